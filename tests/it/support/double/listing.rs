//! Listings: keys in order, folded at a delimiter, page by page.

use std::collections::BTreeMap;
use std::ops::Bound;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use super::model::Object;

/// What a page is made from.
pub struct Query<'a> {
    pub prefix: &'a str,
    pub delimiter: Option<&'a str>,
    /// Keys and prefixes up to this one are left out.
    pub after: Option<&'a str>,
    pub max: usize,
}

/// A page: objects and common prefixes, at most `max` together.
#[derive(Default)]
pub struct Page {
    pub keys: Vec<String>,
    pub prefixes: Vec<String>,
    /// The last key or prefix of a page that others follow.
    pub last: Option<String>,
}

/// The page that follows `query.after`.
pub fn page(objects: &BTreeMap<String, Object>, query: &Query<'_>) -> Page {
    let mut page = Page::default();
    let mut from = match query.after {
        Some(after) if after >= query.prefix => Bound::Excluded(after.to_owned()),
        _ => Bound::Included(query.prefix.to_owned()),
    };
    let mut last = None;
    while let Some((key, _)) = objects.range::<String, _>((from.clone(), Bound::Unbounded)).next() {
        if !key.starts_with(query.prefix) {
            break;
        }
        let folded = query.delimiter.filter(|d| !d.is_empty()).and_then(|delimiter| {
            let at = key[query.prefix.len()..].find(delimiter)?;
            Some(key[..query.prefix.len() + at + delimiter.len()].to_owned())
        });
        match folded {
            Some(prefix) => {
                let next = first_key_past(objects, &prefix);
                // A marker that is a prefix (or lies in one) leaves out all that folds into it.
                if query.after.is_none_or(|after| prefix.as_str() > after) {
                    if page.keys.len() + page.prefixes.len() == query.max {
                        page.last = last;
                        return page;
                    }
                    last = Some(prefix.clone());
                    page.prefixes.push(prefix);
                }
                match next {
                    Some(key) => from = Bound::Included(key),
                    None => break,
                }
            }
            None => {
                if page.keys.len() + page.prefixes.len() == query.max {
                    page.last = last;
                    return page;
                }
                last = Some(key.clone());
                page.keys.push(key.clone());
                from = Bound::Excluded(key.clone());
            }
        }
    }
    page
}

fn first_key_past(objects: &BTreeMap<String, Object>, prefix: &str) -> Option<String> {
    let within = (Bound::Included(prefix.to_owned()), Bound::Unbounded);
    objects.range::<String, _>(within).map(|(key, _)| key).find(|key| !key.starts_with(prefix)).cloned()
}

/// What AWS leaves as it is under `encoding-type=url`; a space becomes `+`.
const LITERAL: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'*').remove(b'/').remove(b' ');

/// A key as a listing spells it.
pub fn spell(key: &str, encoded: bool) -> String {
    if encoded { percent_encode(key.as_bytes(), LITERAL).to_string().replace(' ', "+") } else { key.to_owned() }
}

/// An opaque continuation token.
pub fn token(last: &str) -> String {
    URL_SAFE.encode(last)
}

/// What a token says; `None` for one that is not ours.
pub fn untoken(token: &str) -> Option<String> {
    String::from_utf8(URL_SAFE.decode(token).ok()?).ok()
}
