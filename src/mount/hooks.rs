//! What happens around a publication: the headers a new object gets, and who hears of it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use crate::cache::Cache;
use crate::config::Config;
use crate::publish::headers::{HeaderRules, HeaderRulesError};
use crate::s3::ObjectHeaders;
use crate::writeback::{Hooks, Published};

/// Headers by name and rules, and a line in the log.
pub(super) struct Publication {
    rules: HeaderRules,
    /// The cache, where it lies on the spool's disk.
    cache: Option<Arc<Cache>>,
}

impl Publication {
    pub(super) fn new(config: &Config) -> Result<Self, HeaderRulesError> {
        Ok(Self { rules: HeaderRules::load(config.cache_control.as_deref(), &config.rules, config.header_rules.as_deref())?, cache: None })
    }

    /// The cache gives way to the spool where both are on one disk: its bytes can be had again.
    pub(super) fn with_cache(mut self, config: &Config, cache: &Arc<Cache>) -> Self {
        // The spool's folder may not be there yet.
        let disk = |dir: &Path| dir.ancestors().find_map(|dir| dir.metadata().ok()).map(|metadata| metadata.dev());
        self.cache = (disk(&config.cache_dir) == disk(&config.spool_dir)).then(|| cache.clone());
        self
    }
}

impl Hooks for Publication {
    fn headers(&self, bucket: &str, key: &str) -> ObjectHeaders {
        self.rules.headers(bucket, key)
    }

    fn published(&self, published: &Published) {
        tracing::info!(bucket = published.bucket, key = published.key, size = published.size, etag = %published.etag, replaced = published.replaced, "published");
    }

    fn make_room(&self, bytes: u64) {
        if let Some(cache) = &self.cache {
            cache.give_way(bytes);
        }
    }
}
