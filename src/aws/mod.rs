//! What talking to AWS and its likes needs below S3: HTTP with retry and a budget, credentials, signatures, encodings.
//!
//! Nothing here knows buckets or keys as objects; `s3` builds requests and this module carries them.

pub mod bandwidth;
pub mod credentials;
pub mod encode;
pub mod http;
pub mod passwd;
pub mod profile;
pub mod retry;
pub mod sigv2;
pub mod sigv4;
