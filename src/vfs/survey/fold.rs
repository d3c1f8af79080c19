//! The pages of an undelimited listing, cut into the directories that they hold whole.

use std::cmp::Ordering;
use std::time::Instant;

use super::super::listing::{Listing, Merger};
use crate::s3::{ListEntry, ListPage};

/// Names of a directory that are gathered, at most: a larger one is listed by itself.
const NAMES: usize = 4000;
/// Bytes that the keys of one page's directories may take: a key may name some hundred of them.
const KEYS: usize = 4 << 20;

/// Takes the pages in turn.
///
/// The keys below a directory stand together, both in S3's order and in that of stores that list by directory (SeaweedFS): a directory
/// is whole once a key that is not of it follows, or nothing.
pub(super) struct Fold {
    /// Bytes of the listed prefix.
    root: usize,
    /// After this key the listing begins. The directories that lead to it have begun before, and are not whole.
    after: String,
    /// The directories of the last key, outermost first, below the listed prefix.
    open: Vec<Open>,
    /// The last directory that the listed prefix itself was seen to hold.
    last: Option<String>,
}

/// A directory whose end was not seen.
struct Open {
    key: String,
    /// When its first page was asked for.
    started: Instant,
    held: ListPage,
    /// The last directory in it.
    last: Option<String>,
    whole: bool,
}

/// The store's order is not one that pages can be cut in.
#[derive(Debug)]
pub(super) struct Disorder;

impl Fold {
    /// Of the listing of `root` that begins after `after`, both with their trailing slash.
    pub fn new(root: &str, after: String) -> Self {
        Self { root: root.len(), after, open: Vec::new(), last: None }
    }

    /// When the oldest page was asked for that something is gathered of.
    pub fn since(&self) -> Option<Instant> {
        self.open.first().map(|open| open.started)
    }

    /// Adds a page that was asked for at `started`. Gives what is whole by it, by key.
    pub fn push(&mut self, page: ListPage, started: Instant) -> Result<Vec<(String, Listing)>, Disorder> {
        let (mut whole, mut bytes) = (Vec::new(), 0);
        for entry in page.entries {
            if !is_after(&self.after, &entry.key) {
                return Err(Disorder);
            }
            let directory = entry.key.rfind('/').map_or(0, |at| at + 1);
            while let Some(open) = self.open.pop_if(|open| !entry.key.starts_with(&open.key)) {
                whole.extend(open.close());
            }
            let from = self.open.last().map_or(self.root, |open| open.key.len());
            for (at, _) in entry.key.get(from..directory).ok_or(Disorder)?.match_indices('/') {
                let key = &entry.key[..=from + at];
                self.enter(key, started)?;
                bytes += key.len();
            }
            if bytes > KEYS {
                return Err(Disorder);
            }
            if let Some(open) = self.open.last_mut() {
                open.add(entry);
            }
        }
        if page.next.is_none() {
            whole.extend(self.open.drain(..).rev().filter_map(Open::close));
        }
        Ok(whole)
    }

    fn enter(&mut self, key: &str, started: Instant) -> Result<(), Disorder> {
        let last = self.open.last_mut().map_or(&mut self.last, |open| &mut open.last);
        // A directory that was left is not entered again.
        if last.as_deref().is_some_and(|last| !is_after(last, key)) {
            return Err(Disorder);
        }
        *last = Some(key.to_owned());
        if let Some(open) = self.open.last_mut() {
            open.add_directory(key);
        }
        let whole = !self.after.starts_with(key);
        self.open.push(Open { key: key.to_owned(), started, held: ListPage::default(), last: None, whole });
        Ok(())
    }
}

impl Open {
    fn add(&mut self, entry: ListEntry) {
        self.make_room();
        if self.whole {
            self.held.entries.push(entry);
        }
    }

    fn add_directory(&mut self, key: &str) {
        self.make_room();
        if self.whole {
            self.held.prefixes.push(key.to_owned());
        }
    }

    fn make_room(&mut self) {
        if self.held.entries.len() + self.held.prefixes.len() >= NAMES {
            self.whole = false;
            self.held = ListPage::default();
        }
    }

    fn close(self) -> Option<(String, Listing)> {
        if !self.whole {
            return None;
        }
        let mut merger = Merger::new(&self.key);
        let entries = merger.push(self.held);
        Some((self.key, merger.listing(self.started, entries.into_iter().collect(), true)))
    }
}

/// `key` follows `other` in the order of bytes, or in that of path components.
fn is_after(other: &str, key: &str) -> bool {
    key > other || key.split('/').cmp(other.split('/')) == Ordering::Greater
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::s3::ETag;

    fn entry(key: &str) -> ListEntry {
        let last_modified = std::time::SystemTime::UNIX_EPOCH;
        ListEntry { key: key.to_owned(), size: 1, etag: ETag::new("e"), last_modified, storage_class: None, sha1: false }
    }

    /// What a listing of each directory alone would hold, by the names that it shows.
    fn by_directory(keys: &[String]) -> BTreeMap<String, BTreeSet<String>> {
        let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for key in keys {
            let mut from = 0;
            while let Some(at) = key[from..].find('/').map(|at| from + at + 1) {
                found.entry(key[..from].to_owned()).or_default().insert(key[from..at].to_owned());
                from = at;
                found.entry(key[..from].to_owned()).or_default();
            }
            found.entry(key[..from].to_owned()).or_default().insert(key[from..].to_owned());
        }
        found
    }

    fn names(listing: &Listing) -> BTreeSet<String> {
        let marker = listing.marker.then(String::new);
        let name =
            |entry: super::super::super::listing::Listed| format!("{}{}", entry.segment, if entry.object.is_some() { "" } else { "/" });
        listing.entries.iter().map(name).chain(marker).collect()
    }

    fn fold(root: &str, after: &str, keys: &[String], page: usize) -> Result<BTreeMap<String, BTreeSet<String>>, Disorder> {
        let mut fold = Fold::new(root, after.to_owned());
        let mut found = BTreeMap::new();
        let pages: Vec<&[String]> = keys.chunks(page).collect();
        for (n, keys) in pages.iter().enumerate() {
            let next = (n + 1 < pages.len()).then(String::new);
            let entries = keys.iter().map(|key| entry(key)).collect();
            for (key, listing) in fold.push(ListPage { entries, prefixes: Vec::new(), next }, Instant::now())? {
                assert!(found.insert(key, names(&listing)).is_none(), "a directory is whole once");
            }
        }
        Ok(found)
    }

    fn tree_order(keys: &mut [String]) {
        keys.sort_by(|one, other| one.split('/').cmp(other.split('/')));
    }

    proptest! {
        #[test]
        fn each_directory_is_as_if_listed_alone(
            mut keys in proptest::collection::btree_set("([ab-]{1,2}/){0,4}[ab-]{0,2}", 1..60).prop_map(|keys| keys.into_iter().map(|key| format!("w/{key}")).collect::<Vec<_>>()),
            page in 1..70_usize, by_tree in any::<bool>(), at in any::<prop::sample::Index>(),
        ) {
            if by_tree {
                tree_order(&mut keys);
            }
            let key = at.get(&keys).clone();
            let after = &key[..=key.rfind('/').unwrap()];
            let first = keys.iter().position(|key| key.starts_with(after)).unwrap();
            let rest: Vec<String> = keys[first..].iter().filter(|key| key.as_str() != after).cloned().collect();
            let found = fold("w/", after, &rest, page).unwrap();
            let expected: BTreeMap<_, _> = by_directory(&keys).into_iter()
                .filter(|(directory, _)| !after.starts_with(directory.as_str()) && rest.iter().any(|key| key.starts_with(directory.as_str())))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn what_begins_again_or_before_is_no_order() {
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>();
        assert!(fold("", "b/", &keys(&["a/x"]), 9).is_err(), "before what it begins after");
        assert!(fold("", "a/", &keys(&["b/x", "c/x", "b/y"]), 9).is_err());
        assert!(fold("", "a/", &keys(&["b/x", "c/x", "d/y"]), 9).is_ok());
    }

    #[test]
    fn a_large_directory_is_left_out_and_those_around_it_are_not() {
        let mut keys: Vec<String> = (0..NAMES + 10).map(|n| format!("w/d/{n:05}")).collect();
        keys.extend(["w/e/f".to_owned(), "w/e/g/h".to_owned()]);
        keys.insert(7, "w/d/00005x/y".to_owned());
        keys.sort();
        let found = fold("w/", "w/c/", &keys, 1000).unwrap();
        assert_eq!(found.into_keys().collect::<Vec<_>>(), ["w/d/00005x/", "w/e/", "w/e/g/"]);
    }
}
