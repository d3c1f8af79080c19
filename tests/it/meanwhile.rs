//! What is done to a folder, or in it, while something else happens to it: a rename of one above, a look at it, a crash, others' changes.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::time::Duration;

use crate::support::double::{Fault, Options, When};
use crate::support::files::{self, sh};
use crate::support::mount::{AWS, Mount, Setup, can_mount};
use crate::support::stage::Stage;
use crate::support::store::Store;
use crate::write_back::{LATER, counted, flush, spooled};

const SLOW: Duration = Duration::from_secs(4);

/// Runs `meanwhile` one second into a slow `mv a b` of a tree that was looked at.
fn during_a_rename(meanwhile: impl FnOnce(&Stage) + Send) -> Option<Stage> {
    let stage = counted(&["metadata_ttl=30s"], TREE)?;
    sh(stage.dir(), "ls -lR . >/dev/null");
    stage.double().fault(When::operation("CopyObject").key("b/slow"), Fault::Delay(SLOW));
    std::thread::scope(|scope| {
        let mv = scope.spawn(|| fs::rename(stage.path("a"), stage.path("b")).unwrap());
        std::thread::sleep(Duration::from_secs(1));
        meanwhile(&stage);
        mv.join().unwrap();
    });
    std::thread::sleep(Duration::from_millis(3500));
    flush(&stage);
    Some(stage)
}

const TREE: [(&str, &str); 6] = [("a/", ""), ("a/slow", "x"), ("a/d/", ""), ("a/d/f", "x"), ("a/e/", ""), ("keep", "x")];

/// The marker of a folder whose mode was set is written under the name that it has by then.
#[test]
fn a_mode_that_is_not_sent_yet_follows_the_rename() {
    let Some(stage) = counted(&["metadata_ttl=5s"], TREE) else { return };
    sh(stage.dir(), "ls -lR . >/dev/null; chmod 700 a/d");
    stage.double().fault(When::operation("CopyObject"), Fault::Delay(SLOW));
    fs::rename(stage.path("a"), stage.path("b")).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(stage.store.keys(), ["b/", "b/d/", "b/d/f", "b/e/", "b/slow", "keep"]);
}

/// Promise 11: "the name is gone at once and stays gone", or as long as the call takes.
#[test]
fn a_file_is_removed_meanwhile() {
    let Some(stage) = during_a_rename(|stage| fs::remove_file(stage.path("a/d/f")).unwrap()) else { return };
    assert_eq!(stage.store.keys(), ["b/", "b/d/", "b/e/", "b/slow", "keep"]);
}

/// A folder that is removed while one above it is renamed is gone.
#[test]
fn a_folder_is_removed_meanwhile() {
    let Some(stage) = during_a_rename(|stage| fs::remove_dir(stage.path("a/e")).unwrap()) else { return };
    assert_eq!(stage.store.keys(), ["b/", "b/d/", "b/d/f", "b/slow", "keep"]);
}

/// A folder that is made while one above it is renamed is in the new one.
#[test]
fn a_folder_is_made_meanwhile() {
    let Some(stage) = during_a_rename(|stage| fs::create_dir(stage.path("a/d/new")).unwrap()) else { return };
    assert_eq!(stage.store.keys(), ["b/", "b/d/", "b/d/f", "b/d/new/", "b/e/", "b/slow", "keep"]);
}

/// A link that is made while a folder above it is renamed is in the new one.
#[test]
fn a_link_is_made_meanwhile() {
    let Some(stage) = during_a_rename(|stage| std::os::unix::fs::symlink("f", stage.path("a/d/link")).unwrap()) else { return };
    assert_eq!(stage.store.keys(), ["b/", "b/d/", "b/d/f", "b/d/link", "b/e/", "b/slow", "keep"]);
}

/// A mode that is set while a folder above is renamed is kept with the object under its new name.
#[test]
fn a_mode_is_set_meanwhile() {
    let Some(mut stage) = during_a_rename(|stage| fs::set_permissions(stage.path("a/d/f"), Permissions::from_mode(0o600)).unwrap()) else {
        return;
    };
    stage.mount.remount();
    let mode = fs::metadata(stage.path("b/d/f")).unwrap().permissions().mode() & 0o777;
    let kept = stage.store.get("b/d/f").unwrap().metadata;
    assert!(mode == 0o600 && kept.contains_key("mode"), "{mode:o} {kept:?}");
}

/// Promise 13: "Set later they show on this mount at once and over restarts", of a folder that is queued and renamed.
#[test]
fn attributes_of_a_queued_folder_survive_its_rename() {
    let Some(mut stage) = counted(&[LATER], [("keep", "x")]) else { return };
    sh(stage.dir(), "mkdir a a/q; chmod 700 a/q; touch -d '2001-02-03 04:05:06 UTC' a/q; mv a b");
    flush(&stage);
    stage.mount.remount();
    let told = fs::metadata(stage.path("b/q")).unwrap();
    assert_eq!((told.permissions().mode() & 0o777, told.mtime()), (0o700, 981_173_106));
}

/// The mode of a folder is not that of the one that had its name before.
#[test]
fn a_replaced_folder_leaves_nothing() {
    let Some(mut stage) = counted(&[LATER], [("keep", "x")]) else { return };
    sh(stage.dir(), "mkdir -m 700 g; mkdir -m 711 h; mv -T g h");
    flush(&stage);
    stage.mount.remount();
    assert_eq!(fs::metadata(stage.path("h")).unwrap().permissions().mode() & 0o777, 0o700);
}

/// Whatever is done to a name while its folder is read, it shows once.
#[test]
fn a_name_that_is_written_while_its_folder_is_read_shows_once() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    (0..3000).for_each(|n| store.put(&format!("d/f{n:04}"), "x"));
    let stage = Stage::new(store);
    let mut count = 0;
    for entry in fs::read_dir(stage.path("d")).unwrap() {
        let file = OpenOptions::new().append(true).open(entry.unwrap().path()).unwrap();
        (&file).write_all(b"line\n").unwrap();
        files::close(file).unwrap();
        count += 1;
    }
    assert_eq!(count, 3000);
}

/// A folder whose marker is written while the one above is read shows there.
#[test]
fn a_folder_whose_mode_was_set_is_listed() {
    let objects: Vec<String> = (0..100).map(|n| format!("d/f{n:04}")).chain(["d/a-dir/".to_owned()]).collect();
    let Some(stage) = counted(&[], objects.iter().map(|key| (key.as_str(), ""))) else { return };
    sh(stage.dir(), "ls d >/dev/null");
    fs::set_permissions(stage.path("d/a-dir"), Permissions::from_mode(0o700)).unwrap();
    let said = files::output(std::process::Command::new("python3").arg("-c").arg(
        "import os,sys,ctypes,struct,time\nl=ctypes.CDLL(None)\ndef g(fd):\n b=ctypes.create_string_buffer(1024);n=l.syscall(217,fd,b,1024);o=[];p=0\n while p<n:\n  r=struct.unpack_from('<H',b.raw,p+16)[0];o.append(b.raw[p+19:p+r].split(b'\\0')[0].decode());p+=r\n return o\nfd=os.open(sys.argv[1],os.O_RDONLY);s=g(fd);time.sleep(3)\nwhile True:\n e=g(fd)\n if not e: break\n s+=e\nprint(len(s),'a-dir' in s)",
    ).arg(stage.path("d")));
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), "103 True", "{said:?}");
}

/// Promise 20: "A folder does not vanish with its last file", nor with the last one that is stored while others are written.
#[test]
fn a_folder_stays_while_a_file_in_it_is_written() {
    let Some(stage) = counted(&["metadata_ttl=1s"], [("keep", "x"), ("a/x", "x")]) else { return };
    sh(stage.dir(), "ls -R . >/dev/null");
    let mut open = fs::File::create(stage.path("a/big")).unwrap();
    open.write_all(b"part").unwrap();
    fs::remove_file(stage.path("a/x")).unwrap();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(files::names(stage.dir()), ["a", "keep"]);
    assert!(stage.path("a/big").exists());
}

/// Promise 8: "What is being written or uploaded is read on the mount from this machine", also where others have removed all else around it.
#[test]
fn queued_files_stay_in_reach_where_others_emptied_their_folder() {
    let Some(stage) = counted(&[LATER, "metadata_ttl=1s"], [("keep", "x"), ("a/x", "x")]) else { return };
    sh(stage.dir(), "ls -R . >/dev/null; echo mine > a/mine");
    stage.store.delete("a/x");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(fs::read_to_string(stage.path("a/mine")).ok().as_deref(), Some("mine\n"));
}

/// Promise 13: "Set later they show on this mount at once and over restarts", of files that the next mount stores before anybody looks.
#[test]
fn times_of_queued_files_survive_a_crash() {
    let Some(mut stage) = counted(&[LATER], [("keep", "x")]) else { return };
    sh(stage.dir(), "mkdir d; for n in 1 2 3 4 5; do echo $n > d/$n; touch -d '2001-02-03 04:05:06 UTC' d/$n; chmod 600 d/$n; done");
    stage.mount.crash();
    stage.mount.again();
    stage.store.eventually("they are stored", |store| store.keys().len() == 7);
    stage.store.eventually("nothing is queued", |_| spooled(&stage.mount, "json").is_empty());
    let shown: Vec<_> =
        (1..6).map(|n| fs::metadata(stage.path(&format!("d/{n}"))).unwrap()).map(|m| (m.mtime(), m.mode() & 0o777)).collect();
    assert_eq!(shown, [(981_173_106, 0o600); 5], "{:?}", stage.store.get("d/1").unwrap().metadata);
}

/// What another machine has kept with a folder survives a rename by one that has not seen it.
#[test]
fn a_rename_elsewhere_keeps_a_folder_s_mode() {
    if !can_mount() {
        return;
    }
    let store = Store::double_with(Options { domain: Some(AWS.to_owned()), ..Options::default() });
    store.put_with("p/secret/", "", &[("mode", "16832"), ("uid", "1000"), ("mtime", "981173106")]);
    store.put("p/f", "x");
    let mount = Mount::start(Setup::of(&store).taken_for_aws(&store.endpoint()));
    fs::rename(mount.path("p"), mount.path("q")).unwrap();
    let kept = store.get("q/secret/").unwrap().metadata;
    assert_eq!(kept.get("mode").map(String::as_str), Some("16832"), "{kept:?}");
}
