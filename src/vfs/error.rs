//! Why a filesystem call failed, in POSIX's names. `fuse/errno.rs` turns each into its number.

use crate::cache::CacheError;
use crate::s3::{ErrorKind, S3Error};
use crate::writeback;

/// Result of a filesystem call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One variant an errno: the whole story (which key, which answer) is logged where it is known, because a caller of
/// close() only ever sees the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// ENOENT
    NoEntry,
    /// EEXIST
    Exists,
    /// ENOTDIR
    NotDirectory,
    /// EISDIR
    IsDirectory,
    /// ENOTEMPTY
    NotEmpty,
    /// EACCES
    Access,
    /// EPERM
    NotPermitted,
    /// EROFS
    ReadOnly,
    /// ENOSPC
    NoSpace,
    /// EFBIG
    TooLarge,
    /// ENAMETOOLONG
    NameTooLong,
    /// ESTALE
    Stale,
    /// ETIMEDOUT
    TimedOut,
    /// EHOSTUNREACH
    HostUnreachable,
    /// EINVAL
    Invalid,
    /// EOPNOTSUPP
    NotSupported,
    /// ENODATA
    NoData,
    /// ERANGE
    Range,
    /// EBADF
    BadHandle,
    /// EBUSY
    Busy,
    /// ENXIO: SEEK_DATA or SEEK_HOLE beyond the end
    SeekBeyond,
    /// EIO, when nothing else is true
    Io,
}

impl From<S3Error> for Error {
    /// The errno whose text helps (promise 23).
    fn from(error: S3Error) -> Self {
        let mapped = match error.kind {
            ErrorKind::NoSuchKey | ErrorKind::NoSuchBucket => Self::NoEntry,
            ErrorKind::AccessDenied | ErrorKind::Credentials | ErrorKind::Archived | ErrorKind::ClockSkew => Self::Access,
            ErrorKind::PreconditionFailed | ErrorKind::Conflict | ErrorKind::NoSuchUpload => Self::Stale,
            ErrorKind::NotEmpty => Self::NotEmpty,
            ErrorKind::BucketExists => Self::Exists,
            ErrorKind::TimedOut | ErrorKind::Throttled => Self::TimedOut,
            ErrorKind::Network => Self::HostUnreachable,
            ErrorKind::Quota => Self::NoSpace,
            ErrorKind::TooLarge => Self::TooLarge,
            ErrorKind::KeyTooLong => Self::NameTooLong,
            ErrorKind::NotImplemented => Self::NotSupported,
            ErrorKind::InvalidRange
            | ErrorKind::Server
            | ErrorKind::BadDigest
            | ErrorKind::AclNotSupported
            | ErrorKind::WrongRegion
            | ErrorKind::Protocol
            | ErrorKind::InvalidRequest
            | ErrorKind::LocalIo => Self::Io,
        };
        if !matches!(error.kind, ErrorKind::NoSuchKey) {
            tracing::warn!("{error}");
        }
        mapped
    }
}

impl From<CacheError> for Error {
    fn from(error: CacheError) -> Self {
        match error {
            CacheError::Stale => Self::Stale,
            CacheError::S3(error) if error.kind == ErrorKind::NoSuchKey => Self::Stale,
            CacheError::S3(error) => error.into(),
            CacheError::Damaged(what) => {
                tracing::error!("damaged bytes were not delivered: {what}");
                Self::Io
            }
            CacheError::Io(error) => Self::from_io(&error),
        }
    }
}

impl From<writeback::Error> for Error {
    fn from(error: writeback::Error) -> Self {
        match error {
            writeback::Error::NoSpace => Self::NoSpace,
            writeback::Error::Exists => Self::Exists,
            writeback::Error::Stale | writeback::Error::BaseGone | writeback::Error::Discarded => Self::Stale,
            writeback::Error::TooLarge => Self::TooLarge,
            writeback::Error::TimedOut => Self::TimedOut,
            writeback::Error::Poisoned | writeback::Error::Damaged => Self::Io,
            writeback::Error::S3(error) => error.into(),
            writeback::Error::Io(error) => Self::from_io(&error),
        }
    }
}

impl Error {
    /// Of a failed file operation on this machine's own disk (spool, cache).
    fn from_io(error: &std::io::Error) -> Self {
        tracing::error!("local disk: {error}");
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::NoSpace,
            _ => Self::Io,
        }
    }
}
