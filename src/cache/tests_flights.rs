#![allow(clippy::unwrap_used, missing_docs)]
//! GETs under way: what has come of them is never lost, and nobody pays for what nobody wants.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::fake::{Fake, Fault, Object, content};
use super::tests::{MIB, config, open, read_all, reader};
use super::*;
use crate::s3::ETag;

/// Of a segment of 1 MiB.
const TWELVE_BLOCKS: usize = 12 * 65536;

async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Promise 15: "the old bytes to the end if we have or can get them"
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_before_a_failure_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, fake) = (open(dir.path()).await, Fake::new(content(4 * MIB, 9), "e"));
    let reader = reader(&cache, &fake);
    reader.read(2 << 20, 10).await.unwrap();
    // Twelve blocks come, then the connection breaks and the object is another.
    fake.fail([Fault::Reset(TWELVE_BLOCKS), Fault::OtherETag]);
    assert!(matches!(reader.read(1 << 20, MIB).await, Err(CacheError::Stale)));
    *fake.current.lock() = None;
    assert_eq!(reader.read(1 << 20, 65536).await.unwrap(), content(4 * MIB, 9)[MIB..][..65536]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_come_does_not_wait_until_the_store_was_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, fake) = (open(dir.path()).await, Fake::new(content(4 * MIB, 9), "e"));
    let reader = Arc::new(reader(&cache, &fake));
    reader.read(3 << 20, 10).await.unwrap();
    let (gets, other) = (fake.get_count(), Arc::clone(&reader));
    fake.fail([Fault::Reset(TWELVE_BLOCKS)]);
    *fake.pace.lock() = Duration::from_millis(5);
    let whole = tokio::spawn(async move { other.read(1 << 20, MIB).await });
    until("the first GET", || fake.get_count() > gets).await;
    *fake.latency.lock() = Duration::from_millis(1500);
    until("the second GET", || fake.get_count() > gets + 1).await;
    assert_eq!(reader.read(1 << 20, 65536).await.unwrap().len(), 65536);
    assert!(!whole.is_finished(), "the second GET is not answered yet");
    assert_eq!(whole.await.unwrap().unwrap().len(), MIB);
}

/// "A reader that stops early wastes at most 2 windows", and on a slow connection no more than what is on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_wants_any_more_ends_in_the_middle_of_a_segment() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, fake) = (open(dir.path()).await, Fake::new(content(128 * MIB, 20), "e"));
    *fake.latency.lock() = Duration::from_millis(20);
    *fake.pace.lock() = Duration::from_millis(1);
    let reader = reader(&cache, &fake);
    for n in 0..64 {
        reader.read(n * 128 * 1024, 128 * 1024).await.unwrap();
    }
    // GETs from here on bring 64 KiB every 50 ms; what is open before comes to its end.
    *fake.pace.lock() = Duration::from_millis(50);
    let before = fake.get_count();
    for n in 64.. {
        reader.read(n * 128 * 1024, 128 * 1024).await.unwrap();
        if fake.get_count() - before >= 4 && fake.open.load(Ordering::SeqCst) <= fake.get_count() - before {
            break;
        }
    }
    let open = fake.open.load(Ordering::SeqCst);
    drop(reader);
    let sent = fake.sent.load(Ordering::SeqCst);
    until("no GET is open", || fake.open.load(Ordering::SeqCst) == 0).await;
    // A body is a chunk ahead of who takes it.
    let after = fake.sent.load(Ordering::SeqCst) - sent;
    assert!(after <= open * 2 * 65536, "{after} bytes after the end of {open} GETs");
}

/// Promise 15, as a mount reads: its open proves what a listing named, and listings name no versions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_version_that_an_answer_names_is_read_to_its_end() {
    for learned in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (cache, fake) = (open(dir.path()).await, Fake::new(content(4 * MIB, 11), "e"));
        let listed = reader(&cache, &fake);
        listed.revalidate().await.unwrap();
        let version = ObjectVersion { version_id: Some("v1".into()), ..fake.version("key") };
        let reader = if learned { listed } else { cache.reader(Arc::clone(&fake) as Arc<dyn Store>, version) };
        reader.read(0, 10).await.unwrap();
        let old = fake.current.lock().replace(Object { etag: ETag::new("new"), data: content(9, 1), checksum: None });
        fake.old.lock().push(("v1".into(), old.unwrap()));
        match read_all(&reader, MIB).await {
            Ok(all) => assert!(all == content(4 * MIB, 11)),
            // This store's answers name no version.
            Err(error) => assert!(learned && matches!(error, CacheError::Stale), "{error}"),
        }
    }
}

/// Whatever breaks, however it is read, and with little memory and disk: right bytes or an error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_readers_among_faults_are_given_no_other_byte() {
    for seed in 0..6_u64 {
        let dir = tempfile::tempdir().unwrap();
        let data = content(24 * MIB + 4321, seed);
        let (memory, size) = [(1_u64 << 20, 6_u64 << 20), (128 << 20, 1 << 30), (64 << 20, 10 << 20)][seed as usize % 3];
        let fake = Fake::new(data.clone(), "e");
        *fake.pace.lock() = Duration::from_micros([0, 300][seed as usize / 3]);
        let cache = Cache::open(CacheConfig { memory_limit: memory, max_size: size, ..config(dir.path()) }).await.unwrap();
        let lane = |lane: u64| {
            let (cache, fake, data) = (Arc::clone(&cache), Arc::clone(&fake), data.clone());
            async move {
                let mut state = seed * 1000 + lane + 1;
                let mut next = move |most: u64| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state % most
                };
                let (mut reader, mut at) = (reader(&cache, &fake), 0);
                for turn in 0..40 {
                    match next(8) {
                        0 => at = next(24 << 20),
                        1 => reader = super::tests::reader(&cache, &fake),
                        2 => fake.fail([[Fault::Short, Fault::Reset, Fault::Stall][next(3) as usize](next(3 << 20) as usize)]),
                        _ => {}
                    }
                    let len = [1 << 20, 1 << 20, 128 << 10, 3 << 20, 4096, 70_000][next(6) as usize];
                    if turn % 7 == 0 {
                        _ = tokio::time::timeout(Duration::from_micros(next(4000)), reader.read(at, len)).await;
                    }
                    if let Ok(bytes) = reader.read(at, len).await {
                        let from = (at as usize).min(data.len());
                        assert!(bytes == data[from..(from + len).min(data.len())], "seed {seed} at {at}");
                    }
                    at = (at + len as u64) % (24 << 20);
                }
            }
        };
        let lanes: Vec<_> = (0..8).map(|number| tokio::spawn(lane(number))).collect();
        for lane in lanes {
            lane.await.unwrap();
        }
    }
}
