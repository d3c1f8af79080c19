//! How often things happen and how long they take, counted without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

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

#[cfg(test)]
mod tests {
    use super::*;

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
