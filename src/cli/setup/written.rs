//! What `packmule setup` writes: a section of the config file, a file of keys, a line of the fstab, a unit.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::config::Environment;

/// The unit of the package, for who has the program alone.
const UNIT: &str = include_str!("../../../scripts/package.d/user/packmule@.service");

/// Where the package puts it.
const PACKAGED: &str = "/usr/lib/systemd/user/packmule@.service";

/// mount(8)'s table.
const FSTAB: &str = "/etc/fstab";

/// Of root the machine's config file, else the user's own.
pub fn config_file(environment: &Environment) -> anyhow::Result<PathBuf> {
    let files = environment.config_files();
    let file = if environment.root { files.first() } else { files.last() };
    file.map(|(path, _)| path.clone()).context("PACKMULE_CONFIG is empty: no config file is read; unset it")
}

/// Where the keys of a mount go that were typed: beside the config file, of root in a folder.
pub fn keys_file(config: &Path, name: &str, environment: &Environment) -> PathBuf {
    let folder = config.parent().unwrap_or(Path::new("/"));
    let folder = if environment.root { folder.join("packmule") } else { folder.to_owned() };
    folder.join(format!("{name}.passwd"))
}

/// A section with its words in their order; values are TOML's basic strings, booleans as they are.
pub fn section(name: &str, words: &[(&str, String)]) -> String {
    let quoted = |value: &str| toml::Value::String(value.to_owned()).to_string();
    let lines: String = words.iter().map(|(word, value)| format!("{word} = {}\n", quoted(value))).collect();
    format!("[mount.{}]\n{lines}", if name.contains('.') { quoted(name) } else { name.to_owned() })
}

/// What a config file says with a section more at its end.
pub fn with_section(file: &Path, section: &str) -> anyhow::Result<String> {
    let old = match fs::read_to_string(file) {
        Ok(old) => old,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("{}: cannot be read", file.display())),
    };
    let gap = match old.as_str() {
        "" => "",
        old if old.ends_with("\n\n") => "",
        old if old.ends_with('\n') => "\n",
        _ => "\n\n",
    };
    Ok(format!("{old}{gap}{section}"))
}

/// Replaces a config file, which is there whole before or after, whatever happens.
pub fn replace(file: &Path, text: &str) -> anyhow::Result<()> {
    // A link is followed, one that leads nowhere yet too: dot files are often kept elsewhere.
    let target = match fs::read_link(file) {
        Ok(link) => file.canonicalize().unwrap_or_else(|_| file.parent().unwrap_or(Path::new("/")).join(link)),
        Err(_) => file.to_owned(),
    };
    let folder = target.parent().unwrap_or(Path::new("/"));
    let write = || -> io::Result<()> {
        fs::create_dir_all(folder)?;
        let mut new = tempfile::Builder::new().prefix(".packmule-").tempfile_in(folder)?;
        new.write_all(text.as_bytes())?;
        let mode = fs::metadata(&target).map_or_else(|_| Permissions::from_mode(0o644), |known| known.permissions());
        new.as_file().set_permissions(mode)?;
        new.as_file().sync_all()?;
        new.persist(&target).map_err(|error| error.error)?;
        File::open(folder)?.sync_all()
    };
    write().with_context(|| format!("{}: cannot be written", file.display()))
}

/// Keys for the time of the trial: a file without a name, which is gone with this process however that ends. Gives it and the path by
/// which this process alone can read it.
pub fn keys_without_name(key: &str, secret: &str) -> anyhow::Result<(File, PathBuf)> {
    let mut file = tempfile::tempfile().context("no temporary file can be made")?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(format!("{key}:{secret}\n").as_bytes())?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    Ok((file, path))
}

/// A file of keys that goes again unless it is kept.
pub struct Keys(Option<PathBuf>);

impl Keys {
    /// What is written down needs it.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.0.iter().for_each(|file| drop(fs::remove_file(file)));
    }
}

/// Keys as s3fs keeps them, for their owner alone. One that is there is somebody's.
pub fn write_keys(file: &Path, key: &str, secret: &str) -> anyhow::Result<Keys> {
    let write = || -> io::Result<()> {
        fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))?;
        let mut new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
        new.write_all(format!("{key}:{secret}\n").as_bytes())?;
        new.sync_all()
    };
    match write() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            bail!("{}: is there already: remove it, or take another name", file.display())
        }
        written => written.with_context(|| format!("{}: cannot be written", file.display())).map(|()| Keys(Some(file.to_owned()))),
    }
}

/// The line by which mount(8) finds a named mount.
pub fn fstab_line(name: &str, folder: &Path) -> String {
    // fstab(5): blanks are octal, and so is what begins an escape.
    let folder = folder.display().to_string().replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011");
    // Systemd waits 90 s for an unmount by itself: uploads may take longer.
    format!("{name} {folder} packmule _netdev,nofail,x-systemd.mount-timeout=15min 0 0")
}

/// Adds a line to the fstab.
pub fn append_fstab(line: &str) -> anyhow::Result<()> {
    let add = || -> io::Result<()> {
        let mut fstab = OpenOptions::new().read(true).append(true).create(true).open(FSTAB)?;
        let mut old = String::new();
        fstab.read_to_string(&mut old)?;
        let gap = if old.is_empty() || old.ends_with('\n') { "" } else { "\n" };
        fstab.write_all(format!("{gap}{line}\n").as_bytes())?;
        fstab.sync_all()
    };
    add().with_context(|| format!("{FSTAB}: cannot be written"))
}

/// Has the user's systemd start a named mount at each login; writes the unit where the package has not brought it.
pub fn enable_unit(name: &str, environment: &Environment) -> anyhow::Result<()> {
    if !Path::new(PACKAGED).exists() {
        let config = environment.config_home().context("no home directory is known; set HOME")?;
        let (folder, program) = (config.join("systemd/user"), std::env::current_exe()?);
        let unit = unit_of(&program)?;
        let file = folder.join("packmule@.service");
        // One that is there is the user's own.
        if !file.exists() {
            fs::create_dir_all(&folder)
                .and_then(|()| fs::write(&file, unit))
                .with_context(|| format!("{}: cannot be written", file.display()))?;
        }
    }
    let unit = format!("packmule@{name}.service");
    let said = std::process::Command::new("systemctl").args(["--user", "enable", &unit]).output();
    match said {
        Ok(said) if said.status.success() => Ok(()),
        Ok(said) => bail!("systemctl --user enable {unit}: {}", String::from_utf8_lossy(&said.stderr).trim()),
        Err(error) => bail!("systemctl --user enable {unit}: {error}"),
    }
}

/// The packaged unit, of a program that lies elsewhere.
fn unit_of(program: &Path) -> anyhow::Result<String> {
    let program = program
        .to_str()
        .filter(|path| !path.contains(['%', '"', '\\', ' ']))
        .context("the program's own path has blanks or quotes in it, which no unit can name: move it")?;
    Ok(UNIT.replace("/usr/bin/packmule", program))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::Named;

    #[test]
    fn a_section_is_added_to_what_is_there() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("packmule.toml");
        let words = [("source", "s3://b1/a \"b\"/".to_owned()), ("mountpoint", "/srv/a\\b".to_owned())];
        let append = |section: &str| replace(&file, &with_section(&file, section).unwrap()).unwrap();
        append(&section("b1.example", &words));
        append(&section("two", &[("source", "s3://b2".to_owned())]));
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("\n\n[mount.two]\n") && text.starts_with("[mount.\"b1.example\"]\n"), "{text}");
        let mut environment = Environment::isolated(home.path());
        environment.variables.clear();
        let named = Named::all(&environment).unwrap();
        let names: Vec<&str> = named.iter().map(|named| named.name.as_str()).collect();
        assert_eq!(names, ["b1.example", "two"]);
        assert_eq!(
            (named[0].source.to_string().as_str(), named[0].mountpoint.as_deref()),
            ("s3://b1/a \"b\"/", Some(Path::new("/srv/a\\b")))
        );
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
        // A link that leads nowhere yet stays one.
        let link = home.path().join("link.toml");
        std::os::unix::fs::symlink("elsewhere.toml", &link).unwrap();
        replace(&link, "# text\n").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(home.path().join("elsewhere.toml")).unwrap(), "# text\n");
    }

    #[test]
    fn keys_are_their_owners_alone_and_replace_none() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("packmule/b.passwd");
        drop(write_keys(&file, "AKID", "secret").unwrap());
        assert!(!file.exists(), "nobody kept it");
        write_keys(&file, "AKID", "secret").unwrap().keep();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(write_keys(&file, "AKID", "other").is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "AKID:secret\n");
    }

    #[test]
    fn the_fstab_and_the_unit_name_what_is_meant() {
        assert_eq!(fstab_line("b", Path::new("/srv/a b")), "b /srv/a\\040b packmule _netdev,nofail,x-systemd.mount-timeout=15min 0 0");
        let unit = unit_of(Path::new("/opt/packmule/bin/packmule")).unwrap();
        assert!(unit.contains("ExecStart=/opt/packmule/bin/packmule mount") && !unit.contains("/usr/bin/packmule"), "{unit}");
        assert!(unit_of(Path::new("/opt/a b")).is_err());
    }
}
