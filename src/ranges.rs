//! Sets of byte ranges: which bytes are local, which are dirty, which have been sent.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of `u64`, kept as disjoint, ascending half-open ranges that never touch each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct RangeSet {
    /// Start → end.
    ranges: BTreeMap<u64, u64>,
    /// Sum of the lengths, kept so that [`RangeSet::total`] costs nothing.
    total: u64,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// True when nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many numbers are in the set.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many separate ranges there are.
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.total = 0;
    }

    /// Adds a range; an empty one changes nothing.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Ranges that overlap or touch are folded into the new one, last first.
        while let Some((&s, &e)) = self.ranges.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.ranges.remove(&s);
            self.total -= e - s;
        }
        self.ranges.insert(start, end);
        self.total += end - start;
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        while let Some((&s, &e)) = self.ranges.range(..range.end).next_back() {
            if e <= range.start {
                break;
            }
            self.ranges.remove(&s);
            self.total -= e - s;
            if e > range.end {
                self.ranges.insert(range.end, e);
                self.total += e - range.end;
            }
            if s < range.start {
                self.ranges.insert(s, range.start);
                self.total += range.start - s;
            }
        }
    }

    /// True when every number of `range` is in the set (always for an empty one).
    pub fn covers(&self, range: Range<u64>) -> bool {
        range.start >= range.end || self.run_at(range.start).is_some_and(|run| run.end >= range.end)
    }

    /// True when some number of `range` is in the set.
    pub fn intersects(&self, range: Range<u64>) -> bool {
        range.start < range.end && self.ranges.range(..range.end).next_back().is_some_and(|(_, &e)| e > range.start)
    }

    /// The range of the set that holds `offset`.
    pub fn run_at(&self, offset: u64) -> Option<Range<u64>> {
        self.ranges.range(..=offset).next_back().filter(|&(_, &e)| e > offset).map(|(&s, &e)| s..e)
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&s, &e)| s..e)
    }

    /// What of `within` is in the set, ascending.
    pub fn intersection(&self, within: Range<u64>) -> Vec<Range<u64>> {
        if within.start >= within.end {
            return Vec::new();
        }
        let first = self.run_at(within.start).map_or(within.start, |run| run.start);
        self.ranges.range(first..within.end).map(|(&s, &e)| s.max(within.start)..e.min(within.end)).collect()
    }

    /// What of `within` is not in the set, ascending.
    pub fn gaps(&self, within: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = within.start;
        for run in self.intersection(within.clone()) {
            if at < run.start {
                gaps.push(at..run.start);
            }
            at = run.end;
        }
        if at < within.end {
            gaps.push(at..within.end);
        }
        gaps
    }
}

impl From<Vec<(u64, u64)>> for RangeSet {
    fn from(pairs: Vec<(u64, u64)>) -> Self {
        pairs.into_iter().map(|(s, e)| s..e).collect()
    }
}

impl From<RangeSet> for Vec<(u64, u64)> {
    fn from(set: RangeSet) -> Self {
        set.ranges.into_iter().collect()
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::new();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_numbers(ops in prop::collection::vec((any::<bool>(), 0u64..60, 0u64..20), 0..40), probe in (0u64..60, 0u64..30)) {
            let (mut set, mut model) = (RangeSet::new(), BTreeSet::new());
            for (insert, start, len) in ops {
                let range = start..start + len;
                if insert { set.insert(range.clone()); model.extend(range); } else { set.remove(range.clone()); model.retain(|n| !range.contains(n)); }
            }
            let within = probe.0..probe.0 + probe.1;
            let inside: Vec<u64> = within.clone().filter(|n| model.contains(n)).collect();
            prop_assert_eq!(set.total(), model.len() as u64);
            prop_assert_eq!(set.intersection(within.clone()).into_iter().flatten().collect::<Vec<_>>(), inside.clone());
            prop_assert_eq!(set.gaps(within.clone()).into_iter().flatten().count() + inside.len(), probe.1 as usize);
            prop_assert_eq!(set.covers(within.clone()), inside.len() as u64 == probe.1);
            prop_assert_eq!(set.intersects(within), !inside.is_empty());
            let ranges: Vec<_> = set.iter().collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(RangeSet::from(Vec::from(set.clone())), set);
        }
    }
}
