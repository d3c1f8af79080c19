//! The model: what a local filesystem would answer.

use std::collections::BTreeMap;

use packmule::vfs::Error;
use proptest::prelude::*;
use proptest_state_machine::ReferenceStateMachine;

use crate::support::files::noise;

/// Files and directories by path; bytes by identity, so that an unlinked file lives on in its handle.
#[derive(Clone, Debug, Default)]
pub struct Model {
    pub names: BTreeMap<String, Node>,
    pub files: BTreeMap<usize, Vec<u8>>,
    held: BTreeMap<u8, usize>,
    next: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Node {
    Directory,
    File(usize),
}

#[derive(Clone, Debug)]
pub enum Step {
    Write { path: String, offset: usize, len: usize, seed: u64, truncate: bool },
    Append { path: String, len: usize, seed: u64 },
    Truncate { path: String, size: usize },
    Read { path: String },
    List { path: String },
    Mkdir { path: String },
    Rmdir { path: String },
    Unlink { path: String },
    Rename { from: String, to: String },
    Hold { path: String, slot: u8 },
    WriteHeld { slot: u8, offset: usize, len: usize, seed: u64 },
    ReadHeld { slot: u8 },
    Close { slot: u8 },
    ForeignPut { path: String, len: usize, seed: u64 },
    ForeignDelete { path: String },
    Remount,
}

impl Model {
    pub fn parent(path: &str) -> &str {
        path.rsplit_once('/').map_or("", |(parent, _)| parent)
    }

    /// ENOENT or ENOTDIR where the directory of a path is none.
    fn check_parent(&self, path: &str) -> Result<(), Error> {
        let mut at = String::new();
        for step in Self::parent(path).split('/').filter(|step| !step.is_empty()) {
            at = if at.is_empty() { step.to_owned() } else { format!("{at}/{step}") };
            match self.names.get(&at) {
                Some(Node::Directory) => {}
                Some(Node::File(_)) => return Err(Error::NotDirectory),
                None => return Err(Error::NoEntry),
            }
        }
        Ok(())
    }

    pub fn find(&self, path: &str) -> Result<Node, Error> {
        self.check_parent(path)?;
        self.names.get(path).copied().ok_or(Error::NoEntry)
    }

    fn file(&self, path: &str) -> Result<usize, Error> {
        match self.find(path)? {
            Node::File(id) => Ok(id),
            Node::Directory => Err(Error::IsDirectory),
        }
    }

    fn create(&mut self, path: &str) -> Result<usize, Error> {
        match self.file(path) {
            Err(Error::NoEntry) => {
                self.check_parent(path)?;
                self.next += 1;
                self.names.insert(path.to_owned(), Node::File(self.next));
                self.files.insert(self.next, Vec::new());
                Ok(self.next)
            }
            other => other,
        }
    }

    fn splice(&mut self, id: usize, offset: usize, bytes: &[u8]) {
        let file = self.files.entry(id).or_default();
        if file.len() < offset + bytes.len() {
            file.resize(offset + bytes.len(), 0);
        }
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn children(&self, path: &str) -> Vec<String> {
        let prefix = if path.is_empty() { String::new() } else { format!("{path}/") };
        let below = self.names.keys().filter_map(|name| name.strip_prefix(&prefix));
        below.filter(|name| !name.is_empty() && !name.contains('/')).map(str::to_owned).collect()
    }

    fn is_held(&self, path: &str) -> bool {
        matches!(self.names.get(path), Some(Node::File(id)) if self.held.values().any(|held| held == id))
    }

    /// What a call answers; the model changes where it succeeds.
    pub fn perform(&mut self, step: &Step) -> Outcome {
        match step {
            Step::Write { path, offset, len, seed, truncate } => done(self.create(path).map(|id| {
                if *truncate {
                    self.files.insert(id, Vec::new());
                }
                self.splice(id, *offset, &noise(*seed, *len));
            })),
            Step::Append { path, len, seed } => done(self.create(path).map(|id| {
                let end = self.files[&id].len();
                self.splice(id, end, &noise(*seed, *len));
            })),
            Step::Truncate { path, size } => done(self.file(path).map(|id| self.files.entry(id).or_default().resize(*size, 0))),
            Step::Read { path } => self.file(path).map(|id| Answer::Bytes(self.files[&id].clone())),
            Step::List { path } => match if path.is_empty() { Ok(Node::Directory) } else { self.find(path) } {
                Ok(Node::Directory) => Ok(Answer::Names(self.children(path))),
                Ok(Node::File(_)) => Err(Error::NotDirectory),
                Err(error) => Err(error),
            },
            Step::Mkdir { path } => match self.find(path) {
                Ok(_) => Err(Error::Exists),
                Err(Error::NoEntry) if self.check_parent(path).is_ok() => {
                    self.names.insert(path.clone(), Node::Directory);
                    Ok(Answer::Done)
                }
                Err(error) => Err(error),
            },
            Step::Rmdir { path } => match self.find(path)? {
                Node::File(_) => Err(Error::NotDirectory),
                Node::Directory if !self.children(path).is_empty() => Err(Error::NotEmpty),
                Node::Directory => {
                    self.names.remove(path);
                    Ok(Answer::Done)
                }
            },
            Step::Unlink { path } => done(self.file(path).map(|_| {
                self.names.remove(path);
            })),
            Step::Rename { from, to } => done(self.rename(from, to)),
            Step::Hold { path, slot } => done(self.create(path).map(|id| {
                self.held.insert(*slot, id);
            })),
            Step::WriteHeld { slot, offset, len, seed } => {
                let id = self.held[slot];
                self.splice(id, *offset, &noise(*seed, *len));
                Ok(Answer::Done)
            }
            Step::ReadHeld { slot } => Ok(Answer::Bytes(self.files[&self.held[slot]].clone())),
            Step::Close { slot } => {
                self.held.remove(slot);
                Ok(Answer::Done)
            }
            Step::ForeignPut { path, len, seed } => {
                self.next += 1;
                self.names.insert(path.clone(), Node::File(self.next));
                self.files.insert(self.next, noise(*seed, *len));
                Ok(Answer::Done)
            }
            Step::ForeignDelete { path } => {
                self.names.remove(path);
                Ok(Answer::Done)
            }
            Step::Remount => {
                self.held.clear();
                Ok(Answer::Done)
            }
        }
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), Error> {
        let moved = self.find(from)?;
        let over = match self.find(to) {
            Ok(node) => Some(node),
            Err(Error::NoEntry) => {
                self.check_parent(to)?;
                None
            }
            Err(error) => return Err(error),
        };
        if from == to {
            return Ok(());
        }
        match (moved, over) {
            (Node::Directory, Some(Node::Directory)) if !self.children(to).is_empty() => return Err(Error::NotEmpty),
            (Node::Directory, Some(Node::File(_))) => return Err(Error::NotDirectory),
            (Node::File(_), Some(Node::Directory)) => return Err(Error::IsDirectory),
            (Node::Directory, _) if to.starts_with(&format!("{from}/")) => return Err(Error::Invalid),
            _ => {}
        }
        let below: Vec<String> = self.names.keys().filter(|name| name.starts_with(&format!("{from}/"))).cloned().collect();
        for name in below {
            if let Some(node) = self.names.remove(&name) {
                self.names.insert(format!("{to}{}", &name[from.len()..]), node);
            }
        }
        self.names.remove(from);
        self.names.insert(to.to_owned(), moved);
        Ok(())
    }

    pub fn makes_sense(&self, step: &Step) -> bool {
        match step {
            Step::Hold { slot, .. } => !self.held.contains_key(slot),
            Step::WriteHeld { slot, .. } | Step::ReadHeld { slot } | Step::Close { slot } => self.held.contains_key(slot),
            // Another client's edit of a file that is open here is a conflict: those have tests of their own.
            Step::ForeignPut { path, .. } => {
                self.check_parent(path).is_ok() && self.names.get(path) != Some(&Node::Directory) && !self.is_held(path)
            }
            Step::ForeignDelete { path } => matches!(self.names.get(path), Some(Node::File(_))) && !self.is_held(path),
            _ => true,
        }
    }
}

#[derive(Debug, PartialEq)]
pub enum Answer {
    Done,
    Bytes(Vec<u8>),
    Names(Vec<String>),
}

pub type Outcome = Result<Answer, Error>;

pub fn done(result: Result<(), Error>) -> Outcome {
    result.map(|()| Answer::Done)
}

pub struct Calls;

impl ReferenceStateMachine for Calls {
    type State = Model;
    type Transition = Step;

    fn init_state() -> BoxedStrategy<Model> {
        Just(Model::default()).boxed()
    }

    fn transitions(_: &Model) -> BoxedStrategy<Step> {
        let path =
            || proptest::collection::vec(prop_oneof![Just("a"), Just("b"), Just("\u{e4}.txt")], 1..=3).prop_map(|steps| steps.join("/"));
        let size = || prop_oneof![3 => 0usize..5_000, 1 => Just(6 << 20), 1 => Just(9 << 20)];
        let slot = || 0u8..2;
        prop_oneof![
            4 => (path(), 0usize..20_000, size(), any::<u64>(), any::<bool>()).prop_map(|(path, offset, len, seed, truncate)| Step::Write { path, offset, len: len.max(1), seed, truncate }),
            2 => (path(), 1usize..3_000, any::<u64>()).prop_map(|(path, len, seed)| Step::Append { path, len, seed }),
            1 => (path(), 0usize..9_000_000).prop_map(|(path, size)| Step::Truncate { path, size }),
            4 => path().prop_map(|path| Step::Read { path }),
            3 => prop_oneof![path(), Just(String::new())].prop_map(|path| Step::List { path }),
            4 => path().prop_map(|path| Step::Mkdir { path }),
            2 => path().prop_map(|path| Step::Rmdir { path }),
            2 => path().prop_map(|path| Step::Unlink { path }),
            4 => (path(), path()).prop_map(|(from, to)| Step::Rename { from, to }),
            2 => (path(), slot()).prop_map(|(path, slot)| Step::Hold { path, slot }),
            3 => (slot(), 0usize..9_000_000, 1usize..5_000, any::<u64>()).prop_map(|(slot, offset, len, seed)| Step::WriteHeld { slot, offset, len, seed }),
            2 => slot().prop_map(|slot| Step::ReadHeld { slot }),
            3 => slot().prop_map(|slot| Step::Close { slot }),
            2 => (path(), size(), any::<u64>()).prop_map(|(path, len, seed)| Step::ForeignPut { path, len, seed }),
            1 => path().prop_map(|path| Step::ForeignDelete { path }),
            1 => Just(Step::Remount),
        ]
        .boxed()
    }

    fn preconditions(state: &Model, step: &Step) -> bool {
        state.makes_sense(step)
    }

    fn apply(mut state: Model, step: &Step) -> Model {
        let _ = state.perform(step);
        state
    }
}
