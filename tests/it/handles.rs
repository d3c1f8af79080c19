//! Handles that stay open while others change the file, or while what was written by another handle is refused: promises 2, 6, 12,
//! 14 and 24.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;

use crate::support::double::{Fault, When};
use crate::support::files::{self, close, errno};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

const BASE: &str = "base base base";
const THEIRS: &str = "theirs, and longer than ours";

/// What is known of a name is believed for `metadata_ttl`, and by the kernel for a second; this outlasts both.
const OUTLAST_WHAT_IS_KNOWN: Duration = Duration::from_millis(2100);
const FORGETFUL: &str = "metadata_ttl=1s";

fn to_write(path: &Path) -> File {
    OpenOptions::new().write(true).open(path).unwrap()
}

fn to_append(path: &Path) -> File {
    OpenOptions::new().append(true).open(path).unwrap()
}

/// Status names a parked file of this key.
fn is_parked(stage: &Stage, key: &str) -> bool {
    let named = format!("/{key}  ");
    stage.mount.status().lines().any(|line| line.contains(" parked ") && line.contains(&named))
}

/// The key of the one conflict copy below a folder.
fn beside(stage: &Stage, folder: &str) -> String {
    let keys = stage.store.keys();
    let kept: Vec<&String> = keys.iter().filter(|key| key.starts_with(folder) && key.contains(" (conflict of ")).collect();
    assert_eq!(kept.len(), 1, "{keys:?}");
    kept[0].clone()
}

/// A way of looking at a folder, by its name.
type Look = (&'static str, fn(&Path));

/// A part, an append and a whole content are written by handles that were opened before somebody else changed the files, with
/// nothing, or each way of looking at a name, in between.
fn written_after_others_changed_it(store: Store, options: &[&str]) {
    let queued = options.iter().any(|option| option.starts_with("write_back"));
    let looks: [Look; 4] = [
        ("nothing", |_| ()),
        ("ls", |dir| assert_eq!(files::names(dir).len(), 3)),
        ("stat", |dir| ["part", "log", "whole"].iter().for_each(|name| assert_eq!(fs::metadata(dir.join(name)).unwrap().len(), 28))),
        ("cat", |dir| ["part", "log", "whole"].iter().for_each(|name| assert_eq!(fs::read_to_string(dir.join(name)).unwrap(), THEIRS))),
    ];
    for (look, _) in looks {
        ["part", "log", "whole"].iter().for_each(|name| store.put(&format!("{look}/{name}"), BASE));
    }
    let stage = Stage::with(store, options);
    let mut open = Vec::new();
    for (look, _) in looks {
        let path = |name: &str| stage.path(&format!("{look}/{name}"));
        open.push((to_write(&path("part")), to_append(&path("log")), to_write(&path("whole"))));
        ["part", "log", "whole"].iter().for_each(|name| stage.store.put(&format!("{look}/{name}"), THEIRS));
    }
    std::thread::sleep(OUTLAST_WHAT_IS_KNOWN);
    for ((look, has_a_look), (part, mut log, whole)) in looks.into_iter().zip(open) {
        has_a_look(&stage.path(look));
        part.write_all_at(b"OURS", 3).unwrap();
        log.write_all(b"OURS").unwrap();
        whole.write_all_at(&[b'o'; 40], 0).unwrap();
        [&part, &log, &whole].iter().for_each(|file| file.sync_all().unwrap());
        let closed = [close(part), close(log), close(whole)];
        let part = format!("{look}/part");
        if queued {
            assert_eq!(closed, [Ok(()); 3], "{look}");
            stage.store.eventually("the part is parked", |_| is_parked(&stage, &part));
            stage.store.eventually("the log is stored", |store| store.bytes(&format!("{look}/log")).ends_with(b"OURS"));
            let kept = format!("{look}/whole (conflict of ");
            stage.store.eventually("the whole is stored", |store| store.keys().iter().any(|key| key.starts_with(&kept)));
        } else {
            assert_eq!(closed, [Err(Errno::ESTALE), Ok(()), Ok(())], "{look}");
            assert!(is_parked(&stage, &part), "{look}: {}", stage.mount.status());
        }
        assert_eq!(stage.store.bytes(&part), THEIRS, "{look}");
        assert_eq!(stage.store.bytes(&format!("{look}/log")), format!("{THEIRS}OURS"), "{look}");
        assert_eq!(stage.store.bytes(&format!("{look}/whole")), THEIRS, "{look}");
        assert_eq!(stage.store.bytes(&beside(&stage, look)), "o".repeat(40), "{look}");
        for name in ["part", "whole"] {
            let shows = |_: &Store| fs::read_to_string(stage.path(&format!("{look}/{name}"))).is_ok_and(|shown| shown == THEIRS);
            stage.store.eventually("the name shows theirs", shows);
        }
    }
}

/// The keys of the store, without conflict copies, and what of them is theirs.
fn theirs(store: &Store) -> Vec<String> {
    let keys = store.keys().into_iter().filter(|key| !key.ends_with('/') && !key.contains(" (conflict of "));
    keys.inspect(|key| assert_eq!(store.bytes(key), THEIRS, "{key}")).collect()
}

on_every_store! {
    /// Promises 9 and 12 together: a name that others gave another content while somebody has the file open is renamed or removed
    /// here, and means the open file too.
    fn an_open_file_that_others_replaced_goes_with_its_name(store) {
        let names = ["moved/f", "folder/f", "renamed over/f", "removed/f"];
        names.iter().for_each(|name| store.put(name, BASE));
        store.put("renamed over/other", THEIRS);
        let stage = Stage::with(store, &[FORGETFUL]);
        let open = names.map(|name| to_write(&stage.path(name)));
        names.iter().for_each(|name| stage.store.put(name, THEIRS));
        std::thread::sleep(OUTLAST_WHAT_IS_KNOWN);
        names.iter().for_each(|name| assert_eq!(fs::read_to_string(stage.path(name)).unwrap(), THEIRS));
        open[0].write_all_at(b"begun", 0).unwrap();
        fs::rename(stage.path("moved/f"), stage.path("moved/g")).unwrap();
        fs::rename(stage.path("folder"), stage.path("directory")).unwrap();
        fs::rename(stage.path("renamed over/other"), stage.path("renamed over/f")).unwrap();
        fs::remove_file(stage.path("removed/f")).unwrap();
        for file in open {
            file.write_all_at(&[b'o'; 40], 0).unwrap();
            close(file).unwrap();
        }
        assert_eq!(theirs(&stage.store), ["directory/f", "moved/g", "renamed over/f"]);
        for moved in ["moved/g", "directory/f"] {
            assert_eq!(stage.store.bytes(&beside(&stage, moved)), "o".repeat(40), "{moved}");
        }
        assert_eq!(stage.store.keys().iter().filter(|key| key.contains(" (conflict of ")).count(), 2, "{:?}", stage.store.keys());
    }

    /// Promise 12: "Somebody else's change since we opened the file … is not overwritten silently"
    fn what_is_written_after_others_changed_it_is_not_lost(store) {
        written_after_others_changed_it(store, &[FORGETFUL]);
    }

    /// Promise 12: "Theirs deleted → ours is created."
    fn what_is_written_after_others_deleted_it_is_not_lost(store) {
        let stage = Stage::with(store, &[FORGETFUL]);
        for look in ["nothing", "ls", "stat"] {
            stage.store.put(look, BASE);
            stage.store.put(&format!("{look}.part"), BASE);
            let (whole, part) = (to_write(&stage.path(look)), to_write(&stage.path(&format!("{look}.part"))));
            stage.store.delete(look);
            stage.store.delete(&format!("{look}.part"));
            std::thread::sleep(OUTLAST_WHAT_IS_KNOWN);
            match look {
                "ls" => assert!(!files::names(stage.dir()).contains(&look.to_owned())),
                "stat" => assert_eq!(errno(fs::metadata(stage.path(look))), Errno::ENOENT),
                _ => {}
            }
            whole.write_all_at(&[b'o'; 40], 0).unwrap();
            part.write_all_at(b"OURS", 3).unwrap();
            close(whole).unwrap();
            assert_eq!(stage.store.bytes(look), "o".repeat(40), "{look}");
            assert_eq!(fs::read_to_string(stage.path(look)).unwrap(), "o".repeat(40), "{look}");
            // What lay around it may be gone for good.
            let closed = close(part);
            let kept = if closed.is_ok() { &stage.store.bytes(&format!("{look}.part"))[3..7] == b"OURS" } else { is_parked(&stage, &format!("{look}.part")) };
            assert!(kept, "{look}: {closed:?}: {}", stage.mount.status());
        }
    }

    /// Promise 14: "Another client's change is seen within `metadata_ttl` (5 s), and at once by open()", of a file too that somebody
    /// here has written and keeps open.
    fn others_are_seen_under_an_open_writer(store) {
        store.put("f", BASE);
        store.put("deleted", BASE);
        let stage = Stage::with(store, &[FORGETFUL]);
        let (writer, deleted) = (to_write(&stage.path("f")), to_write(&stage.path("deleted")));
        for file in [&writer, &deleted] {
            file.write_all_at(b"OURS", 0).unwrap();
            close(file.try_clone().unwrap()).unwrap();
        }
        assert_eq!(fs::read_to_string(stage.path("f")).unwrap(), "OURS base base");
        stage.store.put("f", THEIRS);
        stage.store.delete("deleted");
        assert_eq!(fs::read_to_string(stage.path("f")).unwrap(), THEIRS, "at once by open");
        stage.store.eventually("it is gone", |_| fs::metadata(stage.path("deleted")).is_err());
        writer.write_all_at(b"MORE", 0).unwrap();
        assert_eq!(fs::read_to_string(stage.path("f")).unwrap(), THEIRS);
        assert_eq!(close(writer), Err(Errno::ESTALE));
        assert!(is_parked(&stage, "f"), "{}", stage.mount.status());
        deleted.write_all_at(b"MORE", 0).unwrap();
        close(deleted).unwrap();
        assert_eq!(stage.store.bytes("deleted"), "MORE base base");
        assert_eq!(fs::read_to_string(stage.path("deleted")).unwrap(), "MORE base base");
    }
}

/// Promise 14: "at once by open()": the kernel finds the inode of the new version, forgets it, and asks once more. The FORGET often
/// comes while that question is being answered.
#[test]
fn a_version_that_is_forgotten_while_it_is_looked_up_is_opened() {
    if !can_mount() {
        return;
    }
    let (store, names) = (Store::double(), ["a", "b", "c"]);
    names.iter().for_each(|name| store.put(name, BASE));
    let stage =
        Stage { mount: Mount::start(Setup::of(&store).env(packmule::failpoint::VARIABLE, "forgetting=20,lookup-resolved=40")), store };
    for name in names {
        let _old = File::open(stage.path(name)).unwrap();
        stage.store.put(name, THEIRS);
        assert_eq!(fs::read_to_string(stage.path(name)).unwrap(), THEIRS);
    }
}

/// The same where close() only queues.
#[test]
fn what_is_queued_after_others_changed_it_is_not_lost() {
    if can_mount() {
        written_after_others_changed_it(Store::double(), &[FORGETFUL, "write_back=200ms"]);
    }
}

/// Promise 12: "`fail` answers ESTALE and parks", for a change before the first write as for one after it.
#[test]
fn fail_fails_after_a_change_before_the_first_write() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["on_conflict=fail"]);
    for key in ["part", "whole"] {
        stage.store.put(key, BASE);
    }
    let (part, whole) = (to_write(&stage.path("part")), to_write(&stage.path("whole")));
    for key in ["part", "whole"] {
        stage.store.put(key, THEIRS);
    }
    part.write_all_at(b"OURS", 3).unwrap();
    whole.write_all_at(&[b'o'; 40], 0).unwrap();
    assert_eq!((close(part), close(whole)), (Err(Errno::ESTALE), Err(Errno::ESTALE)));
    for key in ["part", "whole"] {
        assert!(is_parked(&stage, key), "{}", stage.mount.status());
        assert_eq!(stage.store.bytes(key), THEIRS);
    }
}

/// Promise 2: "close() returns 0 only when the object is in S3 under its name … otherwise an errno", for every handle that wrote.
#[test]
fn a_refusal_is_told_to_every_handle() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    for key in ["wrote", "writes on"] {
        stage.store.put(key, BASE);
    }
    fs::write(stage.path("new"), "").unwrap();
    stage.double().fault(When::operation("PutObject"), Fault::Error(403, "AccessDenied"));
    for name in ["wrote", "writes on", "new"] {
        let (one, other) = (to_write(&stage.path(name)), to_write(&stage.path(name)));
        one.write_all_at(b"AAAA", 0).unwrap();
        if name == "wrote" {
            other.write_all_at(b"BBBB", 5).unwrap();
        }
        assert_eq!(close(one), Err(Errno::EACCES), "{name}");
        assert!(is_parked(&stage, name), "{}", stage.mount.status());
        if name == "wrote" {
            assert_eq!(errno(other.sync_all()), Errno::EACCES, "{name}");
            assert_eq!(close(other), Err(Errno::EACCES), "{name}");
        } else {
            assert_eq!(errno(other.write_all_at(b"BBBB", 5)), Errno::EACCES, "{name}");
            assert_eq!(errno(other.set_len(3)), Errno::EACCES, "{name}");
        }
    }
    stage.double().clear_faults();
    // A handle opened now is of what S3 holds.
    let again = to_write(&stage.path("writes on"));
    again.write_all_at(b"CCCC", 0).unwrap();
    close(again).unwrap();
    assert_eq!(stage.store.bytes("writes on"), "CCCC base base");
}

/// The same where the refusal comes after a close that only queued.
#[test]
fn a_refusal_of_what_was_queued_is_told_to_who_writes_on() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["write_back=200ms"]);
    stage.store.put("log", BASE);
    let (mut one, mut other) = (to_append(&stage.path("log")), to_append(&stage.path("log")));
    one.write_all(b"one").unwrap();
    other.write_all(b"other").unwrap();
    stage.double().fault(When::operation("PutObject"), Fault::Error(403, "AccessDenied"));
    close(one).unwrap();
    stage.store.eventually("it is parked", |_| is_parked(&stage, "log"));
    stage.store.eventually("who writes on is told", |_| (&other).write_all(b"more").is_err());
    stage.double().clear_faults();
    assert_eq!(errno(other.write_all(b"more")), Errno::EACCES);
    assert_eq!(errno(other.sync_all()), Errno::EACCES);
    assert_eq!(close(other), Err(Errno::EACCES));
}

/// Promise 6: "A file whose write() failed is never published", and its close says so though nothing of it was written.
#[test]
fn a_failed_first_write_fails_the_close() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["spool_size=16M"]);
    stage.store.put("old", BASE);
    let hog = File::create(stage.path("hog")).unwrap();
    hog.write_all_at(&vec![7; 15 << 20], 0).unwrap();
    for name in ["new", "old"] {
        let file = File::create(stage.path(name)).unwrap();
        assert_eq!(errno(file.write_all_at(&vec![7; 1 << 20], 0)), Errno::ENOSPC, "{name}");
        assert_eq!(close(file), Err(Errno::EIO), "{name}");
    }
    assert_eq!(errno(fs::metadata(stage.path("new"))), Errno::ENOENT);
    assert_eq!(fs::read_to_string(stage.path("old")).unwrap(), BASE);
    assert_eq!(stage.store.keys(), ["old"]);
}
