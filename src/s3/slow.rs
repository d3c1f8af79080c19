//! Why a request is sent again, told to whoever waits for it: above all that the store asks to slow down (503 SlowDown, 429), which
//! means that it is there and will take it later.

use std::sync::Arc;
use std::time::Duration;

use super::{ErrorKind, S3Error};

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
