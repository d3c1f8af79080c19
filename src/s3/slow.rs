//! Why a request is sent again, told to whoever waits for it: above all that the store asks to slow down (503 SlowDown, 429), which
//! means that it is there and will take it later. And how long what takes the store its time is waited for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{ErrorKind, S3Error};

/// A store that throttles and takes nothing is waited for so many times as long as one that is silent: an hour, where `close_timeout`
/// is 5 minutes.
const SLOWED_MOST: u32 = 12;

/// When work was last seen alive.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// A byte moved, or an answer came, that had not before.
    pub progress: Instant,
    /// Until when the store asked for patience.
    pub slowed: Instant,
}

impl Default for Life {
    fn default() -> Self {
        let now = Instant::now();
        Self { progress: now, slowed: now }
    }
}

impl Life {
    /// From when on `limit` (`close_timeout`) counts: the last progress, or the end of the pause that the store asked for since.
    pub fn seen(&self, limit: Duration) -> Instant {
        self.progress.max(self.slowed.min(self.progress + limit * SLOWED_MOST))
    }
}

/// Where work tells that it goes on.
#[derive(Clone, Default)]
pub struct Progress(Arc<Mutex<Life>>);

impl Progress {
    /// An answer came that brings it nearer to its end.
    pub fn made(&self) {
        self.0.lock().progress = Instant::now();
    }

    fn left(&self, limit: Duration, close_timeout: Duration) -> Duration {
        limit.saturating_sub(self.0.lock().seen(close_timeout).elapsed())
    }
}

/// Runs `work` to its end, or until `limit` after its last progress (see [`Life::seen`]): `None`.
pub async fn while_alive<T, F: Future<Output = T>>(
    limit: Duration,
    close_timeout: Duration,
    work: impl FnOnce(Progress) -> F,
) -> Option<T> {
    let progress = Progress::default();
    let heard = progress.clone();
    let told: Listener = Arc::new(move |error, pause| {
        if is_sign_of_life(error) {
            heard.0.lock().slowed = Instant::now() + pause;
        }
    });
    let work = listen(told, work(progress.clone()));
    tokio::pin!(work);
    loop {
        let left = progress.left(limit, close_timeout);
        if left.is_zero() {
            return None;
        }
        if let Ok(done) = tokio::time::timeout(left, &mut work).await {
            return Some(done);
        }
    }
}

/// Hears of each failed attempt why it failed, and how long the request pauses for it.
pub type Listener = Arc<dyn Fn(&S3Error, Duration) + Send + Sync>;

tokio::task_local! {
    static LISTENER: Listener;
}

/// Runs `work`; `told` hears of every request in it that is sent again.
pub async fn listen<T>(told: Listener, work: impl Future<Output = T>) -> T {
    LISTENER.scope(told, work).await
}

/// Somebody listens, and judges by it how long he waits.
pub(super) fn is_heard() -> bool {
    LISTENER.try_with(|_| ()).is_ok()
}

/// A request of this task is sent again after a pause.
pub(super) fn tell(error: &S3Error, pause: Duration) {
    let _ = LISTENER.try_with(|told| told(error, pause));
}

/// The store is there and asks for patience. A 503 that is not its own (a load balancer's, before a store that is gone) is no sign of
/// life; of the answer to a HEAD, which has no body, the request's id tells whose it is.
pub fn is_sign_of_life(error: &S3Error) -> bool {
    let its_own = error.code.is_some() || error.status == 429 || error.request_id.is_some();
    error.kind == ErrorKind::Throttled && its_own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throttling_is_life_but_not_for_ever() {
        let (limit, mut life) = (Duration::from_secs(300), Life::default());
        let begun = life.progress;
        life.slowed = begun + Duration::from_secs(1000);
        assert_eq!(life.seen(limit), life.slowed);
        life.slowed = begun + Duration::from_secs(100_000);
        assert_eq!(life.seen(limit), begun + Duration::from_secs(3600));
        life.progress = begun + Duration::from_secs(200_000);
        assert_eq!(life.seen(limit), life.progress);
    }

    #[tokio::test]
    async fn what_goes_on_is_waited_for() {
        let limit = Duration::from_secs(1);
        assert_eq!(while_alive(limit, limit, |_| async { 7 }).await, Some(7));
        assert_eq!(while_alive(Duration::ZERO, limit, |_| std::future::pending::<()>()).await, None);
    }
}
