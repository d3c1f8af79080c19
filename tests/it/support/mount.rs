//! A mount by the real binary, in the foreground, with folders of its own.

use std::fs::File;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::files::output;
use super::leash::Leash;
use super::store::Store;

/// The program under test.
pub const PACKMULE: &str = env!("CARGO_BIN_EXE_packmule");

/// Names the variable that lets a machine without /dev/fuse pass.
const SKIP: &str = "PACKMULE_TESTS_WITHOUT_FUSE";

/// How long a mount may take to answer, and how long to end.
const PATIENCE: Duration = Duration::from_secs(90);

/// No mount of these tests is needed for so long.
const LONGEST_TEST: Duration = Duration::from_secs(400);

/// True where filesystems can be mounted. Elsewhere a test fails, unless the environment says that this is known.
pub fn can_mount() -> bool {
    if Path::new("/dev/fuse").exists() {
        return true;
    }
    assert!(std::env::var_os(SKIP).is_some(), "there is no /dev/fuse here: tests that mount cannot run ({SKIP}=1 skips them)");
    eprintln!("skipped: there is no /dev/fuse here");
    false
}

/// A host of AWS.
pub const AWS: &str = "s3.us-east-1.amazonaws.com";

/// What `packmule mount` is given.
#[derive(Clone, Debug)]
pub struct Setup {
    pub source: String,
    pub options: Vec<String>,
    pub env: Vec<(String, String)>,
    /// A program, and its words, that runs it.
    pub under: Vec<String>,
}

impl Setup {
    /// The store's bucket with the store's keys.
    pub fn of(store: &Store) -> Self {
        Self {
            source: format!("s3://{}", store.bucket()),
            options: vec![format!("endpoint_url={}", store.endpoint())],
            env: vec![
                ("AWS_ACCESS_KEY_ID".to_owned(), store.access_key().to_owned()),
                ("AWS_SECRET_ACCESS_KEY".to_owned(), store.secret_key().to_owned()),
                ("AWS_REGION".to_owned(), store.region().to_owned()),
            ],
            under: Vec::new(),
        }
    }

    /// By another way to the store.
    pub fn through(mut self, endpoint: &str) -> Self {
        self.options.retain(|word| !word.starts_with("endpoint_url="));
        self.option(&format!("endpoint_url={endpoint}"))
    }

    /// As if the store were AWS: what is asked of [`AWS`] comes to this endpoint, a double of that domain.
    pub fn taken_for_aws(self, endpoint: &str) -> Self {
        self.option(&format!("proxy={endpoint}")).through(&format!("http://{AWS}"))
    }

    /// With one more `-o` word.
    pub fn option(mut self, word: &str) -> Self {
        self.options.push(word.to_owned());
        self
    }

    /// With a variable set (the last one of a name counts).
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Another source.
    pub fn source(mut self, source: &str) -> Self {
        source.clone_into(&mut self.source);
        self
    }
}

/// `packmule` with nothing of the tester's own in its environment and its folders under `home`.
pub fn packmule(home: &Path, env: &[(String, String)]) -> Command {
    run_under(&[], home, env)
}

fn run_under(under: &[String], home: &Path, env: &[(String, String)]) -> Command {
    let mut words = under.iter().map(String::as_str).chain([PACKMULE]);
    let mut command = Command::new(words.next().unwrap_or(PACKMULE));
    command.args(words).env_clear();
    for name in ["PATH", "LANG", "RUST_BACKTRACE", "LLVM_PROFILE_FILE"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.env("HOME", home).env("AWS_EC2_METADATA_DISABLED", "true");
    for (name, folder) in
        [("XDG_CACHE_HOME", "cache"), ("XDG_STATE_HOME", "state"), ("XDG_CONFIG_HOME", "config"), ("XDG_RUNTIME_DIR", "run")]
    {
        let folder = home.join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        command.env(name, folder);
    }
    command.envs(env.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null());
    command
}

/// `unshare` into a mount namespace of its own, where its user is root; what is run there follows.
pub fn mount_namespace() -> Command {
    let mut command = Command::new("unshare");
    command.arg("--mount");
    if !nix::unistd::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    // In a chroot the root is no mount point: unshare(1) cannot make it private, and says so by failing.
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    if !table.lines().any(|line| line.split(' ').nth(4) == Some("/")) {
        command.arg("--propagation=unchanged");
    }
    command
}

/// How a command ended that was to mount.
#[derive(Debug)]
pub struct Failure {
    pub status: ExitStatus,
    pub stderr: String,
    pub took: Duration,
}

/// A running mount; it ends with this value.
pub struct Mount {
    home: TempDir,
    dir: PathBuf,
    setup: Setup,
    running: Option<(Child, Guards)>,
}

/// What ends the mount when nobody else does.
struct Guards {
    _leash: Leash,
    /// Dropped when the mount ends; a thread waits for that.
    _watch: mpsc::Sender<()>,
}

/// A call into a filesystem that hangs cannot be interrupted from here: its daemon's end ends it. A daemon that is killed while it
/// tells the kernel of a change in a directory that somebody is in waits for him, and he for it: the kernel is told to give up.
fn watch(pid: Pid, dir: PathBuf) -> mpsc::Sender<()> {
    const LOOK: Duration = Duration::from_millis(500);
    const GIVE_UP: u32 = 6;
    let (alive, ended) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        let (began, mut dead) = (Instant::now(), 0);
        while ended.recv_timeout(LOOK) == Err(mpsc::RecvTimeoutError::Timeout) {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            dead = if stat.contains(") Z ") { dead + 1 } else { 0 };
            if dead == GIVE_UP {
                let _ = nix::mount::umount2(&dir, nix::mount::MntFlags::MNT_FORCE);
            }
            if began.elapsed() > LONGEST_TEST {
                eprintln!("a mount of {LONGEST_TEST:?} is ended: its test hangs");
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
    });
    alive
}

impl Mount {
    /// Mounts and waits until it answers.
    pub fn start(setup: Setup) -> Self {
        match Self::try_start(setup) {
            Ok(mount) => mount,
            Err(failure) => panic!("the mount did not come up: {failure:?}"),
        }
    }

    /// Mounts; a program that ended instead of mounting is a [`Failure`].
    pub fn try_start(setup: Setup) -> Result<Self, Failure> {
        let home = tempfile::Builder::new().prefix("packmule-it-").tempdir().unwrap();
        let dir = home.path().join("mnt");
        std::fs::create_dir(&dir).unwrap();
        let mut mount = Self { home, dir, setup, running: None };
        mount.up()?;
        Ok(mount)
    }

    fn up(&mut self) -> Result<(), Failure> {
        assert!(self.running.is_none(), "mounted already");
        let began = Instant::now();
        let mut command = run_under(&self.setup.under, self.home.path(), &self.setup.env);
        command.arg("mount").arg(&self.setup.source).arg(&self.dir).arg("-f");
        if !self.setup.options.is_empty() {
            command.arg("-o").arg(self.setup.options.join(","));
        }
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        let mut child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let pid = child.id().to_string();
        let leash = Leash::new(
            "kill -9 \"$1\"; fusermount3 -uz \"$2\"; rm -rf \"$3\"",
            &[&pid, self.dir.to_str().unwrap(), self.home.path().to_str().unwrap()],
        );
        let guards = Guards { _leash: leash, _watch: watch(Pid::from_raw(i32::try_from(child.id()).unwrap()), self.dir.clone()) };
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return Err(Failure { status, stderr: self.log(), took: began.elapsed() });
            }
            // statfs is never answered from the kernel's caches, as attributes of a killed mount are for a moment. While a killed one is
            // taken away it is the folder below that answers, and that has no 1 PiB.
            let room = nix::sys::statvfs::statvfs(&self.dir).map_or(0, |stat| stat.blocks() * stat.fragment_size());
            if is_mounted(&self.dir) && room == 1 << 50 {
                self.running = Some((child, guards));
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                self.running = Some((child, guards));
                panic!("no mount after {PATIENCE:?}; it says: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The mountpoint.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path below the mountpoint.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.join(relative)
    }

    /// Where the program's own folders are (`cache`, `state`, `config`, `run`).
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// A command of `packmule` that speaks to this mount.
    pub fn command(&self) -> Command {
        packmule(self.home.path(), &self.setup.env)
    }

    /// What a command of `packmule` about a path says; it must succeed.
    #[track_caller]
    pub fn ask(&self, arguments: &[&str], about: &Path) -> String {
        let said = output(self.command().args(arguments).arg(about));
        assert!(said.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said.stderr));
        String::from_utf8_lossy(&said.stdout).into_owned()
    }

    /// What `packmule status` says of it.
    #[track_caller]
    pub fn status(&self) -> String {
        self.ask(&["status"], &self.dir)
    }

    /// Process id of the mount.
    pub fn pid(&self) -> u32 {
        self.running.as_ref().map(|(child, _)| child.id()).unwrap()
    }

    /// The most memory that it had, in bytes.
    pub fn peak_memory(&self) -> u64 {
        peak_memory(self.pid()).unwrap()
    }

    /// Everything that it said.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.home.path().join("stderr")
    }

    /// Ends it by SIGTERM and waits for the work; it must leave in good order.
    pub fn umount(&mut self) {
        let status = self.end();
        assert!(status.success(), "{status} after SIGTERM; it says: {}", self.log());
    }

    /// Ends it by SIGTERM where a file is left that it cannot publish by itself: it says so, and its status may.
    pub fn umount_leaving(&mut self, key: &str) {
        let status = self.end();
        assert!(matches!(status.code(), Some(0 | 1)), "{status} after SIGTERM; it says: {}", self.log());
        assert!(self.log().contains(key), "nothing is said of {key}: {}", self.log());
    }

    /// Ends it by `packmule umount`, which must succeed.
    pub fn umount_by_command(&mut self) {
        let (mut child, _guards) = self.running.take().unwrap();
        let mut asked = self.command().arg("umount").arg(&self.dir).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // The command waits for the process's end, and that is not there before somebody took note of it.
        let ended = wait(&mut child, PATIENCE);
        let status = wait(&mut asked, PATIENCE);
        self.clear(&mut child);
        assert!(ended.is_some_and(|status| status.success()), "{ended:?} after packmule umount; it says: {}", self.log());
        assert!(status.is_some_and(|status| status.success()), "packmule umount: {status:?}");
    }

    fn end(&mut self) -> ExitStatus {
        let (mut child, _guards) = self.running.take().unwrap();
        signal(&child, Signal::SIGTERM);
        let status = wait(&mut child, PATIENCE);
        self.clear(&mut child);
        status.unwrap_or_else(|| panic!("still running {PATIENCE:?} after SIGTERM; it says: {}", self.log()))
    }

    /// Ends it and mounts again with the same folders.
    pub fn remount(&mut self) {
        self.umount();
        self.again();
    }

    /// SIGKILL, and nothing else: the mountpoint stays, and nobody answers there.
    pub fn kill(&mut self) {
        let (mut child, _guards) = self.running.take().unwrap();
        signal(&child, Signal::SIGKILL);
        let _ = child.wait();
    }

    /// SIGKILL, and nobody sees to it that the program can end.
    pub fn kill_unwatched(&mut self) -> Child {
        let (child, _) = self.running.take().unwrap();
        signal(&child, Signal::SIGKILL);
        child
    }

    /// SIGKILL: what a crash leaves.
    pub fn crash(&mut self) {
        let (mut child, _guards) = self.running.take().unwrap();
        signal(&child, Signal::SIGKILL);
        self.clear(&mut child);
    }

    /// Ends it by a signal that it does not survive, and gives how it ended.
    pub fn dies_of(&mut self, deadly: Signal) -> ExitStatus {
        let (mut child, _guards) = self.running.take().unwrap();
        signal(&child, deadly);
        let status = wait(&mut child, PATIENCE);
        self.clear(&mut child);
        status.unwrap_or_else(|| panic!("it survived {deadly}"))
    }

    /// True when it was killed by a failpoint, or is within so long; it is not armed when it is mounted again.
    pub fn was_killed(&mut self, patience: Duration) -> bool {
        let (mut child, guards) = self.running.take().unwrap();
        let status = wait(&mut child, patience);
        match status {
            Some(status) => {
                assert_eq!(status.signal(), Some(Signal::SIGKILL as i32), "it ended by itself; it says: {}", self.log());
                self.setup.env.retain(|(name, _)| name != packmule::failpoint::VARIABLE);
                true
            }
            None => {
                self.running = Some((child, guards));
                false
            }
        }
    }

    /// Mounts again after [`Self::umount`] or [`Self::crash`].
    pub fn again(&mut self) {
        if let Err(failure) = self.up() {
            panic!("the mount did not come up again: {failure:?}");
        }
    }

    fn clear(&self, child: &mut Child) {
        if is_mounted(&self.dir) {
            let mut command = Command::new("fusermount3");
            let _ = command.arg("-uz").arg(&self.dir).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        if wait(child, Duration::from_secs(1)).is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some((mut child, _leash)) = self.running.take() {
            signal(&child, Signal::SIGTERM);
            let patience = if std::thread::panicking() { Duration::from_secs(2) } else { Duration::from_secs(20) };
            wait(&mut child, patience);
            self.clear(&mut child);
        }
        if std::thread::panicking() {
            eprintln!("the mount said:\n{}", self.log());
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    let _ = kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal);
}

/// The child's end, if it comes in time.
pub fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() > until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Read from the kernel's table: asking the folder itself would wait for a filesystem that does not answer.
pub fn is_mounted(dir: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = dir.to_str().unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == Some(dir))
}

/// The most memory that a process had, in bytes (VmHWM of proc_pid_status(5)).
pub fn peak_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}
