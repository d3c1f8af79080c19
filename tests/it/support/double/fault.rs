//! What goes wrong on purpose, and for which requests.

use std::time::Duration;

use super::request::Asked;

/// What happens to a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The request is served, so much later.
    Delay(Duration),
    /// An error answer; nothing is done.
    Error(u16, &'static str),
    /// `200 OK` with an `<Error>` body; nothing is done.
    ErrorIn200(&'static str),
    /// A captive portal's page instead of S3.
    Html,
    /// Served, but the connection is reset after so many bytes of the answer's body.
    Reset(usize),
    /// Served, but the connection ends in good order after so many bytes of the answer's body.
    Truncate(usize),
    /// Served, but only so many bytes of the answer's body come, and its Content-Length agrees with them.
    Shorter(usize),
    /// Served, but one bit of the answer's body at this offset is turned over.
    Corrupt(usize),
    /// Done, but the answer never comes: the connection is reset.
    LostAnswer,
    /// Not done, and the connection is reset.
    Refuse,
    /// Nothing is answered for so long, then the connection ends.
    Stall(Duration),
    /// So many bytes of the answer's body come, then nothing for so long.
    StallBody(usize, Duration),
}

/// Which of the requests that a fault is for it strikes.
#[derive(Clone, Debug, Default)]
pub struct Turns {
    /// Not the first so many.
    pub skip: u64,
    /// At most so many; `None`: all.
    pub times: Option<u64>,
}

impl Turns {
    /// True of one of the first requests, which is counted.
    pub fn is_skipped(&mut self) -> bool {
        let skipped = self.skip > 0;
        self.skip -= u64::from(skipped);
        skipped
    }

    /// True where it strikes still, which is counted.
    pub fn strike(&mut self) -> bool {
        let strikes = self.times != Some(0);
        self.times = self.times.map(|times| times.saturating_sub(1));
        strikes
    }
}

/// Which requests a fault is for.
#[derive(Clone, Debug, Default)]
pub struct When {
    operation: Option<&'static str>,
    key: Option<String>,
    outside: Option<String>,
    bucket: Option<String>,
    turns: Turns,
}

impl When {
    /// Every request.
    pub fn any() -> Self {
        Self::default()
    }

    /// Requests of one operation, by S3's name.
    pub fn operation(name: &'static str) -> Self {
        Self { operation: Some(name), ..Self::default() }
    }

    /// Requests about one bucket.
    pub fn bucket(name: &str) -> Self {
        Self { bucket: Some(name.to_owned()), ..Self::default() }
    }

    /// Only for this key, or listings of this prefix.
    pub fn key(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self
    }

    /// Only for keys and listings that lie outside of a prefix. DeleteObjects names its keys where nobody looks: never that.
    pub fn outside(mut self, prefix: &str) -> Self {
        self.outside = Some(prefix.to_owned());
        self
    }

    /// Not for the first `count` of them.
    pub fn after(mut self, count: u64) -> Self {
        self.turns.skip = count;
        self
    }

    /// At most `count` times; without it for ever.
    pub fn times(mut self, count: u64) -> Self {
        self.turns.times = Some(count);
        self
    }

    fn is_about(&self, asked: &Asked) -> bool {
        self.operation.is_none_or(|operation| operation == asked.operation)
            && self.bucket.as_ref().is_none_or(|bucket| *bucket == asked.bucket)
            && self.key.as_ref().is_none_or(|key| *key == asked.key || asked.key.is_empty() && *key == asked.prefix)
            && self.outside.as_ref().is_none_or(|prefix| {
                let inside = asked.key.starts_with(prefix) || asked.prefix.starts_with(prefix);
                !inside && asked.operation != "DeleteObjects"
            })
    }
}

/// The faults in force.
#[derive(Debug, Default)]
pub struct Faults(Vec<(When, Fault)>);

impl Faults {
    pub fn add(&mut self, when: When, fault: Fault) {
        self.0.push((when, fault));
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The faults of a request: a delay adds to whatever else happens, of the others the first counts.
    pub fn take(&mut self, asked: &Asked) -> Vec<Fault> {
        let mut taken: Vec<Fault> = Vec::new();
        for (when, fault) in &mut self.0 {
            if !when.is_about(asked) {
                continue;
            }
            let is_delay = matches!(fault, Fault::Delay(_));
            let comes_second = !is_delay && taken.iter().any(|fault| !matches!(fault, Fault::Delay(_)));
            if !when.turns.is_skipped() && !comes_second && when.turns.strike() {
                taken.push(fault.clone());
            }
        }
        taken
    }
}
