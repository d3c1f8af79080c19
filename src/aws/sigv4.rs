//! Signature Version 4, by reqsign. The path that is signed is given apart from the path that travels (see [`super::encode`]).

use std::time::Duration;

use http::{HeaderMap, Method, Uri, request::Parts};
use reqsign_aws_v4::{Credential, RequestSigner};
use reqsign_core::{Context, SignRequest as _};

/// Whom the signature is for.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// `s3`, `cloudfront`.
    pub service: &'a str,
    /// `eu-central-1`.
    pub region: &'a str,
}

fn parts(method: &Method, uri: Uri, headers: HeaderMap) -> Parts {
    let mut parts = http::Request::new(()).into_parts().0;
    parts.method = method.clone();
    parts.uri = uri;
    parts.headers = headers;
    parts
}

/// The headers with `Authorization`, `x-amz-date` and the session token added. `url` has the path to sign
/// (`http::Uri` keeps it as it is); `headers` holds `x-amz-content-sha256` unless the payload is unsigned.
///
/// # Errors
/// A header that is no ASCII text, or credentials that expire now.
pub async fn headers(
    scope: Scope<'_>,
    method: &Method,
    url: &str,
    headers: HeaderMap,
    credential: &Credential,
) -> Result<HeaderMap, String> {
    let uri = url.parse::<Uri>().map_err(|error| error.to_string())?;
    let mut parts = parts(method, uri, headers);
    RequestSigner::new(scope.service, scope.region)
        .sign_request(&Context::new(), &mut parts, Some(credential), None)
        .await
        .map_err(|error| error.to_string())?;
    // The client sets Host from the URL it sends to, which is the one that was signed.
    parts.headers.remove(http::header::HOST);
    Ok(parts.headers)
}

/// The query of a link: `url`'s own parameters, then the signature's, `X-Amz-Signature` last.
///
/// # Errors
/// Credentials that end before the link would.
pub async fn presigned_query(
    scope: Scope<'_>,
    method: &Method,
    url: &str,
    expires: Duration,
    credential: &Credential,
) -> Result<String, String> {
    let uri = url.parse::<Uri>().map_err(|error| error.to_string())?;
    let mut parts = parts(method, uri, HeaderMap::new());
    RequestSigner::new(scope.service, scope.region)
        .sign_request(&Context::new(), &mut parts, Some(credential), Some(expires))
        .await
        .map_err(|_| "the credentials end before the link would: ask for a shorter time, or sign with a long-lived key".to_owned())?;
    parts.uri.query().map(as_botocore).ok_or_else(|| "signing gave no query".to_owned())
}

/// The parameters in botocore's order, so that links compare byte for byte: the token follows the signed headers. The signature
/// covers them sorted and does not care.
fn as_botocore(query: &str) -> String {
    let (token, mut others): (Vec<&str>, Vec<&str>) = query.split('&').partition(|pair| pair.starts_with("X-Amz-Security-Token="));
    let end = others.len().saturating_sub(1);
    others.splice(end..end, token);
    others.join("&")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn credential() -> Credential {
        Credential {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_access_key: "secret".into(),
            session_token: Some("token".into()),
            expires_in: None,
        }
    }

    #[tokio::test]
    async fn headers_are_signed_and_secrets_stay() {
        let scope = Scope { service: "s3", region: "eu-west-1" };
        let signed = headers(scope, &Method::GET, "https://h/b/a/../c?list-type=2", HeaderMap::new(), &credential()).await.unwrap();
        let authorization = signed["authorization"].to_str().unwrap();
        assert!(authorization.starts_with("AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/"));
        assert!(
            authorization.contains("/eu-west-1/s3/aws4_request, SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-security-token,")
        );
        assert_eq!(signed["x-amz-content-sha256"], "UNSIGNED-PAYLOAD");
        assert!(!format!("{signed:?}").contains("Signature"));
    }

    #[tokio::test]
    async fn a_link_does_not_outlive_its_key() {
        let scope = Scope { service: "s3", region: "us-east-1" };
        let mut short = credential();
        short.expires_in = Some(reqsign_core::time::Timestamp::now() + Duration::from_secs(600));
        let day = Duration::from_secs(86_400);
        assert!(presigned_query(scope, &Method::GET, "https://h/k", day, &short).await.unwrap_err().contains("shorter"));
        let query = presigned_query(scope, &Method::GET, "https://h/k?x-id=7", day, &credential()).await.unwrap();
        assert!(query.starts_with("x-id=7&X-Amz-Algorithm=") && query.contains("&X-Amz-Signature="));
    }
}
