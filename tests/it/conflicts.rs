//! Promise 12 as a table: what both sides do to one name × `on_conflict` × `write_back`.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::support::double::{Fault, When};
use crate::support::files::{self, close, noise};
use crate::support::mount::can_mount;
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

const THEIRS: &str = "THEIRS, and longer than ours\n";

/// What S3 holds in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// Theirs, and ours beside it.
    Beside,
    /// Theirs, and ours behind it.
    Behind,
    /// Ours.
    Ours,
    /// What they made of it. Ours is parked: refused with this error, where anybody waits for an answer.
    Parked(Errno),
    /// What they made of it. Ours stays under its old name.
    Refused,
}

/// One row: what we do to a name that somebody else changes or deletes meanwhile.
struct Row {
    name: &'static str,
    /// What was there before.
    base: Option<&'static str>,
    /// They delete it; else they change it.
    deleted: bool,
    begin: fn(&Stage, &str) -> Begun,
    ours: &'static str,
    /// keep, overwrite, fail.
    ends: [Ends; 3],
}

/// What is closed, or renamed, when they have done it.
enum Begun {
    Open(File),
    Renamed(PathBuf),
}

fn open(options: &mut OpenOptions, stage: &Stage, name: &str, bytes: &str, at: Option<u64>) -> Begun {
    let mut file = options.open(stage.path(name)).unwrap();
    match at {
        Some(at) => file.write_all_at(bytes.as_bytes(), at).unwrap(),
        None => file.write_all(bytes.as_bytes()).unwrap(),
    }
    Begun::Open(file)
}

fn whole(stage: &Stage, name: &str) -> Begun {
    open(OpenOptions::new().write(true).truncate(true), stage, name, "ours", Some(0))
}

fn append(stage: &Stage, name: &str) -> Begun {
    open(OpenOptions::new().append(true), stage, name, "ours\n", None)
}

fn append_new(stage: &Stage, name: &str) -> Begun {
    open(OpenOptions::new().append(true).create(true), stage, name, "ours\n", None)
}

fn part(stage: &Stage, name: &str) -> Begun {
    open(OpenOptions::new().write(true), stage, name, "OURS", Some(2))
}

/// The bytes around the change are at hand: they were read.
fn part_of_what_was_read(stage: &Stage, name: &str) -> Begun {
    fs::read(stage.path(name)).unwrap();
    part(stage, name)
}

fn append_to_what_was_read(stage: &Stage, name: &str) -> Begun {
    fs::read(stage.path(name)).unwrap();
    append(stage, name)
}

fn exclusive(stage: &Stage, name: &str) -> Begun {
    open(OpenOptions::new().write(true).create_new(true), stage, name, "ours", Some(0))
}

fn rename_unpublished(stage: &Stage, name: &str) -> Begun {
    let temporary = stage.path(&format!("{name}.crdownload"));
    files::write(&temporary, b"ours").unwrap();
    fs::metadata(stage.path(name)).unwrap();
    Begun::Renamed(temporary)
}

fn rename_published(stage: &Stage, name: &str) -> Begun {
    fs::metadata(stage.path(name)).unwrap();
    Begun::Renamed(stage.path(&source_of(name)))
}

/// The object that is renamed to `name`.
fn source_of(name: &str) -> String {
    format!("source of {name}")
}

const STALE: Ends = Ends::Parked(Errno::ESTALE);
const TAKEN: Ends = Ends::Parked(Errno::EEXIST);

const ROWS: &[Row] = &[
    Row { name: "whole.txt", base: Some("base"), deleted: false, begin: whole, ours: "ours", ends: [Ends::Beside, Ends::Ours, STALE] },
    Row { name: "whole-gone", base: Some("base"), deleted: true, begin: whole, ours: "ours", ends: [Ends::Ours; 3] },
    Row { name: "append", base: Some("base\n"), deleted: false, begin: append, ours: "ours\n", ends: [Ends::Behind, Ends::Behind, STALE] },
    Row { name: "append-new", base: None, deleted: false, begin: append_new, ours: "ours\n", ends: [Ends::Behind, Ends::Behind, STALE] },
    Row { name: "append-gone", base: Some("base\n"), deleted: true, begin: append, ours: "", ends: [STALE; 3] },
    Row {
        name: "append-read-gone",
        base: Some("base\n"),
        deleted: true,
        begin: append_to_what_was_read,
        ours: "base\nours\n",
        ends: [Ends::Ours; 3],
    },
    Row { name: "part", base: Some("base of it"), deleted: false, begin: part, ours: "", ends: [STALE; 3] },
    Row {
        name: "part-read",
        base: Some("base of it"),
        deleted: false,
        begin: part_of_what_was_read,
        ours: "baOURSf it",
        ends: [STALE, Ends::Ours, STALE],
    },
    Row { name: "part-gone", base: Some("base of it"), deleted: true, begin: part, ours: "", ends: [STALE; 3] },
    Row {
        name: "part-read-gone",
        base: Some("base of it"),
        deleted: true,
        begin: part_of_what_was_read,
        ours: "baOURSf it",
        ends: [Ends::Ours; 3],
    },
    Row { name: "exclusive", base: None, deleted: false, begin: exclusive, ours: "ours", ends: [TAKEN; 3] },
    Row {
        name: "renamed.txt",
        base: Some("base"),
        deleted: false,
        begin: rename_unpublished,
        ours: "ours",
        ends: [Ends::Beside, Ends::Ours, STALE],
    },
    Row { name: "renamed-gone", base: Some("base"), deleted: true, begin: rename_unpublished, ours: "ours", ends: [Ends::Ours; 3] },
    Row {
        name: "moved.txt",
        base: Some("base"),
        deleted: false,
        begin: rename_published,
        ours: "ours",
        ends: [Ends::Beside, Ends::Ours, Ends::Refused],
    },
    Row { name: "moved-gone", base: Some("base"), deleted: true, begin: rename_published, ours: "ours", ends: [Ends::Ours; 3] },
];

/// The key beside `name`.
fn beside(keys: &[String], name: &str) -> Option<String> {
    let (stem, extension) = name.split_once('.').map_or((name, String::new()), |(stem, extension)| (stem, format!(".{extension}")));
    let named = |key: &&String| key.starts_with(&format!("{stem} (conflict of ")) && key.ends_with(&format!("){extension}"));
    keys.iter().find(named).cloned()
}

fn is_parked(status: &str, stage: &Stage, name: &str) -> bool {
    let key = format!("s3://{}/{name}", stage.store.bucket());
    status.lines().any(|line| line.contains(" parked ") && line.split_whitespace().any(|word| word == key))
}

/// Every row under one word of `on_conflict`. `queued`: with `write_back`, so that nobody waits for the publication.
fn every_row(store: Store, word: &str, queued: bool) {
    let column = ["keep", "overwrite", "fail"].iter().position(|known| *known == word).unwrap();
    for row in ROWS {
        if let Some(base) = row.base {
            store.put(row.name, base);
        }
        if row.name.starts_with("moved") {
            store.put(&source_of(row.name), row.ours);
        }
    }
    // What was seen stays what it was until they have changed it, however slow the machine is.
    let mut options = vec![format!("on_conflict={word}"), "metadata_ttl=1h".to_owned()];
    options.extend(queued.then(|| "write_back=1h".to_owned()));
    let stage = Stage::with(store, &options.iter().map(String::as_str).collect::<Vec<_>>());
    files::names(stage.dir());
    let begun: Vec<Begun> = ROWS.iter().map(|row| (row.begin)(&stage, row.name)).collect();
    for row in ROWS {
        match row.deleted {
            true => stage.store.delete(row.name),
            false => stage.store.put(row.name, THEIRS),
        }
    }
    for (row, begun) in ROWS.iter().zip(begun) {
        let answer = match begun {
            Begun::Open(file) => close(file),
            Begun::Renamed(from) => match fs::rename(from, stage.path(row.name)) {
                Ok(()) => Ok(()),
                Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap())),
            },
        };
        let expected = match row.ends[column] {
            Ends::Parked(error) if !queued => Err(error),
            Ends::Refused => Err(Errno::ESTALE),
            _ => Ok(()),
        };
        assert_eq!(answer, expected, "{} {word} {queued}", row.name);
    }
    if queued {
        // It fails where something was parked.
        let _ = stage.mount.command().arg("flush").arg(stage.dir()).output().unwrap();
    }
    let (keys, status) = (stage.store.keys(), stage.mount.status());
    for row in ROWS {
        let (name, ends, scene) = (row.name, row.ends[column], format!("{} {word} {queued}: {keys:?}\n{status}", row.name));
        let holds = match ends {
            Ends::Ours => Some(row.ours.to_owned()),
            Ends::Behind => Some(format!("{THEIRS}{}", row.ours)),
            _ => (!row.deleted).then(|| THEIRS.to_owned()),
        };
        let found = |key: &str| stage.store.get(key).map(|object| String::from_utf8_lossy(&object.bytes).into_owned());
        assert_eq!(found(name), holds, "{scene}");
        let ours = beside(&keys, name);
        assert_eq!(ours.is_some(), ends == Ends::Beside, "{scene}");
        if let Some(ours) = ours {
            assert_eq!(found(&ours).as_deref(), Some(row.ours), "{scene}");
            assert!(status.contains(&format!("is kept beside it as {ours}")), "{scene}");
        }
        assert_eq!(is_parked(&status, &stage, name), matches!(ends, Ends::Parked(_)), "{scene}");
        assert_eq!(keys.contains(&source_of(name)), ends == Ends::Refused, "{scene}");
        let shown = || fs::read(stage.path(name)).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        stage.store.eventually(&format!("the mount shows what S3 holds: {scene}"), |_| shown() == holds);
    }
    assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
}

on_every_store! {
    /// Promise 12: "creating one that must not exist (`O_EXCL`)", and "appended lines go behind theirs", where both have written the
    /// same bytes too.
    fn equal_bytes_are_two_files(store) {
        store.put("log", "base ");
        let stage = Stage::new(store);
        // Its bytes are here.
        assert_eq!(fs::read_to_string(stage.path("log")).unwrap(), "base ");
        let lock = OpenOptions::new().write(true).create_new(true).open(stage.path("lock")).unwrap();
        let mut log = OpenOptions::new().append(true).open(stage.path("log")).unwrap();
        let mut new = OpenOptions::new().append(true).create(true).open(stage.path("new")).unwrap();
        lock.write_all_at(b"mine", 0).unwrap();
        log.write_all(b"beat ").unwrap();
        new.write_all(b"beat ").unwrap();
        for (key, bytes) in [("lock", "mine"), ("log", "base beat "), ("new", "beat ")] {
            stage.store.put(key, bytes);
        }
        assert_eq!(close(lock), Err(Errno::EEXIST));
        close(log).unwrap();
        close(new).unwrap();
        assert_eq!(stage.store.bytes("log"), "base beat beat ");
        assert_eq!(stage.store.bytes("new"), "beat beat ");
    }

    /// Promise 12: "New content is stored beside theirs as `name (conflict of HOST DATE).ext`; appended lines go behind theirs"
    fn keep(store) {
        every_row(store, "keep", false);
    }

    /// Promise 12: "`overwrite` overwrites"
    fn overwrite(store) {
        every_row(store, "overwrite", false);
    }

    /// Promise 12: "`on_conflict=fail` always fails"
    fn fail(store) {
        every_row(store, "fail", false);
    }

    /// The same where nobody waits for the publication.
    fn keep_in_the_background(store) {
        every_row(store, "keep", true);
    }

    /// The same where nobody waits for the publication.
    fn overwrite_in_the_background(store) {
        every_row(store, "overwrite", true);
    }

    /// The same where nobody waits for the publication.
    fn fail_in_the_background(store) {
        every_row(store, "fail", true);
    }

    /// Promise 12: "appended lines go behind theirs", however much of it there is and whatever became of what was there.
    fn appends_go_behind_theirs(store) {
        let sizes = [(100, 300_000, 200), (100, 300_000, 0), (300_000, 100, 50), (20 << 20, 3 << 20, 12 << 20), (6 << 20, 9 << 20, 7 << 20)];
        for (index, (base, _, _)) in sizes.iter().enumerate() {
            store.put(&format!("log{index}"), noise(1, *base));
        }
        let stage = Stage::new(store);
        for (index, (_, ours, theirs)) in sizes.into_iter().enumerate() {
            let name = format!("log{index}");
            let mut file = OpenOptions::new().append(true).open(stage.path(&name)).unwrap();
            file.write_all(&noise(2, ours)).unwrap();
            stage.store.put(&name, noise(3, theirs));
            file.write_all(b"last").unwrap();
            close(file).unwrap();
            let expected = [noise(3, theirs), noise(2, ours), b"last".to_vec()].concat();
            assert!(stage.store.bytes(&name) == expected, "{name}");
            assert!(fs::read(stage.path(&name)).unwrap() == expected, "{name} in the mount");
        }
        assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    }

    /// Promise 12: "`overwrite` overwrites", a part of a file too that was copied inside S3 until they came.
    fn a_part_of_a_large_file_is_overwritten(store) {
        let base = noise(1, 20 << 20);
        store.put("f", base.clone());
        let stage = Stage::with(store, &["on_conflict=overwrite"]);
        assert!(fs::read(stage.path("f")).unwrap() == base);
        let file = files::open_existing(&stage.path("f"));
        file.write_all_at(b"ours", 9 << 20).unwrap();
        stage.store.put("f", THEIRS);
        close(file).unwrap();
        let mut expected = base;
        expected[9 << 20..][..4].copy_from_slice(b"ours");
        assert!(stage.store.bytes("f") == expected);
        assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    }

    /// Promise 12: "appended lines go behind theirs", over a crash too.
    fn an_append_goes_behind_theirs_after_a_crash(store) {
        store.put("log", "base\n");
        let mut stage = Stage::with(store, &["write_back=1h"]);
        let mut file = OpenOptions::new().append(true).open(stage.path("log")).unwrap();
        file.write_all(b"ours\n").unwrap();
        close(file).unwrap();
        stage.mount.crash();
        stage.store.put("log", THEIRS);
        stage.mount.again();
        stage.store.eventually("ours is behind theirs", |store| store.bytes("log") == format!("{THEIRS}ours\n"));
    }
}

/// Promise 12: "What somebody else changed since you opened a file" is judged; an earlier content of ours, which the store took and whose
/// answer was lost, is no such change, whether the mount lives on or is killed, before or after the next close.
fn an_answer_is_lost(killed: bool, closed_again: bool) {
    const MIB: usize = 1 << 20;
    let big = noise(3, 20 * MIB);
    let store = Store::double();
    store.put("changed", "base base base");
    store.put("log", "base");
    store.put("big", big.clone());
    store.put("big log", big.clone());
    let mut stage = Stage::with(store, &["write_back=50ms"]);
    let names = ["new", "excl", "changed", "log", "big", "big log"];
    let write = |stage: &Stage, round: u8| {
        let file = |name: &str, options: &mut OpenOptions| options.open(stage.path(name)).unwrap();
        let text = [b'0' + round; 20];
        let new = file("new", OpenOptions::new().write(true).create(true));
        new.write_all_at(&text, 0).unwrap();
        let exclusive = file("excl", OpenOptions::new().write(true).create_new(round == 1));
        exclusive.write_all_at(&text, 0).unwrap();
        let part = file("changed", OpenOptions::new().write(true));
        part.write_all_at(&text[..2], usize::from(round) as u64 * 4).unwrap();
        let big = file("big", OpenOptions::new().write(true));
        big.write_all_at(&text, u64::from(round) * 7 * MIB as u64).unwrap();
        let mut log = file("log", OpenOptions::new().append(true));
        log.write_all(&text).unwrap();
        let mut big_log = file("big log", OpenOptions::new().append(true));
        big_log.write_all(&text).unwrap();
        [new, exclusive, part, log, big, big_log]
    };
    let close_all = |files: [File; 6]| files.into_iter().for_each(|file| close(file).unwrap());
    let first = write(&stage, 1);
    for operation in ["PutObject", "CompleteMultipartUpload"] {
        stage.double().fault(When::operation(operation), Fault::LostAnswer);
    }
    stage.double().fault(When::operation("HeadObject"), Fault::Error(503, "SlowDown"));
    close_all(first);
    let shows = |store: &Store, round: u8| {
        let text = [b'0' + round; 20];
        let of = |name: &str| store.get(name).map(|object| object.bytes.to_vec()).unwrap_or_default();
        let holds = |name: &str, at: usize, text: &[u8]| of(name).get(at..at + text.len()) == Some(text);
        let at = usize::from(round);
        ["new", "excl"].into_iter().all(|name| of(name) == text)
            && holds("changed", at * 4, &text[..2])
            && holds("big", at * 7 * MIB, &text)
            && of("log").ends_with(&text)
            && of("big log").ends_with(&text)
    };
    stage.store.eventually("the store has taken the first", |store| shows(store, 1));
    if closed_again {
        close_all(write(&stage, 2));
    }
    if killed {
        stage.mount.crash();
    }
    stage.double().clear_faults();
    if killed {
        stage.mount.again();
    }
    if closed_again {
        stage.store.eventually("the second is stored", |store| shows(store, 2));
    }
    let said = files::output(stage.mount.command().arg("flush").arg(stage.dir()));
    assert!(said.status.success(), "{said:?}");
    let lines = ["1".repeat(20), if closed_again { "2".repeat(20) } else { String::new() }].concat();
    assert_eq!(stage.store.keys().len(), names.len(), "{:?}", stage.store.keys());
    assert_eq!(stage.store.bytes("log"), format!("base{lines}"));
    assert_eq!(stage.store.bytes("changed"), if closed_again { "base11as22base" } else { "base11ase base" });
    let big_log = stage.store.bytes("big log");
    assert!(big_log[..20 * MIB] == big && big_log[20 * MIB..] == *lines.as_bytes());
    stage.mount.umount();
}

#[test]
fn what_the_store_took_unheard_is_nobody_else_s_change() {
    if can_mount() {
        an_answer_is_lost(false, true);
    }
}

#[test]
fn what_the_store_took_unheard_before_a_crash_is_nobody_else_s_change() {
    if can_mount() {
        an_answer_is_lost(true, true);
        an_answer_is_lost(true, false);
    }
}
