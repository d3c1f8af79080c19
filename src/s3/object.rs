//! Objects: head, get, delete, copy, tags.

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Method, StatusCode};
use md5::{Digest as _, Md5};

use super::bucket::Bucket;
use super::endpoint::BucketName;
use super::operation::Operation;
use super::request::{Call, Payload, exactly};
use super::xml::Element;
use super::{
    Condition, CopyMetadata, CopySource, ETag, ErrorKind, GetObject, GetRequest, ObjectHead, PutOutcome, Result, S3Error, response, xml,
};
use crate::aws::encode;
use crate::aws::http::Incoming;
use crate::aws::retry::Class;

impl Bucket {
    pub(super) async fn head_object(&self, key: &str) -> Result<ObjectHead> {
        let mut call = Call::new(&self.core, Operation::HeadObject, Method::HEAD).key(key);
        call.header("x-amz-checksum-mode", "ENABLED")?;
        let answer = self.core.whole(&self.place, &call).await?;
        self.located();
        let size = response::text(&answer.headers, "content-length").and_then(|size| size.parse().ok());
        size.and_then(|size| response::object_head(&answer.headers, size))
            .ok_or_else(|| self.core.not_s3(&self.place, &call, "a head without ETag or length"))
    }

    pub(super) async fn get_object(&self, key: &str, request: GetRequest) -> Result<GetObject> {
        let mut call = Call::new(&self.core, Operation::GetObject, Method::GET).key(key).class(Class::Read);
        match &request.range {
            Some(range) if range.start >= range.end => {
                return Err(self.core.local(&self.place, &call, ErrorKind::InvalidRange, "an empty range was asked for".into()));
            }
            Some(range) => call.header("range", &format!("bytes={}-{}", range.start, range.end - 1))?,
            // A range's answer may carry a part's checksum, which says nothing of the object.
            None => call.header("x-amz-checksum-mode", "ENABLED")?,
        }
        if let Some(etag) = &request.if_match {
            call.header("if-match", &etag.quoted())?;
        }
        if let Some(version) = &request.version_id {
            call = call.query("versionId", version.as_str());
        }
        let answer = self.core.stream(&self.place, &call).await?;
        let not_s3 = |reason: &str| self.core.not_s3(&self.place, &call, reason);
        let length = response::text(&answer.headers, "content-length").and_then(|length| length.parse::<u64>().ok());
        let (sent, size) = match answer.status {
            StatusCode::OK => length.map(|length| (0..length, length)).ok_or_else(|| not_s3("an object without a length"))?,
            StatusCode::PARTIAL_CONTENT => {
                let range = response::text(&answer.headers, "content-range");
                let (start, end, size) =
                    range.as_deref().and_then(response::content_range).ok_or_else(|| not_s3("a part without Content-Range"))?;
                if length.is_some_and(|length| length != end - start) {
                    return Err(not_s3("Content-Range and Content-Length disagree"));
                }
                (start..end, size)
            }
            other => return Err(not_s3(&format!("status {other}"))),
        };
        let head = response::object_head(&answer.headers, size).ok_or_else(|| not_s3("an object without ETag"))?;
        if request.if_match.as_ref().is_some_and(|wanted| *wanted != head.etag) {
            let message = format!("the store ignored If-Match and sent version {}", head.etag);
            return Err(self.core.local(&self.place, &call, ErrorKind::PreconditionFailed, message));
        }
        let wanted = match request.range {
            None => 0..size,
            Some(range) if range.start >= size => {
                return Err(self.core.local(&self.place, &call, ErrorKind::InvalidRange, format!("the object has {size} bytes")));
            }
            Some(range) => range.start..range.end.min(size),
        };
        self.body(answer.body, sent, wanted, head, &call).map_err(not_s3_owned(self, &call))
    }

    /// The wanted range out of the one that was sent: a store may send more (a 200 to a range), never less or other bytes.
    fn body(
        &self,
        incoming: Incoming,
        sent: Range<u64>,
        wanted: Range<u64>,
        head: ObjectHead,
        call: &Call,
    ) -> std::result::Result<GetObject, &'static str> {
        if sent.start > wanted.start || sent.end < wanted.end {
            return Err("another range than was asked for");
        }
        let whole = sent == wanted;
        let resource = self.place.resource(call.key.as_deref());
        let body = exactly(incoming, wanted.start - sent.start, wanted.end - wanted.start, whole, resource);
        Ok(GetObject { head, range: wanted, body })
    }

    pub(super) async fn delete_key(&self, key: &str, if_match: Option<ETag>) -> Result<()> {
        let mut call = Call::new(&self.core, Operation::DeleteObject, Method::DELETE).key(key);
        if let Some(etag) = if_match {
            call.header("if-match", &etag.quoted())?;
        }
        match self.core.whole(&self.place, &call).await {
            Ok(answer) => self.refuse_html(&call, &answer.headers),
            Err(refusal) if refusal.error.kind == ErrorKind::NoSuchKey => Ok(()),
            Err(refusal) => Err(refusal.error),
        }
    }

    /// A captive portal answers anything with 200 and a page.
    pub(super) fn refuse_html(&self, call: &Call, headers: &http::HeaderMap) -> Result<()> {
        let has_body = headers.contains_key("transfer-encoding") || response::text(headers, "content-length").is_some_and(|len| len != "0");
        if has_body && response::text(headers, "content-type").is_some_and(|kind| kind.starts_with("text/html")) {
            return Err(self.core.not_s3(&self.place, call, "an HTML page"));
        }
        Ok(())
    }

    /// `x-amz-copy-source` and its precondition.
    pub(super) fn copy_source(&self, call: &mut Call, source: &CopySource) -> Result<()> {
        let refused = |message| {
            S3Error::local(ErrorKind::InvalidRequest, call.operation.name(), format!("s3://{}/{}", source.bucket, source.key), message)
        };
        let bucket = BucketName::parse(&source.bucket).map_err(refused)?;
        let mut path = encode::key(&bucket.copy_source(&source.key));
        if let Some(version) = &source.version_id {
            path.push_str(&format!("?versionId={}", encode::component(version)));
        }
        call.header("x-amz-copy-source", &path)?;
        if let Some(etag) = &source.if_match {
            call.header("x-amz-copy-source-if-match", &etag.quoted())?;
        }
        if let Some(owner) = self.core.config.expected_bucket_owner.as_deref().filter(|_| source.bucket == self.name()) {
            call.header("x-amz-source-expected-bucket-owner", owner)?;
        }
        Ok(())
    }

    pub(super) async fn copy_from(
        &self,
        key: &str,
        source: CopySource,
        metadata: CopyMetadata,
        condition: Option<Condition>,
    ) -> Result<PutOutcome> {
        let sum = match &metadata {
            CopyMetadata::Replace(options) => options.checksum.filter(|sum| matches!(sum, super::Checksum::Sha1(_))),
            CopyMetadata::Keep { .. } => None,
        };
        let acl = match &metadata {
            CopyMetadata::Replace(options) => options.acl.as_ref(),
            CopyMetadata::Keep { acl, .. } => acl.as_ref(),
        };
        let mut with = self.extras(condition.as_ref(), sum.as_ref()).await.with_acl(acl);
        loop {
            let mut call = Call::new(&self.core, Operation::CopyObject, Method::PUT).key(key).class(Class::Upload).slow(&self.core);
            self.copy_source(&mut call, &source)?;
            match &metadata {
                CopyMetadata::Keep { website_redirect, storage_class, .. } => {
                    call.header("x-amz-metadata-directive", "COPY")?;
                    call.header("x-amz-website-redirect-location", &redirect(website_redirect.as_deref()))?;
                    call.header("x-amz-storage-class", storage_class.as_deref().unwrap_or(""))?;
                }
                CopyMetadata::Replace(options) => {
                    call.header("x-amz-metadata-directive", "REPLACE")?;
                    self.stored_headers(&mut call, options)?;
                    call.header("x-amz-storage-class", options.storage_class.as_deref().unwrap_or(""))?;
                    if with.checksum {
                        call.header("x-amz-checksum-algorithm", "SHA1")?;
                    }
                }
            }
            self.encryption(&mut call)?;
            self.add_extras(&mut call, &with, condition.as_ref(), acl)?;
            match self.core.xml(&self.place, &call, "CopyObjectResult").await {
                Ok(answer) => {
                    self.settled(&with);
                    let etag = answer.body.text_of("ETag").ok_or_else(|| self.core.not_s3(&self.place, &call, "a copy without ETag"))?;
                    let last_modified = answer
                        .body
                        .text_of("LastModified")
                        .and_then(response::iso_date)
                        .or_else(|| response::http_date(&answer.headers, "date"));
                    return Ok(PutOutcome { etag: ETag::new(etag), version_id: response::version(&answer.headers), last_modified });
                }
                Err(refusal) if self.degrade(&refusal.error, &mut with) => {}
                Err(refusal) => return Err(refusal.error),
            }
        }
    }

    pub(super) async fn object_tags(&self, key: &str) -> Result<Vec<(String, String)>> {
        let call = Call::new(&self.core, Operation::GetObjectTagging, Method::GET).key(key).query("tagging", "");
        let answer = self.core.xml(&self.place, &call, "Tagging").await?;
        let value = |tag: &Element, name: &str| tag.child(name).map(|child| child.text.clone()).unwrap_or_default();
        Ok(answer
            .body
            .child("TagSet")
            .into_iter()
            .flat_map(|set| set.all("Tag"))
            .map(|tag| (value(tag, "Key"), value(tag, "Value")))
            .collect())
    }

    pub(super) async fn replace_tags(&self, key: &str, tags: &[(String, String)]) -> Result<()> {
        let set: String = tags
            .iter()
            .map(|(name, value)| format!("<Tag><Key>{}</Key><Value>{}</Value></Tag>", xml::escape(name), xml::escape(value)))
            .collect();
        let body = format!("<Tagging xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><TagSet>{set}</TagSet></Tagging>");
        let mut call = Call::new(&self.core, Operation::PutObjectTagging, Method::PUT).key(key).query("tagging", "");
        call.header("content-md5", &STANDARD.encode(Md5::digest(&body)))?;
        let call = call.payload(Payload::Bytes(Bytes::from(body)));
        let answer = self.core.whole(&self.place, &call).await?;
        self.refuse_html(&call, &answer.headers)
    }
}

/// A redirect names a key, whose non-ASCII characters a header carries percent-encoded.
pub(super) fn redirect(location: Option<&str>) -> String {
    percent_encoding::utf8_percent_encode(location.unwrap_or(""), percent_encoding::CONTROLS).to_string()
}

fn not_s3_owned<'a>(bucket: &'a Bucket, call: &'a Call) -> impl Fn(&'static str) -> S3Error + 'a {
    move |reason| bucket.core.not_s3(&bucket.place, call, reason)
}
