//! packmule: S3 mounted as a filesystem.

pub mod s3;
