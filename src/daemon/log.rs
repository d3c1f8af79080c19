//! Where the log goes: stderr in the foreground, else systemd's journal where one listens, else a file that SIGHUP reopens; SIGUSR2 steps
//! the level.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use parking_lot::Mutex;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::config::{Config, LogLevel};

/// A log of our own choosing (no `log_file`) is put aside at start once it is over 8 MiB; one old file is kept.
const OWN_LOG_SIZE: u64 = 8 << 20;

/// The log's controls.
#[derive(Clone)]
pub struct Log {
    file: Option<Arc<LogFile>>,
    filter: reload::Handle<EnvFilter, Registry>,
    level: Arc<Mutex<LogLevel>>,
}

struct LogFile {
    path: PathBuf,
    file: Mutex<File>,
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// The file as it is now; a line is one write.
impl Write for &LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.lock().write_all(&one_line(bytes, false))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where systemd-journald takes records (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>).
const JOURNAL: &str = "/run/systemd/journal/socket";

/// Systemd's journal.
struct Journal(UnixDatagram);

impl Journal {
    fn open() -> io::Result<Self> {
        UnixDatagram::unbound()?.connect(JOURNAL)?;
        let socket = UnixDatagram::unbound()?;
        // A journal that hangs is no reason to: the line is lost.
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }
}

/// A line for the journal, of a level.
struct Record {
    journal: Arc<Journal>,
    priority: u8,
}

impl Write for Record {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = one_line(bytes, false);
        // A field of one line ends with it; `one_line` leaves no other line break.
        let mut record = format!("SYSLOG_IDENTIFIER=packmule\nPRIORITY={}\nMESSAGE=", self.priority).into_bytes();
        record.extend_from_slice(line.trim_ascii());
        record.push(b'\n');
        // By name each time: another journald may listen there by now.
        let _ = self.journal.0.send_to(&record, JOURNAL);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives every line the priority of its level.
struct Records(Arc<Journal>);

impl<'a> MakeWriter<'a> for Records {
    type Writer = Record;

    fn make_writer(&'a self) -> Record {
        Record { journal: self.0.clone(), priority: 6 }
    }

    /// syslog(3): err, warning, info, debug.
    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Record {
        let priority = match *metadata.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        Record { priority, ..self.make_writer() }
    }
}

/// Stderr, a line at a time.
struct Terminal {
    coloured: bool,
}

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stderr().lock().write_all(&one_line(bytes, self.coloured))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A line of the log with the control characters in it escaped: keys may hold any, and whoever may name a key must not be able to
/// write lines of the log. The line's own end stays, as does ESC where colours are written with it (tracing escapes others').
fn one_line(line: &[u8], coloured: bool) -> Cow<'_, [u8]> {
    let (text, end) = line.strip_suffix(b"\n").map_or((line, &b""[..]), |text| (text, b"\n"));
    let harmless = |byte: u8| !byte.is_ascii_control() || byte == b'\t' || coloured && byte == 0x1b;
    if text.iter().all(|byte| harmless(*byte)) {
        return Cow::Borrowed(line);
    }
    let escape = |byte: u8| if harmless(byte) { vec![byte] } else { byte.escape_ascii().collect() };
    Cow::Owned(text.iter().flat_map(|byte| escape(*byte)).chain(end.iter().copied()).collect())
}

/// fuser reports as errors what is none: methods left out, replies that a panic dropped (the hook logs those), replies to
/// requests that an unmount took away. What ends a session is logged by us. The HTTP stack is heard from the level debug on.
fn filter(level: LogLevel) -> EnvFilter {
    let others = match level {
        LogLevel::Trace => "debug",
        LogLevel::Debug => "info",
        _ => "error",
    };
    EnvFilter::new(format!("{others},packmule={level},fuser=off", level = level.as_str()))
}

/// Starts the log. A process has one: the first call wins, a later one only makes the controls.
///
/// # Errors
/// When the log file cannot be opened, or the journal that was asked for is not there.
pub fn start(config: &Config, background: bool) -> anyhow::Result<Log> {
    let journal = match (config.log_journal, &config.log_file, background) {
        (true, ..) => Some(Journal::open().with_context(|| format!("log_file=journal: nothing listens at {JOURNAL}: name a file"))?),
        (false, None, true) => Journal::open().ok(),
        _ => None,
    };
    let file = match (&config.log_file, background) {
        (Some(path), _) => Some(path.clone()),
        (None, true) if journal.is_none() => Some(own_log(config)?),
        (None, _) => None,
    };
    let file = match file {
        Some(path) => {
            let file = open(&path).with_context(|| format!("log_file: {} cannot be opened", path.display()))?;
            Some(Arc::new(LogFile { path, file: Mutex::new(file) }))
        }
        None => None,
    };
    let (filter, handle) = reload::Layer::new(filter(config.log_level));
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_target(false);
    // An error means that a log runs already (a test, the demo).
    let _ = match (journal, &file) {
        // It keeps time and level by itself.
        (Some(journal), _) => {
            registry.with(layer.without_time().with_level(false).with_ansi(false).with_writer(Records(Arc::new(journal)))).try_init()
        }
        (None, Some(file)) => registry.with(layer.with_ansi(false).with_writer(file.clone())).try_init(),
        (None, None) => {
            let coloured = io::stderr().is_terminal();
            registry.with(layer.with_ansi(coloured).with_writer(move || Terminal { coloured })).try_init()
        }
    };
    Ok(Log { file, filter: handle, level: Arc::new(Mutex::new(config.log_level)) })
}

/// `STATE/log/MOUNTPOINT.log` with the slashes as dashes.
fn own_log(config: &Config) -> anyhow::Result<PathBuf> {
    let dir = config.state_dir.join("log");
    std::fs::create_dir_all(&dir).with_context(|| format!("{}: cannot be made for the log: pass log_file=", dir.display()))?;
    let name: String = config.mountpoint.to_string_lossy().trim_matches('/').replace('/', "-").chars().take(200).collect();
    let path = dir.join(format!("{}.log", if name.is_empty() { "root" } else { &name }));
    if std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() > OWN_LOG_SIZE) {
        let _ = std::fs::rename(&path, path.with_extension("log.old"));
    }
    Ok(path)
}

impl Log {
    /// Where it goes, unless to stderr.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// Opens the file anew, for a log that was moved away (SIGHUP).
    pub fn reopen(&self) {
        let Some(log) = &self.file else { return };
        match open(&log.path) {
            Ok(file) => *log.file.lock() = file,
            Err(error) => tracing::warn!(%error, "the log file cannot be reopened: the old one is kept"),
        }
    }

    /// One level up, from trace to error again (SIGUSR2).
    pub fn step_level(&self) {
        let next = {
            let mut level = self.level.lock();
            *level = match *level {
                LogLevel::Error => LogLevel::Warn,
                LogLevel::Warn => LogLevel::Info,
                LogLevel::Info => LogLevel::Debug,
                LogLevel::Debug => LogLevel::Trace,
                LogLevel::Trace => LogLevel::Error,
            };
            *level
        };
        if self.filter.reload(filter(next)).is_ok() {
            tracing::error!("log level is now {}", next.as_str());
        }
    }
}

/// A panic is one line in the log, whatever thread it ends; users see no backtrace.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let message = info.payload_as_str().unwrap_or("no message").replace('\n', "; ");
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!("internal error at {place}: {message} (please report it)");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_makes_no_lines() {
        let line = |text: &str, coloured| String::from_utf8_lossy(&one_line(text.as_bytes(), coloured)).into_owned();
        assert_eq!(line("WARN s3://b/k\nERROR forged\r\u{1b}[2J é\n", false), "WARN s3://b/k\\nERROR forged\\r\\x1b[2J é\n");
        assert_eq!(line("\u{1b}[33mWARN\u{1b}[0m a\nb\n", true), "\u{1b}[33mWARN\u{1b}[0m a\\nb\n");
        assert_eq!(line("plain\ttext\n", false), "plain\ttext\n");
    }
}
