//! Copying an entry's bytes out of the spool, run by run: what no object holds must not be lost with it.

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::content::{Content, Origin};
use super::disk::SpoolFile;
use super::entry::Entry;
use super::spool::blocking;
use super::staged::Staged;
use super::{EntryStatus, Error, transfer};

/// What lies at an offset of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// These bytes; none at its end.
    Bytes(Bytes),
    /// So many zeros that take no room in the spool.
    Zeros(u64),
    /// So many bytes of the object that it changes, and why they cannot be had.
    Missing(u64, String),
}

impl Run {
    /// How many bytes it is long.
    pub fn len(&self) -> u64 {
        match self {
            Run::Bytes(bytes) => bytes.len() as u64,
            Run::Zeros(len) | Run::Missing(len, _) => *len,
        }
    }

    /// True at the end.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The first run of at most `len` bytes at `offset`, and where it comes from; nothing at the end.
fn first(content: &Content, offset: u64, len: usize) -> Option<(u64, Origin)> {
    let (range, origin) = content.origins(offset..offset.saturating_add(len as u64)).into_iter().next()?;
    Some((range.end - range.start, origin))
}

/// See [`super::Writeback::run`].
pub(crate) async fn run(entry: &Arc<Entry>, offset: u64, len: usize, fetch: bool) -> Result<Run, Error> {
    let first = first(&entry.content.lock(), offset, len);
    Ok(match first {
        None => Run::Bytes(Bytes::new()),
        Some((run, Origin::Zeros)) => Run::Zeros(run),
        Some((run, Origin::Spool)) => {
            let file = entry.file.clone();
            Run::Bytes(blocking(move || transfer::read_exact(&file, offset, run as usize)).await?)
        }
        Some((run, Origin::Base)) if !fetch => Run::Missing(run, String::new()),
        Some((run, Origin::Base)) => match Staged::new(entry.clone()).read(offset, run as usize).await {
            Ok(bytes) => Run::Bytes(bytes),
            Err(error) => Run::Missing(run, super::reason::of(&error)),
        },
    })
}

/// An entry that no mount has, open for copying.
pub struct Kept {
    /// What status says of it.
    pub status: EntryStatus,
    pub(super) file: SpoolFile,
    pub(super) content: Content,
}

impl Kept {
    /// The run of at most `len` bytes at `offset`. Nobody asks a store here: the object's bytes are missing.
    ///
    /// # Errors
    /// The spool's disk failed.
    pub fn run(&self, offset: u64, len: usize) -> io::Result<Run> {
        Ok(match first(&self.content, offset, len) {
            None => Run::Bytes(Bytes::new()),
            Some((run, Origin::Zeros)) => Run::Zeros(run),
            Some((run, Origin::Spool)) => Run::Bytes(transfer::read_exact(&self.file, offset, run as usize)?),
            Some((run, Origin::Base)) => Run::Missing(run, "they are in S3 alone, and no mount is there to fetch them".into()),
        })
    }
}
