//! The composition root: s3 → cache → writeback → vfs → fuse, and the way back.
//!
//! Nothing outside is changed before the credentials and the bucket are proved, and nothing is mounted before the spool was
//! recovered. On the way back the vfs refuses new writers and publishes what it deferred, the spool is drained while files
//! can still be read, then the kernel lets go.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytesize::ByteSize;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

use crate::cache::{Cache, CacheConfig};
use crate::config::{self, Config, Source};
use crate::control::server::Server;
use crate::control::{DELETES_NAMED, Upload};
use crate::cost::Prices;
use crate::fuse::session::{Options, Session};
use crate::s3::client::Client;
use crate::s3::{Account, explain};
use crate::vfs::{self, Root, Vfs, VfsConfig};
use crate::writeback::{self, Pending, SpoolConfig, Writeback};

mod dead;
mod handler;
mod hooks;
mod metrics;
mod point;

pub(crate) use dead::clear_dead;
pub(crate) use point::{detach, device, helper, others, user_allow_other};
pub use point::{remount, unmount};

/// How long a store that refuses, or whose name is unknown, is asked again at start.
const REFUSED: Duration = Duration::from_secs(20);

/// How long a store that does not answer at all is waited for at start.
const SILENT: Duration = Duration::from_secs(60);

/// How long the filesystem may take to answer for its root, which asks S3 nothing.
const FIRST_ANSWER: Duration = Duration::from_secs(30);

/// Bytes a second that a connection which reads is to have at least, where `bwlimit` is set.
const PACED: u64 = 128 << 10;

/// What the layers of one mount share with whoever asks about it.
pub(crate) struct Layers {
    pub source: String,
    pub mountpoint: PathBuf,
    pub client: Arc<Client>,
    pub cache: Arc<Cache>,
    pub writeback: Writeback,
    pub vfs: Arc<Vfs>,
    pub close_timeout: Duration,
    pub read_only: bool,
    pub prices: Prices,
    pub started: Instant,
}

/// A running mount.
pub struct Mount {
    layers: Arc<Layers>,
    session: Session,
    /// `None` where the socket could not be made.
    control: Option<Server>,
    /// Where `metrics_addr` asks for it.
    metrics: Option<metrics::Endpoint>,
    umounts: mpsc::Receiver<Asker>,
}

/// Who asked for the unmount over the control socket and waits to hear what is left.
pub struct Asker {
    answer: oneshot::Sender<Vec<Upload>>,
    /// How long the uploads are waited for at most; without one, as long as bytes move.
    pub timeout: Option<Duration>,
}

impl Asker {
    /// Tells what could not be uploaded, and gives the answer a moment to leave.
    pub async fn answer(self, left: Vec<Upload>) {
        if self.answer.send(left).is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Mount {
    /// Mounts. When this returns, the filesystem answers.
    ///
    /// # Errors
    /// One line that names what is wrong and the remedy; nothing is mounted then.
    pub async fn start(config: &Config) -> anyhow::Result<Mount> {
        for word in without_effect(config) {
            tracing::warn!("{word}= is understood, and this version does nothing with it yet");
        }
        let for_point = config.clone();
        let mountpoint = tokio::task::spawn_blocking(move || point::prepare(&for_point)).await??;
        let metrics = match config.metrics_addr {
            Some(address) => Some(metrics::bind(address).await?),
            None => None,
        };
        let hooks = hooks::Publication::new(config)?;
        let client = Client::new(config.client.clone()).map_err(explained)?;
        let root = open_root(config, &client).await?;
        let cache = Cache::open(cache_config(config, &client))
            .await
            .with_context(|| format!("cache_dir: {} cannot be used", config.cache_dir.display()))?;
        let hooks = Arc::new(hooks.with_cache(config, &cache));
        let writeback = Writeback::open(spool_config(config, &client), client.clone(), hooks)
            .await
            .with_context(|| format!("spool_dir: {} cannot be used", config.spool_dir.display()))?;
        if let Root::Bucket { store, prefix } = &root
            && !config.mount.ro
        {
            // Now, so that no close waits for it.
            writeback.queues(store.as_ref(), &format!("{prefix}packmule")).await;
        }
        let vfs = Vfs::new(vfs_config(config), root, cache.clone(), writeback.clone())
            .await
            .with_context(|| format!("{}: cannot be used for the state", config.state_dir.display()))?;

        let layers = Layers {
            source: config.fsname.clone(),
            mountpoint,
            client,
            cache,
            writeback,
            vfs,
            close_timeout: config.close_timeout,
            read_only: config.mount.ro,
            prices: config.prices.clone(),
            started: Instant::now(),
        };
        Self::attach(Arc::new(layers), fuse_options(config), metrics).await
    }

    /// Hands the finished layers to the kernel.
    async fn attach(layers: Arc<Layers>, options: Options, listener: Option<TcpListener>) -> anyhow::Result<Mount> {
        let (vfs, runtime, mountpoint) = (layers.vfs.clone(), tokio::runtime::Handle::current(), layers.mountpoint.clone());
        let started = tokio::task::spawn_blocking(move || Session::start(vfs, runtime, &mountpoint, &options)).await?;
        let session = started.map_err(|error| point::explain(error, &layers.mountpoint))?;

        let (ask, umounts) = mpsc::channel(1);
        let handler = Arc::new(handler::Answers::new(layers.clone(), session.operations(), ask));
        let control = Server::start(&layers.mountpoint, handler)
            .inspect_err(|error| tracing::warn!(%error, "no control socket: packmule status and umount cannot reach this mount"))
            .ok();
        let metrics = listener.map(|listener| metrics::Endpoint::start(listener, layers.clone(), session.operations()));
        let mount = Mount { layers, session, control, metrics, umounts };

        // Not through the kernel, with which hands were shaken by now: a process that is killed while it waits for itself never ends,
        // and whoever asks its mount hangs.
        let vfs = mount.layers.vfs.clone();
        match tokio::time::timeout(FIRST_ANSWER, vfs.getattr(vfs::ROOT, None)).await {
            Ok(Ok(_)) => Ok(mount),
            failure => {
                let mountpoint = mount.layers.mountpoint.clone();
                let _ = mount.unmount().await;
                let reason = match failure {
                    Ok(Err(error)) => crate::fuse::describe(error),
                    _ => format!("no answer within {} s", FIRST_ANSWER.as_secs()),
                };
                anyhow::bail!("{}: mounted, but its root does not answer: {reason}", mountpoint.display())
            }
        }
    }

    /// Where it is mounted, links resolved.
    pub fn mountpoint(&self) -> &Path {
        &self.layers.mountpoint
    }

    /// The S3 client of this mount.
    pub fn client(&self) -> &Arc<Client> {
        &self.layers.client
    }

    /// Resolves when somebody else unmounted it.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        self.session.ended()
    }

    /// Resolves when `packmule umount` asks for the end.
    pub async fn umount_asked(&mut self) -> Asker {
        match self.umounts.recv().await {
            Some(asker) => asker,
            // No control socket, so nobody ever asks.
            None => std::future::pending().await,
        }
    }

    /// What is on its way, for who watches it from outside.
    pub fn outlook(&self) -> Outlook {
        Outlook(self.layers.clone())
    }

    /// Drops listings.
    pub async fn refresh(&self) {
        self.layers.vfs.refresh().await;
    }

    /// What is not in S3 yet.
    pub fn work(&self) -> Vec<Upload> {
        self.layers.work()
    }

    /// Refuses new writers, publishes what was deferred and waits for the uploads, as long as bytes move; gives what is
    /// left, which stays in the spool. May be dropped at any time, which leaves more.
    pub async fn drain(&self) -> Vec<Upload> {
        self.layers.vfs.shutdown().await;
        let report = self.layers.writeback.drain(self.layers.close_timeout).await;
        tracing::info!(published = report.published, left = report.left.len(), "drained");
        self.layers.work()
    }

    /// Unmounts and ends the layers. Does not wait for uploads: see [`Mount::drain`].
    ///
    /// # Errors
    /// What umount(2) answered.
    pub async fn unmount(self) -> anyhow::Result<()> {
        let Mount { layers, session, control, metrics, umounts } = self;
        let mountpoint = layers.mountpoint.clone();
        let unmounted = tokio::task::spawn_blocking(move || session.unmount()).await?;
        // Only now: until the mount is gone, `packmule umount` must find somebody to talk to.
        drop((control, metrics, umounts));
        layers.vfs.close().await;
        layers.cache.shutdown().await;
        unmounted.with_context(|| format!("{}: cannot be unmounted", mountpoint.display()))
    }
}

/// A view of what is on its way, which outlives no mount and keeps none.
#[derive(Clone)]
pub struct Outlook(Arc<Layers>);

impl Outlook {
    /// What is on its way; what waits for somebody's word is not.
    pub fn pending(&self) -> Pending {
        self.0.writeback.pending()
    }

    /// The same in words: `2 files (1.2 GiB)`.
    pub fn shown(&self) -> String {
        let Pending { files, bytes, .. } = self.pending();
        format!("{files} {} ({})", if files == 1 { "file" } else { "files" }, ByteSize::b(bytes).display().iec())
    }

    /// What is mounted.
    pub fn source(&self) -> &str {
        &self.0.source
    }
}

impl Layers {
    /// What the spool holds.
    pub fn uploads(&self) -> Vec<Upload> {
        self.writeback.status().iter().map(Upload::from).collect()
    }

    /// What is not as in S3 yet: what the spool holds, and deletes. Of many deletes the first are named.
    pub fn work(&self) -> Vec<Upload> {
        let (count, first) = self.writeback.deletes(DELETES_NAMED);
        Upload::with_deletes(self.uploads(), count, &first)
    }
}

fn explained(error: crate::s3::S3Error) -> anyhow::Error {
    anyhow::anyhow!(explain::explain(&error))
}

/// Asks S3 for the first time: is the bucket there, may we list it?
async fn open_root(config: &Config, client: &Arc<Client>) -> anyhow::Result<Root> {
    match &config.source {
        Source::Bucket { bucket, prefix } => {
            let store = client.probe(bucket, prefix, REFUSED, SILENT).await.map_err(explained)?;
            Ok(Root::Bucket { store, prefix: prefix.clone() })
        }
        Source::AllBuckets => {
            let buckets = tokio::time::timeout(SILENT, client.buckets()).await;
            buckets
                .with_context(|| {
                    format!("{}: no answer within {} s: check endpoint_url and the network", client.endpoint(), SILENT.as_secs())
                })?
                .map_err(explained)?;
            Ok(Root::Account(client.clone()))
        }
    }
}

/// Names what the cache holds across restarts: endpoint and bucket, or the account.
fn identity(config: &Config, client: &Client) -> String {
    let endpoint = client.endpoint();
    match &config.source {
        Source::Bucket { bucket, .. } => format!("{endpoint}/{bucket}"),
        Source::AllBuckets => format!("{endpoint}/*/{}", config.client.profile.as_deref().unwrap_or_default()),
    }
}

fn cache_config(config: &Config, client: &Client) -> CacheConfig {
    CacheConfig {
        dir: config.cache_dir.clone(),
        identity: identity(config, client),
        max_size: config.cache_size,
        min_free_space: config.min_free_space,
        memory_limit: config.memory_limit,
        read_ahead: config.read_ahead,
        // Of many that share a narrow pace each would be silent so long that it seems dead.
        max_connections: config
            .bwlimit
            .map_or(config.max_connections, |rate| config.max_connections.min(usize::try_from(rate / PACED).unwrap_or(usize::MAX).max(2))),
        checks_ranges_over_http: client.is_plain_http(),
    }
}

fn spool_config(config: &Config, client: &Client) -> SpoolConfig {
    SpoolConfig {
        dir: config.spool_dir.clone(),
        service: client.service(),
        bucket: match &config.source {
            Source::Bucket { bucket, .. } => Some(bucket.clone()),
            Source::AllBuckets => None,
        },
        read_only: config.mount.ro,
        max_size: config.spool_size,
        min_free_space: config.min_free_space,
        part_size: config.part_size,
        max_connections: config.max_connections,
        memory_limit: config.memory_limit,
        close_timeout: config.close_timeout,
        write_back: config.write_back,
        on_conflict: match config.on_conflict {
            config::OnConflict::Keep => writeback::OnConflict::Keep,
            config::OnConflict::Overwrite => writeback::OnConflict::Overwrite,
            config::OnConflict::Fail => writeback::OnConflict::Fail,
        },
    }
}

fn vfs_config(config: &Config) -> VfsConfig {
    VfsConfig {
        uid: config.uid,
        gid: config.gid,
        mounter_uid: nix::unistd::geteuid().as_raw(),
        mounter_gid: nix::unistd::getegid().as_raw(),
        umask: config.umask,
        file_mode: config.file_mode,
        dir_mode: config.dir_mode,
        ownership: config.ownership,
        symlinks: config.symlinks,
        metadata_ttl: config.metadata_ttl,
        negative_ttl: config.negative_metadata_ttl,
        read_only: config.mount.ro,
        allow_delete: config.allow_delete,
        allow_bucket_changes: config.allow_bucket_changes,
        ignore: config.ignore.clone(),
        storage_class: config.client.storage_class.clone(),
        mtime: match config.mtime {
            config::MtimeSource::Store => vfs::MtimeSource::Store,
            config::MtimeSource::Local => vfs::MtimeSource::Local,
            config::MtimeSource::Server => vfs::MtimeSource::Server,
        },
        rename_limit: config.rename_limit,
        close_timeout: config.close_timeout,
        write_back: config.write_back,
        max_connections: config.max_connections,
        memory_limit: config.memory_limit,
        state_dir: config.state_dir.clone(),
    }
}

/// Words that were given and that nothing in this version acts on: who relies on one must hear it.
fn without_effect(config: &Config) -> Vec<&'static str> {
    let given = [
        ("cloudfront", matches!(config.cloudfront, config::CloudFront::Ids(_))),
        ("url_host", config.url_host.is_some()),
        ("key_pair_id", config.key_pair_id.is_some()),
        ("private_key", config.private_key.is_some()),
        ("show_versions", config.show_versions),
    ];
    given.into_iter().filter(|(_, given)| *given).map(|(word, _)| word).collect()
}

fn fuse_options(config: &Config) -> Options {
    let flags = &config.mount;
    Options {
        fsname: config.fsname.clone(),
        read_only: flags.ro,
        no_exec: flags.noexec,
        no_atime: flags.noatime,
        sync: flags.sync,
        dir_sync: flags.dirsync,
        allow_other: flags.allow_other,
        allow_root: flags.allow_root,
        default_permissions: flags.default_permissions,
    }
}
