//! packmule: S3 mounted as a filesystem.

pub mod config;
pub mod s3;
pub mod fuse;
