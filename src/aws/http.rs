//! HTTP/1.1 over many connections. HTTP/2 would send all requests through one connection, whose single congestion
//! window is what limits a transfer to S3.

use std::future::Future as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{BoxStream, Stream, StreamExt as _};
use http::{HeaderMap, Method, StatusCode};
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::Instant;
use url::Url;

use super::bandwidth::Bandwidth;

/// How to connect.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Overrides `HTTPS_PROXY`, `HTTP_PROXY`, `NO_PROXY`.
    pub proxy: Option<Url>,
    /// PEM certificates trusted beside the system's.
    pub ca_bundle: Option<PathBuf>,
    /// Accepts any certificate.
    pub no_check_certificate: bool,
    /// The endpoint is `https://`: without any trusted certificate nothing works.
    pub needs_tls: bool,
    /// For TCP and TLS together.
    pub connect_timeout: Duration,
    /// What was sent and nobody has acknowledged for so long ends a connection, and so does a peer that answers no probe.
    pub stall: Duration,
    /// Idle connections kept.
    pub max_connections: usize,
}

/// Why no answer, or no whole answer, came.
#[derive(Clone, Debug)]
pub enum Failure {
    /// Refused, not resolved, TLS: nothing reached the store.
    Connect(String),
    /// No answer to the connection attempt within `connect_timeout`.
    Unanswered,
    /// Reset, closed early, broken HTTP.
    Broken(String),
    /// No byte moved for so long.
    Silent(Duration),
    /// Reading the bytes to send failed here.
    Local(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect(text) | Self::Broken(text) | Self::Local(text) => f.write_str(text),
            Self::Unanswered => f.write_str("nothing answers the connection attempt"),
            Self::Silent(time) => write!(f, "no byte moved for {} s", time.as_secs()),
        }
    }
}

/// What is sent as a body.
pub enum Body {
    /// Nothing.
    Empty,
    /// Bytes in memory.
    Bytes(Bytes),
    /// Exactly `len` bytes of a stream.
    Stream {
        /// Length in bytes.
        len: u64,
        /// The bytes.
        stream: BoxStream<'static, std::io::Result<Bytes>>,
    },
}

/// A signed request.
pub struct Outgoing {
    /// Method.
    pub method: Method,
    /// Where to.
    pub url: Url,
    /// Headers, signature included; `Content-Length` is added.
    pub headers: HeaderMap,
    /// Body.
    pub body: Body,
    /// Ends the request when no byte moved for so long.
    pub stall: Duration,
    /// Pace of the body.
    pub bandwidth: Option<Arc<Bandwidth>>,
    /// Pace of the answer's body.
    pub bandwidth_in: Option<Arc<Bandwidth>>,
    /// Counts the bodies of request and answer.
    pub traffic: Arc<Traffic>,
}

/// Bytes of bodies since the start; heads are not counted.
#[derive(Debug, Default)]
pub struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Traffic {
    /// Bytes that were handed to connections.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes that came, whether or not anybody wanted them.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// An answer whose head has come.
pub struct Incoming {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body; ends with an error when it stops or stalls.
    pub body: BoxStream<'static, Result<Bytes, Failure>>,
}

impl Incoming {
    /// The whole body, at most `limit` bytes.
    ///
    /// # Errors
    /// As the stream; longer bodies are [`Failure::Broken`].
    pub async fn collect(mut self, limit: usize) -> Result<Bytes, Failure> {
        let mut all = bytes::BytesMut::new();
        while let Some(chunk) = self.body.next().await {
            all.extend_from_slice(&chunk?);
            if all.len() > limit {
                return Err(Failure::Broken(format!("the answer is longer than {limit} bytes")));
            }
        }
        Ok(all.freeze())
    }
}

/// Builds the client.
///
/// # Errors
/// One line: an unreadable CA bundle or proxy.
pub fn client(config: &HttpConfig) -> Result<reqwest::Client, String> {
    let bundle = config.ca_bundle.as_deref().map(certificates).transpose()?;
    let found = match &bundle {
        Some(bundle) => builder(config)?.tls_certs_merge(bundle.iter().cloned()).build(),
        None => builder(config)?.build(),
    };
    match found {
        // A machine without system certificates can still trust the bundle, and needs none for plain HTTP.
        Err(_) if bundle.is_some() || !config.needs_tls => builder(config)?
            .tls_certs_only(bundle.unwrap_or_default())
            .build()
            .map_err(|error| format!("TLS cannot be set up ({})", root_cause(&error))),
        other => {
            other.map_err(|error| format!("TLS cannot be set up ({}); install ca-certificates or name ca_bundle=", root_cause(&error)))
        }
    }
}

fn builder(config: &HttpConfig) -> Result<reqwest::ClientBuilder, String> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("packmule/", env!("CARGO_PKG_VERSION")))
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .connect_timeout(config.connect_timeout)
        .pool_max_idle_per_host(config.max_connections.max(16) * 2)
        // S3 closes idle connections after about 20 s; using one that is being closed costs a retry.
        .pool_idle_timeout(Duration::from_secs(15))
        .tcp_nodelay(true)
        // An answer that may take minutes (Complete, a copy) is waited for as long as its peer lives.
        .tcp_keepalive(Duration::from_secs(15))
        .tcp_keepalive_interval(Duration::from_secs(5))
        .tcp_user_timeout(config.stall);
    if let Some(proxy) = &config.proxy {
        let proxy = reqwest::Proxy::all(proxy.clone()).map_err(|error| format!("proxy: {}", root_cause(&error)))?;
        builder = builder.no_proxy().proxy(proxy);
    }
    if config.no_check_certificate {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    Ok(builder)
}

fn certificates(path: &Path) -> Result<Vec<reqwest::Certificate>, String> {
    let shown = path.display();
    let mut pem = Vec::new();
    std::fs::File::open(path)
        .and_then(|mut file| file.read_to_end(&mut pem))
        .map_err(|error| format!("ca_bundle {shown}: {error}; name a readable PEM file"))?;
    let found = reqwest::Certificate::from_pem_bundle(&pem).map_err(|_| format!("ca_bundle {shown}: no PEM certificates in it"))?;
    if found.is_empty() {
        return Err(format!("ca_bundle {shown}: no PEM certificates in it"));
    }
    Ok(found)
}

/// The innermost reason; the outer ones repeat the URL, which may be signed.
pub fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// When a byte last moved, shared by a request's body and its watchman.
#[derive(Debug)]
struct Movement {
    start: Instant,
    last: AtomicU64,
    sent: AtomicBool,
    local: Mutex<Option<String>>,
}

impl Movement {
    fn new() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0), sent: AtomicBool::new(false), local: Mutex::new(None) }
    }

    /// A wait for `bwlimit` counts as movement.
    fn touch_at(&self, at: Instant) {
        let millis = at.saturating_duration_since(self.start).as_millis();
        self.last.store(u64::try_from(millis).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Ends when nothing moved for `stall`. After the last byte of a body was handed to the kernel, whose send buffer may hold
    /// megabytes, a slow line gets as long again as the sending took.
    async fn stalled(&self, stall: Duration) {
        loop {
            let last = self.start + Duration::from_millis(self.last.load(Ordering::Relaxed));
            let grace = if self.sent.load(Ordering::Relaxed) { (last - self.start).min(stall * 4) } else { Duration::ZERO };
            let end = last + stall + grace;
            if Instant::now() >= end {
                return;
            }
            tokio::time::sleep_until(end).await;
        }
    }
}

/// Pieces handed to the connection: small enough that a slow line is seen to move.
const PIECE: usize = 64 * 1024;

/// A request body of known length that counts what leaves.
struct Upload {
    /// Never locked: the mutex makes the stream `Sync`, as reqwest wants its bodies.
    stream: Mutex<BoxStream<'static, std::io::Result<Bytes>>>,
    rest: Bytes,
    left: u64,
    movement: Arc<Movement>,
    bandwidth: Option<Arc<Bandwidth>>,
    traffic: Arc<Traffic>,
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl Upload {
    fn fail(&self, text: String) -> std::io::Error {
        *self.movement.local.lock() = Some(text.clone());
        std::io::Error::other(text)
    }

    fn piece(&mut self) -> Option<Result<Frame<Bytes>, std::io::Error>> {
        let piece = self.rest.split_to(self.rest.len().min(PIECE));
        self.left = match self.left.checked_sub(piece.len() as u64) {
            Some(left) => left,
            None => return Some(Err(self.fail("the source gave more bytes than it announced".into()))),
        };
        self.movement.touch_at(Instant::now());
        self.traffic.sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
        if self.left == 0 {
            self.movement.sent.store(true, Ordering::Relaxed);
        }
        if let Some(bandwidth) = &self.bandwidth {
            let until = bandwidth.reserve(piece.len());
            self.movement.touch_at(until);
            self.pause = Some(Box::pin(tokio::time::sleep_until(until)));
        }
        Some(Ok(Frame::data(piece)))
    }
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        loop {
            if let Some(pause) = &mut self.pause {
                if pause.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                self.pause = None;
            }
            if !self.rest.is_empty() {
                return Poll::Ready(self.piece());
            }
            if self.left == 0 {
                return Poll::Ready(None);
            }
            match self.stream.get_mut().as_mut().poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(chunk))) => self.rest = chunk,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(self.fail(error.to_string())))),
                Poll::Ready(None) => return Poll::Ready(Some(Err(self.fail("the source gave fewer bytes than it announced".into())))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// Sends once. The future may be dropped at any time, which closes the connection.
///
/// # Errors
/// [`Failure`], by what may have reached the store.
pub async fn send(client: &reqwest::Client, outgoing: Outgoing) -> Result<Incoming, Failure> {
    let movement = Arc::new(Movement::new());
    let stall = outgoing.stall;
    let mut request = reqwest::Request::new(outgoing.method.clone(), outgoing.url);
    *request.headers_mut() = outgoing.headers;
    let (len, stream) = match outgoing.body {
        Body::Empty => (0, None),
        Body::Bytes(bytes) => (bytes.len() as u64, Some(futures::stream::iter([Ok(bytes)]).boxed())),
        Body::Stream { len, stream } => (len, Some(stream)),
    };
    if let Some(stream) = stream.filter(|_| len > 0) {
        let body = Upload {
            stream: Mutex::new(stream),
            rest: Bytes::new(),
            left: len,
            movement: Arc::clone(&movement),
            bandwidth: outgoing.bandwidth,
            traffic: Arc::clone(&outgoing.traffic),
            pause: None,
        };
        *request.body_mut() = Some(reqwest::Body::wrap(body));
    }
    if len > 0 || outgoing.method == Method::PUT || outgoing.method == Method::POST {
        request.headers_mut().insert(http::header::CONTENT_LENGTH, len.into());
    }
    let answer = tokio::select! {
        answer = client.execute(request) => answer,
        () = movement.stalled(stall) => return Err(Failure::Silent(stall)),
    };
    let answer = answer.map_err(|error| match movement.local.lock().take() {
        Some(text) => Failure::Local(text),
        None if error.is_connect() && error.is_timeout() => Failure::Unanswered,
        None if error.is_connect() => Failure::Connect(root_cause(&error)),
        None => Failure::Broken(root_cause(&error)),
    })?;
    let answer: http::Response<reqwest::Body> = answer.into();
    let (parts, body) = answer.into_parts();
    let body = http_body_util::BodyDataStream::new(body).map(|chunk| chunk.map_err(|error| Failure::Broken(root_cause(&error))));
    let body = watched(body.boxed(), stall).inspect(move |chunk| {
        let came = chunk.as_ref().map_or(0, Bytes::len) as u64;
        outgoing.traffic.received.fetch_add(came, Ordering::Relaxed);
    });
    let body = match outgoing.bandwidth_in {
        Some(bandwidth) => body.then(move |chunk| paced(chunk, Arc::clone(&bandwidth))).boxed(),
        None => body.boxed(),
    };
    Ok(Incoming { status: parts.status, headers: parts.headers, body })
}

/// Hands a chunk on when its turn has come; what is behind it waits in the connection, and in the end at the store.
async fn paced(chunk: Result<Bytes, Failure>, bandwidth: Arc<Bandwidth>) -> Result<Bytes, Failure> {
    tokio::time::sleep_until(bandwidth.reserve(chunk.as_ref().map_or(0, Bytes::len))).await;
    chunk
}

/// Ends with [`Failure::Silent`] when no chunk comes for `stall` while one is wanted.
fn watched(body: BoxStream<'static, Result<Bytes, Failure>>, stall: Duration) -> impl Stream<Item = Result<Bytes, Failure>> + Send {
    futures::stream::unfold(Some(body), move |body| async move {
        let mut body = body?;
        match tokio::time::timeout(stall, body.next()).await {
            Ok(Some(Ok(chunk))) => Some((Ok(chunk), Some(body))),
            Ok(Some(Err(failure))) => Some((Err(failure), None)),
            Ok(None) => None,
            Err(_) => Some((Err(Failure::Silent(stall)), None)),
        }
    })
}
