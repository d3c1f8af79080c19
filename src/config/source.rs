//! The first argument of a mount: `s3://bucket/prefix/`, `bucket`, `bucket:/prefix`, an access point's ARN, or `s3://`
//! for every bucket of the account.

use super::{ConfigError, Source};

impl Source {
    /// Parses a source as typed on the command line or as an fstab's first field.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let bad = |why: &str| ConfigError::new(format!("{text}: {why}"));
        let (bucket, prefix) = match text.split_at_checked(5) {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("s3://") => {
                if rest.is_empty() || rest == "/" {
                    return Ok(Self::AllBuckets);
                }
                split_bucket(rest)
            }
            _ if text.contains("://") => {
                return Err(bad("is not an S3 source; write s3://BUCKET/PREFIX/, and the server's address as endpoint_url="));
            }
            _ if text.starts_with("arn:") => split_bucket(text),
            _ => match text.split_once(':') {
                None => (text, ""),
                Some((bucket, prefix)) => (
                    bucket,
                    prefix.strip_prefix('/').ok_or_else(|| bad("a prefix begins with /; write BUCKET:/PREFIX or s3://BUCKET/PREFIX/"))?,
                ),
            },
        };
        check_bucket(bucket).map_err(|why| bad(&why))?;
        let mut prefix = prefix.to_owned();
        if !prefix.is_empty() && !prefix.ends_with('/') {
            prefix.push('/');
        }
        // One byte is left for the shortest name below it.
        if prefix.len() >= 1024 {
            return Err(bad("the prefix is too long: an S3 key has at most 1024 bytes"));
        }
        Ok(Self::Bucket { bucket: bucket.to_owned(), prefix })
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AllBuckets => f.write_str("s3://"),
            Self::Bucket { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

/// Cuts the bucket off a path. An access point's ARN holds a `/` of its own: `arn:…:accesspoint/NAME/prefix`.
fn split_bucket(path: &str) -> (&str, &str) {
    let from = match path.find(":accesspoint/") {
        Some(at) if path.starts_with("arn:") => at + ":accesspoint/".len(),
        _ => 0,
    };
    match path[from..].find('/') {
        Some(slash) => (&path[..from + slash], &path[from + slash + 1..]),
        None => (path, ""),
    }
}

/// Refuses what can be no bucket, and what needs a signature that we do not make. Names are judged mildly: buckets of
/// us-east-1 made before 2018 and of compatible stores may hold capitals and underscores.
fn check_bucket(bucket: &str) -> Result<(), String> {
    if let Some(arn) = bucket.strip_prefix("arn:") {
        return check_arn(arn);
    }
    let fits = (2..=255).contains(&bucket.len())
        && bucket.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        && bucket.starts_with(|c: char| c.is_ascii_alphanumeric())
        && !bucket.contains("..");
    if !fits {
        return Err(format!("'{bucket}' is no bucket name; write s3://BUCKET/PREFIX/ (lower-case letters, digits, dots and hyphens)"));
    }
    if bucket.ends_with("--x-s3") {
        return Err(
            "directory buckets (S3 Express) need session signatures, which packmule does not make; use a general purpose bucket".into()
        );
    }
    Ok(())
}

fn check_arn(arn: &str) -> Result<(), String> {
    let fields: Vec<&str> = arn.splitn(5, ':').collect();
    let &[partition, service, region, account, resource] = fields.as_slice() else {
        return Err("is no access point ARN; write arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME".into());
    };
    let name = resource.strip_prefix("accesspoint/").or_else(|| resource.strip_prefix("accesspoint:")).unwrap_or_default();
    if service != "s3" {
        return Err(format!("access points of {service} are not supported; use the bucket or an access point of s3"));
    }
    if region.is_empty() || name.ends_with(".mrap") {
        return Err("multi-region access points need SigV4A signatures, which packmule does not make; name the bucket of one region".into());
    }
    if partition.is_empty() || account.is_empty() || name.is_empty() {
        return Err("is no access point ARN; write arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn bucket(text: &str) -> (String, String) {
        match Source::parse(text).unwrap() {
            Source::Bucket { bucket, prefix } => (bucket, prefix),
            Source::AllBuckets => panic!("{text} is all buckets"),
        }
    }

    #[test]
    fn every_spelling() {
        assert_eq!(Source::parse("s3://").unwrap(), Source::AllBuckets);
        for text in ["releases", "s3://releases", "s3://releases/", "S3://releases/", "releases:/"] {
            assert_eq!(bucket(text), ("releases".into(), String::new()), "{text}");
        }
        for text in ["s3://releases/a/b", "s3://releases/a/b/", "releases:/a/b", "releases:/a/b/"] {
            assert_eq!(bucket(text), ("releases".into(), "a/b/".into()), "{text}");
        }
        assert_eq!(bucket("s3://b1//x"), ("b1".into(), "/x/".into()), "a key may begin with a slash");
        let arn = "arn:aws:s3:eu-west-1:123456789012:accesspoint/web";
        assert_eq!(bucket(arn), (arn.into(), String::new()));
        assert_eq!(bucket(&format!("s3://{arn}/docs")), (arn.into(), "docs/".into()));
        assert_eq!(bucket("web-abc123-s3alias").0, "web-abc123-s3alias");
    }

    #[test]
    fn what_cannot_be_mounted_is_said_in_one_line() {
        for (text, part) in [
            ("https://s3.example.org/b", "endpoint_url="),
            ("releases:prefix", "begins with /"),
            ("", "no bucket name"),
            ("a b", "no bucket name"),
            ("/srv/data", "no bucket name"),
            ("fast--use1-az4--x-s3", "directory buckets"),
            ("arn:aws:s3::123456789012:accesspoint/m.mrap", "SigV4A"),
            ("arn:aws:s3-object-lambda:eu-west-1:1:accesspoint/x", "not supported"),
            ("arn:aws:s3:eu-west-1", "no access point"),
        ] {
            let message = Source::parse(text).unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
            assert!(!message.contains('\n'));
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_shown_is_read_back(text in "(s3://|arn:|)[a-z0-9:/.-]{0,40}|.*") {
            if let Ok(source) = Source::parse(&text) {
                prop_assert_eq!(Source::parse(&source.to_string()).unwrap(), source);
            }
        }
    }
}
