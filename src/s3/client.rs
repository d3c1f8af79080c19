//! The client of one account at one endpoint: configuration, buckets, the probe at mount time.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::Method;
use url::Url;

use super::bucket::Bucket;
use super::endpoint::{BucketName, Endpoint};
use super::failures::{Failure, Failures};
use super::operation::{Counters, Operation, Usage};
use super::request::{Call, Payload, Place};
use super::{Account, BucketEntry, ChecksumKind, ErrorKind, ListRequest, Result, S3Error, Store, response, xml};
use crate::aws::bandwidth::Bandwidth;
use crate::aws::credentials::{Credentials, CredentialsConfig};
use crate::aws::http::{HttpConfig, Traffic};
use crate::aws::profile::{self, Profiles};

/// How the store is reached and what every object gets. Plain data; holds no secret itself.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Another store than AWS.
    pub endpoint_url: Option<Url>,
    /// `None`: `AWS_REGION`, `AWS_DEFAULT_REGION`, the profile's, else found from the bucket.
    pub region: Option<String>,
    /// Overrides `HTTPS_PROXY` and its kin.
    pub proxy: Option<Url>,
    /// `None`: virtual-host style on AWS, path style elsewhere.
    pub path_style: Option<bool>,
    /// PEM certificates trusted beside the system's.
    pub ca_bundle: Option<PathBuf>,
    /// Accepts any certificate.
    pub no_check_certificate: bool,
    /// `x-amz-request-payer`.
    pub requester_pays: bool,
    /// Account id that must own the bucket.
    pub expected_bucket_owner: Option<String>,
    /// Signature Version 2.
    pub sigv2: bool,
    /// ListObjects instead of ListObjectsV2.
    pub list_objects_v1: bool,
    /// IPv6 hosts of AWS.
    pub dual_stack: bool,
    /// `s3-accelerate` hosts of AWS.
    pub transfer_acceleration: bool,
    /// AWS profile.
    pub profile: Option<String>,
    /// s3fs's password file.
    pub passwd_file: Option<PathBuf>,
    /// Instead of `~/.aws/credentials`.
    pub credentials_file: Option<PathBuf>,
    /// Role to assume.
    pub role_arn: Option<String>,
    /// `ExternalId` of the role.
    pub external_id: Option<String>,
    /// The machine's own role alone.
    pub iam_role: Option<String>,
    /// Anonymous requests.
    pub no_sign_request: bool,
    /// Canned ACL of new objects.
    pub acl: Option<String>,
    /// Storage class of new objects.
    pub storage_class: Option<String>,
    /// `AES256`, `aws:kms` or `aws:kms:dsse`.
    pub sse: Option<String>,
    /// KMS key of `sse`.
    pub sse_kms_key_id: Option<String>,
    /// Tags of new objects.
    pub tags: Vec<(String, String)>,
    /// Checksum of uploads; `None`: CRC64NVME, less where the store refuses it.
    pub upload_checksum: Option<ChecksumKind>,
    /// Bytes a second of uploads together.
    pub bwlimit: Option<u64>,
    /// How often reads and metadata requests are sent again.
    pub retries: u32,
    /// TCP and TLS together.
    pub connect_timeout: Duration,
    /// Without a byte moving.
    pub request_timeout: Duration,
    /// The same for CompleteMultipartUpload and server-side copies, which answer when they are done.
    pub close_timeout: Duration,
    /// Connections kept open.
    pub max_connections: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            endpoint_url: None,
            region: None,
            proxy: None,
            path_style: None,
            ca_bundle: None,
            no_check_certificate: false,
            requester_pays: false,
            expected_bucket_owner: None,
            sigv2: false,
            list_objects_v1: false,
            dual_stack: false,
            transfer_acceleration: false,
            profile: None,
            passwd_file: None,
            credentials_file: None,
            role_arn: None,
            external_id: None,
            iam_role: None,
            no_sign_request: false,
            acl: None,
            storage_class: None,
            sse: None,
            sse_kms_key_id: None,
            tags: Vec::new(),
            upload_checksum: None,
            bwlimit: None,
            retries: 5,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(20),
            close_timeout: Duration::from_secs(300),
            max_connections: 32,
        }
    }
}

/// What all buckets of a client share.
#[derive(Debug)]
pub(super) struct Core {
    pub config: ClientConfig,
    pub http: reqwest::Client,
    pub credentials: Credentials,
    pub endpoint: Endpoint,
    pub counters: Counters,
    pub failures: Failures,
    pub traffic: Arc<Traffic>,
    pub bandwidth: Option<Arc<Bandwidth>>,
    pub bandwidth_in: Option<Arc<Bandwidth>>,
    /// Where a bucket is looked for first.
    pub region: String,
    /// The store was seen to give a request id with an answer.
    pub names_requests: AtomicBool,
}

/// The client. Cheap to share; every bucket is made once.
pub struct Client {
    pub(super) core: Arc<Core>,
    buckets: parking_lot::Mutex<HashMap<String, Arc<Bucket>>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoint", &self.core.endpoint.shown()).finish_non_exhaustive()
    }
}

fn configured(kind: ErrorKind, message: String) -> S3Error {
    S3Error::local(kind, "Configuration", "s3://", message)
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// `region=`, the environment's, the profile's.
fn region_of(config: &ClientConfig) -> Option<String> {
    let named = config.region.clone().or_else(|| environment("AWS_REGION")).or_else(|| environment("AWS_DEFAULT_REGION"));
    named.or_else(|| {
        let name = config.profile.clone().or_else(|| environment("AWS_PROFILE")).unwrap_or_else(|| "default".to_owned());
        Profiles::load(&profile::paths(config.credentials_file.as_deref())).get(&name).region
    })
}

impl Client {
    /// Reads what the configuration names (CA bundle, profile) and connects nothing yet.
    ///
    /// # Errors
    /// [`ErrorKind::Credentials`] or [`ErrorKind::InvalidRequest`], one line with the remedy.
    pub fn new(config: ClientConfig) -> Result<Arc<Client>> {
        let invalid = |message| configured(ErrorKind::InvalidRequest, message);
        let endpoint = Endpoint::new(config.endpoint_url.as_ref(), config.path_style, config.dual_stack, config.transfer_acceleration)
            .map_err(invalid)?;
        let http = crate::aws::http::client(&HttpConfig {
            proxy: config.proxy.clone(),
            ca_bundle: config.ca_bundle.clone(),
            no_check_certificate: config.no_check_certificate,
            needs_tls: !endpoint.is_plain_http(),
            connect_timeout: config.connect_timeout,
            stall: config.request_timeout,
            max_connections: config.max_connections,
        })
        .map_err(invalid)?;
        let region = endpoint.region.clone().or_else(|| region_of(&config)).unwrap_or_else(|| "us-east-1".to_owned());
        let credentials = CredentialsConfig {
            profile: config.profile.clone(),
            passwd_file: config.passwd_file.clone(),
            credentials_file: config.credentials_file.clone(),
            role_arn: config.role_arn.clone(),
            external_id: config.external_id.clone(),
            iam_role: config.iam_role.clone(),
            no_sign_request: config.no_sign_request,
            region: Some(region.clone()).filter(|_| endpoint.is_aws()),
        };
        let credentials = Credentials::new(&credentials, http.clone()).map_err(|message| configured(ErrorKind::Credentials, message))?;
        let pace = || config.bwlimit.map(|rate| Arc::new(Bandwidth::new(rate)));
        let (bandwidth, bandwidth_in) = (pace(), pace());
        let core = Core {
            config,
            http,
            credentials,
            endpoint,
            counters: Counters::default(),
            failures: Failures::default(),
            traffic: Arc::default(),
            bandwidth,
            bandwidth_in,
            region,
            names_requests: AtomicBool::new(false),
        };
        Ok(Arc::new(Client { core: Arc::new(core), buckets: parking_lot::Mutex::default() }))
    }

    /// What this client has asked of the store, retries included.
    pub fn usage(&self) -> Usage {
        Usage { requests: self.core.counters.snapshot(), sent: self.core.traffic.sent(), received: self.core.traffic.received() }
    }

    /// How each kind of request ended, and how long it took.
    pub fn counters(&self) -> &Counters {
        &self.core.counters
    }

    /// What failed lately, the oldest first.
    pub fn failures(&self) -> Vec<Failure> {
        self.core.failures.snapshot()
    }

    /// True for AWS itself, whatever the spelling of its endpoint.
    pub fn is_aws(&self) -> bool {
        self.core.endpoint.is_aws()
    }

    /// True when the endpoint is plain `http://`.
    pub fn is_plain_http(&self) -> bool {
        self.core.endpoint.is_plain_http()
    }

    /// The endpoint as messages name it, without anything secret.
    pub fn endpoint(&self) -> String {
        self.core.endpoint.shown()
    }

    /// The service that buckets belong to, the same for every way to spell its endpoint.
    pub fn service(&self) -> String {
        self.core.endpoint.service()
    }

    pub(super) fn store(&self, name: &str) -> Result<Arc<Bucket>> {
        if let Some(bucket) = self.buckets.lock().get(name) {
            return Ok(Arc::clone(bucket));
        }
        let parsed = BucketName::parse(name)
            .map_err(|message| S3Error::local(ErrorKind::InvalidRequest, "Configuration", format!("s3://{name}"), message))?;
        let bucket = Arc::new(Bucket::new(Arc::clone(&self.core), parsed));
        Ok(Arc::clone(self.buckets.lock().entry(name.to_owned()).or_insert(bucket)))
    }

    /// The store of a bucket whose region is found with the first request: asks nothing now.
    ///
    /// # Errors
    /// A name that is none, or a kind of bucket that cannot be mounted.
    pub fn open(&self, name: &str) -> Result<Arc<dyn Store>> {
        Ok(self.store(name)?)
    }

    /// The mount's probe: finds the region, proves the credentials, and that the bucket can be listed under `prefix`. Rights to the
    /// prefix alone are enough: nothing else is asked. Retries while the endpoint refuses (or its name is unknown) until `refused`,
    /// and while nothing answers until `silent`.
    ///
    /// # Errors
    /// The last failure; [`super::explain::explain`] makes the line for the user.
    pub async fn probe(&self, bucket: &str, prefix: &str, refused: Duration, silent: Duration) -> Result<Arc<dyn Store>> {
        let store = self.store(bucket)?;
        let start = tokio::time::Instant::now();
        let resource = store.place.resource(None);
        let mut last =
            S3Error::local(ErrorKind::TimedOut, "ListObjectsV2", resource, format!("nothing answered within {} s", silent.as_secs()));
        loop {
            let request = ListRequest { prefix: prefix.to_owned(), max_keys: Some(2), ..ListRequest::default() };
            let limit = if last.kind == ErrorKind::Network { refused } else { silent };
            let left = limit.saturating_sub(start.elapsed());
            let Ok(answer) = tokio::time::timeout(left, store.list(request)).await else { return Err(last) };
            let error = match answer {
                Ok(_) => return Ok(store),
                Err(error) => error,
            };
            let waits = match error.kind {
                ErrorKind::Network => refused,
                ErrorKind::TimedOut | ErrorKind::Server | ErrorKind::Throttled => silent,
                _ => return Err(error),
            };
            if start.elapsed() + Duration::from_secs(1) >= waits {
                return Err(error);
            }
            last = error;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    fn account_place(&self) -> Place {
        Place::new(None, self.core.region.clone())
    }
}

#[async_trait]
impl Account for Client {
    async fn buckets(&self) -> Result<Vec<BucketEntry>> {
        let place = self.account_place();
        let mut found = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let mut call = Call::new(&self.core, Operation::ListBuckets, Method::GET);
            // Without max-buckets AWS answers one page of all; with it, it pages (and admits accounts of over 10,000 buckets).
            if self.core.endpoint.is_aws() {
                call = call.query("max-buckets", "1000");
            }
            if let Some(token) = next.take() {
                call = call.query("continuation-token", token);
            }
            let answer = self.core.xml(&place, &call, "ListAllMyBucketsResult").await?;
            for bucket in answer.body.child("Buckets").into_iter().flat_map(|list| list.all("Bucket")) {
                if let Some(name) = bucket.text_of("Name") {
                    found.push(BucketEntry { name: name.to_owned(), created: bucket.text_of("CreationDate").and_then(response::iso_date) });
                }
            }
            next = answer.body.text_of("ContinuationToken").map(str::to_owned);
            if next.is_none() {
                return Ok(found);
            }
        }
    }

    async fn bucket(&self, name: &str) -> Result<Arc<dyn Store>> {
        if let Some(known) = self.buckets.lock().get(name).cloned()
            && known.is_located()
        {
            return Ok(known);
        }
        let store = self.store(name)?;
        match store.locate().await {
            Ok(()) => Ok(store),
            Err(error) => {
                self.buckets.lock().remove(name);
                Err(error)
            }
        }
    }

    async fn create_bucket(&self, name: &str) -> Result<()> {
        let parsed = BucketName::parse(name)
            .map_err(|message| S3Error::local(ErrorKind::InvalidRequest, "CreateBucket", format!("s3://{name}"), message))?;
        let place = Place::new(Some(parsed), self.core.region.clone());
        let mut call = Call::new(&self.core, Operation::CreateBucket, Method::PUT);
        // us-east-1 is named by saying nothing; other stores may refuse a constraint that they do not know.
        if self.core.endpoint.is_aws() && self.core.region != "us-east-1" {
            let body = format!(
                "<CreateBucketConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><LocationConstraint>{}</LocationConstraint></CreateBucketConfiguration>",
                xml::escape(&self.core.region)
            );
            call = call.payload(Payload::Bytes(Bytes::from(body)));
        }
        self.core.whole(&place, &call).await?;
        Ok(())
    }

    async fn delete_bucket(&self, name: &str) -> Result<()> {
        let store = self.store(name)?;
        let call = Call::new(&self.core, Operation::DeleteBucket, Method::DELETE);
        self.core.whole(&store.place, &call).await?;
        self.buckets.lock().remove(name);
        Ok(())
    }
}
