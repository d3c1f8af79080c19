//! One reader of one version: finds its blocks, waits for those on their way, has the missing ones fetched.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::SemaphorePermit;

use super::block::{BLOCK, blocks_of};
use super::download::{Download, stale_or};
use super::entry::{Entry, Found, InUse, Piece};
use super::fetch::{self, Awaited, End, Hold};
use super::inner::{Inner, LEAST_ANSWERS};
use super::window::{FIRST, MAX_PIECE, Plan, Window};
use super::{CacheError, ObjectVersion, READ_DEADLINE};
use crate::s3::{ErrorKind, ObjectHead, S3Error, Store};

/// Times that a read has blocks fetched which are gone again when it looks (memory under pressure, a failing disk), before it
/// fetches for itself alone.
const MAX_ROUNDS: u32 = 4;
/// Times that what came damaged is fetched again for one read.
const MENDS_MOST: u32 = 3;

/// A reader pinned to one version, with its own sequential detection: one a file handle.
#[derive(Debug)]
pub struct Reader {
    inner: Arc<Inner>,
    store: Arc<dyn Store>,
    version: ObjectVersion,
    ahead: Mutex<Ahead>,
    /// Nothing is fetched that was not asked for.
    exact: bool,
    entry: Mutex<Option<InUse>>,
    /// Bytes of the entry were handed out. Looked at and set with `entry` locked.
    given: AtomicBool,
}

#[derive(Debug)]
struct Ahead {
    window: Window,
    hold: Hold,
}

impl Reader {
    pub(super) fn new(inner: Arc<Inner>, store: Arc<dyn Store>, version: ObjectVersion) -> Self {
        let window = Window::new(version.size, inner.reach());
        Self {
            inner,
            store,
            version,
            ahead: Mutex::new(Ahead { window, hold: Hold::default() }),
            exact: false,
            entry: Mutex::new(None),
            given: AtomicBool::new(false),
        }
    }

    /// The same, but without read-ahead: for whoever knows what it needs.
    pub fn exact(self) -> Self {
        Self { exact: true, ..self }
    }

    /// Head of the object, once a GET of this reader or of another one of the version brought it.
    pub fn head(&self) -> Option<ObjectHead> {
        self.entry.lock().as_ref().and_then(|held| held.entry().head.get().cloned())
    }

    /// The version that this reader is pinned to.
    pub fn version(&self) -> &ObjectVersion {
        &self.version
    }

    /// Exactly `len` bytes at `offset`, fewer only at the end of the object. Ends within [`READ_DEADLINE`].
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, CacheError> {
        self.read_on(offset, len, 0).await
    }

    /// As [`Reader::read`], for who is about to read everything up to `until`: what is missing of it comes by as few GETs as it can.
    pub async fn read_on(&self, offset: u64, len: usize, until: u64) -> Result<Bytes, CacheError> {
        let end = self.version.size.min(offset.saturating_add(len as u64));
        if offset >= end {
            return Ok(Bytes::new());
        }
        let until = until.min(self.version.size).min(offset.saturating_add(MAX_PIECE)).max(end);
        match tokio::time::timeout(READ_DEADLINE, self.read_range(offset..end, until)).await {
            Ok(result) => result,
            Err(_) => Err(self.timed_out("GetObject")),
        }
    }

    /// Proves that the object is still this version, at the price of at most one request, and keeps what it brought: the first
    /// blocks by a GET with If-Match when they are not cached, else one HEAD. [`CacheError::Stale`] when it is another version.
    pub async fn revalidate(&self) -> Result<ObjectHead, CacheError> {
        match tokio::time::timeout(READ_DEADLINE, self.prove(FIRST)).await {
            Ok(result) => result,
            Err(_) => Err(self.timed_out("HeadObject")),
        }
    }

    /// As [`Reader::revalidate`], where the first blocks are not here and have to be asked for anyway; `None` where they are.
    pub async fn begin(&self) -> Result<Option<ObjectHead>, CacheError> {
        let begun = async {
            let entry = self.entry().await?;
            self.first(&entry, FIRST).await.transpose()
        };
        tokio::time::timeout(READ_DEADLINE, begun).await.unwrap_or_else(|_| Err(self.timed_out("GetObject")))
    }

    /// As [`Reader::revalidate`], of the whole object and before anybody asks for it. What is under way ends with the reader.
    pub async fn fetch_ahead(&self) -> Result<ObjectHead, CacheError> {
        let proved = async {
            let _ahead = self.inner.ahead.acquire().await.ok();
            self.prove(u64::MAX).await
        };
        tokio::time::timeout(READ_DEADLINE, proved).await.unwrap_or_else(|_| Err(self.timed_out("GetObject")))
    }

    /// Of its first `bytes`.
    async fn prove(&self, bytes: u64) -> Result<ObjectHead, CacheError> {
        let entry = self.entry().await?;
        if let Some(head) = self.first(&entry, bytes).await {
            return head;
        }
        let source = entry.source();
        let head = self.store.head(&source.key).await.map_err(stale_or)?;
        if head.etag != source.etag || head.size != source.size {
            return Err(CacheError::Stale);
        }
        head.checksum.into_iter().for_each(|checksum| entry.expect(checksum));
        Ok(head)
    }

    /// Asks for the first `bytes`, where none of them is here or on its way.
    async fn first(&self, entry: &Arc<Entry>, bytes: u64) -> Option<Result<ObjectHead, CacheError>> {
        let first = self.version.size.min(bytes);
        if first == 0 {
            return None;
        }
        let hold = Arc::clone(&self.ahead.lock().hold);
        fetch::open(&self.inner, entry, &self.store, first, &hold).await
    }

    async fn read_range(&self, range: Range<u64>, until: u64) -> Result<Bytes, CacheError> {
        let want = blocks_of(range.clone());
        let (plan, hold) = {
            let mut ahead = self.ahead.lock();
            ahead.window.set_reach(self.inner.reach());
            let mut plan = if self.exact { Plan::of(range.clone()) } else { ahead.window.on_read(range.clone()) };
            plan.demand.end = plan.demand.end.max(until);
            if plan.seek {
                ahead.hold = Hold::default();
            }
            ahead.hold.note(&range);
            (plan, Arc::clone(&ahead.hold))
        };
        let mut plans_ahead = !plan.ahead.is_empty();
        let mut mended = 0;
        let (entry, blocks) = loop {
            match self.find(&want, &plan, &hold, &mut plans_ahead).await {
                // Nobody has seen any of it: what was damaged on its way comes again.
                Err(CacheError::Damaged(_)) if mended < MENDS_MOST && !self.given.load(Ordering::Relaxed) => mended += 1,
                other => break other?,
            }
        };
        if self.inner.keeps_on_disk() {
            let end = if range.end == self.version.size { want.end } else { range.end / BLOCK };
            self.inner.recent.spend(entry.uid, want.start..end);
        }
        let skip = (range.start - want.start * BLOCK) as usize;
        Ok(blocks.slice(skip..skip + (range.end - range.start) as usize))
    }

    /// The blocks, and the entry that they are of.
    async fn find(&self, want: &Range<u64>, plan: &Plan, hold: &Hold, plans_ahead: &mut bool) -> Result<(Arc<Entry>, Bytes), CacheError> {
        let mut entry = self.entry().await?;
        let mut rounds = 0;
        let blocks = loop {
            let found = match self.inner.recent.join(entry.uid, want.clone(), &self.inner.buffers) {
                Some(bytes) => Found::Ready(vec![Piece::Memory(bytes)]),
                None => entry.locate(want.clone(), &self.inner.recent),
            };
            let mut launched = Vec::new();
            if let Found::Missing = found {
                rounds += 1;
                self.ahead.lock().window.missed();
                if rounds > MAX_ROUNDS {
                    break self.fetch_alone(&entry, want.clone()).await?;
                }
                if entry.state().detached {
                    entry = self.reopen(&entry).await?;
                }
                let demand = blocks_of(plan.demand.clone());
                launched = fetch::launch(&self.inner, &entry, &self.store, demand, MAX_PIECE, false, hold);
            }
            if std::mem::take(plans_ahead) {
                // What is evicted gets no more blocks: those ahead go to the entry that this reader will turn to.
                let entry = if entry.state().detached { self.current(&entry).await } else { Arc::clone(&entry) };
                for bytes in &plan.ahead {
                    fetch::launch(&self.inner, &entry, &self.store, blocks_of(bytes.clone()), plan.piece, true, hold);
                }
            }
            match found {
                Found::Ready(mut pieces) => {
                    if let [Piece::Memory(_)] = pieces.as_slice()
                        && let Some(Piece::Memory(bytes)) = pieces.pop()
                    {
                        break bytes;
                    }
                    // Who waits for blocks holds none: this is for who copies them. The answer leaves in the same step as the permit.
                    let _memory = self.share(want).await;
                    if let Some(bytes) = self.assemble(&entry, pieces).await? {
                        break bytes;
                    }
                }
                Found::Wait(flight, block) => {
                    if let End::Failed(error) = flight.wait(block).await {
                        return Err(error);
                    }
                }
                Found::Missing => {
                    for flight in launched.iter().filter(|flight| flight.blocks.start < want.end) {
                        if let End::Failed(error) = flight.wait(want.end.min(flight.blocks.end) - 1).await {
                            return Err(error);
                        }
                    }
                }
            }
        };
        let _held = self.entry.lock();
        if entry.state().damaged {
            return Err(damaged(&entry));
        }
        self.given.store(true, Ordering::Relaxed);
        Ok((entry, blocks))
    }

    /// Memory for an answer that is no part of a segment.
    async fn share(&self, want: &Range<u64>) -> Option<SemaphorePermit<'_>> {
        let kib = (want.end - want.start) * (BLOCK / 1024);
        self.inner.memory.acquire_many(kib.clamp(1, LEAST_ANSWERS) as u32).await.ok()
    }

    async fn assemble(&self, entry: &Arc<Entry>, pieces: Vec<Piece>) -> Result<Option<Bytes>, CacheError> {
        let (inner, entry) = (Arc::clone(&self.inner), Arc::clone(entry));
        let assembles = move || {
            let bytes = entry.assemble(pieces, &inner.buffers);
            // Found bad, it is not to be passed through either.
            if entry.became_proved() || bytes.is_none() {
                inner.account(&entry);
            }
            bytes
        };
        tokio::task::spawn_blocking(assembles).await.map_err(failed)
    }

    /// Reads through: nothing is kept, so nothing can be lost before it is delivered.
    async fn fetch_alone(&self, entry: &Arc<Entry>, want: Range<u64>) -> Result<Bytes, CacheError> {
        let _memory = self.share(&want).await;
        let _connection = self.inner.connections.acquire().await.ok();
        let bytes = super::block::bytes_of(want, entry.size);
        let mut all = bytes::BytesMut::with_capacity((bytes.end - bytes.start) as usize);
        let mut download = Download::new(Arc::clone(entry), Arc::clone(&self.store), &self.inner.buffers, Weak::new(), bytes);
        while let Some((_, data)) = download.next(&Awaited::default()).await? {
            all.extend_from_slice(&data);
        }
        Ok(all.freeze())
    }

    /// The entry to read from. One that was found damaged is left for another, unless bytes of it were given: then this reader is
    /// of no use any more. Said once it would be lost: the kernel keeps no error of what it read ahead.
    async fn entry(&self) -> Result<Arc<Entry>, CacheError> {
        let entry = {
            let mut held = self.entry.lock();
            let source = match held.as_ref().map(InUse::entry) {
                Some(entry) if !entry.state().damaged => return Ok(Arc::clone(entry)),
                Some(entry) if self.given.load(Ordering::Relaxed) => return Err(damaged(entry)),
                Some(entry) => entry.source(),
                None => self.version.clone(),
            };
            let entry = self.inner.entry(&source);
            *held = Some(InUse::new(Arc::clone(&entry)));
            entry
        };
        self.inner.load(&entry).await;
        Ok(entry)
    }

    /// The entry was evicted and lacks a block: goes on with a new one, under the name that the object has now.
    async fn reopen(&self, old: &Arc<Entry>) -> Result<Arc<Entry>, CacheError> {
        if old.state().damaged {
            return Err(damaged(old));
        }
        let entry = self.current(old).await;
        *self.entry.lock() = Some(InUse::new(Arc::clone(&entry)));
        let (inner, next, old) = (Arc::clone(&self.inner), Arc::clone(&entry), Arc::clone(old));
        tokio::task::spawn_blocking(move || inner.succeed(&next, &old)).await.map_err(failed)??;
        Ok(entry)
    }

    async fn current(&self, old: &Arc<Entry>) -> Arc<Entry> {
        let entry = self.inner.entry(&old.source());
        self.inner.load(&entry).await;
        entry
    }

    fn timed_out(&self, operation: &'static str) -> CacheError {
        let resource = format!("s3://{}/{}", self.version.bucket, self.version.key);
        let message = format!("not answered within {} s", READ_DEADLINE.as_secs());
        CacheError::S3(S3Error::local(ErrorKind::TimedOut, operation, resource, message))
    }
}

fn damaged(entry: &Entry) -> CacheError {
    let source = entry.source();
    CacheError::Damaged(format!("s3://{}/{}", source.bucket, source.key))
}

fn failed(error: tokio::task::JoinError) -> CacheError {
    CacheError::Io(Arc::new(std::io::Error::other(error)))
}
