//! packmule mounts S3 as a filesystem: buckets are directories, keys are files. When the copy dialog closes, the object is
//! whole in S3 under its name, with the right headers.
//!
//! # Bird's-eye view
//! ```text
//! kernel ── fuse ── vfs ──┬── cache ──────┐
//!                         └── writeback ──┴── s3 ── aws ── network
//!          (publish: headers by name, links)   mount, daemon, control, cli: around it
//! ```
//! * [`fuse`] decodes a request, spawns a task that owns its reply (what it can answer of names and attributes without waiting it answers
//!   itself), and turns [`vfs::Error`] into an errno. fuser's types stay there.
//! * [`vfs`] is the filesystem: inodes, directories, names ↔ keys, attributes, what each call promises.
//! * [`cache`] reads one version of an object through blocks on disk, many connections at a time.
//! * [`writeback`] keeps what is written in a spool file, sends parts while the application writes, and publishes at close.
//! * [`s3`] is the store: one bucket behind the [`s3::Store`] trait, in S3's own nouns. [`aws`] is below it: HTTP, retries,
//!   credentials, signatures.
//! * [`publish`] knows what an object should be served with, and reads who fetched it. [`config`] is what was asked for, [`mount`]
//!   puts all together, [`daemon`] starts and ends it and speaks with systemd (readiness, the journal, a lock against shutdowns),
//!   [`control`] talks to a running mount, [`measure`] counts and times, [`cost`] knows what its requests cost, [`doctor`] tries whether a
//!   mount would work, [`cli`] is the command line.
//!
//! A lower layer never imports a higher one; what must flow upward is a trait that the lower layer owns
//! ([`writeback::Hooks`], [`writeback::BaseReader`], [`vfs::Notify`]). `tests/it/architecture.rs` fails when one does.
//!
//! # A file's life
//! `create` is local. `write` goes to a sparse spool file; behind the sequential frontier full parts are uploaded at once, with
//! back-pressure, so that a progress bar is honest. The FLUSH of the opener publishes (one PUT, or the remaining parts and
//! Complete) and returns the store's answer: no object exists before, none is ever partial. The spool file then becomes the
//! cache's. Opening for reading sends the first ranged GET with the known ETag; every later GET carries it too, so old and
//! new bytes never mix.
//! Whoever reads the small files of a directory in order finds the next ones fetched. A large file that the cache has whole and proved is
//! the kernel's to read (FUSE passthrough). What is pinned is fetched before anybody asks, and read while the store is silent.
//!
//! # What is known, and for how long
//! A directory that was listed or made within `metadata_ttl` answers lookups without a request. One of more than a few pages is listed
//! in several ranges at once ([`s3::sweep`]); a walk of a tree has what is before it listed without delimiter, a thousand keys a request.
//! Listings carry no metadata: owner, mode, mtime and link targets learned from our own writes or a HEAD are remembered by key and ETag.
//! Listings are a part of `memory_limit`, and names that the kernel alone remembers are some thousand: a walk leaves those that it saw last.
//!
//! # Lock order
//! A file's order (async) → key guards (async) → one table lock (a leaf, never held across `.await`). Workers never block over
//! half a millisecond: disk I/O runs on the blocking pool.
//!
//! # Where state lives
//! The state directory (`$XDG_STATE_HOME/packmule`, `/var/lib/packmule` for root) holds the spool (data that S3 does not have yet:
//! never in a cache directory, people delete those) and the remembered attributes. The cache directory can be deleted at any
//! time, and what was pinned (`packmule cache pin`) is forgotten with it. What takes several steps in S3 (deletes that are
//! queued, a directory's rename) is on record there before the first, so that the next mount ends it. Every mount locks sub-directories of its own; what lies in one
//! that no mount has is listed, copied out and thrown away by [`writeback::offline`], because a bucket that is gone is never mounted again.
//!
//! # What users are promised
//! README.md numbers it. "Promise 12" in a comment is its row 12, and `tests/it/promises.rs` sees to it that every row has a test
//! that quotes it.
//!
//! # Deliberately absent
//! The kernel's write-back cache (sizes and the order of writes must be ours), a HEAD per file, hidden objects of ours in the
//! bucket, and every retry that could outlive the caller's deadline.

pub mod aws;
pub mod cache;
pub mod cli;
pub mod config;
pub mod control;
pub mod cost;
pub mod daemon;
pub mod demo;
pub mod doctor;
pub mod failpoint;
pub mod fuse;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod glob;
pub mod measure;
pub mod mount;
pub mod publish;
pub mod ranges;
pub mod s3;
pub mod vfs;
pub mod writeback;
