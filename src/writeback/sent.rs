//! What was sent to be the object and was not answered: found under the key, it is a content of ours, not somebody else's change
//! (promise 12). A close that comes before the answer is recorded with it, so that it is known after a crash too.
//!
//! The same bytes are no proof: two machines append the same line, or make the same empty file. Ours carries the metadata that
//! travelled with it, its times to the nanosecond among it; an object sent without any is not recognised.

use super::entry::Entry;
use super::publish::StoreReader;
use super::{Expect, Target};
use crate::s3::{Checksum, ETag, Metadata, ObjectHead};

/// So many are remembered; past that the oldest is taken for somebody else's.
const MOST: usize = 8;

/// What an object that was sent looks like.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Sent {
    /// Bytes.
    pub size: u64,
    /// The ETag of a store whose ETags are MD5s.
    pub etag: Option<ETag>,
    /// Of the full object.
    pub checksum: Option<Checksum>,
    /// What travelled with it.
    pub metadata: Metadata,
}

impl Sent {
    /// The object has the same bytes.
    pub fn has_bytes_of(&self, head: &ObjectHead) -> bool {
        let etag = self.etag.as_ref() == Some(&head.etag);
        let checksum = self.checksum.is_some() && self.checksum == head.checksum;
        head.size == self.size && (etag || checksum)
    }

    /// The object carries what travelled with this.
    pub fn is_marked(&self, head: &ObjectHead) -> bool {
        !self.metadata.is_empty() && self.metadata == head.metadata
    }
}

/// Whose an object is that was found under the key.
pub(crate) enum Whose {
    /// The content as it is.
    Present,
    /// An earlier content of ours: what is there now goes over it, as it would have after its answer.
    Earlier,
    /// Somebody else's, for all that is known.
    Theirs,
}

impl Entry {
    /// Content of this generation is about to be sent.
    pub fn sends(&self, sent: &Sent, generation: u64) {
        let mut intent = self.intent.lock();
        intent.sent.retain(|(other, _)| other != sent);
        intent.sent.push((sent.clone(), generation));
        if intent.sent.len() > MOST {
            intent.sent.remove(0);
        }
    }

    /// Whose the object is. Where it is an earlier content of ours, it is what the publication expects and is based on from here on.
    pub fn whose(&self, target: &Target, head: &ObjectHead) -> Whose {
        let mut intent = self.intent.lock();
        let known = intent.sent.iter().rev().find(|(sent, _)| sent.has_bytes_of(head) && sent.is_marked(head));
        let Some(generation) = known.map(|(_, generation)| *generation) else { return Whose::Theirs };
        let mut content = self.content.lock();
        if generation == content.generation {
            return Whose::Present;
        }
        intent.expect = Expect::Version(head.etag.clone());
        if intent.base.is_some() {
            // What was never written is in it as it was in the base.
            intent.base = Some(StoreReader::base(target, head));
            intent.fetches = false;
            content.follows(head.size, intent.appended.is_some());
        }
        intent.appended = intent.appended.map(|_| head.size);
        Whose::Earlier
    }
}
