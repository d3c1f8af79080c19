//! Which directories are being renamed, how far that is, and which were not renamed, and why: for status.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::super::Vfs;
use super::super::error::Error;
use crate::s3::{S3Error, explain};
use crate::writeback::TreeRename;

/// So many that ended with something to say are remembered.
const TOLD_MOST: usize = 20;

/// The rename of a directory, as status shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RenameReport {
    /// `s3://BUCKET/KEY/` of the old name.
    pub from: String,
    /// `s3://BUCKET/KEY/` of the new name.
    pub to: String,
    /// `listing`, `copying`, `verifying`, `deleting`, `waiting` (for a store that does not answer), `failed`, or `done` where something
    /// is to be said of it.
    pub phase: String,
    /// Objects below the old name.
    pub objects: u64,
    /// Those that are copied, or, once it is deleting, deleted.
    pub done: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes that are copied.
    pub copied: u64,
    /// What failed, or stays where it was.
    pub reason: Option<String>,
    /// An earlier run began it.
    pub resumed: bool,
}

impl RenameReport {
    /// Of one that waits for its next mount.
    pub fn waiting(rename: &TreeRename) -> Self {
        let (from, to) = rename.names();
        Self { from, to, phase: "waiting".to_owned(), resumed: true, ..Self::default() }
    }

    /// It is under way, or will be.
    pub fn runs(&self) -> bool {
        !["failed", "done"].contains(&self.phase.as_str())
    }
}

/// Why a rename failed.
#[derive(Clone, Debug)]
pub(super) struct Failed {
    pub error: Error,
    /// For people.
    pub reason: String,
    /// The same may succeed later.
    pub passes: bool,
}

impl Failed {
    pub fn new(error: Error, reason: impl Into<String>) -> Self {
        Self { error, reason: reason.into(), passes: false }
    }
}

impl From<S3Error> for Failed {
    fn from(error: S3Error) -> Self {
        Self { reason: explain::explain(&error), passes: error.kind.passes(), error: error.into() }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        let passes = matches!(error, Error::TimedOut | Error::HostUnreachable);
        let reason = if passes { "the store did not answer" } else { "this machine could not do it: the log says more" };
        Self { error, reason: reason.to_owned(), passes }
    }
}

/// How far one is.
#[derive(Default)]
pub(super) struct Progress {
    from: String,
    to: String,
    resumed: bool,
    told: Mutex<(&'static str, Option<String>)>,
    objects: AtomicU64,
    done: AtomicU64,
    bytes: AtomicU64,
    copied: AtomicU64,
}

impl Progress {
    pub fn enters(&self, phase: &'static str) {
        *self.told.lock() = (phase, None);
    }

    pub fn waits(&self, reason: &str) {
        *self.told.lock() = ("waiting", Some(reason.to_owned()));
    }

    pub fn found(&self, objects: u64, bytes: u64) {
        self.objects.store(objects, Relaxed);
        self.bytes.store(bytes, Relaxed);
        self.done.store(0, Relaxed);
        self.copied.store(0, Relaxed);
    }

    pub fn copied(&self, bytes: u64) {
        self.done.fetch_add(1, Relaxed);
        self.copied.fetch_add(bytes, Relaxed);
    }

    pub fn deletes(&self) {
        self.enters("deleting");
        self.done.store(0, Relaxed);
    }

    pub fn deleted(&self, objects: usize) {
        self.done.fetch_add(objects as u64, Relaxed);
    }

    pub fn objects(&self) -> u64 {
        self.objects.load(Relaxed)
    }

    pub fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }

    fn report(&self) -> RenameReport {
        let (phase, reason) = self.told.lock().clone();
        RenameReport {
            from: self.from.clone(),
            to: self.to.clone(),
            phase: phase.to_owned(),
            objects: self.objects(),
            done: self.done(),
            bytes: self.bytes.load(Relaxed),
            copied: self.copied.load(Relaxed),
            reason,
            resumed: self.resumed,
        }
    }
}

/// Renames of directories: those under way, and the last ones of which something is to be said.
#[derive(Default)]
pub struct TreeRenames(Arc<Mutex<Known>>);

#[derive(Default)]
struct Known {
    running: Vec<Arc<Progress>>,
    told: VecDeque<RenameReport>,
}

/// One that is under way, until this is dropped.
pub(super) struct Running {
    known: Arc<Mutex<Known>>,
    pub progress: Arc<Progress>,
}

impl TreeRenames {
    pub(super) fn begin(&self, what: &TreeRename, resumed: bool) -> Running {
        let (from, to) = what.names();
        let told = Mutex::new(("listing", None));
        let progress = Arc::new(Progress { from, to, resumed, told, ..Progress::default() });
        let mut known = self.0.lock();
        // What was said of the same one before is no longer true.
        known.told.retain(|report| (&report.from, &report.to) != (&progress.from, &progress.to));
        known.running.push(progress.clone());
        Running { known: self.0.clone(), progress }
    }

    fn reports(&self) -> Vec<RenameReport> {
        let known = self.0.lock();
        known.running.iter().map(|progress| progress.report()).chain(known.told.iter().cloned()).collect()
    }
}

impl Running {
    /// It ends with something to say.
    pub fn tell(&self, phase: &'static str, reason: &str) {
        *self.progress.told.lock() = (phase, Some(reason.to_owned()));
        let mut known = self.known.lock();
        known.told.push_back(self.progress.report());
        while known.told.len() > TOLD_MOST {
            known.told.pop_front();
        }
        known.running.retain(|other| !Arc::ptr_eq(other, &self.progress));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.known.lock().running.retain(|other| !Arc::ptr_eq(other, &self.progress));
    }
}

impl Vfs {
    /// Renames of directories that are under way, then the last ones of which something is to be said.
    pub fn renames(&self) -> Vec<RenameReport> {
        self.tree_renames.reports()
    }
}
