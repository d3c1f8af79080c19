//! What survives a crash, what waits, and what is coalesced.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::tests::{MIB, World, pattern, until, write_all};
use super::*;
use crate::s3::{ChecksumKind, ErrorKind};

/// Runs `life`, ends everything that it left running, and gives a world whose spool is what was on disk then: the
/// dead process's locks are not copied.
pub(super) fn crash<F: Future<Output = ()>>(world: World, life: impl FnOnce(Arc<World>) -> F) -> World {
    let world = Arc::new(world);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(life(world.clone()));
    runtime.shutdown_timeout(Duration::from_secs(5));
    let next = tempfile::tempdir().unwrap();
    for dir in std::fs::read_dir(world.dir.path()).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        let copy = next.path().join(dir.file_name());
        std::fs::create_dir(&copy).unwrap();
        for file in std::fs::read_dir(dir.path()).unwrap().flatten() {
            std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
        }
    }
    world.store.heal();
    world.store.inner.lock().calls.clear();
    World { dir: next, store: world.store.clone() }
}

pub(super) fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(test);
}

#[test]
fn a_file_never_closed_is_kept_listed_and_its_upload_aborted() {
    let world = crash(World::new(), |world| async move {
        let writeback = world.open().await;
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(20 * MIB, 0)).await;
        staged.sync().await.unwrap();
        until(|| world.store.count("Part") == 2).await;
    });
    assert!(!world.nothing_pending());
    run(async {
        let writeback = world.open().await;
        until(|| world.nothing_pending()).await;
        let status = writeback.status();
        assert_eq!((status.len(), status[0].phase, status[0].size), (1, Phase::Writing, 20 * MIB as u64));
        assert!(status[0].recovered && world.store.object("a").is_none());
        assert!(writeback.retry(status[0].id).await.unwrap());
        until(|| world.store.object("a").is_some()).await;
        assert!(world.bytes("a") == pattern(20 * MIB, 0));
        until(|| world.files().is_empty()).await;
    });
}

#[test]
fn what_write_back_promised_is_published_after_a_crash() {
    let world = crash(World::new(), |world| async move {
        let writeback = world.open_with(|config| config.write_back = Duration::from_secs(60)).await;
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(100, 0)).await;
        assert!(staged.publish().await.unwrap().is_none());
        assert_eq!(writeback.status()[0].phase, Phase::Sealed);
    });
    assert!(world.store.object("a").is_none());
    run(async {
        let writeback = world.open().await;
        until(|| world.store.object("a").is_some() && world.files().is_empty()).await;
        assert_eq!(world.bytes("a"), pattern(100, 0));
        assert!(writeback.status().is_empty());
    });
}

#[test]
fn what_is_written_after_the_promise_is_not_published_torn() {
    let world = crash(World::new(), |world| async move {
        let writeback = world.open_with(|config| config.write_back = Duration::from_millis(200)).await;
        let staged = world.new_file(&writeback, "a").await;
        staged.write(0, pattern(100, 0)).await.unwrap();
        staged.publish().await.unwrap();
        staged.write(50, pattern(100, 1)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(400)).await;
    });
    run(async {
        let writeback = world.open().await;
        writeback.drain(Duration::from_secs(1)).await;
        assert_eq!(writeback.status()[0].phase, Phase::Writing);
        assert!(world.store.object("a").is_none());
    });
}

#[test]
fn an_interrupted_upload_goes_on_with_the_parts_that_arrived() {
    let world = crash(World::new(), |world| async move {
        let writeback = world.open().await;
        world.store.fail(|op, _| (op == "Complete").then_some(ErrorKind::Network));
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(30 * MIB, 0)).await;
        let publication = tokio::spawn(async move { staged.publish().await });
        until(|| world.store.count("Complete") > 0).await;
        publication.abort();
    });
    run(async {
        let writeback = world.open().await;
        until(|| world.store.object("a").is_some() && world.files().is_empty()).await;
        assert!(world.bytes("a") == pattern(30 * MIB, 0));
        assert_eq!((world.store.count("ListParts"), world.store.count("Part"), world.store.count("Create")), (1, 0, 0));
        assert!(world.nothing_pending() && writeback.status().is_empty());
    });
}

#[test]
fn a_drain_waits_until_the_store_was_asked_what_it_has() {
    let world = crash(World::new(), |world| async move {
        let writeback = world.open().await;
        world.store.fail(|op, _| (op == "Complete").then_some(ErrorKind::Network));
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(20 * MIB, 0)).await;
        let publication = tokio::spawn(async move { staged.publish().await });
        until(|| world.store.count("Complete") > 0).await;
        publication.abort();
    });
    run(async {
        *world.store.delay.lock() = Duration::from_millis(200);
        let writeback = world.open().await;
        // It would send everything anew, and leave one of the two uploads behind.
        writeback.drain(Duration::from_secs(10)).await;
        assert!(world.bytes("a") == pattern(20 * MIB, 0));
        until(|| world.nothing_pending()).await;
        assert_eq!((world.store.count("ListParts"), world.store.count("Part"), world.store.count("Create")), (1, 0, 0));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_closed_again_while_its_upload_ends_is_published_too() {
    let world = World::new();
    let writeback = world.open_with(|config| config.write_back = Duration::from_millis(50)).await;
    let staged = world.new_file(&writeback, "a").await;
    write_all(&staged, &pattern(20 * MIB, 0)).await;
    staged.publish().await.unwrap();
    until(|| world.store.count("Part") == 3).await;
    *world.store.delay.lock() = Duration::from_millis(500);
    until(|| writeback.status().iter().any(|entry| entry.phase == Phase::Completing)).await;
    staged.append(Bytes::from_static(b"tail")).await.unwrap();
    staged.publish().await.unwrap();
    // Nobody asks for it again.
    until(|| world.store.object("a").is_some_and(|object| object.bytes.ends_with(b"tail"))).await;
    until(|| writeback.status().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_be_had_again_gives_way() {
    struct Asked(std::sync::atomic::AtomicU64);

    impl Hooks for Asked {
        fn headers(&self, _: &str, _: &str) -> ObjectHeaders {
            ObjectHeaders::default()
        }

        fn published(&self, _: &Published) {}

        fn make_room(&self, bytes: u64) {
            self.0.fetch_max(bytes, Relaxed);
        }
    }

    let world = World::new();
    let hooks = Arc::new(Asked(0.into()));
    let full = SpoolConfig { min_free_space: u64::MAX, ..world.config() };
    let writeback = Writeback::open(full, Arc::new(super::fake::OneBucket(world.store.clone())), hooks.clone()).await.unwrap();
    let staged = world.new_file(&writeback, "a").await;
    assert!(matches!(staged.write(0, pattern(1000, 0)).await, Err(Error::NoSpace)));
    // A block for the bytes, and one for the record.
    assert_eq!(hooks.0.load(Relaxed), 2 * 4096);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_checksum_is_sent_of_every_size() {
    let kinds = [ChecksumKind::Off, ChecksumKind::Md5, ChecksumKind::Crc32c, ChecksumKind::Crc64Nvme];
    for (kind, len) in kinds.into_iter().flat_map(|kind| [100, 3 * MIB, 20 * MIB].map(|len| (kind, len))) {
        let world = World::new();
        *world.store.kind.lock() = kind;
        let writeback = world.open().await;
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(len, 0)).await;
        let published = tokio::time::timeout(Duration::from_secs(20), staged.publish()).await;
        assert!(published.is_ok_and(|published| published.is_ok()), "{kind:?}, {len}");
        assert!(world.bytes("a") == pattern(len, 0), "{kind:?}, {len}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_disk_changed_is_never_published() {
    let kinds = [ChecksumKind::Crc64Nvme, ChecksumKind::Md5, ChecksumKind::Crc32c];
    for (kind, len) in kinds.into_iter().flat_map(|kind| [100, 3 * MIB, 20 * MIB].map(|len| (kind, len))) {
        let world = World::new();
        *world.store.kind.lock() = kind;
        let writeback = world.open_with(|config| config.write_back = Duration::from_secs(60)).await;
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(len, 0)).await;
        staged.publish().await.unwrap();
        let folder = std::fs::read_dir(world.dir.path()).unwrap().flatten().find(|entry| entry.path().is_dir()).unwrap();
        let spooled = std::fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.path());
        let spooled = spooled.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "data")).unwrap();
        let disk = std::fs::OpenOptions::new().read(true).write(true).open(&spooled).unwrap();
        let (mut byte, at) = ([0], len as u64 / 2);
        std::os::unix::fs::FileExt::read_exact_at(&disk, &mut byte, at).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&disk, &[byte[0] ^ 1], at).unwrap();
        let left = writeback.drain(Duration::from_secs(10)).await.left;
        let [parked] = &left[..] else { panic!("{len}: {left:?}") };
        assert_eq!(parked.phase, Phase::Parked, "{len}: {parked:?}");
        assert!(parked.reason.as_ref().is_some_and(|reason| reason.contains("changed bytes")), "{len}: {parked:?}");
        assert!(world.store.object("a").is_none(), "{len}: published all the same");
        until(|| world.nothing_pending()).await;
    }
}

#[test]
fn what_was_fsynced_after_a_publication_is_kept_too() {
    let world = crash(World::new(), |world| async move {
        let writeback = world.open().await;
        let staged = world.new_file(&writeback, "a").await;
        staged.write(0, Bytes::from_static(b"old")).await.unwrap();
        staged.publish().await.unwrap();
        staged.write(0, Bytes::from_static(b"newer")).await.unwrap();
        staged.sync().await.unwrap();
    });
    run(async {
        let writeback = world.open().await;
        let status = writeback.status();
        assert_eq!((status.len(), status[0].phase, status[0].size), (1, Phase::Writing, 5), "{status:?}");
        assert!(writeback.retry(status[0].id).await.unwrap());
        until(|| world.bytes("a") == "newer").await;
    });
}

/// Promise 9: "past that it returns 0 with the file queued"
#[test]
fn what_is_queued_past_close_timeout_is_on_disk_before_that_is_said() {
    let world = crash(World::new(), |world| async move {
        let writeback = world.open_with(|config| config.close_timeout = Duration::from_millis(100)).await;
        world.store.fail(|op, _| (op == "Put").then_some(ErrorKind::Network));
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(100, 0)).await;
        assert!(matches!(staged.publish().await, Err(Error::TimedOut)));
        assert!(writeback.retry(staged.id()).await.unwrap());
        let record = manifest::Record::load(&writeback.shared.spool.record(staged.id())).unwrap();
        assert_eq!((record.phase, record.durable, record.held), (Phase::Sealed, true, false));
    });
    world.store.heal();
    run(async {
        let _writeback = world.open().await;
        until(|| world.store.object("a").is_some() && world.files().is_empty()).await;
        assert_eq!(world.bytes("a"), pattern(100, 0));
    });
}

/// Promise 26: "uploads that nobody needs are aborted"
#[test]
fn an_upload_is_on_record_until_its_abort_is_answered() {
    let aborts = |world: &World| world.files().iter().filter(|name| name.ends_with(".abort")).count();
    let world = crash(World::new(), |world| async move {
        let writeback = world.open().await;
        world.store.fail(|op, _| match op {
            "Complete" => Some(ErrorKind::AccessDenied),
            "Abort" => Some(ErrorKind::Network),
            _ => None,
        });
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(20 * MIB, 0)).await;
        assert!(staged.publish().await.is_err());
        assert_eq!(aborts(&world), 1, "before anybody hears that it is parked");
        until(|| world.store.count("Abort") > 0).await;
    });
    // The store is still away when the next mount tries.
    let world = crash(world, |world| async move {
        world.store.fail(|op, _| (op == "Abort").then_some(ErrorKind::Network));
        let writeback = world.open().await;
        until(|| world.store.count("Abort") > 0).await;
        assert_eq!(writeback.status()[0].phase, Phase::Parked);
        assert_eq!(aborts(&world), 1);
        // What is thrown away leaves it behind too.
        assert!(writeback.discard(writeback.status()[0].id).await);
    });
    assert!(!world.nothing_pending());
    world.store.heal();
    run(async {
        let _writeback = world.open().await;
        until(|| world.nothing_pending() && world.files().is_empty()).await;
    });
}

#[test]
fn a_completed_upload_whose_answer_was_lost_is_recognised() {
    let world = crash(World::new(), |world| async move {
        let writeback = world.open().await;
        world.store.put_bytes("a", pattern(30 * MIB, 1));
        let staged = world.existing(&writeback, "a").await;
        staged.write(0, pattern(6 * MIB, 5)).await.unwrap();
        world.store.fail(|op, _| (op == "Complete!" || op == "Head").then_some(ErrorKind::Network));
        let publication = tokio::spawn(async move { staged.publish().await });
        until(|| world.store.count("Complete") > 0).await;
        publication.abort();
    });
    run(async {
        let writeback = world.open().await;
        until(|| world.files().is_empty()).await;
        assert_eq!(world.bytes("a")[..6 * MIB], pattern(6 * MIB, 5));
        assert_eq!((world.store.count("Part"), world.store.count("Complete"), world.store.count("Put")), (0, 0, 0));
        assert!(writeback.status().is_empty());
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn with_write_back_rewrites_and_renames_make_one_upload() {
    let world = World::new();
    let writeback = world.open_with(|config| config.write_back = Duration::from_secs(60)).await;
    let staged = world.new_file(&writeback, "a").await;
    for round in 0..3 {
        staged.write(0, pattern(20 * MIB, round)).await.unwrap();
        assert!(staged.publish().await.unwrap().is_none());
    }
    staged.retarget(world.target("b"), Expect::NewFile).await.unwrap();
    assert!(staged.retire().await.is_none());
    assert!(world.store.inner.lock().calls.is_empty());
    let report = writeback.drain(Duration::from_secs(10)).await;
    assert_eq!((report.published, report.left.len()), (1, 0));
    assert!(world.bytes("b") == pattern(20 * MIB, 2) && world.store.object("a").is_none());
    until(|| world.files().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_file_is_published_later_unless_it_changes() {
    let world = World::new();
    let writeback = world.open().await;
    let empty = world.new_file(&writeback, "empty").await;
    empty.publish_later(Duration::from_millis(50)).await.unwrap();
    let filled = world.new_file(&writeback, "filled").await;
    filled.publish_later(Duration::from_millis(50)).await.unwrap();
    filled.write(0, Bytes::from_static(b"x")).await.unwrap();
    until(|| world.store.object("empty").is_some()).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(world.store.object("filled").is_none());
    filled.publish().await.unwrap().unwrap();
    assert_eq!(world.bytes("filled"), "x");
}

/// Metadata for a key that holds what was published.
fn change(key: &str, published: &Published, attributes: Attributes) -> MetadataChange {
    let Published { bucket, etag, size, last_modified, .. } = published.clone();
    MetadataChange { bucket, key: key.into(), etag, size, last_modified, attributes }
}

#[test]
fn metadata_that_waits_outlives_the_process() {
    let world = crash(World::new(), |world| async move {
        let first = world.open().await;
        let staged = world.new_file(&first, "a").await;
        staged.write(0, Bytes::from_static(b"x")).await.unwrap();
        let published = staged.publish().await.unwrap().unwrap();
        let mut attributes = Attributes::default();
        for mtime in ["1", "2"] {
            attributes.metadata.insert("mtime".into(), mtime.into());
            first.update_metadata(world.target("a").store, change("a", &published, attributes.clone()), Box::new(|_| {}));
            first.metadata_recorded("bucket", "a").await;
        }
        // The runtime ends before the copy is due.
    });
    run(async {
        let writeback = world.open().await;
        let mut found = writeback.unsent_metadata().await;
        assert_eq!((found.len(), found[0].what.attributes.metadata["mtime"].as_str()), (1, "2"));
        let change = found[0].what.clone();
        writeback.update_metadata(world.target("a").store, change, Box::new(|_| {}));
        writeback.metadata_recorded("bucket", "a").await;
        found.remove(0).forget().await;
        writeback.drain(Duration::from_secs(5)).await;
        assert_eq!(world.store.object("a").unwrap().metadata["mtime"], "2");
        assert!(world.files().iter().all(|file| !file.ends_with("metadata")), "what was sent is forgotten");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_set_during_a_copy_that_hangs_is_recorded_at_once() {
    let world = World::new();
    let writeback = world.open().await;
    let staged = world.new_file(&writeback, "a").await;
    staged.write(0, Bytes::from_static(b"x")).await.unwrap();
    let published = staged.publish().await.unwrap().unwrap();
    *world.store.delay.lock() = Duration::from_secs(600);
    let set = |mtime: &str| {
        let mut attributes = Attributes::default();
        attributes.metadata.insert("mtime".into(), mtime.into());
        writeback.update_metadata(world.target("a").store, change("a", &published, attributes), Box::new(|_| {}));
    };
    set("1");
    // It is due after a second, and waits for the store from then on.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    set("2");
    tokio::time::timeout(Duration::from_secs(10), writeback.metadata_recorded("bucket", "a")).await.unwrap();
    assert_eq!(writeback.take_metadata("bucket", "a").unwrap().metadata["mtime"], "2");
}

#[test]
fn a_published_file_whose_process_died_before_close_returned_is_not_left_over() {
    let world = crash(World::new(), |world| async move {
        let writeback = world.open().await;
        for (key, theirs) in [("same", "0123456789"), ("other", "012345678X"), ("none", "")] {
            let staged = world.new_file(&writeback, key).await;
            staged.write(0, Bytes::from_static(b"01234")).await.unwrap();
            staged.write(5, Bytes::from_static(b"56789")).await.unwrap();
            if !theirs.is_empty() {
                world.store.put_bytes(key, theirs);
            }
        }
    });
    run(async {
        let writeback = world.open().await;
        until(|| writeback.status().len() == 2).await;
        let status = writeback.status();
        assert!(status.iter().all(|entry| entry.key != "same" && entry.size == 10 && entry.phase == Phase::Writing), "{status:?}");
        assert_eq!((world.bytes("same"), world.bytes("other")), (Bytes::from("0123456789"), Bytes::from("012345678X")));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_deleted_object_was_changed_into_is_created() {
    for (len, cached) in [(5, true), (20 * MIB, true), (20 * MIB, false)] {
        let world = World::new();
        let writeback = world.open().await;
        world.store.put_bytes("o", pattern(len, 0));
        let staged = world.existing(&writeback, "o").await;
        if cached {
            // As the cache has them: without asking the store.
            staged.rebase(&world.store.object("o").unwrap().etag, world.base("o", Arc::new(InMemory(pattern(len, 0)))));
        }
        staged.write(1, Bytes::from_static(b"x")).await.unwrap();
        world.store.inner.lock().objects.remove("o");
        let result = staged.publish().await;
        let mut expected = pattern(len, 0).to_vec();
        expected[1] = b'x';
        match cached {
            true => assert!(result.unwrap().is_some() && world.bytes("o") == expected),
            // Bytes that nobody has any more are not made up.
            false => assert!(matches!(result, Err(Error::BaseGone)) && world.store.object("o").is_none()),
        }
        until(|| world.nothing_pending()).await;
    }
}

/// Base bytes that are at hand.
struct InMemory(Bytes);

#[async_trait]
impl BaseReader for InMemory {
    async fn read(&self, offset: u64, len: usize, _until: u64) -> Result<Bytes, BaseError> {
        Ok(self.0.slice(offset as usize..(offset as usize + len).min(self.0.len())))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_is_copied_once_and_the_file_follows() {
    let world = World::new();
    let writeback = world.open().await;
    let staged = world.new_file(&writeback, "a").await;
    staged.write(0, Bytes::from_static(b"x")).await.unwrap();
    let published = staged.publish().await.unwrap().unwrap();
    let done = Arc::new(AtomicUsize::new(0));
    for mtime in ["1", "2", "3"] {
        let mut attributes = Attributes::default();
        attributes.metadata.insert("mtime".into(), mtime.into());
        let done = done.clone();
        let on_done = Box::new(move |outcome: Result<PutOutcome, S3Error>| {
            assert!(outcome.is_ok());
            done.fetch_add(1, Relaxed);
        });
        writeback.update_metadata(world.target("a").store, change("a", &published, attributes), on_done);
    }
    // Before the drain: what is queued after one hurries, and may be on its way already.
    writeback.update_metadata(world.target("b").store, change("b", &published, Attributes::default()), Box::new(|_| {}));
    assert_eq!(writeback.cancel_metadata("bucket", "b").await, Some(Attributes::default()));
    writeback.drain(Duration::from_secs(5)).await;
    assert_eq!((done.load(Relaxed), world.store.count("Copy")), (1, 1));
    assert_eq!(world.store.object("a").unwrap().metadata["mtime"], "3");
    // The copy's ETag is the one that the next publication is conditional on.
    staged.write(1, Bytes::from_static(b"y")).await.unwrap();
    assert_eq!(staged.publish().await.unwrap().unwrap().key, "a");
    assert_eq!(world.bytes("a"), "xy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_waits_for_uploads_and_refuses_else() {
    let world = World::new();
    let writeback = world.open_with(|config| config.max_size = 10 * MIB as u64).await;
    let staged = world.new_file(&writeback, "a").await;
    staged.write(0, pattern(6 * MIB, 0)).await.unwrap();
    let other = world.new_file(&writeback, "b").await;
    assert!(matches!(other.write(0, pattern(6 * MIB, 0)).await, Err(Error::NoSpace)));
    assert!(matches!(other.publish().await, Err(Error::Poisoned)));
    *world.store.delay.lock() = Duration::from_millis(300);
    let publication = tokio::spawn(async move {
        staged.publish().await.unwrap();
        staged.discard().await;
    });
    until(|| writeback.status().iter().any(|entry| entry.phase == Phase::Sealed)).await;
    let began = Instant::now();
    let third = world.new_file(&writeback, "c").await;
    third.write(0, pattern(6 * MIB, 0)).await.unwrap();
    assert!(began.elapsed() > Duration::from_millis(100));
    publication.await.unwrap();
}
