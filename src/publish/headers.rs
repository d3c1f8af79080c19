//! Headers of new objects by their final key: Content-Type by name, `cache_control=` for all, and over both the rules of
//! a `header_rules=` file:
//!
//! ```toml
//! [[rule]]
//! match = ["*.html", "docs/**"]
//! cache_control = "no-cache"
//! ```
//!
//! A config file has the same rules as `[[header_rules]]`. A pattern without `/` looks at the last component of a key, another at the whole key. Every rule that matches counts;
//! of two that set one header the later wins.

use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeValue, ValueDeserializer};

use super::content_type;
use crate::glob;
use crate::s3::ObjectHeaders;

/// Why a rules file cannot be used: one line with file and line number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("header_rules={file}{at}: {why}")]
pub struct HeaderRulesError {
    file: String,
    at: String,
    why: String,
}

/// The rules of one mount.
#[derive(Clone, Debug, Default)]
pub struct HeaderRules {
    cache_control: Option<String>,
    rules: Vec<HeaderRule>,
}

/// What one rule says.
#[derive(Clone, Debug, PartialEq)]
pub struct HeaderRule {
    patterns: Vec<String>,
    headers: ObjectHeaders,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RulesFile {
    #[serde(default, rename = "rule")]
    rules: Vec<RuleEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleEntry {
    #[serde(rename = "match")]
    patterns: Spanned<Patterns>,
    #[serde(alias = "Content-Type")]
    content_type: Option<Spanned<String>>,
    #[serde(alias = "Cache-Control")]
    cache_control: Option<Spanned<String>>,
    #[serde(alias = "Content-Disposition")]
    content_disposition: Option<Spanned<String>>,
    #[serde(alias = "Content-Encoding")]
    content_encoding: Option<Spanned<String>>,
    #[serde(alias = "Content-Language")]
    content_language: Option<Spanned<String>>,
    #[serde(alias = "Expires")]
    expires: Option<Spanned<String>>,
    #[serde(alias = "x-amz-website-redirect-location")]
    website_redirect: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Patterns {
    One(String),
    Several(Vec<String>),
}

impl HeaderRules {
    /// `cache_control=`, the rules of the config files, and over them the `header_rules=` file, read and judged.
    ///
    /// # Errors
    /// When the file cannot be read, is no TOML, or says what S3 cannot store.
    pub fn load(cache_control: Option<&str>, configured: &[HeaderRule], file: Option<&Path>) -> Result<Self, HeaderRulesError> {
        let rules = match file {
            None => Vec::new(),
            Some(path) => {
                let file = path.display().to_string();
                let text = std::fs::read_to_string(path).map_err(|error| HeaderRulesError {
                    file: file.clone(),
                    at: String::new(),
                    why: error.to_string(),
                })?;
                parse(&text).map_err(|(offset, why)| {
                    let line = text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1;
                    HeaderRulesError { file, at: format!(":{line}"), why }
                })?
            }
        };
        Ok(Self { cache_control: cache_control.map(str::to_owned), rules: [configured, &rules].concat() })
    }

    /// What a new object gets under this key.
    pub fn headers(&self, _bucket: &str, key: &str) -> ObjectHeaders {
        let mut headers = ObjectHeaders {
            content_type: Some(content_type::of_key(key)),
            cache_control: self.cache_control.clone(),
            ..ObjectHeaders::default()
        };
        if key.ends_with('/') {
            // A directory marker is nobody's page.
            headers.cache_control = None;
            return headers;
        }
        for rule in self.rules.iter().filter(|rule| rule.patterns.iter().any(|pattern| glob::matches_key(pattern, key))) {
            let ObjectHeaders {
                content_type,
                cache_control,
                content_disposition,
                content_encoding,
                content_language,
                expires,
                website_redirect,
            } = &rule.headers;
            for (to, from) in [
                (&mut headers.content_type, content_type),
                (&mut headers.cache_control, cache_control),
                (&mut headers.content_disposition, content_disposition),
                (&mut headers.content_encoding, content_encoding),
                (&mut headers.content_language, content_language),
                (&mut headers.expires, expires),
                (&mut headers.website_redirect, website_redirect),
            ] {
                if from.is_some() {
                    to.clone_from(from);
                }
            }
        }
        headers
    }
}

/// An error is where and why.
fn parse(text: &str) -> Result<Vec<HeaderRule>, (usize, String)> {
    let file: RulesFile = toml::from_str(text).map_err(placed)?;
    file.rules.into_iter().map(rule).collect()
}

/// `[[header_rules]]` of a config file, in the words of a rules file's `[[rule]]`.
///
/// # Errors
/// Where in the file and why.
pub fn rules(value: &Spanned<DeValue<'_>>) -> Result<Vec<HeaderRule>, (usize, String)> {
    let entries = Vec::<RuleEntry>::deserialize(ValueDeserializer::from(value.clone())).map_err(placed)?;
    entries.into_iter().map(rule).collect()
}

fn placed(error: toml::de::Error) -> (usize, String) {
    (error.span().map_or(0, |span| span.start), error.message().replace('\n', "; "))
}

fn rule(entry: RuleEntry) -> Result<HeaderRule, (usize, String)> {
    let at = entry.patterns.span().start;
    let patterns = match entry.patterns.into_inner() {
        Patterns::One(pattern) => vec![pattern],
        Patterns::Several(patterns) => patterns,
    };
    for pattern in &patterns {
        glob::check(pattern).map_err(|why| (at, format!("match '{}': {why}", pattern.escape_debug())))?;
    }
    let headers = ObjectHeaders {
        content_type: value("content_type", entry.content_type)?,
        cache_control: value("cache_control", entry.cache_control)?,
        content_disposition: value("content_disposition", entry.content_disposition)?,
        content_encoding: value("content_encoding", entry.content_encoding)?,
        content_language: value("content_language", entry.content_language)?,
        expires: value("expires", entry.expires)?,
        website_redirect: value("website_redirect", entry.website_redirect)?,
    };
    Ok(HeaderRule { patterns, headers })
}

/// A value that can travel in a header.
fn value(name: &str, value: Option<Spanned<String>>) -> Result<Option<String>, (usize, String)> {
    let Some(value) = value else { return Ok(None) };
    let at = value.span().start;
    let value = value.into_inner();
    let why = if value.is_empty() || !value.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        Some("expected printable ASCII, as HTTP headers are")
    } else if name == "content_type" && value.parse::<mime_guess::Mime>().is_err() {
        Some("expected a media type such as text/html; charset=utf-8")
    } else if name == "expires" && httpdate::parse_http_date(&value).is_err() {
        Some("expected a date such as Wed, 21 Oct 2026 07:28:00 GMT")
    } else if name == "website_redirect" && !(value.starts_with('/') || value.starts_with("http://") || value.starts_with("https://")) {
        Some("expected /KEY or a URL, as S3 takes them")
    } else {
        None
    };
    match why {
        Some(why) => Err((at, format!("{name} '{}': {why}", value.escape_debug()))),
        None => Ok(Some(value)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn load(text: &str) -> Result<HeaderRules, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rules.toml");
        std::fs::write(&file, text).unwrap();
        HeaderRules::load(Some("public,max-age=60"), &[], Some(&file))
            .map_err(|error| error.to_string().replace(&file.display().to_string(), "F"))
    }

    #[test]
    fn the_later_rule_wins_header_by_header() {
        let rules = load("[[rule]]\nmatch = '*.html'\ncache_control = 'no-cache'\nContent-Language = 'en'\n[[rule]]\nmatch = ['docs/**', '*.bin']\ncontent_language = 'de'\ncontent_type = 'text/x-a'\n").unwrap();
        let headers = rules.headers("b", "docs/a/index.html");
        assert_eq!(headers.cache_control.as_deref(), Some("no-cache"));
        assert_eq!(headers.content_language.as_deref(), Some("de"));
        assert_eq!(headers.content_type.as_deref(), Some("text/x-a"));
        let plain = rules.headers("b", "a.tar.gz");
        assert_eq!(
            (plain.content_type.as_deref(), plain.cache_control.as_deref(), plain.content_encoding),
            (Some("application/gzip"), Some("public,max-age=60"), None)
        );
        let marker = rules.headers("b", "docs/");
        assert_eq!((marker.content_type.as_deref(), marker.cache_control), (Some("application/x-directory"), None));
    }

    #[test]
    fn what_cannot_be_is_one_line_with_its_number() {
        for (text, line) in [
            ("[[rule]]\nmatch = '*'\ncache-control = 'x'\n", "header_rules=F:3: unknown field `cache-control`"),
            ("[[rule]]\nmatch = '[a'\n", "header_rules=F:2: match '[a': a [ is not closed"),
            ("\n[[rule]]\nmatch = '*'\ncontent_type = 'html'\n", "header_rules=F:4: content_type 'html': expected a media type"),
            ("[[rule]]\nmatch = '*'\ncache_control = \"a\\nb\"\n", "header_rules=F:3: cache_control 'a\\nb': expected printable"),
            ("[[rule]]\nmatch = '*'\nexpires = 'tomorrow'\n", "header_rules=F:3: expires 'tomorrow': expected a date"),
            ("[[rule]]\ncontent_type = 'a/b'\n", "header_rules=F:1: missing field `match`"),
            ("rule = ", "header_rules=F:1: "),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.starts_with(line) && !error.contains('\n'), "{error}");
        }
        assert!(
            HeaderRules::load(None, &[], Some(Path::new("/nonexistent")))
                .unwrap_err()
                .to_string()
                .starts_with("header_rules=/nonexistent: No such file")
        );
    }
}
