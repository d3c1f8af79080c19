//! How far the store is, by how soon it answers.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A store whose answers begin within this time is on the same machine or the same network. S3 takes longer even within its region.
const NEAR: Duration = Duration::from_millis(10);
/// An answer counts for this long and at most for twice as long: a laptop goes elsewhere.
const MEMORY: Duration = Duration::from_secs(60);

/// The shortest time to the head of an answer lately. The shortest, because a busy store and a busy machine answer late at any distance.
#[derive(Debug, Default)]
pub struct Distance(Mutex<Shortest>);

#[derive(Debug, Default)]
struct Shortest {
    since: Option<Instant>,
    now: Option<Duration>,
    before: Option<Duration>,
}

impl Distance {
    /// Notes the time that an answer's head took.
    pub fn note(&self, took: Duration) {
        self.note_at(Instant::now(), took);
    }

    /// True when the store was found to be near; false when nothing is known.
    pub fn is_near(&self) -> bool {
        self.is_near_at(Instant::now())
    }

    fn note_at(&self, now: Instant, took: Duration) {
        let mut shortest = self.0.lock();
        shortest.turn(now);
        shortest.now = Some(shortest.now.map_or(took, |other| other.min(took)));
    }

    fn is_near_at(&self, now: Instant) -> bool {
        let mut shortest = self.0.lock();
        shortest.turn(now);
        shortest.now.into_iter().chain(shortest.before).any(|took| took < NEAR)
    }
}

impl Shortest {
    fn turn(&mut self, now: Instant) {
        let age = now.saturating_duration_since(*self.since.get_or_insert(now));
        if age >= MEMORY {
            self.before = if age < 2 * MEMORY { self.now } else { None };
            self.now = None;
            self.since = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[test]
    fn one_short_answer_among_late_ones_is_near_and_is_forgotten() {
        let (distance, start) = (Distance::default(), Instant::now());
        assert!(!distance.is_near_at(start), "nothing is known");
        distance.note_at(start, 20 * MILLISECOND);
        assert!(!distance.is_near_at(start));
        distance.note_at(start, 2 * MILLISECOND);
        for second in 1..200 {
            let now = start + Duration::from_secs(second);
            distance.note_at(now, 30 * MILLISECOND);
            assert_eq!(distance.is_near_at(now), second < 120, "after {second} s");
        }
    }

    #[test]
    fn an_answer_of_long_ago_says_nothing() {
        let (distance, start) = (Distance::default(), Instant::now());
        distance.note_at(start, MILLISECOND);
        assert!(!distance.is_near_at(start + 2 * MEMORY));
    }
}
