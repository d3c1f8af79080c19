//! A store of several machines, one of which goes and comes while files are copied in.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http::Method;

use crate::support::cluster::Own;
use crate::support::files::{self, noise};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::torture;

const MIB: usize = 1 << 20;

/// Small ones, one of several chunks, and one that goes in parts.
const SIZES: [usize; 4] = [3_000, 300_000, 5 * MIB, 20 * MIB];

/// How long files may take to be stored beside everything else that a busy machine does.
const PATIENCE: Duration = Duration::from_secs(360);

/// A file that was copied in, and how its close ended.
struct Copied {
    seed: u64,
    size: usize,
    closed: io::Result<()>,
}

/// What the writers wrote, by name.
#[derive(Default)]
struct Written(Mutex<BTreeMap<String, Copied>>);

impl Written {
    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Those whose close said so.
    fn stored(&self) -> Vec<(String, u64, usize)> {
        let all = self.0.lock().unwrap();
        all.iter().filter(|(_, copied)| copied.closed.is_ok()).map(|(name, copied)| (name.clone(), copied.seed, copied.size)).collect()
    }

    /// Waits until so many more are closed.
    fn more(&self, files: usize, over: &AtomicBool) {
        let (enough, until) = (self.count() + files, Instant::now() + PATIENCE);
        while self.count() < enough {
            assert!(!over.load(Ordering::SeqCst), "somebody failed");
            assert!(Instant::now() < until, "{} files in {PATIENCE:?}, not {enough}", self.count());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Ends the others when one of them fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Copies files into a folder of its own until it is told to end.
fn copy_in(root: &Path, writer: u64, written: &Written, over: &AtomicBool) {
    let _ends = Ends(over);
    let folder = format!("writer {writer}");
    fs::create_dir(root.join(&folder)).unwrap();
    for (number, size) in (0..).zip(SIZES.iter().cycle()) {
        if over.load(Ordering::SeqCst) {
            return;
        }
        let (name, seed) = (format!("{folder}/file {number}"), writer << 32 | number);
        let closed = files::write(&root.join(&name), &noise(seed, *size));
        written.0.lock().unwrap().insert(name, Copied { seed, size: *size, closed });
    }
}

/// Looks at everything again and again: each call ends, and what it brings is whole.
fn look(root: &Path, written: &Written, over: &AtomicBool) {
    let _ends = Ends(over);
    while !over.load(Ordering::SeqCst) {
        let _ = fs::read_dir(root).map(|entries| entries.for_each(drop));
        for (name, seed, size) in written.stored().into_iter().rev().take(3) {
            if let Ok(bytes) = fs::read(root.join(&name)) {
                assert!(bytes == noise(seed, size), "{name} has other bytes");
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Promise 2: "close() returns 0 only when the object is in S3 under its name, byte for byte"
/// Promise 22: "Every call ends."
/// Promise 24: "Minutes without the store are ridden out."
#[test]
fn a_node_is_killed_and_comes_back_while_files_are_copied_in() {
    if !can_mount() {
        return;
    }
    let own = Own::up();
    assert_eq!(own.cluster.send(&Method::PUT, "team", &[], &[]).status, 200);
    let mut mount = Mount::start(Setup {
        source: "s3://team".to_owned(),
        options: vec![format!("endpoint_url={}", own.cluster.endpoint)],
        env: vec![
            ("AWS_ACCESS_KEY_ID".to_owned(), own.cluster.access_key.clone()),
            ("AWS_SECRET_ACCESS_KEY".to_owned(), own.cluster.secret_key.clone()),
        ],
        under: Vec::new(),
    });
    let (written, over) = (Written::default(), AtomicBool::new(false));
    let root: PathBuf = mount.dir().to_owned();
    // The first is the leader, of the masters and perhaps of etcd too.
    let nodes: &[(&str, u32)] = if torture() { &[("kill", 1), ("stop", 2), ("kill", 3), ("stop", 1), ("kill", 2)] } else { &[("kill", 1)] };
    std::thread::scope(|scope| {
        let writers = [1, 2].map(|writer| {
            let (root, written, over) = (&root, &written, &over);
            scope.spawn(move || copy_in(root, writer, written, over))
        });
        let reader = scope.spawn(|| look(&root, &written, &over));
        let ends = Ends(&over);
        written.more(8, &over);
        for (what, node) in nodes {
            own.node(what, *node);
            written.more(8, &over);
            own.node("start", *node);
            written.more(8, &over);
        }
        drop(ends);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        reader.join().unwrap();
    });
    mount.umount();
    for (name, Copied { seed, size, closed }) in written.0.into_inner().unwrap() {
        assert!(
            closed.is_ok(),
            "closing {name} failed with {closed:?}, though two of three nodes were always there; the mount said:\n{}",
            mount.log()
        );
        let stored = own.cluster.send(&Method::GET, &format!("team/{}", name.replace(' ', "%20")), &[], &[]);
        assert_eq!(stored.status, 200, "{name}");
        assert!(stored.body == noise(seed, size), "{name} is in S3 with {} bytes that are not those written", stored.body.len());
    }
}
