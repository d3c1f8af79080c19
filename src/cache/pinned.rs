//! What is kept whatever else is read: objects and folders that a user pinned (`packmule cache pin`).

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::block::EntryId;
use super::disk::{Disk, FileName, Found};
use super::{Cache, CacheError, ObjectVersion};
use crate::s3::Store;

/// How much of an object is read at once while it is brought.
const STEP: usize = 1 << 20;
/// The names, in the cache's own directory: who removes a cache removes what it pins.
const FILE: &str = "pins.json";

/// A folder or an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pin {
    /// Bucket.
    pub bucket: String,
    /// A prefix, empty or with its `/`, or the whole key of one object.
    pub key: String,
}

impl Pin {
    /// The key is what is pinned, or lies in it.
    pub fn holds(&self, bucket: &str, key: &str) -> bool {
        self.bucket == bucket && if self.is_folder() { key.starts_with(&self.key) } else { key == self.key }
    }

    /// It is a prefix.
    pub fn is_folder(&self) -> bool {
        self.key.is_empty() || self.key.ends_with('/')
    }

    /// `s3://bucket/key` on one line, whatever the key.
    pub fn shown(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.key.escape_debug())
    }
}

/// Names and versions that are pinned.
#[derive(Debug, Default)]
pub struct Pinned {
    pins: Mutex<Vec<Pin>>,
    versions: Mutex<Arc<HashSet<EntryId>>>,
    /// What an earlier mount had of each pin that was not listed yet.
    left: Mutex<HashMap<Pin, Vec<EntryId>>>,
}

impl Pinned {
    /// What the directory's last owner had pinned: of each cache file its sidecar says whether it is. Blocks.
    pub fn load(disk: &Disk, found: &Found) -> Self {
        let path = disk.dir().join(FILE);
        let pins: Vec<Pin> = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!(%error, path = %path.display(), "not readable: what was pinned is not any more; pin it again");
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        let mut left: HashMap<Pin, Vec<EntryId>> = HashMap::new();
        for (id, slot) in found.iter().filter(|_| !pins.is_empty()) {
            let Some(sidecar) = disk.sidecar(FileName { id: *id, serial: slot.serial }) else { continue };
            for pin in pins.iter().filter(|pin| pin.holds(&sidecar.version.bucket, &sidecar.version.key)) {
                left.entry(pin.clone()).or_default().push(*id);
            }
        }
        let versions = left.values().flatten().copied().collect();
        Self { pins: Mutex::new(pins), versions: Mutex::new(Arc::new(versions)), left: Mutex::new(left) }
    }

    /// The versions that are never evicted.
    pub fn versions(&self) -> Arc<HashSet<EntryId>> {
        self.versions.lock().clone()
    }
}

impl Cache {
    /// What is pinned.
    pub fn pins(&self) -> Vec<Pin> {
        self.inner.pinned.pins.lock().clone()
    }

    /// Pins other things from now on, durably.
    ///
    /// # Errors
    /// Without a directory on disk, or when it cannot be written.
    pub async fn set_pins(&self, pins: Vec<Pin>) -> io::Result<()> {
        let text = serde_json::to_vec(&pins)?;
        let dir = self.dir().ok_or_else(|| io::Error::other("the cache is in memory: cache_dir cannot be used"))?;
        let written = tokio::task::spawn_blocking(move || replace(&dir, &text));
        written.await.map_err(io::Error::other)??;
        *self.inner.pinned.pins.lock() = pins;
        Ok(())
    }

    /// These versions are never evicted from now on, and what an earlier mount had of the pins that were not `listed` since; no others.
    pub fn set_pinned_versions(&self, mut versions: HashSet<EntryId>, listed: impl Fn(&Pin) -> bool) {
        let pinned = &self.inner.pinned;
        {
            let (mut left, pins) = (pinned.left.lock(), pinned.pins.lock());
            left.retain(|pin, _| pins.contains(pin) && !listed(pin));
            versions.extend(left.values().flatten());
        }
        *pinned.versions.lock() = Arc::new(versions);
    }

    /// Brings what is missing of a version, while it is `wanted`. Where the disk takes nothing more, or it is not wanted, it is not
    /// [`Cache::is_complete`] afterwards.
    ///
    /// # Errors
    /// As those of [`super::Reader::read`].
    pub async fn keep(
        self: &Arc<Self>,
        store: Arc<dyn Store>,
        version: ObjectVersion,
        wanted: impl Fn() -> bool,
    ) -> Result<(), CacheError> {
        let size = version.size;
        let reader = self.reader(store, version);
        let mut at = 0;
        while at < size && wanted() && self.inner.keeps_on_disk() {
            let bytes = reader.read(at, STEP).await?;
            if bytes.is_empty() {
                return Err(CacheError::Stale);
            }
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Bytes that are on disk of a version of this size. By its id: who asks again and again of thousands hashes each once.
    pub fn held(&self, id: EntryId, size: u64) -> u64 {
        if self.inner.is_complete(id) {
            return size;
        }
        self.inner.index.lock().shelf.peek(id).map_or(0, |slot| slot.bytes.min(size))
    }

    /// Its directory; `None` where it is in memory alone.
    pub fn dir(&self) -> Option<PathBuf> {
        self.inner.disk.as_ref().map(|disk| disk.dir().to_owned())
    }

    /// Its bound in bytes (`cache_size`).
    pub fn max_size(&self) -> u64 {
        self.inner.config.max_size
    }
}

fn replace(dir: &Path, text: &[u8]) -> io::Result<()> {
    let new = dir.join(FILE).with_extension("new");
    fs::write(&new, text)?;
    fs::File::open(&new)?.sync_all()?;
    fs::rename(&new, dir.join(FILE))?;
    fs::File::open(dir)?.sync_all()
}
