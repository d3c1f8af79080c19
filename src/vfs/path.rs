//! Names and keys: which file name a key segment shows as, and which segment a name means.
//!
//! A *segment* is what stands between two slashes of a key; a *name* is what a directory shows. They are the same bytes
//! wherever POSIX allows it. Where it does not, the name is an escape that begins with the introducer `%s3`:
//!
//! | segment | name |
//! |---|---|
//! | empty, `.`, `..`, with a NUL, beginning with `%s3` or ending in `%s3file` | `%s3:` + the segment, percent-encoded where needed |
//! | over 255 bytes | `%s3+` + its beginning + `~` + 16 hex digits of its SHA-256 |
//! | an object `a` beside a directory `a/` | `a%s3file` |
//!
//! In the other direction a local name that is not UTF-8 becomes the segment `%s3:` + percent-encoded bytes, and shows as
//! given. The mapping is a bijection: a segment that merely looks like an escape is itself escaped.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use sha2::{Digest, Sha256};

use super::error::{Error, Result};

/// Begins (or, for a hidden file, ends) every name that is not its segment.
const INTRODUCER: &str = "%s3";
const ESCAPED: &str = "%s3:";
const SHORTENED: &str = "%s3+";
/// Marks an object that a directory of the same name hides.
const HIDDEN: &str = "%s3file";
/// Longest file name that Linux takes (`NAME_MAX`).
pub const NAME_MAX: usize = 255;
/// Longest key that S3 takes, in bytes of UTF-8.
pub const KEY_MAX: usize = 1024;
/// Bytes of the segment that a shortened name begins with: leaves room for introducer, `~` and hash within [`NAME_MAX`].
const SHORTENED_KEEP: usize = 180;

/// What a name means in the directory that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// The segment of a file or a directory.
    Segment(String),
    /// The object that a directory of the same segment hides.
    Hidden(String),
    /// The one segment that begins so and whose shortened name this is: a listing tells which.
    Shortened {
        /// What the segment begins with.
        prefix: String,
    },
}

/// The name that shows `segment`.
pub fn name_of(segment: &str) -> OsString {
    if let Some(bytes) = foreign_bytes(segment) {
        return OsString::from_vec(bytes);
    }
    let strange = segment.is_empty()
        || segment == "."
        || segment == ".."
        || segment.contains('\0')
        || segment.starts_with(INTRODUCER)
        || segment.ends_with(HIDDEN);
    if strange {
        let name = format!("{ESCAPED}{}", percent_encode(segment.as_bytes(), |b| matches!(b, b'%' | b'/' | 0)));
        if name.len() <= NAME_MAX {
            return name.into();
        }
    } else if segment.len() <= NAME_MAX {
        return segment.into();
    }
    shortened(segment).into()
}

/// The name that shows the object `segment` beside a directory of that segment.
pub fn hidden_name_of(segment: &str) -> OsString {
    let mut name = name_of(segment);
    if name.len() + HIDDEN.len() > NAME_MAX {
        name = shortened(segment).into();
    }
    name.push(HIDDEN);
    name
}

/// What `name` means. [`Error::Invalid`] for a name that begins like an escape and is none, [`Error::NameTooLong`] over 255 bytes.
pub fn meaning_of(name: &OsStr) -> Result<Meaning> {
    if name.len() > NAME_MAX {
        return Err(Error::NameTooLong);
    }
    let Some(text) = name.to_str() else {
        return Ok(Meaning::Segment(format!(
            "{ESCAPED}{}",
            percent_encode(name.as_bytes(), |b| b >= 0x80 || matches!(b, b'%' | b'/' | 0))
        )));
    };
    if let Some(shown) = text.strip_suffix(HIDDEN) {
        return match meaning_of(OsStr::new(shown))? {
            Meaning::Segment(segment) => Ok(Meaning::Hidden(segment)),
            Meaning::Shortened { prefix } => Ok(Meaning::Shortened { prefix }),
            Meaning::Hidden(_) => Err(Error::Invalid),
        };
    }
    if let Some(rest) = text.strip_prefix(SHORTENED) {
        let (prefix, hash) = rest.rsplit_once('~').ok_or(Error::Invalid)?;
        return if hash.len() == 16 { Ok(Meaning::Shortened { prefix: prefix.to_owned() }) } else { Err(Error::Invalid) };
    }
    if let Some(encoded) = text.strip_prefix(ESCAPED) {
        let segment = percent_decode(encoded).and_then(|bytes| String::from_utf8(bytes).ok()).ok_or(Error::Invalid)?;
        return if name_of(&segment).as_os_str() == name { Ok(Meaning::Segment(segment)) } else { Err(Error::Invalid) };
    }
    if text.starts_with(INTRODUCER) || text.contains('\0') {
        return Err(Error::Invalid);
    }
    Ok(Meaning::Segment(text.to_owned()))
}

/// The bytes that a segment stands for when it is the escape of a local name that is not UTF-8.
fn foreign_bytes(segment: &str) -> Option<Vec<u8>> {
    let bytes = percent_decode(segment.strip_prefix(ESCAPED)?)?;
    let foreign = std::str::from_utf8(&bytes).is_err() && bytes.len() <= NAME_MAX && !bytes.contains(&0) && !bytes.contains(&b'/');
    let canonical = || percent_encode(&bytes, |b| b >= 0x80 || matches!(b, b'%' | b'/' | 0)) == segment[ESCAPED.len()..];
    (foreign && canonical()).then_some(bytes)
}

fn shortened(segment: &str) -> String {
    let mut keep = SHORTENED_KEEP.min(segment.len());
    while !segment.is_char_boundary(keep) {
        keep -= 1;
    }
    // A NUL or the introducer inside the kept beginning would make the name unparsable: cut before it.
    let keep = [segment.find('\0'), segment.find(INTRODUCER)].into_iter().flatten().fold(keep, usize::min);
    let digest = Sha256::digest(segment.as_bytes());
    let hash: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!("{SHORTENED}{}~{hash}", &segment[..keep])
}

fn percent_encode(bytes: &[u8], escape: impl Fn(u8) -> bool) -> String {
    let mut out = Vec::with_capacity(bytes.len());
    for &byte in bytes {
        if escape(byte) {
            out.extend_from_slice(format!("%{byte:02X}").as_bytes());
        } else {
            out.push(byte);
        }
    }
    // Only whole bytes below 0x80 were replaced, or all bytes from 0x80 on: what is left is UTF-8 still.
    String::from_utf8(out).unwrap_or_default()
}

fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digits = [bytes.next()?, bytes.next()?];
        out.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
    }
    Some(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ordinary_names_are_their_segments() {
        for name in ["a", "Größe 1.txt", "a b", "%20", "a%", "new\nline", ".hidden", "...", "a%s3b", "x%s3"] {
            assert_eq!(name_of(name), OsStr::new(name));
            assert_eq!(meaning_of(OsStr::new(name)), Ok(Meaning::Segment(name.into())));
        }
    }

    #[test]
    fn strange_segments_show_under_an_escape() {
        for (segment, name) in [
            ("", "%s3:"),
            (".", "%s3:."),
            ("..", "%s3:.."),
            ("a\0b", "%s3:a%00b"),
            ("%s3file", "%s3:%25s3file"),
            ("x%s3file", "%s3:x%25s3file"),
        ] {
            assert_eq!(name_of(segment), OsStr::new(name));
            assert_eq!(meaning_of(OsStr::new(name)), Ok(Meaning::Segment(segment.into())));
        }
        assert_eq!(hidden_name_of("a"), OsStr::new("a%s3file"));
        assert_eq!(meaning_of(OsStr::new("a%s3file")), Ok(Meaning::Hidden("a".into())));
    }

    #[test]
    fn an_escape_that_is_none_is_refused() {
        for name in ["%s3:plain", "%s3x", "%s3:%zz", "%s3+abc"] {
            assert_eq!(meaning_of(OsStr::new(name)), Err(Error::Invalid), "{name}");
        }
    }

    #[test]
    fn long_segments_are_shortened_to_different_names() {
        let (one, two) = ("ä".repeat(200), format!("{}b", "ä".repeat(199)));
        assert!(name_of(&one).len() <= NAME_MAX && hidden_name_of(&one).len() <= NAME_MAX);
        assert_ne!(name_of(&one), name_of(&two));
        let Ok(Meaning::Shortened { prefix }) = meaning_of(&name_of(&one)) else { panic!("not shortened") };
        assert!(one.starts_with(&prefix));
    }

    proptest! {
        #[test]
        fn segments_survive_the_round_trip(segment in "[^/]{0,60}") {
            let name = name_of(&segment);
            prop_assert!(!name.is_empty() && name != "." && name != ".." && !name.as_bytes().contains(&b'/') && !name.as_bytes().contains(&0));
            prop_assert_eq!(meaning_of(&name).unwrap(), Meaning::Segment(segment));
        }

        #[test]
        fn escapes_survive_the_round_trip(segment in "(%s3|%s3file|%|:|\\.|\0|a|\u{e9}){0,12}") {
            prop_assert_eq!(meaning_of(&name_of(&segment)).unwrap(), Meaning::Segment(segment));
        }

        #[test]
        fn local_names_survive_the_round_trip(bytes in proptest::collection::vec(1u8..=255, 1..80)) {
            let name = OsString::from_vec(bytes.into_iter().filter(|b| *b != b'/').collect());
            prop_assume!(!name.is_empty() && name != "." && name != "..");
            if let Ok(Meaning::Segment(segment)) = meaning_of(&name) {
                prop_assert_eq!(name_of(&segment), name);
            }
        }
    }
}
