//! All that is not in S3: what running mounts tell, and what spool folders hold that no mount has.

use std::path::{Path, PathBuf};

use anyhow::bail;
use serde::Serialize;

use crate::config::{Environment, resolve};
use crate::control::{self, Client, DELETES_NAMED, FileStatus, Request, Response, Status, Upload};
use crate::fuse::mountinfo::mounts;
use crate::vfs::RenameReport;
use crate::writeback::offline;

/// Digits of a number that people type. A number is unique over the mounts of a machine; its end nearly always.
const DIGITS: usize = 6;

/// What was found.
#[derive(Default)]
pub struct Everything {
    /// What the mounts told.
    pub told: Vec<Status>,
    /// Why others did not.
    pub silent: Vec<String>,
    /// What waits for its next mount.
    pub left: Vec<Left>,
    /// Spool directories that cannot be read.
    pub unread: Vec<String>,
}

/// A spool folder that no mount has locked.
#[derive(Serialize)]
pub struct Left {
    /// The folder.
    pub spool: PathBuf,
    /// Endpoint and bucket (or account) that it belongs to.
    pub source: String,
    /// What it holds.
    pub uploads: Vec<Upload>,
    /// Directories whose rename was cut off.
    pub renames: Vec<RenameReport>,
}

/// An upload and who has it.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub upload: &'a Upload,
    pub owner: Owner<'a>,
}

/// Who has an upload.
#[derive(Clone, Copy)]
pub enum Owner<'a> {
    /// The mount at this mountpoint.
    Mount(&'a Path),
    /// Nobody: it lies in this folder.
    Folder(&'a Path),
}

impl Everything {
    /// All of this user's mounts, and the folders below `spool_dir` (the default one's where `None`).
    pub fn look(spool_dir: Option<PathBuf>) -> anyhow::Result<Self> {
        let me = nix::unistd::geteuid();
        let mut found = Self::default();
        for mount in mounts()?.into_iter().filter(|mount| mount.is_ours(me)) {
            match Client::connect(&mount.target).and_then(|mut client| status(&mut client)) {
                Ok(status) => found.told.push(status),
                Err(error) => found.silent.push(format!("{error:#}")),
            }
        }
        let spool_dir = match spool_dir {
            Some(dir) => Ok(dir),
            None => resolve::spool_dir(&Environment::of_process()),
        };
        match spool_dir {
            Err(error) => found.unread.push(error.to_string()),
            Ok(dir) => match offline::folders(&dir) {
                Ok(folders) => found.left.extend(folders.into_iter().map(Left::from)),
                Err(error) => found.unread.push(format!("{}: {error}; name the spool with --spool-dir", dir.display())),
            },
        }
        Ok(found)
    }

    /// The mount that owns a path, alone; of a file on it, where that stands.
    pub fn of(path: &Path) -> anyhow::Result<(Self, Option<FileStatus>)> {
        let mut client = Client::connect_for(Some(path))?;
        let path = control::resolve(path)?;
        // First what is answered at once: a mount that hangs is found soon.
        let told = status(&mut client)?;
        let file = match client.call(&Request::File { path })? {
            Response::File(file) => Some(*file),
            _ => None,
        };
        Ok((Self { told: vec![told], ..Self::default() }, file))
    }

    /// Every upload.
    pub fn places(&self) -> impl Iterator<Item = Place<'_>> {
        let mounts = self.told.iter().flat_map(|mount| {
            let owner = Owner::Mount(&mount.mountpoint);
            mount.uploads.iter().map(move |upload| Place { upload, owner })
        });
        let folders = self.left.iter().flat_map(|left| {
            let owner = Owner::Folder(&left.spool);
            left.uploads.iter().map(move |upload| Place { upload, owner })
        });
        mounts.chain(folders)
    }

    /// The number to type for an upload: the end of its own, as short as tells it from the others.
    pub fn number(&self, upload: &Upload) -> String {
        let whole = upload.id.to_string();
        let ends = (DIGITS..whole.len()).map(|digits| &whole[whole.len() - digits..]);
        let alone = |end: &&str| self.places().filter(|other| other.upload.id.to_string().ends_with(*end)).count() == 1;
        ends.into_iter().find(alone).unwrap_or(&whole).to_owned()
    }

    /// The upload that a number, or the end of one as [`Everything::number`] gives it, names.
    pub fn numbered(&self, typed: &str) -> anyhow::Result<Place<'_>> {
        let whole = self.places().filter(|place| place.upload.id.to_string() == typed).collect();
        let ends = |place: &Place<'_>| typed.len() >= DIGITS && place.upload.id.to_string().ends_with(typed);
        self.only(typed, whole).or_else(|_| self.only(typed, self.places().filter(ends).collect()))
    }

    /// The upload to a key, of this mount where one is named; of several, the one that waits for somebody's word.
    pub fn keyed(&self, bucket: &str, key: &str, mount: Option<&Path>) -> anyhow::Result<Place<'_>> {
        let of_mount = |place: &Place<'_>| mount.is_none_or(|mount| matches!(place.owner, Owner::Mount(owner) if owner == mount));
        let of_key = |place: &Place<'_>| place.upload.bucket == bucket && place.upload.key == key;
        let mut found: Vec<_> = self.places().filter(|place| of_mount(place) && of_key(place)).collect();
        if found.iter().any(|place| place.upload.waits) {
            found.retain(|place| place.upload.waits);
        }
        self.only(&format!("s3://{bucket}/{}", key.escape_debug()), found)
    }

    fn only<'a>(&'a self, typed: &str, found: Vec<Place<'a>>) -> anyhow::Result<Place<'a>> {
        match found.as_slice() {
            [one] => Ok(*one),
            [] if self.silent.is_empty() => bail!("{typed}: nothing in the spool has this name: packmule status lists what is there"),
            [] => bail!("{typed}: nothing in the spool has this name, and not every mount answers ({})", self.silent.join("; ")),
            several => {
                let numbers: Vec<String> = several.iter().map(|place| format!("{} ({})", place.upload.id, place.upload.shown())).collect();
                bail!("{typed}: names several: {}", numbers.join(", "))
            }
        }
    }
}

impl From<offline::Folder> for Left {
    fn from(folder: offline::Folder) -> Self {
        // Without a mount nothing becomes of any of them.
        let (files, deletes) = (folder.entries.iter().map(Upload::from).collect(), &folder.deletes);
        let uploads = Upload::with_deletes(files, deletes.len(), &deletes[..deletes.len().min(DELETES_NAMED)]);
        let uploads = uploads.into_iter().map(|upload| Upload { waits: true, ..upload }).collect();
        let renames = folder.renames.iter().map(RenameReport::waiting).collect();
        Self { spool: folder.dir, source: folder.identity, uploads, renames }
    }
}

impl Owner<'_> {
    /// What can be done with an upload of this owner, by its number; the first is for most the best.
    pub fn commands(self, upload: &Upload, number: &str) -> Vec<String> {
        if !upload.waits {
            return Vec::new();
        }
        let retry = (matches!(self, Owner::Mount(_)) && !upload.incomplete).then(|| format!("packmule retry {number}"));
        let recover = (!upload.is_delete()).then(|| format!("packmule recover {number} FILE"));
        retry.into_iter().chain(recover).chain([format!("packmule discard {number}")]).collect()
    }
}

fn status(client: &mut Client) -> anyhow::Result<Status> {
    match client.call(&Request::Status)? {
        Response::Status(status) => Ok(*status),
        _ => bail!("{}: runs another version of packmule: mount it anew", client.mountpoint().display()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn upload(id: u64, key: &str) -> Upload {
        Upload { id, bucket: "b".into(), key: key.into(), waits: true, ..Upload::default() }
    }

    #[test]
    fn numbers_are_as_short_as_they_can_be() {
        let mount = Status {
            mountpoint: "/m".into(),
            uploads: vec![upload(1_700_000_000_123_456, "a"), upload(1_700_000_009_123_456, "b"), upload(42, "c")],
            ..Status::default()
        };
        let left =
            Left { spool: "/s".into(), source: "e/b".into(), uploads: vec![upload(1_700_000_000_000_007, "a")], renames: Vec::new() };
        let all = Everything { told: vec![mount], left: vec![left], ..Everything::default() };
        let numbers: Vec<String> = all.places().map(|place| all.number(place.upload)).collect();
        assert_eq!(numbers, ["0123456", "9123456", "42", "000007"]);
        for (number, place) in numbers.iter().zip(all.places()) {
            assert_eq!(all.numbered(number).unwrap().upload.id, place.upload.id);
        }
        let refusal = |typed| all.numbered(typed).map(|place| place.upload.id).unwrap_err().to_string();
        assert!(refusal("123456").contains("several"), "{}", refusal("123456"));
        // Too short to be sure of.
        assert!(refusal("0007").contains("nothing"), "{}", refusal("0007"));
        assert!(all.keyed("b", "a", None).is_err_and(|error| error.to_string().contains("several")));
        assert_eq!(all.keyed("b", "c", None).unwrap().upload.id, 42);
        assert_eq!(all.keyed("b", "a", Some(Path::new("/m"))).unwrap().upload.id, 1_700_000_000_123_456);
    }

    #[test]
    fn what_can_be_done_depends_on_who_has_it() {
        let parked = upload(1, "a");
        assert_eq!(Owner::Mount(Path::new("/m")).commands(&parked, "1")[0], "packmule retry 1");
        assert_eq!(Owner::Folder(Path::new("/s")).commands(&parked, "1"), ["packmule recover 1 FILE", "packmule discard 1"]);
        let torn = Upload { incomplete: true, ..upload(1, "a") };
        assert_eq!(Owner::Mount(Path::new("/m")).commands(&torn, "1").len(), 2);
        assert!(Owner::Mount(Path::new("/m")).commands(&Upload::default(), "1").is_empty());
    }
}
