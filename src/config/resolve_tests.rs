#![allow(clippy::unwrap_used)]
use super::*;
use crate::config::{LogLevel, MtimeSource, OnConflict};

struct Place {
    dir: tempfile::TempDir,
    environment: Environment,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let environment = Environment::isolated(dir.path());
        Self { dir, environment }
    }

    fn load(&self, options: &str) -> Result<Config, ConfigError> {
        Config::load(&Invocation::new("s3://releases/docs", self.dir.path().join("mnt"), options), &self.environment)
    }

    fn refusal(&self, options: &str) -> String {
        self.load(options).unwrap_err().to_string()
    }

    fn config_file(&mut self, text: &str) -> PathBuf {
        let path = self.dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        self.environment.variables.insert("PACKMULE_CONFIG".into(), path.display().to_string());
        path
    }

    fn variable(&mut self, name: &str, value: &str) {
        self.environment.variables.insert(name.into(), value.into());
    }
}

#[test]
fn defaults() {
    let place = Place::new();
    let config = place.load("").unwrap();
    assert_eq!(config.source, Source::Bucket { bucket: "releases".into(), prefix: "docs/".into() });
    assert_eq!(config.fsname, "s3://releases/docs");
    assert_eq!(config.mountpoint, place.dir.path().canonicalize().unwrap().join("mnt"));
    assert_eq!(config.mount, MountFlags::default());
    assert_eq!((config.write_back, config.close_timeout), (Duration::ZERO, Duration::from_secs(300)));
    assert_eq!((config.metadata_ttl, config.negative_metadata_ttl), (Duration::from_secs(5), Duration::from_secs(5)));
    assert_eq!((config.memory_limit, config.min_free_space, config.part_size), (256 * MIB, 2 * GIB, None));
    assert_eq!((config.max_connections, config.rename_limit, config.invalidate_budget), (32, 100_000, 1000));
    assert!(config.cache_size >= GIB);
    assert!(config.allow_delete && config.no_index && config.symlinks && !config.allow_bucket_changes);
    assert_eq!((config.on_conflict, config.mtime, config.log_level), (OnConflict::Keep, MtimeSource::Store, LogLevel::Info));
    assert_eq!(config.ignore, TEMPORARY_NAMES);
    assert_eq!((config.client.retries, config.client.request_timeout), (5, Duration::from_secs(20)));
    assert_eq!((config.upload_checksums, config.client.acl.as_deref(), config.client.path_style), (None, None, None));
    assert_eq!(config.state_dir, place.dir.path().join(".local/state/packmule"));
    assert_eq!(config.spool_dir, place.dir.path().join(".local/state/packmule/spool"));
    assert_eq!(config.cache_dir, place.dir.path().join(".cache/packmule"));
    assert_eq!(config.warning(), None);
}

#[test]
fn directories_of_root_and_of_xdg() {
    let mut place = Place::new();
    place.environment.root = true;
    let config = place.load("").unwrap();
    assert_eq!(config.state_dir, Path::new("/var/lib/packmule"));
    assert_eq!(config.cache_dir, Path::new("/var/cache/packmule"));
    place.variable("XDG_STATE_HOME", "/x/state");
    place.variable("XDG_CACHE_HOME", "relative");
    let config = place.load("").unwrap();
    assert_eq!(config.spool_dir, Path::new("/x/state/packmule/spool"));
    assert_eq!(config.cache_dir, Path::new("/var/cache/packmule"), "XDG: a relative path is to be ignored");
    place.environment.root = false;
    place.environment.home = None;
    assert!(place.refusal("").contains("HOME"));
}

#[test]
fn each_layer_overrides_the_one_below() {
    let mut place = Place::new();
    let retries = |place: &Place, options: &str| place.load(options).unwrap().client.retries;
    place.config_file("retries = 1\nfile_mode = 0o640\n[mount.\"s3://releases/docs/\"]\ncache_control = \"no-cache\"\n[mount.\"s3://other\"]\nretries = 9\n");
    assert_eq!(retries(&place, ""), 1);
    let config = place.load("").unwrap();
    assert_eq!((config.file_mode, config.cache_control.as_deref()), (Some(0o640), Some("no-cache")));
    place.variable("PACKMULE_RETRIES", "2");
    assert_eq!(retries(&place, ""), 2);
    assert_eq!(retries(&place, "retries=3"), 3);
    place.config_file("price_put = 0.01\nprice_get = 0\ncurrency = \"eur\"\n");
    place.variable("PACKMULE_PRICE_OUT", "0.1");
    let prices = Prices { put: Some(0.01), get: Some(0.0), out: Some(0.2), currency: Some("EUR".into()) };
    assert_eq!(place.load("price_out=0.2").unwrap().prices, prices);
    assert_eq!(place.load("ignore=+*.bak").unwrap().ignore.len(), TEMPORARY_NAMES.len() + 1);
    assert_eq!(place.load("ignore=*.bak").unwrap().ignore, ["*.bak"]);
}

#[test]
fn a_config_file_is_refused_by_line() {
    for (text, message) in [
        ("retries = 1\ncach_size = \"1G\"\n", ":2: unknown option 'cach_size'; the nearest is cache_size"),
        ("\nretries = \"many\"", ":2: retries=many: expected a whole number from 0 to 100"),
        ("[mount.\"s3://other/\"]\nregoin = \"x\"", ":2: unknown option 'regoin'; the nearest is region"),
        (
            "[mounts]\n",
            ":1: mounts is no option and no section; sections are [mount.NAME], [mount.\"s3://BUCKET/\"], [prices] and [[header_rules]]",
        ),
        ("[mount]\nreleases = 1\n", ":2: mount.releases is no table; write [mount.releases]"),
        ("a = \n", ":1: "),
        ("secret_access_key = \"hunter2\"", ":1: secret_access_key: secrets are not options"),
    ] {
        let mut place = Place::new();
        let path = place.config_file(text);
        let refusal = place.refusal("");
        assert!(refusal.starts_with(&format!("{}{message}", path.display())), "{refusal}");
        assert!(!refusal.contains("hunter2"));
    }
    let mut place = Place::new();
    place.variable("PACKMULE_CONFIG", "/nonexistent.toml");
    assert!(place.refusal("").starts_with("/nonexistent.toml: No such file"));
}

#[test]
fn aws_variables_stand_below_ours() {
    let mut place = Place::new();
    place.variable("AWS_ENDPOINT_URL", "http://127.0.0.1:9000");
    place.variable("AWS_DEFAULT_REGION", "eu-west-1");
    let client = place.load("").unwrap().client;
    assert_eq!(client.endpoint_url.unwrap().as_str(), "http://127.0.0.1:9000/");
    assert_eq!(client.region.as_deref(), Some("eu-west-1"));
    place.variable("AWS_REGION", "eu-west-2");
    assert_eq!(place.load("").unwrap().client.region.as_deref(), Some("eu-west-2"));
    place.variable("PACKMULE_REGION", "eu-west-3");
    assert_eq!(place.load("").unwrap().client.region.as_deref(), Some("eu-west-3"));
    assert_eq!(place.load("region=eu-north-1").unwrap().client.region.as_deref(), Some("eu-north-1"));
    place.variable("AWS_PROFILE", "nowhere");
    assert!(place.refusal("").starts_with("profile=nowhere: no such profile"));
    place.variable("AWS_ACCESS_KEY_ID", "A");
    assert_eq!(place.load("").unwrap().client.profile, None, "keys of the environment win over its profile");
}

#[test]
fn options_and_flags_give_the_same_config() {
    let place = Place::new();
    let flags = [("ro", None), ("cache-size", Some("1G")), ("part_size", Some("16M")), ("uid", Some("0")), ("big-writes", None)];
    let by_flags = Invocation {
        source: "s3://releases/docs".into(),
        mountpoint: place.dir.path().join("mnt"),
        arguments: flags.iter().map(|(name, value)| Argument::Word((*name).into(), value.map(str::to_owned))).collect(),
        sloppy: false,
    };
    let by_flags = Config::load(&by_flags, &place.environment).unwrap();
    let by_options = place.load("ro,cache_size=1G,part-size=16M,uid=root,big-writes").unwrap();
    let shown = |mut config: Config| {
        config.spool_size = 0; // half of what is free just now
        format!("{config:?}")
    };
    assert_eq!(by_flags.warning().unwrap(), "ignored, packmule has no use for: big-writes");
    assert_eq!(shown(by_flags), shown(by_options));
}

#[test]
fn allow_other_brings_default_permissions() {
    let place = Place::new();
    assert!(place.load("allow_other").unwrap().mount.default_permissions);
    assert!(!place.load("allow_other,no_default_permissions").unwrap().mount.default_permissions);
    assert!(place.load("default_permissions").unwrap().mount.default_permissions);
}

#[test]
fn contradictions_and_unreadable_files_are_one_line() {
    let place = Place::new();
    let mnt = place.dir.path().join("mnt");
    for (options, part) in [
        ("allow_other,allow_root".to_owned(), "exclude each other"),
        ("sse=AES256,sse_kms_key_id=k".into(), "sse=aws:kms"),
        ("transfer_acceleration,url=http://127.0.0.1:1".into(), "endpoint_url"),
        ("part_size=1M".into(), "from 5M to 5G"),
        ("external_id=x".into(), "role_arn"),
        ("passwd_file=/nonexistent".into(), "passwd_file=/nonexistent: No such file"),
        ("credentials_file=/".into(), "credentials_file=/: is a directory"),
        (format!("cache_dir={}/c", mnt.display()), "under the mountpoint"),
        ("cache_dir=/c,spool_dir=/c/s".into(), "lies in the cache"),
        ("close_timeout=0".into(), "close_timeout"),
        ("currency=EUR,price_put=0.01,price_out=0.1".into(), "give price_put, price_get and price_out too"),
        ("price_put=cheap".into(), "price_put=cheap: expected an amount such as 0.005"),
        ("currency=€".into(), "currency=€: expected three letters such as EUR"),
    ] {
        let refusal = place.refusal(&options);
        assert!(refusal.contains(part), "{options}: {refusal}");
    }
    assert_eq!(place.load("sse_kms_key_id=k").unwrap().client.sse.as_deref(), Some("aws:kms"));
    assert_eq!(place.load("sse=off").unwrap().client.sse, None);
}

#[test]
fn shares_of_the_disk_and_homes() {
    let place = Place::new();
    let (whole, _) = disk(place.dir.path());
    let config = place.load("cache_size=50%,cache_dir=~/c,log_file=~/l").unwrap();
    assert!(config.cache_size > whole / 3 && config.cache_size < whole);
    assert_eq!(config.cache_dir, place.dir.path().join("c"));
    assert_eq!(config.log_file, Some(place.dir.path().join("l")));
}
