//! Downloads, counted from access logs.
//!
//! A download is complete when the bytes sent to one client over one link cover the object, in one answer or in several; a client
//! is an address and a program. S3 does not log which bytes a ranged GET sent, so of several such answers only the sum is known:
//! where it reaches the object's size the download is *likely*, not complete. A client that got bytes and is neither has *started*.
//! Logs are late and incomplete (S3 User Guide, "Best-effort server log delivery"): the counts are close, not exact.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use jiff::Timestamp;
use serde::Serialize;

use super::access_log::{Delivery, Line, Part};
use crate::ranges::RangeSet;

/// What a set of logs tells.
#[derive(Debug, Default)]
pub struct Tally {
    objects: BTreeMap<String, Object>,
    /// Hashes of the ids of requests, by which a line that is delivered twice counts once. Of 64 bits: a hundred million requests
    /// lose one with a chance of 1 in 3,000.
    seen: HashSet<u64>,
    hashes: RandomState,
    /// Lines of no access log.
    pub unknown_lines: u64,
}

#[derive(Debug, Default)]
struct Object {
    /// The largest in any line: CloudFront logs none with a part. Of an object that was replaced by one of another size some
    /// downloads in parts are taken for started, and none for complete.
    size: Option<u64>,
    links: BTreeMap<Option<String>, Link>,
}

#[derive(Debug)]
struct Link {
    first: Timestamp,
    last: Timestamp,
    bytes: u64,
    /// By a hash of address and program.
    clients: HashMap<u64, Client>,
}

#[derive(Debug, Default)]
struct Client {
    whole: u64,
    ranges: RangeSet,
    /// Bytes of which nobody knows where they lie.
    unplaced: u64,
}

impl Client {
    fn add_to(&self, downloads: &mut Downloads, size: Option<u64>) {
        let in_parts = !self.ranges.is_empty() && size.is_some_and(|size| self.ranges.covers(0..size));
        downloads.complete += self.whole + u64::from(in_parts);
        // The parts that a client fetches beside a whole answer (a first look at it, as download managers do) are no download.
        if self.whole > 0 || in_parts {
            return;
        }
        let sum = self.ranges.total().saturating_add(self.unplaced);
        match self.unplaced > 0 && size.is_some_and(|size| sum >= size) {
            true => downloads.likely += 1,
            false => downloads.started += 1,
        }
    }
}

/// What became of one link to one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Downloads {
    /// The link's id; `None` for requests without one.
    pub link: Option<String>,
    /// `s3://bucket/key`, or `https://host/path` from CloudFront's logs.
    pub object: String,
    /// Downloads that were sent wholly.
    pub complete: u64,
    /// Downloads whose parts add up to the object's size.
    pub likely: u64,
    /// Downloads that were not seen to end.
    pub started: u64,
    /// Bytes of the object that were sent, over all requests.
    pub bytes: u64,
    /// The first request.
    pub first: Timestamp,
    /// The last request.
    pub last: Timestamp,
}

impl Tally {
    /// Counts a line, unless its request was counted before.
    pub fn add(&mut self, line: Line) {
        match line {
            Line::Delivery(delivery) => {
                if delivery.request.is_empty() || self.seen.insert(self.hashes.hash_one(&delivery.request)) {
                    self.count(*delivery);
                }
            }
            Line::Other => {}
            Line::Unknown => self.unknown_lines += 1,
        }
    }

    fn count(&mut self, delivery: Delivery) {
        let Delivery { time, client, object, link, bytes, part, size, .. } = delivery;
        let object = self.objects.entry(object).or_default();
        object.size = object.size.max(size);
        let link = object.links.entry(link).or_insert_with(|| Link { first: time, last: time, bytes: 0, clients: HashMap::new() });
        link.first = link.first.min(time);
        link.last = link.last.max(time);
        link.bytes = link.bytes.saturating_add(bytes);
        let client = link.clients.entry(self.hashes.hash_one(client)).or_default();
        match part {
            Part::Whole => client.whole += 1,
            Part::From(start) => client.ranges.insert(start..start.saturating_add(bytes)),
            Part::Unknown => client.unplaced = client.unplaced.saturating_add(bytes),
        }
    }

    /// A line for each object and link, in the order of objects.
    pub fn downloads(&self) -> Vec<Downloads> {
        let mut all = Vec::new();
        for (name, object) in &self.objects {
            for (id, link) in &object.links {
                let mut downloads = Downloads {
                    link: id.clone(),
                    object: name.clone(),
                    complete: 0,
                    likely: 0,
                    started: 0,
                    bytes: link.bytes,
                    first: link.first,
                    last: link.last,
                };
                link.clients.values().for_each(|client| client.add_to(&mut downloads, object.size));
                all.push(downloads);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::publish::access_log::read;

    const ID: &str = "abcdefghijkl";

    /// A GET of a 100-byte object in S3's log.
    fn s3(request: &str, address: &str, status: u16, bytes: u64) -> String {
        format!(
            "79a5 b [06/Feb/2019:00:00:3{} +0000] {address} - {request} REST.GET.OBJECT k \"GET /b/k?x-packmule-link={ID} HTTP/1.1\" {status} - {bytes} 100 7 6 \"-\" \"curl\" - s9lz= SigV4\n",
            bytes % 10
        )
    }

    const FIELDS: &str = "#Version: 1.0\n#Fields: date time c-ip cs-method cs(Host) cs-uri-stem sc-status sc-bytes cs-uri-query x-edge-result-type sc-content-len sc-range-start sc-range-end\n";

    /// A GET of a 100-byte object in CloudFront's log, whose answers have 50 bytes of headers.
    fn cloudfront(address: &str, range: Option<(u64, u64)>, bytes: u64, result: &str) -> String {
        let (status, length, range) = match range {
            None => (200, 100, "-\t-".to_owned()),
            Some((start, end)) => (206, end - start + 1, format!("{start}\t{end}")),
        };
        format!(
            "2019-12-04\t21:02:31\t{address}\tGET\td1.cloudfront.net\t/k\t{status}\t{}\tx-packmule-link={ID}\t{result}\t{length}\t{range}\n",
            bytes + 50
        )
    }

    fn counts(log: &str) -> (u64, u64, u64, u64) {
        let mut tally = Tally::default();
        read(log.as_bytes(), &mut |line| tally.add(line)).unwrap();
        assert_eq!(tally.unknown_lines, 0);
        match tally.downloads().as_slice() {
            [] => (0, 0, 0, 0),
            [only] => {
                assert_eq!(only.link.as_deref(), Some(ID));
                (only.complete, only.likely, only.started, only.bytes)
            }
            several => panic!("{several:?}"),
        }
    }

    #[test]
    fn s3_tells_whole_answers_and_sums() {
        assert_eq!(counts(&[s3("R1", "::1", 200, 100), s3("R2", "::1", 200, 100)].concat()), (2, 0, 0, 200));
        // "May repeat": one request.
        assert_eq!(counts(&[s3("R1", "::1", 200, 100), s3("R1", "::1", 200, 100)].concat()), (1, 0, 0, 100));
        // Nothing but the whole object is as long as it.
        assert_eq!(counts(&s3("R1", "::1", 206, 100)), (1, 0, 0, 100));
        assert_eq!(counts(&s3("R1", "::1", 200, 40)), (0, 0, 1, 40));
        // Interrupted, and gone on with.
        assert_eq!(counts(&[s3("R1", "::1", 200, 40), s3("R2", "::1", 206, 60)].concat()), (0, 1, 0, 100));
        assert_eq!(counts(&[s3("R1", "::1", 200, 40), s3("R2", "::2", 206, 60)].concat()), (0, 0, 2, 100));
        assert_eq!(counts(&[s3("R1", "::1", 206, 1), s3("R2", "::1", 200, 100)].concat()), (1, 0, 0, 101));
        // "HEAD, 304 and errors do not count."
        let head = s3("R1", "::1", 200, 100).replace("REST.GET", "REST.HEAD");
        assert_eq!(counts(&[head, s3("R2", "::1", 304, 0), s3("R3", "::1", 403, 100)].concat()), (0, 0, 0, 0));
    }

    #[test]
    fn cloudfront_tells_ranges() {
        assert_eq!(counts(&[FIELDS, &cloudfront("::1", None, 100, "Hit")].concat()), (1, 0, 0, 100));
        let cut = cloudfront("::1", None, 60, "Error");
        assert_eq!(counts(&[FIELDS, &cut].concat()), (0, 0, 1, 100 - 1));
        // The rest twice is not the whole; the union is.
        let resumed = cloudfront("::1", Some((40, 99)), 60, "Hit");
        let cut_early = cloudfront("::1", None, 0, "Error");
        assert_eq!(counts(&[FIELDS, &cut_early, &resumed].concat()), (1, 0, 0, 50 + 60));
        let other = cloudfront("::2", Some((40, 99)), 60, "Hit");
        assert_eq!(counts(&[FIELDS, &other, &other, &cloudfront("::3", None, 100, "Hit")].concat()), (1, 0, 1, 220));
        // Nothing says how long the object is.
        assert_eq!(counts(&[FIELDS, &cloudfront("::1", Some((0, 99)), 100, "Hit")].concat()), (0, 0, 1, 100));
    }

    #[test]
    fn times_are_those_of_the_first_and_the_last_request() {
        let mut tally = Tally::default();
        let log = [s3("R1", "::1", 206, 9), s3("R2", "::1", 206, 2), "no log\n".to_owned()].concat();
        read(log.as_bytes(), &mut |line| tally.add(line)).unwrap();
        let found = tally.downloads();
        assert_eq!((found[0].first.to_string(), found[0].last.to_string()), ("2019-02-06T00:00:32Z".into(), "2019-02-06T00:00:39Z".into()));
        assert_eq!((found[0].object.as_str(), tally.unknown_lines), ("s3://b/k", 1));
    }
}
