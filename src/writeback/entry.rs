//! What all parts of write-back share: the mount's state, and one entry a staged file.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, mpsc};

use super::content::Content;
use super::copied::Borrowers;
use super::deletes::Deletes;
use super::disk::{BLOCK, SpoolFile, whole_blocks};
use super::intent::Intent;
use super::journal::{Deletion, Journalled, MetadataChange, PutOff};
use super::manifest::{BaseRecord, Phase, Record};
use super::metacopy::Copies;
use super::pace::Meter;
use super::plan::{How, Piece};
use super::recover::Stranded;
use super::renames::Renames;
use super::rights::Rights;
use super::rolling::Rolling;
use super::spool::{Spool, blocking};
use super::uploader::Message;
use super::{Attributes, Base, ConflictCopy, Error, Expect, Hooks, SpoolConfig, Target, transfer};
use crate::measure::Speed;
use crate::s3::Store;
use crate::s3::multipart::PartPlan;
use crate::s3::slow::Life;

/// How long a published file may take to leave the spool before a writer who waits for its space is refused.
const HANDING_OVER: Duration = Duration::from_secs(2);

/// How many bytes are reserved between looks at the disk's free space, at most.
const LOOK_EVERY: u64 = 32 << 20;

/// The state of one mount's write-back.
pub(crate) struct Shared {
    pub config: SpoolConfig,
    pub hooks: Arc<dyn Hooks>,
    pub spool: Spool,
    pub meter: Meter,
    /// Chunks that transfers may hold.
    pub memory: Arc<Semaphore>,
    pub copies: Copies,
    pub deletes: Deletes,
    /// Woken when an entry leaves or ends a publication.
    pub changed: Notify,
    /// Publications that ended well.
    pub publications: AtomicU64,
    inbox: mpsc::UnboundedSender<Message>,
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    pub next_id: AtomicU64,
    /// Bytes of the disk that spool files and their records take.
    used: AtomicU64,
    /// Entries whose files are on their way out.
    leaving: AtomicUsize,
    /// Bytes that may still be taken before the disk is looked at again.
    credit: AtomicI64,
    /// The store was found not to know conditional writes.
    pub unconditional: AtomicBool,
    /// ETags of parts are no MD5s here: an upload without a checksum proves nothing.
    pub opaque_parts: AtomicBool,
    /// Which buckets may be written to.
    pub rights: Rights,
    /// Drains that wait: what is queued meanwhile is due at once.
    pub drains: AtomicUsize,
    /// Uploads being aborted and publications being told of: drain() waits for them.
    pub chores: AtomicUsize,
    /// What an earlier run left and that belongs into its directory, until it is asked for.
    pub recovered: Mutex<Vec<Arc<Entry>>>,
    /// Deletions that an earlier run put off, until they are asked for.
    pub deletions: Mutex<Vec<Journalled<Deletion>>>,
    /// Renames of directories that an earlier run did not come to end.
    pub renames: Renames,
    /// Metadata that an earlier run did not come to send, until it is asked for.
    pub metadata: Mutex<Vec<Journalled<MetadataChange>>>,
    /// What an earlier run left for buckets that cannot be reached.
    pub stranded: Mutex<BTreeMap<u64, Stranded>>,
    /// Woken when all that waits is to go at once.
    pub hurried: Notify,
    /// Files that were published beside somebody else's change, the newest last.
    pub conflicts: Mutex<VecDeque<ConflictCopy>>,
    pub borrowers: Borrowers,
}

impl Shared {
    pub fn new(config: SpoolConfig, spool: Spool, hooks: Arc<dyn Hooks>) -> (Arc<Shared>, mpsc::UnboundedReceiver<Message>) {
        let (inbox, receiver) = mpsc::unbounded_channel();
        let (deletions, metadata, renames) = (spool.put_off(), spool.put_off(), Renames::new(spool.put_off()));
        let shared = Shared {
            memory: Arc::new(Semaphore::new(transfer::chunks_in_memory(config.memory_limit))),
            config,
            hooks,
            spool,
            meter: Meter::new(),
            copies: Copies::new(),
            deletes: Deletes::default(),
            changed: Notify::new(),
            publications: AtomicU64::new(0),
            inbox,
            entries: Mutex::new(HashMap::new()),
            // Numbers are never those of an earlier run's files, which stay where they are.
            next_id: AtomicU64::new(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_micros() as u64)),
            used: AtomicU64::new(0),
            leaving: AtomicUsize::new(0),
            credit: AtomicI64::new(0),
            unconditional: AtomicBool::new(false),
            opaque_parts: AtomicBool::new(false),
            rights: Rights::default(),
            drains: AtomicUsize::new(0),
            chores: AtomicUsize::new(0),
            recovered: Mutex::default(),
            deletions: Mutex::new(deletions),
            renames,
            metadata: Mutex::new(metadata),
            stranded: Mutex::default(),
            hurried: Notify::new(),
            conflicts: Mutex::default(),
            borrowers: Borrowers::default(),
        };
        (Arc::new(shared), receiver)
    }

    /// A publication or a delete is queued: `write_back`, and the credentials may do it.
    pub async fn queues(&self, store: &dyn Store, key: &str) -> bool {
        !self.config.write_back.is_zero() && self.rights.may_write(store, key).await
    }

    /// Writes down what is put off.
    pub async fn journal<T: PutOff>(&self, what: T) -> Result<Journalled<T>, Error> {
        let path = self.spool.record(self.next_number()).with_extension(T::EXTENSION);
        Journalled::write(self.spool.disk.clone(), path, what).await
    }

    /// A number that no other entry has, greater than those before.
    pub fn next_number(&self) -> u64 {
        self.next_id.fetch_add(1, Relaxed)
    }

    /// Tells the uploader. It lives as long as the runtime; after that nothing is left to be told.
    pub fn send(&self, message: Message) {
        let _ = self.inbox.send(message);
    }

    pub fn entry(&self, id: u64) -> Option<Arc<Entry>> {
        self.entries.lock().get(&id).cloned()
    }

    pub fn entries(&self) -> Vec<Arc<Entry>> {
        self.entries.lock().values().cloned().collect()
    }

    fn insert(&self, entry: &Arc<Entry>) {
        self.entries.lock().insert(entry.id, entry.clone());
    }

    /// Forgets an entry and gives its space back.
    pub fn remove(&self, entry: &Entry) {
        self.leaving.fetch_add(1, Relaxed);
        self.used.fetch_sub(entry.charged.lock().take().unwrap_or_default(), Relaxed);
        self.credit.store(0, Relaxed);
        self.entries.lock().remove(&entry.id);
        self.changed.notify_waiters();
    }

    /// The file of an entry that was removed is gone, or the cache's.
    pub fn left(&self) {
        self.leaving.fetch_sub(1, Relaxed);
        self.credit.store(0, Relaxed);
        self.changed.notify_waiters();
    }

    /// Has what gives way to the spool make room on its disk. False where the spool's own size is in the way.
    async fn others_make_room(&self, bytes: u64) -> bool {
        if self.used.load(Relaxed).saturating_add(bytes) > self.config.max_size {
            return false;
        }
        let hooks = self.hooks.clone();
        let made = blocking(move || {
            hooks.make_room(bytes);
            Ok(())
        });
        made.await.is_ok()
    }

    /// Takes room for `bytes` more, where there is some at once.
    pub async fn has_room(&self, bytes: u64) -> bool {
        self.fits(bytes) || self.others_make_room(bytes).await && self.fits(bytes)
    }

    /// Makes room for `bytes` more of `entry`. Blocks only while other entries are on their way to S3, which frees space.
    pub async fn reserve(&self, entry: &Entry, bytes: u64) -> Result<(), Error> {
        let mut handing_over = None;
        let mut started = HashSet::new();
        loop {
            let changed = self.changed.notified();
            if self.has_room(bytes).await {
                return Ok(());
            }
            let (mut frees, mut published) = (false, self.leaving.load(Relaxed) > 0);
            for other in self.entries().into_iter().filter(|other| other.id != entry.id) {
                let intent = other.intent.lock();
                frees |= intent.phase.frees();
                // Queued for later: its delay must not be what is waited for.
                if intent.phase == Phase::Sealed && started.insert((other.id, other.content.lock().generation)) {
                    self.send(Message::Due { id: other.id, generation: None });
                }
                // Published a moment ago: its spool file is about to leave, unless somebody keeps it open for writing.
                published |= intent.published.is_some();
            }
            // One that left since the first look is no longer among them.
            if self.fits(bytes) {
                return Ok(());
            }
            let limit = self.config.close_timeout;
            let since = self.meter.seen(limit);
            if frees {
                handing_over = None;
                if tokio::time::timeout(limit, changed).await.is_err() && self.meter.seen(limit) <= since {
                    return Err(Error::NoSpace);
                }
                continue;
            }
            let until = *handing_over.get_or_insert_with(|| tokio::time::Instant::now() + HANDING_OVER);
            if !published || tokio::time::timeout_at(until, changed).await.is_err() {
                return Err(Error::NoSpace);
            }
        }
    }

    fn fits(&self, bytes: u64) -> bool {
        if self.used.load(Relaxed).saturating_add(bytes) > self.config.max_size {
            return false;
        }
        if self.credit.fetch_sub(bytes as i64, Relaxed) >= bytes as i64 {
            return true;
        }
        let free = self.spool.free().saturating_sub(self.config.min_free_space);
        // The less there is, the sooner it is looked at again: we are not the only ones who take it.
        self.credit.store((free.saturating_sub(bytes) / 8).min(LOOK_EVERY) as i64, Relaxed);
        free >= bytes
    }

    /// True while the key is being published: its metadata copies wait.
    pub fn is_publishing(&self, bucket: &str, key: &str) -> bool {
        self.entries.lock().values().any(|entry| {
            let intent = entry.intent.lock();
            intent.phase.frees() && intent.target.key == key && intent.target.store.bucket() == bucket
        })
    }

    /// How many entries are being sent while they are written: they share the allowance.
    pub fn streams(&self) -> usize {
        self.entries.lock().values().filter(|entry| entry.in_flight.load(Relaxed) > 0).count()
    }
}

/// Whether an entry has a record on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Recorded {
    #[default]
    Not,
    /// A killed process leaves it.
    Once,
    /// A power cut leaves it.
    Durably,
}

/// One staged file.
pub(crate) struct Entry {
    pub id: u64,
    pub shared: Arc<Shared>,
    pub file: Arc<SpoolFile>,
    pub data: PathBuf,
    pub record: PathBuf,
    /// Held while the spool file changes, and while a snapshot must stand still.
    pub writer: Arc<tokio::sync::Mutex<()>>,
    pub intent: Mutex<Intent>,
    pub content: Mutex<Content>,
    /// Part ranges, by number.
    pub grid: PartPlan,
    /// Sums of what was written.
    pub rolling: Mutex<Rolling>,
    /// Somebody has seen to it that there is a record.
    pub begun: AtomicBool,
    /// How often the store refused this publication though no object stood in its way.
    pub refusals: AtomicU32,
    /// One record is written at a time.
    pub recorded: tokio::sync::Mutex<Recorded>,
    /// Bytes of the disk that its record takes.
    record_taken: AtomicU64,
    /// Bytes of this entry counted in [`Shared::used`].
    charged: Mutex<Option<u64>>,
    /// Bytes given to part transfers and not handed to a socket yet.
    pub in_flight: AtomicU64,
    /// Bytes handed to sockets since the publication or upload began.
    pub sent: AtomicU64,
    /// How fast they are handed over.
    pub speed: Speed,
    /// The most bytes that a transfer handed over without success, by where they begin.
    pub handed: Mutex<HashMap<u64, u64>>,
    /// Who waits for a PutObject to let go of the file.
    pub wanted: AtomicU32,
    /// When it was last seen alive.
    pub life: Mutex<Life>,
    /// When its content changed last.
    pub changed: Mutex<Instant>,
    /// Deletes of the versions that it replaces: on record until its content is, so that a crash before undeletes nothing.
    pub replaces: Mutex<Vec<Journalled<Deletion>>>,
}

impl Entry {
    pub async fn create(
        shared: &Arc<Shared>,
        target: Target,
        expect: Expect,
        base: Option<Base>,
        attributes: Attributes,
    ) -> Result<Arc<Entry>, Error> {
        let id = shared.next_number();
        let data = shared.spool.data(id);
        let (disk, path) = (shared.spool.disk.clone(), data.clone());
        let size = base.as_ref().map(|b| b.size);
        let file = blocking(move || {
            let file = disk.create(&path)?;
            if let Some(size) = size.filter(|&size| size > 0) {
                file.set_len(size)?;
            }
            Ok(file)
        })
        .await?;
        let mut intent = Intent::new(target, expect, base, attributes);
        intent.order = id;
        let entry = Self::build(shared, id, file, data, shared.spool.record(id), Content::new(size), intent);
        Ok(entry)
    }

    /// An entry of a file that is there.
    pub fn build(
        shared: &Arc<Shared>,
        id: u64,
        file: SpoolFile,
        data: PathBuf,
        record: PathBuf,
        content: Content,
        intent: Intent,
    ) -> Arc<Entry> {
        let recovered = intent.recovered;
        let grid = PartPlan::new(shared.config.part_size, intent.target.store.capabilities().max_object_size);
        let entry = Arc::new(Entry {
            id,
            shared: shared.clone(),
            file: Arc::new(file),
            data,
            record,
            writer: Arc::default(),
            intent: Mutex::new(intent),
            content: Mutex::new(content),
            grid,
            rolling: Mutex::new(Rolling::new(grid)),
            begun: AtomicBool::new(recovered),
            refusals: AtomicU32::new(0),
            // What an earlier run wrote may be durable.
            recorded: tokio::sync::Mutex::new(if recovered { Recorded::Durably } else { Recorded::Not }),
            record_taken: AtomicU64::new(if recovered { BLOCK } else { 0 }),
            charged: Mutex::new(Some(0)),
            in_flight: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            speed: Speed::default(),
            handed: Mutex::default(),
            wanted: AtomicU32::new(0),
            life: Mutex::new(Life::default()),
            changed: Mutex::new(Instant::now()),
            replaces: Mutex::default(),
        });
        shared.insert(&entry);
        entry.charge();
        entry
    }

    /// Makes room for a write to `range`, and for the record that the first one brings.
    pub async fn make_room(&self, range: Range<u64>) -> Result<(), Error> {
        let record = if self.begun.load(Relaxed) { 0 } else { BLOCK };
        let bytes = if range.start >= self.content.lock().size {
            whole_blocks(range)
        } else {
            let file = self.file.clone();
            blocking(move || Ok(file.holes(range))).await?
        };
        if bytes + record > 0 { self.shared.reserve(self, bytes + record).await } else { Ok(()) }
    }

    /// Brings the spool's accounting up to what the entry takes.
    pub fn charge(&self) {
        let mut charged = self.charged.lock();
        // What has left the spool takes nothing of it, whoever still writes.
        let Some(before) = *charged else { return };
        let now = self.file.taken() + self.record_taken.load(Relaxed);
        *charged = Some(now);
        if now >= before {
            self.shared.used.fetch_add(now - before, Relaxed);
        } else {
            self.shared.used.fetch_sub(before - now, Relaxed);
            self.shared.changed.notify_waiters();
        }
    }

    /// It is published after `delay`, unless its content changes before.
    pub fn publish_after(&self, delay: Duration) {
        let generation = self.content.lock().generation;
        self.shared.send(Message::Later { id: self.id, generation, delay });
    }

    /// Writes the record as things stand. `sync`: it survives a power cut once this returns. One that would replace a durable
    /// record always does: else a cut could leave neither.
    pub async fn persist(&self, sync: bool) -> Result<(), Error> {
        self.write_record(sync, None).await
    }

    /// Writes the record with what was appended at `at`, where `content` has it.
    pub async fn persist_moved(&self, content: &Content, at: u64) -> Result<(), Error> {
        self.write_record(false, Some((content, at))).await
    }

    async fn write_record(&self, sync: bool, moved: Option<(&Content, u64)>) -> Result<(), Error> {
        let mut recorded = self.recorded.lock().await;
        self.journal_aborts().await;
        let record = {
            let intent = self.intent.lock();
            if intent.discarded || intent.withheld {
                return Ok(());
            }
            let now = self.content.lock();
            let (content, appended) = moved.map_or((&*now, intent.appended), |(content, at)| (content, Some(at)));
            Record {
                version: Record::current(),
                phase: if intent.phase.frees() && !intent.sealed { Phase::Writing } else { intent.phase },
                order: intent.order,
                bucket: intent.target.store.bucket().to_owned(),
                key: intent.target.key.clone(),
                expect: intent.expect.clone(),
                attributes: intent.attributes.clone(),
                size: content.size,
                local: content.local.clone(),
                dirty: content.dirty.clone(),
                base_len: content.base_len,
                base: intent.base.as_ref().map(|b| BaseRecord {
                    bucket: b.bucket.clone(),
                    key: b.key.clone(),
                    etag: b.etag.clone(),
                    size: b.size,
                    version_id: b.version_id.clone(),
                }),
                copied: content.base_size.is_none(),
                appended,
                held: intent.held,
                guess: intent.guess.clone(),
                upload: intent.upload.clone(),
                poisoned: intent.poisoned,
                reason: intent.reason.clone(),
                completing: intent.completing.as_ref().map(|(parts, _)| parts.clone()),
                completes: intent.completing.as_ref().is_some_and(|(_, generation)| *generation == content.generation),
                sent: intent.sent.iter().map(|(sent, generation)| (sent.clone(), *generation == content.generation)).collect(),
                fetches: intent.fetches,
                durable: intent.durable == Some(content.generation),
                boot: self.shared.spool.disk.boot.to_string(),
            }
        };
        let sync = sync || *recorded == Recorded::Durably;
        let (disk, path) = (self.shared.spool.disk.clone(), self.record.clone());
        let written = blocking(move || {
            let text = record.text()?;
            disk.replace(&path, text.as_bytes(), sync)?;
            Ok(text.len() as u64)
        });
        self.record_taken.store(whole_blocks(0..written.await?), Relaxed);
        *recorded = if sync { Recorded::Durably } else { Recorded::Once };
        self.charge();
        Ok(())
    }

    /// Before the content changes: it is no longer what is in S3 or what was sealed. What a crash leaves of a sealed entry from
    /// here on may be torn, so its record says that it is being written. Call it with `writer` held.
    pub async fn unseal(&self) -> Result<(), Error> {
        let durable = {
            let mut intent = self.intent.lock();
            if intent.phase == Phase::Published {
                intent.phase = Phase::Writing;
            }
            if !std::mem::take(&mut intent.sealed) {
                return Ok(());
            }
            if intent.phase == Phase::Sealed {
                intent.phase = Phase::Writing;
            }
            intent.durable.is_some()
        };
        self.persist(durable).await
    }

    /// fsyncs the spool file, then the record.
    pub async fn persist_durably(&self) -> Result<(), Error> {
        {
            let _writer = self.turn().await;
            let generation = self.content.lock().generation;
            let file = self.file.clone();
            blocking(move || file.sync()).await?;
            self.intent.lock().durable = Some(generation);
        }
        self.persist(true).await
    }

    /// Parts are sent while it is written: not under a temporary name whose final one is not known, and not with
    /// `write_back`, where several rewrites make one upload.
    fn streams(&self) -> bool {
        let intent = self.intent.lock();
        self.shared.config.write_back.is_zero() && (!intent.held || intent.guess.is_some()) && !intent.poisoned && intent.failed.is_none()
    }

    /// True when a part lies wholly behind the sequential frontier and was not announced yet.
    pub fn parts_ready(&self) -> bool {
        let (frontier, next) = {
            let content = self.content.lock();
            (content.frontier(), content.next_part)
        };
        frontier >= self.grid.range(next).end && self.streams()
    }

    /// Announces the parts that became complete.
    pub fn take_ready(&self) -> Vec<Piece> {
        let mut ready = Vec::new();
        if self.streams() {
            let mut content = self.content.lock();
            // Cut below what was announced: from there on it is sent again.
            content.next_part = content.next_part.min(self.grid.number_of(content.frontier()));
            while self.grid.range(content.next_part).end <= content.frontier() {
                let piece = Piece { number: content.next_part, range: self.grid.range(content.next_part), how: How::Upload };
                content.waiting.insert(piece.range.clone());
                content.next_part += 1;
                ready.push(piece);
            }
        }
        ready
    }

    /// Bytes that could travel and have not been handed to a socket, the part being filled among them, and the size of
    /// that part. 0 while no part is complete: then nothing can be waited for.
    pub fn behind(&self) -> (u64, u64) {
        let flying = self.in_flight.load(Relaxed);
        let content = self.content.lock();
        let cell = self.grid.range(content.next_part);
        let waiting = content.waiting.total();
        let filling = content.frontier().saturating_sub(cell.start);
        let behind = if waiting + flying == 0 { 0 } else { waiting + flying + filling };
        (behind, cell.end - cell.start)
    }

    /// The content is safe, or is wanted no more: what it replaces is not to be deleted by itself.
    pub async fn forget_replaced(&self) {
        let replaced = std::mem::take(&mut *self.replaces.lock());
        if !replaced.is_empty() {
            Journalled::forget_all(replaced).await;
        }
    }

    /// `bucket/key`, for messages.
    pub fn name(&self) -> String {
        let intent = self.intent.lock();
        format!("{}/{}", intent.target.store.bucket(), intent.target.key)
    }

    /// Removes the record, if one was written.
    pub async fn unrecord(&self) {
        let mut recorded = self.recorded.lock().await;
        self.journal_aborts().await;
        let was = std::mem::take(&mut *recorded);
        if was != Recorded::Not {
            let (disk, path) = (self.shared.spool.disk.clone(), self.record.clone());
            // One that came back would publish an old content over what has the name by then.
            if let Err(error) = blocking(move || disk.remove(&path, was == Recorded::Durably)).await {
                tracing::warn!("{}: {error}", self.record.display());
            }
        }
    }
}
