//! Where a listing may be divided, guessed from the names so far.

use std::collections::BTreeSet;

use super::ListPage;

/// Pages that a range is guessed to have, at least.
const LEAST: f64 = 0.9;

/// The first and the last name of a page.
#[derive(Clone, Default)]
pub(super) struct Span {
    pub(super) first: String,
    pub(super) last: String,
}

impl Span {
    pub(super) fn of(page: &ListPage) -> Option<Self> {
        Some(Self { first: first_of(page)?.to_owned(), last: last_of(page)?.to_owned() })
    }

    /// Of a range that has no page yet.
    pub(super) fn at(name: &str) -> Self {
        Self { first: name.to_owned(), last: name.to_owned() }
    }
}

/// What the names so far look like.
pub(super) struct Names {
    /// Bytes of the listed prefix, which all names share.
    prefix: usize,
    pub(super) first: Option<String>,
    /// Bytes after the prefix that all names share.
    shared: usize,
    /// Letters and digits where names differ.
    alphabet: BTreeSet<u8>,
}

impl Names {
    pub(super) fn new(prefix: usize) -> Self {
        Self { prefix, first: None, shared: usize::MAX, alphabet: BTreeSet::new() }
    }

    /// Learns of a page. False where its names are in no order.
    pub(super) fn take(&mut self, page: &ListPage) -> bool {
        let Some((first, last)) = first_of(page).zip(last_of(page)) else { return true };
        let sorted = page.entries.is_sorted_by(|one, other| one.key < other.key) && page.prefixes.is_sorted();
        let begin = self.first.get_or_insert_with(|| first.to_owned());
        for name in [first, last] {
            let (one, other) = (begin.get(self.prefix..).unwrap_or_default(), name.get(self.prefix..).unwrap_or_default());
            self.shared = self.shared.min(one.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count());
        }
        for entry in &page.entries {
            let differs = entry.key.bytes().skip(self.prefix + self.shared).take(8);
            self.alphabet.extend(differs.filter(u8::is_ascii_alphanumeric));
        }
        sorted
    }

    /// At most `most` names between the end of a page and `until` at which what lies there may be divided into whole pages, in order.
    pub(super) fn between(&self, page: &Span, until: Option<&str>, most: usize) -> Vec<String> {
        let last = page.last.as_str();
        let (Some(tail), Some(size)) = (last.as_bytes().get(self.prefix..), self.distance(&page.first, last)) else { return Vec::new() };
        let mut found = BTreeSet::new();
        for at in 0..tail.len().min(size.depth + 2) {
            let Some(stem) = last.get(..self.prefix + at) else { break };
            // Before the place where names differ so far, numbers may grow, and the letter next to it may change.
            let counts = at >= self.shared || tail[at..self.shared.min(tail.len())].iter().all(u8::is_ascii_digit);
            if counts || at + 1 == self.shared {
                let names = self.following(tail[at]).into_iter().map(|byte| format!("{stem}{}", char::from(byte)));
                found.extend(names.filter(|name| name.as_str() > last && until.is_none_or(|until| name.as_str() < until)));
            }
        }
        let pages = |from: &str, to: &str| self.distance(from, to).map_or(0.0, |distance| distance.over(&size, self.alphabet.len()));
        let mut apart: Vec<String> = Vec::new();
        for name in found {
            let before = apart.last().map_or(last, String::as_str);
            if pages(before, &name) >= LEAST && until.is_none_or(|until| pages(&name, until) >= LEAST) {
                apart.push(name);
            }
        }
        if apart.len() <= most {
            return apart;
        }
        let count = apart.len();
        (1..=most).map(|nth| std::mem::take(&mut apart[nth * count / (most + 1)])).collect()
    }

    /// How far apart two names are, if names are evenly spread over the letters and digits that they are made of.
    fn distance(&self, from: &str, to: &str) -> Option<Distance> {
        let (from, to) = (from.as_bytes().get(self.prefix..)?, to.as_bytes().get(self.prefix..)?);
        let depth = (0..to.len()).find(|at| from.get(*at) != to.get(*at))?;
        let rank = |name: &[u8], at: usize| name.get(at).map_or(0, |byte| self.alphabet.range(..byte).count()) as f64;
        let base = self.alphabet.len().max(2) as f64;
        let part = (depth..depth + 4).rev().fold(0.0, |part, at| (part + rank(to, at) - rank(from, at)) / base);
        Some(Distance { depth, part })
    }

    /// Letters and digits that may follow this one in its place.
    fn following(&self, byte: u8) -> BTreeSet<u8> {
        let kin = match byte {
            b'0'..=b'9' => b'0'..=b'9',
            b'a'..=b'z' => b'a'..=b'z',
            b'A'..=b'Z' => b'A'..=b'Z',
            _ => return BTreeSet::new(),
        };
        kin.chain(self.alphabet.iter().copied()).filter(|other| *other > byte).collect()
    }
}

/// A part of all names of one beginning of `depth` letters.
struct Distance {
    depth: usize,
    part: f64,
}

impl Distance {
    /// How often the other fits into it, with an alphabet of `base`.
    fn over(&self, other: &Self, base: usize) -> f64 {
        let depth = other.depth as i32 - self.depth as i32;
        self.part / other.part * (base.max(2) as f64).powi(depth)
    }
}

pub(super) fn first_of(page: &ListPage) -> Option<&str> {
    let (entry, prefix) = (page.entries.first().map(|entry| entry.key.as_str()), page.prefixes.first().map(String::as_str));
    entry.into_iter().chain(prefix).min()
}

fn last_of(page: &ListPage) -> Option<&str> {
    let (entry, prefix) = (page.entries.last().map(|entry| entry.key.as_str()), page.prefixes.last().map(String::as_str));
    entry.into_iter().chain(prefix).max()
}
