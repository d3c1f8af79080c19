//! A store with a mount of it, and the macro that runs one test on every store.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::double::Double;
use super::files::close;
use super::mount::{Mount, Setup, can_mount};
use super::seaweed;
use super::store::Store;

/// A mount of a store. The mount ends before the store.
pub struct Stage {
    pub mount: Mount,
    pub store: Store,
}

impl Stage {
    /// With the defaults.
    pub fn new(store: Store) -> Self {
        Self::with(store, &[])
    }

    /// With these `-o` words.
    pub fn with(store: Store, options: &[&str]) -> Self {
        let setup = options.iter().fold(Setup::of(&store), |setup, word| setup.option(word));
        Self { mount: Mount::start(setup), store }
    }

    /// A path in the mount.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.mount.path(relative)
    }

    /// The mountpoint.
    pub fn dir(&self) -> &Path {
        self.mount.dir()
    }

    /// Writes a whole new content of `report.txt` while somebody else does; gives the key under which ours is kept.
    pub fn conflict(&self) -> String {
        self.store.put("report.txt", "base");
        let ours = OpenOptions::new().write(true).truncate(true).open(self.path("report.txt")).unwrap();
        ours.write_all_at(b"ours", 0).unwrap();
        self.store.put("report.txt", "theirs");
        close(ours).unwrap();
        let keys = self.store.keys();
        let kept = keys.iter().find(|key| key.starts_with("report (conflict of ") && key.ends_with(").txt"));
        kept.unwrap_or_else(|| panic!("no conflict copy among {keys:?}")).clone()
    }

    /// The double, in tests that run on it alone.
    pub fn double(&self) -> &Double {
        self.store.as_double().unwrap()
    }
}

/// True in the long form of the tests that break things (`scripts/torture`).
pub fn torture() -> bool {
    std::env::var_os("PACKMULE_TORTURE").is_some_and(|value| value != "0")
}

/// Runs on the double.
pub fn on_double(body: fn(Store)) {
    if can_mount() {
        body(Store::double());
    }
}

/// Runs on SeaweedFS, unless it is known not to hold this line.
pub fn on_seaweed(module: &str, name: &str, body: fn(Store)) {
    // `it::write::seaweed` → `write::NAME`
    let suite = module.split("::").nth(1).unwrap_or_default();
    let test = format!("{suite}::{name}");
    match seaweed::reason_against(&test) {
        Some(reason) => eprintln!("the store cannot hold {test}: {reason}"),
        None if can_mount() => body(Store::seaweed()),
        None => {}
    }
}

/// One suite, two stores: each function becomes `double::NAME` and `seaweed::NAME`.
macro_rules! on_every_store {
    ($($(#[doc = $promise:literal])+ fn $name:ident($store:ident) $body:block)*) => {
        /// The tests that run on every store.
        pub const COMMON: &[&str] = &[$(stringify!($name)),*];

        mod common {
            use super::*;
            $($(#[doc = $promise])+ pub fn $name($store: crate::support::store::Store) $body)*
        }

        mod double {
            $(#[test] fn $name() { crate::support::stage::on_double(super::common::$name); })*
        }

        mod seaweed {
            $(#[test] fn $name() { crate::support::stage::on_seaweed(module_path!(), stringify!($name), super::common::$name); })*
        }
    };
}
pub(crate) use on_every_store;
