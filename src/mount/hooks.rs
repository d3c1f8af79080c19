//! What happens around a publication: the headers a new object gets, and who hears of it.

use crate::config::Config;
use crate::publish::headers::{HeaderRules, HeaderRulesError};
use crate::s3::ObjectHeaders;
use crate::writeback::{Hooks, Published};

/// Headers by name and rules, and a line in the log.
pub(super) struct Publication {
    rules: HeaderRules,
}

impl Publication {
    pub(super) fn new(config: &Config) -> Result<Self, HeaderRulesError> {
        Ok(Self { rules: HeaderRules::load(config.cache_control.as_deref(), config.header_rules.as_deref())? })
    }
}

impl Hooks for Publication {
    fn headers(&self, bucket: &str, key: &str) -> ObjectHeaders {
        self.rules.headers(bucket, key)
    }

    fn published(&self, published: &Published) {
        tracing::info!(bucket = published.bucket, key = published.key, size = published.size, etag = %published.etag, replaced = published.replaced, "published");
    }
}
