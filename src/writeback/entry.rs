//! What all parts of write-back share: the mount's state, and one entry a staged file.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use super::content::Content;
use super::journal::{Deletion, Journalled, MetadataChange, PutOff};
use super::manifest::{BaseRecord, Phase, Record, UploadRecord, boot_id};
use super::metacopy::Copies;
use super::pace::Meter;
use super::plan::{How, Piece};
use super::recover::Stranded;
use super::spool::{Spool, blocking};
use super::uploader::Message;
use super::{Attributes, Base, ConflictCopy, Error, Expect, Guess, Hooks, Published, SpoolConfig, Target};
use crate::s3::Part;
use crate::s3::multipart::PartPlan;

/// How long a published file may take to leave the spool before a writer who waits for its space is refused.
const HANDING_OVER: Duration = Duration::from_secs(2);

/// How many bytes are reserved between looks at the disk's free space.
const LOOK_EVERY: u64 = 32 << 20;

/// The state of one mount's write-back.
pub(crate) struct Shared {
    pub config: SpoolConfig,
    pub hooks: Arc<dyn Hooks>,
    pub spool: Spool,
    pub meter: Meter,
    pub copies: Copies,
    /// Woken when an entry leaves or ends a publication.
    pub changed: Notify,
    /// Publications that ended well.
    pub publications: AtomicU64,
    inbox: mpsc::UnboundedSender<Message>,
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    pub next_id: AtomicU64,
    /// Bytes that spool files hold.
    used: AtomicU64,
    /// Bytes that may still be taken before the disk is looked at again.
    credit: AtomicI64,
    pub boot: String,
    /// The store was found not to know conditional writes.
    pub unconditional: AtomicBool,
    /// Uploads being aborted and publications being told of: drain() waits for them.
    pub chores: AtomicUsize,
    /// What an earlier run left and that belongs into its directory, until it is asked for.
    pub recovered: Mutex<Vec<Arc<Entry>>>,
    /// Deletions that an earlier run put off, until they are asked for.
    pub deletions: Mutex<Vec<Journalled<Deletion>>>,
    /// Metadata that an earlier run did not come to send, until it is asked for.
    pub metadata: Mutex<Vec<Journalled<MetadataChange>>>,
    /// What an earlier run left for buckets that cannot be reached.
    pub stranded: Mutex<BTreeMap<u64, Stranded>>,
    /// Files that were published beside somebody else's change, the newest last.
    pub conflicts: Mutex<VecDeque<ConflictCopy>>,
}

impl Shared {
    pub fn new(config: SpoolConfig, spool: Spool, hooks: Arc<dyn Hooks>) -> (Arc<Shared>, mpsc::UnboundedReceiver<Message>) {
        let (inbox, receiver) = mpsc::unbounded_channel();
        let (deletions, metadata) = (spool.put_off(), spool.put_off());
        let shared = Shared {
            config,
            hooks,
            spool,
            meter: Meter::new(),
            copies: Copies::new(),
            changed: Notify::new(),
            publications: AtomicU64::new(0),
            inbox,
            entries: Mutex::new(HashMap::new()),
            // Numbers are never those of an earlier run's files, which stay where they are.
            next_id: AtomicU64::new(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_micros() as u64)),
            used: AtomicU64::new(0),
            credit: AtomicI64::new(0),
            boot: boot_id(),
            unconditional: AtomicBool::new(false),
            chores: AtomicUsize::new(0),
            recovered: Mutex::default(),
            deletions: Mutex::new(deletions),
            metadata: Mutex::new(metadata),
            stranded: Mutex::default(),
            conflicts: Mutex::default(),
        };
        (Arc::new(shared), receiver)
    }

    /// A new file for [`Journalled`].
    pub fn journal_path<T: PutOff>(&self) -> PathBuf {
        self.spool.record(self.next_id.fetch_add(1, Relaxed)).with_extension(T::EXTENSION)
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
        // Space first: who finds the entry gone finds its space free.
        self.used.fetch_sub(entry.charged.swap(0, Relaxed), Relaxed);
        self.credit.store(0, Relaxed);
        self.entries.lock().remove(&entry.id);
        self.changed.notify_waiters();
    }

    /// Makes room for `bytes` more of `entry`. Blocks only while other entries are on their way to S3, which frees space.
    pub async fn reserve(&self, entry: &Entry, bytes: u64) -> Result<(), Error> {
        let mut handing_over = None;
        loop {
            let changed = self.changed.notified();
            if self.fits(bytes) {
                return Ok(());
            }
            let (mut frees, mut published) = (false, false);
            for other in self.entries().into_iter().filter(|other| other.id != entry.id) {
                let intent = other.intent.lock();
                frees |= intent.phase.frees();
                // Published a moment ago: its spool file is about to leave, unless somebody keeps it open for writing.
                published |= intent.published.is_some();
            }
            // One that left since the first look is no longer among them.
            if self.fits(bytes) {
                return Ok(());
            }
            let since = self.meter.progress();
            if frees {
                handing_over = None;
                if tokio::time::timeout(self.config.close_timeout, changed).await.is_err() && self.meter.progress() <= since {
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
        self.credit.store(free.saturating_sub(bytes).min(LOOK_EVERY) as i64, Relaxed);
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

impl Phase {
    /// Its end will free spool space without anybody's help.
    pub(crate) fn frees(self) -> bool {
        matches!(self, Phase::Sealed | Phase::Uploading | Phase::Completing)
    }
}

/// What is to happen with an entry's content, and what has happened.
pub(crate) struct Intent {
    pub target: Target,
    pub expect: Expect,
    pub base: Option<Base>,
    pub attributes: Attributes,
    /// What travelled with the upload that was begun or published last.
    pub travelled: Option<Attributes>,
    pub held: bool,
    /// Not worth keeping: it ends with the mount, and status is silent about it.
    pub junk: bool,
    pub guess: Option<String>,
    /// Parts go to the guessed key at any size.
    pub eager: bool,
    pub phase: Phase,
    pub upload: Option<UploadRecord>,
    pub published: Option<Published>,
    pub reason: Option<String>,
    pub poisoned: bool,
    /// A write failed because the spool could not hold it.
    pub lacked_room: bool,
    /// fsync() promised that its bytes are kept.
    pub synced: bool,
    /// Append again to what others wrote, rather than beside it.
    pub appended: bool,
    pub discarded: bool,
    /// A part sent ahead was refused for good: writers are told at once.
    pub failed: Option<Error>,
    /// Left by an earlier run.
    pub recovered: bool,
    /// Closed: it goes once it is published.
    pub retired: bool,
    /// The base cannot be copied from inside the store: its bytes are fetched.
    pub fetches: bool,
    /// The parts that Complete was sent with.
    pub completing: Option<Vec<Part>>,
    /// The content is what was sealed: nothing was written since. While it is not, a crash leaves an unfinished file.
    pub sealed: bool,
    /// The generation whose bytes were fsynced.
    pub durable: Option<u64>,
    /// The key that somebody else's change is kept under: ours goes beside it (promise 12).
    pub beside: Option<String>,
}

impl Intent {
    /// See [`super::Staged::set_held`].
    pub fn hold(&mut self, held: bool, guess: Option<Guess>) {
        self.held = held;
        self.eager = guess.as_ref().is_some_and(|guess| guess.eager);
        self.guess = guess.map(|guess| guess.key);
    }

    /// It is to be published after all.
    pub fn revive(&mut self) {
        (self.failed, self.poisoned, self.held, self.reason) = (None, false, false, None);
        self.phase = Phase::Sealed;
    }

    /// Where its parts go.
    pub fn parts_target(&self) -> Target {
        let key = self.guess.as_ref().filter(|_| self.held).unwrap_or(&self.target.key);
        Target { store: self.target.store.clone(), key: key.clone() }
    }

    pub fn new(target: Target, expect: Expect, base: Option<Base>, attributes: Attributes) -> Self {
        Self {
            target,
            expect,
            base,
            attributes,
            travelled: None,
            held: false,
            junk: false,
            guess: None,
            eager: false,
            phase: Phase::Writing,
            upload: None,
            published: None,
            reason: None,
            poisoned: false,
            lacked_room: false,
            synced: false,
            appended: false,
            discarded: false,
            failed: None,
            recovered: false,
            retired: false,
            fetches: false,
            completing: None,
            sealed: false,
            durable: None,
            beside: None,
        }
    }
}

/// One staged file.
pub(crate) struct Entry {
    pub id: u64,
    pub shared: Arc<Shared>,
    pub file: Arc<File>,
    pub data: PathBuf,
    pub record: PathBuf,
    /// Held while the spool file changes, and while a snapshot must stand still.
    pub writer: Arc<tokio::sync::Mutex<()>>,
    pub intent: Mutex<Intent>,
    pub content: Mutex<Content>,
    /// Part ranges, by number.
    pub grid: PartPlan,
    /// Somebody has seen to it that there is a record.
    pub begun: AtomicBool,
    /// How often the store refused this publication though no object stood in its way.
    pub refusals: AtomicU32,
    /// One record is written at a time; true once there is one.
    pub recorded: tokio::sync::Mutex<bool>,
    /// Bytes of this entry counted in [`Shared::used`].
    charged: AtomicU64,
    /// Bytes given to part transfers and not handed to a socket yet.
    pub in_flight: AtomicU64,
    /// Bytes handed to sockets since the publication or upload began.
    pub sent: AtomicU64,
    /// When a byte of it moved that had not moved before.
    pub progress: Mutex<Instant>,
    /// When its content changed last.
    pub changed: Mutex<Instant>,
}

impl Entry {
    pub async fn create(
        shared: &Arc<Shared>,
        target: Target,
        expect: Expect,
        base: Option<Base>,
        attributes: Attributes,
    ) -> Result<Arc<Entry>, Error> {
        let id = shared.next_id.fetch_add(1, Relaxed);
        let data = shared.spool.data(id);
        let path = data.clone();
        let size = base.as_ref().map(|b| b.size);
        let file = blocking(move || {
            let file = Spool::create_file(&path)?;
            if let Some(size) = size.filter(|&size| size > 0) {
                file.set_len(size)?;
            }
            Ok(file)
        })
        .await?;
        let intent = Intent::new(target, expect, base, attributes);
        let entry = Self::build(shared, id, file, data, shared.spool.record(id), Content::new(size), intent);
        Ok(entry)
    }

    /// An entry of a file that is there.
    pub fn build(
        shared: &Arc<Shared>,
        id: u64,
        file: File,
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
            begun: AtomicBool::new(recovered),
            refusals: AtomicU32::new(0),
            recorded: tokio::sync::Mutex::new(recovered),
            charged: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            progress: Mutex::new(Instant::now()),
            changed: Mutex::new(Instant::now()),
        });
        shared.insert(&entry);
        entry.charge();
        entry
    }

    /// Brings the spool's accounting up to what the entry holds.
    pub fn charge(&self) {
        let now = self.content.lock().local.total();
        let before = self.charged.swap(now, Relaxed);
        if now >= before {
            self.shared.used.fetch_add(now - before, Relaxed);
        } else {
            self.shared.used.fetch_sub(before - now, Relaxed);
            self.shared.changed.notify_waiters();
        }
    }

    /// A byte moved (or an answer came) that had not before.
    pub fn progressed(&self) {
        *self.progress.lock() = Instant::now();
    }

    /// How long nothing of it moved.
    pub fn stalled(&self) -> Duration {
        self.progress.lock().elapsed()
    }

    /// Writes the record as things stand. `sync`: it survives a power cut once this returns.
    pub async fn persist(&self, sync: bool) -> Result<(), Error> {
        let mut recorded = self.recorded.lock().await;
        let record = {
            let intent = self.intent.lock();
            if intent.discarded {
                return Ok(());
            }
            let content = self.content.lock();
            Record {
                version: Record::current(),
                phase: if intent.phase.frees() && !intent.sealed { Phase::Writing } else { intent.phase },
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
                held: intent.held,
                guess: intent.guess.clone(),
                upload: intent.upload.clone(),
                poisoned: intent.poisoned,
                reason: intent.reason.clone(),
                completing: intent.completing.clone(),
                durable: intent.durable == Some(content.generation),
                boot: self.shared.boot.clone(),
            }
        };
        let path = self.record.clone();
        blocking(move || record.store(&path, sync)).await?;
        *recorded = true;
        Ok(())
    }

    /// Before the content of a sealed entry changes: what a crash leaves from here on may be torn, so its record says
    /// that it is being written. Call it with `writer` held.
    pub async fn unseal(&self) -> Result<(), Error> {
        let durable = {
            let mut intent = self.intent.lock();
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
            let _writer = self.writer.lock().await;
            let generation = self.content.lock().generation;
            let file = self.file.clone();
            blocking(move || file.sync_data()).await?;
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

    /// `bucket/key`, for messages.
    pub fn name(&self) -> String {
        let intent = self.intent.lock();
        format!("{}/{}", intent.target.store.bucket(), intent.target.key)
    }

    /// Removes the record, if one was written.
    pub async fn unrecord(&self) {
        let mut recorded = self.recorded.lock().await;
        if std::mem::take(&mut *recorded) {
            let path = self.record.clone();
            if let Err(error) = blocking(move || std::fs::remove_file(path)).await {
                tracing::warn!("{}: {error}", self.record.display());
            }
        }
    }
}
