//! Metadata that came after publication: one coalesced copy of the object onto itself, in the background.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use super::entry::Shared;
use super::journal::{Journalled, MetadataChange};
use super::{Attributes, Expect, publish};
use crate::failpoint;
use crate::s3::{CopyMetadata, CopySource, ETag, ErrorKind, PutOptions, PutOutcome, S3Error, Store};

/// File managers set mode and mtime within 15 ms of each other, after RELEASE; scripts within a second.
const DELAY: Duration = Duration::from_secs(1);
/// Copies at once.
const AT_ONCE: usize = 8;
/// What of the metadata goes into tags where the object is too large for a copy.
const TAGGED: [&str; 4] = ["mtime", "mode", "uid", "gid"];

type OnDone = Box<dyn FnOnce(Result<PutOutcome, S3Error>) + Send>;

/// What is to be copied.
struct Request {
    store: Arc<dyn Store>,
    change: MetadataChange,
}

/// A copy that waits.
struct Job {
    request: Request,
    on_done: OnDone,
    record: Recorded,
}

/// Whether a crash forgets it.
enum Recorded {
    NotYet,
    /// The spool could not take it: it is sent all the same.
    Never,
    Yes(Box<Journalled<MetadataChange>>),
}

impl Job {
    /// Its record, which stays on disk until it is forgotten.
    fn take_record(&mut self) -> Option<Journalled<MetadataChange>> {
        match std::mem::replace(&mut self.record, Recorded::NotYet) {
            Recorded::Yes(journalled) => Some(*journalled),
            Recorded::NotYet | Recorded::Never => None,
        }
    }
}

#[derive(Default)]
struct Slot {
    next: Option<Job>,
    due: Option<Instant>,
    running: bool,
    /// Records of what `next` replaces: they go when it has its own.
    outdated: Vec<Journalled<MetadataChange>>,
}

impl Slot {
    fn take(&mut self) -> Option<Job> {
        let mut job = self.next.take()?;
        self.outdated.extend(job.take_record());
        Some(job)
    }
}

/// The copies that wait or run, by bucket and key.
pub(crate) struct Copies {
    slots: Mutex<Inner>,
    permits: Semaphore,
    /// Woken when one ended, was cancelled, or all are to hurry.
    changed: Notify,
}

#[derive(Default)]
struct Inner {
    slots: HashMap<(String, String), Slot>,
    hurry: bool,
}

impl Copies {
    pub fn new() -> Self {
        Self { slots: Mutex::default(), permits: Semaphore::new(AT_ONCE), changed: Notify::new() }
    }

    /// Takes what waits for the key; what runs already runs on.
    pub fn cancel(&self, bucket: &str, key: &str) -> Option<Attributes> {
        let job = self.slots.lock().slots.get_mut(&(bucket.to_owned(), key.to_owned())).and_then(Slot::take);
        self.changed.notify_waiters();
        job.map(|job| job.request.change.attributes)
    }

    /// Cancels what waits for the key, gives it, and waits for what runs: a copy that ended after a publication, a DELETE or a
    /// rename of the key would bring the old object back.
    pub async fn settle(&self, bucket: &str, key: &str) -> Option<Attributes> {
        let waited = self.cancel(bucket, key);
        self.until(|slots| !slots.iter().any(|((b, k), slot)| b == bucket && k == key && slot.running)).await;
        waited
    }

    /// Waits until nothing of the key waits that a crash would forget.
    pub async fn recorded(&self, bucket: &str, key: &str) {
        let name = (bucket.to_owned(), key.to_owned());
        let lost = |slot: &Slot| matches!(slot.next, Some(Job { record: Recorded::NotYet, .. }));
        self.until(|slots| !slots.get(&name).is_some_and(lost)).await;
    }

    /// True while a copy of the key waits or runs.
    pub fn has(&self, bucket: &str, key: &str) -> bool {
        self.slots.lock().slots.contains_key(&(bucket.to_owned(), key.to_owned()))
    }

    /// Starts what waits below a prefix and waits until all of it is done.
    pub async fn finish_below(&self, bucket: &str, prefix: &str) {
        let below = |(b, k): &(String, String)| b == bucket && k.starts_with(prefix);
        for (_, slot) in self.slots.lock().slots.iter_mut().filter(|(name, _)| below(name)) {
            slot.due = Some(Instant::now());
        }
        self.changed.notify_waiters();
        self.until(|slots| !slots.keys().any(below)).await;
    }

    async fn until(&self, done: impl Fn(&HashMap<(String, String), Slot>) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if done(&self.slots.lock().slots) {
                return;
            }
            changed.await;
        }
    }

    /// Starts everything at once, from now on.
    pub fn hurry(&self) {
        self.slots.lock().hurry = true;
        self.changed.notify_waiters();
    }

    /// How many wait or run.
    pub fn len(&self) -> usize {
        self.slots.lock().slots.len()
    }
}

/// Queues a copy; the newest call for a key wins.
pub(crate) fn schedule(shared: &Arc<Shared>, store: Arc<dyn Store>, change: MetadataChange, on_done: OnDone) {
    let name = (change.bucket.clone(), change.key.clone());
    let fresh = {
        let mut inner = shared.copies.slots.lock();
        let fresh = !inner.slots.contains_key(&name);
        let slot = inner.slots.entry(name.clone()).or_default();
        slot.take();
        slot.next = Some(Job { request: Request { store, change }, on_done, record: Recorded::NotYet });
        slot.due = Some(Instant::now() + DELAY);
        fresh
    };
    if fresh {
        tokio::spawn(work(shared.clone(), name));
    } else {
        shared.copies.changed.notify_waiters();
    }
}

/// One task a key, as long as something waits for it.
async fn work(shared: Arc<Shared>, name: (String, String)) {
    let copies = &shared.copies;
    loop {
        let changed = copies.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        record(&shared, &name).await;
        let wait = {
            let mut inner = copies.slots.lock();
            let hurry = inner.hurry;
            match inner.slots.get(&name) {
                Some(Slot { next: Some(Job { record: Recorded::NotYet, .. }), .. }) => continue,
                Some(slot) if slot.next.is_some() => {
                    let due = slot.due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now()));
                    if hurry { Duration::ZERO } else { due }
                }
                Some(slot) if !slot.outdated.is_empty() => continue,
                _ => {
                    inner.slots.remove(&name);
                    drop(inner);
                    copies.changed.notify_waiters();
                    shared.changed.notify_waiters();
                    return;
                }
            }
        };
        if !wait.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
            continue;
        }
        let Ok(_permit) = meanwhile(&shared, &name, copies.permits.acquire()).await else { return };
        let publishing = shared.is_publishing(&name.0, &name.1);
        let job = {
            let mut inner = copies.slots.lock();
            let Some(slot) = inner.slots.get_mut(&name) else { return };
            // The new object will carry what was set before; a copy in between would only make its condition fail.
            let job = if publishing { slot.take().and(None) } else { slot.next.take() };
            slot.running = job.is_some();
            job
        };
        if let Some(job) = job {
            meanwhile(&shared, &name, run(&shared, &name, job)).await;
        }
        if let Some(slot) = copies.slots.lock().slots.get_mut(&name) {
            slot.running = false;
        }
        copies.changed.notify_waiters();
    }
}

/// Waits for `work`, and goes on recording what comes meanwhile: an outage or a large copy holds up no setattr.
async fn meanwhile<T>(shared: &Arc<Shared>, name: &(String, String), work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    loop {
        let changed = shared.copies.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        record(shared, name).await;
        tokio::select! {
            done = &mut work => return done,
            () = changed => {}
        }
    }
}

/// Sees to it that what waits is on disk, and that nothing older is.
async fn record(shared: &Arc<Shared>, name: &(String, String)) {
    let copies = &shared.copies;
    let change = copies.slots.lock().slots.get(name).and_then(|slot| match &slot.next {
        Some(Job { request, record: Recorded::NotYet, .. }) => Some(request.change.clone()),
        _ => None,
    });
    if let Some(change) = change {
        let written = shared.journal(change.clone()).await;
        let record = written.map_or_else(
            |error| {
                tracing::warn!("metadata of s3://{}/{} is not recorded before it is sent: {error}", name.0, name.1);
                Recorded::Never
            },
            |journalled| Recorded::Yes(Box::new(journalled)),
        );
        let mut inner = copies.slots.lock();
        if let Some(slot) = inner.slots.get_mut(name) {
            match &mut slot.next {
                Some(job) if job.request.change == change => job.record = record,
                _ => slot.outdated.extend(match record {
                    Recorded::Yes(journalled) => Some(*journalled),
                    Recorded::NotYet | Recorded::Never => None,
                }),
            }
        }
        drop(inner);
        copies.changed.notify_waiters();
    }
    let outdated = {
        let mut inner = copies.slots.lock();
        let slot = inner.slots.get_mut(name).filter(|slot| !matches!(slot.next, Some(Job { record: Recorded::NotYet, .. })));
        slot.map(|slot| std::mem::take(&mut slot.outdated)).unwrap_or_default()
    };
    for journalled in outdated {
        journalled.forget().await;
    }
}

async fn run(shared: &Arc<Shared>, name: &(String, String), mut whole: Job) {
    let recorded = whole.take_record();
    let Job { request: job, on_done, .. } = whole;
    let largest = job.store.capabilities().max_single_copy;
    failpoint::pass("metadata-due");
    let outcome = if job.change.size > largest { tag(&job).await } else { copy(shared, &job).await };
    match &outcome {
        Ok(put) if put.etag != job.change.etag => follow(shared, name, &job.change.etag, put),
        Ok(_) => {}
        Err(error) => tracing::warn!("metadata of s3://{}/{} stays on this machine only: {error}", name.0, name.1),
    }
    failpoint::pass("metadata-answered");
    // An outage does not end it: the next mount tries again.
    let lasting = outcome.as_ref().is_err_and(|error| error.kind.passes());
    on_done(outcome);
    if let Some(journalled) = recorded.filter(|_| !lasting) {
        journalled.forget().await;
    }
}

async fn copy(shared: &Arc<Shared>, job: &Request) -> Result<PutOutcome, S3Error> {
    let MetadataChange { bucket, key, etag, attributes, .. } = &job.change;
    let source = CopySource { bucket: bucket.clone(), key: key.clone(), if_match: Some(etag.clone()), version_id: None, checksum: None };
    let options = PutOptions {
        headers: publish::headers(shared, bucket, key, attributes),
        metadata: attributes.metadata.clone(),
        storage_class: attributes.storage_class.clone(),
        acl: job.store.get_acl(key).await?,
        ..PutOptions::default()
    };
    job.store.copy(key, source, CopyMetadata::Replace(Box::new(options)), None).await
}

/// Over 5 GB a copy would be a multipart one, through every byte: tags carry the attributes instead.
async fn tag(job: &Request) -> Result<PutOutcome, S3Error> {
    let MetadataChange { bucket, key, etag, attributes, .. } = &job.change;
    let store = &job.store;
    let head = store.head(key).await?;
    if head.etag != *etag {
        let resource = format!("s3://{bucket}/{key}");
        return Err(S3Error::local(ErrorKind::PreconditionFailed, "PutObjectTagging", resource, "the object was replaced meanwhile"));
    }
    let mut tags = if head.tag_count > 0 { store.get_tags(key).await? } else { Vec::new() };
    for name in TAGGED {
        let tag = format!("packmule-{name}");
        tags.retain(|(existing, _)| *existing != tag);
        if let Some(value) = attributes.metadata.get(name) {
            tags.push((tag, value.clone()));
        }
    }
    store.put_tags(key, &tags).await?;
    Ok(PutOutcome { etag: head.etag, version_id: head.version_id, last_modified: Some(head.last_modified) })
}

/// The copy is the same version of the file under a new ETag: bases and expectations follow it, and so does the next copy.
fn follow(shared: &Arc<Shared>, name: &(String, String), old: &ETag, put: &PutOutcome) {
    if let Some(slot) = shared.copies.slots.lock().slots.get_mut(name)
        && let Some(next) = slot.next.as_mut().filter(|next| next.request.change.etag == *old)
    {
        next.request.change.etag = put.etag.clone();
        next.request.change.last_modified = put.last_modified.unwrap_or_else(SystemTime::now);
        slot.outdated.extend(next.take_record());
    }
    for entry in shared.entries() {
        let mut intent = entry.intent.lock();
        if intent.target.store.bucket() == name.0 && intent.target.key == name.1 && intent.expect == Expect::Version(old.clone()) {
            intent.expect = Expect::Version(put.etag.clone());
        }
        if let Some(base) = &mut intent.base
            && (&base.bucket, &base.key, &base.etag) == (&name.0, &name.1, old)
        {
            base.etag = put.etag.clone();
            base.version_id = put.version_id.clone();
        }
        if let Some(published) = &mut intent.published
            && (&published.bucket, &published.key, &published.etag) == (&name.0, &name.1, old)
        {
            published.etag = put.etag.clone();
            published.version_id = put.version_id.clone();
        }
    }
}
