//! Deletions that were promised and put off: one small file each in the mount's spool directory, so that a crash forgets none.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::Error;
use super::spool::blocking;
use crate::s3::ETag;

/// Ends the name of every such file.
pub(crate) const EXTENSION: &str = "delete";

/// An object that is to be deleted, if it still is this version.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Deletion {
    /// Its bucket.
    pub bucket: String,
    /// Its key.
    pub key: String,
    /// The version that was unlinked.
    pub etag: ETag,
}

/// A deletion on disk, until [`Journalled::forget`].
#[derive(Debug)]
pub struct Journalled {
    /// What is to be deleted.
    pub deletion: Deletion,
    path: PathBuf,
}

impl Journalled {
    pub(crate) async fn write(path: PathBuf, deletion: Deletion) -> Result<Self, Error> {
        let text = serde_json::to_vec(&deletion).map_err(|error| Error::from(std::io::Error::other(error)))?;
        let to = path.clone();
        blocking(move || {
            let mut file = File::create(&to)?;
            file.write_all(&text)?;
            file.sync_data()
        })
        .await?;
        Ok(Self { deletion, path })
    }

    /// `None` where it was cut short: its unlink had not returned.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        let deletion = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        Some(Self { deletion, path: path.to_owned() })
    }

    /// It was done, or a new version has taken the object's place.
    pub async fn forget(self) {
        let path = self.path.clone();
        if let Err(error) = blocking(move || std::fs::remove_file(path)).await {
            tracing::warn!("{}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_deletion_is_read_back_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1.delete");
        let deletion = Deletion { bucket: "b".into(), key: "k\n".into(), etag: ETag::new("e") };
        let written = Journalled::write(path.clone(), deletion.clone()).await.unwrap();
        assert_eq!(Journalled::read(&path).unwrap().deletion, deletion);
        written.forget().await;
        assert!(Journalled::read(&path).is_none());
    }
}
