//! Deletes that wait, with `write_back`: promise 11.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;

use crate::support::double::{Fault, Options, When};
use crate::support::files::{self, errno, output, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;
use crate::write_back::{CHANGES, DELETES, LATER, assert_gone, changes, counted, flush, flush_fails, spooled};

/// 1000 files in a directory and more than a page of them in another.
#[test]
fn rm_of_a_big_directory_costs_few_requests() {
    let keys: Vec<String> = (0..1000).map(|n| format!("t/f{n:04}")).chain((0..1500).map(|n| format!("u/f{n:04}"))).collect();
    let Some(stage) = counted(&[LATER, "metadata_ttl=1h"], keys.iter().map(|key| (key.as_str(), "x"))) else { return };
    sh(stage.dir(), "rm -r t u");
    assert_eq!(changes(&stage).of_any(DELETES), 0);
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
    // A listing of its own, not what was known before.
    stage.mount.ask(&["refresh"], stage.dir());
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
    let listings = stage.double().requests().total();
    flush(&stage);
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    let requests = changes(&stage);
    assert!(listings <= 10, "{listings} requests before the deletes");
    assert!((3..=4).contains(&requests.of_any(DELETES)), "{:?}", requests.summary());
}

/// What is deleted stays hidden while the store is away, over a refresh and over a kill -9 with a remount.
#[test]
fn no_name_flickers_back() {
    let Some(mut stage) = counted(&[LATER, "metadata_ttl=0", "negative_metadata_ttl=0"], [("d/f", "x"), ("d/g", "x"), ("e/f", "x")]) else {
        return;
    };
    sh(stage.dir(), "rm d/f; rm -r e");
    for operation in DELETES {
        stage.double().fault(When::operation(operation), Fault::Error(503, "SlowDown"));
    }
    for turn in ["before", "after a refresh", "after a crash"] {
        match turn {
            "after a refresh" => drop(stage.mount.ask(&["refresh"], stage.dir())),
            "after a crash" => {
                stage.mount.crash();
                stage.mount.again();
                // These are due at once, and tried.
                stage.store.eventually("a delete is tried", |_| stage.double().requests().of_any(DELETES) > 0);
            }
            _ => {}
        }
        assert_gone(&stage, "d/f");
        assert_gone(&stage, "e");
        assert_eq!(files::names(&stage.path("d")), ["g"], "{turn}");
        assert_eq!(stage.store.keys(), ["d/f", "d/g", "e/f"], "{turn}");
    }
    stage.store.eventually("status tells of them", |_| {
        let status = stage.mount.status();
        status.contains("deleting") && status.contains("/d/f")
    });
    stage.double().clear_faults();
    flush(&stage);
    assert_eq!(stage.store.keys(), ["d/g"]);
    assert!(stage.mount.status().contains("everything is in S3"), "{}", stage.mount.status());
}

/// A new content under a removed name is one overwrite, on the condition that nobody else has changed it.
#[test]
fn a_new_content_cancels_the_delete() {
    let Some(stage) = counted(&[LATER], [("f", "before"), ("g", "before"), ("h", "before")]) else { return };
    sh(stage.dir(), "rm f g h; echo new > f; echo new > .g.tmp; mv .g.tmp g; echo new > h; rm h");
    assert_eq!(changes(&stage).of_any(CHANGES), 0);
    let records: String = spooled(&stage.mount, "delete").iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    assert!(records.contains("\"h\"") && !records.contains("\"f\""), "{records}");
    flush(&stage);
    let requests = changes(&stage);
    assert_eq!((requests.of("PutObject"), requests.of_any(DELETES)), (2, 1), "{:?}", requests.summary());
    assert_eq!(stage.store.keys(), ["f", "g"]);
    assert!(["f", "g"].iter().all(|key| stage.store.bytes(key) == "new\n"));

    // Theirs, made between our rm and our upload, is not overwritten; ours is kept beside it.
    sh(stage.dir(), "rm f; echo newer > f");
    stage.store.put("f", "theirs");
    flush(&stage);
    assert_eq!(stage.store.bytes("f"), "theirs");
    let beside: Vec<_> = stage.store.keys().into_iter().filter(|key| key.starts_with("f (conflict of ")).collect();
    assert_eq!(beside.len(), 1, "{:?}", stage.store.keys());
    assert_eq!(stage.store.bytes(&beside[0]), "newer\n");
}

/// Somebody else's version under a removed name is not deleted, and shows.
#[test]
fn a_delete_spares_what_somebody_else_has_written_since() {
    let Some(stage) = counted(&[LATER], [("f", "before"), ("g", "before")]) else { return };
    sh(stage.dir(), "rm f g");
    stage.store.put("f", "theirs");
    flush(&stage);
    assert_eq!(stage.store.keys(), ["f"]);
    assert_eq!(fs::read(stage.path("f")).unwrap(), b"theirs");
    assert_gone(&stage, "g");
}

/// So it is where DeleteObjects ignores the ETags that it is given: by the first batch, which finds that out, and by later ones.
#[test]
fn a_delete_spares_it_on_every_store() {
    if !can_mount() {
        return;
    }
    let store = Store::double_with(Options { compares_on_delete: false, page_size: 3, ..Options::default() });
    let names = ["d/a", "d/b", "d/c", "d/é", "e"];
    let stage = Stage::with(store, &[LATER, "metadata_ttl=0"]);
    for turn in ["first", "later"] {
        for name in names {
            stage.store.put(name, turn);
        }
        for other in 0..9 {
            stage.store.put(&format!("d/between{other}"), "x");
        }
        sh(stage.dir(), "rm d/a d/b d/c d/é e");
        stage.store.put("d/b", "theirs");
        stage.store.put("e", "theirs");
        stage.store.delete("d/c");
        flush(&stage);
        let left: Vec<_> = stage.store.keys().into_iter().filter(|key| names.contains(&key.as_str())).collect();
        assert_eq!(left, ["d/b", "e"], "{turn}: {:?}", stage.double().requests().summary());
        assert_eq!(fs::read(stage.path("e")).unwrap(), b"theirs");
    }
}

/// What the store refuses is told with its reason, its name shows again, and it can be tried again.
#[test]
fn a_refused_delete_shows_the_name_again() {
    for names in ["f", "f g"] {
        let Some(stage) = counted(&[LATER, "metadata_ttl=1h"], [("f", "content"), ("g", "content"), ("h", "content")]) else { return };
        sh(stage.dir(), &format!("ls; rm {names}"));
        for operation in DELETES {
            stage.double().fault(When::operation(operation), Fault::Error(403, "AccessDenied"));
        }
        let said = flush_fails(&stage);
        assert!(said.contains("not deleted") && said.contains("/f") && said.contains("denied"), "{said}");
        assert_eq!(files::names(stage.dir()), ["f", "g", "h"]);
        assert_eq!(fs::read(stage.path("f")).unwrap(), b"content");
        let status = stage.mount.status();
        assert!(status.contains("undeleted") && status.contains("denied"), "{status}");
        stage.double().clear_faults();
        sh(stage.dir(), &format!("rm {names}"));
        flush(&stage);
        assert!(!stage.store.keys().contains(&"f".to_owned()));
        assert!(stage.mount.status().contains("everything is in S3"), "{}", stage.mount.status());
    }
}

/// Number of a delete in status, where other tests' mounts are told of too.
fn number_of(stage: &Stage, key: &str) -> String {
    let told: serde_json::Value = serde_json::from_slice(&output(stage.mount.command().args(["status", "--json"])).stdout).unwrap();
    let ours = |place: &serde_json::Value| place.as_str().is_some_and(|place| Path::new(place).starts_with(stage.mount.home()));
    let of_stage = told.as_array().unwrap().iter().filter(|element| ours(&element["mountpoint"]) || ours(&element["spool"]));
    let mut uploads = of_stage.flat_map(|element| element["uploads"].as_array().unwrap());
    let found = uploads.find(|upload| upload["key"] == key).map(|upload| upload["number"].as_str().unwrap().to_owned());
    found.unwrap_or_else(|| panic!("{key} is not in {told}"))
}

/// A delete that was refused is tried again or taken back by its number; one that waits for a mount is taken back without one.
#[test]
fn a_delete_has_a_number() {
    let Some(mut stage) = counted(&[LATER, "metadata_ttl=1h"], [("f", "content"), ("g", "content"), ("h", "content")]) else { return };
    sh(stage.dir(), "ls; rm f g");
    for operation in DELETES {
        stage.double().fault(When::operation(operation), Fault::Error(403, "AccessDenied"));
    }
    flush_fails(&stage);
    let [f, g] = ["f", "g"].map(|key| number_of(&stage, key));
    let refused = output(stage.mount.command().args(["retry", &f]));
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("denied"), "{refused:?}");
    let bytes = output(stage.mount.command().args(["recover", &number_of(&stage, "f"), "-"]));
    assert!(!bytes.status.success() && String::from_utf8_lossy(&bytes.stderr).contains("no bytes"), "{bytes:?}");
    stage.double().clear_faults();
    assert!(stage.mount.ask(&["retry"], Path::new(&number_of(&stage, "f"))).contains("deleted: s3://releases/f"));
    assert!(stage.mount.ask(&["discard", "--yes"], Path::new(&g)).contains("not deleted: s3://releases/g"));
    assert!(stage.mount.status().contains("everything is in S3"), "{}", stage.mount.status());
    assert_eq!(
        (stage.store.keys(), files::names(stage.dir())),
        (vec!["g".to_owned(), "h".to_owned()], vec!["g".to_owned(), "h".to_owned()])
    );
    sh(stage.dir(), "rm g h");
    stage.mount.crash();
    let g = number_of(&stage, "g");
    assert!(stage.mount.ask(&["discard", "--yes"], Path::new(&g)).contains("not deleted: s3://releases/g"));
    stage.mount.again();
    flush(&stage);
    assert_eq!(stage.store.keys(), ["g"]);
}

/// An outage is ridden out: flush and unmount say what is left, and the next mount resumes it.
#[test]
fn deletes_ride_an_outage_out() {
    let Some(mut stage) = counted(&[LATER, "close_timeout=2s", "retries=0"], [("f", "x"), ("g", "x")]) else { return };
    sh(stage.dir(), "rm f g");
    stage.double().set_down(true);
    let said = flush_fails(&stage);
    assert!(said.contains("not deleted, goes on in the background: s3://releases/f"), "{said}");
    stage.mount.umount_leaving("g");
    stage.double().set_down(false);
    assert_eq!(stage.store.keys(), ["f", "g"]);
    stage.mount.again();
    stage.store.eventually("the deletes are done", |store| store.keys().is_empty());
}

/// Keys that XML cannot carry go one by one, and keep no other.
#[test]
fn strange_keys_are_deleted_too() {
    let Some(stage) = counted(&[LATER], [("d/a\u{1}b", "x"), ("d/plain", "x"), ("d/other", "x")]) else { return };
    sh(stage.dir(), "rm -r d");
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
    flush(&stage);
    assert_eq!(stage.store.keys(), Vec::<String>::new());
}

/// A directory is renamed without what was removed from it, onto a name that was removed.
#[test]
fn a_tree_is_renamed_without_what_was_removed() {
    let Some(stage) = counted(&[LATER], [("a/gone", "x"), ("a/kept", "x"), ("b/old", "x")]) else { return };
    sh(stage.dir(), "rm a/gone; rm -r b; mv a b");
    assert_eq!(files::names(&stage.path("b")), ["kept"]);
    flush(&stage);
    assert_eq!(stage.store.keys().iter().filter(|key| !key.ends_with('/')).collect::<Vec<_>>(), ["b/kept"]);
}

/// A file that is open when it is removed is not published by what was queued of it.
#[test]
fn a_queued_file_that_is_open_when_it_is_removed() {
    let Some(stage) = counted(&[LATER], []) else { return };
    files::write(&stage.path("f"), b"content").unwrap();
    let open = fs::File::open(stage.path("f")).unwrap();
    fs::remove_file(stage.path("f")).unwrap();
    flush(&stage);
    assert_eq!(std::io::read_to_string(&open).unwrap(), "content");
    drop(open);
    flush(&stage);
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    assert_eq!(changes(&stage).of_any(CHANGES), 0);
}

/// Without `write_back` unlink sends its DELETE and returns the store's answer.
#[test]
fn without_write_back_unlink_tells_the_truth() {
    let Some(stage) = counted(&[], [("f", "x"), ("g", "x")]) else { return };
    fs::remove_file(stage.path("f")).unwrap();
    assert_eq!(stage.store.keys(), ["g"]);
    stage.double().fault(When::operation("DeleteObject"), Fault::Error(403, "AccessDenied"));
    assert_eq!(errno(fs::remove_file(stage.path("g"))), Errno::EACCES);
}

/// A delete on its way when the file is made anew never meets the new object, on a store that knows no conditions either.
#[test]
fn a_delete_on_its_way_does_not_hit_the_new_object() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put("f", "before");
    store.put("g", "before");
    let stage = Stage { mount: Mount::start(Setup::of(&store).option("write_back=1s")), store };
    for operation in DELETES {
        stage.double().fault(When::operation(operation), Fault::Delay(Duration::from_secs(3)));
    }
    sh(stage.dir(), "rm f g");
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while stage.double().open() == 0 {
        assert!(std::time::Instant::now() < until, "no delete was sent");
        std::thread::sleep(Duration::from_millis(10));
    }
    files::write(&stage.path("f"), b"after").unwrap();
    flush(&stage);
    assert_eq!(stage.store.keys(), ["f"]);
    assert_eq!(stage.store.bytes("f"), "after");
}

/// A file whose new content is on its way is removed: that content takes the delete of what it was to replace for its own no more, and
/// what was there before does not come back.
/// Promise 11: "the name is gone at once and stays gone"
#[test]
fn a_file_that_is_being_replaced_is_removed_with_what_it_replaces() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put("f", "before");
    let setup = Setup::of(&store).option("write_back=100ms").option("part_size=5M");
    let stage = Stage { mount: Mount::start(setup.env(packmule::failpoint::VARIABLE, "unlink-queued=400")), store };
    stage.double().fault(When::operation("UploadPart"), Fault::Delay(Duration::from_secs(1)));
    files::write(&stage.path("f"), &files::noise(1, 12 << 20)).unwrap();
    fs::remove_file(stage.path("f")).unwrap();
    flush(&stage);
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    assert_eq!(errno(fs::metadata(stage.path("f"))), Errno::ENOENT);
}

on_every_store! {
    /// Promise 11: "the name is gone at once", and is free for a folder where a file was, and for a file where a folder was.
    fn a_name_that_was_removed_is_free_for_the_other_kind(store) {
        for name in ["file", "d/f", "from", "tree/f"] {
            store.put(name, "x");
        }
        let stage = Stage::with(store, &[LATER]);
        fs::remove_file(stage.path("file")).unwrap();
        fs::create_dir(stage.path("file")).unwrap();
        fs::write(stage.path("file/below"), "below").unwrap();
        fs::remove_dir_all(stage.path("d")).unwrap();
        fs::write(stage.path("d"), "a file").unwrap();
        fs::remove_dir_all(stage.path("tree")).unwrap();
        fs::rename(stage.path("from"), stage.path("tree")).unwrap();
        flush(&stage);
        for (name, bytes) in [("file/below", "below"), ("d", "a file"), ("tree", "x")] {
            assert_eq!(stage.store.bytes(name), bytes, "{name}");
            assert_eq!(fs::read_to_string(stage.path(name)).unwrap(), bytes, "{name}");
        }
        let keys: Vec<String> = stage.store.keys().into_iter().filter(|key| !key.ends_with('/')).collect();
        assert_eq!(keys, ["d", "file/below", "tree"]);
    }
}
