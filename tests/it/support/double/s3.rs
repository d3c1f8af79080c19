//! s3s's `S3` trait over the model. What a request means is decided here; routing, XML and signatures are s3s's.

use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use s3s::dto::*;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};

use super::listing::{self, Query};
use super::model::{Bucket, State};
use super::{Options, acl, multipart, objects};

/// The store behind the double.
#[derive(Clone)]
pub struct Memory {
    pub state: Arc<Mutex<State>>,
    pub options: Arc<Options>,
}

/// The bucket of a request, or NoSuchBucket.
pub fn bucket<'a>(state: &'a mut State, name: &str) -> S3Result<&'a mut Bucket> {
    state.buckets.get_mut(name).ok_or_else(|| s3_error!(NoSuchBucket, "The specified bucket does not exist"))
}

fn done<T>(output: T) -> S3Result<S3Response<T>> {
    Ok(S3Response::new(output))
}

impl Memory {
    fn page_size(&self, asked: Option<i32>) -> S3Result<usize> {
        let most = self.options.page_size;
        match asked {
            None => Ok(most),
            Some(asked) => usize::try_from(asked).map(|n| n.min(most)).map_err(|_| s3_error!(InvalidArgument, "max-keys")),
        }
    }

    fn entries(&self, bucket: &Bucket, keys: &[String], encoded: bool) -> Vec<Object> {
        let entry = |key: &String| {
            let object = &bucket.objects[key];
            Object {
                key: Some(listing::spell(key, encoded)),
                size: Some(object.bytes.len() as i64),
                e_tag: Some(ETag::Strong(object.etag.clone())),
                last_modified: Some(Timestamp::from(object.last_modified)),
                storage_class: Some(ObjectStorageClass::from(object.storage_class.clone().unwrap_or_else(|| "STANDARD".to_owned()))),
                checksum_algorithm: Some(vec![ChecksumAlgorithm::from(object.checksum.algorithm.name().to_owned())]),
                checksum_type: Some(objects::checksum_type(object.checksum.full)),
                ..Object::default()
            }
        };
        keys.iter().map(entry).collect()
    }
}

fn common_prefixes(prefixes: &[String], encoded: bool) -> Option<Vec<CommonPrefix>> {
    Some(prefixes.iter().map(|p| CommonPrefix { prefix: Some(listing::spell(p, encoded)) }).collect())
}

fn wants_url(encoding: Option<&EncodingType>) -> bool {
    encoding.is_some_and(|e| e.as_str() == EncodingType::URL)
}

#[async_trait::async_trait]
impl S3 for Memory {
    async fn list_buckets(&self, req: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        let state = self.state.lock();
        let after = req.input.continuation_token.as_deref().and_then(listing::untoken);
        let most = req.input.max_buckets.map_or(self.options.page_size, |n| n as usize);
        let mut names = state
            .buckets
            .iter()
            .filter(|(name, _)| req.input.prefix.as_ref().is_none_or(|p| name.starts_with(p)))
            .filter(|(name, _)| after.as_ref().is_none_or(|after| *name > after));
        let buckets: Vec<_> = names
            .by_ref()
            .take(most)
            .map(|(name, bucket)| s3s::dto::Bucket {
                name: Some(name.clone()),
                creation_date: Some(Timestamp::from(bucket.created)),
                bucket_region: Some(self.options.region.clone()),
            })
            .collect();
        let last = buckets.last().and_then(|b| b.name.as_deref()).map(listing::token);
        let continuation_token = names.next().and(last);
        done(ListBucketsOutput { buckets: Some(buckets), continuation_token, ..ListBucketsOutput::default() })
    }

    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        let mut state = self.state.lock();
        if state.buckets.contains_key(&req.input.bucket) {
            return Err(s3_error!(BucketAlreadyOwnedByYou));
        }
        state.buckets.insert(req.input.bucket.clone(), Bucket::new());
        done(CreateBucketOutput { location: Some(format!("/{}", req.input.bucket)) })
    }

    async fn delete_bucket(&self, req: S3Request<DeleteBucketInput>) -> S3Result<S3Response<DeleteBucketOutput>> {
        let mut state = self.state.lock();
        if !bucket(&mut state, &req.input.bucket)?.objects.is_empty() {
            return Err(s3_error!(BucketNotEmpty, "The bucket you tried to delete is not empty"));
        }
        state.buckets.remove(&req.input.bucket);
        done(DeleteBucketOutput {})
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        bucket(&mut self.state.lock(), &req.input.bucket)?;
        done(HeadBucketOutput { bucket_region: Some(self.options.region.clone()), ..HeadBucketOutput::default() })
    }

    async fn get_bucket_location(&self, req: S3Request<GetBucketLocationInput>) -> S3Result<S3Response<GetBucketLocationOutput>> {
        bucket(&mut self.state.lock(), &req.input.bucket)?;
        let elsewhere = (self.options.region != "us-east-1").then(|| BucketLocationConstraint::from(self.options.region.clone()));
        done(GetBucketLocationOutput { location_constraint: elsewhere })
    }

    async fn get_bucket_ownership_controls(
        &self,
        req: S3Request<GetBucketOwnershipControlsInput>,
    ) -> S3Result<S3Response<GetBucketOwnershipControlsOutput>> {
        bucket(&mut self.state.lock(), &req.input.bucket)?;
        let ownership = if self.options.acls { ObjectOwnership::OBJECT_WRITER } else { ObjectOwnership::BUCKET_OWNER_ENFORCED };
        let rules = vec![OwnershipControlsRule { object_ownership: ObjectOwnership::from_static(ownership) }];
        done(GetBucketOwnershipControlsOutput { ownership_controls: Some(OwnershipControls { rules }) })
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        let max = self.page_size(input.max_keys)?;
        let continued = match &input.continuation_token {
            Some(token) => Some(listing::untoken(token).ok_or_else(|| s3_error!(InvalidArgument, "continuation-token"))?),
            None => None,
        };
        let mut state = self.state.lock();
        let bucket = bucket(&mut state, &input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let query = Query {
            prefix: &prefix,
            delimiter: input.delimiter.as_deref(),
            after: continued.as_deref().or(input.start_after.as_deref()),
            max,
        };
        let page = listing::page(&bucket.objects, &query);
        let encoded = wants_url(input.encoding_type.as_ref());
        done(ListObjectsV2Output {
            key_count: Some((page.keys.len() + page.prefixes.len()) as i32),
            contents: Some(self.entries(bucket, &page.keys, encoded)),
            common_prefixes: common_prefixes(&page.prefixes, encoded),
            is_truncated: Some(page.last.is_some()),
            next_continuation_token: page.last.as_deref().map(listing::token),
            continuation_token: input.continuation_token,
            start_after: input.start_after.map(|key| listing::spell(&key, encoded)),
            prefix: Some(listing::spell(&prefix, encoded)),
            delimiter: input.delimiter.map(|d| listing::spell(&d, encoded)),
            encoding_type: input.encoding_type,
            max_keys: Some(max as i32),
            name: Some(input.bucket),
            ..ListObjectsV2Output::default()
        })
    }

    async fn list_objects(&self, req: S3Request<ListObjectsInput>) -> S3Result<S3Response<ListObjectsOutput>> {
        let input = req.input;
        let max = self.page_size(input.max_keys)?;
        let mut state = self.state.lock();
        let bucket = bucket(&mut state, &input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let query = Query { prefix: &prefix, delimiter: input.delimiter.as_deref(), after: input.marker.as_deref(), max };
        let page = listing::page(&bucket.objects, &query);
        let encoded = wants_url(input.encoding_type.as_ref());
        // AWS names the next marker only where keys are folded; else it is the last key.
        let next_marker = page.last.as_deref().filter(|_| input.delimiter.is_some()).map(|last| listing::spell(last, encoded));
        done(ListObjectsOutput {
            contents: Some(self.entries(bucket, &page.keys, encoded)),
            common_prefixes: common_prefixes(&page.prefixes, encoded),
            is_truncated: Some(page.last.is_some()),
            next_marker,
            marker: Some(input.marker.map(|m| listing::spell(&m, encoded)).unwrap_or_default()),
            prefix: Some(listing::spell(&prefix, encoded)),
            delimiter: input.delimiter.map(|d| listing::spell(&d, encoded)),
            encoding_type: input.encoding_type,
            max_keys: Some(max as i32),
            name: Some(input.bucket),
            ..ListObjectsOutput::default()
        })
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        done(objects::put(self, req).await?)
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        done(objects::get(self, req.input)?)
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        done(objects::head(self, req.input)?)
    }

    async fn copy_object(&self, req: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        done(objects::copy(self, req)?)
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        let mut state = self.state.lock();
        let bucket = bucket(&mut state, &req.input.bucket)?;
        if let Some(condition) = &req.input.if_match {
            objects::require_match(bucket.objects.get(&req.input.key), condition)?;
        }
        bucket.objects.remove(&req.input.key);
        done(DeleteObjectOutput::default())
    }

    async fn delete_objects(&self, req: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let mut state = self.state.lock();
        let bucket = bucket(&mut state, &req.input.bucket)?;
        if req.input.delete.objects.len() > 1000 {
            return Err(s3_error!(MalformedXML, "more than 1000 keys"));
        }
        let mut output = DeleteObjectsOutput::default();
        let (mut deleted, mut errors) = (Vec::new(), Vec::new());
        for named in req.input.delete.objects {
            let condition = named.e_tag.filter(|_| self.options.compares_on_delete).map(ETagCondition::ETag);
            match condition.map_or(Ok(()), |c| objects::require_match(bucket.objects.get(&named.key), &c)) {
                Ok(()) => {
                    bucket.objects.remove(&named.key);
                    deleted.push(DeletedObject { key: Some(named.key), ..DeletedObject::default() });
                }
                Err(error) => errors.push(Error {
                    code: Some(error.code().as_str().to_owned()),
                    message: error.message().map(str::to_owned),
                    key: Some(named.key),
                    version_id: None,
                }),
            }
        }
        output.deleted = (!req.input.delete.quiet.unwrap_or(false)).then_some(deleted);
        output.errors = Some(errors);
        done(output)
    }

    async fn get_object_tagging(&self, req: S3Request<GetObjectTaggingInput>) -> S3Result<S3Response<GetObjectTaggingOutput>> {
        let mut state = self.state.lock();
        let object = objects::existing(bucket(&mut state, &req.input.bucket)?, &req.input.key)?;
        let tag = |(key, value): &(String, String)| Tag { key: Some(key.clone()), value: Some(value.clone()) };
        done(GetObjectTaggingOutput { tag_set: object.tags.iter().map(tag).collect(), version_id: None })
    }

    async fn get_object_acl(&self, req: S3Request<GetObjectAclInput>) -> S3Result<S3Response<GetObjectAclOutput>> {
        let mut state = self.state.lock();
        let object = objects::existing(bucket(&mut state, &req.input.bucket)?, &req.input.key)?;
        done(acl::policy(&object.grants))
    }

    async fn put_object_tagging(&self, req: S3Request<PutObjectTaggingInput>) -> S3Result<S3Response<PutObjectTaggingOutput>> {
        let mut state = self.state.lock();
        let object = objects::existing(bucket(&mut state, &req.input.bucket)?, &req.input.key)?;
        let tags = req.input.tagging.tag_set.into_iter();
        object.tags = tags.map(|tag| (tag.key.unwrap_or_default(), tag.value.unwrap_or_default())).collect();
        done(PutObjectTaggingOutput::default())
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        done(multipart::create(self, req.input)?)
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        done(multipart::upload_part(self, req).await?)
    }

    async fn upload_part_copy(&self, req: S3Request<UploadPartCopyInput>) -> S3Result<S3Response<UploadPartCopyOutput>> {
        done(multipart::upload_part_copy(self, req.input)?)
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        done(multipart::complete(self, req.input)?)
    }

    async fn abort_multipart_upload(&self, req: S3Request<AbortMultipartUploadInput>) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let mut state = self.state.lock();
        let bucket = bucket(&mut state, &req.input.bucket)?;
        multipart::find(bucket, &req.input.upload_id, &req.input.key)?;
        bucket.uploads.remove(&req.input.upload_id);
        done(AbortMultipartUploadOutput::default())
    }

    async fn list_parts(&self, req: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        done(multipart::list_parts(self, req.input)?)
    }

    async fn list_multipart_uploads(&self, req: S3Request<ListMultipartUploadsInput>) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        done(multipart::list_uploads(self, req.input)?)
    }
}

/// The time a change is stamped with.
pub fn now() -> SystemTime {
    super::model::whole_second(SystemTime::now())
}
