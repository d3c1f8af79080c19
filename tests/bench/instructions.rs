//! Instructions that packmule spends on a byte, under callgrind: a number that no load on the machine changes, so that a change to the
//! code can be judged by it.

use std::path::Path;

use crate::support::mount::{Mount, Setup};
use crate::support::store::Store;
use crate::{read, write};

/// Two sizes: what they have in common (the start, the open, the close) is not counted.
const SIZES: [u64; 2] = [32 << 20, 96 << 20];

/// Prints instructions a byte of writing, of a first read, and of a second one from the cache.
pub fn count() {
    let store = Store::seaweed();
    println!("| path | instructions a byte |\n|---|---|");
    let [small, large] = SIZES.map(|size| {
        let writes = spent(&store, |dir| write(&dir.join(format!("{size}.bin")), size));
        let reads = spent(&store, |dir| read(&dir.join(format!("{size}.bin")), size));
        let twice = spent(&store, |dir| {
            // Held open from before it was proved: the second reading is not passed through.
            let path = dir.join(format!("{size}.bin"));
            let held = std::fs::File::open(&path).unwrap();
            read(&path, size);
            nix::fcntl::posix_fadvise(&held, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            read(&path, size);
        });
        [writes, reads, twice - reads]
    });
    for (path, (large, small)) in ["write", "read, from the store", "read, from the cache"].into_iter().zip(large.into_iter().zip(small)) {
        println!("| {path} | {:.2} |", (large - small) as f64 / (SIZES[1] - SIZES[0]) as f64);
    }
}

/// Instructions of a mount in which this is done.
fn spent(store: &Store, work: impl FnOnce(&Path)) -> i64 {
    let folder = tempfile::tempdir().unwrap();
    let mut setup = Setup::of(store);
    // The program replaces itself once at its start.
    let out = format!("--callgrind-out-file={}/%p", folder.path().display());
    setup.under = ["valgrind", "--quiet", "--tool=callgrind", "--trace-children=yes", &out].map(str::to_owned).to_vec();
    let mut mount = Mount::start(setup);
    work(mount.dir());
    mount.umount();
    let totals = std::fs::read_dir(folder.path()).unwrap().filter_map(|counted| {
        let counted = std::fs::read_to_string(counted.unwrap().path()).unwrap();
        counted.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse::<i64>().ok())
    });
    totals.sum()
}
