//! Deletes that are put off (`write_back`, and for a moment promise 11's): journalled, then sent in batches.
//!
//! A key that waits here is gone for everybody on the mount until S3 has let go of it, over remounts too. A directory's
//! marker waits for all that is below it. Outages are ridden out; what the store refuses is told, and its name shows again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures::StreamExt;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::entry::Shared;
use super::journal::{Deletion, Journalled};
use super::{DeleteStatus, Error};
use crate::s3::{Account, DELETE_MOST, ETag, ErrorKind, ListPage, S3Error, Store, delete_version, explain};

/// Requests at once where a batch is sent key by key.
const SINGLY: usize = 8;
/// How long a listing may take that was begun while a key was still there.
const SLOWEST_LISTING: Duration = Duration::from_secs(120);
/// Longest delay while a drain waits: as long as a name that is about to be taken is held (promise 11).
const HURRIED: Duration = Duration::from_secs(1);
/// Pauses between attempts: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Bucket and key.
type Name = (String, String);
/// Is told of keys that stay: refused, taken back, or replaced by somebody else meanwhile.
type Kept = Box<dyn Fn(&[Name]) + Send + Sync>;

/// The deletes of one mount.
#[derive(Default)]
pub(crate) struct Deletes {
    inner: Mutex<Inner>,
    /// Woken when one came that is due before the others, when some ended, and when all are to hurry.
    changed: Notify,
    kept: OnceLock<Kept>,
}

#[derive(Default)]
struct Inner {
    /// In the order of keys, so that what lies below a directory follows its marker.
    waiting: BTreeMap<Name, Slot>,
    /// What S3 has let go of, and when: a listing begun before may hold it still.
    ended: HashMap<Name, Instant>,
    /// What the store refused, by number, until it is tried again or dismissed.
    refused: BTreeMap<u64, Refused>,
    /// Buckets that a batch is on its way to.
    busy: HashSet<String>,
    /// Drains that wait.
    drains: usize,
    /// When the queue is looked at next.
    look: Option<Instant>,
}

/// The way to a bucket.
#[derive(Clone)]
pub(crate) enum Way {
    Store(Arc<dyn Store>),
    /// It could not be reached when this mount began: it is looked for with each attempt.
    Account(Arc<dyn Account>),
}

impl Way {
    async fn store(&self, bucket: &str) -> Result<Arc<dyn Store>, S3Error> {
        match self {
            Way::Store(store) => Ok(store.clone()),
            Way::Account(account) => account.bucket(bucket).await,
        }
    }
}

struct Slot {
    way: Way,
    journalled: Journalled<Deletion>,
    /// Goes with others from here on.
    ready: Instant,
    /// Goes by itself.
    due: Instant,
    sending: bool,
    attempts: u32,
    reason: Option<String>,
}

struct Refused {
    way: Way,
    deletion: Deletion,
    error: S3Error,
}

/// What became of a key.
enum End {
    Gone,
    /// It is another version by now, or a directory that has names.
    Kept,
    Later(S3Error),
    Refused(S3Error),
}

impl Inner {
    fn below<'a>(&'a self, bucket: &str, prefix: &'a str) -> impl Iterator<Item = (&'a Name, &'a Slot)> {
        let (bucket, from) = (bucket.to_owned(), (bucket.to_owned(), prefix.to_owned()));
        self.waiting.range(from..).take_while(move |((other, key), _)| *other == bucket && key.starts_with(prefix))
    }

    fn hides(&self, name: &Name, since: Instant) -> bool {
        self.waiting.contains_key(name) || self.ended.get(name).is_some_and(|at| *at >= since)
    }

    /// The keys that go to a bucket now: those below a directory before its marker, and no marker before all of them.
    fn batch(&mut self, bucket: &str, now: Instant) -> Vec<(Name, Option<ETag>)> {
        let (mut chosen, mut stays) = (Vec::new(), None::<&str>);
        for (name, slot) in self.waiting.iter().rev().filter(|((of, _), _)| of == bucket) {
            let key = name.1.as_str();
            let blocked = key.ends_with('/') && stays.is_some_and(|stays| stays.starts_with(key));
            if blocked || slot.ready > now {
                stays = Some(key);
            } else if chosen.len() < DELETE_MOST {
                chosen.push((name.clone(), slot.journalled.what.etag.clone()));
            } else {
                break;
            }
        }
        for (name, _) in &chosen {
            if let Some(slot) = self.waiting.get_mut(name) {
                slot.sending = true;
            }
        }
        chosen
    }
}

impl Deletes {
    /// Who is to be told of keys that stay. Once.
    pub fn on_kept(&self, kept: Kept) {
        let _ = self.kept.set(kept);
    }

    /// Queues what is journalled already.
    pub fn queue(&self, way: Way, journalled: Journalled<Deletion>, delay: Duration) -> Option<Journalled<Deletion>> {
        let name = (journalled.what.bucket.clone(), journalled.what.key.clone());
        let (replaced, sooner) = {
            let mut inner = self.inner.lock();
            let (now, delay) = (Instant::now(), if inner.drains > 0 { delay.min(HURRIED) } else { delay });
            let slot = Slot { way, journalled, ready: now + delay / 2, due: now + delay, sending: false, attempts: 0, reason: None };
            inner.refused.retain(|_, refused| (&refused.deletion.bucket, &refused.deletion.key) != (&name.0, &name.1));
            let sooner = inner.look.is_none_or(|look| slot.due < look);
            (inner.waiting.insert(name, slot), sooner)
        };
        if sooner {
            self.changed.notify_waiters();
        }
        replaced.map(|slot| slot.journalled)
    }

    /// Takes the key out of the queue: something replaces it. `None` where nothing waits, also after a wait for what was on
    /// its way. The record stays on disk until it is forgotten.
    pub async fn take(&self, bucket: &str, key: &str) -> Option<Journalled<Deletion>> {
        let name = (bucket.to_owned(), key.to_owned());
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut inner = self.inner.lock();
                match inner.waiting.get(&name) {
                    Some(slot) if slot.sending => {}
                    Some(_) => return inner.waiting.remove(&name).map(|slot| slot.journalled),
                    None => return None,
                }
            }
            changed.await;
        }
    }

    /// Sends what waits for a key (`whole`), or for all keys that begin so, and waits for its end. Fails where the store refused.
    pub async fn settle(&self, bucket: &str, prefix: &str, whole: bool) -> Result<(), S3Error> {
        let concerns = |key: &str| if whole { key == prefix } else { key.starts_with(prefix) };
        let mut asked = false;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut inner = self.inner.lock();
                let names: Vec<Name> = inner.below(bucket, prefix).map(|(name, _)| name.clone()).filter(|(_, key)| concerns(key)).collect();
                if names.is_empty() {
                    let refused = |refused: &&Refused| refused.deletion.bucket == bucket && concerns(&refused.deletion.key);
                    let error = inner.refused.values().find(refused).map(|refused| refused.error.clone());
                    return error.filter(|_| asked).map_or(Ok(()), Err);
                }
                if !std::mem::replace(&mut asked, true) {
                    let now = Instant::now();
                    for name in names {
                        if let Some(slot) = inner.waiting.get_mut(&name) {
                            (slot.ready, slot.due) = (now, now);
                        }
                    }
                    self.changed.notify_waiters();
                }
            }
            changed.await;
        }
    }

    /// All that waits is due now, and soon what comes before as many calls of [`Deletes::hurry_no_more`].
    pub fn hurry(&self) {
        let now = Instant::now();
        {
            let mut inner = self.inner.lock();
            inner.drains += 1;
            for slot in inner.waiting.values_mut() {
                (slot.ready, slot.due) = (now, now);
            }
        }
        self.changed.notify_waiters();
    }

    /// Ends a [`Deletes::hurry`].
    pub fn hurry_no_more(&self) {
        self.inner.lock().drains -= 1;
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.inner.lock().waiting.len()
    }

    /// True where a key below a prefix waits.
    pub fn any_below(&self, bucket: &str, prefix: &str) -> bool {
        self.inner.lock().below(bucket, prefix).next().is_some()
    }

    /// The key is deleted for this mount, or was after `since`.
    pub fn hides(&self, bucket: &str, key: &str, since: Instant) -> bool {
        let inner = self.inner.lock();
        (!inner.waiting.is_empty() || !inner.ended.is_empty()) && inner.hides(&(bucket.to_owned(), key.to_owned()), since)
    }

    /// Takes out of a page asked for at `since` what is deleted.
    pub fn hide(&self, bucket: &str, since: Instant, page: &mut ListPage) {
        let inner = self.inner.lock();
        if inner.waiting.is_empty() && inner.ended.is_empty() {
            return;
        }
        let mut name = (bucket.to_owned(), String::new());
        let mut shows = |key: &str| {
            name.1.clear();
            name.1.push_str(key);
            !inner.hides(&name, since)
        };
        page.entries.retain(|entry| shows(&entry.key));
        page.prefixes.retain(|prefix| shows(prefix));
    }

    /// How many wait, and up to `most` lines: what was refused, then what waits.
    pub fn status(&self, most: usize) -> (usize, Vec<DeleteStatus>) {
        let inner = self.inner.lock();
        let refused = inner.refused.iter().map(|(id, refused)| DeleteStatus {
            id: *id,
            bucket: refused.deletion.bucket.clone(),
            key: refused.deletion.key.clone(),
            refused: true,
            reason: Some(explain::explain(&refused.error)),
        });
        let waiting = inner.waiting.values().map(|slot| DeleteStatus {
            id: slot.journalled.number(),
            bucket: slot.journalled.what.bucket.clone(),
            key: slot.journalled.what.key.clone(),
            refused: false,
            reason: slot.reason.clone(),
        });
        (inner.waiting.len() + inner.refused.len(), refused.chain(waiting).take(most).collect())
    }

    /// How many wait; those that were refused do not.
    pub fn waiting_count(&self) -> usize {
        self.inner.lock().waiting.len()
    }

    /// The key of the delete that waits under a number.
    fn waiting(&self, id: u64) -> Option<Name> {
        let inner = self.inner.lock();
        inner.waiting.iter().find(|(_, slot)| slot.journalled.number() == id).map(|(name, _)| name.clone())
    }

    /// What was refused leaves the list; what waits stays in S3, and shows again. False where no delete has the number.
    pub async fn dismiss(&self, id: u64) -> bool {
        if self.inner.lock().refused.remove(&id).is_some() {
            return true;
        }
        let Some(name) = self.waiting(id) else { return false };
        let Some(journalled) = self.take(&name.0, &name.1).await else { return false };
        journalled.forget().await;
        self.tell_kept(&[name]);
        true
    }

    fn tell_kept(&self, names: &[Name]) {
        if let Some(kept) = self.kept.get().filter(|_| !names.is_empty()) {
            kept(names);
        }
    }
}

/// See [`super::Writeback::delete_later`].
pub(crate) async fn delete_later(shared: &Arc<Shared>, way: Way, deletion: Deletion, delay: Duration) -> Result<(), Error> {
    // What is on its way is about another version.
    let replaced = shared.deletes.take(&deletion.bucket, &deletion.key).await;
    let journalled = shared.journal(deletion).await?;
    let raced = shared.deletes.queue(way, journalled, delay);
    for older in replaced.into_iter().chain(raced) {
        older.forget().await;
    }
    Ok(())
}

/// Sends a delete that was refused, or that waits, and waits for its end. `None` where no delete has the number.
pub(crate) async fn send_again(shared: &Arc<Shared>, id: u64) -> Option<Result<(), Error>> {
    let refused = shared.deletes.inner.lock().refused.remove(&id);
    let (bucket, key) = match refused {
        Some(Refused { way, deletion, .. }) => {
            let name = (deletion.bucket.clone(), deletion.key.clone());
            if let Err(error) = delete_later(shared, way, deletion, Duration::ZERO).await {
                return Some(Err(error));
            }
            name
        }
        None => shared.deletes.waiting(id)?,
    };
    Some(shared.deletes.settle(&bucket, &key, true).await.map_err(Error::S3))
}

/// Sends what is due, for as long as the runtime lives.
pub(crate) fn start(shared: Arc<Shared>) {
    tokio::spawn(async move {
        loop {
            let changed = shared.deletes.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let look = send_due(&shared);
            tokio::select! {
                () = &mut changed => {}
                () = tokio::time::sleep_until(look.unwrap_or_else(|| Instant::now() + SLOWEST_LISTING).into()) => {}
            }
        }
    });
}

/// Starts a batch to each bucket where something is due; gives when to look again.
fn send_due(shared: &Arc<Shared>) -> Option<Instant> {
    let now = Instant::now();
    let mut inner = shared.deletes.inner.lock();
    let idle = |inner: &Inner, slot: &Slot| !inner.busy.contains(&slot.journalled.what.bucket);
    let due: HashSet<String> =
        inner.waiting.iter().filter(|(_, slot)| slot.due <= now && idle(&inner, slot)).map(|((bucket, _), _)| bucket.clone()).collect();
    for bucket in due {
        let batch = inner.batch(&bucket, now);
        let way = batch.first().and_then(|(name, _)| inner.waiting.get(name)).map(|slot| slot.way.clone());
        if let Some(way) = way {
            inner.busy.insert(bucket.clone());
            tokio::spawn(send(shared.clone(), bucket, way, batch));
        }
    }
    // A marker that is due waits for what is below it.
    inner.look = inner.waiting.values().filter(|slot| slot.due > now && idle(&inner, slot)).map(|slot| slot.due).min();
    inner.look
}

async fn send(shared: Arc<Shared>, bucket: String, way: Way, batch: Vec<(Name, Option<ETag>)>) {
    let keys: Vec<_> = batch.iter().map(|((_, key), etag)| (key.clone(), etag.clone())).collect();
    let ends = match way.store(&bucket).await {
        Ok(store) => delete(store.as_ref(), &keys).await,
        Err(error) => keys.iter().map(|_| judge(Err(error.clone()))).collect(),
    };
    let deletes = &shared.deletes;
    let over: Vec<Journalled<Deletion>> = {
        let inner = deletes.inner.lock();
        let over = batch.iter().zip(&ends).filter(|(_, end)| !matches!(end, End::Later(_)));
        over.filter_map(|((name, _), _)| inner.waiting.get(name).map(|slot| slot.journalled.clone())).collect()
    };
    let moved = !over.is_empty();
    // Before anybody may make the name anew: a record that outlived it would delete that after a crash.
    Journalled::forget_all(over).await;
    let mut kept = Vec::new();
    {
        let mut inner = deletes.inner.lock();
        let now = Instant::now();
        inner.busy.remove(&bucket);
        inner.ended.retain(|_, at| now.duration_since(*at) < SLOWEST_LISTING);
        for ((name, _), end) in batch.into_iter().zip(ends) {
            if let End::Later(error) = end {
                if let Some(slot) = inner.waiting.get_mut(&name) {
                    let due = now + (PAUSE.0 * 2u32.saturating_pow(slot.attempts.min(10))).min(PAUSE.1);
                    (slot.sending, slot.ready, slot.due) = (false, due, due);
                    slot.attempts += 1;
                    slot.reason = Some(explain::explain(&error));
                }
                continue;
            }
            let Some(slot) = inner.waiting.remove(&name) else { continue };
            match end {
                End::Gone => {
                    inner.ended.insert(name, now);
                    continue;
                }
                End::Refused(error) => {
                    tracing::error!("s3://{}/{}: was removed here and is still in S3: {error}", name.0, name.1.escape_debug());
                    let refused = Refused { way: slot.way, deletion: slot.journalled.what.clone(), error };
                    inner.refused.insert(slot.journalled.number(), refused);
                }
                End::Kept => tracing::warn!("s3://{}/{}: was removed here; somebody else's stays", name.0, name.1.escape_debug()),
                End::Later(_) => {}
            }
            kept.push(name);
        }
    }
    if moved {
        shared.meter.record(0, true);
    }
    deletes.tell_kept(&kept);
    deletes.changed.notify_waiters();
    shared.changed.notify_waiters();
}

/// Deletes keys of one bucket, and tells of each.
async fn delete(store: &dyn Store, keys: &[(String, Option<ETag>)]) -> Vec<End> {
    if let [(key, etag)] = keys {
        return vec![delete_one(store, key, etag.as_ref()).await];
    }
    match store.delete_many(keys).await {
        Ok(failed) => {
            let mut failed: HashMap<String, S3Error> = failed.into_iter().collect();
            let mut ends = Vec::with_capacity(keys.len());
            for (key, _) in keys {
                ends.push(match failed.remove(key) {
                    Some(error) if error.kind == ErrorKind::NotImplemented => judge(store.delete(key, None).await),
                    Some(error) => judge(Err(error)),
                    None => End::Gone,
                });
            }
            ends
        }
        // One key that the store does not like must not keep the others.
        Err(error) if matches!(error.kind, ErrorKind::InvalidRequest | ErrorKind::Protocol | ErrorKind::KeyTooLong) => {
            let singly: Vec<_> = keys.iter().map(|(key, etag)| delete_one(store, key, etag.as_ref())).collect();
            futures::stream::iter(singly).buffered(SINGLY).collect().await
        }
        Err(error) => keys.iter().map(|_| judge(Err(error.clone()))).collect(),
    }
}

/// A key on its own. Which stores compare here cannot be found out without a request a key: those that may not are asked before.
async fn delete_one(store: &dyn Store, key: &str, etag: Option<&ETag>) -> End {
    if let Some(etag) = etag.filter(|_| store.capabilities().conditional_deletes != Some(true)) {
        match store.head(key).await {
            Ok(head) if head.etag != *etag => return End::Kept,
            Err(error) if error.kind != ErrorKind::AccessDenied => return judge(Err(error)),
            _ => {}
        }
    }
    judge(delete_version(store, key, etag.cloned()).await)
}

fn judge(answer: Result<(), S3Error>) -> End {
    match answer {
        Ok(()) => End::Gone,
        Err(error) => match error.kind {
            ErrorKind::NoSuchKey => End::Gone,
            ErrorKind::PreconditionFailed | ErrorKind::NotEmpty => End::Kept,
            // A portal's page is an outage too; a conflict is two at once, and the next attempt tells who was first.
            ErrorKind::Protocol | ErrorKind::Conflict => End::Later(error),
            kind if kind.passes() => End::Later(error),
            _ => End::Refused(error),
        },
    }
}
