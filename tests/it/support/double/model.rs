//! What the double holds: buckets of flat keys, and uploads in progress.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use packmule::s3::{Metadata, ObjectHeaders};

use super::checksum::{self, Algorithm, zeros};

/// One object, with everything that S3 keeps beside its bytes.
#[derive(Clone, Debug)]
pub struct Object {
    pub bytes: Bytes,
    /// Without quotes, as AWS makes it: MD5, or MD5 of the parts' MD5s with `-N`.
    pub etag: String,
    /// To the second, as AWS keeps it.
    pub last_modified: SystemTime,
    pub metadata: Metadata,
    pub headers: ObjectHeaders,
    /// `None` is STANDARD.
    pub storage_class: Option<String>,
    /// `x-amz-restore`.
    pub restore: Option<String>,
    pub tags: Vec<(String, String)>,
    /// Grants by permission and grantee (a URI or an id), beside the owner's own; none when private.
    pub grants: Vec<(String, String)>,
    pub checksum: Checksum,
}

/// The checksum that S3 keeps with an object; where the client sends none it makes CRC64NVME by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    pub algorithm: Algorithm,
    /// Base64; of the parts' checksums, with `-N`, where `full` is false.
    pub value: String,
    /// FULL_OBJECT, else COMPOSITE.
    pub full: bool,
}

impl Object {
    /// An object as a plain PUT of `bytes` makes it.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self {
            etag: checksum::hex_md5(&bytes),
            checksum: Checksum { algorithm: Algorithm::Crc64Nvme, value: Algorithm::Crc64Nvme.of(&bytes), full: true },
            bytes,
            last_modified: whole_second(SystemTime::now()),
            metadata: Metadata::new(),
            headers: ObjectHeaders { content_type: Some("binary/octet-stream".to_owned()), ..ObjectHeaders::default() },
            storage_class: None,
            restore: None,
            tags: Vec::new(),
            grants: Vec::new(),
        }
    }

    /// So many zeros, as an upload in parts made it: for sizes that no memory holds.
    pub fn zeros(len: usize) -> Self {
        let bytes = zeros::of(len);
        let checksum = Checksum { algorithm: Algorithm::Crc64Nvme, value: Algorithm::Crc64Nvme.of(&bytes), full: true };
        Self { etag: format!("{}-2", checksum::hex_md5(b"zeros")), checksum, bytes, ..Self::new(Bytes::new()) }
    }

    /// With one line of user metadata.
    pub fn meta(mut self, name: &str, value: &str) -> Self {
        self.metadata.insert(name.to_owned(), value.to_owned());
        self
    }

    /// In another storage class.
    pub fn class(mut self, class: &str) -> Self {
        self.storage_class = Some(class.to_owned());
        self
    }

    /// Last changed `ago` before now.
    pub fn aged(mut self, ago: Duration) -> Self {
        self.last_modified = whole_second(SystemTime::now() - ago);
        self
    }

    /// True when it has to be restored before it can be read or copied.
    pub fn is_archived(&self) -> bool {
        matches!(self.storage_class.as_deref(), Some("GLACIER" | "DEEP_ARCHIVE"))
            && !self.restore.as_deref().is_some_and(|r| r.contains("ongoing-request=\"false\""))
    }
}

/// S3 keeps times to the second; an HTTP date says no more.
pub fn whole_second(time: SystemTime) -> SystemTime {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

/// A part that has arrived.
#[derive(Clone, Debug)]
pub struct PartData {
    pub bytes: Bytes,
    pub md5: [u8; 16],
    /// Base64 of the upload's algorithm.
    pub checksum: String,
    pub last_modified: SystemTime,
}

/// An unfinished multipart upload.
#[derive(Clone, Debug)]
pub struct Upload {
    pub key: String,
    pub initiated: SystemTime,
    /// The object it becomes, without bytes.
    pub template: Object,
    pub algorithm: Algorithm,
    pub full: bool,
    /// It was begun with a checksum, or gets one all the same.
    pub asked: bool,
    pub parts: BTreeMap<i32, PartData>,
}

/// A bucket.
#[derive(Clone, Debug)]
pub struct Bucket {
    pub created: SystemTime,
    pub objects: BTreeMap<String, Object>,
    /// By upload id; ids grow, so the order is that of their creation.
    pub uploads: BTreeMap<String, Upload>,
}

impl Bucket {
    pub fn new() -> Self {
        Self { created: whole_second(SystemTime::now()), objects: BTreeMap::new(), uploads: BTreeMap::new() }
    }
}

/// Everything.
#[derive(Debug, Default)]
pub struct State {
    pub buckets: BTreeMap<String, Bucket>,
    next_upload: u64,
}

impl State {
    pub fn new_upload_id(&mut self) -> String {
        self.next_upload += 1;
        format!("upload-{:08}", self.next_upload)
    }
}
