//! How files are read: a byte, here and there, backwards, a window every MiB, many small ones, many at once, and again.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::measure::{Pattern, Report, Rounds, Row};
use crate::target::{PACKMULE, Target};
use crate::{Arguments, Far, ROUNDS, read, s5cmd, timed, write};

const MIB: u64 = 1 << 20;

/// A task's name, what it reads of a file, and how many bytes that asks for.
type Reading<'a> = (&'static str, &'a dyn Fn(&File), u64);

/// Stores a file of this size without any mount.
pub fn store(far: &Far, key: &str, size: u64) {
    let local = tempfile::tempdir().unwrap();
    let file = local.path().join("file");
    write(&file, size);
    s5cmd(
        &far.store.endpoint(),
        &["--part-size", "8", file.to_str().unwrap(), &format!("s3://{}/{key}", far.store.bucket())].map(str::to_owned),
    );
}

/// Reads `len` bytes at `offset` and compares them.
fn check_at(file: &File, offset: u64, len: usize) {
    let (mut found, mut block) = (vec![0; len], vec![0; Pattern::BLOCK]);
    file.read_exact_at(&mut found, offset).unwrap();
    let mut at = 0;
    while at < len {
        let place = offset + at as u64;
        Pattern::fill(place / Pattern::BLOCK as u64, &mut block);
        let from = (place % Pattern::BLOCK as u64) as usize;
        let take = (Pattern::BLOCK - from).min(len - at);
        assert!(found[at..at + take] == block[from..from + take], "{place}: other bytes");
        at += take;
    }
}

/// Parts of one large file.
pub fn parts(report: &mut Report, arguments: &Arguments) {
    let (far, size) = (Far::new(), arguments.size);
    store(&far, "large.bin", size);
    let here_and_there = |file: &File| {
        let mut place = 1_u64;
        for _ in 0..100 {
            place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            check_at(file, (place >> 20) % (size / 4096) * 4096, 4096);
        }
    };
    let tasks: [Reading<'_>; 4] = [
        ("read one byte, far", &|file| check_at(file, 0, 1), 1),
        ("read 100 × 4 KiB at random, far", &here_and_there, 100 * 4096),
        ("read backwards by 1 MiB, far", &|file| (0..size / MIB).rev().for_each(|block| check_at(file, block * MIB, MIB as usize)), size),
        ("read 64 KiB every 1 MiB, far", &|file| (0..size / MIB).for_each(|block| check_at(file, block * MIB, 64 << 10)), size / 16),
    ];
    far.each(arguments, |mut target| {
        for (task, reads, payload) in &tasks {
            target.cold();
            let _ = std::fs::read_dir(target.dir()).unwrap().count();
            let path = target.dir().join("large.bin");
            let row = far.measure(task, &target, || reads(&File::open(&path).unwrap()));
            report.add(row.asked(*payload));
        }
    });
}

/// 200 files of 30 KiB, one after the other in the order of their names.
pub fn small(report: &mut Report, arguments: &Arguments) {
    let far = Far::new();
    for number in 0..200_u64 {
        let mut content = vec![0; 30 << 10];
        Pattern::fill(number, &mut content);
        far.store.put(&format!("site/{number:03}.dat"), content);
    }
    far.each(arguments, |mut target| {
        target.cold();
        let dir = target.dir().join("site");
        let row = far.measure("read 200 files of 30 KiB in order, far", &target, || {
            let mut names: Vec<PathBuf> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
            names.sort();
            assert_eq!(names.len(), 200);
            names.iter().for_each(|name| assert_eq!(std::fs::read(name).unwrap().len(), 30 << 10));
        });
        report.add(row.payload(200 * (30 << 10)));
    });
}

/// One reader, 16 and 64 of them, each with a file of its own.
pub fn streams(report: &mut Report, arguments: &Arguments) {
    let far = Far::new();
    let each = arguments.size / 32;
    for number in 0..64 {
        store(&far, &format!("streams/{number:02}.bin"), each);
    }
    far.each(arguments, |mut target| {
        for (task, readers) in
            [("read by 1 reader, far", 1), ("read by 16 readers at once, far", 16_u64), ("read by 64 readers at once, far", 64)]
        {
            target.cold();
            let dir = target.dir().join("streams");
            let row = far.measure(task, &target, || {
                std::thread::scope(|scope| {
                    for number in 0..readers {
                        let file = dir.join(format!("{number:02}.bin"));
                        scope.spawn(move || read(&file, each));
                    }
                });
            });
            report.add(row.payload(readers * each));
        }
    });
}

/// What was read is read again: through the mount's process, passed through by the kernel where that is possible, and the cache's file.
pub fn again(report: &mut Report, arguments: &Arguments) {
    let (far, size) = (Far::new(), 2 * arguments.size);
    store(&far, "large.bin", size);
    if !"packmule".contains(&arguments.program) {
        return;
    }
    let target = Target::packmule(PACKMULE, &far.store, &far.endpoint());
    let (path, home) = (target.dir().join("large.bin"), target.home().unwrap().join("cache"));
    let mut rounds = Rounds::default();
    // Held open from before the file was proved: the kernel reads all handles of an inode the same way, and this one through the mount.
    let held = File::open(&path).unwrap();
    sweep(&held, size);
    for _ in 0..ROUNDS {
        // Not from the pages that the kernel has of the mount; the cache's own file stays in memory, in all three.
        posix_fadvise(&held, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        let file = File::open(&path).unwrap();
        rounds.add(far.measure("read again", &target, || sweep(&file, size)));
    }
    drop(held);
    std::thread::sleep(Duration::from_millis(200));
    let cached = File::open(largest_below(&home)).unwrap();
    for _ in 0..ROUNDS {
        let file = File::open(&path).unwrap();
        rounds.add(Row::new("read again", "packmule, passed through", timed(|| sweep(&file, size))));
        rounds.add(Row::new("read again", "the cache's file itself", timed(|| sweep(&cached, size))));
    }
    rounds.medians().into_iter().for_each(|row| report.add(row.payload(size)));
}

/// Reads everything, and looks at nothing: what compares costs as much as what reads.
fn sweep(file: &File, size: u64) {
    let (mut block, mut all) = (vec![0; 1 << 20], 0);
    loop {
        match file.read_at(&mut block, all).unwrap() {
            0 => break,
            read => all += read as u64,
        }
    }
    assert_eq!(all, size);
}

fn largest_below(dir: &Path) -> PathBuf {
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            match entry.metadata().unwrap() {
                data if data.is_dir() => dirs.push(entry.path()),
                data => found.push((data.len(), entry.path())),
            }
        }
    }
    found.into_iter().max().unwrap().1
}
