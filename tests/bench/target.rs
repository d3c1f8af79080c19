//! What is measured: packmule, and the peers that are installed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::mount::{Mount, Setup, is_mounted, wait};
use crate::support::seaweed::{ACCESS_KEY, SECRET_KEY};
use crate::support::store::Store;

/// Other filesystems over S3, by the name of their program.
pub const PEERS: &[&str] = &["s3fs", "rclone", "geesefs", "mount-s3"];

/// packmule as it is.
pub const PACKMULE: &str = "packmule";

/// With `write_back`.
pub const WRITE_BACK: &str = "packmule, write_back";

/// A peer's folder for what it has cached, below its home.
const CACHE: &str = ".cache";

/// A mounted filesystem.
pub enum Target {
    /// packmule, and what the way is called that it is mounted.
    Packmule(&'static str, Box<Mount>),
    Peer(Peer),
}

impl Target {
    /// Mounts it in one of its ways.
    pub fn packmule(way: &'static str, store: &Store, endpoint: &str) -> Self {
        let setup = Setup::of(store).through(endpoint);
        let setup = if way == WRITE_BACK { setup.option("write_back=1s") } else { setup };
        Self::Packmule(way, Box::new(Mount::start(setup)))
    }

    pub fn name(&self) -> &str {
        match self {
            Self::Packmule(way, _) => way,
            Self::Peer(peer) => peer.program,
        }
    }

    pub fn dir(&self) -> &Path {
        match self {
            Self::Packmule(_, mount) => mount.dir(),
            Self::Peer(peer) => &peer.dir,
        }
    }

    /// Where packmule keeps what it keeps.
    pub fn home(&self) -> Option<&Path> {
        match self {
            Self::Packmule(_, mount) => Some(mount.home()),
            Self::Peer(_) => None,
        }
    }

    pub fn pid(&self) -> u32 {
        match self {
            Self::Packmule(_, mount) => mount.pid(),
            Self::Peer(peer) => peer.child.id(),
        }
    }

    /// Sends what waits, where there is a command for that.
    pub fn flush(&self) {
        if let Self::Packmule(_, mount) = self {
            mount.ask(&["flush"], mount.dir());
        }
    }

    /// Mounts again with nothing cached.
    pub fn cold(&mut self) {
        match self {
            Self::Packmule(_, mount) => {
                mount.umount();
                let cache = mount.home().join("cache");
                std::fs::remove_dir_all(&cache).unwrap();
                mount.again();
            }
            Self::Peer(peer) => peer.again(),
        }
        crate::measure::drop_caches();
    }
}

/// A peer, run in the foreground with its usual settings for throughput.
pub struct Peer {
    program: &'static str,
    endpoint: String,
    bucket: String,
    child: Child,
    dir: PathBuf,
    /// Where it keeps what it keeps.
    home: TempDir,
}

impl Peer {
    /// None where the program is not installed, or does not mount within 20 s.
    pub fn start(program: &'static str, store: &Store, endpoint: &str) -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).find(|folder| folder.join(program).exists())?;
        let home = tempfile::tempdir().ok()?;
        let dir = home.path().join("mnt");
        std::fs::create_dir(&dir).ok()?;
        let child = spawn(program, endpoint, store.bucket(), &dir, home.path())?;
        Some(Self { program, endpoint: endpoint.to_owned(), bucket: store.bucket().to_owned(), child, dir, home })
    }

    fn again(&mut self) {
        self.stop();
        let _ = std::fs::remove_dir_all(self.home.path().join(CACHE));
        if let Some(child) = spawn(self.program, &self.endpoint, &self.bucket, &self.dir, self.home.path()) {
            self.child = child;
        }
    }

    fn stop(&mut self) {
        let _ = Command::new("fusermount3").arg("-u").arg(&self.dir).stderr(Stdio::null()).status();
        if wait(&mut self.child, Duration::from_secs(30)).is_none() {
            let _ = Command::new("fusermount3").arg("-uz").arg(&self.dir).status();
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn spawn(program: &str, endpoint: &str, bucket: &str, dir: &Path, home: &Path) -> Option<Child> {
    let mut command = Command::new(program);
    match program {
        "s3fs" => {
            command.args(["-f", bucket]).arg(dir);
            command.args(["-o", &format!("url={endpoint},use_path_request_style,sigv4,parallel_count=16,multipart_size=16")]);
        }
        "rclone" => {
            let remote = format!(":s3,provider=Other,env_auth=true,endpoint='{endpoint}':{bucket}");
            command.args(["mount", &remote]).arg(dir).args(["--vfs-cache-mode", "writes", "--vfs-write-back", "0s"]);
            command.args(["--vfs-read-chunk-streams", "16", "--cache-dir"]).arg(home.join(CACHE));
        }
        "geesefs" => {
            command.args(["-f", "--endpoint", endpoint, bucket]).arg(dir);
        }
        "mount-s3" => {
            command.args(["-f", "--endpoint-url", endpoint, "--force-path-style", "--allow-delete", "--allow-overwrite", bucket]).arg(dir);
        }
        _ => return None,
    }
    let mut child =
        credentials(&mut command).env("HOME", home).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
    let until = Instant::now() + Duration::from_secs(20);
    while !is_mounted(dir) {
        if child.try_wait().ok()?.is_some() || Instant::now() > until {
            eprintln!("{program} does not mount");
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Some(child)
}

/// The keys of the store, for a program that is not ours.
pub fn credentials(command: &mut Command) -> &mut Command {
    let pairs = [("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY), ("AWS_REGION", "us-east-1")];
    command.envs(pairs).env("AWSACCESSKEYID", ACCESS_KEY).env("AWSSECRETACCESSKEY", SECRET_KEY)
}
