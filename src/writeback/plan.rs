//! What to send at publication. Pure: a snapshot of the content in, parts out.

use std::ops::Range;

use crate::ranges::RangeSet;
use crate::s3::multipart::{MAX_PART, MAX_PARTS, MIN_PART, PartPlan};

/// Server-side copies are cut into pieces of this size, so that several run at once: one of 5 GiB takes minutes.
const COPY_PIECE: u64 = 512 << 20;

/// How a part comes to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// UploadPart from the spool; missing bytes are fetched from the base first.
    Upload,
    /// UploadPartCopy from the base.
    Copy,
}

/// One part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Part number, ascending with the offset.
    pub number: u32,
    /// Its bytes.
    pub range: Range<u64>,
    /// Where they come from.
    pub how: How,
}

/// What publication sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// One PutObject.
    Put,
    /// Multipart; the pieces cover the size exactly.
    Parts(Vec<Piece>),
}

/// What the plan depends on.
pub(crate) struct Input<'a> {
    /// Size of the content.
    pub size: u64,
    /// Bytes that differ from the base.
    pub dirty: &'a RangeSet,
    /// Bytes of the base that are part of the content.
    pub base_len: u64,
    /// The base can be copied from inside the store.
    pub copyable: bool,
    /// An upload is open, or only parts are wanted: no PutObject.
    pub multipart: bool,
}

/// Decides how the content is sent.
pub(crate) fn plan(input: &Input<'_>, grid: &PartPlan) -> Plan {
    let first = grid.range(1).end;
    if input.size <= first && !input.multipart {
        return Plan::Put;
    }
    let clean: u64 = input.dirty.gaps(0..input.base_len.min(input.size)).iter().map(|run| run.end - run.start).sum();
    if !input.copyable || clean < MIN_PART {
        return Plan::Parts(
            cut(0..input.size, grid).enumerate().map(|(i, range)| Piece { number: i as u32 + 1, range, how: How::Upload }).collect(),
        );
    }
    let mut smallest = MIN_PART;
    loop {
        // Many small changes all over a huge object would need too many parts: then short clean runs are sent as well.
        let pieces = patch(input, grid, smallest);
        if pieces.len() <= MAX_PARTS as usize || smallest >= input.size {
            return Plan::Parts(pieces);
        }
        smallest *= 2;
    }
}

fn cut(range: Range<u64>, grid: &PartPlan) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let cell = grid.range(grid.number_of(at));
        let piece = at..cell.end.min(range.end);
        at = piece.end;
        Some(piece)
    })
}

/// Clean runs of at least `smallest` bytes are copied, everything else is sent.
fn patch(input: &Input<'_>, grid: &PartPlan, smallest: u64) -> Vec<Piece> {
    let mut segments: Vec<(Range<u64>, How)> = Vec::new();
    let mut at = 0;
    for run in input.dirty.gaps(0..input.base_len.min(input.size)) {
        // What is sent before the run must be a legal part too: it takes the bytes that it lacks from the run.
        let start = if run.start > at && run.start - at < MIN_PART { at + MIN_PART } else { run.start };
        let legal = run.end == input.size || start.saturating_add(smallest) <= run.end;
        if start >= run.end || !legal {
            continue;
        }
        if at < start {
            segments.push((at..start, How::Upload));
        }
        segments.push((start..run.end, How::Copy));
        at = run.end;
    }
    if at < input.size {
        segments.push((at..input.size, How::Upload));
    }
    let copies = COPY_PIECE.max(input.size / u64::from(MAX_PARTS / 2)).min(MAX_PART / 2);
    let last = grid.range(grid.number_of(input.size.saturating_sub(1)));
    let uploads = (last.end - last.start).clamp(MIN_PART, MAX_PART / 2);
    let mut pieces = Vec::new();
    for (range, how) in segments {
        let least = if how == How::Copy { copies } else { uploads };
        for range in even(range, least) {
            pieces.push(Piece { number: pieces.len() as u32 + 1, range, how });
        }
    }
    pieces
}

/// Cuts a range into equal pieces of `least` bytes to twice as many, so that none is too short to be a part.
fn even(range: Range<u64>, least: u64) -> impl Iterator<Item = Range<u64>> {
    let len = range.end - range.start;
    let count = (len / least).max(1);
    let edge = move |i: u64| range.start + (u128::from(len) * u128::from(i) / u128::from(count)) as u64;
    (0..count).map(move |i| edge(i)..edge(i + 1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init)]
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn grid() -> PartPlan {
        PartPlan::new(None, 5 << 40)
    }

    fn pieces(size: u64, dirty: &[Range<u64>], base_len: u64) -> Vec<Piece> {
        let dirty = dirty.iter().cloned().collect();
        let input = Input { size, dirty: &dirty, base_len, copyable: true, multipart: false };
        match plan(&input, &grid()) {
            Plan::Put => Vec::new(),
            Plan::Parts(pieces) => pieces,
        }
    }

    fn summary(pieces: &[Piece]) -> Vec<(How, u64, u64)> {
        pieces.iter().map(|piece| (piece.how, piece.range.start / MIB, (piece.range.end - piece.range.start) / MIB)).collect()
    }

    #[test]
    fn a_megabyte_in_the_middle_sends_one_small_part() {
        let pieces = pieces(256 * MIB, &[128 * MIB..129 * MIB], 256 * MIB);
        assert_eq!(summary(&pieces), [(How::Copy, 0, 128), (How::Upload, 128, 5), (How::Copy, 133, 123)]);
    }

    #[test]
    fn an_append_copies_what_was_there() {
        let pieces = pieces(257 * MIB, &[256 * MIB..257 * MIB], 256 * MIB);
        assert_eq!(summary(&pieces), [(How::Copy, 0, 256), (How::Upload, 256, 1)]);
    }

    #[test]
    fn a_cut_file_is_copied_and_a_small_one_put() {
        assert_eq!(summary(&pieces(100 * MIB, &[], 100 * MIB)), [(How::Copy, 0, 100)]);
        assert_eq!(pieces(8 * MIB, &[0..1], 8 * MIB), []);
    }

    #[test]
    fn many_changes_of_a_huge_object_stay_under_the_limit() {
        let dirty: Vec<_> = (0..20_000u64).map(|i| i * 60 * MIB..i * 60 * MIB + 1).collect();
        let pieces = pieces(20_000 * 60 * MIB, &dirty, 20_000 * 60 * MIB);
        assert!(pieces.len() <= MAX_PARTS as usize, "{}", pieces.len());
    }

    proptest! {
        #[test]
        fn parts_are_legal_cover_the_size_and_copy_only_clean_bytes(
            size in 1u64..3000 * MIB,
            base in 0u64..3000 * MIB,
            changes in prop::collection::vec((0u64..3000 * MIB, 1u64..40 * MIB), 0..20),
            copyable: bool,
            multipart: bool,
        ) {
            let base_len = base.min(size);
            let mut dirty: RangeSet = changes.into_iter().filter(|&(at, _)| at < size).map(|(at, len)| at..(at + len).min(size)).collect();
            dirty.insert(base_len..size);
            let input = Input { size, dirty: &dirty, base_len, copyable, multipart };
            match plan(&input, &grid()) {
                Plan::Put => prop_assert!(size <= grid().range(1).end && !multipart),
                Plan::Parts(pieces) => {
                    let mut at = 0;
                    for (index, piece) in pieces.iter().enumerate() {
                        let len = piece.range.end - piece.range.start;
                        prop_assert_eq!(piece.range.start, at);
                        at = piece.range.end;
                        prop_assert!(len > 0 && len <= MAX_PART && (len >= MIN_PART || at == size));
                        prop_assert_eq!(piece.number as usize, index + 1);
                        if piece.how == How::Copy {
                            prop_assert!(copyable && at <= base_len && !dirty.intersects(piece.range.clone()));
                        }
                    }
                    prop_assert_eq!(at, size);
                    prop_assert!(pieces.len() <= MAX_PARTS as usize);
                }
            }
        }
    }
}
