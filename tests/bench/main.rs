//! The benchmark: `scripts/bench`. Everything is measured in one run on one machine, packmule and its peers alike.
#![allow(clippy::unwrap_used, missing_docs)]

mod edits;
mod instructions;
mod measure;
mod patterns;
mod plot;
#[allow(dead_code, unused_imports, unused_macros, reason = "the tests use the rest")]
#[path = "../it/support/mod.rs"]
mod support;
mod target;
mod tree;

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use measure::{Pattern, Report, Rounds, Row, cpu_seconds, drop_caches, peak_rss};
use support::proxy::{Distance, Proxy};
use support::store::Store;
use target::{PACKMULE, PEERS, Peer, Target};

/// A region on another continent's near side: what hides in a loopback and hurts in an office.
const DISTANCE: Distance = Distance { round_trip: Duration::from_millis(20), bandwidth: 80_000_000 };

/// How often what is over in seconds is done; the median counts.
const ROUNDS: u32 = 3;

struct Arguments {
    /// Only these tasks, with commas between them.
    only: String,
    /// Only filesystems whose name holds this.
    program: String,
    /// Bytes of the sequential file far away; the near one has twice as much.
    size: u64,
    json: PathBuf,
    svg: PathBuf,
}

fn arguments() -> Arguments {
    let (json, svg) = (PathBuf::from("target/bench.json"), PathBuf::from("target/bench.svg"));
    let mut found = Arguments { only: String::new(), program: String::new(), size: 512 << 20, json, svg };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        match word.as_str() {
            "--only" => found.only = value(),
            "--program" => found.program = value(),
            "--size" => found.size = value().parse::<u64>().unwrap() << 20,
            "--json" => found.json = value().into(),
            "--svg" => found.svg = value().into(),
            "--bench" => {}
            other => panic!("unknown word {other}: one of --only WORD, --program WORD, --size MIB, --json FILE, --svg FILE"),
        }
    }
    found
}

type Task = fn(&mut Report, &Arguments);

fn main() {
    let arguments = arguments();
    if arguments.only == "instructions" {
        return instructions::count();
    }
    let tasks: [(&str, Task); 9] = [
        ("far", far),
        ("parts", patterns::parts),
        ("small", patterns::small),
        ("streams", patterns::streams),
        ("edits", edits::edits),
        ("tree", tree::tree),
        ("listing", listing),
        ("near", near),
        ("again", patterns::again),
    ];
    let mut report = Report::new();
    let wanted = |name: &str| arguments.only.is_empty() || arguments.only.split(',').any(|only| only == name);
    for (_, task) in tasks.iter().filter(|(name, _)| wanted(name)) {
        task(&mut report, &arguments);
    }
    report.print().unwrap();
    report.save(&arguments.json).unwrap();
    std::fs::write(&arguments.svg, plot::svg(&report)).unwrap();
    println!("\nalso in {} and, drawn, in {}", arguments.json.display(), arguments.svg.display());
}

/// The store with the distance in front of it.
struct Far {
    store: Store,
    proxy: Proxy,
}

impl Far {
    fn new() -> Self {
        let store = Store::seaweed();
        let address: SocketAddr = store.endpoint().trim_start_matches("http://").parse().unwrap();
        Self { proxy: Proxy::start(address, DISTANCE).unwrap(), store }
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.proxy.address())
    }

    /// packmule and every installed peer, one after the other: they share the processors.
    fn each(&self, arguments: &Arguments, task: impl FnMut(Target)) {
        self.among(&[PACKMULE], arguments, task);
    }

    /// The same with these ways of packmule.
    fn among(&self, ways: &[&'static str], arguments: &Arguments, mut task: impl FnMut(Target)) {
        for way in ways.iter().filter(|way| way.contains(&arguments.program)) {
            task(Target::packmule(way, &self.store, &self.endpoint()));
        }
        for program in PEERS.iter().filter(|program| program.contains(&arguments.program)) {
            if let Some(peer) = Peer::start(program, &self.store, &self.endpoint()) {
                task(Target::Peer(peer));
            }
        }
    }

    /// Times `work` and tells what crossed the distance meanwhile.
    fn measure(&self, task: &'static str, target: &Target, work: impl FnOnce()) -> Row {
        watched(target, || self.beside(task, target.name(), work))
    }

    /// The same of a program that mounts nothing.
    fn beside(&self, task: &'static str, program: &str, work: impl FnOnce()) -> Row {
        self.proxy.reset();
        let took = timed(work);
        self.crossed(Row::new(task, program, took))
    }

    /// The same of what a program may be unable to do. `settles` is not timed, but what crosses the distance meanwhile counts: some
    /// programs return before everything is stored.
    fn attempt(
        &self,
        task: &'static str,
        target: &Target,
        work: impl FnOnce() -> io::Result<()>,
        settles: impl FnOnce() -> io::Result<()>,
    ) -> Option<Row> {
        let mut ended = Ok(());
        let row = watched(target, || {
            self.proxy.reset();
            let took = timed(|| ended = work());
            if ended.is_ok() {
                ended = settles();
            }
            self.crossed(Row::new(task, target.name(), took))
        });
        ended.inspect_err(|error| eprintln!("{task}: {}: not measured: {error}", target.name())).ok().map(|()| row)
    }

    /// With what crossed the distance since the last reset.
    fn crossed(&self, row: Row) -> Row {
        Row {
            busy_connections: Some(self.proxy.peak_busy()),
            open_connections: Some(self.proxy.peak_open()),
            requests: Some(self.proxy.requests().counts()),
            bytes_up: Some(self.proxy.bytes_up()),
            bytes_down: Some(self.proxy.bytes_down()),
            ..row
        }
    }
}

/// One large file, written and read in order through the mount; and what the machine allows: the same bytes through the same proxy,
/// without a filesystem, over as many connections as help. In turn, so that a busy moment of the machine is nobody's alone.
fn far(report: &mut Report, arguments: &Arguments) {
    let (far, size) = (Far::new(), arguments.size);
    let local = tempfile::tempdir().unwrap();
    let (file, back) = (local.path().join("file"), local.path().join("back"));
    write(&file, size);
    let object = |name: &str| format!("s3://{}/{name}", far.store.bucket());
    let wide = |from: &str, to: &str| ["--concurrency", "16", "--part-size", "8", from, to].map(str::to_owned);
    s5cmd(&far.store.endpoint(), &wide(file.to_str().unwrap(), &object("large.bin")));
    let mut rounds = Rounds::default();
    for round in 0..ROUNDS {
        far.each(arguments, |mut target| {
            let name = format!("{}-{round}.bin", target.name());
            let copy = target.dir().join(&name);
            rounds.add(far.measure("write one file, far", &target, || {
                run(Command::new("cp").arg(&file).arg(&copy));
                // Some peers' close() returns before anything is stored.
                while far.store.size(&name) != Some(size) {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }));
            target.cold();
            let _ = std::fs::read_dir(target.dir()).unwrap().count();
            rounds
                .add(far.measure("read one file, far", &target, || run(Command::new("cp").arg(target.dir().join("large.bin")).arg(&back))));
            run(Command::new("cmp").arg(&file).arg(&back));
            std::fs::remove_file(&back).unwrap();
        });
        drop_caches();
        let up = wide(file.to_str().unwrap(), &object(&format!("s5cmd-{round}.bin")));
        rounds.add(far.beside("write one file, far", "s5cmd", || s5cmd(&far.endpoint(), &up)));
        drop_caches();
        rounds
            .add(far.beside("read one file, far", "s5cmd", || s5cmd(&far.endpoint(), &wide(&object("large.bin"), back.to_str().unwrap()))));
        std::fs::remove_file(&back).unwrap();
    }
    rounds.medians().into_iter().for_each(|row| report.add(row.payload(size)));
}

/// `ls -l` of a directory that others filled.
fn listing(report: &mut Report, arguments: &Arguments) {
    let far = Far::new();
    std::thread::scope(|scope| {
        for lane in 0..4 {
            let store = &far.store;
            scope.spawn(move || (lane..5000).step_by(4).for_each(|number| store.put(&format!("many/{number:05}.txt"), "x")));
        }
    });
    far.each(arguments, |mut target| {
        target.cold();
        let dir = target.dir().join("many");
        report.add(far.measure("ls -l of 5,000 keys, far", &target, || {
            let output = Command::new("ls").arg("-l").arg(&dir).output().unwrap();
            assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), 5001, "{output:?}");
        }));
    });
}

/// One file of twice the size each way, without any distance, beside s5cmd, in turn.
fn near(report: &mut Report, arguments: &Arguments) {
    let size = 2 * arguments.size;
    let store = Store::seaweed();
    let folder = tempfile::tempdir().unwrap();
    let (file, back) = (folder.path().join("file"), folder.path().join("back"));
    write(&file, size);
    let mut target = Target::packmule(PACKMULE, &store, &store.endpoint());
    let object = |round: u32| format!("s3://{}/s5cmd-{round}.bin", store.bucket());
    let mut rounds = Rounds::default();
    for round in 0..ROUNDS {
        let copy = target.dir().join(format!("packmule-{round}.bin"));
        let again = |task: &'static str, target: &Target, from: &Path, to: &Path| {
            watched(target, || Row::new(task, target.name(), timed(|| run(Command::new("cp").arg(from).arg(to)))))
        };
        rounds.add(again("write one file, near", &target, &file, &copy));
        let up = timed(|| s5cmd(&store.endpoint(), &[file.to_str().unwrap(), &object(round)]));
        rounds.add(Row::new("write one file, near", "s5cmd", up));
        target.cold();
        rounds.add(again("read one file, near", &target, &copy, &back));
        run(Command::new("cmp").arg(&file).arg(&back));
        std::fs::remove_file(&back).unwrap();
        drop_caches();
        let down = timed(|| s5cmd(&store.endpoint(), &[&object(round), back.to_str().unwrap()]));
        rounds.add(Row::new("read one file, near", "s5cmd", down));
        std::fs::remove_file(&back).unwrap();
    }
    rounds.medians().into_iter().for_each(|row| report.add(row.payload(size)));
}

/// What is measured, with what the filesystem's process used meanwhile.
fn watched(target: &Target, measures: impl FnOnce() -> Row) -> Row {
    let before = cpu_seconds(target.pid());
    let row = measures();
    let cpu = cpu_seconds(target.pid()).zip(before).map(|(after, before)| after - before);
    Row { cpu_seconds: cpu, peak_rss_mib: peak_rss(target.pid()), ..row }
}

fn timed(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

fn write(path: &Path, size: u64) {
    let mut file = File::create(path).unwrap();
    let mut block = vec![0; Pattern::BLOCK];
    for number in 0..size / Pattern::BLOCK as u64 {
        Pattern::fill(number, &mut block);
        file.write_all(&block).unwrap();
    }
    // Dropping a File hides what close() says.
    nix::unistd::close(file).unwrap();
}

/// Reads everything and compares it.
fn read(path: &Path, size: u64) {
    let mut file = File::open(path).unwrap();
    let (mut block, mut expected) = (vec![0; Pattern::BLOCK], vec![0; Pattern::BLOCK]);
    for number in 0..size / Pattern::BLOCK as u64 {
        file.read_exact(&mut block).unwrap();
        Pattern::fill(number, &mut expected);
        assert!(block == expected, "{}: block {number} differs", path.display());
    }
    assert_eq!(file.read(&mut block).unwrap(), 0, "{} is too long", path.display());
}

fn s5cmd(endpoint: &str, words: &[impl AsRef<std::ffi::OsStr>]) {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/venv/bin/s5cmd"));
    run(target::credentials(&mut command).args(["--endpoint-url", endpoint, "cp"]).args(words));
}

fn run(command: &mut Command) {
    attempted(command).unwrap();
}

/// A failure tells the first line of what the command said.
fn attempted(command: &mut Command) -> io::Result<()> {
    let output = command.stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(io::Error::other(format!("{command:?}: {}: {}", output.status, said.lines().next().unwrap_or_default())))
}

/// Waits until the store has what it is to have.
fn stored(every: Duration, holds: impl Fn() -> bool) -> io::Result<()> {
    let until = Instant::now() + Duration::from_secs(300);
    while !holds() {
        if Instant::now() > until {
            return Err(io::Error::other("not stored within 5 minutes"));
        }
        std::thread::sleep(every);
    }
    Ok(())
}
