//! Checksums as S3 spells them: base64 of the big-endian value.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
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
            Self::Crc32 => STANDARD.encode(Crc32::checksum(bytes)),
            Self::Crc32c => STANDARD.encode(Crc32c::checksum(bytes)),
            Self::Crc64Nvme => STANDARD.encode(Crc64Nvme::checksum(bytes)),
            Self::Sha1 => STANDARD.encode(Sha1::checksum(bytes)),
            Self::Sha256 => STANDARD.encode(Sha256::checksum(bytes)),
        }
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
    Md5::checksum(bytes)
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
