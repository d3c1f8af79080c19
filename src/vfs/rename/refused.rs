//! The kernel takes ESTALE of a rename for an outdated name: it looks both up again and asks once more. Somebody else's change of the
//! target is known by then, and would be replaced; what was parked has no name any more. So the same call is refused once more.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::super::error::Error;
use super::super::queued::split;
use super::super::{Ino, Vfs};
use super::Move;
use crate::writeback::Staged;

/// The kernel asks again at once: later it is somebody's new attempt.
const REPEATED_WITHIN: Duration = Duration::from_secs(1);

/// One call of rename(2).
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Asked {
    /// The thread that calls.
    pub caller: u32,
    pub from: (Ino, OsString),
    pub to: (Ino, OsString),
}

struct Refused {
    asked: Asked,
    /// What keeps the old name until then.
    parked: Option<(Ino, Arc<Staged>)>,
}

/// Renames that were answered ESTALE and not asked again yet.
#[derive(Default)]
pub struct RefusedRenames(Mutex<Vec<Refused>>);

impl Vfs {
    /// Answers ESTALE (promise 12), this time and when the kernel repeats the call.
    pub(super) fn refuse(&self, step: &Move, parked: Option<(Ino, Arc<Staged>)>) -> Error {
        let asked = step.asked.clone();
        if let Some((ino, staged)) = &parked {
            let (parent, name) = &asked.from;
            let segment = split(&step.source.key).1.to_owned();
            let mut table = self.table.lock();
            if table.link(*ino, *parent, name, segment)
                && let Some(node) = table.get_mut(*ino)
            {
                node.file.staged = Some(staged.clone());
            }
        }
        self.refused.0.lock().push(Refused { asked: asked.clone(), parked });
        if let Some(this) = self.shared() {
            self.spawn(async move {
                this.pause(REPEATED_WITHIN).await;
                this.was_refused(&asked);
            });
        }
        Error::Stale
    }

    /// True of a call that was refused a moment ago.
    pub(super) fn was_refused(&self, asked: &Asked) -> bool {
        let refused = {
            let mut all = self.refused.0.lock();
            all.iter().position(|refused| refused.asked == *asked).map(|at| all.swap_remove(at))
        };
        let Some(refused) = refused else { return false };
        if let Some((ino, staged)) = refused.parked {
            self.detach(ino, &staged, Error::Stale);
        }
        true
    }
}
