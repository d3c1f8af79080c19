//! Multipart uploads: nothing shows before Complete, and Complete checks what it is told.

use std::collections::BTreeMap;

use bytes::BytesMut;
use s3s::dto::*;
use s3s::{S3Request, S3Result, s3_error};

use super::acl::{self, asked_grants};
use super::checksum::{self, Algorithm, zeros};
use super::model::{self, Bucket, Object, PartData, Upload};
use super::objects::{self, checksums, claimed, stored_headers};
use super::s3::{Memory, bucket, now};
use packmule::s3::ObjectHeaders;

/// The upload of that id and key, or NoSuchUpload.
pub fn find<'a>(bucket: &'a mut Bucket, id: &str, key: &str) -> S3Result<&'a mut Upload> {
    bucket
        .uploads
        .get_mut(id)
        .filter(|upload| upload.key == key)
        .ok_or_else(|| s3_error!(NoSuchUpload, "The specified upload does not exist."))
}

pub fn create(memory: &Memory, mut input: CreateMultipartUploadInput) -> S3Result<CreateMultipartUploadOutput> {
    let mut template = Object::new(Vec::new());
    template.headers = stored_headers!(input);
    template.metadata = input.metadata.take().unwrap_or_default().into_iter().collect();
    template.storage_class = objects::class(input.storage_class.take());
    template.tags = objects::tags(input.tagging.take());
    template.grants = acl::grants(memory, input.acl.as_ref(), asked_grants!(input))?;
    let algorithm = input.checksum_algorithm.as_ref().and_then(|a| Algorithm::parse(a.as_str())).unwrap_or(Algorithm::Crc64Nvme);
    let full = match &input.checksum_type {
        Some(kind) => kind.as_str() == ChecksumType::FULL_OBJECT,
        None => algorithm == Algorithm::Crc64Nvme,
    };
    let asked = input.checksum_algorithm.is_some() || memory.options.sums_unasked;
    if !full && algorithm == Algorithm::Crc64Nvme || full && matches!(algorithm, Algorithm::Sha1 | Algorithm::Sha256) {
        return Err(s3_error!(
            InvalidRequest,
            "The {} checksum type is not supported with {}",
            if full { "FULL_OBJECT" } else { "COMPOSITE" },
            algorithm.name()
        ));
    }
    let mut state = memory.state.lock();
    let id = state.new_upload_id();
    let bucket = bucket(&mut state, &input.bucket)?;
    bucket.uploads.insert(
        id.clone(),
        Upload {
            key: input.key.clone(),
            initiated: now() - memory.options.clock_behind,
            template,
            algorithm,
            // Nobody takes that for the whole's.
            full: full && asked,
            asked,
            parts: BTreeMap::new(),
        },
    );
    Ok(CreateMultipartUploadOutput {
        bucket: Some(input.bucket),
        key: Some(input.key),
        upload_id: Some(id),
        ..CreateMultipartUploadOutput::default()
    })
}

fn part_number(number: i32) -> S3Result<i32> {
    if (1..=10_000).contains(&number) {
        Ok(number)
    } else {
        Err(s3_error!(InvalidArgument, "Part number must be an integer between 1 and 10000"))
    }
}

/// What the ETag of a part spells.
fn part_md5(memory: &Memory, bytes: &[u8]) -> [u8; 16] {
    let md5 = checksum::md5(bytes);
    if memory.options.opaque_parts { md5.map(|byte| !byte) } else { md5 }
}

pub async fn upload_part(memory: &Memory, req: S3Request<UploadPartInput>) -> S3Result<UploadPartOutput> {
    let mut input = req.input;
    let number = part_number(input.part_number)?;
    let (algorithm, asked) = {
        let mut state = memory.state.lock();
        let upload = find(bucket(&mut state, &input.bucket)?, &input.upload_id, &input.key)?;
        (upload.algorithm, upload.asked)
    };
    let bytes = objects::collect(input.body.take()).await?;
    let claimed = claimed!(input);
    if let Some((claimed, _)) = &claimed
        && (*claimed != algorithm || !asked)
    {
        return Err(s3_error!(
            InvalidRequest,
            "Checksum Type mismatch occurred, expected checksum Type: {}, actual checksum Type: {}",
            algorithm.name(),
            claimed.name()
        ));
    }
    objects::verify(&bytes, input.content_md5.as_deref(), claimed, req.trailing_headers.as_ref(), None)?;
    let md5 = part_md5(memory, &bytes);
    let part = PartData { md5, checksum: algorithm.of(&bytes), bytes, last_modified: now() };
    let mut output = UploadPartOutput { e_tag: Some(ETag::Strong(checksum::hex(&md5))), ..UploadPartOutput::default() };
    if asked {
        objects::checksum_value!(output, algorithm, part.checksum.clone());
    }
    let mut state = memory.state.lock();
    find(bucket(&mut state, &input.bucket)?, &input.upload_id, &input.key)?.parts.insert(number, part);
    Ok(output)
}

pub fn upload_part_copy(memory: &Memory, input: UploadPartCopyInput) -> S3Result<UploadPartCopyOutput> {
    let number = part_number(input.part_number)?;
    let source =
        objects::copy_source(memory, &input.copy_source, input.copy_source_if_match.as_ref(), input.copy_source_if_none_match.as_ref())?;
    let size = source.bytes.len() as u64;
    let range = match &input.copy_source_range {
        None => 0..size,
        Some(text) => {
            let range = Range::parse(text).map_err(|_| s3_error!(InvalidArgument, "x-amz-copy-source-range"))?;
            // S3 refuses a range past the end here, where a GET would shorten it.
            match range {
                Range::Int { first, last: Some(last) } if first <= last && last < size => first..last + 1,
                _ => return Err(s3_error!(InvalidRange, "Range specified is not valid for source object of size: {size}")),
            }
        }
    };
    let bytes = source.bytes.slice(range.start as usize..range.end as usize);
    let mut state = memory.state.lock();
    let upload = find(bucket(&mut state, &input.bucket)?, &input.upload_id, &input.key)?;
    let md5 = part_md5(memory, &bytes);
    let part = PartData { md5, checksum: upload.algorithm.of(&bytes), bytes, last_modified: now() };
    let mut result = CopyPartResult {
        e_tag: Some(ETag::Strong(checksum::hex(&md5))),
        last_modified: Some(Timestamp::from(part.last_modified)),
        ..CopyPartResult::default()
    };
    if memory.options.copies_tell_all {
        objects::checksum_value!(result, upload.algorithm, upload.algorithm.of(&source.bytes));
    }
    upload.parts.insert(number, part);
    Ok(UploadPartCopyOutput { copy_part_result: Some(result), ..UploadPartCopyOutput::default() })
}

pub fn complete(memory: &Memory, input: CompleteMultipartUploadInput) -> S3Result<CompleteMultipartUploadOutput> {
    let claimed = claimed!(input);
    let mut state = memory.state.lock();
    let bucket = bucket(&mut state, &input.bucket)?;
    let object = assemble(memory, find(bucket, &input.upload_id, &input.key)?, &input, claimed)?;
    objects::check_conditions(bucket.objects.get(&input.key), input.if_match.as_ref(), input.if_none_match.as_ref())?;

    let mut output = CompleteMultipartUploadOutput {
        e_tag: Some(ETag::Strong(object.etag.clone())),
        bucket: Some(input.bucket),
        key: Some(input.key.clone()),
        location: Some(format!("/{}", input.key)),
        ..CompleteMultipartUploadOutput::default()
    };
    checksums!(output, &object.checksum);
    bucket.uploads.remove(&input.upload_id);
    bucket.objects.insert(input.key, object);
    Ok(output)
}

/// The object that the named parts make, checked against everything the request says of it.
fn assemble(
    memory: &Memory,
    upload: &Upload,
    input: &CompleteMultipartUploadInput,
    claimed: Option<(Algorithm, String)>,
) -> S3Result<Object> {
    let named = input.multipart_upload.as_ref().and_then(|m| m.parts.as_ref()).filter(|parts| !parts.is_empty());
    let named = named.ok_or_else(|| s3_error!(MalformedXML, "You must specify at least one part"))?;
    let mut chosen: Vec<&PartData> = Vec::with_capacity(named.len());
    let mut before = 0;
    for part in named {
        let number = part.part_number.unwrap_or_default();
        if number <= before {
            return Err(s3_error!(InvalidPartOrder, "The list of parts was not in ascending order."));
        }
        before = number;
        // versitygw answers so.
        if !upload.asked && part.checksum_crc64nvme.is_some() {
            return Err(s3_error!(InvalidPart, "The upload was created without a checksum"));
        }
        let data = upload.parts.get(&number).filter(|data| part.e_tag.as_ref().is_some_and(|e| e.value() == checksum::hex(&data.md5)));
        chosen.push(data.ok_or_else(|| s3_error!(InvalidPart, "One or more of the specified parts could not be found."))?);
    }
    let small = |part: &&&PartData| part.bytes.len() < memory.options.min_part_size;
    if chosen[..chosen.len() - 1].iter().any(|part| small(&part)) {
        return Err(s3_error!(EntityTooSmall, "Your proposed upload is smaller than the minimum allowed object size"));
    }
    let size: usize = chosen.iter().map(|part| part.bytes.len()).sum();
    if input.mpu_object_size.is_some_and(|told| told != size as i64) {
        return Err(s3_error!(InvalidRequest, "The provided 'x-amz-mp-object-size' header value does not match what was computed: {size}"));
    }
    let md5s: Vec<u8> = chosen.iter().flat_map(|part| part.md5).collect();
    let bytes = if chosen.iter().all(|part| zeros::are(&part.bytes)) {
        zeros::of(size)
    } else {
        let mut bytes = BytesMut::with_capacity(size);
        chosen.iter().for_each(|part| bytes.extend_from_slice(&part.bytes));
        bytes.freeze()
    };
    let algorithm = upload.algorithm;
    let value = if upload.full { algorithm.of(&bytes) } else { algorithm.composite(chosen.iter().map(|part| part.checksum.as_str())) };
    if let Some((told, told_value)) = claimed {
        if told != algorithm || !upload.asked {
            return Err(s3_error!(InvalidRequest, "The upload was created using the {} checksum mode", algorithm.name()));
        }
        if told_value != value {
            return Err(s3_error!(BadDigest, "The {} you specified did not match the calculated checksum.", algorithm.name()));
        }
    }
    Ok(Object {
        bytes,
        etag: format!("{}-{}", checksum::hex_md5(&md5s), chosen.len()),
        last_modified: now(),
        checksum: model::Checksum { algorithm, value, full: upload.full },
        ..upload.template.clone()
    })
}

pub fn list_parts(memory: &Memory, input: ListPartsInput) -> S3Result<ListPartsOutput> {
    let mut state = memory.state.lock();
    let upload = find(bucket(&mut state, &input.bucket)?, &input.upload_id, &input.key)?;
    let most = input.max_parts.map_or(memory.options.page_size, |n| (n.max(0) as usize).min(memory.options.page_size));
    let after = input.part_number_marker.unwrap_or(0);
    let mut rest = upload.parts.range(after + 1..);
    let part = |(number, data): (&i32, &PartData)| {
        let mut part = Part {
            part_number: Some(*number),
            size: Some(data.bytes.len() as i64),
            e_tag: Some(ETag::Strong(checksum::hex(&data.md5))),
            last_modified: Some(Timestamp::from(data.last_modified)),
            ..Part::default()
        };
        let value = Some(data.checksum.clone());
        match upload.algorithm {
            Algorithm::Crc32 => part.checksum_crc32 = value,
            Algorithm::Crc32c => part.checksum_crc32c = value,
            Algorithm::Crc64Nvme => part.checksum_crc64nvme = value,
            Algorithm::Sha1 => part.checksum_sha1 = value,
            Algorithm::Sha256 => part.checksum_sha256 = value,
        }
        part
    };
    let parts: Vec<Part> = rest.by_ref().take(most).map(part).collect();
    let more = rest.next().is_some();
    Ok(ListPartsOutput {
        next_part_number_marker: parts.last().and_then(|p| p.part_number).filter(|_| more),
        is_truncated: Some(more),
        max_parts: Some(most as i32),
        parts: Some(parts),
        bucket: Some(input.bucket),
        key: Some(input.key),
        upload_id: Some(input.upload_id),
        ..ListPartsOutput::default()
    })
}

pub fn list_uploads(memory: &Memory, input: ListMultipartUploadsInput) -> S3Result<ListMultipartUploadsOutput> {
    let mut state = memory.state.lock();
    let bucket = bucket(&mut state, &input.bucket)?;
    let encoded = input.encoding_type.is_some();
    let prefix = input.prefix.clone().unwrap_or_default();
    let most = input.max_uploads.map_or(memory.options.page_size, |n| (n.max(0) as usize).min(memory.options.page_size));
    let marker = (input.key_marker.clone().unwrap_or_default(), input.upload_id_marker.clone());
    let mut all: Vec<(&String, &Upload)> = bucket.uploads.iter().filter(|(_, u)| u.key.starts_with(&prefix)).collect();
    all.sort_by(|a, b| (&a.1.key, a.0).cmp(&(&b.1.key, b.0)));
    // With a key marker alone, uploads of that very key are left out too.
    all.retain(|(id, upload)| match &marker.1 {
        Some(after) => (&upload.key, *id) > (&marker.0, after),
        None => upload.key > marker.0,
    });
    let more = all.len() > most;
    all.truncate(most);
    let last = all.last().filter(|_| more).map(|(id, upload)| (listing_key(&upload.key, encoded), (*id).clone()));
    let upload = |(id, upload): &(&String, &Upload)| MultipartUpload {
        key: Some(listing_key(&upload.key, encoded)),
        upload_id: Some((*id).clone()),
        initiated: Some(Timestamp::from(upload.initiated)),
        ..MultipartUpload::default()
    };
    Ok(ListMultipartUploadsOutput {
        uploads: Some(all.iter().map(upload).collect()),
        is_truncated: Some(more),
        next_key_marker: last.as_ref().map(|(key, _)| key.clone()),
        next_upload_id_marker: last.map(|(_, id)| id),
        max_uploads: Some(most as i32),
        encoding_type: input.encoding_type,
        prefix: Some(listing_key(&prefix, encoded)),
        bucket: Some(input.bucket),
        ..ListMultipartUploadsOutput::default()
    })
}

fn listing_key(key: &str, encoded: bool) -> String {
    super::listing::spell(key, encoded)
}
