//! Keeps the machine up while something is on its way to S3: an inhibitor lock of systemd-logind
//! (<https://systemd.io/INHIBITOR_LOCKS/>).
//!
//! `block` makes a desktop say who is at work and ask before it shuts down; who may not block (a service without a session) delays the
//! shutdown instead, as long as logind lets it (InhibitDelayMaxSec=). Where no logind answers nothing is held: the spool has it all.

use std::time::{Duration, Instant};

use zbus::{Connection, OwnedFd, proxy};

use crate::mount::Outlook;

/// How often it is looked whether something is on its way.
const LOOK: Duration = Duration::from_secs(2);

/// A logind that is not there, or refuses, is asked again no sooner.
const AGAIN: Duration = Duration::from_secs(60);

/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

#[proxy(interface = "org.freedesktop.login1.Manager", default_service = "org.freedesktop.login1", default_path = "/org/freedesktop/login1")]
trait Manager {
    /// The lock is held until every copy of the descriptor is closed.
    fn inhibit(&self, what: &str, who: &str, why: &str, mode: &str) -> zbus::Result<OwnedFd>;
}

/// What is on its way and does not move is not waited for longer: an outage is no reason to keep a machine up.
const STILL: Duration = Duration::from_secs(60);

/// Holds the lock whenever something is on its way, and moves. Never ends; dropping it lets go.
pub(super) async fn while_pending(outlook: Outlook) {
    let mut lock = None;
    let mut refused: Option<Instant> = None;
    let mut moved = Instant::now();
    loop {
        tokio::time::sleep(LOOK).await;
        let pending = outlook.pending();
        if pending.files == 0 || pending.speed > 0 {
            moved = Instant::now();
        }
        if pending.files == 0 || moved.elapsed() >= STILL {
            // Closing it lets go.
            lock = None;
        } else if lock.is_none() && refused.is_none_or(|at| at.elapsed() >= AGAIN) {
            let why = format!("{} on the way to {}", outlook.shown(), outlook.source());
            match tokio::time::timeout(ANSWER, take(&why)).await {
                Ok(Ok(held)) => lock = Some(held),
                failure => {
                    if refused.replace(Instant::now()).is_none() {
                        let reason = failure
                            .map_or_else(|_| "no answer".to_owned(), |result| result.err().map(|e| e.to_string()).unwrap_or_default());
                        tracing::debug!(reason, "no shutdown inhibitor");
                    }
                }
            }
        }
    }
}

async fn take(why: &str) -> zbus::Result<OwnedFd> {
    // A connection of its own, closed again: the bus may be restarted while a mount lives for months.
    let connection = Connection::system().await?;
    let logind = ManagerProxy::new(&connection).await?;
    match logind.inhibit("shutdown", "packmule", why, "block").await {
        // Not allowed without a session: org.freedesktop.login1.inhibit-block-shutdown.
        Err(_) => logind.inhibit("shutdown", "packmule", why, "delay").await,
        taken => taken,
    }
}
