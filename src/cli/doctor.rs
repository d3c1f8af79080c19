//! `packmule doctor`: each finding as it is made, and the exit status says whether a mount would work.

use std::process::ExitCode;

use anyhow::Context;
use clap::ArgMatches;

use super::pages::say;
use super::{failed, mount};
use crate::config::Config;
use crate::doctor::{self, Finding, Tell, Verdict};

/// `packmule doctor [SOURCE] [-o OPTIONS] [--json]`.
pub fn run(matches: &ArgMatches) -> ExitCode {
    match examine(matches) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => failed(&error, 1),
    }
}

/// Examines a mount as it was configured; `tell` hears of each finding as it is made.
pub fn of(config: &Config, tell: &mut Tell<'_>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime cannot be started")?;
    runtime.block_on(doctor::examine(config, tell));
    Ok(())
}

/// How many things are wrong.
fn examine(matches: &ArgMatches) -> anyhow::Result<usize> {
    let json = matches.get_flag("json");
    let mut findings: Vec<Finding> = Vec::new();
    let mut unheard = None;
    let mut tell = |finding: Finding| {
        if !json && unheard.is_none() {
            unheard = say(&finding.to_string()).err();
        }
        findings.push(finding);
    };
    let mounts = match matches.get_one::<String>("source") {
        Some(source) => {
            let config = mount::load(&mount::nowhere(source, matches))?;
            of(&config, &mut tell)?;
            format!("a mount of {source} ")
        }
        None => {
            doctor::examine_machine(&mut tell);
            "mounts here ".to_owned()
        }
    };
    if let Some(error) = unheard {
        return Err(error);
    }
    let wrong = findings.iter().filter(|finding| finding.verdict == Verdict::Bad).count();
    if json {
        say(&serde_json::to_string_pretty(&findings)?)?;
    } else {
        let text = match wrong {
            0 => "would work".to_owned(),
            1 => "would not work: one thing is wrong".to_owned(),
            many => format!("would not work: {many} things are wrong"),
        };
        say(&format!("\n{mounts}{text}"))?;
    }
    Ok(wrong)
}
