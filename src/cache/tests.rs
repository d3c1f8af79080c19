#![allow(clippy::unwrap_used, missing_docs)]
//! The cache against a scripted store: what it asks for, what it keeps, and that it never gives a wrong byte.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use md5::{Digest, Md5};

use super::block::BLOCK;
use super::fake::{Fake, Fault, Object, content};
use super::*;
use crate::s3::{Checksum, ErrorKind};

pub(super) const MIB: usize = 1 << 20;

pub(super) fn config(dir: &Path) -> CacheConfig {
    CacheConfig {
        dir: dir.to_owned(),
        identity: "http://store/bucket".into(),
        max_size: 1 << 30,
        min_free_space: 0,
        memory_limit: 256 << 20,
        read_ahead: None,
        max_connections: 32,
        checks_ranges_over_http: false,
    }
}

pub(super) async fn open(dir: &Path) -> Arc<Cache> {
    Cache::open(config(dir)).await.unwrap()
}

async fn open_http(dir: &Path) -> Arc<Cache> {
    Cache::open(CacheConfig { checks_ranges_over_http: true, ..config(dir) }).await.unwrap()
}

pub(super) fn reader(cache: &Arc<Cache>, fake: &Arc<Fake>) -> Reader {
    cache.reader(Arc::clone(fake) as Arc<dyn Store>, fake.version("key"))
}

/// Reads from start to end in steps; the first error ends it.
pub(super) async fn read_all(reader: &Reader, step: usize) -> Result<Vec<u8>, CacheError> {
    let mut all = Vec::new();
    loop {
        let bytes = reader.read(all.len() as u64, step).await?;
        if bytes.is_empty() {
            return Ok(all);
        }
        all.extend_from_slice(&bytes);
    }
}

/// Drops a cache and waits until its directory is free.
async fn close(cache: Arc<Cache>) {
    let inner = Arc::downgrade(&cache.inner);
    drop(cache);
    while inner.strong_count() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn data_files(dir: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_dir(dir).unwrap().map(|item| item.unwrap().path());
    let files = mounts.flat_map(|dir| std::fs::read_dir(dir).unwrap()).map(|item| item.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|kind| kind == "data")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sniff_costs_one_get_of_128_kib_and_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, fake) = (open(dir.path()).await, Fake::new(content(64 * MIB, 1), "e"));
    let reader = reader(&cache, &fake);
    assert_eq!(reader.read(0, 16384).await.unwrap(), content(64 * MIB, 1)[..16384]);
    reader.read(4096, 16384).await.unwrap();
    assert_eq!((fake.get_count(), fake.asked()), (1, 131_072));
    assert_eq!(fake.heads.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequential_read_uses_many_connections_and_fetches_every_byte_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(256 * MIB, 2);
    let (cache, fake) = (open(dir.path()).await, Fake::new(data.clone(), "e"));
    *fake.latency.lock() = Duration::from_millis(20);
    *fake.pace.lock() = Duration::from_millis(2);
    let start = Instant::now();
    let all = read_all(&reader(&cache, &fake), 128 * 1024).await.unwrap();
    assert!(all == data);
    eprintln!("256 MiB in {:?}, {} GETs, {} at once", start.elapsed(), fake.get_count(), fake.peak.load(Ordering::SeqCst));
    assert!(fake.peak.load(Ordering::SeqCst) >= 8);
    assert_eq!(fake.asked(), data.len() as u64);
    assert!(fake.get_count() < 80, "{}", fake.get_count());
    assert!(cache.is_complete(&fake.version("key")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_that_fits_into_memory_is_never_read_back_from_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(256 * MIB, 22);
    let config = CacheConfig { read_ahead: Some(32 << 20), checks_ranges_over_http: true, ..config(dir.path()) };
    let (cache, fake) = (Cache::open(config).await.unwrap(), Fake::new(data.clone(), "e-32"));
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &data);
    fake.current.lock().as_mut().unwrap().checksum = Some(Checksum::Crc64Nvme(crc));
    *fake.pace.lock() = Duration::from_millis(1);
    let reader = reader(&cache, &fake);
    for at in (0..data.len()).step_by(MIB) {
        assert!(reader.read(at as u64, MIB).await.unwrap() == data[at..at + MIB]);
        // A block read back would not match its sum, and be fetched again.
        let file = std::fs::OpenOptions::new().write(true).open(&data_files(dir.path())[0]).unwrap();
        file.set_len(0).unwrap();
    }
    assert_eq!(fake.asked(), data.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_soon_the_store_answers_says_how_many_connections_are_used() {
    for (millis, near) in [(0, true), (20, false)] {
        let dir = tempfile::tempdir().unwrap();
        let (cache, fake) = (open(dir.path()).await, Fake::new(content(MIB, 24), "e"));
        assert!(!cache.inner.distance.is_near());
        *fake.latency.lock() = Duration::from_millis(millis);
        reader(&cache, &fake).read(0, 10).await.unwrap();
        assert_eq!(cache.inner.distance.is_near(), near, "{millis} ms");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_overtake_each_other_end_no_get() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(128 * MIB, 23);
    let (cache, fake) = (open(dir.path()).await, Fake::new(data.clone(), "e"));
    *fake.pace.lock() = Duration::from_millis(1);
    let reader = Arc::new(reader(&cache, &fake));
    for group in 0..data.len() / (4 * MIB) {
        let order = if group < 2 { [0, 1, 2, 3] } else { [3, 1, 0, 2] };
        let mut reads = Vec::new();
        for n in order {
            let (reader, at) = (Arc::clone(&reader), group * 4 * MIB + n * MIB);
            reads.push(tokio::spawn(async move { (at, reader.read(at as u64, MIB).await.unwrap()) }));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for read in reads {
            let (at, bytes) = read.await.unwrap();
            assert!(bytes == data[at..at + MIB]);
        }
    }
    assert_eq!(fake.asked(), data.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_reads_cost_a_block_each() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(64 * MIB, 3);
    let (cache, fake) = (open(dir.path()).await, Fake::new(data.clone(), "e"));
    let reader = reader(&cache, &fake);
    for n in 1..101usize {
        let at = n * 7_919 * 4096 % (63 * MIB) + 1;
        assert_eq!(reader.read(at as u64, 4096).await.unwrap(), data[at..at + 4096]);
    }
    assert!(fake.get_count() <= 100 && fake.asked() <= 16 << 20, "{} {}", fake.get_count(), fake.asked());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backward_and_strided_reads_waste_little() {
    let data = content(128 * MIB, 4);
    for (step, len, bound) in [(-(MIB as i64), MIB, 1.2), (MIB as i64, 65536, 2.0)] {
        let dir = tempfile::tempdir().unwrap();
        let (cache, fake) = (open(dir.path()).await, Fake::new(data.clone(), "e"));
        *fake.latency.lock() = Duration::from_millis(5);
        let reader = reader(&cache, &fake);
        let mut at = if step < 0 { data.len() as i64 + step } else { 0 };
        let mut got = 0;
        while at >= 0 && at < data.len() as i64 {
            for part in (0..len).step_by(128 * 1024) {
                let (from, size) = (at as usize + part, (len - part).min(128 * 1024));
                assert!(reader.read(from as u64, size).await.unwrap() == data[from..from + size]);
                got += size;
            }
            at += step;
        }
        let ratio = fake.asked() as f64 / got as f64;
        assert!(ratio <= bound, "step {step}: {ratio}");
        assert!(fake.peak.load(Ordering::SeqCst) >= 3, "step {step}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_readers_share_flights() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(8 * MIB, 5);
    let (cache, fake) = (open(dir.path()).await, Fake::new(data.clone(), "e"));
    *fake.latency.lock() = Duration::from_millis(20);
    let reads = (0..16).map(|_| {
        let reader = reader(&cache, &fake);
        tokio::spawn(async move { read_all(&reader, MIB).await.unwrap() })
    });
    for read in reads.collect::<Vec<_>>() {
        assert!(read.await.unwrap() == data);
    }
    assert_eq!(fake.asked(), data.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_stops_short_or_breaks_is_resumed_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(4 * MIB + 77, 6);
    let (cache, fake) = (open(dir.path()).await, Fake::new(data.clone(), "e"));
    fake.fail([Fault::Short(1000), Fault::Reset(50_000), Fault::Short(0), Fault::Short(70_000), Fault::Reset(300_000)]);
    assert!(read_all(&reader(&cache, &fake), MIB).await.unwrap() == data);
    assert_eq!(fake.gets.lock()[1].start, 1000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_body_is_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(MIB, 7);
    let (cache, fake) = (open(dir.path()).await, Fake::new(data.clone(), "e"));
    fake.fail([Fault::Stall(70_000)]);
    assert!(reader(&cache, &fake).read(0, MIB).await.unwrap() == data);
    assert_eq!(fake.gets.lock()[1].start, 70_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_gone_ends_the_read_with_its_error() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, fake) = (open(dir.path()).await, Fake::new(content(MIB, 8), "e"));
    fake.fail(std::iter::repeat_n(Fault::Stall(10), 100));
    let start = Instant::now();
    let error = reader(&cache, &fake).read(0, 10).await;
    assert!(matches!(&error, Err(CacheError::S3(error)) if error.kind == ErrorKind::TimedOut), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(10));
    fake.faults.lock().clear();
    fake.gone.store(true, Ordering::SeqCst);
    assert!(matches!(reader(&cache, &fake).read(0, 10).await, Err(CacheError::S3(error)) if error.kind == ErrorKind::Network));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_or_removed_object_is_stale_and_errors_keep_their_kind() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, fake) = (open(dir.path()).await, Fake::new(content(4 * MIB, 9), "e"));
    let pinned = reader(&cache, &fake);
    pinned.read(0, 10).await.unwrap();
    fake.fail([Fault::OtherETag]);
    assert!(matches!(pinned.read(3 << 20, 10).await, Err(CacheError::Stale)));
    fake.fail([Fault::Refuse(ErrorKind::Archived)]);
    assert!(matches!(pinned.read(3 << 20, 10).await, Err(CacheError::S3(error)) if error.kind == ErrorKind::Archived));
    *fake.current.lock() = Some(Object { etag: ETag::new("new"), data: content(4 * MIB, 10), checksum: None });
    assert!(matches!(pinned.read(3 << 20, 10).await, Err(CacheError::Stale)));
    assert!(matches!(pinned.revalidate().await, Err(CacheError::Stale)));
    assert_eq!(pinned.read(0, 10).await.unwrap(), content(10, 9));
    *fake.current.lock() = None;
    assert!(matches!(pinned.revalidate().await, Err(CacheError::Stale)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_version_is_read_to_its_end_where_the_bucket_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, fake) = (open(dir.path()).await, Fake::new(content(4 * MIB, 11), "e"));
    let version = ObjectVersion { version_id: Some("v1".into()), ..fake.version("key") };
    let reader = cache.reader(Arc::clone(&fake) as Arc<dyn Store>, version);
    reader.read(0, 10).await.unwrap();
    let old = fake.current.lock().replace(Object { etag: ETag::new("new"), data: content(9, 1), checksum: None });
    fake.old.lock().push(("v1".into(), old.unwrap()));
    assert!(read_all(&reader, MIB).await.unwrap() == content(4 * MIB, 11));
    assert!(matches!(reader.revalidate().await, Err(CacheError::Stale)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revalidation_brings_the_first_blocks_and_then_costs_a_head() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, fake) = (open(dir.path()).await, Fake::new(content(MIB, 12), "e"));
    let reader = reader(&cache, &fake);
    assert_eq!(reader.revalidate().await.unwrap().size, MIB as u64);
    assert_eq!(reader.read(0, 100_000).await.unwrap(), content(100_000, 12));
    assert_eq!((fake.get_count(), fake.heads.load(Ordering::SeqCst)), (1, 0));
    reader.revalidate().await.unwrap();
    assert_eq!((fake.get_count(), fake.heads.load(Ordering::SeqCst)), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cached_blocks_survive_a_restart_and_bad_ones_are_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(3 * MIB + 5, 13);
    let fake = Fake::new(data.clone(), "e");
    let cache = open(dir.path()).await;
    read_all(&reader(&cache, &fake), MIB).await.unwrap();
    cache.shutdown().await;
    close(cache).await;
    let gets = fake.get_count();
    let cache = open(dir.path()).await;
    assert!(cache.is_complete(&fake.version("key")));
    assert!(read_all(&reader(&cache, &fake), MIB).await.unwrap() == data);
    assert_eq!(fake.get_count(), gets, "read from disk");
    let file = std::fs::OpenOptions::new().write(true).open(&data_files(dir.path())[0]).unwrap();
    file.write_all_at(b"rot", MIB as u64 + 3).unwrap();
    assert!(read_all(&reader(&cache, &fake), MIB).await.unwrap() == data);
    assert_eq!(fake.get_count(), gets + 1);
    assert_eq!(fake.gets.lock()[gets], MIB as u64..MIB as u64 + BLOCK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adopted_file_is_read_without_a_request_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(5 * MIB + 1, 14);
    let fake = Fake::new(data.clone(), "e");
    let cache = open(dir.path()).await;
    let spool = dir.path().join("spool");
    std::fs::write(&spool, &data).unwrap();
    cache.adopt(fake.version("key"), &spool).await.unwrap();
    assert!(!spool.exists() && cache.is_complete(&fake.version("key")));
    assert!(read_all(&reader(&cache, &fake), 300_000).await.unwrap() == data);
    cache.shutdown().await;
    close(cache).await;
    let cache = open(dir.path()).await;
    assert!(read_all(&reader(&cache, &fake), 300_000).await.unwrap() == data);
    assert_eq!((fake.get_count(), cache.usage().files), (0, 1));
    cache.remove("bucket", "key").await;
    assert_eq!((cache.usage(), data_files(dir.path()).len()), (CacheUsage::default(), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_gives_way_to_others_on_its_disk() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new(content(5 * MIB, 15), "e");
    let cache = open(dir.path()).await;
    read_all(&reader(&cache, &fake), 300_000).await.unwrap();
    cache.give_way(0);
    assert_eq!(cache.usage().files, 1, "there is room enough");
    cache.give_way(u64::MAX / 2);
    assert_eq!((cache.usage(), data_files(dir.path()).len()), (CacheUsage::default(), 0));
    assert_eq!(read_all(&reader(&cache, &fake), 300_000).await.unwrap().len(), 5 * MIB, "it is fetched again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_and_its_readers_follow_a_new_name() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(2 * MIB, 15);
    let (cache, fake) = (open(dir.path()).await, Fake::new(data.clone(), "e"));
    let old = reader(&cache, &fake);
    old.read(0, MIB).await.unwrap();
    let from = fake.version("key");
    fake.current.lock().as_mut().unwrap().etag = ETag::new("copy");
    let to = fake.version("renamed");
    cache.rekey(&from, &to).await;
    let before = fake.asked();
    assert!(read_all(&old, MIB).await.unwrap() == data);
    assert!(read_all(&cache.reader(Arc::clone(&fake) as Arc<dyn Store>, to.clone()), MIB).await.unwrap() == data);
    assert_eq!(fake.asked() - before, MIB as u64);
    assert!(cache.is_complete(&to) && !cache.is_complete(&from));
    cache.shutdown().await;
    drop(old);
    close(cache).await;
    assert!(open(dir.path()).await.is_complete(&to));
}

/// The kernel's read-ahead reads a segment's size at a time, off a segment's multiples.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_reads_in_order_is_answered_without_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(64 * MIB, 23);
    let (cache, fake) = (open(dir.path()).await, Fake::new(data.clone(), "e"));
    let reader = reader(&cache, &fake);
    let (mut at, mut whole) = (0, 0);
    for size in [MIB / 4, MIB / 2].into_iter().chain(std::iter::repeat_n(MIB, 60)) {
        let first = reader.read(at, size).await.unwrap();
        let second = reader.read(at, size).await.unwrap();
        assert!(first == data[at as usize..][..size]);
        // Joined of two segments, each would be memory of its own.
        whole += u32::from(first.as_ptr() == second.as_ptr());
        at += size as u64;
    }
    assert!(whole > 45, "{whole} of 60");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_size_bound_holds_and_readers_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(24 * MIB, 16);
    let fake = Fake::new(data.clone(), "e");
    let cache = Cache::open(CacheConfig { max_size: 8 << 20, ..config(dir.path()) }).await.unwrap();
    let (one, two) = (reader(&cache, &fake), reader(&cache, &fake));
    for _ in 0..2 {
        let asked = fake.asked();
        assert!(read_all(&one, 200_000).await.unwrap() == data);
        assert!(fake.asked() - asked <= data.len() as u64 * 11 / 10, "{}", fake.asked() - asked);
        assert!(read_all(&two, MIB).await.unwrap() == data);
        assert!(cache.usage().bytes <= 8 << 20);
    }
    assert!(fake.get_count() < 300, "{}", fake.get_count());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_disk_reads_go_through_memory() {
    let dir = tempfile::tempdir().unwrap();
    let data = content(24 * MIB, 17);
    let fake = Fake::new(data.clone(), "e");
    let file = dir.path().join("a file");
    std::fs::write(&file, "").unwrap();
    let no_dir = config(&file);
    let no_space = CacheConfig { min_free_space: u64::MAX, ..config(dir.path()) };
    let no_memory = CacheConfig { memory_limit: 1 << 20, ..no_dir.clone() };
    for config in [no_dir, no_space, no_memory] {
        let cache = Cache::open(config).await.unwrap();
        assert!(read_all(&reader(&cache, &fake), 128 * 1024).await.unwrap() == data);
        assert!(reader(&cache, &fake).read(5 << 20, MIB).await.unwrap() == data[5 * MIB..6 * MIB]);
        assert_eq!(cache.usage().bytes, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_plain_http_a_whole_object_is_compared_with_its_checksum() {
    let data = content(6 * MIB + 9, 18);
    let md5: String = Md5::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
    let crc = Checksum::Crc64Nvme(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &data));
    for (etag, checksum) in [(md5.as_str(), None), ("e-3", Some(crc))] {
        let dir = tempfile::tempdir().unwrap();
        let cache = open_http(dir.path()).await;
        let fake = Fake::new(data.clone(), etag);
        fake.current.lock().as_mut().unwrap().checksum = checksum;
        fake.fail([Fault::Short(usize::MAX), Fault::Flip(99)]);
        let pinned = reader(&cache, &fake);
        let damaged = read_all(&pinned, 100_000).await;
        assert!(matches!(damaged, Err(CacheError::Damaged(_))), "{:?}", damaged.map(|bytes| bytes.len()));
        assert_eq!(cache.usage().files, 0);
        // The file itself goes a moment after the entry.
        while !data_files(dir.path()).is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let again = pinned.read(0, 10).await;
        assert!(matches!(again, Err(CacheError::Damaged(_))), "who was given damaged bytes is given no others after them");
        assert!(read_all(&reader(&cache, &fake), 100_000).await.unwrap() == data, "fetched again");
        assert_eq!(fake.heads.load(Ordering::SeqCst), if checksum.is_some() { 2 } else { 0 });
        cache.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_plain_http_an_object_larger_than_the_cache_is_compared_too() {
    let data = content(24 * MIB, 21);
    let md5: String = Md5::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
    for flip in [None, Some(70_000)] {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(CacheConfig { max_size: 8 << 20, checks_ranges_over_http: true, ..config(dir.path()) }).await.unwrap();
        let fake = Fake::new(data.clone(), &md5);
        fake.fail(flip.map(Fault::Flip));
        match read_all(&reader(&cache, &fake), 100_000).await {
            Ok(all) => assert!(flip.is_none() && all == data),
            Err(error) => assert!(flip.is_some() && matches!(error, CacheError::Damaged(_))),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_plain_http_an_object_of_one_get_is_never_given_damaged() {
    for disk in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("a file");
        std::fs::write(&blocked, "").unwrap();
        let cache = open_http(if disk { dir.path() } else { &blocked }).await;
        let data = content(100_000, 19);
        let fake = Fake::new(data.clone(), &Md5::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        fake.fail([Fault::Flip(70_000)]);
        assert_eq!(reader(&cache, &fake).read(0, 10).await.unwrap(), data[..10], "fetched again");
        assert_eq!(fake.get_count(), 2);
        let other = tempfile::tempdir().unwrap();
        let cache = open_http(other.path()).await;
        fake.fail(vec![Fault::Flip(70_000); 100]);
        assert!(matches!(reader(&cache, &fake).read(0, 10).await, Err(CacheError::Damaged(_))));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_early_stops_its_fetches() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, fake) = (open(dir.path()).await, Fake::new(content(128 * MIB, 20), "e"));
    *fake.pace.lock() = Duration::from_millis(1);
    let reader = reader(&cache, &fake);
    for n in 0..64 {
        reader.read(n * 128 * 1024, 128 * 1024).await.unwrap();
    }
    drop(reader);
    let stopped = fake.sent.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let after = fake.sent.load(Ordering::SeqCst);
    assert!(after - stopped <= 16 * 512 * 1024, "{}", after - stopped);
    assert_eq!(fake.open.load(Ordering::SeqCst), 0);
}

mod model {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Read(prop::sample::Index, usize),
        Sequential(prop::sample::Index, u8),
        Fail(usize, bool),
        Rot(prop::sample::Index),
        CutSidecar(prop::sample::Index),
        Restart,
        Crash,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (any::<prop::sample::Index>(), 1usize..400_000).prop_map(|(at, len)| Step::Read(at, len)),
            2 => (any::<prop::sample::Index>(), 1u8..12).prop_map(|(at, n)| Step::Sequential(at, n)),
            1 => (0usize..300_000, any::<bool>()).prop_map(|(at, short)| Step::Fail(at, short)),
            2 => any::<prop::sample::Index>().prop_map(Step::Rot),
            1 => any::<prop::sample::Index>().prop_map(Step::CutSidecar),
            1 => Just(Step::Restart),
            1 => Just(Step::Crash),
        ]
    }

    fn rot(dir: &Path, at: prop::sample::Index) {
        for path in data_files(dir) {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
            let len = file.metadata().unwrap().len();
            if len > 0 {
                let place = at.index(len as usize) as u64;
                let mut byte = [0];
                file.read_exact_at(&mut byte, place).unwrap();
                file.write_all_at(&[!byte[0]], place).unwrap();
            }
        }
    }

    async fn check(size: usize, max_size: u64, steps: Vec<Step>) {
        let dir = tempfile::tempdir().unwrap();
        let data = content(size, size as u64);
        let fake = Fake::new(data.clone(), "e");
        // Little memory, so that most reads come from the file.
        let config = CacheConfig { max_size, memory_limit: 1 << 20, ..config(dir.path()) };
        let mut cache = Cache::open(config.clone()).await.unwrap();
        let mut reader = super::reader(&cache, &fake);
        for step in steps {
            match step {
                Step::Read(at, len) => {
                    let at = at.index(size);
                    assert!(reader.read(at as u64, len).await.unwrap() == data[at..size.min(at + len)], "{at} {len}");
                }
                Step::Sequential(at, n) => {
                    let at = at.index(size);
                    for start in (at..size).step_by(70_000).take(n.into()) {
                        assert!(reader.read(start as u64, 70_000).await.unwrap() == data[start..size.min(start + 70_000)], "{start}");
                    }
                }
                Step::Fail(at, short) => fake.fail([if short { Fault::Short(at) } else { Fault::Reset(at) }]),
                Step::Rot(at) => rot(dir.path(), at),
                Step::CutSidecar(at) => {
                    cache.shutdown().await;
                    for path in data_files(dir.path()).into_iter().map(|path| path.with_extension("sums")) {
                        if let Ok(record) = std::fs::read(&path) {
                            std::fs::write(&path, &record[..at.index(record.len() + 1)]).unwrap();
                        }
                    }
                }
                Step::Restart | Step::Crash => {
                    if matches!(step, Step::Restart) {
                        cache.shutdown().await;
                    }
                    drop(reader);
                    close(cache).await;
                    cache = Cache::open(config.clone()).await.unwrap();
                    reader = super::reader(&cache, &fake);
                }
            }
            assert!(cache.usage().bytes <= max_size);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn reads_are_the_object_whatever_happens_to_the_cache(
            size in 1usize..4_000_000,
            max_size in prop_oneof![Just(600_000u64), Just(1 << 30)],
            steps in prop::collection::vec(step(), 1..40),
        ) {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(check(size, max_size, steps));
        }
    }
}
