//! What was asked of the double.

use std::collections::BTreeMap;

use super::request::Asked;

/// One request.
#[derive(Clone, Debug)]
pub struct Entry {
    pub operation: &'static str,
    pub bucket: String,
    pub key: String,
    /// `x-amz-*` of the request.
    pub headers: BTreeMap<String, String>,
}

/// Requests since the start or the last reset.
#[derive(Clone, Debug, Default)]
pub struct Requests {
    pub log: Vec<Entry>,
    /// Most that were open at once.
    pub peak: usize,
    /// Bytes of request bodies.
    pub bytes_up: u64,
    /// Bytes of answers' bodies.
    pub bytes_down: u64,
}

impl Requests {
    pub(super) fn add(&mut self, asked: Asked) {
        self.log.push(Entry { operation: asked.operation, bucket: asked.bucket, key: asked.key, headers: asked.headers });
    }

    /// How many of one operation, by S3's name.
    pub fn of(&self, operation: &str) -> usize {
        self.log.iter().filter(|entry| entry.operation == operation).count()
    }

    /// How many of several operations.
    pub fn of_any(&self, operations: &[&str]) -> usize {
        operations.iter().map(|operation| self.of(operation)).sum()
    }

    /// All of them.
    pub fn total(&self) -> usize {
        self.log.len()
    }

    /// By operation, for a message.
    pub fn summary(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for entry in &self.log {
            *counts.entry(entry.operation).or_default() += 1;
        }
        counts
    }
}
