//! Pages that wait, packed: what a name takes of memory is what it differs in from the one before, and some 30 bytes.
//!
//! One buffer holds a page, and is read from its beginning alone. Most of what waits is let go of in another order than it came: many
//! small allocations would leave holes behind that no page fits into.

use std::time::{Duration, SystemTime};

use super::super::{ETag, ListEntry, ListPage};

/// A common prefix: its name is all.
const PREFIX: u8 = 1;
const SHA1: u8 = 2;
/// Its class is not that of the entry before.
const CLASS: u8 = 4;
/// The ETag is an MD5.
const MD5: u8 = 8;
/// The ETag is an MD5 with a number of parts.
const PARTS: u8 = 16;

/// The names of a page, and what [`ListEntry`] tells of each; times before 1970 are 1970.
#[derive(Default)]
pub(super) struct Packed {
    bytes: Vec<u8>,
    next: Option<String>,
}

impl Packed {
    pub(super) fn of(page: &ListPage) -> Self {
        let mut packer = Packer::default();
        page.entries.iter().for_each(|entry| packer.entry(entry));
        page.prefixes.iter().for_each(|prefix| packer.name(PREFIX, prefix));
        packer.bytes.shrink_to_fit();
        Self { bytes: packer.bytes, next: page.next.clone() }
    }

    /// As it was packed.
    pub(super) fn unpacked(&self) -> ListPage {
        let mut page = ListPage { next: self.next.clone(), ..ListPage::default() };
        let mut reader = Reader { rest: &self.bytes };
        let (mut name, mut modified, mut class) = (String::new(), 0u64, "");
        while let Some(flags) = reader.byte() {
            let is = |flag| flags & flag != 0;
            name.truncate(reader.number() as usize);
            name.push_str(reader.text());
            if is(PREFIX) {
                page.prefixes.push(name.clone());
                continue;
            }
            let size = reader.number();
            modified = modified.wrapping_add(unfolded(reader.number()));
            if is(CLASS) {
                class = reader.text();
            }
            let etag = match is(MD5) {
                true => ETag::of_binary(reader.md5(), if is(PARTS) { reader.number() as u16 } else { 0 }),
                false => ETag::new(reader.text()),
            };
            page.entries.push(ListEntry {
                key: name.clone(),
                size,
                etag,
                last_modified: SystemTime::UNIX_EPOCH + Duration::from_nanos(modified),
                storage_class: (!class.is_empty()).then(|| class.to_owned()),
                sha1: is(SHA1),
            });
        }
        page
    }
}

/// Writes one row after the other, each with what the one before was.
#[derive(Default)]
struct Packer {
    bytes: Vec<u8>,
    name: String,
    modified: u64,
    class: String,
}

impl Packer {
    fn entry(&mut self, entry: &ListEntry) {
        let (binary, class) = (entry.etag.binary(), entry.storage_class.as_deref().unwrap_or_default());
        let mut flags = if entry.sha1 { SHA1 } else { 0 };
        flags |= if class == self.class { 0 } else { CLASS };
        flags |= binary.map_or(0, |(_, parts)| MD5 | if parts > 0 { PARTS } else { 0 });
        self.name(flags, &entry.key);
        self.number(entry.size);
        let modified = entry.last_modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let modified = u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX);
        self.number(folded(modified.wrapping_sub(self.modified)));
        self.modified = modified;
        if flags & CLASS != 0 {
            self.text(class);
            class.clone_into(&mut self.class);
        }
        match binary {
            Some((md5, parts)) => {
                self.bytes.extend(md5);
                if parts > 0 {
                    self.number(parts.into());
                }
            }
            None => self.text(entry.etag.as_str()),
        }
    }

    fn name(&mut self, flags: u8, name: &str) {
        let mut shared = name.bytes().zip(self.name.bytes()).take_while(|(one, other)| one == other).count();
        while !name.is_char_boundary(shared) {
            shared -= 1;
        }
        self.bytes.push(flags);
        self.number(shared as u64);
        self.text(name.get(shared..).unwrap_or_default());
        name.clone_into(&mut self.name);
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.bytes.extend_from_slice(text.as_bytes());
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self, mut number: u64) {
        while number > 0x7f {
            self.bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.bytes.push(number as u8);
    }
}

/// Reads what [`Packer`] wrote.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*byte)
    }

    fn number(&mut self) -> u64 {
        let (mut number, mut shift) = (0, 0);
        while let Some(byte) = self.byte() {
            number |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 || shift > 63 {
                break;
            }
        }
        number
    }

    fn text(&mut self) -> &'a str {
        let length = self.number() as usize;
        let (text, rest) = self.rest.split_at_checked(length).unwrap_or_default();
        self.rest = rest;
        std::str::from_utf8(text).unwrap_or_default()
    }

    fn md5(&mut self) -> [u8; 16] {
        let (md5, rest) = self.rest.split_first_chunk().unwrap_or((&[0; 16], &[]));
        self.rest = rest;
        *md5
    }
}

/// A difference in either direction as a number that is small where the difference is.
fn folded(difference: u64) -> u64 {
    difference << 1 ^ ((difference as i64) >> 63) as u64
}

fn unfolded(number: u64) -> u64 {
    number >> 1 ^ (number & 1).wrapping_neg()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::s3::LIST_MOST;

    prop_compose! {
        fn any_entry()(
            key in "[a-bé/]{0,6}", size: u64, etag in prop_oneof!["[0-9a-f]{32}", "[0-9a-f]{32}-[0-9]{1,6}", "[0-9A-F]{32}", "[a-z-]{0,40}"],
            modified in 0..u64::MAX, class in proptest::option::of(prop_oneof!["STANDARD", "GLACIER"]), sha1: bool,
        ) -> ListEntry {
            let last_modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(modified);
            ListEntry { key, size, etag: ETag::new(etag), last_modified, storage_class: class, sha1 }
        }
    }

    proptest! {
        #[test]
        fn what_is_packed_is_what_was_listed(
            entries in proptest::collection::vec(any_entry(), 0..20), prefixes in proptest::collection::vec("[a-bé]{0,4}/", 0..5),
            next in proptest::option::of("[a-z]{0,9}"),
        ) {
            let page = ListPage { entries, prefixes, next };
            prop_assert_eq!(format!("{:?}", Packed::of(&page).unpacked()), format!("{page:?}"));
        }
    }

    #[test]
    fn a_name_that_waits_takes_few_bytes() {
        let entry = |n: usize| ListEntry {
            key: format!("some/folder/IMG_{n:06}.jpg"),
            size: 3_000_000 + n as u64,
            etag: ETag::new(format!("{:032x}", (n as u128 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C834))),
            last_modified: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_000 + n as u64 * 86_461_001 % 77_777_777),
            storage_class: Some("STANDARD".to_owned()),
            sha1: false,
        };
        let page = ListPage { entries: (0..LIST_MOST).map(entry).collect(), ..ListPage::default() };
        let packed = Packed::of(&page);
        assert!(packed.bytes.capacity() <= 36 * LIST_MOST, "{}", packed.bytes.capacity());
    }
}
