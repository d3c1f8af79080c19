//! One byte range of one version, whatever happens to its connections: a body that stops short or stalls is resumed where it was.

use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::block::BLOCK;
use super::entry::Entry;
use super::fetch::{Awaited, Reading};
use super::memory::{Buffer, Buffers};
use super::{CacheError, ObjectVersion};
use crate::s3::{ErrorKind, GetObject, GetRequest, ObjectHead, S3Error, Store};

/// A fetch that brings nothing ends within this time, a little before the call that waits for it (80 s), so that the caller gets the
/// store's error and not just "timed out".
const FETCH_DEADLINE: Duration = Duration::from_millis(if cfg!(test) { 2_000 } else { 76_000 });
/// A connection that brings nothing for so long is given up for another.
const STALL: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 10_000 });
/// Failures in a row, without a block between them, that end a fetch.
const MAX_RESUMES: u32 = 5;
/// Bytes gathered before they are written, cut where the reader's reads begin: what the kernel asks for in one read, which is then
/// answered without a copy. It bounds the memory of a connection.
pub const SEGMENT: usize = 16 * BLOCK as usize;
/// Whole blocks of a segment that somebody waits for are handed on before the rest of it, so far apart.
const PATIENCE: Duration = Duration::from_millis(5);

/// A resumable GET.
pub struct Download {
    entry: Arc<Entry>,
    store: Arc<dyn Store>,
    /// Next byte to hand on; a block's start.
    pos: u64,
    end: u64,
    /// The end of the segment; before it has begun, of all.
    until: u64,
    reading: Weak<Reading>,
    buffers: Arc<Buffers>,
    /// The segment, as far as it has come.
    segment: Option<Buffer>,
    filled: usize,
    body: Option<BoxStream<'static, crate::s3::Result<Bytes>>>,
    /// What came of the body beyond the segment.
    rest: Bytes,
    /// Bytes of the body before the ones that were asked for.
    skip: u64,
    by_version: bool,
    /// Why the body ended.
    trouble: Option<S3Error>,
    failures: u32,
    since_failure: u64,
    last_bytes: Instant,
    last_segment: Instant,
}

impl Download {
    /// Of `bytes`, whose start is a block's.
    pub fn new(entry: Arc<Entry>, store: Arc<dyn Store>, buffers: &Arc<Buffers>, reading: Weak<Reading>, bytes: Range<u64>) -> Self {
        let now = Instant::now();
        Self {
            entry,
            store,
            pos: bytes.start,
            end: bytes.end,
            until: bytes.end,
            reading,
            buffers: Arc::clone(buffers),
            segment: None,
            filled: 0,
            body: None,
            rest: Bytes::new(),
            skip: 0,
            by_version: false,
            trouble: None,
            failures: 0,
            since_failure: 0,
            last_bytes: now,
            last_segment: now,
        }
    }

    /// Sends the first GET, for the current version only, and gives the head of the answer; [`Self::next`] goes on with its body.
    pub async fn open(&mut self) -> Result<ObjectHead, CacheError> {
        loop {
            let source = self.entry.source();
            match self.answer(&source).await {
                Err(CacheError::S3(error)) if asked_again(error.kind) => self.failed(error).await?,
                other => return other,
            }
        }
    }

    /// The next whole blocks (the object's last one may be short), or `None` at the end. Less than a segment only where a read waits
    /// for it: what comes in one piece is answered without a copy.
    pub async fn next(&mut self, awaited: &Awaited) -> Result<Option<(u64, Bytes)>, CacheError> {
        loop {
            if self.space() == 0 {
                return Ok(self.cut_all());
            }
            if !self.rest.is_empty() {
                let rest = std::mem::take(&mut self.rest);
                self.take(rest);
                continue;
            }
            if self.body.is_none() {
                // What has come is not to wait for the answer to another GET, nor to be lost with it.
                if self.filled as u64 >= BLOCK {
                    return Ok(self.cut_whole_blocks());
                }
                if let Some(error) = self.trouble.take() {
                    self.failed(error).await?;
                }
                self.connect().await?;
            }
            let Some(chunk) = self.chunk(awaited).await else { return Ok(self.cut_whole_blocks()) };
            let error = match chunk {
                Some(Ok(chunk)) => {
                    self.take(chunk);
                    continue;
                }
                Some(Err(error)) => error,
                None => self.error(ErrorKind::Network, "the body stopped short".into()),
            };
            (self.body, self.rest, self.trouble) = (None, Bytes::new(), Some(error));
        }
    }

    /// What the body brings next; `None` when a read waits for blocks that are here, and the body lets it wait.
    async fn chunk(&mut self, awaited: &Awaited) -> Option<Option<crate::s3::Result<Bytes>>> {
        let here = (self.pos + self.filled as u64) / BLOCK;
        let (handed, stall) = (self.last_segment + PATIENCE, Instant::now() + STALL);
        loop {
            let waits = self.filled as u64 >= BLOCK && awaited.before(here);
            tokio::select! {
                biased;
                chunk = self.body.as_mut()?.next() => return Some(chunk),
                () = sleep_until(handed), if waits => return None,
                () = awaited.more(), if !waits => {}
                () = sleep_until(stall) => return Some(Some(Err(self.error(ErrorKind::TimedOut, format!("no byte for {STALL:?}"))))),
            }
        }
    }

    /// A body is there, and little is still to come of it.
    pub fn is_nearly_done(&self) -> bool {
        self.body.is_some() && self.end - self.pos <= SEGMENT as u64
    }

    /// Bytes that the segment lacks; 0 at the end of what was asked for, too.
    fn space(&self) -> usize {
        (self.until - self.pos) as usize - self.filled
    }

    fn take(&mut self, mut chunk: Bytes) {
        if self.skip > 0 {
            let skipped = self.skip.min(chunk.len() as u64);
            self.skip -= skipped;
            chunk = chunk.slice(skipped as usize..);
        }
        if self.segment.is_none() {
            let (size, phase) = (SEGMENT as u64, self.reading.upgrade().map_or(0, |reading| reading.phase()));
            self.until = self.end.min((self.pos + size - phase) / size * size + phase);
        }
        let space = self.space();
        self.rest = chunk.split_off(space.min(chunk.len()));
        let segment = self.segment.get_or_insert_with(|| self.buffers.take(self.filled + space));
        segment.as_mut()[self.filled..self.filled + chunk.len()].copy_from_slice(&chunk);
        self.filled += chunk.len();
        self.entry.speed.moved(chunk.len() as u64);
        self.last_bytes = Instant::now();
        self.since_failure += chunk.len() as u64;
        if self.since_failure >= BLOCK {
            self.failures = 0;
        }
    }

    /// What has come, as it lies.
    fn cut_all(&mut self) -> Option<(u64, Bytes)> {
        let mut segment = self.segment.take()?;
        segment.truncate(std::mem::take(&mut self.filled));
        self.handed(segment.freeze())
    }

    /// The whole blocks of what has come, copied: the connection is slow, and a segment's memory is not to be held for a few of them.
    pub fn cut_whole_blocks(&mut self) -> Option<(u64, Bytes)> {
        let len = self.filled / BLOCK as usize * BLOCK as usize;
        let (mut blocks, segment) = (self.buffers.take(len), self.segment.as_mut()?.as_mut());
        blocks.as_mut().copy_from_slice(&segment[..len]);
        segment.copy_within(len..self.filled, 0);
        self.filled -= len;
        self.handed(blocks.freeze())
    }

    fn handed(&mut self, blocks: Bytes) -> Option<(u64, Bytes)> {
        let at = self.pos;
        self.pos += blocks.len() as u64;
        if self.segment.is_none() {
            self.until = self.end;
        }
        self.last_segment = Instant::now();
        (!blocks.is_empty()).then_some((at / BLOCK, blocks))
    }

    async fn connect(&mut self) -> Result<(), CacheError> {
        loop {
            let source = self.entry.source();
            match self.answer(&source).await {
                Ok(_) => return Ok(()),
                Err(CacheError::S3(error)) if asked_again(error.kind) => self.failed(error).await?,
                // A metadata copy or rename of ours gave the bytes another name meanwhile.
                Err(CacheError::Stale) if self.entry.source() != source => {}
                // Replaced, but a versioned bucket still has it. Asked for only now: reading by version needs a right of its own.
                Err(CacheError::Stale) if !self.by_version && source.version_id.is_some() => self.by_version = true,
                Err(CacheError::S3(error)) if self.by_version && error.kind == ErrorKind::AccessDenied => return Err(CacheError::Stale),
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks for what is still to come and takes the answer's body.
    async fn answer(&mut self, source: &ObjectVersion) -> Result<ObjectHead, CacheError> {
        let answer = self.get(source).await.map_err(stale_or)?;
        let head = answer.head.clone();
        self.accept(answer, source)?;
        Ok(head)
    }

    async fn get(&mut self, source: &ObjectVersion) -> Result<GetObject, S3Error> {
        let range = self.pos + self.filled as u64..self.end;
        let request = GetRequest {
            // Asked for without a range the store adds its whole checksum, where it has one.
            range: (range != (0..source.size)).then_some(range),
            if_match: Some(source.etag.clone()),
            version_id: source.version_id.clone().filter(|_| self.by_version),
        };
        let left = FETCH_DEADLINE.saturating_sub(self.last_bytes.elapsed());
        let asked = Instant::now();
        match timeout(left, self.store.get(&source.key, request)).await {
            Ok(answer) => {
                if answer.is_ok() {
                    self.entry.distance.note(asked.elapsed());
                }
                answer
            }
            Err(_) => Err(self.error(ErrorKind::TimedOut, "no answer in time".into())),
        }
    }

    /// Takes an answer's body after its head was found to be the version's. A store that ignores ranges sends more; it is skipped.
    fn accept(&mut self, answer: GetObject, source: &ObjectVersion) -> Result<(), CacheError> {
        if answer.head.etag != source.etag {
            return Err(CacheError::Stale);
        }
        if answer.head.size != source.size {
            let text = format!("the version has {} bytes, and {} are said to be all", source.size, answer.head.size);
            return Err(CacheError::S3(self.error(ErrorKind::Protocol, text)));
        }
        let at = self.pos + self.filled as u64;
        if answer.range.start > at || answer.range.end <= at {
            let text = format!("asked for bytes from {at}, got {}-{}", answer.range.start, answer.range.end);
            return Err(CacheError::S3(self.error(ErrorKind::Protocol, text)));
        }
        self.entry.learn_version_id(&answer.head.etag, answer.head.version_id.as_deref());
        let _ = self.entry.head.set(answer.head.clone());
        // With a part of the object may come that part's checksum.
        if let Some(checksum) = answer.head.checksum.filter(|_| answer.range == (0..source.size)) {
            self.entry.expect(checksum);
        }
        self.skip = at - answer.range.start;
        self.body = Some(answer.body);
        Ok(())
    }

    /// Ends the fetch, or waits a little and lets it go on from where it is.
    async fn failed(&mut self, error: S3Error) -> Result<(), CacheError> {
        (self.body, self.rest) = (None, Bytes::new());
        self.failures += 1;
        self.since_failure = 0;
        let passing = error.kind.passes() || matches!(error.kind, ErrorKind::BadDigest | ErrorKind::Protocol);
        if !passing || self.failures > MAX_RESUMES || self.last_bytes.elapsed() >= FETCH_DEADLINE {
            return Err(CacheError::S3(error));
        }
        tracing::debug!(%error, at = self.pos, "a GET is resumed");
        if self.failures > 1 {
            let millis = (50 << self.failures) * rand::random_range(50..150) / 100;
            sleep(Duration::from_millis(millis)).await;
        }
        Ok(())
    }

    fn error(&self, kind: ErrorKind, message: String) -> S3Error {
        let source = self.entry.source();
        S3Error::local(kind, "GetObject", format!("s3://{}/{}", source.bucket, source.key), message)
    }
}

/// Throttling is no failure, and an answer that does not agree with itself was damaged on its way; of all else the store's client has
/// tried what helps.
fn asked_again(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Throttled | ErrorKind::Protocol)
}

/// What an answer says of the version: 412 and 404 are not errors of the store.
pub fn stale_or(error: S3Error) -> CacheError {
    match error.kind {
        ErrorKind::PreconditionFailed | ErrorKind::NoSuchKey | ErrorKind::InvalidRange => CacheError::Stale,
        _ => CacheError::S3(error),
    }
}
