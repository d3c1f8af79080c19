//! What a user asks of the cache: what it holds, whether that is what came, and that it goes (`packmule cache`).

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use super::block::{BLOCK, bytes_of};
use super::disk::{Disk, FileName};
use super::entry::{Entry, Piece};
use super::inner::Inner;
use super::memory::Buffers;
use super::{Cache, CacheConfig};

/// Blocks that are read at once.
const AT_ONCE: u64 = 16;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheWish {
    /// What it holds.
    Show,
    /// Every block is read and compared with its sum.
    Check,
    /// All that nobody reads or pinned is removed.
    Empty,
}

/// What a cache holds, and what became of the wish.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheReport {
    /// Its directory; `None` where it is in memory alone.
    pub dir: Option<PathBuf>,
    /// Object versions.
    pub files: u64,
    /// Those that are whole.
    pub whole: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Its bound in bytes.
    pub max_size: u64,
    /// After a check: objects with blocks that were not what had come, and how many. Those are fetched again.
    pub damaged: Vec<(String, u64)>,
    /// After a check: bytes that were compared.
    pub checked: u64,
    /// After an emptying: files and bytes that are gone.
    pub freed: (u64, u64),
}

impl Cache {
    /// The caches below a `cache_dir` that no mount has, each locked until it is dropped.
    ///
    /// # Errors
    /// When the directory cannot be read; one that does not exist holds none.
    pub fn left_in(parent: &Path) -> io::Result<Vec<Arc<Cache>>> {
        let found = Disk::open_left(parent)?;
        Ok(found.into_iter().map(|(disk, files)| Cache::of(Inner::with(CacheConfig::unbounded(parent), Some(disk), files))).collect())
    }

    /// Does what is asked, and says what is there then.
    pub async fn upkeep(&self, wish: CacheWish) -> CacheReport {
        let mut report = CacheReport::default();
        match wish {
            CacheWish::Show => {}
            CacheWish::Check => self.inner.check(&mut report).await,
            CacheWish::Empty => {
                let inner = Arc::clone(&self.inner);
                report.freed = tokio::task::spawn_blocking(move || inner.empty()).await.unwrap_or_default();
            }
        }
        (report.files, report.bytes) = self.inner.usage();
        report.whole = self.inner.index.lock().shelf.whole();
        (report.dir, report.max_size) = (self.dir(), self.max_size());
        report
    }
}

impl Inner {
    async fn check(self: &Arc<Self>, report: &mut CacheReport) {
        let files = self.index.lock().shelf.oldest_first();
        for (id, slot) in files {
            let Some(entry) = self.entry_of(FileName { id, serial: slot.serial }).await else { continue };
            self.load(&entry).await;
            let (buffers, checks) = (Arc::clone(&self.buffers), Arc::clone(&entry));
            let (bytes, bad) = tokio::task::spawn_blocking(move || checks.check(&buffers)).await.unwrap_or_default();
            report.checked += bytes;
            if bad > 0 {
                let source = entry.source();
                report.damaged.push((format!("s3://{}/{}", source.bucket, source.key), bad));
                self.note_unsaved(&entry);
            }
            self.account(&entry);
        }
    }

    /// The entry of a cache file, which its readers share.
    async fn entry_of(self: &Arc<Self>, name: FileName) -> Option<Arc<Entry>> {
        let open = self.index.lock().entries.get(&name.id).and_then(Weak::upgrade);
        if open.is_some() {
            return open;
        }
        let inner = Arc::clone(self);
        let sidecar = tokio::task::spawn_blocking(move || inner.disk.as_ref()?.sidecar(name)).await.ok()??;
        Some(self.entry(&sidecar.version))
    }

    /// Removes what nobody reads and nobody pinned. Gives its files and bytes. Blocks.
    fn empty(&self) -> (u64, u64) {
        let pinned = self.pinned.versions();
        let gone = self.remove_files(|shelf, is_read| shelf.clear(|id| is_read(id) || pinned.contains(&id)));
        (gone.len() as u64, gone.iter().map(|(_, slot)| slot.bytes).sum())
    }
}

impl Entry {
    /// Reads all blocks that are here and have sums. Those that do not match are missing from then on. Gives the bytes that were
    /// compared and the number of bad blocks. Blocks.
    fn check(&self, buffers: &Arc<Buffers>) -> (u64, u64) {
        let (mut bytes, mut bad, mut next) = (0, 0, 0);
        let count = self.size.div_ceil(BLOCK);
        while next < count {
            let Some((run, piece)) = self.run_from(next) else { break };
            next = run.end;
            let before = self.state().blocks.present();
            if self.assemble(vec![piece], buffers).is_some() {
                let compared = bytes_of(run, self.size);
                bytes += compared.end - compared.start;
            } else {
                bad += before.saturating_sub(self.state().blocks.present());
                // The rest of the run once more.
                next = run.start;
            }
        }
        (bytes, bad)
    }

    /// The first blocks from `from` on that are here, as many as are read at once.
    fn run_from(&self, from: u64) -> Option<(Range<u64>, Piece)> {
        let state = self.state();
        let (_, file) = state.file.as_ref()?;
        let start = (from..self.size.div_ceil(BLOCK)).find(|block| state.blocks.has(*block))?;
        let sums: Vec<_> = (start..start + AT_ONCE).map_while(|block| state.blocks.sum(block)).map(Some).collect();
        let run = start..start + sums.len() as u64;
        Some((run.clone(), Piece::Disk(Arc::clone(file), run, sums)))
    }
}
