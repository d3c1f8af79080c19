//! Edits of one large file that somebody else stored, each on a fresh mount, until the result is whole in S3.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::measure::{Pattern, Report};
use crate::support::store::Store;
use crate::{Arguments, Far, attempted, patterns, stored};

const ORIGINAL: &str = "large.bin";

/// Number of a block that no file has by its place.
const STRANGE: u64 = 1 << 40;

struct Edit {
    task: &'static str,
    /// Does it in a folder with a file of so many blocks.
    does: fn(&Path, u64) -> io::Result<()>,
    /// Name of the result.
    name: &'static str,
    /// Its blocks, by number.
    result: fn(u64) -> Vec<u64>,
    /// The original goes.
    moves: bool,
}

const EDITS: [Edit; 4] = [
    Edit { task: "overwrite 1 MiB in the middle, far", does: patch, name: ORIGINAL, result: patched, moves: false },
    Edit { task: "append 1 MiB, far", does: append, name: ORIGINAL, result: |blocks| (0..=blocks).collect(), moves: false },
    Edit {
        task: "cp inside the mount, far",
        does: |dir, _| attempted(Command::new("cp").arg(dir.join(ORIGINAL)).arg(dir.join("copy.bin"))),
        name: "copy.bin",
        result: |blocks| (0..blocks).collect(),
        moves: false,
    },
    Edit {
        task: "rename one file, far",
        does: |dir, _| std::fs::rename(dir.join(ORIGINAL), dir.join("moved.bin")),
        name: "moved.bin",
        result: |blocks| (0..blocks).collect(),
        moves: true,
    },
];

fn block(number: u64) -> Vec<u8> {
    let mut block = vec![0; Pattern::BLOCK];
    Pattern::fill(number, &mut block);
    block
}

/// Dropping a File hides what close() says.
fn close(file: File) -> io::Result<()> {
    Ok(nix::unistd::close(file)?)
}

fn patch(dir: &Path, blocks: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(dir.join(ORIGINAL))?;
    file.write_all_at(&block(STRANGE), blocks / 2 * Pattern::BLOCK as u64)?;
    close(file)
}

fn patched(blocks: u64) -> Vec<u64> {
    (0..blocks).map(|number| if number == blocks / 2 { STRANGE } else { number }).collect()
}

fn append(dir: &Path, blocks: u64) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).open(dir.join(ORIGINAL))?;
    file.write_all(&block(blocks))?;
    close(file)
}

/// Half of the sequential file's size.
pub fn edits(report: &mut Report, arguments: &Arguments) {
    let (far, size) = (Far::new(), arguments.size / 2);
    let blocks = size / Pattern::BLOCK as u64;
    far.each(arguments, |mut target| {
        let (dir, folder) = (target.dir().join(target.name()), target.name().to_owned());
        let key = |name: &str| format!("{folder}/{name}");
        for edit in &EDITS {
            patterns::store(&far, &key(ORIGINAL), size);
            target.cold();
            let _ = std::fs::read_dir(&dir).unwrap().count();
            let (result, before) = ((edit.result)(blocks), far.store.head(&key(edit.name)));
            let whole = || {
                let now = far.store.head(&key(edit.name));
                let comes = now != before && now.is_some_and(|(size, _)| size == (result.len() * Pattern::BLOCK) as u64);
                comes && !(edit.moves && far.store.size(&key(ORIGINAL)).is_some())
            };
            let row = far.attempt(
                edit.task,
                &target,
                || (edit.does)(&dir, blocks).and_then(|()| stored(Duration::from_millis(10), whole)),
                || holds(&far.store, &key(edit.name), &result),
            );
            report.add(row);
            for name in [ORIGINAL, edit.name] {
                far.store.delete(&key(name));
            }
        }
    });
}

/// An object of these blocks and no others.
fn holds(store: &Store, key: &str, blocks: &[u64]) -> io::Result<()> {
    let found = store.bytes(key);
    let same = found.chunks(Pattern::BLOCK).eq(blocks.iter().map(|number| block(*number)));
    if same { Ok(()) } else { Err(io::Error::other("the object in S3 is another")) }
}
