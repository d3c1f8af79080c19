//! The steps of a publication as tasks, and how entries leave the spool.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use tokio::sync::oneshot;

use super::content::Content;
use super::entry::{Entry, Shared};
use super::intent::Intent;
use super::manifest::{Phase, Record, UploadRecord};
use super::plan::{self, How, Input, Plan};
use super::recover::Stranded;
use super::spool::blocking;
use super::state::{Action, Goal, SentPart, Slot, State, Upload};
use super::transfer::{self, Trouble};
use super::uploader::Message;
use super::{Attributes, Base, BaseError, BaseReader, DrainReport, Error, Expect, Published, Target};
use super::{behind, commit, copied};
use crate::failpoint;
use crate::s3::{Condition, ETag, ErrorKind, GetObject, GetRequest, ObjectHead, ObjectHeaders, PutOptions, S3Error, Store};

/// What one publication is about, as it stood when it was sealed.
pub(crate) struct Snapshot {
    pub target: Target,
    pub expect: Expect,
    pub base: Option<Base>,
    pub size: u64,
    /// Counts its changes.
    pub generation: u64,
    /// No byte comes from the base.
    pub whole: bool,
    /// The base is what somebody else wrote since the last publication.
    pub rebased: bool,
    /// When it was sealed.
    pub began: SystemTime,
}

/// What a task came to.
pub(crate) enum Outcome {
    Prepared {
        snapshot: Arc<Snapshot>,
        plan: Plan,
        clean: Vec<bool>,
    },
    Created {
        target: Target,
        id: String,
    },
    Sent(SentPart),
    Checked(bool),
    /// Nobody waits for this publication, and the file is being written again: its next close publishes.
    Overtaken,
    Judged(Verdict),
    Trouble(Trouble),
}

/// What PutObject or CompleteMultipartUpload came to.
pub(crate) enum Verdict {
    Published(Box<Published>),
    /// Every part again under a new upload.
    Restart,
    /// Under another key, beside theirs.
    Elsewhere(String),
    /// What it is made of has changed: every part again under a new upload, the old one is aborted.
    Anew,
    /// What it is conditional on has changed: the same again.
    Retry,
    /// See [`Outcome::Overtaken`].
    Overtaken,
    /// Refused for good.
    Refused(Error),
}

/// What a task needs to know of its job.
pub(crate) struct Context {
    pub snapshot: Option<Arc<Snapshot>>,
    /// Where the open upload is, and its id.
    pub upload: Option<Target>,
    pub id: Option<String>,
    pub goal: Goal,
    pub doubt: bool,
    /// A close waits for it.
    pub awaited: bool,
    /// The parts to complete with.
    pub slots: BTreeMap<u32, Slot>,
}

impl Context {
    /// What of it the state tells.
    pub fn of(state: &State, action: &Action) -> Self {
        let id = match &state.upload {
            Upload::Open(id) => Some(id.clone()),
            Upload::None | Upload::Creating => None,
        };
        let slots = if matches!(action, Action::Complete { .. }) { state.slots.clone() } else { BTreeMap::new() };
        Self { snapshot: None, upload: None, id, goal: state.goal, doubt: false, awaited: false, slots }
    }
}

/// Runs one action to its outcome.
pub(crate) async fn perform(entry: &Arc<Entry>, context: Context, action: &Action) -> Outcome {
    let Context { doubt, awaited, goal, .. } = context;
    let result = match (action, context.snapshot) {
        (Action::Prepare { .. }, _) => prepare(entry, goal, context.id.is_some(), awaited).await,
        (Action::Create { .. }, _) => create(entry).await,
        (Action::Send { piece, .. }, snapshot) => {
            let (Some(id), Some(target)) = (context.id, context.upload) else { return Outcome::Judged(Verdict::Restart) };
            let base = snapshot.as_ref().and_then(|snapshot| snapshot.base.as_ref());
            let sent = transfer::part(entry, &target, &id, base, piece).await.map(Outcome::Sent);
            or_without_base(entry, snapshot.as_deref(), sent).await
        }
        (Action::Check { .. }, Some(snapshot)) => Ok(check(entry, &snapshot, awaited).await),
        (Action::Put { .. }, Some(snapshot)) => {
            let put = commit::put(entry, &snapshot, doubt, awaited).await.map(Outcome::Judged);
            or_without_base(entry, Some(&snapshot), put).await
        }
        (Action::Complete { .. }, Some(snapshot)) => match (context.id, context.upload) {
            (Some(id), Some(target)) => commit::complete(entry, &snapshot, &target, &id, &context.slots, doubt).await.map(Outcome::Judged),
            _ => Ok(Outcome::Judged(Verdict::Restart)),
        },
        _ => Ok(Outcome::Judged(Verdict::Retry)),
    };
    result.unwrap_or_else(Outcome::Trouble)
}

/// How the content as it is now is sent. `multipart`: not as one PutObject.
pub(crate) fn plan_of(entry: &Entry, intent: &Intent, content: &Content, multipart: bool) -> Plan {
    let input = Input {
        size: content.size,
        dirty: &content.dirty,
        base_len: content.base_len,
        copyable: intent.base.is_some() && content.base_len > 0 && !intent.fetches,
        multipart,
    };
    plan::plan(&input, &entry.grid)
}

/// What becomes of a transfer that lacks bytes of the base.
async fn or_without_base(entry: &Arc<Entry>, snapshot: Option<&Snapshot>, result: Result<Outcome, Trouble>) -> Result<Outcome, Trouble> {
    match (result, snapshot) {
        (Err(Trouble::Anew), _) => Ok(Outcome::Judged(Verdict::Anew)),
        (Err(Trouble::Stale), Some(snapshot)) => commit::without_base(entry, snapshot).await.map(Outcome::Judged),
        (other, _) => other,
    }
}

/// Seals the content and plans what is sent.
async fn prepare(entry: &Arc<Entry>, goal: Goal, open: bool, awaited: bool) -> Result<Outcome, Trouble> {
    let target = entry.intent.lock().target.clone();
    behind::go_on(entry).await?;
    // A metadata copy in between would change the ETag that the publication is conditional on.
    entry.shared.copies.settle(target.store.bucket(), &target.key).await;
    copied::release(&entry.shared, target.store.bucket(), &target.key, Some(entry.id)).await;
    // A delete that came after it would hit the new object where the store knows no conditions.
    if let Some(deletion) = entry.shared.deletes.take(target.store.bucket(), &target.key).await {
        let mut intent = entry.intent.lock();
        if matches!(intent.expect, Expect::Absent | Expect::NewFile) {
            intent.expect = deletion.what.replaced_by();
        }
        entry.replaces.lock().push(deletion);
    }
    let (snapshot, plan, clean) = {
        let _writer = entry.writer.lock().await;
        let mut intent = entry.intent.lock();
        let mut content = entry.content.lock();
        if !awaited && !intent.sealed {
            return Ok(Outcome::Overtaken);
        }
        content.seal();
        intent.sealed = true;
        let base = intent.base.clone().filter(|_| content.base_len > 0);
        // An upload of nothing has no part to complete with.
        let plan = plan_of(entry, &intent, &content, goal == Goal::Parts || open && content.size > 0);
        let mut clean = Vec::new();
        if let Plan::Parts(pieces) = &plan {
            for piece in pieces {
                // Bytes whose transfer has not begun yet will be read as they are then.
                let fresh = content.unsent.intersection(piece.range.clone()).into_iter().all(|run| content.waiting.covers(run));
                clean.push(fresh);
                if piece.how == How::Copy {
                    content.unsent.remove(piece.range.clone());
                } else if !fresh {
                    content.waiting.insert(piece.range.clone());
                }
            }
        }
        let snapshot = Snapshot {
            target: intent.target.clone(),
            expect: intent.expect.clone(),
            base,
            size: content.size,
            generation: content.generation,
            whole: content.is_whole(),
            rebased: intent.rebased,
            began: SystemTime::now(),
        };
        (snapshot, plan, clean)
    };
    if snapshot.size > snapshot.target.store.capabilities().max_object_size {
        return Err(Trouble::Local(Error::TooLarge));
    }
    if matches!(plan, Plan::Parts(_)) {
        entry.persist(false).await?;
    }
    Ok(Outcome::Prepared { snapshot: Arc::new(snapshot), plan, clean })
}

/// CreateMultipartUpload, between the record of the intent and that of the id (promise 26).
async fn create(entry: &Arc<Entry>) -> Result<Outcome, Trouble> {
    let (target, attributes, creation, plain) = {
        let mut intent = entry.intent.lock();
        let target = intent.parts_target();
        let copies = {
            let content = entry.content.lock();
            !intent.fetches && (!content.is_whole() || content.borrows())
        };
        // What had a checksum of the whole keeps one.
        let plain = copies
            && intent.base.as_ref().is_some_and(|base| base.checksum.is_none())
            && target.store.capabilities().plain_copies
            && !entry.shared.opaque_parts.load(Relaxed);
        let begun = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        intent.upload = Some(UploadRecord { key: target.key.clone(), id: None, begun, plain });
        intent.creations += 1;
        entry.handed.lock().clear();
        intent.travelled = Some(intent.attributes.clone());
        (target, intent.attributes.clone(), intent.creations, plain)
    };
    entry.persist(true).await?;
    failpoint::pass("upload-intended");
    let options = PutOptions { plain, ..options(&entry.shared, &target, &attributes) };
    let id = target.store.create_multipart(&target.key, options).await.map_err(Trouble::S3)?;
    failpoint::pass("upload-created");
    {
        let mut intent = entry.intent.lock();
        let newest = intent.creations == creation;
        if let Some(upload) = intent.upload.as_mut().filter(|_| newest) {
            upload.id = Some(id.clone());
        }
        if intent.phase == Phase::Sealed {
            intent.phase = Phase::Uploading;
        }
    }
    entry.progressed();
    // Durable before the first part: an upload with parts that nobody recorded would be taken for somebody else's.
    if let Err(error) = entry.persist(true).await {
        entry.abandon(target.store, UploadRecord::known(target.key, id));
        return Err(error.into());
    }
    failpoint::pass("upload-recorded");
    Ok(Outcome::Created { target, id })
}

/// Whether every part holds what the file holds now: no part was torn by a writer. Where nobody waits for the publication, that must be
/// what was sealed: parts that were sent later may hold the middle of a new content, or the beginning of one that was closed since.
async fn check(entry: &Arc<Entry>, snapshot: &Snapshot, awaited: bool) -> Outcome {
    let _writer = entry.writer.lock().await;
    let intent = entry.intent.lock();
    if !awaited && !intent.sealed {
        return Outcome::Overtaken;
    }
    let mut content = entry.content.lock();
    let sealed = awaited || content.generation == snapshot.generation;
    Outcome::Checked(sealed && content.verify(snapshot.size))
}

/// Headers by rule, overridden by those set on the file.
pub(crate) fn headers(shared: &Shared, bucket: &str, key: &str, attributes: &Attributes) -> ObjectHeaders {
    let rules = shared.hooks.headers(bucket, key);
    let own = attributes.headers.clone();
    ObjectHeaders {
        content_type: own.content_type.or(rules.content_type),
        cache_control: own.cache_control.or(rules.cache_control),
        content_disposition: own.content_disposition.or(rules.content_disposition),
        content_encoding: own.content_encoding.or(rules.content_encoding),
        content_language: own.content_language.or(rules.content_language),
        expires: own.expires.or(rules.expires),
        website_redirect: own.website_redirect.or(rules.website_redirect),
    }
}

/// How the object is stored, without condition and checksum.
pub(crate) fn options(shared: &Shared, target: &Target, attributes: &Attributes) -> PutOptions {
    PutOptions {
        headers: headers(shared, target.store.bucket(), &target.key, attributes),
        metadata: attributes.metadata.clone(),
        storage_class: attributes.storage_class.clone(),
        tags: attributes.tags.clone(),
        ..PutOptions::default()
    }
}

/// What the store is asked to make sure of.
pub(crate) fn condition(shared: &Shared, snapshot: &Snapshot) -> Option<Condition> {
    let capable = snapshot.target.store.capabilities().conditional_writes != Some(false) && !shared.unconditional.load(Relaxed);
    match &snapshot.expect {
        _ if !capable => None,
        Expect::Anything => None,
        Expect::Absent | Expect::NewFile => Some(Condition::Absent),
        Expect::Version(etag) => Some(Condition::Matches(etag.clone())),
    }
}

/// The published object is the base of what is written from now on. A chore is left open: the hooks are to hear of it.
pub(crate) fn settle(entry: &Arc<Entry>, published: &Published) {
    entry.shared.publications.fetch_add(1, Relaxed);
    entry.shared.chores.fetch_add(1, Relaxed);
    let queued = {
        let mut intent = entry.intent.lock();
        let mut content = entry.content.lock();
        content.published(published.size);
        intent.base = Some(Base {
            bucket: published.bucket.clone(),
            key: published.key.clone(),
            etag: published.etag.clone(),
            size: published.size,
            version_id: published.version_id.clone(),
            checksum: published.checksum,
            reader: StoreReader::of(
                intent.target.store.clone(),
                published.key.clone(),
                published.etag.clone(),
                published.version_id.clone(),
            ),
        });
        intent.expect = Expect::Version(published.etag.clone());
        intent.target.key.clone_from(&published.key);
        intent.phase = match (content.is_dirty(), intent.sealed) {
            (false, _) => Phase::Published,
            // Written and closed again while this was on its way: that is queued.
            (true, true) => Phase::Sealed,
            (true, false) => Phase::Writing,
        };
        let queued = intent.phase == Phase::Sealed;
        if !queued {
            (intent.sealed, intent.durable) = (false, None);
        }
        (intent.upload, intent.completing, intent.reason, intent.fetches) = (None, None, None, false);
        intent.rebased = false;
        intent.sent.clear();
        // What was appended meanwhile goes behind this.
        intent.appended = intent.appended.filter(|_| content.is_dirty()).map(|_| published.size);
        entry.refusals.store(0, Relaxed);
        entry.handed.lock().clear();
        intent.published = Some(published.clone());
        if let Some(key) = intent.beside.take() {
            entry.shared.kept_beside(&published.bucket, &key, &published.key);
        }
        queued
    };
    if queued {
        // What was to start its publication has found this one under way.
        entry.publish_after(entry.shared.config.write_back);
    }
    entry.charge();
}

/// Removes the record of a published entry, unless it was written to meanwhile.
pub(crate) async fn tidy(entry: &Arc<Entry>) {
    entry.forget_replaced().await;
    // From here on a writer makes a record of its own; one that wrote before is seen below.
    entry.begun.store(false, Relaxed);
    if entry.content.lock().is_dirty() {
        entry.begun.store(true, Relaxed);
        if let Err(error) = entry.persist(false).await {
            tracing::warn!("{}: {error}", entry.record.display());
        }
    } else {
        entry.unrecord().await;
    }
}

/// Removes what an entry has on disk.
pub(crate) async fn erase(entry: &Arc<Entry>) {
    entry.forget_replaced().await;
    let (store, begun) = {
        let mut intent = entry.intent.lock();
        (intent.target.store.clone(), intent.upload.take())
    };
    // One that is being created, or whose answer was lost.
    if let Some(upload) = begun {
        entry.abandon(store, upload);
    }
    entry.unrecord().await;
    let (disk, path) = (entry.shared.spool.disk.clone(), entry.data.clone());
    // Bytes without a record are nobody's: they may come back.
    if let Err(error) = blocking(move || disk.remove(&path, false)).await {
        tracing::warn!("{}: {error}", entry.data.display());
    }
    entry.shared.left();
}

/// See [`super::Staged::discard`].
pub(crate) async fn discard(entry: &Arc<Entry>) {
    if entry.intent.lock().discarded {
        return;
    }
    let (reply, done) = oneshot::channel();
    entry.shared.send(Message::Discard { id: entry.id, reply });
    let _ = done.await;
}

/// Throws away what was left for a bucket that could not be reached. False where there is none of this number.
pub(crate) async fn discard_stranded(shared: &Arc<Shared>, id: u64) -> bool {
    let Some(Stranded { found, .. }) = shared.stranded.lock().remove(&id) else { return false };
    let disk = shared.spool.disk.clone();
    if let Err(error) = blocking(move || found.throw_away(&disk)).await {
        tracing::warn!("{error}");
    }
    true
}

/// A whole new content is stored under the key: what could not be stored there, and came before `order`, is wanted no more
/// (promise 24).
pub(crate) async fn supersede(shared: &Arc<Shared>, bucket: &str, key: &str, order: u64) {
    for entry in shared.entries() {
        let superseded = {
            let Intent { phase, order: its, target, .. } = &*entry.intent.lock();
            *phase == Phase::Parked && *its < order && target.key == key && target.store.bucket() == bucket
        };
        if superseded {
            discard(&entry).await;
        }
    }
    let is_superseded = |Record { phase, order: its, bucket: of, key: name, .. }: &Record| {
        *phase != Phase::Writing && *its < order && name == key && of == bucket
    };
    let stranded: Vec<u64> =
        shared.stranded.lock().iter().filter(|(_, stranded)| is_superseded(&stranded.found.record)).map(|(id, _)| *id).collect();
    for id in stranded {
        discard_stranded(shared, id).await;
    }
}

/// See [`super::Staged::retire`].
pub(crate) async fn retire(entry: &Arc<Entry>) -> Option<PathBuf> {
    let whole = {
        let mut intent = entry.intent.lock();
        let content = entry.content.lock();
        if intent.discarded {
            return None;
        }
        if content.is_dirty() {
            // Queued or parked: it goes when it is published.
            intent.retired = true;
            return None;
        }
        intent.discarded = true;
        content.local.covers(0..content.size)
    };
    entry.shared.remove(entry);
    entry.shared.send(Message::Forget(entry.id));
    if !whole {
        erase(entry).await;
        return None;
    }
    entry.forget_replaced().await;
    entry.unrecord().await;
    entry.shared.left();
    Some(entry.data.clone())
}

/// See [`super::Writeback::drain`].
pub(crate) async fn drain(shared: &Arc<Shared>, deadline: Duration) -> DrainReport {
    let before = shared.publications.load(Relaxed);
    let began = Instant::now();
    let _hurry = Hurry::new(shared);
    withdraw(shared, |phase, held| held && !phase.frees());
    loop {
        let changed = shared.changed.notified();
        let sought = shared.stranded.lock().values().any(|stranded| stranded.sought);
        let pending = sought || shared.entries().iter().any(|entry| entry.intent.lock().phase.frees());
        if !pending && shared.copies.len() == 0 && shared.deletes.len() == 0 && shared.chores.load(Relaxed) == 0 {
            break;
        }
        if shared.meter.progress().max(began).elapsed() > deadline {
            break;
        }
        let _ = tokio::time::timeout(Duration::from_millis(100), changed).await;
    }
    DrainReport { published: shared.publications.load(Relaxed) - before, left: shared.status() }
}

/// What is queued or removed is due at once for as long as this lives.
struct Hurry(Arc<Shared>);

impl Hurry {
    fn new(shared: &Arc<Shared>) -> Self {
        // Before the look at what is queued: what comes after that look finds it.
        shared.drains.fetch_add(1, Relaxed);
        shared.copies.hurry();
        shared.deletes.hurry();
        shared.hurried.notify_waiters();
        for entry in shared.entries() {
            shared.send(Message::Due { id: entry.id, generation: None });
        }
        Self(shared.clone())
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.deletes.hurry_no_more();
        self.0.drains.fetch_sub(1, Relaxed);
    }
}

/// Aborts uploads that this run does not complete.
fn withdraw(shared: &Arc<Shared>, which: impl Fn(Phase, bool) -> bool) {
    for entry in shared.entries() {
        let intent = entry.intent.lock();
        if intent.upload.is_some() && which(intent.phase, intent.held) {
            shared.chores.fetch_add(1, Relaxed);
            shared.send(Message::Withdraw(entry.id));
        }
    }
}

/// Reads a published object as a base: needed only where the spool does not hold all of it.
pub(crate) struct StoreReader {
    store: Arc<dyn Store>,
    key: String,
    etag: ETag,
    version_id: Option<String>,
}

impl StoreReader {
    /// Of this version.
    pub fn of(store: Arc<dyn Store>, key: String, etag: ETag, version_id: Option<String>) -> Arc<Self> {
        Arc::new(Self { store, key, etag, version_id })
    }

    /// The object that a HEAD told of, as a base.
    pub fn base(target: &Target, head: &ObjectHead) -> Base {
        let Target { store, key } = target;
        Base {
            bucket: store.bucket().to_owned(),
            key: key.clone(),
            etag: head.etag.clone(),
            size: head.size,
            version_id: head.version_id.clone(),
            checksum: head.checksum,
            reader: Self::of(store.clone(), key.clone(), head.etag.clone(), head.version_id.clone()),
        }
    }

    async fn get(&self, range: Range<u64>, version_id: Option<String>) -> Result<GetObject, BaseError> {
        let request = GetRequest { range: Some(range), if_match: Some(self.etag.clone()), version_id };
        self.store.get(&self.key, request).await.map_err(stale_or)
    }
}

fn stale_or(error: S3Error) -> BaseError {
    match error.kind {
        ErrorKind::PreconditionFailed | ErrorKind::NoSuchKey => BaseError::Stale,
        _ => BaseError::S3(error),
    }
}

#[async_trait]
impl BaseReader for StoreReader {
    async fn read(&self, offset: u64, len: usize, _until: u64) -> Result<Bytes, BaseError> {
        let range = offset..offset + len as u64;
        let object = match self.get(range.clone(), None).await {
            // Replaced, but a versioned bucket still has it. Asked for only now: reading by version needs a right of its own.
            Err(BaseError::Stale) if self.version_id.is_some() => match self.get(range, self.version_id.clone()).await {
                Err(BaseError::S3(error)) if error.kind == ErrorKind::AccessDenied => Err(BaseError::Stale),
                other => other,
            },
            other => other,
        }?;
        let bytes = object.body.try_fold(BytesMut::with_capacity(len), |mut all, chunk| async move {
            all.extend_from_slice(&chunk);
            Ok(all)
        });
        bytes.await.map(BytesMut::freeze).map_err(stale_or)
    }
}
