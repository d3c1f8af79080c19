//! packmule: S3 mounted as a filesystem.

pub mod aws;
pub mod cache;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod demo;
pub mod fuse;
pub mod mount;
pub mod publish;
pub mod s3;
