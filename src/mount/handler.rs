//! Answers to what commands ask over the control socket.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::sync::{mpsc, oneshot};

use super::{Asker, Layers};
use crate::control::server::Handler;
use crate::control::{FileStatus, Request, Response, Status, Upload};
use crate::fuse::{Operations, describe};
use crate::publish::links;
use crate::s3::{Account, explain};
use crate::vfs::{Caller, Ino, Kind, PinReport, ROOT, Vfs};
use crate::writeback::{self, DeleteStatus, EntryStatus, Run};

/// S3's limit for a SigV4 link, in seconds.
const LONGEST_LINK: u64 = 604_800;

/// Longest run of bytes that one answer carries.
const LONGEST_RUN: u64 = 4 << 20;

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
    operations: Arc<Operations>,
    umount: mpsc::Sender<Asker>,
}

impl Answers {
    pub(super) fn new(layers: Arc<Layers>, operations: Arc<Operations>, umount: mpsc::Sender<Asker>) -> Self {
        Self { layers, operations, umount }
    }

    async fn status(&self) -> Status {
        let layers = &self.layers;
        let (cache, usage) = (layers.cache.usage(), layers.client.usage());
        Status {
            source: layers.source.clone(),
            mountpoint: layers.mountpoint.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            read_only: layers.read_only,
            uptime_seconds: layers.started.elapsed().as_secs(),
            operations: self.operations.under_way(),
            uploads: layers.work(),
            cache_files: cache.files,
            cache_bytes: cache.bytes,
            endpoint: layers.client.endpoint(),
            cost: layers.prices.estimate(layers.client.is_aws(), &usage),
            requests: usage.requests.into_iter().map(|(operation, count)| (operation.name().to_owned(), count)).collect(),
            bytes_sent: usage.sent,
            bytes_received: usage.received,
            conflicts: layers.writeback.conflicts(),
            pins: self.pins().await,
            renames: layers.vfs.renames(),
            downloads: layers.cache.downloads(),
            errors: layers.client.failures(),
        }
    }

    async fn umount(&self, timeout: Option<Duration>) -> Response {
        let written = self.layers.vfs.open_for_writing();
        if let Some(one) = written.first() {
            let more = if written.len() > 1 { format!(" and {} more files are", written.len() - 1) } else { " is".into() };
            let shown = self.layers.mountpoint.display();
            return error(format!("{shown}: busy: {one}{more} open for writing: let that end, or use -l"));
        }
        let (answer, left) = oneshot::channel();
        if self.umount.try_send(Asker { answer, timeout }).is_err() {
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

    /// What is not in S3 yet: all, or one file.
    async fn left(&self, path: Option<&Path>) -> Result<Response, String> {
        let uploads = match path {
            Some(path) => {
                let (bucket, key) = self.locate(path).await?;
                self.waiting(&bucket, &key)
            }
            None => self.layers.uploads(),
        };
        Ok(Response::Left { uploads })
    }

    /// An entry that waits for somebody's word; the others go their way by themselves, or are in somebody's hands.
    fn entry_that_waits(&self, id: u64) -> Result<EntryStatus, String> {
        let found = self.entry(id)?;
        match found.waits() {
            true => Ok(found),
            false => {
                Err(format!("s3://{}/{} is not parked: packmule status says what it waits for", found.bucket, found.key.escape_debug()))
            }
        }
    }

    fn entry(&self, id: u64) -> Result<EntryStatus, String> {
        let found = self.layers.writeback.status().into_iter().find(|entry| entry.id == id);
        found.ok_or_else(|| format!("{id}: no upload has this number: packmule status lists them"))
    }

    /// A delete that waits, or that the store refused.
    fn delete(&self, id: u64) -> Option<DeleteStatus> {
        self.layers.writeback.deletes(usize::MAX).1.into_iter().find(|delete| delete.id == id)
    }

    async fn retry(&self, id: u64) -> Result<Response, String> {
        if let Some(DeleteStatus { bucket, key, .. }) = self.delete(id) {
            let ended = self.layers.writeback.delete_again(id).await.unwrap_or(Ok(()));
            self.layers.vfs.refresh().await;
            return match ended {
                Ok(()) => Ok(Response::Key { bucket, key }),
                Err(writeback::Error::S3(error)) => Err(explain::explain(&error)),
                Err(error) => Err(format!("s3://{bucket}/{}: {error}", key.escape_debug())),
            };
        }
        let entry = self.entry_that_waits(id)?;
        let name = format!("s3://{}/{}", entry.bucket, entry.key.escape_debug());
        let error = match self.layers.writeback.publish_again(id).await {
            Some(Ok(published)) => {
                // Listings show it again now, not when they are as old as metadata_ttl.
                self.layers.vfs.refresh().await;
                let (bucket, key) = published.map_or((entry.bucket, entry.key), |published| (published.bucket, published.key));
                return Ok(Response::Key { bucket, key });
            }
            Some(Err(writeback::Error::Discarded)) | None => return Err(format!("{name}: it was removed meanwhile")),
            Some(Err(error)) => error,
        };
        let reason = self.entry(id).ok().and_then(|entry| entry.reason).unwrap_or_else(|| error.to_string());
        Err(format!("{name}: {reason}"))
    }

    async fn discard(&self, id: u64) -> Result<Response, String> {
        if self.delete(id).is_none() {
            self.entry_that_waits(id)?;
        }
        self.layers.writeback.discard(id).await;
        Ok(Response::Ok)
    }

    async fn read(&self, id: u64, offset: u64, length: u64, fetch: bool) -> Result<Response, String> {
        let entry = self.entry(id)?;
        if Upload::from(&entry).is_written() {
            return Err(format!("s3://{}/{} is still being written: copy it from the mount", entry.bucket, entry.key.escape_debug()));
        }
        let length = length.min(LONGEST_RUN) as usize;
        let run = self.layers.writeback.run(id, offset, length, fetch).await.ok_or_else(|| format!("{id}: it was removed meanwhile"))?;
        Ok(match run.map_err(|error| error.to_string())? {
            Run::Bytes(bytes) => Response::Bytes { base64: STANDARD.encode(bytes) },
            Run::Zeros(length) => Response::Zeros { length },
            Run::Missing(length, why) => Response::Missing { length, why },
        })
    }

    async fn pins(&self) -> Vec<PinReport> {
        let vfs = self.layers.vfs.clone();
        tokio::task::spawn_blocking(move || vfs.pins()).await.unwrap_or_default()
    }

    async fn pin(&self, path: &Path, off: bool) -> Result<Response, String> {
        let found = self.find(path).await?;
        let ino = found.inodes.last().copied().unwrap_or(ROOT);
        let vfs = &self.layers.vfs;
        let pin = if off { vfs.unpin(ino).await? } else { vfs.pin(ino).await? };
        Ok(Response::Pin { pin })
    }

    /// Where a path of this mount leads, though there may be no such file: what is parked is not in its directory.
    async fn key(&self, path: &Path) -> Result<Response, String> {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return Err(format!("{}: names no file", path.display())) };
        let found = self.find(dir).await?;
        let dir = found.inodes.last().copied().unwrap_or(ROOT);
        let (bucket, key) = self.layers.vfs.key_below(dir, name).map_err(|error| format!("{}: {}", path.display(), describe(error)))?;
        Ok(Response::Key { bucket, key })
    }

    /// Where a file stands. What is parked is told though its folder does not have it.
    async fn file(&self, path: &Path) -> Result<Response, String> {
        let found = self.find(path).await;
        let word = match &found {
            Ok(found) => {
                let directory = match found.inodes.last() {
                    Some(ino) => self.layers.vfs.getattr(*ino, None).await.is_ok_and(|(attr, _)| attr.kind == Kind::Directory),
                    None => true,
                };
                if directory {
                    return Ok(Response::Status(Box::new(self.status().await)));
                }
                found.attribute("user.packmule.status").await
            }
            Err(_) => None,
        };
        let Response::Key { bucket, key } = self.key(path).await? else { return Err(format!("{}: names no file", path.display())) };
        let mut uploads = self.layers.work();
        uploads.retain(|upload| upload.bucket == bucket && upload.key == key);
        let downloads = self.layers.cache.downloads_of(&bucket, &key);
        match found {
            Err(error) if uploads.is_empty() => Err(error),
            _ => Ok(Response::File(Box::new(FileStatus { path: path.to_owned(), word, bucket, key, uploads, downloads }))),
        }
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
        let url = links::presign_in(store.as_ref(), &key, expires_seconds).await.map_err(|error| explain::explain(&error))?;
        Ok(Response::Link { url })
    }
}

fn error(message: impl Into<String>) -> Response {
    Response::Error { message: message.into() }
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
            Request::Status => Ok(Response::Status(Box::new(self.status().await))),
            Request::File { path } => self.file(&path).await,
            Request::Flush { path, as_is, timeout_ms } => {
                let flushed = async {
                    match (&path, as_is) {
                        (None, true) => Err("--as-is needs the name of one file".into()),
                        (Some(path), true) => self.flush_as_is(path).await,
                        (path, false) => self.flush(path.as_deref()).await,
                    }
                };
                match timeout_ms {
                    None => flushed.await,
                    Some(limit) => match tokio::time::timeout(Duration::from_millis(limit), flushed).await {
                        Ok(flushed) => flushed,
                        Err(_) => self.left(path.as_deref()).await,
                    },
                }
            }
            Request::Cache { wish } => {
                let report = Box::new(self.layers.cache.upkeep(wish).await);
                Ok(Response::Cache { report, pins: self.pins().await })
            }
            Request::Pin { path, off } => self.pin(&path, off).await,
            Request::Refresh => {
                self.layers.vfs.refresh().await;
                Ok(Response::Ok)
            }
            Request::Retry { id } => self.retry(id).await,
            Request::Discard { id } => self.discard(id).await,
            Request::Read { id, offset, length, fetch } => self.read(id, offset, length, fetch).await,
            Request::Key { path } => self.key(&path).await,
            Request::Umount { timeout_ms } => Ok(self.umount(timeout_ms.map(Duration::from_millis)).await),
            Request::Link { path, expires_seconds } => self.link(&path, expires_seconds).await,
        };
        answer.unwrap_or_else(error)
    }
}
