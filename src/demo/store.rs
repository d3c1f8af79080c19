//! s3s-fs, made fit for a mount: keys are files below a folder, so that a user can look at them.
//!
//! What s3s-fs 0.14.1 does otherwise is put right here: it lists no ETags and no directories, says a key is URL-encoded and
//! does not encode it, answers HEAD of a directory's name with 500, drops `Content-Type` from GET, ignores `If-Match` there,
//! keeps the checksums of an overwritten object, and answers 500 where a key would have to be file and folder at once.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use async_trait::async_trait;
use parking_lot::Mutex;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use s3s::dto::*;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;

/// ETag of a directory marker: the MD5 of nothing.
const EMPTY_MD5: &str = "d41d8cd98f00b204e9800998ecf8427e";

/// Keys of a listing page.
const PAGE: usize = 1000;

/// What `encoding-type=url` leaves alone.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'*').remove(b'/');

/// The demo's store.
#[derive(Debug)]
pub(super) struct FolderStore {
    files: FileSystem,
    root: PathBuf,
    /// ETags by key, as long as size and time of the file stay the same: s3s-fs reads a file to know its.
    etags: Mutex<HashMap<(String, String), Known>>,
}

/// An ETag, and the size and time of the file that it was taken of.
type Known = (u64, SystemTime, ETag);

/// A file or a folder of a bucket's folder.
struct Found {
    key: String,
    size: u64,
    modified: SystemTime,
}

impl FolderStore {
    pub(super) fn new(root: &Path) -> Result<Self, String> {
        let files = FileSystem::new(root).map_err(|error| format!("{}: {error:?}", root.display()))?;
        Ok(Self { files, root: root.to_owned(), etags: Mutex::default() })
    }

    /// A key's file. Segments that a folder cannot hold as they are (`..`, empty ones) are nobody's file.
    fn path(&self, bucket: &str, key: &str) -> S3Result<PathBuf> {
        let name = key.strip_suffix('/').unwrap_or(key);
        if name.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
            return Err(s3_error!(InvalidRequest, "the demo's store keeps keys as files and cannot hold this one"));
        }
        Ok(self.root.join(bucket).join(name))
    }

    /// True for a key that is a folder here; an error for a folder's name without its slash.
    fn is_folder(&self, bucket: &str, key: &str) -> S3Result<bool> {
        let path = self.path(bucket, key)?;
        match (path.is_dir(), key.ends_with('/')) {
            (true, true) => Ok(true),
            (true, false) => Err(s3_error!(NoSuchKey)),
            (false, true) => Err(s3_error!(NoSuchKey)),
            (false, false) => Ok(false),
        }
    }

    /// Refuses a key that would have to be a file and a folder at once.
    fn check_room(&self, bucket: &str, key: &str) -> S3Result<()> {
        let path = self.path(bucket, key)?;
        let bucket = self.root.join(bucket);
        let below_a_file = path.ancestors().skip(1).take_while(|parent| *parent != bucket).any(Path::is_file);
        if below_a_file || path.is_dir() != key.ends_with('/') && path.exists() {
            return Err(s3_error!(InvalidRequest, "the demo's store keeps keys as files: one cannot be a file and a folder"));
        }
        Ok(())
    }

    fn walk(bucket: &Path, folder: &Path, found: &mut Vec<Found>) -> io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let (path, metadata) = (entry.path(), entry.metadata()?);
            let Some(mut key) = path.strip_prefix(bucket).ok().and_then(Path::to_str).map(str::to_owned) else { continue };
            let mut size = metadata.len();
            if metadata.is_dir() {
                Self::walk(bucket, &path, found)?;
                key.push('/');
                size = 0;
            }
            found.push(Found { key, size, modified: metadata.modified()? });
        }
        Ok(())
    }

    async fn etag(&self, bucket: &str, found: &Found, request: &S3Request<ListObjectsV2Input>) -> Option<ETag> {
        if found.key.ends_with('/') {
            return Some(ETag::Strong(EMPTY_MD5.into()));
        }
        let name = (bucket.to_owned(), found.key.clone());
        if let Some((size, modified, etag)) = self.etags.lock().get(&name)
            && *size == found.size
            && *modified == found.modified
        {
            return Some(etag.clone());
        }
        let head = HeadObjectInput { bucket: bucket.to_owned(), key: found.key.clone(), ..HeadObjectInput::default() };
        let etag = self.files.head_object(request.clone().map_input(|_| head)).await.ok()?.output.e_tag?;
        self.etags.lock().insert(name, (found.size, found.modified, etag.clone()));
        Some(etag)
    }

    async fn head_of(&self, request: &S3Request<GetObjectInput>) -> S3Result<HeadObjectOutput> {
        let head = HeadObjectInput { bucket: request.input.bucket.clone(), key: request.input.key.clone(), ..HeadObjectInput::default() };
        Ok(self.files.head_object(request_for(request, head)).await?.output)
    }
}

/// The same request with another input; bodies and trailers stay with the first.
fn request_for<T, U>(request: &S3Request<T>, input: U) -> S3Request<U> {
    S3Request {
        input,
        method: request.method.clone(),
        uri: request.uri.clone(),
        headers: request.headers.clone(),
        extensions: request.extensions.clone(),
        credentials: request.credentials.clone(),
        region: request.region.clone(),
        service: request.service.clone(),
        trailing_headers: None,
    }
}

/// True for the ETag of a multipart object, beside which s3s-fs keeps the checksums of whatever the key held before.
fn is_multipart(etag: Option<&ETag>) -> bool {
    etag.is_some_and(|etag| etag.value().contains('-'))
}

#[async_trait]
impl S3 for FolderStore {
    async fn create_bucket(&self, request: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        self.files.create_bucket(request).await
    }

    async fn delete_bucket(&self, request: S3Request<DeleteBucketInput>) -> S3Result<S3Response<DeleteBucketOutput>> {
        match std::fs::remove_dir(self.root.join(&request.input.bucket)) {
            Ok(()) => Ok(S3Response::new(DeleteBucketOutput::default())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(s3_error!(NoSuchBucket)),
            Err(_) => Err(s3_error!(BucketNotEmpty)),
        }
    }

    async fn head_bucket(&self, request: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.files.head_bucket(request).await
    }

    async fn get_bucket_location(&self, request: S3Request<GetBucketLocationInput>) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.files.get_bucket_location(request).await
    }

    async fn list_buckets(&self, request: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        self.files.list_buckets(request).await
    }

    async fn list_objects(&self, request: S3Request<ListObjectsInput>) -> S3Result<S3Response<ListObjectsOutput>> {
        let marker = request.input.marker.clone();
        let request = request.map_input(|input| {
            let mut input: ListObjectsV2Input = input.into();
            input.start_after = marker;
            input
        });
        Ok(self.list_objects_v2(request).await?.map_output(|page| ListObjectsOutput {
            next_marker: page.next_continuation_token,
            contents: page.contents,
            common_prefixes: page.common_prefixes,
            delimiter: page.delimiter,
            encoding_type: page.encoding_type,
            name: page.name,
            prefix: page.prefix,
            max_keys: page.max_keys,
            is_truncated: page.is_truncated,
            ..ListObjectsOutput::default()
        }))
    }

    async fn list_objects_v2(&self, request: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = &request.input;
        let bucket = self.root.join(&input.bucket);
        if !bucket.is_dir() {
            return Err(s3_error!(NoSuchBucket));
        }
        let mut found = Vec::new();
        Self::walk(&bucket, &bucket, &mut found).map_err(|error| s3_error!(InternalError, "{error}"))?;
        found.sort_by(|a, b| a.key.cmp(&b.key));

        let prefix = input.prefix.as_deref().unwrap_or_default();
        let delimiter = input.delimiter.as_deref().filter(|delimiter| !delimiter.is_empty());
        let after = input.continuation_token.as_deref().max(input.start_after.as_deref()).unwrap_or_default();
        let most = input.max_keys.and_then(|keys| usize::try_from(keys).ok()).unwrap_or(PAGE).min(PAGE);
        let encode = |text: &str| match input.encoding_type.as_ref().map(EncodingType::as_str) {
            Some(EncodingType::URL) => utf8_percent_encode(text, PLAIN).to_string(),
            _ => text.to_owned(),
        };

        let (mut contents, mut prefixes, mut last, mut truncated) = (Vec::new(), Vec::new(), String::new(), false);
        for object in found.iter().filter(|object| object.key.starts_with(prefix)) {
            let folded = delimiter.and_then(|delimiter| {
                object.key[prefix.len()..].find(delimiter).map(|at| &object.key[..prefix.len() + at + delimiter.len()])
            });
            let shown = folded.unwrap_or(&object.key);
            if shown <= after || folded.is_some_and(|folded| folded == last) {
                continue;
            }
            if contents.len() + prefixes.len() == most {
                truncated = most > 0;
                break;
            }
            last = shown.to_owned();
            match folded {
                Some(folded) => prefixes.push(CommonPrefix { prefix: Some(encode(folded)) }),
                None => contents.push(Object {
                    key: Some(encode(&object.key)),
                    size: i64::try_from(object.size).ok(),
                    last_modified: Some(object.modified.into()),
                    e_tag: self.etag(&input.bucket, object, &request).await,
                    ..Object::default()
                }),
            }
        }
        let output = ListObjectsV2Output {
            key_count: i32::try_from(contents.len() + prefixes.len()).ok(),
            contents: Some(contents),
            common_prefixes: Some(prefixes),
            is_truncated: Some(truncated),
            next_continuation_token: truncated.then_some(last),
            max_keys: input.max_keys,
            delimiter: input.delimiter.clone(),
            encoding_type: input.encoding_type.clone(),
            name: Some(input.bucket.clone()),
            prefix: Some(encode(prefix)),
            ..ListObjectsV2Output::default()
        };
        Ok(S3Response::new(output))
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        if self.is_folder(&request.input.bucket, &request.input.key)? {
            let modified = self.path(&request.input.bucket, &request.input.key)?.metadata().and_then(|metadata| metadata.modified()).ok();
            let output = HeadObjectOutput {
                content_length: Some(0),
                content_type: Some("application/x-directory".into()),
                e_tag: Some(ETag::Strong(EMPTY_MD5.into())),
                last_modified: modified.map(Timestamp::from),
                ..HeadObjectOutput::default()
            };
            return Ok(S3Response::new(output));
        }
        let mut response = self.files.head_object(request).await?;
        if is_multipart(response.output.e_tag.as_ref()) {
            response.output.checksum_crc32 = None;
            response.output.checksum_crc32c = None;
            response.output.checksum_crc64nvme = None;
            response.output.checksum_sha1 = None;
            response.output.checksum_sha256 = None;
        }
        Ok(response)
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        if self.is_folder(&request.input.bucket, &request.input.key)? {
            let output =
                GetObjectOutput { content_length: Some(0), e_tag: Some(ETag::Strong(EMPTY_MD5.into())), ..GetObjectOutput::default() };
            return Ok(S3Response::new(output));
        }
        let head = self.head_of(&request).await?;
        if let (Some(ETagCondition::ETag(wanted)), Some(etag)) = (&request.input.if_match, &head.e_tag)
            && !etag.strong_cmp(wanted)
        {
            return Err(s3_error!(PreconditionFailed));
        }
        let overrides = (request.input.response_content_type.clone(), request.input.response_content_disposition.clone());
        let mut response = self.files.get_object(request).await?;
        let output = &mut response.output;
        output.content_type = overrides.0.or(head.content_type);
        output.content_disposition = overrides.1.or(output.content_disposition.take());
        if is_multipart(output.e_tag.as_ref()) {
            output.checksum_crc32 = None;
            output.checksum_crc32c = None;
            output.checksum_crc64nvme = None;
            output.checksum_sha1 = None;
            output.checksum_sha256 = None;
        }
        Ok(response)
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        self.check_room(&request.input.bucket, &request.input.key)?;
        let mut response = self.files.put_object(request).await?;
        response.output.e_tag.get_or_insert_with(|| ETag::Strong(EMPTY_MD5.into()));
        Ok(response)
    }

    async fn copy_object(&self, request: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        self.check_room(&request.input.bucket, &request.input.key)?;
        let CopySource::Bucket { bucket, key, .. } = &request.input.copy_source else { return Err(s3_error!(NotImplemented)) };
        if !self.is_folder(bucket, key)? {
            return self.files.copy_object(request).await;
        }
        let target = self.path(&request.input.bucket, &request.input.key)?;
        std::fs::create_dir_all(&target).map_err(|error| s3_error!(InternalError, "{error}"))?;
        let result = CopyObjectResult {
            e_tag: Some(ETag::Strong(EMPTY_MD5.into())),
            last_modified: Some(SystemTime::now().into()),
            ..CopyObjectResult::default()
        };
        Ok(S3Response::new(CopyObjectOutput { copy_object_result: Some(result), ..CopyObjectOutput::default() }))
    }

    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        match self.is_folder(&request.input.bucket, &request.input.key) {
            Ok(_) => self.files.delete_object(request).await,
            // A key that does not exist is deleted already.
            Err(_) => Ok(S3Response::new(DeleteObjectOutput::default())),
        }
    }

    async fn delete_objects(&self, mut request: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        // Folders after what is in them, or they are not empty and stay.
        request.input.delete.objects.sort_by(|a, b| b.key.cmp(&a.key));
        self.files.delete_objects(request).await
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.check_room(&request.input.bucket, &request.input.key)?;
        self.files.create_multipart_upload(request).await
    }

    async fn upload_part(&self, request: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        self.files.upload_part(request).await
    }

    async fn upload_part_copy(&self, request: S3Request<UploadPartCopyInput>) -> S3Result<S3Response<UploadPartCopyOutput>> {
        self.files.upload_part_copy(request).await
    }

    async fn list_parts(&self, request: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        self.files.list_parts(request).await
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        self.check_room(&request.input.bucket, &request.input.key)?;
        self.files.complete_multipart_upload(request).await
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.files.abort_multipart_upload(request).await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::super::server::Server;
    use crate::s3::client::{Client, ClientConfig};
    use crate::s3::{Account, CopyMetadata, CopySource, ErrorKind, GetRequest, ListRequest, PutOptions, Store};

    async fn store(root: &std::path::Path) -> (Server, Arc<dyn Store>) {
        std::fs::create_dir(root.join("data")).unwrap();
        let server = Server::start(&root.join("data"), root.join("credentials")).await.unwrap();
        let config = ClientConfig {
            endpoint_url: Some(format!("http://{}", server.address).parse().unwrap()),
            region: Some("us-east-1".into()),
            credentials_file: Some(server.credentials.clone()),
            ..ClientConfig::default()
        };
        let client = Client::new(config).unwrap();
        client.create_bucket("releases").await.unwrap();
        (server, client.bucket("releases").await.unwrap())
    }

    async fn put(store: &dyn Store, key: &str, body: &'static [u8]) -> crate::s3::Result<crate::s3::PutOutcome> {
        store.put(key, Arc::new(bytes::Bytes::from_static(body)), PutOptions::default()).await
    }

    #[tokio::test]
    async fn folders_are_markers_and_listings_fold() {
        let dir = tempfile::tempdir().unwrap();
        let (_server, store) = store(dir.path()).await;
        let written = put(store.as_ref(), "a/ä %+.txt", b"x").await.unwrap();
        put(store.as_ref(), "empty/", b"").await.unwrap();
        put(store.as_ref(), "z", b"").await.unwrap();

        let page = store.list(ListRequest { delimited: true, ..ListRequest::default() }).await.unwrap();
        assert_eq!(page.prefixes, ["a/", "empty/"]);
        assert_eq!(page.entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["z"]);

        let first = store.list(ListRequest { max_keys: Some(2), ..ListRequest::default() }).await.unwrap();
        assert_eq!(first.entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["a/", "a/ä %+.txt"]);
        assert_eq!(first.entries[1].etag, written.etag);
        let rest = store.list(ListRequest { continuation: first.next, ..ListRequest::default() }).await.unwrap();
        assert_eq!(rest.entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["empty/", "z"]);
        assert!(rest.next.is_none());

        assert_eq!(store.head("a/").await.unwrap().size, 0);
        assert_eq!(store.head("a").await.unwrap_err().kind, ErrorKind::NoSuchKey);
        assert_eq!(store.head("a/ä %+.txt").await.unwrap().size, 1);
    }

    #[tokio::test]
    async fn a_key_is_a_file_or_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let (_server, store) = store(dir.path()).await;
        put(store.as_ref(), "a", b"x").await.unwrap();
        assert_eq!(put(store.as_ref(), "a/b", b"x").await.unwrap_err().kind, ErrorKind::InvalidRequest);
        put(store.as_ref(), "d/e", b"x").await.unwrap();
        assert_eq!(put(store.as_ref(), "d", b"x").await.unwrap_err().kind, ErrorKind::InvalidRequest);
    }

    #[tokio::test]
    async fn versions_are_told_apart_and_folders_move() {
        let dir = tempfile::tempdir().unwrap();
        let (_server, store) = store(dir.path()).await;
        let old = put(store.as_ref(), "d/f", b"old").await.unwrap();
        put(store.as_ref(), "d/f", b"new").await.unwrap();
        let stale = GetRequest { if_match: Some(old.etag), ..GetRequest::default() };
        assert_eq!(store.get("d/f", stale).await.err().unwrap().kind, ErrorKind::PreconditionFailed);

        for key in ["d/", "d/f"] {
            let source = CopySource { bucket: "releases".into(), key: key.into(), if_match: None, version_id: None, checksum: None };
            let keep = CopyMetadata::Keep { website_redirect: None, storage_class: None, acl: None };
            store.copy(&key.replace('d', "moved"), source, keep, None).await.unwrap();
        }
        assert!(store.delete_many(&[("d/".into(), None), ("d/f".into(), None)]).await.unwrap().is_empty());
        let keys: Vec<String> = store.list(ListRequest::default()).await.unwrap().entries.into_iter().map(|entry| entry.key).collect();
        assert_eq!(keys, ["moved/", "moved/f"]);
    }
}
