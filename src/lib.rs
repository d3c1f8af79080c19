//! packmule: S3 mounted as a filesystem.

pub mod config;
pub mod publish;
pub mod s3;
