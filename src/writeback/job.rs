//! One entry, as the uploader sees it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::Target;
use super::entry::{Entry, Shared};
use super::publish::Snapshot;
use super::state::{Action, Goal, State, Step};
use super::uploader::{Answer, Message};

/// An entry's upload and who waits for it.
pub(crate) struct Job {
    pub entry: Arc<Entry>,
    pub state: State,
    pub snapshot: Option<Arc<Snapshot>>,
    /// Where the open upload is.
    pub upload: Option<Target>,
    pub waiters: Vec<oneshot::Sender<Answer>>,
    /// Want a publication of what was written after the seal of the one under way.
    pub next: Vec<(Goal, Option<oneshot::Sender<Answer>>)>,
    /// Must wait for the answer of PutObject or Complete.
    pub after: Vec<Message>,
    pub running: HashMap<Key, AbortHandle>,
    pub attempts: u32,
    pub bad_digests: u32,
    pub since: Instant,
    /// An answer of this publication was lost: what stands in its way may be its own object.
    pub doubt: bool,
}

/// Names a running action.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Step(u32),
    Part(u32, u32),
}

impl Job {
    pub fn new(entry: Arc<Entry>) -> Self {
        Self {
            entry,
            state: State::new(),
            snapshot: None,
            upload: None,
            waiters: Vec::new(),
            next: Vec::new(),
            after: Vec::new(),
            running: HashMap::new(),
            attempts: 0,
            bad_digests: 0,
            since: Instant::now(),
            doubt: false,
        }
    }

    pub fn is_current(&self, action: &Action) -> bool {
        match action {
            Action::Create { epoch } | Action::Send { epoch, .. } => *epoch == self.state.epoch,
            Action::Prepare { serial } | Action::Check { serial } | Action::Complete { serial } | Action::Put { serial } => {
                *serial == self.state.serial
            }
            Action::Abort { .. } | Action::PartsDone | Action::Published => true,
        }
    }

    /// PutObject or Complete may have been done already: their answer must be known before anything else.
    pub fn is_committing(&self) -> bool {
        matches!(self.state.step, Step::Putting | Step::Completing)
    }
}

/// A transfer's place among `max_connections`, given back however the task ends.
pub(crate) struct Place {
    pub shared: Arc<Shared>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.meter.end();
        self.shared.send(Message::Ended);
    }
}
