//! The mountpoint, and what this machine needs for a FUSE mount: everything that can be known before S3 is asked, each
//! failure in one line that names the thing and the remedy.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::unistd::{AccessFlags, access, geteuid};

use super::dead::clear_dead;
use crate::config::{Config, MountFlags};
use crate::fuse::mountinfo::{FS_TYPE, mounted_at};

/// Checks the mountpoint and the machine; gives the mountpoint with its links resolved, as the kernel will show it. The
/// mount of a packmule that died is taken away first.
pub(super) fn prepare(config: &Config) -> anyhow::Result<PathBuf> {
    check_machine(&config.mount)?;
    let shown = config.mountpoint.display();
    let mountpoint = crate::control::resolve(&config.mountpoint)?;
    if let Some(mount) = mounted_at(&mountpoint)?.filter(|mount| mount.fs_type == FS_TYPE)
        && !clear_dead(&mountpoint)?
    {
        bail!("{shown}: {} is already mounted there: unmount it first (packmule umount {shown})", mount.source);
    }
    match std::fs::metadata(&mountpoint) {
        Ok(metadata) if !metadata.is_dir() => bail!("{shown}: not a directory: name a directory to mount on"),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!("{shown}: no such directory: make it first (mkdir -p {shown})"),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            bail!("{shown}: a mount whose program has died is in the way: unmount it (fusermount3 -uz {shown})")
        }
        Err(error) => return Err(error).context(format!("{shown}: cannot be mounted on")),
    }
    // Looking into a directory that systemd's automount waits on would wait for this very mount.
    let automount = mounted_at(&mountpoint)?.is_some_and(|mount| mount.fs_type == "autofs");
    if !automount && !config.mount.nonempty {
        let mut entries = std::fs::read_dir(&mountpoint).with_context(|| format!("{shown}: cannot be read"))?;
        if entries.next().is_some() {
            bail!("{shown}: not empty, and the mount would hide what is in it: name an empty directory, or pass -o nonempty");
        }
    }
    // fusermount3's own rule, said before S3 is asked.
    if !geteuid().is_root() && access(&mountpoint, AccessFlags::W_OK).is_err() {
        bail!("{shown}: you may not write to it, and an ordinary user mounts on his own directories only");
    }
    Ok(mountpoint)
}

fn check_machine(flags: &MountFlags) -> anyhow::Result<()> {
    device()?;
    helper()?;
    others(flags)
}

/// /dev/fuse is there, and may be opened.
pub(crate) fn device() -> anyhow::Result<()> {
    match std::fs::metadata("/dev/fuse") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!(
                "/dev/fuse: missing: load the kernel's module (modprobe fuse), or give the container the device (--device /dev/fuse --cap-add SYS_ADMIN)"
            )
        }
        Err(error) => return Err(error).context("/dev/fuse"),
        Ok(_) => {}
    }
    // A container's rules are not in its mode: only opening it tells.
    match std::fs::File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Ok(()),
        Err(_) if geteuid().is_root() => {
            bail!("/dev/fuse: may not be opened here: give the container the device (--device /dev/fuse --cap-add SYS_ADMIN)")
        }
        Err(_) => bail!("/dev/fuse: you may not open it: ask for membership in its group (ls -l /dev/fuse)"),
    }
}

/// The helper that mounts for ordinary users; `None` for root, who needs none.
pub(crate) fn helper() -> anyhow::Result<Option<PathBuf>> {
    if geteuid().is_root() {
        return Ok(None);
    }
    match fusermount() {
        None => bail!("fusermount3: not found: install the package fuse3"),
        found => Ok(found),
    }
}

/// What `allow_other` asks for is allowed.
pub(crate) fn others(flags: &MountFlags) -> anyhow::Result<()> {
    if (flags.allow_other || flags.allow_root) && !geteuid().is_root() && !user_allow_other() {
        bail!(
            "allow_other: not allowed to ordinary users on this machine: put the line user_allow_other into /etc/fuse.conf, or mount as root"
        );
    }
    Ok(())
}

/// Root lets ordinary users show their mounts to others.
pub(crate) fn user_allow_other() -> bool {
    std::fs::read_to_string("/etc/fuse.conf").is_ok_and(|conf| conf.lines().any(|line| line.trim() == "user_allow_other"))
}

/// The setuid helper, where fuser and the shell look for it.
fn fusermount() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("FUSERMOUNT_PATH") {
        return Some(PathBuf::from(named)).filter(|file| file.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/bin", "/bin", "/sbin"].map(PathBuf::from)).collect::<Vec<_>>();
    ["fusermount3", "fusermount"].iter().find_map(|name| dirs.iter().map(|dir| dir.join(name)).find(|file| file.is_file()))
}

/// Takes a mount out of the tree, in use or not.
pub(crate) fn detach(mountpoint: &Path) -> anyhow::Result<()> {
    match umount2(mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EPERM) => fusermount_unmount(mountpoint, true),
        Err(error) => Err(error.into()),
    }
}

/// Unmounts by umount(2), or by fusermount3 where that is root's.
///
/// # Errors
/// What they answered, "in use" included.
pub fn unmount(mountpoint: &Path) -> anyhow::Result<()> {
    match umount2(mountpoint, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EPERM) => fusermount_unmount(mountpoint, false),
        Err(nix::errno::Errno::EBUSY) => {
            bail!("{}: in use: close what is open on it (fuser -vm {0} names the programs)", mountpoint.display())
        }
        Err(nix::errno::Errno::EINVAL) => bail!("{}: not mounted", mountpoint.display()),
        Err(error) => Err(error).context(format!("{}: cannot be unmounted", mountpoint.display())),
    }
}

fn fusermount_unmount(mountpoint: &Path, lazy: bool) -> anyhow::Result<()> {
    let Some(program) = fusermount() else { bail!("fusermount3: not found: install the package fuse3") };
    let mode = if lazy { "-uz" } else { "-u" };
    let output = Command::new(program).args([mode, "--"]).arg(mountpoint).stdin(Stdio::null()).output().context("fusermount3")?;
    if !output.status.success() {
        bail!("{}: {}", mountpoint.display(), String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "));
    }
    Ok(())
}

/// One line for what mount(2) or fusermount3 refused.
pub(super) fn explain(error: io::Error, mountpoint: &Path) -> anyhow::Error {
    let shown = mountpoint.display();
    let remedy = match error.raw_os_error() {
        Some(libc::ENODEV) => "the kernel has no FUSE: load its module (modprobe fuse)",
        Some(libc::EPERM) => "not permitted: a container needs --cap-add SYS_ADMIN and --device /dev/fuse",
        Some(libc::EBUSY) => "busy: something else is being mounted there",
        _ => "cannot be mounted on",
    };
    // fusermount3 may say several lines, its own name first.
    let said = error.to_string().trim().replace('\n', "; ");
    anyhow::anyhow!("{shown}: {remedy} ({said})")
}

/// `remount`: changes the kernel's flags of a mount that is there. Never mounts.
///
/// # Errors
/// When nothing of ours is mounted there, or for anybody but root.
pub fn remount(config: &Config) -> anyhow::Result<()> {
    let shown = config.mountpoint.display();
    let mountpoint = crate::control::resolve(&config.mountpoint)?;
    if mounted_at(&mountpoint)?.is_none_or(|mount| mount.fs_type != FS_TYPE) {
        bail!("{shown}: nothing of packmule is mounted there to remount");
    }
    if !geteuid().is_root() {
        bail!("{shown}: only root may remount: unmount and mount it anew");
    }
    let flags = &config.mount;
    let mut ms = MsFlags::MS_REMOUNT | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    ms.set(MsFlags::MS_RDONLY, flags.ro);
    ms.set(MsFlags::MS_NOEXEC, flags.noexec);
    ms.set(MsFlags::MS_NOATIME, flags.noatime);
    ms.set(MsFlags::MS_SYNCHRONOUS, flags.sync);
    ms.set(MsFlags::MS_DIRSYNC, flags.dirsync);
    match nix::mount::mount(None::<&str>, &mountpoint, None::<&str>, ms, None::<&str>) {
        Err(nix::errno::Errno::EBUSY) => bail!("{shown}: files are open for writing: close them, then remount read-only"),
        result => result.with_context(|| format!("{shown}: cannot be remounted")),
    }
}
