//! What makes an object a publication: the headers that browsers and CDNs go by, and links to it.

pub mod content_type;
pub mod headers;
pub mod links;
