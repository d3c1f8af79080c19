//! Whether the credentials may write to a bucket. Who closes a file must hear of it where they may not, and where publications are
//! queued he would not.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::s3::{ErrorKind, Store};

/// How long a bucket is asked; the first close in it waits for that.
const PATIENCE: Duration = Duration::from_secs(5);
/// For so long nobody waits again for a store that did not answer.
const SILENT: Duration = Duration::from_secs(60);
/// For so long a refusal is believed: a policy may change.
const REFUSED: Duration = Duration::from_secs(300);

/// No upload has this id.
pub(crate) const NO_UPLOAD: &str = "none";

/// What is known of each bucket.
#[derive(Default)]
pub(crate) struct Rights {
    /// Whether it may be written to, and until when that is believed; `None`: for good.
    known: Mutex<HashMap<String, (bool, Option<Instant>)>>,
    /// One asks, and the others wait for what he is told.
    turn: tokio::sync::Mutex<()>,
}

impl Rights {
    /// False where the store says that we may not write. Asked by a part of an upload that does not exist: that takes the right to
    /// write (s3:PutObject) and can never store a thing. True while it does not answer: what is queued then waits for it.
    pub async fn may_write(&self, store: &dyn Store, key: &str) -> bool {
        if let Some(known) = self.of(store) {
            return known;
        }
        let _turn = self.turn.lock().await;
        if let Some(known) = self.of(store) {
            return known;
        }
        let asked = store.upload_part(key, NO_UPLOAD, 1, Arc::new(Bytes::new()), None);
        let (may, believed) = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Err(error)) if error.kind == ErrorKind::AccessDenied => (false, Some(REFUSED)),
            // They may have been renewed by the next time.
            Ok(Err(error)) if error.kind == ErrorKind::Credentials => (false, Some(Duration::ZERO)),
            Ok(Err(error)) if error.kind.passes() => (true, Some(SILENT)),
            Err(_) => (true, Some(SILENT)),
            Ok(_) => (true, None),
        };
        self.known.lock().insert(store.bucket().to_owned(), (may, believed.map(|time| Instant::now() + time)));
        if !may {
            tracing::warn!("the credentials may not write to s3://{}: close() waits for S3's answer there", store.bucket());
        }
        may
    }

    fn of(&self, store: &dyn Store) -> Option<bool> {
        let known = self.known.lock().get(store.bucket()).copied();
        known.filter(|(_, until)| until.is_none_or(|until| Instant::now() < until)).map(|(may, _)| may)
    }
}
