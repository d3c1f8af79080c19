//! Where the bytes of a publication come from. Those that it needs of the base are put into the spool file; what that has no room
//! for is read from the base as it is sent, so that no close needs space which no write has asked for (promise 27).

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::content::Content;
use super::disk::SpoolFile;
use super::entry::Entry;
use super::spool::blocking;
use super::transfer::{CHUNK, Hasher, read_exact};
use super::{Base, Error};
use crate::ranges::RangeSet;

/// Base bytes fetched at once; a transfer holds one such piece.
const FETCH: u64 = 1 << 20;

/// An entry's bytes, as a transfer reads them.
#[derive(Clone)]
pub(crate) struct Body {
    file: Arc<SpoolFile>,
    base: Option<Base>,
    /// Not in the spool file: they are the base's.
    missing: RangeSet,
}

impl Body {
    /// All of it is in the spool file.
    pub fn local(file: &Arc<SpoolFile>) -> Self {
        Self { file: file.clone(), base: None, missing: RangeSet::new() }
    }

    /// `range` of an entry's content as it is now.
    pub fn of(entry: &Entry, content: &Content, base: Option<&Base>, range: Range<u64>) -> Self {
        let missing = content.lacks(range).into_iter().collect();
        Self { file: entry.file.clone(), base: base.cloned(), missing }
    }

    /// Where the run that begins at `range.start` ends, and whether it is missing.
    fn run(&self, range: &Range<u64>) -> (u64, bool) {
        match self.missing.run_at(range.start) {
            Some(run) => (run.end.min(range.end), true),
            None => (self.missing.intersection(range.clone()).first().map_or(range.end, |run| run.start), false),
        }
    }

    /// How many bytes [`Body::read`] gives.
    pub fn at_once(&self, range: Range<u64>) -> u64 {
        let (end, missing) = self.run(&range);
        (end - range.start).min(if missing { FETCH } else { CHUNK as u64 })
    }

    /// The first bytes of `range`, as many as are read at once.
    pub async fn read(&self, range: Range<u64>) -> Result<Bytes, Error> {
        let (at, len) = (range.start, self.at_once(range.clone()));
        if self.missing.run_at(at).is_some() {
            return fetch(self.base.as_ref(), at, len, self.run(&range).0).await;
        }
        let file = self.file.clone();
        blocking(move || read_exact(&file, at, len as usize)).await
    }

    /// All bytes of `range`.
    pub async fn read_all(&self, range: Range<u64>) -> Result<Bytes, Error> {
        let mut all = BytesMut::new();
        let mut at = range.start;
        while at < range.end {
            let bytes = self.read(at..range.end).await?;
            at += bytes.len() as u64;
            all.extend_from_slice(&bytes);
        }
        Ok(all.freeze())
    }

    /// Feeds the bytes of `range` to each of the hashers.
    pub async fn feed<const N: usize>(&self, range: Range<u64>, mut hashers: [Hasher; N]) -> Result<[Hasher; N], Error> {
        let mut at = range.start;
        while at < range.end {
            let (mut end, missing) = self.run(&(at..range.end));
            let file = self.file.clone();
            hashers = if missing {
                let bytes = self.read(at..end).await?;
                end = at + bytes.len() as u64;
                blocking(move || {
                    hashers.iter_mut().for_each(|hasher| hasher.update(&bytes));
                    Ok(hashers)
                })
                .await?
            } else {
                // One hop to the blocking pool for the whole run.
                blocking(move || {
                    while at < end {
                        let bytes = read_exact(&file, at, CHUNK.min((end - at) as usize))?;
                        hashers.iter_mut().for_each(|hasher| hasher.update(&bytes));
                        at += bytes.len() as u64;
                    }
                    Ok(hashers)
                })
                .await?
            };
            at = end;
        }
        Ok(hashers)
    }
}

/// Bytes of the base, all of them; the next ones are asked for after, up to `until`.
async fn fetch(base: Option<&Base>, at: u64, len: u64, until: u64) -> Result<Bytes, Error> {
    let base = base.ok_or(Error::Stale)?;
    let bytes = base.reader.read(at, len as usize, until).await?;
    if bytes.len() as u64 == len { Ok(bytes) } else { Err(Error::Stale) }
}

/// Puts the base's bytes into the spool file where `range` lacks them, as far as there is room for them.
pub(crate) async fn fill(entry: &Arc<Entry>, base: Option<&Base>, range: Range<u64>) -> Result<(), Error> {
    let gaps = entry.content.lock().lacks(range);
    for gap in gaps {
        let mut at = gap.start;
        while at < gap.end {
            let len = (gap.end - at).min(FETCH);
            if !entry.shared.has_room(len).await {
                return Ok(());
            }
            let bytes = fetch(base, at, len, gap.end).await?;
            entry.progressed();
            entry.shared.meter.record(0, true);
            match fill_piece(entry, at, bytes).await {
                Err(Error::NoSpace) => return Ok(()),
                filled => filled?,
            }
            at += len;
        }
    }
    Ok(())
}

/// Writes fetched bytes where nothing was written meanwhile.
async fn fill_piece(entry: &Arc<Entry>, at: u64, bytes: Bytes) -> Result<(), Error> {
    let _writer = entry.writer.lock().await;
    let end = at + bytes.len() as u64;
    let gaps = {
        let content = entry.content.lock();
        content.local.gaps(at..end.min(content.size))
    };
    let (file, filled) = (entry.file.clone(), gaps.clone());
    blocking(move || {
        gaps.into_iter().try_for_each(|gap| file.write_all_at(&bytes[(gap.start - at) as usize..(gap.end - at) as usize], gap.start))
    })
    .await?;
    {
        let mut content = entry.content.lock();
        filled.into_iter().for_each(|gap| content.filled(gap));
    }
    entry.charge();
    Ok(())
}
