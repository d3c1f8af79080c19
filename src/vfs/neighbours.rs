//! Who reads the small files of a directory one after the other, in the order in which it is listed (a website, a checksum run,
//! `rsync -c`, `cp -r` out), finds the next ones fetched: else each file costs a round trip, however small it is.
//!
//! What is fetched is one list of the whole mount, because each file in it is an open file of the cache: bounded by directory it would
//! grow with the directories that somebody looked into.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;

use super::attr::Kind;
use super::inode::{Place, Table};
use super::listing::{Listed, Listing};
use super::versions::JUST_NOW;
use super::{Ino, Vfs};
use crate::cache::{Cache, ObjectVersion, READ_DEADLINE, Reader};
use crate::s3::{ETag, ObjectHead};

/// A larger file has read-ahead of its own.
const SMALL: u64 = 1 << 20;
/// Files fetched ahead of one reader, at most: at 20 ms that many round trips at once are 1,600 files a second.
const FILES: usize = 32;
/// Their bytes, at most.
const BYTES: u64 = 16 << 20;
/// Files fetched ahead in the whole mount, at most: each has an open file of the cache.
const FILES_OF_ALL: usize = 64;
/// Where many directories are read at once each has so many files ahead, at least.
const FILES_LEAST: usize = 2;
/// No file is fetched that its reader comes to later than this: what the store said of it must be of the last second still (promise 14),
/// and a reader takes a moment longer now and then.
const REACH: Duration = Duration::from_millis(700);
/// Several processes that share a directory's files, or a kernel that reads ahead, are so many files out of order, at most.
const DISORDER: usize = 8;
/// So many names are looked at for the next ones of them that are small files.
const LOOKED_AT: usize = 256;
/// A reader that comes from a directory which it went through goes through the next one too.
const MOMENTUM: Duration = Duration::from_secs(1);
/// A file that was fetched and that nobody opened within this time is held no more. Its bytes stay in the cache.
const HELD: Duration = Duration::from_secs(2);
/// How often it is looked for such files.
const LOOK: Duration = Duration::from_millis(500);

/// How the files of one directory were read lately.
#[derive(Default)]
pub(super) struct Walk {
    /// Segment of the file that was read last, as far as the order goes.
    last: Option<Box<str>>,
    /// Files read in order.
    run: u32,
    /// Segment up to which files are fetched.
    planned: Option<Box<str>>,
    /// How long the reader is busy with one file: from the answer to an open until the next open. What an open waits for is ours.
    pace: Option<Duration>,
    /// When an open was last asked for or answered.
    touched: Option<Instant>,
}

/// What may be fetched of one directory.
struct Room {
    files: usize,
    bytes: u64,
}

/// A file that is fetched before anybody asks for it. Dropped, it is wanted no more.
pub(super) struct Neighbour {
    dir: Ino,
    segment: Box<str>,
    reader: Arc<Reader>,
    begun: Instant,
    /// When the store said that the object is this version, and its head.
    told: AbortOnDropHandle<Option<(Instant, ObjectHead)>>,
}

/// What is fetched ahead in the whole mount.
#[derive(Default)]
pub(super) struct FetchedAhead {
    /// In the order in which they were fetched.
    files: Vec<Neighbour>,
    /// When somebody went through the files of a directory in order, and his pace.
    walked: Option<(Instant, Duration)>,
    /// A task looks for what is held in vain.
    watched: bool,
}

/// A file to fetch.
struct Wanted {
    segment: Box<str>,
    etag: ETag,
    size: u64,
    version_id: Option<String>,
    /// Its next open asks nothing (promise 14): it needs its bytes alone.
    asked: bool,
}

impl Walk {
    /// Notes that the file at `at` is opened. False where it does not go on from the files before. `momentum`: the pace of a reader who has
    /// just gone through another directory.
    fn step(&mut self, listing: &Listing, at: usize, momentum: Option<Duration>) -> bool {
        let segment = || Some(listing.entries.segment(at).into());
        let small = |index: &usize| is_small(listing, *index);
        let busy = self.touched.replace(Instant::now()).map_or(Duration::ZERO, |touched| touched.elapsed().min(JUST_NOW));
        match self.last.as_deref().and_then(|last| listing.position(last)) {
            Some(last) if last == at => true,
            Some(last) if last.abs_diff(at) <= LOOKED_AT && (last.min(at) + 1..last.max(at)).filter(small).count() < DISORDER => {
                self.run += 1;
                self.pace = Some(self.pace.map_or(busy, |pace| (pace + busy) / 2));
                if last < at {
                    self.last = segment();
                }
                true
            }
            _ => {
                let pace = momentum.filter(|_| !(0..at).take(LOOKED_AT).any(|index| small(&index)));
                *self = Self { last: segment(), run: u32::from(pace.is_some()), planned: None, pace, touched: self.touched };
                false
            }
        }
    }

    /// The entries to fetch for a reader who is at `at`.
    fn choose(&mut self, listing: &Listing, at: usize, room: &Room) -> Vec<usize> {
        if self.run == 0 {
            return Vec::new();
        }
        let small = |index: &usize| is_small(listing, *index);
        let files = (2 << self.run.min(8)).min(room.files).min(self.within_reach());
        let from = self.planned.as_deref().and_then(|planned| listing.position(planned)).map_or(at, |planned| planned.max(at)) + 1;
        let next = (at + 1..listing.entries.len()).take(LOOKED_AT).filter(small).take(files).filter(|index| *index >= from);
        let size = |index: usize| listing.entries.file_size(index).unwrap_or(0);
        let mut bytes = room.bytes;
        let chosen: Vec<usize> = next
            .take_while(|index| {
                let fits = size(*index) <= bytes;
                bytes = bytes.saturating_sub(size(*index));
                fits
            })
            .collect();
        if let Some(last) = chosen.last() {
            self.planned = Some(listing.entries.segment(*last).into());
        }
        chosen
    }

    /// Files that the reader comes to in time. None where he is so slow that fetching the next one would cost him a HEAD more than opening it.
    fn within_reach(&self) -> usize {
        let files = REACH.as_micros() / self.pace.unwrap_or_default().as_micros().max(1);
        usize::try_from(files).unwrap_or(usize::MAX)
    }

    /// An open was answered.
    pub fn on_opened(&mut self) {
        if self.touched.is_some() {
            self.touched = Some(Instant::now());
        }
    }
}

impl FetchedAhead {
    fn momentum(&self) -> Option<Duration> {
        self.walked.filter(|(at, _)| at.elapsed() < MOMENTUM).map(|(_, pace)| pace)
    }

    /// What may be fetched of `dir` beside what is held. Readers of many directories share what there is: one that pushed out what
    /// another one waits for would have it fetched twice.
    fn room(&self, dir: Ino) -> Room {
        let mut others: Vec<Ino> = self.files.iter().map(|neighbour| neighbour.dir).filter(|other| *other != dir).collect();
        others.sort_unstable();
        others.dedup();
        let held = self.files.iter().filter(|neighbour| neighbour.dir == dir).map(|neighbour| neighbour.reader.version().size).sum();
        Room { files: (FILES_OF_ALL / (others.len() + 1)).clamp(FILES_LEAST, FILES), bytes: BYTES.saturating_sub(held) }
    }

    /// Gives what of `dir` is wanted no more: what was passed without being read, and everything where the reader is elsewhere.
    fn passed(&mut self, dir: Ino, listing: &Listing, at: usize, goes_on: bool) -> Vec<Neighbour> {
        let near = |segment: &str| listing.position(segment).is_some_and(|index| index + DISORDER >= at);
        self.files.extract_if(.., |neighbour| neighbour.dir == dir && !(goes_on && near(&neighbour.segment))).collect()
    }

    /// Gives those that were fetched longest ago and are too many now.
    fn add(&mut self, fetched: Vec<Neighbour>) -> Vec<Neighbour> {
        self.files.extend(fetched);
        let over = self.files.len().saturating_sub(FILES_OF_ALL);
        self.files.drain(..over).collect()
    }

    fn take(&mut self, dir: Ino, segment: &str) -> Option<Neighbour> {
        let index = self.files.iter().position(|neighbour| neighbour.dir == dir && *neighbour.segment == *segment)?;
        Some(self.files.remove(index))
    }
}

fn is_small(listing: &Listing, at: usize) -> bool {
    listing.entries.file_size(at).is_some_and(is_small_size)
}

fn is_small_size(size: u64) -> bool {
    (1..=SMALL).contains(&size)
}

/// What a listed file is now, as far as this mount knows: the listing is older than what was changed here since, and does not change
/// with it. `None` where nothing is to be fetched of it.
fn wanted(table: &Table, dir: Ino, listing: &Listing, entry: &Listed) -> Option<Wanted> {
    let (name, listed) = (entry.name(), entry.object.as_ref()?);
    if table.dir(dir)?.removed.contains_key(&name) {
        return None;
    }
    let wanted = |etag: &ETag, size| Wanted { segment: entry.segment.clone(), etag: etag.clone(), size, version_id: None, asked: false };
    let Some(node) = table.child(dir, &name).and_then(|child| table.get(child)) else { return Some(wanted(&listed.etag, listed.size)) };
    // What has a local copy is read from that.
    if node.kind != Kind::File || node.is_local() || node.file.staged.is_some() {
        return None;
    }
    let asked = node.file.unopened && node.checked.is_some_and(|at| at.elapsed() < JUST_NOW);
    let newer = node.object.as_ref().filter(|object| object.etag != listed.etag && node.checked.is_some_and(|at| at > listing.started));
    match newer {
        Some(object) if !is_small_size(object.size) || object.archived => None,
        Some(object) => Some(Wanted { version_id: object.version_id.clone(), asked, ..wanted(&object.etag, object.size) }),
        None => Some(Wanted { asked, ..wanted(&listed.etag, listed.size) }),
    }
}

impl Vfs {
    /// A file is opened to be read.
    pub(super) fn fetch_neighbours(&self, ino: Ino) {
        let (parent, chosen, _passed) = {
            let mut table = self.table.lock();
            let Some(node) = table.get(ino).filter(|node| node.linked && node.kind == Kind::File && node.size <= SMALL) else { return };
            let (parent, segment) = (node.parent, node.segment.clone());
            let Some(dir) = table.dir_mut(parent) else { return };
            let Some((listing, at)) = dir.listing.clone().and_then(|listing| listing.position(&segment).map(|at| (listing, at))) else {
                return;
            };
            let mut ahead = self.fetched_ahead.lock();
            let goes_on = dir.walk.step(&listing, at, ahead.momentum());
            let passed = ahead.passed(parent, &listing, at, goes_on);
            let chosen = dir.walk.choose(&listing, at, &ahead.room(parent));
            if dir.walk.run > 1 {
                ahead.walked = Some((Instant::now(), dir.walk.pace.unwrap_or_default()));
            }
            let chosen: Vec<_> =
                chosen.into_iter().filter_map(|index| wanted(&table, parent, &listing, &listing.entries.get(index))).collect();
            (parent, chosen, passed)
        };
        if chosen.is_empty() {
            return;
        }
        let Ok(place) = self.place(parent) else { return };
        let fetched: Vec<_> = chosen.into_iter().filter_map(|wanted| self.fetch_ahead(parent, &place, wanted)).collect();
        let (_pushed_out, unwatched) = {
            let mut ahead = self.fetched_ahead.lock();
            let pushed_out = ahead.add(fetched);
            let unwatched = !ahead.files.is_empty() && !ahead.watched;
            ahead.watched |= unwatched;
            (pushed_out, unwatched)
        };
        if unwatched {
            self.watch_neighbours();
        }
    }

    fn fetch_ahead(&self, dir: Ino, place: &Place, wanted: Wanted) -> Option<Neighbour> {
        let version = ObjectVersion {
            bucket: place.store.bucket().to_owned(),
            key: format!("{}{}", place.key, wanted.segment),
            etag: wanted.etag,
            size: wanted.size,
            version_id: wanted.version_id,
        };
        if wanted.asked && self.cache.is_complete(&version) {
            return None;
        }
        let reader = Arc::new(self.cache.reader(place.store.clone(), version));
        let asks = reader.clone();
        let told = tokio::spawn(async move { asks.fetch_ahead().await.ok().map(|head| (Instant::now(), head)) });
        Some(Neighbour { dir, segment: wanted.segment, reader, begun: Instant::now(), told: AbortOnDropHandle::new(told) })
    }

    /// Lets go of what nobody came for, until nothing is held.
    fn watch_neighbours(&self) {
        let Some(vfs) = self.shared() else { return };
        self.spawn(async move {
            loop {
                vfs.pause(LOOK).await;
                let closing = vfs.closing.is_cancelled();
                let mut ahead = vfs.fetched_ahead.lock();
                let in_vain: Vec<_> = ahead.files.extract_if(.., |neighbour| closing || neighbour.is_in_vain(&vfs.cache)).collect();
                ahead.watched = !ahead.files.is_empty();
                let ends = !ahead.watched;
                drop(ahead);
                drop(in_vain);
                if ends {
                    return;
                }
            }
        });
    }

    /// What was fetched of a file that is opened now. The next open asks for itself.
    pub(super) fn take_neighbour(&self, ino: Ino, etag: &ETag) -> Option<Neighbour> {
        let (parent, segment) = self.table.lock().get(ino).map(|node| (node.parent, node.segment.clone()))?;
        let taken = self.fetched_ahead.lock().take(parent, &segment);
        taken.filter(|neighbour| neighbour.reader.version().etag == *etag)
    }
}

impl Neighbour {
    /// Nobody came for it, and dropping it stops nothing: a reader on a slow line waits longer for the files before than it is held.
    fn is_in_vain(&self, cache: &Cache) -> bool {
        let ended = || cache.is_complete(self.reader.version()) || self.told.is_finished() && self.reader.head().is_none();
        let age = self.begun.elapsed();
        age > READ_DEADLINE || age > HELD && ended()
    }

    /// What the store said of it within the last second, which is as good as asking (promise 14).
    pub async fn head(&mut self) -> Option<ObjectHead> {
        let (at, head) = (&mut self.told).await.ok()??;
        (at.elapsed() < JUST_NOW).then_some(head)
    }

    /// Has its bytes.
    pub fn reader(self) -> Arc<Reader> {
        self.reader
    }
}
