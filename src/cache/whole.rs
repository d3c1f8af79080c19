//! The whole-object checksum, taken block by block in order. Pure.

use std::collections::BTreeMap;

use bytes::Bytes;
use crc_fast::CrcAlgorithm;
use md5::{Digest, Md5};
use sha1::Sha1;

use super::block::BLOCK;
use crate::s3::Checksum;

enum Hasher {
    Md5(Md5),
    Sha1(Sha1),
    Crc(crc_fast::Digest),
}

/// CRCs of stretches can be joined; a hash has to see the object in order.
fn joinable(checksum: Checksum) -> Option<CrcAlgorithm> {
    match checksum {
        Checksum::Crc32c(_) => Some(CrcAlgorithm::Crc32Iscsi),
        Checksum::Crc64Nvme(_) => Some(CrcAlgorithm::Crc64Nvme),
        Checksum::Md5(_) | Checksum::Sha1(_) => None,
    }
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
        let hasher = match (expected, joinable(expected)) {
            (_, Some(algorithm)) => Hasher::Crc(crc_fast::Digest::new(algorithm)),
            (Checksum::Sha1(_), _) => Hasher::Sha1(Sha1::new()),
            _ => Hasher::Md5(Md5::new()),
        };
        Self { hasher, expected, next: 0 }
    }

    /// The block that is to be taken next.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes blocks from [`Self::next`] on; only the object's last one may be short.
    pub fn take(&mut self, blocks: &[u8]) {
        match &mut self.hasher {
            Hasher::Md5(hasher) => hasher.update(blocks),
            Hasher::Sha1(hasher) => hasher.update(blocks),
            Hasher::Crc(digest) => digest.update(blocks),
        }
        self.next += (blocks.len() as u64).div_ceil(BLOCK);
    }

    /// Takes the stretch that begins at [`Self::next`], where there is one.
    pub fn join(&mut self, stretches: &mut Stretches) -> bool {
        let (Hasher::Crc(digest), Some(stretch)) = (&mut self.hasher, stretches.pop(self.next)) else { return false };
        digest.combine(&stretch.digest);
        self.next = stretch.end;
        true
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

/// Most stretches that wait: many times the connections of a sequential reader, while a random one of a huge object leaves them all.
const MAX_STRETCHES: usize = 256;

/// CRCs of blocks that came before their turn, so that they need not be read again when it comes.
#[derive(Debug, Default)]
pub struct Stretches(BTreeMap<u64, Stretch>);

#[derive(Debug)]
struct Stretch {
    end: u64,
    digest: crc_fast::Digest,
}

impl Stretches {
    /// Notes the blocks `data` from `first` on. What is not noted is read again: a hash, or more stretches than are kept.
    pub fn add(&mut self, expected: Checksum, first: u64, data: &Bytes) {
        let Some(algorithm) = joinable(expected) else { return };
        let end = first + (data.len() as u64).div_ceil(BLOCK);
        // A GET's blocks come in order: one stretch grows, and joining, which costs as much as 256 KiB do, happens once a GET.
        if let Some((_, stretch)) = self.0.range_mut(..=first).next_back()
            && stretch.end == first
        {
            stretch.digest.update(data);
            stretch.end = end;
        } else if self.0.len() < MAX_STRETCHES {
            let mut digest = crc_fast::Digest::new(algorithm);
            digest.update(data);
            self.0.insert(first, Stretch { end, digest });
        }
    }

    /// Forgets all: a block was found bad, and comes again.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The stretch that begins at `block`. Those that begin before are of no use any more.
    fn pop(&mut self, block: u64) -> Option<Stretch> {
        while let Some(first) = self.0.first_entry() {
            match first.key().cmp(&block) {
                std::cmp::Ordering::Less => _ = first.remove(),
                std::cmp::Ordering::Equal => return Some(first.remove()),
                std::cmp::Ordering::Greater => break,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(len: usize) -> Bytes {
        (0..len).map(|at| (at * at % 251) as u8).collect()
    }

    proptest! {
        #[test]
        fn stretches_in_any_order_make_the_checksum_of_the_object(
            lens in prop::collection::vec(1u64..5, 1..12),
            turns in prop::collection::vec(any::<prop::sample::Index>(), 12),
            flip in any::<Option<prop::sample::Index>>(),
            tail in 1usize..BLOCK as usize,
        ) {
            let blocks: u64 = lens.iter().sum();
            let data = bytes((blocks - 1) as usize * BLOCK as usize + tail);
            let sums = [
                Checksum::Crc64Nvme(crc_fast::checksum(CrcAlgorithm::Crc64Nvme, &data)),
                Checksum::Crc32c(crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, &data) as u32),
            ];
            let mut received = data.to_vec();
            if let Some(flip) = flip {
                received[flip.index(data.len())] ^= 1;
            }
            let received = Bytes::from(received);
            for sum in sums {
                let mut first = 0;
                let mut segments: Vec<(u64, Bytes)> = lens.iter().map(|len| {
                    let at = first;
                    first += len;
                    (at, received.slice((at * BLOCK) as usize..data.len().min((first * BLOCK) as usize)))
                }).collect();
                let (mut whole, mut stretches) = (Whole::new(sum), Stretches::default());
                for turn in &turns[..lens.len()] {
                    let (at, segment) = segments.remove(turn.index(segments.len()));
                    if at == whole.next() { whole.take(&segment) } else { stretches.add(sum, at, &segment) }
                    while whole.join(&mut stretches) {}
                }
                prop_assert_eq!(whole.next(), blocks);
                prop_assert_eq!(whole.holds(), flip.is_none());
                prop_assert!(stretches.0.is_empty());
            }
        }
    }

    #[test]
    fn stretches_are_bounded_and_those_passed_by_are_forgotten() {
        let sum = Checksum::Crc64Nvme(0);
        let block = bytes(BLOCK as usize);
        let mut stretches = Stretches::default();
        (0..1000).for_each(|n| stretches.add(sum, n * 2, &block));
        assert_eq!(stretches.0.len(), MAX_STRETCHES);
        assert!(stretches.pop(5).is_none() && stretches.pop(6).is_some());
        assert_eq!(stretches.0.first_key_value().map(|(first, _)| *first), Some(8));
        stretches.clear();
        assert!(stretches.pop(8).is_none());
    }

    #[test]
    fn known_checksums_hold() {
        let text = b"123456789";
        let sha1 = Sha1::digest(text).into();
        let md5 = Md5::digest(text).into();
        for sum in [Checksum::Crc32c(0xe306_9283), Checksum::Crc64Nvme(0xae8b_1486_0a79_9888), Checksum::Md5(md5), Checksum::Sha1(sha1)] {
            let mut whole = Whole::new(sum);
            assert!(!whole.holds());
            whole.take(text);
            assert!(whole.holds(), "{sum:?}");
        }
    }
}
