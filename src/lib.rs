//! packmule: S3 mounted as a filesystem.

pub mod ranges;
pub mod s3;
pub mod writeback;
