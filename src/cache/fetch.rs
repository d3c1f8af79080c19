//! Flights: GETs that bring blocks to an entry. A block has at most one flight; everybody who wants it waits for that one.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::CacheError;
use super::block::{BLOCK, blocks_of, bytes_of};
use super::download::{Download, SEGMENT};
use super::entry::Entry;
use super::inner::Inner;
use crate::s3::{ObjectHead, Store};

/// What keeps a flight going beside the reads that wait for it: the reader it was launched for, while it does not seek.
pub type Hold = Arc<Reading>;

/// How the reader reads.
#[derive(Debug, Default)]
pub struct Reading {
    phase: AtomicU64,
    gone: CancellationToken,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

impl Reading {
    /// A read of these bytes. The kernel's read-ahead asks for as much as a segment at a time, seldom at a segment's multiples: its first
    /// windows are smaller.
    pub fn note(&self, range: &Range<u64>) {
        if range.end - range.start >= SEGMENT as u64 {
            self.phase.store(range.start % SEGMENT as u64 / BLOCK * BLOCK, Ordering::Relaxed);
        }
    }

    /// Where its reads begin, in bytes after a multiple of a segment.
    pub fn phase(&self) -> u64 {
        self.phase.load(Ordering::Relaxed)
    }
}

/// How a flight ended.
#[derive(Clone, Debug)]
pub enum End {
    /// All blocks landed.
    Landed,
    /// Nobody wanted it any more.
    Cancelled,
    /// It could not bring the rest.
    Failed(CacheError),
}

#[derive(Debug)]
struct Progress {
    /// The first block that has not landed.
    next: u64,
    end: Option<End>,
}

/// A GET under way.
#[derive(Debug)]
pub struct Flight {
    /// What it brings.
    pub blocks: Range<u64>,
    hold: Weak<Reading>,
    /// The reader went, or seeks.
    gone: CancellationToken,
    awaited: Awaited,
    progress: watch::Sender<Progress>,
}

/// The blocks that reads wait for.
#[derive(Debug, Default)]
pub struct Awaited {
    blocks: Mutex<Vec<u64>>,
    more: Notify,
    none: Notify,
}

impl Awaited {
    /// Somebody waits for a block before this one.
    pub fn before(&self, block: u64) -> bool {
        self.blocks.lock().iter().any(|awaited| *awaited < block)
    }

    /// Ends when somebody more waits, perhaps since before this was called.
    pub async fn more(&self) {
        self.more.notified().await;
    }

    fn by_nobody(&self) -> bool {
        self.blocks.lock().is_empty()
    }
}

/// A read that waits for a block.
struct Waiting<'a>(&'a Awaited, u64);

impl<'a> Waiting<'a> {
    fn new(awaited: &'a Awaited, block: u64) -> Self {
        awaited.blocks.lock().push(block);
        awaited.more.notify_one();
        Self(awaited, block)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut blocks = self.0.blocks.lock();
        if let Some(at) = blocks.iter().position(|block| *block == self.1) {
            blocks.swap_remove(at);
        }
        if blocks.is_empty() {
            self.0.none.notify_one();
        }
    }
}

impl Flight {
    fn new(blocks: Range<u64>, hold: &Hold) -> Arc<Self> {
        let progress = watch::Sender::new(Progress { next: blocks.start, end: None });
        Arc::new(Self { blocks, hold: Arc::downgrade(hold), gone: hold.gone.clone(), awaited: Awaited::default(), progress })
    }

    /// True when the block is yet to come from this flight.
    pub fn brings(&self, block: u64) -> bool {
        let progress = self.progress.borrow();
        progress.end.is_none() && block >= progress.next && block < self.blocks.end
    }

    /// Waits until the block has landed or the flight has ended, and keeps the flight going meanwhile.
    pub async fn wait(&self, block: u64) -> End {
        let _waiting = Waiting::new(&self.awaited, block);
        let mut progress = self.progress.subscribe();
        loop {
            {
                let now = progress.borrow_and_update();
                if let Some(end) = &now.end {
                    return end.clone();
                }
                if now.next > block {
                    return End::Landed;
                }
            }
            if progress.changed().await.is_err() {
                return End::Cancelled;
            }
        }
    }

    /// Ends once nobody wants it.
    async fn unwanted(&self) {
        self.gone.cancelled().await;
        while !self.awaited.by_nobody() {
            self.awaited.none.notified().await;
        }
    }
}

/// Ends a flight whatever happens to its task, and takes it off its entry.
struct Landing {
    entry: Arc<Entry>,
    flight: Arc<Flight>,
    end: End,
}

impl Landing {
    fn download(&self, inner: &Inner, store: &Arc<dyn Store>, bytes: Range<u64>) -> Download {
        let reading = Weak::clone(&self.flight.hold);
        Download::new(Arc::clone(&self.entry), Arc::clone(store), &inner.buffers, reading, bytes)
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let end = std::mem::replace(&mut self.end, End::Cancelled);
        self.flight.progress.send_modify(|progress| progress.end = Some(end));
        self.entry.state().flights.retain(|flight| !Arc::ptr_eq(flight, &self.flight));
    }
}

/// Fetches what of `blocks` is neither here nor on its way, in GETs of at most `piece` bytes, and gives their flights: who waits
/// for one must hold it, lest it fails unseen. `ahead`: nobody waits for it yet, and the GETs are cut at multiples of `piece`.
pub fn launch(
    inner: &Arc<Inner>,
    entry: &Arc<Entry>,
    store: &Arc<dyn Store>,
    blocks: Range<u64>,
    piece: u64,
    ahead: bool,
    hold: &Hold,
) -> Vec<Arc<Flight>> {
    let landings = register(inner, entry, blocks, piece, ahead, hold);
    if ahead && !landings.is_empty() && entry.wants_checksum() {
        let (entry, store) = (Arc::clone(entry), Arc::clone(store));
        tokio::spawn(async move { entry.ask_checksum(&store).await });
    }
    let flights = landings.iter().map(|landing| Arc::clone(&landing.flight)).collect();
    for landing in landings {
        let (inner, store) = (Arc::clone(inner), Arc::clone(store));
        tokio::spawn(async move {
            // Read-ahead leaves some connections to those who wait; it takes its own permit first.
            let _ahead = if ahead { inner.ahead.acquire().await.ok() } else { None };
            let _connection = inner.connections.acquire().await.ok();
            let bytes = bytes_of(landing.flight.blocks.clone(), landing.entry.size);
            let download = landing.download(&inner, &store, bytes);
            fly(Arc::clone(&inner), landing, download, ahead.then_some(store)).await;
        });
    }
    flights
}

/// Fetches the head of the object by a GET, if none of its first `bytes` are here or coming, and gives the head of the answer.
/// The body lands in the background.
pub async fn open(
    inner: &Arc<Inner>,
    entry: &Arc<Entry>,
    store: &Arc<dyn Store>,
    bytes: u64,
    hold: &Hold,
) -> Option<Result<ObjectHead, CacheError>> {
    let blocks = blocks_of(0..bytes);
    let mut landings = register(inner, entry, blocks.clone(), u64::MAX, false, hold);
    let mut landing = match landings.pop() {
        Some(landing) if landing.flight.blocks == blocks => landing,
        _ => return None,
    };
    let connection = Arc::clone(&inner.connections).acquire_owned().await.ok();
    let mut download = landing.download(inner, store, 0..bytes);
    let head = download.open().await;
    match &head {
        Ok(_) => {
            let inner = Arc::clone(inner);
            tokio::spawn(async move {
                fly(inner, landing, download, None).await;
                drop(connection);
            });
        }
        Err(error) => landing.end = End::Failed(error.clone()),
    }
    Some(head)
}

fn register(inner: &Inner, entry: &Arc<Entry>, blocks: Range<u64>, piece: u64, aligned: bool, hold: &Hold) -> Vec<Landing> {
    let most = (piece / BLOCK).max(1);
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut state = entry.state();
    if state.detached {
        return Vec::new();
    }
    let on_disk = state.file.is_some();
    for block in blocks {
        let here = state.blocks.has(block)
            || state.trusted
            || state.flights.iter().any(|flight| flight.brings(block))
            || ((!on_disk || !inner.keeps_on_disk()) && inner.recent.get(entry.uid, block).is_some());
        if here {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == block && run.end - run.start < most && !(aligned && block % most == 0) => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    let mut landings = Vec::with_capacity(runs.len());
    for run in runs {
        let flight = Flight::new(run, hold);
        state.flights.push(Arc::clone(&flight));
        landings.push(Landing { entry: Arc::clone(entry), flight, end: End::Cancelled });
    }
    landings
}

/// `ask`: where the whole checksum comes from; nothing lands before its answer.
async fn fly(inner: Arc<Inner>, mut landing: Landing, mut download: Download, ask: Option<Arc<dyn Store>>) {
    loop {
        // The end of a nearly finished body costs less than its connection.
        let may_end = !download.is_nearly_done();
        let (wanted, came) = tokio::select! {
            biased;
            // What has come is kept.
            () = landing.flight.unwanted(), if may_end => (false, Ok(download.cut_whole_blocks())),
            came = download.next(&landing.flight.awaited) => (true, came),
        };
        let (first, data) = match came {
            Ok(Some(segment)) => segment,
            Ok(None) => {
                if wanted {
                    landing.end = End::Landed;
                }
                return;
            }
            Err(error) => {
                landing.end = End::Failed(error);
                return;
            }
        };
        if let Some(store) = &ask {
            landing.entry.ask_checksum(store).await;
        }
        let next = first + (data.len() as u64).div_ceil(BLOCK);
        let (shared, entry) = (Arc::clone(&inner), Arc::clone(&landing.entry));
        match tokio::task::spawn_blocking(move || shared.land(&entry, first, data)).await {
            Ok(Ok(())) => landing.flight.progress.send_modify(|progress| progress.next = next),
            Ok(Err(error)) => {
                landing.end = End::Failed(error);
                return;
            }
            Err(error) => {
                landing.end = End::Failed(CacheError::Io(Arc::new(std::io::Error::other(error))));
                return;
            }
        }
        if !wanted {
            return;
        }
    }
}
