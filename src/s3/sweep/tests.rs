#![allow(clippy::unwrap_used)]
//! A sweep over a store of the test's own: what it asks for, in how many round trips, and that every name comes once.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use proptest::prelude::*;
use tokio::sync::oneshot;

use super::super::{ETag, ListEntry};
use super::*;

/// Every task that can go on has gone on after so many turns.
const TURNS: usize = 20;

/// The name of a number.
type Shape = fn(u64) -> String;

struct Fake {
    keys: Vec<String>,
    page: usize,
    knows_start_after: bool,
    asked: AtomicUsize,
    /// Fails the request of this number.
    fails: usize,
    /// Requests whose answers are on their way.
    under_way: Mutex<Vec<oneshot::Sender<()>>>,
}

impl Fake {
    fn new(keys: impl IntoIterator<Item = String>, page: usize) -> Arc<Self> {
        let mut keys: Vec<String> = keys.into_iter().collect();
        keys.sort();
        keys.dedup();
        Arc::new(Self { keys, page, knows_start_after: true, asked: AtomicUsize::new(0), fails: usize::MAX, under_way: Mutex::default() })
    }

    fn list(&self, request: &ListRequest) -> ListPage {
        let after = match (&request.continuation, &request.start_after) {
            (Some(after), _) => after.clone(),
            (None, Some(after)) if self.knows_start_after => after.clone(),
            _ => String::new(),
        };
        // A prefix that is continued after holds all that is below it.
        let past = |key: &str| key > after.as_str() && !(request.delimited && after.ends_with('/') && key.starts_with(&after));
        let mut names: BTreeMap<String, bool> = BTreeMap::new();
        let mut keys = self.keys.iter().filter(|key| key.starts_with(&request.prefix) && past(key));
        for key in keys.by_ref() {
            let rest = &key[request.prefix.len()..];
            let (name, is_prefix) = match rest.find('/').filter(|_| request.delimited) {
                Some(at) => (key[..request.prefix.len() + at + 1].to_owned(), true),
                None => (key.clone(), false),
            };
            if names.len() == self.page && !names.contains_key(&name) {
                let next = names.keys().next_back().cloned();
                return Self::page_of(names, next);
            }
            names.insert(name, is_prefix);
        }
        Self::page_of(names, None)
    }

    fn page_of(names: BTreeMap<String, bool>, next: Option<String>) -> ListPage {
        let entry =
            |key| ListEntry { key, size: 1, etag: ETag::new("e"), last_modified: SystemTime::UNIX_EPOCH, storage_class: None, sha1: false };
        let (prefixes, keys): (Vec<_>, Vec<_>) = names.into_iter().partition(|(_, is_prefix)| *is_prefix);
        ListPage {
            entries: keys.into_iter().map(|(key, _)| entry(key)).collect(),
            prefixes: prefixes.into_iter().map(|(prefix, _)| prefix).collect(),
            next,
        }
    }

    fn lister(self: &Arc<Self>) -> Lister {
        let fake = Arc::clone(self);
        Arc::new(move |request| {
            let fake = Arc::clone(&fake);
            Box::pin(async move {
                let nth = fake.asked.fetch_add(1, Ordering::SeqCst);
                let (answer, comes) = oneshot::channel();
                fake.under_way.lock().push(answer);
                comes.await.unwrap();
                if nth == fake.fails {
                    return Err(S3Error::local(ErrorKind::Network, "ListObjectsV2", String::new(), "gone".to_owned()));
                }
                Ok(fake.list(&request))
            })
        })
    }
}

fn names_of(page: &ListPage) -> impl Iterator<Item = String> {
    let mut names: Vec<String> = page.entries.iter().map(|entry| entry.key.clone()).chain(page.prefixes.iter().cloned()).collect();
    names.sort();
    names.into_iter()
}

/// All names in the order in which they come, how many requests and how many round trips that took.
async fn read(fake: &Arc<Fake>, prefix: &str, memory: u64) -> (Vec<String>, usize, u32) {
    read_as(fake, prefix, true, memory).await
}

/// As [`read`]; not delimited: every key below the prefix.
async fn read_as(fake: &Arc<Fake>, prefix: &str, delimited: bool, memory: u64) -> (Vec<String>, usize, u32) {
    let request = ListRequest { prefix: prefix.to_owned(), delimited, ..ListRequest::default() };
    let (first, mut rounds) = (fake.list(&request), 1);
    let mut names: Vec<String> = names_of(&first).collect();
    let Some(mut sweep) = Sweep::after(&request, &first, 32, memory, fake.lister()) else { return (names, 1, rounds) };
    loop {
        let next = {
            let mut next = pin!(sweep.next());
            loop {
                let waits = async {
                    for _ in 0..TURNS {
                        tokio::task::yield_now().await;
                    }
                };
                tokio::select! {
                    biased;
                    next = &mut next => break next,
                    () = waits => {
                        rounds += 1;
                        fake.under_way.lock().drain(..).for_each(|answer| _ = answer.send(()));
                    }
                }
            }
        };
        match next {
            Ok(Some(swept)) => {
                names.extend(names_of(&swept.page));
                let mut again = fake.list(&swept.ask.request);
                swept.ask.cut(&mut again);
                assert!(names_of(&again).eq(names_of(&swept.page)), "{:?}", swept.ask);
            }
            Ok(None) => break,
            Err(error) => assert_eq!(error.kind, ErrorKind::Network),
        }
    }
    (names, 1 + fake.asked.load(Ordering::SeqCst), rounds)
}

/// "100,000 keys in one directory … whole in ≤ 12 round trips of wall time by listing ranges in parallel (start-after)"
#[tokio::test]
async fn a_hundred_thousand_names_take_twelve_round_trips() {
    let shapes: [(&str, u32, Shape); 5] = [
        ("numbers", 12, |n| format!("d/{n:05}")),
        ("photos", 13, |n| format!("d/IMG_{n:06}.jpg")),
        ("sums", 12, |n| format!("d/{:016x}", n.wrapping_mul(0x9E37_79B9_7F4A_7C15))),
        ("days", 20, |n| format!("d/{}-{:02}-{:02}-{:04}.log", 2015 + n / 10_000, n / 800 % 12 + 1, n / 27 % 28 + 1, n)),
        ("words", 12, |n| {
            let letter = |shift: u32| char::from(b'a' + (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> shift) as u8 % 26);
            format!("d/{}{}{}{}-{n}", letter(8), letter(16), letter(24), letter(32))
        }),
    ];
    for (shape, most, name) in shapes {
        let fake = Fake::new((0..100_000).map(name), 1000);
        let (names, requests, rounds) = read(&fake, "d/", u64::MAX).await;
        assert!(names == fake.keys, "{shape}: {} names", names.len());
        assert!(rounds <= most && requests <= 171, "{shape}: {requests} requests, {rounds} round trips");
    }
}

/// "`ls -l` of 5,000 keys … 5 LIST + 1"
#[tokio::test]
async fn five_thousand_names_take_six_requests() {
    let fake = Fake::new((0..5_000).map(|n| format!("d/{n:05}.txt")), 1000);
    let (names, requests, _) = read(&fake, "d/", u64::MAX).await;
    assert!(names == fake.keys && requests <= 6, "{requests}");
}

/// A tree is listed without delimiter, its directories as names among others.
#[tokio::test]
async fn the_keys_of_a_tree_are_listed_in_ranges_too() {
    let shapes: [(&str, u32, Shape); 2] =
        [("months", 60, |n| format!("t/{:04}/{:02}/{n:05}.jpg", n / 5000, n / 400 % 12)), ("flat", 12, |n| format!("t/d/{n:05}"))];
    for (shape, most, name) in shapes {
        let fake = Fake::new((0..60_000).map(name), 1000);
        let (names, requests, rounds) = read_as(&fake, "t/", false, u64::MAX).await;
        assert!(names == fake.keys, "{shape}: {} names", names.len());
        assert!(rounds <= most && requests <= 131, "{shape}: {requests} requests, {rounds} round trips");
    }
}

#[tokio::test]
async fn a_store_that_ignores_where_to_begin_is_listed_in_order() {
    let mut fake = Fake::new((0..2_000).map(|n| format!("{n:05}")), 100);
    Arc::get_mut(&mut fake).unwrap().knows_start_after = false;
    let (names, requests, _) = read(&fake, "", u64::MAX).await;
    assert!(names == fake.keys && requests < 80, "{requests}");
}

/// With little memory it takes longer, and no more than that.
#[tokio::test]
async fn names_that_wait_are_bounded() {
    let fake = Fake::new((0..40_000).map(|n| format!("{n:05}")), 1000);
    let (names, requests, rounds) = read(&fake, "", 0).await;
    assert!(names == fake.keys && requests < 90 && rounds < 60, "{requests} requests, {rounds} round trips");
}

#[tokio::test]
async fn what_failed_is_asked_for_again() {
    for fails in 1..60 {
        let mut fake = Fake::new((0..3_000).map(|n| format!("{n:05}")), 100);
        Arc::get_mut(&mut fake).unwrap().fails = fails;
        assert!(read(&fake, "", u64::MAX).await.0 == fake.keys, "{fails}");
    }
}

proptest! {
    #[test]
    fn every_name_comes_once_and_in_order(keys in prop::collection::hash_set("p/[a-c0-3/é-]{1,7}", 1..300), page in 1..9_usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let fake = Fake::new(keys, page);
        let (keys, ..) = runtime.block_on(read_as(&fake, "p/", false, u64::MAX));
        prop_assert_eq!(&keys, &fake.keys);
        let all = Fake::new(fake.keys.clone(), usize::MAX).list(&ListRequest { prefix: "p/".to_owned(), delimited: true, ..ListRequest::default() });
        let (names, ..) = runtime.block_on(read(&fake, "p/", u64::MAX));
        prop_assert_eq!(names, names_of(&all).collect::<Vec<_>>());
    }
}
