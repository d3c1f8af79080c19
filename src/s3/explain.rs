//! One line for the user: what failed and what helps.

use super::{ErrorKind, S3Error};

/// Names the thing and the remedy, in one line, without the S3 jargon that the log has.
pub fn explain(error: &S3Error) -> String {
    let resource = &error.resource;
    let code = error.code.as_deref().unwrap_or("");
    let detail = if error.message.is_empty() { code.to_owned() } else { error.message.clone() };
    let told = if detail.is_empty() { String::new() } else { format!(" ({detail})") };
    let line = match error.kind {
        _ if error.operation == "Configuration" => detail,
        ErrorKind::NoSuchBucket => {
            let bucket = resource.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
            format!("no such bucket: {bucket}; check its name and endpoint_url, or list yours with s3:// as the source")
        }
        ErrorKind::NoSuchKey => format!("no such object: {resource}"),
        ErrorKind::NoSuchUpload => format!("{resource}: the unfinished upload is gone; the file is sent again from its beginning"),
        ErrorKind::AccessDenied => format!(
            "access to {resource} is denied: the credentials lack the right for {} (s3:ListBucket, s3:GetObject, s3:PutObject … in their policy)",
            error.operation
        ),
        ErrorKind::Credentials => match code {
            "InvalidAccessKeyId" | "InvalidClientTokenId" => format!(
                "the store does not know this access key (for {resource}); check AWS_ACCESS_KEY_ID, the profile or passwd_file, and endpoint_url"
            ),
            "SignatureDoesNotMatch" => format!(
                "the secret key is wrong for this access key (for {resource}); check AWS_SECRET_ACCESS_KEY, the profile or passwd_file"
            ),
            "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" => {
                format!("the credentials for {resource} have expired; sign in again (aws sso login) or renew the session token")
            }
            _ => detail,
        },
        ErrorKind::PreconditionFailed | ErrorKind::Conflict => format!("{resource} was changed by somebody else at the same time"),
        ErrorKind::NotEmpty => format!("{resource} still holds objects (or versions of them); remove them first"),
        ErrorKind::BucketExists => format!("the bucket name of {resource} is taken; choose another"),
        ErrorKind::InvalidRange => format!("{resource} is shorter than was asked for"),
        ErrorKind::Archived => format!("{resource} is archived; restore it first (aws s3api restore-object)"),
        ErrorKind::Throttled => format!("the store asks to slow down ({resource}); fewer max_connections help"),
        ErrorKind::Server => format!("the store failed on {resource}{told}; try again later"),
        ErrorKind::TimedOut => format!("no answer for {resource}{told}; check the network, proxy and endpoint_url"),
        ErrorKind::Network if detail.contains("certificate") => format!(
            "{resource} cannot be reached: the certificate is not trusted{told}; name its CA with ca_bundle=, or use no_check_certificate"
        ),
        ErrorKind::Network if detail.contains("InvalidContentType") => {
            format!("{resource} cannot be reached: what listens there does not speak TLS; write http:// in endpoint_url")
        }
        ErrorKind::Network => format!("{resource} cannot be reached{told}; check endpoint_url, the network and proxy"),
        ErrorKind::Quota => format!("the store has no room for {resource} (quota); free some or raise it"),
        ErrorKind::TooLarge => format!("{resource} is larger than the store takes"),
        ErrorKind::KeyTooLong => format!("the name of {resource} is longer than the store takes (1024 bytes)"),
        ErrorKind::BadDigest => format!("{resource} was damaged on its way{told}; it is sent or read again"),
        ErrorKind::NotImplemented => format!("the store lacks {}{told}", error.operation),
        ErrorKind::AclNotSupported => format!("{resource}: the bucket has ACLs off; leave out default_acl"),
        ErrorKind::WrongRegion => format!("{resource} is in another region{told}; name it with region="),
        ErrorKind::ClockSkew => format!("this machine's clock is wrong{told}; set it, e.g. with: timedatectl set-ntp true"),
        ErrorKind::Protocol => format!("{resource}: {detail}; check endpoint_url, and that no login page or proxy answers instead"),
        ErrorKind::InvalidRequest => format!(
            "the store refuses {} of {resource} ({code}{}{detail})",
            error.operation,
            if code.is_empty() || detail.is_empty() { "" } else { ": " }
        ),
        ErrorKind::LocalIo => format!("a local file could not be read while {resource} was sent{told}"),
    };
    line.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(kind: ErrorKind, code: Option<&str>) -> String {
        let mut error = S3Error::local(kind, "ListObjectsV2", "s3://b", "two\nlines");
        error.code = code.map(str::to_owned);
        explain(&error)
    }

    #[test]
    fn one_line_that_names_the_thing() {
        assert!(told(ErrorKind::NoSuchBucket, Some("NoSuchBucket")).contains("s3://b;"));
        let of_key = S3Error::local(ErrorKind::NoSuchBucket, "PutObject", "s3://b/d/f", "");
        assert!(explain(&of_key).starts_with("no such bucket: s3://b;"));
        assert!(told(ErrorKind::Credentials, Some("SignatureDoesNotMatch")).contains("secret key"));
        assert!(told(ErrorKind::Credentials, Some("InvalidAccessKeyId")).contains("access key"));
        assert!(!told(ErrorKind::Network, None).contains('\n'));
        let silent = explain(&S3Error::local(ErrorKind::WrongRegion, "HeadBucket", "s3://b", ""));
        assert_eq!(silent, "s3://b is in another region; name it with region=");
    }
}
