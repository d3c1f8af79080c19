//! PutObject and CompleteMultipartUpload, and what their refusals mean.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use crc_fast::CrcAlgorithm;
use md5::{Digest, Md5};

use super::behind;
use super::body::{self, Body};
use super::entry::Entry;
use super::manifest::{Phase, UploadRecord};
use super::publish::{self, Snapshot, Verdict};
use super::sent::{Sent, Whose};
use super::state::{Slot, Status};
use super::transfer::{self, Hasher, MemorySource, SpoolSource, Trouble};
use super::{Error, Expect, OnConflict, Published, Target};
use crate::failpoint;
use crate::s3::{Checksum, ChecksumKind, ETag, ErrorKind, ObjectHead, Part, PutOptions, PutOutcome, S3Error, Source};

/// Up to here a body is read into memory, so that writers need not wait for the PUT; 32 of them are 32 MiB.
const IN_MEMORY: u64 = 1 << 20;
/// S3's longest key, in bytes of UTF-8.
const KEY_BYTES: usize = 1024;

/// PutObject of the whole content.
pub(crate) async fn put(entry: &Arc<Entry>, snapshot: &Snapshot, doubt: bool, awaited: bool) -> Result<Verdict, Trouble> {
    body::fill(entry, snapshot.base.as_ref(), 0..snapshot.size).await?;
    // Nobody writes until the bytes are read: what is sent is one moment's content.
    let mut writer = Some(entry.writer.clone().lock_owned().await);
    let (size, generation, attributes, bytes) = {
        let mut intent = entry.intent.lock();
        let mut content = entry.content.lock();
        if !awaited && !intent.sealed {
            return Ok(Verdict::Overtaken);
        }
        if content.size > entry.grid.range(1).end {
            return Ok(Verdict::Retry);
        }
        content.seal();
        intent.sealed = true;
        intent.travelled = Some(intent.attributes.clone());
        let bytes = Body::of(entry, &content, snapshot.base.as_ref(), 0..content.size);
        (content.size, content.generation, intent.attributes.clone(), bytes)
    };
    let Target { store, key } = &snapshot.target;
    let kind = store.capabilities().upload_checksum;
    let body: Arc<dyn Source>;
    let checksum;
    let md5;
    if size <= IN_MEMORY {
        let bytes = bytes.read_all(0..size).await?;
        if entry.rolling.lock().of(&(0..size)).is_some_and(|sum| sum != crc_fast::crc64_nvme(&bytes)) {
            return Err(Trouble::Local(Error::Damaged));
        }
        let mut hasher = Hasher::new(kind);
        hasher.update(&bytes);
        checksum = hasher.finish();
        md5 = checksum.and_then(md5_of).or_else(|| Some(Md5::digest(&bytes).into()));
        body = Arc::new(MemorySource::new(entry, bytes));
    } else {
        checksum = transfer::written(entry, &bytes, 0..size, kind, writer.as_ref()).await?;
        // A queued file may be written again before this is answered.
        md5 = match checksum.and_then(md5_of) {
            None if !entry.shared.config.write_back.is_zero() => {
                transfer::checksums(&bytes, 0..size, [ChecksumKind::Md5]).await?[0].and_then(md5_of)
            }
            known => known,
        };
        body = Arc::new(SpoolSource::new(entry, bytes, 0..size));
    }
    let mut sent = Sent { size, etag: md5.map(etag_of), checksum, metadata: attributes.metadata.clone() };
    entry.sends(&sent, generation);
    if !snapshot.whole && !entry.shared.config.write_back.is_zero() {
        // Else a crash that the answer does not outrun leaves a change whose base is gone, and nobody knows that it was made.
        entry.persist(false).await.unwrap_or_else(|error| tracing::warn!("{}: {error}", entry.record.display()));
    }
    if size <= IN_MEMORY {
        writer = None;
    }
    let mut options = publish::options(&entry.shared, &snapshot.target, &attributes);
    options.condition = publish::condition(&entry.shared, snapshot);
    options.checksum = checksum;
    failpoint::pass("put-begins");
    let put = store.put(key, body.clone(), options.clone());
    let answer = if awaited { put.await } else { entry.gives_way(put).await.unwrap_or_else(|| Err(put_off(snapshot))) };
    let error = match answer {
        Ok(outcome) => {
            failpoint::pass("put-answered");
            return Ok(Verdict::Published(published(snapshot, size, checksum, &attributes, outcome)));
        }
        Err(error) => error,
    };
    let refused = matches!(error.kind, ErrorKind::PreconditionFailed) || error.kind == ErrorKind::NoSuchKey && options.condition.is_some();
    if error.kind == ErrorKind::BadDigest {
        transfer::undamaged(entry, 0..size, writer.as_ref()).await?;
    }
    if !refused {
        return otherwise(entry, &options, error);
    }
    if sent.etag.is_none() {
        let mut hasher = Md5::new();
        let mut stream = body.open();
        while let Some(chunk) = futures::StreamExt::next(&mut stream).await {
            hasher.update(chunk.map_err(Error::from)?);
        }
        sent.etag = Some(etag_of(hasher.finalize().into()));
    }
    drop(writer);
    match judge(entry, snapshot, &sent, doubt, &error).await? {
        Judged::Ours(head) => Ok(Verdict::Published(found(snapshot, size, attributes, *head))),
        Judged::Theirs(verdict) => Ok(verdict),
    }
}

fn put_off(snapshot: &Snapshot) -> S3Error {
    let Target { store, key } = &snapshot.target;
    S3Error::local(ErrorKind::TimedOut, "PutObject", format!("s3://{}/{key}", store.bucket()), "no answer, and the file is written again")
}

/// CompleteMultipartUpload of the parts that were sent.
pub(crate) async fn complete(
    entry: &Arc<Entry>,
    snapshot: &Snapshot,
    target: &Target,
    upload: &str,
    slots: &BTreeMap<u32, Slot>,
    doubt: bool,
) -> Result<Verdict, Trouble> {
    if !target.is(&snapshot.target) {
        return Ok(Verdict::Restart);
    }
    let mut parts = Vec::new();
    for slot in slots.values().filter(|slot| slot.wanted) {
        let Status::Sent(sent) = &slot.status else { return Ok(Verdict::Restart) };
        let size = slot.piece.range.end - slot.piece.range.start;
        parts.push(Part { number: slot.piece.number, etag: sent.etag.clone(), size, checksum: sent.checksum });
    }
    let attributes = {
        let mut intent = entry.intent.lock();
        intent.phase = Phase::Completing;
        intent.completing = Some((parts.clone(), snapshot.generation));
        intent.travelled.clone().unwrap_or_default()
    };
    let checksum = combine(parts.iter().map(|part| (part.checksum, part.size)));
    let sent = Sent { size: snapshot.size, etag: multipart_etag(&parts), checksum, metadata: attributes.metadata.clone() };
    entry.sends(&sent, snapshot.generation);
    entry.persist(!entry.shared.config.write_back.is_zero()).await?;
    let mut options = publish::options(&entry.shared, target, &attributes);
    options.condition = publish::condition(&entry.shared, snapshot);
    options.checksum = checksum;
    failpoint::pass("complete-begins");
    let error = match target.store.complete_multipart(&target.key, upload, &parts, snapshot.size, options.clone()).await {
        Ok(outcome) => {
            failpoint::pass("complete-answered");
            return Ok(Verdict::Published(published(snapshot, snapshot.size, checksum, &attributes, outcome)));
        }
        Err(error) => error,
    };
    match error.kind {
        // Completed by an earlier attempt whose answer was lost, or aborted by somebody.
        ErrorKind::NoSuchUpload => match target.store.head(&target.key).await {
            Ok(head) if is_ours(&sent, &head, snapshot, true) => {
                Ok(Verdict::Published(published(snapshot, snapshot.size, checksum, &attributes, as_outcome(head))))
            }
            Ok(_) => Ok(Verdict::Restart),
            Err(error) if error.kind == ErrorKind::NoSuchKey => Ok(Verdict::Restart),
            Err(error) => Err(Trouble::S3(error)),
        },
        // After a race S3 wants every part again under a new upload.
        ErrorKind::Conflict => {
            once_more(entry, &error).await?;
            Ok(Verdict::Restart)
        }
        ErrorKind::PreconditionFailed | ErrorKind::NoSuchKey => match judge(entry, snapshot, &sent, doubt, &error).await? {
            Judged::Ours(head) => {
                // By an earlier upload than this one, perhaps.
                entry.abandon(target.store.clone(), UploadRecord::known(target.key.clone(), upload.to_owned()));
                Ok(Verdict::Published(found(snapshot, snapshot.size, attributes, *head)))
            }
            Judged::Theirs(verdict) => Ok(verdict),
        },
        _ => otherwise(entry, &options, error),
    }
}

/// A store that lacks the conditional header gets the request without, from now on.
fn otherwise(entry: &Entry, options: &PutOptions, error: S3Error) -> Result<Verdict, Trouble> {
    if error.kind == ErrorKind::NotImplemented && options.condition.is_some() && !entry.shared.unconditional.swap(true, Relaxed) {
        tracing::warn!("the store knows no conditional writes: changes made elsewhere at the same time are not noticed ({error})");
        return Ok(Verdict::Retry);
    }
    Err(Trouble::S3(error))
}

/// A store may go on refusing what nothing stands in the way of (a file whose name is a real directory by now): a few times
/// it is asked again, slower each time, and then its word is the publication's result.
async fn once_more(entry: &Entry, refusal: &S3Error) -> Result<(), Trouble> {
    const MOST: u32 = 6;
    let asked = entry.refusals.fetch_add(1, Relaxed);
    if asked >= MOST {
        entry.refusals.store(0, Relaxed);
        return Err(Trouble::S3(refusal.clone()));
    }
    tokio::time::sleep(Duration::from_millis(100 << asked)).await;
    Ok(())
}

enum Judged {
    Ours(Box<ObjectHead>),
    Theirs(Verdict),
}

/// The condition did not hold: is it our own object, whose answer was lost, and if not, what is to be done (promise 12)?
async fn judge(entry: &Arc<Entry>, snapshot: &Snapshot, sent: &Sent, doubt: bool, refusal: &S3Error) -> Result<Judged, Trouble> {
    let Target { store, key } = &snapshot.target;
    let theirs = match store.head(key).await {
        Ok(head) if is_ours(sent, &head, snapshot, doubt) => return Ok(Judged::Ours(Box::new(head))),
        // The same bytes by chance (two empty files): nothing to keep beside anything. O_EXCL tells who was first, and a line that
        // both have appended is two.
        Ok(head) if snapshot.whole && snapshot.expect != Expect::Absent && !behind::is_append(entry) && sent.has_bytes_of(&head) => {
            return Ok(Judged::Ours(Box::new(head)));
        }
        Ok(head) => match entry.whose(&snapshot.target, &head) {
            Whose::Present => return Ok(Judged::Ours(Box::new(head))),
            Whose::Earlier => return Ok(Judged::Theirs(Verdict::Anew)),
            Whose::Theirs => Some(head),
        },
        Err(error) if error.kind == ErrorKind::NoSuchKey => None,
        Err(error) => return Err(Trouble::S3(error)),
    };
    let expect = |expect| {
        entry.intent.lock().expect = expect;
        Verdict::Retry
    };
    let policy = entry.shared.config.on_conflict;
    Ok(Judged::Theirs(match (theirs, policy) {
        // Theirs deleted: ours is created. What it kept of theirs has been copied or fetched by now.
        (None, _) if matches!(snapshot.expect, Expect::Version(_)) => expect(Expect::NewFile),
        // A key that came and went: the same again.
        (None, _) => {
            once_more(entry, refusal).await?;
            Verdict::Retry
        }
        (Some(_), _) if snapshot.expect == Expect::Absent => Verdict::Refused(Error::Exists),
        (Some(theirs), OnConflict::Keep | OnConflict::Overwrite) if behind::is_append(entry) => {
            once_more(entry, refusal).await?;
            behind::behind(entry, &snapshot.target, theirs).await?;
            Verdict::Anew
        }
        (Some(_), OnConflict::Overwrite) => expect(Expect::Anything),
        (Some(_), OnConflict::Keep) if snapshot.whole => {
            let beside = key_beside(key);
            tracing::warn!("s3://{}/{key}: written by somebody else meanwhile: ours is kept beside it as {beside}", store.bucket());
            Verdict::Elsewhere(beside)
        }
        (Some(_), OnConflict::Keep | OnConflict::Fail) => Verdict::Refused(Error::Stale),
    }))
}

/// Bytes of the base that are part of the content are not under its key any more: somebody else has changed or removed it.
pub(crate) async fn without_base(entry: &Arc<Entry>, snapshot: &Snapshot) -> Result<Verdict, Trouble> {
    let Target { store, key } = &snapshot.target;
    let theirs = match store.head(key).await {
        Ok(head) => match entry.whose(&snapshot.target, &head) {
            Whose::Present => {
                let sent = entry.intent.lock().attributes.clone();
                return Ok(Verdict::Published(found(snapshot, snapshot.size, sent, head)));
            }
            Whose::Earlier => return Ok(Verdict::Anew),
            Whose::Theirs => Some(head),
        },
        Err(error) if error.kind == ErrorKind::NoSuchKey => None,
        Err(error) => return Err(Trouble::S3(error)),
    };
    // Not theirs: a change of ours that was on its way (its attributes, its name) has become known meanwhile.
    let theirs = theirs.filter(|head| snapshot.expect != Expect::Version(head.etag.clone()));
    match (theirs, entry.shared.config.on_conflict) {
        (Some(theirs), OnConflict::Keep | OnConflict::Overwrite) if behind::is_append(entry) => {
            behind::behind(entry, &snapshot.target, theirs).await?;
            Ok(Verdict::Anew)
        }
        (Some(_), OnConflict::Keep | OnConflict::Fail) if snapshot.expect != Expect::Anything => Ok(Verdict::Refused(Error::Stale)),
        // The cache may have them, or the bucket by the version's id; from inside the store they cannot be copied.
        _ if !std::mem::replace(&mut entry.intent.lock().fetches, true) => Ok(Verdict::Anew),
        _ => Ok(Verdict::Refused(Error::BaseGone)),
    }
}

/// Same bytes, and nobody else's: after a lost answer the bytes suffice; else the metadata must be ours too (two machines may create
/// the same empty lock file, and only one of them may have it).
fn is_ours(sent: &Sent, head: &ObjectHead, snapshot: &Snapshot, doubt: bool) -> bool {
    let young = head.last_modified + Duration::from_secs(60) >= snapshot.began;
    sent.has_bytes_of(head) && (doubt || young && sent.is_marked(head))
}

fn as_outcome(head: ObjectHead) -> PutOutcome {
    PutOutcome { etag: head.etag, version_id: head.version_id, last_modified: Some(head.last_modified) }
}

/// The object is there already, with what a HEAD tells of it: where others made it, what was to travel with ours follows.
fn found(snapshot: &Snapshot, size: u64, sent: super::Attributes, head: ObjectHead) -> Box<Published> {
    let attributes = super::Attributes { metadata: head.metadata.clone(), headers: head.headers.clone(), ..sent };
    let checksum = head.checksum;
    published(snapshot, size, checksum, &attributes, as_outcome(head))
}

fn published(
    snapshot: &Snapshot,
    size: u64,
    checksum: Option<Checksum>,
    attributes: &super::Attributes,
    outcome: PutOutcome,
) -> Box<Published> {
    Box::new(Published {
        bucket: snapshot.target.store.bucket().to_owned(),
        key: snapshot.target.key.clone(),
        etag: outcome.etag,
        version_id: outcome.version_id,
        size,
        checksum,
        last_modified: outcome.last_modified.unwrap_or_else(SystemTime::now),
        attributes: attributes.clone(),
        rebased: snapshot.rebased,
        replaced: matches!(snapshot.expect, Expect::Anything | Expect::Version(_)),
    })
}

/// The full-object checksum, where every part was sent with one.
pub(crate) fn combine(mut parts: impl Iterator<Item = (Option<Checksum>, u64)>) -> Option<Checksum> {
    let mut whole = parts.next()?.0?;
    for (checksum, size) in parts {
        whole = match (whole, checksum?) {
            (Checksum::Crc64Nvme(a), Checksum::Crc64Nvme(b)) => {
                Checksum::Crc64Nvme(crc_fast::checksum_combine(CrcAlgorithm::Crc64Nvme, a, b, size))
            }
            (Checksum::Crc32c(a), Checksum::Crc32c(b)) => {
                Checksum::Crc32c(crc_fast::checksum_combine(CrcAlgorithm::Crc32Iscsi, u64::from(a), u64::from(b), size) as u32)
            }
            _ => return None,
        };
    }
    // An MD5 of one part says nothing about a multipart object.
    Some(whole).filter(|sum| !matches!(sum, Checksum::Md5(_) | Checksum::Sha1(_)))
}

/// The ETag of a multipart object: MD5 of the parts' MD5s and their number; `None` where a part's ETag is not an MD5.
pub(crate) fn multipart_etag(parts: &[Part]) -> Option<ETag> {
    let mut all = Md5::new();
    for part in parts {
        all.update(part.etag.md5()?);
    }
    Some(ETag::new(format!("{}-{}", hex::encode(all.finalize()), parts.len())))
}

fn md5_of(checksum: Checksum) -> Option<[u8; 16]> {
    if let Checksum::Md5(md5) = checksum { Some(md5) } else { None }
}

/// The ETag of an object that was PUT in one piece, where ETags are MD5s.
fn etag_of(md5: [u8; 16]) -> ETag {
    ETag::new(hex::encode(md5))
}

fn host() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "this machine".into())
}

/// See [`super::Writeback::key_beside`].
pub(crate) fn key_beside(key: &str) -> String {
    conflict_key(key, &host(), SystemTime::now())
}

/// `dir/name (conflict of HOST DATE).ext`, cut to a legal key.
fn conflict_key(key: &str, host: &str, now: SystemTime) -> String {
    let (dir, name) = key.rsplit_once('/').map_or(("", key), |(dir, name)| (&key[..dir.len() + 1], name));
    // A leading dot makes a hidden file, not an extension.
    let (stem, ext) = match name.rfind('.') {
        Some(dot) if dot > 0 => name.split_at(dot),
        _ => (name, ""),
    };
    let date =
        jiff::Timestamp::try_from(now).unwrap_or_default().to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H.%M.%S").to_string();
    let mark = format!(" (conflict of {} {date})", host.replace('/', "-"));
    let mut room = KEY_BYTES.saturating_sub(dir.len() + mark.len() + ext.len()).min(stem.len());
    while !stem.is_char_boundary(room) {
        room -= 1;
    }
    format!("{dir}{}{mark}{ext}", &stem[..room])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conflict_is_kept_beside_with_its_extension() {
        let at = SystemTime::now();
        let name = conflict_key("a/b.tar/report.pdf", "desk", at);
        assert!(name.starts_with("a/b.tar/report (conflict of desk 2") && name.ends_with(").pdf"), "{name}");
        assert!(conflict_key(".profile", "h", at).starts_with(".profile (conflict of h "));
        let long = format!("{}é.txt", "é".repeat(600));
        assert!(conflict_key(&long, "h", at).len() <= KEY_BYTES);
    }

    #[test]
    fn part_checksums_combine_to_that_of_the_object() {
        let (a, b) = (vec![7u8; 1000], vec![9u8; 77]);
        let whole = [a.as_slice(), b.as_slice()].concat();
        let sum = |bytes: &[u8]| Some(Checksum::Crc64Nvme(crc_fast::crc64_nvme(bytes)));
        assert_eq!(combine([(sum(&a), 1000), (sum(&b), 77)].into_iter()), sum(&whole));
        assert_eq!(combine([(sum(&a), 1000), (None, 77)].into_iter()), None);
    }
}
