//! Symbolic links: objects as s3fs writes them, that a website endpoint follows too (promise 29).

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha1::{Digest, Sha1};

use super::attr::{self, Kind};
use super::create::owner_of;
use super::error::{Error, Result};
use super::file::row_of;
use super::inode::{Node, Object, Place};
use super::lookup::LINK_MAX;
use super::{Caller, Entry, Ino, Vfs};
use crate::s3::{Checksum, ObjectHead, PutOptions};
use crate::writeback::Attributes;

/// RFC 3986's unreserved characters and the slash stay as they are in a redirect.
const REDIRECT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');

impl Vfs {
    /// symlink(2).
    pub async fn symlink(&self, caller: Caller, parent: Ino, name: &OsStr, link: &[u8]) -> Result<Entry> {
        self.check_writable()?;
        if !self.config.symlinks {
            return Err(Error::NotPermitted);
        }
        if link.len() as u64 > LINK_MAX {
            return Err(Error::NameTooLong);
        }
        self.within(self.make_link(caller, parent, name, link)).await
    }

    async fn make_link(&self, caller: Caller, parent: Ino, name: &OsStr, link: &[u8]) -> Result<Entry> {
        match self.resolve(parent, name).await {
            Ok(_) => return Err(Error::Exists),
            Err(Error::NoEntry) => {}
            Err(error) => return Err(error),
        }
        let (segment, _) = self.place_for_new(parent, name, false)?;
        let (place, _guard) = self.hold(|| Ok(self.place_for_new(parent, name, false)?.1)).await?;
        let now = SystemTime::now();
        let (stored, mut attributes) = self.fresh_attributes(Kind::Symlink, owner_of(caller, 0o777), now);
        attributes.headers.content_type = Some("text/plain; charset=utf-8".to_owned());
        attributes.headers.website_redirect = self.redirect_of(&place.key, link);
        let unlinked = self.take_delete(&place).await?;
        let put = put_link(&place, link, &attributes).await;
        let outcome = self.replaced(unlinked, put).await?;
        self.writeback.supersede(place.store.bucket(), &place.key).await;
        let mut node = Node::new(parent, name.to_owned(), segment, Kind::Symlink, now);
        node.stored = stored;
        (node.since, node.checked) = (Some(Instant::now()), Some(Instant::now()));
        node.size = link.len() as u64;
        node.target = Some(link.into());
        let last_modified = outcome.last_modified.unwrap_or(now);
        node.object = Some(Object {
            etag: outcome.etag,
            size: link.len() as u64,
            version_id: outcome.version_id,
            last_modified,
            archived: false,
            checksum: None,
            attributes: Some(attributes),
            decoded: true,
        });
        if let Some(row) = row_of(&node, last_modified) {
            self.memory.put(place.store.bucket(), &place.key, row);
        }
        self.memory.written().await;
        node.object.iter().for_each(|object| self.note_made(&place, object));
        let ino = self.table.lock().insert(node);
        self.touch_parent(parent);
        self.grant(ino)
    }

    /// readlink(2): the object's body, asked for once.
    pub async fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        let object = {
            let table = self.table.lock();
            let node = table.get(ino).ok_or(Error::Stale)?;
            if node.kind != Kind::Symlink {
                return Err(Error::Invalid);
            }
            if let Some(target) = &node.target {
                return Ok(target.to_vec());
            }
            node.object.clone().ok_or(Error::Stale)?
        };
        let place = self.place(ino)?;
        let reader = self.cache.reader(place.store.clone(), Self::version(&place, &object));
        let target = self.within(async { Ok(reader.read(0, LINK_MAX as usize).await?) }).await?;
        let mut table = self.table.lock();
        if let Some(node) = table.get_mut(ino) {
            node.target = Some(target.as_ref().into());
            if let Some(row) = row_of(node, object.last_modified) {
                self.memory.put(place.store.bucket(), &place.key, row);
            }
        }
        Ok(target.to_vec())
    }

    /// Metadata says that the object is a link, and it can be one.
    pub(super) fn is_link(&self, head: &ObjectHead) -> bool {
        self.config.symlinks && head.size <= LINK_MAX && attr::decode(&head.metadata).symlink
    }

    /// What a listing showed as a file is a link: the name gets a new inode. ESTALE makes the kernel look it up again.
    pub(super) fn turn_into_link(&self, ino: Ino, place: &Place, head: ObjectHead) -> Error {
        let named = {
            let mut table = self.table.lock();
            let named = table.get(ino).filter(|node| node.linked).map(|node| (node.parent, node.name.clone(), node.segment.clone()));
            if let Some((parent, name, _)) = &named {
                table.unlink(*parent, name);
            }
            named
        };
        if let Some((parent, name, segment)) = named {
            self.tell(|notify| notify.invalidate_entry(parent, &name));
            if let Err(error) = self.adopt_head(parent, name, &segment, place, head) {
                return error;
            }
        }
        Error::Stale
    }

    /// Where a website endpoint is sent for a link, when its target lies in the same bucket: `/key`.
    pub(super) fn redirect_of(&self, key: &str, link: &[u8]) -> Option<String> {
        let link = std::str::from_utf8(link).ok().filter(|link| !link.starts_with('/'))?;
        let mut segments: Vec<&str> = key.split('/').collect();
        segments.pop();
        for step in link.split('/') {
            match step {
                "" | "." => {}
                ".." => drop(segments.pop()?),
                name => segments.push(name),
            }
        }
        let target = segments.join("/");
        let base = match &self.root {
            super::Root::Bucket { prefix, .. } => prefix.as_str(),
            super::Root::Account(_) => "",
        };
        let inside = !target.is_empty() && target.starts_with(base);
        inside.then(|| format!("/{}", utf8_percent_encode(&target, REDIRECT)))
    }
}

/// PUTs a link with checksum algorithm SHA1, which AWS shows in listings: so other machines know which small files to look at.
async fn put_link(place: &Place, link: &[u8], attributes: &Attributes) -> Result<crate::s3::PutOutcome> {
    let options = PutOptions {
        headers: attributes.headers.clone(),
        metadata: attributes.metadata.clone(),
        checksum: Some(Checksum::Sha1(Sha1::digest(link).into())),
        ..PutOptions::default()
    };
    Ok(place.store.put(&place.key, Arc::new(Bytes::copy_from_slice(link)), options).await?)
}
