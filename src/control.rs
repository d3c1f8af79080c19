//! How commands talk to a running mount: one JSON object a line over a unix socket, an answer a line.
//!
//! The socket lies in a directory that only the mount's user may enter, under a name made from the mountpoint, so that a
//! command finds it without a registry. A socket that nobody listens at is replaced by the next mount of the same place.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cache::{CacheReport, CacheWish, Download, Pin};
use crate::cost::Cost;
use crate::fuse::mountinfo::{self, FS_TYPE};
use crate::measure::eta_seconds;
use crate::s3::Failure;
use crate::vfs::{PinReport, RenameReport};
use crate::writeback::{DeleteStatus, EntryStatus};

pub mod progress;
pub mod server;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
pub mod umount;

pub use crate::writeback::ConflictCopy;

/// Longest request line in bytes: a path of 4096 bytes with every byte escaped, and room.
const MAX_REQUEST: u64 = 64 * 1024;

/// Longest answer line in bytes; a status with many thousand uploads fits.
const MAX_RESPONSE: u64 = 256 * 1024 * 1024;

/// How long a mount may take to take a connection and the request, and to answer what it knows by itself: one that hangs must
/// not keep every command from the others. Other answers may take as long as an upload.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a mount may take to answer what needs a name to be looked up.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(100);

/// So many deletes are named in status.
pub const DELETES_NAMED: usize = 20;

/// What a command asks of a mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Is anybody there?
    Ping,
    /// What the mount is doing.
    Status,
    /// Where one file stands (absolute path on the mount), answered by [`Response::File`]; a folder's is the mount's [`Response::Status`].
    File {
        /// The file; one that could not be stored is found by its name though it is not in its folder.
        path: PathBuf,
    },
    /// Uploads at once what waits: everything, or one file (absolute path on the mount).
    Flush {
        /// The file.
        path: Option<PathBuf>,
        /// Publish a temporary name under that very name (promise 10).
        as_is: bool,
        /// How long to wait at most; without one, as long as bytes move.
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// Drops listings, so that everything is asked anew.
    Refresh,
    /// What the cache holds, that it is checked, or emptied.
    Cache {
        /// Which of these.
        wish: CacheWish,
    },
    /// Keeps a folder or a file (absolute path on the mount) in the cache, or no longer.
    Pin {
        /// Which.
        path: PathBuf,
        /// No longer.
        off: bool,
    },
    /// Tries a parked upload again, waits for it, and tells the key that it has now.
    Retry {
        /// Its number in the spool.
        id: u64,
    },
    /// A run of an upload's bytes, answered by [`Response::Bytes`], [`Response::Zeros`] or [`Response::Missing`].
    Read {
        /// Its number in the spool.
        id: u64,
        /// Where it begins.
        offset: u64,
        /// Its length at most.
        length: u64,
        /// What an object has already is fetched from there.
        fetch: bool,
    },
    /// Bucket and key that a path stands for (absolute, on the mount), whether or not there is such a file.
    Key {
        /// The path.
        path: PathBuf,
    },
    /// Throws a parked or unfinished upload away.
    Discard {
        /// Its number in the spool.
        id: u64,
    },
    /// Waits for the uploads, says what is left, then unmounts.
    Umount {
        /// How long to wait at most; without one, as long as bytes move.
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// A time-limited link to a file (absolute path on the mount).
    Link {
        /// The file.
        path: PathBuf,
        /// Its lifetime in seconds, at most 604,800 (S3's limit for SigV4).
        expires_seconds: u64,
    },
}

/// What the mount answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Ok,
    /// The answer to [`Request::Ping`].
    Pong {
        /// Version of the program that runs the mount.
        version: String,
        /// Where it is mounted.
        mountpoint: PathBuf,
        /// Process id.
        pid: u32,
    },
    /// The answer to [`Request::Status`].
    Status(Box<Status>),
    /// The answer to [`Request::File`].
    File(Box<FileStatus>),
    /// The answer to [`Request::Cache`].
    Cache {
        /// What is there then.
        report: Box<CacheReport>,
        /// What is pinned.
        pins: Vec<PinReport>,
    },
    /// The answer to [`Request::Pin`].
    Pin {
        /// What is pinned, or was.
        pin: Pin,
    },
    /// The answer to [`Request::Link`].
    Link {
        /// The link.
        url: String,
    },
    /// Bytes of an upload; none at its end.
    Bytes {
        /// In base64.
        base64: String,
    },
    /// Bytes of an upload that are zero.
    Zeros {
        /// How many.
        length: u64,
    },
    /// Bytes of an upload that cannot be had.
    Missing {
        /// How many.
        length: u64,
        /// Why.
        why: String,
    },
    /// The answer to [`Request::Key`] and [`Request::Retry`].
    Key {
        /// The bucket.
        bucket: String,
        /// The key.
        key: String,
    },
    /// The answer to [`Request::Umount`] and [`Request::Flush`]: what could not be uploaded.
    Left {
        /// Each upload that is left; empty when all is in S3.
        uploads: Vec<Upload>,
    },
    /// It could not be done; one line for the user.
    Error {
        /// What and why.
        message: String,
    },
}

/// A mount, as `packmule status` shows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What is mounted, as `/proc/mounts` shows it.
    pub source: String,
    /// Where.
    pub mountpoint: PathBuf,
    /// Version of the program that runs it.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// It stores and deletes nothing: what earlier mounts left waits for one that may.
    #[serde(default)]
    pub read_only: bool,
    /// Seconds since it was mounted.
    pub uptime_seconds: u64,
    /// FUSE operations without an answer yet.
    pub operations: usize,
    /// Files that are not (wholly) in S3 yet, then deletes that are not: of many the first.
    pub uploads: Vec<Upload>,
    /// Files in the cache.
    pub cache_files: u64,
    /// Bytes in the cache.
    pub cache_bytes: u64,
    /// Requests sent to S3 since the mount, by operation.
    pub requests: BTreeMap<String, u64>,
    /// Bytes of bodies sent to S3 since the mount.
    #[serde(default)]
    pub bytes_sent: u64,
    /// Bytes of bodies received from S3 since the mount.
    #[serde(default)]
    pub bytes_received: u64,
    /// The store, as messages name it; empty where an older packmule runs the mount.
    #[serde(default)]
    pub endpoint: String,
    /// What that cost, about; `None` where no prices are known.
    #[serde(default)]
    pub cost: Option<Cost>,
    /// Files that this mount published beside somebody else's change of them, the newest last.
    #[serde(default)]
    pub conflicts: Vec<ConflictCopy>,
    /// What is kept in the cache whatever else is read.
    #[serde(default)]
    pub pins: Vec<PinReport>,
    /// What is being fetched, the fastest first.
    #[serde(default)]
    pub downloads: Vec<Download>,
    /// Requests that failed lately, the newest last.
    #[serde(default)]
    pub errors: Vec<Failure>,
    /// Directories that are being renamed, then the last ones of which something is to be said.
    #[serde(default)]
    pub renames: Vec<RenameReport>,
}

/// A file, as `packmule status FILE` shows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FileStatus {
    /// Its path.
    pub path: PathBuf,
    /// The word of its extended attribute `user.packmule.status`; `None` where its folder has no such name.
    pub word: Option<String>,
    /// Bucket.
    pub bucket: String,
    /// Key.
    pub key: String,
    /// What of it is not in S3.
    pub uploads: Vec<Upload>,
    /// What of it is being fetched.
    pub downloads: Vec<Download>,
}

/// A file that is being written, waits, is uploaded or is parked; or a delete.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Upload {
    /// Its number in the spool.
    pub id: u64,
    /// Target bucket.
    pub bucket: String,
    /// Target key.
    pub key: String,
    /// Phase of the manifest (`writing`, `sealed`, `uploading`, `completing`, `parked` …), [`Upload::DELETING`] or [`Upload::UNDELETED`].
    pub phase: String,
    /// Size in bytes.
    pub size: u64,
    /// Bytes that S3 has.
    pub sent: u64,
    /// Bytes a second that moved lately; 0 while nothing does.
    pub speed: u64,
    /// Seconds until all of it is sent at that speed; not known while it is written, or while nothing moves.
    pub eta_seconds: Option<u64>,
    /// Why it is parked.
    pub reason: Option<String>,
    /// Left by an earlier run.
    pub recovered: bool,
    /// Lives under a temporary name until it is renamed.
    pub held: bool,
    /// A write to it failed: it is never published.
    pub incomplete: bool,
    /// Nothing becomes of it by itself: it waits for `packmule retry`, `recover` or `discard`.
    pub waits: bool,
}

impl Upload {
    /// It is on its way, or will be soon.
    pub fn moves(&self) -> bool {
        !self.waits && !self.held
    }

    /// It may still change.
    pub fn is_written(&self) -> bool {
        self.phase == "writing" && !self.recovered
    }

    /// A temporary name waits for its rename, what an earlier mount left (never closed, or for a bucket that is gone) for its
    /// owner's word: neither makes an unmount fail.
    pub fn may_wait(&self) -> bool {
        self.held || self.recovered && self.waits && self.phase != "parked"
    }

    /// Files and the first of `count` deletes; the last one named says how many more there are.
    pub fn with_deletes(mut files: Vec<Upload>, count: usize, first: &[DeleteStatus]) -> Vec<Upload> {
        let more = count - first.len();
        files.extend(first.iter().map(Upload::from));
        if let Some(last) = files.last_mut().filter(|_| more > 0) {
            let reason = last.reason.take();
            last.reason = Some(reason.map_or_else(|| format!("and {more} more"), |reason| format!("{reason}; and {more} more")));
        }
        files
    }

    /// `s3://bucket/key` on one line, whatever the key.
    pub fn shown(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.key.escape_debug())
    }
}

impl From<&EntryStatus> for Upload {
    fn from(entry: &EntryStatus) -> Self {
        let phase = serde_json::to_value(entry.phase).ok();
        let phase = phase.as_ref().and_then(|phase| phase.as_str()).unwrap_or_default().to_owned();
        Self {
            id: entry.id,
            bucket: entry.bucket.clone(),
            key: entry.key.clone(),
            // What was sent of it was refused, or its upload aborted.
            sent: if phase == "parked" { 0 } else { entry.sent },
            speed: entry.speed,
            // What is still written ends nobody knows when.
            eta_seconds: eta_seconds(entry.size.saturating_sub(entry.sent), entry.speed).filter(|_| phase != "writing"),
            phase,
            size: entry.size,
            reason: entry.reason.clone(),
            recovered: entry.recovered,
            held: entry.held,
            incomplete: entry.incomplete,
            waits: entry.waits(),
        }
    }
}

/// A delete in the same words: it has no bytes.
impl From<&DeleteStatus> for Upload {
    fn from(delete: &DeleteStatus) -> Self {
        Self {
            id: delete.id,
            bucket: delete.bucket.clone(),
            key: delete.key.clone(),
            phase: if delete.refused { Self::UNDELETED } else { Self::DELETING }.into(),
            reason: delete.reason.clone(),
            waits: delete.refused,
            ..Self::default()
        }
    }
}

/// A time as requests carry it.
pub fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Upload {
    /// Phase of a delete that waits.
    pub const DELETING: &str = "deleting";
    /// Phase of a delete that the store refused: the name shows what S3 holds.
    pub const UNDELETED: &str = "undeleted";

    /// It is about a delete, which has no bytes.
    pub fn is_delete(&self) -> bool {
        [Self::DELETING, Self::UNDELETED].contains(&self.phase.as_str())
    }
}

/// Directory of the sockets of this user's mounts.
pub fn socket_dir() -> PathBuf {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return "/run/packmule".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => Path::new(&dir).join("packmule"),
        None => format!("/tmp/packmule-{uid}").into(),
    }
}

/// Name of a mountpoint's socket: paths may be longer than the 107 bytes that a socket's name may have.
fn socket_name(mountpoint: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let digest = Sha256::digest(mountpoint.as_os_str().as_bytes());
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>() + ".sock"
}

/// Makes the directory, and refuses one that somebody else made or may enter.
fn make_socket_dir(dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let metadata = std::fs::symlink_metadata(dir)?;
    if !metadata.is_dir() || metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{} belongs to somebody else", dir.display())));
    }
    if metadata.mode() & 0o077 != 0 {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Connects. A mount that has just begun listens a moment after the kernel shows it; until then the socket, if there is one, is what a
/// killed mount has left.
fn reach(socket: &Path) -> io::Result<UnixStream> {
    const ATTEMPTS: u32 = 10;
    for _ in 1..ATTEMPTS {
        match UnixStream::connect(socket) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::thread::sleep(Duration::from_millis(50)),
            other => return other,
        }
    }
    UnixStream::connect(socket)
}

/// A connection to a mount.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    mountpoint: PathBuf,
}

impl Client {
    /// Connects to the mount that owns `path`, or to the only one.
    ///
    /// # Errors
    /// When there is none, several, or the one that owns the path does not answer; one line that says so.
    pub fn connect_for(path: Option<&Path>) -> anyhow::Result<Client> {
        let mounts: Vec<PathBuf> =
            mountinfo::mounts()?.into_iter().filter(|mount| mount.fs_type == FS_TYPE).map(|mount| mount.target).collect();
        let Some(path) = path else { return Self::connect_only(mounts) };
        let path = resolve(path)?;
        let owner = mounts.into_iter().filter(|mount| path.starts_with(mount)).max_by_key(|mount| mount.components().count());
        let Some(mountpoint) = owner else { bail!("{}: not on a packmule mount", path.display()) };
        Self::connect(&mountpoint)
    }

    fn connect_only(mounts: Vec<PathBuf>) -> anyhow::Result<Client> {
        let mut answering: Vec<Client> = mounts.iter().filter_map(|mount| Self::connect(mount).ok()).collect();
        match (answering.pop(), answering.is_empty()) {
            (None, _) => bail!("no packmule mount of yours is running: mount one, or name a path on it"),
            (Some(client), true) => Ok(client),
            (Some(_), false) => {
                let names: Vec<String> = mounts.iter().map(|mount| mount.display().to_string()).collect();
                bail!("several mounts are running: name one of {}", names.join(", "))
            }
        }
    }

    /// Connects to the mount at exactly this mountpoint.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn connect(mountpoint: &Path) -> anyhow::Result<Client> {
        let name = socket_name(mountpoint);
        let mut last = None;
        for dir in candidate_dirs() {
            match reach(&dir.join(&name)) {
                Ok(stream) => {
                    if listener(&stream).is_some_and(|pid| !runs(pid)) {
                        bail!("{0}: its packmule was killed: packmule umount {0} takes the mount away", mountpoint.display());
                    }
                    stream.set_write_timeout(Some(CONNECT_TIMEOUT))?;
                    return Ok(Client { stream: BufReader::new(stream), mountpoint: mountpoint.to_owned() });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) => Err(error).with_context(|| format!("{}: its packmule does not answer", mountpoint.display())),
            None => bail!("{}: no packmule of yours serves it", mountpoint.display()),
        }
    }

    /// Where the mount is that this client speaks to.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Asks, and waits for the answer as long as it takes. [`Response::Error`] comes back as an error.
    ///
    /// # Errors
    /// The mount's own line, or that it went away.
    pub fn call(&mut self, request: &Request) -> anyhow::Result<Response> {
        let gone = || format!("{}: its packmule went away", self.mountpoint.display());
        let limit = match request {
            Request::Ping | Request::Status => Some(CONNECT_TIMEOUT),
            // It looks a name up, which ends within 90 s (promise 22).
            Request::File { .. } => Some(LOOKUP_TIMEOUT),
            _ => None,
        };
        self.stream.get_ref().set_read_timeout(limit)?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).with_context(gone)?;
        let mut answer = Vec::new();
        match (&mut self.stream).take(MAX_RESPONSE).read_until(b'\n', &mut answer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                bail!("{}: its packmule hangs: no answer within {} s", self.mountpoint.display(), limit.unwrap_or_default().as_secs())
            }
            read => read.with_context(gone)?,
        };
        if answer.is_empty() {
            bail!(gone());
        }
        match serde_json::from_slice(&answer).context("the mount runs another version of packmule: mount it anew")? {
            Response::Error { message } => bail!(message),
            response => Ok(response),
        }
    }
}

/// True where the program that served the mount was killed, and the kernel keeps it, as a zombie, and its connections: a thread of it
/// waits for a lock of the kernel whose holder waits for an answer of that very program. Nobody ends this wait but who aborts the
/// connection.
pub(crate) fn was_killed(mountpoint: &Path) -> bool {
    let name = socket_name(mountpoint);
    let streams = candidate_dirs().into_iter().filter_map(|dir| UnixStream::connect(dir.join(&name)).ok());
    streams.filter_map(|stream| listener(&stream)).any(|pid| !runs(pid))
}

/// Who listens at the other end (unix(7), SO_PEERCRED: the process that called listen(2)).
fn listener(stream: &UnixStream) -> Option<u32> {
    let credentials = getsockopt(stream, PeerCredentials).ok()?;
    // 0: a process of another pid namespace.
    u32::try_from(credentials.pid()).ok().filter(|pid| *pid != 0)
}

/// False once the process has ended, though nobody may have reaped it yet (proc_pid_stat(5): the state follows the name).
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Own sockets first; root also looks at every logged-in user's, for `umount` of somebody's mount.
fn candidate_dirs() -> Vec<PathBuf> {
    let mut dirs = vec![socket_dir()];
    if nix::unistd::geteuid().is_root()
        && let Ok(users) = std::fs::read_dir("/run/user")
    {
        dirs.extend(users.flatten().map(|user| user.path().join("packmule")));
        // Of users without a runtime directory, see [`socket_dir`].
        let temporary = std::fs::read_dir("/tmp").into_iter().flatten().flatten();
        dirs.extend(temporary.filter(|entry| entry.file_name().to_string_lossy().starts_with("packmule-")).map(|entry| entry.path()));
    }
    dirs
}

/// Absolute, links resolved as far as the path exists. A dead mount answers nothing but its name is still known.
pub(crate) fn resolve(path: &Path) -> anyhow::Result<PathBuf> {
    let absolute = std::path::absolute(path).with_context(|| format!("{}: not a path", path.display()))?;
    let mut existing = absolute.as_path();
    loop {
        if let Ok(real) = existing.canonicalize() {
            let rest = absolute.strip_prefix(existing).unwrap_or(Path::new(""));
            return Ok(if rest.as_os_str().is_empty() { real } else { real.join(rest) });
        }
        match existing.parent() {
            Some(parent) => existing = parent,
            None => return Ok(absolute),
        }
    }
}
