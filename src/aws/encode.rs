//! Percent-encoding of keys in paths and of values in queries, as the signatures define it.
//!
//! AWS, "Signature Calculations": every byte is encoded but `A-Z a-z 0-9 - . _ ~`, and `/` stays in a path.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// One component of a query or of a path: `/` is encoded too.
pub fn component(text: &str) -> String {
    utf8_percent_encode(text, UNRESERVED).to_string()
}

/// A whole key with its slashes kept, as `x-amz-copy-source` wants it.
pub fn key(key: &str) -> String {
    key.split('/').map(component).collect::<Vec<_>>().join("/")
}

/// The two spellings of a request's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPath {
    /// What is signed: `/` between segments.
    pub signed: String,
    /// What travels. The url crate folds `.` and `..` segments (even as `%2e`), so that DELETE of `a/../b` would
    /// delete `b`: a key with such segments travels with `%2F`, which the store decodes to the same key.
    pub wire: String,
}

/// The path of `key` below `prefix` (`""` or `/bucket`). `None` for the keys `.` and `..` where nothing precedes them:
/// no URL can say those.
pub fn key_path(prefix: &str, object: &str) -> Option<KeyPath> {
    let signed = format!("{prefix}/{}", key(object));
    if !object.split('/').any(|segment| segment == "." || segment == "..") {
        return Some(KeyPath { wire: signed.clone(), signed });
    }
    let lone = object == "." || object == "..";
    if lone && prefix.is_empty() {
        return None;
    }
    let separator = if lone { "%2F" } else { "/" };
    Some(KeyPath { wire: format!("{prefix}{separator}{}", component(object)), signed })
}

/// `a=b&c` from pairs; an empty value is written `key=`, as SigV4 canonicalises it.
pub fn query<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    pairs.into_iter().map(|(k, v)| format!("{}={}", component(k), component(v))).collect::<Vec<_>>().join("&")
}

/// Decodes a key of a listing made with `encoding-type=url`. AWS writes a space as `+` and a plus as `%2B`.
/// Bytes that are no UTF-8 cannot be a key of S3; they become U+FFFD rather than hiding the rest of the page.
pub fn decode_listed(text: &str) -> String {
    if !text.contains(['%', '+']) {
        return text.to_owned();
    }
    percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_their_slashes_and_nothing_else() {
        assert_eq!(key("a b/ä+?#&=%.txt"), "a%20b/%C3%A4%2B%3F%23%26%3D%25.txt");
        assert_eq!(key_path("", "a//b/").unwrap().wire, "/a//b/");
        assert_eq!(key_path("/bucket", "/x").unwrap().wire, "/bucket//x");
    }

    #[test]
    fn dot_segments_survive_the_url_crate() {
        for (prefix, object) in
            [("/b", "a/../c"), ("", "a/./c"), ("", "../x"), ("", "x/.."), ("/b", ".."), ("/b", "."), ("/b", "..//"), ("/b", "a/...")]
        {
            let path = key_path(prefix, object).unwrap();
            let url = url::Url::parse(&format!("http://host{}", path.wire)).unwrap();
            assert_eq!(url.path(), path.wire, "{object}");
            let decoded = percent_decode_str(url.path()).decode_utf8().unwrap().into_owned();
            assert_eq!(decoded, format!("{prefix}/{object}"));
            let signed = percent_decode_str(&path.signed).decode_utf8().unwrap().into_owned();
            assert_eq!(signed, decoded);
        }
        assert_eq!(key_path("", ".."), None);
        assert_eq!(key_path("/b", "a/../c").unwrap().wire, "/b/a%2F..%2Fc");
    }

    #[test]
    fn listed_keys_decode() {
        assert_eq!(decode_listed("a+b%2Bc%20d%01"), "a b+c d\u{1}");
        assert_eq!(decode_listed("plain"), "plain");
        assert_eq!(decode_listed("100%"), "100%");
    }

    proptest::proptest! {
        #[test]
        fn any_key_comes_back(object in "\\PC{1,40}") {
            let path = key_path("/b", &object).unwrap();
            let url = url::Url::parse(&format!("http://host{}", path.wire)).unwrap();
            let decoded = percent_decode_str(url.path()).decode_utf8().unwrap().into_owned();
            proptest::prop_assert_eq!(decoded, format!("/b/{object}"));
        }
    }
}
