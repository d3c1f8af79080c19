//! Who reads the small files of a directory one after the other, in the order in which it is listed (a website, a checksum run,
//! `rsync -c`, `cp -r` out), finds the next ones fetched: else each file costs a round trip, however small it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;

use super::attr::Kind;
use super::inode::Place;
use super::listing::{Listed, Listing};
use super::versions::JUST_NOW;
use super::{Ino, Vfs};
use crate::cache::{ObjectVersion, Reader};
use crate::s3::{ETag, ObjectHead};

/// A larger file has read-ahead of its own.
const SMALL: u64 = 1 << 20;
/// Files fetched ahead, at most: at 20 ms that many round trips at once are 1,600 files a second.
const FILES: usize = 32;
/// Their bytes, at most.
const BYTES: u64 = 16 << 20;
/// Several processes that share a directory's files, or a kernel that reads ahead, are so many files out of order, at most.
const DISORDER: usize = 8;
/// So many names are looked at for the next ones of them that are small files.
const LOOKED_AT: usize = 256;
/// A reader that comes from a directory which it went through goes through the next one too.
const MOMENTUM: Duration = Duration::from_secs(1);

/// How the files of one directory were read lately.
#[derive(Default)]
pub(super) struct Walk {
    /// Segment of the file that was read last, as far as the order goes.
    last: Option<Box<str>>,
    /// Files read in order.
    run: u32,
    /// Segment up to which files are fetched.
    planned: Option<Box<str>>,
    ahead: Vec<Neighbour>,
}

/// A file that is fetched before anybody asks for it. Dropped, it is wanted no more.
pub(super) struct Neighbour {
    segment: Box<str>,
    reader: Arc<Reader>,
    /// When the store said that the object is this version, and its head.
    told: AbortOnDropHandle<Option<(Instant, ObjectHead)>>,
}

impl Walk {
    /// Notes that a file is opened, and gives the entries to fetch. `comes`: its reader has just gone through another directory.
    fn on_read(&mut self, listing: &Listing, segment: &str, comes: bool) -> Vec<usize> {
        let Some(at) = listing.position(segment) else { return Vec::new() };
        let small = |index: &usize| is_small(&listing.entries[*index]);
        match self.last.as_deref().and_then(|last| listing.position(last)) {
            Some(last) if last == at => {}
            Some(last) if last.abs_diff(at) <= LOOKED_AT && (last.min(at) + 1..last.max(at)).filter(small).count() < DISORDER => {
                self.run += 1;
                if last < at {
                    self.last = Some(segment.into());
                }
            }
            _ => {
                let begins = comes && !(0..at).take(LOOKED_AT).any(|index| small(&index));
                *self = Self { last: Some(segment.into()), run: u32::from(begins), ..Self::default() };
            }
        }
        if self.run == 0 {
            return Vec::new();
        }
        self.forget_passed(listing, at);
        let (files, from) = ((2 << self.run.min(8)).min(FILES), self.planned.as_deref().and_then(|planned| listing.position(planned)));
        let (mut room, from) = (BYTES, from.map_or(at, |planned| planned.max(at)) + 1);
        room = room.saturating_sub(self.ahead.iter().map(|neighbour| neighbour.reader.version().size).sum());
        let next = (at + 1..listing.entries.len()).take(LOOKED_AT).filter(small).take(files).filter(|index| *index >= from);
        let size = |index: usize| listing.entries[index].object.as_ref().map_or(0, |object| object.size);
        let chosen: Vec<usize> = next
            .take_while(|index| {
                let fits = size(*index) <= room;
                room = room.saturating_sub(size(*index));
                fits
            })
            .collect();
        if let Some(last) = chosen.last() {
            self.planned = Some(listing.entries[*last].segment.clone());
        }
        chosen
    }

    /// What was passed without being read is not wanted.
    fn forget_passed(&mut self, listing: &Listing, at: usize) {
        self.ahead.retain(|neighbour| listing.position(&neighbour.segment).is_some_and(|index| index + DISORDER >= at));
    }

    fn take(&mut self, segment: &str) -> Option<Neighbour> {
        let index = self.ahead.iter().position(|neighbour| &*neighbour.segment == segment)?;
        Some(self.ahead.swap_remove(index))
    }
}

fn is_small(entry: &Listed) -> bool {
    let small = |size: u64| (1..=SMALL).contains(&size);
    // One written with SHA-1 is a link, perhaps.
    !entry.hidden && entry.object.as_ref().is_some_and(|object| small(object.size) && !object.archived && !object.sha1)
}

impl Vfs {
    /// A file is opened to be read.
    pub(super) fn fetch_neighbours(&self, ino: Ino) {
        let comes = self.walked.lock().is_some_and(|at| at.elapsed() < MOMENTUM);
        let (parent, chosen) = {
            let mut table = self.table.lock();
            let Some(node) = table.get(ino).filter(|node| node.linked && node.kind == Kind::File && node.size <= SMALL) else { return };
            let (parent, segment) = (node.parent, node.segment.clone());
            let Some(dir) = table.dir_mut(parent) else { return };
            let Some(listing) = dir.listing.clone() else { return };
            let chosen = dir.walk.on_read(&listing, &segment, comes);
            if dir.walk.run > 1 {
                *self.walked.lock() = Some(Instant::now());
            }
            let here = |entry: &Listed| {
                let name = entry.name();
                let child = table.child(parent, &name).and_then(|child| table.get(child));
                let removed = table.dir(parent).is_some_and(|dir| dir.removed.contains_key(&name));
                removed || child.is_some_and(|child| child.is_local())
            };
            let chosen: Vec<Listed> = chosen.into_iter().map(|index| listing.entries[index].clone()).filter(|entry| !here(entry)).collect();
            (parent, chosen)
        };
        if chosen.is_empty() {
            return;
        }
        let Ok(place) = self.place(parent) else { return };
        let fetched: Vec<_> = chosen.iter().filter_map(|entry| self.fetch_ahead(&place, entry)).collect();
        if let Some(dir) = self.table.lock().dir_mut(parent) {
            dir.walk.ahead.extend(fetched);
        }
    }

    fn fetch_ahead(&self, dir: &Place, entry: &Listed) -> Option<Neighbour> {
        let object = entry.object.as_ref()?;
        let version = ObjectVersion {
            bucket: dir.store.bucket().to_owned(),
            key: format!("{}{}", dir.key, entry.segment),
            etag: object.etag.clone(),
            size: object.size,
            version_id: None,
        };
        let reader = Arc::new(self.cache.reader(dir.store.clone(), version));
        let asks = reader.clone();
        let told = tokio::spawn(async move { asks.fetch_ahead().await.ok().map(|head| (Instant::now(), head)) });
        Some(Neighbour { segment: entry.segment.clone(), reader, told: AbortOnDropHandle::new(told) })
    }

    /// What was fetched of a file that is opened now. The next open asks for itself.
    pub(super) fn take_neighbour(&self, ino: Ino, etag: &ETag) -> Option<Neighbour> {
        let mut table = self.table.lock();
        let (parent, segment) = table.get(ino).map(|node| (node.parent, node.segment.clone()))?;
        table.dir_mut(parent)?.walk.take(&segment).filter(|neighbour| neighbour.reader.version().etag == *etag)
    }
}

impl Neighbour {
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
