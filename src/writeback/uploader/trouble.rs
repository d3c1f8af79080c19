//! What becomes of an action that failed.

use std::time::Duration;

use super::super::plan::How;
use super::super::state::{Action, Event, Step};
use super::super::transfer::Trouble;
use super::super::{Error, reason};
use super::{Message, Phase, Uploader};
use crate::s3::ErrorKind;

/// A part whose digest the store refuses is damaged on this machine or torn by writers; more attempts do not mend it.
const BAD_DIGESTS: u32 = 5;

impl Uploader {
    /// A task failed: again after a pause, another way, or not at all.
    pub(super) fn trouble(&mut self, id: u64, action: Action, trouble: Trouble) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let doomed = job.after.iter().any(|message| matches!(message, Message::Discard { .. }));
        let Trouble::S3(error) = trouble else { return self.fail(id, trouble.into()) };
        tracing::debug!("{error}");
        // Written to while it was read: that says nothing about this machine, and it is sent again anyway.
        let torn = matches!(&action, Action::Send { piece, .. } if job.entry.content.lock().unsent.intersects(piece.range.clone()));
        let copies = matches!(&action, Action::Send { piece, .. } if piece.how == How::Copy);
        match error.kind {
            _ if doomed => self.fail(id, Error::Discarded),
            ErrorKind::NoSuchUpload => {
                self.stop_transfers(id);
                self.apply(id, Event::Restart);
            }
            ErrorKind::NotImplemented | ErrorKind::InvalidRequest if copies => {
                job.entry.intent.lock().fetches = true;
                self.stop_transfers(id);
                self.apply(id, Event::Again { keep: false });
            }
            ErrorKind::BadDigest | ErrorKind::LocalIo if torn || job.bad_digests < BAD_DIGESTS => {
                job.bad_digests += u32::from(!torn);
                self.again(id, action);
            }
            kind if kind.passes() || matches!(kind, ErrorKind::Protocol | ErrorKind::Conflict) => {
                job.doubt |= job.is_committing();
                job.entry.intent.lock().reason = Some(reason::of_store(&error));
                self.again(id, action);
            }
            _ => self.fail(id, Trouble::S3(error).into()),
        }
    }

    /// Backs off: 250 ms doubling to 15 s, with jitter so that many files do not return at once.
    fn again(&mut self, id: u64, action: Action) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.attempts += 1;
        let pause = Duration::from_millis(250u64 << job.attempts.min(6)).min(Duration::from_secs(15)).mul_f64(rand::random_range(0.5..1.0));
        let shared = self.shared.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            shared.send(Message::Again { id, action });
        });
    }

    /// Publications whose callers wait end `close_timeout` after the last progress; queued ones go on for ever.
    pub(super) fn give_up_stalled(&mut self) {
        let limit = self.shared.config.close_timeout;
        let stalled: Vec<u64> = self
            .jobs
            .iter()
            .filter(|(_, job)| {
                job.state.step != Step::Idle && !job.waiters.is_empty() && job.since.elapsed() > limit && job.entry.stalled() > limit
            })
            // While it only waits for its turn, the others' progress is progress.
            .filter(|(_, job)| !job.running.is_empty() || job.attempts > 0 || self.shared.meter.seen(limit).elapsed() > limit)
            .map(|(&id, _)| id)
            .collect();
        for id in stalled {
            self.fail(id, Error::TimedOut);
        }
    }

    /// Refused for good: parked with its reason, or, while it is still written, reported to the writer.
    pub(super) fn fail(&mut self, id: u64, error: Error) {
        let closed = self.jobs.get(&id).is_some_and(|job| job.state.step != Step::Idle);
        self.give_up(id, error, closed);
    }

    pub(super) fn give_up(&mut self, id: u64, error: Error, park: bool) {
        let Some(job) = self.job(id) else { return };
        let entry = job.entry.clone();
        let waiters = std::mem::take(&mut job.waiters);
        let next = std::mem::take(&mut job.next);
        let after = std::mem::take(&mut job.after);
        {
            let mut intent = entry.intent.lock();
            let last = intent.reason.take();
            intent.reason = Some(match (&error, last) {
                (Error::TimedOut, Some(last)) => format!("{}: {last}", reason::of(&error)),
                _ if intent.poisoned && !matches!(error, Error::Poisoned) => {
                    format!("{}; {}", reason::of(&Error::Poisoned), reason::of(&error))
                }
                _ => reason::of(&error),
            });
            if park {
                (intent.phase, intent.parked) = (Phase::Parked, Some(error.clone()));
            } else {
                intent.failed = Some(error.clone());
            }
        }
        {
            let mut content = entry.content.lock();
            content.waiting.clear();
            content.next_part = 1;
        }
        tracing::warn!("s3://{} is not published: {error}", entry.name());
        self.apply(id, Event::Stop);
        self.stop_transfers(id);
        if let Some(job) = self.jobs.get_mut(&id) {
            (job.upload, job.doubt, job.attempts) = (None, false, 0);
        }
        let shared = self.shared.clone();
        tokio::spawn(async move {
            if let Err(error) = entry.persist(true).await {
                tracing::warn!("{}: {error}", entry.record.display());
            }
            if park {
                // The version that it was to replace is the only one that S3 has.
                entry.forget_replaced().await;
            }
            for waiter in waiters.into_iter().chain(next.into_iter().filter_map(|(_, reply)| reply)) {
                let _ = waiter.send(Err(error.clone()));
            }
            shared.changed.notify_waiters();
            shared.meter.moved.notify_waiters();
        });
        for message in after {
            self.handle(message);
        }
    }
}
