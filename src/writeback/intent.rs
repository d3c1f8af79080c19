//! What is to happen with an entry's content.

use super::abandoned::Abort;
use super::manifest::{Phase, UploadRecord};
use super::sent::Sent;
use super::{Attributes, Base, Error, Expect, Guess, Published, Target};
use crate::s3::{ChecksumKind, Part};

impl Phase {
    /// Its end will free spool space without anybody's help.
    pub(crate) fn frees(self) -> bool {
        matches!(self, Phase::Sealed | Phase::Uploading | Phase::Completing)
    }
}

/// What is to happen with an entry's content, and what has happened.
pub(crate) struct Intent {
    pub target: Target,
    pub expect: Expect,
    pub base: Option<Base>,
    pub attributes: Attributes,
    /// What travelled with the upload that was begun or published last.
    pub travelled: Option<Attributes>,
    pub held: bool,
    /// Not worth keeping: it ends with the mount, and status is silent about it.
    pub junk: bool,
    /// It has no name any more: no record of it is written.
    pub withheld: bool,
    pub guess: Option<String>,
    /// Parts go to the guessed key at any size.
    pub eager: bool,
    pub phase: Phase,
    pub upload: Option<UploadRecord>,
    /// Uploads that are to be aborted, until that is journalled.
    pub abandoned: Vec<Abort>,
    /// Counts the uploads that were begun: an answer to an earlier one says nothing of `upload`.
    pub creations: u32,
    pub published: Option<Published>,
    pub reason: Option<String>,
    pub poisoned: bool,
    /// A write failed because the spool could not hold it.
    pub lacked_room: bool,
    /// fsync() promised that its bytes are kept.
    pub synced: bool,
    /// Where the first append began, while all that the content adds to its base was appended: behind what others wrote it goes
    /// again, rather than beside it.
    pub appended: Option<u64>,
    /// Somebody else's change became the base since the last publication.
    pub rebased: bool,
    pub discarded: bool,
    /// A part sent ahead was refused for good: writers are told at once.
    pub failed: Option<Error>,
    /// Why it was parked in this run.
    pub parked: Option<Error>,
    /// Left by an earlier run.
    pub recovered: bool,
    /// The store is being asked what it has of it: the publication begins with the answer.
    pub resuming: bool,
    /// Its name is being changed, or taken.
    pub paused: bool,
    /// Grows with each change of the name: of two entries under one name, the greater is what the name means.
    pub order: u64,
    /// Closed: it goes once it is published.
    pub retired: bool,
    /// The base cannot be copied from inside the store: its bytes are fetched.
    pub fetches: bool,
    /// The parts that Complete was sent with, and the generation of the content that they are.
    pub completing: Option<(Vec<Part>, u64)>,
    /// What the store may have taken without our having heard of it, and the generation of the content that each was.
    pub sent: Vec<(Sent, u64)>,
    /// The content is what was sealed: nothing was written since. While it is not, a crash leaves an unfinished file.
    pub sealed: bool,
    /// The generation whose bytes were fsynced.
    pub durable: Option<u64>,
    /// The key that somebody else's change is kept under: ours goes beside it (promise 12).
    pub beside: Option<String>,
}

impl Intent {
    /// Its upload was begun without a checksum of the whole.
    pub fn is_plain(&self) -> bool {
        self.upload.as_ref().is_some_and(|upload| upload.plain)
    }

    /// The checksum that parts of its upload carry.
    pub fn part_checksum(&self) -> ChecksumKind {
        match self.target.store.capabilities().upload_checksum {
            ChecksumKind::Crc64Nvme | ChecksumKind::Crc32c if self.is_plain() => ChecksumKind::Md5,
            kind => kind,
        }
    }

    /// See [`super::Staged::set_held`].
    pub fn hold(&mut self, held: bool, guess: Option<Guess>) {
        self.held = held;
        self.eager = guess.as_ref().is_some_and(|guess| guess.eager);
        self.guess = guess.map(|guess| guess.key);
    }

    /// It is to be published after all.
    pub fn revive(&mut self) {
        (self.failed, self.parked, self.poisoned, self.held, self.reason) = (None, None, false, false, None);
        (self.phase, self.sealed) = (Phase::Sealed, true);
    }

    /// It is to be published there.
    pub fn go_to(&mut self, target: Target) {
        if !target.is(&self.target) {
            self.sent.clear();
        }
        self.target = target;
    }

    /// Where its parts go.
    pub fn parts_target(&self) -> Target {
        let key = self.guess.as_ref().filter(|_| self.held).unwrap_or(&self.target.key);
        Target { store: self.target.store.clone(), key: key.clone() }
    }

    pub fn new(target: Target, expect: Expect, base: Option<Base>, attributes: Attributes) -> Self {
        Self {
            target,
            expect,
            base,
            attributes,
            travelled: None,
            held: false,
            junk: false,
            withheld: false,
            guess: None,
            eager: false,
            phase: Phase::Writing,
            upload: None,
            abandoned: Vec::new(),
            creations: 0,
            published: None,
            reason: None,
            poisoned: false,
            lacked_room: false,
            synced: false,
            appended: None,
            rebased: false,
            discarded: false,
            failed: None,
            parked: None,
            recovered: false,
            resuming: false,
            paused: false,
            order: 0,
            retired: false,
            fetches: false,
            completing: None,
            sent: Vec::new(),
            sealed: false,
            durable: None,
            beside: None,
        }
    }
}
