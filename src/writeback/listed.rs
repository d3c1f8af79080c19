//! What status shows of the spool, and the numbers that people name its entries by.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use super::entry::{Entry, Shared};
use super::manifest::Phase;
use super::{ConflictCopy, EntryStatus, Pending, spool};

/// A temporary name that was left for so long shows as not uploaded (promise 10).
const LEFT: Duration = Duration::from_secs(60);

impl Shared {
    pub fn status(&self) -> Vec<EntryStatus> {
        let mut all: Vec<EntryStatus> = self.entries().iter().filter_map(|entry| entry.status()).collect();
        all.extend(self.stranded.lock().iter().filter_map(|(&id, stranded)| stranded.status(&self.spool.disk, id)));
        all.sort_by_key(|status| status.id);
        all
    }

    /// What is on its way, without a word about any of it: asked every other second, of queues of thousands.
    pub fn pending(&self) -> Pending {
        let mut pending = Pending { files: self.deletes.waiting_count(), ..Pending::default() };
        for entry in self.entries() {
            let (intent, content) = (entry.intent.lock(), entry.content.lock());
            let stays = intent.discarded || intent.junk || intent.held || intent.phase == Phase::Parked;
            if stays || intent.phase == Phase::Published && !content.is_dirty() || intent.recovered && intent.phase == Phase::Writing {
                continue;
            }
            let speed = entry.speed.now();
            // A log that somebody keeps open is on no way.
            if intent.phase == Phase::Writing && speed == 0 {
                continue;
            }
            pending.files += 1;
            pending.bytes += content.size.saturating_sub(entry.sent.load(Relaxed));
            pending.speed += speed;
        }
        pending
    }

    /// Takes note of a file that was published beside somebody else's change of it.
    pub fn kept_beside(&self, bucket: &str, key: &str, kept_as: &str) {
        /// Older ones are in the log.
        const REMEMBERED: usize = 20;
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let copy = ConflictCopy { bucket: bucket.to_owned(), key: key.to_owned(), kept_as: kept_as.to_owned(), at };
        let mut conflicts = self.conflicts.lock();
        conflicts.push_back(copy);
        if conflicts.len() > REMEMBERED {
            conflicts.pop_front();
        }
    }
}

impl Entry {
    /// The number of an entry found at start: its file's, by which earlier mounts named it, or a new one where that is taken.
    pub fn number(shared: &Shared, data: &Path) -> u64 {
        let kept = spool::number_of(data);
        let taken = |number: &u64| shared.entry(*number).is_some() || shared.stranded.lock().contains_key(number);
        match kept.filter(|number| *number < u64::MAX / 2 && !taken(number)) {
            Some(number) => {
                shared.next_id.fetch_max(number + 1, Relaxed);
                number
            }
            None => shared.next_number(),
        }
    }

    pub fn status(&self) -> Option<EntryStatus> {
        let intent = self.intent.lock();
        let content = self.content.lock();
        if intent.discarded || intent.junk || (intent.phase == Phase::Published && !content.is_dirty()) {
            return None;
        }
        let left = intent.held && (intent.recovered || self.changed.lock().elapsed() > LEFT);
        Some(EntryStatus {
            id: self.id,
            bucket: intent.target.store.bucket().to_owned(),
            key: intent.target.key.clone(),
            phase: intent.phase,
            size: content.size,
            sent: self.sent.load(Relaxed).min(content.size),
            speed: self.speed.now(),
            reason: intent.reason.clone().or_else(|| left.then(|| "not uploaded: its name is a temporary one".to_owned())),
            recovered: intent.recovered,
            held: intent.held,
            incomplete: intent.poisoned,
            stranded: false,
        })
    }
}
