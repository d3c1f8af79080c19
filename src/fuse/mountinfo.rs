//! `/proc/self/mountinfo`: what is mounted where. Reading it asks no filesystem anything, so a dead or a busy mount cannot
//! hold us up.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Filesystem type of our mounts, as mount(8) and umount(8) see it.
pub const FS_TYPE: &str = "fuse.packmule";

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// `major:minor` of `st_dev`.
    pub device: String,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Filesystem type, with the subtype.
    pub fs_type: String,
    /// What is mounted, as `/proc/mounts` shows it.
    pub source: String,
    /// User who mounted a FUSE filesystem (`user_id=`).
    pub user: Option<u32>,
}

impl MountEntry {
    /// A mount of packmule whose process answers this user: his own, to root everybody's.
    pub fn is_ours(&self, user: nix::unistd::Uid) -> bool {
        self.fs_type == FS_TYPE && (user.is_root() || self.user.is_none_or(|owner| owner == user.as_raw()))
    }
}

/// All mounts of this process's namespace, a later one over an earlier one.
///
/// # Errors
/// When /proc is not there.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The topmost mount whose root is exactly `path`.
///
/// # Errors
/// When /proc is not there.
pub fn mounted_at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rfind(|mount| mount.target == path))
}

fn parse(table: &[u8]) -> Vec<MountEntry> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /target rw,noatime master:1 - ext3 /dev/root rw,errors=continue` (proc_pid_mountinfo(5)).
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = fields.nth(2)?;
    let target = fields.nth(1)?;
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let (fs_type, source) = (fields.next()?, fields.next()?);
    let options = fields.next().unwrap_or_default().split(|byte| *byte == b',');
    let user = options.filter_map(|word| std::str::from_utf8(word).ok()?.strip_prefix("user_id=")?.parse().ok()).next();
    let text = |field: &[u8]| String::from_utf8_lossy(&unescape(field)).into_owned();
    Some(MountEntry {
        device: text(device),
        target: PathBuf::from(OsString::from_vec(unescape(target))),
        fs_type: text(fs_type),
        source: text(source),
        user,
    })
}

/// Space, tab, newline and backslash are written as `\040` and so on.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.get(..3)).flatten();
        match octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_escapes() {
        let table = b"36 35 0:41 / /mnt/my\\040bucket rw,nosuid shared:7 - fuse.packmule s3://b/a\\134c rw,user_id=0\ngarbage\n";
        let expected = MountEntry {
            device: "0:41".into(),
            target: "/mnt/my bucket".into(),
            fs_type: FS_TYPE.into(),
            source: "s3://b/a\\c".into(),
            user: Some(0),
        };
        assert_eq!(parse(table), std::slice::from_ref(&expected));
        let theirs = MountEntry { user: Some(1000), ..expected };
        let asked_by = |user: u32| theirs.is_ours(user.into());
        assert!(asked_by(0) && asked_by(1000) && !asked_by(1001));
        assert_eq!(unescape(b"a\\04"), b"a\\04");
    }
}
