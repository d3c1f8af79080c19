//! Attributes: what S3's metadata says about owner, mode and times, and what a mount shows of it (promises 28 and 29).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Ino, VfsConfig};
use crate::s3::Metadata;

/// `S_IFMT` and the two of its values that a bucket may carry.
const S_IFMT: u32 = 0o170_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
/// Bits that must never come from a bucket: whoever may write the bucket would otherwise own every machine that mounts it.
const SPECIAL_BITS: u32 = 0o7_000;

/// What a directory entry is. S3 knows objects and nothing else: directories are markers or implied, links are objects with a mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An object.
    File,
    /// A key prefix, a marker, or a bucket.
    Directory,
    /// An object whose body is the target.
    Symlink,
}

impl Kind {
    fn type_bits(self) -> u32 {
        match self {
            Self::File => S_IFREG,
            Self::Directory => S_IFDIR,
            Self::Symlink => S_IFLNK,
        }
    }
}

/// What stat(2) tells.
#[derive(Clone, Debug)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// File type.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Permission bits, 07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Link count: 0 once unlinked.
    pub nlink: u32,
    /// Last access, as set; reading does not change it.
    pub atime: SystemTime,
    /// Last change of the content.
    pub mtime: SystemTime,
    /// Last change of content or attributes.
    pub ctime: SystemTime,
}

/// Owner and mode that are kept with the object, where they differ from the mount's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// `x-amz-meta-*` in the convention of s3fs and rclone: decimal, times in seconds with an optional fraction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decoded {
    /// Owner and mode.
    pub stored: Stored,
    /// The mode's file type says symbolic link.
    pub symlink: bool,
    /// `mtime`.
    pub mtime: Option<SystemTime>,
    /// `atime`.
    pub atime: Option<SystemTime>,
    /// `ctime`.
    pub ctime: Option<SystemTime>,
}

/// Reads what s3fs, rclone or we have written. A value that is no number is as if absent.
pub fn decode(metadata: &Metadata) -> Decoded {
    let number = |name: &str| metadata.get(name).and_then(|value| value.trim().parse::<u32>().ok());
    let time = |name: &str| metadata.get(name).and_then(|value| parse_time(value));
    let mode = number("mode");
    Decoded {
        stored: Stored { mode: mode.map(|mode| mode & !S_IFMT & !SPECIAL_BITS), uid: number("uid"), gid: number("gid") },
        symlink: mode.is_some_and(|mode| mode & S_IFMT == S_IFLNK),
        mtime: time("mtime"),
        atime: time("atime"),
        ctime: time("ctime"),
    }
}

/// Writes owner and mode into the metadata that travels with an object, and takes out what is no longer kept.
pub fn encode_stored(metadata: &mut Metadata, kind: Kind, stored: Stored) {
    // A link is told by its mode alone, so it always has one.
    let mode = match (kind, stored.mode) {
        (Kind::Symlink, mode) => Some(mode.unwrap_or(0o777)),
        (_, mode) => mode,
    };
    put(metadata, "mode", mode.map(|mode| kind.type_bits() | (mode & 0o7777)));
    put(metadata, "uid", stored.uid);
    put(metadata, "gid", stored.gid);
}

/// Writes `x-amz-meta-mtime`.
pub fn encode_mtime(metadata: &mut Metadata, mtime: SystemTime) {
    metadata.insert("mtime".to_owned(), format_time(mtime));
}

fn put(metadata: &mut Metadata, name: &str, value: Option<u32>) {
    match value {
        Some(value) => metadata.insert(name.to_owned(), value.to_string()),
        None => metadata.remove(name),
    };
}

/// Seconds since the epoch with up to nine decimals, trailing zeros left off; negative before 1970.
pub fn format_time(time: SystemTime) -> String {
    let (sign, since) = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => ("", since),
        Err(before) => ("-", before.duration()),
    };
    if since.subsec_nanos() == 0 {
        return format!("{sign}{}", since.as_secs());
    }
    let fraction = format!("{:09}", since.subsec_nanos());
    format!("{sign}{}.{}", since.as_secs(), fraction.trim_end_matches('0'))
}

/// The inverse of [`format_time`]; digits past the ninth are dropped.
pub fn parse_time(text: &str) -> Option<SystemTime> {
    let text = text.trim();
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) || !seconds.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let nanos: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let since = Duration::new(seconds.parse().ok()?, nanos.parse().ok()?);
    if negative { UNIX_EPOCH.checked_sub(since) } else { UNIX_EPOCH.checked_add(since) }
}

/// Mode, owner and group as the mount shows them.
pub fn shown(config: &VfsConfig, kind: Kind, stored: Stored) -> (u32, u32, u32) {
    let own = (own_mode(config, kind), config.uid.unwrap_or(config.mounter_uid), config.gid.unwrap_or(config.mounter_gid));
    let stored = if config.ownership == Some(false) { Stored::default() } else { stored };
    let store = config.ownership == Some(true);
    let mode = if modes_follow_options(config, kind) && !store { own.0 } else { stored.mode.unwrap_or(own.0) };
    let uid = if config.uid.is_some() && !store { own.1 } else { stored.uid.unwrap_or(own.1) };
    let gid = if config.gid.is_some() && !store { own.2 } else { stored.gid.unwrap_or(own.2) };
    (mode, uid, gid)
}

/// What of `wanted` is worth keeping: only what differs from what the mount gives by itself.
pub fn worth_keeping(config: &VfsConfig, kind: Kind, wanted: Stored) -> Stored {
    if config.ownership == Some(false) {
        return Stored::default();
    }
    let (mode, uid, gid) = shown(config, kind, Stored::default());
    let store = config.ownership == Some(true);
    let (modes, users, groups) =
        (store || !modes_follow_options(config, kind), store || config.uid.is_none(), store || config.gid.is_none());
    Stored {
        mode: wanted.mode.filter(|wanted| modes && *wanted != mode),
        uid: wanted.uid.filter(|wanted| users && *wanted != uid),
        gid: wanted.gid.filter(|wanted| groups && *wanted != gid),
    }
}

fn modes_follow_options(config: &VfsConfig, kind: Kind) -> bool {
    config.umask.is_some() || if kind == Kind::Directory { config.dir_mode.is_some() } else { config.file_mode.is_some() }
}

fn own_mode(config: &VfsConfig, kind: Kind) -> u32 {
    let (given, plain, full) = match kind {
        Kind::File => (config.file_mode, 0o644, 0o666),
        Kind::Directory => (config.dir_mode, 0o755, 0o777),
        Kind::Symlink => return 0o777,
    };
    match (given, config.umask) {
        (Some(mode), umask) => mode & !umask.unwrap_or(0),
        // The umask is all that is said, so everything else that fits the kind is allowed.
        (None, Some(umask)) => full & !umask,
        (None, None) => plain,
    }
}

/// What is left of a mode when the content or the owner changed: no set-user-ID, and no set-group-ID on what the group may
/// execute (without that it is mandatory locking, which stays).
pub fn without_privileges(mode: u32) -> u32 {
    let sgid = if mode & libc::S_IXGRP == 0 { 0 } else { libc::S_ISGID };
    mode & !(libc::S_ISUID | sgid)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn s3fs_metadata_is_read() {
        let metadata =
            Metadata::from([("mode".into(), "33188".into()), ("uid".into(), "1000".into()), ("mtime".into(), "1700000000.25".into())]);
        let decoded = decode(&metadata);
        assert_eq!(decoded.stored, Stored { mode: Some(0o644), uid: Some(1000), gid: None });
        assert_eq!(decoded.mtime, Some(UNIX_EPOCH + Duration::from_millis(1_700_000_000_250)));
        assert!(!decoded.symlink);
        assert!(decode(&Metadata::from([("mode".into(), "41471".into())])).symlink);
    }

    #[test]
    fn special_bits_of_a_bucket_are_masked() {
        let metadata = Metadata::from([("mode".into(), (0o104_755u32).to_string())]);
        assert_eq!(decode(&metadata).stored.mode, Some(0o755));
    }

    #[test]
    fn nonsense_is_as_if_absent() {
        for text in ["", "x", "1.x", "1.2.3", "--1", "1e9"] {
            let parsed = parse_time(text);
            assert!(parsed.is_none() || text.is_empty(), "{text}: {parsed:?}");
        }
    }

    proptest! {
        #[test]
        fn times_survive_the_round_trip(seconds in 0u64..10_000_000_000, nanos in 0u32..1_000_000_000, before in any::<bool>()) {
            let since = Duration::new(seconds, nanos);
            let time = if before { UNIX_EPOCH - since } else { UNIX_EPOCH + since };
            prop_assert_eq!(parse_time(&format_time(time)), Some(time));
        }
    }
}
