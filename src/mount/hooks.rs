//! What happens around a publication: the headers a new object gets, and who hears of it.

use crate::config::Config;
use crate::s3::ObjectHeaders;
use crate::writeback::{Hooks, Published};

/// Headers by name, and a line in the log.
pub(super) struct Publication {
    cache_control: Option<String>,
}

impl Publication {
    pub(super) fn new(config: &Config) -> Self {
        Self { cache_control: config.cache_control.clone() }
    }
}

impl Hooks for Publication {
    fn headers(&self, _bucket: &str, key: &str) -> ObjectHeaders {
        ObjectHeaders { content_type: Some(content_type(key)), cache_control: self.cache_control.clone(), ..ObjectHeaders::default() }
    }

    fn published(&self, published: &Published) {
        tracing::info!(bucket = published.bucket, key = published.key, size = published.size, etag = %published.etag, replaced = published.replaced, "published");
    }
}

/// By the extension of the final name; S3's own default where it says nothing.
fn content_type(key: &str) -> String {
    mime_guess::from_path(key).first_raw().unwrap_or("binary/octet-stream").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_come_from_the_name() {
        assert_eq!(content_type("a/b.tar.gz"), "application/gzip");
        assert_eq!(content_type("index.html"), "text/html");
        assert_eq!(content_type("a.d/README"), "binary/octet-stream");
    }
}
