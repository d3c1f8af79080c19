//! What the program was told to do, resolved and validated: defaults < config file < environment < command line or fstab.
//!
//! Parsing and meaning are two steps and two types. `typed` turns words into `Typed` with the one table of
//! `table`; `resolve` turns those into a [`Config`]. Nothing here talks to a network or creates a file.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::cost::Prices;
use crate::publish::headers::HeaderRule;
use crate::s3::ChecksumKind;

mod aws_profile;
pub mod layers;
pub mod named;
pub mod resolve;
pub mod source;
pub mod table;
pub mod typed;
pub mod values;
pub mod words;

pub use crate::s3::client::ClientConfig;
pub use layers::{Environment, Of};
pub use named::Named;
pub use resolve::{Argument, Invocation};
pub use typed::Typed;
pub use words::Origin;

/// Why a configuration cannot be: one line that names the thing and the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    message: String,
    /// An option that nobody knows (mount -s forgives those).
    unknown_word: bool,
}

impl ConfigError {
    /// Control characters are escaped, so that the message is one line whatever was typed.
    pub fn new(message: impl AsRef<str>) -> Self {
        let mut line = String::new();
        for c in message.as_ref().chars() {
            if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
        }
        Self { message: line, unknown_word: false }
    }
}

impl std::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ConfigError {}

/// Everything one mount needs to know. Paths are absolute, names are resolved, sizes are bytes.
#[derive(Clone, Debug)]
pub struct Config {
    /// What is mounted.
    pub source: Source,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// First field of `/proc/mounts`: `fsname=`, else the source as typed.
    pub fsname: String,
    /// Words of mount(8) and of libfuse.
    pub mount: MountFlags,

    /// Owner that every file shows (`uid=`, names too).
    pub uid: Option<u32>,
    /// Group that every file shows (`gid=`, names too).
    pub gid: Option<u32>,
    /// Permission bits that no file has.
    pub umask: Option<u32>,
    /// Permission bits of files.
    pub file_mode: Option<u32>,
    /// Permission bits of directories.
    pub dir_mode: Option<u32>,
    /// `ownership=store` is `Some(true)`, `off` is `Some(false)`; `None` follows promise 28.
    pub ownership: Option<bool>,
    /// Symbolic links are made and shown.
    pub symlinks: bool,

    /// What the S3 client needs: endpoint, credentials, object defaults, timeouts.
    pub client: ClientConfig,

    /// Parent of the block cache.
    pub cache_dir: PathBuf,
    /// Bytes that the cache may hold.
    pub cache_size: u64,
    /// Bytes that cache and spool leave free on their disks.
    pub min_free_space: u64,
    /// How long listings and attributes are believed.
    pub metadata_ttl: Duration,
    /// How long a name that was not there is believed absent.
    pub negative_metadata_ttl: Duration,
    /// Largest read-ahead window in bytes; `None` lets the reader grow it.
    pub read_ahead: Option<u64>,
    /// Bytes of memory for buffers.
    pub memory_limit: u64,

    /// Zero: close() waits for the upload. Else the delay of the upload after close().
    pub write_back: Duration,
    /// Parent of the spool.
    pub spool_dir: PathBuf,
    /// Bytes of the disk that the spool may take.
    pub spool_size: u64,
    /// Part size in bytes; `None`: 8 MiB, growing.
    pub part_size: Option<u64>,
    /// Connections for transfers.
    pub max_connections: usize,
    /// Checksum sent with uploads; `None`: what the store is found to know.
    pub upload_checksums: Option<ChecksumKind>,
    /// Bytes a second, in each direction.
    pub bwlimit: Option<u64>,
    /// What happens when somebody else changed the object meanwhile.
    pub on_conflict: OnConflict,
    /// How long write(), close() and rename go on after the last byte moved.
    pub close_timeout: Duration,

    /// Deletes are allowed (and overwriting by rename).
    pub allow_delete: bool,
    /// mkdir and rmdir at the top of an all-buckets mount make and remove buckets.
    pub allow_bucket_changes: bool,
    /// Largest number of keys that one directory rename may move.
    pub rename_limit: u64,
    /// Glob patterns of temporary names (promise 10): the effective list.
    pub ignore: Vec<String>,
    /// Desktop indexers are kept out.
    pub no_index: bool,
    /// Old versions are shown.
    pub show_versions: bool,
    /// Where a file's mtime comes from.
    pub mtime: MtimeSource,

    /// File of glob → headers rules.
    pub header_rules: Option<PathBuf>,
    /// Rules of the config files, which come before those of the file.
    pub rules: Vec<HeaderRule>,
    /// `Cache-Control` of new objects.
    pub cache_control: Option<String>,
    /// Object tags of new objects.
    pub tags: Vec<(String, String)>,

    /// Which distributions are told of changes.
    pub cloudfront: CloudFront,
    /// Which changes are invalidated.
    pub invalidate: Invalidate,
    /// How long invalidations are collected.
    pub invalidate_delay: Duration,
    /// Invalidation paths a month.
    pub invalidate_budget: u64,
    /// Host of links (`cdn.example.org`).
    pub url_host: Option<String>,
    /// CloudFront key pair of signed URLs.
    pub key_pair_id: Option<String>,
    /// File of the private key of signed URLs.
    pub private_key: Option<PathBuf>,

    /// What the store asks for requests and bytes.
    pub prices: Prices,

    /// Log file; `None`: stderr in the foreground, the journal or syslog else.
    pub log_file: Option<PathBuf>,
    /// `log_file=journal`: log to systemd's journal.
    pub log_journal: bool,
    /// How much is logged.
    pub log_level: LogLevel,
    /// Desktop notifications.
    pub notify: bool,
    /// Address of the metrics endpoint.
    pub metrics_addr: Option<SocketAddr>,
    /// `$XDG_STATE_HOME/packmule`, `/var/lib/packmule` or `~/.local/state/packmule`.
    pub state_dir: PathBuf,
    /// Words of other programs that were taken and mean nothing here: one warning names them all.
    pub ignored_words: Vec<String>,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// One bucket, or the keys of it that begin with `prefix` (`""` or ending in `/`).
    Bucket {
        /// Name, alias or access point ARN.
        bucket: String,
        /// Key prefix.
        prefix: String,
    },
    /// Every bucket of the account, as directories.
    AllBuckets,
}

/// Words of mount(8) and libfuse that reach the kernel or the way we mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // each is the word of the same name in mount(8) or mount.fuse3(8)
pub struct MountFlags {
    pub ro: bool,
    pub noexec: bool,
    pub nosuid: bool,
    pub nodev: bool,
    pub noatime: bool,
    pub sync: bool,
    pub dirsync: bool,
    pub allow_other: bool,
    pub allow_root: bool,
    pub default_permissions: bool,
    pub nonempty: bool,
    pub foreground: bool,
    pub remount: bool,
}

/// `on_conflict=` (promise 12).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnConflict {
    /// Ours is published beside theirs.
    #[default]
    Keep,
    /// Ours replaces theirs.
    Overwrite,
    /// close() answers ESTALE and ours is parked.
    Fail,
}

/// `mtime=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MtimeSource {
    /// `x-amz-meta-mtime`, kept in the store.
    #[default]
    Store,
    /// Remembered on this machine only.
    Local,
    /// The store's `LastModified`.
    Server,
}

/// `cloudfront=`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CloudFront {
    /// Found by ListDistributions.
    #[default]
    Auto,
    /// These distributions.
    Ids(Vec<String>),
    /// None.
    Off,
}

/// `invalidate=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Invalidate {
    /// Overwrite, delete and rename of keys that existed.
    #[default]
    Overwrite,
    /// Every published key.
    All,
    /// Nothing.
    Off,
}

/// `log_level=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)] // tracing's levels
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    /// As tracing's filters spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}
