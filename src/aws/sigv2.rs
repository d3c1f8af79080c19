//! Signature Version 2 (2006–2020), for old stores and old links. AWS refuses it for buckets made after 24 Jun 2020.
//!
//! `VERB\nContent-MD5\nContent-Type\nDate\nCanonicalizedAmzHeaders CanonicalizedResource`, HMAC-SHA1, base64
//! (AWS, "Signing and authenticating REST requests").

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use http::HeaderMap;
use reqsign_aws_v4::Credential;
use sha1::Sha1;

use super::encode;

/// Query parameters that belong to the resource and are signed; all others are not.
const SUBRESOURCES: [&str; 30] = [
    "accelerate",
    "acl",
    "cors",
    "defaultObjectAcl",
    "delete",
    "inventory",
    "lifecycle",
    "location",
    "logging",
    "notification",
    "ownershipControls",
    "partNumber",
    "policy",
    "publicAccessBlock",
    "replication",
    "requestPayment",
    "response-cache-control",
    "response-content-disposition",
    "response-content-encoding",
    "response-content-language",
    "response-content-type",
    "response-expires",
    "restore",
    "tagging",
    "torrent",
    "uploadId",
    "uploads",
    "versionId",
    "versioning",
    "website",
];

/// What is signed of a request.
#[derive(Debug)]
pub struct Subject<'a> {
    /// `GET`.
    pub method: &'a str,
    /// `/bucket/encoded/key`, whatever the addressing style.
    pub resource: &'a str,
    /// Query parameters, decoded.
    pub query: &'a [(String, String)],
    /// Headers that travel.
    pub headers: &'a HeaderMap,
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
}

/// The string to sign; `date` is the Date header's value, the expiry of a link, or empty where `x-amz-date` is sent.
fn string_to_sign(subject: &Subject<'_>, date: &str) -> String {
    let mut amz: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, value) in subject.headers {
        if name.as_str().starts_with("x-amz-") {
            amz.entry(name.as_str()).or_default().push(value.to_str().unwrap_or("").trim());
        }
    }
    let amz: String = amz.into_iter().map(|(name, values)| format!("{name}:{}\n", values.join(","))).collect();
    let mut signed: Vec<String> = subject
        .query
        .iter()
        .filter(|(name, _)| SUBRESOURCES.contains(&name.as_str()))
        .map(|(name, value)| if value.is_empty() { name.clone() } else { format!("{name}={value}") })
        .collect();
    signed.sort();
    let query = if signed.is_empty() { String::new() } else { format!("?{}", signed.join("&")) };
    format!(
        "{}\n{}\n{}\n{date}\n{amz}{}{query}",
        subject.method,
        header(subject.headers, "content-md5"),
        header(subject.headers, "content-type"),
        subject.resource
    )
}

fn hmac_sha1(secret: &str, text: &str) -> Option<String> {
    let mut mac = Hmac::<Sha1>::new_from_slice(secret.as_bytes()).ok()?;
    mac.update(text.as_bytes());
    Some(STANDARD.encode(mac.finalize().into_bytes()))
}

/// The value of `Authorization`. The caller has set `x-amz-date` (and `x-amz-security-token` for temporary credentials).
pub fn authorization(subject: &Subject<'_>, credential: &Credential) -> Option<String> {
    let date = if subject.headers.contains_key("x-amz-date") { "" } else { header(subject.headers, "date") };
    let signature = hmac_sha1(&credential.secret_access_key, &string_to_sign(subject, date))?;
    Some(format!("AWS {}:{signature}", credential.access_key_id))
}

/// The query parameters that turn a GET into a link valid until `expires` (seconds since the epoch).
pub fn presigned_query(subject: &Subject<'_>, credential: &Credential, expires: u64) -> Option<String> {
    let mut headers = subject.headers.clone();
    let mut token = String::new();
    if let Some(session) = &credential.session_token {
        // The token is signed as the header that it stands for.
        headers.insert("x-amz-security-token", http::HeaderValue::from_str(session).ok()?);
        token = format!("x-amz-security-token={}&", encode::component(session));
    }
    let subject = Subject { headers: &headers, ..*subject };
    let signature = hmac_sha1(&credential.secret_access_key, &string_to_sign(&subject, &expires.to_string()))?;
    let (id, signature) = (encode::component(&credential.access_key_id), encode::component(&signature));
    Some(format!("AWSAccessKeyId={id}&Signature={signature}&{token}Expires={expires}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};

    // The examples of AWS, "Signing and authenticating REST requests"; its editions name the bucket johnsmith or awsexamplebucket1.
    fn credential() -> Credential {
        Credential {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_access_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            session_token: None,
            expires_in: None,
        }
    }

    fn sign(method: &str, resource: &str, query: &[(&str, &str)], headers: &[(&str, &str)]) -> String {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        let query: Vec<_> = query.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let subject = Subject { method, resource, query: &query, headers: &map };
        authorization(&subject, &credential()).unwrap().rsplit_once(':').unwrap().1.to_owned()
    }

    #[test]
    fn published_vectors() {
        assert_eq!(
            sign("GET", "/awsexamplebucket1/photos/puppy.jpg", &[], &[("date", "Tue, 27 Mar 2007 19:36:42 +0000")]),
            "qgk2+6Sv9/oM7G3qLEjTH1a1l1g="
        );
        assert_eq!(
            sign(
                "PUT",
                "/awsexamplebucket1/photos/puppy.jpg",
                &[],
                &[("date", "Tue, 27 Mar 2007 21:15:45 +0000"), ("content-type", "image/jpeg")]
            ),
            "iqRzw+ileNPu1fhspnRs8nOjjIA="
        );
        assert_eq!(
            sign("GET", "/awsexamplebucket1/", &[("prefix", "photos"), ("max-keys", "50")], &[("date", "Tue, 27 Mar 2007 19:42:41 +0000")]),
            "m0WP8eCtspQl5Ahe6L1SozdX9YA="
        );
        assert_eq!(
            sign("GET", "/awsexamplebucket1/", &[("acl", "")], &[("date", "Tue, 27 Mar 2007 19:44:46 +0000")]),
            "82ZHiFIjc+WbcwFKGUVEQspPn+0="
        );
        assert_eq!(
            sign(
                "DELETE",
                "/johnsmith/photos/puppy.jpg",
                &[],
                &[("date", "Tue, 27 Mar 2007 21:20:27 +0000"), ("x-amz-date", "Tue, 27 Mar 2007 21:20:26 +0000")]
            ),
            "R4dJ53KECjStyBO5iTBJZ4XVOaI="
        );
    }

    #[test]
    fn published_link() {
        let headers = HeaderMap::new();
        let subject = Subject { method: "GET", resource: "/johnsmith/photos/puppy.jpg", query: &[], headers: &headers };
        let query = presigned_query(&subject, &credential(), 1_175_139_620).unwrap();
        assert_eq!(query, "AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE&Signature=NpgCjnDzrM%2BWFzoENXmpNDUsSn8%3D&Expires=1175139620");
    }
}
