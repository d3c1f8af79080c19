//! The file that the demo copies: a tar of programs and libraries of this machine, packmule first. Real content: it
//! compresses, repeats and varies as releases do.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Its size in bytes, at most: what a release of a desktop program weighs.
const SIZE: u64 = 58 << 20;

/// Bytes of a tar block; headers and contents begin on one.
const BLOCK: u64 = 512;

/// Two empty blocks end a tar.
const END: u64 = 2 * BLOCK;

/// Where programs and libraries lie.
const FOLDERS: &[&str] =
    &["/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/share/doc"];

/// Writes the tar to `target`; gives the number of files in it.
pub(super) fn write(target: &Path) -> io::Result<usize> {
    let mut tar = BufWriter::with_capacity(1 << 20, File::create(target)?);
    let mut left = SIZE - END;
    let (mut count, mut seen) = (0, HashSet::new());
    for path in candidates() {
        // Links lead to files that come by themselves.
        let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
        let needed = BLOCK + metadata.len().next_multiple_of(BLOCK);
        if !metadata.is_file() || metadata.len() == 0 || needed > left || !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        let (Ok(file), Some(header)) = (File::open(&path), header(&path, metadata.len(), metadata.mode(), metadata.mtime())) else {
            continue;
        };
        tar.write_all(&header)?;
        let copied = io::copy(&mut file.take(metadata.len()), &mut tar)?;
        // A file that shrank meanwhile is filled up: its header has been written.
        io::copy(&mut io::repeat(0).take(needed - BLOCK - copied), &mut tar)?;
        left -= needed;
        count += 1;
        if left < 64 * BLOCK {
            break;
        }
    }
    io::copy(&mut io::repeat(0).take(END), &mut tar)?;
    tar.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    Ok(count)
}

fn candidates() -> impl Iterator<Item = PathBuf> {
    let folders = FOLDERS.iter().flat_map(|folder| {
        let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        paths.sort();
        paths
    });
    std::env::current_exe().into_iter().chain(folders)
}

/// A ustar header (POSIX.1-1988); `None` for a path that does not fit its 100 bytes.
fn header(path: &Path, size: u64, mode: u32, mtime: i64) -> Option<[u8; BLOCK as usize]> {
    let name = path.strip_prefix("/").unwrap_or(path).to_str().filter(|name| name.len() < 100)?;
    let mut header = [0u8; BLOCK as usize];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, &format!("{:07o}\0", mode & 0o7777));
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{size:011o}\0"));
    put(136, &format!("{:011o}\0", mtime.max(0)));
    // The checksum is taken with its own field full of spaces.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000root");
    put(297, "root");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn tar_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("release.tar");
        let count = write(&target).unwrap();
        assert!(count > 0);
        assert!(std::fs::metadata(&target).unwrap().len() <= SIZE);
        let listing = std::process::Command::new("tar").arg("-tf").arg(&target).output().unwrap();
        assert!(listing.status.success());
        assert_eq!(listing.stdout.iter().filter(|byte| **byte == b'\n').count(), count);
    }
}
