//! Failpoints: named moments at which the crash tests end the program as `kill -9` does. In builds without debug assertions
//! passing one is nothing.

/// Names the failpoint, `NAME` or `NAME:N` (the N-th time that it is passed, from 1).
pub const VARIABLE: &str = "PACKMULE_FAILPOINT";

/// Passes a failpoint. `tests/it/crash.rs` reads every name from the sources, and kills the program at each.
#[inline]
pub fn pass(name: &str) {
    if cfg!(debug_assertions) {
        armed::pass(name);
    }
}

mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use nix::sys::signal::{Signal, raise};

    static CHOSEN: LazyLock<Option<(String, AtomicU32)>> = LazyLock::new(|| {
        let chosen = std::env::var(super::VARIABLE).ok()?;
        let (name, times) = chosen.split_once(':').unwrap_or((&chosen, "1"));
        Some((name.to_owned(), AtomicU32::new(times.parse().unwrap_or(1))))
    });

    pub(super) fn pass(name: &str) {
        if let Some((chosen, left)) = &*CHOSEN
            && chosen == name
            && left.fetch_sub(1, Relaxed) == 1
        {
            // Nothing runs after it, no Drop and no other thread.
            let _ = raise(Signal::SIGKILL);
        }
    }
}
