//! Who is behind a request: FUSE names a thread, promises 4 and 10 speak of processes and programs.

use std::path::PathBuf;

/// The thread group (process) of a thread; the thread's own number where /proc does not tell (it ended, another namespace).
pub fn thread_group(pid: u32) -> u32 {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return pid };
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(pid)
}

/// The program that a thread runs, and the first argument behind an interpreter's name (`python3 script`).
pub fn program(pid: u32) -> Vec<String> {
    let process = thread_group(pid);
    let base = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let exe = std::fs::read_link(format!("/proc/{process}/exe")).ok().and_then(base);
    let arguments = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    let words = arguments.split(|byte| *byte == 0).take(2).filter(|word| !word.is_empty() && !word.starts_with(b"-"));
    let words = words.filter_map(|word| base(PathBuf::from(String::from_utf8_lossy(word).into_owned())));
    exe.into_iter().chain(words).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_belongs_to_its_process() {
        let process = std::process::id();
        let thread = std::thread::spawn(|| thread_group(nix::unistd::gettid().as_raw().unsigned_abs())).join();
        assert_eq!(thread.ok(), Some(process));
        assert!(!program(process).is_empty());
    }
}
