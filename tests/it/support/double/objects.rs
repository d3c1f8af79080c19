//! Whole objects: put, get, head, copy.

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use http::HeaderMap;
use packmule::s3::ObjectHeaders;
use s3s::dto::*;
use s3s::{S3Error, S3ErrorCode, S3Request, S3Result, TrailingHeaders, s3_error};

use super::acl::{self, asked_grants};
use super::checksum::{self, Algorithm};
use super::model::{self, Bucket, Object};
use super::s3::{Memory, bucket, now};

/// The headers that three operations store alike.
macro_rules! stored_headers {
    ($input:expr) => {
        ObjectHeaders {
            content_type: Some($input.content_type.take().unwrap_or_else(|| "binary/octet-stream".to_owned())),
            cache_control: $input.cache_control.take(),
            content_disposition: $input.content_disposition.take(),
            content_encoding: $input.content_encoding.take(),
            content_language: $input.content_language.take(),
            expires: $input.expires.take().map($crate::support::double::objects::http_date),
            website_redirect: $input.website_redirect_location.take(),
        }
    };
}
pub(super) use stored_headers;

/// The answers of GET and HEAD say the same of an object.
macro_rules! describe {
    ($output:ident, $object:expr) => {{
        let object = $object;
        $output.accept_ranges = Some("bytes".to_owned());
        $output.e_tag = Some(ETag::Strong(object.etag.clone()));
        $output.last_modified = Some(Timestamp::from(object.last_modified));
        $output.metadata = Some(object.metadata.clone().into_iter().collect());
        $output.content_type = object.headers.content_type.clone();
        $output.cache_control = object.headers.cache_control.clone();
        $output.content_disposition = object.headers.content_disposition.clone();
        $output.content_encoding = object.headers.content_encoding.clone();
        $output.content_language = object.headers.content_language.clone();
        $output.expires = object.headers.expires.as_deref().and_then(|e| Timestamp::parse(TimestampFormat::HttpDate, e).ok());
        $output.website_redirect_location = object.headers.website_redirect.clone();
        $output.storage_class = object.storage_class.clone().map(StorageClass::from);
        $output.restore = object.restore.clone();
    }};
}

/// `x-amz-checksum-*`.
macro_rules! checksum_value {
    ($output:ident, $algorithm:expr, $value:expr) => {{
        let value = Some($value);
        match $algorithm {
            Algorithm::Crc32 => $output.checksum_crc32 = value,
            Algorithm::Crc32c => $output.checksum_crc32c = value,
            Algorithm::Crc64Nvme => $output.checksum_crc64nvme = value,
            Algorithm::Sha1 => $output.checksum_sha1 = value,
            Algorithm::Sha256 => $output.checksum_sha256 = value,
        }
    }};
}
pub(super) use checksum_value;

/// The same of a whole object, where the request asks for it.
macro_rules! checksums {
    ($output:ident, $checksum:expr) => {{
        let checksum: &model::Checksum = $checksum;
        $crate::support::double::objects::checksum_value!($output, checksum.algorithm, checksum.value.clone());
        $output.checksum_type = Some($crate::support::double::objects::checksum_type(checksum.full));
    }};
}
pub(super) use checksums;

/// What a request claims of its body: the five checksum headers, first match.
macro_rules! claimed {
    ($input:expr) => {
        [
            (Algorithm::Crc32, &$input.checksum_crc32),
            (Algorithm::Crc32c, &$input.checksum_crc32c),
            (Algorithm::Crc64Nvme, &$input.checksum_crc64nvme),
            (Algorithm::Sha1, &$input.checksum_sha1),
            (Algorithm::Sha256, &$input.checksum_sha256),
        ]
        .into_iter()
        .find_map(|(algorithm, value)| Some((algorithm, value.clone()?)))
    };
}
pub(super) use claimed;

pub fn http_date(time: Timestamp) -> String {
    let mut out = Vec::new();
    time.format(TimestampFormat::HttpDate, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

pub fn checksum_type(full: bool) -> ChecksumType {
    ChecksumType::from_static(if full { ChecksumType::FULL_OBJECT } else { ChecksumType::COMPOSITE })
}

/// The object under a key, or NoSuchKey.
pub fn existing<'a>(bucket: &'a mut Bucket, key: &str) -> S3Result<&'a mut Object> {
    bucket.objects.get_mut(key).ok_or_else(|| s3_error!(NoSuchKey, "The specified key does not exist."))
}

fn holds(condition: &ETagCondition, object: &Object) -> bool {
    condition.is_any() || condition.as_etag().is_some_and(|etag| etag.value() == object.etag)
}

/// If-Match of a write or delete: 404 where there is nothing, 412 where it is another version.
pub fn require_match(object: Option<&Object>, condition: &ETagCondition) -> S3Result<()> {
    match object {
        None => Err(s3_error!(NoSuchKey, "The specified key does not exist.")),
        Some(object) if holds(condition, object) => Ok(()),
        Some(_) => Err(s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold")),
    }
}

/// Both conditions of a write.
pub fn check_conditions(object: Option<&Object>, if_match: Option<&ETagCondition>, if_none_match: Option<&ETagCondition>) -> S3Result<()> {
    if let Some(condition) = if_match {
        require_match(object, condition)?;
    }
    match (if_none_match, object) {
        (Some(condition), Some(object)) if holds(condition, object) => {
            Err(s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold"))
        }
        _ => Ok(()),
    }
}

/// The body, whole; a connection that ends early is IncompleteBody and changes nothing.
pub async fn collect(body: Option<StreamingBlob>) -> S3Result<Bytes> {
    let mut all = BytesMut::new();
    if let Some(mut body) = body {
        while let Some(chunk) = body.next().await {
            all.extend_from_slice(&chunk.map_err(|error| S3Error::with_source(S3ErrorCode::IncompleteBody, error))?);
        }
    }
    Ok(all.freeze())
}

/// Checks what the request claimed of the body; answers the checksum to keep.
pub fn verify(
    bytes: &[u8],
    md5: Option<&str>,
    claimed: Option<(Algorithm, String)>,
    trailing: Option<&TrailingHeaders>,
    asked: Option<&ChecksumAlgorithm>,
) -> S3Result<model::Checksum> {
    if md5.is_some_and(|md5| md5 != checksum::base64_md5(bytes)) {
        return Err(s3_error!(BadDigest, "The Content-MD5 you specified did not match what we received."));
    }
    let claimed = claimed.or_else(|| trailing.and_then(|t| t.read(trailer).flatten()));
    if let Some((algorithm, value)) = &claimed
        && *value != algorithm.of(bytes)
    {
        return Err(s3_error!(BadDigest, "The {} you specified did not match the calculated checksum.", algorithm.name()));
    }
    let algorithm = claimed.map(|(a, _)| a).or_else(|| asked.and_then(|a| Algorithm::parse(a.as_str()))).unwrap_or(Algorithm::Crc64Nvme);
    Ok(model::Checksum { algorithm, value: algorithm.of(bytes), full: true })
}

fn trailer(headers: &HeaderMap) -> Option<(Algorithm, String)> {
    headers.iter().find_map(|(name, value)| {
        let algorithm = Algorithm::parse(name.as_str().strip_prefix("x-amz-checksum-")?)?;
        Some((algorithm, value.to_str().ok()?.to_owned()))
    })
}

/// Tags of the `x-amz-tagging` header.
pub fn tags(header: Option<String>) -> Vec<(String, String)> {
    let header = header.unwrap_or_default();
    url::form_urlencoded::parse(header.as_bytes()).map(|(k, v)| (k.into_owned(), v.into_owned())).collect()
}

/// STANDARD is not said.
pub fn class(class: Option<StorageClass>) -> Option<String> {
    class.map(|c| c.as_str().to_owned()).filter(|c| c != "STANDARD")
}

pub async fn put(memory: &Memory, req: S3Request<PutObjectInput>) -> S3Result<PutObjectOutput> {
    let mut input = req.input;
    let grants = acl::grants(memory, input.acl.as_ref(), asked_grants!(input))?;
    let bytes = collect(input.body.take()).await?;
    let claimed = claimed!(input);
    let checksum = verify(&bytes, input.content_md5.as_deref(), claimed, req.trailing_headers.as_ref(), input.checksum_algorithm.as_ref())?;
    let mut object = Object::new(bytes);
    object.checksum = checksum;
    object.headers = stored_headers!(input);
    object.metadata = input.metadata.take().unwrap_or_default().into_iter().collect();
    object.storage_class = class(input.storage_class.take());
    object.tags = tags(input.tagging.take());
    object.grants = grants;

    let mut output = PutObjectOutput { e_tag: Some(ETag::Strong(object.etag.clone())), ..PutObjectOutput::default() };
    checksums!(output, &object.checksum);
    let mut state = memory.state.lock();
    let bucket = bucket(&mut state, &input.bucket)?;
    if memory.options.conditional_puts {
        check_conditions(bucket.objects.get(&input.key), input.if_match.as_ref(), input.if_none_match.as_ref())?;
    }
    bucket.objects.insert(input.key, object);
    Ok(output)
}

fn check_read(object: &Object, if_match: Option<&ETagCondition>, if_none_match: Option<&ETagCondition>) -> S3Result<()> {
    if if_match.is_some_and(|condition| !holds(condition, object)) {
        return Err(s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold"));
    }
    if if_none_match.is_some_and(|condition| holds(condition, object)) {
        return Err(s3_error!(NotModified));
    }
    Ok(())
}

pub fn get(memory: &Memory, input: GetObjectInput) -> S3Result<GetObjectOutput> {
    let mut state = memory.state.lock();
    let object = existing(bucket(&mut state, &input.bucket)?, &input.key)?;
    check_read(object, input.if_match.as_ref(), input.if_none_match.as_ref())?;
    if object.is_archived() {
        return Err(s3_error!(InvalidObjectState, "The operation is not valid for the object's storage class"));
    }
    let size = object.bytes.len() as u64;
    let range = match &input.range {
        None => 0..size,
        Some(range) => range.check(size).map_err(|_| s3_error!(InvalidRange, "The requested range is not satisfiable"))?,
    };
    let bytes = object.bytes.slice(range.start as usize..range.end as usize);
    let mut output = GetObjectOutput::default();
    describe!(output, &*object);
    output.content_length = Some(bytes.len() as i64);
    output.content_range = input.range.map(|_| format!("bytes {}-{}/{size}", range.start, range.end - 1));
    output.tag_count = (!object.tags.is_empty()).then_some(object.tags.len() as i32);
    if input.checksum_mode.is_some() && range == (0..size) {
        checksums!(output, &object.checksum);
    }
    output.body = Some(StreamingBlob::from(s3s::Body::from(bytes)));
    Ok(output)
}

pub fn head(memory: &Memory, input: HeadObjectInput) -> S3Result<HeadObjectOutput> {
    let mut state = memory.state.lock();
    let object = existing(bucket(&mut state, &input.bucket)?, &input.key)?;
    check_read(object, input.if_match.as_ref(), input.if_none_match.as_ref())?;
    let mut output = HeadObjectOutput::default();
    describe!(output, &*object);
    output.content_length = Some(object.bytes.len() as i64);
    if input.checksum_mode.is_some() {
        checksums!(output, &object.checksum);
    }
    Ok(output)
}

/// The source of a copy as it is now.
pub fn copy_source(
    memory: &Memory,
    source: &CopySource,
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
) -> S3Result<Object> {
    let CopySource::Bucket { bucket: name, key, .. } = source else {
        return Err(s3_error!(NotImplemented, "access points"));
    };
    let mut state = memory.state.lock();
    let object = existing(bucket(&mut state, name)?, key)?;
    if if_match.is_some_and(|c| !holds(c, object)) || if_none_match.is_some_and(|c| holds(c, object)) {
        return Err(s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold"));
    }
    if object.is_archived() {
        return Err(s3_error!(InvalidObjectState, "Operation is not valid for the source object's storage class"));
    }
    Ok(object.clone())
}

/// Preconditions of a copy's target, which s3s leaves in the headers.
fn target_condition(headers: &HeaderMap, name: &str) -> Option<ETagCondition> {
    ETagCondition::parse_http_header(headers.get(name)?.as_bytes()).ok()
}

pub fn copy(memory: &Memory, req: S3Request<CopyObjectInput>) -> S3Result<CopyObjectOutput> {
    let mut input = req.input;
    let grants = acl::grants(memory, input.acl.as_ref(), asked_grants!(input))?;
    let source = copy_source(memory, &input.copy_source, input.copy_source_if_match.as_ref(), input.copy_source_if_none_match.as_ref())?;
    if source.bytes.len() as u64 > memory.options.max_single_copy {
        return Err(s3_error!(InvalidRequest, "The specified copy source is larger than the maximum allowable size"));
    }
    let replace = input.metadata_directive.as_ref().is_some_and(|d| d.as_str() == MetadataDirective::REPLACE);
    let itself = matches!(&input.copy_source, CopySource::Bucket { bucket, key, .. } if **bucket == *input.bucket && **key == *input.key);
    let changes =
        replace || input.storage_class.is_some() || input.website_redirect_location.is_some() || input.server_side_encryption.is_some();
    if itself && !changes {
        return Err(s3_error!(
            InvalidRequest,
            "This copy request is illegal because it is trying to copy an object to itself without changing anything."
        ));
    }
    let mut object = Object::new(source.bytes.clone());
    object.last_modified = now();
    if replace {
        object.headers = stored_headers!(input);
        object.metadata = input.metadata.take().unwrap_or_default().into_iter().collect();
    } else {
        object.headers = ObjectHeaders { website_redirect: input.website_redirect_location.take(), ..source.headers.clone() };
        object.metadata = source.metadata.clone();
    }
    let retag = input.tagging_directive.as_ref().is_some_and(|d| d.as_str() == TaggingDirective::REPLACE);
    object.tags = if retag { tags(input.tagging.take()) } else { source.tags.clone() };
    object.storage_class = class(input.storage_class.take());
    object.grants = grants;
    let asked = input.checksum_algorithm.as_ref().and_then(|a| Algorithm::parse(a.as_str()));
    let algorithm = asked.unwrap_or(source.checksum.algorithm);
    object.checksum = model::Checksum { algorithm, value: algorithm.of(&object.bytes), full: true };

    let mut result = CopyObjectResult {
        e_tag: Some(ETag::Strong(object.etag.clone())),
        last_modified: Some(Timestamp::from(object.last_modified)),
        ..CopyObjectResult::default()
    };
    checksums!(result, &object.checksum);
    let mut state = memory.state.lock();
    let bucket = bucket(&mut state, &input.bucket)?;
    let if_match = target_condition(&req.headers, "if-match");
    let if_none_match = target_condition(&req.headers, "if-none-match");
    check_conditions(bucket.objects.get(&input.key), if_match.as_ref(), if_none_match.as_ref())?;
    bucket.objects.insert(input.key, object);
    Ok(CopyObjectOutput { copy_object_result: Some(result), ..CopyObjectOutput::default() })
}
