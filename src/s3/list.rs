//! Listings: ListObjectsV2 and V1, unfinished uploads and their parts.

use http::Method;
use std::time::SystemTime;

use super::bucket::Bucket;
use super::operation::Operation;
use super::request::Call;
use super::xml::Element;
use super::{ETag, ListEntry, ListPage, ListRequest, Part, PendingUpload, Result, response};
use crate::aws::encode;

/// How a page is continued. Stores differ, so the token says which way: a V2 token, or the last key seen.
const TOKEN: &str = "t:";
const AFTER: &str = "a:";

/// Decodes keys where the store says that it encoded them; some ignore `encoding-type`.
fn key_reader(root: &Element) -> impl Fn(&str) -> String + use<> {
    let encoded = root.text_of("EncodingType").is_some_and(|kind| kind.eq_ignore_ascii_case("url"));
    move |text: &str| if encoded { encode::decode_listed(text) } else { text.to_owned() }
}

fn entry(contents: &Element, read: &impl Fn(&str) -> String) -> Option<ListEntry> {
    Some(ListEntry {
        key: read(contents.text_of("Key")?),
        size: contents.text_of("Size").and_then(|size| size.trim().parse().ok()).unwrap_or(0),
        etag: ETag::new(contents.text_of("ETag").unwrap_or("")),
        last_modified: contents.text_of("LastModified").and_then(response::iso_date).unwrap_or(SystemTime::UNIX_EPOCH),
        storage_class: contents.text_of("StorageClass").map(str::to_owned),
        sha1: contents.all("ChecksumAlgorithm").any(|algorithm| algorithm.text == "SHA1"),
    })
}

/// One page from its XML. `Err` when the store says that more follows but not where.
pub(crate) fn page(root: &Element) -> std::result::Result<ListPage, &'static str> {
    let read = key_reader(root);
    let entries: Vec<ListEntry> = root.all("Contents").filter_map(|contents| entry(contents, &read)).collect();
    let prefixes: Vec<String> = root.all("CommonPrefixes").flat_map(|group| group.all("Prefix")).map(|prefix| read(&prefix.text)).collect();
    let mut next = None;
    if root.is_true("IsTruncated") {
        let last = entries.last().map(|entry| &entry.key).max(prefixes.last());
        next = match (root.text_of("NextContinuationToken"), root.text_of("NextMarker")) {
            (Some(token), _) => Some(format!("{TOKEN}{token}")),
            (None, Some(marker)) => Some(format!("{AFTER}{}", read(marker))),
            (None, None) => last.map(|last| format!("{AFTER}{last}")),
        };
        if next.is_none() {
            return Err("an empty page that says more follows");
        }
    }
    Ok(ListPage { entries, prefixes, next })
}

/// A page of ListParts.
pub(crate) fn read_parts(root: &Element) -> std::result::Result<Vec<Part>, &'static str> {
    let read = |part: &Element| {
        let number = part.text_of("PartNumber")?.trim().parse().ok()?;
        let size = part.text_of("Size")?.trim().parse().ok()?;
        Some(Part { number, etag: ETag::new(part.text_of("ETag")?), size, checksum: response::part_checksum(part) })
    };
    root.all("Part").map(|part| read(part).ok_or("a part without number, size or ETag")).collect()
}

/// A page of ListMultipartUploads.
pub(crate) fn read_uploads(root: &Element) -> Vec<PendingUpload> {
    let key = key_reader(root);
    let read = |upload: &Element| {
        let initiated = upload.text_of("Initiated").and_then(response::iso_date).unwrap_or(SystemTime::UNIX_EPOCH);
        Some(PendingUpload { key: key(upload.text_of("Key")?), upload_id: upload.text_of("UploadId")?.to_owned(), initiated })
    };
    root.all("Upload").filter_map(read).collect()
}

impl ETag {
    /// An MD5 and a number of parts (0: not uploaded in parts), where [`ETag::of_binary`] spells it just as this one is.
    pub fn binary(&self) -> Option<([u8; 16], u16)> {
        let (md5, parts) = match self.as_str().split_once('-') {
            Some((md5, parts)) => (md5, parts.parse().ok().filter(|number: &u16| *number > 0 && number.to_string() == parts)?),
            None => (self.as_str(), 0),
        };
        let mut bytes = [0; 16];
        hex::decode_to_slice(md5, &mut bytes).ok()?;
        (!md5.bytes().any(|byte| byte.is_ascii_uppercase())).then_some((bytes, parts))
    }

    /// Of an MD5 and a number of parts.
    pub fn of_binary(md5: [u8; 16], parts: u16) -> Self {
        let md5 = hex::encode(md5);
        Self::new(if parts == 0 { md5 } else { format!("{md5}-{parts}") })
    }
}

impl Bucket {
    pub(super) async fn list_page(&self, request: ListRequest) -> Result<ListPage> {
        let v1 = self.core.config.list_objects_v1;
        let mut call = Call::new(&self.core, if v1 { Operation::ListObjects } else { Operation::ListObjectsV2 }, Method::GET);
        if !v1 {
            call = call.query("list-type", "2");
        }
        call = call.query("encoding-type", "url").query("prefix", request.prefix.as_str());
        if request.delimited {
            call = call.query("delimiter", "/");
        }
        if let Some(most) = request.max_keys {
            call = call.query("max-keys", most.to_string());
        }
        let after = if v1 { "marker" } else { "start-after" };
        match request.continuation.as_deref() {
            Some(token) if token.starts_with(TOKEN) => call = call.query("continuation-token", &token[TOKEN.len()..]),
            Some(token) => call = call.query(after, token.strip_prefix(AFTER).unwrap_or(token)),
            None => {
                if let Some(start) = request.start_after.as_deref() {
                    call = call.query(after, start);
                }
            }
        }
        let answer = self.core.xml(&self.place, &call, "ListBucketResult").await?;
        let page = page(&answer.body).map_err(|reason| self.core.not_s3(&self.place, &call, reason))?;
        if page.next.is_some() && page.next == request.continuation {
            return Err(self.core.not_s3(&self.place, &call, "a listing that continues where it began"));
        }
        self.located();
        self.remember_marker(&page);
        Ok(page)
    }

    pub(super) async fn pages_of_parts(&self, key: &str, upload_id: &str) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        let mut marker: Option<String> = None;
        loop {
            let mut call = Call::new(&self.core, Operation::ListParts, Method::GET).key(key).query("uploadId", upload_id);
            if let Some(marker) = &marker {
                call = call.query("part-number-marker", marker.as_str());
            }
            let answer = self.core.xml(&self.place, &call, "ListPartsResult").await?;
            parts.extend(read_parts(&answer.body).map_err(|reason| self.core.not_s3(&self.place, &call, reason))?);
            let next =
                answer.body.text_of("NextPartNumberMarker").map(str::to_owned).or_else(|| parts.last().map(|part| part.number.to_string()));
            if !answer.body.is_true("IsTruncated") {
                return Ok(parts);
            }
            if next.is_none() || next == marker {
                return Err(self.core.not_s3(&self.place, &call, "a listing that continues where it began"));
            }
            marker = next;
        }
    }

    pub(super) async fn pages_of_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>> {
        let mut uploads = Vec::new();
        let mut marker: Option<(String, String)> = None;
        loop {
            let mut call = Call::new(&self.core, Operation::ListMultipartUploads, Method::GET);
            call = call.query("uploads", "").query("encoding-type", "url").query("prefix", prefix);
            if let Some((key, id)) = &marker {
                call = call.query("key-marker", key.as_str()).query("upload-id-marker", id.as_str());
            }
            let answer = self.core.xml(&self.place, &call, "ListMultipartUploadsResult").await?;
            uploads.extend(read_uploads(&answer.body));
            if !answer.body.is_true("IsTruncated") {
                return Ok(uploads);
            }
            let key = answer.body.text_of("NextKeyMarker").map(key_reader(&answer.body));
            let next = key.map(|key| (key, answer.body.text_of("NextUploadIdMarker").unwrap_or("").to_owned()));
            if next.is_none() || next == marker {
                return Err(self.core.not_s3(&self.place, &call, "a listing that continues where it began"));
            }
            marker = next;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(xml: &str) -> ListPage {
        page(&Element::parse(xml.as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn aws() {
        let page = read(
            r#"<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix></Prefix><NextContinuationToken>1ueGcx+/=</NextContinuationToken><KeyCount>2</KeyCount><MaxKeys>2</MaxKeys><EncodingType>url</EncodingType><IsTruncated>true</IsTruncated><Contents><Key>a+b%2Bc%0A.txt</Key><LastModified>2024-03-01T10:00:00.123Z</LastModified><ETag>&quot;d41d8cd98f00b204e9800998ecf8427e&quot;</ETag><ChecksumAlgorithm>SHA1</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType><Size>5</Size><StorageClass>STANDARD</StorageClass></Contents><CommonPrefixes><Prefix>d%C3%A4r/</Prefix></CommonPrefixes></ListBucketResult>"#,
        );
        assert_eq!(page.entries[0].key, "a b+c\n.txt");
        assert!(page.entries[0].sha1 && page.entries[0].etag.md5().is_some());
        assert_eq!(page.prefixes, ["där/"]);
        assert_eq!(page.next.as_deref(), Some("t:1ueGcx+/="));
    }

    #[test]
    fn minio_and_garage() {
        let page = read(
            r#"<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix>x%2F</Prefix><KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><Delimiter>/</Delimiter><IsTruncated>false</IsTruncated><Contents><Key>x%2Fy%20z</Key><LastModified>2024-03-01T10:00:00.000Z</LastModified><ETag>"abc-2"</ETag><Size>7</Size><Owner><ID></ID><DisplayName></DisplayName></Owner><StorageClass>STANDARD</StorageClass></Contents><EncodingType>url</EncodingType></ListBucketResult>"#,
        );
        assert_eq!((page.entries[0].key.as_str(), page.entries[0].etag.as_str(), page.next), ("x/y z", "abc-2", None));
    }

    #[test]
    fn a_store_that_ignores_the_encoding() {
        let page = read(
            r#"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>100%25+x</Key><Size>1</Size></Contents></ListBucketResult>"#,
        );
        assert_eq!(page.entries[0].key, "100%25+x");
        assert_eq!(page.entries[0].etag.as_str(), "");
    }

    #[test]
    fn ceph_v1_without_a_marker() {
        let page = read(
            r#"<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Marker></Marker><MaxKeys>2</MaxKeys><IsTruncated>true</IsTruncated><Contents><Key>a</Key><Size>1</Size></Contents><CommonPrefixes><Prefix>b/</Prefix></CommonPrefixes></ListBucketResult>"#,
        );
        assert_eq!(page.next.as_deref(), Some("a:b/"));
        let marked = read(
            r#"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>true</IsTruncated><NextMarker>a%20b</NextMarker></ListBucketResult>"#,
        );
        assert_eq!(marked.next.as_deref(), Some("a:a b"));
        let stuck = Element::parse(b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>").unwrap();
        assert!(super::page(&stuck).is_err());
    }
}
