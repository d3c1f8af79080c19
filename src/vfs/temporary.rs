//! Temporary names (semantics 10): what programs write before they rename it to the name that is meant.

use std::ffi::OsStr;
use std::io;

use super::process;

/// Names that desktops look for in every directory: absent without a request, unless a listing holds them (semantics 21).
const PROBES: &[&str] =
    &[".hidden", ".directory", ".sh_thumbnails", ".xdg-volume-info", "autorun.inf", ".Trash", ".autorun", "autorun", "autorun.sh"];
/// Programs whose `NAME.part` and `.NAME.XXXXXX` are temporary; from any other such names are ordinary files.
const PART_WRITERS: &[&str] =
    &["kioworker", "kioslave5", "kioslave", "kio", "dolphin", "firefox", "firefox-esr", "thunderbird", "librewolf"];
const RSYNC: &[&str] = &["rsync"];
const PART_NAMES: &str = "*.part";
/// `.NAME.XXXXXX`.
const RSYNC_NAMES: &str = ".*.??????";

/// What a temporary name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Temporary {
    /// Its parts are sent to the name that it leads to before a close answers, at any size: Dolphin shows a failure then and not later.
    pub eager: bool,
    /// The name that it will probably be renamed to.
    pub leads_to: Option<String>,
}

/// The mount's list of temporary names.
pub struct TemporaryNames {
    patterns: Vec<Pattern>,
}

struct Pattern {
    text: String,
}

impl TemporaryNames {
    /// From the glob patterns of `ignore=`: `*` any run, `?` one character.
    pub fn new(patterns: &[String]) -> io::Result<Self> {
        let check = |pattern: &String| {
            if pattern.is_empty() || pattern.contains('/') {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("ignore={pattern}: a pattern is matched against one name: not empty, no slash"),
                ));
            }
            Ok(Pattern { text: pattern.clone() })
        };
        Ok(Self { patterns: patterns.iter().map(check).collect::<io::Result<_>>()? })
    }

    /// What `name` is when the thread `pid` creates it; `None`: an ordinary file.
    pub fn classify(&self, name: &OsStr, pid: u32) -> Option<Temporary> {
        let name = name.to_str()?;
        let by = |programs: &[&str]| process::program(pid).iter().any(|program| programs.iter().any(|known| program.starts_with(known)));
        let matching = self.patterns.iter().filter(|pattern| glob(pattern.text.as_bytes(), name.as_bytes()));
        matching.map(|pattern| pattern.text.as_str()).find_map(|pattern| match pattern {
            RSYNC_NAMES => {
                let leads_to = rsync_target(name).filter(|_| by(RSYNC))?;
                Some(Temporary { eager: false, leads_to: Some(leads_to.to_owned()) })
            }
            PART_NAMES => {
                let leads_to = name.strip_suffix(".part").filter(|_| by(PART_WRITERS))?;
                Some(Temporary { eager: true, leads_to: Some(leads_to.to_owned()) })
            }
            _ => Some(Temporary { eager: false, leads_to: name.strip_suffix(".crdownload").map(str::to_owned) }),
        })
    }

    /// A name that desktops probe for.
    pub fn is_probe(&self, name: &OsStr) -> bool {
        name.to_str().is_some_and(|name| PROBES.contains(&name) || name.starts_with(".Trash-"))
    }

    /// `.Trash` and `.Trash-UID` cannot be made: file managers then offer to delete (semantics 21).
    pub fn is_trash(name: &OsStr) -> bool {
        name.to_str().is_some_and(|name| name == ".Trash" || name.starts_with(".Trash-"))
    }
}

/// `.NAME.XXXXXX`, as rsync writes it.
fn rsync_target(name: &str) -> Option<&str> {
    let (target, random) = name.strip_prefix('.')?.rsplit_once('.')?;
    (!target.is_empty() && random.len() == 6 && random.bytes().all(|b| b.is_ascii_alphanumeric())).then_some(target)
}

fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|at| glob(rest, &text[at..])),
        Some((b'?', rest)) => text.split_first().is_some_and(|(_, text)| glob(rest, text)),
        Some((byte, rest)) => text.split_first().is_some_and(|(first, text)| first == byte && glob(rest, text)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_temporary_by_pattern_and_writer() {
        let names = TemporaryNames::new(&[".goutputstream-*", "*.part", "._*", ".*.??????"].map(String::from)).unwrap();
        let me = std::process::id();
        let classify = |name: &str| names.classify(OsStr::new(name), me);
        assert_eq!(classify(".goutputstream-AB12"), Some(Temporary { eager: false, leads_to: None }));
        assert_eq!(classify("._x"), Some(Temporary { eager: false, leads_to: None }));
        assert_eq!(classify(".x.my-key"), None, "matches rsync's pattern, and is none of its names");
        assert_eq!(classify("setup.exe"), None);
        assert_eq!(classify("setup.part"), None, "this program is no file manager");
        assert_eq!(classify(".setup.exe.aB3dE6"), None, "nor rsync");
        assert_eq!(rsync_target(".setup.exe.aB3dE6"), Some("setup.exe"));
        assert!(TemporaryNames::new(&["a/b".into()]).is_err());
    }
}
