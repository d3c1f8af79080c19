//! "Bad input … each one line that names the thing and the remedy, exit 32 from mount … Never a panic, a hang or a backtrace."

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::support::double::{Fault, Options, When};
use crate::support::files::{self, output};
use crate::support::mount::{self, Failure, Mount, Setup, can_mount, packmule};
use crate::support::stage::Stage;
use crate::support::store::Store;

/// What a mount says that must fail: one line, exit 32, in time, with each of `words` in it.
fn refused(setup: Setup, within: Duration, words: &[&str]) -> String {
    match Mount::try_start(setup) {
        Ok(_) => panic!("it mounted"),
        Err(failure) => judged(&failure, within, words),
    }
}

fn judged(failure: &Failure, within: Duration, words: &[&str]) -> String {
    let Failure { status, stderr, took } = failure;
    assert_eq!(status.code(), Some(32), "{stderr}");
    assert!(*took < within, "{took:?}: {stderr}");
    let line = stderr.trim_end();
    assert!(!line.is_empty() && !line.contains('\n'), "not one line: {stderr}");
    assert!(!line.contains("panicked") && !line.contains(".rs:"), "{line}");
    for word in words {
        assert!(line.to_lowercase().contains(&word.to_lowercase()), "{word:?} is not in: {line}");
    }
    line.to_owned()
}

const SOON: Duration = Duration::from_secs(20);

#[test]
fn no_such_bucket() {
    if can_mount() {
        let store = Store::double();
        refused(Setup::of(&store).source("s3://no-such-bucket"), SOON, &["no-such-bucket"]);
    }
}

#[test]
fn wrong_access_key() {
    if can_mount() {
        let store = Store::double();
        let setup = Setup::of(&store).env("AWS_ACCESS_KEY_ID", "AKIDNOBODY0000000000");
        refused(setup, SOON, &["key"]);
    }
}

#[test]
fn wrong_secret() {
    if can_mount() {
        let store = Store::double();
        let line = refused(Setup::of(&store).env("AWS_SECRET_ACCESS_KEY", "a-wrong-secret"), SOON, &["secret"]);
        assert!(!line.contains("a-wrong-secret"));
    }
}

#[test]
fn no_credentials() {
    if can_mount() {
        let store = Store::double();
        let mut setup = Setup::of(&store);
        setup.env.retain(|(name, _)| !name.contains("KEY"));
        refused(setup, SOON, &["no credentials found"]);
        // As AWS's own tools read them: set to nothing is not set.
        refused(Setup::of(&store).env("AWS_ACCESS_KEY_ID", "").env("AWS_SECRET_ACCESS_KEY", ""), SOON, &["no credentials found"]);
    }
}

#[test]
fn rights_refused() {
    if can_mount() {
        let store = Store::double();
        store.as_double().unwrap().fault(When::any(), Fault::Error(403, "AccessDenied"));
        refused(Setup::of(&store), SOON, &["releases"]);
    }
}

/// A wrong region is no failure: the right one is found.
#[test]
fn wrong_region() {
    if !can_mount() {
        return;
    }
    let store = Store::double_with(Options { region: "eu-west-3".to_owned(), ..Options::default() });
    store.put("f", "x");
    let mount = Mount::start(Setup::of(&store).option("region=us-west-2"));
    assert_eq!(fs::read(mount.path("f")).unwrap(), b"x");
}

/// "it gives up after 20 s when refused"
#[test]
fn endpoint_down() {
    if can_mount() {
        let store = Store::double();
        let mut setup = Setup::of(&store);
        setup.options = vec!["endpoint_url=http://127.0.0.1:9".to_owned()];
        refused(setup, Duration::from_secs(35), &["127.0.0.1:9"]);
    }
}

/// "20 s when … not resolved"
#[test]
fn endpoint_unknown() {
    if can_mount() {
        let store = Store::double();
        let mut setup = Setup::of(&store);
        setup.options = vec!["endpoint_url=http://no-such-host.invalid".to_owned()];
        refused(setup, Duration::from_secs(35), &["no-such-host.invalid"]);
    }
}

/// "60 s when nothing answers"
#[test]
fn endpoint_silent() {
    if can_mount() {
        let store = Store::double();
        store.as_double().unwrap().fault(When::any(), Fault::Stall(Duration::from_secs(300)));
        refused(Setup::of(&store), Duration::from_secs(75), &[]);
    }
}

#[test]
fn something_else_answers() {
    if can_mount() {
        let store = Store::double();
        store.as_double().unwrap().fault(When::any(), Fault::Html);
        refused(Setup::of(&store), SOON, &["not S3"]);
    }
}

#[test]
fn bad_options() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    for (option, words) in [
        ("cache_szie=1G", &["cache_szie", "cache_size"][..]),
        ("cache_size=lots", &["cache_size", "lots"][..]),
        ("uid=no-such-user-here", &["no-such-user-here"][..]),
        ("endpoint_url=ftp://x", &["ftp"][..]),
    ] {
        // The words are wrong before anything is mounted: 2 is the status of wrong usage, 32 that of a failed mount.
        let setup = Setup::of(&store).option(option);
        let Err(failure) = Mount::try_start(setup) else { panic!("{option} mounted") };
        assert!(matches!(failure.status.code(), Some(2 | 32)), "{option}: {failure:?}");
        let line = failure.stderr.trim_end();
        assert!(!line.is_empty() && !line.contains('\n'), "{option} is not one line: {line}");
        for word in words {
            assert!(line.contains(word), "{option}: {word} is not in: {line}");
        }
    }
}

#[test]
fn a_password_file_that_cannot_be_read() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let passwd = store.home().join("passwd");
    let with = |store: &Store| {
        let mut setup = Setup::of(store).option(&format!("passwd_file={}", store.home().join("passwd").display()));
        setup.env.retain(|(name, _)| !name.contains("KEY"));
        setup
    };
    refused(with(&store), SOON, &["passwd"]);
    fs::write(&passwd, "no colon here\n").unwrap();
    fs::set_permissions(&passwd, fs::Permissions::from_mode(0o600)).unwrap();
    refused(with(&store), SOON, &["passwd"]);
    fs::write(&passwd, format!("{}:{}\n", store.access_key(), store.secret_key())).unwrap();
    fs::set_permissions(&passwd, fs::Permissions::from_mode(0o644)).unwrap();
    let line = refused(with(&store), SOON, &["passwd", "600"]);
    assert!(!line.contains(store.secret_key()));
    fs::set_permissions(&passwd, fs::Permissions::from_mode(0o600)).unwrap();
    let mount = Mount::start(with(&store));
    assert_eq!(files::names(mount.dir()), Vec::<String>::new());

    // The same of a file in the AWS CLI's form.
    let keys = format!("[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n", store.access_key(), store.secret_key());
    let credentials = store.home().join("credentials");
    fs::write(&credentials, keys).unwrap();
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o644)).unwrap();
    let with = || {
        let mut setup = Setup::of(&store).option(&format!("credentials_file={}", credentials.display()));
        setup.env.retain(|(name, _)| !name.contains("KEY"));
        setup
    };
    let line = refused(with(), SOON, &["credentials_file", "can be read by others", "chmod 600"]);
    assert!(!line.contains(store.secret_key()));
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(files::names(Mount::start(with()).dir()), Vec::<String>::new());
}

/// "Secrets never in … core dumps"
#[test]
fn a_mount_that_dies_leaves_no_core() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let mut setup = Setup::of(&store);
    let script = format!("ulimit -c unlimited; cd '{}' && exec \"$0\" \"$@\"", store.home().display());
    setup.under = ["sh".to_owned(), "-c".to_owned(), script].into();
    let status = Mount::start(setup).dies_of(Signal::SIGABRT);
    assert!(status.signal() == Some(Signal::SIGABRT as i32) && !status.core_dumped(), "{status}");
}

/// Runs `packmule mount` on a mountpoint of the test's choice.
fn mount_at(store: &Store, point: &std::path::Path) -> Failure {
    let setup = Setup::of(store);
    let began = std::time::Instant::now();
    let mut command = packmule(store.home(), &setup.env);
    command.arg("mount").arg(&setup.source).arg(point).args(["-f", "-o", &setup.options.join(",")]);
    let output = output(&mut command);
    Failure { status: output.status, stderr: String::from_utf8_lossy(&output.stderr).into_owned(), took: began.elapsed() }
}

#[test]
fn bad_mountpoints() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    judged(&mount_at(&store, &store.home().join("missing")), SOON, &["missing"]);
    let file = store.home().join("a-file");
    fs::write(&file, "x").unwrap();
    judged(&mount_at(&store, &file), SOON, &["a-file", "directory"]);
    let full = store.home().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("x"), "x").unwrap();
    judged(&mount_at(&store, &full), SOON, &["full", "empty"]);
}

#[test]
fn a_mountpoint_in_use() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    judged(&mount_at(&stage.store, stage.dir()), SOON, &["mnt"]);
    assert!(mount::is_mounted(stage.dir()), "the first mount stays");
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
}

/// "Background, with a readiness report": the command returns when the filesystem answers.
#[test]
fn background_mounts_return_when_ready() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put("f", "x");
    let point = store.home().join("mnt");
    fs::create_dir(&point).unwrap();
    let setup = Setup::of(&store);
    let mut command = packmule(store.home(), &setup.env);
    command.arg("mount").arg(&setup.source).arg(&point).args(["-o", &setup.options.join(",")]);
    let said = output(&mut command);
    let stderr = String::from_utf8_lossy(&said.stderr).into_owned();
    let seen = fs::read(point.join("f"));
    let mut umount = packmule(store.home(), &setup.env);
    umount.arg("umount").arg(&point);
    let ended = output(&mut umount);
    assert!(said.status.success(), "{stderr}");
    assert_eq!(seen.unwrap(), b"x");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    assert!(!mount::is_mounted(&point));
}

/// A mount in the background keeps nothing of who started it: not the lock of a script, not the end of its pipe.
#[test]
fn background_mounts_hold_nothing_of_their_callers() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let (point, lock) = (store.home().join("mnt"), store.home().join("lock"));
    fs::create_dir(&point).unwrap();
    let setup = Setup::of(&store);
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", "exec 9>\"$1\" && flock 9 && \"$2\" mount \"$3\" \"$4\" -o \"$5\"", "script"])
        .arg(&lock)
        .arg(env!("CARGO_BIN_EXE_packmule"));
    command.arg(&setup.source).arg(&point).arg(setup.options.join(","));
    let template = packmule(store.home(), &setup.env);
    command.env_clear().envs(template.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mounted = output(&mut command);
    let free = output(std::process::Command::new("flock").args(["--nonblock"]).arg(&lock).arg("true"));
    let ended = output(packmule(store.home(), &setup.env).arg("umount").arg(&point));
    assert!(mounted.status.success() && ended.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
    assert!(free.status.success(), "the mount holds the script's lock");
}

/// "s3://` for every bucket of the account"; "mkdir and rmdir at the top make and remove buckets only with `allow_bucket_changes`"
#[test]
fn every_bucket_of_the_account() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put("f", "x");
    store.as_double().unwrap().create_bucket("second");
    let mount = Mount::start(Setup::of(&store).source("s3://"));
    assert_eq!(files::names(mount.dir()), ["releases", "second"]);
    assert_eq!(fs::read(mount.path("releases/f")).unwrap(), b"x");
    fs::write(mount.path("second/g"), "y").unwrap();
    assert_eq!(store.as_double().unwrap().keys("second"), ["g"]);
    assert!(fs::create_dir(mount.path("third")).is_err());
    drop(mount);
    let mount = Mount::start(Setup::of(&store).source("s3://").option("allow_bucket_changes"));
    fs::create_dir(mount.path("third")).unwrap();
    assert_eq!(store.as_double().unwrap().buckets(), ["releases", "second", "third"]);
    assert!(fs::remove_dir(mount.path("second")).is_err());
    fs::remove_dir(mount.path("third")).unwrap();
    assert_eq!(store.as_double().unwrap().buckets(), ["releases", "second"]);
}

/// A read-only mount refuses, and `allow_delete=no` keeps what is there.
#[test]
fn safety_options() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["ro"]);
    stage.store.put("f", "x");
    assert_eq!(fs::read(stage.path("f")).unwrap(), b"x");
    for refused in [fs::write(stage.path("g"), "y"), fs::remove_file(stage.path("f")), fs::create_dir(stage.path("d"))] {
        assert_eq!(files::errno(refused), nix::errno::Errno::EROFS);
    }
    drop(stage);
    let stage = Stage::with(Store::double(), &["allow_delete=no"]);
    stage.store.put("f", "x");
    assert!(fs::remove_file(stage.path("f")).is_err());
    assert_eq!(stage.store.keys(), ["f"]);
}

/// `packmule … | head` is no error, and no panic.
#[test]
fn a_reader_that_goes_is_no_error() {
    let home = tempfile::tempdir().unwrap();
    for words in [
        &["config", "check"][..],
        &["man"],
        &["completions", "bash"],
        &["status", "--json", "--spool-dir", "."],
        &["cache", "--cache-dir", "."],
    ] {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        drop(reader);
        let mut command = packmule(home.path(), &[]);
        let said = command.args(words).stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        assert!(said.status.success() && said.stderr.is_empty(), "{words:?}: {} {}", said.status, String::from_utf8_lossy(&said.stderr));
    }
}

/// The soft limit of open files is for programs that use select(2).
#[test]
fn a_mount_may_have_as_many_files_open_as_its_user() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let under = ["sh", "-c", "ulimit -Sn 256; exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    let mount = Mount::start(Setup { under, ..Setup::of(&store) });
    let limits = fs::read_to_string(format!("/proc/{}/limits", mount.pid())).unwrap();
    let words: Vec<_> = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap().split_whitespace().collect();
    assert!(words[0] != "256" && words[0] == words[1], "{words:?}");
}
