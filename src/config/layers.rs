//! Where options come from besides the command line: config files, the environment, and the AWS CLI's own config.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::typed::Typed;
use super::words::{Origin, nearest};
use super::{ConfigError, Named, Source, named, table};
use crate::publish::headers;

/// What this process inherits, in one place, so that tests can say it.
#[derive(Clone, Debug)]
pub struct Environment {
    /// Environment variables.
    pub variables: BTreeMap<String, String>,
    /// True for uid 0: state and cache of root live under /var.
    pub root: bool,
    /// Home directory: `$HOME`, else the one of passwd (boots and cron jobs have no HOME).
    pub home: Option<PathBuf>,
    /// The machine's config file.
    pub system_config: PathBuf,
    /// What a config file would say that is about to be written.
    pub draft: Option<(PathBuf, String)>,
}

impl Environment {
    /// The environment of this process.
    pub fn of_process() -> Self {
        let uid = nix::unistd::geteuid();
        let variables: BTreeMap<String, String> =
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
        let home = match variables.get("HOME").filter(|home| !home.is_empty()) {
            Some(home) => Some(PathBuf::from(home)),
            None => nix::unistd::User::from_uid(uid).ok().flatten().map(|user| user.dir),
        };
        Self { variables, root: uid.is_root(), home, system_config: "/etc/packmule.toml".into(), draft: None }
    }

    /// No files, no variables but these, and a home of its own: for `demo` and tests, which must not depend on the
    /// user's settings.
    pub fn isolated(home: &Path) -> Self {
        let variables = BTreeMap::from([("PACKMULE_CONFIG".to_owned(), String::new())]);
        Self { variables, root: false, home: Some(home.to_owned()), system_config: home.join("packmule.toml"), draft: None }
    }

    /// A variable that is set and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// `$XDG_…_HOME/packmule` where set, `/var/…/packmule` for root, else below the home directory.
    pub fn directory(&self, xdg: &str, of_root: &str, below_home: &str) -> Result<PathBuf, ConfigError> {
        // The XDG specification: a relative path is invalid and to be ignored.
        if let Some(parent) = self.get(xdg).map(Path::new).filter(|path| path.is_absolute()) {
            return Ok(parent.join("packmule"));
        }
        if self.root {
            return Ok(of_root.into());
        }
        let home = self.home.as_ref().ok_or_else(|| ConfigError::new(format!("no home directory is known; set HOME or {xdg}")))?;
        Ok(home.join(below_home))
    }

    /// Where this user's programs have their settings: `$XDG_CONFIG_HOME`, else `~/.config`.
    pub fn config_home(&self) -> Option<PathBuf> {
        let named = self.get("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        named.or_else(|| self.home.as_ref().map(|home| home.join(".config")))
    }

    /// Config files, the weaker first. `PACKMULE_CONFIG` names the only one; empty, there is none.
    pub fn config_files(&self) -> Vec<(PathBuf, bool)> {
        if let Some(file) = self.variables.get("PACKMULE_CONFIG") {
            return if file.is_empty() { Vec::new() } else { vec![(file.into(), true)] };
        }
        let user = self.config_home().map(|parent| parent.join("packmule/config.toml"));
        std::iter::once(self.system_config.clone()).chain(user).map(|path| (path, false)).collect()
    }
}

/// A config file: its messages name it and the line.
pub(super) struct Text<'a> {
    path: &'a Path,
    text: &'a str,
}

impl<'a> Text<'a> {
    pub(super) fn new(path: &'a Path, text: &'a str) -> Self {
        Self { path, text }
    }

    pub(super) fn parse(&self) -> Result<Spanned<DeTable<'a>>, ConfigError> {
        DeTable::parse(self.text).map_err(|error| self.refuse(error.span().map_or(0, |span| span.start), error.message()))
    }

    fn line(&self, offset: usize) -> usize {
        self.text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
    }

    /// `FILE:LINE: why`.
    pub(super) fn refuse(&self, offset: usize, why: &str) -> ConfigError {
        ConfigError::new(format!("{}:{}: {why}", self.path.display(), self.line(offset)))
    }

    fn origin(&self, offset: usize) -> Origin {
        Origin::File(self.path.to_owned(), self.line(offset))
    }
}

impl Environment {
    /// The config files that are there, the weaker first.
    pub(super) fn config_texts(&self) -> Result<Vec<(PathBuf, String)>, ConfigError> {
        let mut found = Vec::new();
        for (path, named) in self.config_files() {
            if let Some((_, text)) = self.draft.as_ref().filter(|(draft, _)| *draft == path) {
                found.push((path, text.clone()));
                continue;
            }
            match std::fs::read_to_string(&path) {
                Ok(text) => found.push((path, text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound && !named => {}
                Err(error) => {
                    return Err(ConfigError::new(format!("{}: {error}; mend the config file or set PACKMULE_CONFIG", path.display())));
                }
            }
        }
        Ok(found)
    }
}

/// Whose sections are wanted.
#[derive(Clone, Copy, Debug)]
pub enum Of<'a> {
    /// What every mount shares.
    All,
    /// A source, by its address.
    Source(&'a Source),
    /// A mount with a name: its own section counts more than those of its source.
    Name(&'a Named),
}

impl Typed {
    /// The options below the command line's: config files, then the environment. `of` picks the `[mount.…]` sections.
    pub fn inherited(environment: &Environment, of: Of<'_>) -> Result<Self, ConfigError> {
        let mut typed = Self::default();
        let names = Named::all(environment)?;
        for (path, text) in environment.config_texts()? {
            typed.file(&path, &text, of, &names)?;
        }
        typed.variables(environment)?;
        Ok(typed)
    }

    /// One config file: options at the top are every mount's, `[mount."s3://bucket/"]` those of one source, `[mount.NAME]` with a
    /// `source` those of a mount with a name. `names`: what other files name too; their sections here are of those.
    pub fn file(&mut self, path: &Path, text: &str, of: Of<'_>, names: &[Named]) -> Result<(), ConfigError> {
        let text = Text::new(path, text);
        let table = text.parse()?;
        let mut sections = Vec::new();
        for (key, offset, value) in self.section(&text, table.get_ref(), false)? {
            if key != "mount" {
                let why = format!(
                    "{key} is no option and no section; sections are [mount.NAME], [mount.\"s3://BUCKET/\"], [prices] and [[header_rules]]"
                );
                return Err(text.refuse(offset, &why));
            }
            for (name, section) in value.iter() {
                let offset = name.span().start;
                let name = name.get_ref().as_ref();
                let DeValue::Table(options) = section.get_ref() else {
                    return Err(text.refuse(offset, &format!("mount.{name} is no table; write [mount.{name}]")));
                };
                let (source, _) = named::place(&text, name, options)?;
                // A name's own section is taken after that of its address: the last word counts.
                let is_named = source.is_some() || names.iter().any(|named| named.name == name);
                let (by_address, by_name) = match (of, is_named) {
                    (Of::Name(wanted), true) => (false, wanted.name == name),
                    (_, true) => (false, false),
                    (of, false) => {
                        let address = Source::parse(name).map_err(|error| text.refuse(offset, &error.to_string()))?;
                        let by_address = match of {
                            Of::All => false,
                            Of::Source(wanted) => *wanted == address,
                            Of::Name(wanted) => wanted.source == address,
                        };
                        (by_address, false)
                    }
                };
                sections.push((by_address || by_name, by_name, options));
            }
        }
        sections.sort_by_key(|(_, by_name, _)| *by_name);
        for (wanted, _, options) in sections {
            let mut unused = Self::default();
            // Every section is checked, whichever is used.
            let target = if wanted { &mut *self } else { &mut unused };
            if let Some((key, offset, _)) = target.section(&text, options, true)?.first() {
                return Err(text.refuse(*offset, &format!("{key} is no option; the nearest is {}", nearest(key))));
            }
        }
        Ok(())
    }

    /// Takes the options of a table, in the order of the file so that of two errors the first is named; answers the
    /// tables in it that are none of options.
    fn section<'t, 'i>(
        &mut self,
        text: &Text<'_>,
        table: &'t DeTable<'i>,
        of_mount: bool,
    ) -> Result<Vec<(&'t str, usize, &'t DeTable<'i>)>, ConfigError> {
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        let mut tables = Vec::new();
        for (key, value) in entries {
            let (name, offset) = (key.get_ref().as_ref(), key.span().start);
            match value.get_ref() {
                DeValue::Table(prices) if name == "prices" => self.prices(text, prices)?,
                DeValue::Table(table) => tables.push((name, offset, table)),
                DeValue::Array(_) if name == "header_rules" => {
                    let rules = headers::rules(value).map_err(|(at, why)| text.refuse(if at == 0 { offset } else { at }, &why))?;
                    self.rules.extend(rules);
                }
                _ if named::PLACE.contains(&name) && of_mount => {}
                _ if named::PLACE.contains(&name) => {
                    return Err(text.refuse(offset, &format!("{name}: belongs into a section [mount.NAME]")));
                }
                value => self.word(name, Some(&scalar(value).unwrap_or_default()), &text.origin(offset))?,
            }
        }
        Ok(tables)
    }

    /// `[prices]`: what `price_put`, `price_get`, `price_out` and `currency` say, as a table.
    fn prices(&mut self, text: &Text<'_>, table: &DeTable<'_>) -> Result<(), ConfigError> {
        for (key, value) in table.iter() {
            let (name, offset) = (key.get_ref().as_ref(), key.span().start);
            let option = match name {
                "put" | "get" | "out" => format!("price_{name}"),
                "currency" => name.to_owned(),
                _ => return Err(text.refuse(offset, &format!("prices.{name} is no price; prices are put, get, out and currency"))),
            };
            self.word(&option, Some(&scalar(value.get_ref()).unwrap_or_default()), &text.origin(offset))?;
        }
        Ok(())
    }

    fn variables(&mut self, environment: &Environment) -> Result<(), ConfigError> {
        // AWS's own first: ours override them.
        let mut aws = |variable: &str, option: &str| match environment.get(variable) {
            Some(value) => self.word(option, Some(value), &Origin::Environment(variable.into())).map(|()| true),
            None => Ok(false),
        };
        if environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS") != Some("true") && !aws("AWS_ENDPOINT_URL_S3", "endpoint_url")? {
            aws("AWS_ENDPOINT_URL", "endpoint_url")?;
        }
        if !aws("AWS_REGION", "region")? {
            aws("AWS_DEFAULT_REGION", "region")?;
        }
        aws("AWS_CA_BUNDLE", "ca_bundle")?;
        aws("AWS_USE_DUALSTACK_ENDPOINT", "dual_stack")?;
        // botocore: keys in the environment win over a profile of the environment (not over one that was typed).
        if environment.get("AWS_ACCESS_KEY_ID").is_none() {
            aws("AWS_PROFILE", "profile")?;
        }
        for (variable, value) in &environment.variables {
            let Some(name) = variable.strip_prefix("PACKMULE_").map(str::to_ascii_lowercase) else { continue };
            // Other PACKMULE_ variables are no options (PACKMULE_CONFIG) or somebody else's.
            if table::find(&name).is_some() {
                self.word(&name, Some(value), &Origin::Environment(variable.clone()))?;
            }
        }
        Ok(())
    }
}

/// A TOML value as the parser of words takes it; lists are joined by commas. `None` for tables.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    Some(match value {
        DeValue::String(text) => text.to_string(),
        // 0o644 stays octal, which only modes take.
        DeValue::Integer(number) if number.radix() == 8 => format!("0o{}", number.as_str()),
        DeValue::Integer(number) => match number.radix() {
            10 => number.as_str().to_owned(),
            radix => i128::from_str_radix(number.as_str(), radix).ok()?.to_string(),
        },
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        DeValue::Datetime(date) => date.to_string(),
        DeValue::Array(items) => items.iter().map(|item| scalar(item.get_ref())).collect::<Option<Vec<_>>>()?.join(","),
        DeValue::Table(_) => return None,
    })
}
