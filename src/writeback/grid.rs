//! Part ranges of an upload whose size is not known yet.

use std::ops::Range;

/// Part sizes that grow so that 10,000 parts reach the store's largest object.
pub(crate) struct PartPlan {
    size: u64,
    grow: bool,
}

/// Parts of one size before it doubles.
const STEP: u64 = 800;

impl PartPlan {
    pub fn new(part_size: Option<u64>, _max_object: u64) -> Self {
        Self { size: part_size.unwrap_or(8 << 20), grow: part_size.is_none() }
    }

    pub fn range(&self, number: u32) -> Range<u64> {
        let index = u64::from(number.max(1)) - 1;
        if !self.grow {
            return index * self.size..(index + 1) * self.size;
        }
        let (level, within) = (index / STEP, index % STEP);
        let size = self.size << level;
        let start = STEP * self.size * ((1 << level) - 1) + within * size;
        start..start + size
    }

    pub fn number_of(&self, offset: u64) -> u32 {
        if !self.grow {
            return (offset / self.size) as u32 + 1;
        }
        let mut number = 1;
        while self.range(number + STEP as u32).start <= offset {
            number += STEP as u32;
        }
        let range = self.range(number);
        number + ((offset - range.start) / (range.end - range.start)) as u32
    }
}
