//! The task that owns every upload's state. It never awaits a transfer: transfers are bounded tasks that report to it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::entry::{Entry, Recorded, Shared};
use super::job::{Job, Key, Place};
use super::manifest::{Phase, UploadRecord};
use super::plan::How;
use super::publish::{self, Context, Outcome, Verdict};
use super::state::{Action, Event, Goal, Slot, State, Step, Upload};
use super::{Error, Expect, Guess, Published, Target, abandoned};
use crate::failpoint;
use crate::s3::slow;

/// How often stalled publications are looked for.
const TICK: Duration = Duration::from_millis(500);

mod trouble;

/// What publish() answers.
pub(crate) type Answer = Result<Option<Published>, Error>;

/// What the uploader is told.
pub(crate) enum Message {
    /// Parts lie behind the sequential frontier.
    Ready(u64),
    /// Publish, and tell the caller.
    Publish { id: u64, goal: Goal, reply: Option<oneshot::Sender<Answer>> },
    /// Publish after a delay, unless the content changes before.
    Later { id: u64, generation: u64, delay: Duration },
    /// The delay is over; `None`: at once, whatever the content.
    Due { id: u64, generation: Option<u64> },
    /// The name has changed, and perhaps whether it is a temporary one.
    Retarget { id: u64, target: Target, expect: Expect, held: Option<(bool, Option<Guess>)>, reply: oneshot::Sender<()> },
    /// Publish nothing that nobody waits for, until it is resumed. What may be committed already is waited for.
    Pause { id: u64, reply: oneshot::Sender<()> },
    /// Never publish; kept with its reason.
    Park(u64, Error),
    /// Publish what was parked or unfinished.
    Retry { id: u64, reply: Option<oneshot::Sender<Answer>> },
    /// What was sent of a file that will not be published in this run is aborted: the spool has the bytes.
    Withdraw(u64),
    /// Throw it away.
    Discard { id: u64, reply: oneshot::Sender<()> },
    /// An upload of an earlier run goes on, with the parts that are right.
    Resume { id: u64, upload: Option<(Target, String, BTreeMap<u32, Slot>)> },
    /// An upload of an earlier run turns out to be published.
    Found { id: u64, published: Box<Published> },
    /// Published, and nobody's: it is thrown away, unless somebody has taken it over meanwhile.
    Leave(u64),
    /// It left the spool.
    Forget(u64),
    /// A task's answer.
    Done { id: u64, action: Action, outcome: Outcome },
    /// A failed action's pause is over.
    Again { id: u64, action: Action },
    /// A transfer's place is free.
    Ended,
}

pub(crate) fn start(shared: Arc<Shared>, inbox: mpsc::UnboundedReceiver<Message>) {
    tokio::spawn(Uploader { shared, jobs: HashMap::new(), urgent: VecDeque::new(), parts: VecDeque::new(), busy: 0 }.run(inbox));
}

struct Uploader {
    shared: Arc<Shared>,
    jobs: HashMap<u64, Job>,
    /// Small objects and single requests go before the parts of large files.
    urgent: VecDeque<(u64, Action)>,
    parts: VecDeque<(u64, Action)>,
    busy: usize,
}

impl Uploader {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                _ = tick.tick() => self.give_up_stalled(),
            }
            self.dispatch();
        }
    }

    fn job(&mut self, id: u64) -> Option<&mut Job> {
        if !self.jobs.contains_key(&id) {
            let entry = self.shared.entry(id)?;
            self.jobs.insert(id, Job::new(entry));
        }
        self.jobs.get_mut(&id)
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Ready(id) => {
                // Once sealed, the plan says what is sent; the next write after it announces again.
                let pieces = self.job(id).filter(|job| !job.state.is_sealed()).map(|job| job.entry.take_ready()).unwrap_or_default();
                for piece in pieces {
                    self.apply(id, Event::Ready(piece));
                }
            }
            Message::Publish { id, goal, reply } => self.publish(id, goal, reply),
            // A drain that begins after this sends what is queued by itself.
            Message::Later { id, generation, .. } if self.shared.drains.load(Relaxed) > 0 => {
                self.handle(Message::Due { id, generation: Some(generation) });
            }
            Message::Later { id, generation, delay } => {
                let shared = self.shared.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    shared.send(Message::Due { id, generation: Some(generation) });
                });
            }
            Message::Due { id, generation } => {
                let due = self.shared.entry(id).is_some_and(|entry| {
                    let intent = entry.intent.lock();
                    let content = entry.content.lock();
                    intent.phase == Phase::Sealed
                        && !intent.held
                        && !intent.poisoned
                        && !intent.resuming
                        && !intent.paused
                        && generation.is_none_or(|g| g == content.generation)
                        && content.is_dirty()
                });
                if due {
                    self.publish(id, Goal::Object, None);
                }
            }
            Message::Retry { id, reply } => {
                if let Some(job) = self.job(id) {
                    job.entry.intent.lock().revive();
                }
                self.publish(id, Goal::Object, reply);
            }
            Message::Park(id, error) => self.give_up(id, error, true),
            Message::Withdraw(id) => {
                if self.jobs.get(&id).is_some_and(|job| job.state.step == Step::Idle) {
                    self.apply(id, Event::Stop);
                    self.stop_transfers(id);
                }
                self.shared.chores.fetch_sub(1, Relaxed);
            }
            Message::Retarget { .. } | Message::Discard { .. } | Message::Pause { .. } => self.redirect(message),
            Message::Resume { id, upload } => self.resume(id, upload),
            Message::Found { id, published } => {
                if let Some(entry) = self.job(id).map(|job| job.entry.clone()) {
                    let whole = entry.content.lock().is_whole();
                    publish::settle(&entry, &published);
                    self.finish(id, &entry, *published, whole);
                }
            }
            Message::Leave(id) => {
                let leaves = self.shared.entry(id).is_some_and(|entry| {
                    let mut intent = entry.intent.lock();
                    let leaves = intent.retired && !entry.content.lock().is_dirty();
                    intent.discarded |= leaves;
                    leaves
                });
                if leaves {
                    let (reply, _) = oneshot::channel();
                    self.redirect(Message::Discard { id, reply });
                }
            }
            Message::Forget(id) => {
                self.jobs.remove(&id);
            }
            Message::Done { id, action, outcome } => self.done(id, action, outcome),
            Message::Again { id, action } => {
                if self.jobs.get(&id).is_some_and(|job| job.is_current(&action)) {
                    self.enqueue(id, action);
                }
            }
            Message::Ended => self.busy -= 1,
        }
    }

    fn publish(&mut self, id: u64, goal: Goal, reply: Option<oneshot::Sender<Answer>>) {
        let Some(job) = self.job(id) else {
            if let Some(reply) = reply {
                let _ = reply.send(Err(Error::Discarded));
            }
            return;
        };
        if job.state.is_sealed() && (job.entry.content.lock().changed_since_seal() || job.is_committing() && goal < job.state.goal) {
            job.next.push((goal, reply));
            return;
        }
        if job.state.step == Step::Idle {
            job.since = Instant::now();
            job.attempts = 0;
            job.bad_digests = 0;
            job.entry.sent.store(0, Relaxed);
            let mut intent = job.entry.intent.lock();
            intent.reason = None;
            if goal == Goal::Object {
                intent.phase = Phase::Sealed;
            }
        }
        job.waiters.extend(reply);
        self.apply(id, Event::Publish(goal));
    }

    /// A new name, or the end of the entry. What may be committed already is waited for.
    fn redirect(&mut self, message: Message) {
        let (Message::Retarget { id, .. } | Message::Discard { id, .. } | Message::Pause { id, .. }) = &message else { return };
        let id = *id;
        let order = self.shared.next_number();
        let Some(job) = self.job(id) else { return };
        if job.is_committing() {
            job.after.push(message);
            return;
        }
        let given_up = match &message {
            Message::Retarget { reply, .. } => reply.is_closed() && !job.entry.intent.lock().withheld,
            Message::Pause { reply, .. } => reply.is_closed(),
            _ => false,
        };
        if given_up {
            return;
        }
        match message {
            Message::Retarget { target, expect, held, reply, .. } => {
                let (parts, stops) = {
                    let mut intent = job.entry.intent.lock();
                    intent.go_to(target);
                    intent.expect = expect;
                    intent.order = order;
                    if let Some((held, guess)) = held {
                        intent.hold(held, guess);
                        intent.appended = None;
                    }
                    // Under a temporary name nothing is published by itself.
                    let unqueued = intent.held && job.waiters.is_empty();
                    if unqueued && intent.phase.frees() {
                        intent.phase = Phase::Writing;
                    }
                    (intent.parts_target(), unqueued && job.state.step != Step::Idle)
                };
                let same = job.upload.as_ref().is_none_or(|upload| upload.is(&parts));
                let entry = job.entry.clone();
                if !same {
                    entry.content.lock().next_part = 1;
                }
                if !same || stops {
                    self.stop_transfers(id);
                }
                self.apply(id, if stops { Event::Stop } else { Event::Again { keep: same } });
                if !same {
                    self.shared.send(Message::Ready(id));
                }
                tokio::spawn(async move {
                    let recorded = *entry.recorded.lock().await != Recorded::Not;
                    if recorded && let Err(error) = entry.persist(false).await {
                        tracing::warn!("{}: {error}", entry.record.display());
                    }
                    let _ = reply.send(());
                });
            }
            Message::Pause { reply, .. } => {
                let stops = {
                    let mut intent = job.entry.intent.lock();
                    intent.paused = true;
                    let stops = job.waiters.is_empty() && job.state.step != Step::Idle;
                    if stops && intent.phase.frees() {
                        intent.phase = Phase::Sealed;
                    }
                    stops
                };
                if stops {
                    self.apply(id, Event::Stop);
                    self.stop_transfers(id);
                }
                let _ = reply.send(());
            }
            Message::Discard { reply, .. } => {
                job.entry.intent.lock().discarded = true;
                for waiter in job.waiters.drain(..).chain(job.next.drain(..).filter_map(|(_, reply)| reply)) {
                    let _ = waiter.send(Err(Error::Discarded));
                }
                let entry = job.entry.clone();
                self.apply(id, Event::Stop);
                self.stop_transfers(id);
                self.jobs.remove(&id);
                self.shared.remove(&entry);
                tokio::spawn(async move {
                    publish::erase(&entry).await;
                    let _ = reply.send(());
                });
            }
            _ => {}
        }
    }

    fn resume(&mut self, id: u64, upload: Option<(Target, String, BTreeMap<u32, Slot>)>) {
        let shared = self.shared.clone();
        let Some(job) = self.job(id) else {
            return upload
                .into_iter()
                .for_each(|(target, name, _)| abandoned::abandon(&shared, target.store, UploadRecord::known(target.key, name)));
        };
        // What stands in its way may be what an earlier run sent.
        job.doubt = true;
        let untouched = job.entry.content.lock().generation == 0 && job.state.step == Step::Idle && job.state.upload == Upload::None;
        match upload {
            Some((target, name, slots)) if untouched => {
                (job.upload, job.state.upload, job.state.slots) = (Some(target), Upload::Open(name), slots);
            }
            // Written to, or sent anew, while the store was asked for the parts.
            Some((target, name, _)) => job.entry.abandon(target.store, UploadRecord::known(target.key, name)),
            None => {}
        }
        let mut intent = job.entry.intent.lock();
        intent.resuming = false;
        let due = intent.phase == Phase::Sealed && !intent.paused;
        drop(intent);
        if due {
            self.publish(id, Goal::Object, None);
        }
    }

    fn apply(&mut self, id: u64, event: Event) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let state = std::mem::replace(&mut job.state, State::new());
        let (state, actions) = state.transition(event);
        job.state = state;
        for action in actions {
            match action {
                Action::Abort { id: upload } => {
                    if let Some(job) = self.jobs.get_mut(&id)
                        && let Some(target) = job.upload.take()
                    {
                        job.entry.abandon(target.store, UploadRecord::known(target.key, upload));
                    }
                }
                Action::PartsDone => self.answer(id, Ok(None)),
                // Done where the outcome is at hand.
                Action::Published => {}
                action => self.enqueue(id, action),
            }
        }
    }

    fn enqueue(&mut self, id: u64, action: Action) {
        match &action {
            Action::Prepare { .. } | Action::Check { .. } => self.start(id, action),
            Action::Send { piece, .. } if piece.how == How::Upload => self.parts.push_back((id, action)),
            _ => self.urgent.push_back((id, action)),
        }
    }

    fn dispatch(&mut self) {
        while self.busy < self.shared.config.max_connections.max(1) {
            let Some((id, action)) = self.urgent.pop_front().or_else(|| self.parts.pop_front()) else { return };
            self.start(id, action);
        }
    }

    /// Starts an action's task, unless it was overtaken while it waited.
    fn start(&mut self, id: u64, action: Action) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.is_current(&action)) else { return };
        let entry = job.entry.clone();
        let shared = self.shared.clone();
        let mut place = None;
        if !matches!(action, Action::Prepare { .. } | Action::Check { .. }) {
            self.busy += 1;
            shared.meter.begin();
            place = Some(Place { shared: shared.clone() });
        }
        let key = match &action {
            Action::Send { epoch, piece } => Some(Key::Part(*epoch, piece.number)),
            Action::Prepare { serial } | Action::Check { serial } | Action::Complete { serial } | Action::Put { serial } => {
                Some(Key::Step(*serial))
            }
            // A Create that is cut off could leave an upload that nobody knows.
            Action::Create { .. } | Action::Abort { .. } | Action::PartsDone | Action::Published => None,
        };
        let context = Context {
            snapshot: job.snapshot.clone(),
            upload: job.upload.clone(),
            doubt: job.doubt,
            awaited: !job.waiters.is_empty(),
            ..Context::of(&job.state, &action)
        };
        let task = tokio::spawn(async move {
            let repeated = entry.clone();
            let told: slow::Listener = Arc::new(move |error, pause| repeated.sent_again(error, pause));
            let outcome = slow::listen(told, publish::perform(&entry, context, &action)).await;
            drop(place);
            shared.send(Message::Done { id, action, outcome });
        });
        if let Some(key) = key {
            job.running.insert(key, task.abort_handle());
        }
    }

    fn stop_transfers(&mut self, id: u64) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.running.drain().for_each(|(_, task)| task.abort());
        }
    }

    fn done(&mut self, id: u64, action: Action, outcome: Outcome) {
        let Some(job) = self.jobs.get_mut(&id) else {
            if let Outcome::Created { target, id } = outcome {
                abandoned::abandon(&self.shared, target.store, UploadRecord::known(target.key, id));
            }
            return;
        };
        if let Outcome::Trouble(trouble) = outcome {
            if job.is_current(&action) {
                self.trouble(id, action, trouble);
            }
            return;
        }
        job.attempts = 0;
        match (outcome, action) {
            (Outcome::Prepared { snapshot, plan, clean }, Action::Prepare { serial }) if serial == job.state.serial => {
                job.snapshot = Some(snapshot);
                self.apply(id, Event::Prepared { serial, plan, clean });
            }
            (Outcome::Created { target, id: upload }, Action::Create { epoch }) => {
                let awaited = epoch == job.state.epoch && job.state.upload == Upload::Creating;
                let wanted = target.is(&job.entry.intent.lock().parts_target());
                if awaited && wanted {
                    job.upload = Some(target);
                    return self.apply(id, Event::Created { epoch, id: upload });
                }
                job.entry.abandon(target.store, UploadRecord::known(target.key, upload));
                if awaited {
                    // Renamed while it was being created.
                    self.apply(id, Event::Restart);
                }
            }
            (Outcome::Sent(sent), Action::Send { epoch, piece }) => {
                job.running.remove(&Key::Part(epoch, piece.number));
                self.apply(id, Event::PartSent { epoch, number: piece.number, sent });
            }
            (Outcome::Overtaken, action) if job.is_current(&action) => self.overtaken(id),
            (Outcome::Checked(clean), Action::Check { serial }) => self.apply(id, Event::Checked { serial, clean }),
            (Outcome::Judged(verdict), action) if job.is_current(&action) => self.judged(id, action, verdict),
            _ => {}
        }
    }

    /// What PutObject or CompleteMultipartUpload came to.
    fn judged(&mut self, id: u64, action: Action, verdict: Verdict) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        match verdict {
            Verdict::Published(published) => {
                let (Action::Put { serial } | Action::Complete { serial }) = action else { return };
                let whole = job.snapshot.take().is_some_and(|snapshot| snapshot.whole);
                let entry = job.entry.clone();
                self.apply(id, Event::Finished { serial });
                if let Some(job) = self.jobs.get_mut(&id) {
                    (job.upload, job.doubt) = (None, false);
                    job.running.clear();
                }
                publish::settle(&entry, &published);
                self.finish(id, &entry, *published, whole);
            }
            Verdict::Restart => {
                self.stop_transfers(id);
                self.apply(id, Event::Restart);
            }
            Verdict::Elsewhere(key) => {
                {
                    let mut intent = job.entry.intent.lock();
                    let theirs = std::mem::replace(&mut intent.target.key, key);
                    intent.beside.get_or_insert(theirs);
                    intent.sent.clear();
                    intent.expect = Expect::NewFile;
                }
                self.stop_transfers(id);
                self.apply(id, Event::Again { keep: false });
            }
            Verdict::Anew => {
                self.stop_transfers(id);
                self.apply(id, Event::Again { keep: false });
            }
            Verdict::Retry => self.apply(id, Event::Again { keep: true }),
            Verdict::Overtaken => self.overtaken(id),
            Verdict::Refused(error) => self.fail(id, error),
        }
    }

    /// A queued file is written again: what is sent of it is of no use, and only its next close says what is to be published.
    fn overtaken(&mut self, id: u64) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let (mut next, after) = (std::mem::take(&mut job.next), std::mem::take(&mut job.after));
        {
            let mut intent = job.entry.intent.lock();
            intent.phase = if intent.sealed { Phase::Sealed } else { Phase::Writing };
            if intent.sealed && next.is_empty() {
                // Closed again by now, and what was to start its publication may have found this one under way.
                next.push((Goal::Object, None));
            }
        }
        self.apply(id, Event::Stop);
        self.stop_transfers(id);
        self.shared.changed.notify_waiters();
        for message in after {
            self.handle(message);
        }
        for (goal, reply) in next {
            self.publish(id, goal, reply);
        }
    }

    /// An entry is published; `whole`: no byte of it came from the object that it replaced.
    fn finish(&mut self, id: u64, entry: &Arc<Entry>, published: Published, whole: bool) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let waiters = std::mem::take(&mut job.waiters);
        let next = std::mem::take(&mut job.next);
        let after = std::mem::take(&mut job.after);
        let (entry, shared) = (entry.clone(), self.shared.clone());
        let (erase, order) = {
            let intent = entry.intent.lock();
            (intent.retired && !entry.content.lock().is_dirty() && next.is_empty(), intent.order)
        };
        tokio::spawn(async move {
            shared.hooks.published(&published);
            failpoint::pass("published");
            if whole {
                // Before its own record goes: after a crash it is found published again, and what is older goes then.
                publish::supersede(&shared, &published.bucket, &published.key, order).await;
            }
            publish::tidy(&entry).await;
            failpoint::pass("tidied");
            for waiter in waiters {
                let _ = waiter.send(Ok(Some(published.clone())));
            }
            if erase {
                shared.send(Message::Leave(id));
            }
            shared.chores.fetch_sub(1, Relaxed);
            shared.changed.notify_waiters();
        });
        for message in after {
            self.handle(message);
        }
        for (goal, reply) in next {
            self.publish(id, goal, reply);
        }
    }

    fn answer(&mut self, id: u64, answer: Answer) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        for waiter in job.waiters.drain(..) {
            let _ = waiter.send(answer.clone());
        }
        self.shared.changed.notify_waiters();
        for (goal, reply) in std::mem::take(&mut job.next) {
            self.publish(id, goal, reply);
        }
    }
}
