//! How much is known at once. The kernel keeps each name that it was ever told of until it needs the memory itself, and we with it what
//! stands behind the name: after a `find` through a million keys that would be more than a gigabyte. So the kernel is asked to let go of
//! those that it was told of longest ago, and directories that were listed longest ago are listed anew when somebody looks again.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsString;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::attr::Kind;
use super::inode::{Node, Table};
use super::{Ino, Vfs};

/// Inodes of the whole mount, about, at a kilobyte each: several readers may be within a directory's buffer of some hundred.
const NODES: usize = 4096;
/// Names of listings of the whole mount, besides the newest, at some 65 bytes each.
const NAMES: usize = 200_000;
/// So many names the kernel is asked to let go of at once, and then has a moment to do so.
const BATCH: usize = 1024;
const MOMENT: Duration = Duration::from_millis(10);

/// What is kept only because there is room for it.
#[derive(Default)]
pub(super) struct Crowd {
    /// Inodes that the kernel was told of, the oldest first. Some are no more.
    granted: VecDeque<Ino>,
    /// Those that the kernel was asked to let go of.
    asked: HashSet<Ino>,
    /// Directories that have a listing, by its age, and the number of its names. Some have a newer one.
    listed: VecDeque<(Ino, usize)>,
    /// How often a directory is in that.
    times: HashMap<Ino, u32>,
    /// Names in that.
    names: usize,
}

impl Crowd {
    /// The kernel was told of an inode.
    pub fn granted(&mut self, ino: Ino, is_new: bool) {
        if self.asked.remove(&ino) || is_new {
            self.granted.push_back(ino);
        }
    }

    /// The inode is no more.
    pub fn gone(&mut self, ino: Ino) {
        self.asked.remove(&ino);
    }

    /// A directory was listed. Gives those whose listings are too many by that.
    pub fn listed(&mut self, dir: Ino, names: usize) -> Vec<Ino> {
        let names = names + 1;
        self.listed.push_back((dir, names));
        self.names += names;
        *self.times.entry(dir).or_default() += 1;
        let mut over = Vec::new();
        while self.names - names > NAMES
            && let Some((oldest, held)) = self.listed.pop_front()
        {
            self.names -= held;
            // One that was listed again since goes by that.
            let times = self.times.get(&oldest).map_or(0, |times| times.saturating_sub(1));
            if times > 0 {
                self.times.insert(oldest, times);
            } else {
                self.times.remove(&oldest);
                over.push(oldest);
            }
        }
        over
    }
}

impl Table {
    /// There are more inodes than there is room for.
    pub(super) fn is_crowded(&self) -> bool {
        self.len() > NODES + self.crowd.asked.len() && !self.crowd.granted.is_empty()
    }

    /// The names, each with its directory, that the kernel is to let go of.
    fn surplus(&mut self) -> Vec<(Ino, OsString)> {
        let mut found = Vec::new();
        for _ in 0..self.crowd.granted.len() {
            if !self.is_crowded() || found.len() >= BATCH {
                break;
            }
            let Some(ino) = self.crowd.granted.pop_front() else { break };
            let Some(node) = self.get(ino).filter(|node| node.nlookup > 0) else { continue };
            if is_let_go(node) {
                found.push((node.parent, node.name.clone()));
                self.crowd.asked.insert(ino);
            } else {
                self.crowd.granted.push_back(ino);
            }
        }
        found
    }
}

/// The kernel may let go of its name: a directory may be where a process is, and would lose its path.
fn is_let_go(node: &Node) -> bool {
    node.linked && node.kind != Kind::Directory && !node.is_in_use() && !node.is_local()
}

impl Vfs {
    /// Asks the kernel to let go of names, until there is room.
    pub(super) fn make_room(&self) {
        let Some(vfs) = self.shared().filter(|vfs| !vfs.makes_room.swap(true, Ordering::Relaxed)) else { return };
        self.spawn(async move {
            loop {
                let names = vfs.table.lock().surplus();
                if names.is_empty() || vfs.closing.is_cancelled() {
                    break;
                }
                for (parent, name) in names {
                    vfs.tell(|notify| notify.invalidate_entry(parent, &name));
                }
                vfs.pause(MOMENT).await;
            }
            vfs.makes_room.store(false, Ordering::Relaxed);
        });
    }
}
