//! One inode, one version. What somebody has open, or what content was begun from, stays the version that it is: where the store
//! has another one by then, the name is forgotten and means another inode from its next lookup on. Only our own publications and
//! copies give such an inode another version.
//!
//! A name that was forgotten is not a name that was removed: what is written to the forgotten inode still goes to its key, on the
//! condition that the key holds the version that was opened, and promise 12 decides. A user of this mount who renames or removes
//! the name means the forgotten file too: it goes along ([`Table::relink`]), or is nobody's any more ([`Node::removed`]).

use std::ffi::OsString;
use std::time::{Duration, Instant};

use super::attr::{self, Decoded, Kind};
use super::error::{Error, Result};
use super::inode::{Node, Object, Place, Table};
use super::lookup::object_of;
use super::{Ino, Vfs};
use crate::s3::{ETag, ErrorKind, ObjectHead};
use crate::writeback::Attributes;

/// A HEAD or a listing younger than this needs no other before an open or a change (promise 14).
pub(super) const JUST_NOW: Duration = Duration::from_secs(1);

/// Which version content begins from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// The one that the file was opened with then, whatever the store has by now.
    Opened(Instant),
    /// The same, but ESTALE where the store has another one: a path is looked up again then.
    Named,
    /// What the store has now.
    Newest,
}

impl Node {
    /// What the store says of this version is said of this inode.
    pub fn accepts(&self, etag: &ETag) -> bool {
        !self.is_in_use() || self.object.as_ref().is_some_and(|known| known.etag == *etag)
    }

    /// A HEAD (or a GET's head) tells what the object is now. [`Error::Stale`] where it is another inode's.
    pub fn observe(&mut self, object: Object, decoded: &Decoded) -> Result<()> {
        if !self.accepts(&object.etag) {
            return Err(Error::Stale);
        }
        self.become_version(object, decoded)
    }

    /// It is of this version from now on. What was set here of a version that is known already stays.
    fn become_version(&mut self, object: Object, decoded: &Decoded) -> Result<()> {
        let known = self.object.as_ref().filter(|known| known.etag == object.etag);
        let (same, decoded_before) = (known.is_some(), known.is_some_and(|known| known.decoded));
        if !same {
            self.file.epoch += 1;
            self.size = object.size;
            (self.mtime, self.atime, self.ctime) = (object.last_modified, object.last_modified, object.last_modified);
        }
        if !decoded_before {
            self.apply(decoded);
        }
        let now = Instant::now();
        self.file.described = object.attributes.as_ref().map(|_| now);
        self.object = Some(object);
        self.checked = Some(now);
        Ok(())
    }
}

impl Table {
    /// The store has just taken the node's content under its key: a name that was forgotten is its own again, unless another
    /// inode has content for it. Gives the name.
    pub fn reclaim(&mut self, ino: Ino) -> Option<(Ino, OsString)> {
        let node = self.get(ino).filter(|node| !node.linked && !node.removed)?;
        let (parent, name, segment) = (node.parent, node.name.clone(), node.segment.clone());
        let other = self.child(parent, &name).and_then(|other| self.get(other));
        if other.is_some_and(|other| other.is_local() || other.kind != Kind::File) {
            return None;
        }
        self.unlink(parent, &name);
        self.link(ino, parent, &name, segment).then_some((parent, name))
    }
}

impl Vfs {
    /// The name means something else by now: ESTALE makes the kernel look it up again.
    pub(super) fn forget_name(&self, ino: Ino) -> Error {
        let mut table = self.table.lock();
        if let Some((parent, name)) = table.get(ino).filter(|node| node.linked).map(|node| (node.parent, node.name.clone())) {
            table.unlink(parent, &name);
            if let Some(dir) = table.dir_mut(parent) {
                dir.listing = None;
            }
        }
        Error::Stale
    }

    /// The file's version with all its metadata and tags: what a HEAD told within the last second, else what one tells now. ESTALE
    /// where the store has another version, or none.
    pub(super) async fn current_object(&self, ino: Ino, place: &Place) -> Result<Object> {
        match self.heard_just_now(ino)? {
            Some(object) => Ok(object),
            None => self.object_now(ino, place).await,
        }
    }

    /// As [`Vfs::current_object`], whatever was heard before.
    pub(super) async fn object_now(&self, ino: Ino, place: &Place) -> Result<Object> {
        let head = self.head_of_its_version(ino, place).await?.ok_or(Error::Stale)?;
        self.learn(ino, place, head, Node::observe).await
    }

    /// A HEAD of the file's own version. `None`, and the name is forgotten, where the store has another one, or none.
    pub(super) async fn head_of_its_version(&self, ino: Ino, place: &Place) -> Result<Option<ObjectHead>> {
        let head = match place.store.head(&place.key).await {
            Err(error) if error.kind == ErrorKind::NoSuchKey => None,
            head => Some(head?),
        };
        let own = head.filter(|head| self.table.lock().get(ino).is_some_and(|node| node.accepts(&head.etag)));
        if own.is_none() {
            self.forget_name(ino);
        }
        Ok(own)
    }

    fn heard_just_now(&self, ino: Ino) -> Result<Option<Object>> {
        let table = self.table.lock();
        let node = table.get(ino).ok_or(Error::Stale)?;
        let recent = node.checked.is_some_and(|at| at.elapsed() < JUST_NOW);
        Ok(node.object.clone().filter(|object| recent && object.attributes.is_some()))
    }

    /// Takes a HEAD's news into the node.
    async fn learn(
        &self,
        ino: Ino,
        place: &Place,
        head: ObjectHead,
        into: fn(&mut Node, Object, &Decoded) -> Result<()>,
    ) -> Result<Object> {
        if self.is_link(&head) && self.kind(ino)? == Kind::File {
            return Err(self.turn_into_link(ino, place, head));
        }
        let tags = if head.tag_count > 0 { place.store.get_tags(&place.key).await? } else { Vec::new() };
        let decoded = attr::decode(&head.metadata);
        let attributes =
            Attributes { metadata: head.metadata.clone(), headers: head.headers.clone(), storage_class: head.storage_class.clone(), tags };
        let object = Object { attributes: Some(attributes), ..object_of(head) };
        let mut table = self.table.lock();
        into(table.get_mut(ino).ok_or(Error::Stale)?, object.clone(), &decoded)?;
        Ok(object)
    }

    /// The object that content of the file begins from.
    pub(super) async fn start_from(&self, ino: Ino, place: &Place, start: Start) -> Result<Object> {
        let (removed, parked, opened, described) = {
            let table = self.table.lock();
            let node = table.get(ino).ok_or(Error::Stale)?;
            (node.removed, node.file.parked, node.object.clone(), node.file.described)
        };
        if let Some(error) = parked {
            return Err(error);
        }
        // Whoever has a removed file open may change it for as long as that lasts.
        if removed {
            return opened.ok_or(Error::Stale);
        }
        if let Some(object) = self.heard_just_now(ino)? {
            return Ok(object);
        }
        // What the open asked is not asked again (promise 14).
        if let Start::Opened(at) = start
            && described.is_some_and(|described| described + JUST_NOW > at)
            && let Some(object) = opened.as_ref().filter(|object| object.attributes.is_some())
        {
            return Ok(object.clone());
        }
        match start {
            Start::Named => self.object_now(ino, place).await,
            Start::Opened(_) => match self.head_of_its_version(ino, place).await? {
                Some(head) => self.learn(ino, place, head, Node::observe).await,
                None => opened.ok_or(Error::Stale),
            },
            Start::Newest => match place.store.head(&place.key).await {
                Err(error) if error.kind == ErrorKind::NoSuchKey => Err(Error::Stale),
                head => self.learn(ino, place, head?, Node::become_version).await,
            },
        }
    }
}
