//! Guards over keys: what writes one key or a tree of keys keeps others out of it until the store has answered.
//!
//! The kernel serialises changes of one directory, but not a publication against a rename of the tree above it: a file
//! published under the old prefix after the tree was listed would be left behind.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::error::Result;
use super::inode::Place;

/// Keys that are being written. Fair enough: whoever waits looks again whenever anything ends.
#[derive(Default)]
pub struct KeyGuards {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    held: Mutex<Vec<(u64, Held)>>,
    ended: Notify,
    next: std::sync::atomic::AtomicU64,
}

#[derive(Clone, PartialEq, Eq)]
struct Held {
    bucket: String,
    key: String,
    tree: bool,
}

impl Held {
    /// Two single keys never exclude each other: a file's own order does that.
    fn excludes(&self, other: &Self) -> bool {
        let inside = |tree: &Self, item: &Self| tree.tree && item.key.starts_with(&tree.key);
        self.bucket == other.bucket && (inside(self, other) || inside(other, self))
    }
}

impl Place {
    /// True of the same key in the same bucket.
    pub fn is(&self, other: &Place) -> bool {
        self.key == other.key && self.store.bucket() == other.store.bucket()
    }
}

impl super::Vfs {
    /// Where something lies, and keeps to lie until the guard is dropped: a rename of a directory above it comes first or after.
    pub(super) async fn hold(&self, place: impl Fn() -> Result<Place> + Send) -> Result<(Place, KeyGuard)> {
        self.hold_as(place, false).await
    }

    /// As [`super::Vfs::hold`], with all that is below it.
    pub(super) async fn hold_tree(&self, place: impl Fn() -> Result<Place> + Send) -> Result<(Place, KeyGuard)> {
        self.hold_as(place, true).await
    }

    async fn hold_as(&self, place: impl Fn() -> Result<Place> + Send, tree: bool) -> Result<(Place, KeyGuard)> {
        loop {
            let before = place()?;
            let wanted = Held { bucket: before.store.bucket().to_owned(), key: before.key.clone(), tree };
            let guard = self.guards.enter(wanted).await;
            let now = place()?;
            if now.is(&before) {
                return Ok((now, guard));
            }
        }
    }
}

/// Held until dropped.
pub struct KeyGuard {
    shared: Arc<Shared>,
    id: u64,
}

impl KeyGuards {
    /// Waits until no tree that holds `key` is being changed.
    pub async fn key(&self, bucket: &str, key: &str) -> KeyGuard {
        self.enter(Held { bucket: bucket.to_owned(), key: key.to_owned(), tree: false }).await
    }

    /// As [`KeyGuards::key`]; `None` instead of a wait.
    pub fn try_key(&self, bucket: &str, key: &str) -> Option<KeyGuard> {
        self.try_enter(&Held { bucket: bucket.to_owned(), key: key.to_owned(), tree: false })
    }

    /// Waits until nothing below `prefix` is being changed, and keeps all else out.
    pub async fn tree(&self, bucket: &str, prefix: &str) -> KeyGuard {
        self.enter(Held { bucket: bucket.to_owned(), key: prefix.to_owned(), tree: true }).await
    }

    async fn enter(&self, wanted: Held) -> KeyGuard {
        loop {
            let ended = self.shared.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if let Some(guard) = self.try_enter(&wanted) {
                return guard;
            }
            ended.await;
        }
    }

    fn try_enter(&self, wanted: &Held) -> Option<KeyGuard> {
        let mut held = self.shared.held.lock();
        if held.iter().any(|(_, other)| other.excludes(wanted)) {
            return None;
        }
        let id = self.shared.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        held.push((id, wanted.clone()));
        Some(KeyGuard { shared: self.shared.clone(), id })
    }
}

impl Drop for KeyGuard {
    fn drop(&mut self) {
        self.shared.held.lock().retain(|(id, _)| *id != self.id);
        self.shared.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_tree_waits_for_keys_in_it_and_keeps_others_out() {
        let guards = KeyGuards::default();
        let held = |key: &str, tree| Held { bucket: "b".into(), key: key.into(), tree };
        let file = guards.key("b", "dir/file").await;
        assert!(guards.try_enter(&held("dir/", true)).is_none());
        assert!(guards.try_enter(&held("dir/file", false)).is_some(), "keys do not exclude each other");
        assert!(guards.try_enter(&held("dirt/", true)).is_some());
        drop(file);
        let tree = guards.tree("b", "dir/").await;
        assert!(guards.try_enter(&held("dir/sub/x", false)).is_none());
        assert!(guards.try_enter(&held("other", false)).is_some());
        drop(tree);
        assert!(guards.try_enter(&held("dir/sub/x", false)).is_some());
    }
}
