//! One bucket: what is known of it, and the [`Store`] that the rest of the program sees.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use http::Method;

use super::client::Core;
use super::endpoint::BucketName;
use super::operation::Operation;
use super::request::{Call, Place};
use super::upload::Marker;
use super::{
    Acl, Capabilities, Checksum, ChecksumKind, Condition, CopyMetadata, CopySource, ETag, ErrorKind, GetObject, GetRequest, ListPage,
    ListRequest, ObjectHead, Part, PendingUpload, PutOptions, PutOutcome, Result, S3Error, Source, Store,
};
use crate::aws::{encode, sigv2, sigv4};

const TIB: u64 = 1 << 40;
const GIB: u64 = 1 << 30;

/// A bucket of a [`super::client::Client`].
pub struct Bucket {
    pub(super) core: Arc<Core>,
    pub(super) place: Place,
    pub(super) capabilities: parking_lot::Mutex<Capabilities>,
    /// An answer of the bucket has come: name and region are right.
    located: AtomicBool,
    /// The bucket has ACLs off (or blocks public ones): said once, none sent again.
    pub(super) acl_off: AtomicBool,
    /// Whether the bucket has ACLs on, where that is known, and until when it is believed (`None`: for good), once it was asked.
    pub(super) acls: tokio::sync::Mutex<Option<(Option<bool>, Option<Instant>)>>,
    /// It was said that copies may lose their ACL.
    pub(super) acl_lost: AtomicBool,
    /// A directory marker that exists, for the probe of conditional writes.
    pub(super) marker: parking_lot::Mutex<Option<Marker>>,
    pub(super) probe: tokio::sync::Mutex<()>,
    /// Keys were deleted here as the versions that a listing told of.
    pub(super) looked: AtomicBool,
    /// Keys for which a CreateMultipartUpload was sent and no answer understood, and since when: uploads that nobody knows may be there.
    pub(super) unknown_uploads: parking_lot::Mutex<HashMap<String, SystemTime>>,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bucket").field("name", &self.name()).field("region", &self.place.region()).finish_non_exhaustive()
    }
}

impl Bucket {
    pub(super) fn new(core: Arc<Core>, name: BucketName) -> Self {
        let region = match &name {
            BucketName::AccessPoint { region, .. } => region.clone(),
            BucketName::Plain(_) => core.region.clone(),
        };
        let aws = core.endpoint.is_aws();
        let capabilities = Capabilities {
            // AWS raised the limit from 5 TiB to 50 TB in December 2025; compatible stores did not.
            max_object_size: if aws { 50_000_000_000_000 } else { 5 * TIB },
            max_single_copy: 5 * GIB,
            conditional_writes: aws.then_some(true),
            delete_many: true,
            conditional_deletes: aws.then_some(true),
            real_directories: !aws,
            plain_copies: !aws && core.config.upload_checksum.is_none(),
            upload_checksum: core.config.upload_checksum.unwrap_or(ChecksumKind::Crc64Nvme),
        };
        Self {
            core,
            place: Place::new(Some(name), region),
            capabilities: parking_lot::Mutex::new(capabilities),
            located: AtomicBool::new(false),
            acl_off: AtomicBool::new(false),
            acls: tokio::sync::Mutex::default(),
            acl_lost: AtomicBool::new(false),
            marker: parking_lot::Mutex::new(None),
            probe: tokio::sync::Mutex::new(()),
            looked: AtomicBool::new(false),
            unknown_uploads: parking_lot::Mutex::default(),
        }
    }

    pub(super) fn name(&self) -> &str {
        self.place.bucket.as_ref().map_or("", BucketName::as_str)
    }

    pub(super) fn located(&self) {
        self.located.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_located(&self) -> bool {
        self.located.load(Ordering::Relaxed)
    }

    /// Finds the region and that the bucket exists. A 403 is no refusal: rights may be limited to a prefix.
    pub(super) async fn locate(&self) -> Result<()> {
        let call = Call::new(&self.core, Operation::HeadBucket, Method::HEAD);
        let error = match self.core.whole(&self.place, &call).await {
            Ok(_) => {
                self.located();
                return Ok(());
            }
            Err(refusal) => refusal.error,
        };
        match error.kind {
            ErrorKind::AccessDenied => {
                self.located();
                Ok(())
            }
            // A HEAD has no body to say what was wrong with it, or which region is right: a listing has.
            ErrorKind::InvalidRequest | ErrorKind::WrongRegion | ErrorKind::NotImplemented | ErrorKind::Credentials => {
                let request = ListRequest { max_keys: Some(1), ..ListRequest::default() };
                match self.list_page(request).await {
                    Err(error) if error.kind != ErrorKind::AccessDenied => Err(error),
                    _ => {
                        self.located();
                        Ok(())
                    }
                }
            }
            _ => Err(error),
        }
    }

    async fn link(&self, key: &str, expires: u64, query: &[(String, String)]) -> Result<String> {
        let failed = |kind, message: String| S3Error::local(kind, Operation::GetObject.name(), self.place.resource(Some(key)), message);
        let credential = self.core.credentials.get(Some(self.name())).await.map_err(|message| failed(ErrorKind::Credentials, message))?;
        let region = self.place.region();
        let location = self.core.endpoint.locate(self.place.bucket.as_ref(), &region, true);
        let path = encode::key_path(&location.prefix, key)
            .ok_or_else(|| failed(ErrorKind::InvalidRequest, "no URL can name this key; use path_style".into()))?;
        let mut query = query.to_vec();
        if self.core.config.requester_pays {
            query.push(("x-amz-request-payer".into(), "requester".into()));
        }
        let own = encode::query(query.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let lead = if own.is_empty() { String::new() } else { format!("{own}&") };
        let Some(credential) = credential else {
            let tail = if own.is_empty() { own } else { format!("?{own}") };
            return Ok(format!("{}{}{tail}", location.origin, path.wire));
        };
        if self.core.config.sigv2 {
            let resource = format!("{}/{}", location.resource, encode::key(key));
            let headers = http::HeaderMap::new();
            let subject = sigv2::Subject { method: "GET", resource: &resource, query: &query, headers: &headers };
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
            let signed = sigv2::presigned_query(&subject, &credential, now.saturating_add(expires))
                .ok_or_else(|| failed(ErrorKind::Credentials, "the secret key cannot sign".into()))?;
            return Ok(format!("{}{}?{lead}{signed}", location.origin, path.wire));
        }
        // AWS, "Authenticating requests: query parameters": at most seven days.
        if !(1..=604_800).contains(&expires) {
            return Err(failed(
                ErrorKind::InvalidRequest,
                "a link can be valid for 1 second to 7 days (604800 s); use CloudFront for longer ones".into(),
            ));
        }
        let url = format!("{}{}{}", location.origin, path.signed, if own.is_empty() { String::new() } else { format!("?{own}") });
        let scope = sigv4::Scope { service: "s3", region: &region };
        let signed = sigv4::presigned_query(scope, &Method::GET, &url, Duration::from_secs(expires), &credential).await;
        let signed = signed.map_err(|message| failed(ErrorKind::Credentials, message))?;
        Ok(format!("{}{}?{signed}", location.origin, path.wire))
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Bucket {
    fn bucket(&self) -> &str {
        self.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities.lock().clone()
    }

    async fn head(&self, key: &str) -> Result<ObjectHead> {
        self.head_object(key).await
    }

    async fn get(&self, key: &str, request: GetRequest) -> Result<GetObject> {
        self.get_object(key, request).await
    }

    async fn list(&self, request: ListRequest) -> Result<ListPage> {
        self.list_page(request).await
    }

    async fn put(&self, key: &str, body: Arc<dyn Source>, options: PutOptions) -> Result<PutOutcome> {
        self.put_object(key, body, options).await
    }

    async fn delete(&self, key: &str, if_match: Option<ETag>) -> Result<()> {
        self.spare_marker(key).await;
        self.delete_key(key, if_match).await
    }

    async fn delete_many(&self, keys: &[(String, Option<ETag>)]) -> Result<Vec<(String, S3Error)>> {
        for (key, _) in keys {
            self.spare_marker(key).await;
        }
        self.delete_keys(keys).await
    }

    async fn copy(&self, key: &str, source: CopySource, metadata: CopyMetadata, condition: Option<Condition>) -> Result<PutOutcome> {
        self.copy_from(key, source, metadata, condition).await
    }

    async fn create_multipart(&self, key: &str, options: PutOptions) -> Result<String> {
        self.create_upload(key, options).await
    }

    async fn upload_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        body: Arc<dyn Source>,
        checksum: Option<Checksum>,
    ) -> Result<Part> {
        self.send_part(key, upload_id, number, body, checksum).await
    }

    async fn upload_part_copy(&self, key: &str, upload_id: &str, number: u32, source: CopySource, range: Range<u64>) -> Result<Part> {
        self.copy_part(key, upload_id, number, source, range).await
    }

    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[Part], size: u64, options: PutOptions) -> Result<PutOutcome> {
        self.complete_upload(key, upload_id, parts, size, options).await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<()> {
        self.abort_upload(key, upload_id).await
    }

    async fn list_parts(&self, key: &str, upload_id: &str) -> Result<Vec<Part>> {
        self.pages_of_parts(key, upload_id).await
    }

    async fn list_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>> {
        self.pages_of_uploads(prefix).await
    }

    async fn get_tags(&self, key: &str) -> Result<Vec<(String, String)>> {
        self.object_tags(key).await
    }

    async fn put_tags(&self, key: &str, tags: &[(String, String)]) -> Result<()> {
        self.replace_tags(key, tags).await
    }

    async fn get_acl(&self, key: &str) -> Result<Option<Acl>> {
        self.object_acl(key).await
    }

    async fn presign_get(&self, key: &str, expires_seconds: u64, query: &[(String, String)]) -> Result<String> {
        self.link(key, expires_seconds, query).await
    }
}
