//! One object version in the cache: its file, which blocks are here, and which are on their way.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::block::{BLOCK, BlockMap, EntryId, bytes_of, sum_of};
use super::disk::{FileName, read_at};
use super::distance::Distance;
use super::evict::Slot;
use super::fetch::Flight;
use super::memory::{Buffers, Recent};
use super::whole::{Stretches, Whole};
use super::{CacheError, ObjectVersion};
use crate::measure::Speed;
use crate::s3::{Checksum, ETag, ObjectHead, Store};

/// Reads wait for blocks that wait for this answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(20);

/// A cached version, shared by its readers and flights.
#[derive(Debug)]
pub struct Entry {
    /// Names the entry in [`Recent`]; never used twice.
    pub uid: u64,
    /// Size of the object in bytes.
    pub size: u64,
    /// Head of a GET of this version, once one was answered.
    pub head: std::sync::OnceLock<ObjectHead>,
    /// The sidecar was looked for.
    pub loaded: OnceCell<()>,
    /// Readers that have it open.
    pub readers: AtomicUsize,
    state: Mutex<State>,
    /// Held while blocks are hashed, in the blocking pool only; landings that find it taken leave the work to its holder.
    whole: Mutex<Option<Whole>>,
    /// What came before its turn to be hashed. A leaf.
    stretches: Mutex<Stretches>,
    warned: AtomicBool,
    proved: AtomicBool,
    checks: bool,
    /// From here to the store, learned from every answer.
    pub distance: Arc<Distance>,
    /// How fast its bytes come.
    pub speed: Speed,
    /// The store was asked for the whole checksum; landings of read-ahead wait for its answer.
    asked: OnceCell<()>,
}

/// What changes in an [`Entry`]. A leaf lock, never held across I/O.
pub struct State {
    /// The version that GETs ask for; follows metadata copies and renames.
    pub source: ObjectVersion,
    /// The cache file; `None` before the first block, and where there is no disk.
    pub file: Option<(FileName, Arc<File>)>,
    /// Blocks in the file.
    pub blocks: BlockMap,
    /// The file came whole from this machine; blocks without a sum are right by construction.
    pub trusted: bool,
    /// Running GETs; they do not overlap.
    pub flights: Vec<Arc<Flight>>,
    /// Evicted, removed or replaced: what is here is read, nothing more is fetched into it.
    pub detached: bool,
    /// The whole checksum did not hold.
    pub damaged: bool,
    /// The whole checksum held.
    pub verified: bool,
    /// The whole checksum to be held, where one is known and asked for.
    pub expected: Option<Checksum>,
    /// Hashing began in an evicted entry; the blocks hashed there need not be here.
    pub inherited: bool,
    /// When the first and the last block landed that no sidecar claims.
    pub unsaved: Option<(Instant, Instant)>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("source", &self.source).field("file", &self.file).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Whole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Whole").field("next", &self.next()).finish_non_exhaustive()
    }
}

/// Where the blocks of a read are.
pub enum Found {
    /// All here.
    Ready(Vec<Piece>),
    /// On their way: wait for this block of this flight.
    Wait(Arc<Flight>, u64),
    /// At least one is neither here nor on its way.
    Missing,
}

/// Neighbouring blocks in one place.
pub enum Piece {
    /// In the cache file, with their sums.
    Disk(Arc<File>, Range<u64>, Vec<Option<u32>>),
    /// In memory.
    Memory(Bytes),
}

impl Entry {
    /// A version of which nothing is known. `checks`: its whole checksum is to be verified.
    pub fn new(uid: u64, source: ObjectVersion, checks: bool, distance: Arc<Distance>) -> Self {
        let size = source.size;
        let state = State {
            blocks: BlockMap::new(size),
            expected: source.etag.md5().filter(|_| checks).map(Checksum::Md5),
            source,
            file: None,
            trusted: false,
            flights: Vec::new(),
            detached: false,
            damaged: false,
            verified: false,
            inherited: false,
            unsaved: None,
        };
        Self {
            uid,
            head: std::sync::OnceLock::new(),
            size,
            loaded: OnceCell::new(),
            readers: AtomicUsize::new(0),
            state: Mutex::new(state),
            whole: Mutex::new(None),
            stretches: Mutex::new(Stretches::default()),
            warned: AtomicBool::new(false),
            proved: AtomicBool::new(false),
            checks,
            distance,
            speed: Speed::default(),
            asked: OnceCell::new(),
        }
    }

    /// The lock of what changes.
    pub fn state(&self) -> parking_lot::MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The version that GETs ask for now.
    pub fn source(&self) -> ObjectVersion {
        self.state().source.clone()
    }

    /// The store's full-object checksum. Ignored where one is known already.
    pub fn expect(&self, checksum: Checksum) {
        let mut state = self.state();
        if self.checks && state.expected.is_none() {
            state.expected = Some(checksum);
        }
    }

    /// True while [`Self::ask_checksum`] has something to ask.
    pub fn wants_checksum(&self) -> bool {
        self.checks && !self.asked.initialized() && self.state().expected.is_none()
    }

    /// Asks for the whole checksum of an object that is about to be read whole over plain HTTP by many GETs, where its ETag is
    /// none: one HEAD an object. Ranged answers do not carry it.
    pub async fn ask_checksum(&self, store: &Arc<dyn Store>) {
        if !self.wants_checksum() {
            return;
        }
        self.asked
            .get_or_init(|| async {
                let (source, asked) = (self.source(), Instant::now());
                let answer = tokio::time::timeout(ASK_TIMEOUT, store.head(&source.key)).await;
                if let Ok(Ok(_)) = &answer {
                    self.distance.note(asked.elapsed());
                }
                match answer {
                    Ok(Ok(head)) if head.etag == source.etag => head.checksum.into_iter().for_each(|sum| self.expect(sum)),
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "whole checksum not learned"),
                    Err(_) => tracing::debug!(key = source.key, "whole checksum not learned in time"),
                }
            })
            .await;
    }

    /// Finds the blocks of a read.
    pub fn locate(&self, want: Range<u64>, recent: &Recent) -> Found {
        let state = self.state();
        let mut pieces = Vec::new();
        for block in want.clone() {
            let sum = state.blocks.sum(block);
            match &state.file {
                Some((_, file)) if sum.is_some() || state.trusted => match pieces.last_mut() {
                    Some(Piece::Disk(_, blocks, sums)) if blocks.end == block => {
                        blocks.end += 1;
                        sums.push(sum);
                    }
                    _ => pieces.push(Piece::Disk(Arc::clone(file), block..block + 1, vec![sum])),
                },
                _ => match recent.get(self.uid, block) {
                    Some(bytes) => pieces.push(Piece::Memory(bytes)),
                    None => {
                        return match state.flights.iter().find(|flight| flight.brings(block)) {
                            Some(flight) => Found::Wait(Arc::clone(flight), want.end.min(flight.blocks.end) - 1),
                            None => Found::Missing,
                        };
                    }
                },
            }
        }
        Found::Ready(pieces)
    }

    /// Reads the pieces of a located read, verifying every block that has a sum. `None`: a block was bad, and is missing now.
    /// Blocks: call it from the blocking pool.
    pub fn assemble(&self, pieces: Vec<Piece>, buffers: &Arc<Buffers>) -> Option<Bytes> {
        let len = |piece: &Piece| match piece {
            Piece::Disk(_, blocks, _) => (bytes_of(blocks.clone(), self.size).end - blocks.start * BLOCK) as usize,
            Piece::Memory(bytes) => bytes.len(),
        };
        let mut buffer = buffers.take(pieces.iter().map(len).sum());
        let mut at = 0;
        for piece in &pieces {
            let part = &mut buffer.as_mut()[at..at + len(piece)];
            at += part.len();
            match piece {
                Piece::Memory(bytes) => part.copy_from_slice(bytes),
                Piece::Disk(file, blocks, sums) => {
                    if let Err(error) = read_at(file, part, blocks.start * BLOCK) {
                        self.drop_blocks(blocks.clone(), &error.to_string());
                        return None;
                    }
                    let bad = |((_, chunk), sum): &((u64, &[u8]), &Option<u32>)| sum.is_some_and(|sum| sum != sum_of(chunk));
                    if let Some(((block, _), _)) = blocks.clone().zip(part.chunks(BLOCK as usize)).zip(sums).find(bad) {
                        self.drop_blocks(block..block + 1, "its checksum does not match");
                        return None;
                    }
                }
            }
        }
        let mut state = self.state();
        for piece in &pieces {
            if let Piece::Disk(_, blocks, _) = piece
                && state.blocks.prove(blocks.clone())
            {
                self.proved.store(true, Ordering::Relaxed);
            }
        }
        drop(state);
        Some(buffer.freeze())
    }

    /// The bucket keeps versions, and this is what it calls the entry's: listings do not tell, answers do.
    pub fn learn_version_id(&self, etag: &ETag, version_id: Option<&str>) {
        let mut state = self.state();
        if state.source.version_id.is_none() && state.source.etag == *etag {
            state.source.version_id = version_id.map(str::to_owned);
        }
    }

    /// The last block of all was proved since this was asked: the shelf is to be told.
    pub fn became_proved(&self) -> bool {
        self.proved.swap(false, Ordering::Relaxed)
    }

    /// Bad blocks are missing blocks; said once an entry.
    fn drop_blocks(&self, blocks: Range<u64>, why: &str) {
        let mut state = self.state();
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(object = %format_args!("s3://{}/{}", state.source.bucket, state.source.key), block = blocks.start, why, "a cached block is bad and is fetched again");
        }
        if state.trusted {
            // Its sums are not known yet, so nothing else in the file can be told good from bad.
            state.trusted = false;
            state.detached = true;
        }
        for block in blocks {
            state.blocks.clear(block);
        }
        state.verified = false;
        drop(state);
        *self.whole.lock() = None;
        // The block comes again, and what is compared in the end must be what is kept.
        self.stretches.lock().clear();
    }

    /// Goes on with the hash of the evicted entry that this one follows, once that took in all it can: an object larger than the
    /// cache is read whole too.
    pub fn inherit(&self, old: &Entry, recent: &Recent) {
        let mut hash = old.whole.lock();
        old.hash(&mut hash, (0, &Bytes::new()), u64::MAX, recent);
        let taken = hash.take();
        drop(hash);
        old.state().expected = None;
        let Some(taken) = taken else { return };
        let mut whole = self.whole.lock();
        if whole.as_ref().is_none_or(|own| own.next() < taken.next()) {
            *whole = Some(taken);
            drop(whole);
            self.state().inherited = true;
        }
    }

    /// The first block that is not hashed.
    pub fn hashed_to(&self) -> u64 {
        self.whole.lock().as_ref().map_or(0, Whole::next)
    }

    /// Hashes blocks in order as far as they are here, reading at most `limit` of them back. `fresh`: a block range that just came, and
    /// its bytes. True when those are hashed.
    pub fn hash_on(&self, fresh: (u64, &Bytes), limit: u64, recent: &Recent) -> bool {
        let Some(mut whole) = self.whole.try_lock() else { return false };
        self.hash(&mut whole, fresh, limit, recent);
        whole.as_ref().is_none_or(|whole| whole.next() > fresh.0)
    }

    /// Notes what came before its turn to be hashed, and was written: it need not be read again.
    pub fn hash_later(&self, (first, data): (u64, &Bytes)) {
        if let Some(expected) = self.state().expected {
            self.stretches.lock().add(expected, first, data);
        }
    }

    /// Hashes the rest and says whether the object is whole; every block is in the file or in `fresh`.
    pub fn verify(&self, fresh: (u64, &Bytes), recent: &Recent) -> Result<(), CacheError> {
        let mut whole = self.whole.lock();
        self.hash(&mut whole, fresh, u64::MAX, recent);
        match whole.as_ref() {
            Some(whole) if whole.next() == self.size.div_ceil(BLOCK) && whole.holds() => Ok(()),
            _ => {
                let source = self.source();
                Err(CacheError::Damaged(format!("s3://{}/{}", source.bucket, source.key)))
            }
        }
    }

    fn hash(&self, whole: &mut Option<Whole>, (first, data): (u64, &Bytes), limit: u64, recent: &Recent) {
        let (file, expected) = {
            let state = self.state();
            (state.file.as_ref().map(|(_, file)| Arc::clone(file)), state.expected)
        };
        let Some(expected) = expected else { return };
        let whole = whole.get_or_insert_with(|| Whole::new(expected));
        let fresh = first..first + (data.len() as u64).div_ceil(BLOCK);
        let mut buffer = Vec::new();
        let mut read = 0;
        while whole.next() * BLOCK < self.size {
            let next = whole.next();
            if fresh.contains(&next) {
                whole.take(&data[((next - first) * BLOCK) as usize..]);
                continue;
            }
            if whole.join(&mut self.stretches.lock()) {
                continue;
            }
            if read == limit {
                return;
            }
            read += 1;
            let Some(sum) = self.state().blocks.sum(next) else { return };
            let range = bytes_of(next..next + 1, self.size);
            buffer.resize((range.end - range.start) as usize, 0);
            match (recent.peek(self.uid, next), &file) {
                (Some(block), _) if block.len() == buffer.len() => buffer.copy_from_slice(&block),
                (_, Some(file)) if read_at(file, &mut buffer, range.start).is_ok() => {}
                _ => return,
            }
            if sum_of(&buffer) != sum {
                return;
            }
            whole.take(&buffer);
        }
    }
}

impl State {
    /// All blocks are here.
    pub fn is_complete(&self) -> bool {
        self.trusted || self.blocks.is_complete()
    }

    /// With blocks before `hashed_to` taken as seen, all have come.
    pub fn completes(&self, hashed_to: u64) -> bool {
        let count = self.source.size.div_ceil(BLOCK);
        self.blocks.is_complete() || (self.inherited && (hashed_to..count).rev().all(|block| self.blocks.has(block)))
    }

    /// Bytes on disk, for the bound of the cache.
    pub fn bytes(&self) -> u64 {
        if self.trusted { self.source.size } else { (self.blocks.present() * BLOCK).min(self.source.size) }
    }

    /// As the shelf keeps it.
    pub fn slot(&self, serial: u32) -> Slot {
        let proved = !self.trusted && !self.detached && !self.damaged && self.blocks.is_proved();
        Slot { serial, bytes: self.bytes(), complete: self.is_complete(), proved }
    }

    /// The id of the source.
    pub fn id(&self) -> EntryId {
        EntryId::of(&self.source)
    }
}

/// An entry that a reader has open: eviction takes others first.
#[derive(Debug)]
pub struct InUse(Arc<Entry>);

impl InUse {
    /// Counts a reader.
    pub fn new(entry: Arc<Entry>) -> Self {
        entry.readers.fetch_add(1, Ordering::Relaxed);
        Self(entry)
    }

    /// The entry.
    pub fn entry(&self) -> &Arc<Entry> {
        &self.0
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::Relaxed);
    }
}
