//! Notices to the kernel, sent by a thread of their own: writing one may wait for locks that the kernel holds while it waits
//! for an answer of ours, so no request and no lock of the vfs may be behind it.

use std::collections::{HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use fuser::{INodeNo, Notifier};
use parking_lot::{Condvar, Mutex};

use crate::vfs::{Ino, Notify};

/// Notices that may wait. What does not fit is counted and logged; the entries' and attributes' lifetimes then heal what the
/// notice would have, a few seconds later.
const CAPACITY: usize = 16 * 1024;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Notice {
    Entry { parent: Ino, name: OsString },
    Inode { ino: Ino },
    Delete { parent: Ino, child: Ino, name: OsString },
}

#[derive(Default)]
struct Pending {
    queue: VecDeque<Notice>,
    /// The same notices: one that waits is not queued again.
    waiting: HashSet<Notice>,
    dropped: u64,
    closed: bool,
}

/// The queue and its two ends.
#[derive(Default)]
pub(super) struct NoticeQueue {
    pending: Mutex<Pending>,
    wake: Condvar,
}

impl NoticeQueue {
    fn push(&self, notice: Notice) {
        let mut pending = self.pending.lock();
        if pending.closed || pending.waiting.contains(&notice) {
            return;
        }
        if pending.queue.len() >= CAPACITY {
            pending.dropped += 1;
        } else {
            pending.waiting.insert(notice.clone());
            pending.queue.push_back(notice);
        }
        drop(pending);
        self.wake.notify_one();
    }

    /// The next notice and how many were dropped since the last one; `None` once closed.
    fn pop(&self) -> Option<(Notice, u64)> {
        let mut pending = self.pending.lock();
        loop {
            if pending.closed {
                return None;
            }
            if let Some(notice) = pending.queue.pop_front() {
                // From here on the same notice is news again: what it announces may change once more while it is sent.
                pending.waiting.remove(&notice);
                return Some((notice, std::mem::take(&mut pending.dropped)));
            }
            self.wake.wait(&mut pending);
        }
    }

    /// Ends the thread after the notice it is sending.
    pub(super) fn close(&self) {
        self.pending.lock().closed = true;
        self.wake.notify_all();
    }

    /// Starts the thread that sends.
    pub(super) fn start(self: &Arc<Self>, notifier: Notifier) -> io::Result<JoinHandle<()>> {
        let queue = self.clone();
        std::thread::Builder::new().name("notifier".into()).spawn(move || {
            while let Some((notice, dropped)) = queue.pop() {
                if dropped > 0 {
                    tracing::warn!(dropped, "too many notices to the kernel at once: some names may look old until their lifetime ends");
                }
                send(&notifier, &notice);
            }
        })
    }
}

impl Notify for NoticeQueue {
    fn invalidate_entry(&self, parent: Ino, name: &OsStr) {
        self.push(Notice::Entry { parent, name: name.to_owned() });
    }

    fn invalidate_inode(&self, ino: Ino) {
        self.push(Notice::Inode { ino });
    }

    fn delete_entry(&self, parent: Ino, child: Ino, name: &OsStr) {
        self.push(Notice::Delete { parent, child, name: name.to_owned() });
    }

    fn has_room(&self) -> bool {
        self.pending.lock().queue.len() < CAPACITY / 8
    }
}

fn send(notifier: &Notifier, notice: &Notice) {
    let result = match notice {
        Notice::Entry { parent, name } => notifier.inval_entry(INodeNo(*parent), name),
        // Offset 0, length 0: attributes and every page.
        Notice::Inode { ino } => notifier.inval_inode(INodeNo(*ino), 0, 0),
        Notice::Delete { parent, child, name } => match notifier.delete(INodeNo(*parent), INodeNo(*child), name) {
            // A directory that is in use or not empty in the kernel's eyes: dropping the entry is what is left to do.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::EBUSY | libc::ENOTDIR)) => {
                notifier.inval_entry(INodeNo(*parent), name)
            }
            result => result,
        },
    };
    if let Err(error) = result {
        tracing::debug!(?notice, %error, "the kernel did not take a notice");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_waiting_notice_is_queued_once() {
        let queue = NoticeQueue::default();
        queue.invalidate_inode(7);
        queue.invalidate_inode(7);
        queue.invalidate_entry(1, OsStr::new("a"));
        assert_eq!(queue.pop().unwrap().0, Notice::Inode { ino: 7 });
        queue.invalidate_inode(7);
        assert!(matches!(queue.pop().unwrap().0, Notice::Entry { .. }));
        assert_eq!(queue.pop().unwrap().0, Notice::Inode { ino: 7 });
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let queue = NoticeQueue::default();
        for ino in 0..CAPACITY as u64 + 3 {
            queue.invalidate_inode(ino);
        }
        assert_eq!(queue.pop().unwrap(), (Notice::Inode { ino: 0 }, 3));
        queue.close();
        assert!(queue.pop().is_none());
    }
}
