//! Attributes that listings do not carry, remembered by key and ETag in the state directory (promises 13 and 29).
//!
//! Wrong only by missing: a row whose ETag is not the object's, or that is older than the object, is as if absent. The
//! database is therefore never fsynced by us, and one that cannot be read is begun anew.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::mpsc;

use super::attr::{Decoded, Stored};
use crate::s3::ETag;

/// Rows kept; the oldest go first. About 200 bytes each on disk.
const MOST_ROWS: i64 = 500_000;
/// How many transactions pass between looks at the number of rows, which takes a look at every one.
const COUNT_EVERY: u32 = 1000;
/// LastModified is in whole seconds in some answers and milliseconds in others: an object is newer than a row only beyond this.
pub(super) const SLACK: Duration = Duration::from_secs(2);

/// What is remembered of one object.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Version that it is true of.
    pub etag: ETag,
    /// Owner and mode.
    pub stored: Stored,
    /// Modification.
    pub mtime: Option<SystemTime>,
    /// Access.
    pub atime: Option<SystemTime>,
    /// Change.
    pub ctime: Option<SystemTime>,
    /// A symbolic link and where it points; empty where nobody has asked yet.
    pub target: Option<Vec<u8>>,
    /// The store's time of our last write (or of the answer that told us).
    pub written: SystemTime,
}

impl Row {
    /// What an object's metadata says, written at `written` by the store's clock.
    pub fn of(etag: ETag, decoded: &Decoded, written: SystemTime) -> Self {
        let Decoded { stored, mtime, atime, ctime, .. } = *decoded;
        Self { etag, stored, mtime, atime, ctime, target: None, written }
    }
}

type Key = (String, String);

enum Order {
    Changed,
    Tell(tokio::sync::oneshot::Sender<()>),
    Close(tokio::sync::oneshot::Sender<()>),
}

/// The memory of one user's mounts.
pub struct Memory {
    path: PathBuf,
    reader: Arc<Mutex<Connection>>,
    pending: Arc<Mutex<HashMap<Key, Option<Row>>>>,
    orders: mpsc::UnboundedSender<Order>,
}

impl Memory {
    /// Opens or makes `attributes.db` in the state directory.
    pub async fn open(state_dir: PathBuf) -> std::io::Result<Self> {
        let path = state_dir.join("attributes.db");
        let (reader, writer) = {
            let path = path.clone();
            blocking(move || {
                std::fs::create_dir_all(&state_dir)?;
                connect(&path).or_else(|error| {
                    tracing::warn!("{}: {error}: begun anew", path.display());
                    for suffix in ["", "-wal", "-shm"] {
                        let mut stale = path.clone().into_os_string();
                        stale.push(suffix);
                        let _ = std::fs::remove_file(stale);
                    }
                    connect(&path).map_err(|error| std::io::Error::other(format!("{}: {error}", path.display())))
                })
            })
            .await?
        };
        let pending: Arc<Mutex<HashMap<Key, Option<Row>>>> = Arc::default();
        let (orders, inbox) = mpsc::unbounded_channel();
        tokio::spawn(write_behind(writer, pending.clone(), inbox));
        Ok(Self { path, reader: Arc::new(Mutex::new(reader)), pending, orders })
    }

    /// What is remembered of `key`, if it is of version `etag` and not older than `modified`.
    pub async fn get(&self, bucket: &str, key: &str, etag: &ETag, modified: SystemTime) -> Option<Row> {
        self.get_many(bucket, vec![(key.to_owned(), etag.clone(), modified)]).await.pop().flatten()
    }

    /// As [`Memory::get`], for many keys in one go; answers in the same order.
    pub async fn get_many(&self, bucket: &str, keys: Vec<(String, ETag, SystemTime)>) -> Vec<Option<Row>> {
        let count = keys.len();
        let (reader, pending, bucket) = (self.reader.clone(), self.pending.clone(), bucket.to_owned());
        let found = blocking(move || {
            let reader = reader.lock();
            let find = |(key, etag, modified): (String, ETag, SystemTime)| {
                let id = (bucket.clone(), key);
                let waiting = pending.lock().get(&id).cloned();
                let row = match waiting {
                    Some(row) => row,
                    None => select(&reader, &id).unwrap_or_default(),
                };
                row.filter(|row| row.etag == etag && row.written + SLACK >= modified)
            };
            Ok(keys.into_iter().map(find).collect())
        });
        found.await.unwrap_or_else(|_| vec![None; count])
    }

    /// Remembers.
    pub fn put(&self, bucket: &str, key: &str, row: Row) {
        self.change(bucket, key, Some(row));
    }

    /// Forgets.
    pub fn remove(&self, bucket: &str, key: &str) {
        self.change(bucket, key, None);
    }

    fn change(&self, bucket: &str, key: &str, row: Option<Row>) {
        self.pending.lock().insert((bucket.to_owned(), key.to_owned()), row);
        let _ = self.orders.send(Order::Changed);
    }

    /// Waits until what was remembered before is in the database: a crash of the process does not lose it any more.
    pub async fn written(&self) {
        let (done, wait) = tokio::sync::oneshot::channel();
        if self.orders.send(Order::Tell(done)).is_ok() {
            // Dropped where the database cannot be written, which was said.
            let _ = wait.await;
        }
    }

    /// Writes what waits. Later changes are lost.
    pub async fn close(&self) {
        let (done, wait) = tokio::sync::oneshot::channel();
        if self.orders.send(Order::Close(done)).is_ok() && wait.await.is_err() {
            tracing::warn!("{}: attributes of the last moments were not written", self.path.display());
        }
    }
}

fn connect(path: &std::path::Path) -> rusqlite::Result<(Connection, Connection)> {
    let open = || {
        let connection = Connection::open(path)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "OFF")?;
        connection.pragma_update(None, "cache_size", -2000)?;
        Ok::<_, rusqlite::Error>(connection)
    };
    let writer = open()?;
    writer.execute_batch(
        "CREATE TABLE IF NOT EXISTS attributes_v1 (bucket TEXT, key TEXT, etag TEXT NOT NULL, mode INTEGER, uid INTEGER, gid INTEGER,
         mtime INTEGER, atime INTEGER, ctime INTEGER, target BLOB, written INTEGER NOT NULL, PRIMARY KEY (bucket, key)) WITHOUT ROWID;",
    )?;
    Ok((open()?, writer))
}

/// Writes what changed meanwhile in one transaction, again and again: a copy of many files costs few of them.
async fn write_behind(writer: Connection, pending: Arc<Mutex<HashMap<Key, Option<Row>>>>, mut inbox: mpsc::UnboundedReceiver<Order>) {
    let writer = Arc::new(Mutex::new(writer));
    let mut transactions = 0;
    while let Some(order) = inbox.recv().await {
        let (mut waiting, mut closing) = (Vec::new(), false);
        let mut orders = Some(order);
        while let Some(order) = orders {
            match order {
                Order::Changed => {}
                Order::Tell(done) => waiting.push(done),
                Order::Close(done) => {
                    closing = true;
                    waiting.push(done);
                }
            }
            orders = inbox.try_recv().ok();
        }
        let changes = pending.lock().clone();
        if !changes.is_empty() {
            transactions += 1;
            let (task, written, counts) = (writer.clone(), changes.clone(), transactions % COUNT_EVERY == 0);
            let result = blocking(move || store(&mut task.lock(), &written, counts).map_err(std::io::Error::other)).await;
            match result {
                // What changed again meanwhile stays pending: its own order is in the inbox.
                Ok(()) => pending.lock().retain(|key, row| changes.get(key) != Some(row)),
                Err(error) => tracing::warn!("remembering attributes: {error}"),
            }
        }
        for done in waiting {
            let _ = done.send(());
        }
        if closing {
            return;
        }
    }
}

fn store(connection: &mut Connection, changes: &HashMap<Key, Option<Row>>, counts: bool) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    {
        let mut put = transaction.prepare_cached("INSERT OR REPLACE INTO attributes_v1 VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11)")?;
        let mut remove = transaction.prepare_cached("DELETE FROM attributes_v1 WHERE bucket=?1 AND key=?2")?;
        for ((bucket, key), row) in changes {
            let Some(row) = row else {
                remove.execute(params![bucket, key])?;
                continue;
            };
            let (stored, times) = (row.stored, [row.mtime, row.atime, row.ctime].map(|time| time.map(to_nanos)));
            put.execute(params![
                bucket,
                key,
                row.etag.as_str(),
                stored.mode,
                stored.uid,
                stored.gid,
                times[0],
                times[1],
                times[2],
                row.target,
                to_nanos(row.written)
            ])?;
        }
    }
    let rows: i64 = if counts { transaction.query_row("SELECT count(*) FROM attributes_v1", [], |row| row.get(0))? } else { 0 };
    if rows > MOST_ROWS {
        transaction.execute(
            "DELETE FROM attributes_v1 WHERE (bucket, key) IN (SELECT bucket, key FROM attributes_v1 ORDER BY written LIMIT ?1)",
            params![rows - MOST_ROWS + MOST_ROWS / 20],
        )?;
    }
    transaction.commit()
}

fn select(connection: &Connection, (bucket, key): &Key) -> rusqlite::Result<Option<Row>> {
    let mut statement = connection
        .prepare_cached("SELECT etag,mode,uid,gid,mtime,atime,ctime,target,written FROM attributes_v1 WHERE bucket=?1 AND key=?2")?;
    let read = |row: &rusqlite::Row<'_>| {
        let time = |at: usize| row.get::<_, Option<i64>>(at).map(|nanos| nanos.map(from_nanos));
        Ok(Row {
            etag: ETag::new(row.get::<_, String>(0)?),
            stored: Stored { mode: row.get(1)?, uid: row.get(2)?, gid: row.get(3)? },
            mtime: time(4)?,
            atime: time(5)?,
            ctime: time(6)?,
            target: row.get(7)?,
            written: from_nanos(row.get(8)?),
        })
    };
    statement.query_row(params![bucket, key], read).optional()
}

/// Nanoseconds since the epoch: 1677 to 2262, which is what statx's users ever set.
fn to_nanos(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanos| -nanos),
    }
}

fn from_nanos(nanos: i64) -> SystemTime {
    let since = Duration::from_nanos(nanos.unsigned_abs());
    if nanos < 0 { UNIX_EPOCH - since } else { UNIX_EPOCH + since }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn row(etag: &str) -> Row {
        let now = from_nanos(to_nanos(SystemTime::now()));
        Row {
            etag: ETag::new(etag),
            stored: Stored { mode: Some(0o640), uid: Some(7), gid: None },
            mtime: Some(from_nanos(-1_500_000_000)),
            atime: None,
            ctime: None,
            target: Some(b"to\xff".to_vec()),
            written: now,
        }
    }

    #[tokio::test]
    async fn rows_outlive_the_mount_and_are_true_of_one_version() {
        let dir = tempfile::tempdir().unwrap();
        let (one, early) = (row("one"), SystemTime::now() - Duration::from_secs(60));
        let memory = Memory::open(dir.path().into()).await.unwrap();
        memory.put("b", "k", one.clone());
        assert_eq!(memory.get("b", "k", &one.etag, early).await, Some(one.clone()), "before it is written");
        memory.close().await;
        let memory = Memory::open(dir.path().into()).await.unwrap();
        assert_eq!(memory.get("b", "k", &one.etag, early).await, Some(one.clone()));
        assert_eq!(memory.get("b", "k", &ETag::new("two"), early).await, None);
        assert_eq!(memory.get("b", "k", &one.etag, SystemTime::now() + Duration::from_secs(60)).await, None, "written since by others");
        memory.remove("b", "k");
        assert_eq!(memory.get("b", "k", &one.etag, early).await, None);
    }

    #[tokio::test]
    async fn a_damaged_database_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("attributes.db"), b"this is no database, but long enough to be looked at as one").unwrap();
        assert!(Memory::open(dir.path().into()).await.is_ok());
    }
}
