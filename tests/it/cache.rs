//! `packmule cache`: what is kept of what was read, on this machine.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;

use crate::support::files::{self, noise, output};
use crate::support::mount::can_mount;
use crate::support::stage::Stage;
use crate::support::store::Store;

const MIB: usize = 1 << 20;

/// A mount that has read two objects of 3 MiB whole and the beginning of a third.
fn stage() -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    for (n, name) in ["a", "b", "c"].iter().enumerate() {
        store.put(name, noise(n as u64, 3 * MIB));
    }
    let stage = Stage::new(store);
    assert!(fs::read(stage.path("a")).unwrap() == noise(0, 3 * MIB));
    assert!(fs::read(stage.path("b")).unwrap() == noise(1, 3 * MIB));
    fs::File::open(stage.path("c")).unwrap().read_exact_at(&mut [0; 10], 0).unwrap();
    stage.store.eventually("the sidecars are written", |_| of_kind(&stage, "sums").len() == 3);
    Some(stage)
}

fn cache_dir(stage: &Stage) -> PathBuf {
    stage.mount.home().join("cache/packmule")
}

/// The cache's files that end so.
fn of_kind(stage: &Stage, kind: &str) -> Vec<PathBuf> {
    let below = |dir: &Path| -> Vec<PathBuf> {
        fs::read_dir(dir).map(|items| items.map(|item| item.unwrap().path()).collect()).unwrap_or_default()
    };
    let caches = below(&cache_dir(stage)).into_iter().flat_map(|dir| below(&dir));
    caches.filter(|path| path.extension().is_some_and(|found| found == kind)).collect()
}

fn cache(stage: &Stage, words: &[&str]) -> Output {
    let said = output(stage.mount.command().arg("cache").args(words));
    eprintln!("{words:?}: {said:?}");
    said
}

fn text(said: &Output) -> String {
    String::from_utf8_lossy(&said.stdout).into_owned()
}

/// Turns a byte of the cache file over that holds these bytes.
fn damage(stage: &Stage, content: &[u8]) {
    let files = of_kind(stage, "data");
    let path = files.iter().find(|path| fs::read(path).unwrap() == content).unwrap();
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[!content[MIB]], MIB as u64).unwrap();
}

/// Promise 16: "Bytes from the cache … are checked before a program gets them; what does not hold is fetched again", and can be checked
/// beforehand.
#[test]
fn a_cache_is_shown_checked_and_emptied() {
    let Some(stage) = stage() else { return };
    let dir = stage.dir().to_str().unwrap().to_owned();
    let shown = cache(&stage, &["show", &dir]);
    assert!(shown.status.success() && text(&shown).contains("in 3 files, 2 of them whole"), "{}", text(&shown));
    let checked = cache(&stage, &["check", &dir]);
    assert!(checked.status.success() && text(&checked).contains("6.1 MiB compared: all of it is as it came"), "{}", text(&checked));

    damage(&stage, &noise(1, 3 * MIB));
    let checked = cache(&stage, &["check", &dir]);
    assert!(!checked.status.success() && text(&checked).contains("damaged: s3://releases/b (1 blocks)"), "{}", text(&checked));
    stage.double().reset_requests();
    // Not what the kernel remembers.
    files::sh(stage.dir(), "sync; echo 3 > /proc/sys/vm/drop_caches || true");
    let read = fs::File::open(stage.path("b")).unwrap();
    let mut bytes = vec![0; 3 * MIB];
    read.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == noise(1, 3 * MIB));

    let emptied = cache(&stage, &["empty", &dir]);
    assert!(emptied.status.success() && text(&emptied).contains("in 2 files are gone; the rest is being read"), "{}", text(&emptied));
    drop(read);
    stage.store.eventually("nothing is read", |_| text(&cache(&stage, &["empty", &dir])).contains("in 0 files"));
    assert!(of_kind(&stage, "data").is_empty());
    assert!(fs::read(stage.path("a")).unwrap() == noise(0, 3 * MIB));
}

/// The same of what a mount left that ended, and of nothing at all.
#[test]
fn a_cache_without_a_mount_is_shown_checked_and_emptied() {
    let Some(mut stage) = stage() else { return };
    stage.mount.umount();
    let dir = cache_dir(&stage).to_str().unwrap().to_owned();
    let words = |wish: &'static str| [wish.to_owned(), "--cache-dir".to_owned(), dir.clone()];
    let ask = |stage: &Stage, wish| {
        let words = words(wish);
        cache(stage, &words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    assert!(text(&ask(&stage, "show")).contains("in 3 files, 2 of them whole"));
    damage(&stage, &noise(0, 3 * MIB));
    let checked = ask(&stage, "check");
    assert!(!checked.status.success() && text(&checked).contains("damaged: s3://releases/a (1 blocks)"), "{}", text(&checked));
    assert!(ask(&stage, "check").status.success(), "it is forgotten");
    stage.mount.again();
    stage.double().reset_requests();
    assert!(fs::read(stage.path("a")).unwrap() == noise(0, 3 * MIB));
    assert!(stage.double().requests().bytes_down < MIB as u64, "{}", stage.double().requests().bytes_down);
    stage.mount.umount();
    assert!(text(&ask(&stage, "empty")).contains("in 3 files are gone"));
    assert!(of_kind(&stage, "data").is_empty() && of_kind(&stage, "sums").is_empty());
    assert!(text(&ask(&stage, "show")).contains("in 0 files"));
}

/// A small disk of its own.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        mount(Some("none"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some(format!("size={size}").as_str())).unwrap();
        Self(dir)
    }

    fn free(&self) -> u64 {
        let stat = statvfs(self.0.path()).unwrap();
        stat.blocks_available() * stat.fragment_size()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// "bounded by `cache_size` and `min_free_space`": where others fill the disk the cache makes room, and readers go on.
#[test]
fn the_cache_leaves_min_free_space() {
    const FREE: u64 = 40 << 20;
    if !can_mount() {
        return;
    }
    let (disk, store) = (Disk::new("96m"), Store::double());
    (0..5).for_each(|n| store.put(&format!("{n}"), noise(n, 16 * MIB)));
    let cache = format!("cache_dir={}", disk.0.path().display());
    let stage = Stage::with(store, &[&cache, &format!("min_free_space={FREE}")]);
    let read = |n: u64| assert!(fs::read(stage.path(&n.to_string())).unwrap() == noise(n, 16 * MIB));
    (0..5).for_each(read);
    // What landed last is written before room is made for it, and a moment after it was read.
    let in_bounds = |free: u64| free > FREE - (4 << 20) && free < 60 << 20;
    stage.store.eventually("the cache takes what it may", |_| in_bounds(disk.free()));
    // Open, and read to its end after it was evicted for others.
    let held = fs::File::open(stage.path("0")).unwrap();
    held.read_exact_at(&mut [0; 4096], 0).unwrap();
    fs::write(disk.0.path().join("others"), noise(9, 30 * MIB)).unwrap();
    stage.store.eventually("there is room for others", |_| disk.free() >= FREE);
    (1..5).for_each(read);
    stage.store.eventually("there is room for others again", |_| disk.free() >= FREE);
    let mut whole = vec![0; 16 * MIB];
    held.read_exact_at(&mut whole, 0).unwrap();
    assert!(whole == noise(0, 16 * MIB));
}
