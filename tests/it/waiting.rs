//! Commands that wait for uploads: what they show meanwhile, and when they stop waiting. Promise 25.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::double::{Fault, When};
use crate::support::files::{self, noise};
use crate::support::mount::{PACKMULE, can_mount, is_mounted};
use crate::support::stage::Stage;
use crate::support::store::Store;

const MIB: usize = 1 << 20;

/// What `packmule` says at a terminal of its own (script(1)), where somebody types.
fn at_a_terminal(stage: &Stage, arguments: &str, typed: &str) -> (bool, String) {
    let mut command = Command::new("sh");
    command.env_clear();
    for (name, value) in stage.mount.command().get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    let script = format!("printf '{typed}' | script -qec \"{PACKMULE} {arguments}\" /dev/null");
    let said = files::output(command.args(["-c", &script]).env("TERM", "xterm").stdin(Stdio::null()));
    (said.status.success(), String::from_utf8_lossy(&said.stdout).into_owned())
}

/// Files that are sent when somebody says so, and slowly then.
fn queued(names: &[&str]) -> Stage {
    let stage = Stage::with(Store::double(), &["write_back=1h", "max_connections=1"]);
    for name in names {
        files::write(&stage.path(name), &noise(1, MIB)).unwrap();
    }
    stage.double().fault(When::operation("PutObject"), Fault::Delay(Duration::from_millis(1500)));
    stage
}

#[test]
fn a_terminal_sees_how_far_it_is() {
    if !can_mount() {
        return;
    }
    let stage = queued(&["one.bin", "two.bin"]);
    let (done, said) = at_a_terminal(&stage, &format!("flush {}", stage.dir().display()), "");
    assert!(done, "{said}");
    assert!(said.contains("one.bin") && said.contains("and 1 more") && said.contains("2.00 MiB"), "{said:?}");
    assert_eq!(stage.store.keys(), ["one.bin", "two.bin"]);
    files::write(&stage.path("three.bin"), &noise(1, MIB)).unwrap();
    // Elsewhere a line every half minute would be the first.
    let said = files::output(stage.mount.command().arg("flush").arg(stage.dir()));
    assert!(said.status.success() && said.stderr.is_empty() && said.stdout.is_empty(), "{said:?}");
    files::write(&stage.path("four.bin"), &noise(1, MIB)).unwrap();
    let (done, said) = at_a_terminal(&stage, &format!("flush {}", stage.path("four.bin").display()), "");
    assert!(done && said.contains("four.bin"), "{said:?}");
}

/// Promise 25: "What cannot be finished is said, and resumed at the next mount."
#[test]
fn waiting_ends_at_the_time_that_was_given() {
    if !can_mount() {
        return;
    }
    let mut stage = queued(&["f"]);
    stage.double().set_down(true);
    for path in [stage.path("f"), stage.dir().to_owned()] {
        let said = files::output(stage.mount.command().args(["flush", "--timeout", "1s"]).arg(path));
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert_eq!(said.status.code(), Some(1), "{text}");
        assert!(text.contains("not uploaded, goes on in the background: s3://releases/f"), "{text}");
    }
    let said = files::output(stage.mount.command().args(["umount", "--timeout", "soon"]).arg(stage.dir()));
    assert!(String::from_utf8_lossy(&said.stderr).contains("expected a time"));
    let mut asked = stage.mount.command().args(["umount", "--timeout", "1s"]).arg(stage.dir()).stderr(Stdio::piped()).spawn().unwrap();
    stage.store.eventually("it is unmounted", |_| !is_mounted(stage.dir()));
    // The process has ended when somebody took note of it: the command waits for that.
    stage.mount.crash();
    let said = {
        let mut text = String::new();
        std::io::Read::read_to_string(asked.stderr.as_mut().unwrap(), &mut text).unwrap();
        text
    };
    assert!(!asked.wait().unwrap().success() && said.contains("not uploaded, goes on at the next mount: s3://releases/f"), "{said}");
    stage.double().set_down(false);
    stage.double().clear_faults();
    stage.mount.again();
    stage.store.eventually("it went on", |store| store.get("f").is_some());
    assert!(stage.store.bytes("f") == noise(1, MIB));
}

#[test]
fn somebody_is_asked_before_bytes_are_thrown_away() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().fault(When::operation("PutObject"), Fault::Error(403, "AccessDenied"));
    assert!(files::write(&stage.path("f"), b"refused").is_err());
    let path = stage.path("f").display().to_string();
    let is_there = || {
        let told: Value = serde_json::from_str(&stage.mount.ask(&["status", "--json"], stage.dir())).unwrap();
        told[0]["uploads"].as_array().unwrap().len() == 1
    };
    let (done, said) = at_a_terminal(&stage, &format!("discard {path}"), "n\\n");
    assert!(!done && said.contains("Throw away?") && said.contains("s3://releases/f  7 B") && is_there(), "{said}");
    let (done, said) = at_a_terminal(&stage, &format!("discard {path}"), "y\\n");
    assert!(done && said.contains("thrown away: s3://releases/f") && !is_there(), "{said}");
}
