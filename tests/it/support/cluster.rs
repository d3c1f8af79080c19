//! A cluster of `scripts/cluster`: one that the compatibility suite is told to run on, or one of a test's own.

use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use http::Method;
use tempfile::TempDir;

use super::leash::Leash;
use super::web::{self, Answer};

/// Names the endpoint that the tests which are SeaweedFS's run on; the keys are in the two after it.
const GIVEN: [&str; 3] = ["PACKMULE_TEST_CLUSTER", "PACKMULE_TEST_CLUSTER_ACCESS_KEY", "PACKMULE_TEST_CLUSTER_SECRET_KEY"];

/// How long a cluster may take to be itself again after a node went.
pub const PATIENCE: Duration = Duration::from_secs(150);

/// Tests of the common suites that a cluster whose nodes go and come cannot pass, and why.
pub const CANNOT: &[(&str, &str)] = &[];

/// Where a cluster answers, and to whom.
pub struct Cluster {
    pub endpoint: String,
    pub access_key: String,
    pub secret_key: String,
}

/// The one of the environment.
pub fn given() -> Option<&'static Cluster> {
    static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();
    let from_environment = || {
        let [endpoint, access_key, secret_key] = GIVEN.map(std::env::var);
        let endpoint = endpoint.ok()?.trim_end_matches('/').to_owned();
        let key = |value: Result<String, _>, name| value.unwrap_or_else(|_| panic!("{} is set, {name} is not", GIVEN[0]));
        Some(Cluster { endpoint, access_key: key(access_key, GIVEN[1]), secret_key: key(secret_key, GIVEN[2]) })
    };
    CLUSTER.get_or_init(from_environment).as_ref()
}

/// Another client's request, sent again while a node that went is noticed: what is looked at is the answer, not the pause.
pub fn send(method: &Method, url: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let until = Instant::now() + PATIENCE;
    loop {
        match web::send(method.clone(), url, headers, body.to_vec()) {
            Ok(answer) if answer.status < 500 || answer.status == 501 => return answer,
            refused if Instant::now() > until => panic!("{method} {url}: not within {PATIENCE:?}: {refused:?}"),
            _ => std::thread::sleep(Duration::from_millis(300)),
        }
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
        let told = script(&["up", "--open", folder]);
        let endpoint = told.split_whitespace().nth(1).unwrap_or_else(|| panic!("no endpoint: {told}")).to_owned();
        let passwd = std::fs::read_to_string(dir.path().join("passwd")).unwrap();
        let (access_key, secret_key) = passwd.trim().split_once(':').unwrap();
        let cluster = Cluster { endpoint, access_key: access_key.to_owned(), secret_key: secret_key.to_owned() };
        Self { cluster, dir, leash: Some(leash) }
    }

    /// `kill`, `stop` or `start` of a node.
    pub fn node(&self, what: &str, number: u32) {
        script(&[what, &number.to_string(), self.dir.path().to_str().unwrap()]);
    }

    /// Another client's request about a bucket or an object.
    pub fn send(&self, method: &Method, path: &str, body: &[u8]) -> Answer {
        send(method, &format!("{}/{path}", self.cluster.endpoint), &[], body)
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
