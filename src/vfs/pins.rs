//! What is pinned (`packmule cache pin`) is fetched before anybody reads it, and is read from the cache while the store does not
//! answer: names and versions are then those that the keeper listed last, with what this mount saw and did since. Everything else
//! waits for the store (promise 22).

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::deadline::waited_in_vain;
use super::error::{Error, Result};
use super::inode::{Object, Place};
use super::listing::{Answer, Listed, ListedObject, Listing};
use super::path::Meaning;
use super::{Ino, Vfs};
use crate::cache::{EntryId, ObjectVersion, Pin};
use crate::s3::{ListEntry, ListPage, Store};

mod keeper;

/// A store that has not answered for so long is silent: what is pinned is read from the cache.
const SILENT: Duration = Duration::from_secs(5);
/// Who waited for the store in vain a moment ago waits no longer than this.
const SHORT: Duration = Duration::from_secs(2);

/// What this mount knows of what is pinned.
#[derive(Default)]
pub(super) struct Pins {
    /// Anything is: else nobody takes a lock.
    any: AtomicBool,
    kept: Mutex<BTreeMap<Pin, Kept>>,
    /// Buckets whose store is silent, since when.
    silent: Mutex<HashMap<String, Instant>>,
    /// A pin is new, or the store answers again: what is pinned is listed.
    wake: Notify,
    /// This mount changed something in a pin: it knows what, and lists nothing for it.
    changed: Notify,
    /// Something was listed: what is missing of it is brought.
    bring: Notify,
    /// One change at a time.
    turn: tokio::sync::Mutex<()>,
}

/// One pin's state.
#[derive(Default)]
struct Kept {
    content: Content,
    /// The bucket, once it was found.
    store: Option<Arc<dyn Store>>,
    /// Why the last pass ended early.
    trouble: Option<String>,
    /// All of the content was asked for.
    passed: bool,
    /// Objects of the content that `cache_size` has no room for.
    too_much: u64,
}

/// What a pin holds as far as this mount knows.
#[derive(Clone, Default)]
struct Content {
    snapshot: Option<Arc<Snapshot>>,
    /// What this mount made and removed since the snapshot, and when.
    changes: BTreeMap<String, (Instant, Option<Member>)>,
}

/// What a pin held when it was listed.
struct Snapshot {
    started: Instant,
    objects: BTreeMap<String, Member>,
}

/// An object of a pin, and the id of its version in the cache: what is shown of a pin, and what is missing, is asked of the whole pin
/// again and again.
#[derive(Clone, Debug)]
struct Member {
    entry: ListEntry,
    id: EntryId,
}

/// A pin, as commands show it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinReport {
    /// Bucket.
    pub bucket: String,
    /// Prefix, or key of one object.
    pub key: String,
    /// Objects; none before it was listed.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that are here whole.
    pub kept_files: u64,
    /// Bytes that are here.
    pub kept_bytes: u64,
    /// Objects that `cache_size` has no room for.
    pub too_much: u64,
    /// It was listed since the mount.
    pub listed: bool,
    /// All that could be brought was.
    pub settled: bool,
    /// Why the rest is not here.
    pub trouble: Option<String>,
    /// Seconds since the store answered last, where it is silent: the pin is read from the cache.
    pub silent_seconds: Option<u64>,
}

impl PinReport {
    /// `s3://bucket/key` on one line, whatever the key.
    pub fn shown(&self) -> String {
        Pin { bucket: self.bucket.clone(), key: self.key.clone() }.shown()
    }
}

/// A bucket and a key below which, or to which, something is pinned.
pub(super) struct Covered {
    pub bucket: String,
    key: String,
}

/// What a name is that the store is silent about.
#[derive(Debug)]
enum Known {
    Directory,
    Object(ListedObject),
    Nothing,
}

impl Pins {
    /// It is pinned, lies in what is pinned, or leads to it.
    fn covers(&self, bucket: &str, key: &str) -> bool {
        let leads =
            |pin: &Pin| pin.bucket == bucket && (key.is_empty() || pin.key.strip_prefix(key).is_some_and(|rest| rest.starts_with('/')));
        self.kept.lock().keys().any(|pin| pin.holds(bucket, key) || leads(pin))
    }

    /// It is pinned, or lies in what is.
    fn holds(&self, bucket: &str, key: &str) -> bool {
        self.kept.lock().keys().any(|pin| pin.holds(bucket, key))
    }

    /// What the newest pin that was listed says, which holds all of this folder or this key, and when it was listed.
    fn ask<T>(&self, bucket: &str, key: &str, of: impl FnOnce(&Content) -> T) -> Option<(Instant, T)> {
        let kept = self.kept.lock();
        let holding = kept.iter().filter(|(pin, _)| pin.holds(bucket, key)).map(|(_, kept)| &kept.content);
        let (started, newest) =
            holding.filter_map(|content| Some((content.snapshot.as_ref()?.started, content))).max_by_key(|(started, _)| *started)?;
        Some((started, of(newest)))
    }

    fn store(&self, bucket: &str) -> Option<Arc<dyn Store>> {
        self.kept.lock().iter().filter(|(pin, _)| pin.bucket == bucket).find_map(|(_, kept)| kept.store.clone())
    }

    fn is_silent(&self, bucket: &str) -> bool {
        self.silent.lock().contains_key(bucket)
    }
}

impl Member {
    fn new(bucket: &str, entry: ListEntry) -> Self {
        let id = EntryId::of(&version_of(bucket, &entry));
        Self { entry, id }
    }
}

impl Content {
    /// What is known below a prefix, in no order: as it was listed, with what this mount has done since.
    fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a Member> {
        let in_prefix = move |key: &String| key.starts_with(prefix);
        let listed = self
            .snapshot
            .iter()
            .flat_map(move |snapshot| snapshot.objects.range(prefix.to_owned()..).take_while(move |(key, _)| in_prefix(key)));
        let listed = listed.filter(|(key, _)| !self.changes.contains_key(*key)).map(|(_, member)| member);
        let made = self.changes.range(prefix.to_owned()..).take_while(move |(key, _)| in_prefix(key));
        listed.chain(made.filter_map(|(_, (_, member))| member.as_ref()))
    }

    fn object(&self, key: &str) -> Option<&ListEntry> {
        let member = match self.changes.get(key) {
            Some((_, change)) => change.as_ref(),
            None => self.snapshot.as_ref()?.objects.get(key),
        };
        member.map(|member| &member.entry)
    }

    /// What a name is, less what waits to be deleted.
    fn known(&self, key: &str, hidden: impl Fn(&str) -> bool) -> Known {
        if self.below(&format!("{key}/")).any(|member| !hidden(&member.entry.key)) {
            return Known::Directory;
        }
        match self.object(key).filter(|_| !hidden(key)) {
            Some(entry) => Known::Object(ListedObject::of(entry.clone())),
            None => Known::Nothing,
        }
    }

    /// A page of a folder, whole.
    fn page(&self, prefix: &str) -> ListPage {
        let mut page = ListPage::default();
        let mut entries: Vec<&ListEntry> = self.below(prefix).map(|member| &member.entry).collect();
        entries.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        for entry in entries {
            match entry.key[prefix.len()..].split_once('/') {
                Some((folder, _)) => {
                    let folder = format!("{prefix}{folder}/");
                    if page.prefixes.last() != Some(&folder) {
                        page.prefixes.push(folder);
                    }
                }
                None => page.entries.push(entry.clone()),
            }
        }
        page
    }
}

/// What the cache keeps of it.
fn version_of(bucket: &str, entry: &ListEntry) -> ObjectVersion {
    ObjectVersion { bucket: bucket.to_owned(), key: entry.key.clone(), etag: entry.etag.clone(), size: entry.size, version_id: None }
}

impl Vfs {
    /// Where a name lies that is pinned or leads to what is.
    pub(super) fn covered(&self, parent: Ino, meaning: &Meaning) -> Option<Covered> {
        if !self.pins.any.load(Ordering::Relaxed) {
            return None;
        }
        let Meaning::Segment(segment) = meaning else { return None };
        let (bucket, key) = if self.is_account(parent) {
            (segment.clone(), String::new())
        } else {
            let place = self.place_below(parent, segment, false).ok()?;
            (place.store.bucket().to_owned(), place.key)
        };
        self.pins.covers(&bucket, &key).then_some(Covered { bucket, key })
    }

    /// The store's answer; `None` where it is silent.
    pub(super) async fn unless_silent<T>(&self, bucket: &str, asked: impl Future<Output = Result<T>> + Send) -> Option<Result<T>> {
        if self.pins.is_silent(bucket) {
            return None;
        }
        let limit = if waited_in_vain(self) { SHORT } else { SILENT };
        match tokio::time::timeout(limit, asked).await {
            Ok(Err(Error::TimedOut | Error::HostUnreachable)) | Err(_) => {
                self.note_silent(bucket);
                None
            }
            Ok(answer) => Some(answer),
        }
    }

    /// What the name is as far as the keeper knows. An error where it knows nothing of it.
    pub(super) async fn resolve_pinned(&self, parent: Ino, name: &OsStr, covered: &Covered) -> Result<Ino> {
        const SILENCE: Error = Error::TimedOut;
        let Covered { bucket, key } = covered;
        let here = self.table.lock().child(parent, name);
        if self.is_account(parent) {
            let store = self.pins.store(bucket).ok_or(SILENCE)?;
            return Ok(self.take_bucket(parent, name.to_owned(), bucket, Instant::now(), &store));
        }
        let segment = key.rsplit('/').next().unwrap_or_default().to_owned();
        let place = self.place_below(parent, &segment, false)?;
        // A listing of the folder that is newer than the pin's says more.
        let listing = self.newest_listing(parent);
        let hidden = |key: &str| self.writeback.is_deleted(bucket, key, Instant::now());
        let of_pin = self.pins.ask(bucket, key, |content| content.known(key, hidden));
        let of_pin = of_pin.or_else(|| self.pins.ask(bucket, &format!("{key}/"), |content| content.known(key, hidden)));
        let (started, known) = match (of_pin, listing) {
            (Some((listed, _)), Some(listing)) if listing.started > listed => {
                match listing.find(&Meaning::Segment(segment.clone()), name) {
                    Answer::Found(Listed { object: Some(object), .. }) => (listing.started, Known::Object(object)),
                    Answer::Found(_) => (listing.started, Known::Directory),
                    Answer::Absent => (listing.started, Known::Nothing),
                    Answer::Unknown => return here.ok_or(SILENCE),
                }
            }
            (Some(known), _) => known,
            (None, _) if self.pins.holds(bucket, key) || self.pins.holds(bucket, &format!("{key}/")) => return here.ok_or(SILENCE),
            // It leads to a pin.
            (None, _) => return Ok(here.unwrap_or_else(|| self.take_directory(parent, name.to_owned(), &segment, Instant::now(), None))),
        };
        if self.is_removed_since(parent, name, started) {
            return Err(Error::NoEntry);
        }
        match known {
            Known::Directory => {
                let row = self.recall_directory(&Place { store: place.store, key: format!("{key}/") }).await;
                Ok(self.take_directory(parent, name.to_owned(), &segment, started, row))
            }
            Known::Object(object) => {
                let row = self.memory.get(bucket, key, &object.etag, object.modified).await;
                if row.is_none() && self.may_be_link(&object) {
                    return here.ok_or(SILENCE);
                }
                Ok(self.take_listed(parent, name.to_owned(), &segment, &object, row, started))
            }
            // The mount has seen it since.
            Known::Nothing => match here.filter(|ino| self.is_seen_since(*ino, started)) {
                Some(ino) => Ok(ino),
                None => self.now_absent(parent, name, started),
            },
        }
    }

    fn is_seen_since(&self, ino: Ino, started: Instant) -> bool {
        self.table.lock().get(ino).is_some_and(|node| node.linked && node.checked.is_some_and(|at| at > started))
    }

    /// What a folder was listed as last, however long that is ago.
    pub(super) fn newest_listing(&self, dir: Ino) -> Option<Arc<Listing>> {
        self.table.lock().dir(dir).and_then(|state| state.listing.clone()).filter(|listing| listing.complete)
    }

    /// The page that a pinned folder begins with, and when it was listed, where the store is silent.
    pub(super) fn pinned_page(&self, place: &Place) -> Option<(Instant, ListPage)> {
        let (bucket, key) = (place.store.bucket(), &place.key);
        let (started, mut page) = self.pins.ask(bucket, key, |content| content.page(key))?;
        self.writeback.hide_deleted(bucket, Instant::now(), &mut page);
        Some((started, page))
    }

    /// The store of this bucket is silent, and that matters.
    pub(super) fn is_silent(&self, bucket: &str) -> bool {
        self.pins.any.load(Ordering::Relaxed) && self.pins.is_silent(bucket)
    }

    /// It is pinned.
    pub(super) fn is_pinned(&self, bucket: &str, key: &str) -> bool {
        self.pins.any.load(Ordering::Relaxed) && self.pins.holds(bucket, key)
    }

    /// An object is no more under this key.
    pub(super) fn forget_object(&self, place: &Place) {
        self.memory.remove(place.store.bucket(), &place.key);
        self.note_change(place, None);
    }

    /// This mount made an object, or another version: it is kept too.
    pub(super) fn note_made(&self, place: &Place, object: &Object) {
        let entry = ListEntry {
            key: place.key.clone(),
            size: object.size,
            etag: object.etag.clone(),
            last_modified: object.last_modified,
            storage_class: None,
            sha1: false,
        };
        self.note_change(place, Some(entry));
    }

    fn note_change(&self, place: &Place, entry: Option<ListEntry>) {
        if !self.pins.any.load(Ordering::Relaxed) {
            return;
        }
        let bucket = place.store.bucket();
        let change = entry.map(|entry| Member::new(bucket, entry));
        for (_, kept) in self.pins.kept.lock().iter_mut().filter(|(pin, _)| pin.holds(bucket, &place.key)) {
            kept.content.changes.insert(place.key.clone(), (Instant::now(), change.clone()));
            kept.passed = false;
            self.pins.changed.notify_one();
        }
    }

    fn note_silent(&self, bucket: &str) {
        if self.pins.silent.lock().insert(bucket.to_owned(), Instant::now()).is_none() {
            tracing::warn!("s3://{bucket} does not answer: what is pinned is read from the cache until it does");
            self.await_answer(bucket.to_owned());
        }
    }

    /// Pins, as commands show them. Blocks: of each of their objects it is looked how much is here.
    pub fn pins(&self) -> Vec<PinReport> {
        let silent = self.pins.silent.lock().clone();
        let kept: Vec<(PinReport, Content)> = {
            let kept = self.pins.kept.lock();
            let report = |(pin, kept): (&Pin, &Kept)| PinReport {
                bucket: pin.bucket.clone(),
                key: pin.key.clone(),
                listed: kept.content.snapshot.is_some(),
                settled: kept.passed,
                trouble: kept.trouble.clone(),
                too_much: kept.too_much,
                silent_seconds: silent.get(&pin.bucket).map(|since| (since.elapsed() + SILENT).as_secs()),
                ..PinReport::default()
            };
            kept.iter().map(|one| (report(one), one.1.content.clone())).collect()
        };
        let counted = |(mut report, content): (PinReport, Content)| {
            for Member { entry, id } in content.below("").filter(|_| report.listed) {
                let held = self.cache.held(*id, entry.size);
                report.files += 1;
                report.bytes += entry.size;
                report.kept_bytes += held;
                report.kept_files += u64::from(held == entry.size);
            }
            report
        };
        kept.into_iter().map(counted).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::ETag;

    fn entry(key: &str) -> ListEntry {
        let last_modified = std::time::SystemTime::UNIX_EPOCH;
        ListEntry { key: key.into(), size: 1, etag: ETag::new("e"), last_modified, storage_class: None, sha1: false }
    }

    /// Listed with these keys, and then changed.
    fn content(keys: &[&str], made: &[&str], removed: &[&str]) -> Content {
        let member = |key: &str| Member::new("b", entry(key));
        let objects = keys.iter().map(|key| ((*key).to_owned(), member(key))).collect();
        let changes = made.iter().map(|key| (*key, Some(member(key)))).chain(removed.iter().map(|key| (*key, None)));
        let changes = changes.map(|(key, change)| (key.to_owned(), (Instant::now(), change))).collect();
        Content { snapshot: Some(Arc::new(Snapshot { started: Instant::now(), objects })), changes }
    }

    fn pinned(key: &str) -> Pins {
        let pins = Pins::default();
        pins.kept.lock().insert(Pin { bucket: "b".into(), key: key.into() }, Kept::default());
        pins
    }

    #[test]
    fn a_pin_covers_what_it_holds_and_what_leads_to_it() {
        let pins = pinned("site/css/");
        for (key, covered) in [("", true), ("site", true), ("site/css", true), ("site/css/a", true), ("sit", false), ("site/js", false)] {
            assert_eq!(pins.covers("b", key), covered, "{key}");
        }
        assert!(!pins.covers("c", "site"));
        assert!(pinned("").covers("b", "x/y"));
        assert!(pinned("x/y").covers("b", "x") && !pinned("x/y").covers("b", "x/yz"));
    }

    #[test]
    fn a_folder_is_one_page() {
        let page = content(&["p/", "p/a", "p/b/c", "p/b/d", "p/e", "q"], &["p/aa", "p/bb/x"], &["p/e"]).page("p/");
        assert_eq!(page.entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["p/", "p/a", "p/aa"]);
        assert_eq!((page.prefixes, page.next), (vec!["p/b/".to_owned(), "p/bb/".to_owned()], None));
    }

    #[test]
    fn what_was_done_here_since_counts() {
        let content = content(&["p/a", "p/b/c", "p/d"], &["p/new/x", "p/d"], &["p/a", "p/b/c"]);
        for (key, known) in
            [("p/a", "Nothing"), ("p/b", "Nothing"), ("p/new", "Directory"), ("p/new/x", "Object"), ("p/d", "Object"), ("p", "Directory")]
        {
            assert!(format!("{:?}", content.known(key, |_| false)).starts_with(known), "{key}");
        }
        assert!(matches!(content.known("p/d", |key| key == "p/d"), Known::Nothing));
    }
}
