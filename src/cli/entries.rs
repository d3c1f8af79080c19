//! `packmule retry`, `discard` and `recover`: what becomes of files that could not be stored.

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use clap::ArgMatches;
use indicatif::{ProgressBar, ProgressStyle};

use super::commands::path_of;
use super::everything::{Everything, Owner, Place};
use super::pages::say;
use crate::control::{self, Client, Request, Response, Upload, progress};
use crate::ranges::RangeSet;
use crate::writeback::{Kept, Run, offline};

/// Bytes asked for at once.
const PIECE: u64 = 4 << 20;

/// `packmule retry [ENTRY…|--all]`.
pub fn retry(matches: &ArgMatches) -> anyhow::Result<()> {
    let mut failed = 0;
    let all = Everything::look(path_of(matches, "spool-dir"))?;
    let chosen = if matches.get_flag("all") { parked(matches, &all)? } else { named(matches, &all)? };
    for Place { upload, owner } in chosen {
        let result = match owner {
            Owner::Folder(_) => Err(anyhow::anyhow!("{}: no mount has it: mount its bucket again, then retry", upload.shown())),
            Owner::Mount(mountpoint) => again(mountpoint, upload),
        };
        match result {
            Ok(done) if upload.is_delete() => say(&format!("deleted: {}", done.shown()))?,
            Ok(stored) => say(&format!("stored: {}", stored.shown()))?,
            Err(error) => {
                eprintln!("packmule: {error:#}");
                failed += 1;
            }
        }
    }
    if failed > 0 {
        bail!("{failed} not done; see packmule status");
    }
    Ok(())
}

/// Everything that is parked, of the mounts that are named where any is. What was never closed is published by its own number
/// alone.
fn parked<'a>(matches: &ArgMatches, all: &'a Everything) -> anyhow::Result<Vec<Place<'a>>> {
    let mut mounts = Vec::new();
    for typed in matches.get_many::<String>("entry").into_iter().flatten() {
        mounts.push(Client::connect_for(Some(Path::new(typed)))?.mountpoint().to_owned());
    }
    let meant = |place: &Place<'_>| match place.owner {
        Owner::Mount(mountpoint) => mounts.is_empty() || mounts.iter().any(|mount| mount == mountpoint),
        Owner::Folder(_) => false,
    };
    Ok(all
        .places()
        .filter(meant)
        .filter(|place| ["parked", Upload::UNDELETED].contains(&place.upload.phase.as_str()) && !place.upload.incomplete)
        .collect())
}

/// Stored beside somebody else's change, or under its final name, it has another key now.
fn again(mountpoint: &Path, upload: &Upload) -> anyhow::Result<Upload> {
    let mut client = Client::connect(mountpoint)?;
    let request = Request::Retry { id: upload.id };
    match progress::during(mountpoint, |moving| moving.id == upload.id, || client.call(&request))? {
        Response::Key { bucket, key } => Ok(Upload { bucket, key, ..upload.clone() }),
        _ => Ok(upload.clone()),
    }
}

/// `packmule discard ENTRY… [--yes]`.
pub fn discard(matches: &ArgMatches) -> anyhow::Result<()> {
    let all = Everything::look(path_of(matches, "spool-dir"))?;
    let chosen = named(matches, &all)?;
    if !matches.get_flag("yes") {
        if !io::stdin().is_terminal() {
            bail!("discard throws bytes away that nothing else may hold: say --yes where nobody can be asked");
        }
        for Place { upload, .. } in &chosen {
            let what = if upload.is_delete() { "its delete".to_owned() } else { super::status::size(upload.size) };
            eprintln!("{}  {what}", upload.shown());
        }
        eprint!("Throw away? [y/N] ");
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            bail!("nothing was thrown away");
        }
    }
    for Place { upload, owner } in chosen {
        match owner {
            Owner::Mount(mountpoint) => drop(Client::connect(mountpoint)?.call(&Request::Discard { id: upload.id })?),
            Owner::Folder(dir) => match offline::discard(dir, upload.id).with_context(|| dir.display().to_string())? {
                None => bail!("{}: a mount has it now: see packmule status", upload.shown()),
                Some(true) => {
                    eprintln!("packmule: {}: parts of it may lie in the bucket still: its next mount aborts their upload", upload.shown())
                }
                Some(false) => {}
            },
        }
        let what = if upload.is_delete() { "not deleted" } else { "thrown away" };
        say(&format!("{what}: {}", upload.shown()))?;
    }
    Ok(())
}

/// `packmule recover ENTRY FILE [--force]`.
pub fn recover(matches: &ArgMatches) -> anyhow::Result<()> {
    let all = Everything::look(path_of(matches, "spool-dir"))?;
    let typed = matches.get_one::<String>("entry").map(String::as_str).unwrap_or_default();
    let place = find(typed, &all)?;
    if place.upload.is_delete() {
        bail!("{}: is a delete, which has no bytes: S3 still has the object", place.upload.shown());
    }
    let mut from = match place.owner {
        Owner::Mount(mountpoint) => Origin::Mount { client: Client::connect(mountpoint)?, id: place.upload.id, fetch: true },
        Owner::Folder(dir) => match offline::open(dir, place.upload.id).with_context(|| dir.display().to_string())? {
            Some(kept) => Origin::Folder(Box::new(kept)),
            None => bail!("{}: a mount has it now: ask again", place.upload.shown()),
        },
    };
    let to = path_of(matches, "file").unwrap_or_default();
    let lost = if to.as_os_str() == "-" {
        copy(&mut from, place.upload, &mut Plain(io::stdout().lock()))?
    } else {
        to_file(&mut from, place.upload, &to, matches.get_flag("force"))?
    };
    if let Some(why) = lost.why {
        let ranges: Vec<String> = lost.ranges.iter().map(|range| format!("{} to {}", range.start, range.end)).collect();
        bail!("{}: written as zeros are the bytes {}, which the spool does not hold: {why}", place.upload.shown(), ranges.join(", "));
    }
    Ok(())
}

/// Whatever happens, `to` is the old file or the whole new one.
fn to_file(from: &mut Origin, upload: &Upload, to: &Path, force: bool) -> anyhow::Result<Lost> {
    use std::os::unix::fs::PermissionsExt;
    let exists = || format!("{}: is there already: name another file, or say --force", to.display());
    if !force && to.symlink_metadata().is_ok() {
        bail!(exists());
    }
    if to.is_dir() {
        bail!("{}: is a directory: name a file in it", to.display());
    }
    let beside = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !beside.is_dir() {
        bail!("{}: there is no such directory", beside.display());
    }
    let shown = || format!("{}: cannot be written", to.display());
    let mut file = tempfile::Builder::new()
        .prefix(".packmule-recover-")
        .permissions(std::fs::Permissions::from_mode(0o666))
        .tempfile_in(beside)
        .with_context(shown)?;
    let lost = copy(from, upload, &mut Sparse(file.as_file_mut())).with_context(shown)?;
    file.as_file().sync_all().with_context(shown)?;
    if force {
        file.persist(to).map_err(|error| error.error).with_context(shown)?;
    } else if let Err(error) = file.persist_noclobber(to) {
        match error.error.kind() {
            io::ErrorKind::AlreadyExists => bail!(exists()),
            _ => return Err(error.error).with_context(shown),
        }
    }
    Ok(lost)
}

/// What could not be had.
#[derive(Default)]
struct Lost {
    ranges: RangeSet,
    why: Option<String>,
}

fn copy(from: &mut Origin, upload: &Upload, to: &mut dyn Sink) -> anyhow::Result<Lost> {
    let bar = ProgressBar::new(upload.size);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}") {
        bar.set_style(style);
    }
    let mut lost = Lost::default();
    let mut at = 0;
    loop {
        let run = from.run(at)?;
        let end = at + run.len();
        match run {
            Run::Bytes(bytes) if bytes.is_empty() => break,
            Run::Bytes(bytes) => to.bytes(&bytes)?,
            Run::Zeros(len) => to.zeros(len)?,
            Run::Missing(len, why) => {
                to.zeros(len)?;
                lost.ranges.insert(at..end);
                lost.why.get_or_insert(why);
            }
        }
        at = end;
        bar.set_position(at);
    }
    to.end(at)?;
    bar.finish_and_clear();
    Ok(lost)
}

/// Where bytes come from.
enum Origin {
    Mount { client: Client, id: u64, fetch: bool },
    Folder(Box<Kept>),
}

impl Origin {
    fn run(&mut self, offset: u64) -> anyhow::Result<Run> {
        match self {
            Origin::Folder(kept) => Ok(kept.run(offset, PIECE as usize)?),
            Origin::Mount { client, id, fetch } => match client.call(&Request::Read { id: *id, offset, length: PIECE, fetch: *fetch })? {
                Response::Bytes { base64 } => Ok(Run::Bytes(Bytes::from(STANDARD.decode(base64)?))),
                Response::Zeros { length } if length > 0 => Ok(Run::Zeros(length)),
                Response::Missing { length, why } if length > 0 => {
                    // A store that is gone is not waited for at every piece.
                    *fetch = false;
                    Ok(Run::Missing(length, why))
                }
                _ => bail!("{}: runs another version of packmule: mount it anew", client.mountpoint().display()),
            },
        }
    }
}

/// Where bytes go.
trait Sink {
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn zeros(&mut self, len: u64) -> io::Result<()>;
    fn end(&mut self, size: u64) -> io::Result<()>;
}

/// A pipe.
struct Plain<W>(W);

impl<W: Write> Sink for Plain<W> {
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn zeros(&mut self, len: u64) -> io::Result<()> {
        io::copy(&mut io::Read::take(io::repeat(0), len), &mut self.0).map(drop)
    }

    fn end(&mut self, _: u64) -> io::Result<()> {
        self.0.flush()
    }
}

/// A file, whose zeros take no room.
struct Sparse<'a>(&'a mut File);

impl Sink for Sparse<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        /// Holes of the spool file come as zeros: a few blocks of most filesystems.
        const HOLE: usize = 64 << 10;
        for piece in bytes.chunks(HOLE) {
            match piece.iter().all(|byte| *byte == 0) {
                true => self.zeros(piece.len() as u64)?,
                false => self.0.write_all(piece)?,
            }
        }
        Ok(())
    }

    fn zeros(&mut self, len: u64) -> io::Result<()> {
        self.0.seek(SeekFrom::Current(i64::try_from(len).map_err(io::Error::other)?)).map(drop)
    }

    fn end(&mut self, size: u64) -> io::Result<()> {
        self.0.set_len(size)
    }
}

/// The entries that the command line names.
fn named<'a>(matches: &ArgMatches, all: &'a Everything) -> anyhow::Result<Vec<Place<'a>>> {
    matches.get_many::<String>("entry").into_iter().flatten().map(|typed| find(typed, all)).collect()
}

/// An entry by its number, by s3://bucket/key, or by a path on its mount.
fn find<'a>(typed: &str, all: &'a Everything) -> anyhow::Result<Place<'a>> {
    if !typed.is_empty() && typed.bytes().all(|byte| byte.is_ascii_digit()) {
        return all.numbered(typed);
    }
    if let Some((bucket, key)) = typed.strip_prefix("s3://").and_then(|rest| rest.split_once('/')) {
        return all.keyed(bucket, key, None);
    }
    let path = Path::new(typed);
    let mut client =
        Client::connect_for(Some(path)).with_context(|| format!("{typed}: neither a number of packmule status nor s3://BUCKET/KEY"))?;
    match client.call(&Request::Key { path: control::resolve(path)? })? {
        Response::Key { bucket, key } => all.keyed(&bucket, &key, Some(client.mountpoint())),
        _ => bail!("{}: runs another version of packmule: mount it anew", client.mountpoint().display()),
    }
}
