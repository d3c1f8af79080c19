//! Blocks of an object version: which are here, their CRC-32C, and the sidecar record that keeps both on disk. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

use sha2::{Digest, Sha256};

use super::ObjectVersion;
use crate::s3::ETag;

/// Bytes of a block. 64 KiB, so that a read of up to 64 KiB at any offset costs at most 128 KiB (promise 17), and a
/// 64 KiB read every 1 MiB at most twice what was asked for; runs join blocks into large GETs, so small blocks cost no request.
pub const BLOCK: u64 = 64 * 1024;

/// Blocks of a page: bitmap and sums are kept by pages of 64 MiB, so that a few blocks of a 50 TB object cost little.
const PAGE: u64 = 1024;

const MAGIC: &[u8; 8] = b"pkmcache";
/// Raised whenever the record changes; another version is a miss.
const FORMAT: u32 = 1;
const COMPLETE: u32 = 1;
const VERIFIED: u32 = 2;
/// Bytes that [`peek_complete`] needs.
pub const PEEK: usize = 16;

/// The blocks that hold a byte range.
pub fn blocks_of(bytes: Range<u64>) -> Range<u64> {
    bytes.start / BLOCK..bytes.end.div_ceil(BLOCK)
}

/// The bytes that blocks hold in an object of `size` bytes.
pub fn bytes_of(blocks: Range<u64>, size: u64) -> Range<u64> {
    (blocks.start * BLOCK).min(size)..(blocks.end * BLOCK).min(size)
}

/// CRC-32C of a block.
pub fn sum_of(block: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(block)
}

#[derive(Clone, Debug)]
struct Page {
    bits: [u64; (PAGE / 64) as usize],
    /// Those of them that matched their sum in this mount.
    proved: [u64; (PAGE / 64) as usize],
    sums: Vec<u32>,
}

/// Which blocks of an object are in its cache file, and their sums.
#[derive(Clone, Debug)]
pub struct BlockMap {
    count: u64,
    present: u64,
    proved: u64,
    pages: BTreeMap<u64, Page>,
}

impl BlockMap {
    /// No block of an object of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { count: size.div_ceil(BLOCK), present: 0, proved: 0, pages: BTreeMap::new() }
    }

    /// Number of blocks that are here.
    pub fn present(&self) -> u64 {
        self.present
    }

    /// True when every block is here.
    pub fn is_complete(&self) -> bool {
        self.present == self.count
    }

    /// The sum of a block that is here.
    pub fn sum(&self, block: u64) -> Option<u32> {
        let page = self.pages.get(&(block / PAGE))?;
        let at = (block % PAGE) as usize;
        (page.bits[at / 64] >> (at % 64) & 1 == 1).then(|| page.sums[at])
    }

    /// True when the block is here.
    pub fn has(&self, block: u64) -> bool {
        self.sum(block).is_some()
    }

    /// Adds a block; true when it was not here.
    pub fn set(&mut self, block: u64, sum: u32) -> bool {
        if block >= self.count {
            return false;
        }
        let index = block / PAGE;
        let len = (self.count - index * PAGE).min(PAGE) as usize;
        let page = self.pages.entry(index).or_insert_with(|| Page {
            bits: [0; (PAGE / 64) as usize],
            proved: [0; (PAGE / 64) as usize],
            sums: vec![0; len],
        });
        let at = (block % PAGE) as usize;
        let new = page.bits[at / 64] >> (at % 64) & 1 == 0;
        page.bits[at / 64] |= 1 << (at % 64);
        page.sums[at] = sum;
        self.present += u64::from(new);
        new
    }

    /// Forgets a block; true when it was here.
    pub fn clear(&mut self, block: u64) -> bool {
        let Some(page) = self.pages.get_mut(&(block / PAGE)) else { return false };
        let at = (block % PAGE) as usize;
        let was = page.bits[at / 64] >> (at % 64) & 1 == 1;
        let proved = page.proved[at / 64] >> (at % 64) & 1 == 1;
        page.bits[at / 64] &= !(1 << (at % 64));
        page.proved[at / 64] &= !(1 << (at % 64));
        self.present -= u64::from(was);
        self.proved -= u64::from(proved);
        was
    }

    /// These blocks matched their sums. True when that makes every block proved.
    pub fn prove(&mut self, blocks: Range<u64>) -> bool {
        let before = self.proved;
        for block in blocks {
            let Some(page) = self.pages.get_mut(&(block / PAGE)) else { continue };
            let at = (block % PAGE) as usize;
            let new = page.bits[at / 64] & !page.proved[at / 64] & 1 << (at % 64);
            page.proved[at / 64] |= new;
            self.proved += u64::from(new != 0);
        }
        self.proved > before && self.is_proved()
    }

    /// Every block is here, and matched its sum in this mount.
    pub fn is_proved(&self) -> bool {
        self.proved == self.count
    }
}

/// What a sidecar says of a cache file.
#[derive(Clone, Debug)]
pub struct Sidecar {
    /// The version whose bytes the file holds.
    pub version: ObjectVersion,
    /// The whole object matched its whole checksum (or came from this machine).
    pub verified: bool,
    /// Blocks and sums.
    pub blocks: BlockMap,
}

impl Sidecar {
    /// The record: magic, format, flags, version, pages, and a CRC-32C of all that.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512 + self.blocks.present as usize * 4);
        out.extend_from_slice(MAGIC);
        put_u32(&mut out, FORMAT);
        let complete = if self.blocks.is_complete() { COMPLETE } else { 0 };
        put_u32(&mut out, complete | if self.verified { VERIFIED } else { 0 });
        for text in [&self.version.bucket, &self.version.key, self.version.etag.as_str()] {
            put_text(&mut out, text);
        }
        match &self.version.version_id {
            Some(id) => {
                out.push(1);
                put_text(&mut out, id);
            }
            None => out.push(0),
        }
        put_u64(&mut out, self.version.size);
        put_u64(&mut out, BLOCK);
        // One whose blocks were all forgotten says nothing.
        let pages = || self.blocks.pages.iter().filter(|(_, page)| page.bits != [0; (PAGE / 64) as usize]);
        put_u64(&mut out, pages().count() as u64);
        for (index, page) in pages() {
            put_u64(&mut out, *index);
            page.bits.iter().for_each(|word| put_u64(&mut out, *word));
            for (at, sum) in page.sums.iter().enumerate() {
                if page.bits[at / 64] >> (at % 64) & 1 == 1 {
                    put_u32(&mut out, *sum);
                }
            }
        }
        let sum = sum_of(&out);
        put_u32(&mut out, sum);
        out
    }

    /// Reads a record back. `None` for anything that is not exactly what [`Self::encode`] writes.
    pub fn decode(record: &[u8]) -> Option<Self> {
        let (body, sum) = record.split_at_checked(record.len().checked_sub(4)?)?;
        if u32::from_le_bytes(sum.try_into().ok()?) != sum_of(body) {
            return None;
        }
        let mut input = Input(body);
        if input.take(8)? != MAGIC || input.u32()? != FORMAT {
            return None;
        }
        let flags = input.u32()?;
        let (bucket, key, written) = (input.text()?, input.text()?, input.text()?);
        let etag = ETag::new(&written);
        let version_id = match input.take(1)? {
            [0] => None,
            [1] => Some(input.text()?),
            _ => return None,
        };
        let size = input.u64()?;
        if input.u64()? != BLOCK {
            return None;
        }
        let mut blocks = BlockMap::new(size);
        let mut next = 0;
        for _ in 0..input.u64()? {
            let page = input.u64()?;
            let first = page.checked_mul(PAGE).filter(|_| page >= next)?;
            next = page + 1;
            let mut bits = [0u64; (PAGE / 64) as usize];
            for word in &mut bits {
                *word = input.u64()?;
            }
            if bits == [0; (PAGE / 64) as usize] {
                return None;
            }
            for at in (0..PAGE).filter(|at| bits[(at / 64) as usize] >> (at % 64) & 1 == 1) {
                let sum = input.u32()?;
                // Blocks behind the end would make a map complete that is not.
                let block = first.checked_add(at).filter(|block| *block < blocks.count)?;
                blocks.set(block, sum);
            }
        }
        let right = flags & !(COMPLETE | VERIFIED) == 0
            && (flags & COMPLETE != 0) == blocks.is_complete()
            && etag.as_str() == written
            && input.0.is_empty();
        let version = ObjectVersion { bucket, key, etag, size, version_id };
        right.then_some(Self { version, verified: flags & VERIFIED != 0, blocks })
    }
}

/// Whether the record that begins so claims every block: a hint for the scan at start, nothing is delivered by it.
pub fn peek_complete(head: &[u8; PEEK]) -> bool {
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    head.starts_with(MAGIC) && word(8) == FORMAT && word(12) & COMPLETE != 0
}

/// Names a cache file: hashes of where the object is, and of which version it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryId {
    /// Of bucket and key.
    pub object: u128,
    /// Of ETag and size.
    pub version: u64,
}

impl EntryId {
    /// The id of a version.
    pub fn of(version: &ObjectVersion) -> Self {
        let tag = Sha256::new().chain_update(version.etag.as_str()).chain_update([0]).chain_update(version.size.to_le_bytes()).finalize();
        let mut short = [0; 8];
        short.copy_from_slice(&tag[..8]);
        Self { object: Self::object(&version.bucket, &version.key), version: u64::from_be_bytes(short) }
    }

    /// The half of the id that all versions of a key share.
    pub fn object(bucket: &str, key: &str) -> u128 {
        let hash = Sha256::new().chain_update(bucket).chain_update([0]).chain_update(key).finalize();
        let mut short = [0; 16];
        short.copy_from_slice(&hash[..16]);
        u128::from_be_bytes(short)
    }
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_u32(out, text.len() as u32);
    out.extend_from_slice(text.as_bytes());
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn text(&mut self) -> Option<String> {
        let len = self.u32()? as usize;
        String::from_utf8(self.take(len)?.to_vec()).ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sidecar(size: u64, present: &[u64]) -> Sidecar {
        let mut blocks = BlockMap::new(size);
        for block in present {
            blocks.set(*block, *block as u32 ^ 0x5a5a);
        }
        let version =
            ObjectVersion { bucket: "b".into(), key: "k/ü".into(), etag: ETag::new("\"e-2\""), size, version_id: Some("v1".into()) };
        Sidecar { version, verified: true, blocks }
    }

    #[test]
    fn ranges_and_blocks() {
        assert_eq!(blocks_of(0..1), 0..1);
        assert_eq!(blocks_of(BLOCK - 1..BLOCK + 1), 0..2);
        assert_eq!(bytes_of(1..3, BLOCK + 10), BLOCK..BLOCK + 10);
    }

    #[test]
    fn a_block_of_a_huge_object_costs_one_page() {
        let mut blocks = BlockMap::new(50_000_000_000_000);
        assert!(blocks.set(700_000_000, 7));
        assert!(!blocks.set(700_000_000, 8));
        assert_eq!((blocks.sum(700_000_000), blocks.pages.len()), (Some(8), 1));
        assert!(blocks.clear(700_000_000) && !blocks.has(700_000_000));
    }

    proptest! {
        #[test]
        fn a_sidecar_reads_back_as_written(size in 1u64..200_000_000, seeds in prop::collection::vec(any::<u64>(), 0..60)) {
            let count = size.div_ceil(BLOCK);
            let written = sidecar(size, &seeds.iter().map(|s| s % count).collect::<Vec<_>>());
            let read = Sidecar::decode(&written.encode()).unwrap();
            prop_assert_eq!(&read.version, &written.version);
            prop_assert_eq!(read.verified, written.verified);
            for block in 0..count {
                prop_assert_eq!(read.blocks.sum(block), written.blocks.sum(block));
            }
        }

        #[test]
        fn a_damaged_or_cut_sidecar_is_a_miss(at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>()) {
            let record = sidecar(3_000_000, &[0, 1, 2, 7, 45]).encode();
            let mut damaged = record.clone();
            damaged[at.index(record.len())] ^= 1 << bit;
            prop_assert!(Sidecar::decode(&damaged).is_none());
            prop_assert!(Sidecar::decode(&record[..cut.index(record.len())]).is_none());
        }
    }

    #[test]
    fn a_complete_record_is_known_by_its_head() {
        let head = |s: &Sidecar| <[u8; PEEK]>::try_from(&s.encode()[..PEEK]).unwrap();
        assert!(peek_complete(&head(&sidecar(2 * BLOCK, &[0, 1]))));
        assert!(!peek_complete(&head(&sidecar(2 * BLOCK, &[1]))));
    }
}
