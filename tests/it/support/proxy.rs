//! Distance: a TCP proxy that adds a round trip and caps what one connection carries. The benchmark uses it too.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::wiretap::Wiretap;

/// What lies between client and store.
#[derive(Clone, Copy, Debug)]
pub struct Distance {
    /// Added round-trip time; a new connection pays it once more for its handshake.
    pub round_trip: Duration,
    /// Bytes per second that a connection carries each way.
    pub bandwidth: u64,
}

/// A connection that carries this much within [`WINDOW`] is busy: requests and answers without bytes are not.
const BUSY: u64 = 64 << 10;
const WINDOW: Duration = Duration::from_millis(100);

#[derive(Default)]
struct Meter {
    open: AtomicUsize,
    busy_peak: AtomicUsize,
    open_peak: AtomicUsize,
    up: AtomicU64,
    down: AtomicU64,
    requests: Wiretap,
    connections: parking_lot::Mutex<Vec<std::sync::Weak<AtomicU64>>>,
}

/// A running proxy; it ends with this value.
pub struct Proxy {
    address: SocketAddr,
    meter: Arc<Meter>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on a free loopback port and forwards to `target`.
    pub fn start(target: SocketAddr, distance: Distance) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let meter = Arc::new(Meter::default());
        let (stop, mut stopped) = watch::channel(false);
        let theirs = Arc::clone(&meter);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let clock = Clock::start()?;
        let thread = std::thread::Builder::new().name("proxy".to_owned()).spawn(move || {
            runtime.block_on(async move {
                tokio::select! {
                    _ = accept(listener, target, distance, &clock, &theirs) => {}
                    () = watch_busy(&theirs) => {}
                    _ = stopped.changed() => {}
                }
            });
        })?;
        Ok(Self { address, meter, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Most connections that carried data at one time.
    pub fn peak_busy(&self) -> usize {
        self.meter.busy_peak.load(Ordering::Relaxed)
    }

    /// Most connections that were open at one time.
    pub fn peak_open(&self) -> usize {
        self.meter.open_peak.load(Ordering::Relaxed)
    }

    /// Requests that passed, by kind.
    pub fn requests(&self) -> &Wiretap {
        &self.meter.requests
    }

    /// Forgets the peaks, the bytes and the requests so far.
    pub fn reset(&self) {
        self.meter.busy_peak.store(0, Ordering::Relaxed);
        self.meter.open_peak.store(self.meter.open.load(Ordering::Relaxed), Ordering::Relaxed);
        self.meter.up.store(0, Ordering::Relaxed);
        self.meter.down.store(0, Ordering::Relaxed);
        self.meter.requests.reset();
    }

    /// Bytes carried to the store.
    pub fn bytes_up(&self) -> u64 {
        self.meter.up.load(Ordering::Relaxed)
    }

    /// Bytes carried from the store.
    pub fn bytes_down(&self) -> u64 {
        self.meter.down.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(
    listener: std::net::TcpListener,
    target: SocketAddr,
    distance: Distance,
    clock: &Clock,
    meter: &Arc<Meter>,
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (client, _) = listener.accept().await?;
        let (clock, meter) = (clock.clone(), Arc::clone(meter));
        tokio::spawn(async move {
            let open = meter.open.fetch_add(1, Ordering::Relaxed) + 1;
            meter.open_peak.fetch_max(open, Ordering::Relaxed);
            // The peers see the connection's end; there is nobody else to tell.
            let _ = carry(client, target, distance, &clock, &meter).await;
            meter.open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

async fn carry(client: TcpStream, target: SocketAddr, distance: Distance, clock: &Clock, meter: &Arc<Meter>) -> io::Result<()> {
    let store = TcpStream::connect(target).await?;
    client.set_nodelay(true)?;
    store.set_nodelay(true)?;
    let moved = Arc::new(AtomicU64::new(0));
    meter.connections.lock().push(Arc::downgrade(&moved));
    let handshake_ends = Instant::now() + distance.round_trip;
    let (client_in, client_out) = client.into_split();
    let (store_in, store_out) = store.into_split();
    let line = Line { distance, not_before: handshake_ends, clock: clock.clone(), moved, meter: Arc::clone(meter) };
    let lane = |from, to, asks| one_way(from, to, asks, line.clone());
    let up = tokio::spawn(lane(client_in, store_out, true));
    let down = tokio::spawn(lane(store_in, client_out, false));
    let _ = tokio::join!(up, down);
    Ok(())
}

/// What both directions of a connection share.
#[derive(Clone)]
struct Line {
    distance: Distance,
    /// The end of its handshake.
    not_before: Instant,
    clock: Clock,
    /// Bytes that it has carried.
    moved: Arc<AtomicU64>,
    meter: Arc<Meter>,
}

/// One direction (`asks`: the one that requests take): read at the connection's rate, deliver half a round trip later.
async fn one_way(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, asks: bool, line: Line) -> io::Result<()> {
    let Line { distance, not_before, clock, moved, meter } = line;
    // What is under way is bounded by the line: bandwidth times half a round trip, in chunks, and some to spare.
    let (sender, mut receiver) = mpsc::channel::<(Instant, BytesMut)>(64);
    let reader = async move {
        let mut free_at = not_before;
        loop {
            let mut chunk = BytesMut::with_capacity(64 << 10);
            let count = from.read_buf(&mut chunk).await?;
            if count == 0 {
                return Ok::<(), io::Error>(());
            }
            if asks {
                meter.requests.note(&chunk);
            }
            let now = Instant::now();
            free_at = free_at.max(now) + Duration::from_secs_f64(count as f64 / distance.bandwidth as f64);
            if sender.send((free_at + distance.round_trip / 2, chunk)).await.is_err() {
                return Ok(());
            }
            if asks { &meter.up } else { &meter.down }.fetch_add(count as u64, Ordering::Relaxed);
            // Timers tick in milliseconds: shorter waits are saved up.
            if free_at > now + Duration::from_millis(2) {
                sleep_until(free_at).await;
            }
        }
    };
    let writer = async move {
        while let Some((when, chunk)) = receiver.recv().await {
            clock.until(when).await;
            to.write_all(&chunk).await?;
            // Counted where it arrives: a store slower than the line keeps a connection busy for as long as it takes.
            moved.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        }
        to.shutdown().await
    };
    tokio::try_join!(reader, writer).map(|_| ())
}

/// Waits as precisely as the kernel can. tokio's timers tick in milliseconds and end later than asked: on a way of 10 ms that is a tenth.
#[derive(Clone)]
struct Clock(std::sync::mpsc::Sender<(Instant, oneshot::Sender<()>)>);

impl Clock {
    /// Its thread ends with the last of its clones.
    fn start() -> io::Result<Self> {
        let (sender, wishes) = std::sync::mpsc::channel::<(Instant, oneshot::Sender<()>)>();
        let mut waiting: BTreeMap<(Instant, u64), oneshot::Sender<()>> = BTreeMap::new();
        std::thread::Builder::new().name("proxy-clock".to_owned()).spawn(move || {
            for number in 0.. {
                let now = Instant::now();
                let later = waiting.split_off(&(now, u64::MAX));
                // Who does not wait any more is not told.
                for due in std::mem::replace(&mut waiting, later).into_values() {
                    let _ = due.send(());
                }
                let next = waiting.first_key_value().map(|((when, _), _)| when.saturating_duration_since(now));
                let wish = match next {
                    Some(left) => wishes.recv_timeout(left),
                    None => wishes.recv().map_err(RecvTimeoutError::from),
                };
                match wish {
                    Ok((when, told)) => drop(waiting.insert((when, number), told)),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        })?;
        Ok(Self(sender))
    }

    async fn until(&self, when: Instant) {
        let (told, due) = oneshot::channel();
        if when > Instant::now() && self.0.send((when, told)).is_ok() {
            let _ = due.await;
        }
    }
}

async fn watch_busy(meter: &Arc<Meter>) {
    let mut before: Vec<(std::sync::Weak<AtomicU64>, u64)> = Vec::new();
    loop {
        tokio::time::sleep(WINDOW).await;
        let mut busy = 0;
        for (connection, seen) in &mut before {
            let now = connection.upgrade().map_or(*seen, |moved| moved.load(Ordering::Relaxed));
            busy += usize::from(now >= *seen + BUSY);
            *seen = now;
        }
        before.retain(|(connection, _)| connection.strong_count() > 0);
        before.extend(meter.connections.lock().drain(..).map(|connection| (connection, 0)));
        meter.busy_peak.fetch_max(busy, Ordering::Relaxed);
    }
}
