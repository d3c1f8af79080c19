//! Files as tests need them: bytes that tell where they are from, whole trees to compare, programs with a time limit.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::errno::Errno;

/// No program of these tests takes so long, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(180);

/// Bytes without a period: a block in the wrong place, or of another `seed`, differs.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// close(2) with its result, which Drop swallows.
pub fn close(file: File) -> Result<(), Errno> {
    nix::unistd::close(file)
}

/// The errno of a failed call.
pub fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Errno {
    let error = result.expect_err("it should have failed");
    Errno::from_raw(error.raw_os_error().unwrap_or_else(|| panic!("no errno: {error}")))
}

/// Creates or truncates, writes, closes; the first error counts.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = File::create(path)?;
    file.write_all_at(bytes, 0)?;
    close(file).map_err(io::Error::from)
}

/// Opens for writing without truncation.
pub fn open_existing(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// True when a file below this folder has exactly these bytes.
pub fn holds(folder: &Path, bytes: &[u8]) -> bool {
    let inside = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut paths = inside.filter(|path| path.is_dir() || path.metadata().is_ok_and(|meta| meta.len() == bytes.len() as u64));
    paths.any(|path| if path.is_dir() { holds(&path, bytes) } else { fs::read(&path).is_ok_and(|found| found == bytes) })
}

/// Names in a folder, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

/// What `cp -a` would keep of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// File type and permissions.
    pub mode: u32,
    /// Whole seconds; `None` for folders, whose times S3 does not hold in the bucket.
    pub mtime: Option<i64>,
    pub content: Content,
}

#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    File(Vec<u8>),
    Folder,
    Link(PathBuf),
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(bytes) => write!(f, "{} bytes, md5 {:?}", bytes.len(), super::double::md5(bytes)),
            Self::Folder => f.write_str("folder"),
            Self::Link(target) => write!(f, "-> {}", target.display()),
        }
    }
}

/// Everything below a folder, by path.
pub fn tree(root: &Path) -> BTreeMap<PathBuf, Node> {
    let mut nodes = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_dir() {
                folders.push(path.clone());
                Content::Folder
            } else if meta.is_symlink() {
                Content::Link(fs::read_link(&path).unwrap())
            } else {
                Content::File(fs::read(&path).unwrap())
            };
            let mtime = (!meta.is_dir()).then(|| meta.mtime());
            nodes.insert(path.strip_prefix(root).unwrap().to_owned(), Node { mode: meta.mode(), mtime, content });
        }
    }
    nodes
}

/// Compares two trees path by path: a whole dump of both would say nothing.
#[track_caller]
pub fn assert_same(left: &BTreeMap<PathBuf, Node>, right: &BTreeMap<PathBuf, Node>, what: &str) {
    let paths: std::collections::BTreeSet<_> = left.keys().chain(right.keys()).collect();
    let differing = paths.into_iter().filter(|path| left.get(*path) != right.get(*path));
    let lines: Vec<String> = differing.map(|path| format!("{}: {:?} / {:?}", path.display(), left.get(path), right.get(path))).collect();
    assert!(lines.is_empty(), "{what}: {} differ\n{}", lines.len(), lines.join("\n"));
}

/// The tree without times: for work that stamps files with the time of day.
pub fn without_times(mut tree: BTreeMap<PathBuf, Node>) -> BTreeMap<PathBuf, Node> {
    tree.values_mut().for_each(|node| node.mtime = None);
    tree
}

/// Runs a program in `dir`; it must succeed, and in time.
#[track_caller]
pub fn run(dir: &Path, program: &str, args: &[&str]) -> String {
    let output = output(Command::new(program).args(args).current_dir(dir));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}\n{said}{complaint}", output.status);
    said
}

/// Runs a shell script in `dir`; it must succeed.
#[track_caller]
pub fn sh(dir: &Path, script: &str) -> String {
    run(dir, "sh", &["-euc", script])
}

/// A program's output and status; it is killed when it takes too long.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    // Its own temporary files, not pipes: a killed program's children would keep those open.
    let (out, err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(err.try_clone().unwrap());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
    let status = super::mount::wait(&mut child, PATIENCE);
    let read = |file: &File| {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let (stdout, stderr) = (read(&out), read(&err));
    let Some(status) = status else {
        let _ = child.kill();
        panic!("{command:?} hangs; it said: {}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    };
    Output { status, stdout, stderr }
}

/// A file name from bytes.
pub fn name(bytes: &[u8]) -> &OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(bytes)
}
