//! SeaweedFS: a real distributed store, started once for all tests (or a cluster that is there already), and what it cannot hold.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::cluster;
use super::leash::Leash;

pub const ACCESS_KEY: &str = "AKIDPACKMULEWEED0000";
pub const SECRET_KEY: &str = "weed/secret+key=for-tests-only/123456789";

/// Tests of the common suites that SeaweedFS cannot pass, and why.
pub const CANNOT: &[(&str, &str)] = &[
    ("client::a_part_sent_again", "ListParts names a part that was sent twice twice"),
    ("client::presigned_links_of_version_2", "response-* parameters are left out of what Signature Version 2 signs"),
];

/// Why SeaweedFS, or the cluster that is in its place, does not hold this line.
pub fn reason_against(test: &str) -> Option<&'static str> {
    let (lacks, more): (&[_], &[_]) = match cluster::given() {
        None => (CANNOT, &[]),
        Some(cluster) if cluster.garage => (cluster::GARAGE_CANNOT, &[]),
        Some(_) => (CANNOT, cluster::CANNOT),
    };
    lacks.iter().chain(more).find(|(name, _)| *name == test).map(|(_, reason)| *reason)
}

/// A running `weed server -s3`, or the gateway of a cluster.
pub struct Seaweed {
    endpoint: String,
    access_key: &'static str,
    secret_key: &'static str,
    /// Kills the server and removes its data when this process ends; a cluster is ended by whoever began it.
    _leash: Option<Leash>,
}

impl Seaweed {
    /// The one server of this test run.
    pub fn shared() -> &'static Self {
        static SERVER: OnceLock<Seaweed> = OnceLock::new();
        SERVER.get_or_init(|| cluster::given().map_or_else(Self::start, Self::of))
    }

    fn of(cluster: &'static cluster::Cluster) -> Self {
        let cluster::Cluster { endpoint, access_key, secret_key, .. } = cluster;
        Self { endpoint: endpoint.clone(), access_key, secret_key, _leash: None }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub fn access_key(&self) -> &'static str {
        self.access_key
    }

    pub fn secret_key(&self) -> &'static str {
        self.secret_key
    }

    fn start() -> Self {
        let program = find_weed();
        // Kept by the leash, which outlives every value of this process.
        let folder = tempfile::Builder::new().prefix("packmule-weed-").tempdir().unwrap().keep();
        let data = folder.join("data");
        std::fs::create_dir(&data).unwrap();
        std::fs::write(folder.join("s3.json"), identities()).unwrap();
        // Ports may be taken between finding and using them.
        for _ in 0..3 {
            let ports = free_ports::<8>();
            let log = std::fs::File::create(folder.join("log")).unwrap();
            let mut child =
                command(&program, &folder, &ports).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
            let pid = child.id().to_string();
            let sockets = ports[..6].iter().map(|port| format!("/tmp/seaweedfs-*-grpc-{port}.sock")).collect::<Vec<_>>().join(" ");
            let leash = Leash::new("kill -9 \"$1\"; rm -rf \"$2\"; rm -f $3", &[&pid, folder.to_str().unwrap(), &sockets]);
            let address = SocketAddr::from(([127, 0, 0, 1], ports[6]));
            let until = Instant::now() + Duration::from_secs(60);
            while child.try_wait().unwrap().is_none() && Instant::now() < until {
                if TcpStream::connect(address).is_ok() && answers(address) {
                    let endpoint = format!("http://{address}");
                    return Self { endpoint, access_key: ACCESS_KEY, secret_key: SECRET_KEY, _leash: Some(leash) };
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
        panic!("SeaweedFS did not start: {log}");
    }
}

/// The filer takes a moment longer than the port: ready is when a bucket and an object can be made.
fn answers(address: SocketAddr) -> bool {
    let put = |path: &str| {
        let url = format!("http://{address}/{path}");
        super::web::send(http::Method::PUT, &url, &[], b"ready".to_vec()).is_ok_and(|answer| answer.status == 200)
    };
    put("readiness") && put("readiness/probe")
}

/// Requests of ours to look into the store are not signed; packmule's are, and those the server checks.
fn identities() -> String {
    let actions = r#"["Admin","Read","Write","List","Tagging"]"#;
    format!(
        r#"{{"identities":[{{"name":"packmule","credentials":[{{"accessKey":"{ACCESS_KEY}","secretKey":"{SECRET_KEY}"}}],"actions":{actions}}},{{"name":"anonymous","actions":{actions}}}]}}"#
    )
}

fn command(program: &Path, folder: &Path, ports: &[u16; 8]) -> Command {
    let [master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc] = ports;
    let mut command = Command::new(program);
    command.current_dir(folder).arg("server").args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]);
    command.arg(format!("-dir={}", folder.join("data").display()));
    command.arg(format!("-master.port={master}")).arg(format!("-master.port.grpc={master_grpc}"));
    command.arg(format!("-volume.port={volume}")).arg(format!("-volume.port.grpc={volume_grpc}"));
    command.arg("-filer=true").arg(format!("-filer.port={filer}")).arg(format!("-filer.port.grpc={filer_grpc}"));
    command.arg(format!("-filer.localSocket={}", folder.join("filer.sock").display()));
    command.arg("-s3").arg(format!("-s3.port={s3}")).arg(format!("-s3.port.grpc={s3_grpc}"));
    command.args(["-s3.port.iceberg=0", "-s3.port.lance=0"]);
    command.arg(format!("-s3.config={}", folder.join("s3.json").display()));
    command.arg(format!("-s3.localSocket={}", folder.join("s3.sock").display()));
    // Every bucket grows volumes of its own: one at a time, small ones, as many as there are tests.
    command.args(["-master.volumeSizeLimitMB=256", "-volume.max=2000"]).env("WEED_MASTER_VOLUME_GROWTH_COPY_1", "1");
    command.env("HOME", folder);
    command
}

/// Ports of loopback that nobody listens at now.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let listeners: [TcpListener; N] = std::array::from_fn(|_| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// A Python tool that `scripts/setup` installed.
pub fn installed(name: &str) -> Option<PathBuf> {
    Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/venv/bin").join(name)).filter(|path| path.exists())
}

/// `PACKMULE_WEED`, what `scripts/setup` installed, or the path.
fn find_weed() -> PathBuf {
    if let Some(named) = std::env::var_os("PACKMULE_WEED") {
        return named.into();
    }
    if let Some(installed) = installed("weed") {
        return installed;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("weed")).find(|file| file.exists());
    found.expect("SeaweedFS is not here: run ./scripts/setup test, or name `weed` in PACKMULE_WEED")
}
