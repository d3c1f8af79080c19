//! The vfs's words in fuser's types, and back.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BackingId, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate, ReplyEntry, ReplyOpen, ReplyXattr,
    Request, TimeOrNow,
};

use super::errno::errno;
use crate::vfs::{Attr, Backing, Caller, Entry, Error, Ino, Kind, Opened, SetTime, Vfs};

/// `st_blksize`. stdio takes its buffer size from it, and without a write-back cache every write(2) is a request to us:
/// 128 KiB makes them 32 times fewer than the kernel's 4 KiB, and stays within the price of a sniff (promise 17).
const BLOCK_SIZE: u32 = 128 * 1024;

pub(super) fn caller(req: &Request) -> Caller {
    Caller { uid: req.uid(), gid: req.gid(), pid: req.pid() }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(at) => SetTime::At(at),
    }
}

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
    }
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: attr.atime,
        mtime: attr.mtime,
        ctime: attr.ctime,
        crtime: attr.ctime,
        kind: file_type(attr.kind),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// Attributes of an entry of which only number and type are known and nothing else is looked at.
pub(super) fn bare_attr(ino: Ino, kind: Kind) -> FileAttr {
    let epoch = SystemTime::UNIX_EPOCH;
    file_attr(&Attr { ino, kind, size: 0, mode: 0, uid: 0, gid: 0, nlink: 1, atime: epoch, mtime: epoch, ctime: epoch })
}

/// The shorter of an entry's two lifetimes, for replies where fuser takes one.
pub(super) fn shared_ttl(entry: &Entry) -> Duration {
    entry.entry_ttl.min(entry.attr_ttl)
}

fn open_flags(opened: &Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_cache);
    flags
}

pub(super) fn reply_entry(reply: ReplyEntry, result: Result<Entry, Error>) {
    match result {
        Ok(entry) => reply.entry_with_ttls(&entry.attr_ttl, &entry.entry_ttl, &file_attr(&entry.attr), Generation(entry.generation)),
        Err(error) => reply.error(errno(error)),
    }
}

pub(super) fn reply_attr(reply: ReplyAttr, result: Result<(Attr, Duration), Error>) {
    match result {
        Ok((attr, ttl)) => reply.attr(&ttl, &file_attr(&attr)),
        Err(error) => reply.error(errno(error)),
    }
}

pub(super) fn reply_open(vfs: &Vfs, reply: ReplyOpen, result: Result<Opened, Error>) {
    let opened = match result {
        Ok(opened) => opened,
        Err(error) => return reply.error(errno(error)),
    };
    let fh = FileHandle(opened.fh);
    match opened.backing.as_deref().map(|backing| registered(&reply, backing)) {
        // The kernel takes no other flag with it (fs/fuse/passthrough.c).
        Some(Ok(id)) => return reply.opened_passthrough(fh, FopenFlags::empty(), &id),
        Some(Err(error)) => {
            tracing::info!(%error, "the kernel does not read cache files by itself here");
            let _ = vfs.not_passed(opened.fh);
        }
        None => {}
    }
    reply.opened(fh, open_flags(&opened));
}

/// The kernel's number of a backing file: one for all handles of an inode.
fn registered(reply: &ReplyOpen, backing: &Backing) -> io::Result<Arc<BackingId>> {
    let mut registration = backing.registration.lock();
    if let Some(id) = registration.clone().and_then(|id| id.downcast::<BackingId>().ok()) {
        return Ok(id);
    }
    let id = Arc::new(reply.open_backing(&backing.file)?);
    *registration = Some(id.clone());
    Ok(id)
}

pub(super) fn reply_create(reply: ReplyCreate, result: Result<(Entry, Opened), Error>) {
    match result {
        Ok((entry, opened)) => reply.created(
            &shared_ttl(&entry),
            &file_attr(&entry.attr),
            Generation(entry.generation),
            FileHandle(opened.fh),
            open_flags(&opened),
        ),
        Err(error) => reply.error(errno(error)),
    }
}

/// getxattr(2) and listxattr(2): a size of 0 asks for the length, a buffer that is too small is ERANGE.
pub(super) fn reply_xattr(reply: ReplyXattr, result: Result<Vec<u8>, Error>, size: u32) {
    match result {
        Ok(value) => match (u32::try_from(value.len()), size) {
            (Ok(length), 0) => reply.size(length),
            (Ok(length), size) if length <= size => reply.data(&value),
            _ => reply.error(errno(Error::Range)),
        },
        Err(error) => reply.error(errno(error)),
    }
}
