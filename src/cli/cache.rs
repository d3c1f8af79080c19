//! `packmule cache`: what the caches hold, whether that is what came, and that it goes.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ArgMatches;

use super::commands::path_of;
use super::pages::{say, show};
use super::status::size;
use crate::cache::{Cache, CacheReport, CacheWish};
use crate::config::{Environment, resolve};
use crate::control::{self, Client, Request, Response, progress};
use crate::fuse::mountinfo::mounts;
use crate::vfs::PinReport;

/// How often it is looked how far a pin is.
const POLL: Duration = Duration::from_millis(200);

/// `packmule cache [show|check|empty] [DIRECTORY] [--cache-dir DIRECTORY]`, `packmule cache pin|unpin PATH`.
pub fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let (wish, matches) = match matches.subcommand() {
        Some(("pin", matches)) => return pin(matches, false),
        Some(("unpin", matches)) => return pin(matches, true),
        Some(("check", matches)) => (CacheWish::Check, matches),
        Some(("empty", matches)) => (CacheWish::Empty, matches),
        Some((_, matches)) => (CacheWish::Show, matches),
        None => (CacheWish::Show, matches),
    };
    let (mut damaged, mut silent) = (0, Vec::new());
    let mut tell = |of: String, report: &CacheReport, pins: &[PinReport]| {
        damaged += report.damaged.len();
        let pins: String = pins.iter().map(|pin| format!("  {}\n", pin_line(pin))).collect();
        show((as_text(&of, report, wish) + &pins).as_bytes())
    };
    let cache_dir = path_of(matches, "cache-dir");
    match path_of(matches, "directory") {
        Some(path) => {
            let client = Client::connect_for(Some(&path))?;
            let mountpoint = client.mountpoint().to_owned();
            let (report, pins) = ask(client, wish)?;
            tell(mountpoint.display().to_string(), &report, &pins)?;
        }
        None => {
            let me = nix::unistd::geteuid();
            let mounts = if cache_dir.is_none() { mounts()? } else { Vec::new() };
            for mount in mounts.into_iter().filter(|mount| mount.is_ours(me)) {
                match Client::connect(&mount.target).and_then(|client| ask(client, wish)) {
                    Ok((report, pins)) => tell(mount.target.display().to_string(), &report, &pins)?,
                    Err(error) => silent.push(format!("{error:#}")),
                }
            }
            for report in left(cache_dir, wish)? {
                tell("no mount".to_owned(), &report, &[])?;
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

fn ask(mut client: Client, wish: CacheWish) -> anyhow::Result<(CacheReport, Vec<PinReport>)> {
    match client.call(&Request::Cache { wish })? {
        Response::Cache { report, pins } => Ok((*report, pins)),
        other => bail!("{}: unexpected answer: {other:?}", client.mountpoint().display()),
    }
}

/// `packmule cache pin|unpin PATH`.
fn pin(matches: &ArgMatches, off: bool) -> anyhow::Result<()> {
    let Some(path) = path_of(matches, "path") else { bail!("name a folder or a file on a mount") };
    let mut client = Client::connect_for(Some(&path))?;
    let path = control::resolve(&path)?;
    let pin = match client.call(&Request::Pin { path, off })? {
        Response::Pin { pin } => pin,
        other => bail!("{}: unexpected answer: {other:?}", client.mountpoint().display()),
    };
    if off {
        return say(&format!("{}: not pinned any more", pin.shown()));
    }
    let bar = std::io::stderr().is_terminal().then(progress::bar);
    loop {
        let Response::Status(status) = client.call(&Request::Status)? else { bail!("{}: no status", client.mountpoint().display()) };
        let report = status.pins.into_iter().find(|report| (&report.bucket, &report.key) == (&pin.bucket, &pin.key));
        let Some(report) = report else { bail!("{}: was unpinned meanwhile", pin.shown()) };
        if report.silent_seconds.is_some() {
            bail!("{}: pinned; the store does not answer, and what is missing is fetched when it does", pin.shown());
        }
        if report.settled {
            bar.iter().for_each(indicatif::ProgressBar::finish_and_clear);
            say(&pin_line(&report))?;
            return match report.trouble {
                Some(_) => bail!("not all of it could be fetched: the mount tries again once a minute"),
                None => Ok(()),
            };
        }
        if let Some(bar) = &bar {
            bar.set_length(report.bytes);
            bar.set_position(report.kept_bytes);
        }
        std::thread::sleep(POLL);
    }
}

/// A pin as people read it.
pub(super) fn pin_line(pin: &PinReport) -> String {
    let mut line = format!("pinned {}: ", pin.shown());
    line += &match (pin.listed, pin.files) {
        (false, _) => "not listed yet".to_owned(),
        (_, files) if files == pin.kept_files => format!("{files} files, {}, all here", size(pin.bytes)),
        (_, files) => format!("{} of {files} files, {} of {} here", pin.kept_files, size(pin.kept_bytes), size(pin.bytes)),
    };
    if pin.too_much > 0 {
        line += &format!("; {} have no room in cache_size", pin.too_much);
    }
    if let Some(seconds) = pin.silent_seconds {
        line += &format!(
            "; the store does not answer, for {} now: read from the cache",
            humantime::format_duration(Duration::from_secs(seconds))
        );
    } else if let Some(trouble) = &pin.trouble {
        line += &format!("; {}", trouble.escape_debug());
    }
    line
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
            text += if report.files > 0 { "; the rest is being read, or is pinned\n" } else { "\n" };
        }
    }
    text
}
