//! Memory of the cache: the blocks that came last, and buffers that are used again.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

/// Blocks fetched a moment ago: a reader that keeps up with the network gets them without a pread, and where there is no
/// disk they are the cache. Bounded in bytes, of whole segments: one is in memory as long as any block of it.
#[derive(Debug)]
pub struct Recent {
    inner: Mutex<RecentInner>,
    limit: usize,
}

#[derive(Debug)]
struct RecentInner {
    blocks: LruCache<(u64, u64), Held>,
    /// How many blocks of each segment are here, by the segment's address.
    segments: HashMap<usize, usize>,
    bytes: usize,
}

impl RecentInner {
    fn keep(&mut self, key: (u64, u64), held: Held) {
        let blocks = self.segments.entry(held.segment.as_ptr().addr()).or_default();
        *blocks += 1;
        if *blocks == 1 {
            self.bytes += held.segment.len();
        }
        if let Some(old) = self.blocks.put(key, held) {
            self.let_go(&old);
        }
    }

    fn let_go(&mut self, held: &Held) {
        let address = held.segment.as_ptr().addr();
        let Some(blocks) = self.segments.get_mut(&address) else { return };
        *blocks -= 1;
        if *blocks == 0 {
            self.segments.remove(&address);
            self.bytes -= held.segment.len();
        }
    }
}

/// A block, as the part of the segment that it came in: blocks of one segment are joined without a copy.
#[derive(Clone, Debug)]
struct Held {
    segment: Bytes,
    part: Range<usize>,
}

impl Held {
    fn bytes(&self) -> Bytes {
        self.segment.slice(self.part.clone())
    }

    /// True when `next` follows in the same segment.
    fn goes_on_in(&self, next: &Held) -> bool {
        self.segment.as_ptr() == next.segment.as_ptr() && self.part.end == next.part.start
    }
}

impl Recent {
    /// Holds at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { inner: Mutex::new(RecentInner { blocks: LruCache::unbounded(), segments: HashMap::new(), bytes: 0 }), limit }
    }

    /// The bound, in bytes.
    pub fn limit(&self) -> u64 {
        self.limit as u64
    }

    /// Keeps blocks of the entry `uid` from `first` on, of `size` bytes each but the last, letting the oldest go.
    pub fn put(&self, uid: u64, first: u64, segment: &Bytes, size: usize) {
        let mut inner = self.inner.lock();
        for (block, start) in (first..).zip((0..segment.len()).step_by(size)) {
            let part = start..segment.len().min(start + size);
            inner.keep((uid, block), Held { segment: segment.clone(), part });
        }
        while inner.bytes > self.limit {
            let Some((_, old)) = inner.blocks.pop_lru() else { break };
            inner.let_go(&old);
        }
    }

    /// A block, where it is still here.
    pub fn get(&self, uid: u64, block: u64) -> Option<Bytes> {
        self.inner.lock().blocks.get(&(uid, block)).map(Held::bytes)
    }

    /// A block, where it is still here; it ages as before.
    pub fn peek(&self, uid: u64, block: u64) -> Option<Bytes> {
        self.inner.lock().blocks.peek(&(uid, block)).map(Held::bytes)
    }

    /// All of these blocks joined, or nothing.
    pub fn join(&self, uid: u64, blocks: Range<u64>, buffers: &Arc<Buffers>) -> Option<Bytes> {
        let parts = {
            let mut inner = self.inner.lock();
            if !inner.blocks.contains(&(uid, blocks.start)) {
                return None;
            }
            blocks.map(|block| inner.blocks.get(&(uid, block)).cloned()).collect::<Option<Vec<_>>>()?
        };
        if let (Some(first), Some(last)) = (parts.first(), parts.last())
            && parts.windows(2).all(|pair| pair[0].goes_on_in(&pair[1]))
        {
            return Some(first.segment.slice(first.part.start..last.part.end));
        }
        let mut joined = buffers.take(parts.iter().map(|held| held.part.len()).sum());
        let mut rest = joined.as_mut();
        for held in &parts {
            let (to, after) = rest.split_at_mut(held.part.len());
            to.copy_from_slice(&held.segment[held.part.clone()]);
            rest = after;
        }
        Some(joined.freeze())
    }

    /// These blocks were read to their end, and are on disk: they go first.
    pub fn spend(&self, uid: u64, blocks: Range<u64>) {
        let mut inner = self.inner.lock();
        blocks.for_each(|block| _ = inner.blocks.demote(&(uid, block)));
    }

    /// Forgets the blocks of an entry.
    pub fn forget(&self, uid: u64) {
        let mut inner = self.inner.lock();
        let gone: Vec<_> = inner.blocks.iter().map(|(key, _)| *key).filter(|key| key.0 == uid).collect();
        for key in gone {
            if let Some(old) = inner.blocks.pop(&key) {
                inner.let_go(&old);
            }
        }
    }
}

/// Smaller buffers are cheaper to make than to keep.
const POOLED_FROM: usize = 64 << 10;

/// Read buffers, used again: a fresh one of 1 MiB costs 256 page faults and its zeroing.
#[derive(Debug)]
pub struct Buffers {
    idle: Mutex<(VecDeque<Vec<u8>>, usize)>,
    limit: usize,
}

impl Buffers {
    /// Keeps at most `limit` idle bytes.
    pub fn new(limit: usize) -> Self {
        Self { idle: Mutex::default(), limit }
    }

    /// A buffer of exactly `len` bytes, of any content.
    pub fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let rounded = len.next_power_of_two().max(4096);
        let found = {
            let mut idle = self.idle.lock();
            let at = idle.0.iter().rposition(|buffer| buffer.len() == rounded);
            at.and_then(|at| {
                idle.1 -= rounded;
                idle.0.remove(at)
            })
        };
        Buffer { bytes: found.unwrap_or_else(|| vec![0; rounded]), len, pool: Arc::clone(self) }
    }

    fn give_back(&self, buffer: Vec<u8>) {
        if buffer.len() < POOLED_FROM || buffer.len() > self.limit {
            return;
        }
        let mut idle = self.idle.lock();
        idle.1 += buffer.len();
        idle.0.push_back(buffer);
        // Sizes that nobody has asked for lately make room for those that are in use.
        while idle.1 > self.limit {
            let Some(oldest) = idle.0.pop_front() else { break };
            idle.1 -= oldest.len();
        }
    }
}

/// A buffer of a pool; it goes back there when the last [`Bytes`] made of it is dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    pool: Arc<Buffers>,
}

impl Buffer {
    /// The bytes, to be filled.
    pub fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }

    /// Leaves out what follows.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Hands the bytes out without copying them.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn recent_is_bounded_and_joins() {
        let recent = Recent::new(30);
        for block in 0..4 {
            recent.put(1, block, &Bytes::from(vec![block as u8; 10]), 10);
        }
        let buffers = Arc::new(Buffers::new(0));
        assert!(recent.join(1, 0..2, &buffers).is_none());
        assert_eq!(recent.join(1, 1..3, &buffers).unwrap(), [[1u8; 10], [2; 10]].concat());
        let segment = Bytes::from((0..25).collect::<Vec<u8>>());
        recent.put(1, 7, &segment, 10);
        let joined = recent.join(1, 8..10, &buffers).unwrap();
        assert_eq!((joined.as_ptr(), joined.len()), (segment[10..].as_ptr(), 15), "one segment is not copied");
        assert_eq!(recent.join(1, 7..8, &buffers).unwrap(), segment[..10]);
        recent.forget(1);
        assert!(recent.peek(1, 3).is_none());
    }

    #[test]
    fn what_was_read_goes_before_what_was_not() {
        let recent = Recent::new(30);
        (0..3).for_each(|block| recent.put(1, block, &Bytes::from(vec![0; 10]), 10));
        recent.spend(1, 1..3);
        (3..5).for_each(|block| recent.put(1, block, &Bytes::from(vec![0; 10]), 10));
        let here: Vec<_> = (0..5).map(|block| recent.peek(1, block).is_some()).collect();
        assert_eq!(here, [true, false, false, true, true]);
    }

    /// A block that is read again and again keeps its segment in memory, and is counted for it.
    #[test]
    fn whole_segments_are_counted() {
        let (pool, recent) = (Arc::new(Buffers::new(0)), Recent::new(4 << 20));
        let mut segments = Vec::new();
        struct Counted(Vec<u8>, #[expect(dead_code, reason = "dropped with the bytes")] Arc<()>);
        impl AsRef<[u8]> for Counted {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        for number in 0..50 {
            let token = Arc::new(());
            segments.push(Arc::downgrade(&token));
            recent.put(1, number * 16, &Bytes::from_owner(Counted(vec![0; 1 << 20], token)), 64 << 10);
            recent.join(1, number * 16 + 3..number * 16 + 4, &pool).unwrap();
            recent.spend(1, number * 16..number * 16 + 16);
            recent.get(1, number * 16 + 3);
        }
        let here = segments.iter().filter(|segment| segment.strong_count() > 0).count();
        assert!(here <= 4, "{here} MiB");
        recent.forget(1);
        let inner = recent.inner.lock();
        assert_eq!((inner.bytes, inner.segments.len()), (0, 0));
    }

    #[test]
    fn the_pool_keeps_what_was_used_last() {
        let pool = Arc::new(Buffers::new(8 << 20));
        drop((0..128).map(|_| pool.take(64 << 10)).collect::<Vec<_>>());
        drop(pool.take(1 << 20));
        let idle = pool.idle.lock();
        assert!(idle.1 <= 8 << 20 && idle.0.iter().any(|buffer| buffer.len() == 1 << 20));
    }

    #[test]
    fn buffers_are_used_again() {
        let pool = Arc::new(Buffers::new(1 << 20));
        let mut one = pool.take(100_000);
        one.as_mut()[99_999] = 7;
        let bytes = one.freeze();
        assert_eq!((bytes.len(), bytes[99_999]), (100_000, 7));
        drop(bytes);
        assert_eq!(pool.idle.lock().1, 131_072);
        assert_eq!(pool.take(131_000).as_mut().len(), 131_000);
        assert_eq!(pool.idle.lock().1, 131_072);
    }
}
