//! What a mount tells of itself, and what one needs: promises 6, 23 and 24, and its memory.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use crate::support::double::{Fault, When};
use crate::support::files::{self, noise};
use crate::support::mount::{Mount, can_mount};
use crate::support::stage::Stage;
use crate::support::store::Store;

/// Promise 6: "A file never closed before a crash is kept and listed by `packmule status` (not in its directory), and never published by
/// itself."
/// Promise 5: "fsync makes the bytes durable in the spool, listed and recoverable."
/// Promise 26: "what fsync() promised is in the spool"
#[test]
fn a_file_never_closed_is_kept_and_listed() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new(Store::double());
    let open = File::create(stage.path("unfinished")).unwrap();
    open.write_all_at(b"never closed", 0).unwrap();
    open.sync_all().unwrap();
    stage.mount.crash();
    drop(open);
    stage.mount.again();
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
    let status = stage.mount.ask(&["status", "--json"], stage.dir());
    assert!(status.contains("unfinished"), "{status}");
    // "what cannot be finished is said": nobody waits for it.
    stage.mount.umount_leaving("unfinished");
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    assert!(files::holds(&stage.mount.home().join("state"), b"never closed"), "the bytes are in no file of the state directory");
}

/// Promise 25: "`packmule umount` … wait for the work": what is being written is not cut off, umount says that it is busy.
#[test]
fn a_mount_that_is_written_to_is_busy() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new(Store::double());
    let open = File::create(stage.path("being written")).unwrap();
    open.write_all_at(b"first ", 0).unwrap();
    let said = files::output(stage.mount.command().arg("umount").arg(stage.dir()));
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(!said.status.success() && text.contains("busy") && text.contains("being written") && text.lines().count() == 1, "{text}");
    open.write_all_at(b"second", 6).unwrap();
    files::close(open).unwrap();
    stage.mount.umount_by_command();
    assert_eq!(stage.store.bytes("being written"), "first second");
}

/// Promise 24: "parked, named with its reason … or superseded by a new copy"; and one file's failure is no other's.
#[test]
fn a_refused_file_is_parked_and_superseded() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().fault(When::operation("PutObject").key("bad"), Fault::Error(403, "AccessDenied"));
    assert!(files::write(&stage.path("bad"), b"refused").is_err());
    files::write(&stage.path("good"), b"taken").unwrap();
    assert_eq!(stage.store.keys(), ["good"]);
    let status = stage.mount.status();
    assert!(status.contains("bad") && status.contains("AccessDenied"), "{status}");
    stage.double().clear_faults();
    files::write(&stage.path("bad"), b"copied again").unwrap();
    assert_eq!(stage.store.bytes("bad"), "copied again");
    let status = stage.mount.status();
    assert!(!status.contains("parked") && status.contains("everything is in S3"), "{status}");
}

fn told(stage: &Stage) -> serde_json::Value {
    let told: serde_json::Value = serde_json::from_str(&stage.mount.ask(&["status", "--json"], stage.dir())).unwrap();
    told[0].clone()
}

/// Requests by kind and bytes are those that the store counts, and what they cost follows the prices that were given.
#[test]
fn requests_and_their_cost_are_told() {
    if !can_mount() {
        return;
    }
    let prices = ["price_put=1000", "price_get=10", "price_out=1073741824", "currency=eur"];
    let stage = Stage::with(Store::double(), &prices);
    stage.store.put("theirs", noise(1, 300_000));
    files::write(&stage.path("ours"), &noise(2, 200_000)).unwrap();
    assert_eq!(fs::read(stage.path("theirs")).unwrap().len(), 300_000);
    fs::remove_file(stage.path("theirs")).unwrap();
    let told = told(&stage);
    let seen = stage.double().requests();
    assert_eq!(told["requests"], serde_json::to_value(seen.summary()).unwrap());
    assert!(seen.of("PutObject") == 1 && seen.of("GetObject") >= 1 && seen.of("DeleteObject") == 1, "{:?}", seen.summary());
    assert_eq!((told["bytes_sent"].as_u64(), told["bytes_received"].as_u64()), (Some(seen.bytes_up), Some(seen.bytes_down)));
    assert!(seen.bytes_up == 200_000 && seen.bytes_down >= 300_000, "{} up, {} down", seen.bytes_up, seen.bytes_down);
    let dear = seen.of_any(&["PutObject", "ListObjectsV2"]) as f64;
    let cheap = (seen.total() - seen.of_any(&["PutObject", "ListObjectsV2", "DeleteObject"])) as f64;
    let cost = &told["cost"];
    assert!((cost["requests"].as_f64().unwrap() - dear - cheap / 100.0).abs() < 1e-6, "{cost}: {:?}", seen.summary());
    assert!((cost["out"].as_f64().unwrap() - seen.bytes_down as f64).abs() < 1e-3, "{cost}");
    let status = stage.mount.status();
    assert!(status.contains(&format!("  requests since the mount: {} (", seen.total())) && status.contains("PutObject 1"), "{status}");
    assert!(status.contains("; sent 195.3 KiB, received ") && status.contains("  cost since the mount: about "), "{status}");
    assert!(status.contains(&format!("{}.0000 EUR; prices as configured)", seen.bytes_down)), "{status}");
}

/// Asks until `seen` finds what it looks for in what the mount tells of itself.
fn until<T>(stage: &Stage, what: &str, seen: impl Fn(&serde_json::Value) -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let told = told(stage);
        match seen(&told) {
            Some(found) => return found,
            None => assert!(Instant::now() < until, "{what}: {told}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Promise 23: "The whole story, with the S3 request id, is in status"; and what moves says how fast it does and how long still.
#[test]
fn what_moves_says_how_fast_and_how_long_still() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::with(Store::double(), &["write_back=100ms", "bwlimit=2M"]);
    let content = noise(1, 9 << 20);
    files::write(&stage.path("going up"), &content).unwrap();
    let upload = until(&stage, "an upload with its speed", |told| {
        let upload = told["uploads"][0].clone();
        (upload["speed"].as_u64() > Some(0) && upload["eta_seconds"].is_u64()).then_some(upload)
    });
    assert_eq!((upload["key"].as_str(), upload["size"].as_u64()), (Some("going up"), Some(9 << 20)));
    let path = stage.path("going up");
    let shown = stage.mount.ask(&["status"], &path);
    let word = xattr(&path, "user.packmule.status");
    assert!(shown.starts_with(&format!("{}: {word}\n", path.display())) && word == "not uploaded yet", "{word}: {shown}");
    assert!(shown.contains("/going up\n") && shown.contains("/s"), "{shown}");
    let file: serde_json::Value = serde_json::from_str(&stage.mount.ask(&["status", "--json"], &path)).unwrap();
    assert_eq!((file["word"].as_str(), file["uploads"][0]["id"].as_u64()), (Some("not uploaded yet"), upload["id"].as_u64()));
    stage.mount.ask(&["flush"], &path);
    assert_eq!(stage.mount.ask(&["status"], &path).lines().next(), Some(format!("{}: published", path.display()).as_str()));

    stage.store.put("coming down", content.clone());
    stage.mount.remount();
    let (path, expected) = (stage.path("coming down"), content);
    let reader = std::thread::spawn(move || fs::read(path).unwrap() == expected);
    let download = until(&stage, "a download with its speed", |told| {
        let download = told["downloads"][0].clone();
        (download["speed"].as_u64() > Some(0) && download["here"].as_u64() > Some(0) && download["eta_seconds"].is_u64())
            .then_some(download)
    });
    assert_eq!((download["key"].as_str(), download["size"].as_u64()), (Some("coming down"), Some(9 << 20)));
    // `bwlimit` holds in both directions: what nobody paces comes from this machine's own loopback a hundred times as fast.
    assert!(download["speed"].as_u64() < Some(8 << 20), "{download}");
    assert!(reader.join().unwrap());
    // A folder, and the mountpoint, are the mount's.
    assert!(stage.mount.ask(&["status"], stage.dir()).contains("everything is in S3"));
    let nowhere = files::output(stage.mount.command().arg("status").arg(stage.path("nowhere")));
    let said = String::from_utf8_lossy(&nowhere.stderr).into_owned();
    assert!(nowhere.status.code() == Some(1) && said.contains("nowhere") && said.lines().count() == 1, "{said}");
}

fn xattr(path: &std::path::Path, name: &str) -> String {
    let said = files::output(std::process::Command::new("getfattr").args(["--only-values", "-n", name]).arg(path));
    String::from_utf8(said.stdout).unwrap()
}

/// A mount whose process stands still keeps nobody who asks about a file of it.
#[test]
fn a_mount_that_hangs_is_said_to() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    files::write(&stage.path("f"), b"x").unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(stage.mount.pid()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    // The mountpoint itself: a path below it cannot be looked at.
    let said = files::output(stage.mount.command().arg("status").arg(stage.dir()));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.code() == Some(1) && text.contains("hangs"), "{text}");
}

/// What the store refused is told with its request id, a row of one kind as one; what was only asked for and is not there is no failure.
#[test]
fn the_last_errors_have_their_request_ids() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    assert!(fs::metadata(stage.path("not there")).is_err());
    assert_eq!(told(&stage)["errors"], serde_json::json!([]));
    stage.double().fault(When::operation("PutObject").key("bad"), Fault::Error(403, "AccessDenied"));
    for _ in 0..2 {
        assert!(files::write(&stage.path("bad"), b"refused").is_err());
    }
    let told = told(&stage);
    let error = &told["errors"][0];
    assert_eq!(
        (error["operation"].as_str(), error["code"].as_str(), error["status"].as_u64()),
        (Some("PutObject"), Some("AccessDenied"), Some(403)),
        "{told}"
    );
    assert_eq!((error["request_id"].as_str(), error["count"].as_u64()), (Some("FAULT0000000001"), Some(2)), "{told}");
    let shown = stage.mount.status();
    assert!(shown.contains("  failed: PutObject s3://") && shown.contains("(request id FAULT0000000001)  2 times\n"), "{shown}");
    // One that could not be stored is in no folder, and is found by its name.
    let parked = stage.mount.ask(&["status"], &stage.path("bad"));
    assert!(parked.starts_with(&format!("{}: parked\n", stage.path("bad").display())) && parked.contains("packmule retry"), "{parked}");
}

/// Nobody knows what a store asks that is not AWS: nothing is guessed, and what to set is said.
#[test]
fn a_store_without_known_prices_has_no_estimate() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["price_out=0.01"]);
    assert_eq!(told(&stage)["cost"], serde_json::Value::Null);
    let line = format!("  cost: no prices are known for {}: set price_put, price_get and price_out\n", stage.store.endpoint());
    let status = stage.mount.status();
    assert!(status.contains(&line), "{status}");
}

/// "memory is bounded by `memory_limit` whatever the file size"
#[test]
fn memory_stays_bounded() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["memory_limit=64M"]);
    let piece = noise(1, 16 << 20);
    let file = File::create(stage.path("big")).unwrap();
    for turn in 0..16 {
        file.write_all_at(&piece, turn * (16 << 20)).unwrap();
    }
    files::close(file).unwrap();
    let other = Mount::start(crate::support::mount::Setup::of(&stage.store).option("memory_limit=64M"));
    let mut read = File::open(other.path("big")).unwrap();
    let copied = std::io::copy(&mut read, &mut std::io::sink()).unwrap();
    assert_eq!(copied, 256 << 20);
    for mount in [&stage.mount, &other] {
        assert!(mount.peak_memory() < 64 << 20, "{} KiB", mount.peak_memory() >> 10);
    }
}

/// The same of readers of what was never read here: what a mount holds is less than `memory_limit`, itself included.
#[test]
fn cold_readers_stay_within_memory_limit() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    (0..64).for_each(|n| store.put(&format!("f{n}"), noise(n, 12 << 20)));
    for (limit, readers) in [(64, 4), (64, 16), (256, 4), (256, 64)] {
        let mount = Mount::start(crate::support::mount::Setup::of(&store).option(&format!("memory_limit={limit}M")));
        let idle = mount.peak_memory() >> 10;
        std::thread::scope(|scope| {
            for n in 0..readers {
                let mount = &mount;
                scope.spawn(move || {
                    let mut read = File::open(mount.path(&format!("f{n}"))).unwrap();
                    assert_eq!(std::io::copy(&mut read, &mut std::io::sink()).unwrap(), 12 << 20);
                });
            }
        });
        let peak = mount.peak_memory() >> 10;
        eprintln!("memory_limit={limit}M: {readers} readers: {} MiB, idle {}", peak >> 10, idle >> 10);
        assert!(peak < limit << 10, "memory_limit={limit}M, {readers} readers: {peak} KiB, idle {idle} KiB");
    }
}

/// The same of many files at once over many connections, sent at once or queued, and read back by another machine.
#[test]
fn memory_stays_bounded_whatever_is_copied_at_once() {
    const FILES: u64 = 6;
    if !can_mount() {
        return;
    }
    for options in [&["memory_limit=64M", "max_connections=256"][..], &["memory_limit=64M", "max_connections=256", "write_back=1h"]] {
        let stage = Stage::with(Store::double(), options);
        let piece = noise(1, 4 << 20);
        std::thread::scope(|scope| {
            for n in 0..FILES {
                let (stage, piece) = (&stage, &piece);
                scope.spawn(move || {
                    let file = File::create(stage.path(&format!("f{n}"))).unwrap();
                    (0..16).for_each(|turn| file.write_all_at(piece, turn * (4 << 20)).unwrap());
                    files::close(file).unwrap();
                });
            }
        });
        stage.mount.ask(&["flush"], stage.dir());
        let words = options.iter().fold(crate::support::mount::Setup::of(&stage.store), |setup, word| setup.option(word));
        let other = Mount::start(words);
        std::thread::scope(|scope| {
            for n in 0..FILES {
                let other = &other;
                scope.spawn(move || {
                    let mut read = File::open(other.path(&format!("f{n}"))).unwrap();
                    assert_eq!(std::io::copy(&mut read, &mut std::io::sink()).unwrap(), 64 << 20);
                });
            }
        });
        for (mount, does) in [(&stage.mount, "writes"), (&other, "reads")] {
            let peak = mount.peak_memory() >> 10;
            eprintln!("{options:?} {does}: {} MiB", peak >> 10);
            assert!(peak < 64 << 10, "{options:?} {does}: {peak} KiB");
        }
    }
}
