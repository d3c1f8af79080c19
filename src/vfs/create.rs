//! create, mknod, mkdir: new names.

use std::ffi::OsStr;
use std::time::{Instant, SystemTime};

use super::attr::{Kind, Stored};
use super::deletes::unlinked_object;
use super::dir_state::DirState;
use super::error::{Error, Result};
use super::file::target;
use super::inode::{Node, Place};
use super::path::{KEY_MAX, Meaning, meaning_of};
use super::temporary::{Temporary, TemporaryNames, is_junk};
use super::{Caller, Entry, Ino, Opened, Root, Vfs, process};
use crate::writeback::{Expect, Guess};

impl Vfs {
    /// open(2) with O_CREAT: local, no request where the directory is known.
    pub async fn create(&self, caller: Caller, parent: Ino, name: &OsStr, mode: u32, _umask: u32, flags: i32) -> Result<(Entry, Opened)> {
        self.check_writable()?;
        let exclusive = flags & libc::O_EXCL != 0;
        match self.patiently(self.resolve(parent, name)).await {
            Ok(_) if exclusive => return Err(Error::Exists),
            Ok(ino) => {
                let opened = self.open(caller, ino, flags).await?;
                return Ok((self.grant(ino)?, opened));
            }
            Err(Error::NoEntry) => {}
            Err(error) => return Err(error),
        }
        let ino = self.make_file(caller, parent, name, mode, exclusive).await?;
        let (fh, _) = self.add_handle(caller, ino, flags, None, None)?.ok_or(Error::Stale)?;
        Ok((self.grant(ino)?, Opened { fh, keep_cache: false, backing: None }))
    }

    /// mknod(2) of a regular file.
    pub async fn mknod(&self, caller: Caller, parent: Ino, name: &OsStr, mode: u32, _umask: u32) -> Result<Entry> {
        self.check_writable()?;
        self.require_free(parent, name).await?;
        let ino = self.make_file(caller, parent, name, mode, true).await?;
        if let Some(staged) = self.staged_now(ino)? {
            self.publish_empty_later(ino, &staged).await?;
        }
        self.grant(ino)
    }

    /// Fails with EEXIST when the name means something.
    async fn require_free(&self, parent: Ino, name: &OsStr) -> Result<()> {
        match self.within(self.resolve(parent, name)).await {
            Ok(_) => Err(Error::Exists),
            Err(Error::NoEntry) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The segment and place of a new name. EACCES for the trash, ENAMETOOLONG for what no key can hold.
    pub(super) fn place_for_new(&self, parent: Ino, name: &OsStr, directory: bool) -> Result<(String, Place)> {
        if TemporaryNames::is_trash(name) {
            return Err(Error::Access);
        }
        let Meaning::Segment(segment) = meaning_of(name)? else { return Err(Error::Invalid) };
        // A file of no name at all would have the key of the directory's own marker.
        if segment.is_empty() && !directory {
            return Err(Error::Invalid);
        }
        let place = self.place_below(parent, &segment, directory)?;
        if place.key.len() > KEY_MAX {
            return Err(Error::NameTooLong);
        }
        Ok((segment, place))
    }

    /// Bucket and key that a file of this name has, or would have.
    pub fn key_below(&self, parent: Ino, name: &OsStr) -> Result<(String, String)> {
        let (Meaning::Segment(segment) | Meaning::Hidden(segment)) = meaning_of(name)? else { return Err(Error::NoEntry) };
        let place = self.place_below(parent, &segment, false)?;
        Ok((place.store.bucket().to_owned(), place.key))
    }

    /// A file that exists here alone, until a close publishes it.
    async fn make_file(&self, caller: Caller, parent: Ino, name: &OsStr, mode: u32, exclusive: bool) -> Result<Ino> {
        let (segment, place) = self.place_for_new(parent, name, false)?;
        let temporary = self.temporary.classify(name, caller.pid).map(|temporary| {
            let replaced = || self.opens.replaced_by(process::thread_group(caller.pid), parent, name);
            Temporary { leads_to: temporary.leads_to.or_else(replaced), ..temporary }
        });
        let now = SystemTime::now();
        let (stored, attributes) = self.fresh_attributes(Kind::File, owner_of(caller, mode), now);
        self.patiently(self.settle_other_kind(&place)).await?;
        // With `write_back` it replaces in one step what was removed under this name; else the gap is the caller's own.
        let unlinked = if temporary.is_none() && !self.config.write_back.is_zero() {
            self.take_delete(&place).await?
        } else {
            self.patiently(self.settle_delete(&place)).await?;
            None
        };
        let expect = match &unlinked {
            Some(unlinked) => unlinked.replaced_by(),
            None if exclusive => Expect::Absent,
            None => Expect::NewFile,
        };
        let staged = self.writeback.stage(target(&place), expect, None, attributes).await?;
        let guess = temporary.as_ref().and_then(|temporary| self.guess(parent, temporary));
        if temporary.is_some() {
            staged.set_held(true, guess);
            staged.set_junk(name.to_str().is_some_and(is_junk));
        }
        let mut node = Node::new(parent, name.to_owned(), segment, Kind::File, now);
        node.stored = stored;
        node.since = Some(Instant::now());
        if let Some(unlinked) = unlinked {
            node.object = unlinked.etag().map(unlinked_object);
            node.file.recovered = node.object.is_none();
            unlinked.confirm().into_iter().for_each(|deletion| staged.replaces(deletion));
        }
        node.file.staged = Some(staged);
        node.file.temporary = temporary.is_some();
        let ino = self.table.lock().insert(node);
        let now = self.place(ino)?;
        if !now.is(&place)
            && let Some(staged) = self.staged_now(ino)?
        {
            // A directory above got another name meanwhile.
            staged.retarget(target(&now), staged.expect()).await?;
        }
        self.touch_parent(parent);
        Ok(ino)
    }

    /// The key whose upload may get a temporary file's parts.
    pub(super) fn guess(&self, parent: Ino, temporary: &Temporary) -> Option<Guess> {
        let (_, place) = self.place_for_new(parent, OsStr::new(temporary.leads_to.as_deref()?), false).ok()?;
        Some(Guess { key: place.key, eager: temporary.eager })
    }

    /// mkdir(2): one marker, or a bucket at the account's root.
    pub async fn mkdir(&self, caller: Caller, parent: Ino, name: &OsStr, mode: u32, _umask: u32) -> Result<Entry> {
        self.check_writable()?;
        self.within(self.make_directory(caller, parent, name, mode)).await
    }

    async fn make_directory(&self, caller: Caller, parent: Ino, name: &OsStr, mode: u32) -> Result<Entry> {
        self.require_free(parent, name).await?;
        let now = SystemTime::now();
        let (stored, _) = self.fresh_attributes(Kind::Directory, owner_of(caller, mode), now);
        let (mut dir, mut queued) = (DirState::made(), None);
        let segment = if let (true, Root::Account(account)) = (self.is_account(parent), &self.root) {
            let name = name.to_str().ok_or(Error::Invalid)?;
            if !self.config.allow_bucket_changes {
                tracing::warn!("{name}: a directory here is a bucket: mount with -o allow_bucket_changes to make one");
                return Err(Error::NotPermitted);
            }
            account.create_bucket(name).await?;
            dir.store = Some(self.bucket(name).await?);
            name.to_owned()
        } else {
            let (segment, _) = self.place_for_new(parent, name, true)?;
            let (place, _guard) = self.hold(|| Ok(self.place_for_new(parent, name, true)?.1)).await?;
            self.settle_other_kind(&place).await?;
            let unlinked = self.take_delete(&place).await?;
            let there = unlinked.is_some();
            let made = self.make_marker(&place, stored, now).await;
            queued = self.replaced(unlinked, made).await?;
            if queued.is_some() {
                // A marker that was removed is in S3 still.
                (dir.marker, dir.bare) = (Some(there), !there);
            }
            segment
        };
        let mut node = Node::new(parent, name.to_owned(), segment, Kind::Directory, now);
        node.stored = stored;
        node.since = Some(Instant::now());
        node.checked = Some(Instant::now());
        node.dir = Some(Box::new(dir));
        node.file.staged = queued.clone();
        let ino = {
            let mut table = self.table.lock();
            let ino = table.insert(node);
            if queued.is_none() {
                table.confirm_above(ino);
            }
            ino
        };
        if let Some(staged) = queued {
            self.catch_up(ino);
            self.follow_up(ino, &staged);
        }
        self.touch_parent(parent);
        self.grant(ino)
    }

    /// A name came or went: the directory's times change here; that is never worth a request.
    pub(super) fn touch_parent(&self, parent: Ino) {
        let now = SystemTime::now();
        if let Some(node) = self.table.lock().get_mut(parent) {
            (node.mtime, node.ctime) = (now, now);
        }
    }
}

/// Who makes a file owns it.
pub(super) fn owner_of(caller: Caller, mode: u32) -> Stored {
    Stored { mode: Some(mode & 0o7777), uid: Some(caller.uid), gid: Some(caller.gid) }
}
