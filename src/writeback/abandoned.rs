//! Multipart uploads that nobody needs any more stay on record until the store has said that they are gone (promise 26): over
//! outages, crashes and the end of the mount.
//!
//! An entry's record tells of the upload that it uses. Before one that does not tell of it takes its place, or it is removed, the
//! abort is journalled beside it; the journal is forgotten when the store has answered.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::entry::{Entry, Shared};
use super::journal::{Journalled, PutOff};
use super::manifest::UploadRecord;
use super::spool::Found;
use crate::s3::{Account, ErrorKind, S3Error, Store};

/// Attempts that a drain waits for. It need not wait for more: the next mount goes on.
const WAITED_FOR: u32 = 3;
/// Pauses between attempts: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How far the store's clock may be behind ours.
const SKEW: Duration = Duration::from_secs(300);

/// An upload that is to be aborted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Abandoned {
    /// Its bucket.
    pub bucket: String,
    /// What is known of it.
    #[serde(flatten)]
    pub upload: UploadRecord,
}

impl PutOff for Abandoned {
    const EXTENSION: &'static str = "abort";
    const DURABLE: bool = true;
}

/// An abort that is not journalled yet. Drains wait while there are any.
pub(crate) struct Abort {
    store: Arc<dyn Store>,
    upload: UploadRecord,
    chore: Chore,
}

/// Drains wait for its end.
struct Chore(Arc<Shared>);

impl Chore {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.chores.fetch_add(1, Relaxed);
        Self(shared.clone())
    }
}

impl Drop for Chore {
    fn drop(&mut self) {
        self.0.chores.fetch_sub(1, Relaxed);
        self.0.changed.notify_waiters();
    }
}

impl UploadRecord {
    /// One whose id is known.
    pub fn known(key: String, id: String) -> Self {
        Self { key, id: Some(id), begun: 0, plain: false }
    }
}

impl Entry {
    /// An upload of it is wanted no more: aborted in the background.
    pub fn abandon(self: &Arc<Self>, store: Arc<dyn Store>, upload: UploadRecord) {
        {
            let mut intent = self.intent.lock();
            intent.upload.take_if(|known| known.key == upload.key && known.id == upload.id);
            intent.abandoned.push(Abort { store, upload, chore: Chore::new(&self.shared) });
        }
        let entry = self.clone();
        tokio::spawn(async move {
            let _recorded = entry.recorded.lock().await;
            entry.journal_aborts().await;
        });
    }

    /// Writes down what is to be aborted, and begins that. Call it with `recorded` held, before the record changes.
    pub async fn journal_aborts(&self) {
        let aborts = std::mem::take(&mut self.intent.lock().abandoned);
        for abort in aborts {
            begin(&self.shared, abort).await;
        }
    }
}

/// As [`Entry::abandon`], where no record tells of the upload.
pub(crate) fn abandon(shared: &Arc<Shared>, store: Arc<dyn Store>, upload: UploadRecord) {
    let (shared, abort) = (shared.clone(), Abort { store, upload, chore: Chore::new(shared) });
    tokio::spawn(async move { begin(&shared, abort).await });
}

async fn begin(shared: &Arc<Shared>, Abort { store, upload, chore }: Abort) {
    let what = Abandoned { bucket: store.bucket().to_owned(), upload: upload.clone() };
    // A spool that takes no record is no reason not to abort it.
    let journalled = shared.journal(what).await.inspect_err(|error| tracing::warn!("s3://{}/{}: {error}", store.bucket(), upload.key)).ok();
    tokio::spawn(carry_out(shared.clone(), store, upload, journalled, Some(chore)));
}

/// Goes on with what earlier runs did not come to abort.
pub(crate) fn resume(shared: &Arc<Shared>, account: &Arc<dyn Account>) {
    for journalled in shared.spool.put_off::<Abandoned>() {
        let (shared, account, mut chore) = (shared.clone(), account.clone(), Some(Chore::new(shared)));
        tokio::spawn(async move {
            let mut pause = PAUSE.0;
            loop {
                match account.bucket(&journalled.what.bucket).await {
                    Ok(store) => return carry_out(shared, store, journalled.what.upload.clone(), Some(journalled), chore).await,
                    Err(error) if is_answer(&error) => return journalled.forget().await,
                    Err(error) => tracing::debug!("{error}"),
                }
                chore = None;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE.1);
            }
        });
    }
}

/// Aborts an upload, however often the store must be asked.
async fn carry_out(
    shared: Arc<Shared>,
    store: Arc<dyn Store>,
    upload: UploadRecord,
    journalled: Option<Journalled<Abandoned>>,
    mut chore: Option<Chore>,
) {
    let (mut pause, mut attempts) = (PAUSE.0, 0);
    while let Err(error) = abort(&shared, store.as_ref(), &upload).await {
        if is_answer(&error) {
            break;
        }
        if matches!(error.kind, ErrorKind::AccessDenied | ErrorKind::Credentials) {
            // Stays on record for a mount that may.
            return tracing::warn!("an unfinished upload stays in the bucket: {error}");
        }
        attempts += 1;
        match attempts {
            1 => tracing::warn!("an unfinished upload is not aborted yet: {error}"),
            _ => tracing::debug!("{error}"),
        }
        if attempts >= WAITED_FOR {
            chore = None;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
    if let Some(journalled) = journalled {
        journalled.forget().await;
    }
    drop(chore);
}

/// There is nothing to be aborted, or nothing that could be.
fn is_answer(error: &S3Error) -> bool {
    matches!(error.kind, ErrorKind::NoSuchUpload | ErrorKind::NoSuchBucket | ErrorKind::NotImplemented)
}

async fn abort(shared: &Shared, store: &dyn Store, upload: &UploadRecord) -> Result<(), S3Error> {
    let ids = match &upload.id {
        Some(id) => vec![id.clone()],
        None => unrecorded(shared, store, upload).await?,
    };
    for id in ids {
        store.abort_multipart(&upload.key, &id).await?;
    }
    Ok(())
}

/// Where the intent was recorded and the id was not: an upload of the key begun after it and without parts is ours; one with
/// parts is somebody else's (promise 26).
pub(crate) async fn unrecorded(shared: &Shared, store: &dyn Store, upload: &UploadRecord) -> Result<Vec<String>, S3Error> {
    let since = SystemTime::UNIX_EPOCH + Duration::from_secs(upload.begun);
    let known: HashSet<String> =
        shared.entries().iter().filter_map(|entry| entry.intent.lock().upload.as_ref().and_then(|upload| upload.id.clone())).collect();
    let mut ours = Vec::new();
    for found in store.list_uploads(&upload.key).await? {
        if found.key != upload.key || found.initiated + SKEW < since || known.contains(&found.upload_id) {
            continue;
        }
        match store.list_parts(&found.key, &found.upload_id).await {
            Ok(parts) if parts.is_empty() => ours.push(found.upload_id),
            Ok(_) => {}
            Err(error) if error.kind == ErrorKind::NoSuchUpload => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ours)
}

impl Found {
    /// Removes it for good: the next mount of the bucket aborts its upload.
    pub(super) fn throw_away(&self, disk: &Disk) -> io::Result<()> {
        if let Some(upload) = self.record.upload.clone() {
            let what = Abandoned { bucket: self.record.bucket.clone(), upload };
            Journalled::put(disk.clone(), self.record_path.with_extension(Abandoned::EXTENSION), what)?;
        }
        self.remove(disk)
    }
}
