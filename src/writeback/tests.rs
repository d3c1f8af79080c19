#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;

use super::fake::{Fake, OneBucket};
use super::publish::StoreReader;
use super::*;
use crate::s3::{ErrorKind, ObjectHeaders, Source};

pub(super) const MIB: usize = 1 << 20;

pub(super) struct Plain;

impl Hooks for Plain {
    fn headers(&self, _: &str, _: &str) -> ObjectHeaders {
        ObjectHeaders::default()
    }

    fn published(&self, _: &Published) {}

    fn make_room(&self, _: u64) {}
}

pub(super) struct World {
    pub dir: tempfile::TempDir,
    pub store: Arc<Fake>,
}

impl World {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), store: Arc::default() }
    }

    pub fn config(&self) -> SpoolConfig {
        SpoolConfig {
            dir: self.dir.path().into(),
            service: "id".into(),
            bucket: None,
            read_only: false,
            max_size: 1 << 30,
            min_free_space: 0,
            part_size: None,
            max_connections: 16,
            memory_limit: 256 << 20,
            close_timeout: Duration::from_secs(20),
            write_back: Duration::ZERO,
            on_conflict: OnConflict::Keep,
        }
    }

    pub async fn open_with(&self, change: impl FnOnce(&mut SpoolConfig)) -> Writeback {
        let mut config = self.config();
        change(&mut config);
        Writeback::open(config, Arc::new(OneBucket(self.store.clone())), Arc::new(Plain)).await.unwrap()
    }

    pub async fn open(&self) -> Writeback {
        self.open_with(|_| {}).await
    }

    pub fn target(&self, key: &str) -> Target {
        Target { store: self.store.clone(), key: key.into() }
    }

    pub async fn new_file(&self, writeback: &Writeback, key: &str) -> Arc<Staged> {
        writeback.stage(self.target(key), Expect::NewFile, None, Attributes::default()).await.unwrap()
    }

    /// Opens an object that is there, without O_TRUNC.
    pub async fn existing(&self, writeback: &Writeback, key: &str) -> Arc<Staged> {
        let etag = self.store.object(key).unwrap().etag;
        let reader = StoreReader::of(self.store.clone(), key.into(), etag.clone(), None);
        let base = self.base(key, reader);
        writeback.stage(self.target(key), Expect::Version(etag), Some(base), Attributes::default()).await.unwrap()
    }

    /// The object as a base whose bytes come from `reader`.
    pub fn base(&self, key: &str, reader: Arc<dyn BaseReader>) -> Base {
        let object = self.store.object(key).unwrap();
        Base {
            bucket: "bucket".into(),
            key: key.into(),
            etag: object.etag,
            size: object.bytes.len() as u64,
            version_id: None,
            checksum: None,
            reader,
        }
    }

    pub fn bytes(&self, key: &str) -> Bytes {
        self.store.object(key).unwrap().bytes
    }

    pub fn nothing_pending(&self) -> bool {
        self.store.inner.lock().uploads.is_empty()
    }

    pub fn files(&self) -> Vec<String> {
        let dirs = std::fs::read_dir(self.dir.path()).unwrap().flatten().filter(|entry| entry.path().is_dir());
        let names = dirs.flat_map(|dir| {
            std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name().into_string().unwrap()).collect::<Vec<_>>()
        });
        names.filter(|name| !["lock", "identity", "reserve"].contains(&name.as_str())).collect()
    }
}

/// Bytes that differ everywhere.
pub(super) fn pattern(len: usize, seed: u8) -> Bytes {
    (0..len).map(|i| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes()[1] ^ seed).collect::<Vec<_>>().into()
}

pub(super) async fn write_all(staged: &Staged, bytes: &Bytes) {
    let mut at = 0;
    while at < bytes.len() {
        let end = (at + MIB).min(bytes.len());
        staged.write(at as u64, bytes.slice(at..end)).await.unwrap();
        at = end;
    }
}

pub(super) async fn until(what: impl Fn() -> bool) {
    let began = Instant::now();
    while !what() {
        assert!(began.elapsed() < Duration::from_secs(20), "it does not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_file_is_one_put_and_leaves_nothing() {
    let world = World::new();
    let writeback = world.open().await;
    let staged = world.new_file(&writeback, "a").await;
    assert!(staged.is_dirty());
    staged.write(0, Bytes::from_static(b"hello")).await.unwrap();
    assert_eq!(staged.append(Bytes::from_static(b" world")).await.unwrap(), 5);
    assert_eq!(world.files().len(), 2);
    assert!(world.store.object("a").is_none());
    let published = staged.publish().await.unwrap().unwrap();
    assert_eq!((published.size, published.replaced), (11, false));
    assert_eq!(world.bytes("a"), "hello world");
    assert!(!staged.is_dirty());
    staged.publish().await.unwrap().unwrap();
    assert_eq!(world.store.inner.lock().calls, ["Put"]);
    let path = staged.retire().await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), b"hello world");
    assert!(writeback.status().is_empty());
    assert_eq!(world.files().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_travel_while_the_file_is_written_and_a_rewritten_one_again() {
    let world = World::new();
    let writeback = world.open().await;
    let staged = world.new_file(&writeback, "big").await;
    let mut bytes = pattern(30 * MIB + 7, 0).to_vec();
    write_all(&staged, &bytes.clone().into()).await;
    until(|| world.store.count("Part") == 3).await;
    assert!(world.store.object("big").is_none());
    bytes[5] = !bytes[5];
    staged.write(5, Bytes::copy_from_slice(&bytes[5..6])).await.unwrap();
    let published = staged.publish().await.unwrap().unwrap();
    assert_eq!(world.bytes("big"), bytes);
    assert_eq!(published.size, bytes.len() as u64);
    assert_eq!((world.store.count("Part"), world.store.count("Create"), world.store.count("Complete")), (5, 1, 1));
    assert!(world.nothing_pending());
    assert!(staged.retire().await.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_sequential_writer_keeps_many_connections_busy() {
    let world = World::new();
    let writeback = world.open().await;
    // 256 KiB each 3 ms is about 80 MB/s a connection.
    *world.store.chunk_delay.lock() = Duration::from_millis(3);
    *world.store.delay.lock() = Duration::from_millis(20);
    let staged = world.new_file(&writeback, "big").await;
    let chunk = pattern(MIB, 3);
    for index in 0..256u64 {
        staged.write(index * MIB as u64, chunk.clone()).await.unwrap();
    }
    staged.publish().await.unwrap().unwrap();
    let most = world.store.most.load(Relaxed);
    assert!((8..=16).contains(&most), "{most}");
    assert_eq!(world.bytes("big").len(), 256 * MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_changed_travels() {
    let world = World::new();
    let writeback = world.open().await;
    let mut bytes = pattern(256 * MIB, 1).to_vec();
    world.store.put_bytes("o", bytes.clone());
    let staged = world.existing(&writeback, "o").await;
    assert!(!staged.is_dirty());
    let patch = pattern(MIB, 9);
    staged.write(100 * MIB as u64 + 3, patch.clone()).await.unwrap();
    bytes[100 * MIB + 3..101 * MIB + 3].copy_from_slice(&patch);
    assert_eq!(staged.read(100 * MIB as u64, 16).await.unwrap(), bytes[100 * MIB..100 * MIB + 16]);
    staged.publish().await.unwrap().unwrap();
    assert!(world.bytes("o") == bytes);
    let (up, down) = (world.store.up.load(Relaxed), world.store.down.load(Relaxed));
    assert!(up <= 8 << 20 && down <= 8 << 20, "{up} up, {down} down");
    assert!(world.store.count("PartCopy") <= 2 && world.store.count("Part") == 1);
    // The published object is the base of the next change.
    staged.append(patch.clone()).await.unwrap();
    bytes.extend_from_slice(&patch);
    let published = staged.publish().await.unwrap().unwrap();
    assert!(published.replaced && world.bytes("o") == bytes);
    assert!(world.store.up.load(Relaxed) - up == MIB as u64);
    assert_eq!(staged.read(7, 9).await.unwrap(), bytes[7..16]);
    assert!(staged.retire().await.is_none());
    assert!(world.files().is_empty() && world.nothing_pending());
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_and_extended_files_hold_zeros_between() {
    let world = World::new();
    let writeback = world.open().await;
    let mut bytes = pattern(40 * MIB, 2).to_vec();
    world.store.put_bytes("o", bytes.clone());
    let staged = world.existing(&writeback, "o").await;
    staged.truncate(20 * MIB as u64 + 1).await.unwrap();
    staged.truncate(33 * MIB as u64).await.unwrap();
    staged.punch_hole(MIB as u64, 10).await.unwrap();
    bytes.truncate(20 * MIB + 1);
    bytes.resize(33 * MIB, 0);
    bytes[MIB..MIB + 10].fill(0);
    assert!(staged.read(0, 64 * MIB).await.unwrap() == bytes);
    staged.publish().await.unwrap().unwrap();
    assert!(world.bytes("o") == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_parked_and_can_be_retried() {
    let world = World::new();
    let writeback = world.open().await;
    world.store.fail(|op, _| (op == "Complete" || op == "Put").then_some(ErrorKind::AccessDenied));
    for (key, len) in [("small", 10), ("large", 9 * MIB)] {
        let staged = world.new_file(&writeback, key).await;
        write_all(&staged, &pattern(len, 0)).await;
        assert!(matches!(staged.publish().await, Err(Error::S3(error)) if error.kind == ErrorKind::AccessDenied));
        assert!(staged.retire().await.is_none());
    }
    until(|| world.nothing_pending()).await;
    let status = writeback.status();
    assert_eq!(status.len(), 2);
    assert!(status.iter().all(|entry| entry.phase == Phase::Parked && entry.reason.is_some()));
    world.store.heal();
    for entry in &status {
        assert!(writeback.retry(entry.id).await.unwrap());
    }
    until(|| writeback.status().is_empty() && world.files().is_empty()).await;
    assert_eq!(world.bytes("large"), pattern(9 * MIB, 0));
    assert!(!writeback.discard(status[0].id).await);
}

/// Promise 24: "or the same file is copied again"
#[tokio::test(flavor = "multi_thread")]
async fn a_newer_content_supersedes_what_is_parked_and_no_older_one_does() {
    let world = World::new();
    let writeback = world.open_with(|config| config.write_back = Duration::from_millis(10)).await;
    let writeback = &writeback;
    let parked = |count| until(move || writeback.status().iter().filter(|entry| entry.phase == Phase::Parked).count() == count);
    world.store.fail(|op, _| (op == "Put").then_some(ErrorKind::AccessDenied));
    let mut numbers = Vec::new();
    for (count, bytes) in [(1, "first"), (2, "second")] {
        let staged = world.new_file(writeback, "a").await;
        staged.write(0, Bytes::from_static(bytes.as_bytes())).await.unwrap();
        staged.publish().await.unwrap();
        parked(count).await;
        staged.leave();
        numbers.push(staged.id());
    }
    world.store.heal();
    writeback.publish_again(numbers[0]).await.unwrap().unwrap();
    assert_eq!(writeback.status().iter().map(|entry| entry.id).collect::<Vec<_>>(), numbers[1..]);
    let etag = world.store.object("a").unwrap().etag;
    let staged = writeback.stage(world.target("a"), Expect::Version(etag), None, Attributes::default()).await.unwrap();
    staged.write(0, Bytes::from_static(b"third")).await.unwrap();
    staged.publish().await.unwrap();
    until(|| writeback.status().is_empty()).await;
    assert_eq!(world.bytes("a"), "third");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_temporary_name_is_retried_under_its_final_one() {
    let world = World::new();
    let writeback = world.open().await;
    world.store.fail(|op, _| (op == "Part").then_some(ErrorKind::AccessDenied));
    let staged = world.new_file(&writeback, "final.part").await;
    staged.set_held(true, Some(Guess { key: "final".into(), eager: true }));
    write_all(&staged, &pattern(100, 0)).await;
    assert!(staged.publish().await.is_err());
    staged.leave();
    let status = writeback.status();
    assert_eq!((status[0].phase, status[0].held), (Phase::Parked, true));
    world.store.heal();
    let published = writeback.publish_again(status[0].id).await.unwrap().unwrap().unwrap();
    assert_eq!((published.key.as_str(), world.bytes("final")), ("final", pattern(100, 0)));
    until(|| writeback.status().is_empty() && world.files().is_empty() && world.nothing_pending()).await;
    assert!(world.store.object("final.part").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn outages_are_ridden_out_and_end_by_close_timeout() {
    let world = World::new();
    let writeback = world.open_with(|config| config.close_timeout = Duration::from_secs(2)).await;
    let mut failures = 3;
    world.store.fail(move |op, _| {
        failures -= i32::from(op == "Part" && failures > 0);
        (op == "Part" && failures > 0).then_some(ErrorKind::Network)
    });
    let staged = world.new_file(&writeback, "a").await;
    write_all(&staged, &pattern(9 * MIB, 0)).await;
    staged.publish().await.unwrap().unwrap();
    world.store.fail(|_, _| Some(ErrorKind::Network));
    let staged = world.new_file(&writeback, "b").await;
    staged.write(0, Bytes::from_static(b"x")).await.unwrap();
    let began = Instant::now();
    assert!(matches!(staged.publish().await, Err(Error::TimedOut)));
    assert!(began.elapsed() < Duration::from_secs(6));
    assert_eq!(writeback.status()[0].phase, Phase::Parked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_is_held_back_and_let_go_by_close_timeout() {
    let world = World::new();
    let writeback = world.open_with(|config| config.close_timeout = Duration::from_secs(1)).await;
    world.store.fail(|_, _| Some(ErrorKind::Network));
    let staged = world.new_file(&writeback, "a").await;
    let chunk = pattern(MIB, 0);
    for index in 0..64u64 {
        if let Err(error) = staged.write(index * MIB as u64, chunk.clone()).await {
            assert!(matches!(error, Error::TimedOut));
            // One part, and the one that is being filled.
            assert!((8..=16).contains(&index), "{index}");
            assert!(matches!(staged.publish().await, Err(Error::Poisoned)));
            return;
        }
    }
    panic!("the writer ran away");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_refused_for_good_is_told_to_the_writer() {
    let world = World::new();
    let writeback = world.open().await;
    world.store.fail(|op, _| (op == "Part").then_some(ErrorKind::AccessDenied));
    let staged = world.new_file(&writeback, "a").await;
    let mut error = None;
    for index in 0..64u64 {
        error = error.or(staged.write(index * MIB as u64, pattern(MIB, 0)).await.err());
    }
    assert!(matches!(error, Some(Error::S3(error)) if error.kind == ErrorKind::AccessDenied));
    assert!(staged.publish().await.is_err());
    until(|| writeback.status()[0].phase == Phase::Parked && world.nothing_pending()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_are_found_out() {
    let world = World::new();
    let writeback = world.open().await;
    for (op, len) in [("Complete!", 9 * MIB), ("Put!", 5)] {
        let mut lost = false;
        world.store.fail(move |operation, _| (operation == op && !std::mem::replace(&mut lost, true)).then_some(ErrorKind::Network));
        let staged = world.new_file(&writeback, op).await;
        write_all(&staged, &pattern(len, 0)).await;
        assert_eq!(staged.publish().await.unwrap().unwrap().key, op);
        assert_eq!(world.bytes(op), pattern(len, 0));
        staged.retire().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicts_are_kept_beside_or_refused_or_overwritten() {
    for policy in [OnConflict::Keep, OnConflict::Fail, OnConflict::Overwrite] {
        for len in [5, 9 * MIB] {
            let world = World::new();
            let writeback = world.open_with(|config| config.on_conflict = policy).await;
            let staged = world.new_file(&writeback, "d/name.txt").await;
            write_all(&staged, &pattern(len, 0)).await;
            world.store.put_bytes("d/name.txt", "theirs");
            let result = staged.publish().await;
            match policy {
                OnConflict::Keep => {
                    let key = result.unwrap().unwrap().key;
                    assert!(key.starts_with("d/name (conflict of ") && key.ends_with(").txt"), "{key}");
                    assert_eq!((world.bytes("d/name.txt"), world.bytes(&key)), (Bytes::from("theirs"), pattern(len, 0)));
                }
                OnConflict::Fail => assert!(matches!(result, Err(Error::Stale)) && world.bytes("d/name.txt") == "theirs"),
                OnConflict::Overwrite => assert!(result.is_ok() && world.bytes("d/name.txt") == pattern(len, 0)),
            }
            until(|| world.nothing_pending()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exclusive_name_that_was_taken_is_refused_and_a_changed_base_is_stale() {
    let world = World::new();
    let writeback = world.open().await;
    let staged = writeback.stage(world.target("lock"), Expect::Absent, None, Attributes::default()).await.unwrap();
    world.store.put_bytes("lock", "");
    assert!(matches!(staged.publish().await, Err(Error::Exists)));
    world.store.put_bytes("o", pattern(20 * MIB, 0));
    let staged = world.existing(&writeback, "o").await;
    staged.write(3, Bytes::from_static(b"x")).await.unwrap();
    world.store.put_bytes("o", "theirs");
    assert!(matches!(staged.publish().await, Err(Error::Stale)));
    assert_eq!(world.bytes("o"), "theirs");
    assert_eq!(writeback.status().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guessed_name_gets_the_parts_and_the_rename_completes_them() {
    let world = World::new();
    let writeback = world.open().await;
    let staged = world.new_file(&writeback, "f.part").await;
    staged.set_held(true, Some(Guess { key: "f".into(), eager: true }));
    write_all(&staged, &pattern(20 * MIB, 0)).await;
    assert!(staged.publish().await.unwrap().is_none());
    assert_eq!((world.store.count("Part"), world.store.count("Complete")), (3, 0));
    staged.retarget(world.target("f"), Expect::NewFile).await.unwrap();
    staged.set_held(false, None);
    assert_eq!(staged.publish().await.unwrap().unwrap().key, "f");
    assert_eq!((world.store.count("Part"), world.store.count("Complete")), (3, 1));
    // A wrong guess is aborted and sent again.
    let staged = world.new_file(&writeback, "g.part").await;
    staged.set_held(true, Some(Guess { key: "g".into(), eager: true }));
    staged.write(0, Bytes::from_static(b"small")).await.unwrap();
    assert!(staged.publish().await.unwrap().is_none());
    assert_eq!(world.store.count("Create"), 2);
    staged.retarget(world.target("h"), Expect::NewFile).await.unwrap();
    staged.set_held(false, None);
    staged.publish().await.unwrap().unwrap();
    assert_eq!(world.bytes("h"), "small");
    until(|| world.nothing_pending()).await;
    assert!(world.store.object("g").is_none() && world.store.object("f.part").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_goes_on_during_publication_tears_nothing() {
    let world = World::new();
    let writeback = world.open().await;
    *world.store.chunk_delay.lock() = Duration::from_millis(1);
    let staged = world.new_file(&writeback, "t").await;
    write_all(&staged, &pattern(24 * MIB, 0)).await;
    let publisher = tokio::spawn({
        let staged = staged.clone();
        async move { staged.publish().await }
    });
    for round in 1..40u64 {
        staged.write((round * 7 % 24) * MIB as u64, pattern(MIB, 1)).await.unwrap();
        staged.append(Bytes::from_static(b"tail")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    publisher.await.unwrap().unwrap();
    staged.publish().await.unwrap().unwrap();
    let size = staged.size() as usize;
    assert!(staged.read(0, size).await.unwrap() == world.bytes("t"));
    assert!(!staged.is_dirty() && world.nothing_pending());
}

#[tokio::test(flavor = "multi_thread")]
async fn discarded_files_leave_no_trace() {
    let world = World::new();
    let writeback = world.open().await;
    let staged = world.new_file(&writeback, "a").await;
    write_all(&staged, &pattern(17 * MIB, 0)).await;
    staged.discard().await;
    assert!(matches!(staged.publish().await, Err(Error::Discarded)));
    until(|| world.nothing_pending()).await;
    assert!(world.files().is_empty() && writeback.status().is_empty() && world.store.object("a").is_none());
}

#[tokio::test]
async fn transfers_hold_no_more_than_their_share_of_the_memory() {
    let world = World::new();
    let writeback = world.open_with(|config| (config.memory_limit, config.write_back) = (32 << 20, Duration::from_secs(3600))).await;
    let staged = world.new_file(&writeback, "f").await;
    write_all(&staged, &pattern(MIB, 1)).await;
    let entry = writeback.shared.entry(staged.id()).unwrap();
    let mut bodies: Vec<_> =
        (0..33).map(|_| transfer::SpoolSource::new(&entry, body::Body::local(&entry.file), 0..MIB as u64).open()).collect();
    let mut held = Vec::new();
    for body in &mut bodies[..32] {
        held.push(body.next().await.unwrap().unwrap());
    }
    assert!(tokio::time::timeout(Duration::from_millis(200), bodies[32].next()).await.is_err(), "more than 8 MiB are held");
    held.pop();
    assert_eq!(bodies[32].next().await.unwrap().unwrap(), pattern(MIB, 1).slice(..256 << 10));
}
