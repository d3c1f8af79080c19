//! Content that is another file's object: it is copied inside the store at publication, and no byte of it comes here (promise 7).

use std::ops::Range;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::entry::{Entry, Shared};
use super::manifest::Phase;
use super::spool::blocking;
use super::{Base, Error, body};
use crate::s3::ETag;

/// Entries whose bytes are another file's object's until they are published.
#[derive(Default)]
pub(crate) struct Borrowers(Mutex<Vec<Weak<Entry>>>);

impl Borrowers {
    fn add(&self, entry: &Arc<Entry>) {
        self.0.lock().push(Arc::downgrade(entry));
    }

    /// Those of the object under this key.
    fn of(&self, bucket: &str, key: &str) -> Vec<Arc<Entry>> {
        let mut all = self.0.lock();
        if all.is_empty() {
            return Vec::new();
        }
        all.retain(|entry| entry.upgrade().is_some_and(|entry| entry.content.lock().borrows()));
        let takes = |entry: &Arc<Entry>| entry.intent.lock().base.as_ref().is_some_and(|base| base.bucket == bucket && base.key == key);
        all.iter().filter_map(Weak::upgrade).filter(takes).collect()
    }
}

/// See [`super::Staged::copy`].
pub(crate) async fn take(entry: &Arc<Entry>, base: &Base, range: Range<u64>) -> Result<bool, Error> {
    let _writer = entry.turn().await;
    {
        let intent = entry.intent.lock();
        let largest = intent.target.store.capabilities().max_object_size;
        // What is sealed may be on its way: what comes of that will be the base.
        let begins = intent.phase == Phase::Writing && !intent.sealed && !intent.held && intent.upload.is_none();
        let goes_on = entry.content.lock().copied_to() == Some(range.start)
            && match &intent.base {
                Some(known) if range.start > 0 => (&known.bucket, &known.key, &known.etag) == (&base.bucket, &base.key, &base.etag),
                _ => range.start == 0,
            };
        if !begins || !goes_on || base.size <= entry.grid.range(1).end || range.end > base.size.min(largest) {
            return Ok(false);
        }
    }
    let (file, end) = (entry.file.clone(), range.end);
    blocking(move || file.set_len(end)).await?;
    {
        let mut intent = entry.intent.lock();
        let mut content = entry.content.lock();
        intent.base = Some(base.clone());
        content.copied(end);
    }
    if range.start == 0 {
        entry.shared.borrowers.add(entry);
    }
    entry.rolling.lock().forget(range);
    Ok(true)
}

/// What the content takes of another file's object is in the spool file from here on: that one may change before this is published.
pub(crate) async fn fetch(entry: &Arc<Entry>) -> Result<(), Error> {
    if !entry.content.lock().borrows() {
        return Ok(());
    }
    let base = entry.intent.lock().base.clone();
    let len = entry.content.lock().base_len;
    body::fill(entry, base.as_ref(), 0..len).await?;
    if entry.content.lock().borrows() { Err(Error::NoSpace) } else { Ok(()) }
}

/// The object under this key is about to go, or to be another: who takes bytes of it has them first. `by`: whose content replaces it.
pub(crate) async fn release(shared: &Shared, bucket: &str, key: &str, by: Option<u64>) {
    for entry in shared.borrowers.of(bucket, key).into_iter().filter(|entry| Some(entry.id) != by) {
        if let Err(error) = fetch(&entry).await {
            tracing::warn!("{}: the object that it is copied from goes before it is closed: {error}", entry.name());
        }
    }
}

/// That version was copied to another key, where its bytes are taken from.
pub(crate) fn follow(shared: &Shared, (bucket, key): (&str, &str), etag: &ETag, to: &Base) {
    for entry in shared.borrowers.of(bucket, key) {
        let mut intent = entry.intent.lock();
        if intent.base.as_ref().is_some_and(|base| base.etag == *etag) {
            intent.base = Some(to.clone());
        }
    }
}
