//! Uploads: PutObject and multipart, with what stores may refuse (ACLs, checksums, conditions) left out once it is known.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, Method};
use md5::{Digest as _, Md5};

use super::bucket::Bucket;
use super::operation::Operation;
use super::request::{Call, Payload};
use super::{
    Acl, Checksum, ChecksumKind, Condition, CopySource, ETag, ErrorKind, ListPage, Part, PutOptions, PutOutcome, Result, S3Error, Source,
    response, rfc2047,
};
use crate::aws::encode;
use crate::aws::retry::Class;

/// What is in a marker that this client wrote so lately needs no HEAD.
const JUST_WRITTEN: Duration = Duration::from_secs(5);

/// A directory marker that exists.
#[derive(Clone)]
pub(super) struct Marker {
    key: String,
    /// What this client wrote it with, and when.
    ours: Option<(PutOptions, Instant)>,
}

/// What a request carries that the store may refuse.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extras {
    acl: bool,
    /// The object's own ACL instead.
    grants: bool,
    /// The ACL was left out because of a 403, whose reason is not sure yet.
    acl_suspect: bool,
    pub checksum: bool,
    condition: bool,
}

impl Extras {
    /// An object's own ACL, private ones included, takes the place of the mount's.
    pub(super) fn with_acl(self, acl: Option<&Acl>) -> Self {
        acl.map_or(self, |acl| Self { acl: false, grants: !acl.is_private(), ..self })
    }
}

impl Bucket {
    /// What to send, by what is known of the store.
    pub(super) async fn extras(&self, condition: Option<&Condition>, checksum: Option<&Checksum>) -> Extras {
        if condition.is_some() {
            self.probe_conditions().await;
        }
        let known = self.capabilities.lock().clone();
        Extras {
            acl: self.core.config.acl.is_some() && !self.acl_off.load(Ordering::Relaxed),
            grants: false,
            acl_suspect: false,
            checksum: checksum.is_some() && known.upload_checksum != ChecksumKind::Off,
            condition: condition.is_some() && known.conditional_writes != Some(false),
        }
    }

    pub(super) fn add_extras(&self, call: &mut Call, with: &Extras, condition: Option<&Condition>, acl: Option<&Acl>) -> Result<()> {
        if let Some(acl) = acl.filter(|_| with.grants) {
            acl.add_to(call)?;
        }
        if with.acl {
            call.header("x-amz-acl", self.core.config.acl.as_deref().unwrap_or(""))?;
        }
        match condition.filter(|_| with.condition) {
            Some(Condition::Absent) => call.header("if-none-match", "*"),
            Some(Condition::Matches(etag)) => call.header("if-match", &etag.quoted()),
            None => Ok(()),
        }
    }

    /// True when the request is to be sent again without what the store refused.
    pub(super) fn degrade(&self, error: &S3Error, with: &mut Extras) -> bool {
        let says = |words: &[&str]| {
            let text = format!("{} {}", error.code.as_deref().unwrap_or(""), error.message).to_ascii_lowercase();
            words.iter().any(|word| text.contains(word))
        };
        let refused = matches!(error.kind, ErrorKind::NotImplemented | ErrorKind::InvalidRequest);
        if with.grants && matches!(error.kind, ErrorKind::AclNotSupported | ErrorKind::AccessDenied) {
            // An object that everybody may read in a bucket that blocks public access, or a missing right: it goes without.
            with.grants = false;
            self.acl_is_lost(error);
        } else if with.acl && error.kind == ErrorKind::AclNotSupported {
            with.acl = false;
            self.acl_is_off();
        } else if with.acl && error.kind == ErrorKind::AccessDenied {
            // Block Public Access answers so; so does a missing right. Without the ACL it will show which.
            with.acl = false;
            with.acl_suspect = true;
        } else if with.condition
            && refused
            && (error.kind == ErrorKind::NotImplemented || says(&["if-none-match", "if-match", "conditional"]))
            && !says(&["checksum"])
        {
            with.condition = false;
            self.conditions(false);
        } else if with.checksum && refused && (error.kind == ErrorKind::NotImplemented || says(&["checksum", "crc", "content-md5"])) {
            with.checksum = false;
            if std::mem::replace(&mut self.capabilities.lock().upload_checksum, ChecksumKind::Off) != ChecksumKind::Off {
                tracing::warn!(bucket = self.name(), reason = %error, "the store refuses upload checksums: sent without from now on (upload_checksums=off says so beforehand)");
            }
        } else if with.grants && error.kind == ErrorKind::InvalidRequest {
            // A grantee that is no more.
            with.grants = false;
            self.acl_is_lost(error);
        } else {
            return false;
        }
        true
    }

    /// The request was taken: a 403 that went away with the ACL was about the ACL.
    pub(super) fn settled(&self, with: &Extras) {
        if with.acl_suspect {
            self.acl_is_off();
        }
    }

    fn acl_is_off(&self) {
        if !self.acl_off.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                bucket = self.name(),
                "the bucket does not take ACLs (ownership enforced or public access blocked): uploading without default_acl; publish it through a distribution"
            );
        }
    }

    fn conditions(&self, honoured: bool) {
        let before = self.capabilities.lock().conditional_writes.replace(honoured);
        if !honoured && before != Some(false) {
            tracing::warn!(
                bucket = self.name(),
                "the store does not honour conditional writes: a change by another client at the same moment can be overwritten"
            );
        }
    }

    pub(super) fn remember_marker(&self, page: &ListPage) {
        if self.capabilities.lock().conditional_writes.is_none()
            && let Some(marker) = page.entries.iter().find(|entry| entry.size == 0 && entry.key.ends_with('/'))
        {
            self.marker.lock().get_or_insert_with(|| Marker { key: marker.key.clone(), ours: None });
        }
    }

    /// Learns whether conditions are honoured by writing a directory marker that exists over itself with `If-None-Match: *`: refused, or
    /// the same bytes again. Without a marker it stays unknown, and conditions are sent on the chance.
    async fn probe_conditions(&self) {
        if self.capabilities.lock().conditional_writes.is_some() || self.marker.lock().is_none() {
            return;
        }
        let _one = self.probe.lock().await;
        let Some(marker) = self.marker.lock().clone() else { return };
        let options = match marker.ours.filter(|(_, written)| written.elapsed() < JUST_WRITTEN) {
            Some((options, _)) => options,
            None => {
                let Ok(head) = self.head_object(&marker.key).await else {
                    *self.marker.lock() = None;
                    return;
                };
                if head.size != 0 {
                    return;
                }
                PutOptions { headers: head.headers, metadata: head.metadata, storage_class: head.storage_class, ..PutOptions::default() }
            }
        };
        if self.capabilities.lock().conditional_writes.is_some() {
            return;
        }
        let with = Extras { condition: true, ..Extras::default() };
        let empty: Arc<dyn Source> = Arc::new(Bytes::new());
        let Ok(call) = self.put_call(&marker.key, &empty, &options, &with, Some(&Condition::Absent)) else { return };
        match self.core.whole(&self.place, &call).await {
            Ok(_) => self.conditions(false),
            Err(refusal) => match refusal.error.kind {
                ErrorKind::PreconditionFailed => self.conditions(true),
                ErrorKind::NotImplemented | ErrorKind::InvalidRequest => self.conditions(false),
                _ => {}
            },
        }
    }

    /// Before a key is deleted: a probe must not bring a marker back.
    pub(super) async fn spare_marker(&self, key: &str) {
        if key.ends_with('/') {
            let _probe = self.probe.lock().await;
            self.marker.lock().take_if(|marker| marker.key == key);
        }
    }

    /// Stored headers and user metadata.
    pub(super) fn stored_headers(&self, call: &mut Call, options: &PutOptions) -> Result<()> {
        let headers = &options.headers;
        for (name, value) in [
            ("content-type", &headers.content_type),
            ("cache-control", &headers.cache_control),
            ("content-disposition", &headers.content_disposition),
            ("content-encoding", &headers.content_encoding),
            ("content-language", &headers.content_language),
            ("expires", &headers.expires),
        ] {
            call.header(name, value.as_deref().unwrap_or(""))?;
        }
        call.header("x-amz-website-redirect-location", &super::object::redirect(headers.website_redirect.as_deref()))?;
        for (name, value) in &options.metadata {
            call.header(&format!("x-amz-meta-{name}"), &rfc2047::encode(value))?;
        }
        Ok(())
    }

    pub(super) fn encryption(&self, call: &mut Call) -> Result<()> {
        let config = &self.core.config;
        call.header("x-amz-server-side-encryption", config.sse.as_deref().unwrap_or(""))?;
        call.header("x-amz-server-side-encryption-aws-kms-key-id", config.sse_kms_key_id.as_deref().unwrap_or(""))
    }

    /// Everything that is fixed when an object (or an upload) is created.
    fn creation_headers(&self, call: &mut Call, options: &PutOptions) -> Result<()> {
        self.stored_headers(call, options)?;
        let class = options.storage_class.as_deref().or(self.core.config.storage_class.as_deref());
        call.header("x-amz-storage-class", class.unwrap_or(""))?;
        let own = |name: &str| options.tags.iter().any(|(own, _)| own == name);
        let tags = self.core.config.tags.iter().filter(|(name, _)| !own(name)).chain(&options.tags);
        call.header("x-amz-tagging", &encode::query(tags.map(|(name, value)| (name.as_str(), value.as_str()))))?;
        self.encryption(call)
    }

    fn checksum_header(call: &mut Call, checksum: &Checksum) -> Result<()> {
        match checksum {
            Checksum::Crc64Nvme(sum) => call.header("x-amz-checksum-crc64nvme", &STANDARD.encode(sum.to_be_bytes())),
            Checksum::Crc32c(sum) => call.header("x-amz-checksum-crc32c", &STANDARD.encode(sum.to_be_bytes())),
            Checksum::Md5(sum) => call.header("content-md5", &STANDARD.encode(sum)),
            Checksum::Sha1(sum) => call.header("x-amz-checksum-sha1", &STANDARD.encode(sum)),
        }
    }

    /// A part's checksum in the list that completes an upload.
    fn checksum_element(checksum: &Checksum) -> String {
        match checksum {
            Checksum::Crc64Nvme(sum) => format!("<ChecksumCRC64NVME>{}</ChecksumCRC64NVME>", STANDARD.encode(sum.to_be_bytes())),
            Checksum::Crc32c(sum) => format!("<ChecksumCRC32C>{}</ChecksumCRC32C>", STANDARD.encode(sum.to_be_bytes())),
            Checksum::Md5(_) | Checksum::Sha1(_) => String::new(),
        }
    }

    fn put_call(
        &self,
        key: &str,
        body: &Arc<dyn Source>,
        options: &PutOptions,
        with: &Extras,
        condition: Option<&Condition>,
    ) -> Result<Call> {
        let mut call = Call::new(&self.core, Operation::PutObject, Method::PUT)
            .key(key)
            .class(Class::Upload)
            .payload(Payload::Source(Arc::clone(body)));
        self.creation_headers(&mut call, options)?;
        if let Some(checksum) = options.checksum.as_ref().filter(|_| with.checksum) {
            Self::checksum_header(&mut call, checksum)?;
        }
        self.add_extras(&mut call, with, condition, options.acl.as_ref())?;
        Ok(call)
    }

    pub(super) async fn put_object(&self, key: &str, body: Arc<dyn Source>, options: PutOptions) -> Result<PutOutcome> {
        let mut condition = options.condition.clone();
        let mut with = self.extras(condition.as_ref(), options.checksum.as_ref()).await.with_acl(options.acl.as_ref());
        let mut damaged = 0;
        loop {
            let call = self.put_call(key, &body, &options, &with, condition.as_ref())?;
            match self.core.whole(&self.place, &call).await {
                Ok(answer) => {
                    self.settled(&with);
                    if body.is_empty() && key.ends_with('/') && self.capabilities.lock().conditional_writes.is_none() {
                        let ours = PutOptions { condition: None, checksum: None, ..options.clone() };
                        *self.marker.lock() = Some(Marker { key: key.to_owned(), ours: Some((ours, Instant::now())) });
                    }
                    let etag = self.etag(&call, &answer.headers)?;
                    match self.agrees(&call, &answer.headers, &etag, options.checksum.as_ref(), &body).await {
                        Ok(()) => return Ok(outcome(etag, &answer.headers)),
                        // What lies there now is ours, and damaged: the same again replaces it, and nothing else.
                        Err(error) if error.kind == ErrorKind::BadDigest && damaged < self.core.config.retries => {
                            tracing::warn!("{error}: it is sent again");
                            damaged += 1;
                            body.refused();
                            condition = condition.map(|_| Condition::Matches(etag));
                        }
                        Err(error) => return Err(error),
                    }
                }
                Err(refusal) if self.degrade(&refusal.error, &mut with) => {}
                Err(refusal) => {
                    let unsure = refusal.repeated && matches!(refusal.error.kind, ErrorKind::PreconditionFailed | ErrorKind::Conflict);
                    if unsure && let Some(ours) = self.was_ours(key, body.len(), options.checksum.as_ref(), None).await {
                        return Ok(ours);
                    }
                    if with.condition && refusal.error.kind == ErrorKind::PreconditionFailed {
                        self.conditions(true);
                    }
                    return Err(refusal.error);
                }
            }
        }
    }

    fn etag(&self, call: &Call, headers: &HeaderMap) -> Result<ETag> {
        response::text(headers, "etag").map(ETag::new).ok_or_else(|| self.core.not_s3(&self.place, call, "an upload answered without ETag"))
    }

    /// After a lost answer, a refusal may be about our own success: true when the object there is what we sent.
    async fn was_ours(&self, key: &str, size: u64, checksum: Option<&Checksum>, etag: Option<&ETag>) -> Option<PutOutcome> {
        let head = self.head_object(key).await.ok()?;
        let same_sum = match (checksum, &head.checksum) {
            (Some(Checksum::Md5(sent)), _) => head.etag.md5().as_ref() == Some(sent),
            (Some(sent), Some(stored)) => sent == stored,
            _ => false,
        };
        let ours = head.size == size && (same_sum || etag == Some(&head.etag));
        ours.then_some(PutOutcome { etag: head.etag, version_id: head.version_id, last_modified: Some(head.last_modified) })
    }

    pub(super) async fn create_upload(&self, key: &str, options: PutOptions) -> Result<String> {
        // The checksum of a multipart upload is of the full object: its algorithm is fixed here, its value comes at the end.
        let algorithm = match self.capabilities.lock().upload_checksum {
            ChecksumKind::Crc64Nvme => Some("CRC64NVME"),
            ChecksumKind::Crc32c => Some("CRC32C"),
            ChecksumKind::Off | ChecksumKind::Md5 => None,
        }
        .filter(|_| !options.plain);
        let mut with = self.extras(None, None).await.with_acl(options.acl.as_ref());
        with.checksum = algorithm.is_some();
        // Whoever drops this future, or meets an answer that is none, leaves the note behind.
        let before = self.unknown_uploads.lock().get(key).copied();
        let begun = before.unwrap_or_else(SystemTime::now);
        self.unknown_uploads.lock().insert(key.to_owned(), begun);
        loop {
            let mut call =
                Call::new(&self.core, Operation::CreateMultipartUpload, Method::POST).key(key).class(Class::Upload).query("uploads", "");
            self.creation_headers(&mut call, &options)?;
            if let Some(algorithm) = algorithm.filter(|_| with.checksum) {
                call.header("x-amz-checksum-algorithm", algorithm)?;
                call.header("x-amz-checksum-type", "FULL_OBJECT")?;
            }
            self.add_extras(&mut call, &with, None, options.acl.as_ref())?;
            match self.core.xml(&self.place, &call, "InitiateMultipartUploadResult").await {
                Ok(answer) => {
                    self.settled(&with);
                    let id = answer
                        .body
                        .text_of("UploadId")
                        .ok_or_else(|| self.core.not_s3(&self.place, &call, "an upload without id"))?
                        .to_owned();
                    self.unknown_uploads.lock().remove(key);
                    if answer.repeated || before.is_some() {
                        self.drop_lost_uploads(key, &id, response::by_their_clock(&answer.headers, begun)).await;
                    }
                    return Ok(id);
                }
                Err(refusal) if self.degrade(&refusal.error, &mut with) => {}
                Err(refusal) => {
                    let refused = !refusal.repeated && refusal.error.status >= 400 && before.is_none();
                    if refused {
                        self.unknown_uploads.lock().remove(key);
                    }
                    return Err(refusal.error);
                }
            }
        }
    }

    /// A Create whose answer was lost left an upload that nobody knows: of this key, begun since by the store's clock, without parts.
    async fn drop_lost_uploads(&self, key: &str, ours: &str, begun: SystemTime) {
        let Ok(uploads) = self.pages_of_uploads(key).await else { return };
        // Both tell whole seconds.
        let since = begun - std::time::Duration::from_secs(2);
        for lost in uploads.iter().filter(|upload| upload.key == key && upload.upload_id != ours && upload.initiated >= since) {
            if self.pages_of_parts(key, &lost.upload_id).await.is_ok_and(|parts| parts.is_empty()) {
                let _ = self.abort_upload(key, &lost.upload_id).await;
            }
        }
    }

    pub(super) async fn send_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        body: Arc<dyn Source>,
        checksum: Option<Checksum>,
    ) -> Result<Part> {
        let mut with = self.extras(None, checksum.as_ref()).await;
        with.acl = false;
        loop {
            let mut call = Call::new(&self.core, Operation::UploadPart, Method::PUT).key(key).class(Class::Upload);
            call = call.query("partNumber", number.to_string()).query("uploadId", upload_id).payload(Payload::Source(Arc::clone(&body)));
            if let Some(checksum) = checksum.as_ref().filter(|_| with.checksum) {
                Self::checksum_header(&mut call, checksum)?;
            }
            match self.core.whole(&self.place, &call).await {
                Ok(answer) => {
                    let etag = self.etag(&call, &answer.headers)?;
                    self.agrees(&call, &answer.headers, &etag, checksum.as_ref(), &body).await?;
                    return Ok(Part { number, etag, size: body.len(), checksum: checksum.filter(|_| with.checksum) });
                }
                Err(refusal) if self.degrade(&refusal.error, &mut with) => {}
                Err(refusal) => return Err(refusal.error),
            }
        }
    }

    pub(super) async fn copy_part(&self, key: &str, upload_id: &str, number: u32, source: CopySource, range: Range<u64>) -> Result<Part> {
        let mut call = Call::new(&self.core, Operation::UploadPartCopy, Method::PUT).key(key).class(Class::Upload).slow(&self.core);
        call = call.query("partNumber", number.to_string()).query("uploadId", upload_id);
        if range.is_empty() {
            return Err(self.core.local(&self.place, &call, ErrorKind::InvalidRange, "an empty range cannot be a part".into()));
        }
        self.copy_source(&mut call, &source)?;
        call.header("x-amz-copy-source-range", &format!("bytes={}-{}", range.start, range.end - 1))?;
        let answer = self.core.xml(&self.place, &call, "CopyPartResult").await?;
        let etag = answer.body.text_of("ETag").ok_or_else(|| self.core.not_s3(&self.place, &call, "a copied part without ETag"))?;
        let checksum = response::part_checksum(&answer.body);
        // versitygw tells the source's for every range of it, and keeps what it combines of that as the object's.
        if checksum.is_some() && checksum == source.checksum && self.gives_crcs_up() {
            let message = "the checksum that came with a copied range is that of the whole source".to_owned();
            return Err(self.core.local(&self.place, &call, ErrorKind::BadDigest, message));
        }
        Ok(Part { number, etag: ETag::new(etag), size: range.end - range.start, checksum })
    }

    pub(super) async fn complete_upload(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[Part],
        size: u64,
        options: PutOptions,
    ) -> Result<PutOutcome> {
        let condition = options.condition.as_ref();
        let mut with = self.extras(condition, options.checksum.as_ref()).await;
        with.acl = false;
        loop {
            // Not to a store that refused them: the upload was begun without.
            let checksums = self.capabilities.lock().upload_checksum != ChecksumKind::Off;
            let list: String = parts
                .iter()
                .map(|part| {
                    let sum = part.checksum.as_ref().filter(|_| checksums).map(Self::checksum_element).unwrap_or_default();
                    let etag = super::xml::escape(&part.etag.quoted());
                    format!("<Part>{sum}<PartNumber>{}</PartNumber><ETag>{etag}</ETag></Part>", part.number)
                })
                .collect();
            let body = Bytes::from(format!(
                "<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{list}</CompleteMultipartUpload>"
            ));
            let mut call =
                Call::new(&self.core, Operation::CompleteMultipartUpload, Method::POST).key(key).class(Class::Upload).slow(&self.core);
            call = call.query("uploadId", upload_id).payload(Payload::Bytes(body));
            call.header("content-type", "application/xml")?;
            call.header("x-amz-mp-object-size", &size.to_string())?;
            // An MD5 has no full-object form in a multipart upload; Content-MD5 would be the XML's.
            if let Some(checksum) =
                options.checksum.as_ref().filter(|sum| with.checksum && matches!(sum, Checksum::Crc64Nvme(_) | Checksum::Crc32c(_)))
            {
                Self::checksum_header(&mut call, checksum)?;
                call.header("x-amz-checksum-type", "FULL_OBJECT")?;
            }
            self.add_extras(&mut call, &with, condition, None)?;
            match self.core.xml(&self.place, &call, "CompleteMultipartUploadResult").await {
                Ok(answer) => {
                    let etag = answer
                        .body
                        .text_of("ETag")
                        .ok_or_else(|| self.core.not_s3(&self.place, &call, "an upload completed without ETag"))?;
                    self.completes(&call, &answer.body, &options)?;
                    return Ok(outcome(ETag::new(etag), &answer.headers));
                }
                Err(refusal) if self.degrade(&refusal.error, &mut with) => {}
                Err(refusal) => {
                    let unsure = refusal.repeated
                        && matches!(refusal.error.kind, ErrorKind::NoSuchUpload | ErrorKind::PreconditionFailed | ErrorKind::Conflict);
                    if unsure && let Some(ours) = self.was_ours(key, size, options.checksum.as_ref(), multipart_etag(parts).as_ref()).await
                    {
                        return Ok(ours);
                    }
                    return Err(refusal.error);
                }
            }
        }
    }

    pub(super) async fn abort_upload(&self, key: &str, upload_id: &str) -> Result<()> {
        let call = Call::new(&self.core, Operation::AbortMultipartUpload, Method::DELETE).key(key).query("uploadId", upload_id);
        match self.core.whole(&self.place, &call).await {
            Ok(answer) => self.refuse_html(&call, &answer.headers),
            Err(refusal) if matches!(refusal.error.kind, ErrorKind::NoSuchUpload | ErrorKind::NoSuchKey) => Ok(()),
            Err(refusal) => Err(refusal.error),
        }
    }
}

fn outcome(etag: ETag, headers: &HeaderMap) -> PutOutcome {
    PutOutcome { etag, version_id: response::version(headers), last_modified: response::http_date(headers, "date") }
}

/// The ETag of a multipart object whose parts' ETags are MD5s: MD5 of the MD5s, a dash, their number. Every store that was looked at does so.
fn multipart_etag(parts: &[Part]) -> Option<ETag> {
    let mut all = Md5::new();
    for part in parts {
        all.update(part.etag.md5()?);
    }
    let hex: String = all.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Some(ETag::new(format!("{hex}-{}", parts.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etag_of_parts() {
        // Two parts of 5 MiB of zeros on AWS: each 5f363e0e58a95f06cbe9bbc662c5dfb6.
        let part = |number| Part { number, etag: ETag::new("5f363e0e58a95f06cbe9bbc662c5dfb6"), size: 5 << 20, checksum: None };
        let whole = multipart_etag(&[part(1), part(2)]);
        assert!(whole.is_some_and(|etag| etag.as_str().ends_with("-2") && etag.as_str().len() == 34));
        assert_eq!(multipart_etag(&[Part { number: 1, etag: ETag::new("not-md5"), size: 1, checksum: None }]), None);
    }
}
