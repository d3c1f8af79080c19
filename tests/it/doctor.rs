//! `packmule doctor`: what it finds right on every store, and that each fault gets its own words and remedy.

use http::Method;
use serde_json::Value;

use crate::support::double::{Double, Fault, Options, When};
use crate::support::files::output;
use crate::support::moto::Moto;
use crate::support::mount::{self, Setup, can_mount};
use crate::support::seaweed::free_ports;
use crate::support::stage::on_every_store;
use crate::support::store::Store;

/// What it said, and whether a mount would work.
struct Said {
    works: bool,
    findings: Vec<Value>,
}

impl Said {
    /// Verdict, and what was found and helps, of one check.
    fn of(&self, check: &str) -> (&str, String) {
        let found = self.findings.iter().find(|finding| finding["check"] == check);
        let found = found.unwrap_or_else(|| panic!("no {check} in {:?}", self.findings));
        let text = |name: &str| found[name].as_str().unwrap_or_default();
        (text("verdict"), format!("{} → {}", text("found"), text("remedy")))
    }

    /// The checks that are wrong.
    fn wrong(&self) -> Vec<&str> {
        let wrong = self.findings.iter().filter(|finding| finding["verdict"] == "bad");
        wrong.filter_map(|finding| finding["check"].as_str()).collect()
    }

    fn says(&self, check: &str, verdict: &str, words: &[&str]) {
        let (found, text) = self.of(check);
        assert_eq!(found, verdict, "{check}: {text}");
        for word in words {
            assert!(text.contains(word), "{check} says nothing of {word}: {text}");
        }
    }
}

fn doctor(setup: &Setup) -> Said {
    let home = tempfile::tempdir().unwrap();
    let mut command = mount::packmule(home.path(), &setup.env);
    let said = output(command.args(["doctor", "--json", &setup.source, "-o"]).arg(setup.options.join(",")));
    let text = String::from_utf8(said.stdout).unwrap();
    let findings = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text} {}", String::from_utf8_lossy(&said.stderr)));
    Said { works: said.status.success(), findings }
}

on_every_store! {
    /// The list, right on a store that is right; and nothing is left behind, versions included.
    fn a_mount_that_works_has_nothing_wrong(store) {
        store.put("folder/file", "content");
        let said = doctor(&Setup::of(&store).source(&format!("s3://{}/folder/", store.bucket())));
        assert!(said.works && said.wrong().is_empty(), "{:?}", said.findings);
        for check in
            ["/dev/fuse", "fusermount3", "cache_dir", "spool_dir", "name", "connection", "clock", "list", "write", "read", "multipart", "delete"]
        {
            said.says(check, "good", &[]);
        }
        said.says("credentials", "good", &["AWS_ACCESS_KEY_ID"]);
        said.says("connection", "good", &["without TLS"]);
        said.says("conditional writes", "good", &["refuses to overwrite"]);
        said.says("checksums", "good", &["refuses bytes that were damaged"]);
        said.says("region", "good", &["us-east-1"]);
        said.says("CloudFront", "note", &["not AWS's"]);
        assert_eq!(store.keys(), ["folder/file"]);

        let said = doctor(&Setup::of(&store).option("ro"));
        assert!(said.works, "{:?}", said.findings);
        said.says("write", "note", &["read-only"]);
        said.says("read", "good", &[]);
    }

    /// Rights and what the store can do are tried one by one: each has its own words.
    fn wrong_keys_and_names_are_named(store) {
        let secret = doctor(&Setup::of(&store).env("AWS_SECRET_ACCESS_KEY", "not-the-secret"));
        assert!(!secret.works);
        secret.says("list", "bad", &["the secret key is wrong", "AWS_SECRET_ACCESS_KEY"]);
        let key = doctor(&Setup::of(&store).env("AWS_ACCESS_KEY_ID", "AKIDNOBODY"));
        key.says("list", "bad", &["does not know this access key", "AWS_ACCESS_KEY_ID"]);
        let bucket = doctor(&Setup::of(&store).source("s3://no-such-bucket"));
        bucket.says("list", "bad", &["no such bucket: s3://no-such-bucket", "check its name"]);
        let passwd = store.home().join("passwd");
        std::fs::write(&passwd, format!("{}:{}", store.access_key(), store.secret_key())).unwrap();
        std::fs::set_permissions(&passwd, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let file = doctor(&Setup::of(&store).option(&format!("passwd_file={}", passwd.display())).env("AWS_ACCESS_KEY_ID", "AKIDNOBODY"));
        file.says("credentials", "good", &[passwd.to_str().unwrap(), "passwd_file"]);
        assert!(file.works, "{:?}", file.findings);
    }
}

/// What is kept of overwritten and deleted objects is told, and the trial's own versions are removed.
#[test]
fn versions_are_told_of_and_not_left() {
    if !can_mount() {
        return;
    }
    let store = Store::seaweed();
    let enabled = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
    assert_eq!(store.send(Method::PUT, "?versioning=", &[], enabled.into()).status, 200);
    let said = doctor(&Setup::of(&store));
    said.says("versions", "good", &["can be had again"]);
    let left = store.send(Method::GET, "?versions=", &[], Vec::new()).text();
    assert!(!left.contains("packmule-doctor"), "{left}");
}

/// Each refusal by itself: what else can be tried is tried.
#[test]
fn each_missing_right_is_named_with_its_remedy() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put("there", "content");
    let double: &Double = store.as_double().unwrap();
    let denied = |operation: &'static str| {
        double.clear_faults();
        double.fault(When::operation(operation), Fault::Error(403, "AccessDenied"));
        doctor(&Setup::of(&store))
    };
    let list = denied("ListObjectsV2");
    assert_eq!(list.wrong(), ["list"]);
    list.says("list", "bad", &["s3:ListBucket"]);
    let write = denied("PutObject");
    assert_eq!(write.wrong(), ["write"]);
    write.says("write", "bad", &["s3:PutObject", "-o ro"]);
    write.says("read", "good", &[]);
    let read = denied("GetObject");
    assert_eq!(read.wrong(), ["read"]);
    let multipart = denied("CreateMultipartUpload");
    assert_eq!(multipart.wrong(), ["multipart"]);
    // What cannot be aborted is completed, and goes as an object.
    let aborted = denied("AbortMultipartUpload");
    assert_eq!(aborted.wrong(), ["multipart"]);
    aborted.says("multipart", "bad", &["s3:AbortMultipartUpload"]);
    assert_eq!((store.keys(), store.unfinished_uploads()), (vec!["there".to_owned()], Vec::new()));
    let resumed = denied("ListParts");
    assert!(resumed.works);
    resumed.says("multipart", "note", &["cannot be resumed", "s3:ListMultipartUploadParts"]);
    let delete = denied("DeleteObject");
    assert_eq!(delete.wrong(), ["delete"]);
    delete.says("delete", "bad", &["is still there", "s3:DeleteObject", "allow_delete=no"]);
    assert!(store.keys().iter().any(|key| key.starts_with(".packmule-doctor-")), "what cannot be deleted is there, as it said");
    assert!(doctor(&Setup::of(&store).option("allow_delete=no")).works);
    double.clear_faults();
    double.fault(When::any(), Fault::Error(403, "RequestTimeTooSkewed"));
    doctor(&Setup::of(&store)).says("list", "bad", &["clock", "timedatectl"]);
    double.clear_faults();
    double.fault(When::any(), Fault::Html);
    assert!(!doctor(&Setup::of(&store)).works);
}

/// A store that keeps neither conditions nor checksums is usable, and what that costs is said.
#[test]
fn what_a_lesser_store_lacks_is_said() {
    if !can_mount() {
        return;
    }
    let store = Store::double_with(Options { conditional_puts: false, ..Options::default() });
    let said = doctor(&Setup::of(&store).option("upload_checksums=off"));
    assert!(said.works, "{:?}", said.findings);
    said.says("conditional writes", "note", &["not kept"]);
    said.says("checksums", "note", &["upload_checksums=off"]);
}

/// The network's own faults.
#[test]
fn what_is_between_here_and_the_store_is_told_apart() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let at = |endpoint: &str| doctor(&Setup::of(&store).through(endpoint));
    let refused = at(&format!("http://127.0.0.1:{}", free_ports::<1>()[0]));
    assert_eq!(refused.wrong(), ["connection"]);
    refused.says("connection", "bad", &["refused", "endpoint_url"]);
    let unknown = at("http://nothing.invalid:1");
    unknown.says("name", "note", &["nothing.invalid cannot be resolved"]);
    assert!(!unknown.works);
    let late = Store::double_with(Options { clock_behind: std::time::Duration::from_secs(1200), ..Options::default() });
    doctor(&Setup::of(&late)).says("clock", "bad", &["20m", "ahead of", "timedatectl"]);
    at(&store.endpoint().replace("http://", "https://")).says("connection", "bad", &["does not speak TLS", "http://"]);
}

/// Without a source, this machine alone; options that are wrong have one line, as of mount.
#[test]
fn the_machine_alone_and_wrong_options() {
    if !can_mount() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let said = output(mount::packmule(home.path(), &[]).arg("doctor"));
    let text = String::from_utf8(said.stdout).unwrap();
    assert!(said.status.success() && text.contains("/dev/fuse: can be opened") && text.ends_with("mounts here would work\n"), "{text}");
    let wrong = output(mount::packmule(home.path(), &[]).args(["doctor", "s3://bucket", "-o", "profil=x"]));
    let line = String::from_utf8(wrong.stderr).unwrap();
    assert!(wrong.status.code() == Some(1) && line.lines().count() == 1 && line.contains("profile"), "{line}");
}

/// The bucket's settings and its distributions, by moto, which keeps them as AWS does.
#[test]
fn settings_and_distributions_are_explained() {
    if !can_mount() {
        return;
    }
    let moto = Moto::shared();
    moto.aws(&["s3", "mb", "s3://website"]);
    let bare = moto.setup("s3://website/web/");
    let said = doctor(&bare);
    assert!(said.works, "{:?}", said.findings);
    said.says("public access", "note", &["not blocked", "Block Public Access"]);
    said.says("abandoned uploads", "note", &["no lifecycle rule", "put-bucket-lifecycle-configuration --bucket website"]);
    said.says("CloudFront", "note", &["none of the account's"]);

    // As its own remedy says.
    let (_, text) = said.of("abandoned uploads");
    let rules = text.split_once("--lifecycle-configuration '").and_then(|(_, rest)| rest.split_once('\'')).unwrap().0;
    moto.aws(&["s3api", "put-bucket-lifecycle-configuration", "--bucket", "website", "--lifecycle-configuration", rules]);
    let block = "BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true";
    moto.aws(&["s3api", "put-public-access-block", "--bucket", "website", "--public-access-block-configuration", block]);
    let enforced = "Rules=[{ObjectOwnership=BucketOwnerEnforced}]";
    moto.aws(&["s3api", "put-bucket-ownership-controls", "--bucket", "website", "--ownership-controls", enforced]);
    moto.aws(&["cloudfront", "create-distribution", "--origin-domain-name", "website.s3.eu-west-1.amazonaws.com"]);
    moto.aws(&["cloudfront", "create-distribution", "--origin-domain-name", "another.s3.amazonaws.com"]);
    let said = doctor(&bare);
    said.says("public access", "good", &["blocked"]);
    said.says("abandoned uploads", "good", &["after 7 days"]);
    said.says("ACLs", "good", &["off"]);
    said.says("CloudFront", "good", &["serves the bucket", "cloudfront.net"]);
    assert_eq!(said.findings.iter().filter(|finding| finding["check"] == "CloudFront").count(), 1);
}
