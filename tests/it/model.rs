//! The filesystem against a model of one: any sequence of calls, edits by another client and remounts gives the bytes,
//! names and errors that a local filesystem would give.

mod reference;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use packmule::cache::{Cache, CacheConfig};
use packmule::s3::ObjectHeaders;
use packmule::vfs::{Caller, Error, Fh, Ino, Kind, MtimeSource, ROOT, Root, SetAttr, Vfs, VfsConfig};
use packmule::writeback::{Hooks, OnConflict, Published, SpoolConfig, Writeback};
use proptest::prelude::*;
use proptest_state_machine::{StateMachineTest, prop_state_machine};
use reference::{Answer, Calls, Model, Node, Outcome, Step, done};

use crate::support::client::{Connected, connect};
use crate::support::files::noise;
use crate::support::store::Store;

/// The filesystem under test, without a kernel: on the double, with folders that outlive a remount.
struct Subject {
    runtime: tokio::runtime::Runtime,
    store: Store,
    home: tempfile::TempDir,
    connected: Connected,
    layers: Option<(Arc<Vfs>, Writeback)>,
    held: BTreeMap<u8, Fh>,
    model: Model,
}

struct NoHooks;

impl Hooks for NoHooks {
    fn headers(&self, _bucket: &str, _key: &str) -> ObjectHeaders {
        ObjectHeaders::default()
    }

    fn published(&self, _published: &Published) {}

    fn make_room(&self, _bytes: u64) {}
}

fn caller() -> Caller {
    Caller { uid: 0, gid: 0, pid: std::process::id() }
}

impl Subject {
    fn start(&mut self) {
        let home = self.home.path().to_owned();
        let (client, store) = (self.connected.client.clone(), self.connected.bucket.clone());
        let layers = self.runtime.block_on(async {
            let cache = Cache::open(CacheConfig {
                dir: home.join("cache"),
                identity: "model".into(),
                max_size: 64 << 20,
                min_free_space: 0,
                memory_limit: 64 << 20,
                read_ahead: None,
                max_connections: 8,
                checks_ranges_over_http: true,
            });
            let spool = SpoolConfig {
                dir: home.join("spool"),
                service: "model".into(),
                bucket: None,
                read_only: false,
                max_size: 1 << 30,
                min_free_space: 0,
                part_size: None,
                max_connections: 8,
                memory_limit: 64 << 20,
                close_timeout: Duration::from_secs(30),
                write_back: Duration::ZERO,
                on_conflict: OnConflict::Keep,
            };
            let writeback = Writeback::open(spool, client.clone(), Arc::new(NoHooks)).await.unwrap();
            let config = VfsConfig {
                storage_class: None,
                uid: None,
                gid: None,
                mounter_uid: 0,
                mounter_gid: 0,
                umask: None,
                file_mode: None,
                dir_mode: None,
                ownership: None,
                symlinks: true,
                metadata_ttl: Duration::from_secs(5),
                negative_ttl: Duration::from_secs(5),
                read_only: false,
                allow_delete: true,
                allow_bucket_changes: false,
                ignore: Vec::new(),
                mtime: MtimeSource::Store,
                rename_limit: 1000,
                close_timeout: Duration::from_secs(30),
                write_back: Duration::ZERO,
                max_connections: 8,
                memory_limit: 64 << 20,
                state_dir: home.join("state"),
            };
            let root = Root::Bucket { store, prefix: "below/".into() };
            let vfs = Vfs::new(config, root, cache.await.unwrap(), writeback.clone()).await.unwrap();
            (vfs, writeback)
        });
        self.layers = Some(layers);
    }

    fn stop(&mut self) {
        let Some((vfs, writeback)) = self.layers.take() else { return };
        self.runtime.block_on(async {
            for fh in std::mem::take(&mut self.held).into_values() {
                vfs.flush(caller(), fh).await.unwrap();
                vfs.release(fh).await;
            }
            vfs.shutdown().await;
            let report = writeback.drain(Duration::from_secs(30)).await;
            assert!(report.left.is_empty(), "left: {:?}", report.left);
            vfs.close().await;
        });
    }

    fn vfs(&self) -> &Vfs {
        &self.layers.as_ref().unwrap().0
    }

    /// As the kernel walks a path, one lookup a name.
    async fn walk(&self, path: &str) -> Result<Ino, Error> {
        let mut at = ROOT;
        for step in path.split('/').filter(|step| !step.is_empty()) {
            if at != ROOT && self.vfs().getattr(at, None).await?.0.kind != Kind::Directory {
                return Err(Error::NotDirectory);
            }
            at = self.vfs().lookup(caller(), at, OsStr::new(step)).await?.attr.ino;
        }
        Ok(at)
    }

    async fn walk_parent<'a>(&self, path: &'a str) -> Result<(Ino, &'a OsStr), Error> {
        let parent = self.walk(Model::parent(path)).await?;
        if self.vfs().getattr(parent, None).await?.0.kind != Kind::Directory {
            return Err(Error::NotDirectory);
        }
        Ok((parent, OsStr::new(path.rsplit('/').next().unwrap())))
    }

    async fn open(&self, path: &str, flags: i32) -> Result<Fh, Error> {
        let (parent, name) = self.walk_parent(path).await?;
        match self.vfs().lookup(caller(), parent, name).await {
            Ok(entry) if entry.attr.kind == Kind::Directory => Err(Error::IsDirectory),
            Ok(entry) => Ok(self.vfs().open(caller(), entry.attr.ino, flags).await?.fh),
            Err(Error::NoEntry) if flags & libc::O_CREAT != 0 => Ok(self.vfs().create(caller(), parent, name, 0o644, 0, flags).await?.1.fh),
            Err(error) => Err(error),
        }
    }

    async fn close(&self, fh: Fh) -> Result<(), Error> {
        let result = self.vfs().flush(caller(), fh).await;
        self.vfs().release(fh).await;
        result
    }

    async fn put(&self, path: &str, flags: i32, offset: usize, bytes: Vec<u8>) -> Outcome {
        let fh = self.open(path, flags | libc::O_CREAT | libc::O_WRONLY).await?;
        self.vfs().write(fh, offset as u64, Bytes::from(bytes), false).await?;
        self.close(fh).await?;
        Ok(Answer::Done)
    }

    async fn read_all(&self, fh: Fh) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        loop {
            let piece = self.vfs().read(fh, bytes.len() as u64, 128 << 10).await?;
            if piece.is_empty() {
                return Ok(bytes);
            }
            bytes.extend_from_slice(&piece);
        }
    }

    async fn list(&self, path: &str) -> Outcome {
        let ino = self.walk(path).await?;
        let fh = self.vfs().opendir(ino).await?;
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let before = offset;
            // A small buffer: every third entry is refused once.
            let mut room = 3;
            let mut sink = |entry: packmule::vfs::DirEntry<'_>| {
                room -= 1;
                if room < 0 {
                    return false;
                }
                names.push(entry.name.to_str().unwrap().to_owned());
                offset = entry.offset;
                true
            };
            self.vfs().readdir(fh, before, false, &mut sink).await?;
            if offset == before {
                break;
            }
        }
        self.vfs().releasedir(fh).await;
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(Answer::Names(names))
    }

    async fn perform(&mut self, step: &Step) -> Outcome {
        match step {
            Step::Write { path, offset, len, seed, truncate } => {
                self.put(path, if *truncate { libc::O_TRUNC } else { 0 }, *offset, noise(*seed, *len)).await
            }
            Step::Append { path, len, seed } => self.put(path, libc::O_APPEND, 0, noise(*seed, *len)).await,
            Step::Truncate { path, size } => {
                let ino = self.walk(path).await?;
                let set = SetAttr { size: Some(*size as u64), ..SetAttr::default() };
                self.vfs().setattr(caller(), ino, None, set).await.map(|_| Answer::Done)
            }
            Step::Read { path } => {
                let fh = self.open(path, libc::O_RDONLY).await?;
                let bytes = self.read_all(fh).await;
                self.close(fh).await?;
                bytes.map(Answer::Bytes)
            }
            Step::List { path } => self.list(path).await,
            Step::Mkdir { path } => {
                let (parent, name) = self.walk_parent(path).await?;
                self.vfs().mkdir(caller(), parent, name, 0o755, 0).await.map(|_| Answer::Done)
            }
            Step::Rmdir { path } => {
                let (parent, name) = self.walk_parent(path).await?;
                done(self.vfs().rmdir(caller(), parent, name).await)
            }
            Step::Unlink { path } => {
                let (parent, name) = self.walk_parent(path).await?;
                done(self.vfs().unlink(caller(), parent, name).await)
            }
            Step::Rename { from, to } => {
                let (parent, name) = self.walk_parent(from).await?;
                self.vfs().lookup(caller(), parent, name).await?;
                let (new_parent, new_name) = self.walk_parent(to).await?;
                done(self.vfs().rename(caller(), parent, name, new_parent, new_name, 0).await)
            }
            Step::Hold { path, slot } => {
                let fh = self.open(path, libc::O_CREAT | libc::O_RDWR).await?;
                self.held.insert(*slot, fh);
                Ok(Answer::Done)
            }
            Step::WriteHeld { slot, offset, len, seed } => {
                self.vfs().write(self.held[slot], *offset as u64, Bytes::from(noise(*seed, *len)), false).await?;
                Ok(Answer::Done)
            }
            Step::ReadHeld { slot } => self.read_all(self.held[slot]).await.map(Answer::Bytes),
            Step::Close { slot } => {
                let fh = self.held.remove(slot).unwrap();
                done(self.close(fh).await)
            }
            Step::ForeignPut { path, len, seed } => {
                self.settle().await;
                self.store.put(&format!("below/{path}"), noise(*seed, *len));
                self.vfs().refresh().await;
                Ok(Answer::Done)
            }
            Step::ForeignDelete { path } => {
                self.settle().await;
                self.store.delete(&format!("below/{path}"));
                self.vfs().refresh().await;
                Ok(Answer::Done)
            }
            Step::Remount => unreachable!("done without the runtime"),
        }
    }

    /// A release goes on in the background, and an empty file is stored 2 s after its close: another client's edit comes after them.
    async fn settle(&self) {
        for _ in 0..500 {
            if self.layers.as_ref().unwrap().1.status().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

struct Filesystem;

impl StateMachineTest for Filesystem {
    type SystemUnderTest = Subject;
    type Reference = Calls;

    fn init_test(_: &Model) -> Subject {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let store = Store::double();
        let connected = connect(&store);
        let home = tempfile::tempdir().unwrap();
        let mut subject = Subject { runtime, store, home, connected, layers: None, held: BTreeMap::new(), model: Model::default() };
        subject.start();
        subject
    }

    fn apply(mut subject: Subject, _: &Model, step: Step) -> Subject {
        let expected = subject.model.perform(&step);
        let handle = subject.runtime.handle().clone();
        let got = if matches!(step, Step::Remount) {
            subject.stop();
            subject.start();
            Ok(Answer::Done)
        } else {
            handle.block_on(subject.perform(&step))
        };
        assert!(got == expected, "{step:?}: got {}, expected {}", short(&got), short(&expected));
        subject
    }

    fn teardown(mut subject: Subject, state: Model) {
        subject.stop();
        for (path, node) in &state.names {
            if let Node::File(id) = node {
                let got = subject.store.get(&format!("below/{path}")).map(|seen| seen.bytes);
                assert!(got.as_deref() == Some(&state.files[id][..]), "{path} is not what was closed");
            }
        }
        assert!(subject.store.unfinished_uploads().is_empty());
    }
}

fn short(outcome: &Outcome) -> String {
    match outcome {
        Ok(Answer::Bytes(bytes)) => format!("{} bytes, sum {}", bytes.len(), bytes.iter().map(|b| u64::from(*b)).sum::<u64>()),
        other => format!("{other:?}"),
    }
}

prop_state_machine! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_calls_is_as_on_a_local_filesystem(sequential 1..40 => Filesystem);
}
