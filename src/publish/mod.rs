//! What makes an object a publication: the headers that browsers and CDNs go by, links to it, and who fetched it.

pub mod access_log;
pub mod cloudfront;
pub mod content_type;
pub mod downloads;
pub mod headers;
pub mod links;
