//! Files that nobody waits for: queued by `write_back`, or left in the spool by an earlier run (promises 2, 8 and 10).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use super::attr::{self, Kind};
use super::error::{Error, Result};
use super::inode::{Node, Place};
use super::marker::is_marker;
use super::path::name_of;
use super::remember::Row;
use super::temporary::is_junk;
use super::{Ino, Vfs};
use crate::writeback::{Staged, Target};

/// How long the end of the mount waits to hear of the last publications.
const LAST_NEWS: Duration = Duration::from_secs(1);

/// Bucket and prefix of a directory.
type Directory = (String, String);
type ByDirectory = HashMap<Directory, Vec<Arc<Staged>>>;

/// What an earlier run left, by bucket and directory prefix, until somebody looks into that directory.
#[derive(Default)]
pub struct Recovered {
    waiting: Mutex<ByDirectory>,
}

impl Recovered {
    /// Junk ended with the mount that it was made on, so a crash has left it.
    pub async fn new(found: Vec<Arc<Staged>>) -> Self {
        let mut waiting = ByDirectory::new();
        for staged in found {
            let (directory, segment) = home(&staged);
            if staged.is_held() && is_junk(&segment) {
                staged.discard().await;
                continue;
            }
            waiting.entry(directory).or_default().push(staged);
        }
        Self { waiting: Mutex::new(waiting) }
    }

    /// What nobody has looked at yet below a directory.
    pub(super) fn take_below(&self, bucket: &str, prefix: &str) -> Vec<Arc<Staged>> {
        let mut waiting = self.waiting.lock();
        let below = waiting.extract_if(|(of, directory), _| of == bucket && directory.starts_with(prefix));
        below.flat_map(|(_, files)| files).collect()
    }

    /// Gives back what [`Recovered::take_below`] took, for the directory that it belongs into by now.
    pub(super) fn put_back(&self, staged: Arc<Staged>) {
        let (directory, _) = home(&staged);
        self.waiting.lock().entry(directory).or_default().push(staged);
    }

    fn take(&self, bucket: &str, prefix: &str) -> Vec<Arc<Staged>> {
        self.waiting.lock().remove(&(bucket.to_owned(), prefix.to_owned())).unwrap_or_default()
    }

    fn is_empty(&self) -> bool {
        self.waiting.lock().is_empty()
    }

    fn all(&self) -> Vec<Arc<Staged>> {
        self.waiting.lock().values().flatten().cloned().collect()
    }

    /// Nobody has looked into its directory yet.
    fn holds(&self, staged: &Arc<Staged>) -> bool {
        self.waiting.lock().get(&home(staged).0).is_some_and(|files| files.iter().any(|file| Arc::ptr_eq(file, staged)))
    }
}

/// The directory that a file or a directory is in, and its segment there.
fn home(staged: &Staged) -> (Directory, String) {
    let target = staged.target();
    let key = target.key.strip_suffix('/').filter(|_| is_marker(staged)).unwrap_or(&target.key);
    let (prefix, segment) = split(key);
    ((target.store.bucket().to_owned(), prefix.to_owned()), segment.to_owned())
}

/// A key's directory prefix and last segment.
pub(super) fn split(key: &str) -> (&str, &str) {
    key.split_at(key.rfind('/').map_or(0, |at| at + 1))
}

impl Vfs {
    /// Gives what an earlier run left in this directory its place there.
    pub(super) fn attach_recovered(&self, dir: Ino) {
        if self.recovered.is_empty() || self.is_account(dir) {
            return;
        }
        let Ok(place) = self.place(dir) else { return };
        for staged in self.recovered.take(place.store.bucket(), &place.key) {
            if staged.take_over() {
                self.attach(dir, staged);
            }
        }
    }

    /// What an earlier run left and is published before anybody looks at it: its times and mode, which no listing tells, are remembered.
    pub(super) fn watch_recovered(self: &Arc<Self>) {
        for staged in self.recovered.all() {
            let this = Arc::downgrade(self);
            self.followers.spawn(async move {
                let Ok(Some(published)) = staged.settled().await else { return };
                let Some(this) = this.upgrade().filter(|this| this.recovered.holds(&staged)) else { return };
                let Target { store, .. } = staged.target();
                let place = Place { store, key: published.key.clone() };
                if is_marker(&staged) {
                    return this.remember_marker(&place, &published.attributes);
                }
                let row = Row::of(published.etag, &attr::decode(&published.attributes.metadata), published.last_modified);
                this.memory.put(place.store.bucket(), &place.key, row);
            });
        }
    }

    fn attach(&self, dir: Ino, staged: Arc<Staged>) {
        let (_, segment) = home(&staged);
        let name = name_of(&segment);
        let kind = if is_marker(&staged) { Kind::Directory } else { Kind::File };
        let mut node = Node::new(dir, name, segment, kind, SystemTime::now());
        node.apply(&attr::decode(&staged.attributes().metadata));
        node.size = staged.size();
        node.since = Some(Instant::now());
        node.file.staged = Some(staged.clone());
        node.file.temporary = staged.is_held();
        node.file.recovered = true;
        let ino = {
            let mut table = self.table.lock();
            // A directory that is known already keeps what is known of it.
            let known = table.child(dir, &node.name).filter(|child| kind == Kind::Directory && table.dir(*child).is_some());
            match known {
                Some(child) => {
                    if let Some(there) = table.get_mut(child) {
                        there.file = node.file;
                    }
                    child
                }
                None => table.insert(node),
            }
        };
        if !staged.is_held() {
            self.follow_up(ino, &staged);
        }
    }

    /// Takes the object in once a queued file has become one.
    pub(super) fn follow_up(&self, ino: Ino, staged: &Arc<Staged>) {
        {
            let mut table = self.table.lock();
            let Some(node) = table.get_mut(ino).filter(|node| !node.file.followed) else { return };
            node.file.followed = true;
        }
        let (Some(this), staged) = (self.shared(), staged.clone()) else { return };
        // Not among the work that shutdown waits for: the drain that follows it is what sends these files.
        self.followers.spawn(async move {
            let settled = staged.settled().await;
            let Ok(order) = this.order(ino) else { return };
            let turn = order.lock().await;
            let current = {
                let mut table = this.table.lock();
                let Some(node) = table.get_mut(ino) else { return };
                node.file.followed = false;
                node.file.staged.as_ref().is_some_and(|now| Arc::ptr_eq(now, &staged))
            };
            match settled {
                Ok(Some(published)) if current => this.published(ino, published),
                Err(error) if current => this.detach(ino, &staged, error.into()),
                _ => return,
            }
            drop(turn);
            this.retire(ino).await;
        });
    }

    /// The last publications are taken in.
    pub(super) async fn heard_all(&self) {
        self.followers.close();
        let _ = tokio::time::timeout(LAST_NEWS, self.followers.wait()).await;
    }

    /// Lock files and file managers' notes end with the mount (promise 10).
    pub(super) async fn drop_junk(&self) {
        let junk: Vec<Arc<Staged>> = self.table.lock().staged().filter(|staged| staged.is_junk()).cloned().collect();
        for staged in junk {
            staged.discard().await;
        }
    }

    /// Publishes a file under its temporary name (`packmule flush FILE --as-is`). [`Error::Invalid`] where the name is none.
    pub async fn publish_as_is(&self, ino: Ino) -> Result<()> {
        let staged = self.staged_now(ino)?.filter(|staged| staged.is_held()).ok_or(Error::Invalid)?;
        staged.set_held(false, None);
        staged.set_junk(false);
        if let Some(node) = self.table.lock().get_mut(ino) {
            node.file.temporary = false;
        }
        self.publish(ino).await?;
        self.retire(ino).await;
        Ok(())
    }
}
