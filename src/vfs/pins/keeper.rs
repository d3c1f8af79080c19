//! Lists what is pinned once a minute, and brings what is new of it: side by side, for bringing may take hours. What this mount changes
//! meanwhile is known without a listing, which costs a request for each thousand objects.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use futures::StreamExt;

use super::super::{Ino, Kind, Vfs};
use super::{Content, Member, SILENT, Snapshot, version_of};
use crate::cache::{CacheError, ObjectVersion, Pin};
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
            let lists = async {
                loop {
                    this.list_pins().await;
                    let _ = tokio::time::timeout(EVERY, this.pins.wake.notified()).await;
                    tokio::time::sleep(GATHER).await;
                }
            };
            let brings = async {
                loop {
                    tokio::select! {
                        () = this.pins.bring.notified() => {}
                        () = this.pins.changed.notified() => tokio::time::sleep(GATHER).await,
                    }
                    this.bring_pins().await;
                }
            };
            tokio::select! {
                () = closing.cancelled() => {}
                () = lists => {}
                () = brings => {}
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
        let of = |snapshot: &Snapshot| snapshot.objects.values().map(|member| member.entry.size).sum::<u64>();
        let others: u64 = {
            let kept = self.pins.kept.lock();
            kept.iter().filter(|(other, _)| **other != pin).filter_map(|(_, kept)| kept.content.snapshot.as_deref().map(of)).sum()
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
        let Some(this) = self.shared() else { return Ok(pin) };
        let _ = tokio::task::spawn_blocking(move || this.choose()).await;
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
            objects.extend(fits.map(|entry| (entry.key.clone(), Member::new(&pin.bucket, entry))));
            if objects.len() > MOST {
                return Err(format!("{}: holds more than {MOST} objects: pin folders of it", pin.shown()));
            }
            request.continuation = page.next.filter(|_| pin.is_folder());
            if request.continuation.is_none() {
                return Ok(Snapshot { started, objects });
            }
        }
    }

    fn install_snapshot(&self, pin: &Pin, store: Arc<dyn Store>, snapshot: Snapshot) {
        if let Some(kept) = self.pins.kept.lock().get_mut(pin) {
            kept.content.changes.retain(|_, (at, _)| *at >= snapshot.started);
            (kept.content.snapshot, kept.store) = (Some(Arc::new(snapshot)), Some(store));
            (kept.passed, kept.trouble) = (false, None);
        }
    }

    /// Lists every pin.
    async fn list_pins(&self) {
        let pins: Vec<Pin> = self.pins.kept.lock().keys().cloned().collect();
        for pin in pins.into_iter().filter(|pin| !self.pins.is_silent(&pin.bucket)) {
            let store = match tokio::time::timeout(SILENT, self.store_of(&pin.bucket)).await {
                Ok(Ok(Some(store))) => Ok(store),
                Ok(Ok(None)) => Err("not on this mount".to_owned()),
                Ok(Err(error)) => Err(explain::explain(&error)),
                Err(_) => Err(silence(&pin)),
            };
            let listed = match store {
                Ok(store) => self.listed(store.as_ref(), &pin).await.map(|snapshot| (store, snapshot)),
                Err(why) => Err(why),
            };
            match listed {
                Ok((store, snapshot)) => self.install_snapshot(&pin, store, snapshot),
                Err(why) => self.note_trouble(&pin, Some(why)),
            }
        }
        self.pins.bring.notify_one();
    }

    /// Brings what is missing of what was listed, and made since.
    async fn bring_pins(&self) {
        let Some(this) = self.shared() else { return };
        let chosen = tokio::task::spawn_blocking(move || this.choose()).await.unwrap_or_default();
        for Chosen { pin, missing, archived } in chosen {
            let Some(store) = self.pins.store(&pin.bucket).filter(|_| !self.pins.is_silent(&pin.bucket)) else { continue };
            let asleep = (archived > 0).then(|| format!("{archived} objects are archived: restore them first"));
            let trouble = self.bring(&pin, &store, missing).await;
            self.note_trouble(&pin, trouble.or(asleep));
        }
    }

    /// The versions that there is room for are not evicted from now on. Gives those of them that are missing, pin by pin. Blocks: each
    /// is looked for.
    fn choose(&self) -> Vec<Chosen> {
        let listed: BTreeMap<Pin, Content> = {
            let kept = self.pins.kept.lock();
            let listed = kept.iter().filter(|(_, kept)| kept.content.snapshot.is_some());
            listed.map(|(pin, kept)| (pin.clone(), kept.content.clone())).collect()
        };
        let (mut room, mut seen, mut chosen) = (self.cache.max_size(), HashSet::new(), Vec::new());
        for (pin, content) in &listed {
            let (mut wanted, mut too_much, mut archived) = (Vec::new(), 0, 0);
            for member in content.below("") {
                if is_archive_class(member.entry.storage_class.as_deref()) {
                    archived += 1;
                } else if !seen.contains(&member.id) {
                    match room.checked_sub(member.entry.size) {
                        Some(rest) => {
                            room = rest;
                            seen.insert(member.id);
                            wanted.push(member);
                        }
                        None => too_much += 1,
                    }
                }
            }
            if let Some(kept) = self.pins.kept.lock().get_mut(pin) {
                kept.too_much = too_much;
            }
            chosen.push((pin, wanted, archived));
        }
        self.cache.set_pinned_versions(seen, |pin| listed.contains_key(pin));
        // From here on what is here stays.
        let is_missing = |member: &&Member| self.cache.held(member.id, member.entry.size) < member.entry.size;
        let of = |(pin, wanted, archived): (&Pin, Vec<&Member>, usize)| Chosen {
            pin: pin.clone(),
            missing: wanted.into_iter().filter(is_missing).map(|member| version_of(&pin.bucket, &member.entry)).collect(),
            archived,
        };
        chosen.into_iter().map(of).collect()
    }

    /// Brings what is missing, as long as the pin stands. Gives why some of it is missing still.
    async fn bring(&self, pin: &Pin, store: &Arc<dyn Store>, missing: Vec<ObjectVersion>) -> Option<String> {
        let this = self.shared()?;
        // One that finds no room finds it for all.
        let full = Arc::new(AtomicBool::new(false));
        let kept = missing.into_iter().map(|version| this.clone().bring_one(pin.clone(), store.clone(), version, full.clone()));
        let troubles: Vec<Option<String>> = futures::stream::iter(kept).buffer_unordered(AT_ONCE).collect().await;
        troubles.into_iter().flatten().next()
    }

    async fn bring_one(self: Arc<Self>, pin: Pin, store: Arc<dyn Store>, version: ObjectVersion, full: Arc<AtomicBool>) -> Option<String> {
        let stands = || self.pins.kept.lock().contains_key(&pin);
        let wanted = || !full.load(Ordering::Relaxed) && stands() && !self.pins.is_silent(&pin.bucket);
        // Read by somebody else since it was missing.
        if !wanted() || self.cache.is_complete(&version) {
            return None;
        }
        match self.cache.keep(store, version.clone(), wanted).await {
            Ok(()) if self.cache.is_complete(&version) || !wanted() => None,
            Ok(()) => {
                full.store(true, Ordering::Relaxed);
                Some("cache_dir has no room (min_free_space), or cannot be written".to_owned())
            }
            // Replaced since it was listed: the next pass brings what is there then.
            Err(CacheError::Stale) => None,
            Err(CacheError::S3(error)) => Some(explain::explain(&error)),
            Err(error) => Some(error.to_string()),
        }
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

/// What is to be kept of a pin.
struct Chosen {
    pin: Pin,
    missing: Vec<ObjectVersion>,
    /// Objects that cannot be read.
    archived: usize,
}

fn is_answer(error: &S3Error) -> bool {
    !matches!(error.kind, ErrorKind::TimedOut | ErrorKind::Network | ErrorKind::Throttled)
}

fn silence(pin: &Pin) -> String {
    format!("s3://{}: no answer within {} s", pin.bucket, SILENT.as_secs())
}
