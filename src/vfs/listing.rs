//! Listings turned into directory entries: an object and a prefix of one name, names across page borders, escapes.

use std::time::{Instant, SystemTime};

mod entries;

pub use entries::Entries;

use super::path::{Meaning, hidden_name_of, name_of};
use crate::s3::{ETag, ListEntry, ListPage, is_archive_class};

/// Names that one listing may hold before it is no longer kept whole: about 7 MB of memory.
pub const KEEP_MOST: usize = 100_000;

/// One name of a directory, as the store lists it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// What stands in the key.
    pub segment: Box<str>,
    /// An object that a directory of the same segment hides.
    pub hidden: bool,
    /// The object, or `None` for a directory.
    pub object: Option<ListedObject>,
}

/// An object of a listing.
#[derive(Clone, Debug)]
pub struct ListedObject {
    /// Bytes.
    pub size: u64,
    /// Entity tag.
    pub etag: ETag,
    /// LastModified.
    pub modified: SystemTime,
    /// Must be restored before it can be read.
    pub archived: bool,
    /// Written with checksum algorithm SHA1: a symbolic link, perhaps (promise 29).
    pub sha1: bool,
}

impl Listed {
    /// The name that shows it.
    pub fn name(&self) -> std::ffi::OsString {
        if self.hidden { hidden_name_of(&self.segment) } else { name_of(&self.segment) }
    }
}

/// What a directory held when it was listed.
#[derive(Debug)]
pub struct Listing {
    /// When the first page was asked for.
    pub started: Instant,
    /// Sorted by segment, the hidden one after the directory.
    pub entries: Entries,
    /// Nothing is missing.
    pub complete: bool,
    /// A marker object stands for the directory itself.
    pub marker: bool,
    /// Of an incomplete one: no name whose `segment/` sorts after it is spoken of.
    covered: String,
}

/// What a listing says of a name.
pub enum Answer {
    /// It holds it.
    Found(Listed),
    /// It does not exist.
    Absent,
    /// Not covered.
    Unknown,
}

impl Listing {
    /// Of a directory that was just made.
    pub fn empty(started: Instant) -> Self {
        Self { started, entries: Entries::default(), complete: true, marker: true, covered: String::new() }
    }

    /// Where an object, or a directory, of this segment stands.
    pub fn position(&self, segment: &str) -> Option<usize> {
        self.entries.position(segment, false)
    }

    /// What it says of a name's meaning.
    pub fn find(&self, meaning: &Meaning, name: &std::ffi::OsStr) -> Answer {
        let (segment, hidden) = match meaning {
            Meaning::Segment(segment) => (segment, false),
            Meaning::Hidden(segment) => (segment, true),
            Meaning::Shortened { prefix } => {
                let from = self.entries.from(prefix);
                let beginning = (from..self.entries.len()).take_while(|at| self.entries.segment(*at).starts_with(prefix.as_str()));
                return match beginning.map(|at| self.entries.get(at)).find(|entry| entry.name() == name) {
                    Some(entry) => Answer::Found(entry),
                    None if self.complete => Answer::Absent,
                    None => Answer::Unknown,
                };
            }
        };
        match self.entries.position(segment, hidden) {
            Some(at) => Answer::Found(self.entries.get(at)),
            None if self.complete || format!("{segment}/") <= self.covered => Answer::Absent,
            None => Answer::Unknown,
        }
    }
}

/// Joins the pages of one delimited listing into entries.
///
/// A store lists `a`, then `a!…`, `a-…`, `a.…`, and only then `a/`: whether `a` is hidden by a directory may be known pages
/// later. Such an object is held back; at most a handful can be in doubt at a page's end, because each is a beginning of the
/// last key.
#[derive(Clone, Debug, Default)]
pub struct Merger {
    prefix_len: usize,
    doubtful: Vec<Listed>,
    marker: bool,
    last: String,
}

impl Merger {
    /// For a listing of `prefix`, delimited.
    pub fn new(prefix: &str) -> Self {
        Self { prefix_len: prefix.len(), ..Self::default() }
    }

    /// Entries that are certain after this page, sorted.
    pub fn push(&mut self, page: ListPage) -> Vec<Listed> {
        let last_page = page.next.is_none();
        let mut directories: Vec<Box<str>> =
            page.prefixes.iter().filter_map(|prefix| segment_of(prefix.strip_suffix('/')?, self.prefix_len)).collect();
        directories.sort_unstable();
        directories.dedup();
        let last = page.entries.iter().map(|e| e.key.as_str()).chain(page.prefixes.iter().map(String::as_str)).max();
        let last = last.and_then(|last| last.get(self.prefix_len..)).unwrap_or_default().to_owned();

        let mut entries: Vec<Listed> = std::mem::take(&mut self.doubtful);
        for entry in page.entries {
            match segment_of(&entry.key, self.prefix_len) {
                Some(segment) if segment.is_empty() => self.marker_object(entry, &mut entries),
                Some(segment) => entries.push(Listed { segment, hidden: false, object: Some(ListedObject::of(entry)) }),
                None => {}
            }
        }
        for entry in entries.iter_mut().filter(|entry| !entry.hidden) {
            entry.hidden = directories.binary_search(&entry.segment).is_ok();
        }
        if !last_page {
            let doubtful = |entry: &Listed| {
                !entry.hidden && entry.object.is_some() && !entry.segment.is_empty() && format!("{}/", entry.segment) > last
            };
            (self.doubtful, entries) = entries.into_iter().partition(doubtful);
        }
        entries.extend(directories.into_iter().map(|segment| Listed { segment, hidden: false, object: None }));
        entries.sort_unstable_by(|a, b| (&a.segment, a.hidden).cmp(&(&b.segment, b.hidden)));
        self.last = last;
        entries
    }

    /// An object whose key is the listed prefix itself: the directory's marker, or, when it has content, a file without a name.
    fn marker_object(&mut self, entry: ListEntry, entries: &mut Vec<Listed>) {
        self.marker = true;
        if entry.size > 0 {
            entries.push(Listed { segment: "".into(), hidden: true, object: Some(ListedObject::of(entry)) });
        }
    }

    /// A listing of all entries so far.
    pub fn listing(&self, started: Instant, mut entries: Entries, complete: bool) -> Listing {
        entries.sort();
        Listing { started, entries, complete, marker: self.marker, covered: self.last.clone() }
    }
}

fn segment_of(key: &str, prefix_len: usize) -> Option<Box<str>> {
    key.get(prefix_len..).filter(|rest| !rest.contains('/')).map(Into::into)
}

impl ListedObject {
    /// Of a listing's entry.
    pub fn of(entry: ListEntry) -> Self {
        let archived = is_archive_class(entry.storage_class.as_deref());
        Self { size: entry.size, etag: entry.etag, modified: entry.last_modified, archived, sha1: entry.sha1 }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ffi::OsStr;

    use super::super::path::meaning_of;
    use super::*;

    fn page(keys: &[&str], prefixes: &[&str], more: bool) -> ListPage {
        let entry = |key: &&str| ListEntry {
            key: (*key).into(),
            size: 1,
            etag: ETag::new("e"),
            last_modified: SystemTime::UNIX_EPOCH,
            storage_class: None,
            sha1: false,
        };
        ListPage {
            entries: keys.iter().map(entry).collect(),
            prefixes: prefixes.iter().map(|p| (*p).into()).collect(),
            next: more.then(|| "more".into()),
        }
    }

    fn names(entries: &[Listed]) -> Vec<String> {
        entries.iter().map(|entry| entry.name().into_string().unwrap() + if entry.object.is_none() { "/" } else { "" }).collect()
    }

    #[test]
    fn a_directory_hides_the_file_of_its_name() {
        assert_eq!(names(&Merger::new("p/").push(page(&["p/a", "p/a-b"], &["p/a/"], false))), ["a/", "a%s3file", "a-b"]);
    }

    #[test]
    fn a_file_whose_directory_is_pages_later_is_held_back() {
        let mut merger = Merger::new("");
        assert_eq!(names(&merger.push(page(&["Z", "a", "a-1"], &[], true))), ["Z"]);
        assert_eq!(names(&merger.push(page(&["a-2", "a.x"], &[], true))), ["a-1", "a-2"], "a.x is in doubt too");
        assert_eq!(names(&merger.push(page(&["b"], &["a/"], false))), ["a/", "a%s3file", "a.x", "b"]);
    }

    #[test]
    fn an_incomplete_listing_knows_what_it_covers() {
        let mut merger = Merger::new("");
        let entries = merger.push(page(&["a", "b", "c"], &[], true));
        let listing = merger.listing(Instant::now(), entries.into_iter().collect(), false);
        let ask = |name: &str| listing.find(&meaning_of(OsStr::new(name)).unwrap(), OsStr::new(name));
        assert!(matches!(ask("a"), Answer::Found(_)));
        assert!(matches!(ask("aa"), Answer::Absent));
        assert!(matches!(ask("d"), Answer::Unknown));
        assert!(matches!(ask("c"), Answer::Unknown), "c/ may follow");
    }
}
