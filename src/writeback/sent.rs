//! What was sent to be the object and was not answered: found under the key, it is an earlier content of ours, not somebody else's
//! change (promise 12). A close that comes before the answer is recorded with it, so that it is known after a crash too.

use super::entry::Entry;
use super::publish::StoreReader;
use super::{Base, Expect, Target};
use crate::s3::{Checksum, ETag, ObjectHead};

/// So many are remembered; past that the oldest is taken for somebody else's.
const MOST: usize = 8;

/// What an object of these bytes looks like.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Sent {
    /// Bytes.
    pub size: u64,
    /// The ETag of a store whose ETags are MD5s.
    pub etag: Option<ETag>,
    /// Of the full object.
    pub checksum: Option<Checksum>,
}

impl Sent {
    /// The object has the same bytes.
    pub fn is(&self, head: &ObjectHead) -> bool {
        let etag = self.etag.as_ref() == Some(&head.etag);
        let checksum = self.checksum.is_some() && self.checksum == head.checksum;
        head.size == self.size && (etag || checksum)
    }
}

impl Entry {
    /// Is about to be sent.
    pub fn sends(&self, sent: &Sent) {
        let mut intent = self.intent.lock();
        intent.sent.retain(|other| other != sent);
        intent.sent.push(sent.clone());
        if intent.sent.len() > MOST {
            intent.sent.remove(0);
        }
    }

    /// The store has an object under the key that is not what is being sent. Where it is an earlier content of ours, whose answer
    /// was lost, the content goes over it as it would have after that answer: true then. `now`: what is being sent; the same bytes
    /// may be somebody else's (two machines make the same empty file), which is for the caller to tell.
    pub fn is_over_our_own(&self, target: &Target, head: &ObjectHead, now: Option<&Sent>) -> bool {
        let mut intent = self.intent.lock();
        if now.is_some_and(|now| now.is(head)) || !intent.sent.iter().any(|sent| sent.is(head)) {
            return false;
        }
        let mut content = self.content.lock();
        intent.expect = Expect::Version(head.etag.clone());
        if intent.base.is_some() {
            // What was never written is in it as it was in the base.
            intent.base = Some(Base {
                bucket: target.store.bucket().to_owned(),
                key: target.key.clone(),
                etag: head.etag.clone(),
                size: head.size,
                version_id: head.version_id.clone(),
                reader: StoreReader::of(target.store.clone(), target.key.clone(), head.etag.clone(), head.version_id.clone()),
            });
            intent.fetches = false;
            content.follows(head.size, intent.appended.is_some());
        }
        intent.appended = intent.appended.map(|_| head.size);
        true
    }
}
