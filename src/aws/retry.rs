//! When a request is sent again: idempotency × kind of failure, with backoff, jitter and a budget for the process.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

/// What the request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Answers somebody who waits: at most `retries` times, and while the store throttles for some time.
    Metadata,
    /// Bytes for a reader: the same.
    Read,
    /// Part of an upload: retried until the caller drops the future, who knows when progress counts as lost.
    Upload,
}

/// What went wrong with an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing reached the store (refused, not resolved, TLS): safe for any request.
    NotSent,
    /// The answer was lost (reset, silence): the store may have acted.
    Lost,
    /// The store said that it did not act and wants to be asked again later (503, 429).
    Throttled,
    /// The store failed (500, 502, 504, an `<Error>` in a 200).
    Server,
    /// An answer that asking again will not change.
    Final,
}

/// Tokens that retries of all requests share, so that a failing store is not flooded (the AWS SDKs' "retry quota":
/// 500 tokens, 5 a retry, 10 after silence, one back for each success).
#[derive(Debug)]
pub struct Budget {
    tokens: AtomicI64,
}

const CAPACITY: i64 = 500;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A store that is not reached at all is restarting, or the network is: five pauses from here span a quarter of a minute.
const FIRST_PAUSE_UNREACHED: Duration = Duration::from_millis(300);
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// Throttling alone ends a request that somebody waits for after so long, if his own deadline (80 s, promise 22) did not before.
const THROTTLED_MOST: Duration = Duration::from_secs(85);
/// While somebody waits for the answer a throttling store is asked at least so often.
const LONGEST_PAUSE_WAITED_FOR: Duration = Duration::from_secs(5);

static PROCESS: Budget = Budget { tokens: AtomicI64::new(CAPACITY) };

impl Budget {
    /// The budget of this process.
    pub fn process() -> &'static Budget {
        &PROCESS
    }

    fn take(&self, cost: i64) -> bool {
        self.tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |have| (have >= cost).then_some(have - cost)).is_ok()
    }

    /// A request succeeded: the store is well enough to be asked.
    pub fn succeeded(&self) {
        let _ = self.tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |have| (have < CAPACITY).then_some(have + 1));
    }
}

/// The attempts of one request.
#[derive(Debug)]
pub struct Attempts {
    class: Class,
    idempotent: bool,
    retries: u32,
    made: u32,
    /// Those of them that the store did not ask for: throttling is no failure.
    failures: u32,
    /// `None`: whoever waits judges by himself how long a store that throttles is waited for.
    throttled_most: Option<Duration>,
    began: Instant,
}

impl Attempts {
    /// `retries`: how often a Metadata or Read request is sent again.
    pub fn new(class: Class, idempotent: bool, retries: u32) -> Self {
        let throttled_most = (class != Class::Upload).then_some(THROTTLED_MOST);
        Self { class, idempotent, retries, made: 0, failures: 0, throttled_most, began: Instant::now() }
    }

    /// Throttling never ends it: the caller drops the future when he has waited long enough.
    pub fn wait_out_throttling(&mut self) {
        self.throttled_most = None;
    }

    /// How often it was sent again so far.
    pub fn made(&self) -> u32 {
        self.made
    }

    /// The pause before the next attempt, or `None` when the failure is the answer.
    pub fn next(&mut self, budget: &Budget, outcome: Outcome, retry_after: Option<Duration>) -> Option<Duration> {
        let repeatable = match outcome {
            Outcome::Final => false,
            Outcome::NotSent | Outcome::Throttled | Outcome::Server => true,
            Outcome::Lost => self.idempotent,
        };
        if !repeatable {
            return None;
        }
        let affordable = budget.take(if outcome == Outcome::Lost { 10 } else { 5 });
        let (waited_for, throttled) = (self.class != Class::Upload, outcome == Outcome::Throttled);
        if waited_for && !throttled && (self.failures >= self.retries || !affordable) {
            return None;
        }
        self.made += 1;
        self.failures += u32::from(!throttled);
        // What the budget does not pay for goes on at the slowest pace.
        let first = if matches!(outcome, Outcome::NotSent | Outcome::Lost) { FIRST_PAUSE_UNREACHED } else { FIRST_PAUSE };
        let ceiling = if affordable { first.saturating_mul(1 << self.made.min(10)).min(LONGEST_PAUSE) } else { LONGEST_PAUSE };
        let ceiling = if waited_for { ceiling.min(LONGEST_PAUSE_WAITED_FOR) } else { ceiling };
        let jittered = ceiling.mul_f64(rand::random_range(0.5..1.0));
        let pause = retry_after.map_or(jittered, |wait| wait.min(Duration::from_secs(60)).max(jittered));
        let over = throttled && self.throttled_most.is_some_and(|most| self.began.elapsed() + pause >= most);
        (!over).then_some(pause)
    }
}

/// `Retry-After` in seconds or as a date.
pub fn parse_retry_after(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = httpdate::parse_http_date(value.trim()).ok()?;
    at.duration_since(std::time::SystemTime::now()).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn full() -> Budget {
        Budget { tokens: AtomicI64::new(CAPACITY) }
    }

    #[test]
    fn metadata_ends_after_its_retries() {
        let budget = full();
        let mut attempts = Attempts::new(Class::Metadata, true, 5);
        assert_eq!((0..10).filter(|_| attempts.next(&budget, Outcome::Server, None).is_some()).count(), 5);
    }

    #[test]
    fn a_lost_answer_repeats_only_idempotent_requests() {
        let budget = full();
        assert!(Attempts::new(Class::Upload, false, 5).next(&budget, Outcome::Lost, None).is_none());
        assert!(Attempts::new(Class::Upload, false, 5).next(&budget, Outcome::NotSent, None).is_some());
        assert!(Attempts::new(Class::Upload, false, 5).next(&budget, Outcome::Throttled, None).is_some());
        assert!(Attempts::new(Class::Metadata, true, 5).next(&budget, Outcome::Lost, None).is_some());
        assert!(Attempts::new(Class::Upload, true, 5).next(&budget, Outcome::Final, None).is_none());
    }

    #[test]
    fn an_empty_budget_stops_reads_and_slows_uploads() {
        let budget = Budget { tokens: AtomicI64::new(0) };
        assert!(Attempts::new(Class::Read, true, 5).next(&budget, Outcome::Server, None).is_none());
        let pause = Attempts::new(Class::Upload, true, 5).next(&budget, Outcome::Throttled, None);
        assert!(pause.is_some_and(|p| p >= LONGEST_PAUSE / 2));
        for _ in 0..5 {
            budget.succeeded();
        }
        assert!(Attempts::new(Class::Read, true, 5).next(&budget, Outcome::Server, None).is_some());
    }

    #[test]
    fn throttling_is_no_failure_of_a_read_but_ends() {
        let empty = Budget { tokens: AtomicI64::new(0) };
        let mut attempts = Attempts::new(Class::Read, true, 2);
        for _ in 0..50 {
            assert!(attempts.next(&empty, Outcome::Throttled, None).is_some_and(|pause| pause <= LONGEST_PAUSE_WAITED_FOR));
        }
        assert!(attempts.next(&full(), Outcome::Server, None).is_some());
        attempts.began = Instant::now().checked_sub(THROTTLED_MOST / 2).unwrap();
        assert!(attempts.next(&full(), Outcome::Throttled, None).is_some());
        assert!(attempts.next(&full(), Outcome::Throttled, Some(Duration::from_secs(60))).is_none(), "too long for who waits");
        attempts.began = Instant::now().checked_sub(THROTTLED_MOST).unwrap();
        assert!(attempts.next(&full(), Outcome::Throttled, None).is_none());
        attempts.wait_out_throttling();
        assert!(attempts.next(&full(), Outcome::Throttled, None).is_some());
    }

    #[test]
    fn uploads_go_on_and_pauses_stay_bounded() {
        let budget = full();
        let mut attempts = Attempts::new(Class::Upload, true, 5);
        for _ in 0..1000 {
            assert!(attempts.next(&budget, Outcome::Throttled, None).is_some_and(|p| p <= LONGEST_PAUSE));
        }
        assert!(attempts.next(&budget, Outcome::Throttled, Some(Duration::from_secs(30))).is_some_and(|p| p >= Duration::from_secs(30)));
    }

    #[test]
    fn retry_after_has_two_spellings() {
        assert_eq!(parse_retry_after("7"), Some(Duration::from_secs(7)));
        let at = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(100));
        assert!(parse_retry_after(&at).is_some_and(|d| d.as_secs() > 90));
        assert_eq!(parse_retry_after("soon"), None);
    }
}
