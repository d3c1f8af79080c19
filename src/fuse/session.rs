//! The mount as the kernel sees it: what is negotiated, the mount(2) options, the session's threads and its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, InitFlags, KernelConfig, MountOption, SessionACL, SessionUnmounter};
use nix::mount::{MntFlags, MsFlags, umount2};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::mountinfo::{FS_TYPE, mounted_at};
use super::notify::NoticeQueue;
use super::{Fuse, Operations};
use crate::vfs::Vfs;

/// Largest WRITE and READ request in bytes. Above 1 MiB nothing gets faster, and every writer's request is one allocation.
const MAX_REQUEST: u32 = 1 << 20;

/// Read-ahead and asynchronous direct requests that the kernel may have outstanding: twice the default number of
/// connections, so that a cold sequential read is never held up here.
const MAX_BACKGROUND: u16 = 64;

/// Threads that read /dev/fuse. They only decode; fuser gives each a buffer of 16 MiB, of which a request touches 1 MiB.
const SESSION_THREADS: usize = 2;

/// Kernel read-ahead window in KiB where we may set it (see [`widen_read_ahead`]).
const READ_AHEAD_KIB: u32 = 1024;

/// How long the session's threads may take to end after the unmount. They end at once, unless fusermount3 has detached a
/// mount that is in use.
const JOIN_TIMEOUT: Duration = Duration::from_secs(2);

/// What a mount asks of the kernel.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// First field of `/proc/mounts`.
    pub fsname: String,
    /// `ro`
    pub read_only: bool,
    /// `noexec`
    pub no_exec: bool,
    /// `noatime`
    pub no_atime: bool,
    /// `sync`
    pub sync: bool,
    /// `dirsync`
    pub dir_sync: bool,
    /// `allow_other`
    pub allow_other: bool,
    /// `allow_root`
    pub allow_root: bool,
    /// `default_permissions`
    pub default_permissions: bool,
}

/// Sets capabilities and sizes. A capability that the kernel lacks is left out. True where it may read cache files by itself: since
/// Linux 6.9, for CAP_SYS_ADMIN.
pub(super) fn negotiate(config: &mut KernelConfig) -> bool {
    let wanted = [
        // Else open(O_TRUNC) comes as SETATTR and looks like truncate(path).
        InitFlags::FUSE_ATOMIC_O_TRUNC,
        // Else a getxattr of security.capability comes before every WRITE.
        InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_DO_READDIRPLUS,
        InitFlags::FUSE_READDIRPLUS_AUTO,
        InitFlags::FUSE_ASYNC_DIO,
        // Else mmap(MAP_SHARED) of a file opened with FOPEN_DIRECT_IO is ENODEV.
        InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        // Cached pages go when the ETag changes (a notice, or an open without keep_cache), not when an mtime does: file
        // managers set the mtime after the data, and a replaced object may keep the old one's.
        InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    ];
    for flag in wanted {
        if config.add_capabilities(flag).is_err() {
            tracing::debug!(?flag, "not known to this kernel");
        }
    }
    // Left out on purpose: WRITEBACK_CACHE (sizes and the order of writes must be ours), AUTO_INVAL_DATA (see above),
    // DONT_MASK (the kernel applies the umask), POSIX_LOCKS and FLOCK_LOCKS (the kernel keeps them), CACHE_SYMLINKS.
    // A size that the kernel bounds lower answers the bound, and that is then used.
    if let Err(nearest) = config.set_max_write(MAX_REQUEST) {
        let _ = config.set_max_write(nearest);
    }
    if let Err(nearest) = config.set_max_readahead(MAX_REQUEST) {
        let _ = config.set_max_readahead(nearest);
    }
    let _ = config.set_max_background(MAX_BACKGROUND);
    let _ = config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3);
    // 1: the cache's filesystem is no stacked one, and a stacked one (a container's root) may lie over this mount.
    let passes = nix::unistd::geteuid().is_root() && config.set_max_stack_depth(1).is_ok();
    passes && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
}

/// Mounts by mount(2), which root may. fuser's own way is not taken: it opens the mountpoint, and opening a directory that
/// systemd's automount waits on waits for this very mount.
fn mount_as_root(mountpoint: &Path, options: &Options) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    // Neither devices nor setuid programs come out of a bucket, whoever mounts it.
    let mut flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    flags.set(MsFlags::MS_RDONLY, options.read_only);
    flags.set(MsFlags::MS_NOEXEC, options.no_exec);
    flags.set(MsFlags::MS_NOATIME, options.no_atime);
    flags.set(MsFlags::MS_SYNCHRONOUS, options.sync);
    flags.set(MsFlags::MS_DIRSYNC, options.dir_sync);
    let mut data =
        format!("fd={},rootmode=40000,user_id={},group_id={}", device.as_raw_fd(), nix::unistd::geteuid(), nix::unistd::getegid());
    if options.allow_other || options.allow_root {
        data.push_str(",allow_other");
    }
    if options.default_permissions {
        data.push_str(",default_permissions");
    }
    nix::mount::mount(Some(options.fsname.as_str()), mountpoint, Some(FS_TYPE), flags, Some(data.as_str()))?;
    Ok(device.into())
}

/// What fusermount3 is told, which mounts for an ordinary user.
fn fuser_options(options: &Options) -> Vec<MountOption> {
    // It splits its options at commas that no backslash precedes.
    let fsname = options.fsname.replace('\\', "\\\\").replace(',', "\\,");
    let mut mount_options =
        vec![MountOption::FSName(fsname), MountOption::CUSTOM("subtype=packmule".into()), MountOption::NoDev, MountOption::NoSuid];
    let switches = [
        (options.read_only, MountOption::RO),
        (options.no_exec, MountOption::NoExec),
        (options.no_atime, MountOption::NoAtime),
        (options.sync, MountOption::Sync),
        (options.dir_sync, MountOption::DirSync),
        (options.default_permissions, MountOption::DefaultPermissions),
    ];
    mount_options.extend(switches.into_iter().filter_map(|(on, option)| on.then_some(option)));
    mount_options
}

fn acl(options: &Options) -> SessionACL {
    match (options.allow_other, options.allow_root) {
        (true, _) => SessionACL::All,
        (false, true) => SessionACL::RootAndOwner,
        (false, false) => SessionACL::Owner,
    }
}

/// Mounts, and says who has to unmount.
fn open_session(filesystem: Fuse, mountpoint: &Path, options: &Options) -> io::Result<(fuser::Session<Fuse>, Unmounter)> {
    let mut config = Config::default();
    config.n_threads = Some(SESSION_THREADS);
    config.clone_fd = true;
    config.acl = acl(options);
    if nix::unistd::geteuid().is_root() {
        match mount_as_root(mountpoint, options) {
            Ok(device) => {
                let acl = config.acl;
                let session = fuser::Session::from_fd(filesystem, device, acl, config).inspect_err(|_| {
                    let _ = umount2(mountpoint, MntFlags::MNT_DETACH);
                })?;
                return Ok((session, Unmounter::Own));
            }
            // Root without CAP_SYS_ADMIN, as in a container.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            Err(error) => return Err(error),
        }
    }
    config.mount_options = fuser_options(options);
    let mut session = fuser::Session::new(filesystem, mountpoint, &config)?;
    let unmounter = session.unmount_callable();
    Ok((session, Unmounter::Fuser(unmounter)))
}

enum Unmounter {
    /// We called mount(2), we call umount(2).
    Own,
    /// fuser mounted by fusermount3 and unmounts by it (lazily, as fusermount3 -z).
    Fuser(SessionUnmounter),
}

/// The mount in the tree. Dropping it takes the mount away, in use or not, so that no way out of a failed start leaves one
/// behind that nobody serves.
struct Attachment {
    mountpoint: PathBuf,
    unmounter: Unmounter,
    /// `major:minor` of the mount, by which it is told from one that somebody else put there later.
    device: Option<String>,
    ended: watch::Receiver<bool>,
    taken: bool,
}

impl Attachment {
    fn is_there(&self) -> bool {
        !self.taken && !*self.ended.borrow() && mounted_at(&self.mountpoint).ok().flatten().map(|mount| mount.device) == self.device
    }

    /// True when it went with files still open, which fail when this process ends.
    fn take(&mut self) -> io::Result<bool> {
        if !self.is_there() {
            return Ok(false);
        }
        let result = match &mut self.unmounter {
            Unmounter::Own => umount2(&self.mountpoint, MntFlags::UMOUNT_NOFOLLOW).map_err(io::Error::from),
            Unmounter::Fuser(unmounter) => unmounter.unmount(),
        };
        let in_use = matches!(&result, Err(error) if error.raw_os_error() == Some(libc::EBUSY));
        if in_use {
            umount2(&self.mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
        } else {
            result?;
        }
        self.taken = true;
        Ok(in_use)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Err(error) = self.take() {
            tracing::warn!(mountpoint = %self.mountpoint.display(), %error, "the mount cannot be taken away");
        }
    }
}

/// A mounted filesystem and the threads that serve it.
pub struct Session {
    attachment: Attachment,
    thread: JoinHandle<()>,
    notices: Arc<NoticeQueue>,
    notifier: JoinHandle<()>,
    operations: Arc<Operations>,
}

impl Session {
    /// Mounts, and serves from then on. Blocks until the kernel has shaken hands.
    ///
    /// # Errors
    /// What mount(2) or fusermount3 answered, the latter in its own words.
    pub fn start(vfs: Arc<Vfs>, runtime: Handle, mountpoint: &Path, options: &Options) -> io::Result<Self> {
        let operations: Arc<Operations> = Arc::default();
        let for_opens = Arc::new(OnceLock::new());
        let filesystem = Fuse::new(vfs.clone(), runtime, operations.clone(), for_opens.clone());
        let (session, unmounter) = open_session(filesystem, mountpoint, options)?;
        // Set before any request is read, so it is never set twice.
        let _ = for_opens.set(session.notifier());
        let device = mounted_at(mountpoint)?.map(|mount| mount.device);
        if let Some(device) = &device {
            widen_read_ahead(device);
        }
        let (end, ended) = watch::channel(false);
        let attachment = Attachment { mountpoint: mountpoint.to_owned(), unmounter, device, ended, taken: false };
        let notices = Arc::new(NoticeQueue::default());
        let notifier = notices.start(session.notifier())?;
        vfs.set_notify(notices.clone());
        let thread = std::thread::Builder::new().name("session".into()).spawn(move || {
            if let Err(error) = session.run() {
                tracing::error!(%error, "the FUSE session ended with an error");
            }
            let _ = end.send(true);
        })?;
        Ok(Self { attachment, thread, notices, notifier, operations })
    }

    /// Resolves when the kernel has let go of the filesystem, whoever unmounted it.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut ended = self.attachment.ended.clone();
        async move {
            // An error means that the sender is gone, which is the end as well.
            let _ = ended.wait_for(|ended| *ended).await;
        }
    }

    /// What the kernel's operations come to.
    pub fn operations(&self) -> Arc<Operations> {
        self.operations.clone()
    }

    /// Unmounts and waits for the session's threads. A mount that is in use is detached: it leaves the tree at once, its open
    /// files fail when this process ends.
    ///
    /// # Errors
    /// What umount(2) answered.
    pub fn unmount(self) -> io::Result<()> {
        let Session { mut attachment, thread, notices, notifier, .. } = self;
        let in_use = attachment.take()?;
        if in_use {
            tracing::warn!(mountpoint = %attachment.mountpoint.display(), "files are still open: the mount is detached, they fail from now on");
        }
        notices.close();
        let deadline = Instant::now() + JOIN_TIMEOUT;
        while !in_use && !*attachment.ended.borrow() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        if *attachment.ended.borrow() {
            // A panic in either thread is in the log already.
            let _ = thread.join();
            let _ = notifier.join();
        }
        Ok(())
    }
}

/// FUSE keeps the kernel's 128 KiB read-ahead however much is negotiated; only sysfs raises it, and only root may write
/// there. With it a sequential read asks for 1 MiB at a time instead of 128 KiB.
fn widen_read_ahead(device: &str) {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, READ_AHEAD_KIB.to_string()) {
        tracing::debug!(path, %error, "the kernel's read-ahead stays at 128 KiB");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_for_fusermount() {
        let options = fuser_options(&Options { fsname: "s3://b/a,b\\c".into(), read_only: true, ..Options::default() });
        assert!(options.contains(&MountOption::RO));
        assert!(options.contains(&MountOption::FSName("s3://b/a\\,b\\\\c".into())));
        assert!(!options.contains(&MountOption::DefaultPermissions));
    }
}
