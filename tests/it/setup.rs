//! `packmule setup` by pipe: what is asked is written down, tried and mounted; and mounts with a name.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::support::files;
use crate::support::mount::{Setup, can_mount, is_mounted, mount_namespace, packmule};
use crate::support::store::Store;

const PACKMULE: &str = env!("CARGO_BIN_EXE_packmule");
const NOBODY: u32 = 65534;

/// Folders of a user, and the config file that is read alone.
struct Place {
    home: TempDir,
    config: PathBuf,
}

impl Place {
    fn new() -> Self {
        let home = tempfile::Builder::new().prefix("packmule-it-").tempdir().unwrap();
        let config = home.path().join("packmule.toml");
        fs::write(&config, "# mine\nretries = 2\n").unwrap();
        Self { home, config }
    }

    fn point(&self) -> PathBuf {
        self.home.path().join("folder")
    }

    fn command(&self) -> Command {
        packmule(self.home.path(), &[("PACKMULE_CONFIG".to_owned(), self.config.display().to_string())])
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.config).unwrap()
    }
}

/// Lines of standard input, as they are asked for; as root also whose the files are.
fn answered(command: &mut Command, lines: &[&str]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all((lines.join("\n") + "\n").as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The answers up to the folder, with keys that are typed.
fn answers<'a>(store: &'a Store, source: &'a str, endpoint: &'a str, folder: &'a str) -> Vec<&'a str> {
    let mut lines = vec![source, "releases", endpoint, "us-east-1", "keys", store.access_key(), store.secret_key(), folder];
    if nix::unistd::geteuid().is_root() {
        lines.push("root");
    }
    lines
}

#[test]
fn what_is_answered_is_tried_written_and_mounted() {
    if !can_mount() {
        return;
    }
    let (store, place) = (Store::double(), Place::new());
    let (source, endpoint, point) = (format!("s3://{}/nightly", store.bucket()), store.endpoint(), place.point());
    let lines = [answers(&store, &source, &endpoint, point.to_str().unwrap()), vec!["no", "yes"]].concat();
    // What only this shell says is not what is tried.
    let output = answered(place.command().env("AWS_ENDPOINT_URL", "http://127.0.0.1:9").arg("setup"), &lines);
    let text = said(&output);
    let mounted = is_mounted(&point);
    let written = fs::write(point.join("f"), "x");
    // A name stands for the mountpoint, too.
    let umounted = files::output(place.command().args(["umount", "releases"]));
    assert!(output.status.success() && mounted, "{text}");
    assert!(text.contains("ok    write") && text.contains("written to "), "{text}");
    assert!(!text.contains(store.secret_key()), "{text}");
    written.unwrap();
    assert!(umounted.status.success() && !is_mounted(&point), "{}", said(&umounted));
    assert_eq!(store.bytes("nightly/f"), "x");
    let config = place.text();
    assert!(config.starts_with("# mine\nretries = 2\n\n[mount.releases]\nsource = "), "{config}");
    assert!(!config.contains(store.secret_key()), "{config}");

    // By the name again, and nothing that is there is written over.
    let again = files::output(place.command().args(["mount", "releases"]));
    let seen = fs::read(point.join("f"));
    let ended = files::output(place.command().arg("umount").arg(&point));
    assert!(again.status.success() && ended.status.success(), "{} {}", said(&again), said(&ended));
    assert_eq!(seen.unwrap(), b"x");
    let twice = answered(place.command().arg("setup"), &lines);
    assert!(
        twice.status.code() == Some(1) && said(&twice).contains("a section of this name is in the config file already"),
        "{}",
        said(&twice)
    );
    assert_eq!(place.text(), config);
    let checked = files::output(place.command().args(["config", "check"]));
    assert!(checked.status.success(), "{}", said(&checked));
}

#[test]
fn what_would_not_work_is_not_written_without_a_word() {
    let (store, place) = (Store::double(), Place::new());
    let (endpoint, point, before) = (store.endpoint(), place.point(), place.text());
    let lines = answers(&store, "s3://no-such-bucket", &endpoint, point.to_str().unwrap());
    let output = answered(place.command().arg("setup"), &lines);
    let text = said(&output);
    assert!(output.status.code() == Some(1) && text.contains("wrong list") && text.contains("nothing was written"), "{text}");
    assert_eq!(place.text(), before);
    // Nor the keys that were typed.
    assert!(!files::holds(place.home.path(), store.secret_key().as_bytes()));
    assert!(!point.exists());
    let bad = answered(place.command().arg("setup"), &["https://example.org/b"]);
    assert!(bad.status.code() == Some(1) && said(&bad).contains("is not an S3 source"), "{}", said(&bad));
    let silent = answered(place.command().arg("setup"), &[]);
    assert!(silent.status.code() == Some(1), "{}", said(&silent));
}

/// A name that has a section is taken, though that has no source: another one would be a duplicate key to every mount.
#[test]
fn what_is_written_can_be_read_again() {
    let (store, place) = (Store::double(), Place::new());
    let (source, endpoint, point) = (format!("s3://{}", store.bucket()), store.endpoint(), place.point());
    for text in ["[mount.releases]\nretries = 9\n", "mount = { releases = { retries = 9 } }\n"] {
        fs::write(&place.config, text).unwrap();
        let output = answered(place.command().arg("setup"), &answers(&store, &source, &endpoint, point.to_str().unwrap()));
        assert!(output.status.code() == Some(1) && said(&output).contains("a section of this name"), "{}", said(&output));
    }
    // One that no section can be added to is left as it is, and no keys stay.
    let inline = "mount = { other = { source = \"s3://other\" } }\n";
    fs::write(&place.config, inline).unwrap();
    let output = answered(place.command().arg("setup"), &answers(&store, &source, &endpoint, point.to_str().unwrap()));
    assert!(output.status.code() == Some(1), "{}", said(&output));
    assert_eq!(place.text(), inline);
    assert!(!files::holds(place.home.path(), store.secret_key().as_bytes()));
}

/// mount(8) makes a path of the fstab's first field where there is a file of that name; `packmule umount` is not led astray by it.
#[test]
fn a_name_that_is_a_folder_too() {
    if !can_mount() {
        return;
    }
    let (store, place) = (Store::double(), Place::new());
    let setup = Setup::of(&store);
    let (point, here) = (place.point(), place.home.path().join("here"));
    fs::create_dir_all(here.join("media")).unwrap();
    fs::create_dir(&point).unwrap();
    fs::write(&place.config, format!("[mount.media]\nsource = \"s3://{}\"\nmountpoint = \"{}\"\n", store.bucket(), point.display()))
        .unwrap();
    std::os::unix::fs::symlink(PACKMULE, here.join("mount.packmule")).unwrap();
    let template = place.command();
    let mut helper = Command::new(here.join("mount.packmule"));
    helper.env_clear().envs(template.get_envs().filter_map(|(name, value)| Some((name, value?))));
    helper.envs(setup.env.iter().map(|(name, value)| (name, value))).current_dir(&here);
    let options = format!("_netdev,{}", setup.options.join(","));
    let mounted = files::output(helper.arg(here.join("media")).arg(&point).args(["-o", &options]));
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let umounted = files::output(place.command().args(["umount", "media"]).current_dir(&here));
    assert!(mounted.status.success(), "{}", said(&mounted));
    // What `mount -a` looks for.
    assert!(table.contains(&format!("{} {} fuse.packmule", here.join("media").display(), point.display())), "{table}");
    assert!(umounted.status.success() && !is_mounted(&point), "{}", said(&umounted));
}

/// As root the fstab's line, in a mount namespace with an fstab of the test's own; mount(8) then finds it by the name.
#[test]
fn the_fstab_gets_its_line_by_consent() {
    if !can_mount() || !nix::unistd::geteuid().is_root() {
        return;
    }
    let (store, place) = (Store::double(), Place::new());
    let (source, endpoint, point) = (format!("s3://{}", store.bucket()), store.endpoint(), place.home.path().join("a folder"));
    let fstab = place.home.path().join("fstab");
    fs::write(&fstab, "# static file system information").unwrap();
    let script = format!("mount --bind '{}' /etc/fstab && exec '{PACKMULE}' setup", fstab.display());
    let template = place.command();
    let mut command = mount_namespace();
    command.args(["sh", "-c", &script]).env_clear();
    command.envs(template.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let made = !Path::new("/etc/fstab").exists();
    if made {
        fs::write("/etc/fstab", "").unwrap();
    }
    let output = answered(&mut command, &[answers(&store, &source, &endpoint, point.to_str().unwrap()), vec!["yes", "no"]].concat());
    if made {
        fs::remove_file("/etc/fstab").unwrap();
    }
    assert!(output.status.success(), "{}", said(&output));
    let line = format!(
        "releases {} packmule _netdev,nofail,x-systemd.mount-timeout=15min 0 0\n",
        point.display().to_string().replace(' ', "\\040")
    );
    assert_eq!(fs::read_to_string(&fstab).unwrap(), format!("# static file system information\n{line}"));
    assert!(point.is_dir() && !is_mounted(&point));
    // mount(8)'s own reading of the line.
    let found = files::output(Command::new("findmnt").args(["--noheadings", "--output", "SOURCE,TARGET,FSTYPE", "--tab-file"]).arg(&fstab));
    let found = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(found.contains("releases") && found.contains("a folder") && found.contains("packmule"), "{found}");
}

/// An ordinary user's unit, enabled by systemctl (a stand-in that notes what it is asked), of the program where it lies.
#[test]
fn a_user_gets_a_unit_by_consent() {
    let (store, place) = (Store::double(), Place::new());
    let (source, endpoint, point) = (format!("s3://{}", store.bucket()), store.endpoint(), place.point());
    let (bin, asked) = (place.home.path().join("bin"), place.home.path().join("asked"));
    fs::create_dir(&bin).unwrap();
    fs::copy(PACKMULE, bin.join("packmule")).unwrap();
    fs::write(bin.join("systemctl"), format!("#!/bin/sh\necho \"$@\" >>'{}'\n", asked.display())).unwrap();
    fs::set_permissions(bin.join("systemctl"), fs::Permissions::from_mode(0o755)).unwrap();
    let template = place.command();
    let root = nix::unistd::geteuid().is_root();
    let mut command = if root {
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".to_owned()]).arg(bin.join("packmule"));
        for folder in [place.home.path().to_owned(), bin.clone()]
            .into_iter()
            .chain(["cache", "state", "config", "run"].map(|name| place.home.path().join(name)))
        {
            chown(&folder, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        chown(&place.config, Some(NOBODY), Some(NOBODY)).unwrap();
        command
    } else {
        Command::new(bin.join("packmule"))
    };
    command.env_clear().envs(template.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())).arg("setup");
    let lines =
        [source.as_str(), "releases", &endpoint, "us-east-1", "keys", store.access_key(), store.secret_key(), point.to_str().unwrap()];
    // What this machine lacks for a user's mounts is not the matter here.
    let output = answered(&mut command, &[&lines[..], &["yes", "no"]].concat());
    let output =
        if said(&output).contains("wrong ") { answered(&mut command, &[&lines[..], &["yes", "yes", "no"]].concat()) } else { output };
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(fs::read_to_string(&asked).unwrap(), "--user enable packmule@releases.service\n");
    let unit = place.home.path().join("config/systemd/user/packmule@.service");
    if !Path::new("/usr/lib/systemd/user/packmule@.service").exists() {
        let unit = fs::read_to_string(unit).unwrap();
        assert!(unit.contains(&format!("ExecStart={}/packmule mount --foreground %i", bin.display())), "{unit}");
    }
}
