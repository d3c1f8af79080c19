//! packmule: S3 mounted as a filesystem.

pub mod aws;
pub mod cache;
pub mod ranges;
pub mod s3;
pub mod writeback;
