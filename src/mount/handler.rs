//! Answers to what commands ask over the control socket.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use super::{Asker, Layers};
use crate::config::Source;
use crate::control::server::Handler;
use crate::control::{Request, Response, Status, Upload};
use crate::s3::{Account, explain};
use crate::writeback::EntryStatus;

/// S3's limit for a SigV4 link, in seconds.
const LONGEST_LINK: u64 = 604_800;

/// How often a flush looks whether its file is through.
const FLUSH_POLL: Duration = Duration::from_millis(100);

pub(super) struct Answers {
    layers: Arc<Layers>,
    operations: Arc<AtomicUsize>,
    umount: mpsc::Sender<Asker>,
}

impl Answers {
    pub(super) fn new(layers: Arc<Layers>, operations: Arc<AtomicUsize>, umount: mpsc::Sender<Asker>) -> Self {
        Self { layers, operations, umount }
    }

    fn status(&self) -> Status {
        let layers = &self.layers;
        let cache = layers.cache.usage();
        Status {
            source: layers.source.clone(),
            mountpoint: layers.mountpoint.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: layers.started.elapsed().as_secs(),
            operations: self.operations.load(Ordering::Relaxed),
            uploads: layers.uploads(),
            cache_files: cache.files,
            cache_bytes: cache.bytes,
            requests: layers.client.requests().into_iter().map(|(operation, count)| (operation.to_owned(), count)).collect(),
        }
    }

    async fn umount(&self) -> Response {
        let (answer, left) = oneshot::channel();
        if self.umount.try_send(Asker(answer)).is_err() {
            return error("it is being unmounted already");
        }
        match left.await {
            Ok(uploads) => Response::Left { uploads },
            Err(_) => error("it ended before it could say what is left"),
        }
    }

    /// Bucket and key of a path on this mount, for names that are keys as they stand.
    fn locate(&self, path: &Path) -> Result<(String, String), String> {
        let shown = path.display();
        let relative = path.strip_prefix(&self.layers.mountpoint).map_err(|_| format!("{shown}: not on this mount"))?;
        let name = relative.to_str().filter(|name| !name.is_empty()).ok_or_else(|| format!("{shown}: not the name of an object"))?;
        match &self.layers.roots {
            Source::Bucket { bucket, prefix } => Ok((bucket.clone(), format!("{prefix}{name}"))),
            Source::AllBuckets => {
                let (bucket, key) = name.split_once('/').ok_or_else(|| format!("{shown}: a bucket, not an object"))?;
                Ok((bucket.to_owned(), key.to_owned()))
            }
        }
    }

    fn waiting(&self, bucket: &str, key: &str) -> Vec<Upload> {
        self.layers.uploads().into_iter().filter(|upload| upload.bucket == bucket && upload.key == key).collect()
    }

    async fn flush(&self, path: Option<&Path>) -> Result<Response, String> {
        let target = path.map(|path| self.locate(path)).transpose()?;
        let drain = self.layers.writeback.drain(self.layers.close_timeout);
        let Some((bucket, key)) = target else {
            let report = drain.await;
            return Ok(Response::Left { uploads: report.left.iter().map(upload).collect() });
        };
        // One file: the others are started as well, but not waited for.
        tokio::select! {
            _ = drain => {}
            () = async { while !self.waiting(&bucket, &key).is_empty() { tokio::time::sleep(FLUSH_POLL).await } } => {}
        }
        Ok(Response::Left { uploads: self.waiting(&bucket, &key) })
    }

    async fn link(&self, path: &Path, expires_seconds: u64) -> Result<Response, String> {
        if expires_seconds == 0 || expires_seconds > LONGEST_LINK {
            return Err(format!("a link lives 1 to {LONGEST_LINK} seconds (7 days), not {expires_seconds}"));
        }
        let (bucket, key) = self.locate(path)?;
        if !self.waiting(&bucket, &key).is_empty() {
            return Err(format!("{}: not wholly in S3 yet: ask again when packmule status no longer lists it", path.display()));
        }
        let store = self.layers.client.bucket(&bucket).await.map_err(|error| explain::explain(&error))?;
        store.head(&key).await.map_err(|error| explain::explain(&error))?;
        let url = store.presign_get(&key, expires_seconds, &[]).await.map_err(|error| explain::explain(&error))?;
        Ok(Response::Link { url })
    }
}

fn error(message: impl Into<String>) -> Response {
    Response::Error { message: message.into() }
}

/// An entry of the spool in the protocol's words.
pub(super) fn upload(entry: &EntryStatus) -> Upload {
    let phase = serde_json::to_value(entry.phase).ok();
    Upload {
        id: entry.id,
        bucket: entry.bucket.clone(),
        key: entry.key.clone(),
        phase: phase.as_ref().and_then(|phase| phase.as_str()).unwrap_or_default().to_owned(),
        size: entry.size,
        sent: entry.sent,
        reason: entry.reason.clone(),
        recovered: entry.recovered,
        held: entry.held,
    }
}

#[async_trait]
impl Handler for Answers {
    async fn handle(&self, request: Request) -> Response {
        let answer = match request {
            Request::Ping => Ok(Response::Pong { version: env!("CARGO_PKG_VERSION").into(), mountpoint: self.layers.mountpoint.clone(), pid: std::process::id() }),
            Request::Status => Ok(Response::Status(Box::new(self.status()))),
            Request::Flush { path, as_is: false } => self.flush(path.as_deref()).await,
            Request::Flush { path: None, as_is: true } => Err("--as-is needs the name of one file".into()),
            Request::Flush { path: Some(path), as_is: true } => Err(format!("{}: not a temporary name of this mount", path.display())),
            Request::Refresh => {
                self.layers.vfs.refresh().await;
                Ok(Response::Ok)
            }
            Request::Retry { id } => match self.layers.writeback.retry(id) {
                true => Ok(Response::Ok),
                false => Err(format!("{id}: no upload has this number: packmule status lists them")),
            },
            Request::Discard { id } => match self.layers.writeback.discard(id).await {
                true => Ok(Response::Ok),
                false => Err(format!("{id}: no upload has this number: packmule status lists them")),
            },
            Request::Umount => Ok(self.umount().await),
            Request::Link { path, expires_seconds } => self.link(&path, expires_seconds).await,
        };
        answer.unwrap_or_else(error)
    }
}
