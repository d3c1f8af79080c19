//! Why an entry waits or is parked, in the words that status shows: plain, with the remedy, and with what the store answered.

use super::Error;
use crate::s3::S3Error;
use crate::s3::explain::explain;

/// Of an entry that is refused.
pub(crate) fn of(error: &Error) -> String {
    let remedy = match error {
        Error::S3(error) => return of_store(error),
        Error::Exists => "remove or rename that object and retry, or take the bytes out with recover",
        Error::Stale => {
            "take the bytes out with recover and join them with theirs; where ours is a whole file, retry stores it once theirs is out of the way"
        }
        Error::BaseGone => "recover gives what was changed and says what is missing",
        Error::Poisoned => "copy the file again; recover gives what had been written",
        Error::TooLarge => "recover gives the bytes",
        Error::TimedOut => "retry when the store can be reached",
        Error::NoSpace | Error::Discarded => return error.to_string(),
        Error::Damaged => "copy the file again, and check the disk of spool_dir and the memory",
        Error::Io(_) => "check the disk of spool_dir",
    };
    format!("{error}; {remedy}")
}

/// Of what the store answered. The answer itself follows, with the request id that its operators ask for.
pub(crate) fn of_store(error: &S3Error) -> String {
    format!("{} [{error}]", explain(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::ErrorKind;

    #[test]
    fn a_refusal_says_what_helps_and_what_the_store_said() {
        let mut error = S3Error::local(ErrorKind::AccessDenied, "PutObject", "s3://b/k", "no");
        error.code = Some("AccessDenied".into());
        error.request_id = Some("ID".into());
        let said = of(&Error::S3(error));
        assert!(said.starts_with("access to s3://b/k is denied") && said.contains("s3:PutObject"), "{said}");
        assert!(said.ends_with("[PutObject s3://b/k: AccessDenied: no (request id ID)]"), "{said}");
        assert!(of(&Error::Exists).contains("retry") && of(&Error::Stale).contains("recover"));
    }
}
