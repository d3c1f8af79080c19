//! What a directory is known to hold: listings and their age.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::dir_state::ListingOrder;
use super::error::{Error, Result};
use super::inode::Place;
use super::listing::{Entries, KEEP_MOST, Listed, Listing, Merger};
use super::{Ino, Root, Vfs};
use crate::s3::{LIST_MOST, ListPage, ListRequest, Store};

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
        if !self.is_pinned(place.store.bucket(), &place.key) {
            self.table.lock().make_way(dir);
        }
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
}
