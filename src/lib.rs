//! packmule: S3 mounted as a filesystem.

pub mod aws;
pub mod cache;
pub mod s3;
