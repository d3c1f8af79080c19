//! The one table of options: every word that may be typed, what kind of value it has, and where the value goes.
//! The fstab grammar, the command line, the environment, the config file, the help, the completions, the man page and
//! docs/options.md all read it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::typed::Typed;
use super::values::{self, Amount};
use super::{CloudFront, Invalidate, LogLevel, MtimeSource, OnConflict};
use crate::s3::ChecksumKind;

/// Where an option stands in help and documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // see title()
pub enum Group {
    Mount,
    Fuse,
    Ownership,
    Where,
    Credentials,
    Objects,
    Reading,
    Writing,
    Safety,
    Network,
    CloudFront,
    Cost,
    Logs,
}

impl Group {
    /// Heading of the group.
    pub fn title(self) -> &'static str {
        match self {
            Self::Mount => "mount(8)",
            Self::Fuse => "fuse",
            Self::Ownership => "ownership",
            Self::Where => "where",
            Self::Credentials => "credentials",
            Self::Objects => "objects",
            Self::Reading => "reading",
            Self::Writing => "writing",
            Self::Safety => "safety",
            Self::Network => "network",
            Self::CloudFront => "cloudfront",
            Self::Cost => "cost",
            Self::Logs => "logs",
        }
    }
}

/// What an option's value is, and the field that takes it.
#[derive(Clone, Copy)]
pub enum Kind {
    /// The word alone, or with yes or no.
    Flag(fn(&mut Typed, bool)),
    /// Bytes.
    Size(fn(&mut Typed, u64)),
    /// Bytes, or the word that stands for `None`.
    SizeOr(&'static str, fn(&mut Typed, Option<u64>)),
    /// Bytes or a share of the disk.
    Share(fn(&mut Typed, Amount)),
    /// A time.
    Time(fn(&mut Typed, Duration)),
    /// A whole number in a range.
    Count(u64, u64, fn(&mut Typed, u64)),
    /// An amount of money.
    Price(fn(&mut Typed, f64)),
    /// Permission bits.
    Octal(fn(&mut Typed, u32)),
    /// A file or directory.
    Path(fn(&mut Typed, PathBuf)),
    /// An http or https address.
    Url(fn(&mut Typed, Url)),
    /// One of these words; the setter gets its place.
    Choice(&'static [&'static str], fn(&mut Typed, usize)),
    /// Anything else. `accepts` is said when the setter answers `None`; `missing` stands for a word without value.
    Text {
        /// What is accepted, after "expected".
        accepts: &'static str,
        /// The value of the bare word; `None`: a value must come.
        missing: Option<&'static str>,
        /// Takes the value or refuses it.
        set: fn(&mut Typed, &str) -> Option<()>,
    },
    /// Taken, and means nothing to us.
    Nothing,
}

/// Another program's word for an option. A bare number under it counts in `unit` bytes (times: always seconds).
#[derive(Clone, Copy)]
pub struct Alias {
    /// The word, with `_`.
    pub name: &'static str,
    /// Bytes of one.
    pub unit: u64,
}

/// One option.
#[derive(Clone, Copy)]
pub struct Opt {
    /// Our name, with `_`.
    pub name: &'static str,
    /// Other programs' names.
    pub aliases: &'static [Alias],
    /// Value and destination.
    pub kind: Kind,
    /// Place in help.
    pub group: Group,
    /// Default as documents show it; empty: none.
    pub default: &'static str,
    /// One line.
    pub help: &'static str,
}

const MIB: u64 = 1 << 20;

/// A word whose bare numbers are ours: bytes.
const fn same(name: &'static str) -> Alias {
    Alias { name, unit: 1 }
}

const fn unit(name: &'static str, unit: u64) -> Alias {
    Alias { name, unit }
}

const fn opt(group: Group, name: &'static str, aliases: &'static [Alias], kind: Kind, default: &'static str, help: &'static str) -> Opt {
    Opt { name, aliases, kind, group, default, help }
}

use Group as G;
use Kind::{Choice, Count, Flag, Nothing, Octal, Path, Price, Share, Size, SizeOr, Text, Time, Url as Address};

/// Any text but none.
const fn text(set: fn(&mut Typed, &str) -> Option<()>) -> Kind {
    Text { accepts: "a value", missing: None, set }
}

const fn text_of(accepts: &'static str, set: fn(&mut Typed, &str) -> Option<()>) -> Kind {
    Text { accepts, missing: None, set }
}

const SSE: &[&str] = &["AES256", "aws:kms", "aws:kms:dsse"];
const ACLS: &[&str] = &[
    "private",
    "public-read",
    "public-read-write",
    "authenticated-read",
    "aws-exec-read",
    "bucket-owner-read",
    "bucket-owner-full-control",
    "log-delivery-write",
];

/// All options, in the order of documents.
#[rustfmt::skip]
pub static OPTIONS: &[Opt] = &[
    opt(G::Mount, "ro", &[same("read_only")], Flag(|t, v| t.ro = Some(v)), "", "Mount read-only"),
    opt(G::Mount, "rw", &[], Flag(|t, v| t.ro = Some(!v)), "", "Mount for reading and writing"),
    opt(G::Mount, "nosuid", &[], Flag(|t, v| t.nosuid = Some(v)), "", "Ignore setuid and setgid bits"),
    opt(G::Mount, "suid", &[], Flag(|t, v| t.nosuid = Some(!v)), "", "The opposite of nosuid"),
    opt(G::Mount, "nodev", &[], Flag(|t, v| t.nodev = Some(v)), "", "Ignore device nodes"),
    opt(G::Mount, "dev", &[], Flag(|t, v| t.nodev = Some(!v)), "", "The opposite of nodev"),
    opt(G::Mount, "noexec", &[], Flag(|t, v| t.noexec = Some(v)), "", "Run no programs from the mount"),
    opt(G::Mount, "exec", &[], Flag(|t, v| t.noexec = Some(!v)), "", "The opposite of noexec"),
    opt(G::Mount, "noatime", &[], Flag(|t, v| t.noatime = Some(v)), "", "Do not update access times"),
    opt(G::Mount, "atime", &[same("relatime"), same("strictatime"), same("norelatime")], Flag(|t, v| t.noatime = Some(!v)), "", "The opposite of noatime"),
    opt(G::Mount, "sync", &[], Flag(|t, v| t.sync = Some(v)), "", "Every write reaches the spool's disk before it returns"),
    opt(G::Mount, "async", &[], Flag(|t, v| t.sync = Some(!v)), "", "The opposite of sync"),
    opt(G::Mount, "dirsync", &[], Flag(|t, v| t.dirsync = Some(v)), "", "As sync, for directories"),
    opt(G::Mount, "remount", &[], Flag(|t, v| t.remount = Some(v)), "", "Change ro, noexec, nosuid, nodev, noatime or sync of a mount; never mounts twice"),
    opt(G::Mount, "defaults", &[same("auto"), same("noauto"), same("user"), same("nouser"), same("users"), same("owner"), same("group"), same("nofail"), same("_netdev"),
        same("comment"), same("diratime"), same("nodiratime"), same("lazytime"), same("nolazytime"), same("silent"), same("loud"), same("iversion"), same("noiversion"), same("use_xattr"),
        // A remount by directory hands back what the kernel shows of a FUSE mount.
        same("user_id"), same("group_id"), same("rootmode"), same("fd")],
        Nothing, "", "Words for mount(8) itself, and x-*: taken and ignored"),

    opt(G::Fuse, "allow_other", &[], Flag(|t, v| t.allow_other = Some(v)), "", "Let every user of the machine in"),
    opt(G::Fuse, "allow_root", &[], Flag(|t, v| t.allow_root = Some(v)), "", "Let root in beside the user who mounts"),
    opt(G::Fuse, "default_permissions", &[], Flag(|t, v| t.default_permissions = Some(v)), "on with allow_other", "The kernel checks owner and mode"),
    opt(G::Fuse, "no_default_permissions", &[], Flag(|t, v| t.default_permissions = Some(!v)), "", "The opposite of default_permissions"),
    opt(G::Fuse, "foreground", &[], Flag(|t, v| t.foreground = Some(v)), "", "Stay in the foreground"),
    opt(G::Fuse, "fsname", &[], text(|t, v| { t.fsname = Some(v.into()); Some(()) }), "the source", "Name shown in /proc/mounts"),
    opt(G::Fuse, "nonempty", &[], Flag(|t, v| t.nonempty = Some(v)), "", "Mount over a directory that holds files"),

    opt(G::Ownership, "uid", &[], text_of("a user's name or number", |t, v| { t.uid = Some(user(v)?); Some(()) }), "who mounts", "Owner that every file shows"),
    opt(G::Ownership, "gid", &[], text_of("a group's name or number", |t, v| { t.gid = Some(group(v)?); Some(()) }), "who mounts", "Group that every file shows"),
    opt(G::Ownership, "umask", &[], Octal(|t, v| t.umask = Some(v)), "", "Permission bits that no file has"),
    opt(G::Ownership, "file_mode", &[same("file_perms")], Octal(|t, v| t.file_mode = Some(v)), "0644", "Permissions of files"),
    opt(G::Ownership, "dir_mode", &[same("dir_perms")], Octal(|t, v| t.dir_mode = Some(v)), "0755", "Permissions of directories"),
    opt(G::Ownership, "ownership", &[], Choice(&["store", "off"], |t, i| t.ownership = Some(i == 0)), "", "Keep mode and owner in the store even beside uid=, gid=, umask= …; off: never"),
    opt(G::Ownership, "symlinks", &[], Choice(&["store", "off"], |t, i| t.symlinks = Some(i == 0)), "store", "Keep symbolic links in the store as s3fs does"),

    opt(G::Where, "endpoint_url", &[same("url")], Address(|t, v| t.endpoint_url = Some(v)), "AWS", "Address of the S3 server"),
    opt(G::Where, "region", &[same("endpoint")], text(|t, v| { t.region = Some(v.into()); Some(()) }), "found by itself", "Region of the bucket"),
    opt(G::Where, "proxy", &[], Address(|t, v| t.proxy = Some(v)), "HTTPS_PROXY", "HTTP proxy"),
    opt(G::Where, "path_style", &[same("use_path_request_style"), same("force_path_style")], Flag(|t, v| t.path_style = Some(v)), "by endpoint", "Bucket in the path instead of the host name"),
    opt(G::Where, "ca_bundle", &[], Path(|t, v| t.ca_bundle = Some(v)), "the system's", "PEM file of certificate authorities to trust"),
    opt(G::Where, "no_check_certificate", &[], Flag(|t, v| t.no_check_certificate = Some(v)), "", "Trust any TLS certificate (for tests)"),
    opt(G::Where, "requester_pays", &[], Flag(|t, v| t.requester_pays = Some(v)), "", "Pay for requests to buckets of others"),
    opt(G::Where, "expected_bucket_owner", &[], text_of("an AWS account number of 12 digits", |t, v| {
        (v.len() == 12 && v.bytes().all(|b| b.is_ascii_digit())).then(|| t.expected_bucket_owner = Some(v.into()))
    }), "", "Fail unless this account owns the bucket"),
    opt(G::Where, "sigv2", &[], Flag(|t, v| t.sigv2 = Some(v)), "", "Sign as old stores want it"),
    opt(G::Where, "listobjectsv1", &[], Flag(|t, v| t.list_objects_v1 = Some(v)), "", "List as old stores want it"),
    opt(G::Where, "dual_stack", &[], Flag(|t, v| t.dual_stack = Some(v)), "", "AWS endpoints with IPv6"),
    opt(G::Where, "transfer_acceleration", &[], Flag(|t, v| t.transfer_acceleration = Some(v)), "", "AWS transfer acceleration endpoints"),

    opt(G::Credentials, "profile", &[], text(|t, v| { t.profile = Some(v.into()); Some(()) }), "AWS_PROFILE", "Profile of the AWS config files"),
    opt(G::Credentials, "passwd_file", &[], Path(|t, v| t.passwd_file = Some(v)), "", "Keys as s3fs keeps them: KEY:SECRET or BUCKET:KEY:SECRET a line"),
    opt(G::Credentials, "credentials_file", &[same("shared_config")], Path(|t, v| t.credentials_file = Some(v)), "~/.aws/credentials", "Keys as the AWS CLI keeps them"),
    opt(G::Credentials, "role_arn", &[], text_of("an ARN such as arn:aws:iam::123456789012:role/NAME", |t, v| v.starts_with("arn:").then(|| t.role_arn = Some(v.into()))), "", "Role to assume"),
    opt(G::Credentials, "external_id", &[], text(|t, v| { t.external_id = Some(v.into()); Some(()) }), "", "External id for role_arn"),
    opt(G::Credentials, "iam_role", &[], Text { accepts: "auto or a role's name", missing: Some("auto"), set: |t, v| { t.iam_role = Some(v.into()); Some(()) } }, "", "Credentials of the machine's role"),
    opt(G::Credentials, "no_sign_request", &[same("public_bucket")], Flag(|t, v| t.no_sign_request = Some(v)), "", "No credentials: public buckets"),

    opt(G::Objects, "default_acl", &[same("acl")], text_of("auto, private, public-read, public-read-write, authenticated-read, aws-exec-read, bucket-owner-read, bucket-owner-full-control or log-delivery-write", |t, v| {
        if v == "auto" { t.acl = Some(None); return Some(()); }
        ACLS.contains(&v).then(|| t.acl = Some(Some(v.into())))
    }), "auto", "Canned ACL of new objects; auto: the bucket's own"),
    opt(G::Objects, "storage_class", &[], text_of("a storage class such as STANDARD_IA", |t, v| {
        let known = ["STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR", "GLACIER", "DEEP_ARCHIVE", "REDUCED_REDUNDANCY"];
        let class = known.into_iter().find(|k| k.eq_ignore_ascii_case(v)).unwrap_or(v);
        class.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-').then(|| t.storage_class = Some(class.into()))
    }), "the bucket's", "Storage class of new objects"),
    opt(G::Objects, "sse", &[same("use_sse")], Text { accepts: "AES256, aws:kms, aws:kms:dsse, kmsid:KEY or off (keys of the customer are not supported)", missing: Some("AES256"), set: set_sse }, "the bucket's", "Server-side encryption of new objects"),
    opt(G::Objects, "sse_kms_key_id", &[], text(|t, v| { t.sse_kms_key_id = Some(v.into()); Some(()) }), "", "KMS key for sse=aws:kms"),
    opt(G::Objects, "cache_control", &[], text_of("a header value such as public,max-age=3600", |t, v| header_value(v).map(|v| t.cache_control = Some(v))), "", "Cache-Control of new objects"),
    opt(G::Objects, "header_rules", &[], Path(|t, v| t.header_rules = Some(v)), "", "TOML file of headers by file name"),
    opt(G::Objects, "tags", &[], text_of("up to ten KEY=VALUE pairs joined by &", |t, v| values::tags(v).map(|v| t.tags = Some(v))), "", "Tags of new objects"),

    opt(G::Reading, "cache_dir", &[same("use_cache"), same("cache")], Path(|t, v| t.cache_dir = Some(v)), "~/.cache/packmule", "Parent of the read cache"),
    opt(G::Reading, "cache_size", &[unit("max_cache_size", MIB), unit("vfs_cache_max_size", 1 << 10)], Share(|t, v| t.cache_size = Some(v)), "10% of the disk, at least 1G", "Bytes that the read cache may hold"),
    opt(G::Reading, "min_free_space", &[unit("ensure_diskfree", MIB)], Size(|t, v| t.min_free_space = Some(v)), "2G", "Bytes that cache and spool leave free on their disk"),
    opt(G::Reading, "metadata_ttl", &[same("stat_cache_expire"), same("dir_cache_time")], text_of("a time such as 5s or 1m, minimal or indefinite", |t, v| ttl(v).map(|v| t.metadata_ttl = Some(v))), "5s", "How long listings and attributes are believed"),
    opt(G::Reading, "negative_metadata_ttl", &[], text_of("a time such as 5s or 1m, minimal or indefinite", |t, v| ttl(v).map(|v| t.negative_metadata_ttl = Some(v))), "metadata_ttl", "How long a name that was not there is believed absent"),
    opt(G::Reading, "read_ahead", &[], SizeOr("auto", |t, v| t.read_ahead = Some(v)), "auto", "Largest read-ahead of one reader"),
    opt(G::Reading, "memory_limit", &[unit("memory_target", MIB)], Size(|t, v| t.memory_limit = Some(v)), "256M", "Memory of a mount, at least 64M"),

    opt(G::Writing, "write_back", &[same("vfs_write_back")], Time(|t, v| t.write_back = Some(v)), "0", "0: close(), unlink() and mkdir() wait for S3; else the delay of what they send"),
    opt(G::Writing, "spool_dir", &[], Path(|t, v| t.spool_dir = Some(v)), "the state directory", "Parent of the spool of unpublished bytes"),
    opt(G::Writing, "spool_size", &[], Share(|t, v| t.spool_size = Some(v)), "50% of the free disk", "Bytes of the disk that the spool may take"),
    opt(G::Writing, "part_size", &[unit("multipart_size", MIB), same("write_part_size")], SizeOr("auto", |t, v| t.part_size = Some(v)), "auto", "Part size of uploads; auto: 8M, growing"),
    opt(G::Writing, "max_connections", &[same("parallel_count"), same("transfers")], Count(1, 1024, |t, v| t.max_connections = Some(v)), "32", "Connections for transfers"),
    opt(G::Writing, "upload_checksums", &[], Choice(&["auto", "off", "md5", "crc32c", "crc64nvme"], |t, i| {
        t.upload_checksums = Some([None, Some(ChecksumKind::Off), Some(ChecksumKind::Md5), Some(ChecksumKind::Crc32c), Some(ChecksumKind::Crc64Nvme)].get(i).copied().flatten());
    }), "auto", "Checksum that the store verifies"),
    opt(G::Writing, "bwlimit", &[], SizeOr("off", |t, v| t.bwlimit = Some(v)), "off", "Bytes a second, in each direction"),
    opt(G::Writing, "on_conflict", &[], Choice(&["keep", "overwrite", "fail"], |t, i| t.on_conflict = [OnConflict::Keep, OnConflict::Overwrite, OnConflict::Fail].get(i).copied()), "keep", "When somebody else changed the object: keep both, overwrite, or fail"),
    opt(G::Writing, "close_timeout", &[], Time(|t, v| t.close_timeout = Some(v)), "5m", "How long close() goes on after the last byte moved"),

    opt(G::Safety, "allow_delete", &[], Flag(|t, v| t.allow_delete = Some(v)), "yes", "Files may be deleted and replaced by rename"),
    opt(G::Safety, "allow_bucket_changes", &[], Flag(|t, v| t.allow_bucket_changes = Some(v)), "no", "mkdir and rmdir at the top of s3:// make and remove buckets"),
    opt(G::Safety, "rename_limit", &[], Count(0, u64::MAX, |t, v| t.rename_limit = Some(v)), "100000", "Keys that one directory rename may move"),
    opt(G::Safety, "ignore", &[], text_of("[+]PATTERN:PATTERN…, each for one name, without /", |t, v| (!v.contains('/')).then(|| ignore(t, v))), "temporary names", "Names that never become objects; + adds to the list"),
    opt(G::Safety, "no_index", &[], Flag(|t, v| t.no_index = Some(v)), "on", "Keep desktop indexers out"),
    opt(G::Safety, "show_versions", &[], Flag(|t, v| t.show_versions = Some(v)), "", "Show old versions"),
    opt(G::Safety, "mtime", &[], Choice(&["store", "local", "server"], |t, i| t.mtime = [MtimeSource::Store, MtimeSource::Local, MtimeSource::Server].get(i).copied()), "store", "Keep mtime in the store, on this machine, or show the upload time"),

    opt(G::Network, "retries", &[], Count(0, 100, |t, v| t.retries = Some(v)), "5", "Times that a read or metadata request is sent again"),
    opt(G::Network, "connect_timeout", &[], Time(|t, v| t.connect_timeout = Some(v)), "10s", "How long a connection may take to be made"),
    opt(G::Network, "request_timeout", &[], Time(|t, v| t.request_timeout = Some(v)), "20s", "How long a request waits without a byte moving"),

    opt(G::CloudFront, "cloudfront", &[], text_of("auto, off or distribution ids joined by commas", |t, v| {
        t.cloudfront = Some(match v { "auto" => CloudFront::Auto, "off" => CloudFront::Off, ids => CloudFront::Ids(ids.split([',', ':', ' ']).filter(|i| !i.is_empty()).map(distribution).collect::<Option<_>>()?) });
        Some(())
    }), "auto", "Distributions that hear of changes"),
    opt(G::CloudFront, "invalidate", &[], Choice(&["overwrite", "all", "off"], |t, i| t.invalidate = [Invalidate::Overwrite, Invalidate::All, Invalidate::Off].get(i).copied()), "overwrite", "Changes that are invalidated"),
    opt(G::CloudFront, "invalidate_delay", &[], Time(|t, v| t.invalidate_delay = Some(v)), "5s", "How long invalidations are collected"),
    opt(G::CloudFront, "invalidate_budget", &[], Count(0, u64::MAX, |t, v| t.invalidate_budget = Some(v)), "1000", "Invalidation paths a month"),
    opt(G::CloudFront, "url_host", &[], text_of("a host name such as cdn.example.org", |t, v| (!v.contains(['/', ' ', '@'])).then(|| t.url_host = Some(v.into()))), "", "Host of the links that are shown"),
    opt(G::CloudFront, "key_pair_id", &[], text(|t, v| { t.key_pair_id = Some(v.into()); Some(()) }), "", "CloudFront key of signed URLs"),
    opt(G::CloudFront, "private_key", &[], Path(|t, v| t.private_key = Some(v)), "", "PEM file of that key"),

    opt(G::Cost, "price_put", &[], Price(|t, v| t.price_put = Some(v)), "AWS: 0.005", "Price of 1,000 requests of PUT, COPY, POST and LIST, for the estimate in status"),
    opt(G::Cost, "price_get", &[], Price(|t, v| t.price_get = Some(v)), "AWS: 0.0004", "Price of 1,000 requests of GET and all others (deleting and aborting is free)"),
    opt(G::Cost, "price_out", &[], Price(|t, v| t.price_out = Some(v)), "AWS: 0.09", "Price of 1 GB (2^30 bytes) received from the store"),
    opt(G::Cost, "currency", &[], text_of("three letters such as EUR", |t, v| {
        (v.len() == 3 && v.bytes().all(|b| b.is_ascii_alphabetic())).then(|| t.currency = Some(v.to_ascii_uppercase()))
    }), "USD", "Currency of the prices; one that is not USD needs all three"),

    opt(G::Logs, "log_file", &[], Path(|t, v| t.log_file = Some(v)), "the journal, else a file in the state directory", "Log here; journal: to systemd's journal (journalctl -t packmule)"),
    opt(G::Logs, "log_level", &[same("dbglevel")], Choice(&["error", "warn", "info", "debug", "trace", "crit", "err", "warning"], |t, i| {
        use LogLevel::{Debug, Error, Info, Trace, Warn};
        t.log_level = [Error, Warn, Info, Debug, Trace, Error, Error, Warn].get(i).copied();
    }), "info", "How much is logged"),
    opt(G::Logs, "notify", &[], Flag(|t, v| t.notify = Some(v)), "", "Desktop notifications"),
    opt(G::Logs, "metrics_addr", &[], text_of("ADDRESS:PORT or PORT", |t, v| metrics_addr(v).map(|v| t.metrics_addr = Some(v))), "", "Serve Prometheus metrics here (PORT alone: loopback)"),
];

/// Tuning words of libfuse, s3fs, rclone and mountpoint that have no meaning here, and whether a value follows them.
#[rustfmt::skip]
pub static TUNING: &[(&str, bool)] = &[
    // mount.fuse3(8), fuse(8)
    ("big_writes", false), ("max_read", true), ("max_write", true), ("max_readahead", true), ("max_background", true), ("congestion_threshold", true),
    ("max_idle_threads", true), ("max_threads", true), ("clone_fd", false), ("kernel_cache", false), ("auto_cache", false), ("noauto_cache", false), ("attr_timeout", true),
    ("entry_timeout", true), ("negative_timeout", true), ("ac_attr_timeout", true), ("noforget", false), ("remember", true), ("direct_io", false),
    ("hard_remove", false), ("async_read", false), ("sync_read", false), ("atomic_o_trunc", false), ("large_read", false), ("intr", false), ("intr_signal", true),
    ("use_ino", false), ("readdir_ino", false), ("nullpath_ok", false), ("splice_read", false), ("splice_write", false), ("splice_move", false), ("no_splice_read", false),
    ("no_splice_write", false), ("no_splice_move", false), ("no_remote_lock", false), ("no_remote_flock", false), ("no_remote_posix_lock", false), ("writeback_cache", false),
    ("auto_unmount", false), ("subtype", true), ("blksize", true), ("blkdev", false),
    // s3fs(1)
    ("multireq_max", true), ("parallel_upload", true), ("max_stat_cache_size", true), ("stat_cache_interval_expire", true), ("enable_noobj_cache", false), ("disable_noobj_cache", false),
    ("nodnscache", false), ("nosscache", false), ("readwrite_timeout", true), ("list_object_max_keys", true), ("check_cache_dir_exist", false), ("del_cache", false), ("tmpdir", true),
    ("max_dirty_data", true), ("multipart_copy_size", true), ("multipart_threshold", true), ("singlepart_copy_limit", true), ("nomultipart", false), ("nomixupload", false), ("streamupload", false),
    ("nocopyapi", false), ("norenameapi", false), ("enable_content_md5", false), ("enable_unsigned_payload", false), ("update_parent_dir_stat", false), ("complement_stat", false),
    ("compat_dir", false), ("notsup_compat_dir", false), ("noxmlns", false), ("noua", false), ("sigv4", false), ("listobjectsv2", false), ("instance_name", true), ("max_thread_count", true),
    ("curldbg", false), ("no_time_stamp_msg", false), ("set_check_cache_sigusr1", true), ("mime", true), ("ecs", false), ("imdsv1only", false), ("use_session_token", false),
    ("use_wtf8", false), ("free_space_ratio", true), ("bucket_size", true), ("ssl_verify_hostname", true),
    // rclone mount, mount-s3
    ("vfs_cache_mode", true), ("vfs_cache_max_age", true), ("vfs_cache_poll_interval", true), ("vfs_read_chunk_size", true), ("vfs_read_chunk_size_limit", true), ("vfs_read_ahead", true),
    ("buffer_size", true), ("poll_interval", true), ("checkers", true), ("daemon", false), ("daemon_timeout", true), ("no_modtime", false), ("no_checksum", false), ("no_seek", false),
    ("allow_overwrite", false), ("incremental_upload", false), ("maximum_throughput_gbps", true), ("read_part_size", true), ("cache_block_size", true),
];

/// Words that would carry a secret. argv is public (`ps`, `/proc/mounts`), so they are refused with the way to say it.
pub static SECRETS: &[&str] = &[
    "access_key",
    "access_key_id",
    "aws_access_key_id",
    "secret",
    "secret_key",
    "secret_access_key",
    "aws_secret_access_key",
    "session_token",
    "aws_session_token",
    "password",
    "passwd",
    "accesskey",
    "secretkey",
];

/// The option of a word (with `_`), and the bytes that a bare number under it counts in.
pub fn find(word: &str) -> Option<(&'static Opt, u64)> {
    OPTIONS.iter().find_map(|option| {
        if option.name == word {
            return Some((option, 1));
        }
        option.aliases.iter().find(|alias| alias.name == word).map(|alias| (option, alias.unit))
    })
}

/// Every word that has a meaning, ours first.
pub fn words() -> impl Iterator<Item = &'static str> {
    OPTIONS.iter().flat_map(|option| std::iter::once(option.name).chain(option.aliases.iter().map(|alias| alias.name)))
}

fn user(text: &str) -> Option<u32> {
    values::count(text)
        .map(u32::try_from)
        .map_or_else(|| nix::unistd::User::from_name(text).ok().flatten().map(|user| user.uid.as_raw()), known)
}

fn group(text: &str) -> Option<u32> {
    values::count(text)
        .map(u32::try_from)
        .map_or_else(|| nix::unistd::Group::from_name(text).ok().flatten().map(|group| group.gid.as_raw()), known)
}

/// chown(2) takes -1 for "leave it": no file can have that owner.
fn known(id: Result<u32, std::num::TryFromIntError>) -> Option<u32> {
    id.ok().filter(|id| *id != u32::MAX)
}

/// A time, or mount-s3's two words.
fn ttl(text: &str) -> Option<Duration> {
    match text {
        "minimal" => Some(Duration::ZERO),
        "indefinite" => Some(Duration::from_secs(100 * 365 * 86_400)),
        _ => values::time(text),
    }
}

/// s3fs says `use_sse`, `use_sse=1`, `use_sse=kmsid:KEY` where the AWS CLI says `AES256` and `aws:kms`.
fn set_sse(t: &mut Typed, text: &str) -> Option<()> {
    if let Some(known) = SSE.iter().find(|known| known.eq_ignore_ascii_case(text)) {
        t.sse = Some(Some((*known).into()));
        return Some(());
    }
    match text {
        "off" | "0" => t.sse = Some(None),
        "1" => t.sse = Some(Some("AES256".into())),
        "kmsid" | "k" => t.sse = Some(Some("aws:kms".into())),
        _ => {
            let key = text.strip_prefix("kmsid:").or_else(|| text.strip_prefix("k:")).filter(|key| !key.is_empty())?;
            t.sse = Some(Some("aws:kms".into()));
            t.sse_kms_key_id = Some(key.into());
        }
    }
    Some(())
}

/// A value that can travel in an HTTP header.
pub fn header_value(text: &str) -> Option<String> {
    let text = text.trim();
    text.bytes().all(|b| (0x20..0x7f).contains(&b)).then(|| text.to_owned())
}

/// Patterns are joined by `:`, or by commas where those are quoted.
fn ignore(t: &mut Typed, text: &str) {
    let patterns = |text: &str| text.split([':', ',']).filter(|p| !p.is_empty()).map(str::to_owned).collect();
    match text.strip_prefix('+') {
        Some(more) => {
            let more: Vec<String> = patterns(more);
            t.ignore_more.extend(more);
        }
        None => {
            t.ignore = Some(patterns(text));
            t.ignore_more.clear();
        }
    }
}

fn distribution(id: &str) -> Option<String> {
    id.bytes().all(|b| b.is_ascii_alphanumeric()).then(|| id.to_ascii_uppercase())
}

fn metrics_addr(text: &str) -> Option<SocketAddr> {
    match text.strip_prefix(':').unwrap_or(text).parse::<u16>() {
        Ok(port) => Some(SocketAddr::from(([127, 0, 0, 1], port))),
        Err(_) => text.parse().ok(),
    }
}
