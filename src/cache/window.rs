//! Read-ahead policy of one reader: from the reads so far, what to fetch beside the read itself. Pure.
//!
//! Reads are grouped into runs. A run that goes on is sequential and gets a window four times what it consumed, so that a few
//! round trips reach the largest window and a reader that stops early wastes in proportion to what it read. Runs that follow each
//! other at one distance (a video seek, an ISO, a file read backward) are strided: the next runs are fetched, nothing between.

use std::ops::Range;

use super::block::BLOCK;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Largest automatic window. Twelve GETs of [`MAX_PIECE`]: at 20 ms and 80 MB/s a connection they carry 800 MB/s.
pub const MAX_WINDOW: u64 = 96 * MIB;
/// GETs of a window, at least: it comes over that many connections.
const LANES: u64 = 8;
/// Largest GET: long enough (100 ms at 80 MB/s) that a 20 ms round trip costs a fifth.
pub const MAX_PIECE: u64 = 8 * MIB;
/// Largest GET of a window near the store.
const NEAR_PIECE: u64 = 16 * MIB;
const MIN_PIECE: u64 = 512 * KIB;
/// What a first read at the start of an object brings, and the size up to which an object is fetched by one GET (promise 17).
pub const FIRST: u64 = 128 * KIB;
/// The kernel's read-ahead requests reach us out of order, each in a task of its own: two windows of 1 MiB may be under way, and
/// twice as much after posix_fadvise(SEQUENTIAL), which cp calls. Taken for a seek, the first or the last of them would end every
/// GET ahead.
const DISORDER: u64 = 4 * MIB;
/// Runs fetched ahead of a strided reader, at most.
const MAX_STRIDES: u64 = 32;

/// What a read needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Bytes to fetch for the read, at least the read itself.
    pub demand: Range<u64>,
    /// Bytes to fetch ahead, not planned before in this run, nearest first.
    pub ahead: Vec<Range<u64>>,
    /// Largest GET for `ahead`, which are cut at its multiples.
    pub piece: u64,
    /// The reader went elsewhere: what was fetched ahead for it is wanted no more.
    pub seek: bool,
}

#[derive(Clone, Debug, Default)]
struct Run {
    start: u64,
    end: u64,
    consumed: u64,
    reads: u32,
    ahead_to: u64,
}

#[derive(Clone, Debug, Default)]
struct Stride {
    step: i64,
    len: u64,
    seen: u32,
    /// Runs after the current one that were planned already.
    ahead: u64,
}

impl Plan {
    /// Just these bytes.
    pub fn of(read: Range<u64>) -> Self {
        Self { demand: read, ahead: Vec::new(), piece: MAX_PIECE, seek: false }
    }
}

/// Detects how one reader goes through an object.
#[derive(Clone, Debug)]
pub struct Window {
    size: u64,
    reach: Reach,
    run: Option<Run>,
    stride: Stride,
}

/// How far ahead a window may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Largest window in bytes.
    pub max: u64,
    /// Over at least so many GETs.
    pub lanes: u64,
    /// Of at most so many bytes each.
    pub piece: u64,
}

impl Reach {
    /// Where round trips have to be bridged.
    pub fn far(max: u64) -> Self {
        Self { max, lanes: LANES, piece: MAX_PIECE }
    }

    /// Near the store a connection is as fast as the processors at its ends: many more than there are of ours only take turns, and
    /// what they bring before its time has to be read back from the disk. What counts there is what a GET costs the store.
    pub fn near(max: u64, processors: u64) -> Self {
        let lanes = (processors + 1).max(3);
        match lanes * NEAR_PIECE {
            window if window < MAX_WINDOW => Self { max: max.min(window), lanes, piece: NEAR_PIECE },
            _ => Self::far(max),
        }
    }
}

impl Window {
    /// For an object of `size` bytes.
    pub fn new(size: u64, reach: Reach) -> Self {
        Self { size, reach, run: None, stride: Stride::default() }
    }

    /// From now on.
    pub fn set_reach(&mut self, reach: Reach) {
        self.reach = reach;
    }

    /// Notes a read of `read` (not empty, inside the object) and says what to fetch.
    pub fn on_read(&mut self, read: Range<u64>) -> Plan {
        let mut plan = Plan::of(read.clone());
        if self.size <= FIRST {
            plan.demand = 0..self.size;
            return plan;
        }
        if read.start == 0 {
            plan.demand.end = plan.demand.end.max(FIRST);
        }
        match &mut self.run {
            Some(run) if continues(run, &read) => {
                run.consumed += read.end - read.start;
                run.reads += 1;
                run.end = run.end.max(read.end);
                self.plan_forward(&mut plan);
            }
            _ => self.begin_run(&read, &mut plan),
        }
        plan
    }

    /// A block that was to be here is not (evicted, its flight failed or was given up): what lies ahead is planned once more.
    pub fn missed(&mut self) {
        self.stride.ahead = 0;
        if let Some(run) = &mut self.run {
            run.ahead_to = run.end;
        }
    }

    fn plan_forward(&mut self, plan: &mut Plan) {
        let strided = self.is_strided();
        let Some(run) = &mut self.run else { return };
        if strided && run.end <= run.start.saturating_add(self.stride.len) {
            return;
        }
        // The kernel asks for a sniff of 16 KiB in pieces of its own, which look like a sequential reader of a few.
        if run.consumed <= FIRST && !strided {
            return;
        }
        let window = (run.consumed * 4).min(self.reach.max);
        let piece = piece_of(window / self.reach.lanes, self.reach.piece);
        run.ahead_to = run.ahead_to.max(run.end.next_multiple_of(BLOCK)).min(self.size);
        let mut target = (run.end + window).min(self.size);
        if target < self.size {
            target -= target % piece;
        }
        let room = target.saturating_sub(run.ahead_to);
        if room > 0 {
            plan.ahead.push(run.ahead_to..run.ahead_to + room);
            plan.piece = piece;
            run.ahead_to += room;
        }
    }

    fn begin_run(&mut self, read: &Range<u64>, plan: &mut Plan) {
        let next = Run { start: read.start, end: read.end, consumed: read.end - read.start, reads: 1, ahead_to: plan.demand.end };
        let Some(last) = self.run.replace(next) else { return };
        let step = read.start as i64 - last.start as i64;
        let len = (last.end - last.start).max(read.end - read.start);
        if step == self.stride.step && len <= step.unsigned_abs() {
            self.stride.seen += 1;
            self.stride.len = len;
            self.stride.ahead = self.stride.ahead.saturating_sub(1);
        } else {
            self.stride = Stride { step, len, seen: 0, ahead: 0 };
        }
        plan.seek = !self.is_strided();
        if self.is_strided() && self.reach.max > 0 {
            self.plan_strides(read.start, plan);
        }
    }

    fn plan_strides(&mut self, start: u64, plan: &mut Plan) {
        let Stride { step, len, seen, ahead } = self.stride;
        let contiguous = step < 0 && step.unsigned_abs() == len;
        // A backward reader is a sequential one: its window counts bytes. Others wait for at most 32 separate runs.
        let most =
            if contiguous { (self.reach.max / 3 / len.max(1)).max(1) } else { MAX_STRIDES.min((self.reach.max / 3 / len.max(1)).max(1)) };
        let target = most.min(1 << seen.min(20));
        if target <= ahead || (contiguous && (target - ahead) * len < MIN_PIECE.min(len * target / 2)) {
            return;
        }
        let at = |index: u64| start as i64 + step * index as i64;
        let clip = |from: i64, to: i64| (from.max(0) as u64).min(self.size)..(to.max(0) as u64).min(self.size);
        if contiguous {
            plan.ahead.push(clip(at(target), at(ahead)));
            plan.piece = piece_of(target * len / LANES, 2 * MIB);
        } else {
            plan.ahead.extend((ahead + 1..=target).map(|index| clip(at(index), at(index) + len as i64)));
        }
        plan.ahead.retain(|range| !range.is_empty());
        self.stride.ahead = target;
    }

    fn is_strided(&self) -> bool {
        self.stride.seen > 0
    }
}

/// The size of GETs: about `share`. A power of two: cut at its multiples they do not straddle the parts that the object was made of,
/// which costs a store twice the work.
fn piece_of(share: u64, largest: u64) -> u64 {
    share.next_power_of_two().clamp(MIN_PIECE, largest)
}

/// A run that has consumed much may be left as far ahead as it may be returned to: requests overtake each other both ways. Half of what
/// it consumed at most, so that what is fetched of the gaps of a strided reader is less than what it reads.
fn continues(run: &Run, read: &Range<u64>) -> bool {
    let slack = (read.end - read.start).max(FIRST).max((run.consumed / 2).min(DISORDER));
    read.start >= run.start && read.start + DISORDER >= run.end && read.start <= run.end + slack
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 512 * MIB;
    const FAR: Reach = Reach { max: MAX_WINDOW, lanes: LANES, piece: MAX_PIECE };

    fn bytes(plan: &Plan) -> u64 {
        plan.ahead.iter().map(|r| r.end - r.start).sum()
    }

    #[test]
    fn a_sniff_costs_128_kib_and_a_small_object_one_get() {
        assert_eq!(Window::new(SIZE, FAR).on_read(0..16 * KIB).demand, 0..FIRST);
        assert_eq!(Window::new(30 * KIB, FAR).on_read(8 * KIB..9 * KIB).demand, 0..30 * KIB);
    }

    #[test]
    fn a_sequential_window_reaches_its_bound_within_32_mib_and_covers_all_once() {
        let mut window = Window::new(SIZE, FAR);
        let (mut covered, mut at) = (0, 0);
        while at < SIZE {
            let plan = window.on_read(at..at + 128 * KIB);
            covered = plan.demand.end.max(covered);
            at += 128 * KIB;
            for range in plan.ahead {
                assert!(range.start <= covered.next_multiple_of(BLOCK), "a hole before {range:?}");
                covered = covered.max(range.end);
            }
            assert!(covered - at <= MAX_WINDOW, "wasted at {at}: {}", covered - at);
            assert!(covered - at.min(covered) <= 4 * at.max(FIRST), "too eager at {at}");
            if at > 32 * MIB && at < SIZE - 2 * MAX_WINDOW {
                assert!(covered - at >= MAX_WINDOW - MAX_PIECE);
            }
        }
        assert_eq!(covered, SIZE);
    }

    #[test]
    fn near_the_store_few_large_gets_lie_ahead() {
        let mut window = Window::new(SIZE, FAR);
        let near = Reach::near(MAX_WINDOW, 2);
        assert_eq!(near, Reach { max: 3 * NEAR_PIECE, lanes: 3, piece: NEAR_PIECE });
        assert_eq!(Reach::near(MAX_WINDOW, 6), FAR, "processors enough for all connections");
        assert_eq!(Reach::near(MIB, 2).max, MIB);
        window.set_reach(near);
        let mut covered = 0;
        for at in (0..SIZE).step_by(MIB as usize) {
            let plan = window.on_read(at..at + MIB);
            covered = plan.ahead.iter().map(|range| range.end).fold(covered, u64::max);
            if at > 32 * MIB && at < SIZE - near.max {
                assert!((near.max - NEAR_PIECE..=near.max).contains(&(covered - at - MIB)), "{at}: {covered}");
                assert!(plan.ahead.iter().all(|range| range.end - range.start == NEAR_PIECE && plan.piece == NEAR_PIECE));
            }
        }
        assert_eq!(covered, SIZE);
    }

    #[test]
    fn out_of_order_requests_of_the_kernel_stay_sequential() {
        let mut window = Window::new(SIZE, FAR);
        for start in [0, 2, 1, 3, 5, 4, 6].map(|n| n * 128 * KIB) {
            assert!(!window.on_read(start..start + 128 * KIB).seek);
        }
    }

    #[test]
    fn a_busy_machine_shuffles_whole_megabytes_and_nothing_is_fetched_twice() {
        let mut window = Window::new(SIZE, FAR);
        let (mut fetched, mut pieces) = (0, 0);
        for group in 0..SIZE / (4 * MIB) {
            let orders = [[0, 2, 3, 1], [0, 2, 1, 3], [3, 0, 2, 1], [1, 3, 2, 0]];
            for n in orders[if group < 2 { group as usize } else { group as usize % 4 }] {
                let start = group * 4 * MIB + n * MIB;
                let plan = window.on_read(start..start + MIB);
                assert!(!plan.seek, "at {start}");
                fetched += bytes(&plan);
                pieces += bytes(&plan).div_ceil(plan.piece);
            }
        }
        assert!(fetched <= SIZE && pieces < 110, "{fetched} bytes in {pieces} GETs");
    }

    #[test]
    fn a_jump_is_a_seek_until_twice_as_much_was_read_in_order() {
        for (read, jump, seek) in [(1, 2, true), (4, 3, true), (8, 3, false), (64, 5, true)] {
            let mut window = Window::new(SIZE, FAR);
            (0..read).for_each(|n| _ = window.on_read(n * MIB..(n + 1) * MIB));
            let start = (read + jump) * MIB;
            assert_eq!(window.on_read(start..start + MIB).seek, seek, "{jump} after {read}");
        }
    }

    #[test]
    fn random_reads_fetch_nothing_ahead() {
        let mut window = Window::new(SIZE, FAR);
        let mut at = 7_919u64;
        for _ in 0..200 {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let start = at % (SIZE / 4096) * 4096;
            let plan = window.on_read(start..start + 4096);
            assert!(bytes(&plan) <= 64 * KIB, "{plan:?}");
        }
    }

    #[test]
    fn strides_are_fetched_ahead_and_nothing_between() {
        let mut window = Window::new(SIZE, FAR);
        let (mut fetched, mut most) = (0, 0);
        for n in 0..400 {
            let plan = window.on_read(n * MIB..n * MIB + 64 * KIB);
            assert!(plan.ahead.iter().all(|r| r.start % MIB == 0 && r.end - r.start == 64 * KIB));
            fetched += bytes(&plan);
            most = most.max(plan.ahead.len());
            assert!(n < 2 || !plan.seek);
        }
        assert!(fetched <= 440 * 64 * KIB && most >= 4, "{fetched} {most}");
    }

    #[test]
    fn a_backward_reader_is_fetched_ahead_in_large_pieces() {
        let mut window = Window::new(SIZE, FAR);
        let (mut low, mut waste) = (SIZE, 0);
        for step in (0..512u64).rev() {
            for part in 0..8 {
                let start = step * MIB + part * 128 * KIB;
                let plan = window.on_read(start..start + 128 * KIB);
                for range in plan.ahead {
                    if range.start >= step * MIB {
                        continue; // forward, into what was read before
                    }
                    assert!(range.end <= low.min(step * MIB), "fetched twice: {range:?}");
                    waste = waste.max(step * MIB - range.start.min(step * MIB));
                    low = low.min(range.start);
                }
            }
        }
        assert_eq!(low, 0);
        assert!((16 * MIB..=MAX_WINDOW).contains(&waste), "{waste}");
    }

    #[test]
    fn no_window_no_read_ahead() {
        let mut window = Window::new(SIZE, Reach::far(0));
        for n in 0..100 {
            assert!(window.on_read(n * MIB..(n + 1) * MIB).ahead.is_empty());
        }
    }
}
