//! `bwlimit`: one pace for all body bytes that leave, and one for those that come.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Paces senders so that together they stay at a rate. Each taker reserves its time slot at once, so the order is
/// fair and nothing polls.
#[derive(Debug)]
pub struct Bandwidth {
    bytes_per_second: u64,
    free_at: Mutex<Option<Instant>>,
}

impl Bandwidth {
    /// A limit in bytes a second; 0 counts as 1.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free_at: Mutex::new(None) }
    }

    /// Reserves the time for `bytes` and tells when they may leave.
    pub fn reserve(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        let mut free_at = self.free_at.lock();
        let start = free_at.map_or(now, |at| at.max(now));
        *free_at = Some(start + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64));
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn slots_follow_each_other() {
        let limit = Bandwidth::new(100_000);
        let first = limit.reserve(500);
        let second = limit.reserve(500);
        assert_eq!(second - first, Duration::from_millis(5));
        tokio::time::sleep(Duration::from_millis(30)).await;
        let before = Instant::now();
        assert!(limit.reserve(1) >= before);
    }
}
