//! What an earlier run left in the spool: resumed where it was promised, kept where it was not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::commit;
use super::content::Content;
use super::disk::{Disk, SpoolFile};
use super::entry::{Entry, Shared};
use super::intent::Intent;
use super::journal::Deletion;
use super::manifest::{Phase, Record};
use super::plan::{How, Piece};
use super::publish::{self, StoreReader};
use super::spool::{Found, blocking};
use super::state::{SentPart, Slot, Status};
use super::transfer;
use super::uploader::Message;
use super::{Base, EntryStatus, Error, Expect, Staged, Target, offline, reason};
use crate::s3::{Account, ErrorKind, Part, S3Error, Store};

/// An entry whose close had returned, and its record.
type Promise = (Arc<Entry>, Record);

/// How far the store's clock may be behind ours.
const SKEW: Duration = Duration::from_secs(300);

/// Takes every entry in; what was promised goes on in the background.
pub(crate) async fn resume(shared: &Arc<Shared>, found: Vec<Found>, account: &Arc<dyn Account>) {
    let mut stores = Stores { account: account.as_ref(), known: BTreeMap::new() };
    let put_off = std::mem::take(&mut *shared.deletions.lock());
    for journalled in put_off {
        match stores.of(&journalled.what.bucket).await {
            // The newest of each key.
            Ok(store) => {
                if let Some(older) = shared.deletes.queue(store, journalled, Duration::ZERO) {
                    older.forget().await;
                }
            }
            Err(error) => {
                let Deletion { bucket, key, .. } = &journalled.what;
                tracing::warn!("s3://{bucket}/{key} is deleted when its bucket can be reached: {error}");
            }
        }
    }
    let mut promises: BTreeMap<(String, String), Vec<Promise>> = BTreeMap::new();
    for found in found {
        let id = Entry::number(shared, &found.data);
        match stores.of(&found.record.bucket).await {
            Ok(store) => {
                if let Ok(Some(promise)) = take_in(shared, id, found, store, account).await {
                    promises.entry((promise.1.bucket.clone(), promise.1.key.clone())).or_default().push(promise);
                }
            }
            Err(error) => strand(shared, id, found, account, &error),
        }
    }
    for mut versions in promises.into_values() {
        versions.sort_by_key(|(_, record)| record.order);
        // The name means the newest.
        shared.recovered.lock().extend(versions.last().map(|(entry, _)| entry.clone()));
        tokio::spawn(go_on_in_turn(shared.clone(), versions));
    }
}

/// What was promised under one name goes on, the oldest first: it may have been on its way when a newer one took its place, and what
/// that is conditional on is then what becomes of the older.
async fn go_on_in_turn(shared: Arc<Shared>, versions: Vec<Promise>) {
    let mut before: Option<Arc<Entry>> = None;
    for (entry, record) in versions {
        if let Some(older) = before.take()
            && let Ok(Some(published)) = Staged::new(older).settled().await
            && published.key == record.key
        {
            entry.intent.lock().expect = Expect::Version(published.etag);
        }
        go_on(&shared, &entry, &record).await;
        before = Some(entry);
    }
}

/// What an earlier run left for a bucket that could not be reached: it stays as it is until it is retried.
pub(crate) struct Stranded {
    pub found: Found,
    account: Arc<dyn Account>,
    why: String,
}

impl Stranded {
    /// What status says of it.
    pub fn status(&self, disk: &Disk, id: u64) -> Option<EntryStatus> {
        let status = self.found.open(disk, id).ok()??.status;
        Some(EntryStatus { stranded: true, reason: Some(format!("its bucket cannot be reached: {}", self.why)), ..status })
    }
}

fn strand(shared: &Arc<Shared>, id: u64, found: Found, account: &Arc<dyn Account>, error: &S3Error) {
    let Record { bucket, key, .. } = &found.record;
    tracing::warn!("s3://{bucket}/{key} waits in {} until its bucket can be reached: {error}", found.data.display());
    shared.stranded.lock().insert(id, Stranded { found, account: account.clone(), why: reason::of_store(error) });
}

/// Tries to reach the bucket of a stranded entry again. `None` where there is no such entry.
pub(crate) async fn reach(shared: &Arc<Shared>, id: u64) -> Option<Result<(), Error>> {
    let Stranded { found, account, .. } = shared.stranded.lock().remove(&id)?;
    Some(match account.bucket(&found.record.bucket).await {
        Ok(store) => take_in(shared, id, found, store, &account).await.map(|promise| {
            if let Some(promise) = promise {
                shared.recovered.lock().push(promise.0.clone());
                tokio::spawn(go_on_in_turn(shared.clone(), vec![promise]));
            }
        }),
        Err(error) => {
            strand(shared, id, found, &account, &error);
            Err(Error::S3(error))
        }
    })
}

/// Makes an entry of what was found. What was promised is the caller's to go on with; the rest is tidied up in the background.
async fn take_in(
    shared: &Arc<Shared>,
    id: u64,
    Found { data, record_path, mut record }: Found,
    store: Arc<dyn Store>,
    account: &Arc<dyn Account>,
) -> Result<Option<Promise>, Error> {
    let base_store = match &record.base {
        Some(base) if base.bucket != record.bucket => account.bucket(&base.bucket).await.ok(),
        _ => Some(store.clone()),
    };
    let (disk, path) = (shared.spool.disk.clone(), data.clone());
    let file = blocking(move || disk.open(&path)).await.inspect_err(|error| tracing::warn!("{}: {error}", data.display()))?;
    let boot = &shared.spool.disk.boot;
    catch_up(&mut record, &file, boot);
    let worthless = offline::is_worthless(&record);
    let promised = promised(&record, boot);
    let intent = intent(&record, store, base_store, promised);
    let entry = Entry::build(shared, id, file, data, record_path, Content::of(&record), intent);
    if promised {
        return Ok(Some((entry, record)));
    }
    // Bytes that were not fsynced are whole while the kernel is the same.
    if record.held && !worthless && !record.poisoned && intact(&record, boot) {
        shared.recovered.lock().push(entry.clone());
    }
    tokio::spawn(async move {
        let discarded = worthless || is_published(&entry, &record).await;
        clean_up(&entry, &record).await;
        if discarded {
            publish::discard(&entry).await;
        }
    });
    Ok(None)
}

/// The buckets of what was left, each looked for once.
struct Stores<'a> {
    account: &'a dyn Account,
    known: BTreeMap<String, Result<Arc<dyn Store>, S3Error>>,
}

impl Stores<'_> {
    async fn of(&mut self, bucket: &str) -> Result<Arc<dyn Store>, S3Error> {
        if let Some(known) = self.known.get(bucket) {
            return known.clone();
        }
        let found = self.account.bucket(bucket).await;
        self.known.insert(bucket.to_owned(), found.clone());
        found
    }
}

/// close() had returned, or was on its way, and the bytes are those that were sealed: fsynced, or written under the
/// kernel that still runs.
pub(super) fn promised(record: &Record, boot: &str) -> bool {
    let sealed = matches!(record.phase, Phase::Sealed | Phase::Uploading | Phase::Completing);
    sealed && intact(record, boot) && !record.poisoned && !record.held
}

fn intact(record: &Record, boot: &str) -> bool {
    record.durable || !boot.is_empty() && record.boot == boot
}

/// The record of a file that is being written is as old as its first write, or its last fsync. Under the same kernel all of a
/// new file is there; where it changes an object, only the record tells its bytes from the object's.
pub(super) fn catch_up(record: &mut Record, file: &SpoolFile, boot: &str) {
    let same_kernel = !boot.is_empty() && record.boot == boot;
    if record.phase != Phase::Writing || record.base.is_some() || !same_kernel {
        return;
    }
    if let Ok(size) = file.len() {
        record.size = size;
        (record.local, record.dirty) = (std::iter::once(0..size).collect(), std::iter::once(0..size).collect());
    }
}

/// S3 holds these very bytes under this name: its PUT was answered, and the process was killed before close() returned.
async fn is_published(entry: &Arc<Entry>, record: &Record) -> bool {
    if record.phase != Phase::Writing || record.held || record.poisoned || !record.local.covers(0..record.size) {
        return false;
    }
    // Older than the file: what was written since is nowhere else.
    if entry.file.len().ok() != Some(record.size) {
        return false;
    }
    let store = entry.intent.lock().target.store.clone();
    let Ok(head) = store.head(&record.key).await else { return false };
    if head.size != record.size {
        return false;
    }
    let range = 0..record.size;
    let kind = store.capabilities().upload_checksum;
    let same_checksum =
        head.checksum.is_some() && transfer::checksum(&entry.file, range.clone(), kind).await.is_ok_and(|ours| ours == head.checksum);
    same_checksum || commit::part_etag(entry, range).await.is_ok_and(|ours| ours.as_ref() == Some(&head.etag))
}

fn intent(record: &Record, store: Arc<dyn Store>, base_store: Option<Arc<dyn Store>>, promised: bool) -> Intent {
    let base = record.base.as_ref().zip(base_store).map(|(base, store)| Base {
        bucket: base.bucket.clone(),
        key: base.key.clone(),
        etag: base.etag.clone(),
        size: base.size,
        version_id: base.version_id.clone(),
        reader: StoreReader::of(store, base.key.clone(), base.etag.clone(), base.version_id.clone()),
    });
    let mut intent = Intent::new(Target { store, key: record.key.clone() }, record.expect.clone(), base, record.attributes.clone());
    intent.appended = record.appended;
    intent.held = record.held;
    intent.guess.clone_from(&record.guess);
    intent.upload.clone_from(&record.upload);
    intent.completing.clone_from(&record.completing);
    intent.travelled = Some(record.attributes.clone());
    intent.poisoned = record.poisoned;
    intent.durable = record.durable.then_some(0);
    intent.sealed = promised;
    intent.recovered = true;
    intent.order = record.order;
    intent.resuming = promised;
    intent.retired = true;
    (intent.phase, intent.reason) = standing(record, promised);
    intent
}

/// Where an earlier run's entry stands now, and why.
pub(super) fn standing(record: &Record, promised: bool) -> (Phase, Option<String>) {
    let phase = match record.phase {
        Phase::Parked => Phase::Parked,
        _ if promised => Phase::Sealed,
        _ => Phase::Writing,
    };
    let reason = match (&record.reason, phase) {
        (Some(reason), _) => Some(reason.clone()),
        (None, Phase::Writing) if !record.held => {
            Some("it was not closed before the program ended: its bytes are kept in the spool and are not published by themselves".into())
        }
        (None, _) => None,
    };
    (phase, reason)
}

/// Aborts the upload of an entry that will not be published by itself: the spool has the bytes.
async fn clean_up(entry: &Arc<Entry>, record: &Record) {
    let Some(upload) = &record.upload else { return };
    let store = entry.intent.lock().target.store.clone();
    let target = Target { store, key: upload.key.clone() };
    match &upload.id {
        Some(id) => publish::abort(&entry.shared, target, id.clone()),
        None => abort_unrecorded(&entry.shared, &target, upload.begun).await,
    }
    entry.intent.lock().upload = None;
    if let Err(error) = entry.persist(true).await {
        tracing::warn!("{}: {error}", entry.record.display());
    }
}

/// The intent was recorded, the id was not: an upload of the key begun after it and without parts is ours; one with
/// parts is somebody else's (promise 26).
async fn abort_unrecorded(shared: &Arc<Shared>, target: &Target, begun: u64) {
    let since = SystemTime::UNIX_EPOCH + Duration::from_secs(begun);
    let uploads = match target.store.list_uploads(&target.key).await {
        Ok(uploads) => uploads,
        Err(error) => return tracing::warn!("{error}"),
    };
    for upload in uploads.into_iter().filter(|upload| upload.key == target.key && upload.initiated + SKEW >= since) {
        if target.store.list_parts(&target.key, &upload.upload_id).await.is_ok_and(|parts| parts.is_empty()) {
            publish::abort(shared, target.clone(), upload.upload_id);
        }
    }
}

/// What was promised goes on, with the parts that the store has.
async fn go_on(shared: &Arc<Shared>, entry: &Arc<Entry>, record: &Record) {
    let store = entry.intent.lock().target.store.clone();
    let mut resumed = None;
    let mut done = None;
    if let Some(upload) = &record.upload {
        let target = Target { store: store.clone(), key: upload.key.clone() };
        match &upload.id {
            None => abort_unrecorded(shared, &target, upload.begun).await,
            Some(id) => match patiently(|| store.list_parts(&target.key, id)).await {
                Ok(parts) => match reusable(entry, record, parts).await {
                    Ok(slots) => resumed = Some((target, id.clone(), slots)),
                    Err(error) => tracing::warn!("{}: {error}", entry.data.display()),
                },
                Err(error) if error.kind == ErrorKind::NoSuchUpload => done = completed(&*store, record).await,
                Err(error) => tracing::warn!("{error}"),
            },
        }
    }
    match done {
        Some(published) => shared.send(Message::Found { id: entry.id, published: Box::new(published) }),
        None => shared.send(Message::Resume { id: entry.id, upload: resumed }),
    }
}

/// Outages at start are ridden out.
async fn patiently<T, F: Future<Output = Result<T, S3Error>>>(mut call: impl FnMut() -> F) -> Result<T, S3Error> {
    let mut pause = Duration::from_millis(500);
    loop {
        match call().await {
            Err(error) if error.kind.passes() => {
                tracing::debug!("{error}");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(30));
            }
            other => return other,
        }
    }
}

/// The upload is gone after Complete was sent: it was completed if the object's ETag is that of its parts.
async fn completed(store: &dyn Store, record: &Record) -> Option<super::Published> {
    let etag = commit::multipart_etag(record.completing.as_deref()?)?;
    let head = patiently(|| store.head(&record.key)).await.ok()?;
    (head.etag.as_str() == etag && head.size == record.size).then(|| super::Published {
        bucket: record.bucket.clone(),
        key: record.key.clone(),
        etag: head.etag,
        version_id: head.version_id,
        size: head.size,
        last_modified: head.last_modified,
        attributes: record.attributes.clone(),
        // Nobody has read it since the program ended.
        rebased: false,
        replaced: !matches!(record.expect, Expect::Absent | Expect::NewFile),
    })
}

/// Parts whose size and MD5 are those of the spool's bytes on the grid of a new file.
async fn reusable(entry: &Arc<Entry>, record: &Record, parts: Vec<Part>) -> Result<BTreeMap<u32, Slot>, Error> {
    let mut slots = BTreeMap::new();
    if record.base.is_some() {
        return Ok(slots);
    }
    let kind = entry.intent.lock().target.store.capabilities().upload_checksum;
    for part in parts {
        let cell = entry.grid.range(part.number);
        let range = cell.start..cell.end.min(record.size);
        if range.start >= range.end
            || range.end - range.start != part.size
            || commit::part_etag(entry, range.clone()).await?.as_ref() != Some(&part.etag)
        {
            continue;
        }
        let checksum = transfer::checksum(&entry.file, range.clone(), kind).await?;
        let piece = Piece { number: part.number, range, how: How::Upload };
        slots.insert(part.number, Slot { piece, status: Status::Sent(SentPart { etag: part.etag, checksum }), wanted: true });
    }
    Ok(slots)
}
