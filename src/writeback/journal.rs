//! What was promised and put off: one small file each in the mount's spool directory, so that a crash forgets none.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::disk::Disk;
use super::spool::{blocking, number_of};
use super::{Attributes, Error, Expect};
use crate::s3::ETag;

/// Something that can be put off.
pub trait PutOff: Serialize + DeserializeOwned + Clone + Send + 'static {
    /// Ends the name of every such file.
    const EXTENSION: &'static str;
    /// It survives a power cut, not only a crash of the process.
    const DURABLE: bool;
}

/// An object that is to be deleted, if it still is this version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deletion {
    /// Its bucket.
    pub bucket: String,
    /// Its key.
    pub key: String,
    /// The version that was unlinked; `None`: whatever is there (a directory's marker).
    pub etag: Option<ETag>,
}

impl Deletion {
    /// What a publication expects to find that comes instead of it.
    pub fn replaced_by(&self) -> Expect {
        self.etag.clone().map_or(Expect::Anything, Expect::Version)
    }
}

impl PutOff for Deletion {
    const EXTENSION: &'static str = "delete";
    const DURABLE: bool = true;
}

/// Metadata that an object is to carry, if it still is this version (promise 13).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataChange {
    /// Its bucket.
    pub bucket: String,
    /// Its key.
    pub key: String,
    /// The version that carries older metadata.
    pub etag: ETag,
    /// Its size in bytes.
    pub size: u64,
    /// Its LastModified: a copy onto itself may leave the ETag as it is, so that only this tells whether there was one since.
    pub last_modified: SystemTime,
    /// All that is to be stored with it.
    pub attributes: Attributes,
}

impl PutOff for MetadataChange {
    const EXTENSION: &'static str = "metadata";
    // An fsync a chmod would cost more than what it saves: the data is in S3.
    const DURABLE: bool = false;
}

/// What is put off, on disk until [`Journalled::forget`].
#[derive(Clone)]
pub struct Journalled<T> {
    /// What it is.
    pub what: T,
    path: PathBuf,
    disk: Disk,
}

impl<T: PutOff> Journalled<T> {
    pub(crate) async fn write(disk: Disk, path: PathBuf, what: T) -> Result<Self, Error> {
        blocking(move || Self::put(disk, path, what)).await
    }

    /// As [`Journalled::write`], where blocking is no harm.
    pub(crate) fn put(disk: Disk, path: PathBuf, what: T) -> std::io::Result<Self> {
        let text = serde_json::to_vec(&what).map_err(std::io::Error::other)?;
        disk.replace(&path, &text, T::DURABLE)?;
        Ok(Self { what, path, disk })
    }

    /// `None` where it was cut short: the call that put it off had not returned.
    pub(crate) fn read(disk: &Disk, path: &Path) -> Option<Self> {
        let what = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        Some(Self { what, path: path.to_owned(), disk: disk.clone() })
    }

    /// Puts another in its place.
    pub(crate) async fn replace(&self, what: T) -> Result<Self, Error> {
        Self::write(self.disk.clone(), self.path.clone(), what).await
    }

    /// Its file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The number in its file's name.
    pub(crate) fn number(&self) -> u64 {
        number_of(&self.path).unwrap_or_default()
    }

    /// As [`Journalled::forget`], of many.
    pub(crate) async fn forget_all(all: Vec<Self>) {
        let removed = blocking(move || {
            let mut last: BTreeMap<Option<&Path>, &Self> = BTreeMap::new();
            for one in &all {
                if let Err(error) = one.disk.remove(&one.path, false) {
                    tracing::warn!("{}: {error}", one.path.display());
                }
                last.insert(one.path.parent(), one);
            }
            last.into_values().filter(|_| T::DURABLE).try_for_each(|one| one.disk.sync_parent(&one.path))
        });
        if let Err(error) = removed.await {
            tracing::warn!("{error}");
        }
    }

    /// It was done, or is wanted no more: what is durable must not come back, it would be done to what has the name by then.
    pub async fn forget(self) {
        let (disk, path) = (self.disk.clone(), self.path.clone());
        if let Err(error) = blocking(move || disk.remove(&path, T::DURABLE)).await {
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
        let (dir, disk) = (tempfile::tempdir().unwrap(), Disk::default());
        let path = dir.path().join("1.delete");
        let deletion = Deletion { bucket: "b".into(), key: "k\n".into(), etag: Some(ETag::new("e")) };
        let written = Journalled::write(disk.clone(), path.clone(), deletion.clone()).await.unwrap();
        assert_eq!(Journalled::<Deletion>::read(&disk, &path).unwrap().what, deletion);
        written.forget().await;
        assert!(Journalled::<Deletion>::read(&disk, &path).is_none());
    }
}
