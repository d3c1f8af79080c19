//! The data plane of one staged file: what open handles read and write.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;

use super::content::Origin;
use super::entry::{Entry, Recorded};
use super::manifest::Phase;
use super::pace::allowance;
use super::spool::blocking;
use super::state::Goal;
use super::uploader::Message;
use super::{Attributes, Base, Deletion, Error, Expect, Guess, Journalled, Published, Target, copied, publish, transfer};
use crate::failpoint;
use crate::s3::ETag;

/// A file that waits in the spool until it is an object. Dropping it does not end it: [`Staged::retire`] or
/// [`Staged::discard`] do.
pub struct Staged {
    entry: Arc<Entry>,
}

impl Staged {
    pub(crate) fn new(entry: Arc<Entry>) -> Self {
        Self { entry }
    }

    /// Names it in status.
    pub fn id(&self) -> u64 {
        self.entry.id
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.entry.content.lock().size
    }

    /// True when it is a whole new content: no object's bytes are part of it.
    pub fn is_whole(&self) -> bool {
        self.entry.content.lock().is_whole()
    }

    /// True when no object holds its content. Attributes that were set after its upload began do not count: see
    /// [`super::Writeback::update_metadata`].
    pub fn is_dirty(&self) -> bool {
        self.entry.content.lock().is_dirty()
    }

    /// True when a write of it failed: it is never published.
    pub fn is_poisoned(&self) -> bool {
        self.entry.intent.lock().poisoned
    }

    /// True when its publication is due, or under way.
    pub fn is_queued(&self) -> bool {
        self.entry.intent.lock().phase.frees()
    }

    /// Writes. Waits where the writer is too far ahead of the network (promise 3) or the spool is full of what is on
    /// its way; ends with [`Error::TimedOut`] `close_timeout` after the last progress. A write that fails poisons the file.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), Error> {
        self.change(Place::At(offset), data).await.map(drop)
    }

    /// Writes at the end, atomically with other writers of this file; gives the offset.
    pub async fn append(&self, data: Bytes) -> Result<u64, Error> {
        self.change(Place::End, data).await
    }

    async fn change(&self, place: Place, data: Bytes) -> Result<u64, Error> {
        self.usable()?;
        let result = self.try_change(place, data).await;
        if let Err(error) = &result {
            let mut intent = self.entry.intent.lock();
            intent.poisoned = true;
            intent.lacked_room |= matches!(error, Error::NoSpace);
        }
        result
    }

    async fn try_change(&self, place: Place, data: Bytes) -> Result<u64, Error> {
        let entry = &self.entry;
        let len = data.len() as u64;
        if len == 0 {
            return Ok(self.size());
        }
        self.hold_back().await?;
        let at = match place {
            Place::At(offset) => offset,
            Place::End => self.size(),
        };
        entry.make_room(at..at.saturating_add(len)).await?;
        let range = {
            let _writer = entry.turn().await;
            let offset = match place {
                Place::At(offset) => offset,
                Place::End => self.size(),
            };
            let range = offset..self.fits(offset, len)?;
            entry.unseal().await?;
            let writing = entry.clone();
            let gap = self.size().min(offset)..offset;
            blocking(move || {
                writing.file.write_all_at(&data, offset)?;
                let mut rolling = writing.rolling.lock();
                // What lies between is zeros now.
                rolling.forget(gap);
                rolling.wrote(offset, &data);
                Ok(())
            })
            .await?;
            let mut intent = entry.intent.lock();
            let mut content = entry.content.lock();
            // A new file is begun as an append to nothing: somebody else may make it meanwhile.
            let new = content.size == 0 && content.base_size.is_none() && intent.expect == Expect::NewFile;
            intent.appended = match place {
                Place::End if new || !content.is_dirty() => Some(range.start),
                Place::End => intent.appended,
                Place::At(_) => None,
            };
            content.wrote(range.clone());
            range
        };
        entry.charge();
        self.changed().await?;
        Ok(range.start)
    }

    /// The end of `len` bytes at `offset`, where the store can hold an object of that size.
    fn fits(&self, offset: u64, len: u64) -> Result<u64, Error> {
        let largest = self.entry.intent.lock().target.store.capabilities().max_object_size;
        offset.checked_add(len).filter(|&end| end <= largest).ok_or(Error::TooLarge)
    }

    /// After every change: the record exists, and the uploader hears of parts that became complete.
    async fn changed(&self) -> Result<(), Error> {
        let entry = &self.entry;
        *entry.changed.lock() = Instant::now();
        if !entry.begun.swap(true, Relaxed) {
            // Not synced: it is there so that a killed process leaves a named file, not so that a power cut does.
            entry.persist(false).await?;
        }
        if entry.parts_ready() {
            entry.shared.send(Message::Ready(entry.id));
        }
        Ok(())
    }

    /// Waits while bytes that could travel are further behind the writer than promise 3 allows.
    async fn hold_back(&self) -> Result<(), Error> {
        let entry = &self.entry;
        let shared = &entry.shared;
        if !shared.config.write_back.is_zero() {
            return Ok(());
        }
        let began = Instant::now();
        loop {
            let moved = shared.meter.moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            self.usable()?;
            let (behind, part) = entry.behind();
            if behind <= allowance(shared.meter.rate(), part, shared.streams()) {
                return Ok(());
            }
            // While it only waits for its turn, the others' progress is progress.
            let waits = entry.in_flight.load(Relaxed) == 0;
            let limit = shared.config.close_timeout;
            let last = entry.seen().max(began).max(if waits { shared.meter.seen(limit) } else { began });
            let left = limit.saturating_sub(last.elapsed());
            if left.is_zero() {
                return Err(Error::TimedOut);
            }
            let _ = tokio::time::timeout(left.min(Duration::from_secs(1)), moved).await;
        }
    }

    /// Before every change. What is refused here will be missing in the file, so that no retry may publish it (promise 6).
    fn usable(&self) -> Result<(), Error> {
        let mut intent = self.entry.intent.lock();
        match intent.failed.clone() {
            _ if intent.discarded => Err(Error::Discarded),
            Some(error) => {
                intent.poisoned = true;
                Err(error)
            }
            None => Ok(()),
        }
    }

    /// Bytes from `offset`, fewer only at the end of the file.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, Error> {
        let entry = &self.entry;
        if entry.intent.lock().discarded && entry.content.lock().size == 0 {
            return Err(Error::Discarded);
        }
        let origins = entry.content.lock().origins(offset..offset.saturating_add(len as u64));
        let mut pieces = Vec::with_capacity(origins.len());
        for (range, origin) in origins {
            let len = (range.end - range.start) as usize;
            pieces.push(match origin {
                Origin::Spool => {
                    let file = entry.file.clone();
                    blocking(move || transfer::read_exact(&file, range.start, len)).await?
                }
                Origin::Base => self.read_base(range.start, len).await?,
                Origin::Zeros => Bytes::from(vec![0; len]),
            });
        }
        Ok(match pieces.len() {
            1 => pieces.remove(0),
            _ => pieces
                .iter()
                .fold(BytesMut::new(), |mut all, piece| {
                    all.extend_from_slice(piece);
                    all
                })
                .freeze(),
        })
    }

    async fn read_base(&self, offset: u64, len: usize) -> Result<Bytes, Error> {
        let reader = self.entry.intent.lock().base.as_ref().map(|base| base.reader.clone()).ok_or(Error::Stale)?;
        let mut all = BytesMut::new();
        while all.len() < len {
            let bytes = reader.read(offset + all.len() as u64, len - all.len(), offset + len as u64).await?;
            if bytes.is_empty() {
                return Err(Error::Stale);
            }
            all.extend_from_slice(&bytes);
        }
        Ok(all.freeze())
    }

    /// Takes `range` of another file's object, at the same place and behind what it took before: the store copies it at publication.
    /// False where the bytes have to be written: there is other content, or `base` is small enough for one PUT.
    pub async fn copy(&self, base: &Base, range: Range<u64>) -> Result<bool, Error> {
        self.usable()?;
        let copied = copied::take(&self.entry, base, range).await?;
        if copied {
            self.changed().await?;
        }
        Ok(copied)
    }

    /// Cuts or extends the file.
    pub async fn truncate(&self, size: u64) -> Result<(), Error> {
        self.usable()?;
        self.fits(size, 0)?;
        {
            let _writer = self.entry.turn().await;
            if self.size() == size {
                return Ok(());
            }
            self.entry.unseal().await?;
            let file = self.entry.file.clone();
            blocking(move || file.set_len(size)).await?;
            self.entry.rolling.lock().forget(size.min(self.size())..u64::MAX);
            self.entry.intent.lock().appended = None;
            self.entry.content.lock().truncated(size);
        }
        self.entry.charge();
        self.changed().await
    }

    /// posix_fallocate: makes sure that there is room, and extends the file unless `keep_size`.
    pub async fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> Result<(), Error> {
        self.usable()?;
        let end = self.fits(offset, len)?;
        self.entry.make_room(offset..end).await?;
        if keep_size {
            return Ok(());
        }
        if end > self.size() {
            self.truncate(end).await?;
        }
        // Holes cost nothing: what later writes rely on is taken now.
        let file = self.entry.file.clone();
        blocking(move || file.allocate(offset, len)).await?;
        self.entry.charge();
        Ok(())
    }

    /// Zeros in place of `len` bytes; the size stays.
    pub async fn punch_hole(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.usable()?;
        {
            let _writer = self.entry.turn().await;
            let end = offset.saturating_add(len).min(self.size());
            if offset >= end {
                return Ok(());
            }
            self.entry.unseal().await?;
            let file = self.entry.file.clone();
            blocking(move || file.punch(offset, end - offset)).await?;
            self.entry.rolling.lock().forget(offset..end);
            self.entry.intent.lock().appended = None;
            self.entry.content.lock().punched(offset..end);
        }
        self.entry.charge();
        self.changed().await
    }

    /// Bytes and record are durable in the spool (fsync).
    pub async fn sync(&self) -> Result<(), Error> {
        if self.entry.intent.lock().discarded {
            return Ok(());
        }
        copied::fetch(&self.entry).await?;
        self.entry.begun.store(true, Relaxed);
        self.entry.intent.lock().synced = true;
        self.entry.persist_durably().await?;
        failpoint::pass("synced");
        Ok(())
    }

    /// Changes what travels with the content. After the upload began it makes the entry dirty; [`Staged::publish`] then
    /// queues a metadata copy. A crash does not lose them where it does not lose the content.
    pub async fn set_attributes(&self, change: impl FnOnce(&mut Attributes)) {
        change(&mut self.entry.intent.lock().attributes);
        if self.is_dirty()
            && let Err(error) = self.record_again().await
        {
            tracing::warn!("{}: {error}", self.entry.record.display());
        }
    }

    /// What travels with the content, as it is now.
    pub fn attributes(&self) -> Attributes {
        self.entry.intent.lock().attributes.clone()
    }

    /// Renames an unpublished file. Parts sent to another key are aborted and sent again. Where the publication under
    /// the old name cannot be stopped any more, waits for its end: [`Staged::published`] then names the old key.
    pub async fn retarget(&self, target: Target, expect: Expect) -> Result<(), Error> {
        self.go_to(target, expect, None).await
    }

    /// As [`Staged::retarget`], and from then on as after [`Staged::set_held`]: in one step, because which key the parts go to
    /// follows from both. Under another name it is a whole new content, however it was written.
    pub async fn retarget_held(&self, target: Target, expect: Expect, held: bool, guess: Option<Guess>) -> Result<(), Error> {
        self.go_to(target, expect, Some((held, guess))).await
    }

    async fn go_to(&self, target: Target, expect: Expect, held: Option<(bool, Option<Guess>)>) -> Result<(), Error> {
        if self.entry.intent.lock().discarded {
            return Err(Error::Discarded);
        }
        let (reply, answer) = oneshot::channel();
        self.entry.shared.send(Message::Retarget { id: self.entry.id, target, expect, held, reply });
        answer.await.map_err(|_| Error::Discarded)
    }

    /// The object that it started from was copied to another key, where its bytes are read from now on. Nothing where it
    /// started from another version than `from`.
    pub fn rebase(&self, from: &ETag, base: Base) {
        let mut intent = self.entry.intent.lock();
        if intent.base.as_ref().is_some_and(|known| known.etag == *from) {
            intent.base = Some(base);
        }
    }

    /// What is queued of it is not published before [`Staged::resume`]. What cannot be stopped any more is waited for:
    /// [`Staged::published`] tells.
    pub async fn pause(&self) {
        let (reply, paused) = oneshot::channel();
        self.entry.shared.send(Message::Pause { id: self.entry.id, reply });
        let _ = paused.await;
    }

    /// Ends [`Staged::pause`].
    pub fn resume(&self) {
        self.entry.intent.lock().paused = false;
        self.entry.publish_after(self.entry.shared.config.write_back);
    }

    /// Its name is another file's, or nobody's, while it is open: what was queued of it is not published, and ends with the mount
    /// or a crash. Gives what it had become before that could be stopped.
    pub async fn withhold(&self) -> Option<Published> {
        self.set_junk(true);
        self.entry.intent.lock().withheld = true;
        // Returns when what was on its way has arrived.
        let _ = self.go_to(self.target(), self.expect(), Some((true, None))).await;
        self.entry.unrecord().await;
        self.published()
    }

    /// It is published over a version whose delete was put off: that is forgotten when this content is safe.
    pub fn replaces(&self, deletion: Journalled<Deletion>) {
        self.entry.replaces.lock().push(deletion);
    }

    /// It replaces what `other` was to replace.
    pub fn inherit(&self, other: &Staged) {
        let deletions = std::mem::take(&mut *other.entry.replaces.lock());
        self.entry.replaces.lock().extend(deletions);
    }

    /// What its publication expects to find.
    pub fn expect(&self) -> Expect {
        self.entry.intent.lock().expect.clone()
    }

    /// Where it is to be published.
    pub fn target(&self) -> Target {
        self.entry.intent.lock().target.clone()
    }

    /// Under a temporary name: [`Staged::publish`] makes no object. `guess`: the upload that gets the parts.
    pub fn set_held(&self, held: bool, guess: Option<Guess>) {
        self.entry.intent.lock().hold(held, guess);
    }

    /// Not worth keeping (a lock file, a file manager's notes): it ends with the mount, and status is silent about it.
    pub fn set_junk(&self, junk: bool) {
        self.entry.intent.lock().junk = junk;
    }

    /// Brings the record up to date, if there is one.
    pub async fn record_again(&self) -> Result<(), Error> {
        let recorded = *self.entry.recorded.lock().await;
        if recorded != Recorded::Not { self.entry.persist(false).await } else { Ok(()) }
    }

    /// Seals the content as it is now, uploads it and waits until it is in S3. `Ok(None)` where it is held, or queued
    /// by `write_back`. A clean file answers at once. A failure parks the entry.
    pub async fn publish(&self) -> Result<Option<Published>, Error> {
        let entry = &self.entry;
        let (held, sends, failed, poisoned, gives_way) = {
            let intent = entry.intent.lock();
            if intent.discarded {
                return Err(Error::Discarded);
            }
            let sends = intent.guess.is_some() && (intent.eager || self.size() > entry.grid.range(1).end);
            (intent.held, sends, intent.failed.clone(), intent.poisoned, intent.lacked_room && !intent.synced)
        };
        if poisoned || failed.is_some() {
            let error = failed.unwrap_or(Error::Poisoned);
            if gives_way {
                // Never to be published, and what it holds is the room that others want.
                publish::discard(entry).await;
                return Err(Error::Poisoned);
            }
            entry.shared.send(Message::Park(entry.id, error.clone()));
            return Err(error);
        }
        if !self.is_dirty() {
            return Ok(self.published());
        }
        entry.begun.store(true, Relaxed);
        if held {
            copied::fetch(entry).await?;
        }
        // What it lacks it takes from another file's object: that is copied while it is there.
        let can_wait = !entry.content.lock().borrows();
        let target = self.target();
        if can_wait && entry.shared.queues(target.store.as_ref(), &target.key).await {
            self.queue(entry.shared.config.write_back, held).await?;
            return Ok(None);
        }
        if held && (!sends || self.size() == 0) {
            entry.persist(true).await?;
            return Ok(None);
        }
        let goal = if held { Goal::Parts } else { Goal::Object };
        let (reply, answer) = oneshot::channel();
        entry.shared.send(Message::Publish { id: entry.id, goal, reply: Some(reply) });
        answer.await.map_err(|_| Error::Discarded)?
    }

    async fn queue(&self, delay: Duration, held: bool) -> Result<(), Error> {
        let entry = &self.entry;
        if held {
            entry.persist_durably().await?;
        } else {
            self.promise().await?;
        }
        failpoint::pass("queued");
        if !held {
            entry.forget_replaced().await;
            entry.publish_after(delay);
        }
        Ok(())
    }

    /// What was closed is to be published, whatever becomes of the program: the caller is about to see to it.
    pub async fn promise(&self) -> Result<(), Error> {
        let entry = &self.entry;
        {
            let _writer = entry.turn().await;
            let mut intent = entry.intent.lock();
            intent.sealed = true;
            if !intent.phase.frees() {
                intent.phase = Phase::Sealed;
            }
            intent.reason = None;
        }
        entry.persist_durably().await
    }

    /// Recorded now, published after `delay` unless it changes before; [`super::Writeback::drain`] does it at once.
    pub async fn publish_later(&self, delay: Duration) -> Result<(), Error> {
        if self.entry.intent.lock().discarded {
            return Err(Error::Discarded);
        }
        if !self.entry.content.lock().is_dirty() {
            return Ok(());
        }
        self.entry.begun.store(true, Relaxed);
        self.queue(delay, false).await
    }

    /// Waits until a queued file is an object. `Ok(None)` where it is written again, or held.
    pub async fn settled(&self) -> Result<Option<Published>, Error> {
        /// A change may come without a notice.
        const LOOK: Duration = Duration::from_secs(1);
        loop {
            let changed = self.entry.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let intent = self.entry.intent.lock();
                match intent.phase {
                    // An earlier run's leaves the spool by itself.
                    Phase::Published if intent.discarded && intent.retired => return Ok(intent.published.clone()),
                    _ if intent.discarded => return Err(Error::Discarded),
                    Phase::Published => return Ok(intent.published.clone()),
                    Phase::Parked => return Err(intent.parked.clone().unwrap_or(Error::Discarded)),
                    Phase::Writing => return Ok(None),
                    Phase::Sealed | Phase::Uploading | Phase::Completing => {}
                }
            }
            let _ = tokio::time::timeout(LOOK, changed).await;
        }
    }

    /// The key that a temporary name will probably be renamed to.
    pub fn guess(&self) -> Option<String> {
        let intent = self.entry.intent.lock();
        intent.guess.clone().filter(|_| intent.held)
    }

    /// See [`Staged::set_junk`].
    pub fn is_junk(&self) -> bool {
        self.entry.intent.lock().junk
    }

    /// Under a temporary name.
    pub fn is_held(&self) -> bool {
        self.entry.intent.lock().held
    }

    /// Takes a file that an earlier run left into use: it ends when it is retired, no longer by itself. False where it has ended.
    pub fn take_over(&self) -> bool {
        let mut intent = self.entry.intent.lock();
        intent.retired = false;
        !intent.discarded
    }

    /// The last publication.
    pub fn published(&self) -> Option<Published> {
        self.entry.intent.lock().published.clone()
    }

    /// Nobody wants the bytes: aborts uploads, removes the record and the spool file.
    pub async fn discard(&self) {
        publish::discard(&self.entry).await;
    }

    /// It is parked and nobody looks after it any more: once a retry has published it, it leaves the spool by itself.
    pub fn leave(&self) {
        self.entry.intent.lock().retired = true;
    }

    /// The file is published and closed. Gives its spool file, for the cache, where it holds the whole object; else
    /// removes it. A file that is not published stays in the spool and gives `None`.
    pub async fn retire(&self) -> Option<PathBuf> {
        publish::retire(&self.entry).await
    }
}

/// Where a write goes.
#[derive(Clone, Copy)]
enum Place {
    At(u64),
    End,
}
