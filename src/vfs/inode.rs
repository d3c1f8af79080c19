//! The inode table: what this mount knows, by inode number. One lock, a leaf, never held across `.await`.
//!
//! A node lives while the kernel counts lookups of it, a handle is open on it, or something of it waits to be sent.
//! Its key is never stored: it is the segments from the root down, so renaming a directory moves all below it at once.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::attr::{Kind, Stored};
use super::crowd::Crowd;
use super::dir_state::DirState;
use super::error::Error;
use super::listing::Listing;
use super::passed::Modes;
use super::survey::Surveys;
use super::{Ino, ROOT};
use crate::s3::{Checksum, ETag, Store};
use crate::writeback::{Attributes, Published, Staged};

/// Names up to which the subdirectories of a directory are counted at every stat.
const COUNT_MOST: usize = 1000;

/// One inode.
pub struct Node {
    /// Parent directory; the root's is itself.
    pub parent: Ino,
    /// Name as shown.
    pub name: OsString,
    /// What stands in the key for it.
    pub segment: String,
    /// File type.
    pub kind: Kind,
    /// Lookups that the kernel has not forgotten.
    pub nlookup: u64,
    /// Open handles and background work that need the node.
    pub pins: u32,
    /// False once its name is gone or means another node.
    pub linked: bool,
    /// A user of this mount removed its name or gave it to another file: its content is nobody's but theirs who have it open.
    pub removed: bool,
    /// Set when this mount created, renamed or published it: a listing begun before does not speak of it.
    pub since: Option<Instant>,
    /// When the store last confirmed it.
    pub checked: Option<Instant>,
    /// Owner and mode as kept or set.
    pub stored: Stored,
    /// Size in bytes, of the newest content known.
    pub size: u64,
    /// Modification.
    pub mtime: SystemTime,
    /// `mtime` was set by utimens(2), not by a write: it is worth a copy of its own.
    pub mtime_set: bool,
    /// Access.
    pub atime: SystemTime,
    /// Change.
    pub ctime: SystemTime,
    /// The object's version, once one exists.
    pub object: Option<Object>,
    /// What a file has beside, and a directory whose marker is queued.
    pub file: FileState,
    /// What a directory has beside.
    pub dir: Option<Box<DirState>>,
    /// Where a link points, once known.
    pub target: Option<Arc<[u8]>>,
}

/// The published object behind a file, a link or a directory's marker.
#[derive(Clone, Debug)]
pub struct Object {
    /// Its entity tag.
    pub etag: ETag,
    /// Its size in bytes.
    pub size: u64,
    /// Its version id, where known.
    pub version_id: Option<String>,
    /// The store's LastModified.
    pub last_modified: SystemTime,
    /// It must be restored before it can be read.
    pub archived: bool,
    /// Its whole checksum, once a HEAD or our own publication told it.
    pub checksum: Option<Checksum>,
    /// Headers, metadata and tags, once a HEAD or our own publication told them.
    pub attributes: Option<Attributes>,
    /// A metadata answer (HEAD, GET or our own memory) was seen, so owner, mode and kind are known.
    pub decoded: bool,
}

impl From<&Published> for Object {
    fn from(published: &Published) -> Self {
        Self {
            etag: published.etag.clone(),
            size: published.size,
            version_id: published.version_id.clone(),
            last_modified: published.last_modified,
            archived: false,
            checksum: published.checksum,
            attributes: Some(published.attributes.clone()),
            decoded: true,
        }
    }
}

/// A file's local side.
#[derive(Default)]
pub struct FileState {
    /// Content that the store does not hold yet.
    pub staged: Option<Arc<Staged>>,
    /// Serialises staging, publication and truncation of this file.
    pub order: Arc<tokio::sync::Mutex<()>>,
    /// Handles open for writing.
    pub writers: u32,
    /// Grows when this mount changes what readers must see; a handle's reader of an older epoch is opened anew.
    pub epoch: u64,
    /// ETag of the content whose pages the kernel may hold.
    pub kernel_pages: Option<ETag>,
    /// The newest publication of the staged content that the node is of.
    pub told: Option<ETag>,
    /// The name is a temporary one: nothing is published under it.
    pub temporary: bool,
    /// Its spool file is on its way to the cache.
    pub retiring: bool,
    /// Why its content was parked while somebody had it open: it takes no more, and the closes of those who wrote it say so.
    pub parked: Option<Error>,
    /// Somebody waits in the background for its publication.
    pub followed: bool,
    /// An earlier run left it: an object that this node does not know may lie under its key.
    pub recovered: bool,
    /// When a HEAD or a GET last told all that the object carries.
    pub described: Option<Instant>,
    /// Not opened since the store was last asked.
    pub unopened: bool,
    /// How its handles are open in the kernel.
    pub modes: Modes,
}

impl FileState {
    /// It has content that is no object yet, or whose object the node has not heard of.
    fn is_ahead(&self) -> bool {
        let told = |staged: &Staged| staged.published().map(|published| published.etag) == self.told;
        self.staged.as_ref().is_some_and(|staged| staged.is_dirty() || !told(staged))
    }
}

/// Where a node lies in the store.
#[derive(Clone)]
pub struct Place {
    /// Its bucket.
    pub store: Arc<dyn Store>,
    /// A file's key; a directory's key prefix, empty or with its trailing slash.
    pub key: String,
}

/// What a node's new name means for others ([`Table::relink`]).
#[derive(Default)]
pub struct Relinked {
    /// What had the new name.
    pub replaced: Vec<Ino>,
    /// What had the old name once, and was moved along.
    pub forgotten: Vec<Ino>,
}

/// All inodes.
pub struct Table {
    nodes: HashMap<Ino, Box<Node>>,
    /// Nodes in use whose name means another node by now, though nobody here took it from them.
    forgotten: HashSet<Ino>,
    /// Directories that are listed before anybody reads them.
    pub(super) surveys: Surveys,
    /// What is kept only because there is room.
    pub(super) crowd: Crowd,
    next: Ino,
}

impl Table {
    /// Holds the root, in a mount that may take so many bytes of memory.
    pub fn new(now: SystemTime, memory_limit: u64) -> Self {
        let mut root = Node::new(ROOT, OsString::new(), String::new(), Kind::Directory, now);
        root.nlookup = 1;
        Self {
            nodes: HashMap::from([(ROOT, Box::new(root))]),
            forgotten: HashSet::new(),
            surveys: Surveys::default(),
            crowd: Crowd::new(memory_limit),
            next: ROOT + 1,
        }
    }

    /// The node, if it is still known.
    pub fn get(&self, ino: Ino) -> Option<&Node> {
        self.nodes.get(&ino).map(Box::as_ref)
    }

    /// The node, to change.
    pub fn get_mut(&mut self, ino: Ino) -> Option<&mut Node> {
        self.nodes.get_mut(&ino).map(Box::as_mut)
    }

    /// The directory part of a node.
    pub fn dir(&self, ino: Ino) -> Option<&DirState> {
        self.get(ino)?.dir.as_deref()
    }

    /// The directory part, to change.
    pub fn dir_mut(&mut self, ino: Ino) -> Option<&mut DirState> {
        self.get_mut(ino)?.dir.as_deref_mut()
    }

    /// The child that `name` means here, if a node of it exists.
    pub fn child(&self, parent: Ino, name: &OsStr) -> Option<Ino> {
        self.dir(parent)?.children.get(name).copied()
    }

    /// Adds a node under its parent, in place of whatever had the name. Unreferenced until a lookup is counted.
    pub fn insert(&mut self, node: Node) -> Ino {
        let ino = self.next;
        self.next += 1;
        self.unlink(node.parent, &node.name);
        self.thin_out(node.parent);
        if let Some(dir) = self.dir_mut(node.parent) {
            dir.removed.remove(&node.name);
            dir.absent.remove(&node.name);
            dir.bare = false;
            dir.children.insert(node.name.clone(), ino);
        }
        self.nodes.insert(ino, Box::new(node));
        ino
    }

    /// A user takes the name away from its node, and from those that had it before. Gives them.
    pub fn remove(&mut self, parent: Ino, name: &OsStr) -> Vec<Ino> {
        let mut removed = self.forgotten_as(parent, name);
        removed.extend(self.child(parent, name));
        for ino in &removed {
            self.forgotten.remove(ino);
            if let Some(node) = self.get_mut(*ino) {
                node.removed = true;
            }
        }
        self.unlink(parent, name);
        removed
    }

    /// Nodes in use that had this name, and lost it to another node or to nothing.
    fn forgotten_as(&self, parent: Ino, name: &OsStr) -> Vec<Ino> {
        let had = |ino: &&Ino| self.get(**ino).is_some_and(|node| node.parent == parent && node.name == name);
        self.forgotten.iter().filter(had).copied().collect()
    }

    /// Takes the name out of its directory, because it means another node or nothing; the node stays while it is referenced.
    pub fn unlink(&mut self, parent: Ino, name: &OsStr) -> Option<Ino> {
        let child = self.dir_mut(parent)?.children.remove(name)?;
        if let Some(node) = self.nodes.get_mut(&child) {
            node.linked = false;
            if !node.removed && node.is_in_use() {
                self.forgotten.insert(child);
            }
        }
        self.reap(child);
        Some(child)
    }

    /// Moves a node to another name, in place of whatever had it. What was forgotten of its old name goes with it.
    pub fn relink(&mut self, ino: Ino, parent: Ino, name: &OsStr, segment: String) -> Relinked {
        let Some((old_parent, old_name)) = self.get(ino).map(|node| (node.parent, node.name.clone())) else { return Relinked::default() };
        let replaced = self.remove(parent, name);
        let forgotten = self.forgotten_as(old_parent, &old_name);
        for ino in &forgotten {
            if let Some(node) = self.nodes.get_mut(ino) {
                (node.parent, node.name, node.segment) = (parent, name.to_owned(), segment.clone());
            }
        }
        if let Some(dir) = self.dir_mut(old_parent) {
            dir.children.remove(&old_name);
            dir.removed.insert(old_name, Instant::now());
        }
        self.link(ino, parent, name, segment);
        Relinked { replaced, forgotten }
    }

    /// Gives a node a name that nothing has. False where node or directory are no more.
    pub fn link(&mut self, ino: Ino, parent: Ino, name: &OsStr, segment: String) -> bool {
        self.forgotten.remove(&ino);
        let Some(node) = self.nodes.get_mut(&ino) else { return false };
        (node.parent, node.name, node.segment) = (parent, name.to_owned(), segment);
        node.since = Some(Instant::now());
        node.linked = true;
        let Some(dir) = self.dir_mut(parent) else { return false };
        dir.removed.remove(name);
        dir.absent.remove(name);
        dir.bare = false;
        dir.children.insert(name.to_owned(), ino);
        true
    }

    /// st_nlink of a directory: its own name, its `.`, and a `..` for each subdirectory; 1 where they are not counted, which
    /// find(1) and its like take for "not known".
    pub fn links(&self, node: &Node) -> u32 {
        let Some(dir) = node.dir.as_deref() else { return 1 };
        let Some(listing) = dir.listing.as_deref().filter(|listing| listing.complete) else { return 1 };
        if listing.entries.len() + dir.children.len() > COUNT_MOST {
            return 1;
        }
        let newer = |child: &Ino| self.get(*child).filter(|node| node.since.is_some_and(|since| since >= listing.started));
        let here = dir.children.values().filter_map(newer).filter(|node| node.kind == Kind::Directory).count();
        let listed = listing.entries.iter().filter(|entry| entry.object.is_none()).map(|entry| entry.name()).filter(|name| {
            let removed = dir.removed.get(name).is_some_and(|at| *at >= listing.started);
            !removed && dir.children.get(name).and_then(newer).is_none()
        });
        u32::try_from(2 + here + listed.count()).unwrap_or(1)
    }

    /// Counts a lookup that the kernel is told of.
    pub fn remember(&mut self, ino: Ino) {
        if let Some(node) = self.get_mut(ino) {
            node.nlookup += 1;
            let is_new = node.nlookup == 1;
            if node.kind != Kind::Directory {
                self.crowd.granted(ino, is_new);
            }
        }
    }

    /// The kernel forgot `nlookup` lookups.
    pub fn forget(&mut self, ino: Ino, nlookup: u64) {
        if let Some(node) = self.get_mut(ino) {
            node.nlookup = node.nlookup.saturating_sub(nlookup);
            self.reap(ino);
        }
    }

    /// Keeps the node until [`Table::unpin`].
    pub fn pin(&mut self, ino: Ino) {
        if let Some(node) = self.get_mut(ino) {
            node.pins += 1;
            if !node.linked && !node.removed {
                self.forgotten.insert(ino);
            }
        }
    }

    /// Lets go of a [`Table::pin`].
    pub fn unpin(&mut self, ino: Ino) {
        if let Some(node) = self.get_mut(ino) {
            node.pins = node.pins.saturating_sub(1);
            self.reap(ino);
        }
    }

    /// Removes the node if nothing refers to it, and then its parent likewise.
    fn reap(&mut self, ino: Ino) {
        let mut ino = ino;
        while ino != ROOT {
            let Some(node) = self.get(ino) else { return };
            let held = node.nlookup > 0 || node.is_in_use() || node.file.retiring;
            let busy = node.dir.as_deref().is_some_and(|dir| !dir.children.is_empty() || dir.keeping || dir.marker_dirty);
            if held || busy || self.is_newer_than_listing(node) {
                return;
            }
            if self.is_newer_than_survey(node) {
                return self.surveys.keep(ino);
            }
            let (parent, name, linked) = (node.parent, node.name.clone(), node.linked);
            self.nodes.remove(&ino);
            self.crowd.gone(ino);
            self.forgotten.remove(&ino);
            if linked && let Some(dir) = self.dir_mut(parent) {
                dir.children.remove(&name);
                if dir.children.is_empty() {
                    dir.children = HashMap::new();
                }
            }
            ino = parent;
        }
    }

    /// A listing in use, or on its way, was begun before this mount gave the node its name: forgotten, the name would be absent.
    fn is_newer_than_listing(&self, node: &Node) -> bool {
        let listed = self.dir(node.parent).and_then(DirState::oldest_listing);
        node.linked && node.since.is_some_and(|since| listed.is_some_and(|at| at <= since))
    }

    /// As [`Table::is_newer_than_listing`], of listings that no directory has yet.
    fn is_newer_than_survey(&self, node: &Node) -> bool {
        let Some(surveyed) = self.surveys.since() else { return false };
        let newer = |at: &Instant| *at >= surveyed;
        node.linked
            && (node.since.is_some_and(|since| newer(&since)) || node.dir.as_deref().is_some_and(|dir| dir.removed.values().any(newer)))
    }

    /// Takes a newer listing of a directory into use, and lets go of nodes that only the older one did not know.
    pub fn install(&mut self, dir: Ino, listing: Arc<Listing>) {
        let names = listing.entries.len();
        let Some(state) = self.dir_mut(dir) else { return };
        state.install(listing);
        self.release_children(dir);
        for crowded in self.crowd.listed(dir, names) {
            self.drop_listing(crowded);
        }
    }

    /// The directory is listed anew when somebody asks.
    pub fn drop_listing(&mut self, dir: Ino) {
        let Some(state) = self.dir_mut(dir) else { return };
        state.listing = None;
        self.release_children(dir);
    }

    /// As [`Table::release`], of all that a directory holds.
    fn release_children(&mut self, dir: Ino) {
        let children = self.dir(dir).map(|state| state.children.values().copied().collect::<Vec<_>>());
        children.into_iter().flatten().for_each(|child| self.reap(child));
    }

    /// A directory that many files are copied into gives up its listing now and then, so that nodes newer than it can go.
    fn thin_out(&mut self, dir: Ino) {
        const MANY: usize = 8192;
        if self.dir(dir).is_some_and(|state| state.children.len() % MANY == MANY - 1) {
            self.drop_listing(dir);
        }
    }

    /// Tries again to remove a node whose last reason to live may have gone.
    pub fn release(&mut self, ino: Ino) {
        self.reap(ino);
    }

    /// The bucket and key of a node, given the mount's own bucket and prefix (none when the account is mounted).
    /// `None` for the account's root, or a node that is gone.
    pub fn place(&self, ino: Ino, base: Option<&Place>) -> Option<Place> {
        let mut segments = Vec::new();
        let mut at = ino;
        let (store, mut key) = loop {
            let node = self.get(at)?;
            if let Some(store) = node.dir.as_deref().and_then(|dir| dir.store.clone()) {
                break (store, String::new());
            }
            if at == ROOT {
                let base = base?;
                break (base.store.clone(), base.key.clone());
            }
            segments.push(node.segment.as_str());
            at = node.parent;
        };
        for (depth, segment) in segments.iter().rev().enumerate() {
            key.push_str(segment);
            if depth + 1 < segments.len() || self.get(ino).is_some_and(|node| node.kind == Kind::Directory) {
                key.push('/');
            }
        }
        Some(Place { store, key })
    }

    /// All nodes at or below a directory, and those in use whose name there was forgotten.
    pub fn below(&self, ino: Ino) -> Vec<Ino> {
        let mut found = vec![ino];
        let mut next = 0;
        while next < found.len() {
            let at = found[next];
            if let Some(dir) = self.dir(at) {
                found.extend(dir.children.values().copied());
                found.extend(self.forgotten.iter().filter(|ino| self.get(**ino).is_some_and(|node| node.parent == at)));
            }
            next += 1;
        }
        found
    }

    /// The store has just taken a key below: whatever others do, the directories that lead to it are there.
    pub fn confirm_above(&mut self, ino: Ino) {
        let now = Instant::now();
        let mut at = ino;
        while let Some(parent) = self.get(at).map(|node| node.parent).filter(|parent| *parent != ROOT) {
            if let Some(node) = self.get_mut(parent) {
                node.checked = node.checked.map(|_| now);
            }
            at = parent;
        }
    }

    /// No listing begun at `started` knows it better: it is newer, or it or something below it is here alone.
    pub fn is_here(&self, ino: Ino, started: Instant) -> bool {
        let newer = |node: &Node| node.since.is_some_and(|since| since >= started);
        self.get(ino).is_some_and(|node| newer(node) || self.holds_local(node))
    }

    /// It is here alone, or something below it.
    pub fn holds_local(&self, node: &Node) -> bool {
        let below = |dir: &DirState| dir.children.values().any(|child| self.get(*child).is_some_and(|child| self.holds_local(child)));
        node.is_local() || node.dir.as_deref().is_some_and(below)
    }

    /// True when `ino` is `ancestor` or lies below it.
    pub fn is_below(&self, ino: Ino, ancestor: Ino) -> bool {
        let mut at = ino;
        loop {
            if at == ancestor {
                return true;
            }
            match self.get(at) {
                Some(node) if at != ROOT => at = node.parent,
                _ => return false,
            }
        }
    }

    /// Names of files that somebody has open for writing.
    pub fn written(&self) -> impl Iterator<Item = &OsStr> {
        self.nodes.values().filter(|node| !node.removed && node.file.writers > 0).map(|node| node.name.as_os_str())
    }

    /// All content that the store does not hold.
    pub fn staged(&self) -> impl Iterator<Item = &Arc<Staged>> {
        self.nodes.values().filter_map(|node| node.file.staged.as_ref())
    }

    /// All directories.
    pub fn directories(&self) -> Vec<Ino> {
        self.nodes.iter().filter(|(_, node)| node.dir.is_some()).map(|(ino, _)| *ino).collect()
    }

    /// Drops listings and what was confirmed; gives the inodes concerned.
    pub fn drop_knowledge(&mut self) -> Vec<Ino> {
        self.surveys.clear();
        for node in self.nodes.values_mut() {
            node.checked = None;
            if let Some(dir) = node.dir.as_deref_mut() {
                dir.listing = None;
                dir.absent.clear();
                dir.removed.clear();
            }
        }
        self.nodes.keys().copied().collect()
    }
}

impl Node {
    /// A node that nothing is known of but its name and kind.
    pub fn new(parent: Ino, name: OsString, segment: String, kind: Kind, now: SystemTime) -> Self {
        Self {
            parent,
            name,
            segment,
            kind,
            nlookup: 0,
            pins: 0,
            linked: true,
            removed: false,
            since: None,
            checked: None,
            stored: Stored::default(),
            size: 0,
            mtime: now,
            mtime_set: false,
            atime: now,
            ctime: now,
            object: None,
            file: FileState::default(),
            dir: (kind == Kind::Directory).then(|| Box::new(DirState::unknown())),
            target: None,
        }
    }

    /// The store confirmed it less than `ttl` ago, or it exists only here.
    pub fn is_fresh(&self, ttl: Duration) -> bool {
        self.is_local() || self.checked.is_some_and(|at| at.elapsed() < ttl)
    }

    /// An object that a directory of the same segment hides, under the name that tells it from that.
    pub fn is_hidden(&self) -> bool {
        self.name != super::path::name_of(&self.segment)
    }

    /// Somebody has it open, or it has content of its own.
    pub fn is_in_use(&self) -> bool {
        self.pins > 0 || self.file.staged.is_some()
    }

    /// It holds content or attributes that no listing can know better.
    pub fn is_local(&self) -> bool {
        self.file.is_ahead() || self.dir.as_deref().is_some_and(|dir| dir.keeping || dir.marker_dirty)
    }

    /// Takes over what an answer of the store or our memory says of owner, mode and times.
    pub fn apply(&mut self, decoded: &super::attr::Decoded) {
        self.stored = decoded.stored;
        if let Some(mtime) = decoded.mtime {
            self.mtime = mtime;
        }
        self.atime = decoded.atime.unwrap_or(self.mtime);
        self.ctime = decoded.ctime.unwrap_or(self.mtime);
    }
}
