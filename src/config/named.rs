//! Mounts that have a name in a config file: `packmule mount releases`.
//!
//! ```toml
//! [mount.releases]
//! source = "s3://releases/nightly/"
//! mountpoint = "/srv/releases"
//! profile = "release"
//! ```

use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::layers::{Environment, Text};
use super::{ConfigError, Source};

/// A `[mount.NAME]` section that says what it mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// NAME.
    pub name: String,
    /// `source=`.
    pub source: Source,
    /// `mountpoint=`.
    pub mountpoint: Option<PathBuf>,
}

/// Words of a section that are no options: they say what is mounted where.
pub(super) const PLACE: [&str; 2] = ["source", "mountpoint"];

impl Named {
    /// All of them, in the order of the files; of one name in two files each says of the second what it says.
    ///
    /// # Errors
    /// When a file is no TOML, or a section says what cannot be.
    pub fn all(environment: &Environment) -> Result<Vec<Self>, ConfigError> {
        let mut found: Vec<Self> = Vec::new();
        let mut placed = Vec::new();
        for (path, text) in environment.config_texts()? {
            let text = Text::new(&path, &text);
            let table = text.parse()?;
            let Some(DeValue::Table(sections)) = table.get_ref().get("mount").map(|value| value.get_ref()) else { continue };
            for (name, section) in sections.iter() {
                let DeValue::Table(section) = section.get_ref() else { continue };
                let (source, mountpoint) = place(&text, name.get_ref(), section)?;
                if mountpoint.is_some() {
                    placed.push((
                        name.get_ref().to_string(),
                        text.refuse(
                            name.span().start,
                            &format!("mount.{name} has a mountpoint and no source: say what is mounted there", name = name.get_ref()),
                        ),
                    ));
                }
                match (found.iter_mut().find(|known| known.name == name.get_ref().as_ref()), source) {
                    (Some(known), source) => {
                        known.source = source.unwrap_or_else(|| known.source.clone());
                        known.mountpoint = mountpoint.or_else(|| known.mountpoint.take());
                    }
                    (None, Some(source)) => found.push(Self { name: name.get_ref().to_string(), source, mountpoint }),
                    // The options of a source: its name is that.
                    (None, None) => {}
                }
            }
        }
        match placed.into_iter().find(|(name, _)| found.iter().all(|named| named.name != *name)) {
            Some((_, error)) => Err(error),
            None => Ok(found),
        }
    }

    /// The names of all `[mount.…]` sections, of sources too, as they are written.
    ///
    /// # Errors
    /// When a file is no TOML.
    pub fn sections(environment: &Environment) -> Result<Vec<String>, ConfigError> {
        let mut found = Vec::new();
        for (path, text) in environment.config_texts()? {
            let table = Text::new(&path, &text).parse()?;
            if let Some(DeValue::Table(sections)) = table.get_ref().get("mount").map(|value| value.get_ref()) {
                found.extend(sections.keys().map(|name| name.get_ref().to_string()));
            }
        }
        Ok(found)
    }

    /// The one of this name.
    ///
    /// # Errors
    /// As [`Named::all`].
    pub fn find(environment: &Environment, name: &str) -> Result<Option<Self>, ConfigError> {
        Ok(Self::all(environment)?.into_iter().find(|named| named.name == name))
    }
}

/// What a section says of [`PLACE`]. One that names a source is a name itself, which goes into the names of units.
pub(super) fn place(text: &Text<'_>, name: &str, section: &DeTable<'_>) -> Result<(Option<Source>, Option<PathBuf>), ConfigError> {
    let word = |key: &str| match section.get_key_value(key) {
        None => Ok(None),
        Some((at, value)) => match value.get_ref() {
            DeValue::String(value) => Ok(Some((at.span().start, value.to_string()))),
            _ => Err(text.refuse(at.span().start, &format!("{key}: expected a text, in quotes"))),
        },
    };
    let source = match word("source")? {
        None => None,
        Some((at, _)) if !is_name(name) => {
            let why =
                format!("mount.\"{name}\" has a source: its own name is then letters, digits, '-', '_' and '.' such as [mount.releases]");
            return Err(text.refuse(at, &why));
        }
        Some((at, source)) => Some(Source::parse(&source).map_err(|error| text.refuse(at, &format!("source={error}")))?),
    };
    let mountpoint = match word("mountpoint")? {
        None => None,
        Some((_, path)) if path.starts_with('/') || path.starts_with("~/") => Some(PathBuf::from(path)),
        Some((at, path)) => return Err(text.refuse(at, &format!("mountpoint={path}: expected a path that begins with / or ~/"))),
    };
    Ok((source, mountpoint))
}

/// Nothing that a path, a source, systemd's escaping or a shell takes for something else.
pub fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(['-', '.'])
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// The mountpoint of a mount that is named, where `typed` is a name.
///
/// # Errors
/// As [`Named::all`].
pub fn mountpoint_of(typed: &Path, environment: &Environment) -> Result<Option<PathBuf>, ConfigError> {
    let Some(name) = typed.to_str().filter(|name| is_name(name)) else { return Ok(None) };
    let mountpoint = Named::find(environment, name)?.and_then(|named| named.mountpoint);
    mountpoint.map(|mountpoint| super::resolve::absolute(mountpoint, environment)).transpose()
}

/// The name that mount(8) meant: it makes a path of the fstab's first field where there is a file of that name, and no source begins
/// with `/`.
///
/// # Errors
/// As [`Named::all`].
pub fn name_of_path(source: &str, environment: &Environment) -> Result<Option<String>, ConfigError> {
    let last = Path::new(source).file_name().and_then(|name| name.to_str()).filter(|name| source.starts_with('/') && is_name(name));
    let Some(name) = last else { return Ok(None) };
    Ok(Named::find(environment, name)?.map(|named| named.name))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::{Config, Invocation};

    fn environment(system: &str, user: &str) -> (tempfile::TempDir, Environment) {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(home.path().join(".config/packmule")).unwrap();
        std::fs::write(home.path().join("packmule.toml"), system).unwrap();
        std::fs::write(home.path().join(".config/packmule/config.toml"), user).unwrap();
        let mut environment = Environment::isolated(home.path());
        environment.variables.clear();
        (home, environment)
    }

    fn load(environment: &Environment, source: &str, mountpoint: &str) -> Result<Config, String> {
        Config::load(&Invocation::new(source, mountpoint, "metadata_ttl=7"), environment).map_err(|error| error.to_string())
    }

    const SYSTEM: &str = r#"
region = "eu-central-1"
[prices]
put = 0.01
get = 0.001
out = 0
currency = "EUR"
[mount."s3://releases/"]
retries = 9
[mount.releases]
source = "s3://releases/nightly"
mountpoint = "/srv/releases"
write_back = "5s"
[mount."s3://releases/nightly/"]
ro = true
write_back = "9s"
[mount.releases.prices]
get = 0.002
[[header_rules]]
match = "*.html"
cache_control = "no-cache"
[[mount.releases.header_rules]]
match = "*.html"
cache_control = "max-age=60"
"#;

    #[test]
    fn a_name_brings_source_place_and_options() {
        let (_home, environment) = environment(SYSTEM, "[mount.releases]\nmountpoint = \"~/releases\"\nretries = 3\n");
        let config = load(&environment, "releases", "").unwrap();
        assert_eq!(config.source.to_string(), "s3://releases/nightly/");
        assert_eq!(config.mountpoint, environment.home.clone().unwrap().canonicalize().unwrap().join("releases"));
        assert_eq!((config.write_back.as_secs(), config.client.retries, config.metadata_ttl.as_secs()), (5, 3, 7));
        assert_eq!((config.prices.put, config.prices.get, config.prices.currency.as_deref()), (Some(0.01), Some(0.002), Some("EUR")));
        assert!(config.mount.ro, "options of the address, whoever mounts it");
        assert_eq!(config.fsname, "releases", "mount(8) looks for what the fstab says");
        assert_eq!(config.rules.len(), 2);
        assert_eq!(load(&environment, "releases", "/elsewhere").unwrap().mountpoint, Path::new("/elsewhere"));
        // The same bucket by its address: no name, so the section of the address.
        let config = load(&environment, "s3://releases/", "/m").unwrap();
        assert_eq!((config.write_back.as_secs(), config.client.retries, config.rules.len()), (0, 9, 1));
        // Any other is a bucket.
        assert_eq!(load(&environment, "other", "/m").unwrap().source.to_string(), "s3://other/");
        assert!(load(&environment, "other", "").unwrap_err().contains("no mountpoint"));
        assert_eq!(mountpoint_of(Path::new("releases"), &environment).unwrap(), Some(environment.home.clone().unwrap().join("releases")));
        assert_eq!(mountpoint_of(Path::new("other"), &environment).unwrap(), None);
        assert_eq!(mountpoint_of(Path::new("/releases"), &environment).unwrap(), None);
        assert_eq!(name_of_path("/srv/releases", &environment).unwrap().as_deref(), Some("releases"));
        assert_eq!(name_of_path("/srv/other", &environment).unwrap(), None);
        assert_eq!(name_of_path("releases", &environment).unwrap(), None);
        assert_eq!(Named::sections(&environment).unwrap(), ["releases", "s3://releases/", "s3://releases/nightly/", "releases"]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, part) in [
            ("[mount.\"a/b\"]\nsource = \"s3://b1\"\n", "packmule.toml:2: mount.\"a/b\" has a source"),
            ("[mount.x1]\nsource = \"https://b\"\n", "packmule.toml:2: source=https://b: is not an S3 source"),
            ("[mount.x1]\nsource = 3\n", "packmule.toml:2: source: expected a text"),
            ("[mount.x1]\nsource = \"b1\"\nmountpoint = \"srv\"\n", "packmule.toml:3: mountpoint=srv: expected a path"),
            ("[mount.x1]\nsource = \"b1\"\nretrys = 3\n", "packmule.toml:3: unknown option 'retrys'; the nearest is retries"),
            ("[mount.x1]\nmountpoint = \"/srv\"\n", "packmule.toml:1: mount.x1 has a mountpoint and no source"),
            ("source = \"b1\"\n", "packmule.toml:1: source: belongs into a section [mount.NAME]"),
            ("[prices]\nputt = 3\n", "packmule.toml:2: prices.putt is no price; prices are put, get, out and currency"),
            ("[prices]\nput = \"x\"\n", "packmule.toml:2: price_put=x: expected"),
            ("[[header_rules]]\nmatch = '[a'\n", "packmule.toml:2: match '[a': a [ is not closed"),
            ("[mount.x1]\nsource = 'b1'\n[[mount.x1.header_rules]]\nmach = 'a'\n", "packmule.toml:4: unknown field `mach`"),
            ("header_rules = [1]\n", "packmule.toml:1: "),
        ] {
            let (_home, environment) = environment(text, "");
            let message = load(&environment, "releases", "/m").unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
}
