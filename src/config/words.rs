//! The one parser of options: `-o a,b=c`, `--a --b=c`, `PACKMULE_B=c` and `b = "c"` all end in [`Typed::word`].

use std::fmt;
use std::path::PathBuf;

use url::Url;

use super::table::{self, Kind, Opt};
use super::typed::Typed;
use super::{ConfigError, values};

/// Where a word came from: messages name it, and secrets are judged by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line or the fstab.
    Arguments,
    /// An environment variable of this name.
    Environment(String),
    /// A line of a config file.
    File(PathBuf, usize),
}

impl Typed {
    /// Takes mount(8)'s `-o` argument: words joined by commas; a value with commas is quoted (`a="b,c"`) or has them
    /// escaped (`a=b\,c`). With `sloppy` (mount -s) unknown words are ignored.
    pub fn options(&mut self, text: &str, sloppy: bool) -> Result<(), ConfigError> {
        for word in split_options(text)? {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word.as_str(), None),
            };
            match self.word(name, value, &Origin::Arguments) {
                Err(error) if sloppy && error.unknown_word => self.ignored.push(name.to_owned()),
                other => other?,
            }
        }
        Ok(())
    }

    /// Takes one word, `_` and `-` alike, with its value if one came.
    pub fn word(&mut self, typed: &str, value: Option<&str>, origin: &Origin) -> Result<(), ConfigError> {
        if typed.starts_with("x-") || typed.starts_with("X-") {
            return Ok(());
        }
        let name = typed.replace('-', "_");
        let Some((option, unit)) = table::find(&name) else {
            return self.foreign(typed, &name, origin);
        };
        if *origin == Origin::Arguments {
            self.given.push(option.name);
        }
        self.set(option, unit, &name, value, origin)
    }

    fn foreign(&mut self, typed: &str, name: &str, origin: &Origin) -> Result<(), ConfigError> {
        if table::TUNING.iter().any(|(word, _)| *word == name) {
            self.ignored.push(typed.to_owned());
            return Ok(());
        }
        if table::SECRETS.contains(&name) {
            return Err(ConfigError::new(format!(
                "{}{typed}: secrets are not options, everybody could read them; put them into ~/.aws/credentials or a passwd_file, or into the environment",
                At(origin)
            )));
        }
        let nearest = nearest(name);
        let mut error = ConfigError::new(format!("{}unknown option '{typed}'; the nearest is {nearest}", At(origin)));
        error.unknown_word = true;
        Err(error)
    }

    fn set(&mut self, option: &Opt, unit: u64, name: &str, value: Option<&str>, origin: &Origin) -> Result<(), ConfigError> {
        let refuse = |accepts: &str| {
            let shown = match value {
                Some(value) => format!("={}", without_password(value)),
                None => String::new(),
            };
            let name = match origin {
                Origin::Environment(variable) => variable.as_str(),
                _ => name,
            };
            ConfigError::new(format!("{}{name}{shown}: expected {accepts}", At(origin)))
        };
        let given = value.map(str::trim).filter(|value| !value.is_empty());
        let refused = || refuse(&accepts(&option.kind));
        match option.kind {
            Kind::Nothing => {}
            Kind::Flag(set) => set(self, values::flag(value.unwrap_or_default().trim()).ok_or_else(refused)?),
            Kind::Size(set) => set(self, given.and_then(|v| values::size(v, unit)).ok_or_else(refused)?),
            Kind::SizeOr(word, set) => match given.ok_or_else(refused)? {
                v if v.eq_ignore_ascii_case(word) => set(self, None),
                v => set(self, Some(values::size(v.strip_suffix("/s").unwrap_or(v), unit).ok_or_else(refused)?)),
            },
            Kind::Share(set) => set(self, given.and_then(|v| values::amount(v, unit)).ok_or_else(refused)?),
            Kind::Time(set) => set(self, given.and_then(values::time).ok_or_else(refused)?),
            Kind::Count(least, most, set) => {
                set(self, given.and_then(values::count).filter(|n| (least..=most).contains(n)).ok_or_else(refused)?);
            }
            Kind::Price(set) => set(self, given.and_then(values::price).ok_or_else(refused)?),
            Kind::Octal(set) => set(self, given.and_then(values::octal).ok_or_else(refused)?),
            Kind::Path(set) => set(self, PathBuf::from(given.ok_or_else(refused)?)),
            Kind::Url(set) => {
                let url = given.and_then(address).ok_or_else(refused)?;
                if url.password().is_some() && *origin == Origin::Arguments {
                    return Err(refuse(
                        "an address without a password, everybody could read it; put it into the config file or HTTPS_PROXY",
                    ));
                }
                set(self, url);
            }
            Kind::Choice(words, set) => {
                let place = given.and_then(|v| words.iter().position(|word| word.eq_ignore_ascii_case(v)));
                set(self, place.ok_or_else(refused)?);
            }
            Kind::Text { missing, set, .. } => given.or(missing).and_then(|v| set(self, v)).ok_or_else(refused)?,
        }
        Ok(())
    }
}

/// What a kind of option takes, for messages and documents.
pub fn accepts(kind: &Kind) -> String {
    match kind {
        Kind::Flag(_) => "yes or no".into(),
        Kind::Size(_) => "a size such as 512M or 20G".into(),
        Kind::SizeOr(word, _) => format!("a size such as 512M or 20G, or {word}"),
        Kind::Share(_) => "a size such as 512M or 20G, or a share of the disk such as 10%".into(),
        Kind::Time(_) => "a time such as 30s, 5m or 1h30m".into(),
        Kind::Count(least, u64::MAX, _) => format!("a whole number from {least}"),
        Kind::Count(least, most, _) => format!("a whole number from {least} to {most}"),
        Kind::Price(_) => "an amount such as 0.005".into(),
        Kind::Octal(_) => "an octal mode such as 0644".into(),
        Kind::Path(_) => "a path".into(),
        Kind::Url(_) => "an address such as https://s3.example.org:9000".into(),
        Kind::Choice(words, _) => match words.split_last() {
            Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
            _ => words.concat(),
        },
        Kind::Text { accepts, .. } => (*accepts).into(),
        Kind::Nothing => "anything".into(),
    }
}

/// Our word that differs least from an unknown one.
pub fn nearest(name: &str) -> &'static str {
    let mut best = ("", usize::MAX);
    for word in table::words() {
        let distance = strsim::damerau_levenshtein(name, word);
        if distance < best.1 {
            best = (word, distance);
        }
    }
    best.0
}

/// An http(s) URL with a host.
fn address(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let fits = matches!(url.scheme(), "http" | "https") && url.has_host() && url.query().is_none() && url.fragment().is_none();
    fits.then_some(url)
}

/// A value as messages may show it.
fn without_password(value: &str) -> String {
    match (value.find("://"), value.rfind('@')) {
        (Some(start), Some(at)) if start < at => format!("{}***{}", &value[..start + 3], &value[at..]),
        _ => value.to_owned(),
    }
}

/// Cuts an `-o` argument at its commas; quotes and backslashes are taken off.
fn split_options(text: &str) -> Result<Vec<String>, ConfigError> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let escaped = if c == '\\' { chars.next_if(|next| matches!(next, ',' | '\\' | '"')) } else { None };
        match (escaped, c) {
            (None, '"') => quoted = !quoted,
            (None, ',') if !quoted => words.push(String::new()),
            (literal, _) => {
                if let Some(word) = words.last_mut() {
                    word.push(literal.unwrap_or(c));
                }
            }
        }
    }
    if quoted {
        return Err(ConfigError::new(format!("-o {text}: a quote is not closed; write NAME=\"VALUE,VALUE\"")));
    }
    words.retain(|word| !word.is_empty());
    Ok(words)
}

/// Prefix of a message: file and line.
struct At<'a>(&'a Origin);

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Origin::File(path, line) => write!(f, "{}:{line}: ", path.display()),
            Origin::Arguments | Origin::Environment(_) => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "words_tests.rs"]
mod tests;
