//! From what was typed to what it means: defaults, names, directories, disks, and words that contradict each other.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::layers::Environment;
use super::typed::Typed;
use super::values::Amount;
use super::{Config, ConfigError, MountFlags, Named, Of, Origin, Source, aws_profile};
use crate::cost::{Prices, USD};
use crate::s3::client::ClientConfig;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Names that never become objects (promise 10).
pub const TEMPORARY_NAMES: &[&str] = &[
    ".goutputstream-*",
    "*.part",
    "*.crdownload",
    ".org.chromium.Chromium.*",
    ".*.??????",
    ".~lock.*#",
    "lu*.tmp",
    "~$*",
    ".DS_Store",
    "Thumbs.db",
    "._*",
];

/// One word or `-o` argument of a mount command, in the order typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// mount(8)'s `-o` argument.
    Options(String),
    /// `--name[=value]`.
    Word(String, Option<String>),
}

/// A mount as it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invocation {
    /// First argument.
    pub source: String,
    /// Second argument.
    pub mountpoint: PathBuf,
    /// Options, in the order typed.
    pub arguments: Vec<Argument>,
    /// mount(8)'s `-s`: unknown words are ignored.
    pub sloppy: bool,
}

impl Invocation {
    /// A mount with one `-o` argument.
    pub fn new(source: impl Into<String>, mountpoint: impl Into<PathBuf>, options: impl Into<String>) -> Self {
        Self { source: source.into(), mountpoint: mountpoint.into(), arguments: vec![Argument::Options(options.into())], sloppy: false }
    }

    /// Puts the arguments over what is already typed.
    pub fn apply(&self, typed: &mut Typed) -> Result<(), ConfigError> {
        for argument in &self.arguments {
            match argument {
                Argument::Options(text) => typed.options(text, self.sloppy)?,
                Argument::Word(name, value) => typed.word(name, value.as_deref(), &Origin::Arguments)?,
            }
        }
        Ok(())
    }
}

impl Config {
    /// Defaults < config files < environment < arguments, resolved.
    pub fn load(invocation: &Invocation, environment: &Environment) -> Result<Self, ConfigError> {
        let Some(named) = Named::find(environment, &invocation.source)? else {
            let source = Source::parse(&invocation.source)?;
            let mut typed = Typed::inherited(environment, Of::Source(&source))?;
            invocation.apply(&mut typed)?;
            return Self::resolve(source, invocation, typed, environment);
        };
        let mut typed = Typed::inherited(environment, Of::Name(&named))?;
        invocation.apply(&mut typed)?;
        let mut invocation = invocation.clone();
        if invocation.mountpoint.as_os_str().is_empty()
            && let Some(mountpoint) = named.mountpoint
        {
            invocation.mountpoint = absolute(mountpoint, environment)?;
        }
        Self::resolve(named.source, &invocation, typed, environment)
    }

    fn resolve(source: Source, invocation: &Invocation, mut t: Typed, environment: &Environment) -> Result<Self, ConfigError> {
        aws_profile::fill(&mut t, environment)?;
        let place = |path: PathBuf| absolute(path, environment);
        let state_dir = state_dir(environment)?;
        let cache_dir = cache_of(&mut t, environment)?;
        let spool_dir = spool_of(&mut t, &state_dir, environment)?;
        let mountpoint = mountpoint(&invocation.mountpoint)?;
        let log_journal = t.log_file.as_deref() == Some(Path::new("journal"));
        let log_file = t.log_file.take().filter(|_| !log_journal).map(place).transpose()?;
        if spool_dir.starts_with(&cache_dir) {
            return Err(ConfigError::new(format!(
                "spool_dir={} lies in the cache, which people delete; name a directory outside {}",
                spool_dir.display(),
                cache_dir.display()
            )));
        }
        for (name, path) in [("cache_dir", Some(&cache_dir)), ("spool_dir", Some(&spool_dir)), ("log_file", log_file.as_ref())] {
            if let Some(path) = path.filter(|path| path.starts_with(&mountpoint)) {
                return Err(ConfigError::new(format!(
                    "{name}={} lies under the mountpoint; name a place outside {}",
                    path.display(),
                    mountpoint.display()
                )));
            }
        }
        check(&t)?;
        let close_timeout = t.close_timeout.unwrap_or(Duration::from_secs(300));
        let metadata_ttl = t.metadata_ttl.unwrap_or(Duration::from_secs(5));
        Ok(Self {
            fsname: t.fsname.take().unwrap_or_else(|| invocation.source.clone()),
            source,
            mountpoint,
            mount: flags(&t),
            uid: t.uid,
            gid: t.gid,
            umask: t.umask,
            file_mode: t.file_mode,
            dir_mode: t.dir_mode,
            ownership: t.ownership,
            symlinks: t.symlinks.unwrap_or(true),
            cache_size: match t.cache_size {
                Some(amount) => bytes(amount, || disk(&cache_dir).0),
                None => (disk(&cache_dir).0 / 10).max(GIB),
            },
            min_free_space: t.min_free_space.unwrap_or(2 * GIB),
            metadata_ttl,
            negative_metadata_ttl: t.negative_metadata_ttl.unwrap_or(metadata_ttl),
            read_ahead: t.read_ahead.flatten(),
            memory_limit: t.memory_limit.unwrap_or(256 * MIB),
            write_back: t.write_back.unwrap_or_default(),
            spool_size: bytes(t.spool_size.unwrap_or(Amount::Percent(50.0)), || disk(&spool_dir).1),
            part_size: t.part_size.flatten(),
            max_connections: count(t.max_connections, 32) as usize,
            upload_checksums: t.upload_checksums.flatten(),
            bwlimit: t.bwlimit.flatten(),
            on_conflict: t.on_conflict.unwrap_or_default(),
            close_timeout,
            allow_delete: t.allow_delete.unwrap_or(true),
            allow_bucket_changes: t.allow_bucket_changes.unwrap_or(false),
            rename_limit: t.rename_limit.unwrap_or(100_000),
            ignore: ignore(&mut t),
            no_index: t.no_index.unwrap_or(true),
            show_versions: t.show_versions.unwrap_or(false),
            mtime: t.mtime.unwrap_or_default(),
            rules: std::mem::take(&mut t.rules),
            header_rules: readable("header_rules", t.header_rules.take(), environment)?,
            cache_control: t.cache_control.take(),
            tags: t.tags.clone().unwrap_or_default(),
            cloudfront: t.cloudfront.take().unwrap_or_default(),
            invalidate: t.invalidate.unwrap_or_default(),
            invalidate_delay: t.invalidate_delay.unwrap_or(Duration::from_secs(5)),
            invalidate_budget: t.invalidate_budget.unwrap_or(1000),
            url_host: t.url_host.take(),
            key_pair_id: t.key_pair_id.take(),
            private_key: readable("private_key", t.private_key.take(), environment)?,
            prices: Prices { put: t.price_put, get: t.price_get, out: t.price_out, currency: t.currency.take() },
            log_file,
            log_journal,
            log_level: t.log_level.unwrap_or_default(),
            notify: t.notify.unwrap_or(false),
            metrics_addr: t.metrics_addr,
            ignored_words: std::mem::take(&mut t.ignored),
            client: client(t, close_timeout, environment)?,
            cache_dir,
            spool_dir,
            state_dir,
        })
    }

    /// The one warning about words of other programs, if there were any.
    pub fn warning(&self) -> Option<String> {
        let words = &self.ignored_words;
        (!words.is_empty()).then(|| format!("ignored, packmule has no use for: {}", words.join(", ")))
    }
}

/// What a client needs that belongs to no mount (`packmule link s3://…`).
pub fn client_of(arguments: &[Argument], source: &Source, environment: &Environment) -> Result<ClientConfig, ConfigError> {
    let mut typed = Typed::inherited(environment, Of::Source(source))?;
    Invocation { arguments: arguments.to_vec(), ..Invocation::default() }.apply(&mut typed)?;
    aws_profile::fill(&mut typed, environment)?;
    check(&typed)?;
    let close_timeout = typed.close_timeout.unwrap_or(Duration::from_secs(300));
    client(typed, close_timeout, environment)
}

/// Where the spool of a mount is whose own options do not say it.
pub fn spool_dir(environment: &Environment) -> Result<PathBuf, ConfigError> {
    spool_of(&mut Typed::inherited(environment, Of::All)?, &state_dir(environment)?, environment)
}

/// Where the cache of a mount is whose own options do not say it.
pub fn cache_dir(environment: &Environment) -> Result<PathBuf, ConfigError> {
    cache_of(&mut Typed::inherited(environment, Of::All)?, environment)
}

fn cache_of(t: &mut Typed, environment: &Environment) -> Result<PathBuf, ConfigError> {
    match t.cache_dir.take() {
        Some(path) => absolute(path, environment),
        None => environment.directory("XDG_CACHE_HOME", "/var/cache/packmule", ".cache/packmule"),
    }
}

fn state_dir(environment: &Environment) -> Result<PathBuf, ConfigError> {
    environment.directory("XDG_STATE_HOME", "/var/lib/packmule", ".local/state/packmule")
}

fn spool_of(t: &mut Typed, state_dir: &Path, environment: &Environment) -> Result<PathBuf, ConfigError> {
    match t.spool_dir.take() {
        Some(path) => absolute(path, environment),
        None => Ok(state_dir.join("spool")),
    }
}

/// Flags as they will be; a remount takes its own from [`Typed`].
fn flags(t: &Typed) -> MountFlags {
    let allow_other = t.allow_other.unwrap_or(false);
    MountFlags {
        ro: t.ro.unwrap_or(false),
        noexec: t.noexec.unwrap_or(false),
        nosuid: t.nosuid.unwrap_or(false),
        nodev: t.nodev.unwrap_or(false),
        noatime: t.noatime.unwrap_or(false),
        sync: t.sync.unwrap_or(false),
        dirsync: t.dirsync.unwrap_or(false),
        allow_other,
        allow_root: t.allow_root.unwrap_or(false),
        default_permissions: t.default_permissions.unwrap_or(allow_other),
        nonempty: t.nonempty.unwrap_or(false),
        foreground: t.foreground.unwrap_or(false),
        remount: t.remount.unwrap_or(false),
    }
}

/// Words that cannot stand together, and numbers that S3 does not take.
fn check(t: &Typed) -> Result<(), ConfigError> {
    let yes = |flag: Option<bool>| flag == Some(true);
    let sse = t.sse.as_ref().and_then(Option::as_deref);
    let wrong = if yes(t.allow_other) && yes(t.allow_root) {
        "allow_other and allow_root exclude each other; allow_other lets root in too"
    } else if t.external_id.is_some() && t.role_arn.is_none() {
        "external_id belongs to a role; give role_arn too"
    } else if t.sse_kms_key_id.is_some() && t.sse.is_some() && !sse.is_some_and(|sse| sse.starts_with("aws:kms")) {
        "sse_kms_key_id needs sse=aws:kms or sse=aws:kms:dsse"
    } else if yes(t.transfer_acceleration) && t.endpoint_url.is_some() {
        "transfer_acceleration is AWS's own; leave out it or endpoint_url"
    } else if yes(t.transfer_acceleration) && yes(t.path_style) {
        "transfer_acceleration needs the bucket in the host name; leave out it or path_style"
    } else if t.part_size.flatten().is_some_and(|size| !(5 * MIB..=5 * GIB).contains(&size)) {
        "part_size: S3 takes parts from 5M to 5G"
    } else if t.memory_limit.is_some_and(|limit| limit < 64 * MIB) {
        "memory_limit: expected at least 64M"
    } else if t.close_timeout.is_some_and(|timeout| timeout.is_zero()) {
        "close_timeout: expected a time above 0, uploads need some"
    } else if t.request_timeout.is_some_and(|timeout| timeout.is_zero()) {
        "request_timeout: expected a time above 0"
    } else if t.connect_timeout.is_some_and(|timeout| timeout.is_zero()) {
        "connect_timeout: expected a time above 0"
    } else if t.currency.as_ref().is_some_and(|currency| currency != USD) && [t.price_put, t.price_get, t.price_out].contains(&None) {
        "currency: the prices that are known are in USD; give price_put, price_get and price_out too"
    } else if t.bwlimit.flatten() == Some(0) {
        "bwlimit: expected a size above 0, or off"
    } else {
        return Ok(());
    };
    Err(ConfigError::new(wrong))
}

fn client(t: Typed, close_timeout: Duration, environment: &Environment) -> Result<ClientConfig, ConfigError> {
    Ok(ClientConfig {
        endpoint_url: t.endpoint_url,
        region: t.region,
        proxy: t.proxy,
        path_style: t.path_style,
        ca_bundle: readable("ca_bundle", t.ca_bundle, environment)?,
        no_check_certificate: t.no_check_certificate.unwrap_or(false),
        requester_pays: t.requester_pays.unwrap_or(false),
        expected_bucket_owner: t.expected_bucket_owner,
        sigv2: t.sigv2.unwrap_or(false),
        list_objects_v1: t.list_objects_v1.unwrap_or(false),
        dual_stack: t.dual_stack.unwrap_or(false),
        transfer_acceleration: t.transfer_acceleration.unwrap_or(false),
        profile: t.profile,
        passwd_file: readable("passwd_file", t.passwd_file, environment)?,
        credentials_file: readable("credentials_file", t.credentials_file, environment)?,
        role_arn: t.role_arn,
        external_id: t.external_id,
        iam_role: t.iam_role,
        no_sign_request: t.no_sign_request.unwrap_or(false),
        acl: t.acl.flatten(),
        storage_class: t.storage_class,
        sse: t.sse.unwrap_or_else(|| t.sse_kms_key_id.is_some().then(|| "aws:kms".to_owned())),
        sse_kms_key_id: t.sse_kms_key_id,
        tags: t.tags.unwrap_or_default(),
        upload_checksum: t.upload_checksums.flatten(),
        bwlimit: t.bwlimit.flatten(),
        retries: u32::try_from(count(t.retries, 5)).unwrap_or(u32::MAX),
        connect_timeout: t.connect_timeout.unwrap_or(Duration::from_secs(10)),
        request_timeout: t.request_timeout.unwrap_or(Duration::from_secs(20)),
        close_timeout,
        max_connections: count(t.max_connections, 32) as usize,
    })
}

fn count(typed: Option<u64>, default: u64) -> u64 {
    typed.unwrap_or(default)
}

fn ignore(t: &mut Typed) -> Vec<String> {
    let mut patterns = t.ignore.take().unwrap_or_else(|| TEMPORARY_NAMES.iter().map(|name| (*name).to_owned()).collect());
    patterns.append(&mut t.ignore_more);
    patterns
}

/// A file that must be there and readable before anything is mounted.
fn readable(option: &str, path: Option<PathBuf>, environment: &Environment) -> Result<Option<PathBuf>, ConfigError> {
    let Some(path) = path else { return Ok(None) };
    let path = absolute(path, environment)?;
    let told = |why: &dyn std::fmt::Display| ConfigError::new(format!("{option}={}: {why}; name a file that you may read", path.display()));
    let file = std::fs::File::open(&path).map_err(|error| told(&error))?;
    match file.metadata() {
        Ok(metadata) if metadata.is_dir() => Err(told(&"is a directory")),
        _ => Ok(Some(path)),
    }
}

/// Paths are absolute before the program goes to the background; `~/` is the home directory, as shells leave it in
/// `-o cache_dir=~/x`.
pub(crate) fn absolute(path: PathBuf, environment: &Environment) -> Result<PathBuf, ConfigError> {
    let path = match (path.strip_prefix("~"), &environment.home) {
        (Ok(below), Some(home)) => home.join(below),
        _ => path,
    };
    std::path::absolute(&path).map_err(|error| ConfigError::new(format!("{}: {error}", path.display())))
}

/// The mountpoint as `/proc/self/mountinfo` will spell it. A dead mount cannot be resolved itself, but its parent can.
fn mountpoint(typed: &Path) -> Result<PathBuf, ConfigError> {
    if typed.as_os_str().is_empty() {
        return Err(ConfigError::new(
            "no mountpoint; write packmule mount SOURCE DIRECTORY, or mountpoint = \"DIRECTORY\" into the config file's section of this mount",
        ));
    }
    let absolute = std::path::absolute(typed).map_err(|error| ConfigError::new(format!("{}: {error}", typed.display())))?;
    if let Ok(real) = absolute.canonicalize() {
        return Ok(real);
    }
    Ok(match (absolute.parent().map(Path::canonicalize), absolute.components().next_back()) {
        (Some(Ok(parent)), Some(Component::Normal(name))) => parent.join(name),
        _ => absolute,
    })
}

fn bytes(amount: Amount, whole: impl FnOnce() -> u64) -> u64 {
    match amount {
        Amount::Bytes(bytes) => bytes,
        Amount::Percent(percent) => (whole() as f64 * percent / 100.0) as u64,
    }
}

/// Size and free bytes of the disk that a directory lies on or will lie on; 0 where nothing can be known.
pub(crate) fn disk(directory: &Path) -> (u64, u64) {
    let statvfs = directory.ancestors().find_map(|path| nix::sys::statvfs::statvfs(path).ok());
    statvfs.map_or((0, 0), |s| (s.blocks().saturating_mul(s.fragment_size()), s.blocks_available().saturating_mul(s.fragment_size())))
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
