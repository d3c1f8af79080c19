//! HTTP around s3s: connections, faults, counting.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::StdError;
use s3s::service::S3Service;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::Shared;
use super::fault::Fault;
use super::request::{Asked, classify, signed_region};

type Answer = Response<UnsyncBoxBody<Bytes, StdError>>;

/// Serves until `stop` changes.
pub async fn serve(listener: TcpListener, service: S3Service, shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
    let accept = async {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            if shared.down.load(Ordering::SeqCst) {
                let _ = stream.set_zero_linger();
                continue;
            }
            let _ = stream.set_nodelay(true);
            tokio::spawn(connection(stream, service.clone(), Arc::clone(&shared)));
        }
    };
    tokio::select! {
        () = accept => {}
        _ = stop.changed() => {}
    }
}

async fn connection(stream: TcpStream, service: S3Service, shared: Arc<Shared>) {
    let reset = Arc::new(AtomicBool::new(false));
    let socket = Socket { stream, reset: Arc::clone(&reset) };
    let handler = service_fn(move |request| answer(request, service.clone(), Arc::clone(&shared), Arc::clone(&reset)));
    // An error here is a connection that ended: by the peer, or by a fault of ours.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), handler).await;
}

/// Ends the connection without an answer.
#[derive(Debug, thiserror::Error)]
#[error("connection dropped on purpose")]
struct Dropped;

/// Counts a request for as long as it is open.
struct Open(Arc<Shared>);

impl Open {
    fn new(shared: &Arc<Shared>) -> Self {
        let open = shared.open.fetch_add(1, Ordering::SeqCst) + 1;
        let mut requests = shared.requests.lock();
        requests.peak = requests.peak.max(open);
        Self(Arc::clone(shared))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn answer(request: Request<Incoming>, service: S3Service, shared: Arc<Shared>, reset: Arc<AtomicBool>) -> Result<Answer, Dropped> {
    let (parts, body) = request.into_parts();
    let asked = classify(&parts, shared.options.domain.as_deref());
    let _open = Open::new(&shared);
    let faults = shared.faults.lock().take(&asked);
    let mut keep_back = false;
    let mut shape = None;
    for fault in faults {
        match fault {
            Fault::Delay(time) => tokio::time::sleep(time).await,
            Fault::Error(status, code) => return Ok(instead(&shared, asked, status, &error_xml(code))),
            Fault::ErrorIn200(code) => return Ok(instead(&shared, asked, 200, &error_xml(code))),
            Fault::Html => return Ok(portal(&shared, asked)),
            Fault::Refuse => {
                shared.requests.lock().add(asked);
                reset.store(true, Ordering::SeqCst);
                return Err(Dropped);
            }
            Fault::Stall(time) => {
                shared.requests.lock().add(asked);
                tokio::time::sleep(time).await;
                return Err(Dropped);
            }
            Fault::LostAnswer => keep_back = true,
            other => shape = Some(other),
        }
    }
    if shared.down.load(Ordering::SeqCst) {
        reset.store(true, Ordering::SeqCst);
        return Err(Dropped);
    }
    let region = shared.region(&asked.bucket);
    if let Some(told) = signed_region(&parts)
        && told != region
    {
        return Ok(wrong_region(&shared, asked, &told, &region));
    }
    let up = Arc::clone(&shared);
    let is_empty = hyper::body::Body::is_end_stream(&body);
    let counted = body.map_frame(move |frame| {
        up.requests.lock().bytes_up += frame.data_ref().map_or(0, Bytes::len) as u64;
        frame
    });
    // s3s wants a length where none is sent and the body is not known to be empty.
    let body = if is_empty { s3s::Body::empty() } else { s3s::Body::http_body_unsync(counted) };
    let request = Request::from_parts(parts, body);
    let Ok(response) = service.call(request).await else { return Err(Dropped) };
    shared.requests.lock().add(asked);
    if keep_back {
        reset.store(true, Ordering::SeqCst);
        return Err(Dropped);
    }
    let (mut parts, body) = response.into_parts();
    let date = httpdate::fmt_http_date(SystemTime::now() - shared.options.clock_behind);
    parts.headers.insert("date", date.parse().unwrap());
    let body = match shape {
        Some(Fault::Shorter(len)) => {
            let whole = http_body_util::BodyExt::collect(body).await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            let cut = whole.slice(..len.min(whole.len()));
            parts.headers.insert("content-length", cut.len().into());
            parts.headers.remove("transfer-encoding");
            Full::new(cut).map_err(|never: Infallible| match never {}).boxed_unsync()
        }
        Some(fault) => misshape(body, fault, reset).await,
        None => body.boxed_unsync(),
    };
    let down = Arc::clone(&shared);
    let counted = body.map_frame(move |frame| {
        down.requests.lock().bytes_down += frame.data_ref().map_or(0, Bytes::len) as u64;
        frame
    });
    Ok(Response::from_parts(parts, counted.boxed_unsync()))
}

fn instead(shared: &Shared, asked: Asked, status: u16, body: &str) -> Answer {
    let head = asked.operation.starts_with("Head");
    shared.requests.lock().add(asked);
    let body = if head { String::new() } else { body.to_owned() };
    let body = Full::new(Bytes::from(body)).map_err(|never: Infallible| match never {}).boxed_unsync();
    let mut answer = Response::new(body);
    *answer.status_mut() = StatusCode::from_u16(status).unwrap();
    answer.headers_mut().insert("content-type", "application/xml".parse().unwrap());
    answer.headers_mut().insert("x-amz-request-id", "FAULT0000000001".parse().unwrap());
    answer
}

fn error_xml(code: &str) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>made by the test</Message><RequestId>FAULT0000000001</RequestId></Error>"
    )
}

fn portal(shared: &Shared, asked: Asked) -> Answer {
    let mut answer =
        instead(shared, asked, 200, "<!DOCTYPE html><html><head><title>Welcome</title></head><body>Please log in.</body></html>");
    answer.headers_mut().insert("content-type", "text/html; charset=utf-8".parse().unwrap());
    answer
}

fn wrong_region(shared: &Shared, asked: Asked, told: &str, region: &str) -> Answer {
    let xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>AuthorizationHeaderMalformed</Code><Message>The authorization header is malformed; the region '{told}' is wrong; expecting '{region}'</Message><Region>{region}</Region></Error>"
    );
    let mut answer = instead(shared, asked, 400, &xml);
    answer.headers_mut().insert("x-amz-bucket-region", region.parse().unwrap());
    answer
}

/// The answer's body, spoiled. Its Content-Length stays that of the whole.
async fn misshape(body: s3s::Body, fault: Fault, reset: Arc<AtomicBool>) -> UnsyncBoxBody<Bytes, StdError> {
    let whole = http_body_util::BodyExt::collect(body).await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let frames: BoxStream<'static, Result<Frame<Bytes>, StdError>> = match fault {
        Fault::Reset(after) => {
            let ending = async move {
                // What was sent is on its way before the reset follows it.
                tokio::time::sleep(Duration::from_millis(30)).await;
                reset.store(true, Ordering::SeqCst);
                Err(StdError::from(Dropped))
            };
            head(&whole, after).chain(stream::once(ending)).boxed()
        }
        Fault::Truncate(after) => {
            let ending = async move {
                tokio::time::sleep(Duration::from_millis(30)).await;
                Err(StdError::from(Dropped))
            };
            head(&whole, after).chain(stream::once(ending)).boxed()
        }
        Fault::StallBody(after, time) => {
            let ending = async move {
                tokio::time::sleep(time).await;
                Err(StdError::from(Dropped))
            };
            head(&whole, after).chain(stream::once(ending)).boxed()
        }
        Fault::Corrupt(at) => {
            let mut spoiled = whole.to_vec();
            if let Some(byte) = spoiled.get_mut(at) {
                *byte ^= 1;
            }
            head(&Bytes::from(spoiled), usize::MAX).boxed()
        }
        _ => head(&whole, usize::MAX).boxed(),
    };
    StreamBody::new(frames).boxed_unsync()
}

fn head(whole: &Bytes, after: usize) -> BoxStream<'static, Result<Frame<Bytes>, StdError>> {
    stream::iter([Ok(Frame::data(whole.slice(..after.min(whole.len()))))]).boxed()
}

/// A connection that can be made to end by a reset.
struct Socket {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.load(Ordering::SeqCst) {
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.reset.load(Ordering::SeqCst) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
