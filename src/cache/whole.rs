//! The whole-object checksum, taken block by block in order. Pure.

use md5::{Digest, Md5};
use sha1::Sha1;

use crate::s3::Checksum;

enum Hasher {
    Md5(Md5),
    Sha1(Sha1),
    Crc(crc_fast::Digest),
}

/// A running checksum of an object from its first block on.
pub struct Whole {
    hasher: Hasher,
    expected: Checksum,
    next: u64,
}

impl Whole {
    /// Nothing taken yet.
    pub fn new(expected: Checksum) -> Self {
        let hasher = match expected {
            Checksum::Md5(_) => Hasher::Md5(Md5::new()),
            Checksum::Sha1(_) => Hasher::Sha1(Sha1::new()),
            Checksum::Crc32c(_) => Hasher::Crc(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi)),
            Checksum::Crc64Nvme(_) => Hasher::Crc(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme)),
        };
        Self { hasher, expected, next: 0 }
    }

    /// The block that is to be taken next.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes the block [`Self::next`].
    pub fn take(&mut self, block: &[u8]) {
        match &mut self.hasher {
            Hasher::Md5(hasher) => hasher.update(block),
            Hasher::Sha1(hasher) => hasher.update(block),
            Hasher::Crc(digest) => digest.update(block),
        }
        self.next += 1;
    }

    /// Whether what was taken is the object.
    pub fn holds(&self) -> bool {
        match (&self.hasher, self.expected) {
            (Hasher::Md5(hasher), Checksum::Md5(sum)) => hasher.clone().finalize()[..] == sum,
            (Hasher::Sha1(hasher), Checksum::Sha1(sum)) => hasher.clone().finalize()[..] == sum,
            (Hasher::Crc(digest), Checksum::Crc32c(sum)) => digest.finalize() == u64::from(sum),
            (Hasher::Crc(digest), Checksum::Crc64Nvme(sum)) => digest.finalize() == sum,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_checksums_hold() {
        let text = b"123456789";
        let sha1 = Sha1::digest(text).into();
        let md5 = Md5::digest(text).into();
        for sum in [Checksum::Crc32c(0xe306_9283), Checksum::Crc64Nvme(0xae8b_1486_0a79_9888), Checksum::Md5(md5), Checksum::Sha1(sha1)] {
            let mut whole = Whole::new(sum);
            whole.take(&text[..4]);
            assert!(!whole.holds());
            whole.take(&text[4..]);
            assert!(whole.holds(), "{sum:?}");
        }
    }
}
