#![allow(clippy::unwrap_used)]
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::values::Amount;
use crate::config::{CloudFront, LogLevel};

fn typed(options: &str) -> Typed {
    let mut typed = Typed::default();
    typed.options(options, false).unwrap();
    typed
}

fn refusal(options: &str) -> String {
    let message = Typed::default().options(options, false).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

/// Every word of the documented table, with a value where it needs one.
const DOCUMENTED: &[&str] = &[
    "ro rw _netdev nofail auto noauto user nouser users group owner suid nosuid dev nodev exec noexec atime noatime relatime sync async remount defaults x-systemd.automount x-gvfs-show",
    "allow_other allow_root default_permissions no_default_permissions foreground fsname=a nonempty",
    "uid=root gid=root uid=1000 gid=1000 umask=022 file_mode=0644 file_perms=0644 dir_mode=0755 dir_perms=0755 ownership=store ownership=off symlinks=store symlinks=off",
    "endpoint_url=https://s3.example.org url=http://127.0.0.1:9000 region=eu-west-1 endpoint=eu-west-1 proxy=http://proxy:3128 path_style use_path_request_style force_path_style ca_bundle=/etc/ssl/ca.pem no_check_certificate requester_pays expected_bucket_owner=123456789012 sigv2 listobjectsv1 dual_stack transfer_acceleration",
    "profile=release passwd_file=/etc/passwd-s3fs credentials_file=/root/c shared_config=/root/c role_arn=arn:aws:iam::123456789012:role/r external_id=x iam_role iam_role=auto no_sign_request public_bucket public_bucket=1",
    "default_acl=public-read default_acl=auto acl=private storage_class=STANDARD_IA storage_class=standard_ia sse=aws:kms sse use_sse use_sse=1 use_sse=kmsid:abc sse_kms_key_id=abc cache_control=no-cache header_rules=/etc/h.toml tags=a=b&c=d",
    "cache_dir=/c use_cache=/c cache=/c cache_size=10% cache_size=1G max_cache_size=1024 vfs_cache_max_size=10G min_free_space=2G ensure_diskfree=100 metadata_ttl=5s stat_cache_expire=60 dir_cache_time=5m negative_metadata_ttl=1 read_ahead=8M memory_limit=256M memory_target=256",
    "write_back=0 write_back=5s vfs_write_back=5s spool_dir=/s spool_size=50% part_size=8M part_size=auto multipart_size=10 write_part_size=8388608 max_connections=32 parallel_count=5 transfers=4 upload_checksums=off upload_checksums=crc64nvme bwlimit=10M on_conflict=keep on_conflict=overwrite on_conflict=fail close_timeout=5m",
    "read_only allow_delete=yes allow_delete=no allow_bucket_changes rename_limit=100000 ignore=*.tmp ignore=+*.bak no_index show_versions mtime=store mtime=local mtime=server",
    "retries=5 connect_timeout=10s request_timeout=30s",
    "cloudfront=auto cloudfront=off cloudfront=E2ABC invalidate=overwrite invalidate=all invalidate=off invalidate_delay=5s invalidate_budget=1000 url_host=cdn.example.org key_pair_id=K2 private_key=/k.pem",
    "price_put=0.005 price_get=0 price_out=0.09 currency=EUR currency=usd",
    "log_file=/var/log/p.log log_level=debug dbglevel=info dbglevel=crit notify metrics_addr=127.0.0.1:9100",
];

#[test]
fn every_documented_word_is_taken_in_both_spellings() {
    for word in DOCUMENTED.iter().flat_map(|line| line.split(' ')) {
        for word in [word.to_owned(), dashed(word)] {
            let mut typed = Typed::default();
            typed.options(&word, false).unwrap_or_else(|error| panic!("{error}"));
            assert!(typed.ignored.is_empty(), "{word} only gave a warning");
        }
    }
}

fn dashed(word: &str) -> String {
    match word.split_once('=') {
        Some((name, value)) => format!("{}={value}", name.replace('_', "-")),
        None => word.replace('_', "-"),
    }
}

#[test]
fn no_word_is_in_the_table_twice() {
    let mut seen = std::collections::BTreeSet::new();
    for word in table::words().chain(table::TUNING.iter().map(|(word, _)| *word)).chain(table::SECRETS.iter().copied()) {
        assert!(seen.insert(word), "{word}");
        assert!(!word.contains('-'), "{word} is spelled with _");
    }
}

#[test]
fn a_bare_number_has_the_unit_of_the_word() {
    assert_eq!(typed("part_size=5242880").part_size, Some(Some(5 << 20)));
    assert_eq!(typed("multipart_size=10").part_size, Some(Some(10 << 20)));
    assert_eq!(typed("write_part_size=10485760").part_size, Some(Some(10 << 20)));
    assert_eq!(typed("multipart_size=10M").part_size, Some(Some(10 << 20)));
    assert_eq!(typed("ensure_diskfree=100").min_free_space, Some(100 << 20));
    assert_eq!(typed("min_free_space=100").min_free_space, Some(100));
    assert_eq!(typed("max_cache_size=1024").cache_size, Some(Amount::Bytes(1 << 30)));
    assert_eq!(typed("memory_target=512").memory_limit, Some(512 << 20));
    assert_eq!(typed("stat_cache_expire=60").metadata_ttl, Some(Duration::from_secs(60)));
}

#[test]
fn words_of_other_programs_mean_what_they_meant_there() {
    assert_eq!(typed("use_sse=kmsid:K1").sse, Some(Some("aws:kms".into())));
    assert_eq!(typed("use_sse=kmsid:K1").sse_kms_key_id.as_deref(), Some("K1"));
    assert_eq!(typed("use_sse").sse, Some(Some("AES256".into())));
    assert_eq!(typed("dbglevel=err").log_level, Some(LogLevel::Error));
    assert_eq!(typed("storage_class=standard_ia").storage_class.as_deref(), Some("STANDARD_IA"));
    assert_eq!(typed("allow-delete").allow_delete, Some(true), "as mount-s3 has it");
    assert_eq!(typed("metadata-ttl=minimal").metadata_ttl, Some(Duration::ZERO));
}

#[test]
fn the_last_word_wins_and_ignore_adds_up() {
    assert_eq!(typed("ro,rw").ro, Some(false));
    assert_eq!(typed("nosuid,suid").nosuid, Some(false));
    let both = typed("ignore=+*.a,ignore=+*.b:*.c");
    assert_eq!((both.ignore, both.ignore_more), (None, vec!["*.a".into(), "*.b".into(), "*.c".into()]));
    let replaced = typed("ignore=+*.a,ignore=*.b");
    assert_eq!((replaced.ignore, replaced.ignore_more), (Some(vec!["*.b".into()]), vec![]));
}

#[test]
fn commas_in_values_are_quoted_or_escaped() {
    for options in [r#"ro,cache_control="public,max-age=60",rw"#, r"ro,cache_control=public\,max-age=60,rw"] {
        let typed = typed(options);
        assert_eq!(typed.cache_control.as_deref(), Some("public,max-age=60"));
        assert_eq!(typed.ro, Some(false));
    }
    assert_eq!(typed(r#"cloudfront="E1,e2""#).cloudfront, Some(CloudFront::Ids(vec!["E1".into(), "E2".into()])));
    assert_eq!(typed(r"fsname=a\\b\c").fsname.as_deref(), Some(r"a\b\c"));
    assert!(refusal(r#"fsname="a,b"#).contains("quote"));
    assert_eq!(typed(",,ro,,").ro, Some(true));
}

#[test]
fn tuning_words_are_remembered_for_one_warning() {
    assert_eq!(
        typed("big_writes,max-read=131072,multireq_max=5,enable_noobj_cache").ignored,
        ["big_writes", "max-read", "multireq_max", "enable_noobj_cache"]
    );
}

#[test]
fn an_unknown_word_names_the_nearest() {
    for (word, nearest) in [
        ("cach_size=1G", "cache_size"),
        ("allow_ohter", "allow_other"),
        ("writeback=5s", "write_back"),
        ("read-onyl", "read_only"),
        ("regoin=x", "region"),
        ("logfile=/x", "log_file"),
    ] {
        let message = refusal(word);
        assert!(message.starts_with("unknown option '") && message.ends_with(&format!("the nearest is {nearest}")), "{message}");
    }
    let mut sloppy = Typed::default();
    sloppy.options("cach_size=1G,ro", true).unwrap();
    assert_eq!((sloppy.ignored, sloppy.ro), (vec!["cach_size".to_owned()], Some(true)));
    assert!(Typed::default().options("cache_size=x", true).is_err(), "sloppy forgives words, not values");
}

#[test]
fn a_bad_value_names_option_value_and_what_is_taken() {
    for (word, message) in [
        ("cache_size=much", "cache_size=much: expected a size such as 512M or 20G, or a share of the disk such as 10%"),
        ("cache_size", "cache_size: expected a size such as 512M or 20G, or a share of the disk such as 10%"),
        ("close_timeout=5 parsecs", "close_timeout=5 parsecs: expected a time such as 30s, 5m or 1h30m"),
        ("on_conflict=merge", "on_conflict=merge: expected keep, overwrite or fail"),
        ("uid=no-such-user", "uid=no-such-user: expected a user's name or number"),
        ("max_connections=0", "max_connections=0: expected a whole number from 1 to 1024"),
        ("url=localhost:9000", "url=localhost:9000: expected an address such as https://s3.example.org:9000"),
        ("file_mode=rw", "file_mode=rw: expected an octal mode such as 0644"),
        ("ro=maybe", "ro=maybe: expected yes or no"),
        ("uid=4294967295", "uid=4294967295: expected a user's name or number"),
        ("ignore=a/b", "ignore=a/b: expected [+]PATTERN:PATTERN…, each for one name, without /"),
        ("cache_dir=", "cache_dir=: expected a path"),
    ] {
        assert_eq!(refusal(word), message);
    }
    assert!(refusal("use_sse=custom:/k").contains("not supported"));
}

#[test]
fn no_secret_is_taken_or_shown() {
    for word in ["secret_access_key=hunter2", "aws-secret-access-key=hunter2", "proxy=http://u:hunter2@proxy:1", "url=ftp://u:hunter2@host"]
    {
        let message = refusal(word);
        assert!(!message.contains("hunter2"), "{message}");
    }
    let file = Origin::File("/etc/packmule.toml".into(), 3);
    Typed::default().word("proxy", Some("http://u:p@proxy:1"), &file).unwrap();
}

#[test]
fn messages_name_file_and_variable() {
    let file = Origin::File("/etc/packmule.toml".into(), 3);
    let message = Typed::default().word("retries", Some("x"), &file).unwrap_err().to_string();
    assert_eq!(message, "/etc/packmule.toml:3: retries=x: expected a whole number from 0 to 100");
    let variable = Origin::Environment("PACKMULE_RETRIES".into());
    let message = Typed::default().word("retries", Some("x"), &variable).unwrap_err().to_string();
    assert_eq!(message, "PACKMULE_RETRIES=x: expected a whole number from 0 to 100");
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in ".*", word in 0..table::OPTIONS.len()) {
        let _ = Typed::default().options(&text, false);
        let _ = Typed::default().word(table::OPTIONS[word].name, Some(&text), &Origin::Arguments);
    }

    #[test]
    fn quoting_carries_any_value(value in "[^\"\\\\]*", other in "[a-z]{1,9}") {
        let words = split_options(&format!("{other},k=\"{value}\",{other}")).unwrap();
        prop_assert_eq!(words, [other.clone(), format!("k={value}"), other]);
    }

    #[test]
    fn escaping_carries_any_value(value in ".*") {
        let escaped = value.replace('\\', r"\\").replace(',', r"\,").replace('"', "\\\"");
        prop_assert_eq!(split_options(&format!("k={escaped}")).unwrap(), [format!("k={value}")]);
    }
}
