//! Mounts whose program has died. The kernel keeps such a mount: what is asked of it fails ("Transport endpoint is not connected"),
//! or, where the killed program cannot end (see [`control::was_killed`]), waits for ever.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::statfs::statfs;

use super::point::detach;
use crate::control;
use crate::fuse::mountinfo::mounted_at;

/// How long a mount that lives may take to answer statfs, which it does by itself (promise 22), before its program is looked at.
const ANSWER: Duration = Duration::from_secs(2);

/// Where fusectl is mounted, if anywhere (Documentation/filesystems/fuse/fuse.rst): `N/abort` belongs to the user who mounted.
const FUSECTL: &str = "/sys/fs/fuse/connections";

/// Takes a mount of packmule away whose program has died, so that callers who wait for it get their errors. False where it lives.
///
/// # Errors
/// When it cannot be taken away; one line with the remedy.
pub(crate) fn clear_dead(mountpoint: &Path) -> anyhow::Result<bool> {
    let Some(mount) = mounted_at(mountpoint)? else { return Ok(false) };
    let shown = mountpoint.display();
    let hangs = match ask(mountpoint.to_owned()) {
        Some(Err(Errno::ENOTCONN)) => false,
        None if control::was_killed(mountpoint) => true,
        None => bail!("{shown}: {} is mounted there and does not answer: end its packmule, or run umount -f {shown}", mount.source),
        Some(_) => return Ok(false),
    };
    tracing::warn!(mountpoint = %shown, "the packmule that served this mount has died: its mount is taken away");
    if hangs {
        abort(mountpoint, &mount.device);
    }
    if mounted_at(mountpoint)?.is_some_and(|now| now.device == mount.device) {
        detach(mountpoint)
            .with_context(|| format!("{shown}: the dead mount of {} is in the way: run fusermount3 -uz {shown}", mount.source))?;
    }
    Ok(true)
}

/// What statfs says: the kernel never answers it from its caches, as it may a dead mount's attributes. `None` where it hangs.
fn ask(mountpoint: PathBuf) -> Option<Result<(), Errno>> {
    let (answer, asked) = mpsc::channel();
    // Left behind where it hangs: the abort ends it, and the end of this process.
    std::thread::spawn(move || answer.send(statfs(&mountpoint).map(drop)));
    asked.recv_timeout(ANSWER).ok()
}

/// Ends a connection that nobody will answer any more: every call that waits on it fails. Where we may not, the mount is taken out of
/// the tree all the same, and only who waits in it already goes on waiting until he is killed.
fn abort(mountpoint: &Path, device: &str) {
    let id = device.rsplit_once(':').map_or(device, |(_, minor)| minor);
    if std::fs::write(Path::new(FUSECTL).join(id).join("abort"), "1").is_ok() {
        return;
    }
    // Aborts first, and then unmounts where nobody is on it, else answers EBUSY.
    if let Err(error @ (Errno::EPERM | Errno::EACCES)) = umount2(mountpoint, MntFlags::MNT_FORCE | MntFlags::UMOUNT_NOFOLLOW) {
        tracing::warn!(mountpoint = %mountpoint.display(), %error, "who waits in the dead mount waits until he is killed");
    }
}
