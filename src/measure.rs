//! How often things happen and how long they take, counted without a lock; and how fast bytes move.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Upper bounds of the classes, in microseconds: from what the kernel's caches and ours answer to what a deadline ends.
const BOUNDS: [u64; 15] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 10_000_000, 90_000_000];

/// Durations by classes.
#[derive(Debug, Default)]
pub struct Durations {
    classes: [AtomicU64; BOUNDS.len() + 1],
    microseconds: AtomicU64,
}

impl Durations {
    /// One more.
    pub fn observe(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.classes[BOUNDS.partition_point(|bound| *bound < took)].fetch_add(1, Relaxed);
        self.microseconds.fetch_add(took, Relaxed);
    }

    /// How many each class has, by its upper bound in seconds (the last one has none), and the sum of all in seconds. What is observed
    /// meanwhile may be in one of the two alone.
    pub fn snapshot(&self) -> (Vec<(f64, u64)>, f64) {
        let bounds = BOUNDS.iter().map(|bound| *bound as f64 / 1e6).chain([f64::MAX]);
        let counts = self.classes.iter().map(|class| class.load(Relaxed));
        (bounds.zip(counts).collect(), self.microseconds.load(Relaxed) as f64 / 1e6)
    }
}

/// The speed is that of so much time: long enough that parts which end together do not make it jump.
const WINDOW: Duration = Duration::from_secs(5);
/// Bytes within this are one sample.
const GRAIN: Duration = Duration::from_millis(100);
/// A speed counts from so long on: before, it is that of a buffer which is being filled.
const SHORTEST: Duration = Duration::from_millis(500);

/// How fast bytes of one thing move, now.
#[derive(Debug, Default)]
pub struct Speed {
    samples: Mutex<VecDeque<(Instant, u64)>>,
}

impl Speed {
    /// So many bytes moved.
    pub fn moved(&self, bytes: u64) {
        self.moved_at(bytes, Instant::now());
    }

    fn moved_at(&self, bytes: u64, now: Instant) {
        let mut samples = self.samples.lock();
        match samples.back_mut() {
            Some((since, sum)) if now.duration_since(*since) < GRAIN => *sum += bytes,
            _ => samples.push_back((now, bytes)),
        }
        while samples.front().is_some_and(|(at, _)| now.duration_since(*at) > WINDOW) {
            samples.pop_front();
        }
    }

    /// Bytes a second over the last seconds; 0 where nothing moved in them.
    pub fn now(&self) -> u64 {
        self.at(Instant::now())
    }

    fn at(&self, now: Instant) -> u64 {
        let samples = self.samples.lock();
        let recent = || samples.iter().filter(|(at, _)| now.duration_since(*at) <= WINDOW);
        let Some((first, _)) = recent().next() else { return 0 };
        let elapsed = now.duration_since(*first).max(SHORTEST);
        (recent().map(|(_, bytes)| bytes).sum::<u64>() as f64 / elapsed.as_secs_f64()) as u64
    }

    /// When the last bytes moved, if any did.
    pub fn last(&self) -> Option<Instant> {
        self.samples.lock().back().map(|(at, _)| *at)
    }
}

/// Seconds until `left` bytes have moved at this speed, rounded up; `None` where nothing moves.
pub fn eta_seconds(left: u64, speed: u64) -> Option<u64> {
    (speed > 0).then(|| left.div_ceil(speed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_that_of_the_last_seconds() {
        let (speed, start) = (Speed::default(), Instant::now());
        assert_eq!((speed.at(start), speed.last()), (0, None));
        speed.moved_at(1000, start);
        assert_eq!(speed.at(start), 2000, "a first burst is not a speed without end");
        for step in 1..=100_u32 {
            speed.moved_at(1000, start + step * GRAIN);
        }
        let end = start + 100 * GRAIN;
        assert!((9_500..=10_500).contains(&speed.at(end)), "{}", speed.at(end));
        assert!((4_000..=6_000).contains(&speed.at(end + WINDOW / 2)), "{}", speed.at(end + WINDOW / 2));
        assert_eq!(speed.at(end + WINDOW * 2), 0);
        assert!(speed.samples.lock().len() <= 52);
        assert_eq!((eta_seconds(10, 0), eta_seconds(10, 3), eta_seconds(0, 3)), (None, Some(4), Some(0)));
    }

    #[test]
    fn durations_fall_into_their_classes() {
        let durations = Durations::default();
        for micros in [0, 50, 51, 1_000, 200_000_000] {
            durations.observe(Duration::from_micros(micros));
        }
        let (classes, sum) = durations.snapshot();
        let count = |bound: f64| classes.iter().find(|(upper, _)| (upper - bound).abs() < f64::EPSILON).map_or(0, |(_, count)| *count);
        assert_eq!((count(0.00005), count(0.0001), count(0.001), classes.last().map(|(_, count)| *count)), (2, 1, 1, Some(1)));
        assert!((sum - 200.001_101).abs() < 1e-6, "{sum}");
    }
}
