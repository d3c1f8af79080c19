//! A bucket in memory for the tests: multipart, copies, conditions, checksums, and failures on demand.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use md5::{Digest, Md5};
use parking_lot::Mutex;

use super::rights::NO_UPLOAD;
use crate::s3::*;

/// Decides whether an operation fails, before it does anything; `"X!"` asks after it was done (a lost answer).
type Fault = Box<dyn FnMut(&str, &str) -> Option<ErrorKind> + Send>;

#[derive(Clone, Debug)]
pub struct Object {
    pub bytes: Bytes,
    pub etag: ETag,
    pub metadata: Metadata,
}

#[derive(Clone, Debug, Default)]
pub struct Pending {
    pub key: String,
    pub metadata: Metadata,
    pub parts: BTreeMap<u32, (Bytes, ETag)>,
}

#[derive(Default)]
pub struct Inner {
    pub objects: BTreeMap<String, Object>,
    pub uploads: BTreeMap<String, Pending>,
    pub calls: Vec<String>,
    fault: Option<Fault>,
    next: u64,
}

pub struct Fake {
    pub inner: Mutex<Inner>,
    /// Bytes taken in by PutObject and UploadPart, and given out by GetObject.
    pub up: AtomicU64,
    pub down: AtomicU64,
    /// Data transfers at once: now, and the most.
    pub busy: AtomicUsize,
    pub most: AtomicUsize,
    /// Waited before each answer.
    pub delay: Mutex<Duration>,
    /// How the store wants uploads summed.
    pub kind: Mutex<ChecksumKind>,
    /// Waited before each chunk of a body.
    pub chunk_delay: Mutex<Duration>,
    /// ETags are no MD5 of anything, and checksums are told instead, as with SSE-KMS.
    pub opaque: AtomicBool,
}

impl Default for Fake {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            up: AtomicU64::default(),
            down: AtomicU64::default(),
            busy: AtomicUsize::default(),
            most: AtomicUsize::default(),
            delay: Mutex::default(),
            kind: Mutex::new(ChecksumKind::Crc64Nvme),
            chunk_delay: Mutex::default(),
            opaque: AtomicBool::default(),
        }
    }
}

impl std::fmt::Debug for Fake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fake")
    }
}

impl Fake {
    pub fn fail(&self, fault: impl FnMut(&str, &str) -> Option<ErrorKind> + Send + 'static) {
        self.inner.lock().fault = Some(Box::new(fault));
    }

    /// The bucket as it is now.
    pub fn snapshot(&self) -> Fake {
        let inner = self.inner.lock();
        let copy = Inner { objects: inner.objects.clone(), uploads: inner.uploads.clone(), next: inner.next, ..Inner::default() };
        Fake { inner: Mutex::new(copy), ..Fake::default() }
    }

    pub fn heal(&self) {
        self.inner.lock().fault = None;
    }

    pub fn put_bytes(&self, key: &str, bytes: impl Into<Bytes>) -> ETag {
        let bytes = bytes.into();
        let etag = self.etag(&bytes);
        self.inner.lock().objects.insert(key.into(), Object { bytes, etag: etag.clone(), metadata: Metadata::new() });
        etag
    }

    fn etag(&self, bytes: &[u8]) -> ETag {
        if !self.opaque.load(Relaxed) {
            return ETag::new(hex::encode(Md5::digest(bytes)));
        }
        let mut inner = self.inner.lock();
        inner.next += 1;
        ETag::new(hex::encode(Md5::digest(inner.next.to_be_bytes())))
    }

    /// The checksum that is told of these bytes.
    fn told(&self, bytes: &[u8]) -> Option<Checksum> {
        self.opaque.load(Relaxed).then(|| Checksum::Crc64Nvme(crc_fast::crc64_nvme(bytes)))
    }

    pub fn object(&self, key: &str) -> Option<Object> {
        self.inner.lock().objects.get(key).cloned()
    }

    pub fn count(&self, operation: &str) -> usize {
        self.inner.lock().calls.iter().filter(|call| call.as_str() == operation).count()
    }

    async fn call(&self, operation: &'static str, key: &str) -> Result<()> {
        let delay = *self.delay.lock();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        self.inner.lock().calls.push(operation.into());
        self.fault(operation, key)
    }

    fn fault(&self, operation: &str, key: &str) -> Result<()> {
        let mut inner = self.inner.lock();
        match inner.fault.as_mut().and_then(|fault| fault(operation, key)) {
            Some(kind) => Err(error(kind, key)),
            None => Ok(()),
        }
    }

    fn condition(&self, key: &str, condition: &Option<Condition>) -> Result<()> {
        let inner = self.inner.lock();
        let object = inner.objects.get(key);
        match (condition, object) {
            (Some(Condition::Absent), Some(_)) => Err(error(ErrorKind::PreconditionFailed, key)),
            (Some(Condition::Matches(_)), None) => Err(error(ErrorKind::NoSuchKey, key)),
            (Some(Condition::Matches(etag)), Some(object)) if *etag != object.etag => Err(error(ErrorKind::PreconditionFailed, key)),
            _ => Ok(()),
        }
    }

    async fn body(&self, body: &Arc<dyn Source>, checksum: Option<Checksum>, key: &str) -> Result<Bytes> {
        self.most.fetch_max(self.busy.fetch_add(1, Relaxed) + 1, Relaxed);
        let mut all = BytesMut::new();
        let mut stream = body.open();
        while let Some(chunk) = stream.next().await {
            let delay = *self.chunk_delay.lock();
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            // The disk's threads may have ended with the test before this did.
            all.extend_from_slice(&chunk.map_err(|_| error(ErrorKind::Network, key))?);
        }
        self.busy.fetch_sub(1, Relaxed);
        assert_eq!(all.len() as u64, body.len());
        self.up.fetch_add(all.len() as u64, Relaxed);
        match checksum {
            Some(Checksum::Crc64Nvme(sum)) if crc_fast::crc64_nvme(&all) != sum => Err(error(ErrorKind::BadDigest, key)),
            _ => Ok(all.freeze()),
        }
    }

    fn source(&self, source: &CopySource) -> Result<Object> {
        let object = self.object(&source.key).ok_or_else(|| error(ErrorKind::NoSuchKey, &source.key))?;
        match &source.if_match {
            Some(etag) if *etag != object.etag => Err(error(ErrorKind::PreconditionFailed, &source.key)),
            _ => Ok(object),
        }
    }

    /// A part that the store has from now on.
    pub fn part(&self, upload: &str, number: u32, bytes: Bytes) -> Result<Part> {
        let (etag, checksum) = (self.etag(&bytes), self.told(&bytes));
        let size = bytes.len() as u64;
        let mut inner = self.inner.lock();
        let pending = inner.uploads.get_mut(upload).ok_or_else(|| error(ErrorKind::NoSuchUpload, upload))?;
        pending.parts.insert(number, (bytes, etag.clone()));
        Ok(Part { number, etag, size, checksum })
    }
}

fn error(kind: ErrorKind, key: &str) -> S3Error {
    S3Error::local(kind, "Fake", key, "made to fail")
}

fn outcome(etag: ETag) -> PutOutcome {
    PutOutcome { etag, version_id: None, last_modified: None }
}

#[async_trait]
impl Store for Fake {
    fn bucket(&self) -> &str {
        "bucket"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            max_object_size: 5 << 40,
            max_single_copy: 5 << 30,
            conditional_writes: Some(true),
            delete_many: true,
            conditional_deletes: Some(true),
            real_directories: false,
            plain_copies: false,
            upload_checksum: *self.kind.lock(),
        }
    }

    async fn head(&self, key: &str) -> Result<ObjectHead> {
        self.call("Head", key).await?;
        let object = self.object(key).ok_or_else(|| error(ErrorKind::NoSuchKey, key))?;
        Ok(ObjectHead {
            size: object.bytes.len() as u64,
            checksum: self.told(&object.bytes),
            etag: object.etag,
            last_modified: SystemTime::now(),
            metadata: object.metadata,
            headers: ObjectHeaders::default(),
            storage_class: None,
            version_id: None,
            restore: None,
            tag_count: 0,
        })
    }

    async fn get(&self, key: &str, request: GetRequest) -> Result<GetObject> {
        self.call("Get", key).await?;
        let source = CopySource { bucket: "bucket".into(), key: key.into(), if_match: request.if_match, version_id: None, checksum: None };
        let object = self.source(&source)?;
        let range = request.range.unwrap_or(0..object.bytes.len() as u64);
        let bytes = object.bytes.slice(range.start as usize..range.end as usize);
        self.down.fetch_add(bytes.len() as u64, Relaxed);
        let head = self.head(key).await?;
        Ok(GetObject { head, range, body: futures::stream::iter([Ok(bytes)]).boxed() })
    }

    async fn list(&self, _: ListRequest) -> Result<ListPage> {
        Ok(ListPage::default())
    }

    async fn put(&self, key: &str, body: Arc<dyn Source>, options: PutOptions) -> Result<PutOutcome> {
        self.call("Put", key).await?;
        let bytes = self.body(&body, options.checksum, key).await?;
        self.condition(key, &options.condition)?;
        let etag = self.put_bytes(key, bytes);
        self.inner.lock().objects.get_mut(key).unwrap().metadata = options.metadata;
        self.fault("Put!", key)?;
        Ok(outcome(etag))
    }

    async fn delete(&self, key: &str, _: Option<ETag>) -> Result<()> {
        self.inner.lock().objects.remove(key);
        Ok(())
    }

    async fn delete_many(&self, _: &[(String, Option<ETag>)]) -> Result<Vec<(String, S3Error)>> {
        Ok(Vec::new())
    }

    async fn copy(&self, key: &str, source: CopySource, metadata: CopyMetadata, _: Option<Condition>) -> Result<PutOutcome> {
        self.call("Copy", key).await?;
        let mut object = self.source(&source)?;
        if let CopyMetadata::Replace(options) = metadata {
            object.metadata = options.metadata;
        }
        object.etag = ETag::new(format!("{}-copied", object.etag));
        self.inner.lock().objects.insert(key.into(), object.clone());
        Ok(outcome(object.etag))
    }

    async fn create_multipart(&self, key: &str, options: PutOptions) -> Result<String> {
        self.call("Create", key).await?;
        let mut inner = self.inner.lock();
        inner.next += 1;
        let id = format!("upload-{}", inner.next);
        inner.uploads.insert(id.clone(), Pending { key: key.into(), metadata: options.metadata, parts: BTreeMap::new() });
        Ok(id)
    }

    async fn upload_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        body: Arc<dyn Source>,
        checksum: Option<Checksum>,
    ) -> Result<Part> {
        if upload_id == NO_UPLOAD {
            // Asks whether it may write, which the tests do not count.
            return Err(error(ErrorKind::NoSuchUpload, key));
        }
        self.call("Part", key).await?;
        let bytes = self.body(&body, checksum, key).await?;
        let part = self.part(upload_id, number, bytes)?;
        self.fault("Part!", key)?;
        Ok(Part { checksum, ..part })
    }

    async fn upload_part_copy(&self, key: &str, upload_id: &str, number: u32, source: CopySource, range: Range<u64>) -> Result<Part> {
        self.call("PartCopy", key).await?;
        let object = self.source(&source)?;
        self.part(upload_id, number, object.bytes.slice(range.start as usize..range.end as usize))
    }

    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[Part], size: u64, options: PutOptions) -> Result<PutOutcome> {
        self.call("Complete", key).await?;
        let pending = self.inner.lock().uploads.get(upload_id).cloned().ok_or_else(|| error(ErrorKind::NoSuchUpload, key))?;
        assert_eq!(pending.key, key);
        self.condition(key, &options.condition)?;
        let (mut all, mut sums) = (BytesMut::new(), Md5::new());
        for (index, part) in parts.iter().enumerate() {
            let (bytes, etag) = &pending.parts[&part.number];
            assert_eq!(etag, &part.etag);
            assert!(index + 1 == parts.len() || bytes.len() >= 5 << 20, "EntityTooSmall");
            all.extend_from_slice(bytes);
            sums.update(etag.md5().unwrap());
        }
        assert_eq!(all.len() as u64, size);
        if let Some(Checksum::Crc64Nvme(sum)) = options.checksum {
            assert_eq!(sum, crc_fast::crc64_nvme(&all), "BadDigest");
        }
        let etag = if self.opaque.load(Relaxed) {
            self.etag(&all)
        } else {
            ETag::new(format!("{}-{}", sums.finalize().iter().map(|b| format!("{b:02x}")).collect::<String>(), parts.len()))
        };
        {
            let mut inner = self.inner.lock();
            inner.uploads.remove(upload_id);
            inner.objects.insert(key.into(), Object { bytes: all.freeze(), etag: etag.clone(), metadata: pending.metadata });
        }
        self.fault("Complete!", key)?;
        Ok(outcome(etag))
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<()> {
        self.call("Abort", key).await?;
        self.inner.lock().uploads.remove(upload_id);
        Ok(())
    }

    async fn list_parts(&self, key: &str, upload_id: &str) -> Result<Vec<Part>> {
        self.call("ListParts", key).await?;
        let inner = self.inner.lock();
        let pending = inner.uploads.get(upload_id).ok_or_else(|| error(ErrorKind::NoSuchUpload, key))?;
        Ok(pending
            .parts
            .iter()
            .map(|(&number, (bytes, etag))| Part { number, etag: etag.clone(), size: bytes.len() as u64, checksum: self.told(bytes) })
            .collect())
    }

    async fn list_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>> {
        let inner = self.inner.lock();
        let matching = inner.uploads.iter().filter(|(_, pending)| pending.key.starts_with(prefix));
        Ok(matching
            .map(|(id, pending)| PendingUpload { key: pending.key.clone(), upload_id: id.clone(), initiated: SystemTime::now() })
            .collect())
    }

    async fn get_tags(&self, _: &str) -> Result<Vec<(String, String)>> {
        Ok(Vec::new())
    }

    async fn put_tags(&self, key: &str, _: &[(String, String)]) -> Result<()> {
        self.call("PutTags", key).await
    }

    async fn get_acl(&self, _: &str) -> Result<Option<Acl>> {
        Ok(None)
    }

    async fn presign_get(&self, _: &str, _: u64, _: &[(String, String)]) -> Result<String> {
        Ok(String::new())
    }
}

/// An account of that one bucket.
#[derive(Debug)]
pub struct OneBucket(pub Arc<Fake>);

#[async_trait]
impl Account for OneBucket {
    async fn buckets(&self) -> Result<Vec<BucketEntry>> {
        Ok(Vec::new())
    }

    async fn bucket(&self, _: &str) -> Result<Arc<dyn Store>> {
        Ok(self.0.clone())
    }

    async fn create_bucket(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn delete_bucket(&self, _: &str) -> Result<()> {
        Ok(())
    }
}
