//! Whether the credentials may write to a bucket. Who closes a file must hear of it where they may not, and where publications are
//! queued he would not.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::s3::{ErrorKind, Store};

/// How long a bucket is asked; the first close in it waits for that.
const PATIENCE: Duration = Duration::from_secs(20);

/// No upload has this id.
pub(crate) const NO_UPLOAD: &str = "none";

/// What is known of each bucket.
#[derive(Default)]
pub(crate) struct Rights {
    known: Mutex<HashMap<String, bool>>,
    /// One asks, and the others wait for what he is told.
    turn: tokio::sync::Mutex<()>,
}

impl Rights {
    /// False where the store says that we may not write. Asked once a bucket, by a part of an upload that does not exist: that takes the
    /// right to write (s3:PutObject) and can never store a thing. While it does not answer nothing is known, and nothing remembered:
    /// what is queued then waits for it.
    pub async fn may_write(&self, store: &dyn Store, key: &str) -> bool {
        if let Some(known) = self.of(store) {
            return known;
        }
        let _turn = self.turn.lock().await;
        if let Some(known) = self.of(store) {
            return known;
        }
        let asked = store.upload_part(key, NO_UPLOAD, 1, Arc::new(Bytes::new()), None);
        let (may, answered) = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Err(error)) if matches!(error.kind, ErrorKind::AccessDenied | ErrorKind::Credentials) => (false, true),
            Ok(Err(error)) => (true, !error.kind.passes()),
            Ok(Ok(_)) => (true, true),
            Err(_) => (true, false),
        };
        if answered {
            self.known.lock().insert(store.bucket().to_owned(), may);
        }
        if !may {
            tracing::warn!("the credentials may not write to s3://{}: close() waits for S3's answer there", store.bucket());
        }
        may
    }

    fn of(&self, store: &dyn Store) -> Option<bool> {
        self.known.lock().get(store.bucket()).copied()
    }
}
