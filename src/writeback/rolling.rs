//! The CRC-64/NVME of what an application wrote, computed as it was handed over: from write() to Complete the bytes are never
//! summed anew, so what a disk or memory changed on the way is refused by the store.

use std::collections::BTreeMap;
use std::ops::Range;

use crc_fast::{CrcAlgorithm, Digest};

use crate::s3::multipart::PartPlan;

/// Sums of the parts that were written in order, each from its start.
pub(crate) struct Rolling {
    grid: PartPlan,
    /// Part number → where its sum ends, and the sum.
    parts: BTreeMap<u32, (u64, Digest)>,
}

impl Rolling {
    /// Nothing is known yet.
    pub fn new(grid: PartPlan) -> Self {
        Self { grid, parts: BTreeMap::new() }
    }

    /// After `bytes` were written at `at`. A part that is written in any other order than its own has no sum.
    pub fn wrote(&mut self, mut at: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let number = self.grid.number_of(at);
            let cell = self.grid.range(number);
            let (piece, rest) = bytes.split_at(bytes.len().min((cell.end - at) as usize));
            if at == cell.start {
                self.parts.insert(number, (at, Digest::new(CrcAlgorithm::Crc64Nvme)));
            }
            match self.parts.get_mut(&number) {
                Some((end, digest)) if *end == at => {
                    digest.update(piece);
                    *end += piece.len() as u64;
                }
                _ => drop(self.parts.remove(&number)),
            }
            at += piece.len() as u64;
            bytes = rest;
        }
    }

    /// After the bytes of a range became others.
    pub fn forget(&mut self, range: Range<u64>) {
        let touched = |number: &u32, end: u64| self.grid.range(*number).start < range.end && range.start < end;
        self.parts.retain(|number, (end, _)| !touched(number, *end));
    }

    /// The sum of exactly this range, where it is a part, or the written beginning of one.
    pub fn of(&self, range: &Range<u64>) -> Option<u64> {
        let number = self.grid.number_of(range.start);
        let (end, digest) = self.parts.get(&number)?;
        (self.grid.range(number).start == range.start && *end == range.end).then(|| digest.clone().finalize())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn writes_in_order_are_summed_part_by_part() {
        let grid = PartPlan::new(Some(5 * MIB), 1 << 40);
        let bytes: Vec<u8> = (0..12 * MIB).map(|i| (i ^ (i >> 9)) as u8).collect();
        let mut rolling = Rolling::new(grid);
        for (index, chunk) in bytes.chunks(700_001).enumerate() {
            rolling.wrote(index as u64 * 700_001, chunk);
        }
        for range in [0..5 * MIB, 5 * MIB..10 * MIB, 10 * MIB..12 * MIB] {
            let sum = crc_fast::crc64_nvme(&bytes[range.start as usize..range.end as usize]);
            assert_eq!(rolling.of(&range), Some(sum), "{range:?}");
        }
        assert_eq!(rolling.of(&(0..4 * MIB)), None);
    }

    proptest! {
        #[test]
        fn a_sum_is_right_or_not_there(ops in prop::collection::vec((0u64..11 * MIB, 1usize..3_000_000, any::<u8>()), 1..12)) {
            let grid = PartPlan::new(Some(5 * MIB), 1 << 40);
            let (mut file, mut rolling, mut next) = (Vec::new(), Rolling::new(grid), 0);
            for (at, len, seed) in ops {
                // Half of the writes go on where the last one ended.
                let at = if seed % 2 == 0 { next } else { at };
                let bytes: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
                if seed % 7 == 0 {
                    let cut = at.min(file.len() as u64);
                    file.truncate(cut as usize);
                    rolling.forget(cut..u64::MAX);
                }
                if at > file.len() as u64 {
                    rolling.forget(file.len() as u64..at);
                }
                file.resize(file.len().max(at as usize + len), 0);
                file[at as usize..at as usize + len].copy_from_slice(&bytes);
                rolling.wrote(at, &bytes);
                next = at + len as u64;
                for number in 1..5 {
                    let range = grid.range(number);
                    let range = range.start..range.end.min(file.len() as u64);
                    if range.start < range.end && let Some(sum) = rolling.of(&range) {
                        prop_assert_eq!(sum, crc_fast::crc64_nvme(&file[range.start as usize..range.end as usize]));
                    }
                }
            }
        }
    }
}
