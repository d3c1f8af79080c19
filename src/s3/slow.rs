//! "Slow down" (503 SlowDown, 429), told to whoever waits for a request: the store is there, and will take it later.

use std::sync::Arc;
use std::time::Duration;

use super::{ErrorKind, S3Error};

/// Hears of each such answer how long the request pauses for it.
pub type Listener = Arc<dyn Fn(Duration) + Send + Sync>;

tokio::task_local! {
    static LISTENER: Listener;
}

/// Runs `work`; `told` hears of the throttling that its requests meet.
pub async fn listen<T>(told: Listener, work: impl Future<Output = T>) -> T {
    LISTENER.scope(told, work).await
}

/// An answer made the request of this task pause. A 503 that is not the store's own (a load balancer's, before a store that is gone)
/// is no sign of life.
pub(super) fn tell(error: &S3Error, pause: Duration) {
    if error.kind == ErrorKind::Throttled && (error.code.is_some() || error.status == 429) {
        let _ = LISTENER.try_with(|told| told(pause));
    }
}
