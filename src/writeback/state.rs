//! The state of one entry's upload, and how events change it. Pure: the uploader performs the actions.
//!
//! Two counters make late answers harmless: `epoch` names the multipart upload, `serial` the step (prepare, check,
//! put, complete). What answers under an old one is ignored, an upload created under an old epoch is aborted.
//! Within an upload no two transfers of one number ever run at once: the store keeps the last, whichever that is.

use std::collections::BTreeMap;

use super::plan::{Piece, Plan};
use crate::s3::{Checksum, ETag};

/// How far a publication is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Goal {
    /// All parts in the store: a temporary name whose rename will complete them.
    Parts,
    /// The object.
    Object,
}

/// What is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// No publication is under way; parts may be sent ahead.
    Idle,
    /// A snapshot and a plan are being made.
    Preparing,
    /// Parts travel.
    Sending,
    /// All parts are there; were they the snapshot's?
    Checking,
    /// CompleteMultipartUpload is under way.
    Completing,
    /// PutObject is under way.
    Putting,
}

/// The multipart upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Upload {
    None,
    Creating,
    Open(String),
}

/// A part that the store has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SentPart {
    pub etag: ETag,
    /// As sent with it, or as the store told it of a copy.
    pub checksum: Option<Checksum>,
}

/// Where a part stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Waiting,
    /// `stale`: what it carries is not wanted any more, so it is sent again after it.
    Sending {
        stale: bool,
    },
    Sent(SentPart),
}

/// One part number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub piece: Piece,
    pub status: Status,
    /// In the plan; what is not is left out of Complete.
    pub wanted: bool,
}

/// The state of one entry's upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub step: Step,
    pub upload: Upload,
    pub slots: BTreeMap<u32, Slot>,
    pub goal: Goal,
    pub epoch: u32,
    pub serial: u32,
}

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A part lies wholly behind the sequential frontier.
    Ready(Piece),
    /// Somebody wants it published.
    Publish(Goal),
    /// The snapshot's plan; with each piece, whether its bytes are unchanged since they were handed to a transfer.
    Prepared { serial: u32, plan: Plan, clean: Vec<bool> },
    /// An upload exists, perhaps with parts that are known to be right (recovery).
    Created { epoch: u32, id: String },
    /// The store has a part.
    PartSent { epoch: u32, number: u32, sent: SentPart },
    /// The check's answer.
    Checked { serial: u32, clean: bool },
    /// PutObject or Complete ended well.
    Finished { serial: u32 },
    /// The upload is gone or of no use: begin another one.
    Restart,
    /// The key or the plan's ground has changed: make another snapshot; the upload stays if `keep`.
    Again { keep: bool },
    /// Given up, or thrown away.
    Stop,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Prepare {
        serial: u32,
    },
    Create {
        epoch: u32,
    },
    Send {
        epoch: u32,
        piece: Piece,
    },
    Check {
        serial: u32,
    },
    Complete {
        serial: u32,
    },
    Put {
        serial: u32,
    },
    Abort {
        id: String,
    },
    /// The goal of parts was reached.
    PartsDone,
    /// The goal of an object was reached.
    Published,
}

impl State {
    pub fn new() -> Self {
        Self { step: Step::Idle, upload: Upload::None, slots: BTreeMap::new(), goal: Goal::Object, epoch: 0, serial: 0 }
    }

    /// True from the snapshot on: what is written now belongs to the next publication, unless bytes are sent again.
    pub fn is_sealed(&self) -> bool {
        !matches!(self.step, Step::Idle | Step::Preparing)
    }

    /// The next state, and what to do about it.
    pub fn transition(mut self, event: Event) -> (State, Vec<Action>) {
        let mut actions = Vec::new();
        self.apply(event, &mut actions);
        (self, actions)
    }

    fn apply(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Ready(piece) => {
                // Once sealed, the plan says what is sent.
                if !self.is_sealed() {
                    self.want(piece, false);
                    self.send(actions);
                }
            }
            Event::Publish(goal) if self.step == Step::Idle => {
                self.goal = goal;
                self.prepare(actions);
            }
            Event::Publish(goal) => self.goal = self.goal.max(goal),
            Event::Prepared { serial, plan, clean } if serial == self.serial && self.step == Step::Preparing => match plan {
                Plan::Put => {
                    self.drop_upload(actions);
                    self.slots.clear();
                    self.step = Step::Putting;
                    actions.push(Action::Put { serial });
                }
                Plan::Parts(pieces) => {
                    self.slots.values_mut().for_each(|slot| slot.wanted = false);
                    for (piece, clean) in pieces.into_iter().zip(clean) {
                        self.want(piece, clean);
                    }
                    self.step = Step::Sending;
                    self.send(actions);
                    self.advance(actions);
                }
            },
            Event::Created { epoch, id } => {
                if epoch == self.epoch && self.upload == Upload::Creating {
                    self.upload = Upload::Open(id);
                    self.send(actions);
                    self.advance(actions);
                } else {
                    actions.push(Action::Abort { id });
                }
            }
            Event::PartSent { epoch, number, sent } if epoch == self.epoch => {
                if let Some(slot) = self.slots.get_mut(&number)
                    && let Status::Sending { stale } = slot.status
                {
                    slot.status = if stale { Status::Waiting } else { Status::Sent(sent) };
                }
                self.send(actions);
                self.advance(actions);
            }
            Event::Checked { serial, clean } if serial == self.serial && self.step == Step::Checking => match (clean, self.goal) {
                (false, _) => self.prepare(actions),
                (true, Goal::Parts) => {
                    self.step = Step::Idle;
                    actions.push(Action::PartsDone);
                }
                (true, Goal::Object) => {
                    self.step = Step::Completing;
                    actions.push(Action::Complete { serial });
                }
            },
            Event::Finished { serial } if serial == self.serial && matches!(self.step, Step::Completing | Step::Putting) => {
                // The upload went into the object: nothing to abort.
                self.upload = Upload::None;
                self.reset();
                actions.push(Action::Published);
            }
            Event::Restart => {
                self.drop_upload(actions);
                self.slots.retain(|_, slot| slot.wanted);
                self.slots.values_mut().for_each(|slot| slot.status = Status::Waiting);
                if self.is_sealed() {
                    self.prepare(actions);
                } else {
                    self.send(actions);
                }
            }
            Event::Again { keep } => {
                if !keep {
                    self.drop_upload(actions);
                    self.slots.clear();
                }
                if self.step != Step::Idle {
                    self.prepare(actions);
                }
            }
            Event::Stop => {
                self.drop_upload(actions);
                self.reset();
            }
            // Late answers of an upload or a step that is no more.
            Event::Prepared { .. } | Event::PartSent { .. } | Event::Checked { .. } | Event::Finished { .. } => {}
        }
    }

    fn reset(&mut self) {
        self.step = Step::Idle;
        self.slots.clear();
        self.goal = Goal::Object;
        self.epoch += 1;
        self.serial += 1;
    }

    fn prepare(&mut self, actions: &mut Vec<Action>) {
        self.step = Step::Preparing;
        self.serial += 1;
        actions.push(Action::Prepare { serial: self.serial });
    }

    fn drop_upload(&mut self, actions: &mut Vec<Action>) {
        if let Upload::Open(id) = std::mem::replace(&mut self.upload, Upload::None) {
            actions.push(Action::Abort { id });
        }
        self.epoch += 1;
    }

    /// Puts a piece on the list; `clean`: what was sent of it still holds.
    fn want(&mut self, piece: Piece, clean: bool) {
        match self.slots.get_mut(&piece.number) {
            Some(slot) => {
                let same = clean && slot.piece == piece;
                slot.status = match (&slot.status, same) {
                    (status, true) => status.clone(),
                    (Status::Sending { .. }, false) => Status::Sending { stale: true },
                    (_, false) => Status::Waiting,
                };
                slot.piece = piece;
                slot.wanted = true;
            }
            None => {
                self.slots.insert(piece.number, Slot { piece, status: Status::Waiting, wanted: true });
            }
        }
    }

    /// Sends what waits, or creates the upload that it needs.
    fn send(&mut self, actions: &mut Vec<Action>) {
        let waits = |slot: &&mut Slot| slot.wanted && slot.status == Status::Waiting;
        match self.upload {
            Upload::Open(_) => {
                for slot in self.slots.values_mut().filter(waits) {
                    slot.status = Status::Sending { stale: false };
                    actions.push(Action::Send { epoch: self.epoch, piece: slot.piece.clone() });
                }
            }
            Upload::None if self.slots.values_mut().any(|slot| waits(&slot)) => {
                self.upload = Upload::Creating;
                self.epoch += 1;
                actions.push(Action::Create { epoch: self.epoch });
            }
            Upload::None | Upload::Creating => {}
        }
    }

    fn advance(&mut self, actions: &mut Vec<Action>) {
        let complete = self.slots.values().filter(|slot| slot.wanted).all(|slot| matches!(slot.status, Status::Sent(_)));
        if self.step == Step::Sending && matches!(self.upload, Upload::Open(_)) && complete {
            self.step = Step::Checking;
            self.serial += 1;
            actions.push(Action::Check { serial: self.serial });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writeback::plan::How;
    use proptest::prelude::*;
    use std::collections::{BTreeSet, HashSet};

    fn piece(number: u32) -> Piece {
        Piece { number, range: u64::from(number - 1) * 8..u64::from(number) * 8, how: How::Upload }
    }

    fn sent() -> SentPart {
        SentPart { etag: ETag::new("e"), checksum: None }
    }

    /// A store and an uploader that answer in any order.
    #[derive(Default)]
    struct World {
        prepares: Vec<u32>,
        creates: Vec<u32>,
        sends: Vec<(u32, u32)>,
        steps: Vec<Action>,
        open: BTreeSet<String>,
        published: u32,
    }

    fn drive(state: State, event: Event, world: &mut World) -> State {
        let (state, actions) = state.transition(event);
        for action in actions {
            match action {
                Action::Prepare { serial } => world.prepares.push(serial),
                Action::Create { epoch } => world.creates.push(epoch),
                Action::Send { epoch, piece } => {
                    assert!(!world.sends.contains(&(epoch, piece.number)), "two transfers of one number");
                    world.sends.push((epoch, piece.number));
                }
                Action::Abort { id } => assert!(world.open.remove(&id), "aborted twice"),
                Action::Complete { .. } => {
                    let Upload::Open(id) = &state.upload else { panic!("completes nothing") };
                    assert!(world.open.contains(id));
                    assert!(state.slots.values().all(|slot| !slot.wanted || matches!(slot.status, Status::Sent(_))));
                    world.steps.push(action);
                }
                Action::Check { .. } | Action::Put { .. } => world.steps.push(action),
                Action::Published => world.published += 1,
                Action::PartsDone => {}
            }
        }
        state
    }

    proptest! {
        #[test]
        fn uploads_end_once_and_never_race(choices in prop::collection::vec((0u8..12, any::<u16>()), 0..120)) {
            let (mut state, mut world, mut names, mut completed) = (State::new(), World::default(), 0, HashSet::new());
            for (choice, seed) in choices {
                let pick = |len: usize| usize::from(seed) % len.max(1);
                let event = match choice {
                    0 => Event::Ready(piece(u32::from(seed % 4) + 1)),
                    1 => Event::Publish(if seed & 1 == 0 { Goal::Object } else { Goal::Parts }),
                    2 | 3 if !world.prepares.is_empty() => {
                        let serial = world.prepares.remove(pick(world.prepares.len()));
                        let count = u32::from(seed % 5);
                        let plan = if count == 0 { Plan::Put } else { Plan::Parts((1..=count).map(piece).collect()) };
                        Event::Prepared { serial, plan, clean: (0..count).map(|n| seed >> n & 1 == 0).collect() }
                    }
                    4 if !world.creates.is_empty() => {
                        names += 1;
                        world.open.insert(names.to_string());
                        Event::Created { epoch: world.creates.remove(pick(world.creates.len())), id: names.to_string() }
                    }
                    5..=8 if !world.sends.is_empty() => {
                        let (epoch, number) = world.sends.remove(pick(world.sends.len()));
                        Event::PartSent { epoch, number, sent: sent() }
                    }
                    9 if !world.steps.is_empty() => match world.steps.remove(pick(world.steps.len())) {
                        Action::Check { serial } => Event::Checked { serial, clean: seed & 3 != 0 },
                        Action::Complete { serial } | Action::Put { serial } => {
                            if serial == state.serial && let Upload::Open(id) = &state.upload {
                                prop_assert!(completed.insert(id.clone()));
                                world.open.remove(id);
                            }
                            Event::Finished { serial }
                        }
                        _ => continue,
                    },
                    10 if seed % 4 == 0 => Event::Restart,
                    11 if seed % 4 == 0 => Event::Again { keep: seed & 8 != 0 },
                    11 if seed % 4 == 1 => Event::Stop,
                    _ => continue,
                };
                state = drive(state, event, &mut world);
            }
            // Stopped, and every upload that is still being created answered: none is left behind.
            state = drive(state, Event::Stop, &mut world);
            for epoch in std::mem::take(&mut world.creates) {
                names += 1;
                world.open.insert(names.to_string());
                state = drive(state, Event::Created { epoch, id: names.to_string() }, &mut world);
            }
            prop_assert!(world.open.is_empty());
            prop_assert_eq!(state.upload, Upload::None);
        }
    }
}
