//! lookup, getattr, forget: from a name to an inode with as few requests as the promises allow.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::attr::{self, Attr, Decoded, Kind};
use super::error::{Error, Result};
use super::inode::{Node, Object, Place, Table};
use super::listing::{Answer, Listed, ListedObject, Merger};
use super::path::{Meaning, meaning_of};
use super::remember::Row;
use super::{Caller, Entry, Fh, Ino, KERNEL_TTL, MtimeSource, ROOT, Vfs};
use crate::failpoint;
use crate::s3::{ETag, ListRequest, ObjectHead, Store};
use crate::writeback::Attributes;

/// A symbolic link's target is at most PATH_MAX - 1 bytes.
pub(super) const LINK_MAX: u64 = 4095;

/// How often a name is looked up again whose inode was forgotten before the answer.
const LOOKUPS_MOST: u32 = 8;

impl Vfs {
    /// lookup(2)'s step: one name in one directory.
    pub async fn lookup(&self, _caller: Caller, parent: Ino, name: &OsStr) -> Result<Entry> {
        let mut tries = 0;
        loop {
            let ino = self.within(self.resolve(parent, name)).await?;
            failpoint::pass("lookup-resolved");
            match self.grant(ino) {
                // A FORGET of an earlier answer overtook this one, as it does where the kernel finds that the name has another inode
                // now: it lets that one go and asks again. ESTALE would be open(2)'s, which has looked twice by then.
                Err(Error::Stale) if tries < LOOKUPS_MOST => tries += 1,
                granted => return granted,
            }
        }
    }

    /// The kernel dropped `nlookup` lookups of the inode.
    pub fn forget(&self, ino: Ino, nlookup: u64) {
        failpoint::pass("forgetting");
        self.table.lock().forget(ino, nlookup);
    }

    /// stat(2).
    pub async fn getattr(&self, ino: Ino, fh: Option<Fh>) -> Result<(Attr, Duration)> {
        if fh.is_none() {
            self.within(self.confirm(ino)).await?;
        }
        self.attr(ino)
    }

    /// Makes sure that what is known of the inode is not older than `metadata_ttl`.
    pub(super) async fn confirm(&self, ino: Ino) -> Result<()> {
        let (parent, name) = {
            let table = self.table.lock();
            let node = table.get(ino).ok_or(Error::Stale)?;
            if ino == ROOT || !node.linked || self.is_true(&table, ino) {
                return Ok(());
            }
            (node.parent, node.name.clone())
        };
        match self.resolve(parent, &name).await {
            Ok(found) if found == ino => Ok(()),
            // A file that is open keeps its inode: it is what the handle says, though the name may mean another by now.
            _ if self.handles.is_open(ino) => Ok(()),
            Ok(_) => Err(Error::Stale),
            Err(error) => Err(error),
        }
    }

    /// The node can be answered from without a request.
    fn is_true(&self, table: &Table, ino: Ino) -> bool {
        table.get(ino).is_some_and(|node| node.linked && (ino == ROOT || node.is_fresh(self.config.metadata_ttl)))
    }

    /// How long the kernel may answer by itself: no longer than we would.
    fn kernel_ttl(&self, ino: Ino, node: &Node) -> Duration {
        let most = self.longest_ttl();
        if ino == ROOT || node.is_local() {
            return most;
        }
        most.min(node.checked.map_or(Duration::ZERO, |at| self.config.metadata_ttl.saturating_sub(at.elapsed())))
    }

    /// How long it may at most.
    fn longest_ttl(&self) -> Duration {
        KERNEL_TTL.min(self.config.metadata_ttl)
    }

    /// A listing of this age may be shown: what the kernel keeps of it for a moment is no older than `metadata_ttl` then.
    pub(super) fn shown_ttl(&self) -> Duration {
        let ttl = self.config.metadata_ttl;
        if ttl < 2 * KERNEL_TTL { ttl } else { ttl.saturating_sub(KERNEL_TTL) }
    }

    /// Answers readdirplus, and counts it as a lookup. Who reads a directory looks at its names next: they are as they were shown, also
    /// where reading takes longer than the listing is true.
    pub(super) fn grant_shown(&self, ino: Ino) -> Result<Entry> {
        let ttl = self.longest_ttl();
        Ok(Entry { entry_ttl: ttl, attr_ttl: ttl, ..self.grant(ino)? })
    }

    /// What stat shows of a node.
    pub(super) fn attr(&self, ino: Ino) -> Result<(Attr, Duration)> {
        let table = self.table.lock();
        let node = table.get(ino).ok_or(Error::Stale)?;
        // What somebody has open stays the version that it is.
        let ttl = if self.handles.is_open(ino) { self.longest_ttl() } else { self.kernel_ttl(ino, node) };
        Ok((self.attr_of(&table, ino, node), ttl))
    }

    /// As [`Vfs::attr`], with the lock held.
    pub(super) fn attr_of(&self, table: &Table, ino: Ino, node: &Node) -> Attr {
        let (mode, uid, gid) = attr::shown(&self.config, node.kind, node.stored);
        let size = match (&node.target, node.kind) {
            (Some(target), Kind::Symlink) => target.len() as u64,
            _ => node.file.staged.as_ref().map_or(node.size, |staged| staged.size()),
        };
        let nlink = match (node.linked, node.kind) {
            (false, _) => 0,
            (true, Kind::Directory) => table.links(node),
            (true, _) => 1,
        };
        Attr { ino, kind: node.kind, size, mode, uid, gid, nlink, atime: node.atime, mtime: node.mtime, ctime: node.ctime }
    }

    /// Answers a lookup and counts it.
    pub(super) fn grant(&self, ino: Ino) -> Result<Entry> {
        let mut table = self.table.lock();
        table.remember(ino);
        if table.is_crowded() {
            self.make_room();
        }
        let node = table.get(ino).ok_or(Error::Stale)?;
        let ttl = self.kernel_ttl(ino, node);
        Ok(Entry { attr: self.attr_of(&table, ino, node), generation: 0, entry_ttl: ttl, attr_ttl: ttl })
    }

    /// The inode that `name` means in `parent` now. The caller grants it, or lets it go with [`Table::release`].
    pub(super) async fn resolve(&self, parent: Ino, name: &OsStr) -> Result<Ino> {
        let meaning = match meaning_of(name) {
            Err(Error::Invalid) => return Err(Error::NoEntry),
            other => other?,
        };
        self.attach_recovered(parent);
        if let Some(answer) = self.resolve_here(parent, name)? {
            return answer;
        }
        if self.temporary.is_probe(name) && !self.listed_lately(parent) {
            return Err(Error::NoEntry);
        }
        let Some(covered) = self.covered(parent, &meaning) else { return self.resolve_in_store(parent, name, meaning).await };
        match self.unless_silent(&covered.bucket, self.resolve_in_store(parent, name, meaning)).await {
            Some(resolved) => resolved,
            None => self.resolve_pinned(parent, name, &covered).await,
        }
    }

    async fn resolve_in_store(&self, parent: Ino, name: &OsStr, meaning: Meaning) -> Result<Ino> {
        let mut listing = self.known(parent).await?;
        let mut answer = listing.find(&meaning, name);
        if matches!(answer, Answer::Unknown)
            && let Some(whole) = self.known_whole(parent).await?
        {
            answer = whole.find(&meaning, name);
            listing = whole;
        }
        if self.is_removed_since(parent, name, listing.started) {
            return Err(Error::NoEntry);
        }
        match answer {
            Answer::Found(listed) => self.adopt_listed(parent, name.to_owned(), &listed, listing.started).await,
            Answer::Absent => self.now_absent(parent, name, listing.started),
            Answer::Unknown => self.ask(parent, name, meaning).await,
        }
    }

    /// The answer, where none needs to be asked for.
    fn resolve_here(&self, parent: Ino, name: &OsStr) -> Result<Option<Result<Ino>>> {
        let table = self.table.lock();
        let dir = table.dir(parent).ok_or(if table.get(parent).is_some() { Error::NotDirectory } else { Error::Stale })?;
        if let Some(&child) = dir.children.get(name) {
            return Ok(self.is_true(&table, child).then_some(Ok(child)));
        }
        let (absent, removed) = (dir.absent.get(name), dir.removed.get(name));
        let lately = absent.is_some_and(|at| at.elapsed() < self.config.negative_ttl)
            || removed.is_some_and(|at| at.elapsed() < self.config.metadata_ttl);
        Ok(lately.then_some(Err(Error::NoEntry)))
    }

    fn listed_lately(&self, dir: Ino) -> bool {
        self.table.lock().dir(dir).and_then(super::dir_state::DirState::listed_at).is_some_and(|at| at.elapsed() < self.config.metadata_ttl)
    }

    /// This mount removed the name after that listing was begun.
    pub(super) fn is_removed_since(&self, dir: Ino, name: &OsStr, started: Instant) -> bool {
        self.table.lock().dir(dir).and_then(|dir| dir.removed.get(name)).is_some_and(|at| *at >= started)
    }

    /// A listing does not hold the name: the node that had it is unlinked, unless this mount knows better.
    pub(super) fn now_absent(&self, parent: Ino, name: &OsStr, started: Instant) -> Result<Ino> {
        let mut table = self.table.lock();
        if let Some(child) = table.child(parent, name) {
            if table.is_here(child, started) {
                return Ok(child);
            }
            table.unlink(parent, name);
        }
        Err(Error::NoEntry)
    }

    /// Gives a listed name its inode.
    pub(super) async fn adopt_listed(&self, parent: Ino, name: OsString, listed: &Listed, started: Instant) -> Result<Ino> {
        if self.is_account(parent) {
            let store = self.bucket(&listed.segment).await?;
            return Ok(self.take_bucket(parent, name, &listed.segment, started, &store));
        }
        let place = self.place_below(parent, &listed.segment, listed.object.is_none())?;
        let Some(object) = &listed.object else {
            let row = self.recall_directory(&place).await;
            return Ok(self.take_directory(parent, name, &listed.segment, started, row));
        };
        let row = self.memory.get(place.store.bucket(), &place.key, &object.etag, object.modified).await;
        if row.is_none() && self.may_be_link(object) {
            let head = place.store.head(&place.key).await?;
            return self.adopt_head(parent, name, &listed.segment, &place, head);
        }
        Ok(self.take_listed(parent, name, &listed.segment, object, row, started))
    }

    /// The inode of a bucket.
    pub(super) fn take_bucket(&self, root: Ino, name: OsString, bucket: &str, started: Instant, store: &Arc<dyn Store>) -> Ino {
        self.take(root, name, bucket, Kind::Directory, None, started, |node| {
            if let Some(dir) = node.dir.as_deref_mut() {
                dir.store = Some(store.clone());
            }
        })
    }

    /// A small object that was written with algorithm SHA1: links are, and listings show it (promise 29).
    pub(super) fn may_be_link(&self, object: &ListedObject) -> bool {
        self.config.symlinks && object.sha1 && object.size <= LINK_MAX
    }

    /// Where a name lies, from its directory.
    pub(super) fn place_below(&self, parent: Ino, segment: &str, directory: bool) -> Result<Place> {
        let mut place = self.place(parent)?;
        place.key.push_str(segment);
        if directory {
            place.key.push('/');
        }
        Ok(place)
    }

    /// The inode of a listed directory.
    pub(super) fn take_directory(&self, parent: Ino, name: OsString, segment: &str, started: Instant, row: Option<Row>) -> Ino {
        let mounted = self.mounted;
        self.take(parent, name, segment, Kind::Directory, None, started, |node| {
            if node.checked.is_none() {
                (node.mtime, node.atime, node.ctime) = (mounted, mounted, mounted);
                if let Some(row) = &row {
                    node.apply(&decoded_of(row));
                }
            }
        })
    }

    /// The inode of a listed object, with what is remembered of it.
    pub(super) fn take_listed(
        &self,
        parent: Ino,
        name: OsString,
        segment: &str,
        listed: &ListedObject,
        row: Option<Row>,
        started: Instant,
    ) -> Ino {
        let link = row.as_ref().and_then(|row| row.target.clone()).filter(|_| self.config.symlinks);
        let kind = if link.is_some() { Kind::Symlink } else { Kind::File };
        let object = Object {
            etag: listed.etag.clone(),
            size: listed.size,
            version_id: None,
            last_modified: listed.modified,
            archived: listed.archived,
            checksum: None,
            attributes: None,
            decoded: row.is_some(),
        };
        let decoded = row.as_ref().map(decoded_of);
        self.take_object(parent, name, segment, kind, object, decoded, link, started)
    }

    /// The inode of an object whose HEAD was seen.
    pub(super) fn adopt_head(&self, parent: Ino, name: OsString, segment: &str, place: &Place, head: ObjectHead) -> Result<Ino> {
        let decoded = attr::decode(&head.metadata);
        let kind = if self.is_link(&head) { Kind::Symlink } else { Kind::File };
        let row = Row::of(head.etag.clone(), &decoded, head.last_modified);
        // Where a link points is asked for when somebody wants to know.
        let target = (kind == Kind::Symlink).then(Vec::new);
        self.memory.put(place.store.bucket(), &place.key, Row { target, ..row });
        Ok(self.take_object(parent, name, segment, kind, object_of(head), Some(decoded), None, Instant::now()))
    }

    #[allow(clippy::too_many_arguments)]
    fn take_object(
        &self,
        parent: Ino,
        name: OsString,
        segment: &str,
        kind: Kind,
        object: Object,
        decoded: Option<Decoded>,
        target: Option<Vec<u8>>,
        started: Instant,
    ) -> Ino {
        let decoded = decoded.map(|mut decoded| {
            if self.config.mtime == MtimeSource::Server {
                decoded.mtime = None;
            }
            decoded
        });
        self.take(parent, name, segment, kind, Some(&object.etag), started, |node| {
            let same = node.object.as_ref().is_some_and(|known| known.etag == object.etag);
            if same && decoded.is_none() {
                return;
            }
            (node.mtime, node.atime, node.ctime) = (object.last_modified, object.last_modified, object.last_modified);
            if let Some(decoded) = &decoded {
                node.apply(decoded);
            } else {
                node.stored = attr::Stored::default();
            }
            node.size = object.size;
            if !same {
                node.file.epoch += 1;
            }
            let known = node.object.take().filter(|_| same);
            let attributes = object.attributes.clone().or(known.and_then(|known| known.attributes));
            node.object = Some(Object { attributes, ..object.clone() });
            if let Some(target) = target.as_ref().filter(|target| !target.is_empty()) {
                node.target = Some(target.as_slice().into());
            }
        })
    }

    /// The node that has the name, or a new one: a node of another kind gives way, and one that stays another version than `etag`;
    /// one that this mount knows better stays as it is.
    #[allow(clippy::too_many_arguments)]
    fn take(
        &self,
        parent: Ino,
        name: OsString,
        segment: &str,
        kind: Kind,
        etag: Option<&ETag>,
        started: Instant,
        update: impl FnOnce(&mut Node),
    ) -> Ino {
        let mut table = self.table.lock();
        if let Some(child) = table.child(parent, &name)
            && let Some(node) = table.get_mut(child)
        {
            if node.is_local() || node.since.is_some_and(|since| since >= started) {
                return child;
            }
            if node.kind == kind && etag.is_none_or(|etag| node.accepts(etag)) {
                update(node);
                node.checked = Some(started);
                node.file.unopened = true;
                return child;
            }
        }
        let mut node = Node::new(parent, name, segment.to_owned(), kind, SystemTime::now());
        update(&mut node);
        node.checked = Some(started);
        node.file.unopened = true;
        table.insert(node)
    }

    /// Asks for one name of a directory too large to be listed for it: the object and the prefix at once.
    async fn ask(&self, parent: Ino, name: &OsStr, meaning: Meaning) -> Result<Ino> {
        let started = Instant::now();
        let segment = match meaning {
            Meaning::Segment(segment) => segment,
            Meaning::Hidden(segment) => {
                let place = self.place_below(parent, &segment, false)?;
                let head = self.head_there(&place).await?;
                return self.adopt_head(parent, name.to_owned(), &segment, &place, head);
            }
            Meaning::Shortened { prefix } => return self.ask_shortened(parent, name, &prefix, started).await,
        };
        let place = self.place_below(parent, &segment, false)?;
        let below = self.holds_names(place.store.as_ref(), format!("{}/", place.key));
        let (head, below) = tokio::join!(self.head_there(&place), below);
        if below? {
            let directory = Place { key: format!("{}/", place.key), store: place.store.clone() };
            let row = self.recall_directory(&directory).await;
            return Ok(self.take_directory(parent, name.to_owned(), &segment, started, row));
        }
        match head {
            Ok(head) => self.adopt_head(parent, name.to_owned(), &segment, &place, head),
            Err(Error::NoEntry) => {
                let newer = self.now_absent(parent, name, started);
                if newer.is_err()
                    && let Some(dir) = self.table.lock().dir_mut(parent)
                {
                    if dir.absent.len() > 4096 {
                        dir.absent.clear();
                    }
                    dir.absent.insert(name.to_owned(), started);
                }
                newer
            }
            Err(error) => Err(error),
        }
    }

    /// HEAD of an object that was not removed here.
    async fn head_there(&self, place: &Place) -> Result<ObjectHead> {
        let since = Instant::now();
        let head = place.store.head(&place.key).await;
        if self.writeback.is_deleted(place.store.bucket(), &place.key, since) { Err(Error::NoEntry) } else { Ok(head?) }
    }

    /// The one key that begins with `prefix` and whose shortened name this is.
    async fn ask_shortened(&self, parent: Ino, name: &OsStr, prefix: &str, started: Instant) -> Result<Ino> {
        let place = self.place(parent)?;
        let mut merger = Merger::new(&place.key);
        let mut request = ListRequest { prefix: format!("{}{prefix}", place.key), delimited: true, ..ListRequest::default() };
        loop {
            let page = self.list(place.store.as_ref(), request.clone()).await?;
            request.continuation = page.next.clone();
            if let Some(listed) = merger.push(page).iter().find(|listed| listed.name() == name) {
                return self.adopt_listed(parent, name.to_owned(), listed, started).await;
            }
            if request.continuation.is_none() {
                return Err(Error::NoEntry);
            }
        }
    }
}

/// What HEAD told of an object, as the table keeps it.
pub(super) fn object_of(head: ObjectHead) -> Object {
    Object {
        size: head.size,
        version_id: head.version_id.clone(),
        last_modified: head.last_modified,
        archived: head.is_archived(),
        checksum: head.checksum,
        decoded: true,
        etag: head.etag,
        // Without its tags they are not all: whoever needs them asks for both.
        attributes: (head.tag_count == 0).then_some(Attributes {
            metadata: head.metadata,
            headers: head.headers,
            storage_class: head.storage_class,
            tags: Vec::new(),
        }),
    }
}

fn decoded_of(row: &Row) -> Decoded {
    Decoded { stored: row.stored, symlink: row.target.is_some(), mtime: row.mtime, atime: row.atime, ctime: row.ctime }
}
