//! What a mount tells Prometheus, over HTTP on `metrics_addr`.

use std::convert::Infallible;
use std::fmt::{self, Error};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::Layers;
use crate::control::Upload;
use crate::fuse::Operations;
use crate::measure::Durations;

/// Prometheus's text format, which every collector reads.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The endpoint. Dropping it ends the listener.
pub(super) struct Endpoint(JoinHandle<()>);

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Takes the address, before anything is mounted.
pub(super) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("metrics_addr={address}: cannot be listened at: name a free port of this machine"))
}

impl Endpoint {
    /// Answers from now on.
    pub(super) fn start(listener: TcpListener, layers: Arc<Layers>, operations: Arc<Operations>) -> Self {
        let mut registry = Registry::with_prefix("packmule");
        registry.register_collector(Box::new(Told { layers, operations }));
        let registry = Arc::new(registry);
        Self(tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    // Out of file descriptors, most likely: not for long.
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                };
                let registry = registry.clone();
                let service = hyper::service::service_fn(move |request| {
                    let answer = answer(&request, &registry);
                    async move { Ok::<_, Infallible>(answer) }
                });
                // A client that hangs up is no news.
                tokio::spawn(
                    async move { hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await },
                );
            }
        }))
    }
}

fn answer<B>(request: &Request<B>, registry: &Registry) -> Response<Full<Bytes>> {
    let said = |status: StatusCode, text: String| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(TEXT));
        response
    };
    if request.uri().path() != "/metrics" || request.method() != Method::GET {
        return said(StatusCode::NOT_FOUND, "packmule's metrics are at /metrics\n".to_owned());
    }
    let mut text = String::new();
    match prometheus_text::encode(&mut text, registry) {
        Ok(()) => said(StatusCode::OK, text),
        Err(error) => said(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// What is asked for when somebody asks.
struct Told {
    layers: Arc<Layers>,
    operations: Arc<Operations>,
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Told").field("mountpoint", &self.layers.mountpoint).finish_non_exhaustive()
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Result<(), Error> {
    encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&(value as f64))
}

fn counter(encoder: &mut MetricEncoder<'_>, labels: &[(&str, &str)], value: u64) -> Result<(), Error> {
    encoder.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

/// Kinds of which none was seen are left out.
fn durations<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    kinds: impl Iterator<Item = (&'static str, &'a Durations)>,
) -> Result<(), Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    for (kind, durations) in kinds {
        let (classes, sum) = durations.snapshot();
        let count = classes.iter().map(|(_, count)| count).sum();
        if count > 0 {
            family.encode_family(&[("operation", kind)])?.encode_histogram::<NoLabelSet>(sum, count, &classes, None)?;
        }
    }
    Ok(())
}

impl Collector for Told {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let (layers, encoder) = (&self.layers, &mut encoder);
        let mountpoint = layers.mountpoint.display().to_string();
        let labels = [("version", env!("CARGO_PKG_VERSION")), ("source", &layers.source), ("mountpoint", &mountpoint)];
        encoder.encode_descriptor("mount", "What is mounted where", None, MetricType::Gauge)?.encode_family(&labels)?.encode_gauge(&1)?;
        gauge(encoder, "uptime_seconds", "Since it was mounted", layers.started.elapsed().as_secs())?;

        gauge(encoder, "operations_under_way", "FUSE operations without an answer yet", self.operations.under_way() as u64)?;
        durations(encoder, ("operation_seconds", "FUSE operations, until they were answered"), self.operations.took())?;

        let (requests, usage) = (layers.client.counters(), layers.client.usage());
        let mut family = encoder.encode_descriptor(
            "s3_requests",
            "Requests to S3 by HTTP status (none: no answer came), retries included",
            None,
            MetricType::Counter,
        )?;
        for ((operation, status), count) in requests.answers() {
            let status = if status == 0 { "none".to_owned() } else { status.to_string() };
            counter(&mut family, &[("operation", operation.name()), ("status", &status)], count)?;
        }
        let took = requests.took().map(|(operation, durations)| (operation.name(), durations));
        durations(encoder, ("s3_request_seconds", "Requests to S3, until the head of the answer was there"), took)?;
        let mut family = encoder.encode_descriptor("s3_bytes", "Bytes of bodies to and from S3", None, MetricType::Counter)?;
        counter(&mut family, &[("direction", "sent")], usage.sent)?;
        counter(&mut family, &[("direction", "received")], usage.received)?;
        if let Some(cost) = layers.prices.estimate(layers.client.is_aws(), &usage) {
            let help = "What requests and bytes cost, about";
            let mut family = encoder.encode_descriptor("cost_estimate", help, None, MetricType::Gauge)?;
            family.encode_family(&[("currency", cost.currency.as_str())])?.encode_gauge(&cost.total())?;
        }

        let cache = layers.cache.usage();
        gauge(encoder, "cache_files", "Object versions in the cache", cache.files)?;
        gauge(encoder, "cache_bytes", "Bytes in the cache", cache.bytes)?;

        let uploads = layers.uploads();
        let of = |picked: Picked| uploads.iter().filter(move |upload| picked(upload));
        let mut files = encoder.encode_descriptor("queue_files", "Files that are not in S3 yet", None, MetricType::Gauge)?;
        for (state, picked) in STATES {
            files.encode_family(&[("state", *state)])?.encode_gauge(&(of(*picked).count() as i64))?;
        }
        let mut bytes = encoder.encode_descriptor("queue_bytes", "Bytes of them that S3 does not have", None, MetricType::Gauge)?;
        for (state, picked) in STATES {
            let left: u64 = of(*picked).map(|upload| upload.size.saturating_sub(upload.sent)).sum();
            bytes.encode_family(&[("state", *state)])?.encode_gauge(&(left as f64))?;
        }
        gauge(encoder, "queue_deletes", "Deletes that were not sent yet, or were refused", layers.writeback.deletes(0).0 as u64)?;
        gauge(
            encoder,
            "conflict_copies",
            "Files that were published beside somebody else's change",
            layers.writeback.conflicts().len() as u64,
        )
    }
}

type Picked = fn(&Upload) -> bool;

/// A file is in one of them.
const STATES: &[(&str, Picked)] = &[
    ("written", |upload| upload.is_written()),
    ("queued", |upload| !upload.is_written() && !upload.waits && !upload.held),
    ("temporary", |upload| !upload.is_written() && !upload.waits && upload.held),
    // Nothing becomes of it by itself.
    ("parked", |upload| !upload.is_written() && upload.waits),
];
