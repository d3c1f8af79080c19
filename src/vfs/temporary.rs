//! Temporary names (promise 10): what programs write before they rename it to the name that is meant.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Ino, process};
use crate::glob::{self, matches_key};

/// Names that desktops look for in every directory: absent without a request, unless a listing holds them (promise 21).
const PROBES: &[&str] =
    &[".hidden", ".directory", ".sh_thumbnails", ".xdg-volume-info", "autorun.inf", ".Trash", ".autorun", "autorun", "autorun.sh"];
/// Programs whose `NAME.part` and `.NAME.XXXXXX` are temporary; from any other such names are ordinary files.
const PART_WRITERS: &[&str] =
    &["kioworker", "kioslave5", "kioslave", "kio", "dolphin", "firefox", "firefox-esr", "thunderbird", "librewolf"];
const RSYNC: &[&str] = &["rsync"];
const PART_NAMES: &str = "*.part";
/// `.NAME.XXXXXX`.
const RSYNC_NAMES: &str = ".*.??????";

/// Lock files and file managers' notes: not worth keeping beyond the mount.
const JUNK: &[&str] = &[".DS_Store", "Thumbs.db", "desktop.ini", "._*", ".~lock.*#"];

/// What a temporary name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Temporary {
    /// Its parts are sent to the name that it leads to before a close answers, at any size: Dolphin shows a failure then and not later.
    pub eager: bool,
    /// The name that it will probably be renamed to.
    pub leads_to: Option<String>,
}

/// GLib's: it has just opened the name that it will replace.
const GLIB: &str = ".goutputstream-";
/// How long after that open.
const JUST_OPENED: Duration = Duration::from_secs(2);
/// Opens that are remembered.
const OPENS_MOST: usize = 64;

/// Existing files that were opened for writing a moment ago: GLib's replacement of one follows (promise 10).
#[derive(Default)]
pub struct Opens {
    last: Mutex<VecDeque<(Instant, u32, Ino, OsString)>>,
}

impl Opens {
    /// A process opened `name` for writing, without O_TRUNC.
    pub fn note(&self, process: u32, parent: Ino, name: OsString) {
        let mut last = self.last.lock();
        last.truncate(OPENS_MOST - 1);
        last.push_front((Instant::now(), process, parent, name));
    }

    /// The name that a new file of the process replaces, if it is one of GLib's temporary ones.
    pub fn replaced_by(&self, process: u32, parent: Ino, new: &OsStr) -> Option<String> {
        new.to_str().filter(|new| new.starts_with(GLIB))?;
        let last = self.last.lock();
        let found = last.iter().find(|(at, by, dir, _)| at.elapsed() < JUST_OPENED && *by == process && *dir == parent);
        found.and_then(|(.., name)| name.to_str().map(str::to_owned))
    }
}

/// The mount's list of temporary names.
pub struct TemporaryNames {
    patterns: Vec<String>,
}

impl TemporaryNames {
    /// From the glob patterns of `ignore=`.
    pub fn new(patterns: &[String]) -> io::Result<Self> {
        let check = |pattern: &String| {
            if pattern.is_empty() || pattern.contains('/') {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("ignore={pattern}: a pattern is matched against one name: not empty, no slash"),
                ));
            }
            let wrong = |why| io::Error::new(io::ErrorKind::InvalidInput, format!("ignore={pattern}: {why}"));
            glob::check(pattern).map(|()| pattern.clone()).map_err(wrong)
        };
        Ok(Self { patterns: patterns.iter().map(check).collect::<io::Result<_>>()? })
    }

    /// What `name` is when the thread `pid` creates it; `None`: an ordinary file.
    pub fn classify(&self, name: &OsStr, pid: u32) -> Option<Temporary> {
        let name = name.to_str()?;
        let by = |programs: &[&str]| process::program(pid).iter().any(|program| programs.iter().any(|known| program.starts_with(known)));
        let mut matching = self.patterns.iter().filter(|pattern| matches_key(pattern, name));
        matching.find_map(|pattern| match pattern.as_str() {
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

    /// `.Trash` and `.Trash-UID` cannot be made: file managers then offer to delete (promise 21).
    pub fn is_trash(name: &OsStr) -> bool {
        name.to_str().is_some_and(|name| name == ".Trash" || name.starts_with(".Trash-"))
    }
}

/// A temporary name that ends with the mount.
pub fn is_junk(name: &str) -> bool {
    JUNK.iter().any(|pattern| matches_key(pattern, name))
}

/// `.NAME.XXXXXX`, as rsync writes it.
fn rsync_target(name: &str) -> Option<&str> {
    let (target, random) = name.strip_prefix('.')?.rsplit_once('.')?;
    (!target.is_empty() && random.len() == 6 && random.bytes().all(|b| b.is_ascii_alphanumeric())).then_some(target)
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
        assert!(TemporaryNames::new(&["a/b".into()]).is_err() && TemporaryNames::new(&["[a".into()]).is_err());
        assert!(is_junk("._x") && is_junk(".~lock.a.odt#") && !is_junk(".goutputstream-AB12"));
    }

    #[test]
    fn glib_replaces_what_it_has_just_opened() {
        let opens = Opens::default();
        opens.note(7, 1, "a.txt".into());
        opens.note(8, 1, "b.txt".into());
        assert_eq!(opens.replaced_by(7, 1, OsStr::new(".goutputstream-AB12")).as_deref(), Some("a.txt"));
        assert_eq!(opens.replaced_by(7, 2, OsStr::new(".goutputstream-AB12")), None, "another directory");
        assert_eq!(opens.replaced_by(7, 1, OsStr::new("c.txt")), None);
        (0..200).for_each(|process| opens.note(process, 1, "x".into()));
        assert_eq!(opens.last.lock().len(), OPENS_MOST);
    }
}
