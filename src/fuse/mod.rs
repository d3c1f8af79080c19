//! The kernel's requests. A session thread decodes one, a task answers it: a slow or a panicking operation harms its own
//! caller alone (a reply that is dropped unsent answers EIO), and the session threads never wait. What asks for names and attributes is
//! answered by the session thread itself where nothing has to be waited for.
//!
//! Locks: neither POSIX_LOCKS nor FLOCK_LOCKS is negotiated, so the kernel keeps fcntl and flock locks by itself, between
//! the processes of this machine.

mod convert;
mod errno;
pub mod mountinfo;
mod notify;
mod operations;
pub mod session;

use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FopenFlags, Generation, INodeNo, KernelConfig, LockOwner, Notifier,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle;

use self::convert::{caller, file_attr, file_type, reply_attr, reply_create, reply_entry, reply_open, reply_xattr, set_time, shared_ttl};
pub(crate) use self::errno::describe;
use self::errno::errno;
pub use self::operations::Operations;
use self::operations::{Operation, UnderWay};
use crate::vfs::{self, DirEntry, Error, SetAttr, Vfs};

/// The largest count a copy_file_range reply carries: a whole page below 32 bits, as the kernel itself asks.
const MAX_COPY: u64 = 0xffff_f000;

/// What fuser calls.
pub(crate) struct Fuse {
    vfs: Arc<Vfs>,
    runtime: Handle,
    operations: Arc<Operations>,
    /// Set once the session is there.
    notifier: Arc<OnceLock<Notifier>>,
}

impl Fuse {
    pub(crate) fn new(vfs: Arc<Vfs>, runtime: Handle, operations: Arc<Operations>, notifier: Arc<OnceLock<Notifier>>) -> Self {
        Self { vfs, runtime, operations, notifier }
    }

    /// Runs one operation. The task owns the reply: if it panics the reply is dropped, which answers EIO, and the panic
    /// hook logs it.
    fn spawn<F: Future<Output = ()> + Send + 'static>(
        &self,
        req: &Request,
        kind: Operation,
        operation: impl FnOnce(Arc<Vfs>) -> F + Send + 'static,
    ) {
        self.runtime.spawn(self.task(req, kind, operation));
    }

    /// As [`Self::spawn`], and at once as far as it goes without waiting: waking another thread costs more than most answers about names
    /// do. For operations that neither copy file data nor call the kernel back, which may wait for a session thread.
    fn answer<F: Future<Output = ()> + Send + 'static>(
        &self,
        req: &Request,
        kind: Operation,
        operation: impl FnOnce(Arc<Vfs>) -> F + Send + 'static,
    ) {
        let mut task = Box::pin(self.task(req, kind, operation));
        let _runtime = self.runtime.enter();
        let polls = AssertUnwindSafe(|| task.as_mut().poll(&mut Context::from_waker(Waker::noop())));
        // A spawned task is polled anew, with a waker of its own. One that panicked is dropped, as the runtime drops it.
        if let Ok(Poll::Pending) = std::panic::catch_unwind(polls) {
            self.runtime.spawn(task);
        }
    }

    fn task<F: Future<Output = ()> + Send + 'static>(
        &self,
        req: &Request,
        kind: Operation,
        operation: impl FnOnce(Arc<Vfs>) -> F + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (vfs, guard, pid) = (self.vfs.clone(), UnderWay::begin(&self.operations, kind), req.pid());
        async move {
            let _guard = guard;
            vfs::asked_by(pid, operation(vfs)).await;
        }
    }
}

fn reply_empty(reply: ReplyEmpty, result: Result<(), Error>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

impl fuser::Filesystem for Fuse {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if session::negotiate(config) {
            self.vfs.pass_through();
        }
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (caller, name) = (caller(req), name.to_owned());
        self.answer(req, Operation::Lookup, async move |vfs| reply_entry(reply, vfs.lookup(caller, parent.0, &name).await));
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.vfs.forget(ino.0, nlookup);
    }

    fn getattr(&self, req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(req, Operation::Getattr, async move |vfs| reply_attr(reply, vfs.getattr(ino.0, fh.map(|fh| fh.0)).await));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (caller, fh) = (caller(req), fh.map(|fh| fh.0));
        let set = SetAttr { mode, uid, gid, size, atime: atime.map(set_time), mtime: mtime.map(set_time) };
        self.spawn(req, Operation::Setattr, async move |vfs| reply_attr(reply, vfs.setattr(caller, ino.0, fh, set).await));
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        self.answer(req, Operation::Readlink, async move |vfs| match vfs.readlink(ino.0).await {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn mknod(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, _rdev: u32, reply: ReplyEntry) {
        if !matches!(mode & libc::S_IFMT, 0 | libc::S_IFREG) {
            return reply.error(Errno::EPERM);
        }
        let (caller, name) = (caller(req), name.to_owned());
        self.spawn(req, Operation::Mknod, async move |vfs| reply_entry(reply, vfs.mknod(caller, parent.0, &name, mode, umask).await));
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let (caller, name) = (caller(req), name.to_owned());
        self.spawn(req, Operation::Mkdir, async move |vfs| reply_entry(reply, vfs.mkdir(caller, parent.0, &name, mode, umask).await));
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, name) = (caller(req), name.to_owned());
        self.spawn(req, Operation::Unlink, async move |vfs| reply_empty(reply, vfs.unlink(caller, parent.0, &name).await));
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, name) = (caller(req), name.to_owned());
        self.spawn(req, Operation::Rmdir, async move |vfs| reply_empty(reply, vfs.rmdir(caller, parent.0, &name).await));
    }

    fn symlink(&self, req: &Request, parent: INodeNo, link_name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (caller, name, target) = (caller(req), link_name.to_owned(), target.as_os_str().as_bytes().to_vec());
        self.spawn(req, Operation::Symlink, async move |vfs| reply_entry(reply, vfs.symlink(caller, parent.0, &name, &target).await));
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (caller, name, newname) = (caller(req), name.to_owned(), newname.to_owned());
        self.spawn(req, Operation::Rename, async move |vfs| {
            reply_empty(reply, vfs.rename(caller, parent.0, &name, newparent.0, &newname, flags.bits()).await)
        });
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        // An object has one key. EPERM is link(2)'s word for a filesystem without hard links.
        reply.error(Errno::EPERM);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (caller, notifier) = (caller(req), self.notifier.clone());
        self.spawn(req, Operation::Open, async move |vfs| {
            let result = vfs.open(caller, ino.0, flags.0).await;
            if result.as_ref().is_ok_and(|opened| !opened.keep_cache) {
                forget_attributes(&notifier, ino);
            }
            reply_open(&vfs, reply, result);
        });
    }

    fn create(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, flags: i32, reply: ReplyCreate) {
        let (caller, name) = (caller(req), name.to_owned());
        self.spawn(req, Operation::Create, async move |vfs| {
            reply_create(reply, vfs.create(caller, parent.0, &name, mode, umask, flags).await)
        });
    }

    fn read(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.spawn(req, Operation::Read, async move |vfs| match vfs.read(fh.0, offset, size).await {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // The one copy of the data: the session thread's buffer takes the next request as soon as this returns.
        let (data, kill_suidgid) = (Bytes::copy_from_slice(data), write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID));
        self.spawn(req, Operation::Write, async move |vfs| match vfs.write(fh.0, offset, data, kill_suidgid).await {
            Ok(written) => reply.written(written),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn flush(&self, req: &Request, _ino: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        let caller = caller(req);
        self.spawn(req, Operation::Flush, async move |vfs| reply_empty(reply, vfs.flush(caller, fh.0).await));
    }

    fn release(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.spawn(req, Operation::Release, async move |vfs| {
            vfs.release(fh.0).await;
            reply.ok();
        });
    }

    fn fsync(&self, req: &Request, _ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.spawn(req, Operation::Fsync, async move |vfs| reply_empty(reply, vfs.fsync(fh.0, datasync).await));
    }

    fn fallocate(&self, req: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, length: u64, mode: i32, reply: ReplyEmpty) {
        let caller = caller(req);
        self.spawn(req, Operation::Fallocate, async move |vfs| reply_empty(reply, vfs.fallocate(caller, fh.0, offset, length, mode).await));
    }

    fn lseek(&self, req: &Request, _ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        self.spawn(req, Operation::Lseek, async move |vfs| match vfs.lseek(fh.0, offset, whence).await {
            Ok(offset) => reply.offset(i64::try_from(offset).unwrap_or(i64::MAX)),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn copy_file_range(
        &self,
        req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let caller = caller(req);
        self.spawn(req, Operation::CopyFileRange, async move |vfs| {
            match vfs.copy_file_range(caller, fh_in.0, offset_in, fh_out.0, offset_out, len.min(MAX_COPY)).await {
                Ok(copied) => reply.written(u32::try_from(copied).unwrap_or(u32::MAX)),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.answer(req, Operation::Opendir, async move |vfs| match vfs.opendir(ino.0).await {
            Ok(fh) => reply.opened(FileHandle(fh), FopenFlags::empty()),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn readdir(&self, req: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.spawn(req, Operation::Readdir, async move |vfs| {
            let mut taken = false;
            let result = vfs
                .readdir(fh.0, offset, false, &mut |entry: DirEntry<'_>| {
                    let added = !reply.add(INodeNo(entry.ino), entry.offset, file_type(entry.kind), entry.name);
                    taken |= added;
                    added
                })
                .await;
            match result {
                Err(error) if !taken => reply.error(errno(error)),
                _ => reply.ok(),
            }
        });
    }

    fn readdirplus(&self, req: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        self.spawn(req, Operation::Readdirplus, async move |vfs| {
            let mut taken = false;
            let result = vfs
                .readdir(fh.0, offset, true, &mut |entry: DirEntry<'_>| {
                    let added = !add_plus(&mut reply, &entry);
                    taken |= added;
                    added
                })
                .await;
            // Entries already taken count as looked up: they must reach the kernel, and the error shows at the next call.
            match result {
                Err(error) if !taken => reply.error(errno(error)),
                _ => reply.ok(),
            }
        });
    }

    fn releasedir(&self, req: &Request, _ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.answer(req, Operation::Releasedir, async move |vfs| {
            vfs.releasedir(fh.0).await;
            reply.ok();
        });
    }

    fn fsyncdir(&self, req: &Request, _ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.spawn(req, Operation::Fsyncdir, async move |vfs| reply_empty(reply, vfs.fsyncdir(fh.0).await));
    }

    fn statfs(&self, req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.answer(req, Operation::Statfs, async move |vfs| match vfs.statfs().await {
            Ok(s) => reply.statfs(s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.frsize),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn setxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, value: &[u8], flags: i32, _position: u32, reply: ReplyEmpty) {
        let (name, value) = (name.to_owned(), value.to_vec());
        self.spawn(req, Operation::Setxattr, async move |vfs| reply_empty(reply, vfs.setxattr(ino.0, &name, &value, flags).await));
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.to_owned();
        self.answer(req, Operation::Getxattr, async move |vfs| reply_xattr(reply, vfs.getxattr(ino.0, &name).await, size));
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer(req, Operation::Listxattr, async move |vfs| reply_xattr(reply, vfs.listxattr(ino.0).await, size));
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.spawn(req, Operation::Removexattr, async move |vfs| reply_empty(reply, vfs.removexattr(ino.0, &name).await));
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // Asked only without default_permissions, and after this answer never again: access(2) then succeeds, as open will.
        reply.error(Errno::ENOSYS);
    }
}

/// An open that drops the pages may be of another version, and the kernel cuts reads at the size that it remembers: it must
/// ask again before the first read, so this cannot wait its turn in the queue of notices. A notice of attributes alone
/// (offset -1) waits for no page and no directory, so nothing that waits for us can hold it up.
fn forget_attributes(notifier: &OnceLock<Notifier>, ino: INodeNo) {
    if let Some(Err(error)) = notifier.get().map(|notifier| notifier.inval_inode(ino, -1, 0)) {
        tracing::debug!(%error, ino = ino.0, "the kernel keeps the attributes of an opened file");
    }
}

/// True when the buffer was full and the entry did not go in.
fn add_plus(reply: &mut ReplyDirectoryPlus, entry: &DirEntry<'_>) -> bool {
    match entry.entry {
        Some(known) => reply.add(
            INodeNo(entry.ino),
            entry.offset,
            entry.name,
            &shared_ttl(known),
            &file_attr(&known.attr),
            Generation(known.generation),
        ),
        // `.` and `..`: the kernel takes number and type from these and links nothing.
        None => reply.add(
            INodeNo(entry.ino),
            entry.offset,
            entry.name,
            &Duration::ZERO,
            &convert::bare_attr(entry.ino, entry.kind),
            Generation(0),
        ),
    }
}
