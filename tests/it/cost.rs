//! "Requests are the cost": how many each piece of work may take. On the double, which counts.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::double::{Fault, Object, Options, When};
use crate::support::files::{self, close, noise, sh};
use crate::support::mount::{AWS, Mount, Setup, can_mount};
use crate::support::proxy::{Distance, Proxy};
use crate::support::stage::Stage;
use crate::support::store::Store;

const MIB: usize = 1 << 20;
const BUCKET: &str = "releases";

/// A mount whose start is not counted.
fn counted(options: &[&str], objects: impl IntoIterator<Item = (String, Vec<u8>)>) -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    for (key, bytes) in objects {
        store.put(&key, bytes);
    }
    let stage = Stage::with(store, options);
    stage.double().reset_requests();
    Some(stage)
}

/// "creating 200 files in 60 new directories costs at most one request a file, one a directory and 3 more"
#[test]
fn two_hundred_files_in_sixty_new_directories() {
    let Some(stage) = counted(&[], []) else { return };
    for dir in 0..60 {
        fs::create_dir(stage.path(&format!("d{dir}"))).unwrap();
    }
    for file in 0..200 {
        files::write(&stage.path(&format!("d{}/f{file}", file % 60)), b"content").unwrap();
    }
    let requests = stage.double().requests();
    assert!(requests.total() <= 263, "{:?}", requests.summary());
    assert_eq!(stage.store.keys().len(), 260);
}

/// What is written below a directory says that the directory is there: it is not looked for again while that goes on.
#[test]
fn a_directory_that_is_written_to_is_not_looked_for() {
    let Some(stage) = counted(&["metadata_ttl=3s"], []) else { return };
    sh(stage.dir(), "mkdir -p d/e; for turn in 1 2 3 4 5 6; do echo $turn > d/e/f; sleep 1; done; cat d/e/f");
    let requests = stage.double().requests();
    assert_eq!(requests.of("ListObjectsV2"), 1, "{:?}", requests.summary());
}

/// "`ls -l` of 5,000 keys costs at most 6 requests"
#[test]
fn listing_five_thousand_keys() {
    let Some(stage) = counted(&[], (0..5000).map(|n| (format!("many/file-{n:05}"), b"x".to_vec()))) else { return };
    let listing = sh(stage.dir(), "ls -l many");
    assert_eq!(listing.lines().count(), 5001);
    let requests = stage.double().requests();
    assert!(requests.total() <= 6, "{:?}", requests.summary());
    assert_eq!(requests.of("HeadObject"), 0, "a HEAD per file never happens");
}

/// A directory of any size shows every name, whatever looks at it: more than the table lets a directory keep without a reason.
#[test]
fn no_name_of_a_huge_directory_is_left_out() {
    let Some(stage) = counted(&[], (0..21_000).map(|n| (format!("huge/file-{n:05}"), Vec::new()))) else { return };
    for look in ["ls -f huge", "ls -l huge", "find huge -type f", "ls -l huge"] {
        let names = sh(stage.dir(), look);
        assert_eq!(names.lines().filter(|line| line.contains("file-")).count(), 21_000, "{look}");
    }
}

/// Two hundred files in sixty directories, with their markers.
fn tree() -> Vec<(String, Vec<u8>)> {
    let above = (0..6).map(|n| format!("t/a{n}/")).chain(["t/".to_owned()]);
    let directories = (0..60).map(|n| format!("t/a{}/b{}/", n / 10, n % 10)).chain(above);
    directories
        .map(|key| (key, Vec::new()))
        .chain((0..200).map(|n| (format!("t/a{}/b{}/f{n}", n % 60 / 10, n % 10), noise(n, 5000))))
        .collect()
}

/// Each file is one GET, and of all directories together there are some LISTs.
#[test]
fn reading_a_tree() {
    let Some(stage) = counted(&["metadata_ttl=1m"], tree()) else { return };
    let out = tempfile::tempdir().unwrap();
    sh(stage.dir(), &format!("cp -r t {0}/t && test $(find {0}/t -type f | wc -l) = 200", out.path().display()));
    let requests = stage.double().requests();
    assert_eq!(requests.of("GetObject"), 200, "{:?}", requests.summary());
    assert!(requests.total() <= 208, "{:?}", requests.summary());
}

/// A walk costs a listing a thousand keys, and some at its beginning.
#[test]
fn walking_a_tree() {
    let Some(stage) = counted(&["metadata_ttl=1m"], (0..2000).map(|n| (format!("t/a{}/b{}/f{n}", n % 20, n % 100), b"x".to_vec()))) else {
        return;
    };
    let found = sh(stage.dir(), "find t -type f | wc -l");
    assert_eq!(found.trim(), "2000");
    let requests = stage.double().requests();
    // 122 directories with the root.
    assert!(requests.total() <= 10, "{:?}", requests.summary());
}

/// Promise 7: "Only changed parts travel; the rest is copied inside S3."
#[test]
fn a_small_change_of_a_big_file_moves_little() {
    let Some(stage) = counted(&[], [("big".to_owned(), noise(1, 64 * MIB))]) else { return };
    let file = files::open_existing(&stage.path("big"));
    file.write_all_at(b"changed", 30_000_000).unwrap();
    close(file).unwrap();
    let mut expected = noise(1, 64 * MIB);
    expected[30_000_000..30_000_007].copy_from_slice(b"changed");
    assert!(stage.store.bytes("big") == expected);
    let requests = stage.double().requests();
    assert!(requests.of("UploadPartCopy") > 0, "{:?}", requests.summary());
    let (up, down) = (requests.bytes_up, requests.bytes_down);
    assert!(up < 24 << 20 && down < 24 << 20, "{up} bytes up, {down} bytes down");
}

/// Promise 7: "Opening an existing object for writing without O_TRUNC downloads nothing; a handle that wrote nothing uploads nothing."
#[test]
fn opening_for_writing_moves_nothing() {
    let Some(stage) = counted(&[], [("f".to_owned(), noise(1, 9 * MIB))]) else { return };
    close(files::open_existing(&stage.path("f"))).unwrap();
    let requests = stage.double().requests();
    assert_eq!(requests.of_any(&["GetObject", "PutObject", "CopyObject", "CreateMultipartUpload"]), 0, "{:?}", requests.summary());
}

/// Promise 8: "At publication its spool file becomes its cache file … reading it back costs nothing."
#[test]
fn reading_back_what_was_written_costs_nothing() {
    let Some(stage) = counted(&[], []) else { return };
    let bytes = noise(1, 18 * MIB);
    files::write(&stage.path("f"), &bytes).unwrap();
    stage.double().reset_requests();
    assert!(fs::read(stage.path("f")).unwrap() == bytes);
    let requests = stage.double().requests();
    assert_eq!(requests.of("GetObject"), 0, "{:?}", requests.summary());
    assert!(requests.total() <= 10, "{:?}", requests.summary());
}

/// Promise 17: "A small read costs a small request: ≤ 128 KiB for a 16 KiB sniff, kept."
#[test]
fn a_sniff_is_small_and_kept() {
    let Some(stage) = counted(&[], [("film".to_owned(), noise(1, 32 * MIB))]) else { return };
    for _ in 0..2 {
        let mut head = vec![0; 16 << 10];
        File::open(stage.path("film")).unwrap().read_exact(&mut head).unwrap();
        assert!(head == noise(1, 32 * MIB)[..16 << 10]);
    }
    let requests = stage.double().requests();
    // The XML of a listing or an error counts too.
    assert!(requests.bytes_down <= (128 << 10) + 8192, "{} bytes", requests.bytes_down);
}

/// Promise 17: "Read-ahead only after sequential reads."
#[test]
fn random_reads_fetch_little() {
    let size = 64 * MIB;
    let Some(stage) = counted(&[], [("disk".to_owned(), noise(1, size))]) else { return };
    let expected = noise(1, size);
    let file = File::open(stage.path("disk")).unwrap();
    let mut block = vec![0; 4096];
    for turn in 0..40_usize {
        let at = (turn * 7_368_787) % (size - 4096);
        file.read_exact_at(&mut block, at as u64).unwrap();
        assert!(block == expected[at..at + 4096], "at {at}");
    }
    let requests = stage.double().requests();
    assert!(requests.bytes_down <= 40 * (256 << 10), "{} bytes for 160 KiB", requests.bytes_down);
}

/// Promise 14: "a wholly cached file costs one HEAD", after a remount too.
#[test]
fn a_cached_file_costs_one_head_after_a_remount() {
    let Some(mut stage) = counted(&[], [("f".to_owned(), noise(1, 10 * MIB))]) else { return };
    assert!(fs::read(stage.path("f")).unwrap() == noise(1, 10 * MIB));
    stage.mount.remount();
    stage.double().reset_requests();
    assert!(fs::read(stage.path("f")).unwrap() == noise(1, 10 * MIB));
    let requests = stage.double().requests();
    assert_eq!(requests.of("GetObject"), 0, "{:?}", requests.summary());
}

/// Promise 4: "A FLUSH without new data (dup, fork, readers, placeholders) does nothing."
#[test]
fn flushes_without_data_ask_nothing() {
    let Some(stage) = counted(&[], []) else { return };
    let mut file = File::create(stage.path("f")).unwrap();
    file.write_all(b"x").unwrap();
    close(file.try_clone().unwrap()).unwrap();
    close(file.try_clone().unwrap()).unwrap();
    close(file).unwrap();
    let requests = stage.double().requests();
    assert_eq!(requests.of("PutObject"), 1, "{:?}", requests.summary());
}

/// Promise 3: "Bytes go to S3 while the application writes"
#[test]
fn parts_travel_while_the_application_writes() {
    let Some(stage) = counted(&[], []) else { return };
    let mut file = File::create(stage.path("f")).unwrap();
    file.write_all(&noise(1, 64 * MIB)).unwrap();
    let sent = |stage: &Stage| stage.double().requests().of("UploadPart");
    for _ in 0..100 {
        if sent(&stage) >= 6 {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(sent(&stage) >= 6, "{:?}", stage.double().requests().summary());
    let before_close = sent(&stage);
    close(file).unwrap();
    assert!(sent(&stage) - before_close <= 2, "close() had {} parts to send", sent(&stage) - before_close);
}

/// Promise 3: "ahead of the store by at most one part or one second of the measured rate, whichever is more: a progress bar is honest"
#[test]
fn a_store_that_takes_nothing_holds_the_writer_back() {
    let Some(stage) = counted(&["close_timeout=30s"], []) else { return };
    stage.double().fault(When::operation("UploadPart"), Fault::Error(503, "SlowDown"));
    let (written, bytes) = (AtomicU64::new(0), noise(1, 64 * MIB));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut file = File::create(stage.path("f")).unwrap();
            for piece in bytes.chunks(MIB) {
                file.write_all(piece).unwrap();
                written.fetch_add(1, Ordering::SeqCst);
            }
            close(file).unwrap();
        });
        stage.store.eventually("a part is tried", |_| stage.double().requests().of("UploadPart") > 0);
        // Long enough for all 64 MiB, if nothing held the writer back.
        std::thread::sleep(Duration::from_secs(2));
        // A part that is refused, a part to be ahead by, and what is not a whole part yet.
        assert!(written.load(Ordering::SeqCst) <= 24 && !writer.is_finished(), "{} MiB are written", written.load(Ordering::SeqCst));
        stage.double().clear_faults();
    });
    assert!(stage.store.bytes("f") == bytes);
}

/// Promise 13: "chown, chmod, utimens and ACL xattrs that change nothing cost nothing"; later ones "reach S3 by one coalesced metadata copy".
#[test]
fn metadata_after_close_is_one_copy() {
    let Some(stage) = counted(&[], []) else { return };
    files::write(&stage.path("f"), b"content").unwrap();
    stage.double().reset_requests();
    sh(stage.dir(), "chmod 600 f; touch -d '2001-02-03 04:05:06 UTC' f; chmod 640 f");
    stage.store.eventually("mtime and mode are in the bucket", |store| {
        let metadata = store.get("f").unwrap().metadata;
        metadata.get("mtime").is_some_and(|m| m.starts_with("981173106")) && metadata.get("mode").is_some_and(|m| m == "33184")
    });
    sh(stage.dir(), "chmod 640 f; touch -d '2001-02-03 04:05:06 UTC' f");
    std::thread::sleep(Duration::from_millis(2500));
    let requests = stage.double().requests();
    assert_eq!(requests.of("CopyObject"), 1, "{:?}", requests.summary());
    assert_eq!(requests.of("PutObject"), 0, "{:?}", requests.summary());
}

/// Promise 21: "Names that desktops probe … are absent without a request unless a listing holds them."
#[test]
fn probed_names_cost_nothing() {
    let Some(stage) = counted(&["metadata_ttl=0", "negative_metadata_ttl=0"], []) else { return };
    for name in [".hidden", ".directory", ".sh_thumbnails", ".xdg-volume-info", "autorun.inf", ".Trash", ".Trash-1000"] {
        assert!(!stage.path(name).exists(), "{name}");
    }
    let requests = stage.double().requests();
    assert_eq!(requests.total(), 0, "{:?}", requests.summary());
}

/// A tree's removal is one DELETE an object, and 8 more at most.
#[test]
fn removing_a_tree() {
    let Some(stage) = counted(&["metadata_ttl=1m"], tree()) else { return };
    sh(stage.dir(), "rm -r t");
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    let requests = stage.double().requests();
    assert_eq!(requests.of("DeleteObject"), 267, "{:?}", requests.summary());
    assert!(requests.total() <= 267 + 8, "{:?}", requests.summary());
}

/// On AWS, where a directory is nothing but keys, one without a marker costs nothing: what is asked of AWS comes to the double.
#[test]
fn removing_a_tree_without_markers_on_aws() {
    if !can_mount() {
        return;
    }
    let store = Store::double_with(Options { domain: Some(AWS.to_owned()), ..Options::default() });
    for n in 0..200 {
        store.put(&format!("t/a{}/b{}/f{n}", n % 60 / 10, n % 10), "content");
    }
    let mount = Mount::start(Setup::of(&store).taken_for_aws(&store.endpoint()).option("metadata_ttl=1m"));
    let double = store.as_double().unwrap();
    double.reset_requests();
    sh(mount.dir(), "rm -r t");
    assert_eq!(store.keys(), Vec::<String>::new());
    let requests = double.requests();
    assert_eq!(requests.of("DeleteObject"), 200, "{:?}", requests.summary());
    assert!(requests.total() <= 200 + 8, "{:?}", requests.summary());
}

/// With `write_back`, right after the tree was copied.
#[test]
fn removing_a_tree_later() {
    let Some(stage) = counted(&["write_back=1h", "metadata_ttl=1h"], []) else { return };
    sh(stage.dir(), "for d in $(seq 60); do mkdir -p t/d$d; done; for f in $(seq 200); do echo content > t/d$((f % 60 + 1))/f$f; done");
    stage.mount.ask(&["flush"], stage.dir());
    stage.double().reset_requests();
    sh(stage.dir(), "rm -r t");
    stage.mount.ask(&["flush"], stage.dir());
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    let requests = stage.double().requests();
    assert!(requests.total() <= 12, "{:?}", requests.summary());
}

/// A directory's rename: copies, then deletes in batches.
#[test]
fn renaming_a_tree() {
    let Some(stage) = counted(&[], (0..120).map(|n| (format!("t/d{}/f{n}", n % 3), n.to_string().into_bytes()))) else { return };
    fs::rename(stage.path("t"), stage.path("u")).unwrap();
    let expected: Vec<_> = (0..120).map(|n| format!("u/d{}/f{n}", n % 3)).collect();
    let keys = stage.store.keys();
    for key in &expected {
        assert!(keys.contains(key), "{key} is missing");
    }
    assert!(!keys.iter().any(|key| key.starts_with("t/")), "{keys:?}");
    let requests = stage.double().requests();
    assert_eq!(requests.of("CopyObject"), 120, "{:?}", requests.summary());
    assert!(requests.of("DeleteObject") == 0 && requests.of("DeleteObjects") == 1, "{:?}", requests.summary());
}

/// "one copy an existing object (a marker is PUT anew) + 1 batched delete + 5, listed without delimiter, in parallel"
#[test]
fn renaming_two_hundred_files_in_sixty_directories() {
    let markers = (0..60).map(|n| (format!("t/d{n}/"), Vec::new()));
    let objects = (0..200).map(|n| (format!("t/d{}/f{n}", n % 60), n.to_string().into_bytes()));
    let Some(stage) = counted(&[], markers.chain(objects)) else { return };
    stage.double().fault(When::operation("CopyObject"), Fault::Delay(Duration::from_millis(20)));
    fs::rename(stage.path("t"), stage.path("u")).unwrap();
    let requests = stage.double().requests();
    let (copies, markers, deletes) = (requests.of("CopyObject"), requests.of("PutObject"), requests.of("DeleteObjects"));
    assert_eq!((copies, markers), (200, 60), "{:?}", requests.summary());
    // Whether the bucket has ACLs is outside the counts.
    let acls = requests.of("GetBucketOwnershipControls");
    assert!(deletes == 1 && acls <= 1 && requests.total() - acls <= copies + markers + 1 + 5, "{:?}", requests.summary());
    assert!(requests.peak >= 8, "{} at once", requests.peak);
    assert_eq!(stage.store.keys().iter().filter(|key| key.starts_with("u/d")).count(), 260);
    assert!(!stage.store.keys().iter().any(|key| key.starts_with("t/")));
}

/// A thousand keys a delete. One finds out whether the store compares ETags, and one is of what may be a directory of the store's own.
#[test]
fn renaming_three_thousand_files() {
    let Some(stage) = counted(&[], (0..3000).map(|n| (format!("t/f{n}"), Vec::new()))) else { return };
    fs::rename(stage.path("t"), stage.path("u")).unwrap();
    let requests = stage.double().requests();
    assert_eq!((requests.of("CopyObject"), requests.of("DeleteObjects")), (3000, 3 + 2), "{:?}", requests.summary());
    // The root, the old name, whether the new one is free, the new one again, and once where the first thousand lie.
    assert!(requests.of("ListObjectsV2") <= 1 + 3 + 1 + 3 + 2, "{:?}", requests.summary());
    assert_eq!(stage.store.keys().len(), 3000);
}

/// Far from the store a big file travels over many connections.
#[test]
fn distance_is_met_with_connections() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let bytes = noise(1, 96 * MIB);
    store.as_double().unwrap().put_object(BUCKET, "down", Object::new(bytes.clone()));
    let target = store.endpoint().trim_start_matches("http://").parse().unwrap();
    let distance = Distance { round_trip: Duration::from_millis(20), bandwidth: 20_000_000 };
    let proxy = Proxy::start(target, distance).unwrap();
    let mut setup = Setup::of(&store);
    setup.options = vec![format!("endpoint_url=http://{}", proxy.address())];
    let mount = Mount::start(setup);
    assert!(fs::read(mount.path("down")).unwrap() == bytes);
    let (peak, open) = (proxy.peak_busy(), proxy.peak_open());
    assert!(peak >= 4, "{peak} of {open} connections were busy, {} bytes", proxy.bytes_down());
    files::write(&mount.path("up"), &bytes).unwrap();
    assert!(store.bytes("up") == bytes);
}

const SMALL_FILES: usize = 200;
/// Files that a busy machine keeps waiting for more than a second after the store spoke of them: they are asked for again. How many are
/// fetched at once goes by how fast they are read, too.
const STALLED: usize = 10;

fn small_file(n: usize) -> Vec<u8> {
    noise(n as u64, 30 << 10)
}

/// A folder of small files, listed, at 20 ms.
fn small_files() -> Option<Stage> {
    let stage = counted(&[], (0..SMALL_FILES).map(|n| (format!("d/{n:03}"), small_file(n))))?;
    assert_eq!(files::names(&stage.path("d")).len(), SMALL_FILES);
    stage.double().reset_requests();
    stage.double().fault(When::operation("GetObject"), Fault::Delay(Duration::from_millis(20)));
    Some(stage)
}

fn read_small_file(stage: &Stage, n: usize) {
    assert!(fs::read(stage.path(&format!("d/{n:03}"))).unwrap() == small_file(n), "{n}");
}

/// Promise 14: "A first open of a file listed or fetched within the last second asks nothing more." Who reads small files in the order of
/// their names finds the next ones fetched, many at once, each by one GET.
#[test]
fn small_files_read_in_order_are_fetched_ahead() {
    let Some(stage) = small_files() else { return };
    (0..SMALL_FILES).for_each(|n| read_small_file(&stage, n));
    let requests = stage.double().requests();
    assert_eq!(requests.of("GetObject"), SMALL_FILES, "{:?}", requests.summary());
    assert!(requests.of("HeadObject") <= STALLED, "{:?}", requests.summary());
    assert!(requests.of("ListObjectsV2") <= 2 && requests.peak >= 4, "{:?}, {} at once", requests.summary(), requests.peak);
    // Once more: all of it is here, and that it is still true is asked for ahead.
    std::thread::sleep(Duration::from_millis(1100));
    stage.double().fault(When::operation("HeadObject"), Fault::Delay(Duration::from_millis(20)));
    stage.double().reset_requests();
    (0..SMALL_FILES).for_each(|n| read_small_file(&stage, n));
    let requests = stage.double().requests();
    assert_eq!(requests.of("GetObject"), 0, "{:?}", requests.summary());
    assert!((SMALL_FILES..=SMALL_FILES + STALLED).contains(&requests.of("HeadObject")), "{:?}", requests.summary());
    assert!(requests.peak >= 4, "{} at once", requests.peak);
}

/// Who reads here and there, or stops, has little fetched that nobody reads.
#[test]
fn small_files_read_in_no_order_are_fetched_alone() {
    let Some(stage) = small_files() else { return };
    let somewhere = (0..40).map(|n| n * 73 % SMALL_FILES);
    somewhere.for_each(|n| read_small_file(&stage, n));
    assert_eq!(stage.double().requests().of("GetObject"), 40, "{:?}", stage.double().requests().summary());
    let Some(stage) = small_files() else { return };
    (0..3).for_each(|n| read_small_file(&stage, n));
    std::thread::sleep(Duration::from_millis(200));
    let fetched = stage.double().requests().of("GetObject");
    assert!((4..=3 + 8).contains(&fetched), "{fetched} for 3");
}

/// Promise 14: "Another client's change is seen within `metadata_ttl` (5 s), and at once by open()", of a file too that was fetched ahead.
#[test]
fn what_was_fetched_ahead_is_asked_for_again_later() {
    let Some(stage) = small_files() else { return };
    (0..3).for_each(|n| read_small_file(&stage, n));
    std::thread::sleep(Duration::from_millis(1100));
    stage.store.put("d/003", "theirs");
    assert_eq!(fs::read_to_string(stage.path("d/003")).unwrap(), "theirs");
    read_small_file(&stage, 4);
}
