//! Faults on the way to a store that is not ours: an HTTP/1.1 proxy that breaks chosen requests or their answers, byte for byte.
//!
//! It takes one request at a time off a connection, whole, and hands the store's answer back, whole: what a fault does to
//! either happens at a place that does not depend on how the kernel cuts the stream.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;

use super::double::Turns;
use super::wiretap::operation;

/// What happens to a request or to its answer.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// So much longer under way: half of it the request, half of it the answer.
    Latency(Duration),
    /// Refused with this status and S3 error code; the store hears nothing of it.
    Refusal(u16, &'static str),
    /// Refused because the clocks differ by hours; the store hears nothing of it.
    Skew,
    /// `200 OK` with an `<Error>` body; the store hears nothing of it.
    ErrorIn200(&'static str),
    /// A captive portal's page, with an ETag as web servers give one; the store hears nothing of it.
    Portal,
    /// Reset in the middle of the request's body; the store hears nothing of it.
    ResetUp,
    /// Nobody reads on from the middle of the request's body, or answers; the connection stays open.
    StallUp,
    /// One bit in the middle of the request's body is turned over.
    FlipUp,
    /// Done, and the connection is reset in the middle of the answer.
    ResetDown,
    /// Done, and the connection ends in good order in the middle of the answer.
    Truncated,
    /// Done, and the answer's body lacks its second half, as its Content-Length says.
    Shortened,
    /// Done, and the answer stops in its middle; the connection stays open.
    StallDown,
    /// Done, and one bit in the middle of the answer's body is turned over.
    FlipDown,
    /// Done, and the answer names no ETag.
    NoETag,
    /// Done, and the connection is reset instead of an answer.
    LostAnswer,
}

/// Which requests a fault is for.
#[derive(Clone, Debug)]
pub struct When {
    operations: Vec<&'static str>,
    contains: String,
    turns: Turns,
}

impl When {
    /// Requests of these operations, by S3's names (both versions of ListObjects are `ListObjects`); none named: all.
    pub fn any_of(operations: &[&'static str]) -> Self {
        Self { operations: operations.to_vec(), contains: String::new(), turns: Turns::default() }
    }

    /// Only where the request line holds this.
    pub fn containing(mut self, text: &str) -> Self {
        text.clone_into(&mut self.contains);
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
}

#[derive(Debug, Default)]
struct Shared {
    faults: Mutex<Vec<(When, Fault)>>,
    struck: AtomicU64,
}

impl Shared {
    /// The first fault that is meant for this request.
    fn take(&self, head: &[u8]) -> Option<Fault> {
        let name = operation(head)?;
        let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        for (when, fault) in self.faults.lock().iter_mut() {
            let meant = when.operations.is_empty() || when.operations.contains(&name);
            if meant && line.contains(&when.contains) && !when.turns.is_skipped() && when.turns.strike() {
                return Some(*fault);
            }
        }
        None
    }

    fn strike(&self) {
        self.struck.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether the store can be reached, and how often its connections were cut.
type Line = (bool, u64);

/// A running proxy; it ends with this value.
pub struct Faulty {
    address: SocketAddr,
    shared: Arc<Shared>,
    line: watch::Sender<Line>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Faulty {
    /// Before the store at `endpoint` (`http://ADDRESS`).
    pub fn before(endpoint: &str) -> Self {
        let target: SocketAddr = endpoint.strip_prefix("http://").unwrap().parse().unwrap();
        // Bound and never listened on: nobody else gets the port while the store is down.
        let reserved = bound(SocketAddr::from(([127, 0, 0, 1], 0)));
        let address = reserved.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let (line, lines) = watch::channel((true, 0));
        let (stop, mut stopped) = watch::channel(false);
        let theirs = Arc::clone(&shared);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let thread = std::thread::Builder::new().name("faulty".to_owned()).spawn(move || {
            runtime.block_on(async move {
                tokio::select! {
                    () = accept(address, target, &theirs, lines) => {}
                    _ = stopped.changed() => {}
                }
            });
            drop(reserved);
        });
        Self { address, shared, line, stop, thread: Some(thread.unwrap()) }
    }

    /// Where clients find the store.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on these requests suffer this fault. Of several faults for a request the first counts.
    pub fn fault(&self, when: When, fault: Fault) {
        self.shared.faults.lock().push((when, fault));
    }

    /// No faults any more.
    pub fn heal(&self) {
        self.shared.faults.lock().clear();
    }

    /// How often a fault came to pass.
    pub fn struck(&self) -> u64 {
        self.shared.struck.load(Ordering::Relaxed)
    }

    /// The store is gone (every connection is cut, none is accepted) or there again.
    pub fn set_down(&self, down: bool) {
        self.line.send_modify(|(up, cuts)| {
            *up = !down;
            *cuts += u64::from(down);
        });
        self.shared.strike();
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn bound(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

async fn accept(address: SocketAddr, target: SocketAddr, shared: &Arc<Shared>, mut line: watch::Receiver<Line>) {
    let mut listener = None;
    loop {
        if !line.borrow_and_update().0 {
            listener = None;
        } else if listener.is_none() {
            listener = Some(bound(address).listen(1024).unwrap());
        }
        let Some(open) = &listener else {
            if line.changed().await.is_err() {
                return;
            }
            continue;
        };
        let client = tokio::select! {
            client = open.accept() => client,
            _ = line.changed() => continue,
        };
        let Ok((client, _)) = client else { continue };
        let (shared, mut cut) = (Arc::clone(shared), line.clone());
        cut.mark_unchanged();
        tokio::spawn(async move {
            let mut client = Side::new(client);
            tokio::select! {
                // Whatever ends a connection, its peer sees it; there is nobody else to tell.
                _ = serve(&mut client, target, &shared) => {}
                _ = cut.wait_for(|(up, _)| !up) => client.reset(),
            }
        });
    }
}

/// Requests of one connection, one after the other.
async fn serve(client: &mut Side, target: SocketAddr, shared: &Shared) -> io::Result<()> {
    while let Some(head) = client.head().await? {
        let fault = shared.take(&head);
        let length = header(&head, "content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        match fault {
            Some(Fault::ResetUp | Fault::StallUp) => {
                client.body(length / 2).await?;
                shared.strike();
                match fault {
                    Some(Fault::ResetUp) => client.reset(),
                    _ => std::future::pending().await,
                }
                return Ok(());
            }
            Some(Fault::Latency(time)) => {
                shared.strike();
                tokio::time::sleep(time / 2).await;
            }
            _ => {}
        }
        let mut body = client.body(length).await?;
        if let Some(answer) = fault.and_then(|fault| instead(fault, head.starts_with(b"HEAD "))) {
            shared.strike();
            client.stream.write_all(&answer).await?;
            continue;
        }
        if let (Some(Fault::FlipUp), false) = (fault, body.is_empty()) {
            shared.strike();
            body = flipped(body);
        }
        let answer = ask(target, &head, &body).await?;
        if let Some(Fault::Latency(time)) = fault {
            tokio::time::sleep(time / 2).await;
        }
        let Some(fault) = fault else {
            client.stream.write_all(&answer.bytes()).await?;
            continue;
        };
        if !spoil(client, fault, answer, shared).await? {
            return Ok(());
        }
    }
    Ok(())
}

/// Hands on an answer with what the fault makes of it. False when the connection is over.
async fn spoil(client: &mut Side, fault: Fault, mut answer: Answer, shared: &Shared) -> io::Result<bool> {
    // The middle of the body, or of the head where there is none.
    let whole = answer.bytes();
    let middle = whole.len() - if answer.body.is_empty() { whole.len() / 2 } else { answer.body.len() / 2 };
    match fault {
        Fault::LostAnswer => client.reset(),
        Fault::ResetDown | Fault::Truncated | Fault::StallDown => {
            client.stream.write_all(&whole[..middle]).await?;
            // What was sent is on its way before the end follows it.
            tokio::time::sleep(Duration::from_millis(30)).await;
            match fault {
                Fault::ResetDown => client.reset(),
                Fault::Truncated => client.stream.shutdown().await?,
                _ => {
                    shared.strike();
                    std::future::pending().await
                }
            }
        }
        Fault::Shortened | Fault::FlipDown if !answer.body.is_empty() => {
            match fault {
                Fault::Shortened => answer.cut(answer.body.len() / 2),
                _ => answer.body = flipped(answer.body),
            }
            shared.strike();
            client.stream.write_all(&answer.bytes()).await?;
            return Ok(true);
        }
        Fault::NoETag => {
            answer.forget_etag();
            shared.strike();
            client.stream.write_all(&answer.bytes()).await?;
            return Ok(true);
        }
        _ => {
            client.stream.write_all(&whole).await?;
            return Ok(true);
        }
    }
    shared.strike();
    Ok(false)
}

/// The answer of a fault that keeps the request from the store.
fn instead(fault: Fault, head_only: bool) -> Option<Vec<u8>> {
    let now = SystemTime::now();
    let error = |code: &str| {
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>made by the test</Message><RequestId>FAULTY</RequestId></Error>"
        )
    };
    let (status, kind, more, date, body) = match fault {
        Fault::Refusal(status, code) => (status, "application/xml", "x-amz-request-id: FAULTY\r\n", now, error(code)),
        Fault::Skew => {
            (403, "application/xml", "x-amz-request-id: FAULTY\r\n", now - Duration::from_secs(5 * 3600), error("RequestTimeTooSkewed"))
        }
        Fault::ErrorIn200(code) => (200, "application/xml", "x-amz-request-id: FAULTY\r\n", now, error(code)),
        Fault::Portal => {
            let page = "<!DOCTYPE html><html><head><title>Welcome</title></head><body>Please log in.</body></html>";
            (
                200,
                "text/html; charset=utf-8",
                "etag: \"6718f3a0-5e\"\r\nlast-modified: Wed, 23 Oct 2024 13:01:20 GMT\r\n",
                now,
                page.to_owned(),
            )
        }
        _ => return None,
    };
    let date = httpdate::fmt_http_date(date);
    let mut answer =
        format!("HTTP/1.1 {status} Fault\r\ndate: {date}\r\ncontent-type: {kind}\r\n{more}content-length: {}\r\n\r\n", body.len());
    if !head_only {
        answer += &body;
    }
    Some(answer.into_bytes())
}

fn flipped(body: Bytes) -> Bytes {
    let mut body = body.to_vec();
    let middle = body.len() / 2;
    body[middle] ^= 0x10;
    body.into()
}

/// What the store says to a request.
async fn ask(target: SocketAddr, head: &[u8], body: &[u8]) -> io::Result<Answer> {
    let mut store = Side::new(TcpStream::connect(target).await?);
    // A store may answer before it has read the body, and read no more.
    let sent = async { store.stream.write_all(head).await.and(store.stream.write_all(body).await) }.await;
    let answered = store.head().await?.ok_or(io::ErrorKind::UnexpectedEof);
    let answered = match sent {
        Ok(()) => answered?,
        Err(error) => answered.map_err(|_| error)?,
    };
    let bare = head.starts_with(b"HEAD ") || [&b"204"[..], b"304"].contains(&answered.get(9..12).unwrap_or_default());
    let body = match header(&answered, "content-length").and_then(|length| length.parse().ok()) {
        _ if bare => Bytes::new(),
        Some(length) => store.body(length).await?,
        None if header(&answered, "transfer-encoding").is_some() => {
            let body = store.chunks().await?;
            let mut whole = Answer { head: without(&answered, "transfer-encoding"), body };
            whole.announce();
            return Ok(whole);
        }
        None => store.rest().await?,
    };
    Ok(Answer { head: answered, body })
}

struct Answer {
    head: Bytes,
    body: Bytes,
}

impl Answer {
    fn bytes(&self) -> Vec<u8> {
        [&self.head[..], &self.body].concat()
    }

    fn cut(&mut self, length: usize) {
        self.body.truncate(length);
        self.announce();
    }

    /// States the body's length.
    fn announce(&mut self) {
        let head = without(&self.head, "content-length");
        let end = head.len() - 2;
        self.head = [&head[..end], format!("content-length: {}\r\n\r\n", self.body.len()).as_bytes()].concat().into();
    }

    fn forget_etag(&mut self) {
        self.head = without(&self.head, "etag");
        let text = String::from_utf8_lossy(&self.body);
        if let Some((before, after)) = text.split_once("<ETag>").and_then(|(before, rest)| Some((before, rest.split_once("</ETag>")?.1))) {
            self.body = format!("{before}{after}").into();
            self.announce();
        }
    }
}

/// The lines of a head, each without its end.
fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line)).filter(|line| !line.is_empty())
}

fn is_named(line: &[u8], name: &str) -> bool {
    line.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name.as_bytes())) && line.get(name.len()) == Some(&b':')
}

fn header(head: &[u8], name: &str) -> Option<String> {
    let line = lines(head).skip(1).find(|line| is_named(line, name))?;
    Some(String::from_utf8_lossy(&line[name.len() + 1..]).trim().to_owned())
}

/// A head without a header.
fn without(head: &[u8], name: &str) -> Bytes {
    let mut kept = lines(head).filter(|line| !is_named(line, name)).fold(Vec::new(), |mut kept, line| {
        kept.extend_from_slice(line);
        kept.extend_from_slice(b"\r\n");
        kept
    });
    kept.extend_from_slice(b"\r\n");
    kept.into()
}

/// One end of a connection, and what was read of it and not taken yet.
struct Side {
    stream: TcpStream,
    read: BytesMut,
}

impl Side {
    fn new(stream: TcpStream) -> Self {
        let _ = stream.set_nodelay(true);
        Self { stream, read: BytesMut::new() }
    }

    /// The connection ends by a reset when it is dropped.
    fn reset(&self) {
        let _ = self.stream.set_zero_linger();
    }

    async fn more(&mut self) -> io::Result<()> {
        self.read.reserve(64 << 10);
        match self.stream.read_buf(&mut self.read).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// Up to and with the first `end`.
    async fn until(&mut self, end: &[u8]) -> io::Result<Bytes> {
        let mut looked = 0;
        loop {
            if let Some(at) = self.read[looked..].windows(end.len()).position(|bytes| bytes == end) {
                return Ok(self.read.split_to(looked + at + end.len()).freeze());
            }
            looked = self.read.len().saturating_sub(end.len());
            self.more().await?;
        }
    }

    /// The next head; nothing where the peer is done.
    async fn head(&mut self) -> io::Result<Option<Bytes>> {
        match self.until(b"\r\n\r\n").await {
            Ok(head) => Ok(Some(head)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && self.read.is_empty() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn body(&mut self, length: usize) -> io::Result<Bytes> {
        while self.read.len() < length {
            self.more().await?;
        }
        Ok(self.read.split_to(length).freeze())
    }

    async fn chunks(&mut self) -> io::Result<Bytes> {
        let mut whole = BytesMut::new();
        loop {
            let line = self.until(b"\r\n").await?;
            let digits = String::from_utf8_lossy(&line).split([';', '\r']).next().unwrap_or_default().trim().to_owned();
            let length = usize::from_str_radix(&digits, 16).map_err(|_| io::ErrorKind::InvalidData)?;
            let chunk = self.body(length + 2).await?;
            whole.extend_from_slice(&chunk[..length]);
            if length == 0 {
                return Ok(whole.freeze());
            }
        }
    }

    async fn rest(&mut self) -> io::Result<Bytes> {
        while self.more().await.is_ok() {}
        Ok(self.read.split().freeze())
    }
}

#[test]
fn heads_are_read_and_changed() {
    let head = b"HTTP/1.1 200 OK\r\nETag: \"e\"\r\nContent-Length: 5\r\n\r\n";
    assert_eq!(header(head, "content-length").as_deref(), Some("5"));
    assert_eq!(header(head, "content"), None);
    let mut answer = Answer { head: Bytes::from_static(head), body: Bytes::from_static(b"hello") };
    answer.cut(2);
    assert_eq!(answer.bytes(), b"HTTP/1.1 200 OK\r\nETag: \"e\"\r\ncontent-length: 2\r\n\r\nhe");
    answer.body = Bytes::from_static(b"<R><Key>k</Key><ETag>e</ETag></R>");
    answer.forget_etag();
    assert_eq!(answer.bytes(), b"HTTP/1.1 200 OK\r\ncontent-length: 19\r\n\r\n<R><Key>k</Key></R>");
}
