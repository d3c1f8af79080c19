//! `packmule umount DIR`, also as `umount.fuse.packmule`: asks the mount to finish its uploads and to go, shows how far it
//! is, and falls back to umount(2) or fusermount3 where nobody answers.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Client, Request, Response, Upload, resolve};
use crate::fuse::mountinfo::{FS_TYPE, mounted_at};
use crate::mount;

/// How long the mount may take to go once its uploads are done.
const GONE: Duration = Duration::from_secs(30);

/// How long the process may take to end after that; it writes its cache's index.
const PROCESS_ENDED: Duration = Duration::from_secs(10);

/// How often the progress is asked for.
const POLL: Duration = Duration::from_millis(200);

/// How to unmount.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// `-l`: take it out of the tree at once; the process finishes the uploads by itself.
    pub lazy: bool,
    /// No progress.
    pub quiet: bool,
}

/// Unmounts; gives what could not be uploaded and stays in the spool.
///
/// # Errors
/// When it is not a mount of packmule, or is still there at the end; one line.
pub fn umount(mountpoint: &Path, options: Options) -> anyhow::Result<Vec<Upload>> {
    let shown = mountpoint.display();
    let mountpoint = resolve(mountpoint)?;
    match mounted_at(&mountpoint)? {
        None => bail!("{shown}: not mounted"),
        Some(mount) if mount.fs_type != FS_TYPE => bail!("{shown}: a mount of type {}, not of packmule: use umount(8)", mount.fs_type),
        Some(_) => {}
    }
    if options.lazy {
        mount::detach(&mountpoint)?;
        return Ok(Vec::new());
    }
    let Ok(mut client) = Client::connect(&mountpoint) else {
        // Nobody's, or somebody else's and we are root: the process drains by itself once the kernel let go.
        mount::unmount(&mountpoint)?;
        return Ok(Vec::new());
    };
    let pid = match client.call(&Request::Ping)? {
        Response::Pong { pid, .. } => pid,
        other => bail!("{shown}: an answer to another question: {other:?}"),
    };
    let left = ask(client, &mountpoint, options)?;
    let deadline = Instant::now() + GONE;
    while mounted_at(&mountpoint)?.is_some_and(|mount| mount.fs_type == FS_TYPE) {
        if Instant::now() > deadline {
            mount::unmount(&mountpoint)?;
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // Whoever mounts again right away wants spool and cache unlocked: they are when the process has ended.
    let deadline = Instant::now() + PROCESS_ENDED;
    while pid != std::process::id() && runs(pid) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(left)
}

/// False once the process has ended, though nobody may have reaped it yet (proc_pid_stat(5): the state follows the name).
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Asks on one connection and watches on another.
fn ask(mut client: Client, mountpoint: &Path, options: Options) -> anyhow::Result<Vec<Upload>> {
    let done = AtomicBool::new(false);
    let answer = std::thread::scope(|scope| {
        if !options.quiet && std::io::stderr().is_terminal() {
            scope.spawn(|| watch(mountpoint, &done));
        }
        let answer = client.call(&Request::Umount);
        done.store(true, Ordering::Relaxed);
        answer
    })?;
    match answer {
        Response::Left { uploads } => Ok(uploads),
        other => bail!("{}: an answer to another question: {other:?}", mountpoint.display()),
    }
}

fn watch(mountpoint: &Path, done: &AtomicBool) {
    let Ok(mut client) = Client::connect(mountpoint) else { return };
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("uploading {msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}") {
        bar.set_style(style);
    }
    let mut finished = 0;
    let mut before: Vec<Upload> = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let Ok(Response::Status(status)) = client.call(&Request::Status) else { break };
        let moving: Vec<Upload> = status.uploads.into_iter().filter(|upload| upload.phase != "parked" && !upload.held).collect();
        // What is gone from the list went through; the bar counts it on.
        finished += before.iter().filter(|old| !moving.iter().any(|new| new.id == old.id)).map(|old| old.size).sum::<u64>();
        bar.set_length(finished + moving.iter().map(|upload| upload.size).sum::<u64>());
        bar.set_position(finished + moving.iter().map(|upload| upload.sent.min(upload.size)).sum::<u64>());
        bar.set_message(format!("{} files", moving.len()));
        before = moving;
        std::thread::sleep(POLL);
    }
    bar.finish_and_clear();
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_nobody_reaped_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(runs(std::process::id()) && runs(child.id()));
        child.kill().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while runs(child.id()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!runs(child.id()) && Path::new("/proc").join(child.id().to_string()).exists());
        child.wait().unwrap();
        assert!(!runs(child.id()));
    }
}
