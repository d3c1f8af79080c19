//! User metadata that is no ASCII travels as RFC 2047 words, as AWS's documents ask ("Working with object metadata").

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// A metadata value as a header may carry it.
pub fn encode(value: &str) -> String {
    let plain = value.bytes().all(|b| (0x20..0x7f).contains(&b)) && value.trim() == value && !value.contains("=?");
    if plain {
        return value.to_owned();
    }
    format!("=?UTF-8?B?{}?=", STANDARD.encode(value))
}

fn word(text: &str) -> Option<String> {
    let mut fields = text.strip_prefix("=?")?.strip_suffix("?=")?.splitn(3, '?');
    let (charset, encoding, data) = (fields.next()?, fields.next()?, fields.next()?);
    if !charset.eq_ignore_ascii_case("utf-8") {
        return None;
    }
    let bytes = if encoding.eq_ignore_ascii_case("b") {
        STANDARD.decode(data).ok()?
    } else if encoding.eq_ignore_ascii_case("q") {
        percent_encoding::percent_decode_str(&data.replace('%', "%25").replace('_', " ").replace('=', "%")).collect()
    } else {
        return None;
    };
    String::from_utf8(bytes).ok()
}

/// The value that a header carries; what is no encoded word is left alone.
pub fn decode(value: &str) -> String {
    if !value.contains("=?") {
        return value.to_owned();
    }
    // White space between encoded words is not part of the text.
    let words: Option<Vec<String>> = value.split_whitespace().map(word).collect();
    words.map_or_else(|| value.to_owned(), |words| words.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        assert_eq!(encode("1700000000.5"), "1700000000.5");
        assert_eq!(encode("é"), "=?UTF-8?B?w6k=?=");
        assert_eq!(decode("=?UTF-8?Q?=C3=A9_x%?="), "é x%");
        assert_eq!(decode("=?UTF-8?B?w6k=?= =?UTF-8?B?w6k=?="), "éé");
        assert_eq!(decode("a =?b"), "a =?b");
    }

    proptest::proptest! {
        #[test]
        fn any_value_comes_back(value in ".{0,40}") {
            proptest::prop_assert_eq!(decode(&encode(&value)), value);
        }
    }
}
