//! Extended attributes: S3's own under `user.s3.*`, everybody else's kept as s3fs keeps them (`x-amz-meta-xattr`).

use std::collections::BTreeMap;
use std::ffi::OsStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::attr::Kind;
use super::error::{Error, Result};
use super::inode::Object;
use super::{Ino, Vfs};
use crate::s3::Metadata;
use crate::writeback::Attributes;

const META: &str = "user.s3.meta.";
/// Where s3fs keeps attributes: URL-encoded JSON of base64 values.
const XATTR: &str = "xattr";
/// S3 keeps 2 KiB of user metadata in all; the rest of it is ours and s3fs's small numbers.
const KEPT_MOST: usize = 1800;

impl Vfs {
    /// getxattr(2).
    pub async fn getxattr(&self, ino: Ino, name: &OsStr) -> Result<Vec<u8>> {
        let name = name.to_str().ok_or(Error::NoData)?;
        if name == "user.packmule.status" {
            return Ok(self.status_word(ino)?.as_bytes().to_vec());
        }
        // Asked before every write and by every `ls`: the answer needs no request.
        if !name.starts_with("user.") || self.kind(ino)? != Kind::File {
            return Err(Error::NoData);
        }
        if name == "user.packmule.url" {
            return self.url(ino);
        }
        let attributes = self.attributes(ino).await?;
        let text = |value: Option<String>| value.map(String::into_bytes).ok_or(Error::NoData);
        match name {
            "user.s3.etag" => text(self.object(ino).map(|object| object.etag.to_string())),
            "user.s3.version-id" => text(self.object(ino).and_then(|object| object.version_id)),
            "user.s3.storage-class" => text(Some(attributes.storage_class.unwrap_or_else(|| "STANDARD".to_owned()))),
            "user.s3.content-type" => text(attributes.headers.content_type),
            "user.s3.cache-control" => text(attributes.headers.cache_control),
            _ => match name.strip_prefix(META) {
                Some(key) => text(attributes.metadata.get(key).cloned()),
                None => decode(&attributes.metadata).remove(name).ok_or(Error::NoData),
            },
        }
    }

    /// listxattr(2): NUL-separated.
    pub async fn listxattr(&self, ino: Ino) -> Result<Vec<u8>> {
        if self.kind(ino)? != Kind::File {
            return Ok(Vec::new());
        }
        // A listing of names must not cost a HEAD a file (`cp -a`, `ls -l` on some systems): only what is known is named.
        let known = self.known_attributes(ino).unwrap_or_default();
        let mut names: Vec<String> = decode(&known.metadata).into_keys().collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        names.sort_unstable();
        Ok(names.into_iter().flat_map(|name| name.into_bytes().into_iter().chain([0])).collect())
    }

    /// setxattr(2).
    pub async fn setxattr(&self, ino: Ino, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        self.check_changeable()?;
        let name = name.to_str().ok_or(Error::Invalid)?.to_owned();
        if !name.starts_with("user.") || self.kind(ino)? != Kind::File {
            return Err(Error::NotSupported);
        }
        let exists = match self.getxattr(ino, OsStr::new(&name)).await {
            Ok(_) => true,
            Err(Error::NoData) => false,
            Err(error) => return Err(error),
        };
        if flags & libc::XATTR_CREATE != 0 && exists {
            return Err(Error::Exists);
        }
        if flags & libc::XATTR_REPLACE != 0 && !exists {
            return Err(Error::NoData);
        }
        let text = || String::from_utf8(value.to_vec()).map_err(|_| Error::Invalid);
        match name.as_str() {
            "user.s3.content-type" => {
                let text = text()?;
                self.change_attributes(ino, |attributes| attributes.headers.content_type = Some(text)).await
            }
            "user.s3.cache-control" => {
                let text = text()?;
                self.change_attributes(ino, |attributes| attributes.headers.cache_control = Some(text)).await
            }
            _ if name.starts_with(META) => {
                let (key, text) = (name[META.len()..].to_ascii_lowercase(), text()?);
                self.change_attributes(ino, |attributes| drop(attributes.metadata.insert(key, text))).await
            }
            _ if is_reserved(&name) => Err(Error::NotPermitted),
            _ => {
                let mut kept = decode(&self.attributes(ino).await?.metadata);
                kept.insert(name, value.to_vec());
                self.keep(ino, kept).await
            }
        }
    }

    /// removexattr(2).
    pub async fn removexattr(&self, ino: Ino, name: &OsStr) -> Result<()> {
        self.check_changeable()?;
        self.getxattr(ino, name).await?;
        let name = name.to_str().ok_or(Error::NoData)?;
        match name {
            "user.s3.cache-control" => self.change_attributes(ino, |attributes| attributes.headers.cache_control = None).await,
            _ if name.starts_with(META) => {
                let key = name[META.len()..].to_owned();
                self.change_attributes(ino, |attributes| drop(attributes.metadata.remove(&key))).await
            }
            _ if is_reserved(name) => Err(Error::NotPermitted),
            _ => {
                let mut kept = decode(&self.attributes(ino).await?.metadata);
                kept.remove(name);
                self.keep(ino, kept).await
            }
        }
    }

    async fn keep(&self, ino: Ino, kept: BTreeMap<String, Vec<u8>>) -> Result<()> {
        let encoded = encode(&kept);
        if encoded.len() > KEPT_MOST {
            return Err(Error::NoSpace);
        }
        self.change_attributes(ino, |attributes| {
            if kept.is_empty() {
                attributes.metadata.remove(XATTR);
            } else {
                attributes.metadata.insert(XATTR.to_owned(), encoded);
            }
        })
        .await
    }

    /// Headers and metadata of a file: what will travel with unsent content, else what a HEAD tells.
    async fn attributes(&self, ino: Ino) -> Result<Attributes> {
        if let Some(known) = self.known_attributes(ino) {
            return Ok(known);
        }
        let place = self.place(ino)?;
        let object = self.within(self.current_object(ino, &place)).await?;
        Ok(object.attributes.unwrap_or_default())
    }

    fn known_attributes(&self, ino: Ino) -> Option<Attributes> {
        let (staged, object) = {
            let table = self.table.lock();
            let node = table.get(ino)?;
            (node.file.staged.clone(), node.object.clone())
        };
        match staged.filter(|staged| staged.is_dirty()) {
            Some(staged) => Some(staged.attributes()),
            None => object?.attributes,
        }
    }

    fn object(&self, ino: Ino) -> Option<Object> {
        self.table.lock().get(ino)?.object.clone()
    }

    /// Where the file stands: `published`, `uploading` or `temporary`.
    fn status_word(&self, ino: Ino) -> Result<&'static str> {
        let table = self.table.lock();
        let node = table.get(ino).ok_or(Error::Stale)?;
        Ok(match &node.file.staged {
            Some(_) if node.file.temporary => "temporary",
            Some(staged) if staged.is_dirty() => "not uploaded yet",
            _ => "published",
        })
    }

    fn url(&self, ino: Ino) -> Result<Vec<u8>> {
        let place = self.place(ino)?;
        Ok(format!("s3://{}/{}", place.store.bucket(), place.key).into_bytes())
    }
}

fn is_reserved(name: &str) -> bool {
    name.starts_with("user.s3.") || name.starts_with("user.packmule.")
}

/// Attributes as s3fs keeps them. What cannot be read is left out, never an error: the file is good without it.
fn decode(metadata: &Metadata) -> BTreeMap<String, Vec<u8>> {
    let json = metadata.get(XATTR).map(|text| percent_decode_str(text).decode_utf8_lossy().into_owned()).unwrap_or_default();
    let values: BTreeMap<String, String> = serde_json::from_str(&json).unwrap_or_default();
    values.into_iter().filter_map(|(name, value)| Some((name, STANDARD.decode(value).ok()?))).collect()
}

fn encode(values: &BTreeMap<String, Vec<u8>>) -> String {
    let values: BTreeMap<&str, String> = values.iter().map(|(name, value)| (name.as_str(), STANDARD.encode(value))).collect();
    let json = serde_json::to_string(&values).unwrap_or_default();
    utf8_percent_encode(&json, NON_ALPHANUMERIC).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_kept_as_s3fs_keeps_them() {
        let kept = BTreeMap::from([("user.note".to_owned(), b"\0binary\xff".to_vec())]);
        assert_eq!(decode(&Metadata::from([(XATTR.to_owned(), encode(&kept))])), kept);
        let theirs = "%7B%22user%2Ea%22%3A%22dmFsdWU%3D%22%7D";
        assert_eq!(
            decode(&Metadata::from([(XATTR.to_owned(), theirs.to_owned())])),
            BTreeMap::from([("user.a".to_owned(), b"value".to_vec())])
        );
        assert!(decode(&Metadata::from([(XATTR.to_owned(), "nonsense".to_owned())])).is_empty());
    }
}
