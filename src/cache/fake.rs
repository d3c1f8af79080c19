//! An object in memory behind the [`Store`] trait, with scripted failures and counters: the outside world of the cache's tests.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use parking_lot::Mutex;

use super::ObjectVersion;
use crate::s3::*;

/// What goes wrong with one GET.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The body ends after so many bytes, without an error.
    Short(usize),
    /// The body fails after so many bytes.
    Reset(usize),
    /// The body gives no more after so many bytes.
    Stall(usize),
    /// The GET itself fails.
    Refuse(ErrorKind),
    /// One bit of the body's byte at this place is turned.
    Flip(usize),
    /// Another version answers.
    OtherETag,
}

#[derive(Clone, Debug)]
pub struct Object {
    pub etag: ETag,
    pub data: Bytes,
    pub checksum: Option<Checksum>,
}

#[derive(Debug, Default)]
pub struct Fake {
    pub current: Mutex<Option<Object>>,
    /// Replaced versions, by version id.
    pub old: Mutex<Vec<(String, Object)>>,
    pub faults: Mutex<VecDeque<Fault>>,
    pub gets: Mutex<Vec<Range<u64>>>,
    pub heads: AtomicUsize,
    pub open: Arc<AtomicUsize>,
    pub peak: AtomicUsize,
    pub sent: Arc<AtomicUsize>,
    /// Time to the head of an answer.
    pub latency: Mutex<Duration>,
    /// Time of 64 KiB of body.
    pub pace: Mutex<Duration>,
    pub gone: AtomicBool,
}

/// `len` bytes that differ everywhere.
pub fn content(len: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out.into()
}

impl Fake {
    pub fn new(data: Bytes, etag: &str) -> Arc<Self> {
        let fake = Self::default();
        *fake.current.lock() = Some(Object { etag: ETag::new(etag), data, checksum: None });
        Arc::new(fake)
    }

    pub fn version(&self, key: &str) -> ObjectVersion {
        let current = self.current.lock();
        let (etag, size) = current.as_ref().map_or((ETag::new(""), 0), |o| (o.etag.clone(), o.data.len() as u64));
        ObjectVersion { bucket: "bucket".into(), key: key.into(), etag, size, version_id: None }
    }

    pub fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().extend(faults);
    }

    pub fn get_count(&self) -> usize {
        self.gets.lock().len()
    }

    pub fn asked(&self) -> u64 {
        self.gets.lock().iter().map(|range| range.end - range.start).sum()
    }

    fn object(&self, version_id: Option<&str>, key: &str) -> Result<Object> {
        let old = self.old.lock();
        let object = match version_id {
            Some(id) => old.iter().find(|(old, _)| old == id).map(|(_, object)| object.clone()),
            None => self.current.lock().clone(),
        };
        object.ok_or_else(|| error(ErrorKind::NoSuchKey, key))
    }
}

fn error(kind: ErrorKind, key: &str) -> S3Error {
    S3Error::local(kind, "GetObject", format!("s3://bucket/{key}"), "scripted")
}

fn head(object: &Object) -> ObjectHead {
    ObjectHead {
        size: object.data.len() as u64,
        etag: object.etag.clone(),
        last_modified: SystemTime::UNIX_EPOCH,
        metadata: Metadata::new(),
        headers: ObjectHeaders::default(),
        storage_class: None,
        version_id: None,
        checksum: object.checksum,
        restore: None,
        tag_count: 0,
    }
}

struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn absent<T>(operation: &str) -> Result<T> {
    Err(error(ErrorKind::NotImplemented, operation))
}

#[async_trait]
impl Store for Fake {
    fn bucket(&self) -> &str {
        "bucket"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            max_object_size: 1 << 42,
            max_single_copy: 5 << 30,
            conditional_writes: None,
            delete_many: true,
            conditional_deletes: Some(true),
            real_directories: false,
            plain_copies: false,
            upload_checksum: ChecksumKind::Off,
        }
    }

    async fn head(&self, key: &str) -> Result<ObjectHead> {
        self.heads.fetch_add(1, Ordering::SeqCst);
        Ok(head(&self.object(None, key)?))
    }

    async fn get(&self, key: &str, request: GetRequest) -> Result<GetObject> {
        self.answer(key, request).await
    }

    async fn list(&self, _: ListRequest) -> Result<ListPage> {
        absent("list")
    }

    async fn put(&self, _: &str, _: Arc<dyn Source>, _: PutOptions) -> Result<PutOutcome> {
        absent("put")
    }

    async fn delete(&self, _: &str, _: Option<ETag>) -> Result<()> {
        absent("delete")
    }

    async fn delete_many(&self, _: &[(String, Option<ETag>)]) -> Result<Vec<(String, S3Error)>> {
        absent("delete_many")
    }

    async fn copy(&self, _: &str, _: CopySource, _: CopyMetadata, _: Option<Condition>) -> Result<PutOutcome> {
        absent("copy")
    }

    async fn create_multipart(&self, _: &str, _: PutOptions) -> Result<String> {
        absent("create_multipart")
    }

    async fn upload_part(&self, _: &str, _: &str, _: u32, _: Arc<dyn Source>, _: Option<Checksum>) -> Result<Part> {
        absent("upload_part")
    }

    async fn upload_part_copy(&self, _: &str, _: &str, _: u32, _: CopySource, _: Range<u64>) -> Result<Part> {
        absent("upload_part_copy")
    }

    async fn complete_multipart(&self, _: &str, _: &str, _: &[Part], _: u64, _: PutOptions) -> Result<PutOutcome> {
        absent("complete_multipart")
    }

    async fn abort_multipart(&self, _: &str, _: &str) -> Result<()> {
        absent("abort_multipart")
    }

    async fn list_parts(&self, _: &str, _: &str) -> Result<Vec<Part>> {
        absent("list_parts")
    }

    async fn list_uploads(&self, _: &str) -> Result<Vec<PendingUpload>> {
        absent("list_uploads")
    }

    async fn get_tags(&self, _: &str) -> Result<Vec<(String, String)>> {
        absent("get_tags")
    }

    async fn put_tags(&self, _: &str, _: &[(String, String)]) -> Result<()> {
        absent("put_tags")
    }

    async fn get_acl(&self, _: &str) -> Result<Option<Acl>> {
        absent("get_acl")
    }

    async fn presign_get(&self, _: &str, _: u64, _: &[(String, String)]) -> Result<String> {
        absent("presign_get")
    }
}

impl Fake {
    async fn answer(&self, key: &str, request: GetRequest) -> Result<GetObject> {
        let fault = self.faults.lock().pop_front();
        let opened = Open(Arc::clone(&self.open));
        self.peak.fetch_max(self.open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        self.gets.lock().push(request.range.clone().unwrap_or_default());
        let (latency, pace) = (*self.latency.lock(), *self.pace.lock());
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        let mut object = self.object(request.version_id.as_deref(), key)?;
        if self.gone.load(Ordering::SeqCst) {
            return Err(error(ErrorKind::Network, key));
        }
        match fault {
            Some(Fault::Refuse(kind)) => return Err(error(kind, key)),
            Some(Fault::OtherETag) => object.etag = ETag::new("other"),
            _ if request.if_match.as_ref().is_some_and(|etag| *etag != object.etag) => {
                return Err(error(ErrorKind::PreconditionFailed, key));
            }
            _ => {}
        }
        let range = request.range.unwrap_or(0..object.data.len() as u64);
        let mut bytes = object.data.slice(range.start as usize..range.end as usize);
        if let Some(Fault::Flip(at)) = fault {
            let mut turned = bytes.to_vec();
            turned[at] ^= 4;
            bytes = turned.into();
        }
        let cut = match fault {
            Some(Fault::Short(n) | Fault::Reset(n) | Fault::Stall(n)) => n.min(bytes.len()),
            _ => bytes.len(),
        };
        let sent = bytes.slice(..cut);
        let chunks: Vec<Result<Bytes>> = (0..sent.len()).step_by(65536).map(|at| Ok(sent.slice(at..sent.len().min(at + 65536)))).collect();
        let end = match fault {
            Some(Fault::Reset(_)) => futures::stream::iter(vec![Err(error(ErrorKind::Network, key))]).boxed(),
            Some(Fault::Stall(_)) => futures::stream::pending().boxed(),
            _ => futures::stream::empty().boxed(),
        };
        let counter = Arc::clone(&self.sent);
        let body = futures::stream::iter(chunks)
            .then(move |chunk| {
                _ = &opened;
                let counter = Arc::clone(&counter);
                async move {
                    if !pace.is_zero() {
                        tokio::time::sleep(pace).await;
                    }
                    counter.fetch_add(chunk.as_ref().map_or(0, Bytes::len), Ordering::SeqCst);
                    chunk
                }
            })
            .chain(end)
            .boxed();
        Ok(GetObject { head: head(&object), range, body })
    }
}
