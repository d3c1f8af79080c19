//! Time-limited links to objects.

use crate::s3::client::{Client, ClientConfig};
use crate::s3::{Account, Result};

/// A GET link that works for so many seconds (with SigV4 at most seven days). The bucket's region is found first.
///
/// # Errors
/// What the client says of its configuration, the bucket or the signature.
pub async fn presign(config: ClientConfig, bucket: &str, key: &str, expires_seconds: u64) -> Result<String> {
    Client::new(config)?.bucket(bucket).await?.presign_get(key, expires_seconds, &[]).await
}
