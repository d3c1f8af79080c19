//! opendir, readdir, readdirplus: directories of any size in bounded memory.
//!
//! A handle shows a directory as it was when it was opened (or rewound): what the store lists, less what this mount
//! removed, and then what exists here alone. It holds at most two pages of the listing and, of all before, only where each
//! began, so that a seek backwards asks for that page again.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use tokio::sync::Mutex;

use super::attr::Kind;
use super::dir_state::ListingGuard;
use super::error::{Error, Result};
use super::inode::Place;
use super::listing::{Entries, KEEP_MOST, Listed, Listing, Merger};
use super::remember::Row;
use super::{DirEntry, DirSink, Fh, Ino, Vfs};
use crate::s3::sweep::{Ask, Lister, Sweep};
use crate::s3::{ListPage, ListRequest, Store};

/// Offsets 1 and 2 follow `.` and `..`; the listing's entries come from 2 on.
const DOTS: u64 = 2;
/// The part of `memory_limit` that names of one directory may take which wait to be read.
const LISTED_PART: u64 = 10;
/// HEADs of possible links that go out together.
const LINKS_AT_ONCE: usize = 32;
/// How often a listed name gets an inode that is let go of before it could be offered.
const OFFERS_MOST: u32 = 8;

/// An open directory.
pub struct DirHandle {
    ino: Ino,
    stream: Mutex<Option<Stream>>,
}

/// One pass over a directory.
struct Stream {
    started: Instant,
    place: Option<Place>,
    /// Where each page begins, in order.
    anchors: Vec<Anchor>,
    /// What follows the first page.
    sweep: Option<Sweep>,
    /// The page that was read last.
    current: Option<(usize, Page)>,
    /// Entries of the whole listing, while they are few enough to be kept.
    gathered: Option<Entries>,
    /// A listing that is already whole.
    whole: Option<Arc<Listing>>,
    /// All pages are known.
    ended: bool,
    /// Names that exist here and that the listing does not hold, in order; known at the end of the listing.
    extra: Option<Vec<OsString>>,
    /// What this mount publishes while the store lists is kept until it was shown.
    _guard: Arc<ListingGuard>,
}

/// The beginning of a page: what must be asked and what was in doubt.
#[derive(Clone)]
struct Anchor {
    /// Index of the first entry.
    first: u64,
    /// What stood at each index from there on, once that was told.
    told: Option<Arc<[u64]>>,
    /// None before it was asked for, and where nothing came.
    ask: Option<Ask>,
    merger: Merger,
}

impl Vfs {
    /// opendir(3).
    pub async fn opendir(&self, ino: Ino) -> Result<Fh> {
        let mut table = self.table.lock();
        if table.dir(ino).is_none() {
            return Err(if table.get(ino).is_some() { Error::NotDirectory } else { Error::Stale });
        }
        table.pin(ino);
        drop(table);
        Ok(self.handles.add_directory(DirHandle { ino, stream: Mutex::new(None) }))
    }

    /// Closes a directory.
    pub async fn releasedir(&self, fh: Fh) {
        if let Ok(handle) = self.handles.remove_directory(fh) {
            self.table.lock().unpin(handle.ino);
        }
    }

    /// fsync(2) of a directory: what was closed empty in it becomes an object now.
    pub async fn fsyncdir(&self, fh: Fh) -> Result<()> {
        let handle = self.handles.directory(fh)?;
        let empty: Vec<Ino> = {
            let table = self.table.lock();
            let children = table.dir(handle.ino).map(|dir| dir.children.values().copied().collect::<Vec<_>>()).unwrap_or_default();
            let waits = |ino: &Ino| {
                let staged = table.get(*ino).and_then(|node| node.file.staged.as_ref());
                staged.is_some_and(|staged| staged.size() == 0 && staged.is_dirty()) && !self.handles.is_written(*ino)
            };
            children.into_iter().filter(waits).collect()
        };
        for ino in empty {
            let order = self.order(ino)?;
            let turn = order.lock().await;
            if !self.handles.is_written(ino) {
                self.publish_in_turn(ino).await?;
            }
            drop(turn);
            self.retire(ino).await;
        }
        Ok(())
    }

    /// getdents(2). Entries that `sink` takes with attributes count as lookups.
    pub async fn readdir(&self, fh: Fh, offset: u64, plus: bool, sink: DirSink<'_>) -> Result<()> {
        self.within(self.read_entries(fh, offset, plus, sink)).await
    }

    async fn read_entries(&self, fh: Fh, offset: u64, plus: bool, sink: DirSink<'_>) -> Result<()> {
        let handle = self.handles.directory(fh)?;
        let mut held = handle.stream.lock().await;
        if offset == 0 || held.is_none() {
            *held = Some(self.begin(handle.ino)?);
        }
        let Some(stream) = held.as_mut() else { return Err(Error::BadHandle) };
        let mut offset = offset;
        while offset < DOTS {
            let (ino, name) = if offset == 0 { (handle.ino, ".") } else { (self.parent_ino(handle.ino), "..") };
            offset += 1;
            if !sink(DirEntry { ino, offset, kind: Kind::Directory, name: OsStr::new(name), entry: None }) {
                return Ok(());
            }
        }
        loop {
            let batch = self.batch(handle.ino, stream, offset - DOTS).await?;
            let Batch { names, listed } = batch;
            if names.is_empty() {
                match listed {
                    None => return Ok(()),
                    // A page whose every entry is in doubt yields nothing yet, and one whose rest was removed nothing more.
                    Some(end) => offset = offset.max(DOTS + end),
                }
            }
            for Prepared { name, index, found } in self.prepare(handle.ino, stream, names, plus).await? {
                offset = DOTS + index + 1;
                if !self.offer(handle.ino, stream, found, offset, &name, plus, sink)? {
                    return Ok(());
                }
            }
        }
    }

    fn parent_ino(&self, ino: Ino) -> Ino {
        self.table.lock().get(ino).map_or(super::ROOT, |node| node.parent)
    }

    /// Offers one entry; a lookup is counted first, and taken back when the buffer was full. A node that nobody has looked up
    /// yet may be let go of at any time (by the nodes made after it, too): what is listed gets another one, and is never left out.
    #[allow(clippy::too_many_arguments)]
    fn offer(&self, dir: Ino, stream: &Stream, found: Found, offset: u64, name: &OsStr, plus: bool, sink: DirSink<'_>) -> Result<bool> {
        let mut granted = None;
        for _ in 0..OFFERS_MOST {
            let (ino, kind) = match &found {
                Found::Gone => return Ok(true),
                Found::Node(ino, kind) => (*ino, *kind),
                // Its node would say that the name is there.
                Found::Listed(..) if self.is_removed_since(dir, name, stream.started) => return Ok(true),
                Found::Listed(listed, row) => self.take_offered(dir, stream, name, listed, row.as_deref().cloned()),
            };
            if !plus {
                let taken = sink(DirEntry { ino, offset, kind, name, entry: None });
                self.table.lock().release(ino);
                return Ok(taken);
            }
            granted = self.grant_shown(ino).ok().map(|entry| (ino, entry));
            if granted.is_some() || matches!(found, Found::Node(..)) {
                break;
            }
        }
        let Some((ino, entry)) = granted else {
            // A name that is here alone has gone meanwhile; a listed one has not.
            return if matches!(found, Found::Node(..)) { Ok(true) } else { Err(Error::Busy) };
        };
        let taken = sink(DirEntry { ino, offset, kind: entry.attr.kind, name, entry: Some(&entry) });
        if !taken {
            self.forget(ino, 1);
        }
        Ok(taken)
    }

    /// The inode of a listed name.
    fn take_offered(&self, dir: Ino, stream: &Stream, name: &OsStr, listed: &Listed, row: Option<Row>) -> (Ino, Kind) {
        let Some(object) = &listed.object else {
            return (self.take_directory(dir, name.to_owned(), &listed.segment, stream.started, row), Kind::Directory);
        };
        let kind = if row.as_ref().is_some_and(|row| row.target.is_some()) { Kind::Symlink } else { Kind::File };
        (self.take_listed(dir, name.to_owned(), &listed.segment, object, row, stream.started), kind)
    }

    fn begin(&self, dir: Ino) -> Result<Stream> {
        self.attach_recovered(dir);
        let place = if self.is_account(dir) { None } else { Some(self.place(dir)?) };
        let is_pinned = place.as_ref().is_some_and(|place| self.is_pinned(place.store.bucket(), &place.key));
        let mut table = self.table.lock();
        table.visit(dir);
        let state = table.dir_mut(dir).ok_or(Error::NotDirectory)?;
        let whole = state.listing.as_ref().filter(|listing| listing.complete && listing.started.elapsed() < self.shown_ttl()).cloned();
        let started = whole.as_ref().map_or_else(Instant::now, |listing| listing.started);
        let guard = state.begin_listing(started);
        if whole.is_none() && !is_pinned {
            table.make_way(dir);
        }
        let merger = place.as_ref().map_or_else(Merger::default, |place| Merger::new(&place.key));
        let prefix = place.as_ref().map(|place| place.key.clone()).unwrap_or_default();
        let ask = Some(Ask::first(ListRequest { prefix, delimited: true, ..ListRequest::default() }));
        Ok(Stream {
            _guard: guard,
            started,
            place,
            anchors: vec![Anchor { first: 0, told: None, ask, merger }],
            sweep: None,
            current: None,
            gathered: Some(Entries::default()),
            whole,
            ended: false,
            extra: None,
        })
    }

    /// The names from `index` on that are at hand after at most one request.
    async fn batch(&self, dir: Ino, stream: &mut Stream, index: u64) -> Result<Batch> {
        if stream.whole.is_none() && stream.place.is_none() {
            let listing = Arc::new(self.list_buckets(stream.started).await?);
            self.install(dir, listing.clone());
            stream.whole = Some(listing);
        }
        if let Some(whole) = stream.whole.clone() {
            return Ok(self.of_whole(dir, stream, &whole, index));
        }
        let at = stream.anchors.partition_point(|anchor| anchor.first <= index).saturating_sub(1);
        if let Some((number, page)) = stream.current.clone().filter(|(number, _)| *number == at) {
            if index < page.end {
                return Ok(page.batch(index));
            }
            if stream.ended && number + 1 == stream.anchors.len() {
                return Ok(self.extra(dir, stream, page.end, index));
            }
        }
        self.next_page(dir, stream, at, index).await
    }

    fn of_whole(&self, dir: Ino, stream: &mut Stream, whole: &Listing, index: u64) -> Batch {
        let total = whole.entries.len() as u64;
        let from = usize::try_from(index).unwrap_or(usize::MAX);
        let entries = (from..whole.entries.len()).map(|at| (at as u64, whole.entries.get(at)));
        if index < total { Batch::of(entries, total) } else { self.extra(dir, stream, total, index) }
    }

    /// Asks for page `at`; what it makes certain is the batch.
    async fn next_page(&self, dir: Ino, stream: &mut Stream, at: usize, index: u64) -> Result<Batch> {
        let place = stream.place.clone().ok_or(Error::NotDirectory)?;
        let anchor = stream.anchors.get(at).cloned().ok_or(Error::Invalid)?;
        let mut merger = anchor.merger.clone();
        let last = at + 1 == stream.anchors.len();
        let newest = last && !stream.ended;
        let page = match (anchor.ask, &mut stream.sweep) {
            (Some(ask), _) if at == 0 && anchor.told.is_none() => {
                let page = match self.first_page(dir, &place, &ask).await? {
                    First::Page(page) => page,
                    First::Pinned(started, page) => {
                        self.began(dir, stream, started);
                        page
                    }
                    First::Seen(listing) => {
                        self.began(dir, stream, listing.started);
                        stream.whole = Some(listing.clone());
                        return Ok(self.of_whole(dir, stream, &listing, index));
                    }
                };
                if newest {
                    stream.sweep = self.sweep(&ask.request, &page, self.lister(place.store.clone()));
                }
                page
            }
            (Some(ask), _) => {
                let mut page = self.list_again(&place, &ask, anchor.told.as_deref().map_or(0, <[u64]>::len)).await?;
                page.next = (!last).then(String::new);
                page
            }
            (None, Some(sweep)) if newest => match sweep.next().await? {
                Some(swept) => {
                    stream.anchors[at].ask = Some(swept.ask);
                    swept.page
                }
                None => ListPage::default(),
            },
            _ => ListPage::default(),
        };
        let next = page.next.clone();
        let entries = merger.push(page);
        if newest {
            stream.anchors[at].told = Some(entries.iter().map(|entry| mark(&entry.segment, entry.hidden)).collect());
            let gathered = stream.gathered.take().map(|mut all| {
                entries.iter().for_each(|entry| all.push(entry));
                all
            });
            stream.gathered = gathered.filter(|all| all.len() <= KEEP_MOST);
        }
        let page = match &anchor.told {
            None => Page::new(anchor.first, entries),
            // What was told stays where it was, whatever came or went since; what came is for who begins anew.
            Some(told) => Page::as_told(anchor.first, told, entries),
        };
        let end = page.end;
        if newest {
            if let Some(state) = self.table.lock().dir_mut(dir) {
                state.size = state.size.max(usize::try_from(end).unwrap_or(usize::MAX));
            }
            match next {
                Some(_) => stream.anchors.push(Anchor { first: end, told: None, ask: None, merger }),
                None => {
                    stream.ended = true;
                    stream.sweep = None;
                    if let Some(all) = stream.gathered.take() {
                        self.install(dir, Arc::new(merger.listing(stream.started, all, true)));
                    }
                }
            }
        }
        stream.current = Some((at, page.clone()));
        if index < end {
            return Ok(page.batch(index));
        }
        if stream.ended && at + 1 == stream.anchors.len() {
            return Ok(self.extra(dir, stream, end, index));
        }
        Ok(Batch { names: Vec::new(), listed: Some(end) })
    }

    /// A page that was read before, and what has slipped behind its end for names that came since.
    async fn list_again(&self, place: &Place, ask: &Ask, told: usize) -> Result<ListPage> {
        let mut request = ask.request.clone();
        let mut all = ListPage::default();
        loop {
            let mut page = self.list(place.store.as_ref(), request.clone()).await?;
            let beyond = ask.cut(&mut page);
            all.entries.append(&mut page.entries);
            all.prefixes.append(&mut page.prefixes);
            match page.next {
                Some(next) if !beyond && all.entries.len() + all.prefixes.len() < 2 * told => request.continuation = Some(next),
                _ => return Ok(all),
            }
        }
    }

    /// What the store says, or what is known of a pinned directory while it says nothing.
    async fn first_page(&self, dir: Ino, place: &Place, ask: &Ask) -> Result<First> {
        if let Some(listing) = self.surveyed(dir).await {
            return Ok(First::Seen(listing));
        }
        let bucket = place.store.bucket();
        let asked = self.list(place.store.as_ref(), ask.request.clone());
        if !self.is_pinned(bucket, &place.key) {
            return Ok(First::Page(asked.await?));
        }
        if let Some(page) = self.unless_silent(bucket, asked).await {
            return Ok(First::Page(page?));
        }
        let (started, page) = self.pinned_page(place).ok_or(Error::TimedOut)?;
        // As it was seen last, where that is since the pin was listed.
        let newer = self.newest_listing(dir).filter(|listing| listing.started > started);
        Ok(newer.map_or(First::Pinned(started, page), First::Seen))
    }

    /// It shows the directory as it was known at that time.
    fn began(&self, dir: Ino, stream: &mut Stream, started: Instant) {
        stream.started = started;
        if let Some(state) = self.table.lock().dir_mut(dir) {
            stream._guard = state.begin_listing(started);
        }
    }

    /// What follows the first page.
    pub(super) fn sweep(&self, request: &ListRequest, first: &ListPage, lister: Lister) -> Option<Sweep> {
        let (lanes, memory) = (self.config.max_connections, self.config.memory_limit / LISTED_PART);
        Sweep::after(request, first, lanes, memory, lister)
    }

    /// Lists, less what was removed here.
    pub(super) fn lister(&self, store: Arc<dyn Store>) -> Lister {
        let vfs = self.this.clone();
        Arc::new(move |request| {
            let (vfs, store) = (vfs.clone(), store.clone());
            Box::pin(async move {
                match vfs.upgrade() {
                    Some(vfs) => vfs.list_raw(store.as_ref(), request).await,
                    None => store.list(request).await,
                }
            })
        })
    }

    /// Names that exist here alone, behind those that the store lists.
    fn extra(&self, dir: Ino, stream: &mut Stream, listed: u64, index: u64) -> Batch {
        let extra = stream.extra.get_or_insert_with(|| {
            let table = self.table.lock();
            let Some(state) = table.dir(dir) else { return Vec::new() };
            let ours = state.children.values().filter(|ino| table.is_here(**ino, stream.started)).filter_map(|ino| table.get(*ino));
            let mut ours: HashMap<u64, OsString> = ours.map(|node| (mark(&node.segment, node.is_hidden()), node.name.clone())).collect();
            // What was shown in its place, with what it has become since.
            match &stream.whole {
                Some(whole) => {
                    whole.entries.iter().map(|entry| mark(&entry.segment, entry.hidden)).for_each(|shown| drop(ours.remove(&shown)))
                }
                None => stream
                    .anchors
                    .iter()
                    .flat_map(|anchor| anchor.told.iter().flat_map(|told| told.iter()))
                    .for_each(|shown| drop(ours.remove(shown))),
            }
            let mut names: Vec<OsString> = ours.into_values().collect();
            names.sort_unstable();
            names
        });
        let from = usize::try_from(index.saturating_sub(listed)).unwrap_or(usize::MAX);
        let names = extra.iter().enumerate().skip(from).map(|(at, name)| (listed + at as u64, Offered::Here(name.clone()))).collect();
        Batch { names, listed: None }
    }

    /// What is to be known of each name of a batch before it is offered.
    async fn prepare(&self, dir: Ino, stream: &Stream, batch: Vec<(u64, Offered)>, plus: bool) -> Result<Vec<Prepared>> {
        let rows = self.recall(stream, &batch).await;
        let mut prepared = Vec::with_capacity(batch.len());
        let mut links = Vec::new();
        for (at, ((index, offered), row)) in batch.into_iter().zip(rows).enumerate() {
            let listed = match offered {
                Offered::Here(name) => {
                    let found = self.child_here(dir, &name, None).map_or(Found::Gone, |(ino, kind)| Found::Node(ino, kind));
                    prepared.push(Prepared { name, index, found });
                    continue;
                }
                Offered::Listed(listed) => listed,
            };
            let name = listed.name();
            if self.is_removed_since(dir, &name, stream.started) {
                prepared.push(Prepared { name, index, found: Found::Gone });
                continue;
            }
            if let Some((ino, kind)) = self.child_here(dir, &name, Some(stream.started)) {
                prepared.push(Prepared { name, index, found: Found::Node(ino, kind) });
                continue;
            }
            let found = match (&listed.object, &stream.place) {
                (object, Some(_)) => {
                    if plus && row.is_none() && object.as_ref().is_some_and(|object| self.may_be_link(object)) {
                        links.push((at, listed.clone()));
                    }
                    Found::Listed(Box::new(listed), row.map(Box::new))
                }
                (_, None) => Found::Node(self.adopt_listed(dir, name.clone(), &listed, stream.started).await?, Kind::Directory),
            };
            prepared.push(Prepared { name, index, found });
        }
        let found = futures::stream::iter(links.into_iter().map(|(at, listed)| async move {
            let ino = self.adopt_listed(dir, listed.name(), &listed, stream.started).await;
            (at, ino)
        }));
        for (at, ino) in found.buffer_unordered(LINKS_AT_ONCE).collect::<Vec<_>>().await {
            // What the HEAD told is remembered. A link that cannot be looked at shows as the small file that the listing names.
            if let (Ok(_), Some(Prepared { found: Found::Listed(listed, row @ None), .. })) = (ino, prepared.get_mut(at))
                && let (Some(object), Some(place)) = (&listed.object, &stream.place)
            {
                let key = format!("{}{}", place.key, listed.segment);
                *row = self.memory.get(place.store.bucket(), &key, &object.etag, object.modified).await.map(Box::new);
            }
        }
        Ok(prepared)
    }

    /// What is remembered of each listed name, in one look.
    async fn recall(&self, stream: &Stream, batch: &[(u64, Offered)]) -> Vec<Option<Row>> {
        let Some(place) = &stream.place else { return vec![None; batch.len()] };
        let directory = super::marker::directory_tag();
        let wanted = batch.iter().map(|(_, offered)| match offered {
            Offered::Listed(Listed { segment, object: Some(object), .. }) => {
                (format!("{}{segment}", place.key), object.etag.clone(), object.modified)
            }
            Offered::Listed(Listed { segment, .. }) => {
                (format!("{}{segment}/", place.key), directory.clone(), std::time::SystemTime::UNIX_EPOCH)
            }
            Offered::Here(_) => (String::new(), directory.clone(), std::time::SystemTime::UNIX_EPOCH),
        });
        self.memory.get_many(place.store.bucket(), wanted.collect()).await
    }

    /// The node of a name; of a listed one where it knows better than a listing begun at `listed`.
    fn child_here(&self, dir: Ino, name: &OsStr, listed: Option<Instant>) -> Option<(Ino, Kind)> {
        let table = self.table.lock();
        let ino = table.child(dir, name).filter(|ino| listed.is_none_or(|listed| table.is_here(*ino, listed)))?;
        table.get(ino).map(|node| (ino, node.kind))
    }
}

/// The beginning of a directory.
enum First {
    Page(ListPage),
    /// Of a pinned one, and when it was listed.
    Pinned(Instant, ListPage),
    /// Listed before, whole.
    Seen(Arc<Listing>),
}

/// A name that is about to be offered.
struct Prepared {
    name: OsString,
    index: u64,
    found: Found,
}

/// What it stands for.
enum Found {
    /// Removed here since.
    Gone,
    /// A name that this mount knows better than the listing, or a bucket.
    Node(Ino, Kind),
    /// A name that the store listed, and what is remembered of it.
    Listed(Box<Listed>, Option<Box<Row>>),
}

/// Names at hand, each with its index.
struct Batch {
    names: Vec<(u64, Offered)>,
    /// Where the page ends that they are of: more may follow though there are no names.
    listed: Option<u64>,
}

enum Offered {
    Listed(Listed),
    Here(OsString),
}

/// Names that one call looks at: a kernel buffer holds some hundred of them.
const BATCH: usize = 256;

impl Batch {
    fn of(entries: impl Iterator<Item = (u64, Listed)>, end: u64) -> Self {
        Self { names: entries.take(BATCH).map(|(index, entry)| (index, Offered::Listed(entry))).collect(), listed: Some(end) }
    }
}

/// A page of the listing, each entry with its index.
#[derive(Clone)]
struct Page {
    entries: Arc<Vec<(u64, Listed)>>,
    /// The index behind it.
    end: u64,
}

impl Page {
    fn new(first: u64, entries: Vec<Listed>) -> Self {
        let entries: Vec<_> = (first..).zip(entries).collect();
        Self { end: first + entries.len() as u64, entries: Arc::new(entries) }
    }

    fn as_told(first: u64, told: &[u64], entries: Vec<Listed>) -> Self {
        let places: HashMap<u64, u64> = told.iter().copied().zip(first..).collect();
        let mut entries: Vec<_> =
            entries.into_iter().filter_map(|entry| Some((*places.get(&mark(&entry.segment, entry.hidden))?, entry))).collect();
        entries.sort_unstable_by_key(|(index, _)| *index);
        Self { end: first + told.len() as u64, entries: Arc::new(entries) }
    }

    fn batch(&self, index: u64) -> Batch {
        let from = self.entries.partition_point(|(at, _)| *at < index);
        Batch::of(self.entries[from..].iter().cloned(), self.end)
    }
}

/// Tells an entry from the others of its page.
fn mark(segment: &str, hidden: bool) -> u64 {
    let mut hasher = DefaultHasher::new();
    (segment, hidden).hash(&mut hasher);
    hasher.finish()
}
