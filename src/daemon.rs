//! The process of a mount: in the foreground, or in the background of the command that returns when the filesystem answers.
//!
//! Background: the binary starts itself again with the same arguments and a pipe as standard output, on which the new process
//! says one line, `ready` or the reason why not. No fork: a fork would lose the runtime's threads.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::log::Log;
use crate::config::Config;
use crate::control::Upload;
use crate::mount::{self, Mount, Outlook};

mod inhibit;
pub mod log;

/// Set for the process that the background start makes: its standard output is the readiness pipe.
const READY_PIPE: &str = "PACKMULE_READY_PIPE";

/// What glibc's malloc(3) is told (mallopt(3)), which keeps a mount within `memory_limit`. It is read when a program starts.
///
/// It gives memory back from a size on that it raises as buffers are freed, up to 32 MiB, and then keeps what threads free: some 30 MiB
/// with 16 readers. Named, the size stays what it begins with. And each thread has an arena of its own, where what another one frees in
/// its own is of no use to it: the names of a large directory come in one thread, and are looked up in others.
const MALLOC: [(&str, &str); 2] = [("MALLOC_MMAP_THRESHOLD_", "131072"), ("MALLOC_ARENA_MAX", "4")];

/// mount(8): the mount failed.
const MOUNT_FAILED: u8 = 32;

/// How much longer than asked for before a stop may take, as it goes on.
const EXTENSION: Duration = Duration::from_secs(60);

/// Largest number of threads for file I/O.
const BLOCKING_THREADS: usize = 64;

/// Keeps what this process has in memory, keys among it, out of core dumps, whatever the system does with those (prctl(2),
/// PR_SET_DUMPABLE: a limit of 0 would not count where they are piped to a program).
pub fn refuse_core_dumps() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::debug!(%error, "core dumps stay possible");
    }
}

/// Mounts, in the foreground until unmounted, or in the background until it answers. What goes wrong is one line on stderr.
/// Must be called before the program starts threads.
pub fn run(config: &Config) -> ExitCode {
    let child = std::env::var_os(READY_PIPE).is_some();
    let result = match (config.mount.remount, child, config.mount.foreground) {
        (true, ..) => mount::remount(config).map(|()| ExitCode::SUCCESS),
        (_, true, _) => return run_child(config),
        (_, _, true) => {
            if unset().next().is_some()
                && let Ok(mut again) = myself()
            {
                // Where it fails the mount needs more memory, and that is all.
                let _ = again.exec();
            }
            run_here(config, false, || Ok(()))
        }
        (_, _, false) => start_background(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("packmule: {}", one_line(&error));
        ExitCode::from(MOUNT_FAILED)
    })
}

/// An error and its causes in one line.
pub fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").trim().replace('\n', "; ")
}

/// This program with the same arguments.
fn myself() -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("cannot find my own program file")?;
    let mut arguments = std::env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        // mount.packmule and packmule are one file that looks at its name.
        command.arg0(name);
    }
    command.args(arguments);
    command.envs(unset());
    Ok(command)
}

/// Of [`MALLOC`], what this process was not started with.
fn unset() -> impl Iterator<Item = (&'static str, &'static str)> {
    MALLOC.into_iter().filter(|(name, _)| std::env::var_os(name).is_none())
}

/// Starts this program again and waits for its one line.
fn start_background() -> anyhow::Result<ExitCode> {
    // What the caller has open (a script's flock(1), the end of a pipe) is not to be held as long as the mount lives.
    close_fds::set_fds_cloexec(3, &[]);
    let mut child = myself()?
        .env(READY_PIPE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the background process")?;
    let mut line = String::new();
    if let Some(pipe) = child.stdout.take() {
        BufReader::new(pipe).read_line(&mut line).context("the background process cannot be heard")?;
    }
    match line.trim_end() {
        "ready" => Ok(ExitCode::SUCCESS),
        "" => {
            let status = child.wait().context("the background process is lost")?;
            bail!("the background process ended without a word ({status}): start it with -f to see why")
        }
        reason => bail!("{reason}"),
    }
}

/// The background process: a session of its own, no working directory, and one line to the command that waits.
fn run_child(config: &Config) -> ExitCode {
    let say = |line: &str| {
        let mut pipe = io::stdout();
        let said = writeln!(pipe, "{line}").and_then(|()| pipe.flush());
        if let Ok(null) = File::options().write(true).open("/dev/null") {
            let _ = nix::unistd::dup2_stdout(null);
        }
        said
    };
    // Fails only for a leader of its session, which needs no new one.
    let _ = nix::unistd::setsid();
    let _ = std::env::set_current_dir("/");
    let result = run_here(config, true, || say("ready").context("the command that started this mount is gone"));
    result.unwrap_or_else(|error| {
        let line = one_line(&error);
        tracing::error!("{line}");
        let _ = say(&line);
        ExitCode::from(MOUNT_FAILED)
    })
}

/// Mounts and serves until the end. `ready` is called when the filesystem answers; its error unmounts again.
fn run_here(config: &Config, background: bool, ready: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let log = log::start(config, background)?;
    log::log_panics();
    allow_many_files();
    let runtime = runtime().context("cannot start")?;
    let result = runtime.block_on(serve(config, &log, ready));
    // Nothing that still runs has a promise to keep: what was not drained lies in the spool.
    runtime.shutdown_background();
    result
}

/// Each open file of the mount and each connection is a descriptor here, and so is what is read from the cache: the soft limit, 1024 nearly
/// everywhere for the sake of select(2), is less than a mount is asked for. What it starts inherits the limit as it then is.
fn allow_many_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// The runtime of a mount.
///
/// # Errors
/// When threads cannot be started.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("packmule").max_blocking_threads(BLOCKING_THREADS).build()
}

/// TERM and INT, as one. From when it is made neither ends the process by itself.
pub(crate) struct Stop {
    term: Signal,
    int: Signal,
}

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// Resolves at the next of them.
    pub(crate) async fn asked(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

async fn serve(config: &Config, log: &Log, ready: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let mut stop = Stop::new()?;
    let (mut hup, mut usr2) = (signal(SignalKind::hangup())?, signal(SignalKind::user_defined2())?);
    let mut mount = tokio::select! {
        mount = Mount::start(config) => mount?,
        () = stop.asked() => bail!("interrupted before the mount was there"),
    };
    tracing::info!(source = config.fsname, mountpoint = %mount.mountpoint().display(), "mounted");
    if let Err(error) = ready() {
        mount.unmount().await?;
        return Err(error);
    }
    notify_service_manager(&format!("READY=1\nSTATUS=mounted on {}", mount.mountpoint().display()));

    // Until the end: a shutdown waits for the drain too.
    let awake = inhibit::while_pending(mount.outlook());
    tokio::pin!(awake);
    let asker = loop {
        tokio::select! {
            () = &mut awake => {}
            () = mount.ended() => break None,
            () = stop.asked() => break None,
            asker = mount.umount_asked() => break Some(asker),
            _ = hup.recv() => {
                log.reopen();
                mount.refresh().await;
            }
            _ = usr2.recv() => log.step_level(),
        }
    };

    notify_service_manager("STOPPING=1");
    let asks_for_time = ask_for_time(mount.outlook());
    let deadline = async {
        match asker.as_ref().and_then(|asker| asker.timeout) {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let left = tokio::select! {
        left = mount.drain() => left,
        () = awake => mount.work(),
        () = asks_for_time => mount.work(),
        () = deadline => mount.work(),
        () = stop.asked() => mount.work(),
    };
    report(&left, log);
    if let Some(asker) = asker {
        asker.answer(left.clone()).await;
    }
    mount.unmount().await?;
    tracing::info!("unmounted");
    Ok(if left.iter().all(Upload::may_wait) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Tells the service manager what an end waits for, and that it takes longer than TimeoutStopSec= (sd_notify(3), EXTEND_TIMEOUT_USEC):
/// the drain itself ends when nothing moves any more. Never ends.
async fn ask_for_time(outlook: Outlook) {
    loop {
        let status = format!("STATUS=storing {}\nEXTEND_TIMEOUT_USEC={}", outlook.shown(), EXTENSION.as_micros());
        notify_service_manager(&status);
        tokio::time::sleep(EXTENSION / 6).await;
    }
}

/// Says what is not in S3: in the log, and to a user at the terminal.
fn report(left: &[Upload], log: &Log) {
    for upload in left {
        let reason = upload.reason.as_deref().unwrap_or("not finished");
        if upload.is_delete() {
            tracing::warn!(bucket = upload.bucket, key = upload.key, reason, "not deleted");
        } else {
            tracing::warn!(bucket = upload.bucket, key = upload.key, reason, "not uploaded: kept in the spool");
        }
    }
    let files = left.iter().filter(|upload| !upload.is_delete()).count();
    if files > 0 && log.path().is_some() && io::stderr().is_terminal() {
        eprintln!("packmule: {files} files are not uploaded: they are kept in the spool");
    }
}

/// sd_notify(3), without the library: one datagram to the socket that systemd names. Without one there is nobody to tell.
fn notify_service_manager(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else { return };
    let send = || {
        let address = match name.as_bytes().strip_prefix(b"@") {
            Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name)?,
            None => SocketAddr::from_pathname(&name)?,
        };
        let socket = UnixDatagram::unbound()?;
        // A manager that does not read must not hold up the end.
        socket.set_nonblocking(true)?;
        socket.send_to_addr(state.as_bytes(), &address)
    };
    if let Err(error) = send() {
        tracing::warn!(%error, "NOTIFY_SOCKET does not take the state");
    }
}
