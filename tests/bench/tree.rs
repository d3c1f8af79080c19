//! A tree of 200 files in 60 directories: copied in, read back, renamed and removed, each on a fresh mount.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::measure::{Pattern, Report};
use crate::support::store::Store;
use crate::target::{PACKMULE, Target, WRITE_BACK};
use crate::{Arguments, Far, attempted, stored};

const FILES: u64 = 200;

/// 59 directories in the tree and the tree itself.
fn grow(tree: &Path) {
    for number in 0..FILES {
        let folder = tree.join(format!("{:02}", number % 59));
        std::fs::create_dir_all(&folder).unwrap();
        let mut content = vec![0; 16 << 10];
        Pattern::fill(number, &mut content);
        std::fs::write(folder.join(format!("{number:03}.dat")), content).unwrap();
    }
}

/// Seconds until each command returns; the next step begins when everything is stored.
pub fn tree(report: &mut Report, arguments: &Arguments) {
    let local = tempfile::tempdir().unwrap();
    let tree = local.path().join("tree");
    grow(&tree);
    let far = Far::new();
    far.among(&[PACKMULE, WRITE_BACK], arguments, |mut target| {
        let (name, moved) = (target.name().to_owned(), format!("{} moved", target.name()));
        let (to, away) = (target.dir().join(&name), target.dir().join(&moved));
        // Until the store has so many files below each of both.
        let settles = |target: &Target, counts: [u64; 2]| {
            target.flush();
            stored(Duration::from_millis(100), || [&name, &moved].map(|folder| files(&far.store, folder)) == counts)
        };

        let copy = || attempted(Command::new("cp").arg("-r").arg(&tree).arg(&to));
        let copied = far.attempt("copy 200 files in 60 directories, far", &target, copy, || settles(&target, [FILES, 0]));
        if copied.is_none() {
            return;
        }
        report.add(copied);

        target.cold();
        let compare = || attempted(Command::new("diff").arg("-r").arg(&tree).arg(&to));
        report.add(far.attempt("read 200 files in 60 directories, far", &target, compare, || Ok(())));

        target.cold();
        let rename = || std::fs::rename(&to, &away);
        let renamed = far.attempt("rename 200 files in 60 directories, far", &target, rename, || settles(&target, [0, FILES]));
        let rest = if renamed.is_some() { &away } else { &to };
        report.add(renamed);

        target.cold();
        let remove = || attempted(Command::new("rm").arg("-r").arg(rest));
        report.add(far.attempt("remove 200 files in 60 directories, far", &target, remove, || settles(&target, [0, 0])));
    });
}

/// Objects below a folder that are files.
fn files(store: &Store, folder: &str) -> u64 {
    let below = format!("{folder}/");
    store.keys().iter().filter(|key| key.starts_with(&below) && !key.ends_with('/')).count() as u64
}
