//! What a directory knows of its names.

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::{Arc, Weak};
use std::time::{Instant, SystemTime};

use super::Ino;
use super::attr::Stored;
use super::error::Error;
use super::listing::Listing;
use super::neighbours::Walk;
use super::survey::Visits;
use crate::s3::Store;

/// When and how the last listing failed; who lists holds it.
pub type ListingOrder = tokio::sync::Mutex<Option<(Instant, Error)>>;

/// A directory's knowledge of its names.
pub struct DirState {
    /// The bucket, for the directory that is a bucket's root; its segment is then not part of keys.
    pub store: Option<Arc<dyn Store>>,
    /// Nodes by name.
    pub children: HashMap<OsString, Ino>,
    /// The newest listing, whole or a first page.
    pub listing: Option<Arc<Listing>>,
    /// When the newest listing was begun that was ever in use: what was removed since is known, what was removed before is not.
    newest: Option<Instant>,
    /// How many names it held when it was listed whole, or holds at least.
    pub size: usize,
    /// Names asked for one by one since it was listed.
    pub asked: usize,
    /// Listings that somebody reads, by their beginning; see [`DirState::begin_listing`].
    reading: Vec<(Instant, Weak<ListingGuard>)>,
    /// Names that this mount removed, and when: listings begun before still hold them.
    pub removed: HashMap<OsString, Instant>,
    /// Names that the store did not know, and when it was asked.
    pub absent: HashMap<OsString, Instant>,
    /// Lets one task list while others wait for its result.
    pub listing_order: Arc<ListingOrder>,
    /// A marker object exists; `None`: not known.
    pub marker: Option<bool>,
    /// When this mount heard that its marker is stored: a listing begun before may lack it.
    marked: Option<Instant>,
    /// Made here, and neither its marker nor a name in it has ever been anywhere but here.
    pub bare: bool,
    /// A marker is to be written once nothing else holds the directory ([`super::Vfs::keep_directory`]).
    pub keeping: bool,
    /// The time that utimens(2) set last: what names that come and go make of it since is never worth a request.
    pub(super) set_mtime: Option<SystemTime>,
    /// The key of the marker that this mount wrote last, and its attributes.
    pub(super) written: Option<(String, Stored, SystemTime)>,
    /// Marker attributes are to be written.
    pub marker_dirty: bool,
    /// How its files are read.
    pub(super) walk: Walk,
    /// How it is read itself.
    pub(super) visits: Visits,
}

impl DirState {
    /// Nothing known.
    pub fn unknown() -> Self {
        Self {
            store: None,
            children: HashMap::new(),
            listing: None,
            newest: None,
            size: 0,
            asked: 0,
            reading: Vec::new(),
            removed: HashMap::new(),
            absent: HashMap::new(),
            listing_order: Arc::default(),
            marker: None,
            marked: None,
            bare: false,
            set_mtime: None,
            written: None,
            keeping: false,
            marker_dirty: false,
            walk: Walk::default(),
            visits: Visits::default(),
        }
    }

    /// Just made by us: known to be empty.
    pub fn made() -> Self {
        let now = Instant::now();
        Self { listing: Some(Arc::new(Listing::empty(now))), newest: Some(now), marker: Some(true), ..Self::unknown() }
    }

    /// Its marker is stored.
    pub(super) fn mark(&mut self) {
        (self.marker, self.marked, self.bare) = (Some(true), Some(Instant::now()), false);
    }

    /// When the listing that is in use was begun.
    pub fn listed_at(&self) -> Option<Instant> {
        self.listing.as_ref().map(|listing| listing.started)
    }

    /// A listing begins: until what is given is dropped, nodes that this mount names meanwhile are kept, for it may lack them.
    pub fn begin_listing(&mut self, started: Instant) -> Arc<ListingGuard> {
        let guard = Arc::new(ListingGuard);
        self.reading.retain(|(_, guard)| guard.strong_count() > 0);
        self.reading.push((started, Arc::downgrade(&guard)));
        guard
    }

    /// When the oldest listing was begun that is in use or being read.
    pub(super) fn oldest_listing(&self) -> Option<Instant> {
        let read = self.reading.iter().filter(|(_, guard)| guard.strong_count() > 0).map(|(started, _)| *started);
        read.chain(self.listed_at()).min()
    }

    /// No newer listing was in use.
    pub(super) fn takes(&self, listing: &Listing) -> bool {
        self.newest.is_none_or(|newest| newest <= listing.started)
    }

    /// Takes a newer listing into use and lets go of what it has overtaken.
    pub(super) fn install(&mut self, listing: Arc<Listing>) {
        if !self.takes(&listing) {
            return;
        }
        self.newest = Some(listing.started);
        self.removed.retain(|_, at| *at >= listing.started);
        self.absent.clear();
        if listing.complete {
            (self.size, self.asked) = (listing.entries.len(), 0);
            if listing.marker || self.marked.is_none_or(|at| at < listing.started) {
                self.marker = Some(listing.marker);
            }
        }
        self.listing = Some(listing);
    }
}

/// Held by whoever reads a listing.
pub struct ListingGuard;
