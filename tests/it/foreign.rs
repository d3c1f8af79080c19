//! Test suites that are not ours, run on a directory: pjdfstest (POSIX calls, case by case) and fsx (random operations against a
//! model in memory). `scripts/setup` builds both below `target/tools`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What is expected of each pjdfstest case on a mount: `pass`, or why it is not asked of an object store.
const EXPECT: &str = include_str!("pjdfstest.expect");

/// At least so many cases that an object store can hold must be in the list, whatever is taken out of it.
const PASS_AT_LEAST: usize = 154;

/// Cases that make a file whose path is as long as PATH_MAX allows: 4,095 bytes, of which a key can hold 1,024.
const PATH_MAX_CASES: &str = "enametoolong_path";

/// `(reason or "pass", case)` in the order of the file.
pub fn expectations() -> Vec<(&'static str, &'static str)> {
    EXPECT
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(' '))
        .map(|(what, case)| (what, case.trim()))
        .collect()
}

/// Runs every case of pjdfstest below `dir` and returns what differs from the expectations, one line each.
/// `dir` must let other users in (`allow_other`): as root, cases switch to two users that every Debian has.
pub fn pjdfstest(dir: &Path) -> Vec<String> {
    let config = tempfile::tempdir().unwrap();
    let file = config.path().join("pjdfstest.toml");
    std::fs::write(&file, pjdfstest_config()).unwrap();
    let suite = |dir: &Path, filter: &[&str]| {
        let output = run(Command::new(tool("pjdfstest")).arg("-c").arg(&file).arg("-p").arg(dir).args(filter));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let found = verdicts(&text);
        assert!(!found.is_empty(), "pjdfstest gave up: {text}{}", String::from_utf8_lossy(&output.stderr));
        found
    };
    let mut verdicts = suite(dir, &[]);
    verdicts.extend(suite(&long_path(dir), &[PATH_MAX_CASES]));
    let root = nix::unistd::geteuid().is_root();
    let mut wrong = Vec::new();
    for (_, case) in expectations().into_iter().filter(|(what, _)| *what == "pass") {
        match verdicts.get(case).map(|(verdict, detail)| (verdict.as_str(), detail)) {
            Some(("ok", _)) => {}
            Some(("skipped", _)) if !root => {}
            Some((verdict, detail)) => wrong.push(format!("{case}: {verdict} {detail}")),
            None => wrong.push(format!("{case}: did not run")),
        }
    }
    wrong
}

/// One run of fsx on `file`: `operations` random operations drawn from `seed`, with the weights of `tests/it/fsx/CONFIG.toml`.
/// The error holds the log of the last operations.
pub fn fsx(file: &Path, config: &str, operations: u32, seed: u32) -> Result<(), String> {
    let artifacts = tempfile::tempdir().unwrap();
    let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/fsx").join(config).with_extension("toml");
    let output = run(Command::new(tool("fsx"))
        .arg("-f")
        .arg(weights)
        .args(["-N", &operations.to_string(), "-S", &seed.to_string(), "-P"])
        .arg(artifacts.path())
        .arg(file));
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<&str> = said.lines().collect();
    Err(format!("fsx {config} seed {seed}: {}\n{}", output.status, lines[lines.len().saturating_sub(60)..].join("\n")))
}

/// The table of docs/testing.md: per system call, how many cases pass and how many are not asked, by reason.
pub fn expected_table() -> String {
    let mut calls: BTreeMap<&str, (usize, BTreeMap<&str, usize>)> = BTreeMap::new();
    let mut total = (0, BTreeMap::new());
    for (what, case) in expectations() {
        let call = case.split("::").next().unwrap_or(case);
        for row in [calls.entry(call).or_default(), &mut total] {
            if what == "pass" { row.0 += 1 } else { *row.1.entry(what).or_default() += 1 }
        }
    }
    let mut table = String::from("| call | pass | not asked |\n|---|---|---|\n");
    for (call, (pass, not_asked)) in calls.into_iter().chain([("all", total)]) {
        let reasons: Vec<String> = not_asked.iter().map(|(reason, count)| format!("{count} {}", reason.replace('-', " "))).collect();
        let _ = writeln!(table, "| {call} | {pass} | {} |", reasons.join(", "));
    }
    table
}

fn pjdfstest_config() -> String {
    let entries: Vec<String> = ["nobody", "daemon"].iter().map(|user| format!("[\"{user}\", \"{}\"]", group_of(user))).collect();
    let features = "posix_fallocate = {}\nutime_now = {}\nutimensat = {}\nrename_ctime = {}\n";
    format!("[features]\n{features}[settings]\nnaptime = 0.02\n[dummy_auth]\nentries = [{}]\n", entries.join(", "))
}

/// The name of a user's own group: `nobody` is in `nogroup` on Debian and in `nobody` elsewhere.
fn group_of(user: &str) -> String {
    let user = nix::unistd::User::from_name(user).unwrap().unwrap_or_else(|| panic!("there is no user {user}"));
    nix::unistd::Group::from_gid(user.gid).unwrap().unwrap_or_else(|| panic!("group {} has no name", user.gid)).name
}

/// The same directory by a path of 3,100 bytes: what is left until PATH_MAX fits the 1,024 bytes of a key.
fn long_path(dir: &Path) -> PathBuf {
    let mut path = dir.as_os_str().to_owned();
    while path.len() < 3100 {
        path.push("/.");
    }
    path.into()
}

/// Case → (verdict, the first line said about it).
fn verdicts(output: &str) -> BTreeMap<String, (String, String)> {
    let mut found = BTreeMap::new();
    let mut lines = output.lines().peekable();
    while let Some(line) = lines.next() {
        let mut words = line.split_whitespace();
        if let (Some(case), Some(verdict @ ("ok" | "FAILED" | "skipped")), None) = (words.next(), words.next(), words.next()) {
            let detail = lines.peek().filter(|next| next.starts_with('\t')).map_or("", |next| next.trim());
            found.insert(case.to_owned(), (verdict.to_owned(), detail.to_owned()));
        }
    }
    found
}

/// Fifteen minutes: a suite that hangs must not hang the run.
fn run(command: &mut Command) -> Output {
    let mut limited = Command::new("timeout");
    limited.args(["--kill-after=10", "900"]).arg(command.get_program()).args(command.get_args()).env("NO_COLOR", "1");
    limited.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn tool(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin").join(name);
    assert!(path.exists(), "{name} is not built: run ./scripts/setup");
    path
}

#[test]
fn enough_cases_are_expected_to_pass() {
    let pass = expectations().iter().filter(|(what, _)| *what == "pass").count();
    assert!(pass >= PASS_AT_LEAST, "only {pass} cases of pjdfstest are expected to pass");
}

#[test]
fn the_docs_show_what_pjdfstest_finds() {
    let docs = include_str!("../../docs/testing.md");
    let table = expected_table();
    assert!(docs.contains(&table), "put this table into docs/testing.md:\n{table}");
}
