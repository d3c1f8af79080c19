//! Time-limited links to objects, and the id by which an access log tells them apart.

use crate::s3::client::{Client, ClientConfig};
use crate::s3::{Account, Result, Store};

/// The query parameter that carries a link's id. S3 takes no notice of parameters in `x-…` and logs them (S3 User Guide, "Custom
/// access log information"). Signature Version 4 signs it with the rest; version 2 signs no such parameter, so that there anybody
/// can change it.
pub const PARAMETER: &str = "x-packmule-link";

/// Letters of an id: 60 bits, so that no two links of a log share one.
const LETTERS: usize = 12;

/// RFC 4648, base32, in small letters.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// A GET link that works for so many seconds (with SigV4 at most seven days). The bucket's region is found first.
///
/// # Errors
/// What the client says of its configuration, the bucket or the signature.
pub async fn presign(config: ClientConfig, bucket: &str, key: &str, expires_seconds: u64) -> Result<String> {
    let store = Client::new(config)?.bucket(bucket).await?;
    presign_in(store.as_ref(), key, expires_seconds).await
}

/// The same in a bucket that is at hand.
///
/// # Errors
/// What the store says of the signature.
pub async fn presign_in(store: &dyn Store, key: &str, expires_seconds: u64) -> Result<String> {
    store.presign_get(key, expires_seconds, &[(PARAMETER.to_owned(), new_id())]).await
}

fn new_id() -> String {
    let random: u64 = rand::random();
    (0..LETTERS).map(|place| char::from(ALPHABET[(random >> (5 * place)) as usize % ALPHABET.len()])).collect()
}

/// True for what [`presign`] makes: anybody can ask for a public object with a parameter of his own.
pub fn is_id(text: &str) -> bool {
    text.len() == LETTERS && text.bytes().all(|byte| ALPHABET.contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_link_has_an_id_of_its_own() {
        let ids: std::collections::HashSet<String> = (0..1000).map(|_| new_id()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| is_id(id)));
        for other in ["", "abc", "abcdefghijk1", "ABCDEFGHIJKL", "abcdefghijklm", "abcdefghij k"] {
            assert!(!is_id(other), "{other}");
        }
    }
}
