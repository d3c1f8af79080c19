//! `packmule cache pin`: folders that are kept, and read while the store does not answer.

use std::fs;
use std::process::Output;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::support::double::{Fault, Object, When};
use crate::support::files::{self, errno, noise, output};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::Stage;
use crate::support::store::Store;

const MIB: usize = 1 << 20;
/// Longer than a store may be silent, and two looks.
const SOON: Duration = Duration::from_secs(9);

fn cache(mount: &Mount, words: &[&str], path: &str) -> Output {
    let said = output(mount.command().arg("cache").args(words).arg(mount.path(path)));
    eprintln!("{words:?} {path}: {said:?}");
    said
}

fn pin(mount: &Mount, path: &str) -> String {
    let said = cache(mount, &["pin"], path);
    assert!(said.status.success(), "{said:?}");
    String::from_utf8_lossy(&said.stdout).into_owned()
}

fn refusal(mount: &Mount, words: &[&str], path: &str) -> String {
    let said = cache(mount, words, path);
    assert!(!said.status.success() && said.stdout.is_empty(), "{said:?}");
    String::from_utf8_lossy(&said.stderr).into_owned()
}

fn site(store: &Store) {
    store.put("site/index.html", "<p>");
    store.put("site/css/main.css", "p {}");
    store.put("site/setup.exe", noise(1, 9 * MIB));
    store.put("other/f", "f");
}

/// A mount with the site pinned.
fn pinned_site() -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    site(&store);
    let stage = Stage::with(store, &["metadata_ttl=1s"]);
    pin(&stage.mount, "site");
    Some(stage)
}

fn quickly<T>(what: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = what();
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    result
}

/// Everything of the site is there and reads; what is not pinned does not.
fn reads_without_a_store(mount: &Mount, root: &str) {
    let path = |name: &str| mount.path(&format!("{root}{name}"));
    quickly(|| assert_eq!(fs::read(path("site/index.html")).unwrap(), b"<p>"));
    quickly(|| assert_eq!(files::names(&path("site")), ["css", "index.html", "setup.exe"]));
    quickly(|| assert_eq!(files::names(&path("site/css")), ["main.css"]));
    quickly(|| assert_eq!(fs::read(path("site/css/main.css")).unwrap(), b"p {}"));
    quickly(|| assert!(fs::read(path("site/setup.exe")).unwrap() == noise(1, 9 * MIB)));
    quickly(|| assert_eq!(errno(fs::read(path("site/none"))), Errno::ENOENT));
    assert!(mount.status().contains("read from the cache"), "{}", mount.status());
}

/// Refused, or never answered.
fn outage(stage: &Stage, silent: bool) {
    if silent {
        stage.double().fault(When::any(), Fault::Stall(Duration::from_secs(600)));
    } else {
        stage.double().set_down(true);
    }
}

#[test]
fn a_pinned_folder_reads_without_the_store() {
    if !can_mount() {
        return;
    }
    for silent in [false, true] {
        let store = Store::double();
        site(&store);
        let stage = Stage::with(store, &["metadata_ttl=1s"]);
        let said = pin(&stage.mount, "site");
        assert!(said.contains("pinned s3://releases/site/: 3 files, 9.0 MiB, all here"), "{said}");
        stage.double().reset_requests();
        assert!(fs::read(stage.path("site/setup.exe")).unwrap() == noise(1, 9 * MIB));
        assert_eq!(stage.double().requests().of("GetObject"), 0);
        // Nothing is known any more but by the pin.
        std::thread::sleep(Duration::from_secs(2));
        outage(&stage, silent);
        reads_without_a_store(&stage.mount, "");
        let unpinned = quickly(|| {
            let path = stage.path("other/f");
            let asks = std::thread::spawn(move || fs::read(path).map(drop));
            reads_without_a_store(&stage.mount, "");
            asks
        });
        stage.double().put_object("releases", "site/index.html", Object::new("<h1>"));
        stage.double().clear_faults();
        stage.double().set_down(false);
        let _ = unpinned.join();
        stage.store.eventually("the store is asked again", |_| !stage.mount.status().contains("read from the cache"));
        assert_eq!(fs::read(stage.path("site/index.html")).unwrap(), b"<h1>");
        assert_eq!(fs::read(stage.path("other/f")).unwrap(), b"f");
        stage.store.eventually("the new version is kept", |_| stage.mount.status().contains("3 files, 9.0 MiB, all here"));
    }
}

/// "every other open fails by semantics 22": an error and no wrong answer.
#[test]
fn what_is_not_pinned_fails_while_the_store_is_silent() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    site(&store);
    store.put("site2/f", "g");
    let stage = Stage::with(store, &["metadata_ttl=1s", "retries=0"]);
    pin(&stage.mount, "site/css");
    // Read before, so that its bytes are here: but nobody pinned it.
    assert_eq!(fs::read(stage.path("other/f")).unwrap(), b"f");
    std::thread::sleep(Duration::from_secs(2));
    outage(&stage, false);
    quickly(|| assert_eq!(fs::read(stage.path("site/css/main.css")).unwrap(), b"p {}"));
    for name in ["other/f", "site2/f", "site/index.html", "none"] {
        let error = errno(fs::read(stage.path(name)));
        assert!(matches!(error, Errno::ETIMEDOUT | Errno::EHOSTUNREACH), "{name}: {error}");
    }
    quickly(|| assert_eq!(fs::read(stage.path("site/css/main.css")).unwrap(), b"p {}"));
}

#[test]
fn what_this_mount_changed_is_so_without_the_store() {
    let Some(stage) = pinned_site() else { return };
    fs::remove_file(stage.path("site/index.html")).unwrap();
    files::write(&stage.path("site/new"), b"new").unwrap();
    fs::rename(stage.path("site/css/main.css"), stage.path("site/css/other.css")).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    outage(&stage, false);
    assert_eq!(files::names(&stage.path("site")), ["css", "new", "setup.exe"]);
    assert_eq!(files::names(&stage.path("site/css")), ["other.css"]);
    assert_eq!(errno(fs::metadata(stage.path("site/index.html"))), Errno::ENOENT);
    assert_eq!(errno(fs::metadata(stage.path("site/css/main.css"))), Errno::ENOENT);
    assert_eq!(fs::read(stage.path("site/new")).unwrap(), b"new");
    stage.double().set_down(false);
}

#[test]
fn what_is_pinned_is_not_evicted() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    site(&store);
    for n in 0..6 {
        store.put(&format!("many/{n}"), noise(n, 8 * MIB));
    }
    let mut stage = Stage::with(store, &["metadata_ttl=1s", "cache_size=24M"]);
    pin(&stage.mount, "site");
    let reads_all = |stage: &Stage| (0..6).for_each(|n| assert!(fs::read(stage.path(&format!("many/{n}"))).unwrap() == noise(n, 8 * MIB)));
    reads_all(&stage);
    let emptied = cache(&stage.mount, &["empty"], "");
    assert!(emptied.status.success(), "{emptied:?}");
    assert!(stage.mount.status().contains("3 files, 9.0 MiB, all here"), "{}", stage.mount.status());
    // The next mount keeps it, also before it has listed it.
    stage.mount.remount();
    reads_all(&stage);
    stage.store.eventually("it is listed", |_| stage.mount.status().contains("3 files, 9.0 MiB, all here"));
    stage.double().reset_requests();
    assert!(fs::read(stage.path("site/setup.exe")).unwrap() == noise(1, 9 * MIB));
    assert_eq!(stage.double().requests().of("GetObject"), 0);

    let line = refusal(&stage.mount, &["pin"], "many");
    assert!(line.contains("s3://releases/many/: holds 48.0 MiB, and cache_size is 24.0 MiB, of which other pins take 9.0 MiB"), "{line}");
    let line = refusal(&stage.mount, &["unpin"], "many");
    assert!(line.contains("s3://releases/many/: is not pinned"), "{line}");
    let line = refusal(&stage.mount, &["unpin"], "site/css");
    assert!(line.contains("is pinned with s3://releases/site/: unpin that"), "{line}");
    let unpinned = cache(&stage.mount, &["unpin"], "site");
    assert!(unpinned.status.success(), "{unpinned:?}");
    assert!(!stage.mount.status().contains("pinned"), "{}", stage.mount.status());
    assert!(cache(&stage.mount, &["empty"], "").status.success());
    assert!(String::from_utf8_lossy(&cache(&stage.mount, &["show"], "").stdout).contains("in 0 files"));
}

/// A pin that this mount has not listed yet says nothing of its names: no file is a folder, and none is missing.
#[test]
fn a_pin_that_was_never_listed_is_an_error() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    site(&store);
    let mut stage = Stage::with(store, &["metadata_ttl=1s", "retries=0"]);
    pin(&stage.mount, "site");
    stage.mount.umount();
    stage.double().fault(When::operation("ListObjectsV2").key("site/"), Fault::Stall(Duration::from_secs(600)));
    stage.mount.again();
    assert!(stage.mount.status().contains("not listed yet"), "{}", stage.mount.status());
    for name in ["site/index.html", "site/none", "site/none/x"] {
        let error = quickly(|| errno(fs::metadata(stage.path(name))));
        assert!(matches!(error, Errno::ETIMEDOUT | Errno::EHOSTUNREACH), "{name}: {error}");
    }
    stage.double().clear_faults();
    stage.store.eventually("it is listed", |_| stage.mount.status().contains("3 files, 9.0 MiB, all here"));
    assert_eq!(fs::read(stage.path("site/index.html")).unwrap(), b"<p>");
}

/// What was learned since the pin was listed is not forgotten: a folder that was renamed here, a file that others made and this mount saw.
#[test]
fn what_was_seen_since_is_so_without_the_store() {
    let Some(stage) = pinned_site() else { return };
    fs::rename(stage.path("site/css"), stage.path("site/css2")).unwrap();
    stage.store.eventually("the copy is kept", |_| stage.mount.status().contains("3 files, 9.0 MiB, all here"));
    stage.store.put("site/later", "later");
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(fs::read(stage.path("site/later")).unwrap(), b"later");
    assert_eq!(files::names(&stage.path("site")), ["css2", "index.html", "later", "setup.exe"]);
    std::thread::sleep(Duration::from_secs(2));
    outage(&stage, false);
    quickly(|| assert_eq!(files::names(&stage.path("site")), ["css2", "index.html", "later", "setup.exe"]));
    quickly(|| assert_eq!(fs::metadata(stage.path("site/later")).unwrap().len(), 5));
    quickly(|| assert_eq!(fs::read(stage.path("site/css2/main.css")).unwrap(), b"p {}"));
    quickly(|| assert_eq!(errno(fs::metadata(stage.path("site/css"))), Errno::ENOENT));
    stage.double().set_down(false);
}

/// Small files in the order of their names are fetched ahead: not of a store that is silent.
#[test]
fn small_pinned_files_are_read_in_order_without_the_store() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    (0..40).for_each(|n| store.put(&format!("many/{n:02}"), noise(n, 3000)));
    let stage = Stage::with(store, &["metadata_ttl=1s"]);
    pin(&stage.mount, "many");
    std::thread::sleep(Duration::from_secs(2));
    outage(&stage, true);
    quickly(|| (0..40).for_each(|n| assert!(fs::read(stage.path(&format!("many/{n:02}"))).unwrap() == noise(n, 3000))));
}

/// A disk that has no room is not paid for again and again.
#[test]
fn what_finds_no_room_is_not_fetched_again() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    (0..30).for_each(|n| store.put(&format!("many/{n:02}"), noise(n, MIB)));
    let stage = Stage::with(store, &["min_free_space=1000T"]);
    let line = {
        let said = cache(&stage.mount, &["pin"], "many");
        assert!(!said.status.success(), "{said:?}");
        String::from_utf8_lossy(&said.stdout).into_owned()
    };
    assert!(line.contains("cache_dir has no room (min_free_space), or cannot be written"), "{line}");
    let fetched = stage.double().requests().of("GetObject");
    assert!(fetched <= 16, "{fetched} GETs");
    cache(&stage.mount, &["pin"], "many");
    let again = stage.double().requests().of("GetObject") - fetched;
    assert!(again <= 16, "{again} GETs");
}

/// What this mount changes in a pin is kept at once, and is no reason to list all of it anew.
#[test]
fn what_is_changed_in_a_pin_is_kept_without_a_listing() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    (0..10).for_each(|n| store.put(&format!("site/many/{n:04}"), "x"));
    store.put("other/moved", noise(1, MIB));
    let stage = Stage::with(store, &["metadata_ttl=1h"]);
    pin(&stage.mount, "site");
    stage.double().reset_requests();
    let all_here = |what: &str| stage.store.eventually(what, |_| stage.mount.status().contains(&format!("site/: {what}, all here")));
    for n in 1..=8 {
        files::write(&stage.path(&format!("site/new{n}")), b"y").unwrap();
        all_here(&format!("{} files, {} B", 10 + n, 10 + n));
    }
    files::write(&stage.path("site/new1"), b"another").unwrap();
    all_here("18 files, 24 B");
    fs::remove_file(stage.path("site/many/0000")).unwrap();
    all_here("17 files, 23 B");
    // What is not on this machine is fetched, and not evicted.
    fs::rename(stage.path("other/moved"), stage.path("site/moved")).unwrap();
    all_here("18 files, 1.0 MiB");
    assert!(cache(&stage.mount, &["empty"], "").status.success());
    all_here("18 files, 1.0 MiB");
    let listings = stage.double().requests().of("ListObjectsV2");
    assert!(listings < 11, "{listings} for 11 changes");
}

/// One object, and a bucket of a mount of all of them.
#[test]
fn a_file_and_a_bucket_are_pinned() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    site(&store);
    let stage = Stage { mount: Mount::start(Setup::of(&store).source("s3://").option("metadata_ttl=1s")), store };
    let root = format!("{}/", stage.store.bucket());
    let said = pin(&stage.mount, &format!("{root}site/setup.exe"));
    assert!(said.contains("pinned s3://releases/site/setup.exe: 1 files, 9.0 MiB, all here"), "{said}");
    let line = refusal(&stage.mount, &["pin"], "");
    assert!(line.contains("all buckets cannot be pinned at once: name a bucket, a folder or a file"), "{line}");
    std::thread::sleep(Duration::from_secs(2));
    stage.double().set_down(true);
    quickly(|| assert!(fs::read(stage.path(&format!("{root}site/setup.exe"))).unwrap() == noise(1, 9 * MIB)));
    stage.double().set_down(false);
    stage.store.eventually("the store is asked again", |_| !stage.mount.status().contains("read from the cache"));
    pin(&stage.mount, &root);
    std::thread::sleep(Duration::from_secs(2));
    stage.double().set_down(true);
    reads_without_a_store(&stage.mount, &root);
}
