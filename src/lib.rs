//! packmule: S3 mounted as a filesystem.

pub mod cache;
pub mod s3;
