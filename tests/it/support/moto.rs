//! moto: AWS's own settings and services, as far as they are asked about, started once for all tests.

use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::leash::Leash;
use super::mount::Setup;
use super::seaweed::{free_ports, installed};

/// A running `moto_server`.
pub struct Moto {
    endpoint: String,
    /// Kills the server when this process ends.
    _leash: Leash,
}

impl Moto {
    /// The one server of this test run.
    pub fn shared() -> &'static Self {
        static SERVER: OnceLock<Moto> = OnceLock::new();
        SERVER.get_or_init(Self::start)
    }

    fn start() -> Self {
        // Ports may be taken between finding and using them.
        for _ in 0..3 {
            let address = SocketAddr::from(([127, 0, 0, 1], free_ports::<1>()[0]));
            let mut command = Command::new(tool("moto_server"));
            command.args(["-H", "127.0.0.1", "-p", &address.port().to_string()]);
            let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let leash = Leash::new("kill -9 \"$1\"", &[&child.id().to_string()]);
            if answers(address, || child.try_wait().unwrap().is_none()) {
                return Self { endpoint: format!("http://{address}"), _leash: leash };
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("moto did not start");
    }

    /// The AWS CLI, which must succeed.
    pub fn aws(&self, words: &[&str]) {
        let mut command = Command::new(tool("aws"));
        command.args(words).args(["--endpoint-url", &self.endpoint]).envs(self.setup("").env).stdin(Stdio::null());
        let said = command.output().unwrap();
        assert!(said.status.success(), "aws {words:?}: {}", String::from_utf8_lossy(&said.stderr));
    }

    /// A source there, with the account's CloudFront.
    pub fn setup(&self, source: &str) -> Setup {
        let pairs = [
            ("AWS_ACCESS_KEY_ID", "AKIDMOTO"),
            ("AWS_SECRET_ACCESS_KEY", "moto"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL_CLOUDFRONT", &self.endpoint),
        ];
        Setup {
            source: source.to_owned(),
            options: vec![format!("endpoint_url={}", self.endpoint)],
            env: pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            under: Vec::new(),
        }
    }
}

fn answers(address: SocketAddr, lives: impl FnMut() -> bool) -> bool {
    let (mut lives, until) = (lives, Instant::now() + Duration::from_secs(60));
    while lives() && Instant::now() < until {
        if TcpStream::connect(address).is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    false
}

/// What `scripts/setup` installed.
fn tool(name: &str) -> PathBuf {
    installed(name).unwrap_or_else(|| panic!("{name} is not here: run ./scripts/setup test"))
}
