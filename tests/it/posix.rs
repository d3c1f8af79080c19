//! POSIX on a mount, judged by programs that are not ours.

use crate::foreign;
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::store::Store;

/// Every case that an object store can hold; `pjdfstest.expect` names them. On SeaweedFS, which drops the metadata of directories:
/// what this mount knows must be true all the same.
#[test]
fn pjdfstest_passes_what_an_object_store_can_hold() {
    if !can_mount() {
        return;
    }
    let store = Store::seaweed();
    let mut mount = Mount::start(Setup::of(&store).option("allow_other").option("default_permissions"));
    let wrong = foreign::pjdfstest(mount.dir());
    assert!(wrong.is_empty(), "{} cases differ from tests/it/pjdfstest.expect:\n{}", wrong.len(), wrong.join("\n"));
    mount.umount();
}

/// Runs fsx, then compares what it left with the object and with the same file after a remount.
fn fsx(store: &Store, options: &[&str], config: &str, operations: u32, seeds: &[u32]) {
    if !can_mount() {
        return;
    }
    let setup = options.iter().fold(Setup::of(store), |setup, option| setup.option(option));
    let mut mount = Mount::start(setup);
    for seed in seeds {
        let name = format!("fsx-{seed}");
        if let Err(message) = foreign::fsx(&mount.path(&name), config, operations, *seed) {
            panic!("{message}");
        }
        let before = std::fs::read(mount.path(&name)).unwrap();
        mount.remount();
        assert!(store.bytes(&name) == before, "{name}: the object differs from the file");
        assert!(std::fs::read(mount.path(&name)).unwrap() == before, "{name}: another file after the remount");
    }
    mount.umount();
    assert_eq!(store.unfinished_uploads(), Vec::<String>::new());
}

#[test]
fn fsx_finds_no_mismatch() {
    fsx(&Store::double(), &[], "small", 10_000, &[1, 2, 3]);
}

#[test]
fn fsx_finds_no_mismatch_on_seaweedfs() {
    fsx(&Store::seaweed(), &[], "small", 10_000, &[4, 5]);
}

#[test]
fn fsx_finds_no_mismatch_in_a_file_of_several_parts() {
    fsx(&Store::double(), &["part_size=5M"], "large", 2_000, &[6, 7]);
}

#[test]
fn fsx_finds_no_mismatch_in_a_file_of_several_parts_on_seaweedfs() {
    fsx(&Store::seaweed(), &["part_size=5M"], "large", 2_000, &[8]);
}
