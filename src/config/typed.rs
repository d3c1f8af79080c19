//! What was typed, from whichever layer, before it means anything: every field is `None` until a word sets it, and the
//! last word wins.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::values::Amount;
use super::{CloudFront, Invalidate, LogLevel, MtimeSource, OnConflict};
use crate::publish::headers::HeaderRule;
use crate::s3::ChecksumKind;

/// The options of one mount as typed. `Option<Option<_>>` is a word that can also say `auto` or `off`.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)] // each field is the option of the same name; table.rs describes them
pub struct Typed {
    pub ro: Option<bool>,
    pub noexec: Option<bool>,
    pub nosuid: Option<bool>,
    pub nodev: Option<bool>,
    pub noatime: Option<bool>,
    pub sync: Option<bool>,
    pub dirsync: Option<bool>,
    pub remount: Option<bool>,
    pub allow_other: Option<bool>,
    pub allow_root: Option<bool>,
    pub default_permissions: Option<bool>,
    pub nonempty: Option<bool>,
    pub foreground: Option<bool>,
    pub fsname: Option<String>,

    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub umask: Option<u32>,
    pub file_mode: Option<u32>,
    pub dir_mode: Option<u32>,
    pub ownership: Option<bool>,
    pub symlinks: Option<bool>,

    pub endpoint_url: Option<Url>,
    pub region: Option<String>,
    pub proxy: Option<Url>,
    pub path_style: Option<bool>,
    pub ca_bundle: Option<PathBuf>,
    pub no_check_certificate: Option<bool>,
    pub requester_pays: Option<bool>,
    pub expected_bucket_owner: Option<String>,
    pub sigv2: Option<bool>,
    pub list_objects_v1: Option<bool>,
    pub dual_stack: Option<bool>,
    pub transfer_acceleration: Option<bool>,

    pub profile: Option<String>,
    pub passwd_file: Option<PathBuf>,
    pub credentials_file: Option<PathBuf>,
    pub role_arn: Option<String>,
    pub external_id: Option<String>,
    pub iam_role: Option<String>,
    pub no_sign_request: Option<bool>,

    pub acl: Option<Option<String>>,
    pub storage_class: Option<String>,
    pub sse: Option<Option<String>>,
    pub sse_kms_key_id: Option<String>,
    pub cache_control: Option<String>,
    pub header_rules: Option<PathBuf>,
    /// `[[header_rules]]` of the config files, over all layers.
    pub rules: Vec<HeaderRule>,
    pub tags: Option<Vec<(String, String)>>,

    pub cache_dir: Option<PathBuf>,
    pub cache_size: Option<Amount>,
    pub min_free_space: Option<u64>,
    pub metadata_ttl: Option<Duration>,
    pub negative_metadata_ttl: Option<Duration>,
    pub read_ahead: Option<Option<u64>>,
    pub memory_limit: Option<u64>,

    pub write_back: Option<Duration>,
    pub spool_dir: Option<PathBuf>,
    pub spool_size: Option<Amount>,
    pub part_size: Option<Option<u64>>,
    pub max_connections: Option<u64>,
    pub upload_checksums: Option<Option<ChecksumKind>>,
    pub bwlimit: Option<Option<u64>>,
    pub on_conflict: Option<OnConflict>,
    pub close_timeout: Option<Duration>,

    pub allow_delete: Option<bool>,
    pub allow_bucket_changes: Option<bool>,
    pub rename_limit: Option<u64>,
    /// `ignore=PATTERNS`: the list that replaces the default one.
    pub ignore: Option<Vec<String>>,
    /// `ignore=+PATTERNS`: added to the list, over all layers.
    pub ignore_more: Vec<String>,
    pub no_index: Option<bool>,
    pub show_versions: Option<bool>,
    pub mtime: Option<MtimeSource>,

    pub retries: Option<u64>,
    pub connect_timeout: Option<Duration>,
    pub request_timeout: Option<Duration>,

    pub cloudfront: Option<CloudFront>,
    pub invalidate: Option<Invalidate>,
    pub invalidate_delay: Option<Duration>,
    pub invalidate_budget: Option<u64>,
    pub url_host: Option<String>,
    pub key_pair_id: Option<String>,
    pub private_key: Option<PathBuf>,

    pub price_put: Option<f64>,
    pub price_get: Option<f64>,
    pub price_out: Option<f64>,
    pub currency: Option<String>,

    pub log_file: Option<PathBuf>,
    pub log_level: Option<LogLevel>,
    pub notify: Option<bool>,
    pub metrics_addr: Option<SocketAddr>,

    /// Words of other programs that mean nothing here, in the order typed.
    pub ignored: Vec<String>,
    /// Our names of the options given on the command line or in the fstab.
    pub given: Vec<&'static str>,
}
