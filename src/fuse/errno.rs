//! The one place where a vfs error becomes an errno.

use fuser::Errno;

use crate::vfs::Error;

/// The errno that says what happened. No wildcard arm: a new variant does not compile until it is mapped.
pub(super) fn errno(error: Error) -> Errno {
    match error {
        Error::NoEntry => Errno::ENOENT,
        Error::Exists => Errno::EEXIST,
        Error::NotDirectory => Errno::ENOTDIR,
        Error::IsDirectory => Errno::EISDIR,
        Error::NotEmpty => Errno::ENOTEMPTY,
        Error::Access => Errno::EACCES,
        Error::NotPermitted => Errno::EPERM,
        Error::ReadOnly => Errno::EROFS,
        Error::NoSpace => Errno::ENOSPC,
        Error::TooLarge => Errno::EFBIG,
        Error::NameTooLong => Errno::ENAMETOOLONG,
        Error::Stale => Errno::ESTALE,
        Error::TimedOut => Errno::ETIMEDOUT,
        Error::HostUnreachable => Errno::EHOSTUNREACH,
        Error::Invalid => Errno::EINVAL,
        // Never ENOSYS: the kernel would stop asking for the whole mount (facts: it ends all xattrs).
        Error::NotSupported => Errno::EOPNOTSUPP,
        Error::NoData => Errno::ENODATA,
        Error::Range => Errno::ERANGE,
        Error::BadHandle => Errno::EBADF,
        Error::Busy => Errno::EBUSY,
        Error::Io => Errno::EIO,
        Error::SeekBeyond => Errno::ENXIO,
    }
}

/// An error in the words of strerror(3), for answers that are not an errno.
pub(crate) fn describe(error: Error) -> String {
    let text = std::io::Error::from_raw_os_error(errno(error).code()).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_in_words() {
        assert_eq!(describe(Error::NoEntry), "No such file or directory");
    }
}
