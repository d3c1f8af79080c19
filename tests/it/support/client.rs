//! The project's own client, pointed at a test's store.

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use packmule::s3::client::{Client, ClientConfig};
use packmule::s3::{GetRequest, Result, Source};

use super::double::{self, Double};
use super::store::Store;

/// A client, and its bucket; the password file lives as long as the store.
pub struct Connected {
    pub client: Arc<Client>,
    pub bucket: Arc<dyn packmule::s3::Store>,
}

/// With these keys.
pub fn connect_as(store: &Store, access_key: &str, secret_key: &str, change: impl FnOnce(&mut ClientConfig)) -> Connected {
    let changed = |config: &mut ClientConfig| {
        config.region = Some(store.region().to_owned());
        change(config);
    };
    connected(&store.endpoint(), store.bucket(), store.home(), access_key, secret_key, changed)
}

/// Keys go by a password file: the environment of a test process is everybody's.
fn connected(
    endpoint: &str,
    bucket: &str,
    home: &Path,
    access_key: &str,
    secret_key: &str,
    change: impl FnOnce(&mut ClientConfig),
) -> Connected {
    let passwd = home.join(format!("passwd-{access_key}-{}", secret_key.len()));
    let mut file = std::fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&passwd).unwrap();
    std::io::Write::write_all(&mut file, format!("{access_key}:{secret_key}\n").as_bytes()).unwrap();
    let mut config = ClientConfig {
        endpoint_url: Some(endpoint.parse().unwrap()),
        region: Some("us-east-1".to_owned()),
        passwd_file: Some(passwd),
        ..ClientConfig::default()
    };
    change(&mut config);
    let client = Client::new(config).unwrap();
    let bucket = client.open(bucket).unwrap();
    Connected { client, bucket }
}

/// With the store's own keys.
pub fn connect_with(store: &Store, change: impl FnOnce(&mut ClientConfig)) -> Connected {
    connect_as(store, store.access_key(), store.secret_key(), change)
}

/// With the defaults.
pub fn connect(store: &Store) -> Connected {
    connect_with(store, |_| ())
}

/// Runs a future of a test that is none.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(future)
}

/// Bytes to upload.
pub fn source(bytes: impl Into<Bytes>) -> Arc<dyn Source> {
    Arc::new(bytes.into())
}

/// A whole object.
pub async fn get(bucket: &Arc<dyn packmule::s3::Store>, key: &str) -> Result<Bytes> {
    get_with(bucket, key, GetRequest::default()).await
}

/// What a GET brings, all of it.
pub async fn get_with(bucket: &Arc<dyn packmule::s3::Store>, key: &str, request: GetRequest) -> Result<Bytes> {
    let mut answer = bucket.get(key, request).await?;
    let mut bytes = BytesMut::new();
    while let Some(chunk) = answer.body.next().await {
        bytes.extend_from_slice(&chunk?);
    }
    assert_eq!(bytes.len() as u64, answer.range.end - answer.range.start, "the body ended well and short");
    Ok(bytes.freeze())
}

/// Another double's first bucket, by a password file in `home`.
pub fn connect_to(double: &Double, home: &Path) -> Connected {
    let endpoint = double.endpoint();
    let bucket = double.buckets().remove(0);
    connected(&endpoint, &bucket, home, double::ACCESS_KEY, double::SECRET_KEY, |_| ())
}
