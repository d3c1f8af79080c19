//! Power cuts: at any change of the spool's disk, what was not fsynced is lost, in part or altogether.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::disk::{Change, Disk, Watch};
use super::fake::{Fake, OneBucket};
use super::tests::{MIB, Plain, World, pattern, until, write_all};
use super::*;
use crate::s3::ChecksumKind;

/// What may happen to a file's bytes between two fsyncs.
#[derive(Clone)]
enum Edit {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Punch(u64, u64),
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Edit::Write(at, new) => {
                let end = *at as usize + new.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[*at as usize..end].copy_from_slice(new);
            }
            Edit::SetLen(len) => bytes.resize(*len as usize, 0),
            Edit::Punch(at, len) => {
                let (start, end) = (bytes.len().min(*at as usize), bytes.len().min((at + len) as usize));
                bytes[start..end].fill(0);
            }
        }
    }
}

#[derive(Clone, Default)]
struct Inode {
    durable: Vec<u8>,
    pending: Vec<Edit>,
}

/// What may happen to a directory between two fsyncs.
#[derive(Clone)]
enum Naming {
    Link(PathBuf, usize),
    Unlink(PathBuf),
    MakeDir(PathBuf),
    Rename(PathBuf, PathBuf, usize),
}

/// A disk as POSIX describes it: what is durable, and what is not yet.
#[derive(Clone, Default)]
struct Model {
    inodes: Vec<Inode>,
    /// Names as programs see them.
    names: BTreeMap<PathBuf, usize>,
    durable: BTreeMap<PathBuf, Option<usize>>,
    pending: BTreeMap<PathBuf, Vec<Naming>>,
}

impl Model {
    fn name(&mut self, path: &Path, naming: Naming) {
        self.pending.entry(path.parent().unwrap().to_owned()).or_default().push(naming);
    }

    fn edit(&mut self, path: &Path, edit: Edit) {
        let inode = self.names[path];
        self.inodes[inode].pending.push(edit);
    }

    fn apply(&mut self, change: &Change<'_>) {
        match *change {
            Change::MakeDir(path) => self.name(path, Naming::MakeDir(path.to_owned())),
            Change::Create(path) => match self.names.get(path) {
                Some(&inode) => self.inodes[inode].pending.push(Edit::SetLen(0)),
                None => {
                    self.inodes.push(Inode::default());
                    self.names.insert(path.to_owned(), self.inodes.len() - 1);
                    self.name(path, Naming::Link(path.to_owned(), self.inodes.len() - 1));
                }
            },
            Change::Write { path, at, bytes } => self.edit(path, Edit::Write(at, bytes.to_vec())),
            Change::SetLen { path, len } => self.edit(path, Edit::SetLen(len)),
            Change::Punch { path, at, len } => self.edit(path, Edit::Punch(at, len)),
            Change::Sync(path) => {
                let inode = &mut self.inodes[self.names[path]];
                for edit in std::mem::take(&mut inode.pending) {
                    edit.apply(&mut inode.durable);
                }
            }
            Change::SyncDir(dir) => {
                for naming in self.pending.remove(dir).unwrap_or_default() {
                    self.make_durable(naming);
                }
            }
            Change::Link { from, to } => {
                let inode = self.names[from];
                self.names.insert(to.to_owned(), inode);
                self.name(to, Naming::Link(to.to_owned(), inode));
            }
            Change::Rename { from, to } => {
                let inode = self.names.remove(from).unwrap();
                self.names.insert(to.to_owned(), inode);
                self.name(to, Naming::Rename(from.to_owned(), to.to_owned(), inode));
            }
            Change::Remove(path) => {
                self.names.remove(path);
                self.name(path, Naming::Unlink(path.to_owned()));
            }
        }
    }

    fn make_durable(&mut self, naming: Naming) {
        match naming {
            Naming::Link(path, inode) => drop(self.durable.insert(path, Some(inode))),
            Naming::MakeDir(path) => drop(self.durable.insert(path, None)),
            Naming::Unlink(path) => drop(self.durable.remove(&path)),
            Naming::Rename(from, to, inode) => {
                self.durable.remove(&from);
                self.durable.insert(to, Some(inode));
            }
        }
    }

    /// What is on the disk when the power comes back, below `to` instead of below `from`. Of what was not fsynced nothing is
    /// left, or of each directory's names the first so many, and of each file's writes any.
    fn after_the_cut(mut self, from: &Path, to: &Path, rng: &mut SmallRng) {
        let spares = rng.random_bool(0.6);
        for (_, namings) in std::mem::take(&mut self.pending) {
            let kept = if spares { rng.random_range(0..=namings.len()) } else { 0 };
            for naming in namings.into_iter().take(kept) {
                self.make_durable(naming);
            }
        }
        let all = std::mem::take(&mut self.durable);
        for (path, inode) in all {
            let place = to.join(path.strip_prefix(from).unwrap());
            let Some(inode) = inode else {
                std::fs::create_dir_all(place).unwrap();
                continue;
            };
            let Inode { durable: mut bytes, pending } = self.inodes[inode].clone();
            for edit in pending.iter().filter(|_| spares && rng.random_bool(0.5)) {
                edit.apply(&mut bytes);
            }
            // A name whose directory was lost is lost with it.
            if place.parent().unwrap().is_dir() {
                std::fs::write(place, bytes).unwrap();
            }
        }
    }
}

/// What the program told the application.
#[derive(Clone, Debug)]
enum Told {
    /// A new content is being written under the key.
    Begins(&'static str),
    /// close() is about to be called.
    Closing(&'static str, Bytes),
    /// close() returned.
    Closed(&'static str, Bytes),
    /// fsync() returned.
    Synced(&'static str, Bytes),
    /// The file was renamed.
    Moving(&'static str, &'static str),
    Moved(&'static str, &'static str),
    /// The file is being unlinked; it was.
    Removing(&'static str),
    Removed(&'static str),
}

/// The moment of the cut.
struct Cut {
    model: Model,
    store: Fake,
    told: Vec<Told>,
}

struct Watcher {
    inner: Mutex<Watched>,
    store: Arc<Fake>,
    told: Mutex<Vec<Told>>,
    at: usize,
}

#[derive(Default)]
struct Watched {
    model: Model,
    changes: usize,
    cut: Option<Cut>,
}

impl Watch for Watcher {
    fn change(&self, change: &Change<'_>) -> io::Result<()> {
        let mut inner = self.inner.lock();
        inner.changes += 1;
        if inner.changes == self.at {
            // Whoever comes to the disk waits for the lock, so nothing that depends on a later change is in the picture.
            inner.cut = Some(Cut { model: inner.model.clone(), store: self.store.snapshot(), told: self.told.lock().clone() });
        }
        inner.model.apply(change);
        Ok(())
    }
}

const KEYS: [&str; 3] = ["a", "b", "c"];

/// Bytes that differ from one chunk to the next.
fn many(len: usize, seed: u8) -> Vec<u8> {
    let few = pattern(65_521, seed);
    few.iter().copied().cycle().take(len).collect()
}

/// Some files' lives, at random.
async fn live(world: &World, writeback: &Writeback, told: &Watcher, rng: &mut SmallRng) {
    let tell = |what| told.told.lock().push(what);
    let mut names: Vec<&'static str> = KEYS.to_vec();
    for (round, key) in KEYS.into_iter().enumerate() {
        let mut key = key;
        tell(Told::Begins(key));
        let staged = world.new_file(writeback, key).await;
        let len = if rng.random_bool(0.25) { 6 * MIB } else { rng.random_range(1..40_000) };
        let mut content = Vec::new();
        for step in 0..rng.random_range(1..4usize) {
            let bytes = many(len, (round * 7 + step) as u8);
            let at = if step == 0 { 0 } else { rng.random_range(0..=content.len()) };
            content.resize(content.len().max(at + bytes.len()), 0);
            content[at..at + bytes.len()].copy_from_slice(&bytes);
            tell(Told::Begins(key));
            for (index, chunk) in bytes.chunks(MIB).enumerate() {
                staged.write((at + index * MIB) as u64, Bytes::copy_from_slice(chunk)).await.unwrap();
            }
            let whole = Bytes::from(content.clone());
            if rng.random_bool(0.4) {
                staged.sync().await.unwrap();
                tell(Told::Synced(key, whole.clone()));
            }
            if rng.random_bool(0.6) {
                tell(Told::Closing(key, whole.clone()));
                if staged.publish().await.is_ok() {
                    tell(Told::Closed(key, whole));
                }
            }
        }
        if rng.random_bool(0.3) && staged.is_dirty() {
            let to = ["x", "y", "z"][round];
            tell(Told::Moving(key, to));
            staged.retarget(world.target(to), Expect::NewFile).await.unwrap();
            tell(Told::Moved(key, to));
            names[round] = to;
            key = to;
        }
        if rng.random_bool(0.2) && staged.is_dirty() {
            tell(Told::Removing(key));
            staged.discard().await;
            tell(Told::Removed(key));
        } else if rng.random_bool(0.5) {
            let _ = staged.retire().await;
        }
        if rng.random_bool(0.3) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What must be true of one name after the cut.
#[derive(Clone, Debug, Default)]
struct Owed {
    /// Contents that may be in S3: every close that began.
    attempts: Vec<Bytes>,
    /// The newest that is in S3 or queued for it.
    closed: Option<Bytes>,
    /// What is in the spool, in S3, or queued.
    synced: Option<Bytes>,
    /// Nothing may be there.
    removed: bool,
    /// A rename was under way.
    between: bool,
}

fn owed(told: &[Told]) -> BTreeMap<&'static str, Owed> {
    let mut all: BTreeMap<&'static str, Owed> = BTreeMap::new();
    for what in told.iter().cloned() {
        match what {
            Told::Begins(key) => {
                let owed = all.entry(key).or_default();
                (owed.closed, owed.synced) = (None, None);
            }
            Told::Closing(key, bytes) => all.entry(key).or_default().attempts.push(bytes),
            Told::Closed(key, bytes) => all.entry(key).or_default().closed = Some(bytes),
            Told::Synced(key, bytes) => all.entry(key).or_default().synced = Some(bytes),
            Told::Moving(from, to) => {
                let mut owed = all.get(from).cloned().unwrap_or_default();
                owed.between = true;
                all.insert(to, owed.clone());
                all.insert(from, owed);
            }
            Told::Moved(from, to) => {
                let mut owed = all.remove(from).unwrap_or_default();
                owed.between = false;
                // It may have been published under the old name before the rename, or while it was renamed.
                all.insert(from, Owed { attempts: owed.attempts.clone(), ..Owed::default() });
                all.insert(to, owed);
            }
            Told::Removing(key) => {
                let owed = all.entry(key).or_default();
                (owed.closed, owed.synced) = (None, None);
            }
            Told::Removed(key) => all.entry(key).or_default().removed = true,
        }
    }
    all
}

/// One life, cut short at the disk's change number `at`. False where there were fewer.
fn cut_at(seed: u64, at: usize) -> bool {
    let mut rng = SmallRng::seed_from_u64(seed);
    let world = World::new();
    let delay = [Duration::ZERO, Duration::from_millis(30), Duration::from_secs(60)][rng.random_range(0..3)];
    let watcher = Arc::new(Watcher { inner: Mutex::default(), store: world.store.clone(), told: Mutex::default(), at });
    watcher.inner.lock().model.durable.insert(world.dir.path().to_owned(), None);
    let open = |world: &World, disk: Disk, write_back| {
        let config = SpoolConfig { write_back, part_size: Some(5 << 20), ..world.config() };
        Writeback::open_on(disk, config, Arc::new(OneBucket(world.store.clone())), Arc::new(Plain))
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let writeback = open(&world, Disk::watched("before", watcher.clone()), delay).await.unwrap();
        live(&world, &writeback, &watcher, &mut rng).await;
    });
    runtime.shutdown_timeout(Duration::from_secs(10));
    empty(&world.store);
    watcher.told.lock().clear();
    let Watched { cut, .. } = std::mem::take(&mut *watcher.inner.lock());
    let Some(Cut { model, store, told }) = cut else { return false };
    let after = World { dir: tempfile::tempdir().unwrap(), store: Arc::new(store) };
    model.after_the_cut(world.dir.path(), after.dir.path(), &mut rng);
    let owed = owed(&told);
    // Removing a file that is written to again leaves the object of its last close: unlinking that is another layer's matter.
    let there: Vec<String> = after.store.inner.lock().objects.keys().cloned().collect();
    let scene = format!("seed {seed}, change {at}, write_back {delay:?}: {}", story(&told));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let writeback = open(&after, Disk::default(), Duration::ZERO).await.unwrap();
        writeback.drain(Duration::from_secs(20)).await;
        until(|| after.nothing_pending()).await;
        for (key, object) in &after.store.inner.lock().objects {
            let owed = owed.get(key.as_str()).cloned().unwrap_or_default();
            assert!(owed.attempts.contains(&object.bytes), "{scene}: {key} holds {} bytes that nobody closed", object.bytes.len());
        }
        for (key, owed) in owed {
            let object = after.store.object(key).map(|object| object.bytes);
            if owed.removed {
                let was_there = there.iter().any(|there| there == key);
                assert!(
                    (object.is_none() || was_there) && writeback.status().iter().all(|entry| entry.key != key),
                    "{scene}: {key} came back"
                );
            }
            if owed.between {
                continue;
            }
            if let Some(closed) = &owed.closed {
                assert_eq!(object.as_ref().map(Bytes::len), Some(closed.len()), "{scene}: {key} was closed and is not in S3");
                assert!(object.as_ref() == Some(closed), "{scene}: {key} is not what was closed");
            }
            if let Some(synced) = &owed.synced
                && object.as_ref() != Some(synced)
            {
                let entry = writeback.status().into_iter().find(|entry| entry.key == key);
                let entry = entry.unwrap_or_else(|| panic!("{scene}: {key} was fsynced and is nowhere"));
                assert!(entry.recovered && entry.size == synced.len() as u64, "{scene}: {entry:?}");
                let staged = Staged::new(writeback.shared.entry(entry.id).unwrap());
                assert!(staged.read(0, synced.len()).await.unwrap() == *synced, "{scene}: {key} is not what was fsynced");
            }
        }
    });
    empty(&after.store);
    true
}

/// Entries and the mount that they are of hold each other, the disk and the store: what these hold would last as long as all of the
/// tests.
fn empty(store: &Fake) {
    let mut inner = store.inner.lock();
    inner.objects.clear();
    inner.uploads.clear();
}

fn story(told: &[Told]) -> String {
    let line = |what: &Told| match what {
        Told::Closing(key, bytes) => format!("closing {key} of {}", bytes.len()),
        Told::Closed(key, bytes) => format!("closed {key} of {}", bytes.len()),
        Told::Synced(key, bytes) => format!("synced {key} of {}", bytes.len()),
        other => format!("{other:?}"),
    };
    told.iter().map(line).collect::<Vec<_>>().join(", ")
}

/// A disk that others fill: it takes no bytes of files, and records only once the reserve of the spool was given up.
struct Full {
    spool: PathBuf,
    full: AtomicBool,
}

impl Watch for Full {
    fn change(&self, change: &Change<'_>) -> io::Result<()> {
        let (Change::Create(path) | Change::Write { path, .. } | Change::SetLen { path, .. }) = change else { return Ok(()) };
        let mut folders = std::fs::read_dir(&self.spool)?.flatten();
        let lacks =
            path.extension().is_some_and(|extension| extension == "data") || folders.any(|folder| folder.path().join("reserve").exists());
        if lacks && self.full.load(Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_others_fill_refuses_writes_and_fails_no_close() {
    for (len, write_back) in [(100, Duration::ZERO), (20 * MIB, Duration::ZERO), (100, Duration::from_secs(60))] {
        let world = World::new();
        let disk = Arc::new(Full { spool: world.dir.path().to_owned(), full: AtomicBool::new(false) });
        let config = SpoolConfig { write_back, ..world.config() };
        let account = Arc::new(OneBucket(world.store.clone()));
        let writeback = Writeback::open_on(Disk::watched("boot", disk.clone()), config, account, Arc::new(Plain)).await.unwrap();
        let (staged, other) = (world.new_file(&writeback, "a").await, world.new_file(&writeback, "b").await);
        write_all(&staged, &pattern(len, 0)).await;
        disk.full.store(true, Relaxed);
        assert!(matches!(other.write(0, pattern(100, 1)).await, Err(Error::NoSpace)), "{len}");
        staged.publish().await.unwrap();
        disk.full.store(false, Relaxed);
        writeback.drain(Duration::from_secs(10)).await;
        assert!(world.bytes("a") == pattern(len, 0), "{len}");
        assert!(world.store.object("b").is_none());
    }
}

/// Objects of which 10 bytes at an offset are changed: each needs bytes of its base to be published.
const CHANGED: [(usize, usize); 3] = [(MIB / 2, 100), (3 * MIB, 2 * MIB), (64 * MIB, 30 * MIB)];

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_others_fill_fails_no_close_of_a_changed_object() {
    let kinds = [ChecksumKind::Off, ChecksumKind::Md5, ChecksumKind::Crc32c, ChecksumKind::Crc64Nvme];
    let delays = [Duration::ZERO, Duration::from_secs(60)];
    let cases = kinds.into_iter().flat_map(|kind| CHANGED.map(|change| (kind, change)));
    for ((kind, (len, at)), write_back) in cases.zip(delays.into_iter().cycle()) {
        let world = World::new();
        *world.store.kind.lock() = kind;
        let mut expected = pattern(len, 0).to_vec();
        world.store.put_bytes("o", expected.clone());
        let disk = Arc::new(Full { spool: world.dir.path().to_owned(), full: AtomicBool::new(false) });
        let config = SpoolConfig { write_back, ..world.config() };
        let account = Arc::new(OneBucket(world.store.clone()));
        let writeback = Writeback::open_on(Disk::watched("boot", disk.clone()), config, account, Arc::new(Plain)).await.unwrap();
        let staged = world.existing(&writeback, "o").await;
        staged.write(at as u64, pattern(10, 7)).await.unwrap();
        expected[at..at + 10].copy_from_slice(&pattern(10, 7));
        disk.full.store(true, Relaxed);
        staged.publish().await.unwrap();
        let left = writeback.drain(Duration::from_secs(10)).await.left;
        assert!(left.is_empty() && world.bytes("o") == expected, "{kind:?}, {len}: {left:?}");
        assert!(world.store.up.load(Relaxed) <= 5 * MIB as u64 + 10, "{kind:?}, {len}: more than the changed part travelled");
        assert!(staged.read(0, len).await.unwrap() == expected, "{kind:?}, {len}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_base_of_a_changed_object_does_not_outgrow_the_spool() {
    for (len, at) in CHANGED {
        let world = World::new();
        let mut expected = pattern(len, 0).to_vec();
        world.store.put_bytes("o", expected.clone());
        let writeback = world.open_with(|config| config.max_size = 100_000).await;
        let staged = world.existing(&writeback, "o").await;
        staged.write(at as u64, pattern(10, 7)).await.unwrap();
        expected[at..at + 10].copy_from_slice(&pattern(10, 7));
        staged.publish().await.unwrap().unwrap();
        assert!(world.bytes("o") == expected);
        let held = writeback.shared.entry(staged.id()).unwrap().content.lock().local.total();
        assert!(held <= 100_000, "{len}: the spool holds {held} bytes");
    }
}

#[test]
fn whatever_is_cut_off_what_was_promised_is_kept() {
    let lives: u64 = if std::env::var_os("PACKMULE_TORTURE").is_some_and(|value| value != "0") { 100 } else { 5 };
    let mut cuts = 0;
    for seed in 0..lives {
        let mut rng = SmallRng::seed_from_u64(seed ^ 0xc0ffee);
        let mut at = rng.random_range(1..8);
        while cut_at(seed, at) {
            cuts += 1;
            at += rng.random_range(1..12);
        }
    }
    eprintln!("power cut, promises kept: {cuts}");
    assert!(cuts as u64 > lives, "{cuts} cuts in {lives} lives");
}
