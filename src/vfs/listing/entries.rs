//! The entries of a listing, packed: what one takes of memory is its name and 48 bytes.

use std::cmp::Ordering;
use std::time::{Duration, SystemTime};

use super::{Listed, ListedObject};
use crate::s3::ETag;

const HIDDEN: u8 = 1;
const OBJECT: u8 = 2;
const ARCHIVED: u8 = 4;
const SHA1: u8 = 8;
/// The ETag is no MD5, with or without a number of parts: its text follows the name's.
const SPELLED: u8 = 16;

/// Listed names in a row.
#[derive(Clone, Debug, Default)]
pub struct Entries {
    text: String,
    rows: Vec<Row>,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    /// Where its text begins.
    at: usize,
    size: u64,
    /// Nanoseconds since 1970.
    modified: u64,
    md5: [u8; 16],
    /// Bytes of the name.
    name: u16,
    /// Bytes of a spelled ETag, else the number of parts; 0: not uploaded in parts.
    etag: u16,
    flags: u8,
}

impl Row {
    fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

impl Entries {
    /// How many.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Adds one. S3's keys are of at most 1024 bytes; what is longer than 65,535 is left out, ETags likewise.
    pub fn push(&mut self, entry: &Listed) {
        let Ok(name) = u16::try_from(entry.segment.len()) else { return };
        let mut row = Row { at: self.text.len(), size: 0, modified: 0, md5: [0; 16], name, etag: 0, flags: 0 };
        let mut spelled = "";
        row.flags |= if entry.hidden { HIDDEN } else { 0 };
        if let Some(object) = &entry.object {
            row.flags |= OBJECT | if object.archived { ARCHIVED } else { 0 } | if object.sha1 { SHA1 } else { 0 };
            row.size = object.size;
            let modified = object.modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            row.modified = u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX);
            if let Some((md5, parts)) = object.etag.binary() {
                (row.md5, row.etag) = (md5, parts);
            } else {
                spelled = object.etag.as_str();
                let Ok(length) = u16::try_from(spelled.len()) else { return };
                row.etag = length;
                row.flags |= SPELLED;
            }
        }
        self.text.push_str(&entry.segment);
        self.text.push_str(spelled);
        self.rows.push(row);
    }

    /// By segment, the hidden one after the directory; and gives back the memory that it does not need.
    pub fn sort(&mut self) {
        let text = &self.text;
        let order = |row: &Row| (segment_of(text, row), row.is(HIDDEN));
        if !self.rows.is_sorted_by(|one, other| order(one) <= order(other)) {
            self.rows.sort_unstable_by(|one, other| order(one).cmp(&order(other)));
        }
        self.rows.shrink_to_fit();
        self.text.shrink_to_fit();
    }

    /// What stands in the key.
    pub fn segment(&self, at: usize) -> &str {
        self.rows.get(at).map_or("", |row| segment_of(&self.text, row))
    }

    /// One of them; of what is not there an empty name.
    pub fn get(&self, at: usize) -> Listed {
        self.rows.get(at).map_or_else(|| Listed { segment: "".into(), hidden: false, object: None }, |row| self.unpacked(row))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Listed> {
        self.rows.iter().map(|row| self.unpacked(row))
    }

    /// Bytes of an object that is shown under its own name and can be read as it is; `None` of one that is archived, or a link perhaps.
    pub fn file_size(&self, at: usize) -> Option<u64> {
        let row = self.rows.get(at)?;
        (row.is(OBJECT) && !row.is(HIDDEN) && !row.is(ARCHIVED) && !row.is(SHA1)).then_some(row.size)
    }

    /// Some are objects.
    pub fn has_objects(&self) -> bool {
        self.rows.iter().any(|row| row.is(OBJECT))
    }

    /// Where a name of this segment stands; those are sorted.
    pub fn position(&self, segment: &str, hidden: bool) -> Option<usize> {
        let order = |row: &Row| segment_of(&self.text, row).cmp(segment).then(row.is(HIDDEN).cmp(&hidden));
        self.rows.binary_search_by(order).ok()
    }

    /// The first that is not before this segment; those are sorted.
    pub fn from(&self, segment: &str) -> usize {
        self.rows.partition_point(|row| segment_of(&self.text, row).cmp(segment) == Ordering::Less)
    }

    fn unpacked(&self, row: &Row) -> Listed {
        let object = row.is(OBJECT).then(|| ListedObject {
            size: row.size,
            etag: self.etag(row),
            modified: SystemTime::UNIX_EPOCH + Duration::from_nanos(row.modified),
            archived: row.is(ARCHIVED),
            sha1: row.is(SHA1),
        });
        Listed { segment: segment_of(&self.text, row).into(), hidden: row.is(HIDDEN), object }
    }

    fn etag(&self, row: &Row) -> ETag {
        if row.is(SPELLED) {
            let from = row.at + usize::from(row.name);
            return ETag::new(self.text.get(from..from + usize::from(row.etag)).unwrap_or_default());
        }
        ETag::of_binary(row.md5, row.etag)
    }
}

impl FromIterator<Listed> for Entries {
    fn from_iter<I: IntoIterator<Item = Listed>>(entries: I) -> Self {
        let mut packed = Self::default();
        entries.into_iter().for_each(|entry| packed.push(&entry));
        packed
    }
}

fn segment_of<'a>(text: &'a str, row: &Row) -> &'a str {
    text.get(row.at..row.at + usize::from(row.name)).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_etag() -> impl Strategy<Value = String> {
        prop_oneof!["[0-9a-f]{32}", "[0-9a-f]{32}-[0-9]{1,6}", "[0-9a-fA-F]{32}", "[0-9a-f]{30,34}", "[a-z-]{0,40}"]
    }

    prop_compose! {
        fn any_entry()(segment in "[a-é/]{0,9}", hidden: bool, object in proptest::option::of((any::<u64>(), any_etag(), 0..u64::MAX / 2, any::<bool>(), any::<bool>()))) -> Listed {
            let object = object.map(|(size, etag, modified, archived, sha1)| ListedObject {
                size, etag: ETag::new(etag), modified: SystemTime::UNIX_EPOCH + Duration::from_nanos(modified), archived, sha1,
            });
            Listed { segment: segment.into(), hidden, object }
        }
    }

    proptest! {
        #[test]
        fn what_is_packed_is_what_was_listed(entries in proptest::collection::vec(any_entry(), 0..20)) {
            let mut packed: Entries = entries.iter().cloned().collect();
            prop_assert_eq!(format!("{:?}", packed.iter().collect::<Vec<_>>()), format!("{entries:?}"));
            packed.sort();
            for entry in &entries {
                let at = packed.position(&entry.segment, entry.hidden).unwrap();
                prop_assert_eq!((packed.segment(at), packed.get(at).hidden), (&*entry.segment, entry.hidden));
                prop_assert!(packed.from(&entry.segment) <= at);
            }
            prop_assert!(packed.iter().map(|entry| (entry.segment, entry.hidden)).is_sorted());
        }
    }

    #[test]
    fn a_name_takes_its_bytes_and_few_more() {
        assert!(size_of::<Row>() <= 48);
        let object = ListedObject { size: 1, etag: ETag::new("0".repeat(32)), modified: SystemTime::now(), archived: false, sha1: false };
        let mut entries: Entries =
            (0..1000).map(|n| Listed { segment: format!("{n:05}").into(), hidden: false, object: Some(object.clone()) }).collect();
        entries.sort();
        assert_eq!(entries.text.capacity() + entries.rows.capacity() * size_of::<Row>(), 1000 * (5 + 48));
    }
}
