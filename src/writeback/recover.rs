//! What an earlier run left in the spool: resumed where it was promised, kept where it was not.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::body::{self, Body};
use super::commit;
use super::content::Content;
use super::deletes::Way;
use super::disk::{Disk, SpoolFile};
use super::entry::{Entry, Shared};
use super::intent::Intent;
use super::journal::Deletion;
use super::manifest::{Phase, Record, UploadRecord};
use super::plan::{How, Piece, Plan};
use super::publish::{self, StoreReader};
use super::spool::{Found, blocking};
use super::state::{SentPart, Slot, Status};
use super::transfer;
use super::uploader::Message;
use super::{Base, EntryStatus, Error, Expect, Staged, Target, abandoned, offline, reason};
use crate::s3::{Account, Checksum, ChecksumKind, ETag, ErrorKind, Part, S3Error, Store};

/// An entry whose close had returned, and its record.
pub(super) type Promise = (Arc<Entry>, Record);

/// Pauses between looks for a bucket: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Takes every entry in; what was promised goes on in the background.
pub(crate) async fn resume(shared: &Arc<Shared>, found: Vec<Found>, account: &Arc<dyn Account>) {
    let mut stores = Stores { account: account.as_ref(), known: BTreeMap::new() };
    let put_off = std::mem::take(&mut *shared.deletions.lock());
    for journalled in put_off {
        let way = match stores.of(&journalled.what.bucket).await {
            Ok(store) => Way::Store(store),
            Err(error) => {
                let Deletion { bucket, key, .. } = &journalled.what;
                tracing::warn!("s3://{bucket}/{key} is deleted when its bucket can be reached: {error}");
                Way::Account(account.clone())
            }
        };
        // The newest of each key.
        if let Some(older) = shared.deletes.queue(way, journalled, Duration::ZERO) {
            older.forget().await;
        }
    }
    let (mut reached, mut sought) = (Vec::new(), BTreeSet::new());
    for found in found {
        let id = Entry::number(shared, &found.data);
        match stores.of(&found.record.bucket).await {
            Ok(store) => reached.push((id, found, store)),
            Err(error) => {
                if error.kind.passes() {
                    sought.insert(found.record.bucket.clone());
                }
                strand(
                    shared,
                    id,
                    Stranded { found, account: account.clone(), sought: error.kind.passes(), why: reason::of_store(&error) },
                );
            }
        }
    }
    take_all_in(shared, reached, account).await;
    for bucket in sought {
        tokio::spawn(seek(shared.clone(), bucket, account.clone()));
    }
}

/// Takes entries in; what was promised goes on.
async fn take_all_in(shared: &Arc<Shared>, found: Vec<(u64, Found, Arc<dyn Store>)>, account: &Arc<dyn Account>) {
    let mut promises: BTreeMap<(String, String), Vec<Promise>> = BTreeMap::new();
    for (id, found, store) in found {
        if let Ok(Some(promise)) = take_in(shared, id, found, store, account).await {
            promises.entry((promise.1.bucket.clone(), promise.1.key.clone())).or_default().push(promise);
        }
    }
    for ((bucket, key), mut versions) in promises {
        versions.sort_by_key(|(_, record)| record.order);
        // The name means the newest.
        shared.recovered.lock().extend(versions.last().map(|(entry, _)| entry.clone()));
        if let Some(versions) = shared.renames.keep_waiting(&bucket, &key, versions) {
            tokio::spawn(go_on_in_turn(shared.clone(), versions));
        }
    }
}

/// What was promised under one name goes on, the oldest first: it may have been on its way when a newer one took its place, and what
/// that is conditional on is then what becomes of the older.
pub(super) async fn go_on_in_turn(shared: Arc<Shared>, versions: Vec<Promise>) {
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

/// What an earlier run left for a bucket that could not be reached: it stays as it is until the bucket is there.
pub(crate) struct Stranded {
    pub found: Found,
    account: Arc<dyn Account>,
    /// The bucket is looked for. Else it waits for somebody's word: the store says that there is none.
    pub sought: bool,
    why: String,
}

impl Stranded {
    /// What status says of it.
    pub fn status(&self, disk: &Disk, id: u64) -> Option<EntryStatus> {
        let status = self.found.open(disk, id).ok()??.status;
        Some(EntryStatus { stranded: true, reason: Some(format!("its bucket cannot be reached: {}", self.why)), ..status })
    }
}

fn strand(shared: &Arc<Shared>, id: u64, stranded: Stranded) {
    let Record { bucket, key, .. } = &stranded.found.record;
    let (data, why) = (stranded.found.data.display(), &stranded.why);
    tracing::warn!("s3://{bucket}/{key} waits in {data} until its bucket can be reached: {why}");
    shared.stranded.lock().insert(id, stranded);
}

/// Looks for a bucket until it is there, or the store says that there is none: with growing pauses, and when all is to hurry.
async fn seek(shared: Arc<Shared>, bucket: String, account: Arc<dyn Account>) {
    let mut pause = PAUSE.0;
    loop {
        if shared.drains.load(Relaxed) == 0 {
            let _ = tokio::time::timeout(pause, shared.hurried.notified()).await;
        } else {
            // Somebody waits for it.
            tokio::time::sleep(PAUSE.0).await;
        }
        pause = (pause * 2).min(PAUSE.1);
        let is_there = |stranded: &Stranded| stranded.sought && stranded.found.record.bucket == bucket;
        if !shared.stranded.lock().values().any(is_there) {
            return;
        }
        match account.bucket(&bucket).await {
            Ok(store) => {
                // For a moment they are neither here nor there.
                shared.chores.fetch_add(1, Relaxed);
                let taken: Vec<_> = shared.stranded.lock().extract_if(.., |_, stranded| is_there(stranded)).collect();
                let taken = taken.into_iter().map(|(id, stranded)| (id, stranded.found, store.clone())).collect();
                take_all_in(&shared, taken, &account).await;
                shared.chores.fetch_sub(1, Relaxed);
                return;
            }
            Err(error) => {
                for stranded in shared.stranded.lock().values_mut().filter(|stranded| is_there(stranded)) {
                    (stranded.sought, stranded.why) = (error.kind.passes(), reason::of_store(&error));
                }
            }
        }
    }
}

/// Tries to reach the bucket of a stranded entry again. `None` where there is no such entry.
pub(crate) async fn reach(shared: &Arc<Shared>, id: u64) -> Option<Result<(), Error>> {
    // It stays on the list while its bucket is asked for: who seeks that goes on only while something is there.
    let (bucket, account) =
        shared.stranded.lock().get(&id).map(|stranded| (stranded.found.record.bucket.clone(), stranded.account.clone()))?;
    let store = match account.bucket(&bucket).await {
        Ok(store) => store,
        Err(error) => {
            if let Some(stranded) = shared.stranded.lock().get_mut(&id) {
                stranded.why = reason::of_store(&error);
            }
            return Some(Err(Error::S3(error)));
        }
    };
    let Stranded { found, .. } = shared.stranded.lock().remove(&id)?;
    Some(take_in(shared, id, found, store, &account).await.map(|promise| {
        if let Some(promise) = promise {
            shared.recovered.lock().push(promise.0.clone());
            tokio::spawn(go_on_in_turn(shared.clone(), vec![promise]));
        }
    }))
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
    proved(entry, None, 0..record.size, &head.etag, head.checksum, ChecksumKind::Off).await.is_ok_and(|proof| proof.is_some())
}

fn intent(record: &Record, store: Arc<dyn Store>, base_store: Option<Arc<dyn Store>>, promised: bool) -> Intent {
    let base = record.base.as_ref().zip(base_store).map(|(base, store)| Base {
        bucket: base.bucket.clone(),
        key: base.key.clone(),
        etag: base.etag.clone(),
        size: base.size,
        version_id: base.version_id.clone(),
        checksum: None,
        reader: StoreReader::of(store, base.key.clone(), base.etag.clone(), base.version_id.clone()),
    });
    let mut intent = Intent::new(Target { store, key: record.key.clone() }, record.expect.clone(), base, record.attributes.clone());
    intent.appended = record.appended;
    intent.held = record.held;
    intent.guess.clone_from(&record.guess);
    intent.upload.clone_from(&record.upload);
    // The content as it is found is its generation 0.
    let generation = |present: bool| if present { 0 } else { u64::MAX };
    intent.completing = record.completing.clone().map(|parts| (parts, generation(record.completes)));
    intent.sent = record.sent.iter().map(|(sent, present)| (sent.clone(), generation(*present))).collect();
    intent.fetches = record.fetches;
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
    entry.abandon(store, upload.clone());
    if let Err(error) = entry.persist(true).await {
        tracing::warn!("{}: {error}", entry.record.display());
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
            None => match patiently(|| abandoned::unrecorded(shared, store.as_ref(), upload)).await {
                Ok(found) => {
                    found.into_iter().for_each(|id| abandoned::abandon(shared, store.clone(), UploadRecord::known(upload.key.clone(), id)));
                }
                Err(error) => tracing::warn!("{error}"),
            },
            Some(id) => match patiently(|| store.list_parts(&target.key, id)).await {
                Ok(parts) => resumed = Some((target, id.clone(), reusable(entry, record, parts).await)),
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

/// The upload is gone after Complete was sent: it was completed if the object's ETag or checksum is that of its parts.
async fn completed(store: &dyn Store, record: &Record) -> Option<super::Published> {
    let parts = record.completing.as_deref().filter(|_| record.completes)?;
    let head = patiently(|| store.head(&record.key)).await.ok()?;
    let same_etag = commit::multipart_etag(parts).is_some_and(|etag| etag == head.etag);
    let sum = commit::combine(parts.iter().map(|part| (part.checksum, part.size)));
    let same = same_etag || sum.is_some() && sum == head.checksum;
    (same && head.size == record.size).then(|| super::Published {
        bucket: record.bucket.clone(),
        key: record.key.clone(),
        etag: head.etag,
        version_id: head.version_id,
        size: head.size,
        checksum: head.checksum,
        last_modified: head.last_modified,
        attributes: record.attributes.clone(),
        // Nobody has read it since the program ended.
        rebased: false,
        replaced: !matches!(record.expect, Expect::Absent | Expect::NewFile),
    })
}

/// Parts of the plan that the store has, each proved to hold what it is to hold: one of ours by its ETag or checksum, one that was
/// copied by the parts that Complete was sent with. A copy of an upload that was cut off before is made again: it costs a request
/// and no bytes, and to have it on record would cost each of them an fsync.
async fn reusable(entry: &Arc<Entry>, record: &Record, listed: Vec<Part>) -> BTreeMap<u32, Slot> {
    let (base, plan) = {
        let (intent, content) = (entry.intent.lock(), entry.content.lock());
        (intent.base.clone(), publish::plan_of(entry, &intent, &content, content.size > 0))
    };
    let Plan::Parts(pieces) = plan else { return BTreeMap::new() };
    let mut by_number: BTreeMap<u32, Vec<Part>> = BTreeMap::new();
    for part in listed {
        let of_number = by_number.entry(part.number).or_default();
        if !of_number.contains(&part) {
            of_number.push(part);
        }
    }
    let completing = record.completing.as_deref().unwrap_or_default();
    let mut slots = BTreeMap::new();
    for piece in pieces {
        // Where a store lists every sending of a number, and they differ, nobody knows which one it would complete with.
        let Some([part]) = by_number.get(&piece.number).map(Vec::as_slice) else { continue };
        if part.size != piece.range.end - piece.range.start {
            continue;
        }
        let sent = match piece.how {
            How::Copy => copied(completing, &piece, part),
            How::Upload => uploaded(entry, base.as_ref(), completing, &piece, part).await,
        };
        if let Some(sent) = sent {
            slots.insert(piece.number, Slot { piece, status: Status::Sent(sent), wanted: true });
        }
    }
    slots
}

/// A part that Complete was sent with, at the same place: until an entry is published what it has of its base only gets less, so
/// what is to be copied now was the base's then.
fn copied(completing: &[Part], piece: &Piece, part: &Part) -> Option<SentPart> {
    let mut at = 0;
    let sent = completing.iter().find(|sent| {
        let start = at;
        at += sent.size;
        start == piece.range.start && sent.number == part.number && sent.size == part.size && sent.etag == part.etag
    })?;
    Some(SentPart { etag: sent.etag.clone(), checksum: sent.checksum })
}

/// A part that holds the bytes of the piece, by the checksum that the store tells of it, or that it was sent with.
async fn uploaded(entry: &Arc<Entry>, base: Option<&Base>, completing: &[Part], piece: &Piece, part: &Part) -> Option<SentPart> {
    let remembered = || completing.iter().find(|sent| sent.number == part.number && sent.etag == part.etag)?.checksum;
    let told = part.checksum.or_else(remembered);
    let (kind, plain) = {
        let intent = entry.intent.lock();
        (intent.part_checksum(), intent.is_plain())
    };
    let proof = patiently(|| async {
        match proved(entry, base, piece.range.clone(), &part.etag, told, kind).await {
            Err(Error::S3(error)) => Err(error),
            Err(error) => {
                tracing::warn!("{}: part {} is sent again: {error}", entry.data.display(), piece.number);
                Ok(None)
            }
            Ok(proof) => Ok(proof),
        }
    });
    let mut sent = proof.await.inspect_err(|error| tracing::warn!("{error}")).ok().flatten()?;
    // What the store says of a part by itself is no part of the upload.
    sent.checksum = sent.checksum.filter(|sum| !plain || sum.kind() == ChecksumKind::Md5);
    Some(sent)
}

/// What the store holds, where its ETag or checksum is that of these bytes: the size alone says nothing. `kind`: the checksum that
/// goes on with it where the store told none.
async fn proved(
    entry: &Arc<Entry>,
    base: Option<&Base>,
    range: Range<u64>,
    etag: &ETag,
    told: Option<Checksum>,
    kind: ChecksumKind,
) -> Result<Option<SentPart>, Error> {
    body::fill(entry, base, range.clone()).await?;
    let body = Body::of(entry, &entry.content.lock(), base, range.clone());
    let by_etag = etag.md5().map(Checksum::Md5);
    let kinds = [by_etag, told].map(|sum| sum.map_or(ChecksumKind::Off, |sum| sum.kind()));
    let [md5, same, ours] = transfer::checksums(&body, range, [kinds[0], kinds[1], kind]).await?;
    let told = told.filter(|_| same == told);
    let proved = told.is_some() || by_etag.is_some() && md5 == by_etag;
    Ok(proved.then(|| SentPart { etag: etag.clone(), checksum: told.or(ours) }))
}
