//! Lists what is pinned once a minute and brings what is new of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use futures::StreamExt;

use super::super::{Ino, Kind, Vfs};
use super::{SILENT, Snapshot};
use crate::cache::{Cache, CacheError, ObjectVersion, Pin};
use crate::s3::{ErrorKind, ListRequest, S3Error, Store, explain, is_archive_class};

/// How often what is pinned is listed: one request for a thousand objects.
const EVERY: Duration = Duration::from_secs(60);
/// Changes of so long are one.
const GATHER: Duration = Duration::from_millis(500);
/// How often a silent store is asked whether it is back.
const PROBE: Duration = Duration::from_secs(2);
/// Objects of a pin, at most: 20 MB of names.
const MOST: usize = 50_000;
/// Objects that are brought at once.
const AT_ONCE: usize = 8;

impl Vfs {
    /// Keeps what an earlier mount was told to, and what this one will be.
    pub(in super::super) fn keep_pins(self: &Arc<Self>) {
        self.set_known(self.cache.pins());
        let (this, closing) = (self.clone(), self.closing.clone());
        self.spawn(async move {
            let keeps = async {
                loop {
                    this.pass().await;
                    let _ = tokio::time::timeout(EVERY, this.pins.wake.notified()).await;
                    tokio::time::sleep(GATHER).await;
                }
            };
            tokio::select! {
                () = closing.cancelled() => {}
                () = keeps => {}
            }
        });
    }

    fn set_known(&self, pins: Vec<Pin>) {
        let mut kept = self.pins.kept.lock();
        kept.retain(|pin, _| pins.contains(pin));
        for pin in pins {
            kept.entry(pin).or_default();
        }
        self.pins.any.store(!kept.is_empty(), Ordering::Relaxed);
    }

    /// Pins a file or a folder: it is listed when this returns, and brought afterwards.
    ///
    /// # Errors
    /// One line for the user: it does not fit, the cache has no directory, or the store does not list it.
    pub async fn pin(&self, ino: Ino) -> Result<Pin, String> {
        let pin = self.pin_of(ino)?;
        let store = self.store_of(&pin.bucket).await.map_err(|error| explain::explain(&error))?;
        let store = store.ok_or_else(|| format!("{}: not on this mount", pin.shown()))?;
        let snapshot = self.listed(store.as_ref(), &pin).await?;
        let _turn = self.pins.turn.lock().await;
        let of = |snapshot: &Snapshot| snapshot.objects.values().map(|entry| entry.size).sum::<u64>();
        let others: u64 = {
            let kept = self.pins.kept.lock();
            kept.iter().filter(|(other, _)| **other != pin).filter_map(|(_, kept)| kept.snapshot.as_deref().map(of)).sum()
        };
        let (bytes, room) = (of(&snapshot), self.cache.max_size().saturating_sub(others));
        if bytes > room {
            let shown = |bytes| ByteSize::b(bytes).display().iec();
            let taken = if others > 0 { format!(", of which other pins take {}", shown(others)) } else { String::new() };
            let bound = shown(self.cache.max_size());
            return Err(format!(
                "{}: holds {}, and cache_size is {bound}{taken}: mount with a larger cache_size, or pin less",
                pin.shown(),
                shown(bytes)
            ));
        }
        let mut pins = self.cache.pins();
        if !pins.contains(&pin) {
            pins.push(pin.clone());
            self.cache.set_pins(pins.clone()).await.map_err(|error| format!("{}: not pinned: {error}", pin.shown()))?;
        }
        self.set_known(pins);
        self.install_snapshot(&pin, store, snapshot);
        self.pins.wake.notify_one();
        Ok(pin)
    }

    /// Pins a file or a folder no longer. What is here of it stays until something else needs the room.
    ///
    /// # Errors
    /// One line for the user: it is not pinned, or that cannot be written down.
    pub async fn unpin(&self, ino: Ino) -> Result<Pin, String> {
        let pin = self.pin_of(ino)?;
        let _turn = self.pins.turn.lock().await;
        let mut pins = self.cache.pins();
        if !pins.contains(&pin) {
            let holder = pins.iter().find(|other| other.holds(&pin.bucket, &pin.key));
            return Err(match holder {
                Some(holder) => format!("{}: is pinned with {}: unpin that", pin.shown(), holder.shown()),
                None => format!("{}: is not pinned: packmule cache show lists what is", pin.shown()),
            });
        }
        pins.retain(|other| *other != pin);
        self.cache.set_pins(pins.clone()).await.map_err(|error| format!("{}: still pinned: {error}", pin.shown()))?;
        self.set_known(pins);
        self.choose();
        Ok(pin)
    }

    fn pin_of(&self, ino: Ino) -> Result<Pin, String> {
        if self.is_account(ino) {
            return Err("all buckets cannot be pinned at once: name a bucket, a folder or a file".into());
        }
        let (place, kind) = match (self.place(ino), self.kind(ino)) {
            (Ok(place), Ok(kind)) => (place, kind),
            _ => return Err("it is gone: look again".into()),
        };
        match kind {
            Kind::Symlink => Err(format!("s3://{}/{} is a link: pin what it points to", place.store.bucket(), place.key.escape_debug())),
            Kind::Directory | Kind::File => Ok(Pin { bucket: place.store.bucket().to_owned(), key: place.key }),
        }
    }

    /// All that a pin holds now.
    async fn listed(&self, store: &dyn Store, pin: &Pin) -> Result<Snapshot, String> {
        let started = Instant::now();
        let max_keys = (!pin.is_folder()).then_some(1);
        let mut request = ListRequest { prefix: pin.key.clone(), max_keys, ..ListRequest::default() };
        let mut objects = BTreeMap::new();
        loop {
            let page = tokio::time::timeout(SILENT, self.list_raw(store, request.clone())).await;
            let page = page.map_err(|_| silence(pin)).and_then(|page| page.map_err(|error| explain::explain(&error)))?;
            let fits = page.entries.into_iter().filter(|entry| pin.holds(&pin.bucket, &entry.key));
            objects.extend(fits.map(|entry| (entry.key.clone(), entry)));
            if objects.len() > MOST {
                return Err(format!("{}: holds more than {MOST} objects: pin folders of it", pin.shown()));
            }
            request.continuation = page.next.filter(|_| pin.is_folder());
            if request.continuation.is_none() {
                return Ok(Snapshot { started, objects, too_much: 0 });
            }
        }
    }

    fn install_snapshot(&self, pin: &Pin, store: Arc<dyn Store>, snapshot: Snapshot) {
        if let Some(kept) = self.pins.kept.lock().get_mut(pin) {
            kept.removed.retain(|_, at| *at >= snapshot.started);
            (kept.snapshot, kept.store) = (Some(Arc::new(snapshot)), Some(store));
            (kept.passed, kept.trouble) = (false, None);
        }
    }

    /// Lists every pin, and brings what is missing.
    async fn pass(&self) {
        let pins: Vec<Pin> = self.pins.kept.lock().keys().cloned().collect();
        let mut stores = HashMap::new();
        for pin in &pins {
            if self.pins.is_silent(&pin.bucket) {
                continue;
            }
            let store = match self.store_of(&pin.bucket).await {
                Ok(Some(store)) => store,
                Ok(None) => {
                    self.note_trouble(pin, Some("not on this mount".into()));
                    continue;
                }
                Err(error) => {
                    self.note_trouble(pin, Some(explain::explain(&error)));
                    continue;
                }
            };
            match self.listed(store.as_ref(), pin).await {
                Ok(snapshot) => self.install_snapshot(pin, store.clone(), snapshot),
                Err(why) => self.note_trouble(pin, Some(why)),
            }
            stores.insert(pin.bucket.clone(), store);
        }
        for (pin, versions, archived) in self.choose() {
            let Some(store) = stores.get(&pin.bucket) else { continue };
            let asleep = (archived > 0).then(|| format!("{archived} objects are archived: restore them first"));
            let trouble = self.bring(store, &versions).await;
            self.note_trouble(&pin, trouble.or(asleep));
        }
    }

    /// The versions that there is room for, pin by pin, and how many cannot be read. These are not evicted from now on.
    fn choose(&self) -> Vec<(Pin, Vec<ObjectVersion>, usize)> {
        let (mut room, mut seen) = (self.cache.max_size(), HashSet::new());
        let mut kept = self.pins.kept.lock();
        let mut chosen = Vec::new();
        for (pin, kept) in kept.iter_mut() {
            let Some(snapshot) = &mut kept.snapshot else { continue };
            let (mut versions, mut too_much, mut archived) = (Vec::new(), 0, 0);
            for entry in snapshot.objects.values() {
                if is_archive_class(entry.storage_class.as_deref()) {
                    archived += 1;
                    continue;
                }
                let version = snapshot.version(&pin.bucket, entry);
                if seen.contains(&version) {
                    continue;
                }
                match room.checked_sub(entry.size) {
                    Some(rest) => {
                        room = rest;
                        seen.insert(version.clone());
                        versions.push(version);
                    }
                    None => too_much += 1,
                }
            }
            if too_much != snapshot.too_much {
                *snapshot = Arc::new(Snapshot { started: snapshot.started, objects: snapshot.objects.clone(), too_much });
            }
            chosen.push((pin.clone(), versions, archived));
        }
        // What an earlier mount pinned stays until it was listed.
        let listed = kept.values().all(|kept| kept.snapshot.is_some());
        self.cache.set_pinned_versions(chosen.iter().flat_map(|(_, versions, _)| versions), listed);
        chosen
    }

    /// Brings what is missing of these. Gives why some of it is missing still.
    async fn bring(&self, store: &Arc<dyn Store>, versions: &[ObjectVersion]) -> Option<String> {
        let missing: Vec<_> = versions.iter().filter(|version| !self.cache.is_complete(version)).cloned().collect();
        let kept = missing.into_iter().map(|version| bring_one(self.cache.clone(), store.clone(), version));
        let troubles: Vec<Option<String>> = futures::stream::iter(kept).buffer_unordered(AT_ONCE).collect().await;
        troubles.into_iter().flatten().next()
    }

    fn note_trouble(&self, pin: &Pin, trouble: Option<String>) {
        if let Some(kept) = self.pins.kept.lock().get_mut(pin) {
            if let Some(why) = trouble.as_ref().filter(|why| kept.trouble.as_ref() != Some(why)) {
                tracing::warn!("{}: not all of it is kept: {why}", pin.shown());
            }
            (kept.passed, kept.trouble) = (true, trouble);
        }
    }

    /// Asks a silent store until it answers.
    pub(super) fn await_answer(&self, bucket: String) {
        let Some(this) = self.shared() else { return };
        self.spawn(async move {
            loop {
                this.pause(PROBE).await;
                let pin = this.pins.kept.lock().keys().find(|pin| pin.bucket == bucket).cloned();
                let Some(pin) = pin.filter(|_| !this.closing.is_cancelled()) else { break };
                let asks = async {
                    let Some(store) = this.store_of(&pin.bucket).await? else { return Ok(()) };
                    let request = ListRequest { prefix: pin.key.clone(), max_keys: Some(1), ..ListRequest::default() };
                    store.list(request).await.map(drop)
                };
                if let Ok(answer) = tokio::time::timeout(SILENT, asks).await
                    && answer.as_ref().err().is_none_or(is_answer)
                {
                    tracing::info!("s3://{bucket} answers again");
                    break;
                }
            }
            this.pins.silent.lock().remove(&bucket);
            this.pins.wake.notify_one();
        });
    }
}

async fn bring_one(cache: Arc<Cache>, store: Arc<dyn Store>, version: ObjectVersion) -> Option<String> {
    match cache.keep(store, version.clone()).await {
        Ok(()) if cache.is_complete(&version) => None,
        Ok(()) => Some("the cache's disk has no room (min_free_space), or cannot be written".to_owned()),
        // Replaced since it was listed: the next pass brings what is there then.
        Err(CacheError::Stale) => None,
        Err(CacheError::S3(error)) => Some(explain::explain(&error)),
        Err(error) => Some(error.to_string()),
    }
}

fn is_answer(error: &S3Error) -> bool {
    !matches!(error.kind, ErrorKind::TimedOut | ErrorKind::Network | ErrorKind::Throttled)
}

fn silence(pin: &Pin) -> String {
    format!("s3://{}: no answer within {} s", pin.bucket, SILENT.as_secs())
}
