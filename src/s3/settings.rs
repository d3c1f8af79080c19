//! What a bucket is set to, as far as whoever asks may know it: for who explains why something does not work.

use std::time::SystemTime;

use http::{HeaderMap, Method, StatusCode};
use url::Url;

use super::bucket::Bucket;
use super::client::Client;
use super::operation::Operation;
use super::request::{Call, failed};
use super::xml::Element;
use super::{ErrorKind, Result, S3Error, response};
use crate::aws::http::{self as transport, Body, Outgoing};
use crate::aws::sigv4;

/// SHA-256 of no bytes.
const NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// What a bucket is set to. Each may be refused by itself.
#[derive(Debug)]
pub struct Settings {
    /// Where it is.
    pub region: String,
    /// `ObjectOwnership`; `None`: never set.
    pub ownership: Result<Option<String>>,
    /// Block Public Access of the bucket; `None`: never set. The account's own is not in it.
    pub public_access: Result<Option<PublicAccessBlock>>,
    /// Whether overwritten and deleted objects are kept.
    pub versioning: Result<Versioning>,
    /// Rules that end unfinished uploads: keys' prefix, and days after CreateMultipartUpload.
    pub abandoned_uploads: Result<Vec<(String, u32)>>,
}

/// Block Public Access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublicAccessBlock {
    /// Public ACLs do nothing (`IgnorePublicAcls`).
    pub ignores_acls: bool,
    /// A public policy opens nothing to the public (`RestrictPublicBuckets`).
    pub restricts_policies: bool,
    /// New public ACLs and policies are refused; those that are there stay in force.
    pub refuses_new: bool,
}

/// A bucket's versioning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Versioning {
    /// Never switched on.
    Off,
    /// Every overwritten and deleted object stays as a version.
    Enabled,
    /// What was kept is kept, nothing more.
    Suspended,
}

impl Settings {
    /// Days after which S3 itself ends an unfinished upload of a key with this prefix.
    pub fn ends_uploads_after(&self, prefix: &str) -> Option<u32> {
        let rules = self.abandoned_uploads.as_ref().ok()?;
        rules.iter().filter(|(of, _)| prefix.starts_with(of.as_str())).map(|(_, days)| *days).min()
    }
}

impl Bucket {
    /// A configuration of the bucket's; `None` where the answer's code is `unset`.
    pub(super) async fn setting(&self, operation: Operation, word: &str, root: &str, unset: &str) -> Result<Option<Element>> {
        let call = Call::new(&self.core, operation, Method::GET).query(word, "");
        match self.core.xml(&self.place, &call, root).await {
            Ok(answer) => Ok(Some(answer.body)),
            Err(refusal) if refusal.error.code.as_deref() == Some(unset) => Ok(None),
            Err(refusal) => Err(refusal.error),
        }
    }

    /// GetBucketOwnershipControls.
    pub(super) async fn ownership(&self) -> Result<Option<String>> {
        let unset = "OwnershipControlsNotFoundError";
        let found = self.setting(Operation::GetBucketOwnershipControls, "ownershipControls", "OwnershipControls", unset).await?;
        let rule = |element: Element| element.child("Rule").and_then(|rule| rule.text_of("ObjectOwnership")).unwrap_or_default().to_owned();
        Ok(found.map(rule))
    }

    async fn public_access(&self) -> Result<Option<PublicAccessBlock>> {
        let (root, unset) = ("PublicAccessBlockConfiguration", "NoSuchPublicAccessBlockConfiguration");
        let found = self.setting(Operation::GetPublicAccessBlock, "publicAccessBlock", root, unset).await?;
        Ok(found.map(|block| PublicAccessBlock {
            ignores_acls: block.is_true("IgnorePublicAcls"),
            restricts_policies: block.is_true("RestrictPublicBuckets"),
            refuses_new: block.is_true("BlockPublicAcls") && block.is_true("BlockPublicPolicy"),
        }))
    }

    async fn versioning(&self) -> Result<Versioning> {
        let found = self.setting(Operation::GetBucketVersioning, "versioning", "VersioningConfiguration", "").await?;
        Ok(match found.as_ref().and_then(|found| found.text_of("Status")) {
            Some("Enabled") => Versioning::Enabled,
            Some(_) => Versioning::Suspended,
            None => Versioning::Off,
        })
    }

    async fn abandoned_uploads(&self) -> Result<Vec<(String, u32)>> {
        let (root, unset) = ("LifecycleConfiguration", "NoSuchLifecycleConfiguration");
        let found = self.setting(Operation::GetBucketLifecycleConfiguration, "lifecycle", root, unset).await?;
        Ok(found.iter().flat_map(|rules| rules.all("Rule")).filter_map(ends_uploads).collect())
    }
}

/// A rule that ends unfinished uploads. AWS takes such a rule for prefixes alone, not for tags or sizes.
fn ends_uploads(rule: &Element) -> Option<(String, u32)> {
    let days = rule.child("AbortIncompleteMultipartUpload")?.text_of("DaysAfterInitiation")?.parse().ok()?;
    let filter = rule.child("Filter");
    let and = filter.and_then(|filter| filter.child("And"));
    let prefix = [Some(rule), filter, and].into_iter().flatten().find_map(|element| element.text_of("Prefix"));
    (rule.text_of("Status") == Some("Enabled")).then(|| (prefix.unwrap_or_default().to_owned(), days))
}

impl Client {
    /// All that a bucket is set to. Its region is right once an answer of it has come.
    ///
    /// # Errors
    /// A name that is none.
    pub async fn settings(&self, bucket: &str) -> Result<Settings> {
        let bucket = self.store(bucket)?;
        let (ownership, public_access, versioning, abandoned_uploads) =
            tokio::join!(bucket.ownership(), bucket.public_access(), bucket.versioning(), bucket.abandoned_uploads());
        Ok(Settings { region: bucket.place.region(), ownership, public_access, versioning, abandoned_uploads })
    }

    /// Removes every version of a key, and its delete markers. Gives how many there were.
    ///
    /// # Errors
    /// As of ListObjectVersions and of DeleteObject with a version, which needs a right of its own (`s3:DeleteObjectVersion`).
    pub async fn erase(&self, bucket: &str, key: &str) -> Result<usize> {
        let bucket = self.store(bucket)?;
        let list = Call::new(&bucket.core, Operation::ListObjectVersions, Method::GET).query("prefix", key).query("versions", "");
        let answer = bucket.core.xml(&bucket.place, &list, "ListVersionsResult").await?;
        let found = answer.body.all("Version").chain(answer.body.all("DeleteMarker"));
        let versions: Vec<&str> =
            found.filter(|version| version.text_of("Key") == Some(key)).filter_map(|version| version.text_of("VersionId")).collect();
        for version in &versions {
            let delete = Call::new(&bucket.core, Operation::DeleteObject, Method::DELETE).key(key).query("versionId", *version);
            bucket.core.whole(&bucket.place, &delete).await?;
        }
        Ok(versions.len())
    }

    /// Where requests for a bucket go, before the key.
    ///
    /// # Errors
    /// A name that is none.
    pub fn url_of(&self, bucket: Option<&str>) -> Result<Url> {
        let (name, region) = match bucket {
            Some(bucket) => {
                let bucket = self.store(bucket)?;
                (bucket.place.bucket.clone(), bucket.place.region())
            }
            None => (None, self.core.region.clone()),
        };
        let location = self.core.endpoint.locate(name.as_ref(), &region, name.is_some());
        let text = format!("{}{}", location.origin, location.prefix);
        Url::parse(&text).map_err(|error| S3Error::local(ErrorKind::InvalidRequest, "Configuration", text, error.to_string()))
    }

    /// The store's clock (`Date`, to the second), by an unsigned question that any answer answers; `None` where it has none.
    ///
    /// # Errors
    /// [`ErrorKind::Network`] or [`ErrorKind::TimedOut`] where nothing answers.
    pub async fn clock(&self, bucket: Option<&str>) -> Result<Option<SystemTime>> {
        let url = self.url_of(bucket)?;
        let mut answer = self.send(Method::HEAD, url.clone(), HeaderMap::new()).await;
        if matches!(answer, Err(transport::Failure::Broken(_))) {
            answer = self.send(Method::HEAD, url, HeaderMap::new()).await;
        }
        let answer = answer.map_err(|failure| S3Error::local(failed(&failure).0, "HeadBucket", self.endpoint(), failure.to_string()))?;
        Ok(response::http_date(&answer.headers, "date"))
    }

    /// GET of another AWS service than S3, with the credentials of this client. Not sent again when it fails.
    ///
    /// # Errors
    /// As of S3's; `operation` names the call in them.
    pub async fn ask_service(&self, scope: sigv4::Scope<'_>, operation: &'static str, url: &Url) -> Result<Element> {
        let refused = |kind, message: String| S3Error::local(kind, operation, scope.service, message);
        let credential = self.core.credentials.get(None).await.map_err(|message| refused(ErrorKind::Credentials, message))?;
        let credential = credential.ok_or_else(|| refused(ErrorKind::Credentials, "requests go unsigned (no_sign_request)".to_owned()))?;
        let mut headers = HeaderMap::new();
        // Only S3 takes an unsigned payload: this is the sum of none.
        headers.insert("x-amz-content-sha256", http::HeaderValue::from_static(NOTHING));
        let headers = sigv4::headers(scope, &Method::GET, url.as_str(), headers, &credential)
            .await
            .map_err(|message| refused(ErrorKind::Credentials, message))?;
        let answer = self.send(Method::GET, url.clone(), headers).await;
        let answer = answer.map_err(|failure| refused(failed(&failure).0, failure.to_string()))?;
        let (status, headers) = (answer.status, answer.headers.clone());
        let body = answer.collect(1 << 24).await.map_err(|failure| refused(ErrorKind::Network, failure.to_string()))?;
        if status != StatusCode::OK {
            return Err(response::error(operation, scope.service, status, &headers, &response::error_body(&headers, &body)));
        }
        Element::parse(&body).map_err(|reason| refused(ErrorKind::Protocol, reason))
    }

    async fn send(&self, method: Method, url: Url, headers: HeaderMap) -> std::result::Result<transport::Incoming, transport::Failure> {
        let (stall, traffic) = (self.core.config.request_timeout, self.core.traffic.clone());
        transport::send(
            &self.core.http,
            Outgoing { method, url, headers, body: Body::Empty, stall, bandwidth: None, bandwidth_in: None, traffic },
        )
        .await
    }

    /// In words, where the credentials for a bucket come from.
    ///
    /// # Errors
    /// One line: none found, or the file or service that failed.
    pub async fn credentials_source(&self, bucket: Option<&str>) -> Result<String> {
        let found = self.core.credentials.get(bucket).await;
        found.map_err(|message| S3Error::local(ErrorKind::Credentials, "Configuration", "s3://", message))?;
        Ok(self.core.credentials.source())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn rules_that_end_uploads() {
        let rules = "<LifecycleConfiguration><Rule><ID>1</ID><Filter><Prefix>tmp/</Prefix></Filter><Status>Enabled</Status>\
                     <AbortIncompleteMultipartUpload><DaysAfterInitiation>2</DaysAfterInitiation></AbortIncompleteMultipartUpload></Rule>\
                     <Rule><Filter/><Status>Disabled</Status><AbortIncompleteMultipartUpload><DaysAfterInitiation>1</DaysAfterInitiation>\
                     </AbortIncompleteMultipartUpload></Rule><Rule><Prefix></Prefix><Status>Enabled</Status>\
                     <AbortIncompleteMultipartUpload><DaysAfterInitiation>7</DaysAfterInitiation></AbortIncompleteMultipartUpload></Rule>\
                     <Rule><Prefix/><Status>Enabled</Status><Expiration><Days>1</Days></Expiration></Rule></LifecycleConfiguration>";
        let rules = Element::parse(rules.as_bytes()).unwrap();
        let found: Vec<(String, u32)> = rules.all("Rule").filter_map(ends_uploads).collect();
        assert_eq!(found, [("tmp/".to_owned(), 2), (String::new(), 7)]);
        let settings = Settings {
            region: String::new(),
            ownership: Ok(None),
            public_access: Ok(None),
            versioning: Ok(Versioning::Off),
            abandoned_uploads: Ok(found),
        };
        assert_eq!((settings.ends_uploads_after("tmp/x/"), settings.ends_uploads_after("")), (Some(2), Some(7)));
    }
}
