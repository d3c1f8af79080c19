//! What is being fetched now, for who asks how far it is.

use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Cache;
use super::block::BLOCK;
use super::entry::Entry;
use crate::measure::eta_seconds;

/// Who reads in bursts is still reading so long after the last one.
const LINGERS: Duration = Duration::from_secs(2);

/// So many are told, the fastest first: the read-ahead of a walk has hundreds of small ones, each gone in a moment.
const TOLD: usize = 50;

/// An object of which bytes are coming, or came a moment ago.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Download {
    /// Bucket.
    pub bucket: String,
    /// Key.
    pub key: String,
    /// Size of the object in bytes.
    pub size: u64,
    /// Bytes of it that are in the cache.
    pub here: u64,
    /// Bytes a second that came lately.
    pub speed: u64,
    /// Seconds until all of it is here at that speed, if all is read; not known while nothing comes.
    pub eta_seconds: Option<u64>,
}

impl Download {
    /// `s3://bucket/key` on one line, whatever the key.
    pub fn shown(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.key.escape_debug())
    }
}

impl Cache {
    /// What is being fetched, the fastest first; of many those.
    pub fn downloads(&self) -> Vec<Download> {
        let mut found = self.all_downloads();
        found.sort_by(|a, b| b.speed.cmp(&a.speed).then_with(|| a.key.cmp(&b.key)));
        found.truncate(TOLD);
        found
    }

    /// What is being fetched of one key: of each version that somebody reads.
    pub fn downloads_of(&self, bucket: &str, key: &str) -> Vec<Download> {
        self.all_downloads().into_iter().filter(|download| download.bucket == bucket && download.key == key).collect()
    }

    fn all_downloads(&self) -> Vec<Download> {
        // Entries are dropped outside of the lock, should this be their last holder.
        let entries: Vec<Arc<Entry>> = self.inner.index.lock().entries.values().filter_map(Weak::upgrade).collect();
        entries.iter().filter_map(|entry| entry.download()).collect()
    }
}

impl Entry {
    fn download(&self) -> Option<Download> {
        let state = self.state();
        if state.flights.is_empty() && self.speed.last().is_none_or(|last| last.elapsed() > LINGERS) {
            return None;
        }
        let here = (state.blocks.present() * BLOCK).min(self.size);
        let (source, speed) = (state.source.clone(), self.speed.now());
        let eta_seconds = eta_seconds(self.size - here, speed);
        Some(Download { bucket: source.bucket, key: source.key, size: self.size, here, speed, eta_seconds })
    }
}
