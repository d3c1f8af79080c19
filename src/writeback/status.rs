//! What is told of entries and deletes.

use super::Phase;

/// One line of `packmule status`.
#[derive(Clone, Debug, serde::Serialize)]
pub struct EntryStatus {
    /// Names the entry to [`super::Writeback::retry`] and [`super::Writeback::discard`].
    pub id: u64,
    /// Bucket.
    pub bucket: String,
    /// Key.
    pub key: String,
    /// Where it stands.
    pub phase: Phase,
    /// The file's size in bytes.
    pub size: u64,
    /// Bytes of it handed to the network so far.
    pub sent: u64,
    /// Bytes a second that were handed over lately.
    pub speed: u64,
    /// Why it is not published: the last failure, with its remedy where there is one.
    pub reason: Option<String>,
    /// Left by an earlier run (unfinished, parked, or queued again).
    pub recovered: bool,
    /// Lives under a temporary name until it is renamed.
    pub held: bool,
    /// A write to it failed: it is never published.
    pub incomplete: bool,
    /// Its bucket could not be reached when this mount took the spool over.
    pub stranded: bool,
}

impl EntryStatus {
    /// Nothing becomes of it by itself: it waits for somebody's word, to be retried or discarded.
    pub fn waits(&self) -> bool {
        self.stranded || self.phase == Phase::Parked || self.recovered && self.phase == Phase::Writing && !self.held
    }
}

/// What is on its way to S3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Files that wait or are sent, those that are being written where bytes of them move; deletes that wait.
    pub files: usize,
    /// Bytes that S3 does not have yet.
    pub bytes: u64,
    /// Bytes a second that move.
    pub speed: u64,
}

/// A file that was published beside somebody else's change of it (`on_conflict=keep`).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ConflictCopy {
    /// The bucket of both.
    pub bucket: String,
    /// The key, which holds theirs.
    pub key: String,
    /// The key of ours.
    pub kept_as: String,
    /// When, in seconds since the epoch.
    pub at: u64,
}

/// A delete that waits, or that the store refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteStatus {
    /// Names it to [`super::Writeback::retry`] and [`super::Writeback::discard`].
    pub id: u64,
    /// Bucket.
    pub bucket: String,
    /// Key.
    pub key: String,
    /// It is not tried again by itself, and its name shows again.
    pub refused: bool,
    /// The last failure, with its remedy.
    pub reason: Option<String>,
}

/// What [`super::Writeback::drain`] achieved.
#[derive(Clone, Debug)]
pub struct DrainReport {
    /// Publications that ended well meanwhile.
    pub published: u64,
    /// What stays in the spool.
    pub left: Vec<EntryStatus>,
}
