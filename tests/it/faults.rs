//! The fault suite: every fault on the way to SeaweedFS, met by every operation. The verdict of each case is one of: right bytes, or
//! an errno and a whole object (the old one; the new one only where just the answer was lost); of a listing: every name, or an
//! errno. `PACKMULE_TORTURE=1` makes it long: every fault at every request of an operation, and mixtures drawn from a seed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use packmule::s3::PutOptions;

use crate::support::client::{block_on, connect, source};
use crate::support::faulty::{Fault, Faulty, When};
use crate::support::files::{self, noise};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::torture;
use crate::support::store::Store;

const MIB: usize = 1 << 20;

/// Ninety seconds, and a slow machine.
const LONGEST_CALL: Duration = Duration::from_secs(105);
/// How long the store throttles: longer than `close_timeout`, which throttling alone does not use up.
const BURST: Duration = Duration::from_secs(7);
/// How long a store takes to start again.
const RESTART: Duration = Duration::from_millis(1500);

const OPTIONS: &[&str] =
    &["part_size=5M", "metadata_ttl=0", "negative_metadata_ttl=0", "request_timeout=2s", "close_timeout=5s", "retries=3"];

/// A mount with the proxy between it and its store. The mount ends first.
struct Stage {
    mount: Mount,
    faulty: Faulty,
    store: Store,
}

impl Stage {
    fn new(store: Store, options: &[&str]) -> Self {
        let faulty = Faulty::before(&store.endpoint());
        let setup = Setup::of(&store).through(&faulty.endpoint());
        Self { mount: Mount::start(options.iter().fold(setup, |setup, word| setup.option(word))), faulty, store }
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// Something happens to requests.
    Wire(Fault),
    /// All connections are cut, none is accepted for some seconds, and then all is well again.
    Restart,
}

/// An operation on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    SmallWrite,
    LargeWrite,
    Overwrite,
    Read,
    Rename,
    Delete,
}

const ACTS: [Act; 6] = [Act::SmallWrite, Act::LargeWrite, Act::Overwrite, Act::Read, Act::Rename, Act::Delete];
/// What the acts send, but for looking names up.
const WORK: &[&str] =
    &["PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "GetObject", "CopyObject", "DeleteObject"];

fn old(name: &str) -> Vec<u8> {
    noise(name.len() as u64 + 1000, 3 * MIB - 5)
}

impl Act {
    /// The requests that it is made of.
    fn requests(self) -> &'static [&'static str] {
        match self {
            Act::SmallWrite | Act::Overwrite => &["PutObject"],
            Act::LargeWrite => &["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"],
            Act::Read => &["GetObject"],
            Act::Rename => &["CopyObject", "DeleteObject"],
            Act::Delete => &["DeleteObject"],
        }
    }

    fn new_bytes(self, name: &str) -> Vec<u8> {
        let seed = name.bytes().fold(7, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
        match self {
            Act::LargeWrite => noise(seed, 11 * MIB + 13),
            _ => noise(seed, 70_001),
        }
    }

    /// What is there before anything goes wrong.
    fn prepare(self, stage: &Stage, name: &str) {
        if let Some((folder, _)) = name.rsplit_once('/') {
            stage.store.put(&format!("{folder}/neighbour"), "x");
        }
        if !matches!(self, Act::SmallWrite | Act::LargeWrite) {
            stage.store.put(name, old(name));
            assert_eq!(fs::metadata(stage.mount.path(name)).unwrap().len(), old(name).len() as u64);
        }
    }

    fn run(self, stage: &Stage, name: &str) -> io::Result<()> {
        let path = stage.mount.path(name);
        match self {
            Act::SmallWrite | Act::LargeWrite | Act::Overwrite => files::write(&path, &self.new_bytes(name)),
            Act::Read => fs::read(&path).map(|bytes| assert!(bytes == old(name), "{name}: wrong bytes were read")),
            Act::Rename => fs::rename(&path, path.with_extension("moved")),
            Act::Delete => fs::remove_file(&path),
        }
    }

    /// What may be in the store now. `lost`: the store may have acted and its answer not have come.
    fn judge(self, stage: &Stage, name: &str, result: &io::Result<()>, lost: bool) {
        let told = |what: &str| format!("{name}: {what} ({self:?}: {result:?})");
        let seen = |key: &str| stage.store.get(key).map(|seen| seen.bytes);
        let (before, moved) = (old(name), format!("{name}.moved"));
        match self {
            Act::Read => assert!(seen(name).is_some_and(|bytes| bytes == before), "{}", told("a read changed the object")),
            Act::SmallWrite | Act::LargeWrite | Act::Overwrite => {
                let (now, new) = (seen(name), self.new_bytes(name));
                let is_new = now.as_ref().is_some_and(|bytes| *bytes == new);
                let is_old = if self == Act::Overwrite { now.as_ref().is_some_and(|bytes| *bytes == before) } else { now.is_none() };
                match result {
                    Ok(()) => assert!(is_new, "{}", told("the store does not hold what was written")),
                    Err(_) if lost => assert!(is_old || is_new, "{}", told("neither the old nor the new object is whole")),
                    Err(_) => assert!(is_old, "{}", told("a failed write left something else than the old object")),
                }
            }
            Act::Rename => {
                let (here, there) = (seen(name), seen(&moved));
                let whole = |bytes: &Option<bytes::Bytes>| bytes.as_ref().is_some_and(|bytes| *bytes == before);
                assert!(here.is_none() || whole(&here), "{}", told("damaged under the old name"));
                assert!(there.is_none() || whole(&there), "{}", told("damaged under the new name"));
                match result {
                    Ok(()) => assert!(here.is_none() && there.is_some(), "{}", told("not renamed")),
                    Err(_) => assert!(here.is_some() || (lost && there.is_some()), "{}", told("gone")),
                }
            }
            Act::Delete => match (result, seen(name)) {
                (Ok(()), now) => assert!(now.is_none(), "{}", told("it is still there")),
                (Err(_), now) => assert!(now.map_or(lost, |bytes| bytes == before), "{}", told("not whole")),
            },
        }
    }

    /// All is well again: it works now, whatever came of it before.
    fn again(self, stage: &Stage, name: &str) {
        let done = match self {
            Act::Rename => !stage.mount.path(name).exists(),
            Act::Delete => stage.store.get(name).is_none(),
            _ => false,
        };
        let result = if done { Ok(()) } else { self.run(stage, name) };
        assert!(result.is_ok(), "{name}: {self:?} does not work when the store does: {result:?}");
        self.judge(stage, name, &result, false);
        match self {
            Act::Delete => assert!(!stage.mount.path(name).exists(), "{name} shows"),
            Act::Rename => assert!(fs::read(stage.mount.path(name).with_extension("moved")).unwrap() == old(name)),
            Act::Read => {}
            _ => assert!(fs::read(stage.mount.path(name)).unwrap() == self.new_bytes(name), "{name}: read back differs"),
        }
    }
}

impl Trouble {
    /// The store may have acted though no answer says so.
    fn loses_answers(self) -> bool {
        match self {
            Trouble::Restart => true,
            Trouble::Wire(fault) => {
                matches!(
                    fault,
                    Fault::ResetDown
                        | Fault::Truncated
                        | Fault::Shortened
                        | Fault::StallDown
                        | Fault::FlipDown
                        | Fault::NoETag
                        | Fault::LostAnswer
                )
            }
        }
    }

    /// Happening once to this request it goes unnoticed by the program.
    fn is_mended(self, request: &str) -> bool {
        let upload = !matches!(request, "GetObject" | "CopyObject" | "DeleteObject");
        match self {
            Trouble::Restart => true,
            Trouble::Wire(fault) => match fault {
                Fault::Latency(_) | Fault::ResetUp | Fault::FlipUp | Fault::ResetDown | Fault::Truncated | Fault::LostAnswer => true,
                // The answer to Complete or a copy may take as long as `close_timeout`: then it is too late to ask again.
                Fault::StallUp | Fault::StallDown => !matches!(request, "CompleteMultipartUpload" | "CopyObject"),
                Fault::Refusal(status, _) => status == 429 || status >= 500,
                Fault::ErrorIn200(_) => request != "GetObject",
                Fault::Shortened => upload || request == "GetObject",
                Fault::Portal | Fault::NoETag => upload,
                Fault::Skew | Fault::FlipDown => false,
            },
        }
    }

    /// It can happen to this request at all.
    fn concerns(self, request: &str) -> bool {
        match self {
            Trouble::Wire(Fault::FlipUp) => matches!(request, "PutObject" | "UploadPart" | "CompleteMultipartUpload"),
            // Of an XML answer over plain HTTP nothing tells that a bit was turned over.
            Trouble::Wire(Fault::FlipDown) => request == "GetObject",
            Trouble::Wire(Fault::Shortened) => !matches!(request, "PutObject" | "UploadPart" | "DeleteObject"),
            Trouble::Wire(Fault::NoETag) => !matches!(request, "CreateMultipartUpload" | "DeleteObject"),
            _ => true,
        }
    }

    fn throttles(self) -> bool {
        matches!(self, Trouble::Wire(Fault::Refusal(503 | 429, _)))
    }

    /// Lets `act` run while this happens: to `count` requests (`None`: until it is over) after the first `skip` of these.
    fn during<T>(self, stage: &Stage, requests: &[&'static str], skip: u64, count: Option<u64>, act: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = match self {
            Trouble::Restart => {
                stage.faulty.set_down(true);
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(RESTART);
                        stage.faulty.set_down(false);
                    });
                    act()
                })
            }
            Trouble::Wire(fault) => {
                let when = When::any_of(requests).after(skip);
                stage.faulty.fault(count.map_or(when.clone(), |count| when.times(count)), fault);
                let result = act();
                stage.faulty.heal();
                result
            }
        };
        assert!(began.elapsed() < LONGEST_CALL + RESTART, "{self:?} on {requests:?}: {:?}", began.elapsed());
        result
    }
}

/// One fault, met once by each request of each operation.
fn happens_once(stage: &Stage, trouble: Trouble, skip: u64) {
    for act in ACTS {
        for request in act.requests().iter().filter(|request| trouble.concerns(request)) {
            let name = format!("once/{act:?}-{request}-{skip}");
            act.prepare(stage, &name);
            let struck = stage.faulty.struck();
            let result = trouble.during(stage, &[request], skip, Some(1), || act.run(stage, &name));
            assert!(skip > 0 || stage.faulty.struck() > struck, "{name}: {trouble:?} did not happen");
            act.judge(stage, &name, &result, trouble.loses_answers());
            if trouble.is_mended(request) {
                assert!(result.is_ok(), "{name}: {trouble:?} happened once, and the operation failed: {result:?}");
            }
            act.again(stage, &name);
        }
    }
}

/// One fault, for as long as all operations last, at the same time; and what was open meanwhile goes on afterwards.
fn goes_on(stage: &Stage, trouble: Trouble, requests: &[&'static str], round: u32) {
    stage.store.put("held", noise(9, 20 * MIB));
    let held = File::open(stage.mount.path("held")).unwrap();
    let mut head = vec![0; 4096];
    held.read_exact_at(&mut head, 0).unwrap();
    // A rename goes on until its deadline: too long for the short form.
    let acts = ACTS.into_iter().filter(|act| torture() || *act != Act::Rename || trouble.throttles());
    let names: Vec<_> = acts.map(|act| (act, format!("{act:?}-{round}/on"))).collect();
    for (act, name) in &names {
        act.prepare(stage, name);
    }
    let act_all = || {
        std::thread::scope(|scope| {
            let running: Vec<_> = names.iter().map(|(act, name)| scope.spawn(|| act.run(stage, name))).collect();
            if trouble.throttles() {
                std::thread::sleep(BURST);
                stage.faulty.heal();
            }
            running.into_iter().map(|act| act.join().unwrap()).collect::<Vec<_>>()
        })
    };
    let concerned: Vec<&'static str> = requests.iter().copied().filter(|request| trouble.concerns(request)).collect();
    let results = trouble.during(stage, &concerned, 0, None, act_all);
    for ((act, name), result) in names.iter().zip(&results) {
        act.judge(stage, name, result, trouble.loses_answers());
        if trouble.throttles() {
            assert!(result.is_ok(), "{name}: throttling alone made it fail: {result:?}");
        }
        act.again(stage, name);
    }
    let mut rest = vec![0; 20 * MIB];
    held.read_exact_at(&mut rest, 0).unwrap();
    assert!(rest == noise(9, 20 * MIB), "a file that was open all the time reads wrong");
}

fn files_suffer(trouble: Trouble) {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new(Store::seaweed(), OPTIONS);
    happens_once(&stage, trouble, 0);
    goes_on(&stage, trouble, WORK, 0);
    if torture() {
        (1..5).for_each(|skip| happens_once(&stage, trouble, skip));
        for (round, request) in (1..).zip(WORK.iter().filter(|request| trouble.concerns(request))) {
            goes_on(&stage, trouble, &[request], round);
        }
    }
    // "uploads that nobody needs are aborted", at the latest by the next mount.
    stage.mount.umount_leaving("");
    stage.mount.again();
    stage.store.eventually("no upload is left", |store| store.unfinished_uploads().is_empty());
}

/// A directory of more than one page; a bucket of its own, which tests only read.
fn many() -> (Store, Vec<String>) {
    static BUCKET: OnceLock<String> = OnceLock::new();
    let names: Vec<String> = (0..1050).map(|n| format!("file-{n:04}")).collect();
    let bucket = BUCKET.get_or_init(|| {
        let store = Store::seaweed();
        block_on(async {
            use futures::StreamExt as _;
            let bucket = connect(&store).bucket;
            let puts = names.iter().map(|name| {
                let bucket = &bucket;
                async move { bucket.put(&format!("many/{name}"), source("x"), PutOptions::default()).await.unwrap() }
            });
            futures::stream::iter(puts).buffer_unordered(8).for_each(async |_| ()).await;
        });
        store.bucket().to_owned()
    });
    (Store::seaweed_bucket(bucket), names)
}

/// Names of a directory, or the error that any of them came with.
fn list(dir: &std::path::Path) -> io::Result<Vec<String>> {
    let mut names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().into_string().unwrap())).collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn listings_suffer(trouble: Trouble) {
    if !can_mount() || !trouble.concerns("ListObjects") {
        return;
    }
    let (store, all) = many();
    // What is listed whole is kept: what was cut must not be.
    let stage = Stage::new(store, &["metadata_ttl=1h", "request_timeout=2s", "retries=3"]);
    let dir = stage.mount.path("many");
    let check = |what: &str, listed: &io::Result<Vec<String>>| {
        if let Ok(names) = listed {
            assert!(*names == all, "{what}: {trouble:?}: {} of {} names shown as all", names.len(), all.len());
        }
    };
    for (what, mark, count) in [
        ("page 1, once", "delimiter=", Some(1)),
        ("page 2, once", "continuation-token=", Some(1)),
        ("page 1", "delimiter=", None),
        ("page 2", "continuation-token=", None),
    ] {
        stage.mount.ask(&["refresh"], stage.mount.dir());
        let struck = stage.faulty.struck();
        let listed = match trouble {
            Trouble::Restart => trouble.during(&stage, &[], 0, None, || list(&dir)),
            Trouble::Wire(fault) => {
                let when = When::any_of(&["ListObjects"]).containing(mark);
                stage.faulty.fault(count.map_or(when.clone(), |count| when.times(count)), fault);
                std::thread::scope(|scope| {
                    let listing = scope.spawn(|| list(&dir));
                    if trouble.throttles() && count.is_none() {
                        std::thread::sleep(BURST);
                        stage.faulty.heal();
                    }
                    let listed = listing.join().unwrap();
                    stage.faulty.heal();
                    listed
                })
            }
        };
        assert!(stage.faulty.struck() > struck, "{what}: {trouble:?} did not happen");
        check(what, &listed);
        let sent_again =
            trouble.is_mended("ListObjects") && !matches!(trouble, Trouble::Wire(Fault::Portal | Fault::Shortened | Fault::NoETag));
        if (count.is_some() || trouble.throttles() || matches!(trouble, Trouble::Restart)) && sent_again {
            assert!(listed.is_ok(), "{what}: {trouble:?} happened once, and the listing failed: {listed:?}");
        }
        let healed = list(&dir).unwrap();
        assert!(healed == all, "{what}: {trouble:?}: {} of {} names after it is over", healed.len(), all.len());
        assert!(dir.join("file-1049").exists() && !dir.join("file-1050").exists());
    }
}

/// The matrix: each fault meets files (written, overwritten, read, renamed, deleted) and listings.
macro_rules! matrix {
    ($($(#[doc = $doc:literal])* $name:ident: $trouble:expr;)*) => {
        const TROUBLES: &[Trouble] = &[$($trouble),*];

        mod files_meet {
            use super::*;
            $($(#[doc = $doc])* #[test] fn $name() { files_suffer($trouble); })*
        }

        mod listings_meet {
            use super::*;
            $($(#[doc = $doc])* #[test] fn $name() { listings_suffer($trouble); })*
        }
    };
}

matrix! {
    latency: Trouble::Wire(Fault::Latency(Duration::from_millis(700)));
    internal_errors: Trouble::Wire(Fault::Refusal(500, "InternalError"));
    slow_down: Trouble::Wire(Fault::Refusal(503, "SlowDown"));
    too_many_requests: Trouble::Wire(Fault::Refusal(429, "TooManyRequests"));
    resets_on_the_way_up: Trouble::Wire(Fault::ResetUp);
    resets_on_the_way_down: Trouble::Wire(Fault::ResetDown);
    truncated_answers: Trouble::Wire(Fault::Truncated);
    short_answers_that_agree_with_themselves: Trouble::Wire(Fault::Shortened);
    stalls_on_the_way_up: Trouble::Wire(Fault::StallUp);
    stalls_on_the_way_down: Trouble::Wire(Fault::StallDown);
    flipped_bits_on_the_way_up: Trouble::Wire(Fault::FlipUp);
    flipped_bits_on_the_way_down: Trouble::Wire(Fault::FlipDown);
    errors_in_a_200: Trouble::Wire(Fault::ErrorIn200("InternalError"));
    answers_without_an_etag: Trouble::Wire(Fault::NoETag);
    a_captive_portal: Trouble::Wire(Fault::Portal);
    lost_answers: Trouble::Wire(Fault::LostAnswer);
    a_wrong_clock: Trouble::Wire(Fault::Skew);
    an_expired_token: Trouble::Wire(Fault::Refusal(400, "ExpiredToken"));
    a_restart_of_the_store: Trouble::Restart;
}

/// Promise 2: "S3 then holds the whole old object, or the whole new one if only the store's answer was lost."
/// Faults drawn from a seed, several at a time, for `PACKMULE_TORTURE_SECONDS` (a few without the long form).
#[test]
fn a_mixture_of_faults() {
    if !can_mount() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seconds = number("PACKMULE_TORTURE_SECONDS").unwrap_or(if torture() { 600 } else { 5 });
    let seed = number("PACKMULE_TORTURE_SEED").unwrap_or(if torture() { std::process::id().into() } else { 1 });
    eprintln!("PACKMULE_TORTURE_SEED={seed}");
    let until = Instant::now() + Duration::from_secs(seconds);
    let wire: Vec<Fault> =
        TROUBLES.iter().filter_map(|trouble| if let Trouble::Wire(fault) = trouble { Some(*fault) } else { None }).collect();
    let mut random = noise(seed, 1 << 16).into_iter().map(usize::from).cycle();
    let mut draw = |below: usize| random.next().unwrap() % below;
    let stage = Stage::new(Store::seaweed(), OPTIONS);
    let mut round = 0;
    while round < 3 || Instant::now() < until {
        round += 1;
        let names = ACTS.map(|act| (act, format!("{act:?}/{round}")));
        for (act, name) in &names {
            act.prepare(&stage, name);
        }
        for _ in 0..3 {
            let (fault, request) = (wire[draw(wire.len())], WORK[draw(WORK.len())]);
            if Trouble::Wire(fault).concerns(request) {
                eprintln!("round {round}: {fault:?} on {request}");
                stage.faulty.fault(When::any_of(&[request]).after(draw(4) as u64).times(1 + draw(3) as u64), fault);
            }
        }
        let results: Vec<_> = std::thread::scope(|scope| {
            let running: Vec<_> = names.iter().map(|(act, name)| scope.spawn(|| act.run(&stage, name))).collect();
            running.into_iter().map(|act| act.join().unwrap()).collect()
        });
        stage.faulty.heal();
        for ((act, name), result) in names.iter().zip(&results) {
            act.judge(&stage, name, result, true);
            act.again(&stage, name);
        }
    }
    eprintln!("faults mixed at random, calls with a right end: {}", round * ACTS.len());
}
