//! What lies around the objects: the bucket's settings, and the distributions in front of it.

use super::{Finding, Tell, Verdict};
use crate::publish::cloudfront;
use crate::s3::client::Client;
use crate::s3::settings::{Settings, Versioning};
use crate::s3::{ErrorKind, S3Error};

/// What may not be known is no fault of the mount's.
fn unknown(check: &'static str, error: &S3Error, right: &str) -> Finding {
    match error.kind {
        ErrorKind::AccessDenied => Finding::aside(check, format!("not known: these credentials may not ask ({right})")),
        // A store that lacks the question answers in many ways.
        kind if kind.passes() || kind == ErrorKind::Credentials => Finding::refused(check, Verdict::Note, error),
        _ => Finding::aside(check, "not known: the store does not say"),
    }
}

/// Region, ACLs, Block Public Access, versions, and what becomes of unfinished uploads.
pub(super) async fn settings(client: &Client, bucket: &str, prefix: &str, tell: &mut Tell<'_>) {
    let settings = match client.settings(bucket).await {
        Ok(settings) => settings,
        Err(error) => return tell(Finding::refused("settings", Verdict::Note, &error)),
    };
    tell(Finding::good("region", settings.region.clone()));
    for finding in [acls(&settings, client.is_aws()), public(&settings), versions(&settings), uploads(&settings, client, bucket, prefix)] {
        tell(finding);
    }
}

fn acls(settings: &Settings, aws: bool) -> Finding {
    match &settings.ownership {
        Ok(Some(ownership)) if ownership == "BucketOwnerEnforced" => {
            Finding::good("ACLs", "off: whoever may read the bucket may read each object (default_acl= does nothing)")
        }
        Ok(None) if !aws => Finding::aside("ACLs", "not known: the store does not say"),
        Ok(_) => Finding::note(
            "ACLs",
            "on: each object has its own, which renames carry along at the price of a request",
            "switch them off (Object Ownership: Bucket owner enforced) unless somebody relies on them",
        ),
        Err(error) => unknown("ACLs", error, "s3:GetBucketOwnershipControls"),
    }
}

fn public(settings: &Settings) -> Finding {
    match &settings.public_access {
        Ok(Some(block)) if block.ignores_acls && block.restricts_policies => {
            Finding::good("public access", "blocked: nobody reads it without credentials, a link, or a CloudFront distribution")
        }
        Ok(Some(block)) if block.refuses_new => Finding::aside(
            "public access",
            "new public ACLs and policies are refused; what is public already stays so (IgnorePublicAcls and RestrictPublicBuckets are not both on)",
        ),
        Ok(_) => Finding::note(
            "public access",
            "not blocked by the bucket: an ACL or a policy can make objects public",
            "if nobody is to read it without credentials, switch Block Public Access on",
        ),
        Err(error) => unknown("public access", error, "s3:GetBucketPublicAccessBlock"),
    }
}

fn versions(settings: &Settings) -> Finding {
    match &settings.versioning {
        Ok(Versioning::Enabled) => Finding::good(
            "versions",
            "kept: what is overwritten or deleted can be had again, and is paid for until a lifecycle rule ends it",
        ),
        Ok(Versioning::Suspended) => Finding::aside("versions", "no longer kept (suspended); older ones are still there"),
        Ok(Versioning::Off) => Finding::aside("versions", "not kept: what is overwritten or deleted is gone"),
        Err(error) => unknown("versions", error, "s3:GetBucketVersioning"),
    }
}

fn uploads(settings: &Settings, client: &Client, bucket: &str, prefix: &str) -> Finding {
    const CHECK: &str = "abandoned uploads";
    if let Err(error) = &settings.abandoned_uploads {
        return unknown(CHECK, error, "s3:GetLifecycleConfiguration");
    }
    let endpoint = if client.is_aws() { String::new() } else { format!(" --endpoint-url {}", client.endpoint()) };
    match settings.ends_uploads_after(prefix) {
        Some(days) => Finding::good(CHECK, format!("a lifecycle rule ends them after {days} days")),
        None => Finding::note(
            CHECK,
            "no lifecycle rule ends them: what a program leaves that never comes back is stored, and paid for, unseen",
            format!(
                "aws s3api put-bucket-lifecycle-configuration --bucket {bucket}{endpoint} --lifecycle-configuration '{{\"Rules\":[{{\"ID\":\"uploads\",\"Status\":\"Enabled\",\"Filter\":{{\"Prefix\":\"\"}},\"AbortIncompleteMultipartUpload\":{{\"DaysAfterInitiation\":7}}}}]}}' (this replaces the rules that are there)"
            ),
        ),
    }
}

/// The CloudFront distributions that have the bucket for their origin.
pub(super) async fn distributions(client: &Client, bucket: &str, prefix: &str, tell: &mut Tell<'_>) {
    const CHECK: &str = "CloudFront";
    if !client.is_aws() && std::env::var_os(cloudfront::ENDPOINT_VARIABLE).is_none() {
        return tell(Finding::aside(CHECK, "not asked: this store is not AWS's"));
    }
    if bucket.starts_with("arn:") {
        return tell(Finding::aside(CHECK, "not looked for: an access point does not tell which bucket is behind it"));
    }
    let all = match cloudfront::distributions(client).await {
        Ok(all) => all,
        Err(error) => return tell(unknown(CHECK, &error, "cloudfront:ListDistributions")),
    };
    let mut served = false;
    for distribution in &all {
        for path in distribution.paths_of(bucket) {
            served = true;
            let names =
                std::iter::once(&distribution.domain).chain(&distribution.aliases).map(String::as_str).collect::<Vec<_>>().join(", ");
            let state = if distribution.enabled { "" } else { "; it is switched off" };
            let part = if path.is_empty() { String::new() } else { format!(" from {path}/ on") };
            let outside = !path.is_empty() && !prefix.is_empty() && {
                let origin = format!("{}/", path.trim_start_matches('/'));
                !prefix.starts_with(&origin) && !origin.starts_with(prefix)
            };
            let outside = if outside { "; nothing of this mount lies there" } else { "" };
            tell(Finding::good(CHECK, format!("distribution {} serves the bucket{part} as {names}{state}{outside}", distribution.id)));
        }
    }
    if !served {
        tell(Finding::aside(CHECK, format!("none of the account's {} distributions serves this bucket", all.len())));
    }
}
