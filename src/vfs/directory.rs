//! What a directory is known to hold: listings, their age, and the marker that keeps an empty one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use super::dir_state::ListingOrder;
use super::error::{Error, Result};
use super::inode::Place;
use super::listing::{Entries, KEEP_MOST, Listed, Listing, Merger};
use super::remember::Row;
use super::{Ino, Root, Vfs, attr};
use crate::s3::{self, ETag, ErrorKind, LIST_MOST, ListPage, ListRequest, ObjectHeaders, PutOptions, Store};

/// How long an implied directory that lost its last name may stay without a marker (promise 20), and how long
/// changes of a marker's attributes are gathered.
const MARKER_DELAY: Duration = Duration::from_secs(2);
/// What every S3 browser knows a directory by.
const MARKER_TYPE: &str = "application/x-directory";

impl Vfs {
    /// Bucket and prefix of the mount itself; none when every bucket is mounted.
    fn base(&self) -> Option<Place> {
        match &self.root {
            Root::Bucket { store, prefix } => Some(Place { store: store.clone(), key: prefix.clone() }),
            Root::Account(_) => None,
        }
    }

    /// Where an inode lies in the store. EPERM for the account's root, which is no place to write to.
    pub(super) fn place(&self, ino: Ino) -> Result<Place> {
        let base = self.base();
        let table = self.table.lock();
        if table.get(ino).is_none() {
            return Err(Error::Stale);
        }
        table.place(ino, base.as_ref()).ok_or(Error::NotPermitted)
    }

    /// True for the directory whose names are buckets.
    pub(super) fn is_account(&self, ino: Ino) -> bool {
        ino == super::ROOT && matches!(self.root, Root::Account(_))
    }

    /// What the directory holds, asked for at most `metadata_ttl` ago: whole when it fits one page, else its beginning.
    pub(super) async fn known(&self, dir: Ino) -> Result<Arc<Listing>> {
        let order = {
            let table = self.table.lock();
            let state = table.dir(dir).ok_or(Error::NotDirectory)?;
            if let Some(listing) = self.in_use(state.listing.as_ref()) {
                return Ok(listing);
            }
            state.listing_order.clone()
        };
        // Only a whole listing can be too large.
        self.list_in_turn(dir, &order, false).await?.ok_or(Error::TooLarge)
    }

    /// As [`Vfs::known`], of a directory larger than a page: whole, once names were asked for one by one with as many requests as that
    /// takes.
    pub(super) async fn known_whole(&self, dir: Ino) -> Result<Option<Arc<Listing>>> {
        let order = {
            let mut table = self.table.lock();
            let state = table.dir_mut(dir).ok_or(Error::NotDirectory)?;
            state.asked += 1;
            // A HEAD and a LIST each.
            if state.size == 0 || state.size > KEEP_MOST || state.asked * 2 < state.size.div_ceil(LIST_MOST) {
                return Ok(None);
            }
            state.listing_order.clone()
        };
        let listing = self.list_in_turn(dir, &order, true).await?;
        // It is not tried again before it was found to be smaller.
        if listing.is_none()
            && let Some(state) = self.table.lock().dir_mut(dir)
        {
            (state.size, state.asked) = (KEEP_MOST + 1, 0);
        }
        Ok(listing)
    }

    /// Lists, or waits for who does. None where a `whole` listing is too large to be kept.
    async fn list_in_turn(&self, dir: Ino, order: &ListingOrder, whole: bool) -> Result<Option<Arc<Listing>>> {
        let asked = Instant::now();
        let mut turn = order.lock().await;
        let meanwhile = self.table.lock().dir(dir).and_then(|state| self.in_use(state.listing.as_ref()));
        if let Some(listing) = meanwhile.filter(|listing| listing.complete || !whole) {
            return Ok(Some(listing));
        }
        // Who waited while it failed has waited long enough: a queue of callers must not each try in turn.
        if let Some((_, error)) = turn.filter(|(failed, _)| *failed >= asked) {
            return Err(error);
        }
        if !whole && let Some(listing) = self.surveyed(dir).await {
            return Ok(Some(listing));
        }
        let started = Instant::now();
        let _guard = self.table.lock().dir_mut(dir).map(|state| state.begin_listing(started));
        let epoch = self.epoch.load(Ordering::Relaxed);
        let listed = match whole {
            true => self.list_whole(dir, started).await,
            false if self.is_account(dir) => self.list_buckets(started).await.map(Some),
            false => self.list_beginning(dir, started).await.map(Some),
        };
        let listing = listed.inspect_err(|error| *turn = Some((Instant::now(), *error)))?.map(Arc::new);
        if let Some(listing) = listing.as_ref().filter(|_| self.epoch.load(Ordering::Relaxed) == epoch) {
            self.install(dir, listing.clone());
        }
        Ok(listing)
    }

    /// None where it has become too large to be kept.
    async fn list_whole(&self, dir: Ino, started: Instant) -> Result<Option<Listing>> {
        let place = self.place(dir)?;
        let mut merger = Merger::new(&place.key);
        let request = ListRequest { prefix: place.key.clone(), delimited: true, ..ListRequest::default() };
        let first = self.list(place.store.as_ref(), request.clone()).await?;
        let mut sweep = self.sweep(&request, &first, self.lister(place.store.clone()));
        let mut page = Some(first);
        let mut entries = Entries::default();
        while let Some(listed) = page {
            merger.push(listed).iter().for_each(|entry| entries.push(entry));
            if entries.len() > KEEP_MOST {
                return Ok(None);
            }
            page = match &mut sweep {
                Some(sweep) => sweep.next().await?.map(|swept| swept.page),
                None => None,
            };
        }
        // What was in doubt at the end of a page behind which another one was thought to follow.
        merger.push(ListPage::default()).iter().for_each(|entry| entries.push(entry));
        Ok(Some(merger.listing(started, entries, true)))
    }

    fn in_use(&self, listing: Option<&Arc<Listing>>) -> Option<Arc<Listing>> {
        listing.filter(|listing| listing.started.elapsed() < self.config.metadata_ttl).cloned()
    }

    /// Takes a listing into use.
    pub(super) fn install(&self, dir: Ino, listing: Arc<Listing>) {
        self.table.lock().install(dir, listing);
    }

    async fn list_beginning(&self, dir: Ino, started: Instant) -> Result<Listing> {
        let place = self.place(dir)?;
        let mut merger = Merger::new(&place.key);
        let mut request = ListRequest { prefix: place.key.clone(), delimited: true, ..ListRequest::default() };
        loop {
            let page = self.list(place.store.as_ref(), request.clone()).await?;
            request.continuation = page.next.clone();
            // All of a page may have been removed here.
            let shows = page.entries.iter().any(|entry| entry.key != place.key) || !page.prefixes.is_empty();
            let entries = merger.push(page);
            if shows || request.continuation.is_none() {
                return Ok(merger.listing(started, entries.into_iter().collect(), request.continuation.is_none()));
            }
        }
    }

    /// The account's buckets as directories.
    pub(super) async fn list_buckets(&self, started: Instant) -> Result<Listing> {
        let Root::Account(account) = &self.root else { return Err(Error::NotDirectory) };
        let buckets = account.buckets().await?;
        let entries = buckets.into_iter().map(|bucket| Listed { segment: bucket.name.into(), hidden: false, object: None }).collect();
        Ok(Merger::default().listing(started, entries, true))
    }

    /// The store of a bucket at the account's root; ENOENT where there is none.
    pub(super) async fn bucket(&self, name: &str) -> Result<Arc<dyn Store>> {
        match &self.root {
            Root::Account(account) => Ok(account.bucket(name).await?),
            Root::Bucket { .. } => Err(Error::NoEntry),
        }
    }

    /// After a name left `dir`: a directory that nothing else holds gets its marker a moment later, unless it went too.
    pub(super) fn keep_directory(&self, dir: Ino) {
        {
            let mut table = self.table.lock();
            if dir == super::ROOT || table.get(dir).is_none_or(|node| !node.linked) {
                return;
            }
            let Some(state) = table.dir_mut(dir) else { return };
            if state.marker == Some(true) || state.keeping || state.store.is_some() {
                return;
            }
            let (children, removed) = (&state.children, &state.removed);
            let others =
                state.listing.as_ref().is_some_and(|listing| listing.entries.iter().any(|entry| !removed.contains_key(&entry.name())));
            if !children.is_empty() || others {
                return;
            }
            state.keeping = true;
        }
        self.marker_later(dir);
    }

    /// Writes the marker's attributes a moment later, together with what changes until then.
    pub(super) fn touch_marker(&self, dir: Ino) {
        {
            let mut table = self.table.lock();
            let Some(state) = table.dir_mut(dir) else { return };
            if std::mem::replace(&mut state.marker_dirty, true) || state.keeping {
                return;
            }
        }
        self.marker_later(dir);
    }

    fn marker_later(&self, dir: Ino) {
        let Some(this) = self.shared() else { return };
        self.spawn(async move {
            this.pause(MARKER_DELAY).await;
            let wanted = {
                let mut table = this.table.lock();
                let linked = table.get(dir).is_some_and(|node| node.linked);
                let Some(state) = table.dir_mut(dir) else { return };
                let wanted = linked && (std::mem::take(&mut state.keeping) || state.marker_dirty);
                state.keeping = false;
                state.marker_dirty = false;
                wanted
            };
            if wanted && let Err(error) = this.within(this.write_marker(dir)).await {
                tracing::warn!("directory marker: {error:?}");
            }
            this.table.lock().release(dir);
        });
    }

    /// PUTs the marker of a directory with the attributes that it has now, unless it was written with those: rsync sets a directory's
    /// times before its files and again after them.
    pub(super) async fn write_marker(&self, dir: Ino) -> Result<()> {
        let place = self.place(dir)?;
        let _guard = self.guards.key(place.store.bucket(), &place.key).await;
        let (stored, mtime) = {
            let table = self.table.lock();
            let node = table.get(dir).filter(|node| node.linked).ok_or(Error::NoEntry)?;
            let state = node.dir.as_deref().ok_or(Error::NotDirectory)?;
            let mtime = state.set_mtime.unwrap_or(node.mtime);
            let written = state.written.as_ref().filter(|_| state.marker == Some(true));
            if written.is_some_and(|(key, stored, time)| (key, stored, time) == (&place.key, &node.stored, &mtime)) {
                return Ok(());
            }
            (node.stored, mtime)
        };
        self.put_marker(&place, stored, mtime).await?;
        if let Some(state) = self.table.lock().dir_mut(dir) {
            state.marker = Some(true);
            state.written = Some((place.key, stored, mtime));
        }
        Ok(())
    }

    /// PUTs a marker object and remembers what a store that drops a marker's metadata (SeaweedFS) would forget.
    pub(super) async fn put_marker(&self, place: &Place, stored: attr::Stored, mtime: SystemTime) -> s3::Result<()> {
        let mut options = PutOptions {
            headers: ObjectHeaders { content_type: Some(MARKER_TYPE.to_owned()), ..ObjectHeaders::default() },
            ..PutOptions::default()
        };
        attr::encode_stored(&mut options.metadata, attr::Kind::Directory, stored);
        if self.config.mtime == super::MtimeSource::Store {
            attr::encode_mtime(&mut options.metadata, mtime);
        }
        place.store.put(&place.key, Arc::new(bytes::Bytes::new()), options).await?;
        self.remember_directory(place, stored, mtime);
        Ok(())
    }

    /// Directories are remembered by key alone: a listing never shows the ETag of a marker.
    pub(super) fn remember_directory(&self, place: &Place, stored: attr::Stored, mtime: SystemTime) {
        let row =
            Row { etag: directory_tag(), stored, mtime: Some(mtime), atime: None, ctime: None, target: None, written: SystemTime::now() };
        self.memory.put(place.store.bucket(), &place.key, row);
    }

    /// What is remembered of a directory.
    pub(super) async fn recall_directory(&self, place: &Place) -> Option<Row> {
        self.memory.get(place.store.bucket(), &place.key, &directory_tag(), SystemTime::UNIX_EPOCH).await
    }

    /// DELETEs a marker. A store that shows directories of its own may answer that it is not empty: then it has names.
    pub(super) async fn delete_marker(&self, place: &Place) -> Result<()> {
        match place.store.delete(&place.key, None).await {
            Err(error) if error.kind == ErrorKind::NotEmpty => {
                // Of names that it holds, some are directories without a key.
                self.table.lock().surveys.found_unfit(place);
                Err(Error::NotEmpty)
            }
            other => Ok(other?),
        }
    }
}

/// Stands for the ETag that a listing never shows of a directory.
pub(super) fn directory_tag() -> ETag {
    ETag::new("directory")
}
