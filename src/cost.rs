//! What a mount's requests and bytes cost, about. Storage, retrieval from colder classes, transfer acceleration, KMS and free
//! allowances are not in it.

use serde::{Deserialize, Serialize};

use crate::s3::operation::{Operation, Usage};

/// Currency of the prices that are known here.
pub const USD: &str = "USD";

/// What AWS asks in US dollars: S3 Standard in us-east-1, and the first 10 TB a month out to the internet, as
/// <https://aws.amazon.com/s3/pricing/> had it in 2025.
const AWS: Prices = Prices { put: Some(0.005), get: Some(0.0004), out: Some(0.09), currency: None };

/// Bytes of what AWS's bills call a GB.
const GB: f64 = (1_u64 << 30) as f64;

/// Prices as they were configured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prices {
    /// 1,000 requests of PUT, COPY, POST and LIST.
    pub put: Option<f64>,
    /// 1,000 requests of GET and all others that are not free.
    pub get: Option<f64>,
    /// 2^30 bytes that leave the store.
    pub out: Option<f64>,
    /// What all of them are in; `None`: [`USD`].
    pub currency: Option<String>,
}

/// An estimate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// What the amounts are in, by ISO 4217.
    pub currency: String,
    /// For requests.
    pub requests: f64,
    /// For bytes that left the store.
    pub out: f64,
    /// Whose prices these are.
    pub prices: String,
}

/// How S3 bills an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Put,
    Get,
    Free,
}

fn class(operation: Operation) -> Class {
    use Operation::{
        AbortMultipartUpload, CompleteMultipartUpload, CopyObject, CreateBucket, CreateMultipartUpload, DeleteBucket, DeleteObject,
        DeleteObjects, GetBucketLifecycleConfiguration, GetBucketOwnershipControls, GetBucketVersioning, GetObject, GetObjectAcl,
        GetObjectTagging, GetPublicAccessBlock, HeadBucket, HeadObject, ListBuckets, ListMultipartUploads, ListObjectVersions, ListObjects,
        ListObjectsV2, ListParts, PutObject, PutObjectTagging, UploadPart, UploadPartCopy,
    };
    match operation {
        PutObject
        | CopyObject
        | CreateMultipartUpload
        | UploadPart
        | UploadPartCopy
        | CompleteMultipartUpload
        | PutObjectTagging
        | CreateBucket
        | ListObjectsV2
        | ListObjects
        | ListParts
        | ListMultipartUploads
        | ListObjectVersions
        | ListBuckets => Class::Put,
        GetObject
        | HeadObject
        | GetObjectTagging
        | GetObjectAcl
        | GetBucketOwnershipControls
        | GetBucketVersioning
        | GetBucketLifecycleConfiguration
        | GetPublicAccessBlock
        | HeadBucket => Class::Get,
        DeleteObject | DeleteObjects | DeleteBucket | AbortMultipartUpload => Class::Free,
    }
}

impl Prices {
    /// What this usage cost; `None` where a price is neither configured nor, on AWS, known.
    pub fn estimate(&self, aws: bool, usage: &Usage) -> Option<Cost> {
        let known = if aws { AWS } else { Self::default() };
        let (put, get, out) = (self.put.or(known.put)?, self.get.or(known.get)?, self.out.or(known.out)?);
        let count = |of: Class| usage.requests.iter().filter(|(operation, _)| class(*operation) == of).map(|(_, sent)| *sent).sum::<u64>();
        let prices = match [self.put, self.get, self.out].iter().flatten().count() {
            0 => "prices of S3 Standard in us-east-1",
            3 => "prices as configured",
            _ => "prices as configured, else of S3 Standard in us-east-1",
        };
        Some(Cost {
            currency: self.currency.clone().unwrap_or_else(|| USD.to_owned()),
            requests: (count(Class::Put) as f64 * put + count(Class::Get) as f64 * get) / 1000.0,
            out: usage.received as f64 / GB * out,
            prices: prices.to_owned(),
        })
    }
}

impl Cost {
    /// Both together.
    pub fn total(&self) -> f64 {
        self.requests + self.out
    }

    /// An amount of this currency as people read it.
    pub fn money(&self, amount: f64) -> String {
        if self.currency == USD { format!("${amount:.4}") } else { format!("{amount:.4} {}", self.currency) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn usage() -> Usage {
        let requests = vec![
            (Operation::PutObject, 1000),
            (Operation::ListObjectsV2, 1000),
            (Operation::GetObject, 2000),
            (Operation::DeleteObject, 5000),
            (Operation::AbortMultipartUpload, 5000),
        ];
        Usage { requests, sent: 7 << 30, received: 1 << 30 }
    }

    fn near(one: f64, other: f64) -> bool {
        (one - other).abs() < 1e-9
    }

    #[test]
    fn what_aws_asks() {
        let cost = Prices::default().estimate(true, &usage()).unwrap();
        assert!(near(cost.requests, 2.0 * 0.005 + 2.0 * 0.0004) && near(cost.out, 0.09), "{cost:?}");
        assert_eq!((cost.prices.as_str(), cost.money(cost.total())), ("prices of S3 Standard in us-east-1", "$0.1008".to_owned()));
    }

    #[test]
    fn configured_prices_come_first() {
        let some = Prices { out: Some(0.0), ..Prices::default() };
        let cost = some.estimate(true, &usage()).unwrap();
        assert!(near(cost.out, 0.0) && near(cost.requests, 0.0108), "{cost:?}");
        assert_eq!(cost.prices, "prices as configured, else of S3 Standard in us-east-1");
        let all = Prices { put: Some(1.0), get: Some(2.0), out: Some(3.0), currency: Some("EUR".into()) };
        let cost = all.estimate(true, &usage()).unwrap();
        assert!(near(cost.requests, 6.0) && near(cost.out, 3.0), "{cost:?}");
        assert_eq!((cost.prices.as_str(), cost.money(cost.total())), ("prices as configured", "9.0000 EUR".to_owned()));
        assert_eq!(all.estimate(false, &usage()), Some(cost));
    }

    #[test]
    fn other_stores_have_no_prices_of_aws() {
        assert_eq!(Prices::default().estimate(false, &usage()), None);
        assert_eq!(Prices { put: Some(1.0), get: Some(1.0), ..Prices::default() }.estimate(false, &usage()), None);
    }
}
