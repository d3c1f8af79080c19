//! `packmule doctor`: tries what a mount needs and says, in plain words, what is missing and what helps.
//!
//! What it writes lies under one key below the source's prefix, and is gone when it has come to its end; what cannot be removed is named.
//! Whoever cannot list what is to be mounted hears of nothing behind that.

use std::fmt;

use serde::Serialize;

use crate::config::{Config, Source};
use crate::s3::client::Client;
use crate::s3::explain::explain;
use crate::s3::{Account as _, S3Error};

mod account;
mod machine;
mod store;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// A mount works; something would be better, or could not be known.
    Note,
    /// A mount with these options does not work, or not for what it is for.
    Bad,
}

/// One thing that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was tried, in a word or two.
    pub check: &'static str,
    /// How bad it is.
    pub verdict: Verdict,
    /// What is so.
    pub found: String,
    /// What helps.
    pub remedy: Option<String>,
}

impl Finding {
    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Good, found: found.into(), remedy: None }
    }

    fn note(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Note, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// Nothing can be done about it, or nothing needs to.
    fn aside(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Note, found: found.into(), remedy: None }
    }

    fn bad(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Bad, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// A line of this program's own: what is wrong, and after it the remedy.
    fn told(check: &'static str, verdict: Verdict, line: &str) -> Self {
        let (found, remedy) = line.split_once("; ").map_or((line, None), |(found, remedy)| (found, Some(remedy.to_owned())));
        Self { check, verdict, found: found.to_owned(), remedy }
    }

    /// What the store refused.
    fn refused(check: &'static str, verdict: Verdict, error: &S3Error) -> Self {
        let mut finding = Self::told(check, verdict, &explain(error));
        if let Some(id) = &error.request_id {
            finding.found += &format!(" (request id {id})");
        }
        finding
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.verdict {
            Verdict::Good => "ok",
            Verdict::Note => "note",
            Verdict::Bad => "wrong",
        };
        write!(f, "{mark:<6}{}: {}", self.check, self.found)?;
        match &self.remedy {
            Some(remedy) => write!(f, "\n      → {remedy}"),
            None => Ok(()),
        }
    }
}

/// Whoever hears of each finding as it is made.
pub type Tell<'a> = dyn FnMut(Finding) + Send + 'a;

/// This machine alone: what every mount needs.
pub fn examine_machine(tell: &mut Tell<'_>) {
    machine::fuse(None).into_iter().for_each(tell);
}

/// A mount as it was configured: machine, network, credentials, bucket and what lies around it.
pub async fn examine(config: &Config, tell: &mut Tell<'_>) {
    machine::fuse(Some(&config.mount)).into_iter().for_each(&mut *tell);
    machine::disks(config).into_iter().for_each(&mut *tell);
    // Once more is enough to tell a hiccup from a fault, and nobody waits for long.
    let settings = crate::s3::client::ClientConfig { retries: config.client.retries.min(1), ..config.client.clone() };
    let client = match Client::new(settings.clone()) {
        Ok(client) => client,
        Err(error) => return tell(Finding::refused("options", Verdict::Bad, &error)),
    };
    let bucket = match &config.source {
        Source::Bucket { bucket, .. } => Some(bucket.as_str()),
        Source::AllBuckets => None,
    };
    if !machine::network(config, &client, bucket, tell).await {
        return;
    }
    match client.credentials_source(bucket).await {
        Ok(source) => tell(Finding::good("credentials", source)),
        Err(error) => return tell(Finding::refused("credentials", Verdict::Bad, &error)),
    }
    match &config.source {
        Source::Bucket { bucket, prefix } => {
            if store::examine(config, settings, &client, (bucket, prefix), tell).await {
                account::settings(&client, bucket, prefix, tell).await;
                account::distributions(&client, bucket, prefix, tell).await;
            }
        }
        Source::AllBuckets => match client.buckets().await {
            Ok(buckets) => tell(Finding::good("list buckets", format!("{} in this account", buckets.len()))),
            Err(error) => tell(Finding::refused("list buckets", Verdict::Bad, &error)),
        },
    }
}
