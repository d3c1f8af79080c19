//! The program is killed, at any moment and at each of its failpoints: promise 26. `PACKMULE_TORTURE=1` kills it some hundred
//! times, on SeaweedFS as well; CI some dozen times.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use packmule::failpoint;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::support::double::Options;
use crate::support::files::{self, noise};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::torture;
use crate::support::store::Store;

const MIB: usize = 1 << 20;
const NAMES: [&str; 4] = ["a", "b", "sub/c", "sub/d"];

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content {
    seed: u64,
    len: usize,
    /// Its first byte is a hole.
    punched: bool,
}

impl Content {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = noise(self.seed, self.len);
        if self.punched {
            bytes[0] = 0;
        }
        bytes
    }
}

/// What is known of one name.
#[derive(Clone, Debug, Default)]
struct Known {
    /// What S3 may hold: the last content whose close was answered, then what was under way since. `None`: no object.
    may: Vec<Option<Content>>,
    /// With a queue: what S3 may still hold while the last one waits, should it be written over before.
    before: Vec<Option<Content>>,
    /// fsynced, and neither closed nor removed since.
    synced: Option<Content>,
}

fn add(known: &mut Vec<Option<Content>>, more: Vec<Option<Content>>) {
    for content in more {
        if !known.contains(&content) {
            known.push(content);
        }
    }
}

/// What the application was told until the program was killed.
struct Life {
    dir: PathBuf,
    queues: bool,
    rng: SmallRng,
    known: BTreeMap<&'static str, Known>,
    next: u64,
    /// The last calls.
    story: Vec<String>,
    /// The program is killed: where its mount is gone nothing is to be done in the folder below.
    over: Arc<AtomicBool>,
}

impl Life {
    fn new(dir: &Path, queues: bool, seed: u64) -> Self {
        let known = NAMES.into_iter().map(|name| (name, Known { may: vec![None], ..Known::default() })).collect();
        Self {
            dir: dir.to_owned(),
            queues,
            rng: SmallRng::seed_from_u64(seed),
            known,
            next: seed << 20,
            story: Vec::new(),
            over: Arc::default(),
        }
    }

    fn about(&mut self, name: &'static str) -> &mut Known {
        self.known.get_mut(name).unwrap()
    }

    /// Only what was answered is a promise; what was asked may have happened.
    fn now(&mut self, name: &'static str, content: Option<Content>) {
        let known = self.about(name);
        let before = std::mem::replace(&mut known.may, vec![content]);
        add(&mut known.before, before);
        known.synced = None;
    }

    fn perhaps(&mut self, name: &'static str, content: Option<Content>) {
        self.about(name).may.push(content);
    }

    /// What waited for its upload is written over: as on any disk, it is gone, and S3 holds what it held.
    fn overwrites_a_queued(&mut self, name: &'static str) {
        if self.queues {
            let known = self.about(name);
            add(&mut known.may, known.before.clone());
        }
    }

    fn tell(&mut self, what: String) {
        self.story.push(what);
        if self.story.len() > 40 {
            self.story.remove(0);
        }
    }

    fn content(&mut self, large: bool) -> Content {
        self.next += 1;
        let len = if large { 11 * MIB } else { self.rng.random_range(1..60_000) };
        Content { seed: self.next, len, punched: false }
    }

    /// Writes a whole new content.
    fn write(&mut self, name: &'static str, large: bool, sync: bool) -> io::Result<()> {
        let content = self.content(large);
        self.tell(format!("write {name} {}", content.len));
        let path = self.dir.join(name);
        self.overwrites_a_queued(name);
        let file = File::create(&path)?;
        for (index, chunk) in content.bytes().chunks(MIB).enumerate() {
            file.write_all_at(chunk, (index * MIB) as u64)?;
        }
        if sync {
            file.sync_all()?;
            self.about(name).synced = Some(content);
        }
        self.perhaps(name, Some(content));
        files::close(file)?;
        self.now(name, Some(content));
        Ok(())
    }

    /// As GLib replaces a file: a temporary name, renamed over.
    fn replace(&mut self, name: &'static str) -> io::Result<()> {
        let content = self.content(false);
        self.tell(format!("replace {name} {}", content.len));
        let temporary = self.dir.join(".goutputstream-AB12CD");
        files::write(&temporary, &content.bytes())?;
        self.perhaps(name, Some(content));
        fs::rename(&temporary, self.dir.join(name))?;
        // A rename over waits for the publication.
        self.now(name, Some(content));
        Ok(())
    }

    fn rename(&mut self, from: &'static str, to: &'static str) -> io::Result<()> {
        let [Some(content)] = self.known[from].may[..] else { return Ok(()) };
        self.tell(format!("rename {from} {to}"));
        self.perhaps(from, None);
        self.perhaps(to, Some(content));
        fs::rename(self.dir.join(from), self.dir.join(to))?;
        // With a queue an older version moves at once, and the newest follows.
        let moved = self.known[from].before.clone();
        add(&mut self.about(to).before, moved);
        self.now(from, None);
        self.now(to, Some(content));
        Ok(())
    }

    fn remove(&mut self, name: &'static str) -> io::Result<()> {
        if self.known[name].may == [None] {
            return Ok(());
        }
        self.tell(format!("remove {name}"));
        self.perhaps(name, None);
        self.about(name).synced = None;
        fs::remove_file(self.dir.join(name))?;
        self.now(name, None);
        Ok(())
    }

    fn touch(&mut self, name: &'static str) -> io::Result<()> {
        if self.known[name].may == [None] {
            return Ok(());
        }
        self.tell(format!("touch {name}"));
        let path = self.dir.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        OpenOptions::new().read(true).open(&path)?.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000))
    }

    fn punch(&mut self, name: &'static str) -> io::Result<()> {
        let [Some(content)] = self.known[name].may[..] else { return Ok(()) };
        let content = Content { punched: true, ..content };
        self.overwrites_a_queued(name);
        let file = OpenOptions::new().write(true).open(self.dir.join(name))?;
        fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 1)?;
        self.perhaps(name, Some(content));
        files::close(file)?;
        self.now(name, Some(content));
        Ok(())
    }

    /// By copy_file_range(2): the store copies.
    fn copy(&mut self, from: &'static str, to: &'static str) -> io::Result<()> {
        let [Some(content)] = self.known[from].may[..] else { return Ok(()) };
        self.tell(format!("copy {from} {to}"));
        self.overwrites_a_queued(to);
        let (mut source, mut copy) = (File::open(self.dir.join(from))?, File::create(self.dir.join(to))?);
        io::copy(&mut source, &mut copy)?;
        self.perhaps(to, Some(content));
        files::close(copy)?;
        self.now(to, Some(content));
        Ok(())
    }

    /// A directory gets another name.
    fn rename_tree(&mut self) -> io::Result<()> {
        self.tell("rename a directory".to_owned());
        fs::create_dir(self.dir.join("tree"))?;
        for name in ["x", "y"] {
            files::write(&self.dir.join("tree").join(name), name.as_bytes())?;
        }
        fs::rename(self.dir.join("tree"), self.dir.join("moved"))
    }

    /// Every kind of call once.
    fn round(&mut self) -> io::Result<()> {
        match fs::create_dir(self.dir.join("sub")) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        self.write("a", false, true)?;
        self.write("b", true, false)?;
        self.touch("a")?;
        self.copy("b", "sub/d")?;
        self.write("sub/c", false, false)?;
        self.replace("a")?;
        self.rename("sub/c", "sub/d")?;
        self.write("sub/c", true, true)?;
        self.punch("b")?;
        self.remove("sub/d")?;
        self.rename_tree()?;
        self.touch("b")?;
        // What was set is copied to S3 a second later.
        let until = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < until {
            self.dir.metadata()?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Calls at random.
    fn wander(&mut self) -> io::Result<()> {
        match fs::create_dir(self.dir.join("sub")) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        while !self.over.load(Relaxed) {
            let name = NAMES[self.rng.random_range(0..NAMES.len())];
            match self.rng.random_range(0..13) {
                0..=3 => self.write(name, false, false)?,
                4 => self.write(name, false, true)?,
                5 => self.write(name, true, false)?,
                6 => self.write(name, true, true)?,
                7 => self.replace("a")?,
                8 => self.rename(name, if name == "a" { "sub/d" } else { "a" })?,
                9 => self.remove(name)?,
                10 => self.touch(name)?,
                11 if name != "a" => self.copy(name, "a")?,
                _ => std::thread::sleep(Duration::from_millis(self.rng.random_range(0..150))),
            }
        }
        Ok(())
    }
}

/// Which content it is; an object that is none of those that were closed is torn.
fn recognise(known: &Known, bytes: Option<&[u8]>) -> Option<Option<Content>> {
    let same = |content: &Option<Content>| match (content, bytes) {
        (None, None) => true,
        (Some(content), Some(bytes)) => content.len == bytes.len() && content.bytes() == bytes,
        _ => false,
    };
    known.may.iter().find(|content| same(content)).copied()
}

/// Kills the mount, mounts again, and looks at what is left of what was promised.
fn check(mount: &mut Mount, store: &Store, known: &BTreeMap<&'static str, Known>, queues: bool, scene: &str) {
    let objects = |store: &Store| -> BTreeMap<&'static str, Option<Vec<u8>>> {
        NAMES.into_iter().map(|name| (name, store.get(name).map(|seen| seen.bytes.to_vec()))).collect()
    };
    if !queues {
        // What close() said is in S3 is there, whatever became of the program.
        for (name, bytes) in objects(store) {
            let (known, len) = (&known[name], bytes.as_ref().map(Vec::len));
            assert!(recognise(known, bytes.as_deref()).is_some(), "{scene}: {name} in S3 ({len:?} bytes) is none of {known:?}");
        }
    }
    mount.again();
    let flushed = files::output(mount.command().args(["flush"]).arg(mount.dir()));
    let status: serde_json::Value = serde_json::from_str(&mount.ask(&["status", "--json"], mount.dir())).unwrap();
    let left: Vec<serde_json::Value> = status[0]["uploads"].as_array().unwrap().clone();
    for (name, bytes) in objects(store) {
        let (known, len) = (&known[name], bytes.as_ref().map(Vec::len));
        let found = recognise(known, bytes.as_deref());
        assert!(found.is_some(), "{scene}: {name} in S3 ({len:?} bytes) is none of {known:?}; left: {left:?}; {flushed:?}");
        let seen = fs::read(mount.path(name)).ok();
        let keys = store.keys();
        assert!(
            seen == bytes,
            "{scene}: {name} shows {:?} bytes and is {len:?}; keys {keys:?}; left {left:?}",
            seen.map(|seen| seen.len())
        );
        if let Some(synced) = known.synced.filter(|synced| found != Some(Some(*synced))) {
            // Closed or not: its bytes are in the spool, and listed.
            let entry = left.iter().find(|entry| entry["key"] == name && entry["size"] == synced.len);
            assert!(entry.is_some(), "{scene}: {name} was fsynced and is not listed: {left:?}");
            assert!(files::holds(&mount.home().join("state"), &synced.bytes()), "{scene}: the fsynced bytes of {name} are nowhere");
        }
    }
    store.eventually(&format!("{scene}: a renamed directory has one name"), |store| {
        let has = |name: &str| store.keys().iter().any(|key| key.starts_with(name));
        !has("tree/") || !has("moved/")
    });
    // Killed between the copy of a rename and the end of what was queued under its new name: nobody knows then whether it happened,
    // and both contents are kept.
    let renamed_over = scene.rsplit("; ").next().and_then(|last| last.strip_prefix("rename ")?.split(' ').nth(1)).filter(|_| queues);
    let of_rename = |key: &String| renamed_over.is_some_and(|name| key.starts_with(&format!("{name} (conflict of")));
    let conflicts: Vec<String> = store.keys().into_iter().filter(|key| key.contains("conflict of") && !of_rename(key)).collect();
    assert!(conflicts.is_empty(), "{scene}: nobody else wrote anything: {conflicts:?}");
    for entry in &left {
        assert_eq!(entry["phase"], "writing", "{scene}: neither published nor unfinished: {entry}");
    }
    store.eventually(&format!("{scene}: uploads that nobody needs are aborted"), |store| store.unfinished_uploads().is_empty());
}

fn setup(store: &Store, queues: bool) -> Setup {
    let setup = Setup::of(store).option("part_size=5M");
    if queues { setup.option("write_back=100ms") } else { setup }
}

/// Killed after some random time.
fn killed_at_random(store: &Store, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let queues = seed % 2 == 1;
    let mut mount = Mount::start(setup(store, queues));
    let after = Duration::from_millis(rng.random_range(0..2500));
    let dir = mount.dir().to_owned();
    let over: Arc<AtomicBool> = Arc::default();
    let (known, story, _) = std::thread::scope(|scope| {
        let ends = over.clone();
        let worker = scope.spawn(move || {
            let mut life = Life { over: ends, ..Life::new(&dir, queues, seed) };
            let end = life.wander();
            (life.known, life.story, end)
        });
        std::thread::sleep(after);
        over.store(true, Relaxed);
        mount.kill();
        // Until it has noticed: its next call must not find the folder below the mountpoint.
        worker.join().unwrap()
    });
    check(
        &mut mount,
        store,
        &known,
        queues,
        &format!("seed {seed}, killed after {after:?}, write_back {queues}, after {}", story.join("; ")),
    );
    store.keys().iter().for_each(|key| store.delete(key));
}

/// Killed at a failpoint; false where it was not passed.
fn killed_at(store: &Store, point: &str, queues: bool, seed: u64) -> bool {
    let armed = setup(store, queues).env(failpoint::VARIABLE, point);
    let mut mount = match Mount::try_start(armed) {
        Ok(mount) => mount,
        // The start passes it too.
        Err(failure) => return failure.status.code().is_none(),
    };
    let mut life = Life::new(mount.dir(), queues, seed);
    let end = life.round();
    let passed = mount.was_killed(if end.is_err() { Duration::from_secs(5) } else { Duration::ZERO });
    if !passed {
        assert!(end.is_ok(), "{point}: {end:?} without its being killed; it says: {}", mount.log());
    } else {
        check(&mut mount, store, &life.known, queues, &format!("killed at {point}, write_back {queues}"));
    }
    store.keys().iter().for_each(|key| store.delete(key));
    passed
}

/// Every name in the sources.
fn failpoints() -> BTreeSet<String> {
    fn visit(folder: &Path, found: &mut BTreeSet<String>) {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                visit(&path, found);
            } else {
                let text = fs::read_to_string(&path).unwrap();
                found.extend(
                    text.split("failpoint::pass(\"").skip(1).filter_map(|rest| rest.split_once('"')).map(|(name, _)| name.to_owned()),
                );
            }
        }
    }
    let mut found = BTreeSet::new();
    visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found
}

/// Kills of one kind, one after the other.
fn kills(store: fn() -> Store, seeds: std::ops::Range<u64>) {
    if !can_mount() {
        return;
    }
    let (store, count) = (store(), seeds.end - seeds.start);
    for seed in seeds {
        killed_at_random(&store, seed);
    }
    eprintln!("killed at random, promises kept: {count}");
}

/// Promise 26: "kill -9 at any moment: what close() promised is published or queued after the next mount, what fsync() promised is in the
/// spool; nothing torn is visible; uploads that nobody needs are aborted"
#[test]
fn killed_at_any_moment() {
    kills(Store::double, 0..if torture() { 160 } else { 12 });
}

/// Kills on a store that is not ours (promise 26).
#[test]
fn killed_at_any_moment_on_seaweedfs() {
    kills(Store::seaweed, 1000..if torture() { 1060 } else { 1004 });
}

/// Promise 26: "kill -9 at any moment"
#[test]
fn killed_at_every_failpoint() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let points = failpoints();
    assert!(points.len() > 20, "{points:?}");
    let mut kills = 0;
    for (index, point) in points.iter().enumerate() {
        let seed = index as u64;
        let at_once = killed_at(&store, point, false, seed);
        // Some are passed only where uploads wait.
        let queued = (torture() || !at_once) && killed_at(&store, point, true, seed);
        assert!(at_once || queued, "{point} is never passed");
        kills += u32::from(at_once) + u32::from(queued);
        if torture() {
            for time in 2..8 {
                kills += u32::from(killed_at(&store, &format!("{point}:{time}"), time % 2 == 0, seed + time * 100));
            }
        }
    }
    eprintln!("killed at {} failpoints, promises kept: {kills}", points.len());
}

/// A file whose Complete was answered before the kill is known to be stored: none of it is sent again, and no upload is left (promise 26).
#[test]
fn what_was_completed_before_a_kill_is_not_sent_again() {
    if !can_mount() {
        return;
    }
    for changes in [false, true] {
        let store = Store::double();
        if changes {
            store.put("f", noise(1, 23 * MIB));
        }
        let mut mount = Mount::start(setup(&store, true).env(failpoint::VARIABLE, "complete-answered"));
        let mut expected = noise(2, 23 * MIB);
        if changes {
            expected = noise(1, 23 * MIB);
            expected[6 * MIB..7 * MIB].copy_from_slice(&noise(3, MIB));
            let file = OpenOptions::new().write(true).open(mount.path("f")).unwrap();
            file.write_all_at(&expected[6 * MIB..7 * MIB], 6 * MIB as u64).unwrap();
            files::close(file).unwrap();
        } else {
            files::write(&mount.path("f"), &expected).unwrap();
        }
        assert!(mount.was_killed(Duration::from_secs(20)));
        store.as_double().unwrap().reset_requests();
        mount.again();
        files::output(mount.command().args(["flush"]).arg(mount.dir()));
        let requests = store.as_double().unwrap().requests();
        assert!(store.get("f").is_some_and(|seen| seen.bytes == expected), "changes {changes}");
        assert_eq!(requests.of("CreateMultipartUpload"), 0, "changes {changes}: {:?}", requests.summary());
        assert_eq!(store.unfinished_uploads(), Vec::<String>::new());
    }
}

/// What is queued under a name is given up for what is renamed over it only when that is promised too (promise 26).
#[test]
fn a_rename_over_a_queued_file_that_dies_loses_not_both() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let mut kills = 0;
    for point in ["rename-recorded:1", "spool-remove:1", "spool-remove:2", "spool-remove:3", "queued:2", "queued:3"] {
        let mut mount = Mount::start(Setup::of(&store).option("write_back=1h").env(failpoint::VARIABLE, point));
        files::write(&mount.path("a"), b"first").unwrap();
        let temporary = mount.path(".goutputstream-AB12CD");
        let replaced = files::write(&temporary, b"second").and_then(|()| fs::rename(&temporary, mount.path("a")));
        if !mount.was_killed(if replaced.is_err() { Duration::from_secs(5) } else { Duration::ZERO }) {
            continue;
        }
        kills += 1;
        mount.again();
        files::output(mount.command().args(["flush"]).arg(mount.dir()));
        let expected: &[&str] = if replaced.is_ok() { &["second"] } else { &["first", "second"] };
        let stored = store.get("a").map(|seen| String::from_utf8_lossy(&seen.bytes).into_owned());
        assert!(stored.as_deref().is_some_and(|stored| expected.contains(&stored)), "{point}: {stored:?} after {replaced:?}");
        store.delete("a");
    }
    assert!(kills >= 3, "{kills}");
}

/// A queued content that replaces an object is renamed: the object never shows again beside the content that has left its name.
#[test]
fn a_rename_of_a_queued_replacement_that_dies_brings_nothing_back() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    for (point, expected) in [("rename-left:1", "a"), ("rename-recorded:1", "b")] {
        store.put("a", "old");
        let mut mount = Mount::start(Setup::of(&store).option("write_back=1h").env(failpoint::VARIABLE, point));
        files::write(&mount.path("a"), b"new").unwrap();
        fs::rename(mount.path("a"), mount.path("b")).unwrap_err();
        assert!(mount.was_killed(Duration::from_secs(5)), "{point}");
        mount.again();
        files::output(mount.command().args(["flush"]).arg(mount.dir()));
        assert_eq!(store.keys(), [expected], "{point}");
        assert_eq!(store.bytes(expected), "new", "{point}");
        assert_eq!(files::names(mount.dir()), [expected], "{point}");
        store.delete(expected);
    }
}

/// A new file of 5 parts, killed when 3 of them were answered; an object that is changed in two places, when both were, or one. What the
/// store has is found over several pages, by its MD5 or, where ETags are none, by its checksum (promise 26).
#[test]
fn parts_that_arrived_before_a_kill_are_not_sent_again() {
    if !can_mount() {
        return;
    }
    let cases = [
        (false, false, "part-answered:3", 2),
        (false, true, "part-answered:2", 0),
        (false, true, "part-answered:1", 1),
        (true, false, "part-answered:3", 2),
        (true, true, "part-answered:2", 0),
    ];
    for (opaque_parts, changes, point, most) in cases {
        let store = Store::double_with(Options { page_size: 2, opaque_parts, sums_unasked: false, ..Options::default() });
        let mut expected = noise(1, 23 * MIB);
        if changes {
            store.put("f", expected.clone());
        }
        let mut mount = Mount::start(setup(&store, true).env(failpoint::VARIABLE, point));
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(mount.path("f")).unwrap();
        let places = if changes { vec![6 * MIB..7 * MIB, 17 * MIB..18 * MIB] } else { (0..23).map(|i| i * MIB..(i + 1) * MIB).collect() };
        for place in places {
            if changes {
                expected[place.clone()].copy_from_slice(&noise(2, MIB));
            }
            file.write_all_at(&expected[place.clone()], place.start as u64).unwrap();
        }
        files::close(file).unwrap();
        assert!(mount.was_killed(Duration::from_secs(20)), "opaque {opaque_parts}, changes {changes}: not killed");
        store.as_double().unwrap().reset_requests();
        mount.again();
        files::output(mount.command().args(["flush"]).arg(mount.dir()));
        let requests = store.as_double().unwrap().requests();
        assert!(store.get("f").is_some_and(|seen| seen.bytes == expected), "opaque {opaque_parts}, changes {changes}");
        // Before it was asked what it has, the store may have come to the end of what was under way at the kill.
        let since = requests.log.iter().skip_while(|entry| entry.operation != "ListParts");
        let sent = since.filter(|entry| entry.operation == "UploadPart" && entry.key == "f").count();
        assert!(sent <= most, "opaque {opaque_parts}, changes {changes}: {sent} parts were sent again");
        assert_eq!(requests.of("CreateMultipartUpload"), 0);
        assert!(changes || requests.of("ListParts") >= 2, "one page told it all");
        store.eventually("nothing is left of it", |store| store.unfinished_uploads().is_empty());
    }
}
