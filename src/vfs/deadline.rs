//! How long a call waits for the store (promise 22).
//!
//! The promise is about the process's call, and the kernel makes several requests of one where the first fails: a name whose
//! revalidation fails is looked up, what read-ahead could not bring is read page by page, a page fault is tried again, the next
//! getdents(2) follows one that had `.` and `..` to give. They come one after the other and from the same thread, so who waited in
//! vain a moment ago gets a short answer: long enough for a store that is back, and short enough for the promise.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Vfs;
use super::error::{Error, Result};
use crate::s3::slow;

/// The first request of a call ends within it. With [`REPEATED`] twice it is less than 90 s.
pub(super) const DEADLINE: Duration = Duration::from_secs(80);
/// Those that the kernel repeats end within this.
const REPEATED: Duration = Duration::from_secs(4);
/// The kernel repeats at once; this is a busy machine's "at once".
const AT_ONCE: Duration = Duration::from_secs(5);

tokio::task_local! {
    /// The thread whose call is answered.
    static ASKER: u32;
}

/// Runs `operation`, which answers a request of the thread `pid`.
pub async fn asked_by<T>(pid: u32, operation: impl Future<Output = T>) -> T {
    ASKER.scope(pid, operation).await
}

/// Threads that waited in vain: until when, and for what.
#[derive(Debug, Default)]
pub(super) struct InVain(Mutex<HashMap<u32, (Instant, Error)>>);

impl InVain {
    fn lately(&self, asker: u32) -> Option<Error> {
        self.0.lock().get(&asker).filter(|(at, _)| at.elapsed() < AT_ONCE).map(|(_, error)| *error)
    }

    fn note(&self, asker: u32, error: Error) {
        let mut threads = self.0.lock();
        threads.retain(|_, (at, _)| at.elapsed() < AT_ONCE);
        threads.insert(asker, (Instant::now(), error));
    }
}

/// The thread that asks waited for the store in vain a moment ago.
pub(super) fn waited_in_vain(vfs: &Vfs) -> bool {
    ASKER.try_with(|asker| vfs.in_vain.lately(*asker).is_some()).unwrap_or(false)
}

impl Vfs {
    /// Ends `work` with an error at the deadline of promise 22.
    pub(super) async fn within<T>(&self, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        // 0 is everybody in another pid namespace.
        let asker = ASKER.try_with(|asker| *asker).ok().filter(|asker| *asker != 0);
        let earlier = asker.and_then(|asker| self.in_vain.lately(asker));
        let (began, limit) = (Instant::now(), if earlier.is_some() { REPEATED } else { DEADLINE });
        let result = tokio::time::timeout(limit, work).await.unwrap_or(Err(earlier.unwrap_or(Error::TimedOut)));
        if let (Some(asker), Err(error @ (Error::TimedOut | Error::HostUnreachable))) = (asker, &result)
            // Not by a call that was cut short: a store that needs longer than that is one that answers.
            && earlier.is_none()
            && began.elapsed() >= REPEATED
        {
            self.in_vain.note(asker, *error);
        }
        result
    }

    /// As [`Vfs::within`], for who writes: a store that throttles is waited for, as long as a close waits for it.
    pub(super) async fn patiently<T>(&self, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        slow::while_alive(DEADLINE, self.config.close_timeout, |_| work).await.unwrap_or(Err(Error::TimedOut))
    }
}
