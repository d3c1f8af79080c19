//! What an answer to an upload proves: that the store holds the bytes that were sent.

use std::sync::Arc;

use futures::StreamExt as _;
use http::HeaderMap;
use md5::{Digest as _, Md5};

use super::bucket::Bucket;
use super::request::Call;
use super::{Checksum, ChecksumKind, ETag, ErrorKind, PutOptions, Result, Source, response};

impl Bucket {
    /// Compares the answer to PutObject or UploadPart with what was sent: by the checksum that the store repeats, else by the MD5
    /// that its ETag is (not under KMS: AWS, "Common response headers").
    pub(super) async fn agrees(
        &self,
        call: &Call,
        headers: &HeaderMap,
        etag: &ETag,
        checksum: Option<&Checksum>,
        body: &Arc<dyn Source>,
    ) -> Result<()> {
        self.refuse_html(call, headers)?;
        if let (Some(sent), Some(stored)) = (checksum, response::checksum(headers))
            && std::mem::discriminant(sent) == std::mem::discriminant(&stored)
        {
            return if *sent == stored { Ok(()) } else { Err(self.damaged(call, "the checksum that it repeats is another")) };
        }
        let kms = response::text(headers, "x-amz-server-side-encryption").is_some_and(|kind| kind.starts_with("aws:kms"));
        let wanted = self.core.config.upload_checksum != Some(ChecksumKind::Off);
        let Some(stored) = etag.md5().filter(|_| wanted && !kms && !body.is_empty()) else { return Ok(()) };
        let sent = match checksum {
            Some(Checksum::Md5(sum)) => *sum,
            _ => {
                self.knows_md5_alone(checksum);
                self.md5_of(call, body).await?
            }
        };
        if sent == stored { Ok(()) } else { Err(self.damaged(call, "its ETag is not their MD5")) }
    }

    /// The same of CompleteMultipartUpload, by the checksum of the full object.
    pub(super) fn completes(&self, call: &Call, answer: &super::xml::Element, options: &PutOptions) -> Result<()> {
        let full = answer.text_of("ChecksumType").is_none_or(|kind| kind == "FULL_OBJECT");
        match (options.checksum, response::part_checksum(answer).filter(|_| full)) {
            (Some(sent), Some(stored)) if std::mem::discriminant(&sent) == std::mem::discriminant(&stored) && sent != stored => {
                Err(self.damaged(call, "the checksum that it repeats is another"))
            }
            _ => Ok(()),
        }
    }

    /// A store that repeats no CRC does not know it, and lets damaged bytes pass: every store knows Content-MD5.
    fn knows_md5_alone(&self, checksum: Option<&Checksum>) {
        if matches!(checksum, Some(Checksum::Crc64Nvme(_) | Checksum::Crc32c(_))) {
            self.gives_crcs_up();
        }
    }

    /// CRCs are not sent any more. False where they were not anyway.
    pub(super) fn gives_crcs_up(&self) -> bool {
        let mut known = self.capabilities.lock();
        let sent = matches!(known.upload_checksum, ChecksumKind::Crc64Nvme | ChecksumKind::Crc32c);
        if sent {
            known.upload_checksum = ChecksumKind::Md5;
            tracing::info!(bucket = self.name(), "the store does not do CRCs right: uploads carry Content-MD5 from now on");
        }
        sent
    }

    async fn md5_of(&self, call: &Call, body: &Arc<dyn Source>) -> Result<[u8; 16]> {
        let mut hasher = Md5::new();
        let mut bytes = body.open();
        while let Some(chunk) = bytes.next().await {
            hasher.update(chunk.map_err(|error| self.core.local(&self.place, call, ErrorKind::LocalIo, error.to_string()))?);
        }
        Ok(hasher.finalize().into())
    }

    fn damaged(&self, call: &Call, how: &str) -> super::S3Error {
        let message = format!("the store holds other bytes than were sent ({how})");
        self.core.local(&self.place, call, ErrorKind::BadDigest, message)
    }
}
