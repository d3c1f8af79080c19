//! What is pinned (`packmule cache pin`) is fetched before anybody reads it, and is read from the cache while the store does not
//! answer: names and versions are then those that the keeper listed last, less what this mount removed since. Everything else waits for the store (promise 22).

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
use super::inode::Place;
use super::listing::ListedObject;
use super::path::Meaning;
use super::{Ino, Vfs};
use crate::cache::{ObjectVersion, Pin};
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
    /// A pin is new, something changed in one, or the store answers again.
    wake: Notify,
    /// One change at a time.
    turn: tokio::sync::Mutex<()>,
}

/// One pin's state.
#[derive(Default)]
struct Kept {
    snapshot: Option<Arc<Snapshot>>,
    /// The bucket, once it was found.
    store: Option<Arc<dyn Store>>,
    /// Objects removed here since the snapshot, and when.
    removed: HashMap<String, Instant>,
    /// Why the last pass ended early.
    trouble: Option<String>,
    /// All of the snapshot was asked for.
    passed: bool,
}

/// What a pin held when it was listed.
struct Snapshot {
    started: Instant,
    objects: BTreeMap<String, ListEntry>,
    /// Keys that `cache_size` has no room for.
    too_much: u64,
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

    /// The newest listing that holds all of this folder, or this key.
    fn snapshot(&self, bucket: &str, key: &str) -> Option<(Arc<Snapshot>, Vec<String>)> {
        let kept = self.kept.lock();
        let holding = kept.iter().filter(|(pin, _)| pin.holds(bucket, key));
        let newest = holding.filter_map(|(_, kept)| kept.snapshot.as_ref().map(|snapshot| (snapshot, &kept.removed)));
        let (snapshot, removed) = newest.max_by_key(|(snapshot, _)| snapshot.started)?;
        Some((snapshot.clone(), removed.keys().cloned().collect()))
    }

    fn store(&self, bucket: &str) -> Option<Arc<dyn Store>> {
        self.kept.lock().iter().filter(|(pin, _)| pin.bucket == bucket).find_map(|(_, kept)| kept.store.clone())
    }

    fn is_silent(&self, bucket: &str) -> bool {
        self.silent.lock().contains_key(bucket)
    }
}

impl Snapshot {
    /// A page of a folder, whole.
    fn page(&self, prefix: &str, removed: &[String]) -> ListPage {
        let mut page = ListPage::default();
        let below = self.objects.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
        for (key, entry) in below.filter(|(key, _)| !removed.contains(key)) {
            match key[prefix.len()..].split_once('/') {
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

    fn version(&self, bucket: &str, entry: &ListEntry) -> ObjectVersion {
        ObjectVersion { bucket: bucket.to_owned(), key: entry.key.clone(), etag: entry.etag.clone(), size: entry.size, version_id: None }
    }
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
        let snapshot = self.pins.snapshot(bucket, key).or_else(|| self.pins.snapshot(bucket, &format!("{key}/")));
        let Some((snapshot, removed)) = snapshot else {
            // It leads to a pin.
            return Ok(here.unwrap_or_else(|| self.take_directory(parent, name.to_owned(), &segment, Instant::now(), None)));
        };
        let hidden = |key: &str| removed.iter().any(|gone| gone == key) || self.writeback.is_deleted(bucket, key, snapshot.started);
        match known(&snapshot, key, hidden) {
            Known::Directory => {
                let row = self.recall_directory(&Place { store: place.store, key: format!("{key}/") }).await;
                Ok(self.take_directory(parent, name.to_owned(), &segment, snapshot.started, row))
            }
            Known::Object(object) => {
                let row = self.memory.get(bucket, key, &object.etag, object.modified).await;
                if row.is_none() && self.may_be_link(&object) {
                    return here.ok_or(SILENCE);
                }
                Ok(self.take_listed(parent, name.to_owned(), &segment, &object, row, snapshot.started))
            }
            Known::Nothing => self.now_absent(parent, name, snapshot.started),
        }
    }

    /// The page that a pinned folder begins with, and when it was listed, where the store is silent.
    pub(super) fn pinned_page(&self, place: &Place) -> Option<(Instant, ListPage)> {
        let (snapshot, removed) = self.pins.snapshot(place.store.bucket(), &place.key)?;
        let mut page = snapshot.page(&place.key, &removed);
        self.writeback.hide_deleted(place.store.bucket(), snapshot.started, &mut page);
        Some((snapshot.started, page))
    }

    /// It is pinned.
    pub(super) fn is_pinned(&self, bucket: &str, key: &str) -> bool {
        self.pins.any.load(Ordering::Relaxed) && self.pins.kept.lock().keys().any(|pin| pin.holds(bucket, key))
    }

    /// An object is no more under this key.
    pub(super) fn forget_object(&self, place: &Place) {
        self.memory.remove(place.store.bucket(), &place.key);
        if self.pins.any.load(Ordering::Relaxed) {
            for (_, kept) in self.pins.kept.lock().iter_mut().filter(|(pin, _)| pin.holds(place.store.bucket(), &place.key)) {
                kept.removed.insert(place.key.clone(), Instant::now());
                self.pins.wake.notify_one();
            }
        }
    }

    /// This mount made an object, or another version: it is kept too.
    pub(super) fn note_made(&self, place: &Place) {
        if self.is_pinned(place.store.bucket(), &place.key) {
            self.pins.wake.notify_one();
        }
    }

    fn note_silent(&self, bucket: &str) {
        if self.pins.silent.lock().insert(bucket.to_owned(), Instant::now()).is_none() {
            tracing::warn!("s3://{bucket} does not answer: what is pinned is read from the cache until it does");
            self.await_answer(bucket.to_owned());
        }
    }

    /// Pins, as commands show them.
    pub fn pins(&self) -> Vec<PinReport> {
        let silent = self.pins.silent.lock().clone();
        let kept = self.pins.kept.lock();
        let report = |(pin, kept): (&Pin, &Kept)| {
            let mut report = PinReport {
                bucket: pin.bucket.clone(),
                key: pin.key.clone(),
                settled: kept.passed,
                trouble: kept.trouble.clone(),
                silent_seconds: silent.get(&pin.bucket).map(|since| since.elapsed().as_secs()),
                ..PinReport::default()
            };
            if let Some(snapshot) = &kept.snapshot {
                (report.files, report.too_much) = (snapshot.objects.len() as u64, snapshot.too_much);
                for entry in snapshot.objects.values() {
                    let held = self.cache.held(&snapshot.version(&pin.bucket, entry));
                    report.bytes += entry.size;
                    report.kept_bytes += held;
                    report.kept_files += u64::from(held == entry.size);
                }
            }
            report
        };
        kept.iter().map(report).collect()
    }
}

fn known(snapshot: &Snapshot, key: &str, hidden: impl Fn(&str) -> bool) -> Known {
    let folder = format!("{key}/");
    let mut below = snapshot.objects.range(folder.clone()..).take_while(|(key, _)| key.starts_with(&folder));
    if below.any(|(key, _)| !hidden(key)) {
        return Known::Directory;
    }
    match snapshot.objects.get(key).filter(|_| !hidden(key)) {
        Some(entry) => Known::Object(ListedObject::of(entry.clone())),
        None => Known::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::ETag;

    fn snapshot(keys: &[&str]) -> Snapshot {
        let entry = |key: &&str| {
            let entry = ListEntry {
                key: (*key).into(),
                size: 1,
                etag: ETag::new("e"),
                last_modified: std::time::SystemTime::UNIX_EPOCH,
                storage_class: None,
                sha1: false,
            };
            ((*key).to_owned(), entry)
        };
        Snapshot { started: Instant::now(), objects: keys.iter().map(entry).collect(), too_much: 0 }
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
    fn a_folder_of_a_snapshot_is_one_page() {
        let page = snapshot(&["p/", "p/a", "p/b/c", "p/b/d", "p/e", "q"]).page("p/", &["p/e".to_owned()]);
        assert_eq!(page.entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["p/", "p/a"]);
        assert_eq!((page.prefixes, page.next), (vec!["p/b/".to_owned()], None));
    }

    #[test]
    fn a_folder_all_of_whose_names_are_gone_is_none() {
        let snapshot = snapshot(&["p/a", "p/b/c"]);
        assert!(matches!(known(&snapshot, "p/b", |_| false), Known::Directory));
        assert!(matches!(known(&snapshot, "p/b", |key| key == "p/b/c"), Known::Nothing));
        assert!(matches!(known(&snapshot, "p/a", |_| false), Known::Object(_)));
    }
}
