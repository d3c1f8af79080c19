//! Checksums as S3 spells them: base64 of the big-endian value.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use s3s::crypto::{Checksum as _, Crc32, Crc32c, Crc64Nvme, Md5, Sha1, Sha256};

/// The algorithms of `x-amz-checksum-*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Crc32,
    Crc32c,
    Crc64Nvme,
    Sha1,
    Sha256,
}

impl Algorithm {
    /// By the name of `x-amz-checksum-algorithm`.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name.to_ascii_uppercase().as_str() {
            "CRC32" => Self::Crc32,
            "CRC32C" => Self::Crc32c,
            "CRC64NVME" => Self::Crc64Nvme,
            "SHA1" => Self::Sha1,
            "SHA256" => Self::Sha256,
            _ => return None,
        })
    }

    /// S3's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crc32 => "CRC32",
            Self::Crc32c => "CRC32C",
            Self::Crc64Nvme => "CRC64NVME",
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
        }
    }

    /// The checksum of `bytes`, in base64.
    pub fn of(self, bytes: &[u8]) -> String {
        match self {
            _ if zeros::are(bytes) => self.of_zeros(bytes),
            Self::Crc32 => STANDARD.encode(Crc32::checksum(bytes)),
            Self::Crc32c => STANDARD.encode(Crc32c::checksum(bytes)),
            Self::Crc64Nvme => STANDARD.encode(Crc64Nvme::checksum(bytes)),
            Self::Sha1 => STANDARD.encode(Sha1::checksum(bytes)),
            Self::Sha256 => STANDARD.encode(Sha256::checksum(bytes)),
        }
    }

    fn of_zeros(self, bytes: &[u8]) -> String {
        static SUMS: Mutex<BTreeMap<(&str, usize), String>> = Mutex::new(BTreeMap::new());
        let sum = || STANDARD.encode(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes).to_be_bytes());
        assert_eq!(self, Self::Crc64Nvme, "huge objects have no other sum");
        SUMS.lock().entry((self.name(), bytes.len())).or_insert_with(sum).clone()
    }

    /// Checksum of the parts' checksums, with their number (COMPOSITE).
    pub fn composite<'a>(self, parts: impl Iterator<Item = &'a str>) -> String {
        let mut all = Vec::new();
        let mut count = 0;
        for part in parts {
            all.extend(STANDARD.decode(part).unwrap_or_default());
            count += 1;
        }
        format!("{}-{count}", self.of(&all))
    }
}

pub fn md5(bytes: &[u8]) -> [u8; 16] {
    if !zeros::are(bytes) {
        return Md5::checksum(bytes);
    }
    // Summed once for each length: a huge object has many parts of it.
    static SUMS: Mutex<BTreeMap<usize, [u8; 16]>> = Mutex::new(BTreeMap::new());
    *SUMS.lock().entry(bytes.len()).or_insert_with(|| Md5::checksum(bytes))
}

/// Zeros for objects that are larger than memory: they take none before somebody writes to them, and nobody does.
pub mod zeros {
    use std::sync::OnceLock;

    use bytes::Bytes;

    /// As many as the largest of these objects has.
    const MOST: usize = 13 << 30;

    fn all() -> &'static Bytes {
        static ALL: OnceLock<Bytes> = OnceLock::new();
        ALL.get_or_init(|| Bytes::from(vec![0; MOST]))
    }

    /// So many.
    pub fn of(len: usize) -> Bytes {
        all().slice(..len)
    }

    /// True of what [`of`] gave, and of a part of it.
    pub fn are(bytes: &[u8]) -> bool {
        bytes.len() > 1 << 20 && all().as_ptr_range().contains(&bytes.as_ptr())
    }
}

pub fn base64_md5(bytes: &[u8]) -> String {
    STANDARD.encode(md5(bytes))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The ETag of an object that came in one piece.
pub fn hex_md5(bytes: &[u8]) -> String {
    hex(&md5(bytes))
}
