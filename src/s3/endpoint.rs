//! Where a bucket is found: hosts, path and virtual-host style, access points, and what is refused.

use std::net::IpAddr;

use url::Url;

/// A bucket as it was named: a plain name (or access point alias), or an access point's ARN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BucketName {
    /// A name or alias.
    Plain(String),
    /// `arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME`.
    AccessPoint {
        /// The whole ARN, as copy sources want it.
        arn: String,
        /// Its region, which is known thereby.
        region: String,
        /// `NAME-ACCOUNT`, the host's first label.
        label: String,
    },
}

impl BucketName {
    /// Understands a bucket argument.
    ///
    /// # Errors
    /// One line for what cannot be a bucket or needs a signature that this program lacks.
    pub fn parse(name: &str) -> Result<Self, String> {
        if name.starts_with("arn:") {
            return Self::parse_arn(name);
        }
        if name.ends_with("--x-s3") {
            return Err(format!("{name} is a directory bucket (S3 Express), which packmule cannot mount; use a general purpose bucket"));
        }
        if name.ends_with("--ol-s3") || name.ends_with("--op-s3") || name.ends_with(".mrap") {
            return Err(format!(
                "{name} is an Object Lambda, Outposts or multi-region access point, which packmule cannot mount; name the bucket itself"
            ));
        }
        let usable = (1..=255).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        if !usable || name == "." || name == ".." {
            return Err(format!("{name:?} is no bucket name; letters, digits, dots, hyphens and underscores make one"));
        }
        Ok(Self::Plain(name.to_owned()))
    }

    fn parse_arn(arn: &str) -> Result<Self, String> {
        let fields: Vec<&str> = arn.splitn(6, ':').collect();
        let [_, _, service, region, account, resource] = fields.as_slice() else {
            return Err(format!("{arn} is no access point ARN; the form is arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME"));
        };
        if *service == "s3-object-lambda" || *service == "s3-outposts" || *service == "s3express" {
            return Err(format!("{arn}: {service} access points cannot be mounted; name the bucket itself"));
        }
        let name = resource.strip_prefix("accesspoint").and_then(|rest| rest.strip_prefix(['/', ':']));
        let Some(name) = name.filter(|_| *service == "s3") else {
            return Err(format!("{arn} is no access point ARN; the form is arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME"));
        };
        if region.is_empty() || name.ends_with(".mrap") {
            return Err(format!(
                "{arn} is a multi-region access point, which needs SigV4a signatures that packmule lacks; name one region's bucket"
            ));
        }
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !plain(name) || !plain(account) || !plain(region) {
            return Err(format!("{arn} is no access point ARN; the form is arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME"));
        }
        Ok(Self::AccessPoint { arn: arn.to_owned(), region: (*region).to_owned(), label: format!("{name}-{account}") })
    }

    /// As it was named.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Plain(name) => name,
            Self::AccessPoint { arn, .. } => arn,
        }
    }

    /// The `x-amz-copy-source` of a key, before encoding; an access point's has `/object/` between.
    pub fn copy_source(&self, key: &str) -> String {
        match self {
            Self::Plain(name) => format!("{name}/{key}"),
            Self::AccessPoint { arn, .. } => format!("{arn}/object/{key}"),
        }
    }
}

/// The service, as configured.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// `None`: AWS's own, by region.
    custom: Option<Url>,
    tls: bool,
    path_style: Option<bool>,
    dual_stack: bool,
    accelerate: bool,
    /// Region that the endpoint's host names.
    pub region: Option<String>,
}

/// Where requests for one bucket (or none) go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// `https://host:port`.
    pub origin: String,
    /// Before the key: `""`, `/bucket`, or with the endpoint's own path before.
    pub prefix: String,
    /// SigV2's resource prefix: `/bucket`, whatever the style.
    pub resource: String,
}

/// The region in a host of AWS's (`s3.REGION.amazonaws.com`, `s3-REGION.…`, `s3.dualstack.REGION.…`); `Some(None)`: the global one.
fn region_of_host(host: &str) -> Option<Option<String>> {
    let rest = host.strip_suffix(".amazonaws.com").or_else(|| host.strip_suffix(".amazonaws.com.cn"))?;
    if rest == "s3" {
        return Some(None);
    }
    let region = rest.strip_prefix("s3.dualstack.").or_else(|| rest.strip_prefix("s3.")).or_else(|| rest.strip_prefix("s3-"))?;
    let like_a_region =
        region.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') && region.ends_with(|c: char| c.is_ascii_digit());
    like_a_region.then(|| Some(region.to_owned()))
}

/// A bucket that can be a DNS label or name (3 to 63 lower-case letters, digits, hyphens, dots).
fn is_dns_like(name: &str) -> bool {
    let label = |label: &str| {
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        edge(label.as_bytes().first()) && edge(label.as_bytes().last())
    };
    (3..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        && name.split('.').all(label)
        && name.parse::<IpAddr>().is_err()
}

impl Endpoint {
    /// From the options `endpoint_url`, `path_style`, `dual_stack`, `transfer_acceleration`.
    ///
    /// # Errors
    /// One line for a URL that is no http(s) endpoint.
    pub fn new(url: Option<&Url>, path_style: Option<bool>, dual_stack: bool, accelerate: bool) -> Result<Self, String> {
        let mut endpoint = Self { custom: None, tls: true, path_style, dual_stack, accelerate, region: None };
        let Some(url) = url else { return Ok(endpoint) };
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(format!("endpoint_url {url}: not an http:// or https:// URL"));
        }
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
            return Err("endpoint_url: credentials, query and fragment do not belong there; name scheme, host and port".to_owned());
        }
        endpoint.tls = url.scheme() == "https";
        match url.host_str().and_then(region_of_host) {
            Some(region) => endpoint.region = region,
            None => endpoint.custom = Some(url.clone()),
        }
        Ok(endpoint)
    }

    /// True for AWS itself (its VPC endpoints included): known limits and abilities.
    pub fn is_aws(&self) -> bool {
        self.custom
            .as_ref()
            .is_none_or(|url| url.host_str().is_some_and(|host| host.ends_with(".amazonaws.com") || host.ends_with(".amazonaws.com.cn")))
    }

    /// True when nothing but the network's own checks protects the bytes.
    pub fn is_plain_http(&self) -> bool {
        !self.tls
    }

    /// How messages name it.
    pub fn shown(&self) -> String {
        match &self.custom {
            Some(url) => url.origin().ascii_serialization(),
            None => "AWS S3".to_owned(),
        }
    }

    /// The service behind it, the same for every spelling: all of AWS's hosts (regions, dual stack, acceleration, VPC endpoints)
    /// are one, as bucket names are unique there; of others host, port and path count, and a machine's own addresses are one.
    pub fn service(&self) -> String {
        let Some(url) = self.custom.as_ref().filter(|_| !self.is_aws()) else { return "AWS S3".to_owned() };
        let loopback = match url.host() {
            Some(url::Host::Domain(name)) => name.trim_end_matches('.') == "localhost",
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            None => false,
        };
        let host = if loopback { "localhost" } else { url.host_str().unwrap_or_default().trim_end_matches('.') };
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        format!("{host}{port}{}", url.path().trim_end_matches('/'))
    }

    fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    fn virtual_host(&self, bucket: &str) -> bool {
        let possible = is_dns_like(bucket) && !(self.tls && bucket.contains('.'));
        let host_is_ip = self.custom.as_ref().is_some_and(|url| !matches!(url.host(), Some(url::Host::Domain(_))));
        possible && !host_is_ip && !self.path_style.unwrap_or(!self.is_aws())
    }

    /// Host and path of a bucket's requests. `object_level` is false for requests that acceleration does not serve.
    pub fn locate(&self, bucket: Option<&BucketName>, region: &str, object_level: bool) -> Location {
        let suffix = if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" };
        let dual = if self.dual_stack { ".dualstack" } else { "" };
        let scheme = self.scheme();
        let (host, base) = match &self.custom {
            Some(url) => {
                let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
                (format!("{}{port}", url.host_str().unwrap_or("")), url.path().trim_end_matches('/').to_owned())
            }
            None => (format!("s3{dual}.{region}.{suffix}"), String::new()),
        };
        match bucket {
            None => Location { origin: format!("{scheme}://{host}"), prefix: base, resource: String::new() },
            Some(BucketName::AccessPoint { region, label, .. }) => {
                let host = match &self.custom {
                    Some(_) => format!("{label}.{host}"),
                    None => format!("{label}.s3-accesspoint{dual}.{region}.{suffix}"),
                };
                Location { origin: format!("{scheme}://{host}"), prefix: base, resource: String::new() }
            }
            Some(BucketName::Plain(name)) => {
                let resource = format!("/{name}");
                if !self.virtual_host(name) {
                    return Location { origin: format!("{scheme}://{host}"), prefix: format!("{base}/{name}"), resource };
                }
                let accelerated = self.accelerate && self.custom.is_none() && object_level;
                let host = if accelerated { format!("s3-accelerate{dual}.{suffix}") } else { host };
                Location { origin: format!("{scheme}://{name}.{host}"), prefix: base, resource }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn at(url: Option<&str>, style: Option<bool>, bucket: &str) -> String {
        let url = url.map(|url| Url::parse(url).unwrap());
        let endpoint = Endpoint::new(url.as_ref(), style, false, false).unwrap();
        let location = endpoint.locate(Some(&BucketName::parse(bucket).unwrap()), "eu-west-1", true);
        format!("{}{}", location.origin, location.prefix)
    }

    #[test]
    fn styles() {
        assert_eq!(at(None, None, "releases"), "https://releases.s3.eu-west-1.amazonaws.com");
        assert_eq!(at(None, None, "my.site"), "https://s3.eu-west-1.amazonaws.com/my.site");
        assert_eq!(at(None, Some(false), "my.site"), "https://s3.eu-west-1.amazonaws.com/my.site");
        assert_eq!(at(None, None, "Old_Bucket"), "https://s3.eu-west-1.amazonaws.com/Old_Bucket");
        assert_eq!(at(None, Some(true), "releases"), "https://s3.eu-west-1.amazonaws.com/releases");
        assert_eq!(at(Some("http://127.0.0.1:8333"), Some(false), "releases"), "http://127.0.0.1:8333/releases");
        assert_eq!(at(Some("http://store.lan:9000/"), None, "releases"), "http://store.lan:9000/releases");
        assert_eq!(at(Some("http://store.lan:9000"), Some(false), "my.site"), "http://my.site.store.lan:9000");
        assert_eq!(at(Some("https://gw.lan/s3/"), None, "b-1"), "https://gw.lan/s3/b-1");
        assert_eq!(at(Some("https://s3.us-east-2.amazonaws.com"), None, "releases"), "https://releases.s3.eu-west-1.amazonaws.com");
    }

    #[test]
    fn a_service_has_many_spellings() {
        let service = |url: &str| Endpoint::new(Some(&Url::parse(url).unwrap()), None, false, false).unwrap().service();
        let aws = Endpoint::new(None, Some(true), true, true).unwrap().service();
        for url in [
            "https://s3.amazonaws.com",
            "https://s3.dualstack.eu-west-1.amazonaws.com",
            "http://s3-us-west-2.amazonaws.com/",
            "https://vpce-1a2b.s3.us-east-1.vpce.amazonaws.com",
        ] {
            assert_eq!(service(url), aws, "{url}");
        }
        for url in ["http://127.0.0.1:8333", "http://LOCALHOST:8333/", "http://[::1]:8333", "https://localhost.:8333"] {
            assert_eq!(service(url), "localhost:8333", "{url}");
        }
        assert_eq!(service("http://Store.lan:80/s3/"), service("https://store.lan/s3"));
        assert_ne!(service("http://store.lan:9000"), service("http://store.lan:9001"));
    }

    #[test]
    fn access_points() {
        let arn = "arn:aws:s3:us-west-2:123456789012:accesspoint/finance";
        assert_eq!(at(None, None, arn), "https://finance-123456789012.s3-accesspoint.us-west-2.amazonaws.com");
        assert_eq!(BucketName::parse(arn).unwrap().copy_source("a/b"), format!("{arn}/object/a/b"));
        assert_eq!(
            at(None, None, "my-ap-hrzrlukc5m36ft7okagglf3gmwluquse1b-s3alias"),
            "https://my-ap-hrzrlukc5m36ft7okagglf3gmwluquse1b-s3alias.s3.eu-west-1.amazonaws.com"
        );
    }

    #[test]
    fn acceleration_and_dual_stack() {
        let endpoint = Endpoint::new(None, None, true, true).unwrap();
        let bucket = BucketName::parse("releases").unwrap();
        assert_eq!(endpoint.locate(Some(&bucket), "eu-west-1", true).origin, "https://releases.s3-accelerate.dualstack.amazonaws.com");
        assert_eq!(endpoint.locate(Some(&bucket), "eu-west-1", false).origin, "https://releases.s3.dualstack.eu-west-1.amazonaws.com");
        assert_eq!(endpoint.locate(None, "cn-north-1", false).origin, "https://s3.dualstack.cn-north-1.amazonaws.com.cn");
    }

    #[test]
    fn what_cannot_be_mounted_is_refused_in_a_line() {
        for name in [
            "x--usw2-az1--x-s3",
            "arn:aws:s3::123456789012:accesspoint/m.mrap",
            "arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/x",
            "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/x",
            "arn:aws:s3:::bucket",
            "a/b",
            "",
            "..",
        ] {
            let refusal = BucketName::parse(name).unwrap_err();
            assert!(!refusal.contains('\n') && !refusal.is_empty(), "{name}");
        }
    }
}
