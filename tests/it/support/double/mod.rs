//! The S3 double: an S3 in memory, with flat keys as S3 has them, behind s3s (routing, XML and signature checks are
//! not ours), on a loopback port of its own. Tests look into it, edit it as another client would, count what was
//! asked of it and make it fail.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use s3s::auth::{S3Auth, SecretKey, SimpleAuth};
use s3s::host::SingleDomain;
use s3s::service::S3ServiceBuilder;
use s3s::{S3ErrorCode, S3Result};
use tokio::sync::watch;

mod acl;
mod checksum;
mod fault;
mod listing;
mod model;
mod multipart;
mod objects;
mod record;
mod request;
mod s3;
mod server;

pub use acl::{ALL_USERS, OWNER};
pub use checksum::hex_md5 as md5;
pub use fault::{Fault, Turns, When};
pub use model::Object;
pub use record::Requests;

/// The double's only access key.
pub const ACCESS_KEY: &str = "AKIDPACKMULEDOUBLE00";
/// Its secret.
pub const SECRET_KEY: &str = "double/secret+key=for-tests-only/1234567";

/// How the double differs from AWS's defaults.
#[derive(Clone, Debug)]
pub struct Options {
    /// Requests signed for another one are refused, with the right one named.
    pub region: String,
    /// Most keys of a listing's page.
    pub page_size: usize,
    /// Least bytes of a part that is not the last.
    pub min_part_size: usize,
    /// Most bytes that CopyObject takes.
    pub max_single_copy: u64,
    /// ACL headers are taken.
    pub acls: bool,
    /// ETags of parts are no MD5s of their bytes, as with SSE-KMS.
    pub opaque_parts: bool,
    /// DeleteObjects compares the ETags that it is given.
    pub compares_on_delete: bool,
    /// PutObject heeds `If-None-Match` and `If-Match`.
    pub conditional_puts: bool,
    /// An object that is stored without a checksum gets one, and parts of an upload that was begun without may carry one, as on AWS.
    pub sums_unasked: bool,
    /// Virtual-host style under this domain, beside path style.
    pub domain: Option<String>,
    /// A copied range is told the checksum of the whole source, as versitygw does it.
    pub copies_tell_all: bool,
    /// How far its clock is behind ours.
    pub clock_behind: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            region: "us-east-1".to_owned(),
            page_size: 1000,
            min_part_size: 5 << 20,
            max_single_copy: 5 << 30,
            acls: false,
            opaque_parts: false,
            compares_on_delete: true,
            sums_unasked: true,
            conditional_puts: true,
            domain: None,
            copies_tell_all: false,
            clock_behind: Duration::ZERO,
        }
    }
}

/// What the server's thread and the test share.
pub struct Shared {
    options: Arc<Options>,
    faults: Mutex<fault::Faults>,
    requests: Mutex<Requests>,
    /// Requests without an answer yet.
    open: AtomicUsize,
    /// Buckets that are not in the options' region.
    elsewhere: Mutex<BTreeMap<String, String>>,
    down: AtomicBool,
}

/// A running double; it ends with this value.
pub struct Double {
    address: SocketAddr,
    state: Arc<Mutex<model::State>>,
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

/// [`SimpleAuth`] with AWS's code for an access key that it does not know.
struct Auth(SimpleAuth);

#[async_trait::async_trait]
impl S3Auth for Auth {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        self.0.get_secret_key(access_key).await.map_err(|_| s3s::S3Error::new(S3ErrorCode::InvalidAccessKeyId))
    }
}

impl Shared {
    /// Where a bucket is.
    fn region(&self, bucket: &str) -> String {
        self.elsewhere.lock().get(bucket).unwrap_or(&self.options.region).clone()
    }
}

impl Double {
    /// With AWS's defaults and these buckets.
    pub fn start(buckets: &[&str]) -> Self {
        Self::with(Options::default(), buckets)
    }

    /// With other options.
    pub fn with(options: Options, buckets: &[&str]) -> Self {
        let options = Arc::new(options);
        let state = Arc::new(Mutex::new(model::State::default()));
        for bucket in buckets {
            state.lock().buckets.insert((*bucket).to_owned(), model::Bucket::new());
        }
        let mut builder = S3ServiceBuilder::new(s3::Memory { state: Arc::clone(&state), options: Arc::clone(&options) });
        builder.set_auth(Auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY)));
        if let Some(domain) = &options.domain {
            builder.set_host(SingleDomain::new(domain).unwrap());
        }
        let service = builder.build();
        let shared = Arc::new(Shared {
            options,
            faults: Mutex::default(),
            requests: Mutex::default(),
            open: AtomicUsize::new(0),
            elsewhere: Mutex::default(),
            down: AtomicBool::new(false),
        });
        let (stop, stopped) = watch::channel(false);
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("double".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                server::serve(listener, service, theirs, stopped).await;
            });
        });
        Self { address, state, shared, stop, thread: Some(thread.unwrap()) }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn create_bucket(&self, name: &str) {
        self.state.lock().buckets.insert(name.to_owned(), model::Bucket::new());
    }

    /// A bucket in another region than the others.
    pub fn create_bucket_in(&self, region: &str, name: &str) {
        self.shared.elsewhere.lock().insert(name.to_owned(), region.to_owned());
        self.create_bucket(name);
    }

    pub fn buckets(&self) -> Vec<String> {
        self.state.lock().buckets.keys().cloned().collect()
    }

    /// The object as it is now.
    pub fn object(&self, bucket: &str, key: &str) -> Option<Object> {
        self.state.lock().buckets.get(bucket)?.objects.get(key).cloned()
    }

    /// Another client's edit.
    pub fn put_object(&self, bucket: &str, key: &str, mut object: Object) {
        object.checksum.full &= self.shared.options.sums_unasked;
        let mut state = self.state.lock();
        let objects = &mut state.buckets.get_mut(bucket).unwrap_or_else(|| panic!("no bucket {bucket}")).objects;
        objects.insert(key.to_owned(), object);
    }

    /// Another client's deletion.
    pub fn delete_object(&self, bucket: &str, key: &str) {
        if let Some(bucket) = self.state.lock().buckets.get_mut(bucket) {
            bucket.objects.remove(key);
        }
    }

    /// All keys, in order.
    pub fn keys(&self, bucket: &str) -> Vec<String> {
        self.state.lock().buckets.get(bucket).map(|b| b.objects.keys().cloned().collect()).unwrap_or_default()
    }

    /// Key and id of every upload that was begun and neither completed nor aborted.
    pub fn unfinished_uploads(&self, bucket: &str) -> Vec<(String, String)> {
        let state = self.state.lock();
        let Some(bucket) = state.buckets.get(bucket) else { return Vec::new() };
        bucket.uploads.iter().map(|(id, upload)| (upload.key.clone(), id.clone())).collect()
    }

    /// Requests that have no answer yet.
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// What was asked since the start or the last reset.
    pub fn requests(&self) -> Requests {
        self.shared.requests.lock().clone()
    }

    /// Forgets what was asked; answers it.
    pub fn reset_requests(&self) -> Requests {
        std::mem::take(&mut *self.shared.requests.lock())
    }

    /// From now on this goes wrong.
    pub fn fault(&self, when: When, fault: Fault) {
        self.shared.faults.lock().add(when, fault);
    }

    /// Nothing goes wrong any more.
    pub fn clear_faults(&self) {
        self.shared.faults.lock().clear();
    }

    /// While down, connections are reset without an answer.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::SeqCst);
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
