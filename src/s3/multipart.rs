//! How an object is cut into parts, and copies of any size inside the store.

use std::ops::Range;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};

use super::slow::{self, Progress};
use super::{CopyMetadata, CopySource, ErrorKind, ObjectHead, PutOptions, PutOutcome, Result, S3Error, Store};

/// Most parts of an upload (S3's limit).
pub const MAX_PARTS: u32 = 10_000;
/// Smallest part but the last (S3's limit), bytes.
pub const MIN_PART: u64 = 5 << 20;
/// Largest part (S3's limit), bytes.
pub const MAX_PART: u64 = 5 << 30;
/// First parts of an upload whose size nobody knows: small enough to start early, large enough for few requests.
const FIRST_PART: u64 = 8 << 20;
/// Parts of a server-side copy: many at once make a large copy short.
const COPY_PART: u64 = 256 << 20;
/// UploadPartCopy requests at once; they move no bytes of ours.
const COPIES_AT_ONCE: usize = 16;

/// Where each part of an upload of unknown size begins and ends. Sizes double every `run` parts, so that [`MAX_PARTS`] parts reach the
/// largest object; `run` is as long as that allows. Part 1 begins at 0 and parts follow without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartPlan {
    first: u64,
    run: u32,
}

fn tier_size(first: u64, tier: u32) -> u64 {
    first.checked_shl(tier).filter(|size| size >> tier == first).unwrap_or(MAX_PART).min(MAX_PART)
}

impl PartPlan {
    /// A plan for objects up to `max_object` bytes (or as near as parts of 5 GiB come). `part_size` fixes the first parts' size.
    pub fn new(part_size: Option<u64>, max_object: u64) -> Self {
        let first = part_size.unwrap_or(FIRST_PART).clamp(MIN_PART, MAX_PART);
        let (mut low, mut high) = (1, MAX_PARTS);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if (Self { first, run: middle }).capacity() >= max_object {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        Self { first, run: low }
    }

    /// Where part `index` (from 0) begins.
    fn start(&self, index: u32) -> u64 {
        let (tiers, rest) = (index / self.run, index % self.run);
        let mut start = 0u64;
        for tier in 0..tiers {
            let size = tier_size(self.first, tier);
            if size == MAX_PART {
                return start + u64::from(index - tier * self.run) * MAX_PART;
            }
            start += u64::from(self.run) * size;
        }
        start + u64::from(rest) * tier_size(self.first, tiers)
    }

    /// Bytes that all parts hold together.
    pub fn capacity(&self) -> u64 {
        self.start(MAX_PARTS)
    }

    /// The bytes of part `number` (from 1); the last part of an object ends earlier.
    pub fn range(&self, number: u32) -> Range<u64> {
        let index = number.saturating_sub(1);
        self.start(index)..self.start(index + 1)
    }

    /// The part that holds the byte at `offset`; past [`PartPlan::capacity`] a number over [`MAX_PARTS`].
    pub fn number_of(&self, offset: u64) -> u32 {
        let (mut tier, mut start) = (0u32, 0u64);
        loop {
            let size = tier_size(self.first, tier);
            let length = u64::from(self.run) * size;
            if offset < start + length || size == MAX_PART {
                let within = (offset - start) / size;
                return u32::try_from(within).unwrap_or(u32::MAX).saturating_add(tier * self.run).saturating_add(1);
            }
            start += length;
            tier += 1;
        }
    }
}

/// Equal ranges for copying `size` bytes in parts.
fn copy_ranges(size: u64) -> Vec<Range<u64>> {
    let part = COPY_PART.max(size.div_ceil(u64::from(MAX_PARTS)));
    (0..size.div_ceil(part)).map(|index| index * part..((index + 1) * part).min(size)).collect()
}

/// Copies an object inside the store, whatever its size: CopyObject up to its limit, else parallel UploadPartCopy, to which everything that is
/// stored with the object is sent again (a multipart copy carries none of it). `head` is the source's, as it is now; `tags` are the source's
/// tags, needed where `head.tag_count` is not 0 and the copy is in parts. It takes as long as the store works on it, but no longer than
/// `limit` (`close_timeout`) after its last answer. A failed copy leaves no upload.
///
/// # Errors
/// [`ErrorKind::PreconditionFailed`] when `source.if_match` does not hold, [`ErrorKind::Archived`] without a request,
/// [`ErrorKind::TimedOut`] after `limit`, [`ErrorKind::BadDigest`] when the store's answers do not add up to the source.
pub async fn copy_object(
    store: &dyn Store,
    to_key: &str,
    source: CopySource,
    head: &ObjectHead,
    tags: &[(String, String)],
    metadata: CopyMetadata,
    limit: Duration,
) -> Result<PutOutcome> {
    let to = format!("s3://{}/{to_key}", store.bucket());
    let stalled = || S3Error::local(ErrorKind::TimedOut, "CopyObject", &to, format!("the store has not answered for {limit:?}"));
    if head.is_archived() {
        let from = format!("s3://{}/{}", source.bucket, source.key);
        return Err(S3Error::local(
            ErrorKind::Archived,
            "CopyObject",
            from,
            "the object is archived; restore it first (aws s3api restore-object)",
        ));
    }
    if head.size <= store.capabilities().max_single_copy {
        let copied = slow::while_alive(limit, limit, |_| store.copy(to_key, source, metadata, None)).await;
        return copied.unwrap_or_else(|| Err(stalled()));
    }
    // What has no checksum of the whole gets none.
    let plain = store.capabilities().plain_copies && head.checksum.is_none();
    let (source, options) = in_parts(source, head, tags, metadata, plain);
    let created = slow::while_alive(limit, limit, |_| store.create_multipart(to_key, options)).await;
    let upload_id = created.unwrap_or_else(|| Err(stalled()))?;
    let copied =
        slow::while_alive(limit, limit, |progress| parts_and_complete(store, to_key, &upload_id, source, head, plain, progress)).await;
    let copied = copied.unwrap_or_else(|| Err(stalled()));
    if copied.is_err() {
        let aborted = store.abort_multipart(to_key, &upload_id).await;
        if let Err(error) = aborted {
            tracing::warn!(reason = %error, "the upload of a failed copy could not be aborted");
        }
    }
    copied
}

/// What a copy in parts is made of: the source, of one version, and all that is stored with the object.
fn in_parts(
    source: CopySource,
    head: &ObjectHead,
    tags: &[(String, String)],
    metadata: CopyMetadata,
    plain: bool,
) -> (CopySource, PutOptions) {
    let mut options = match metadata {
        CopyMetadata::Keep { website_redirect, storage_class, acl } => {
            let mut headers = head.headers.clone();
            headers.website_redirect = website_redirect;
            PutOptions {
                headers,
                metadata: head.metadata.clone(),
                storage_class: storage_class.or_else(|| head.storage_class.clone()),
                acl,
                ..PutOptions::default()
            }
        }
        CopyMetadata::Replace(options) => *options,
    };
    // Stated even where it is the default: the mount's own storage class is for new objects.
    options.storage_class.get_or_insert_with(|| head.storage_class.clone().unwrap_or_else(|| "STANDARD".to_owned()));
    tags.clone_into(&mut options.tags);
    (options.checksum, options.condition, options.plain) = (None, None, plain);
    // Parts read at different times must be of one version.
    let source =
        CopySource { if_match: source.if_match.or_else(|| Some(head.etag.clone())), checksum: source.checksum.or(head.checksum), ..source };
    (source, options)
}

async fn parts_and_complete(
    store: &dyn Store,
    to_key: &str,
    upload_id: &str,
    source: CopySource,
    head: &ObjectHead,
    plain: bool,
    progress: Progress,
) -> Result<PutOutcome> {
    let numbered = copy_ranges(head.size).into_iter().zip(1u32..);
    let copies = numbered.map(|(range, number)| store.upload_part_copy(to_key, upload_id, number, source.clone(), range));
    let mut parts: Vec<_> = futures::stream::iter(copies).buffered(COPIES_AT_ONCE).inspect_ok(|_| progress.made()).try_collect().await?;
    if plain {
        parts.iter_mut().for_each(|part| part.checksum = None);
    }
    let options =
        PutOptions { checksum: head.checksum.filter(|sum| matches!(sum, super::Checksum::Crc64Nvme(_))), ..PutOptions::default() };
    let outcome = store.complete_multipart(to_key, upload_id, &parts, head.size, options).await?;
    let now = store.head(to_key).await?;
    if now.etag == outcome.etag && now.size != head.size {
        let message = format!("the copy has {} bytes, the source {}", now.size, head.size);
        return Err(S3Error::local(ErrorKind::BadDigest, "UploadPartCopy", format!("s3://{}/{to_key}", store.bucket()), message));
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FIVE_TIB: u64 = 5 << 40;
    const FIFTY_TB: u64 = 50_000_000_000_000;

    #[test]
    fn ten_thousand_parts_reach_the_largest_object() {
        assert!(PartPlan::new(None, FIVE_TIB).capacity() >= FIVE_TIB);
        assert!(PartPlan::new(None, FIFTY_TB).capacity() >= FIFTY_TB);
        assert!(PartPlan::new(Some(MIN_PART), FIFTY_TB).capacity() >= FIFTY_TB);
        assert_eq!(PartPlan::new(None, FIVE_TIB).range(1), 0..8 << 20);
        let fixed = PartPlan::new(Some(1 << 30), FIVE_TIB);
        assert_eq!(fixed.range(5000), (4999 << 30)..(5000 << 30));
    }

    proptest! {
        #[test]
        fn parts_follow_each_other(size in proptest::option::of(1u64..6 << 30), max in prop_oneof![Just(FIVE_TIB), Just(FIFTY_TB), 1..FIFTY_TB], number in 1u32..MAX_PARTS, at in 0.0f64..1.0) {
            let plan = PartPlan::new(size, max);
            let range = plan.range(number);
            let length = range.end - range.start;
            prop_assert!((MIN_PART..=MAX_PART).contains(&length));
            prop_assert_eq!(plan.range(number + 1).start, range.end);
            let offset = range.start + ((length - 1) as f64 * at) as u64;
            prop_assert_eq!(plan.number_of(offset), number);
            prop_assert_eq!(plan.number_of(range.end), number + 1);
            prop_assert!(plan.capacity() >= max);
        }

        #[test]
        fn copies_cover_the_object(size in 1u64..FIFTY_TB) {
            let ranges = copy_ranges(size);
            prop_assert!(ranges.len() <= MAX_PARTS as usize);
            prop_assert_eq!(ranges.first().map(|r| r.start), Some(0));
            prop_assert_eq!(ranges.last().map(|r| r.end), Some(size));
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }
}
