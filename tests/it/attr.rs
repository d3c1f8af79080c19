//! Attributes: promises 13, 27, 28, 29, and the extended ones of the options.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;

use crate::support::double::{Fault, Object, When};
use crate::support::files::{self, errno, noise, sh};
use crate::support::mount::can_mount;
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

/// A key's user metadata, or nothing.
fn metadata(store: &Store, key: &str, name: &str) -> Option<String> {
    store.get(key)?.metadata.get(name).cloned()
}

on_every_store! {
    /// Promise 13: "true on this mount at once, are remembered by key and ETag over restarts … and reach S3 by one coalesced metadata copy"
    fn times_and_modes_reach_the_store(store) {
        let mut stage = Stage::new(store);
        files::write(&stage.path("f"), b"content").unwrap();
        sh(stage.dir(), "chmod 750 f; touch -d '2001-02-03 04:05:06.25 UTC' f");
        assert_eq!(sh(stage.dir(), "stat -c '%a %Y' f").trim(), "750 981173106", "true on this mount at once");
        stage.store.eventually("mode and mtime are in the bucket", |store| {
            metadata(store, "f", "mode").as_deref() == Some("33256") && metadata(store, "f", "mtime").is_some_and(|m| m.starts_with("981173106"))
        });
        assert_eq!(stage.store.bytes("f"), "content");
        stage.mount.remount();
        let _ = fs::read(stage.path("f")).unwrap();
        assert_eq!(sh(stage.dir(), "stat -c '%a %Y' f").trim(), "750 981173106", "after a remount");
    }

    /// Promise 13: "Such a copy is the same version of the file: readers, cache and the base for conflicts follow it, and it invalidates nothing."
    fn readers_and_writers_follow_a_metadata_copy(store) {
        let stage = Stage::new(store);
        let bytes = noise(1, 20 << 20);
        files::write(&stage.path("f"), &bytes).unwrap();
        let (mut reader, writer) = (fs::File::open(stage.path("f")).unwrap(), files::open_existing(&stage.path("f")));
        let mut seen = vec![0; 16 << 10];
        reader.read_exact(&mut seen).unwrap();
        if let Some(double) = stage.store.as_double() {
            double.reset_requests();
        }
        sh(stage.dir(), "touch -d '2001-02-03 04:05:06 UTC' f");
        stage.store.eventually("the mtime is in the bucket", |store| metadata(store, "f", "mtime").is_some_and(|m| m.starts_with("981173106")));
        reader.read_to_end(&mut seen).unwrap();
        assert!(seen == bytes);
        if let Some(double) = stage.store.as_double() {
            assert_eq!(double.requests().of("GetObject"), 0, "{:?}", double.requests().summary());
        }
        writer.write_all_at(b"ours", 0).unwrap();
        files::close(writer).unwrap();
        assert!(stage.store.bytes("f") == [b"ours", &bytes[4..]].concat());
        assert_eq!(stage.store.keys(), ["f"], "no conflict with ourselves");
    }

    /// Promise 28: "Mode, owner and group are kept as s3fs keeps them": what another program wrote so is understood.
    fn metadata_of_other_programs(store) {
        store.put_with("f", "x", &[("mtime", "981173106.25"), ("mode", "33152"), ("uid", "12"), ("gid", "34")]);
        let stage = Stage::new(store);
        // A listing carries no metadata: it shows once the file was looked at by itself.
        stage.store.eventually("the metadata shows", |_| {
            assert_eq!(fs::read(stage.path("f")).unwrap(), b"x");
            let meta = fs::metadata(stage.path("f")).unwrap();
            (meta.mtime(), meta.permissions().mode() & 0o7777, meta.uid(), meta.gid()) == (981_173_106, 0o600, 12, 34)
        });
    }

    /// Promise 13: "They never fail a copy."
    fn changing_owner_and_times_never_fails(store) {
        let stage = Stage::new(store);
        files::write(&stage.path("f"), b"x").unwrap();
        fs::create_dir(stage.path("d")).unwrap();
        sh(stage.dir(), "touch -r f d; chmod 700 d; chmod u+w f");
        let meta = fs::metadata(stage.path("f")).unwrap();
        let owner = format!("{}:{}", meta.uid(), meta.gid());
        files::run(stage.dir(), "chown", &[&owner, "f", "d"]);
        assert_eq!(fs::read(stage.path("f")).unwrap(), b"x");
    }

    /// Promise 29: "A symbolic link is an object as s3fs writes one (S_IFLNK in `x-amz-meta-mode`, the target as body)"
    fn symbolic_links(store) {
        let mut stage = Stage::new(store);
        files::write(&stage.path("target"), b"content").unwrap();
        symlink("target", stage.path("link")).unwrap();
        symlink("/absolute/elsewhere", stage.path("dangling")).unwrap();
        assert_eq!(fs::read(stage.path("link")).unwrap(), b"content");
        assert_eq!(stage.store.bytes("link"), "target");
        assert_eq!(metadata(&stage.store, "link", "mode").as_deref(), Some("41471"));
        assert!(fs::symlink_metadata(stage.path("link")).unwrap().is_symlink());
        assert_eq!(fs::symlink_metadata(stage.path("link")).unwrap().len(), 6);
        stage.mount.remount();
        assert_eq!(fs::read_link(stage.path("link")).unwrap().to_str(), Some("target"));
        assert_eq!(fs::read_link(stage.path("dangling")).unwrap().to_str(), Some("/absolute/elsewhere"));
        assert_eq!(fs::read(stage.path("link")).unwrap(), b"content");
        assert!(!stage.path("dangling").exists());
    }

    /// Promise 29: "Where a store does not list it, another machine sees a small text file until a HEAD or GET answer shows the mode; from then on a link."
    fn links_that_no_listing_marks(store) {
        store.put("target", "content");
        for (link, to) in [("link", "target"), ("dangling", "nowhere"), ("looked-at", "target")] {
            store.put_with(link, to, &[("mode", "41471")]);
        }
        let mut stage = Stage::new(store);
        assert_eq!(files::names(stage.dir()), ["dangling", "link", "looked-at", "target"]);
        let link = |name: &str| stage.path(name).symlink_metadata().unwrap().is_symlink();
        // An open asks: the GET of the first one, that would read the link's own text, tells.
        assert_eq!(fs::read(stage.path("link")).unwrap(), b"content");
        assert!(link("link"));
        std::thread::sleep(Duration::from_millis(1100));
        assert_eq!(fs::read(stage.path("looked-at")).unwrap(), b"content");
        assert_eq!(errno(fs::read(stage.path("dangling"))), Errno::ENOENT);
        assert!(link("looked-at") && link("dangling"));
        stage.mount.command().args(["refresh"]).arg(stage.dir()).status().unwrap();
        assert!(link("looked-at") && link("dangling"), "after another listing");
        stage.mount.remount();
        assert!(["link", "dangling", "looked-at"].iter().all(|name| stage.path(name).symlink_metadata().unwrap().is_symlink()));
    }

    /// Promise 27: "statfs says 1 PiB free"
    fn statfs_has_room(store) {
        let stage = Stage::new(store);
        let stat = nix::sys::statvfs::statvfs(stage.dir()).unwrap();
        let free = stat.blocks_available() as u64 * stat.fragment_size() as u64;
        assert_eq!(free, 1 << 50);
        assert!(stat.name_max() >= 255);
    }

    /// "other `user.*` are kept as s3fs keeps them"; `user.s3.*` read and write what S3 has.
    fn extended_attributes(store) {
        let mut stage = Stage::new(store);
        files::write(&stage.path("page.html"), b"<p>").unwrap();
        let attribute = |stage: &Stage, name: &str| sh(stage.dir(), &format!("getfattr --only-values -n {name} page.html"));
        assert_eq!(attribute(&stage, "user.s3.etag").trim_matches('"'), stage.store.get("page.html").unwrap().etag);
        sh(stage.dir(), "setfattr -n user.comment -v 'made by hand' page.html");
        sh(stage.dir(), "setfattr -n user.s3.content-type -v text/plain page.html; setfattr -n user.s3.meta.origin -v here page.html");
        assert_eq!(attribute(&stage, "user.comment"), "made by hand");
        stage.store.eventually("the attributes are in the bucket", |store| {
            let seen = store.get("page.html").unwrap();
            seen.content_type.as_deref() == Some("text/plain") && seen.metadata.get("origin").map(String::as_str) == Some("here") && seen.metadata.contains_key("xattr")
        });
        stage.mount.remount();
        assert_eq!(attribute(&stage, "user.comment"), "made by hand");
        assert_eq!(attribute(&stage, "user.s3.content-type"), "text/plain");
        assert!(sh(stage.dir(), "getfattr -d page.html").contains("user.comment"));
        sh(stage.dir(), "setfattr -x user.comment page.html; ! getfattr -n user.comment page.html 2>/dev/null");
    }

    /// Promise 28: "Where `uid=` or `gid=` is given every file shows it; where `umask=`, `file_mode=` or `dir_mode=` is given, modes follow it"
    fn owner_and_mode_options(store) {
        store.put_with("f", "x", &[("mode", "33188"), ("uid", "5")]);
        store.put("d/g", "y");
        let stage = Stage::with(store, &["uid=1234", "gid=5678", "file_mode=0640", "dir_mode=0710"]);
        assert_eq!(sh(stage.dir(), "stat -c '%u %g %a' f d d/g").trim(), "1234 5678 640\n1234 5678 710\n1234 5678 640");
        sh(stage.dir(), "chmod 777 f; chown 99:99 f");
        assert_eq!(fs::read(stage.path("f")).unwrap(), b"x");
        assert_eq!(metadata(&stage.store, "f", "mode").as_deref(), Some("33188"), "taken and not kept");
    }

    /// "file_mode=0644, dir_mode=0755", "uid and gid of who mounts"
    fn defaults_of_owner_and_mode(store) {
        store.put("f", "x");
        store.put("d/g", "y");
        let stage = Stage::new(store);
        let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
        assert_eq!(sh(stage.dir(), "stat -c '%u %g %a' f d").trim(), format!("{uid} {gid} 644\n{uid} {gid} 755"));
    }

    /// Promise 28: "Setuid, setgid and sticky bits that come from a bucket are masked."
    fn no_setuid_from_a_bucket(store) {
        store.put_with("f", "#!/bin/sh", &[("mode", "36333")]);
        let stage = Stage::new(store);
        stage.store.eventually("the mode shows", |_| {
            fs::read(stage.path("f")).unwrap();
            sh(stage.dir(), "stat -c %a f").trim() == "755"
        });
    }

    /// What a truncation, a write and a preallocation leave of set-user-ID is what they leave of it on a local disk: root keeps it.
    fn privileges_after_a_change(store) {
        let stage = Stage::new(store);
        let local = tempfile::tempdir().unwrap();
        let script = "for how in 'truncate -s 1' 'fallocate -l 9' 'truncate -s 0' 'tee' 'chown $(id -u)'; do
            printf content > f; chmod 6755 f; sh -c \"$how f\" < /dev/null; stat -c \"$how %a\" f; rm f; done";
        assert_eq!(sh(stage.dir(), script), sh(local.path(), script));
    }

    /// Promise 13: "Later ones … reach S3 by one coalesced metadata copy in the background": whatever is set last leaves out none of the others.
    fn everything_that_is_set_reaches_the_store(store) {
        let stage = Stage::new(store);
        files::write(&stage.path("f"), b"content").unwrap();
        sh(stage.dir(), "chmod 750 f; touch -d '2001-02-03 04:05:06 UTC' f; setfattr -n user.comment -v 'by hand' f");
        stage.store.eventually("mode, mtime and the attribute are in the bucket", |store| {
            metadata(store, "f", "mode").as_deref() == Some("33256")
                && metadata(store, "f", "mtime").is_some_and(|m| m.starts_with("981173106"))
                && metadata(store, "f", "xattr").is_some()
        });
    }

    /// The time of a file that others wrote is the store's.
    fn modification_time_of_plain_objects(store) {
        store.put("f", "x");
        let stage = Stage::new(store);
        let modified = fs::metadata(stage.path("f")).unwrap().modified().unwrap();
        let age = SystemTime::now().duration_since(modified).unwrap_or_default();
        assert!(age < Duration::from_secs(60), "{age:?}");
    }
}

/// Promise 13: "mtime and mode known before the upload began travel with it (a single PUT: before close)."
/// Promise 13: "An mtime that only write() made is never worth a copy"
#[test]
fn what_is_known_before_the_close_travels() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new(Store::double());
    let file = fs::File::create(stage.path("f")).unwrap();
    file.write_all_at(b"content", 0).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(981_173_106)).unwrap();
    files::close(file).unwrap();
    assert!(metadata(&stage.store, "f", "mtime").is_some_and(|mtime| mtime.starts_with("981173106")));
    assert_eq!(metadata(&stage.store, "f", "mode").as_deref(), Some("33184"));
    let written = fs::File::create(stage.path("g")).unwrap();
    for at in 0..20 {
        written.write_all_at(&noise(1, 1 << 20), at << 20).unwrap();
    }
    files::close(written).unwrap();
    let shown = fs::metadata(stage.path("g")).unwrap().mtime();
    stage.mount.umount();
    assert_eq!(stage.double().requests().of_any(&["CopyObject", "UploadPartCopy"]), 0, "{:?}", stage.double().requests().summary());
    stage.mount.again();
    assert_eq!(fs::metadata(stage.path("g")).unwrap().mtime(), shown);
}

/// Promise 13: "remembered by key and ETag over restarts (and forgotten when a listing or answer shows a LastModified later than our own last write of it)"
#[test]
fn times_are_remembered_and_forgotten() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new(Store::double());
    files::write(&stage.path("f"), b"content").unwrap();
    sh(stage.dir(), "touch -d '2001-02-03 04:05:06 UTC' f; chmod 600 f");
    stage.mount.remount();
    stage.double().reset_requests();
    let shown = |stage: &Stage| sh(stage.dir(), "ls -l > /dev/null; stat -c '%a %Y' f").trim().to_owned();
    assert_eq!(shown(&stage), "600 981173106");
    let requests = stage.double().requests();
    assert_eq!(requests.of_any(&["HeadObject", "GetObject"]), 0, "{:?}", requests.summary());
    // The same bytes, and with them the same ETag: only the time tells that somebody else wrote them.
    let later = Object {
        last_modified: stage.double().object("releases", "f").unwrap().last_modified + Duration::from_secs(60),
        ..Object::new("content")
    };
    stage.double().put_object("releases", "f", later.clone());
    stage.mount.remount();
    let modified = later.last_modified.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert_eq!(shown(&stage), format!("644 {modified}"));
}

/// Promise 13: "They never fail a copy."
#[test]
fn a_store_that_refuses_metadata_fails_nobody() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().fault(When::operation("CopyObject"), Fault::Error(403, "AccessDenied"));
    let source = stage.store.home().join("source");
    fs::write(&source, "content").unwrap();
    sh(
        stage.dir(),
        &format!(
            "touch -d '2001-02-03 04:05:06 UTC' {0}; chmod 640 {0}; cp -p {0} f; chmod 600 f; touch f; touch -r {0} f",
            source.display()
        ),
    );
    stage.store.eventually("the copy is tried", |_| stage.double().requests().of("CopyObject") > 0);
    assert_eq!(sh(stage.dir(), "stat -c '%a %Y' f; cat f").trim(), "600 981173106\ncontent");
    assert_eq!(stage.store.bytes("f"), "content");
}

/// Promise 28: "`default_permissions` makes the kernel check them (on with allow_other) … A stored mode is enforced once it was seen"
#[test]
fn modes_are_enforced() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put_with("closed", "closed", &[("mode", "32768")]);
    store.put_with("open", "open", &[("mode", "33060")]);
    // Root is never refused, so somebody else must look; anybody else may be refused what is his own.
    let option = if nix::unistd::geteuid().is_root() { "allow_other" } else { "default_permissions" };
    let stage = Stage::with(store, &[option]);
    fs::set_permissions(stage.mount.home(), fs::Permissions::from_mode(0o755)).unwrap();
    for (name, mode) in [("open", 0o444), ("closed", 0)] {
        assert_eq!(fs::read(stage.path(name)).unwrap(), name.as_bytes());
        let shown = || fs::metadata(stage.path(name)).unwrap().permissions().mode() & 0o777;
        stage.store.eventually("the stored mode shows", |_| shown() == mode);
    }
    let script = "import os, sys\nif os.geteuid() == 0: os.setuid(65534)\nfor name in sys.argv[1:]:\n    \
                  try: print(open(name).read())\n    except OSError as error: print(error.errno)";
    let paths = ["open", "closed"].map(|name| stage.path(name).to_str().unwrap().to_owned());
    let seen = files::run(std::path::Path::new("/"), "python3", &["-c", script, &paths[0], &paths[1]]);
    assert_eq!(seen, format!("open\n{}\n", nix::libc::EACCES));
}

/// Promise 29: "with `x-amz-website-redirect-location` where the target lies in the same bucket … written with checksum algorithm SHA1"
#[test]
fn links_carry_redirect_and_mark() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    fs::create_dir(stage.path("d")).unwrap();
    symlink("../target.html", stage.path("d/link")).unwrap();
    symlink("../../outside", stage.path("d/out")).unwrap();
    let object = |key: &str| stage.double().object("releases", key).unwrap();
    assert_eq!(object("d/link").headers.website_redirect.as_deref(), Some("/target.html"));
    assert_eq!(object("d/link").checksum.algorithm.name(), "SHA1");
    assert_eq!(object("d/out").headers.website_redirect, None);
    fs::rename(stage.path("d/link"), stage.path("link")).unwrap();
    assert_eq!(object("link").headers.website_redirect, None, "../target.html now lies outside");
    assert_eq!(object("link").checksum.algorithm.name(), "SHA1");
}

/// Promise 29: "so that another machine looks at just those": links made by another mount show as links.
#[test]
fn another_machine_sees_links() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    files::write(&stage.path("target"), b"content").unwrap();
    symlink("target", stage.path("link")).unwrap();
    let other = crate::support::mount::Mount::start(crate::support::mount::Setup::of(&stage.store));
    assert!(fs::symlink_metadata(other.path("link")).unwrap().is_symlink());
    let listing = sh(other.dir(), "ls -l");
    assert!(listing.contains("link -> target"), "{listing}");
}

/// Promise 13: "Headers, tags, storage class and encryption survive it, and renames"
#[test]
fn metadata_copies_keep_everything_else() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let mut object = Object::new("content").meta("origin", "elsewhere").class("STANDARD_IA").aged(Duration::from_secs(600));
    object.headers.content_type = Some("text/x-own".to_owned());
    object.headers.cache_control = Some("max-age=5".to_owned());
    object.tags = vec![("stage".to_owned(), "release".to_owned())];
    store.as_double().unwrap().put_object("releases", "f", object.clone());
    let stage = Stage::new(store);
    let same = |key: &str| {
        let now = stage.double().object("releases", key).unwrap();
        assert_eq!(
            (now.headers, now.tags, now.storage_class),
            (object.headers.clone(), object.tags.clone(), object.storage_class.clone()),
            "{key}"
        );
        assert_eq!(now.metadata.get("origin").map(String::as_str), Some("elsewhere"), "{key}");
    };
    sh(stage.dir(), "touch -d '2001-02-03 04:05:06 UTC' f");
    stage.store.eventually("the mtime is in the bucket", |store| metadata(store, "f", "mtime").is_some());
    same("f");
    fs::rename(stage.path("f"), stage.path("g")).unwrap();
    same("g");
    let file = files::open_existing(&stage.path("g"));
    file.write_all_at(b"C", 0).unwrap();
    files::close(file).unwrap();
    let now = stage.double().object("releases", "g").unwrap();
    assert_eq!((now.headers, now.storage_class), (object.headers.clone(), object.storage_class.clone()), "after a change of content");
    assert_eq!(stage.store.bytes("g"), "Content");
}
