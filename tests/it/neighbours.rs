//! Small files that are read in the order of their names find the next ones fetched: what that may cost the store and the machine. On the
//! double, which counts.

use std::fs;
use std::time::{Duration, Instant};

use crate::support::double::{Fault, When};
use crate::support::files::{self, noise};
use crate::support::mount::{Mount, can_mount};
use crate::support::stage::Stage;
use crate::support::store::Store;

const FILES: usize = 200;
const DIRECTORIES: usize = 150;
const FILES_EACH: usize = 24;
/// Files fetched ahead in the whole mount, and twice as many that the cache has not written the sums of.
const OPEN_MOST: usize = 64 + 128;

fn content(n: usize) -> Vec<u8> {
    noise(n as u64, 30 << 10)
}

fn name(n: usize) -> String {
    format!("d/{n:03}")
}

/// A folder of small files, listed, at 20 ms.
fn small_files() -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    (0..FILES).for_each(|n| store.put(&name(n), content(n)));
    let stage = Stage::with(store, &[]);
    assert_eq!(files::names(&stage.path("d")).len(), FILES);
    stage.double().reset_requests();
    stage.double().fault(When::operation("GetObject"), Fault::Delay(Duration::from_millis(20)));
    Some(stage)
}

/// Many folders of small files.
fn many_directories() -> Store {
    let store = Store::double();
    for dir in 0..DIRECTORIES {
        (0..FILES_EACH).for_each(|n| store.put(&format!("t/{dir:03}/{n:02}"), noise(n as u64, 2000)));
    }
    store
}

/// Files of the cache that the mount has open.
fn open_files(mount: &Mount) -> usize {
    let links = fs::read_dir(format!("/proc/{}/fd", mount.pid())).unwrap().map(|entry| fs::read_link(entry.unwrap().path()));
    links
        .filter(|link| link.as_ref().is_ok_and(|link| link.starts_with(mount.home()) && link.extension().is_some_and(|end| end == "data")))
        .count()
}

/// Reads those of each directory; the most files that the mount had open after one of them.
fn read_of_each(mount: &Mount, which: impl Iterator<Item = usize> + Clone) -> usize {
    let of_directory = |dir: usize| {
        files::names(&mount.path(&format!("t/{dir:03}")));
        for n in which.clone() {
            assert!(fs::read(mount.path(&format!("t/{dir:03}/{n:02}"))).unwrap() == noise(n as u64, 2000), "{dir}/{n}");
        }
        open_files(mount)
    };
    (0..DIRECTORIES).map(of_directory).max().unwrap()
}

/// What was fetched for readers who went elsewhere is bounded for the whole mount, and is let go.
fn holds_little(which: impl Iterator<Item = usize> + Clone) {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(many_directories(), &[]);
    let most = read_of_each(&stage.mount, which);
    assert!((1..=OPEN_MOST).contains(&most), "{most} open files");
    let began = Instant::now();
    while open_files(&stage.mount) > 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "{} open files long after", open_files(&stage.mount));
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn the_first_files_of_many_directories() {
    holds_little(0..3);
}

#[test]
fn every_other_file_of_many_directories() {
    holds_little((0..FILES_EACH).step_by(2));
}

/// Reading back what was written through the mount fetches nothing, though the listing is of the objects before.
#[test]
fn files_overwritten_here_are_read_back_for_nothing() {
    let Some(stage) = small_files() else { return };
    (0..FILES).for_each(|n| files::write(&stage.path(&name(n)), &content(FILES + n)).unwrap());
    for _ in 0..2 {
        stage.double().reset_requests();
        (0..FILES).for_each(|n| assert!(fs::read(stage.path(&name(n))).unwrap() == content(FILES + n), "{n}"));
        let requests = stage.double().requests();
        assert_eq!(requests.of("GetObject"), 0, "{:?}", requests.summary());
        assert!(requests.of("HeadObject") <= FILES + 10, "{:?}", requests.summary());
        std::thread::sleep(Duration::from_millis(1100));
    }
}

/// Who overwrote some of them finds the others fetched.
#[test]
fn files_between_overwritten_ones_are_fetched_once() {
    let Some(stage) = small_files() else { return };
    let overwritten = |n: usize| n.is_multiple_of(2);
    (0..FILES).filter(|n| overwritten(*n)).for_each(|n| files::write(&stage.path(&name(n)), &content(FILES + n)).unwrap());
    stage.double().reset_requests();
    (0..FILES).for_each(|n| assert!(fs::read(stage.path(&name(n))).unwrap() == content(n + FILES * usize::from(overwritten(n))), "{n}"));
    let requests = stage.double().requests();
    assert_eq!(requests.of("GetObject"), FILES / 2, "{:?}", requests.summary());
}

/// A reader who is busy with each file for a while costs the store no more than one who is not: what it said of a file that is reached
/// later than a second after is not believed, and such a file is not fetched yet.
#[test]
fn slow_readers_cost_one_request_a_file() {
    for (busy, files) in [(60, 100), (300, 20), (1200, 6)] {
        let Some(stage) = small_files() else { return };
        for n in 0..files {
            assert!(fs::read(stage.path(&name(n))).unwrap() == content(n));
            std::thread::sleep(Duration::from_millis(busy));
        }
        let requests = stage.double().requests();
        // A machine that has other work makes a reader slower than he was until then.
        assert!(requests.of("HeadObject") <= files / 10, "{busy} ms: {:?}", requests.summary());
        assert!(requests.of("GetObject") <= files + 12, "{busy} ms: {:?}", requests.summary());
    }
}

/// Readers of many directories at once share what is fetched ahead, and none has it fetched twice.
#[test]
fn many_walks_at_once_cost_one_request_a_file() {
    const WALKS: usize = 12;
    if !can_mount() {
        return;
    }
    let stage = Stage::with(many_directories(), &[]);
    (0..WALKS).for_each(|dir| assert_eq!(files::names(&stage.path(&format!("t/{dir:03}"))).len(), FILES_EACH));
    stage.double().reset_requests();
    stage.double().fault(When::operation("GetObject"), Fault::Delay(Duration::from_millis(20)));
    std::thread::scope(|scope| {
        for dir in 0..WALKS {
            let stage = &stage;
            scope.spawn(move || {
                for n in 0..FILES_EACH {
                    assert!(fs::read(stage.path(&format!("t/{dir:03}/{n:02}"))).unwrap() == noise(n as u64, 2000), "{dir}/{n}");
                }
            });
        }
    });
    let requests = stage.double().requests();
    assert!(requests.of("GetObject") <= WALKS * FILES_EACH + 12, "{:?}", requests.summary());
}
