//! packmule: S3 mounted as a filesystem.

pub mod aws;
pub mod cache;
pub mod config;
pub mod control;
pub mod daemon;
pub mod demo;
pub mod fuse;
pub mod mount;
pub mod publish;
pub mod ranges;
pub mod s3;
pub mod writeback;
