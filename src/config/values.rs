//! Values as people type them: `512M`, `10%`, `5m`, `0644`, `yes`. Every parser answers `None` for what it does not
//! understand; the caller knows the option's name and says what is accepted.

use std::time::Duration;

/// Longest duration that is taken, a century: sums with the clock cannot overflow.
const LONGEST: f64 = 100.0 * 365.0 * 86_400.0;

/// A size that may depend on the disk it is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// Bytes.
    Bytes(u64),
    /// Hundredths of the disk.
    Percent(f64),
}

/// Bytes: a number, perhaps with a fraction, and K, M, G, T or P (binary; `KB` and `KiB` are the same). `unit` is what
/// a bare number counts.
pub fn size(text: &str, unit: u64) -> Option<u64> {
    let (number, suffix) = split_number(text)?;
    let factor = match suffix.to_ascii_lowercase().as_str() {
        "" => unit,
        "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        "p" | "pb" | "pib" => 1 << 50,
        _ => return None,
    };
    match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(factor),
        Err(_) => {
            let bytes = number.parse::<f64>().ok()? * factor as f64;
            (bytes.is_finite() && bytes < u64::MAX as f64).then_some(bytes as u64)
        }
    }
}

/// A size, or `10%`.
pub fn amount(text: &str, unit: u64) -> Option<Amount> {
    match text.trim().strip_suffix('%') {
        None => size(text, unit).map(Amount::Bytes),
        Some(number) => {
            let (digits, rest) = split_number(number)?;
            let percent: f64 = digits.parse().ok()?;
            (rest.is_empty() && percent <= 100.0).then_some(Amount::Percent(percent))
        }
    }
}

/// A time: numbers with `ms`, `s`, `m`, `h`, `d` or `w`, as in `1h30m`; a bare number is seconds.
pub fn time(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut seconds = 0.0;
    let mut first = true;
    while first || !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let tail = tail.trim_start();
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" if first && tail.is_empty() => 1.0,
            "ms" | "msec" => 0.001,
            "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
            "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
            "h" | "hour" | "hours" => 3_600.0,
            "d" | "day" | "days" => 86_400.0,
            "w" | "week" | "weeks" => 604_800.0,
            _ => return None,
        };
        seconds += decimal(number)? * factor;
        rest = tail.trim_start();
        first = false;
    }
    (seconds <= LONGEST).then(|| Duration::from_secs_f64(seconds))
}

/// yes and no, in every way that mount(8), s3fs and rclone spell them.
pub fn flag(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "" | "yes" | "on" | "true" | "1" => Some(true),
        "no" | "off" | "false" | "0" => Some(false),
        _ => None,
    }
}

/// Permission bits in octal, with or without a leading zero.
pub fn octal(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    u32::from_str_radix(digits, 8).ok().filter(|mode| *mode <= 0o7777)
}

/// A whole number.
pub fn count(text: &str) -> Option<u64> {
    // parse() alone would take `+5`.
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// An amount of money.
pub fn price(text: &str) -> Option<f64> {
    decimal(text).filter(|price| price.is_finite())
}

/// Object tags as `x-amz-tagging` has them: `key=value&key2=value2`, percent-encoded. S3 takes ten of them, keys up to
/// 128 and values up to 256 characters.
pub fn tags(text: &str) -> Option<Vec<(String, String)>> {
    let pairs: Vec<(String, String)> = url::form_urlencoded::parse(text.as_bytes()).into_owned().collect();
    let fits = |(key, value): &(String, String)| (1..=128).contains(&key.chars().count()) && value.chars().count() <= 256;
    (pairs.len() <= 10 && pairs.iter().all(fits)).then_some(pairs)
}

/// The number that a text begins with, and what follows it.
fn split_number(text: &str) -> Option<(&str, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    decimal(number)?;
    Some((number, suffix.trim_start()))
}

fn decimal(number: &str) -> Option<f64> {
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_binary_and_bare_numbers_have_the_words_unit() {
        assert_eq!(size("512", 1), Some(512));
        assert_eq!(size("10", 1 << 20), Some(10 << 20));
        assert_eq!(size("10K", 1 << 20), Some(10 << 10));
        assert_eq!(size("1.5G", 1), Some(3 << 29));
        assert_eq!(size("20 GiB", 1), Some(20 << 30));
        assert_eq!(size("1t", 1), Some(1 << 40));
        for bad in ["", "-1", "G", "1X", "1.2.3", "99999999999G", "ten", "1e9", "+5", ".5"] {
            assert_eq!(size(bad, 1), None, "{bad}");
        }
    }

    #[test]
    fn percentages() {
        assert_eq!(amount("10%", 1), Some(Amount::Percent(10.0)));
        assert_eq!(amount("10 %", 1), Some(Amount::Percent(10.0)));
        assert_eq!(amount("1G", 1), Some(Amount::Bytes(1 << 30)));
        assert_eq!(amount("101%", 1), None);
        assert_eq!(amount("%", 1), None);
    }

    #[test]
    fn times() {
        assert_eq!(time("5m"), Some(Duration::from_secs(300)));
        assert_eq!(time("0"), Some(Duration::ZERO));
        assert_eq!(time("90"), Some(Duration::from_secs(90)));
        assert_eq!(time("1h30m"), Some(Duration::from_secs(5_400)));
        assert_eq!(time("1h 30 min"), Some(Duration::from_secs(5_400)));
        assert_eq!(time("250ms"), Some(Duration::from_millis(250)));
        for bad in ["", "m", "5x", "5m3", "-1", "1e9s", "99999999999d", "s5"] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }

    #[test]
    fn modes_and_tags() {
        assert_eq!(octal("0644"), Some(0o644));
        assert_eq!(octal("755"), Some(0o755));
        assert_eq!(octal("888"), None);
        assert_eq!(octal("77777"), None);
        assert_eq!(tags("a=b&c=d%20e").unwrap(), [("a".into(), "b".into()), ("c".into(), "d e".into())]);
        assert_eq!(tags("=b"), None);
    }

    #[test]
    fn prices() {
        assert_eq!(price("0.0004"), Some(0.0004));
        assert_eq!(price("0"), Some(0.0));
        for bad in ["", "-1", ".5", "$1", "1 USD", "1,5", "inf", "nan"] {
            assert_eq!(price(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in ".*", unit in 1u64..=1 << 20) {
            let _ = (size(&text, unit), amount(&text, unit), time(&text), flag(&text), octal(&text), count(&text), price(&text), tags(&text));
        }

        #[test]
        fn every_size_is_read_back(bytes in 0u64..1 << 40) {
            prop_assert_eq!(size(&bytes.to_string(), 1), Some(bytes));
            prop_assert_eq!(size(&format!("{bytes}k"), 1), Some(bytes << 10));
        }
    }
}
