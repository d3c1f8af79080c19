//! Keys that are not file names, and file names that are not keys: promises 18 and 19. SeaweedFS keeps keys as paths
//! and cannot hold these; the double can.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::PathBuf;

use nix::errno::Errno;
use sha2::{Digest as _, Sha256};

use crate::support::double::{Fault, Object, When, md5};
use crate::support::files::{self, errno};
use crate::support::mount::can_mount;
use crate::support::stage::Stage;
use crate::support::store::Store;

const BUCKET: &str = "releases";

/// A bucket of these keys, each with its own name as content.
fn bucket_of(keys: &[&str]) -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    for key in keys {
        store.put(key, (*key).to_owned());
    }
    Some(Stage::new(store))
}

/// Every strange key beside an ordinary neighbour: as which path it shows.
fn strange_keys() -> Vec<(String, String)> {
    let long = "l\u{f6}ng-".repeat(60);
    let digest: String = Sha256::digest(long.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let mut cut = 180;
    while !long.is_char_boundary(cut) {
        cut -= 1;
    }
    let shown_long = format!("%s3+{}~{digest}", &long[..cut]);
    let pairs = [
        ("a//b", "a/%s3:/b"),
        ("/leading", "%s3:/leading"),
        ("p/../q", "p/%s3:../q"),
        ("p/./r", "p/%s3:./r"),
        ("..", "%s3:.."),
        ("%s3begins", "%s3:%25s3begins"),
        ("nul\0byte", "%s3:nul%00byte"),
        ("ctl\u{1}\u{1b}\u{7f}\n\t", "ctl\u{1}\u{1b}\u{7f}\n\t"),
        ("both", "both%s3file"),
        ("both/under", "both/under"),
        ("plain%2Fpercent", "plain%2Fpercent"),
    ];
    let mut all: Vec<_> = pairs.map(|(key, path)| (key.to_owned(), path.to_owned())).into();
    all.push((long, shown_long));
    all
}

/// Promise 18: "shown under a reversible escape; readable … A strange key never breaks, hides or empties the listing of the others."
#[test]
fn every_key_shows_and_reads() {
    let keys = strange_keys();
    let Some(stage) = bucket_of(&keys.iter().map(|(key, _)| key.as_str()).chain(["neighbour"]).collect::<Vec<_>>()) else { return };
    assert_eq!(fs::read(stage.path("neighbour")).unwrap(), b"neighbour");
    for (key, shown) in &keys {
        let bytes = fs::read(stage.path(shown)).unwrap_or_else(|error| panic!("{key:?} as {shown:?}: {error}"));
        assert_eq!(bytes, key.as_bytes(), "{shown}");
        let (dir, name) = shown.rsplit_once('/').unwrap_or(("", shown));
        let names = files::names(&stage.path(dir));
        assert!(names.contains(&name.to_owned()), "{name:?} is not among {names:?}");
    }
    let root = files::names(stage.dir());
    let mut expected: Vec<String> = keys.iter().map(|(_, shown)| shown.split('/').next().unwrap().to_owned()).collect();
    expected.push("neighbour".to_owned());
    expected.sort();
    expected.dedup();
    assert_eq!(root, expected);
}

/// The same after a listing was made first: names of the listing are found as they are.
#[test]
fn every_listed_name_is_found() {
    let keys = strange_keys();
    let Some(stage) = bucket_of(&keys.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>()) else { return };
    let tree = files::tree(stage.dir());
    let contents: Vec<Vec<u8>> = tree
        .values()
        .filter_map(|node| match &node.content {
            files::Content::File(bytes) => Some(bytes.clone()),
            _ => None,
        })
        .collect();
    for (key, _) in &keys {
        assert!(contents.contains(&key.clone().into_bytes()), "{key:?} was not met on a walk: {:?}", tree.keys());
    }
    assert_eq!(contents.len(), keys.len());
}

/// Promise 18: "deletable, and never touching a neighbour (`a/../b` is not `b`)"
#[test]
fn deleting_a_strange_key_deletes_it_alone() {
    let keys = strange_keys();
    let mut all: Vec<&str> = keys.iter().map(|(key, _)| key.as_str()).collect();
    all.extend(["q", "r", "b", "a/b", "p/q", "leading"]);
    let Some(stage) = bucket_of(&all) else { return };
    let mut left: Vec<String> = all.iter().map(|&key| key.to_owned()).collect();
    for (key, shown) in &keys {
        fs::remove_file(stage.path(shown)).unwrap_or_else(|error| panic!("{key:?} as {shown:?}: {error}"));
        left.retain(|other| other != key);
        left.sort();
        let keys: Vec<String> = stage.store.keys().into_iter().filter(|key| !key.ends_with('/')).collect();
        assert_eq!(keys, left, "after removing {key:?}");
    }
}

/// Promise 18: "renamable": out to an ordinary name, and back under the escape.
#[test]
fn strange_keys_are_renamed() {
    let keys = strange_keys();
    let Some(stage) = bucket_of(&keys.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>()) else { return };
    for (key, shown) in keys.iter().filter(|(key, _)| !key.starts_with("both")) {
        fs::rename(stage.path(shown), stage.path("ordinary")).unwrap_or_else(|error| panic!("{shown:?}: {error}"));
        assert_eq!(stage.store.bytes("ordinary"), key.as_bytes());
        assert!(stage.store.get(key).is_none(), "{key:?}");
        if !shown.starts_with("%s3+") && stage.path(shown).parent().unwrap().is_dir() {
            fs::rename(stage.path("ordinary"), stage.path(shown)).unwrap();
            assert_eq!(stage.store.bytes(key), key.as_bytes());
        }
    }
}

/// A strange key is overwritten under its name.
#[test]
fn strange_keys_are_written() {
    let keys = strange_keys();
    let Some(stage) = bucket_of(&keys.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>()) else { return };
    for (key, shown) in &keys {
        files::write(&stage.path(shown), b"new").unwrap_or_else(|error| panic!("{shown:?}: {error}"));
        assert_eq!(stage.store.bytes(key), "new", "{key:?}");
    }
    assert_eq!(stage.store.keys().iter().filter(|key| !key.ends_with('/')).count(), keys.len());
}

/// Promise 18: "`a` beside `a/x`: `a` is the directory, the object shows beside it"
#[test]
fn an_object_beside_a_directory_of_its_name() {
    let Some(stage) = bucket_of(&["a", "a/x"]) else { return };
    assert_eq!(files::names(stage.dir()), ["a", "a%s3file"]);
    assert!(stage.path("a").is_dir());
    assert_eq!(files::names(&stage.path("a")), ["x"]);
    assert_eq!(fs::read(stage.path("a%s3file")).unwrap(), b"a");
    assert_eq!(errno(File::create(stage.path("a"))), Errno::EISDIR);
    fs::remove_file(stage.path("a%s3file")).unwrap();
    assert_eq!(stage.store.keys(), ["a/x"]);
}

/// A marker with bytes in it is a directory; its bytes are not lost by using it.
#[test]
fn a_marker_with_content_survives() {
    let Some(stage) = bucket_of(&["d/", "d/x"]) else { return };
    assert!(files::names(&stage.path("d")).contains(&"x".to_owned()));
    files::write(&stage.path("d/y"), b"y").unwrap();
    assert_eq!(stage.store.bytes("d/"), "d/");
}

/// Promise 18: "A local name that is not UTF-8 is escaped in its key and shown as given."
#[test]
fn names_that_are_not_utf8() {
    let Some(mut stage) = bucket_of(&[]) else { return };
    let path: PathBuf = stage.dir().join(files::name(b"caf\xe9 %"));
    File::create(&path).unwrap().write_all(b"latin-1").unwrap();
    let keys = stage.store.keys();
    assert!(keys.len() == 1 && keys[0].starts_with("%s3:caf%E9"), "{keys:?}");
    stage.mount.remount();
    let mut text = String::new();
    File::open(&path).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "latin-1");
    let listed: Vec<_> = fs::read_dir(stage.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(listed, [files::name(b"caf\xe9 %")]);
}

/// Promise 18: "Control characters are ordinary bytes of a name (escaped in status and logs)."
#[test]
fn control_characters_do_not_reach_the_terminal() {
    let Some(stage) = bucket_of(&[]) else { return };
    let name = "line\nbreak\u{1b}[31mred\u{7}";
    files::write(&stage.path(name), b"x").unwrap();
    assert_eq!(stage.store.keys(), [name]);
    stage.double().fault(When::operation("PutObject"), Fault::Error(403, "AccessDenied"));
    assert!(files::write(&stage.path(name), b"y").is_err());
    let (status, log) = (stage.mount.status(), stage.mount.log());
    assert!(!status.contains("line\nbreak"), "status: {status:?}");
    for (what, text) in [("status", status), ("log", log)] {
        assert!(text.contains("[31mred"), "{what}: {text}");
        assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'), "{what}: {text:?}");
    }
}

/// Strange directories are listed over several pages like any other.
#[test]
fn pages_with_strange_keys() {
    if !can_mount() {
        return;
    }
    let store = Store::double_with(crate::support::double::Options { page_size: 7, ..Default::default() });
    let mut expected = Vec::new();
    for n in 0..100 {
        let key = format!("d/{}{n:03}", ["", "\u{1}", "a b+", "\u{e9}", "%41"][n % 5]);
        store.put(&key, md5(key.as_bytes()));
        expected.push(key["d/".len()..].to_owned());
        store.as_double().unwrap().put_object(BUCKET, &format!("d/sub{n}/x"), Object::new("x"));
        expected.push(format!("sub{n}"));
    }
    expected.sort();
    let stage = Stage::new(store);
    assert_eq!(files::names(&stage.path("d")), expected);
}

/// The name of a file that would have its directory's own key is refused, and what was to be moved there stays.
#[test]
fn a_file_without_a_name_is_refused() {
    let Some(stage) = bucket_of(&["d/f"]) else { return };
    assert_eq!(errno(fs::rename(stage.path("d/f"), stage.path("d/%s3:"))), Errno::EINVAL);
    assert_eq!(errno(File::create(stage.path("d/%s3:"))), Errno::EINVAL);
    assert_eq!(stage.store.bytes("d/f"), "d/f");
}

/// A store that refuses without an object in the way (its real directory of that name) is not asked for ever.
#[test]
fn a_refusal_without_a_reason_ends() {
    let Some(stage) = bucket_of(&[]) else { return };
    stage.double().fault(When::operation("PutObject").key("f"), Fault::Error(412, "PreconditionFailed"));
    assert!(files::write(&stage.path("f"), b"mine").is_err());
    assert!(stage.double().requests().of("PutObject") < 20, "{:?}", stage.double().requests().summary());
}
