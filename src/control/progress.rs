//! What a command shows while a mount uploads for it: a bar on a terminal, elsewhere a line now and then.

use std::io::{IsTerminal, stderr};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Client, Request, Response, Upload};

/// How often a bar moves.
const POLL: Duration = Duration::from_millis(200);

/// How often a log gets a line.
const LINE: Duration = Duration::from_secs(30);

/// The longest name that a bar shows, in characters.
const NAME: usize = 40;

/// Does `work` and shows meanwhile how far the mount's uploads are that are `meant`.
pub fn during<T>(mountpoint: &Path, meant: impl Fn(&Upload) -> bool + Sync, work: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        let (working, ended) = mpsc::channel();
        scope.spawn(|| watch(mountpoint, &meant, ended));
        let result = work();
        // Wakes the watcher, which leaves the terminal as it was.
        drop(working);
        result
    })
}

fn watch(mountpoint: &Path, meant: &dyn Fn(&Upload) -> bool, ended: Receiver<()>) {
    let bar = stderr().is_terminal().then(bar);
    let mut pause = if bar.is_some() { Duration::ZERO } else { LINE };
    let mut client = None;
    let mut progress = Progress::default();
    while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        if client.is_none() {
            client = Client::connect(mountpoint).ok();
        }
        let Some(Ok(Response::Status(status))) = client.as_mut().map(|client| client.call(&Request::Status)) else { break };
        progress.take(status.uploads.into_iter().filter(|upload| upload.moves() && meant(upload)).collect());
        match &bar {
            Some(bar) => {
                bar.set_length(progress.all());
                bar.set_position(progress.sent());
                bar.set_message(progress.names());
                pause = POLL;
            }
            None => eprintln!("packmule: {}", progress.line()),
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
}

/// A bar of bytes on the terminal.
pub fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}") {
        bar.set_style(style);
    }
    bar
}

/// How far several uploads are together.
#[derive(Default)]
struct Progress {
    /// Bytes of those that went through.
    finished: u64,
    moving: Vec<Upload>,
}

impl Progress {
    /// The uploads as they are now. What is gone from the list went through.
    fn take(&mut self, now: Vec<Upload>) {
        let gone = self.moving.iter().filter(|old| !now.iter().any(|new| new.id == old.id));
        self.finished += gone.map(|old| old.size).sum::<u64>();
        self.moving = now;
    }

    fn all(&self) -> u64 {
        self.finished + self.moving.iter().map(|upload| upload.size).sum::<u64>()
    }

    fn sent(&self) -> u64 {
        self.finished + self.moving.iter().map(|upload| upload.sent.min(upload.size)).sum::<u64>()
    }

    /// The file that is being sent, and how many more there are.
    fn names(&self) -> String {
        let Some(first) = self.moving.iter().max_by_key(|upload| upload.sent.min(upload.size)) else { return "the last answers".into() };
        let name = first.key.rsplit('/').next().unwrap_or_default();
        let name: String = name.escape_debug().take(NAME).collect();
        match self.moving.len() - 1 {
            0 => name,
            more => format!("{name} and {more} more"),
        }
    }

    fn line(&self) -> String {
        let shown = |bytes| ByteSize::b(bytes).display().iec();
        format!("uploading {}: {} of {}", self.names(), shown(self.sent()), shown(self.all()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_through_stays_counted() {
        let upload = |id, key: &str, sent| Upload { id, key: key.into(), size: 2048, sent, ..Upload::default() };
        let mut progress = Progress::default();
        assert_eq!(progress.line(), "uploading the last answers: 0 B of 0 B");
        progress.take(vec![upload(1, "d/a\n", 2048), upload(2, "b", 0), upload(3, "c", 1024)]);
        assert_eq!(progress.line(), "uploading a\\n and 2 more: 3.0 KiB of 6.0 KiB");
        progress.take(vec![upload(3, "c", 1024)]);
        assert_eq!(progress.line(), "uploading c: 5.0 KiB of 6.0 KiB");
        progress.take(vec![upload(3, "c", 4096)]);
        assert_eq!((progress.sent(), progress.all()), (6144, 6144));
    }
}
