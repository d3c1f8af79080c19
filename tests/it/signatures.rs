//! Links signed by code that is not ours: botocore makes the same URL, byte for byte.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use crate::support::client::{block_on, connect_with};
use crate::support::files::output;
use crate::support::seaweed::installed;
use crate::support::store::Store;

const KEYS: &[&str] = &["setup.exe", "d/a b+c", "größe/\u{e9}.txt", "a%20b", "q?x=1&y#z", "~tilde_-.(1)!*'"];

/// A Python that has botocore: the one that scripts/setup makes, else the one named here.
pub fn python() -> PathBuf {
    installed("python").unwrap_or_else(|| std::env::var_os("PACKMULE_PYTHON").map_or_else(|| "python3".into(), PathBuf::from))
}

fn parameter(url: &str, name: &str) -> String {
    let url = url::Url::parse(url).unwrap();
    url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned()).unwrap()
}

fn same_as_botocore(sigv2: bool) {
    let store = Store::double();
    let connected = connect_with(&store, |config| config.sigv2 = sigv2);
    for key in KEYS {
        let ours = block_on(connected.bucket.presign_get(key, 3600, &[])).unwrap();
        let (date, version) = if sigv2 {
            let expires: u64 = parameter(&ours, "Expires").parse().unwrap();
            let signed = UNIX_EPOCH + Duration::from_secs(expires - 3600);
            let signed = jiff::Timestamp::try_from(signed).unwrap();
            (signed.strftime("%Y%m%dT%H%M%SZ").to_string(), "s3")
        } else {
            (parameter(&ours, "X-Amz-Date"), "s3v4")
        };
        let mut botocore = Command::new(python());
        botocore
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/presign.py"))
            .args([&store.endpoint(), "us-east-1", store.bucket(), key, "3600"])
            .env("AWS_ACCESS_KEY_ID", store.access_key())
            .env("AWS_SECRET_ACCESS_KEY", store.secret_key())
            .env_remove("AWS_SESSION_TOKEN")
            .env("PRESIGN_DATE", date)
            .env("PRESIGN_VERSION", version);
        let answer = output(&mut botocore);
        assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
        assert_eq!(ours, String::from_utf8_lossy(&answer.stdout).trim(), "{key}");
    }
}

#[test]
fn botocore_presigns_the_same_url() {
    same_as_botocore(false);
}

#[test]
fn botocore_presigns_the_same_url_of_version_2() {
    same_as_botocore(true);
}
