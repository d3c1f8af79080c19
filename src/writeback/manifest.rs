//! The on-disk contract: one versioned, checksummed JSON record beside each spool file, replaced atomically.

use std::fs;
use std::io;
use std::path::Path;

use super::sent::Sent;
use super::{Attributes, Expect};
use crate::ranges::RangeSet;
use crate::s3::{ETag, Part};

/// Version of the record; a newer one is left alone.
const VERSION: u32 = 1;

/// Where an entry stands, as its record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// close() was never promised: kept, listed as unfinished, not published by itself.
    Writing,
    /// The opener closed it: it will be published.
    Sealed,
    /// Parts may exist.
    Uploading,
    /// CompleteMultipartUpload was sent, its outcome is not known.
    Completing,
    /// Visible in S3.
    Published,
    /// Refused for good, or a conflict: kept and listed until it is retried or discarded.
    Parked,
}

/// The multipart upload that an entry has begun or is about to begin.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct UploadRecord {
    /// The key it was created for.
    pub key: String,
    /// `None`: the intent alone was recorded, so an upload of the key begun after `begun` without parts is ours.
    pub id: Option<String>,
    /// Seconds since the epoch when the intent was recorded.
    pub begun: u64,
    /// Begun without a checksum of the whole.
    #[serde(default)]
    pub plain: bool,
}

/// The base, without its reader.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct BaseRecord {
    pub bucket: String,
    pub key: String,
    pub etag: ETag,
    pub size: u64,
    pub version_id: Option<String>,
}

/// Everything needed to publish a spool file, or to explain it, after a crash.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Record {
    pub version: u32,
    pub phase: Phase,
    /// Of two records under one key, the greater is the newer.
    #[serde(default)]
    pub order: u64,
    pub bucket: String,
    pub key: String,
    pub expect: Expect,
    pub attributes: Attributes,
    pub size: u64,
    pub local: RangeSet,
    pub dirty: RangeSet,
    pub base_len: u64,
    pub base: Option<BaseRecord>,
    /// The base is another file's object: none holds the content.
    #[serde(default)]
    pub copied: bool,
    /// Where what was appended begins in the spool file, if all was: it belongs behind the base, whatever that is.
    #[serde(default)]
    pub appended: Option<u64>,
    pub held: bool,
    pub guess: Option<String>,
    pub upload: Option<UploadRecord>,
    /// The parts that Complete was sent with: its outcome is told by the object's ETag.
    pub completing: Option<Vec<Part>>,
    /// They are the content as it is.
    #[serde(default)]
    pub completes: bool,
    /// What the store may have taken (see [`Sent`]), and whether it is the content as it is.
    #[serde(default)]
    pub sent: Vec<(Sent, bool)>,
    /// The base cannot be copied from inside the store: all of it is sent.
    #[serde(default)]
    pub fetches: bool,
    pub poisoned: bool,
    pub reason: Option<String>,
    /// The spool file was fsynced with this record.
    pub durable: bool,
    /// The kernel's boot id: what was not fsynced is still whole while it is the same (kill -9, not a power cut).
    pub boot: String,
}

/// First word of every record file; the CRC-32C of the JSON text follows it on the line.
const MAGIC: &str = "packmule-spool";

/// The JSON text behind its first line.
pub(crate) fn framed(json: &str) -> String {
    format!("{MAGIC} {:08x}\n{json}", crc_fast::crc32_iscsi(json.as_bytes()))
}

impl Record {
    /// Reads a record; `InvalidData` where it is damaged or of a version that this program does not know.
    pub fn load(path: &Path) -> io::Result<Record> {
        Self::parse(&fs::read_to_string(path)?)
    }

    /// The record as it is stored.
    pub fn text(&self) -> io::Result<String> {
        Ok(framed(&serde_json::to_string(self)?))
    }

    /// What [`Record::text`] gave.
    pub fn parse(text: &str) -> io::Result<Record> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let (_, json) = text.split_once('\n').ok_or_else(|| invalid("the record is cut short".into()))?;
        if text != framed(json) {
            return Err(invalid("the record's checksum does not match".into()));
        }
        let record: Record = serde_json::from_str(json).map_err(|e| invalid(e.to_string()))?;
        if record.version > VERSION {
            return Err(invalid(format!("record version {} is newer than this program's {VERSION}", record.version)));
        }
        Ok(record)
    }

    /// The version to write.
    pub const fn current() -> u32 {
        VERSION
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub fn record() -> Record {
        Record {
            version: VERSION,
            phase: Phase::Sealed,
            order: 1,
            bucket: "b".into(),
            key: "k\u{1}é".into(),
            expect: Expect::Version(ETag::new("e")),
            attributes: Attributes::default(),
            size: 9,
            local: std::iter::once(0..9).collect(),
            dirty: RangeSet::new(),
            base_len: 0,
            base: None,
            copied: false,
            appended: None,
            held: false,
            guess: None,
            upload: None,
            completing: None,
            completes: false,
            sent: Vec::new(),
            fetches: false,
            poisoned: false,
            reason: None,
            durable: true,
            boot: "1".into(),
        }
    }

    #[test]
    fn a_record_comes_back_and_damage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1.json");
        fs::write(&path, record().text().unwrap()).unwrap();
        assert_eq!(Record::load(&path).unwrap(), record());
        let text = fs::read_to_string(&path).unwrap().replace("\"size\":9", "\"size\":8");
        fs::write(&path, text).unwrap();
        assert_eq!(Record::load(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_newer_record_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1.json");
        fs::write(&path, Record { version: VERSION + 1, ..record() }.text().unwrap()).unwrap();
        assert!(Record::load(&path).is_err());
    }
}
