//! What the S3 client is told.

use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use crate::s3::ChecksumKind;

/// Endpoint, credentials source, object defaults and limits of one S3 client.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // each field is the option of the same name
pub struct ClientConfig {
    pub endpoint_url: Option<Url>,
    pub region: Option<String>,
    pub proxy: Option<Url>,
    pub path_style: Option<bool>,
    pub ca_bundle: Option<PathBuf>,
    pub no_check_certificate: bool,
    pub requester_pays: bool,
    pub expected_bucket_owner: Option<String>,
    pub sigv2: bool,
    pub list_objects_v1: bool,
    pub dual_stack: bool,
    pub transfer_acceleration: bool,
    pub profile: Option<String>,
    pub passwd_file: Option<PathBuf>,
    pub credentials_file: Option<PathBuf>,
    pub role_arn: Option<String>,
    pub external_id: Option<String>,
    pub iam_role: Option<String>,
    pub no_sign_request: bool,
    pub acl: Option<String>,
    pub storage_class: Option<String>,
    pub sse: Option<String>,
    pub sse_kms_key_id: Option<String>,
    pub tags: Vec<(String, String)>,
    pub upload_checksum: Option<ChecksumKind>,
    pub bwlimit: Option<u64>,
    pub retries: u32,
    pub connect_timeout: Duration,
    pub request_timeout: Duration,
    pub close_timeout: Duration,
    pub max_connections: usize,
}
