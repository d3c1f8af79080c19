//! The filesystem: inodes, directories, files and their order, over the cache (reading), the write-back (writing) and
//! the store (names).
//!
//! # Locks
//! One file's `order` (async) → key guards (async, [`guard`]) → the inode table (never held across `.await`) → what is fetched ahead
//! ([`neighbours`]). The handle table is a leaf of its own. Nothing calls the kernel ([`Notify`]) while it holds one.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, RwLock};

use crate::cache::Cache;
use crate::s3::{Account, S3Error, Store};
use crate::writeback::Writeback;

mod attr;
mod create;
mod crowd;
mod deadline;
mod deletes;
mod dir_state;
mod directory;
mod error;
mod file;
mod guard;
mod handle;
mod inode;
mod listing;
mod lookup;
mod marker;
mod metadata;
mod neighbours;
mod passed;
mod path;
mod pins;
mod process;
mod queued;
mod read;
mod readdir;
mod remember;
mod remove;
mod rename;
mod setattr;
mod survey;
mod symlink;
mod temporary;
mod versions;
mod write;
mod xattr;

pub use attr::{Attr, Kind};
pub use deadline::asked_by;
pub use error::{Error, Result};
pub use passed::Backing;
pub use pins::PinReport;
pub use rename::RenameReport;

use deadline::InVain;
use guard::KeyGuards;
use handle::Handles;
use inode::Table;
use neighbours::FetchedAhead;
use passed::Passing;
use pins::Pins;
use queued::Recovered;
use remember::Memory;
use rename::{RefusedRenames, TreeRenames};
use temporary::{Opens, TemporaryNames};

/// Inode number; the root is [`ROOT`].
pub type Ino = u64;
/// File handle.
pub type Fh = u64;
/// FUSE's number of the root inode.
pub const ROOT: Ino = 1;

/// How long the kernel may answer from what we told it, at most. Short, because a file manager's window asks again only
/// when the kernel does; we answer from memory for `metadata_ttl`.
const KERNEL_TTL: Duration = Duration::from_secs(1);

/// Who asks. `pid` is a thread id, as FUSE gives it.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Effective user of the filesystem call.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Thread.
    pub pid: u32,
}

/// A name that was found or made.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What stat would tell.
    pub attr: Attr,
    /// Never reused with the same inode number.
    pub generation: u64,
    /// How long the kernel may keep the name.
    pub entry_ttl: Duration,
    /// How long the kernel may keep the attributes.
    pub attr_ttl: Duration,
}

/// An open file.
pub struct Opened {
    /// Its handle.
    pub fh: Fh,
    /// The kernel may keep the pages it has of the file.
    pub keep_cache: bool,
    /// What the kernel is to read by itself. Where it does not take that, [`Vfs::not_passed`] hears of it.
    pub backing: Option<Arc<Backing>>,
}

/// A time to set.
#[derive(Clone, Copy, Debug)]
pub enum SetTime {
    /// UTIME_NOW.
    Now,
    /// This one.
    At(SystemTime),
}

/// Attributes to change.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last modification.
    pub mtime: Option<SetTime>,
}

/// What statfs(2) tells.
#[derive(Clone, Copy, Debug)]
pub struct StatFs {
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Free blocks for users.
    pub bavail: u64,
    /// Inodes.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Block size in bytes.
    pub bsize: u32,
    /// Longest name in bytes.
    pub namelen: u32,
    /// Fragment size in bytes.
    pub frsize: u32,
}

/// A directory entry offered to the kernel.
pub struct DirEntry<'a> {
    /// Inode number.
    pub ino: Ino,
    /// Where a later readdir goes on after this entry.
    pub offset: u64,
    /// File type.
    pub kind: Kind,
    /// Name.
    pub name: &'a std::ffi::OsStr,
    /// Attributes, for readdirplus: an entry that was taken with them counts as a lookup.
    pub entry: Option<&'a Entry>,
}

/// Takes entries; `false`: the buffer is full and this one was not taken.
pub type DirSink<'a> = &'a mut (dyn FnMut(DirEntry<'_>) -> bool + Send);

/// Notices to the kernel. Called under no lock; must not block.
pub trait Notify: Send + Sync + 'static {
    /// The name may mean something else now.
    fn invalidate_entry(&self, parent: Ino, name: &std::ffi::OsStr);
    /// Attributes and pages of the inode are no longer true.
    fn invalidate_inode(&self, ino: Ino);
    /// The name is gone.
    fn delete_entry(&self, parent: Ino, child: Ino, name: &std::ffi::OsStr);
    /// Few notices wait: some that can wait may be given.
    fn has_room(&self) -> bool;
}

/// Where a file's mtime comes from and goes to (`mtime=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MtimeSource {
    /// Kept in `x-amz-meta-mtime`.
    Store,
    /// Kept on this machine only.
    Local,
    /// The store's LastModified.
    Server,
}

/// What a mount is told about its filesystem.
#[derive(Clone, Debug)]
pub struct VfsConfig {
    /// `uid=`.
    pub uid: Option<u32>,
    /// `gid=`.
    pub gid: Option<u32>,
    /// User who mounts.
    pub mounter_uid: u32,
    /// Group who mounts.
    pub mounter_gid: u32,
    /// `umask=`.
    pub umask: Option<u32>,
    /// `file_mode=`.
    pub file_mode: Option<u32>,
    /// `dir_mode=`.
    pub dir_mode: Option<u32>,
    /// `ownership=`: `Some(true)` store, `Some(false)` off, `None` the rules of promise 28.
    pub ownership: Option<bool>,
    /// `symlinks=store`.
    pub symlinks: bool,
    /// How long a listing or an answer is true.
    pub metadata_ttl: Duration,
    /// How long an absent name is absent.
    pub negative_ttl: Duration,
    /// Nothing may change.
    pub read_only: bool,
    /// `allow_delete=yes`.
    pub allow_delete: bool,
    /// mkdir and rmdir at the top make and remove buckets.
    pub allow_bucket_changes: bool,
    /// Glob patterns of temporary names (promise 10).
    pub ignore: Vec<String>,
    /// Storage class of new objects, which their copies must name again; `None`: the store's own.
    pub storage_class: Option<String>,
    /// Where mtime lives.
    pub mtime: MtimeSource,
    /// Most objects that one directory rename may move.
    pub rename_limit: u64,
    /// How long a publication may stand still.
    pub close_timeout: Duration,
    /// 0: close waits for S3.
    pub write_back: Duration,
    /// Requests of one operation that go out at the same time.
    pub max_connections: usize,
    /// Bytes that the whole mount may take of memory.
    pub memory_limit: u64,
    /// Where attributes are remembered.
    pub state_dir: PathBuf,
}

/// What is mounted.
#[derive(Clone)]
pub enum Root {
    /// One bucket, or a prefix of it.
    Bucket {
        /// The bucket.
        store: Arc<dyn Store>,
        /// Empty, or ends with `/`.
        prefix: String,
    },
    /// Every bucket of the account.
    Account(Arc<dyn Account>),
}

/// A mounted filesystem.
pub struct Vfs {
    config: VfsConfig,
    root: Root,
    cache: Arc<Cache>,
    writeback: Writeback,
    table: Mutex<Table>,
    handles: Handles,
    guards: KeyGuards,
    in_vain: InVain,
    fetched_ahead: Mutex<FetchedAhead>,
    /// A task does ([`Vfs::make_room`]).
    makes_room: AtomicBool,
    memory: Memory,
    pins: Pins,
    passing: Passing,
    temporary: TemporaryNames,
    opens: Opens,
    refused: RefusedRenames,
    tree_renames: TreeRenames,
    notify: RwLock<Option<Arc<dyn Notify>>>,
    mounted: SystemTime,
    /// Listings begun before this moment are no longer used ([`Vfs::refresh`]).
    epoch: AtomicU64,
    recovered: Recovered,
    background: tokio_util::task::TaskTracker,
    followers: tokio_util::task::TaskTracker,
    closing: tokio_util::sync::CancellationToken,
    this: std::sync::Weak<Vfs>,
}

impl Vfs {
    /// A filesystem over `root`. Fails when the state directory cannot be used or an `ignore` pattern is none.
    pub async fn new(config: VfsConfig, root: Root, cache: Arc<Cache>, writeback: Writeback) -> std::io::Result<Arc<Self>> {
        let memory = Memory::open(config.state_dir.clone()).await?;
        let temporary = TemporaryNames::new(&config.ignore)?;
        let recovered = Recovered::new(writeback.recovered()).await;
        let mounted = SystemTime::now();
        let vfs = Arc::new_cyclic(|this| Self {
            table: Mutex::new(Table::new(mounted, config.memory_limit)),
            handles: Handles::default(),
            guards: KeyGuards::default(),
            in_vain: InVain::default(),
            fetched_ahead: Mutex::default(),
            makes_room: AtomicBool::new(false),
            memory,
            pins: Pins::default(),
            passing: Passing::default(),
            temporary,
            opens: Opens::default(),
            refused: RefusedRenames::default(),
            tree_renames: TreeRenames::default(),
            notify: RwLock::new(None),
            mounted,
            epoch: AtomicU64::new(0),
            recovered,
            background: tokio_util::task::TaskTracker::new(),
            followers: tokio_util::task::TaskTracker::new(),
            closing: tokio_util::sync::CancellationToken::new(),
            this: this.clone(),
            config,
            root,
            cache,
            writeback,
        });
        vfs.watch_deletes();
        vfs.watch_recovered();
        vfs.keep_pins();
        if !vfs.config.read_only {
            vfs.send_what_was_put_off().await;
            vfs.resume_renames();
        }
        Ok(vfs)
    }

    /// Names of files that are open for writing: an unmount would cut them off.
    pub fn open_for_writing(&self) -> Vec<String> {
        self.table.lock().written().map(|name| name.to_string_lossy().escape_debug().to_string()).collect()
    }

    /// Where notices to the kernel go once it is there.
    pub fn set_notify(&self, notify: Arc<dyn Notify>) {
        *self.notify.write() = Some(notify);
    }

    /// Forgets every listing and negative answer: the next look asks the store.
    pub async fn refresh(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
        let known = self.table.lock().drop_knowledge();
        for ino in known {
            self.tell(|notify| notify.invalidate_inode(ino));
        }
    }

    /// Lets nobody begin to write any more, sends what was put off (empty files, directory attributes) and waits for the background work. Uploads are the
    /// write-back's to drain afterwards, and then comes [`Vfs::close`].
    pub async fn shutdown(&self) {
        self.closing.cancel();
        self.background.close();
        self.background.wait().await;
        self.drop_junk().await;
    }

    /// Writes the remembered attributes: the last thing, after the uploads told what they made.
    pub async fn close(&self) {
        self.heard_all().await;
        self.memory.close().await;
    }

    /// statfs(2): 1 PiB free, because 0, nearly full and 16 EiB make Dolphin refuse to copy (promise 27).
    pub async fn statfs(&self) -> Result<StatFs> {
        const BLOCK: u32 = 4096;
        const PIB: u64 = 1 << 50;
        let blocks = PIB / u64::from(BLOCK);
        Ok(StatFs {
            blocks,
            bfree: blocks,
            bavail: blocks,
            files: u64::from(u32::MAX),
            ffree: u64::from(u32::MAX),
            bsize: BLOCK,
            namelen: 255,
            frsize: BLOCK,
        })
    }

    /// The bucket of this name; none where something else is mounted.
    async fn store_of(&self, bucket: &str) -> std::result::Result<Option<Arc<dyn Store>>, S3Error> {
        Ok(match &self.root {
            Root::Bucket { store, .. } => Some(store.clone()).filter(|store| store.bucket() == bucket),
            Root::Account(account) => Some(account.bucket(bucket).await?),
        })
    }

    fn tell(&self, notice: impl FnOnce(&dyn Notify)) {
        let notify = self.notify.read().clone();
        if let Some(notify) = notify {
            notice(notify.as_ref());
        }
    }

    /// Runs `work` in the background; [`Vfs::shutdown`] waits for it.
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.background.spawn(work);
    }

    /// Sleeps, or less when the filesystem is closing.
    async fn pause(&self, duration: Duration) {
        tokio::select! {
            () = tokio::time::sleep(duration) => {}
            () = self.closing.cancelled() => {}
        }
    }

    fn shared(&self) -> Option<Arc<Self>> {
        self.this.upgrade()
    }

    /// Fails where nothing may be changed.
    fn check_changeable(&self) -> Result<()> {
        if self.config.read_only { Err(Error::ReadOnly) } else { Ok(()) }
    }

    /// Fails where nobody may begin to write. Once its end was asked for a mount is as one that is remounted read-only before it is
    /// unmounted, but that what was begun may end: open files are written and closed, get their attributes and their final names.
    fn check_writable(&self) -> Result<()> {
        self.check_changeable()?;
        if self.closing.is_cancelled() { Err(Error::ReadOnly) } else { Ok(()) }
    }
}
