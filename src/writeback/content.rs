//! What a staged file's bytes are made of: the spool file, the base object, and zeros. Pure.
//!
//! Invariant: every byte below `size` is in `local` (valid in the spool file, holes there being zeros) or below
//! `base_len` (valid in the base object).

use std::ops::Range;

use super::manifest::Record;
use crate::ranges::RangeSet;

/// Where a run of bytes is read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The spool file.
    Spool,
    /// The base object, at the same offset.
    Base,
    /// Nowhere: zeros.
    Zeros,
}

/// The content model of one staged file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Content {
    /// Length of the file.
    pub size: u64,
    /// Bytes valid in the spool file.
    pub local: RangeSet,
    /// Bytes that differ from the base; without one, every byte written.
    pub dirty: RangeSet,
    /// Bytes of the base still valid; a truncation lowers it for good.
    pub base_len: u64,
    /// The base's size; `None` while no object of the file's own holds any of it: a base is then another file's object, which its bytes
    /// are copied from.
    pub base_size: Option<u64>,
    /// Bytes written since they were last handed to a part upload.
    pub unsent: RangeSet,
    /// Bytes of parts that were announced and whose transfer has not begun (or is to be repeated).
    pub waiting: RangeSet,
    /// The first part that was not announced.
    pub next_part: u32,
    /// Bytes written since the last seal.
    since: RangeSet,
    /// Lowest size since the last seal.
    since_low: u64,
    /// Counts changes.
    pub generation: u64,
    /// End of what was written in order from the start.
    frontier: u64,
    /// Written ahead of the frontier, waiting for the gap to be filled.
    ahead: RangeSet,
}

impl Content {
    /// A file made of a base of so many bytes, or an empty new one.
    pub fn new(base_size: Option<u64>) -> Self {
        let size = base_size.unwrap_or(0);
        Self { size, base_len: size, base_size, next_part: 1, since_low: u64::MAX, ..Self::default() }
    }

    /// What was read back from a manifest.
    pub fn of(record: &Record) -> Self {
        Self {
            size: record.size,
            local: record.local.clone(),
            dirty: record.dirty.clone(),
            base_len: record.base_len,
            base_size: record.base.as_ref().map(|base| base.size).filter(|_| !record.copied),
            next_part: 1,
            since_low: u64::MAX,
            ..Self::default()
        }
    }

    /// True when no object holds exactly these bytes.
    pub fn is_dirty(&self) -> bool {
        self.base_size != Some(self.size) || !self.dirty.is_empty()
    }

    /// True when none of the bytes of an object that it changes are part of it.
    pub fn is_whole(&self) -> bool {
        self.base_size.is_none() || self.dirty.covers(0..self.size)
    }

    /// True when bytes of it are another file's object's and nobody else's yet.
    pub fn borrows(&self) -> bool {
        self.base_size.is_none() && !self.lacks(0..self.size).is_empty()
    }

    /// Where another file's object can go on giving its bytes; `None` where there are others already.
    pub fn copied_to(&self) -> Option<u64> {
        (self.base_size.is_none() && self.base_len == self.size && self.dirty.is_empty()).then_some(self.size)
    }

    /// After the spool file was extended to `end`, and the bytes up to there are to be another file's object's.
    pub fn copied(&mut self, end: u64) {
        (self.size, self.base_len) = (end, end);
        self.generation += 1;
    }

    fn changed(&mut self, range: Range<u64>) {
        self.local.insert(range.clone());
        self.dirty.insert(range.clone());
        self.unsent.insert(range.clone());
        self.since.insert(range);
        self.generation += 1;
    }

    /// After bytes were written into the spool file. A write past the end leaves zeros between, which are changes too.
    pub fn wrote(&mut self, range: Range<u64>) {
        if range.start > self.size {
            self.changed(self.size..range.start);
        }
        self.changed(range.clone());
        self.size = self.size.max(range.end);
        if range.start <= self.frontier {
            self.frontier = self.frontier.max(range.end);
            while let Some(run) = self.ahead.run_at(self.frontier) {
                self.frontier = run.end;
            }
            self.ahead.remove(0..self.frontier);
        } else {
            self.ahead.insert(range);
        }
    }

    /// After the spool file was cut or extended (`set_len`) to `size`.
    pub fn truncated(&mut self, size: u64) {
        if size > self.size {
            self.changed(self.size..size);
        } else {
            for set in [&mut self.local, &mut self.dirty, &mut self.unsent, &mut self.since, &mut self.ahead, &mut self.waiting] {
                set.remove(size..u64::MAX);
            }
            self.base_len = self.base_len.min(size);
            self.since_low = self.since_low.min(size);
            self.frontier = self.frontier.min(size);
            self.generation += 1;
        }
        self.size = size;
    }

    /// After a hole was punched into the spool file; bytes past the end stay out of it.
    pub fn punched(&mut self, range: Range<u64>) {
        let end = range.end.min(self.size);
        if range.start < end {
            self.changed(range.start..end);
        }
    }

    /// After base bytes were copied into the spool file: no change of content.
    pub fn filled(&mut self, range: Range<u64>) {
        self.local.insert(range);
    }

    /// After all that differs from the base was moved to `range`, behind which the file ends. What else was local is not any more.
    pub fn moved(&mut self, range: Range<u64>) {
        self.size = range.end;
        for set in [&mut self.local, &mut self.dirty, &mut self.unsent] {
            set.clear();
            set.insert(range.clone());
        }
        for set in [&mut self.waiting, &mut self.ahead] {
            set.clear();
        }
        (self.next_part, self.frontier) = (1, 0);
        self.seal();
    }

    /// After another object of so many bytes became the base.
    pub fn rebased(&mut self, size: u64) {
        (self.base_len, self.base_size) = (size, Some(size));
    }

    /// What of `range` is not in the spool file, but the base's.
    pub fn lacks(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.local.gaps(range.start..range.end.min(self.base_len))
    }

    /// Where the bytes of `range` (cut at the end of the file) come from, in order.
    pub fn origins(&self, range: Range<u64>) -> Vec<(Range<u64>, Origin)> {
        let range = range.start..range.end.min(self.size);
        let mut out = Vec::new();
        let mut at = range.start;
        let elsewhere = |out: &mut Vec<(Range<u64>, Origin)>, gap: Range<u64>| {
            let cut = self.base_len.clamp(gap.start, gap.end);
            if gap.start < cut {
                out.push((gap.start..cut, Origin::Base));
            }
            if cut < gap.end {
                out.push((cut..gap.end, Origin::Zeros));
            }
        };
        for run in self.local.intersection(range.clone()) {
            elsewhere(&mut out, at..run.start);
            at = run.end;
            out.push((run, Origin::Spool));
        }
        if at < range.end {
            elsewhere(&mut out, at..range.end);
        }
        out
    }

    /// The content as it is now is what will be published; call it while no write is under way.
    pub fn seal(&mut self) {
        self.since.clear();
        self.since_low = u64::MAX;
    }

    /// True when something changed after [`Content::seal`].
    pub fn changed_since_seal(&self) -> bool {
        !self.since.is_empty() || self.since_low != u64::MAX
    }

    /// The sealed content, `size` bytes of it, is an object now: it becomes the base, and only what came later differs.
    pub fn published(&mut self, size: u64) {
        self.base_size = Some(size);
        self.base_len = size.min(self.since_low);
        self.dirty = std::mem::take(&mut self.since);
        // Everything not kept locally must be in the base; a file that grew after the seal did so by changes.
        self.since_low = u64::MAX;
        self.unsent = self.dirty.clone();
        self.waiting.clear();
    }

    /// An earlier state of the content, `size` bytes, is the base from now on. `appended`: it differs by its end alone.
    pub fn follows(&mut self, size: u64, appended: bool) {
        self.base_size = Some(size);
        if appended {
            self.base_len = size;
            self.dirty.remove(0..size);
        }
    }

    /// True when all that was sent of the first `size` bytes is what they are now. They are published then: later
    /// changes alone are the next publication's. Call it while no write is under way.
    pub fn verify(&mut self, size: u64) -> bool {
        let same = !self.unsent.intersects(0..size) && self.since_low >= size;
        if same {
            self.since.remove(0..size);
        }
        same
    }

    /// End of what was written in order from the start of a file without base: parts before it may be sent.
    pub fn frontier(&self) -> u64 {
        if self.base_size.is_none() && self.base_len == 0 { self.frontier } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A spool file, a base and the model, as plain vectors.
    struct World {
        content: Content,
        spool: Vec<u8>,
        base: Vec<u8>,
        model: Vec<u8>,
    }

    impl World {
        fn read(&self) -> Vec<u8> {
            let mut out = Vec::new();
            for (range, origin) in self.content.origins(0..self.content.size) {
                let (s, e) = (range.start as usize, range.end as usize);
                match origin {
                    Origin::Spool => out.extend_from_slice(&self.spool[s..e]),
                    Origin::Base => out.extend_from_slice(&self.base[s..e]),
                    Origin::Zeros => out.resize(out.len() + e - s, 0),
                }
            }
            out
        }

        fn set_len(&mut self, size: usize) {
            self.spool.resize(size, 0);
            self.model.resize(size, 0);
            self.content.truncated(size as u64);
        }

        fn write(&mut self, at: usize, bytes: &[u8]) {
            let end = at + bytes.len();
            for vector in [&mut self.spool, &mut self.model] {
                vector.resize(vector.len().max(end), 0);
                vector[at..end].copy_from_slice(bytes);
            }
            self.content.wrote(at as u64..end as u64);
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(usize, u8, usize),
        Truncate(usize),
        Punch(usize, usize),
        Seal,
        Published,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0usize..64, 1u8.., 1usize..24).prop_map(|(at, byte, len)| Op::Write(at, byte, len)),
            2 => (0usize..80).prop_map(Op::Truncate),
            1 => (0usize..64, 1usize..24).prop_map(|(at, len)| Op::Punch(at, len)),
            1 => Just(Op::Seal),
            1 => Just(Op::Published),
        ]
    }

    #[test]
    fn what_is_copied_from_another_object_is_no_object_s_yet() {
        let mut content = Content::new(None);
        content.copied(10);
        assert!(content.is_dirty() && content.is_whole() && content.borrows());
        assert_eq!((content.origins(0..10), content.copied_to()), (vec![(0..10, Origin::Base)], Some(10)));
        content.wrote(2..4);
        assert_eq!(content.copied_to(), None, "what was written stands in the way");
        content.truncated(6);
        assert_eq!(content.origins(0..10), [(0..2, Origin::Base), (2..4, Origin::Spool), (4..6, Origin::Base)]);
        assert_eq!(content.frontier(), 0, "nothing of it is sent as it is written");
        content.filled(0..6);
        assert!(content.is_dirty() && !content.borrows(), "the spool has all of it, and no object");
        content.seal();
        content.published(6);
        assert!(!content.is_dirty());
    }

    proptest! {
        #[test]
        fn content_reads_as_the_model(base in prop::option::of(prop::collection::vec(1u8.., 0..64)), ops in prop::collection::vec(op(), 0..30)) {
            let bytes = base.clone().unwrap_or_default();
            // A spool file extended past its holes reads zeros there; bytes of the base are not in it.
            let mut w = World { content: Content::new(base.as_ref().map(|b| b.len() as u64)), spool: vec![0; bytes.len()], base: bytes.clone(), model: bytes };
            let mut sealed: Option<Vec<u8>> = None;
            for op in ops {
                match op {
                    Op::Write(at, byte, len) => w.write(at, &vec![byte; len]),
                    Op::Truncate(size) => w.set_len(size),
                    Op::Punch(at, len) => {
                        let end = (at + len).min(w.model.len());
                        if at < end { w.spool[at..end].fill(0); w.model[at..end].fill(0); }
                        w.content.punched(at as u64..(at + len) as u64);
                    }
                    Op::Seal => { w.content.seal(); sealed = Some(w.model.clone()); }
                    Op::Published => if let Some(object) = sealed.take() {
                        w.content.published(object.len() as u64);
                        w.base = object;
                    },
                }
                prop_assert_eq!(w.content.size, w.model.len() as u64);
                prop_assert_eq!(&w.read(), &w.model);
                // What is not dirty is what the base holds.
                for gap in w.content.dirty.gaps(0..w.content.size) {
                    let (s, e) = (gap.start as usize, gap.end as usize);
                    prop_assert_eq!(&w.model[s..e], &w.base[s..e]);
                }
                if !w.content.is_dirty() { prop_assert_eq!(&w.base, &w.model); }
                prop_assert!(w.content.frontier() <= w.content.size);
            }
        }
    }
}
