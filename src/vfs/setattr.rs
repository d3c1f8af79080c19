//! setattr: chmod, chown, utimens, truncate. None of the first three ever makes a copy fail (promise 13).

use std::time::{Duration, SystemTime};

use super::attr::{self, Attr, Kind, Stored};
use super::error::{Error, Result};
use super::{Caller, Fh, Ino, SetAttr, SetTime, Vfs};

impl Vfs {
    /// Changes attributes: true here at once; what is kept with the object follows in the background.
    pub async fn setattr(&self, caller: Caller, ino: Ino, fh: Option<Fh>, set: SetAttr) -> Result<(Attr, Duration)> {
        self.check_changeable()?;
        if let Some(size) = set.size {
            match self.kind(ino)? {
                Kind::Directory => return Err(Error::IsDirectory),
                Kind::Symlink => return Err(Error::Invalid),
                Kind::File => {}
            }
            // Times that come with a truncation are the kernel's own "now".
            self.truncate(caller, ino, fh, size).await?;
        }
        if self.apply(ino, set)? {
            self.keep_attributes(ino).await;
        }
        self.attr(ino)
    }

    /// Applies what is set; true when something changed that is kept with the object.
    fn apply(&self, ino: Ino, set: SetAttr) -> Result<bool> {
        let now = SystemTime::now();
        let mut table = self.table.lock();
        let node = table.get_mut(ino).ok_or(Error::Stale)?;
        let before = (node.stored, node.mtime);
        let (mode, uid, gid) = attr::shown(&self.config, node.kind, node.stored);
        let mut wanted = Stored {
            mode: Some(set.mode.map_or(mode, |mode| mode & 0o7777)),
            uid: Some(set.uid.unwrap_or(uid)),
            gid: Some(set.gid.unwrap_or(gid)),
        };
        if set.mode.is_none() && (set.uid.is_some() || set.gid.is_some()) && node.kind == Kind::File {
            wanted.mode = wanted.mode.map(attr::without_privileges);
        }
        node.stored = attr::worth_keeping(&self.config, node.kind, wanted);
        let time = |time: SetTime| match time {
            SetTime::Now => now,
            SetTime::At(time) => time,
        };
        if let Some(atime) = set.atime {
            node.atime = time(atime);
        }
        if let Some(mtime) = set.mtime {
            node.mtime = time(mtime);
            // A truncation's time is one that write() made; only a time of its own is worth a request.
            node.mtime_set = set.size.is_none();
            if let Some(dir) = node.dir.as_deref_mut() {
                dir.set_mtime = Some(node.mtime);
            }
        }
        node.ctime = now;
        Ok((node.stored, node.mtime) != before)
    }
}
