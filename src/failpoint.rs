//! Failpoints: named moments at which the crash tests end the program as `kill -9` does, or that last longer than they do. In builds
//! without debug assertions passing one is nothing.

/// Names the failpoints, with commas between them: `NAME` or `NAME:N` (the N-th time that it is passed, from 1), or `NAME=MS` (it takes
/// so many milliseconds).
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
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};

    enum Chosen {
        Ends(AtomicU32),
        Lasts(Duration),
    }

    static CHOSEN: LazyLock<Vec<(String, Chosen)>> = LazyLock::new(|| {
        let variable = std::env::var(super::VARIABLE).unwrap_or_default();
        variable.split(',').filter(|chosen| !chosen.is_empty()).filter_map(read).collect()
    });

    fn read(chosen: &str) -> Option<(String, Chosen)> {
        if let Some((name, milliseconds)) = chosen.split_once('=') {
            return Some((name.to_owned(), Chosen::Lasts(Duration::from_millis(milliseconds.parse().ok()?))));
        }
        let (name, times) = chosen.split_once(':').unwrap_or((chosen, "1"));
        Some((name.to_owned(), Chosen::Ends(AtomicU32::new(times.parse().unwrap_or(1)))))
    }

    pub(super) fn pass(name: &str) {
        match CHOSEN.iter().find(|(chosen, _)| chosen == name).map(|(_, chosen)| chosen) {
            Some(Chosen::Ends(left)) if left.fetch_sub(1, Relaxed) == 1 => {
                // Nothing runs after it, no Drop and no other thread.
                let _ = raise(Signal::SIGKILL);
            }
            Some(Chosen::Lasts(time)) => std::thread::sleep(*time),
            _ => {}
        }
    }
}
