//! File name patterns, of header rules and of temporary names: `*` and `?` within a name, `**` across names, `[a-z]`, `[!a-z]`.

/// True when the whole text matches. A pattern without `/` is matched against the last component of a key.
pub fn matches_key(pattern: &str, key: &str) -> bool {
    if pattern.contains('/') {
        return matches(pattern.strip_prefix('/').unwrap_or(pattern).as_bytes(), key.as_bytes());
    }
    matches(pattern.as_bytes(), key.rsplit('/').next().unwrap_or(key).as_bytes())
}

/// Why a pattern cannot be meant, if so.
pub fn check(pattern: &str) -> Result<(), &'static str> {
    if pattern.is_empty() {
        return Err("an empty pattern matches nothing");
    }
    let mut rest = pattern;
    while let Some((_, class)) = rest.split_once('[') {
        // A ] right after the opening is one of the characters.
        let from = class.char_indices().nth(1 + usize::from(class.starts_with('!'))).map_or(class.len(), |(at, _)| at);
        let Some(end) = class.get(from..).and_then(|tail| tail.find(']')) else {
            return Err("a [ is not closed");
        };
        rest = &class[from + end + 1..];
    }
    Ok(())
}

/// Iterative, with one place to go back to for `*` and one for `**`: linear memory, and no pattern takes exponential time.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    let mut double: Option<(usize, usize)> = None;
    loop {
        let step = match pattern.get(p) {
            Some(b'*') if pattern.get(p + 1) == Some(&b'*') => {
                // `**/` matches no directory too.
                let after = p + 2 + usize::from(pattern.get(p + 2) == Some(&b'/') && (p == 0 || pattern[p - 1] == b'/'));
                double = Some((after, t));
                star = None;
                p = after;
                continue;
            }
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
                continue;
            }
            Some(_) if t < text.len() => one(&pattern[p..], text[t]),
            Some(_) => None,
            None if t == text.len() => return true,
            None => None,
        };
        if let Some(length) = step {
            p += length;
            t += 1;
            continue;
        }
        // Give the innermost star one byte more; a single one stops at a slash.
        if let Some((after, at)) = star.filter(|(_, at)| text.get(*at).is_some_and(|byte| *byte != b'/')) {
            star = Some((after, at + 1));
            (p, t) = (after, at + 1);
        } else if let Some((after, at)) = double.filter(|(_, at)| *at < text.len()) {
            double = Some((after, at + 1));
            star = None;
            (p, t) = (after, at + 1);
        } else {
            return false;
        }
    }
}

/// Length of the pattern's first element if the byte matches it.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern {
        [b'?', ..] => (byte != b'/').then_some(1),
        [b'[', rest @ ..] => {
            let negated = rest.first() == Some(&b'!');
            let from = usize::from(negated);
            let end = from + 1 + rest.get(from + 1..)?.iter().position(|b| *b == b']')?;
            (class(&rest[from..end], byte) != negated && byte != b'/').then_some(end + 2)
        }
        [b'\\', literal, ..] => (*literal == byte).then_some(2),
        [literal, ..] => (*literal == byte).then_some(1),
        [] => None,
    }
}

fn class(class: &[u8], byte: u8) -> bool {
    let mut at = 0;
    while let Some(&low) = class.get(at) {
        match (class.get(at + 1), class.get(at + 2)) {
            (Some(b'-'), Some(&high)) => {
                if (low..=high).contains(&byte) {
                    return true;
                }
                at += 3;
            }
            _ => {
                if low == byte {
                    return true;
                }
                at += 1;
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_paths() {
        for (pattern, key) in [
            ("*.html", "a/b/index.html"),
            ("index.*", "index.html"),
            ("a?c", "abc"),
            ("docs/*.md", "docs/a.md"),
            ("docs/**", "docs/a/b.md"),
            ("**/x", "x"),
            ("**/x", "a/b/x"),
            ("a/**/x", "a/x"),
            ("a/**/x", "a/b/c/x"),
            ("[a-c]x", "bx"),
            ("[!a-c]x", "dx"),
            ("[]]", "]"),
            ("/top", "top"),
            ("*", ".hidden"),
            (r"a\*", "a*"),
            ("*a*b*", "xxaxxbxx"),
        ] {
            assert!(matches_key(pattern, key), "{pattern} {key}");
        }
        for (pattern, key) in [
            ("*.html", "a.htm"),
            ("docs/*.md", "docs/a/b.md"),
            ("/top", "a/top"),
            ("a?c", "ac"),
            ("[!a-c]x", "bx"),
            ("a/**/x", "b/x"),
            ("?", ""),
        ] {
            assert!(!matches_key(pattern, key), "{pattern} {key}");
        }
        assert!(check("[a-").is_err() && check("").is_err() && check("[!]").is_err());
        assert!(check("[]a]*").is_ok() && check("*.[ch]").is_ok());
    }

    proptest! {
        #[test]
        fn nothing_panics_and_every_text_matches_itself(pattern in ".{0,20}", text in "[a-z/.]{0,20}") {
            let _ = (matches_key(&pattern, &text), check(&pattern));
            prop_assert!(matches(text.as_bytes(), text.as_bytes()));
            prop_assert!(matches(b"**", text.as_bytes()));
        }
    }
}
