//! mount(8) and umount(8): "Type `packmule` (`/sbin/mount.packmule`) and `fuse.packmule`", promise 25. The helpers' links lie in a
//! folder that only a mount namespace of the test's own shows as /sbin.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::{Command, Output};

use crate::support::double::{Fault, When};
use crate::support::files::{noise, output};
use crate::support::mount::{PACKMULE, can_mount, packmule};
use crate::support::store::Store;

/// The helpers that a package installs.
const HELPERS: &[&str] = &["mount.packmule", "umount.fuse.packmule"];

/// Before each script: only the helpers are in /sbin, sockets are nobody else's, and whatever happens nothing stays mounted.
const BEGINNING: &str = "mount --bind \"$SBIN\" \"$(readlink -f /sbin)\"; mount -t tmpfs none /run
trap 'if mountpoint -q \"$M\"; then umount -l \"$M\"; fi' EXIT
served() { grep -lsa -- \"[/]${M#/}\" /proc/[0-9]*/cmdline | wc -l; }
";

/// How a private mount namespace is made: root's own, or an unprivileged user's where the machine lets him.
fn unshare() -> Option<&'static [&'static str]> {
    let works = |how: &[&str]| Command::new("unshare").args(how).arg("true").output().is_ok_and(|output| output.status.success());
    // Slave: what is unmounted outside goes here too, or other mounts would live until this namespace ends.
    let ways: [&[&str]; 2] = [&["-m", "--propagation=slave"], &["-r", "-m", "--propagation=slave"]];
    // In a chroot, whose root is no mount that could be made a slave: as it is, where nothing of it is seen outside.
    let way = ways.into_iter().find(|way| works(way)).or_else(|| keeps_to_itself(UNCHANGED).then_some(UNCHANGED));
    assert!(way.is_some() || !nix::unistd::geteuid().is_root(), "root cannot make a mount namespace here");
    way
}

const UNCHANGED: &[&str] = &["-m", "--propagation=unchanged"];

/// True when a mount made in such a namespace is not seen in this one.
fn keeps_to_itself(way: &[&str]) -> bool {
    let probe = tempfile::tempdir().unwrap();
    let mut inside = Command::new("unshare");
    inside.args(way).args(["sh", "-c", "mount -t tmpfs none \"$0\" && : > \"$0/seen\""]).arg(probe.path());
    let mounted = inside.output().is_ok_and(|output| output.status.success());
    let seen = probe.path().join("seen").exists();
    if seen {
        let _ = Command::new("umount").arg(probe.path()).status();
    }
    mounted && !seen
}

/// Runs a script; `$M` is the mountpoint, `$SPEC` and `$OPTS` mount the store's bucket.
fn script(store: &Store, script: &str) -> Option<Output> {
    let Some(way) = unshare().filter(|_| can_mount()) else {
        eprintln!("skipped: this user cannot make a mount namespace");
        return None;
    };
    let (sbin, point, passwd) = (store.home().join("sbin"), store.home().join("mnt"), store.home().join("passwd"));
    for dir in [&sbin, &point] {
        fs::create_dir(dir).unwrap();
    }
    for helper in HELPERS {
        symlink(PACKMULE, sbin.join(helper)).unwrap();
    }
    fs::write(&passwd, format!("{}:{}\n", store.access_key(), store.secret_key())).unwrap();
    fs::set_permissions(&passwd, fs::Permissions::from_mode(0o600)).unwrap();
    // umount(8) finds its helper only for a mountpoint in libmount's utab, where `_netdev` puts it; others it takes from statfs(2),
    // which says "fuse" without the subtype (util-linux 2.38, lookup_umount_fs_by_statfs).
    let options = format!("_netdev,endpoint_url={},region=us-east-1,passwd_file={},write_back=1h", store.endpoint(), passwd.display());
    let mut command = Command::new("timeout");
    command.args(["120", "unshare"]).args(way).args(["sh", "-euc", &format!("{BEGINNING}{script}")]);
    let like = packmule(store.home(), &[]);
    command.env_clear().envs(like.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.env("SBIN", &sbin).env("M", &point).env("SPEC", format!("s3://{}", store.bucket())).env("OPTS", options);
    Some(output(&mut command))
}

/// What a script said that must succeed.
#[track_caller]
fn said(store: &Store, text: &str) -> Option<String> {
    let output = script(store, text)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    Some(out)
}

/// Promise 25: "umount(8) (through `/sbin/umount.fuse.packmule`) … wait for the work". mount(8) returns when the filesystem answers, and
/// no process stays.
#[test]
fn mount_and_umount() {
    let store = Store::double();
    store.put("f", "from the bucket");
    fs::write(store.home().join("big"), noise(1, 9 << 20)).unwrap();
    let text = "mount -t packmule \"$SPEC\" \"$M\" -o \"$OPTS,nofail,x-systemd.automount\"
        cat \"$M/f\"; grep -c \" $M fuse.packmule .*nosuid,nodev\" /proc/mounts
        cp \"$SBIN/../big\" \"$M/big\"; umount \"$M\"; mountpoint -q \"$M\" || echo unmounted; served";
    if let Some(out) = said(&store, text) {
        assert_eq!(out, "from the bucket1\nunmounted\n0\n");
        assert!(store.bytes("big") == noise(1, 9 << 20));
    }
}

/// A line of fstab(5), `mount DIR` alone, and a second `mount` of it that says so instead of mounting twice.
#[test]
fn a_line_of_fstab() {
    let store = Store::double();
    store.put("f", "from the bucket");
    let text = "echo \"$SPEC $M packmule $OPTS,nofail,uid=12,file_mode=0640 0 0\" > \"$SBIN/../fstab\"
        mount -T \"$SBIN/../fstab\" \"$M\"; stat -c '%u %a' \"$M/f\"
        mount -T \"$SBIN/../fstab\" \"$M\" 2>/dev/null && echo twice; grep -c \" $M fuse\" /proc/mounts; umount \"$M\"; served";
    if let Some(out) = said(&store, text) {
        assert_eq!(out, "12 640\n1\n0\n");
    }
}

/// "`remount` changes those flags or fails in one line, and never mounts twice"
#[test]
fn remount_changes_flags() {
    let store = Store::double();
    store.put("f", "x");
    let text = "mount -t packmule \"$SPEC\" \"$M\" -o \"$OPTS\"; echo y > \"$M/g\"
        mount -t packmule \"$SPEC\" \"$M\" -o \"$OPTS,remount,ro,noexec\"
        (echo z > \"$M/h\") 2>/dev/null || echo read-only; cat \"$M/f\"; echo; grep -c \" $M fuse.* ro,.*noexec\" /proc/mounts
        mount -t packmule \"$SPEC\" \"$M\" -o \"$OPTS,remount,rw\"; echo z > \"$M/h\"; grep -c \" $M fuse\" /proc/mounts; umount \"$M\"; served
        mount -t packmule \"$SPEC\" \"$M\" -o \"$OPTS,remount,ro\" || echo status $?";
    if let Some(output) = script(&store, text) {
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "read-only\nx\n1\n1\n0\nstatus 32\n", "{err}");
        assert!(err.contains("nothing of packmule is mounted there to remount"), "{err}");
        assert_eq!(store.keys(), ["f", "g", "h"]);
    }
}

/// A mount that fails in the background says its one line to mount(8) and ends with 32.
#[test]
fn a_failure_reaches_mount() {
    let store = Store::double();
    store.as_double().unwrap().fault(When::operation("ListObjectsV2"), Fault::Error(403, "AccessDenied"));
    if let Some(output) = script(&store, "mount -t packmule \"$SPEC\" \"$M\" -o \"$OPTS\" || echo status $?; served") {
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "status 32\n0\n", "{err}");
        assert!(err.lines().count() == 1 && err.contains("access to s3://releases is denied"), "{err}");
    }
}

/// Promise 25: "a bare umount(2) returns while the process drains on": `umount -l`, and what waits is uploaded all the same.
#[test]
fn lazy_umount_finishes_in_the_background() {
    let store = Store::double();
    let text = "mount -t packmule \"$SPEC\" \"$M\" -o \"$OPTS,write_back=1h\"; echo y > \"$M/g\"; umount -l \"$M\"; mountpoint -q \"$M\" || echo gone
        for second in $(seq 50); do [ \"$(served)\" = 0 ] && break; sleep 0.2; done; served";
    if let Some(out) = said(&store, text) {
        assert_eq!(out, "gone\n0\n");
        assert_eq!(store.bytes("g"), "y\n");
    }
}
