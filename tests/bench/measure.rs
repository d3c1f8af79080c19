//! What was measured, and how it is shown.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::support::mount::peak_memory;

/// One line of the table.
#[derive(Debug, Default, Serialize)]
pub struct Row {
    pub task: &'static str,
    pub program: String,
    pub seconds: f64,
    /// Bytes that the task wanted.
    pub asked: Option<u64>,
    /// Payload, megabytes (10^6) per second.
    pub mb_per_s: Option<f64>,
    /// Most connections that carried data within one tenth of a second.
    pub busy_connections: Option<usize>,
    pub open_connections: Option<usize>,
    pub requests: Option<BTreeMap<&'static str, u64>>,
    /// On the wire, to the store.
    pub bytes_up: Option<u64>,
    /// On the wire, from the store.
    pub bytes_down: Option<u64>,
    /// Of the daemon, user and system.
    pub cpu_seconds: Option<f64>,
    /// The daemon's peak, MiB.
    pub peak_rss_mib: Option<f64>,
}

impl Row {
    pub fn new(task: &'static str, program: &str, took: Duration) -> Self {
        Self { task, program: program.to_owned(), seconds: took.as_secs_f64(), ..Self::default() }
    }

    /// So many bytes were asked for, which says nothing of a rate.
    pub fn asked(mut self, bytes: u64) -> Self {
        self.asked = Some(bytes);
        self
    }

    pub fn payload(mut self, bytes: u64) -> Self {
        self.mb_per_s = Some(bytes as f64 / 1e6 / self.seconds);
        self
    }
}

/// The same tasks done several times.
#[derive(Default)]
pub struct Rounds(Vec<Row>);

impl Rounds {
    /// Keeps a row and says it at once.
    pub fn add(&mut self, row: Row) {
        eprintln!("  {}: {}: {:.2} s", row.task, row.program, row.seconds);
        self.0.push(row);
    }

    /// Of each task and program the round of the median time, with the largest memory of all rounds.
    pub fn medians(self) -> Vec<Row> {
        let mut groups: Vec<Vec<Row>> = Vec::new();
        for row in self.0 {
            match groups.iter_mut().find(|group| (group[0].task, &group[0].program) == (row.task, &row.program)) {
                Some(group) => group.push(row),
                None => groups.push(vec![row]),
            }
        }
        let median = |mut group: Vec<Row>| {
            let peak = group.iter().filter_map(|row| row.peak_rss_mib).reduce(f64::max);
            group.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
            let middle = group.len() / 2;
            Row { peak_rss_mib: peak, ..group.swap_remove(middle) }
        };
        let mut rows: Vec<Row> = groups.into_iter().map(median).collect();
        rows.sort_by_key(|row| row.task);
        rows
    }
}

/// Every row of a run, and the machine it comes from.
#[derive(Debug, Serialize)]
pub struct Report {
    pub processor: String,
    pub processors: usize,
    pub kernel: String,
    pub rows: Vec<Row>,
}

impl Report {
    pub fn new() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        Self {
            processor: model.trim_start_matches([' ', '\t', ':']).to_owned(),
            processors: std::thread::available_parallelism().map_or(1, Into::into),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            rows: Vec::new(),
        }
    }

    /// Keeps a row, if there is one, and says it at once: a run takes minutes.
    pub fn add(&mut self, row: impl Into<Option<Row>>) {
        let Some(row) = row.into() else { return };
        eprintln!("{}: {}: {:.2} s", row.task, row.program, row.seconds);
        self.rows.push(row);
    }

    pub fn print(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "\n{} × {}, Linux {}\n", self.processors, self.processor, self.kernel)?;
        writeln!(
            out,
            "| task | program | s | MB/s | busy connections | requests | MB up | MB down | processor s | peak RSS, MiB |\n|---|---|---|---|---|---|---|---|---|---|"
        )?;
        let megabytes = |bytes: Option<u64>| bytes.map(|bytes| format!("{:.1}", bytes as f64 / 1e6)).unwrap_or_default();
        for row in &self.rows {
            let requests = row.requests.as_ref().map(|counts| {
                let kinds: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
                format!("{} ({})", counts.values().sum::<u64>(), kinds.join(", "))
            });
            writeln!(
                out,
                "| {} | {} | {:.2} | {} | {} | {} | {} | {} | {} | {} |",
                row.task,
                row.program,
                row.seconds,
                row.mb_per_s.map(|rate| format!("{rate:.0}")).unwrap_or_default(),
                row.busy_connections.map(|count| count.to_string()).unwrap_or_default(),
                requests.unwrap_or_default(),
                megabytes(row.bytes_up),
                megabytes(row.bytes_down),
                row.cpu_seconds.map(|seconds| format!("{seconds:.2}")).unwrap_or_default(),
                row.peak_rss_mib.map(|rss| format!("{rss:.0}")).unwrap_or_default(),
            )?;
        }
        writeln!(
            out,
            "\nEdits: s until the result is whole in S3. Trees: s until the command returns, requests and MB until everything is in S3; \
             with write_back, and in geesefs and rclone, that is later."
        )
    }

    pub fn save(&self, file: &Path) -> io::Result<()> {
        std::fs::write(file, serde_json::to_string_pretty(self)? + "\n")
    }
}

/// VmHWM of a process, MiB.
pub fn peak_rss(pid: u32) -> Option<f64> {
    peak_memory(pid).map(|bytes| bytes as f64 / f64::from(1 << 20))
}

/// What a process has used of the processors.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: f64 = fields.get(11..13)?.iter().filter_map(|field| field.parse::<f64>().ok()).sum();
    // A tick is 10 ms on every Linux that has been for twenty years (USER_HZ).
    Some(ticks / 100.0)
}

/// Empties the page cache; only root can, and for others a read may come from memory on the store's side.
pub fn drop_caches() {
    nix::unistd::sync();
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
}

/// A file's contents that no compression or caching of equal blocks shortens, and that can be told from its offset alone.
pub struct Pattern;

impl Pattern {
    pub const BLOCK: usize = 1 << 20;

    /// The block of 1 MiB with this number.
    pub fn fill(number: u64, block: &mut [u8]) {
        let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
}
