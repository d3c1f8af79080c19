//! One request from call to answer: signed, sent, retried, its bucket's region followed, refused credentials read again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use reqsign_aws_v4::Credential;
use sha2::{Digest as _, Sha256};
use url::Url;

use super::client::Core;
use super::endpoint::BucketName;
use super::operation::Operation;
use super::response::{self, ErrorBody};
use super::xml::{self, Element};
use super::{ErrorKind, Result, S3Error, Source, slow};
use crate::aws::http::{self as transport, Body, Failure, Incoming, Outgoing};
use crate::aws::retry::{self, Attempts, Budget, Class, Outcome};
use crate::aws::{encode, sigv2, sigv4};

/// A body that can be sent again.
#[derive(Clone)]
pub(super) enum Payload {
    Empty,
    Bytes(Bytes),
    Source(Arc<dyn Source>),
}

/// Everything of a request but signature and place.
pub(super) struct Call {
    pub operation: Operation,
    pub method: Method,
    pub key: Option<String>,
    pub query: Vec<(String, String)>,
    pub headers: HeaderMap,
    pub payload: Payload,
    pub class: Class,
    pub idempotent: bool,
    /// Longest time without a byte moving.
    pub stall: Duration,
}

impl Call {
    /// An idempotent call without a body.
    pub fn new(core: &Core, operation: Operation, method: Method) -> Self {
        Self {
            operation,
            method,
            key: None,
            query: Vec::new(),
            headers: HeaderMap::new(),
            payload: Payload::Empty,
            class: Class::Metadata,
            idempotent: true,
            stall: core.config.request_timeout,
        }
    }

    pub fn key(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self
    }

    pub fn query(mut self, name: &str, value: impl Into<String>) -> Self {
        self.query.push((name.to_owned(), value.into()));
        self
    }

    pub fn class(mut self, class: Class) -> Self {
        self.class = class;
        self
    }

    fn has_body(&self) -> bool {
        !matches!(self.payload, Payload::Empty)
    }

    pub fn payload(mut self, payload: Payload) -> Self {
        self.payload = payload;
        self
    }

    /// Complete and server-side copies answer when they are done.
    pub fn slow(mut self, core: &Core) -> Self {
        self.stall = core.config.close_timeout;
        self
    }

    /// Adds a header; an empty value is left out.
    ///
    /// # Errors
    /// A value that no header can carry.
    pub fn header(&mut self, name: &str, value: &str) -> Result<()> {
        if value.is_empty() {
            return Ok(());
        }
        let bad = || {
            S3Error::local(
                ErrorKind::InvalidRequest,
                self.operation.name(),
                self.key.clone().unwrap_or_default(),
                format!("header {name} can hold visible ASCII characters alone"),
            )
        };
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| bad())?;
        let value = HeaderValue::from_str(value).map_err(|_| bad())?;
        // Signatures cover header values as ASCII text.
        value.to_str().map_err(|_| bad())?;
        self.headers.insert(name, value);
        Ok(())
    }
}

/// Where a call goes: a bucket and the region it is known to be in.
#[derive(Debug)]
pub(super) struct Place {
    pub bucket: Option<BucketName>,
    region: parking_lot::Mutex<String>,
}

impl Place {
    pub fn new(bucket: Option<BucketName>, region: String) -> Self {
        Self { bucket, region: parking_lot::Mutex::new(region) }
    }

    pub fn region(&self) -> String {
        self.region.lock().clone()
    }

    pub fn resource(&self, key: Option<&str>) -> String {
        match (&self.bucket, key) {
            (Some(bucket), Some(key)) => format!("s3://{}/{key}", bucket.as_str()),
            (Some(bucket), None) => format!("s3://{}", bucket.as_str()),
            _ => "s3://".to_owned(),
        }
    }
}

/// A 2xx answer.
pub(super) struct Answer<B> {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: B,
    /// An earlier attempt's answer was lost: it may have taken effect.
    pub repeated: bool,
}

/// A call that failed, and whether an earlier attempt of it may have taken effect.
pub(super) struct Refusal {
    pub error: S3Error,
    pub repeated: bool,
}

impl From<S3Error> for Refusal {
    fn from(error: S3Error) -> Self {
        Self { error, repeated: false }
    }
}

impl From<Refusal> for S3Error {
    fn from(refusal: Refusal) -> Self {
        refusal.error
    }
}

type Tried<T> = std::result::Result<T, Refusal>;

/// The header in which a store names the request that it answers.
const REQUEST_ID: &str = "x-amz-request-id";

/// So many attempts that came to nothing are worth a line in the log: the first ones are everyday.
const TOLD: u32 = 3;

/// The largest answer that is read into memory: a page of 1000 keys of 1024 bytes, each three bytes a byte, is 4 MB.
const LARGEST: usize = 32 << 20;

enum Attempt<B> {
    Done(StatusCode, HeaderMap, B),
    Refused { status: StatusCode, headers: HeaderMap, body: ErrorBody },
    Failed(Failure),
}

impl Core {
    /// Sends until the head of a 2xx answer has come; the body follows.
    pub async fn stream(&self, place: &Place, call: &Call) -> Tried<Answer<Incoming>> {
        self.repeat(place, call, async |incoming: Incoming| Ok((incoming.status, incoming.headers.clone(), incoming))).await
    }

    /// Sends until a whole 2xx answer has come. An `<Error>` in a 200 is an error, retried as one.
    pub async fn whole(&self, place: &Place, call: &Call) -> Tried<Answer<Bytes>> {
        self.repeat(place, call, async |incoming: Incoming| {
            let (status, headers) = (incoming.status, incoming.headers.clone());
            Ok((status, headers, incoming.collect(LARGEST).await?))
        })
        .await
    }

    /// [`Core::whole`] with the XML root that must come.
    pub async fn xml(&self, place: &Place, call: &Call, root: &str) -> Tried<Answer<Element>> {
        let answer = self.whole(place, call).await?;
        match Element::parse(&answer.body) {
            Ok(element) if element.name == root => {
                if answer.headers.contains_key(REQUEST_ID) {
                    self.names_requests.store(true, Ordering::Relaxed);
                }
                Ok(Answer { status: answer.status, headers: answer.headers, body: element, repeated: answer.repeated })
            }
            Ok(element) => Err(self.no_answer(place, call, &format!("<{}> came instead of <{root}>", element.name))),
            Err(reason) => Err(self.no_answer(place, call, &reason)),
        }
    }

    /// A 2xx whose body is none of S3's.
    fn no_answer(&self, place: &Place, call: &Call, reason: &str) -> Refusal {
        let error = self.not_s3(place, call, reason);
        self.failures.note(&error);
        error.into()
    }

    pub fn not_s3(&self, place: &Place, call: &Call, reason: &str) -> S3Error {
        let message = format!("what answers at {} is not S3 ({reason})", self.endpoint.shown());
        S3Error::local(ErrorKind::Protocol, call.operation.name(), place.resource(call.key.as_deref()), message)
    }

    async fn repeat<B, F>(&self, place: &Place, call: &Call, read: F) -> Tried<Answer<B>>
    where
        B: Readable,
        F: AsyncFn(Incoming) -> std::result::Result<(StatusCode, HeaderMap, B), Failure>,
    {
        self.send(place, call, read).await.inspect_err(|refusal| self.failures.note(&refusal.error))
    }

    async fn send<B, F>(&self, place: &Place, call: &Call, read: F) -> Tried<Answer<B>>
    where
        B: Readable,
        F: AsyncFn(Incoming) -> std::result::Result<(StatusCode, HeaderMap, B), Failure>,
    {
        let budget = Budget::process();
        let mut attempts = Attempts::new(call.class, call.idempotent, self.config.retries);
        if slow::is_heard() {
            attempts.wait_out_throttling();
        }
        let (mut followed, mut reread, mut repeated) = (0, false, false);
        loop {
            let bucket = place.bucket.as_ref().map(BucketName::as_str);
            let credential =
                self.credentials.get(bucket).await.map_err(|message| self.local(place, call, ErrorKind::Credentials, message))?;
            let (error, outcome, wait) = match self.attempt(place, call, credential.as_ref(), &read).await? {
                Attempt::Done(status, headers, body) => {
                    budget.succeeded();
                    return Ok(Answer { status, headers, body, repeated });
                }
                Attempt::Refused { status, headers, body } => {
                    let error = response::error(call.operation.name(), &place.resource(call.key.as_deref()), status, &headers, &body);
                    if followed < 2 && self.follow_region(place, status, &error, &body) {
                        followed += 1;
                        continue;
                    }
                    if error.kind == ErrorKind::Credentials
                        && !reread
                        && let Some(used) = &credential
                        && self.credentials.refused(used).await
                    {
                        reread = true;
                        continue;
                    }
                    // A HEAD has no body to tell an unknown key from a missing right.
                    let bare = body.code.is_none()
                        && matches!(status, StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST)
                        && call.method == Method::HEAD;
                    if bare
                        && !reread
                        && let Some(used) = &credential
                        && self.credentials.rotated(bucket, used).await
                    {
                        reread = true;
                        continue;
                    }
                    let outcome = match error.kind {
                        ErrorKind::Throttled => Outcome::Throttled,
                        ErrorKind::Server | ErrorKind::TimedOut => Outcome::Server,
                        // The bytes were damaged on their way, or another conditional write was in flight.
                        ErrorKind::BadDigest if call.has_body() && attempts.made() < self.config.retries => Outcome::Server,
                        _ => Outcome::Final,
                    };
                    repeated |= outcome == Outcome::Server;
                    let wait = headers.get("retry-after").and_then(|value| value.to_str().ok()).and_then(retry::parse_retry_after);
                    (error, outcome, wait)
                }
                Attempt::Failed(failure) => {
                    let (kind, outcome) = failed(&failure);
                    repeated |= outcome == Outcome::Lost;
                    let message = match &failure {
                        Failure::Local(text) => text.clone(),
                        remote => format!("{}: {remote}", self.endpoint.shown()),
                    };
                    (self.local(place, call, kind, message), outcome, None)
                }
            };
            let Some(pause) = attempts.next(budget, outcome, wait) else { return Err(Refusal { error, repeated }) };
            slow::tell(&error, pause);
            // Whoever waits for another kind of request hears its end soon.
            if attempts.made() == TOLD && call.class == Class::Upload {
                tracing::warn!("{error}; it is tried again");
            }
            tracing::debug!(operation = call.operation.name(), resource = %error.resource, attempt = attempts.made(), pause_ms = pause.as_millis() as u64, reason = %error, "sending again");
            if let Payload::Source(source) = &call.payload {
                source.refused();
            }
            tokio::time::sleep(pause).await;
        }
    }

    pub fn local(&self, place: &Place, call: &Call, kind: ErrorKind, message: String) -> S3Error {
        S3Error::local(kind, call.operation.name(), place.resource(call.key.as_deref()), message)
    }

    async fn attempt<B, F>(&self, place: &Place, call: &Call, credential: Option<&Credential>, read: &F) -> Result<Attempt<B>>
    where
        B: Readable,
        F: AsyncFn(Incoming) -> std::result::Result<(StatusCode, HeaderMap, B), Failure>,
    {
        let (url, headers) = self.sign(place, call, credential).await?;
        let body = match &call.payload {
            Payload::Empty => Body::Empty,
            Payload::Bytes(bytes) => Body::Bytes(bytes.clone()),
            Payload::Source(source) => Body::Stream { len: source.len(), stream: source.open() },
        };
        self.counters.count(call.operation);
        let outgoing = Outgoing {
            method: call.method.clone(),
            url,
            headers,
            body,
            stall: call.stall,
            bandwidth: self.bandwidth.clone(),
            bandwidth_in: self.bandwidth_in.clone(),
            traffic: Arc::clone(&self.traffic),
        };
        let began = Instant::now();
        let sent = transport::send(&self.http, outgoing).await;
        self.counters.answered(call.operation, sent.as_ref().map_or(0, |incoming| incoming.status.as_u16()), began.elapsed());
        let incoming = match sent {
            Ok(incoming) => incoming,
            Err(failure) => return Ok(Attempt::Failed(failure)),
        };
        let (status, headers) = (incoming.status, incoming.headers.clone());
        if status.is_success() && self.is_portal(&headers) {
            return Err(self.not_s3(place, call, "an HTML page"));
        }
        if !status.is_success() {
            let body = incoming.collect(1 << 20).await.unwrap_or_default();
            return Ok(Attempt::Refused { status, body: response::error_body(&headers, &body), headers });
        }
        match read(incoming).await {
            Err(failure) => Ok(Attempt::Failed(failure)),
            Ok((status, headers, body)) => {
                if let Some(text) = body.text()
                    && xml::root_name(text) == Some(b"Error")
                {
                    let body = response::error_body(&headers, text);
                    // The status was sent before the outcome was known: the code says it all.
                    let status = if body.code.is_some() { StatusCode::BAD_REQUEST } else { StatusCode::INTERNAL_SERVER_ERROR };
                    return Ok(Attempt::Refused { status, headers, body });
                }
                Ok(Attempt::Done(status, headers, body))
            }
        }
    }

    /// A page of somebody between us and the store (a captive portal, a proxy's login), which may have all the headers of an object:
    /// it lacks the request id that this store gives with every answer.
    fn is_portal(&self, headers: &HeaderMap) -> bool {
        self.names_requests.load(Ordering::Relaxed)
            && !headers.contains_key(REQUEST_ID)
            && response::text(headers, "content-type").is_some_and(|kind| kind.starts_with("text/html"))
    }

    /// True when the answer names another region than the one that was signed for; it is remembered.
    fn follow_region(&self, place: &Place, status: StatusCode, error: &S3Error, body: &ErrorBody) -> bool {
        let misplaced = error.kind == ErrorKind::WrongRegion
            || status.is_redirection()
            || (status == StatusCode::BAD_REQUEST && body.code.is_none())
            || (status == StatusCode::FORBIDDEN && body.code.is_none());
        let Some(region) = body.region.as_ref().filter(|region| misplaced && !region.is_empty()) else { return false };
        let mut known = place.region.lock();
        if *known == *region {
            return false;
        }
        tracing::debug!(bucket = %place.resource(None), from = %known, to = %region, "the bucket's region was found");
        known.clone_from(region);
        true
    }

    /// The URL to send to and all headers.
    async fn sign(&self, place: &Place, call: &Call, credential: Option<&Credential>) -> Result<(Url, HeaderMap)> {
        let region = place.region();
        let object_level = call.key.is_some() || call.method == Method::GET || call.method == Method::POST;
        let location = self.endpoint.locate(place.bucket.as_ref(), &region, object_level && place.bucket.is_some());
        let path = match &call.key {
            Some(key) => encode::key_path(&location.prefix, key),
            None if location.prefix.is_empty() => encode::key_path("", ""),
            None => Some(encode::KeyPath { signed: location.prefix.clone(), wire: location.prefix.clone() }),
        };
        let invalid = |message: String| self.local(place, call, ErrorKind::InvalidRequest, message);
        let path = path.ok_or_else(|| invalid("no URL can name this key; use path_style".to_owned()))?;
        let query = encode::query(call.query.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let query = if query.is_empty() { query } else { format!("?{query}") };
        let url = Url::parse(&format!("{}{}{query}", location.origin, path.wire)).map_err(|error| invalid(error.to_string()))?;
        let mut headers = call.headers.clone();
        self.common_headers(place, &mut headers);
        let Some(credential) = credential else { return Ok((url, headers)) };
        // Keys to delete and parts to join: few bytes, and one turned over does harm.
        if let (Payload::Bytes(body), false) = (&call.payload, self.config.sigv2) {
            let sum: String = Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect();
            headers.insert("x-amz-content-sha256", HeaderValue::from_str(&sum).map_err(|error| invalid(error.to_string()))?);
        }
        if self.config.sigv2 {
            let now = httpdate::fmt_http_date(std::time::SystemTime::now());
            headers.insert("x-amz-date", HeaderValue::from_str(&now).map_err(|error| invalid(error.to_string()))?);
            if let Some(token) = &credential.session_token {
                let mut token = HeaderValue::from_str(token).map_err(|error| invalid(error.to_string()))?;
                token.set_sensitive(true);
                headers.insert("x-amz-security-token", token);
            }
            let resource = match &call.key {
                Some(key) => format!("{}/{}", location.resource, encode::key(key)),
                // The path as it is sent in path style; AWS's virtual hosts have a `/` after the bucket.
                None if location.resource.is_empty() || !location.prefix.ends_with(&location.resource) => format!("{}/", location.resource),
                None => location.resource.clone(),
            };
            let subject = sigv2::Subject { method: call.method.as_str(), resource: &resource, query: &call.query, headers: &headers };
            let value = sigv2::authorization(&subject, credential).ok_or_else(|| invalid("the secret key cannot sign".to_owned()))?;
            let mut value = HeaderValue::from_str(&value).map_err(|error| invalid(error.to_string()))?;
            value.set_sensitive(true);
            headers.insert(::http::header::AUTHORIZATION, value);
            return Ok((url, headers));
        }
        // The host is signed as it is sent: the url crate leaves out a default port.
        let signed = format!("{}{}{query}", url.origin().ascii_serialization(), path.signed);
        let headers = sigv4::headers(sigv4::Scope { service: "s3", region: &region }, &call.method, &signed, headers, credential)
            .await
            .map_err(invalid)?;
        Ok((url, headers))
    }

    fn common_headers(&self, place: &Place, headers: &mut HeaderMap) {
        if place.bucket.is_none() {
            return;
        }
        if self.config.requester_pays {
            headers.insert("x-amz-request-payer", HeaderValue::from_static("requester"));
        }
        if let Some(owner) = self.config.expected_bucket_owner.as_deref().and_then(|owner| HeaderValue::from_str(owner).ok()) {
            headers.insert("x-amz-expected-bucket-owner", owner);
        }
    }
}

/// What a request without an answer means.
pub(super) fn failed(failure: &Failure) -> (ErrorKind, Outcome) {
    match failure {
        Failure::Connect(_) => (ErrorKind::Network, Outcome::NotSent),
        Failure::Unanswered => (ErrorKind::TimedOut, Outcome::NotSent),
        Failure::Broken(_) => (ErrorKind::Network, Outcome::Lost),
        Failure::Silent(_) => (ErrorKind::TimedOut, Outcome::Lost),
        Failure::Local(_) => (ErrorKind::LocalIo, Outcome::Final),
    }
}

/// A body that was read whole shows its text; one that streams has none yet.
pub(super) trait Readable {
    fn text(&self) -> Option<&[u8]>;
}

impl Readable for Bytes {
    fn text(&self) -> Option<&[u8]> {
        Some(self)
    }
}

impl Readable for Incoming {
    fn text(&self) -> Option<&[u8]> {
        None
    }
}

/// The part of `incoming` that the caller wants: `skip` bytes dropped, then exactly `want`, an error when fewer come.
/// `whole`: more bytes than wanted are an error too.
pub(super) fn exactly(
    incoming: Incoming,
    skip: u64,
    want: u64,
    whole: bool,
    resource: String,
) -> futures::stream::BoxStream<'static, Result<Bytes>> {
    let wrong = move |kind, message: String| S3Error::local(kind, Operation::GetObject.name(), resource.clone(), message);
    futures::stream::unfold(Some((incoming.body, skip, want)), move |state| {
        let wrong = wrong.clone();
        async move {
            let (mut body, mut skip, mut want) = state?;
            if want == 0 && !whole {
                return None;
            }
            loop {
                let mut chunk = match body.next().await {
                    Some(Ok(chunk)) => chunk,
                    Some(Err(failure)) => {
                        let kind = if matches!(failure, Failure::Silent(_)) { ErrorKind::TimedOut } else { ErrorKind::Network };
                        return Some((Err(wrong(kind, failure.to_string())), None));
                    }
                    None if want == 0 => return None,
                    None => return Some((Err(wrong(ErrorKind::Network, format!("the body ended {want} bytes early"))), None)),
                };
                if skip > 0 {
                    let dropped = skip.min(chunk.len() as u64);
                    chunk = chunk.slice(dropped as usize..);
                    skip -= dropped;
                }
                if chunk.is_empty() {
                    continue;
                }
                if chunk.len() as u64 > want {
                    if whole {
                        return Some((Err(wrong(ErrorKind::BadDigest, "the body is longer than it was announced".to_owned())), None));
                    }
                    chunk.truncate(want as usize);
                }
                want -= chunk.len() as u64;
                return Some((Ok(chunk), Some((body, skip, want))));
            }
        }
    })
    .boxed()
}
