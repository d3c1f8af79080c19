//! `packmule umount DIR`, also as `umount.fuse.packmule`: asks the mount to finish its uploads and to go, and falls back to umount(2) or fusermount3 where nobody answers.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;

use super::{Client, Request, Response, Upload, progress, resolve, runs};
use crate::fuse::mountinfo::{FS_TYPE, mounted_at};
use crate::mount;

/// How long the mount may take to go once its uploads are done.
const GONE: Duration = Duration::from_secs(30);

/// How long the process may take to end after that; it writes its cache's index.
const PROCESS_ENDED: Duration = Duration::from_secs(10);

/// How to unmount.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// `-l`: take it out of the tree at once; the process finishes the uploads by itself.
    pub lazy: bool,
    /// How long to wait for the uploads; without one, as long as bytes move (`close_timeout`).
    pub timeout: Option<Duration>,
}

/// How it went.
#[derive(Debug, Default)]
pub struct Unmounted {
    /// What could not be uploaded, and stays in the spool.
    pub left: Vec<Upload>,
    /// The mount's program had died before: what is in the spool was not asked.
    pub had_died: bool,
}

/// Unmounts. A mount whose program has died is taken away.
///
/// # Errors
/// When it is not a mount of packmule, or is still there at the end; one line.
pub fn umount(mountpoint: &Path, options: Options) -> anyhow::Result<Unmounted> {
    let shown = mountpoint.display();
    let mountpoint = resolve(mountpoint)?;
    match mounted_at(&mountpoint)? {
        None => bail!("{shown}: not mounted"),
        Some(mount) if mount.fs_type != FS_TYPE => bail!("{shown}: a mount of type {}, not of packmule: use umount(8)", mount.fs_type),
        Some(_) => {}
    }
    match (mount::clear_dead(&mountpoint), options.lazy) {
        (Ok(true), _) => return Ok(Unmounted { had_died: true, ..Unmounted::default() }),
        (_, true) => {
            mount::detach(&mountpoint)?;
            return Ok(Unmounted::default());
        }
        (alive, false) => alive.map(drop)?,
    }
    let Ok(mut client) = Client::connect(&mountpoint) else {
        // Nobody's, or somebody else's and we are root: the process drains by itself once the kernel let go.
        mount::unmount(&mountpoint)?;
        return Ok(Unmounted::default());
    };
    let pid = match client.call(&Request::Ping)? {
        Response::Pong { pid, .. } => pid,
        other => bail!("{shown}: an answer to another question: {other:?}"),
    };
    let request = Request::Umount { timeout_ms: options.timeout.map(super::milliseconds) };
    let left = match progress::during(&mountpoint, |_| true, || client.call(&request))? {
        Response::Left { uploads } => uploads,
        other => bail!("{shown}: an answer to another question: {other:?}"),
    };
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
    Ok(Unmounted { left, had_died: false })
}
