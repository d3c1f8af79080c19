//! Answers to what commands ask over the control socket.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use super::{Asker, Layers};
use crate::control::server::Handler;
use crate::control::{Request, Response, Status, Upload};
use crate::fuse::describe;
use crate::s3::{Account, explain};
use crate::vfs::{Caller, Ino, ROOT, Vfs};
use crate::writeback::{DeleteStatus, EntryStatus};

/// S3's limit for a SigV4 link, in seconds.
const LONGEST_LINK: u64 = 604_800;

/// How often a flush looks whether its file is through.
const FLUSH_POLL: Duration = Duration::from_millis(100);

/// Inodes that were looked up, forgotten again at the end.
struct Looked {
    vfs: Arc<Vfs>,
    inodes: Vec<Ino>,
}

impl Looked {
    async fn attribute(&self, name: &str) -> Option<String> {
        let ino = self.inodes.last().copied()?;
        String::from_utf8(self.vfs.getxattr(ino, OsStr::new(name)).await.ok()?).ok()
    }
}

impl Drop for Looked {
    fn drop(&mut self) {
        for ino in &self.inodes {
            self.vfs.forget(*ino, 1);
        }
    }
}

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
            uploads: layers.work(),
            cache_files: cache.files,
            cache_bytes: cache.bytes,
            requests: layers.client.requests().into_iter().map(|(operation, count)| (operation.to_owned(), count)).collect(),
        }
    }

    async fn umount(&self) -> Response {
        let written = self.layers.vfs.open_for_writing();
        if let Some(one) = written.first() {
            let more = if written.len() > 1 { format!(" and {} more files are", written.len() - 1) } else { " is".into() };
            let shown = self.layers.mountpoint.display();
            return error(format!("{shown}: busy: {one}{more} open for writing: let that end, or use -l"));
        }
        let (answer, left) = oneshot::channel();
        if self.umount.try_send(Asker(answer)).is_err() {
            return error("it is being unmounted already");
        }
        match left.await {
            Ok(uploads) => Response::Left { uploads },
            Err(_) => error("it ended before it could say what is left"),
        }
    }

    /// Looks a path of this mount up as the kernel would, so that names which are escaped keys are understood.
    async fn find(&self, path: &Path) -> Result<Looked, String> {
        let shown = path.display();
        let relative = path.strip_prefix(&self.layers.mountpoint).map_err(|_| format!("{shown}: not on this mount"))?;
        let caller = Caller { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw(), pid: std::process::id() };
        let mut looked = Looked { vfs: self.layers.vfs.clone(), inodes: Vec::new() };
        for name in relative {
            let parent = looked.inodes.last().copied().unwrap_or(ROOT);
            let entry = looked.vfs.lookup(caller, parent, name).await.map_err(|error| format!("{shown}: {}", describe(error)))?;
            looked.inodes.push(entry.attr.ino);
        }
        Ok(looked)
    }

    /// Bucket and key of a file of this mount.
    async fn locate(&self, path: &Path) -> Result<(String, String), String> {
        let no_object = || format!("{}: not a file with an object of its own", path.display());
        let url = self.find(path).await?.attribute("user.packmule.url").await.ok_or_else(no_object)?;
        let (bucket, key) = url.strip_prefix("s3://").and_then(|rest| rest.split_once('/')).ok_or_else(no_object)?;
        Ok((bucket.to_owned(), key.to_owned()))
    }

    fn waiting(&self, bucket: &str, key: &str) -> Vec<Upload> {
        self.layers.uploads().into_iter().filter(|upload| upload.bucket == bucket && upload.key == key).collect()
    }

    async fn flush(&self, path: Option<&Path>) -> Result<Response, String> {
        let target = match path {
            Some(path) => Some(self.locate(path).await?),
            None => None,
        };
        let drain = self.layers.writeback.drain(self.layers.close_timeout);
        let Some((bucket, key)) = target else {
            drain.await;
            return Ok(Response::Left { uploads: self.layers.work() });
        };
        // One file: the others are started as well, but not waited for.
        tokio::select! {
            _ = drain => {}
            () = async { while !self.waiting(&bucket, &key).is_empty() { tokio::time::sleep(FLUSH_POLL).await } } => {}
        }
        Ok(Response::Left { uploads: self.waiting(&bucket, &key) })
    }

    /// A temporary name is published by the rename that it waits for, or at its owner's word.
    async fn flush_as_is(&self, path: &Path) -> Result<Response, String> {
        let found = self.find(path).await?;
        if let (Some("temporary"), Some(&ino)) = (found.attribute("user.packmule.status").await.as_deref(), found.inodes.last()) {
            self.layers.vfs.publish_as_is(ino).await.map_err(|error| format!("{}: {}", path.display(), describe(error)))?;
        }
        self.flush(Some(path)).await
    }

    async fn link(&self, path: &Path, expires_seconds: u64) -> Result<Response, String> {
        if expires_seconds == 0 || expires_seconds > LONGEST_LINK {
            return Err(format!("a link lives 1 to {LONGEST_LINK} seconds (7 days), not {expires_seconds}"));
        }
        let (bucket, key) = self.locate(path).await?;
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

/// A delete in the same words: it has no bytes.
pub(super) fn delete(delete: &DeleteStatus) -> Upload {
    Upload {
        id: delete.id,
        bucket: delete.bucket.clone(),
        key: delete.key.clone(),
        phase: if delete.refused { Upload::UNDELETED } else { Upload::DELETING }.into(),
        reason: delete.reason.clone(),
        ..Upload::default()
    }
}

#[async_trait]
impl Handler for Answers {
    async fn handle(&self, request: Request) -> Response {
        let answer = match request {
            Request::Ping => Ok(Response::Pong {
                version: env!("CARGO_PKG_VERSION").into(),
                mountpoint: self.layers.mountpoint.clone(),
                pid: std::process::id(),
            }),
            Request::Status => Ok(Response::Status(Box::new(self.status()))),
            Request::Flush { path, as_is: false } => self.flush(path.as_deref()).await,
            Request::Flush { path: None, as_is: true } => Err("--as-is needs the name of one file".into()),
            Request::Flush { path: Some(path), as_is: true } => self.flush_as_is(&path).await,
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
