//! `packmule cache`: what the caches hold, whether that is what came, and that it goes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::ArgMatches;

use super::commands::path_of;
use super::pages::show;
use super::status::size;
use crate::cache::{Cache, CacheReport, CacheWish};
use crate::config::{Environment, resolve};
use crate::control::{Client, Request, Response};
use crate::fuse::mountinfo::mounts;

/// `packmule cache [show|check|empty] [DIRECTORY] [--cache-dir DIRECTORY]`.
pub fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let (wish, matches) = match matches.subcommand() {
        Some(("check", matches)) => (CacheWish::Check, matches),
        Some(("empty", matches)) => (CacheWish::Empty, matches),
        Some((_, matches)) => (CacheWish::Show, matches),
        None => (CacheWish::Show, matches),
    };
    let (mut damaged, mut silent) = (0, Vec::new());
    let mut tell = |of: String, report: &CacheReport| {
        damaged += report.damaged.len();
        show(as_text(&of, report, wish).as_bytes())
    };
    let cache_dir = path_of(matches, "cache-dir");
    match path_of(matches, "directory") {
        Some(path) => {
            let client = Client::connect_for(Some(&path))?;
            let mountpoint = client.mountpoint().to_owned();
            tell(mountpoint.display().to_string(), &ask(client, wish)?)?;
        }
        None => {
            let me = nix::unistd::geteuid();
            let mounts = if cache_dir.is_none() { mounts()? } else { Vec::new() };
            for mount in mounts.into_iter().filter(|mount| mount.is_ours(me)) {
                match Client::connect(&mount.target).and_then(|client| ask(client, wish)) {
                    Ok(report) => tell(mount.target.display().to_string(), &report)?,
                    Err(error) => silent.push(format!("{error:#}")),
                }
            }
            for report in left(cache_dir, wish)? {
                tell("no mount".to_owned(), &report)?;
            }
        }
    }
    silent.iter().for_each(|line| eprintln!("packmule: {line}"));
    match (damaged, silent.is_empty()) {
        (0, true) => Ok(()),
        (0, false) => bail!("a mount does not answer"),
        (files, _) => bail!("{files} files were damaged on this machine's disk; what was damaged is fetched again when it is read"),
    }
}

fn ask(mut client: Client, wish: CacheWish) -> anyhow::Result<CacheReport> {
    match client.call(&Request::Cache { wish })? {
        Response::Cache { report } => Ok(*report),
        other => bail!("{}: unexpected answer: {other:?}", client.mountpoint().display()),
    }
}

/// The same of what mounts left that ended.
fn left(cache_dir: Option<PathBuf>, wish: CacheWish) -> anyhow::Result<Vec<CacheReport>> {
    let dir = match cache_dir {
        Some(dir) => dir,
        None => resolve::cache_dir(&Environment::of_process())?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build()?;
    let caches: Vec<Arc<Cache>> = Cache::left_in(&dir).with_context(|| format!("{}; name the cache with --cache-dir", shown(&dir)))?;
    runtime.block_on(async {
        let mut reports = Vec::new();
        for cache in caches {
            let report = cache.upkeep(wish).await;
            // What a check found out is kept.
            cache.shutdown().await;
            reports.push(report);
        }
        Ok(reports)
    })
}

fn shown(path: &Path) -> String {
    path.display().to_string().escape_debug().to_string()
}

/// What one cache holds, as people read it.
fn as_text(of: &str, report: &CacheReport, wish: CacheWish) -> String {
    let dir = report.dir.as_deref().map_or_else(|| "in memory: cache_dir cannot be used".to_owned(), shown);
    let bound = if report.max_size == u64::MAX { String::new() } else { format!(" of {}", size(report.max_size)) };
    let holds = format!("{}{bound} in {} files, {} of them whole", size(report.bytes), report.files, report.whole);
    let mut text = format!("{}: {dir}\n  {holds}\n", of.escape_debug());
    match wish {
        CacheWish::Show => {}
        CacheWish::Check if report.damaged.is_empty() => text += &format!("  {} compared: all of it is as it came\n", size(report.checked)),
        CacheWish::Check => {
            for (object, blocks) in &report.damaged {
                text += &format!("  damaged: {} ({blocks} blocks)\n", object.escape_debug());
            }
        }
        CacheWish::Empty => {
            text += &format!("  {} in {} files are gone", size(report.freed.1), report.freed.0);
            text += if report.files > 0 { "; the rest is being read\n" } else { "\n" };
        }
    }
    text
}
