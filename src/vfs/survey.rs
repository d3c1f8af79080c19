//! Walks of a tree (`find`, `cp -r`, `rm -r`, `rsync`, a file manager that counts what is in a folder): directories are read one after
//! the other, and each would cost a LIST and its round trip. What is below a walk is listed without delimiter instead, a thousand keys a
//! request, and each directory finds itself listed.
//!
//! It is asked for beside the listing of the directory at which it begins, from there on in the store's order, which is that of walks;
//! who wanders elsewhere has each directory listed by itself, and fewer and fewer attempts made.

mod fold;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use self::fold::{Disorder, Fold};
use super::dir_state::ListingGuard;
use super::error::Result;
use super::inode::{Place, Table};
use super::listing::Listing;
use super::{Ino, ROOT, Vfs};
use crate::s3::{ListPage, ListRequest, Store};

/// Two directories of one parent read within it are a walk.
const PACE: Duration = Duration::from_secs(5);
/// A directory none of whose directories was read for so long is part of no walk any more.
const LASTS: Duration = Duration::from_secs(30);
/// Names that are held for directories that nobody has come to, at most.
const NAMES: usize = 8000;
/// When fewer are left, the next page is asked for.
const FEW: usize = 1000;
/// After attempts that served nobody, 2 to the power of their number of directories are passed over; this power at most.
const PASSED_OVER: u32 = 6;
/// How often it is looked for what has become too old.
const LOOK: Duration = Duration::from_secs(1);

/// How a directory was read lately.
#[derive(Default)]
pub(super) struct Visits {
    /// When it, or one below it, was read last.
    active: Option<Instant>,
    /// The last one of its directories that was read, and when.
    child: Option<(Ino, Instant)>,
    /// It was read by a walk.
    walked: bool,
}

impl Visits {
    fn is_active(&self) -> bool {
        self.active.is_some_and(|at| at.elapsed() < LASTS)
    }
}

/// What is listed ahead of walks, in the whole mount.
#[derive(Default)]
pub(super) struct Surveys {
    /// Whole directories by bucket and key.
    held: HashMap<(String, String), Arc<Listing>>,
    names: usize,
    stream: Option<Stream>,
    /// Locked while a page is on its way.
    under_way: Arc<tokio::sync::Mutex<()>>,
    reading: Vec<(Instant, Weak<ListingGuard>)>,
    /// When the oldest page was asked for that is held or on its way.
    since: Option<Instant>,
    /// Nodes that would have been let go of, had they not been newer than that.
    kept: Vec<Ino>,
    /// Attempts that served nobody since one did.
    fruitless: u32,
    /// Directories to pass over before the next attempt.
    passed_over: u32,
    forgotten: Vec<Forgotten>,
    /// Buckets whose listings cannot be cut into directories.
    unfit: HashSet<String>,
    /// A task looks for what is too old.
    watched: bool,
}

/// An undelimited listing that is being read.
struct Stream {
    place: Place,
    fold: Fold,
    /// None: it has ended.
    next: Option<ListRequest>,
}

/// What was below a directory until then.
struct Forgotten {
    bucket: String,
    key: String,
    at: Instant,
}

impl Forgotten {
    fn holds(&self, bucket: &str, key: &str, listing: &Listing) -> bool {
        listing.started <= self.at && self.bucket == bucket && key.starts_with(&self.key)
    }
}

/// A page to ask for.
struct Ask {
    store: Arc<dyn Store>,
    request: ListRequest,
    turn: tokio::sync::OwnedMutexGuard<()>,
    started: Instant,
    guard: Arc<ListingGuard>,
}

/// What a directory that is read finds.
enum Found {
    Listed(Arc<Listing>, Option<Ask>),
    /// A page is on its way that may hold it.
    Waits(Arc<tokio::sync::Mutex<()>>),
    Nothing(Option<Ask>),
}

impl Surveys {
    /// What this mount knows that is newer than this is not forgotten: a directory that is held does not speak of it.
    pub fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Notes a node that is kept for [`Surveys::since`] alone.
    pub fn keep(&mut self, ino: Ino) {
        self.kept.push(ino);
    }

    /// What was listed until now of this directory and below it is no longer used: another one has its name, or nothing.
    pub fn forget(&mut self, place: &Place) {
        if self.since.is_none() {
            return;
        }
        let forgotten = Forgotten { bucket: place.store.bucket().to_owned(), key: place.key.clone(), at: Instant::now() };
        self.retain(|bucket, key, listing| !forgotten.holds(bucket, key, listing));
        self.forgotten.push(forgotten);
    }

    fn retain(&mut self, holds: impl Fn(&str, &str, &Listing) -> bool) {
        self.held.retain(|(bucket, key), listing| holds(bucket, key, listing));
        self.names = self.held.values().map(|listing| cost(listing)).sum();
    }

    /// Nothing that was listed is used.
    pub fn clear(&mut self) {
        (self.names, self.stream) = (0, None);
        self.held.clear();
    }

    /// The store shows directories that no key tells of.
    pub fn found_unfit(&mut self, place: &Place) {
        self.clear();
        self.unfit.insert(place.store.bucket().to_owned());
    }

    fn take(&mut self, place: &Place, ttl: Duration) -> Option<Arc<Listing>> {
        let listing = self.held.remove(&(place.store.bucket().to_owned(), place.key.clone()))?;
        self.names -= cost(&listing);
        Some(listing).filter(|listing| listing.started.elapsed() < ttl)
    }

    /// Begins to list what follows `place` below `root`, unless that is of no use.
    fn begin(&mut self, root: Place, place: &Place) -> Option<Ask> {
        if self.unfit.contains(place.store.bucket()) {
            return None;
        }
        if self.passed_over > 0 {
            self.passed_over -= 1;
            return None;
        }
        let turn = self.under_way.clone().try_lock_owned().ok()?;
        self.fruitless += 1;
        self.passed_over = (1 << self.fruitless.min(PASSED_OVER)) - 2;
        let request = ListRequest { prefix: root.key.clone(), start_after: Some(place.key.clone()), ..ListRequest::default() };
        let fold = Fold::new(&root.key, place.key.clone());
        self.stream = Some(Stream { place: root, fold, next: None });
        Some(self.ask(place.store.clone(), request, turn))
    }

    /// Goes on, where those who walk have come near the end of what is held.
    fn go_on(&mut self) -> Option<Ask> {
        if self.names >= FEW {
            return None;
        }
        let stream = self.stream.as_mut().filter(|stream| stream.next.is_some())?;
        let turn = self.under_way.clone().try_lock_owned().ok()?;
        let (store, request) = (stream.place.store.clone(), stream.next.take()?);
        Some(self.ask(store, request, turn))
    }

    fn ask(&mut self, store: Arc<dyn Store>, request: ListRequest, turn: tokio::sync::OwnedMutexGuard<()>) -> Ask {
        let (started, guard) = (Instant::now(), Arc::new(ListingGuard));
        self.reading.push((started, Arc::downgrade(&guard)));
        self.since = self.since.or(Some(started));
        Ask { store, request, turn, started, guard }
    }

    /// Takes in a page.
    fn arrived(&mut self, ask: &Ask, page: ListPage) {
        let bucket = ask.store.bucket();
        // None where what it is of was changed meanwhile.
        let Some(stream) = self.stream.as_mut() else { return };
        let next = page.next.clone();
        match stream.fold.push(page, ask.started) {
            Ok(whole) => {
                let continues = |next| ListRequest { continuation: Some(next), start_after: None, ..ask.request.clone() };
                stream.next = next.map(continues);
                let forgotten = &self.forgotten;
                let is_true = |(key, listing): &(String, Listing)| !forgotten.iter().any(|gone| gone.holds(bucket, key, listing));
                for (key, listing) in whole.into_iter().filter(is_true) {
                    self.names += cost(&listing);
                    if let Some(before) = self.held.insert((bucket.to_owned(), key), Arc::new(listing)) {
                        self.names -= cost(&before);
                    }
                }
            }
            Err(Disorder) => {
                self.stream = None;
                self.unfit.insert(bucket.to_owned());
            }
        }
        if self.names > NAMES {
            self.clear();
        }
    }

    /// Lets go of what is older than `ttl`. Gives the nodes that nothing of it keeps any more, perhaps.
    fn expire(&mut self, ttl: Duration) -> Vec<Ino> {
        self.retain(|_, _, listing| listing.started.elapsed() < ttl);
        self.stream.take_if(|stream| stream.fold.since().is_some_and(|since| since.elapsed() >= ttl));
        self.reading.retain(|(_, guard)| guard.strong_count() > 0);
        let read = self.reading.iter().map(|(started, _)| *started);
        let held = self.held.values().map(|listing| listing.started);
        self.since = held.chain(read).chain(self.stream.as_ref().and_then(|stream| stream.fold.since())).min();
        let since = self.since;
        self.forgotten.retain(|gone| since.is_some_and(|since| since <= gone.at));
        std::mem::take(&mut self.kept)
    }
}

/// What a listing counts for.
fn cost(listing: &Listing) -> usize {
    listing.entries.len() + 1
}

impl Table {
    /// Somebody begins to read a directory.
    pub(super) fn visit(&mut self, dir: Ino) {
        let now = Instant::now();
        let Some(parent) = self.get(dir).map(|node| node.parent).filter(|_| dir != ROOT) else {
            if let Some(state) = self.dir_mut(dir) {
                state.visits.active = Some(now);
            }
            return;
        };
        let mut walked = false;
        if let Some(above) = self.dir_mut(parent).map(|state| &mut state.visits).filter(|visits| visits.is_active()) {
            let beside = above.child.is_some_and(|(other, at)| other != dir && at.elapsed() < PACE);
            walked = above.walked || beside;
        }
        if let Some(above) = self.dir_mut(parent) {
            above.visits.child = Some((dir, now));
        }
        if let Some(state) = self.dir_mut(dir) {
            // Some read each directory twice (rm).
            let walked = walked || state.visits.walked && state.visits.is_active();
            (state.visits.active, state.visits.walked) = (Some(now), walked);
        }
        for above in self.walk_above(dir) {
            if let Some(state) = self.dir_mut(above) {
                state.visits.active = Some(now);
            }
        }
    }

    /// The directories above that the same walk has come through, the nearest first.
    fn walk_above(&self, dir: Ino) -> Vec<Ino> {
        let mut found = Vec::new();
        let mut at = dir;
        while let Some(parent) = self.get(at).map(|node| node.parent).filter(|parent| *parent != at) {
            if !self.dir(parent).is_some_and(|state| state.visits.is_active()) {
                break;
            }
            found.push(parent);
            at = parent;
        }
        found
    }

    /// A walk goes through the directory.
    fn is_walked(&self, dir: Ino) -> bool {
        self.dir(dir).is_some_and(|state| state.visits.walked && state.visits.is_active())
    }
}

impl Vfs {
    /// The directory's listing, where a walk has it listed already or is about to. Else more is listed for those who come next.
    pub(super) async fn surveyed(&self, dir: Ino) -> Option<Arc<Listing>> {
        // What is true for less long serves nobody.
        if self.config.metadata_ttl < LOOK || !self.table.lock().is_walked(dir) {
            return None;
        }
        let place = self.place(dir).ok()?;
        if self.is_pinned(place.store.bucket(), &place.key) {
            return None;
        }
        let mut waited = false;
        loop {
            let under_way = match self.find_surveyed(dir, &place, waited) {
                Found::Listed(listing, ask) => {
                    self.survey(ask);
                    return Some(listing);
                }
                Found::Nothing(ask) => {
                    self.survey(ask);
                    return None;
                }
                Found::Waits(under_way) => under_way,
            };
            drop(under_way.lock().await);
            waited = true;
        }
    }

    fn find_surveyed(&self, dir: Ino, place: &Place, waited: bool) -> Found {
        let mut table = self.table.lock();
        let listing = table.surveys.take(place, self.shown_ttl());
        let listing = listing.filter(|listing| table.dir(dir).is_some_and(|state| state.takes(listing)));
        let surveys = &mut table.surveys;
        if let Some(listing) = listing {
            (surveys.fruitless, surveys.passed_over) = (0, 0);
            let ask = surveys.go_on();
            table.install(dir, listing.clone());
            return Found::Listed(listing, ask);
        }
        let may_come = surveys
            .stream
            .as_ref()
            .is_some_and(|stream| stream.place.store.bucket() == place.store.bucket() && place.key.starts_with(&stream.place.key));
        if may_come && !waited && surveys.under_way.try_lock().is_err() {
            return Found::Waits(surveys.under_way.clone());
        }
        let top = table.walk_above(dir).into_iter().rfind(|above| !self.is_account(*above)).unwrap_or(dir);
        drop(table);
        let root = self.place(top).ok().filter(|root| root.store.bucket() == place.store.bucket()).unwrap_or_else(|| place.clone());
        Found::Nothing(self.table.lock().surveys.begin(root, place))
    }

    /// Asks for a page in the background.
    fn survey(&self, ask: Option<Ask>) {
        let Some((ask, vfs)) = ask.zip(self.shared()) else { return };
        self.watch_surveys();
        self.spawn(async move {
            let page: Result<ListPage> = tokio::select! {
                page = vfs.within(vfs.list(ask.store.as_ref(), ask.request.clone())) => page,
                () = vfs.closing.cancelled() => return,
            };
            if let Ok(page) = page {
                vfs.table.lock().surveys.arrived(&ask, page);
            }
            let Ask { turn, guard, .. } = ask;
            drop((turn, guard));
        });
    }

    /// Lets go of what is too old, until nothing is held.
    fn watch_surveys(&self) {
        let Some(vfs) = self.shared() else { return };
        if std::mem::replace(&mut self.table.lock().surveys.watched, true) {
            return;
        }
        self.spawn(async move {
            loop {
                vfs.pause(LOOK).await;
                let mut table = vfs.table.lock();
                if vfs.closing.is_cancelled() {
                    table.surveys.clear();
                }
                for ino in table.surveys.expire(vfs.config.metadata_ttl) {
                    table.release(ino);
                }
                table.surveys.watched = table.surveys.since().is_some() && !vfs.closing.is_cancelled();
                if !table.surveys.watched {
                    return;
                }
            }
        });
    }
}
