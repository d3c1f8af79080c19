//! What the package holds, as far as it can be judged without installing it: `scripts/test-package` does that.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::files::output;
use crate::support::mount::{PACKMULE, packmule};

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn text(path: &str) -> String {
    fs::read_to_string(project(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What a program said on both outputs; it must succeed.
#[track_caller]
fn said(command: &mut Command) -> String {
    let output = output(command);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    said
}

/// Every file below a folder of the project.
fn files(folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(project(folder)).unwrap() {
        let path = format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap());
        if project(&path).is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Source and destination of what Cargo.toml puts into the package; a symbolic link has no source.
fn assets() -> Vec<(Option<String>, String)> {
    let manifest: toml::Table = text("Cargo.toml").parse().unwrap();
    let assets = manifest["package"]["metadata"]["deb"]["assets"].as_array().unwrap();
    let word = |value: &toml::Value| value.as_str().unwrap().to_owned();
    assets
        .iter()
        .map(|asset| asset.as_array().map_or_else(|| (None, word(&asset["dest"])), |list| (Some(word(&list[0])), word(&list[1]))))
        .collect()
}

/// "every line commented out but valid when uncommented"
#[test]
fn the_default_config_is_right_with_and_without_its_settings() {
    let home = tempfile::tempdir().unwrap();
    let shipped = text("scripts/package.d/packmule.toml");
    assert!(shipped.lines().all(|line| line.is_empty() || line.starts_with('#')), "a setting is on");
    // `#name = value` is a setting, `# words` are words.
    let is_setting = |line: &str| line.strip_prefix('#').is_some_and(|rest| rest.starts_with(|c: char| c == '[' || c.is_ascii_lowercase()));
    let settings = shipped.lines().filter(|line| is_setting(line)).count();
    assert!(settings > 20, "{settings} settings");
    let all_on: Vec<&str> = shipped.lines().map(|line| if is_setting(line) { &line[1..] } else { line }).collect();
    // What a mount with a name would read is looked for.
    let keys = home.path().join("passwd");
    fs::write(&keys, "AKID:secret\n").unwrap();
    let all_on = all_on.join("\n").replace("/etc/packmule.passwd", keys.to_str().unwrap());
    for (name, text) in [("shipped.toml", shipped.clone()), ("all-on.toml", all_on)] {
        let file = home.path().join(name);
        fs::write(&file, text).unwrap();
        let env = [("PACKMULE_CONFIG".to_owned(), file.display().to_string())];
        assert!(said(packmule(home.path(), &env).args(["config", "check"])).ends_with(": right\n"));
    }
}

/// Whatever Cargo.toml puts into the package exists or is made by scripts/package, and what lies there for the package is in it.
#[test]
fn every_asset_is_there_and_nothing_is_forgotten() {
    let made = ["target/release/packmule", "target/package/man/", "target/package/completions/"];
    let static_files = files("scripts/package.d");
    let mut used = BTreeSet::new();
    for (source, _) in assets() {
        let Some(source) = source.filter(|source| !made.iter().any(|made| source.starts_with(made))) else { continue };
        let (folder, pattern) = source.rsplit_once('/').unwrap_or((".", &source));
        let (begin, end) = pattern.split_once('*').unwrap_or((pattern, ""));
        let matched: Vec<String> = match pattern.contains('*') {
            true => {
                files(folder).into_iter().filter(|file| file.starts_with(&format!("{folder}/{begin}")) && file.ends_with(end)).collect()
            }
            false => vec![source.clone()],
        };
        assert!(!matched.is_empty() && matched.iter().all(|file| project(file).is_file()), "{source} is not there");
        used.extend(matched);
    }
    let forgotten: Vec<_> = static_files.iter().filter(|file| !used.contains(*file) && !file.contains("/debian/")).collect();
    assert!(forgotten.is_empty(), "in no package: {forgotten:?}");
}

/// "binary, mount helper, man pages …, bash/zsh/fish completions, units, file-manager actions, and a default config with comments"
#[test]
fn the_package_has_what_is_promised() {
    let places: Vec<String> = assets().into_iter().map(|(_, place)| place).collect();
    for promised in [
        "usr/bin/",
        "usr/sbin/mount.packmule",
        "usr/sbin/umount.fuse.packmule",
        "usr/share/man/man1/",
        "usr/share/man/man5/",
        "usr/share/man/man8/",
        "usr/share/bash-completion/completions/packmule",
        "usr/share/zsh/vendor-completions/_packmule",
        "usr/share/fish/vendor_completions.d/packmule.fish",
        "usr/lib/systemd/system/",
        "usr/lib/systemd/user/",
        "usr/share/kio/servicemenus/packmule.desktop",
        "usr/share/nemo/actions/",
        "usr/share/file-manager/actions/",
        "etc/packmule.toml",
    ] {
        assert!(places.iter().any(|place| place == promised), "{promised} is missing");
    }
}

/// A page refers to no page of ours that is not written with it.
#[test]
fn the_manual_pages_refer_to_each_other() {
    let dir = tempfile::tempdir().unwrap();
    said(packmule(dir.path(), &[]).args(["man", "--dir"]).arg(dir.path().join("man")));
    let pages: BTreeSet<String> =
        fs::read_dir(dir.path().join("man")).unwrap().map(|page| page.unwrap().file_name().into_string().unwrap()).collect();
    for page in ["packmule.1", "packmule-mount.1", "packmule-cache-pin.1", "packmule.toml.5", "mount.packmule.8", "umount.fuse.packmule.8"]
    {
        assert!(pages.contains(page), "{page} is missing");
    }
    for page in &pages {
        let text = fs::read_to_string(dir.path().join("man").join(page)).unwrap().replace("\\-", "-");
        for section in ['1', '5', '8'] {
            for (at, _) in text.match_indices(&format!("({section})")) {
                let name = text[..at].rsplit(|c: char| !c.is_ascii_alphanumeric() && !"-._".contains(c)).next().unwrap();
                let ours = name.contains("packmule");
                assert!(!ours || pages.contains(&format!("{name}.{section}")), "{page} names {name}({section})");
            }
        }
    }
}

fn systemd_analyze() -> Command {
    let mut command = Command::new("systemd-analyze");
    let there = Command::new("systemd-analyze").arg("--version").output().is_ok_and(|output| output.status.success());
    assert!(there, "systemd-analyze is not here: run ./scripts/setup test");
    command.args(["verify", "--man=no"]);
    command
}

/// systemd-analyze names an unknown word in a unit and succeeds all the same: it must have nothing to say.
#[test]
fn systemd_takes_the_units() {
    let dir = tempfile::tempdir().unwrap();
    for kind in ["system", "user"] {
        let folder = dir.path().join(kind);
        fs::create_dir(&folder).unwrap();
        let unit = folder.join("packmule@.service");
        let text = text(&format!("scripts/package.d/{kind}/packmule@.service"));
        assert!(text.contains("ExecStart=/usr/bin/packmule mount --foreground %i\n"));
        for word in [
            "Type=notify",
            "NotifyAccess=main",
            "Restart=on-failure",
            "KillMode=mixed",
            "TimeoutStopSec=",
            "StartLimitBurst=",
            "ExecReload=",
        ] {
            assert!(text.contains(&format!("\n{word}")), "{kind}: {word}");
        }
        // Each of these hides the mount from everybody else.
        for word in [
            "ProtectSystem",
            "ProtectHome",
            "PrivateTmp",
            "PrivateDevices",
            "PrivateMounts",
            "ReadOnlyPaths",
            "ProtectProc",
            "ProtectKernel",
        ] {
            assert!(!text.contains(&format!("\n{word}")), "{kind}: {word}");
        }
        // The program need not be installed.
        fs::write(&unit, text.replace("/usr/bin/packmule ", &format!("{PACKMULE} "))).unwrap();
        let mut verify = systemd_analyze();
        verify.args((kind == "user").then_some("--user")).arg(&unit).env("XDG_RUNTIME_DIR", dir.path());
        assert_eq!(said(&mut verify), "", "{kind}");
    }
}

/// "systemd's `.mount` and `.automount` (checked with `systemd-analyze verify` and the fstab generator)"
#[test]
fn systemd_makes_mount_and_automount_of_the_line_in_the_readme() {
    let dir = tempfile::tempdir().unwrap();
    let readme = text("README.md");
    let line = readme.lines().map(str::trim).find(|line| line.starts_with("s3://") && line.contains(" packmule ")).unwrap();
    assert!(line.contains("x-systemd.automount") && line.contains("/srv/releases"));
    fs::write(dir.path().join("fstab"), format!("{line}\n")).unwrap();
    let generator = ["/usr/lib", "/lib"].map(|lib| Path::new(lib).join("systemd/system-generators/systemd-fstab-generator"));
    let generator = generator.into_iter().find(|file| file.exists()).expect("the fstab generator is not here: run ./scripts/setup test");
    let units = ["normal", "early", "late"].map(|name| dir.path().join(name));
    for folder in &units {
        fs::create_dir(folder).unwrap();
    }
    said(Command::new(generator).args(&units).env("SYSTEMD_FSTAB", dir.path().join("fstab")));
    let mount = fs::read_to_string(units[0].join("srv-releases.mount")).unwrap();
    for word in ["What=s3://releases/", "Where=/srv/releases", "Type=packmule", "Options=_netdev,nofail,"] {
        assert!(mount.contains(&format!("\n{word}")), "{word}\n{mount}");
    }
    for unit in ["srv-releases.mount", "srv-releases.automount"] {
        assert_eq!(said(systemd_analyze().arg(units[0].join(unit))), "", "{unit}");
    }
}

const HELPER: &str = "scripts/package.d/file-action";

/// A folder of programs that write down how they were called, one word a line, and what they were given.
struct Stubs(tempfile::TempDir);

impl Stubs {
    fn new(names: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        let text = "#!/bin/sh\nlog=$STUBS/${0##*/}\nfor word in \"$@\"; do printf '%s\\n' \"$word\"; done >>\"$log\"\n\
            case ${0##*/} in packmule) [ ! -e \"$STUBS/fail\" ] || exit 1; echo \"said of $1\" ;; xclip) cat >\"$log.given\" ;; findmnt) echo fuse.packmule ;; esac\n";
        for name in names {
            let file = dir.path().join("bin").join(name);
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self(dir)
    }

    /// The helper in a folder of its own, on a display or none.
    fn helper(&self, display: bool, words: &[&str]) -> Command {
        let mut command = Command::new(project(HELPER));
        let folder = self.0.path().join("files");
        fs::create_dir_all(&folder).unwrap();
        command.args(words).env_clear().current_dir(folder);
        command.env("PATH", format!("{}:/usr/bin:/bin", self.0.path().join("bin").display())).env("STUBS", self.0.path());
        command.envs(display.then_some(("DISPLAY", ":0")));
        command
    }

    /// The words that a program got.
    fn words(&self, name: &str) -> String {
        fs::read_to_string(self.0.path().join(name)).unwrap_or_default()
    }
}

const STRANGE: &str = "$(touch x) \"'; touch y; `touch z` <b>&.bin";

/// "never a shell injection by file names"
#[test]
fn what_a_file_is_called_is_never_a_command() {
    said(Command::new("sh").arg("-n").arg(project(HELPER)));
    for (action, asked) in [("link", "link\n--expires\n7d\n"), ("status", "status\n"), ("pin", "cache\npin\n")] {
        let stubs = Stubs::new(&["packmule", "xclip", "notify-send", "zenity", "kdialog", "xmessage"]);
        let files = stubs.0.path().join("files");
        let there = files.join(STRANGE);
        // Once by its path, once by a name that could be an option.
        said(&mut stubs.helper(true, &[action, there.to_str().unwrap(), "--help"]));
        let expected = [there.clone(), files.join("--help")].map(|file| format!("{asked}{}\n", file.display()));
        assert_eq!(stubs.words("packmule"), expected.concat());
        assert_eq!(fs::read_dir(&files).unwrap().count(), 0, "something was run");
        match action {
            "status" => assert!(stubs.words("zenity").contains("--text-info")),
            _ => {
                let notice = stubs.words("notify-send");
                assert!(notice.contains("touch z` &lt;b&gt;&amp;.bin, --help\n"), "{notice}");
            }
        }
        if action == "link" {
            assert_eq!(stubs.words("xclip"), "-selection\nclipboard\n");
            assert_eq!(stubs.words("xclip.given"), "said of link\nsaid of link");
        }
    }
}

/// Without a display it is printed, and a failure is one for the caller too.
#[test]
fn the_helper_says_what_went_wrong() {
    let stubs = Stubs::new(&["packmule", "findmnt"]);
    assert_eq!(said(&mut stubs.helper(false, &["link", "/m/f"])), "said of link\n");
    assert_eq!(said(&mut stubs.helper(false, &["here", "/m/f"])), "true\n");
    fs::write(stubs.0.path().join("fail"), "").unwrap();
    assert_eq!(output(&mut stubs.helper(false, &["status", "/m/f"])).status.code(), Some(1));
    assert_eq!(output(&mut stubs.helper(false, &["format", "/m/f"])).status.code(), Some(2));
    // This folder is on no mount of packmule.
    let bare = Stubs::new(&[]);
    assert_eq!(output(&mut bare.helper(false, &["here", "."])).status.code(), Some(1));
}

/// Every menu calls the helper where it is installed, with an action that it knows and the files as words of their own.
#[test]
fn every_menu_calls_the_helper() {
    let home = "usr/libexec/packmule/";
    assert!(assets().contains(&(Some(HELPER.to_owned()), home.to_owned())));
    let mut calls = 0;
    for file in files("scripts/package.d").into_iter().filter(|file| file.ends_with(".desktop") || file.ends_with(".nemo_action")) {
        for line in text(&file).lines().filter_map(|line| line.strip_prefix("Exec=").or_else(|| line.strip_prefix("ShowIfTrue="))) {
            let known = ["link", "status", "pin", "here"].map(|action| format!("/{home}file-action {action} %F"));
            assert!(known.contains(&line.to_owned()), "{file}: {line}");
            calls += 1;
        }
    }
    assert_eq!(calls, 12);
    // PCManFM crashes at the sight of one (libfm 1.3).
    assert!(files("scripts/package.d/actions").iter().all(|file| !text(file).contains("Schemes=")));
    assert!(text("scripts/package.d/nautilus.py").contains(&format!("HELPER = \"/{home}file-action\"")));
}

/// The menu of Nautilus is there for files on a mount and for no others, whatever the mount is called.
#[test]
fn nautilus_shows_the_menu_on_mounts() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("gi")).unwrap();
    fs::write(dir.path().join("gi/__init__.py"), "").unwrap();
    let library = "class GObject:\n  GObject = type('GObject', (), {})\nclass Nautilus:\n  MenuProvider = type('MenuProvider', (), {})\n";
    fs::write(dir.path().join("gi/repository.py"), library).unwrap();
    fs::write(dir.path().join("menu.py"), text("scripts/package.d/nautilus.py")).unwrap();
    let script = "import builtins, io, menu
table = b'36 35 0:41 / /mnt/my\\\\040b\\xc3\\xa9 rw shared:7 - fuse.packmule s3://b rw\\n37 35 0:42 / /srv rw - ext4 /dev/a rw\\n'
real = builtins.open
builtins.open = lambda name, *mode: io.BytesIO(table) if name == '/proc/self/mountinfo' else real(name, *mode)
points = menu.mountpoints()
print([menu.is_there(path, points) for path in ('/mnt/my b\\u00e9/f', '/mnt/my b\\u00e9', '/mnt/my b\\u00e9x/f', '/srv/f')])";
    let mut python = Command::new("python3");
    python.args(["-c", script]).env("PYTHONPATH", dir.path()).env("PYTHONDONTWRITEBYTECODE", "1").env("PYTHONUTF8", "1");
    assert_eq!(said(&mut python), "[True, True, False, False]\n");
}
