//! Which CloudFront distributions serve a bucket.

use url::Url;

use crate::aws::sigv4::Scope;
use crate::s3::client::Client;
use crate::s3::xml::Element;
use crate::s3::{ErrorKind, Result, S3Error};

/// CloudFront is one service for all regions (its API of 2020-05-31).
const SCOPE: Scope<'static> = Scope { service: "cloudfront", region: "us-east-1" };

/// What AWS's own tools take another address from, for tests and proxies of it.
pub const ENDPOINT_VARIABLE: &str = "AWS_ENDPOINT_URL_CLOUDFRONT";

const ENDPOINT: &str = "https://cloudfront.amazonaws.com";

/// A distribution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribution {
    /// `E…`.
    pub id: String,
    /// `….cloudfront.net`.
    pub domain: String,
    /// Names of its owner's that lead to it.
    pub aliases: Vec<String>,
    /// It serves anything at all.
    pub enabled: bool,
    /// Domain and path of each origin.
    pub origins: Vec<(String, String)>,
}

impl Distribution {
    fn of(summary: &Element) -> Option<Self> {
        let items = |name: &str| summary.child(name).and_then(|list| list.child("Items"));
        let origins = items("Origins").into_iter().flat_map(|items| items.all("Origin"));
        let origin = |origin: &Element| {
            Some((origin.text_of("DomainName")?.to_owned(), origin.text_of("OriginPath").unwrap_or_default().to_owned()))
        };
        Some(Self {
            id: summary.text_of("Id")?.to_owned(),
            domain: summary.text_of("DomainName").unwrap_or_default().to_owned(),
            aliases: items("Aliases").into_iter().flat_map(|items| items.all("CNAME")).map(|name| name.text.clone()).collect(),
            // A staging distribution serves nobody but its tester.
            enabled: summary.is_true("Enabled") && !summary.is_true("Staging"),
            origins: origins.filter_map(origin).collect(),
        })
    }

    /// The paths in the bucket, without a `/` at their ends, that this distribution serves.
    pub fn paths_of(&self, bucket: &str) -> Vec<&str> {
        self.origins.iter().filter(|(domain, _)| is_of_bucket(domain, bucket)).map(|(_, path)| path.trim_end_matches('/')).collect()
    }
}

/// `BUCKET.s3.amazonaws.com` in all its spellings: with a region, dual stack, as a website.
fn is_of_bucket(domain: &str, bucket: &str) -> bool {
    let host = domain.strip_suffix(".cn").unwrap_or(domain);
    let service = host.strip_suffix(".amazonaws.com").and_then(|rest| rest.strip_prefix(bucket)?.strip_prefix('.'));
    service.is_some_and(|service| service == "s3" || service.starts_with("s3.") || service.starts_with("s3-"))
}

/// ListDistributions, all pages.
///
/// # Errors
/// [`ErrorKind::AccessDenied`] where `cloudfront:ListDistributions` is missing.
pub async fn distributions(client: &Client) -> Result<Vec<Distribution>> {
    let endpoint = std::env::var(ENDPOINT_VARIABLE).ok().filter(|url| !url.is_empty()).unwrap_or_else(|| ENDPOINT.to_owned());
    let invalid = |text: String| S3Error::local(ErrorKind::InvalidRequest, "Configuration", SCOPE.service, text);
    let mut url = Url::parse(&endpoint).map_err(|error| invalid(format!("{ENDPOINT_VARIABLE}={endpoint}: {error}")))?;
    url.set_path(&format!("{}/2020-05-31/distribution", url.path().trim_end_matches('/')));
    let (mut found, mut marker) = (Vec::new(), None::<String>);
    loop {
        let mut page = url.clone();
        page.query_pairs_mut().extend_pairs(marker.iter().map(|marker| ("Marker", marker.as_str()))).append_pair("MaxItems", "100");
        let answer = client.ask_service(SCOPE, "ListDistributions", &page).await?;
        let items = answer.child("Items").into_iter().flat_map(|items| items.all("DistributionSummary"));
        found.extend(items.filter_map(Distribution::of));
        let next = answer.text_of("NextMarker").filter(|next| answer.is_true("IsTruncated") && !next.is_empty()).map(str::to_owned);
        if next.is_none() || next == marker {
            return Ok(found);
        }
        marker = next;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn origins_of_a_bucket_in_every_spelling() {
        for domain in [
            "site.s3.amazonaws.com",
            "site.s3.eu-west-1.amazonaws.com",
            "site.s3-eu-west-1.amazonaws.com",
            "site.s3.dualstack.eu-west-1.amazonaws.com",
            "site.s3-website-us-east-1.amazonaws.com",
            "site.s3-website.eu-central-1.amazonaws.com",
            "site.s3.cn-north-1.amazonaws.com.cn",
        ] {
            assert!(is_of_bucket(domain, "site"), "{domain}");
        }
        for domain in [
            "my.site.s3.amazonaws.com",
            "site.example.com",
            "site2.s3.amazonaws.com",
            "site.s3.amazonaws.com.evil.org",
            "site.execute-api.amazonaws.com",
        ] {
            assert!(!is_of_bucket(domain, "site"), "{domain}");
        }
    }

    #[test]
    fn a_summary_is_read() {
        let text = "<DistributionSummary><Id>E1</Id><Status>Deployed</Status><DomainName>d1.cloudfront.net</DomainName>\
                    <Aliases><Quantity>1</Quantity><Items><CNAME>www.example.com</CNAME></Items></Aliases>\
                    <Origins><Quantity>2</Quantity><Items><Origin><Id>a</Id><DomainName>site.s3.amazonaws.com</DomainName>\
                    <OriginPath>/web</OriginPath></Origin><Origin><Id>b</Id><DomainName>other.example.com</DomainName><OriginPath/></Origin>\
                    </Items></Origins><Enabled>true</Enabled><Staging>false</Staging></DistributionSummary>";
        let read = Distribution::of(&Element::parse(text.as_bytes()).unwrap()).unwrap();
        assert_eq!((read.id.as_str(), read.enabled, read.aliases.as_slice()), ("E1", true, &["www.example.com".to_owned()][..]));
        assert_eq!(read.paths_of("site"), ["/web"]);
        assert!(read.paths_of("web").is_empty());
    }
}
