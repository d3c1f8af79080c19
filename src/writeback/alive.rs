//! How an entry's upload gets on, and who waits for that.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::entry::Entry;
use super::reason;
use crate::s3::{S3Error, slow};

/// A store of which nothing is heard for so long does not keep a writer from a file that nobody waits for.
const SILENCE: Duration = Duration::from_secs(3);

impl Entry {
    /// A byte moved (or an answer came) that had not before.
    pub fn progressed(&self) {
        self.life.lock().progress = Instant::now();
    }

    /// A request of its upload is sent again after a pause: status says why, and a store that asks for patience is there.
    pub fn sent_again(&self, error: &S3Error, pause: Duration) {
        if slow::is_sign_of_life(error) {
            let until = Instant::now() + pause;
            self.life.lock().slowed = until;
            self.shared.meter.slowed(until);
        }
        self.intent.lock().reason = Some(reason::of_store(error));
    }

    /// Its turn to change the file. A PutObject that nobody waits for, of a store that is silent, gives way: see [`Entry::gives_way`].
    pub async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        struct Waits<'a>(&'a AtomicU32);
        impl Drop for Waits<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Relaxed);
            }
        }
        self.wanted.fetch_add(1, Relaxed);
        let _waits = Waits(&self.wanted);
        self.writer.lock().await
    }

    /// Ends `work`, which keeps writers out, when one of them waits while nothing of it moves: what they write is sent in its place.
    pub async fn gives_way<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            if let Ok(done) = tokio::time::timeout(SILENCE / 3, &mut work).await {
                return Some(done);
            }
            if self.wanted.load(Relaxed) > 0 && self.life.lock().progress.elapsed() >= SILENCE {
                return None;
            }
        }
    }

    /// From when on `close_timeout` counts.
    pub fn seen(&self) -> Instant {
        self.life.lock().seen(self.shared.config.close_timeout)
    }

    /// How long nothing of it moved, without the time for which the store asked for patience.
    pub fn stalled(&self) -> Duration {
        self.seen().elapsed()
    }
}
