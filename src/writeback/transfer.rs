//! One transfer: a part or a whole object from the spool file to the store.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream, StreamExt};
use md5::{Digest, Md5};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::body::{self, Body};
use super::disk::SpoolFile;
use super::entry::Entry;
use super::manifest::Phase;
use super::plan::{How, Piece};
use super::state::SentPart;
use super::{Base, Error, Target};
use crate::failpoint;
use crate::s3::{Checksum, ChecksumKind, CopySource, ErrorKind, S3Error, Source};

/// Bytes read from the spool at once: small enough that 32 transfers hold little, large enough that the hop to the
/// blocking pool (about 20 µs) costs nothing beside the network.
pub(super) const CHUNK: usize = 256 << 10;
/// Why a transfer did not end well.
#[derive(Clone, Debug)]
pub(crate) enum Trouble {
    /// The store's answer, or none.
    S3(S3Error),
    /// The base is another version now, or its bytes cannot be had any more.
    Stale,
    /// Every part again under a new upload.
    Anew,
    /// The spool failed.
    Local(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        match error {
            Error::S3(error) => Trouble::S3(error),
            Error::Stale => Trouble::Stale,
            error => Trouble::Local(error),
        }
    }
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::S3(error) if error.kind == ErrorKind::TooLarge => Error::TooLarge,
            Trouble::S3(error) => Error::S3(error),
            Trouble::Stale | Trouble::Anew => Error::Stale,
            Trouble::Local(error) => error,
        }
    }
}

/// Chunks that all transfers of a mount may hold together: a quarter of `memory_limit`. Never so few that some connections
/// which hang, each with a chunk or two, would hold up the others.
pub(crate) fn chunks_in_memory(memory_limit: u64) -> usize {
    usize::try_from(memory_limit / 4 / CHUNK as u64).unwrap_or(usize::MAX).clamp(32, Semaphore::MAX_PERMITS)
}

/// A chunk on its way, with its share of the memory.
struct Held {
    chunk: Bytes,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.chunk
    }
}

/// A range of an entry's bytes, counted as it leaves.
pub(crate) struct SpoolSource {
    entry: Arc<Entry>,
    body: Body,
    range: Range<u64>,
    counts: Arc<Counts>,
}

/// Bytes of one transfer that were handed over: those of the attempt under way, and the most of any attempt, of this transfer or of
/// earlier ones of the same bytes. Only bytes beyond that are progress, so that a black hole that swallows a socket buffer at each
/// attempt, and a store that takes all of them and answers nonsense, do time out.
struct Counts {
    entry: Arc<Entry>,
    handed: AtomicU64,
    most: AtomicU64,
    range: Range<u64>,
}

impl Counts {
    fn new(entry: &Arc<Entry>, range: Range<u64>) -> Arc<Self> {
        entry.in_flight.fetch_add(range.end - range.start, Relaxed);
        let most = entry.handed.lock().get(&range.start).copied().unwrap_or(0);
        Arc::new(Self { entry: entry.clone(), handed: AtomicU64::new(0), most: AtomicU64::new(most), range })
    }

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// The attempt under way came to nothing: what was handed over of it was not taken.
    fn restart(&self) {
        let handed = self.handed.swap(0, Relaxed);
        self.entry.in_flight.fetch_add(handed, Relaxed);
        self.entry.sent.fetch_sub(handed, Relaxed);
        self.entry.shared.meter.retract(handed);
    }

    fn hand(&self, bytes: u64) {
        // A client may read a body twice at once (to hash it): no more than its length is ever counted.
        let before = self.handed.fetch_update(Relaxed, Relaxed, |handed| Some((handed + bytes).min(self.len()))).unwrap_or(self.len());
        let handed = (before + bytes).min(self.len());
        self.entry.in_flight.fetch_sub(handed - before, Relaxed);
        self.entry.sent.fetch_add(handed - before, Relaxed);
        self.entry.speed.moved(handed - before);
        let news = handed > self.most.fetch_max(handed, Relaxed);
        if news {
            self.entry.progressed();
        }
        self.entry.shared.meter.record(bytes, news);
    }
}

impl Drop for Counts {
    fn drop(&mut self) {
        let most = self.most.load(Relaxed);
        if most > 0 {
            self.entry.handed.lock().entry(self.range.start).and_modify(|known| *known = most.max(*known)).or_insert(most);
        }
        let rest = self.len() - self.handed.load(Relaxed).min(self.len());
        self.entry.in_flight.fetch_sub(rest, Relaxed);
        self.entry.shared.meter.moved.notify_waiters();
    }
}

impl SpoolSource {
    pub fn new(entry: &Arc<Entry>, body: Body, range: Range<u64>) -> Self {
        let counts = Counts::new(entry, range.clone());
        Self { entry: entry.clone(), body, range, counts }
    }
}

impl Source for SpoolSource {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn refused(&self) {
        self.counts.restart();
    }

    fn open(&self) -> BoxStream<'static, io::Result<Bytes>> {
        self.counts.restart();
        let (body, counts, end) = (self.body.clone(), self.counts.clone(), self.range.end);
        let memory = self.entry.shared.memory.clone();
        stream::try_unfold(self.range.start, move |at| {
            let (body, counts, memory) = (body.clone(), counts.clone(), memory.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let chunks = body.at_once(at..end).div_ceil(CHUNK as u64) as u32;
                let permit = memory.acquire_many_owned(chunks).await.map_err(io::Error::other)?;
                let chunk = body.read(at..end).await.map_err(io::Error::other)?;
                let next = at + chunk.len() as u64;
                counts.hand(chunk.len() as u64);
                Ok(Some((Bytes::from_owner(Held { chunk, _permit: permit }), next)))
            }
        })
        .boxed()
    }
}

/// Bytes in memory, counted as a spool range is.
pub(crate) struct MemorySource {
    bytes: Bytes,
    counts: Arc<Counts>,
}

impl MemorySource {
    pub fn new(entry: &Arc<Entry>, bytes: Bytes) -> Self {
        let counts = Counts::new(entry, 0..bytes.len() as u64);
        Self { bytes, counts }
    }
}

impl Source for MemorySource {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn refused(&self) {
        self.counts.restart();
    }

    fn open(&self) -> BoxStream<'static, io::Result<Bytes>> {
        self.counts.restart();
        let counts = self.counts.clone();
        Box::pin(stream::iter((!self.bytes.is_empty()).then(|| self.bytes.clone())).map(move |bytes| {
            counts.hand(bytes.len() as u64);
            Ok(bytes)
        }))
    }
}

/// Reads exactly `len` bytes; what lies past the end of the file is zeros (the file was cut meanwhile: the bytes are
/// sent again anyway).
pub(crate) fn read_exact(file: &SpoolFile, at: u64, len: usize) -> io::Result<Bytes> {
    let mut buffer = BytesMut::zeroed(len);
    let mut done = 0;
    while done < len {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(buffer.freeze())
}

/// A checksum that is fed bytes.
pub(crate) enum Hasher {
    Off,
    Md5(Box<Md5>),
    Crc(ChecksumKind, Box<crc_fast::Digest>),
}

impl Hasher {
    pub fn new(kind: ChecksumKind) -> Self {
        match kind {
            ChecksumKind::Off => Hasher::Off,
            ChecksumKind::Md5 => Hasher::Md5(Box::default()),
            ChecksumKind::Crc32c => Hasher::Crc(kind, Box::new(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi))),
            ChecksumKind::Crc64Nvme => Hasher::Crc(kind, Box::new(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme))),
        }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Off => {}
            Hasher::Md5(md5) => Digest::update(md5.as_mut(), bytes),
            Hasher::Crc(_, crc) => crc.update(bytes),
        }
    }

    pub fn finish(self) -> Option<Checksum> {
        match self {
            Hasher::Off => None,
            Hasher::Md5(md5) => Some(Checksum::Md5(md5.finalize().into())),
            Hasher::Crc(ChecksumKind::Crc32c, crc) => Some(Checksum::Crc32c(crc.finalize() as u32)),
            Hasher::Crc(_, crc) => Some(Checksum::Crc64Nvme(crc.finalize())),
        }
    }
}

/// The checksum of a range.
pub(crate) async fn checksum(body: &Body, range: Range<u64>, kind: ChecksumKind) -> Result<Option<Checksum>, Error> {
    let [sum] = checksums(body, range, [kind]).await?;
    Ok(sum)
}

/// Checksums of several kinds, from one reading.
pub(crate) async fn checksums<const N: usize>(
    body: &Body,
    range: Range<u64>,
    kinds: [ChecksumKind; N],
) -> Result<[Option<Checksum>; N], Error> {
    if kinds.iter().all(|kind| *kind == ChecksumKind::Off) {
        return Ok([None; N]);
    }
    let hashers = body.feed(range, kinds.map(Hasher::new)).await?;
    Ok(hashers.map(Hasher::finish))
}

/// The checksum of a range, as the application wrote it where that is known: computed on its way into the spool file.
/// `writer`: where the caller keeps writers out.
pub(crate) async fn written(
    entry: &Arc<Entry>,
    body: &Body,
    range: Range<u64>,
    kind: ChecksumKind,
    writer: Option<&Writer>,
) -> Result<Option<Checksum>, Error> {
    let sum = entry.rolling.lock().of(&range).map(Checksum::Crc64Nvme);
    match kind {
        ChecksumKind::Crc64Nvme if sum.is_some() => Ok(sum),
        ChecksumKind::Md5 | ChecksumKind::Crc32c if sum.is_some() => {
            // The store sums another way: nothing is sent before the file is known to hold what was written.
            let [asked, found] = checksums(body, range.clone(), [kind, ChecksumKind::Crc64Nvme]).await?;
            if found != sum {
                undamaged(entry, range, writer).await?;
            }
            Ok(asked)
        }
        _ => checksum(body, range, kind).await,
    }
}

/// Keeps writers of a spool file out.
pub(crate) type Writer = tokio::sync::OwnedMutexGuard<()>;

/// Fails where the spool file does not hold what was written into it: while nobody writes, file and sum tell of the same bytes.
pub(crate) async fn undamaged(entry: &Arc<Entry>, range: Range<u64>, writer: Option<&Writer>) -> Result<(), Error> {
    let _writer = match writer {
        Some(_) => None,
        None => Some(entry.writer.lock().await),
    };
    let Some(sum) = entry.rolling.lock().of(&range) else { return Ok(()) };
    if checksum(&Body::local(&entry.file), range.clone(), ChecksumKind::Crc64Nvme).await? == Some(Checksum::Crc64Nvme(sum)) {
        return Ok(());
    }
    let Range { start, end } = range;
    tracing::error!(
        "{}: bytes {start} to {end} are not those that were written: the disk or the memory of this machine fails",
        entry.data.display()
    );
    Err(Error::Damaged)
}

/// Brings one part to the store.
pub(crate) async fn part(
    entry: &Arc<Entry>,
    target: &Target,
    upload: &str,
    base: Option<&Base>,
    piece: &Piece,
) -> Result<SentPart, Trouble> {
    let (store, number) = (&target.store, piece.number);
    if piece.how == How::Copy {
        let Some(base) = base else { return Err(Trouble::Stale) };
        let source = CopySource {
            bucket: base.bucket.clone(),
            key: base.key.clone(),
            if_match: Some(base.etag.clone()),
            version_id: base.version_id.clone(),
            checksum: base.checksum,
        };
        let part = match store.upload_part_copy(&target.key, upload, number, source, piece.range.clone()).await {
            Ok(part) => part,
            Err(error) if matches!(error.kind, ErrorKind::PreconditionFailed | ErrorKind::NoSuchKey) => {
                return Err(Trouble::Stale);
            }
            // The upload takes no other checksum than this one: another upload, without.
            Err(error) if error.kind == ErrorKind::BadDigest => return Err(Trouble::Anew),
            Err(error) => return Err(Trouble::S3(error)),
        };
        entry.progressed();
        entry.sent.fetch_add(piece.range.end - piece.range.start, Relaxed);
        entry.speed.moved(piece.range.end - piece.range.start);
        return Ok(SentPart { etag: part.etag, checksum: part.checksum.filter(|_| !entry.intent.lock().is_plain()) });
    }
    let sent = upload_part(entry, target, upload, base, piece).await;
    if sent.is_err() {
        // It will be sent again, and the writer must not run away meanwhile.
        entry.content.lock().waiting.insert(piece.range.clone());
    }
    sent
}

/// The ETag of a part is not the MD5 of what was sent: the store holds something else, or its ETags are none. An upload with a checksum tells.
fn opaque(entry: &Entry) -> Trouble {
    entry.shared.opaque_parts.store(true, Relaxed);
    Trouble::Anew
}

async fn upload_part(entry: &Arc<Entry>, target: &Target, upload: &str, base: Option<&Base>, piece: &Piece) -> Result<SentPart, Trouble> {
    let store = &target.store;
    body::fill(entry, base, piece.range.clone()).await?;
    let body = {
        // What is written from here on marks its bytes again after it is in the file, so the check finds a torn part.
        let mut content = entry.content.lock();
        content.unsent.remove(piece.range.clone());
        content.waiting.remove(piece.range.clone());
        Body::of(entry, &content, base, piece.range.clone())
    };
    let source = SpoolSource::new(entry, body.clone(), piece.range.clone());
    let counts = source.counts.clone();
    let (kind, plain) = {
        let intent = entry.intent.lock();
        (intent.part_checksum(), intent.is_plain())
    };
    let checksum = written(entry, &body, piece.range.clone(), kind, None).await?;
    let part = match store.upload_part(&target.key, upload, piece.number, Arc::new(source), checksum).await {
        Ok(part) => part,
        Err(error) => {
            counts.restart();
            if error.kind == ErrorKind::BadDigest {
                undamaged(entry, piece.range.clone(), None).await?;
                if plain {
                    return Err(opaque(entry));
                }
            }
            return Err(Trouble::S3(error));
        }
    };
    if plain && kind == ChecksumKind::Md5 && part.etag.md5().map(Checksum::Md5) != checksum {
        return Err(opaque(entry));
    }
    failpoint::pass("part-answered");
    {
        let mut intent = entry.intent.lock();
        if intent.phase != Phase::Parked && intent.failed.is_none() {
            // What stood in the way is over.
            intent.reason = None;
        }
    }
    entry.progressed();
    Ok(SentPart { etag: part.etag, checksum: part.checksum })
}
