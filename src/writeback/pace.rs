//! How fast bytes leave, and how far a writer may be ahead of them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::s3::slow::Life;

/// The rate is that of so much active time.
const WINDOW: Duration = Duration::from_secs(2);
/// Samples closer than this are folded.
const GRAIN: Duration = Duration::from_millis(20);
/// The rate counts from the first 50 ms on: a new upload then reaches many connections within two round trips,
/// and a burst into empty socket buffers is not taken for a rate of gigabytes a second.
const SHORTEST: Duration = Duration::from_millis(50);

/// Measures bytes handed to sockets while transfers run; idle time does not count.
pub(crate) struct Meter {
    inner: Mutex<Inner>,
    /// Woken at every progress.
    pub moved: Notify,
}

struct Inner {
    running: usize,
    /// When `active` was last brought up to date.
    updated: Instant,
    active: Duration,
    bytes: u64,
    samples: VecDeque<(Duration, u64)>,
    life: Life,
}

impl Meter {
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            inner: Mutex::new(Inner {
                running: 0,
                updated: now,
                active: Duration::ZERO,
                bytes: 0,
                samples: VecDeque::new(),
                life: Life::default(),
            }),
            moved: Notify::new(),
        }
    }

    /// A transfer began.
    pub fn begin(&self) {
        self.inner.lock().advance(1);
    }

    /// A transfer ended, one way or the other.
    pub fn end(&self) {
        self.inner.lock().advance(-1);
        self.moved.notify_waiters();
    }

    /// `bytes` left; `progress` when they (or an answer) had not left before.
    pub fn record(&self, bytes: u64, progress: bool) {
        let mut inner = self.inner.lock();
        inner.advance(0);
        if inner.samples.back().is_none_or(|&(at, _)| inner.active >= at + GRAIN) {
            let sample = (inner.active, inner.bytes);
            inner.samples.push_back(sample);
            while inner.samples.len() > 2 && inner.samples[1].0 + WINDOW < inner.active {
                inner.samples.pop_front();
            }
        }
        inner.bytes += bytes;
        if progress {
            inner.life.progress = Instant::now();
        }
        drop(inner);
        self.moved.notify_waiters();
    }

    /// `bytes` that had left were not taken: a store that reads and refuses is not fast.
    pub fn retract(&self, bytes: u64) {
        let mut inner = self.inner.lock();
        inner.bytes = inner.bytes.saturating_sub(bytes);
    }

    /// Bytes a second over the recent active time; 0 while nothing was measured.
    pub fn rate(&self) -> u64 {
        let mut inner = self.inner.lock();
        inner.advance(0);
        let Some(&(at, bytes)) = inner.samples.front() else { return 0 };
        let elapsed = (inner.active - at).max(SHORTEST);
        (inner.bytes.saturating_sub(bytes) as f64 / elapsed.as_secs_f64()) as u64
    }

    /// When something last moved anywhere.
    pub fn progress(&self) -> Instant {
        self.inner.lock().life.progress
    }

    /// The store asks for patience until then.
    pub fn slowed(&self, until: Instant) {
        self.inner.lock().life.slowed = until;
    }

    /// See [`Life::seen`].
    pub fn seen(&self, limit: Duration) -> Instant {
        self.inner.lock().life.seen(limit)
    }
}

impl Inner {
    fn advance(&mut self, change: isize) {
        let now = Instant::now();
        if self.running > 0 {
            self.active += now - self.updated;
        }
        self.updated = now;
        self.running = self.running.saturating_add_signed(change);
    }
}

/// How many bytes a sequential writer may be ahead (promise 3): one part, or one second of the rate, whichever is
/// more, shared among the files being sent.
pub(crate) fn allowance(rate: u64, part: u64, writers: usize) -> u64 {
    part.max(rate / writers.max(1) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_counts_active_time_only() {
        let meter = Meter::new();
        assert_eq!(meter.rate(), 0);
        meter.begin();
        meter.record(1 << 20, true);
        std::thread::sleep(Duration::from_millis(60));
        meter.record(1 << 20, true);
        meter.end();
        let rate = meter.rate();
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(meter.rate(), rate);
        assert!(rate > 10 << 20 && rate <= 42 << 20, "{rate}");
    }

    #[test]
    fn what_was_refused_is_no_rate() {
        let meter = Meter::new();
        meter.begin();
        for _ in 0..10 {
            meter.record(8 << 20, true);
            meter.retract(8 << 20);
        }
        assert_eq!(meter.rate(), 0);
    }

    #[test]
    fn a_writer_is_ahead_by_a_part_or_a_second() {
        assert_eq!(allowance(0, 8 << 20, 0), 8 << 20);
        assert_eq!(allowance(100 << 20, 8 << 20, 1), 100 << 20);
        assert_eq!(allowance(100 << 20, 8 << 20, 4), 25 << 20);
    }
}
