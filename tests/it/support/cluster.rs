//! A cluster of `scripts/cluster`: one that the compatibility suite is told to run on, or one of a test's own.

use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use http::{Method, Request};
use reqsign_aws_v4::{Credential, RequestSigner};
use reqsign_core::{Context, SignRequest as _};
use tempfile::TempDir;

use super::leash::Leash;
use super::web::{self, Answer};

/// Names the endpoint that the tests which are SeaweedFS's run on, and in those after it the keys, the region and the engine.
const GIVEN: [&str; 5] = [
    "PACKMULE_TEST_CLUSTER",
    "PACKMULE_TEST_CLUSTER_ACCESS_KEY",
    "PACKMULE_TEST_CLUSTER_SECRET_KEY",
    "PACKMULE_TEST_CLUSTER_REGION",
    "PACKMULE_TEST_CLUSTER_ENGINE",
];

/// Where nothing else is said.
pub const REGION: &str = "us-east-1";

/// How long a cluster may take to be itself again after a node went.
pub const PATIENCE: Duration = Duration::from_secs(150);

/// A gateway may hold a request that its node can no longer answer.
const ONE_TRY: Duration = Duration::from_secs(40);

/// Tests of the common suites that a cluster whose nodes go and come cannot pass, and why.
pub const CANNOT: &[(&str, &str)] = &[
    ("doctor::a_mount_that_works_has_nothing_wrong", "it tells what it meets, and that is the node that goes just then"),
    ("walks::a_walk_shows_what_waits", UNLISTED),
    ("walks::a_walk_shows_what_was_changed_here", UNLISTED),
    (
        "walks::a_tree_with_empty_directories_goes",
        "a folder that others emptied is listed until a filer has cleaned up, which takes longer while nodes go",
    ),
];

/// SeaweedFS 4.48: the filer inserts the entry, then its folders; what is tried again after that is an update, which makes no folders.
const UNLISTED: &str = "where a node goes between an object and its new folder, SeaweedFS tells success and does not list the folder";

/// Tests of the common suites that Garage 2.5.0 cannot pass, whether nodes go or not, and why.
pub const GARAGE_CANNOT: &[(&str, &str)] = &[
    ("client::a_part_sent_again", NO_PART_WITHOUT_CHECKSUM),
    ("client::abort", NO_PART_WITHOUT_CHECKSUM),
    ("client::conditional_put", NO_CONDITIONS),
    ("client::multipart", NO_PART_WITHOUT_CHECKSUM),
    ("client::presigned_links", "a link that has expired is answered 400, not 403"),
    ("client::presigned_links_of_version_2", NO_SIGNATURE_2),
    ("client::signature_version_2", NO_SIGNATURE_2),
    ("client::tags", "objects have no tags"),
    ("conflicts::appends_go_behind_theirs", NO_CONDITIONS),
    ("conflicts::equal_bytes_are_two_files", NO_CONDITIONS),
    ("conflicts::fail", NO_CONDITIONS),
    ("conflicts::fail_in_the_background", NO_CONDITIONS),
    ("conflicts::keep", NO_CONDITIONS),
    ("conflicts::keep_in_the_background", NO_CONDITIONS),
    ("conflicts::overwrite", NO_CONDITIONS),
    ("conflicts::overwrite_in_the_background", NO_CONDITIONS),
    ("doctor::a_mount_that_works_has_nothing_wrong", "a PUT is answered with a version's id where no versions are kept"),
    ("doctor::wrong_keys_and_names_are_named", "a wrong secret key is told like a right that is lacking"),
    ("handles::an_open_file_that_others_replaced_goes_with_its_name", NO_CONDITIONS),
    ("handles::others_are_seen_under_an_open_writer", NO_CONDITIONS),
    ("handles::what_is_written_after_others_changed_it_is_not_lost", NO_CONDITIONS),
    ("refusals::conflicts_are_not_lost", NO_CONDITIONS),
    ("refusals::what_an_earlier_mount_left_needs_no_mount", NO_CONDITIONS),
    ("versions::a_download_ends_over_what_others_wrote", NO_CONDITIONS),
    ("versions::two_machines_append_to_one_file", NO_CONDITIONS),
    ("versions::two_machines_create_one_name", NO_CONDITIONS),
    ("versions::two_machines_write_one_file", NO_CONDITIONS),
];

const NO_CONDITIONS: &str = "conditional writes are not known, and done without a word";
const NO_SIGNATURE_2: &str = "Signature Version 2 is not known";
const NO_PART_WITHOUT_CHECKSUM: &str = "a part without a checksum is refused where its upload named an algorithm";

/// Where a cluster answers, and to whom.
pub struct Cluster {
    pub endpoint: String,
    pub access_key: String,
    pub secret_key: String,
    pub region: String,
    /// Garage, not SeaweedFS.
    pub garage: bool,
}

/// The one of the environment.
pub fn given() -> Option<&'static Cluster> {
    static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();
    let from_environment = || {
        let [endpoint, access_key, secret_key, region, engine] = GIVEN.map(std::env::var);
        let endpoint = endpoint.ok()?.trim_end_matches('/').to_owned();
        let key = |value: Result<String, _>, name| value.unwrap_or_else(|_| panic!("{} is set, {name} is not", GIVEN[0]));
        let (access_key, secret_key) = (key(access_key, GIVEN[1]), key(secret_key, GIVEN[2]));
        let garage = engine.is_ok_and(|engine| engine == "garage");
        Some(Cluster { endpoint, access_key, secret_key, region: region.unwrap_or_else(|_| REGION.to_owned()), garage })
    };
    CLUSTER.get_or_init(from_environment).as_ref()
}

impl Cluster {
    /// Another client's request, sent again while a node that went is noticed: what is looked at is the answer, not the pause.
    pub fn send(&self, method: &Method, rest: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let url = format!("{}/{rest}", self.endpoint);
        let until = Instant::now() + PATIENCE;
        loop {
            let signed = self.sign(method, &url, headers);
            let signed: Vec<(&str, &str)> = signed.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            match web::send_within(Some(ONE_TRY), method.clone(), &url, &signed, body.to_vec()) {
                Ok(answer) if answer.status < 500 || answer.status == 501 => return answer,
                refused if Instant::now() > until => panic!("{method} {url}: not within {PATIENCE:?}: {refused:?}"),
                _ => std::thread::sleep(Duration::from_millis(300)),
            }
        }
    }

    /// By reqsign itself, without packmule's own rules for paths.
    fn sign(&self, method: &Method, url: &str, headers: &[(&str, &str)]) -> Vec<(String, String)> {
        let mut request = Request::builder().method(method).uri(url).header("x-amz-content-sha256", "UNSIGNED-PAYLOAD");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut parts = request.body(()).unwrap().into_parts().0;
        let credential = Credential {
            access_key_id: self.access_key.clone(),
            secret_access_key: self.secret_key.clone(),
            session_token: None,
            expires_in: None,
        };
        let signer = RequestSigner::new("s3", &self.region);
        futures::executor::block_on(signer.sign_request(&Context::new(), &mut parts, Some(&credential), None)).unwrap();
        parts.headers.remove(http::header::HOST);
        parts.headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect()
    }
}

/// A SeaweedFS of three nodes that is a test's own.
pub struct Own {
    pub cluster: Cluster,
    dir: TempDir,
    /// Takes it down when this process ends; a drop does before.
    leash: Option<Leash>,
}

impl Own {
    /// Starts it.
    pub fn up() -> Self {
        let dir = tempfile::Builder::new().prefix("packmule-cluster-").tempdir().unwrap();
        let folder = dir.path().to_str().unwrap();
        let leash = Leash::new("\"$1\" down \"$2\"; rm -rf \"$2\"", &[SCRIPT, folder]);
        let told = script(&["up", folder]);
        let endpoint = told.split_whitespace().nth(1).unwrap_or_else(|| panic!("no endpoint: {told}")).to_owned();
        let passwd = std::fs::read_to_string(dir.path().join("passwd")).unwrap();
        let (access_key, secret_key) = passwd.trim().split_once(':').unwrap();
        let (access_key, secret_key) = (access_key.to_owned(), secret_key.to_owned());
        let cluster = Cluster { endpoint, access_key, secret_key, region: REGION.to_owned(), garage: false };
        Self { cluster, dir, leash: Some(leash) }
    }

    /// `kill`, `stop` or `start` of a node.
    pub fn node(&self, what: &str, number: u32) {
        script(&[what, &number.to_string(), self.dir.path().to_str().unwrap()]);
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // A test that failed wants to hear of that alone.
        let ended = command(&["down", self.dir.path().to_str().unwrap()]).status();
        if ended.is_ok_and(|status| status.success()) {
            drop(self.leash.take());
        }
    }
}

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/cluster");

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(SCRIPT);
    command.args(words).stdin(Stdio::null());
    command
}

/// What it says; it must succeed.
fn script(words: &[&str]) -> String {
    let said = command(words).stderr(Stdio::inherit()).output().unwrap();
    assert!(said.status.success(), "scripts/cluster {words:?}: {}", said.status);
    String::from_utf8_lossy(&said.stdout).into_owned()
}
