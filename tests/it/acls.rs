//! ACLs, where a bucket has them on, survive renames and metadata copies (promise 13); a server-side copy carries none over.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use crate::support::double::{ALL_USERS, Fault, OWNER, Object, Options, When};
use crate::support::mount::{AWS, Mount, Setup, can_mount};
use crate::support::stage::Stage;
use crate::support::store::Store;

const BUCKET: &str = "releases";

/// Everybody may read it, and somebody else may change who may.
fn shared() -> Vec<(String, String)> {
    [("READ", ALL_USERS), ("WRITE_ACP", "0123abcd")].map(|(permission, who)| (permission.to_owned(), who.to_owned())).into()
}

/// A mount of a bucket with ACLs, of these objects, whose names begin with "shared" or not.
fn stage(options: &[&str], keys: &[&str]) -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double_with(Options { acls: true, ..Options::default() });
    for key in keys {
        let grants = if key.contains("shared") { shared() } else { Vec::new() };
        // What no single CopyObject takes.
        let object = if key.contains("large") { Object::zeros(6 << 30) } else { Object::new("content") };
        store.as_double().unwrap().put_object(BUCKET, key, Object { grants, ..object });
    }
    let stage = Stage::with(store, options);
    stage.double().reset_requests();
    Some(stage)
}

fn grants(stage: &Stage, key: &str) -> Vec<(String, String)> {
    stage.double().object(BUCKET, key).unwrap_or_else(|| panic!("no {key}: {:?}", stage.store.keys())).grants
}

/// Promise 13: "so does an ACL where the bucket has ACLs on"
#[test]
fn renames_keep_acls() {
    let keys = ["shared", "private", "shared-large", "private-large", "t/shared", "t/d/private", "t/shared-large"];
    // What is private stays so, whatever new objects get.
    let Some(stage) = stage(&["default_acl=public-read"], &keys) else { return };
    for (from, to) in [("shared", "s"), ("private", "p"), ("shared-large", "sl"), ("private-large", "pl"), ("t", "u")] {
        fs::rename(stage.path(from), stage.path(to)).unwrap();
    }
    for key in ["s", "sl", "u/shared", "u/shared-large"] {
        assert_eq!(grants(&stage, key), shared(), "{key}");
    }
    for key in ["p", "pl", "u/d/private"] {
        assert_eq!(grants(&stage, key), Vec::new(), "{key}");
    }
    let requests = stage.double().requests();
    assert_eq!((requests.of("GetBucketOwnershipControls"), requests.of("GetObjectAcl")), (1, keys.len()), "{:?}", requests.summary());
    // The owner's own right is granted with the others: it is not given beside them.
    let granted = requests.log.iter().filter_map(|entry| entry.headers.get("x-amz-grant-full-control"));
    assert!(granted.clone().count() == 4 && granted.clone().all(|grantees| grantees == &format!("id=\"{OWNER}\"")), "{requests:?}");
}

/// Promise 13: "so does an ACL where the bucket has ACLs on", when mode or time follow the data.
#[test]
fn metadata_copies_keep_acls() {
    let Some(stage) = stage(&["default_acl=public-read"], &["shared", "private"]) else { return };
    for name in ["shared", "private"] {
        fs::set_permissions(stage.path(name), Permissions::from_mode(0o600)).unwrap();
    }
    stage.store.eventually("the modes are in S3", |store| {
        ["shared", "private"].iter().all(|key| store.get(key).unwrap().metadata.contains_key("mode"))
    });
    assert_eq!((grants(&stage, "shared"), grants(&stage, "private")), (shared(), Vec::new()));
}

/// A bucket with ACLs off, as all that were made since April 2023, costs one question; a store that does not know the question has none.
#[test]
fn without_acls_none_is_asked_for() {
    for fault in [None, Some(Fault::Error(501, "NotImplemented")), Some(Fault::Error(403, "AccessDenied"))] {
        if !can_mount() {
            return;
        }
        let store = Store::double();
        ["a", "b", "c"].iter().for_each(|key| store.put(key, "x"));
        let stage = Stage::new(store);
        fault.into_iter().for_each(|fault| stage.double().fault(When::operation("GetBucketOwnershipControls"), fault));
        stage.double().reset_requests();
        for key in ["a", "b", "c"] {
            fs::rename(stage.path(key), stage.path(&format!("{key}{key}"))).unwrap();
        }
        let requests = stage.double().requests();
        assert_eq!((requests.of("GetBucketOwnershipControls"), requests.of("GetObjectAcl")), (1, 0), "{:?}", requests.summary());
    }
}

/// An AWS bucket of before April 2023, whose ownership nobody has set, has ACLs on; elsewhere that answer says nothing.
#[test]
fn an_old_bucket_has_acls() {
    for aws in [true, false] {
        if !can_mount() {
            return;
        }
        let store = Store::double_with(Options { acls: true, domain: Some(AWS.to_owned()), ..Options::default() });
        let double = store.as_double().unwrap();
        double.fault(When::operation("GetBucketOwnershipControls"), Fault::Error(404, "OwnershipControlsNotFoundError"));
        double.put_object(BUCKET, "shared", Object { grants: shared(), ..Object::new("content") });
        let setup = if aws { Setup::of(&store).taken_for_aws(&store.endpoint()) } else { Setup::of(&store) };
        let mount = Mount::start(setup);
        fs::rename(mount.path("shared"), mount.path("to")).unwrap();
        assert_eq!(double.object(BUCKET, "to").unwrap().grants, if aws { shared() } else { Vec::new() });
    }
}

/// Who may not read or set ACLs can rename all the same, and the log says once what that costs.
#[test]
fn acls_that_cannot_be_kept_are_said() {
    let read: fn(&Stage) = |stage| stage.double().fault(When::operation("GetObjectAcl"), Fault::Error(403, "AccessDenied"));
    let set: fn(&Stage) = |stage| stage.double().fault(When::operation("CopyObject").times(1), Fault::Error(403, "AccessDenied"));
    let grantee: fn(&Stage) = |stage| stage.double().fault(When::operation("CopyObject").times(1), Fault::Error(400, "InvalidArgument"));
    for refuses in [read, set, grantee] {
        let Some(stage) = stage(&[], &["shared", "shared-too"]) else { return };
        refuses(&stage);
        fs::rename(stage.path("shared"), stage.path("to")).unwrap();
        assert_eq!(grants(&stage, "to"), Vec::new());
        fs::rename(stage.path("shared-too"), stage.path("to-too")).unwrap();
        let log = stage.mount.log();
        assert_eq!(log.matches("may lose its ACL").count(), 1, "{log}");
    }
}

/// A store that fails for a moment when it is asked for an ACL loses none: the rename fails, and can be tried again.
#[test]
fn an_acl_is_not_lost_to_an_outage() {
    let Some(stage) = stage(&["retries=0"], &["shared"]) else { return };
    stage.double().fault(When::operation("GetObjectAcl").times(1), Fault::Error(503, "SlowDown"));
    let renamed = fs::rename(stage.path("shared"), stage.path("to"));
    if renamed.is_err() {
        fs::rename(stage.path("shared"), stage.path("to")).unwrap();
    }
    assert_eq!(grants(&stage, "to"), shared());
}

/// A page of a captive portal says nothing of the bucket: it is asked again, and until then the log says what that costs.
#[test]
fn a_portal_s_page_is_no_answer() {
    let Some(stage) = stage(&[], &["shared"]) else { return };
    stage.double().fault(When::operation("GetBucketOwnershipControls").times(1), Fault::Html);
    fs::rename(stage.path("shared"), stage.path("to")).unwrap();
    assert!(stage.mount.log().contains("may lose its ACL"), "{}", stage.mount.log());
}

/// A store that fails when it is asked whether it has ACLs is not asked for each object.
#[test]
fn a_store_that_fails_is_not_asked_for_each_object() {
    let keys: Vec<String> = (0..12).map(|n| format!("t/{n}")).collect();
    let Some(stage) = stage(&["retries=1"], &keys.iter().map(String::as_str).collect::<Vec<_>>()) else { return };
    stage.double().fault(When::operation("GetBucketOwnershipControls"), Fault::Error(500, "InternalError"));
    fs::rename(stage.path("t"), stage.path("u")).unwrap();
    let asked = stage.double().requests().of("GetBucketOwnershipControls");
    assert!(asked <= 2, "{asked}");
}

/// What new objects get is nothing for a copy: where an ACL cannot be read, its object is not shown to everybody by a rename or a chmod.
#[test]
fn what_is_private_stays_so() {
    for refused in ["GetObjectAcl", "GetBucketOwnershipControls"] {
        let Some(stage) = stage(&["default_acl=public-read"], &["private", "private-too"]) else { return };
        stage.double().fault(When::operation(refused), Fault::Error(403, "AccessDenied"));
        fs::rename(stage.path("private"), stage.path("to")).unwrap();
        fs::set_permissions(stage.path("private-too"), Permissions::from_mode(0o600)).unwrap();
        stage.store.eventually("the mode is in S3", |store| store.get("private-too").unwrap().metadata.contains_key("mode"));
        assert_eq!((grants(&stage, "to"), grants(&stage, "private-too")), (Vec::new(), Vec::new()), "{refused}");
        assert!(stage.mount.log().contains("may lose its ACL"), "{}", stage.mount.log());
    }
}
