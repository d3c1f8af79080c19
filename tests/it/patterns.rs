//! What reading costs, pattern by pattern: requests and bytes, on the double, which counts, at 20 ms.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use crate::support::double::{Fault, Requests, When};
use crate::support::files::{self, noise};
use crate::support::mount::can_mount;
use crate::support::stage::Stage;
use crate::support::store::Store;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const SIZE: usize = 128 * MIB;

/// Reads `len` bytes at each of these places of a large object that was listed, and compares them.
fn cost_of_reading(places: impl Iterator<Item = usize>, len: usize) -> Option<Requests> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    let content = noise(1, SIZE);
    store.put("large", content.clone());
    let stage = Stage::new(store);
    assert_eq!(files::names(stage.dir()), ["large"]);
    stage.double().reset_requests();
    stage.double().fault(When::operation("GetObject"), Fault::Delay(Duration::from_millis(20)));
    let file = File::open(stage.path("large")).unwrap();
    let mut bytes = vec![0; len];
    for at in places {
        file.read_exact_at(&mut bytes, at as u64).unwrap();
        assert!(bytes == content[at..at + len], "at {at}");
    }
    drop(file);
    // What was fetched ahead comes to its end.
    std::thread::sleep(Duration::from_millis(300));
    let requests = stage.double().requests();
    eprintln!("{:?}, {} KiB, {} at once", requests.summary(), requests.bytes_down >> 10, requests.peak);
    assert_eq!(requests.total(), requests.of("GetObject"), "{:?}", requests.summary());
    Some(requests)
}

/// Promise 17: "Looking at the first 16 KiB of a file fetches at most 128 KiB, once", and one byte elsewhere one small piece more: the
/// beginning is what an open asks for, to know which version it opens.
#[test]
fn one_byte() {
    for (at, gets, most) in [(0, 1, 128 << 10), (SIZE / 2 + 12_345, 2, 192 << 10)] {
        let Some(requests) = cost_of_reading(std::iter::once(at), 1) else { return };
        assert_eq!(requests.of("GetObject"), gets, "at {at}");
        assert!(requests.bytes_down <= most + 4096, "at {at}: {}", requests.bytes_down);
    }
}

/// Random reads fetch what they ask for and little more.
#[test]
fn small_reads_here_and_there() {
    let Some(requests) = cost_of_reading((0..100).map(|turn| turn * 73_687_087 % (SIZE - 4 * KIB)), 4 * KIB) else { return };
    assert!(requests.of("GetObject") <= 100, "{}", requests.of("GetObject"));
    assert!(requests.bytes_down <= 16 << 20, "{}", requests.bytes_down);
}

/// From the end to the beginning, as some archivers read: read ahead of, backward.
#[test]
fn backward() {
    let Some(requests) = cost_of_reading((0..SIZE / MIB).rev().map(|step| step * MIB), MIB) else { return };
    assert!(requests.bytes_down * 10 <= SIZE as u64 * 12, "{} MiB of {}", requests.bytes_down >> 20, SIZE >> 20);
    assert!(requests.peak >= 4, "{} at once", requests.peak);
}

/// 64 KiB of each MiB, as a video is searched or an image of a disk looked through: the gaps are not fetched, the next places are.
#[test]
fn at_equal_distances() {
    // At whole blocks, and where every read touches two: then twice is what the blocks are, and a read that the kernel splits costs one.
    for (shift, spare) in [(0, 0), (4 * KIB, MIB)] {
        let Some(requests) = cost_of_reading((0..SIZE / MIB).map(|step| step * MIB + shift), 64 * KIB) else { return };
        let asked = (SIZE / MIB * 64 * KIB) as u64;
        assert!(requests.bytes_down <= 2 * asked + spare as u64, "{} KiB for {}", requests.bytes_down >> 10, asked >> 10);
        assert!(requests.peak >= 4, "{} at once", requests.peak);
    }
}

/// Who reads in order gets many connections soon, and who stops early wastes two windows at most: a window is four times what was read.
#[test]
fn in_order_and_stopped_early() {
    let read = 8 * MIB;
    let Some(requests) = cost_of_reading((0..read / (128 * KIB)).map(|step| step * 128 * KIB), 128 * KIB) else { return };
    assert!(requests.peak >= 6, "{} at once", requests.peak);
    assert!(requests.bytes_down <= (read + 2 * 4 * read) as u64, "{} MiB for {}", requests.bytes_down >> 20, read >> 20);
}
