//! What to send at publication. Pure: a snapshot of the content in, parts out.

use std::ops::Range;

use super::grid::PartPlan;
use crate::ranges::RangeSet;

/// S3's smallest part except the last.
pub(crate) const MIN_PART: u64 = 5 << 20;
/// S3's largest part and server-side part copy.
pub(crate) const MAX_PART: u64 = 5 << 30;
/// S3's largest number of parts.
pub(crate) const MAX_PARTS: u64 = 10_000;
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
        return Plan::Parts(cut(0..input.size, grid).enumerate().map(|(i, range)| Piece { number: i as u32 + 1, range, how: How::Upload }).collect());
    }
    let mut smallest = MIN_PART;
    loop {
        // Many small changes all over a huge object would need too many parts: then short clean runs are sent as well.
        let pieces = patch(input, grid, smallest);
        if pieces.len() as u64 <= MAX_PARTS || smallest >= input.size {
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
    let copies = COPY_PIECE.max(input.size / (MAX_PARTS / 2)).min(MAX_PART / 2);
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
