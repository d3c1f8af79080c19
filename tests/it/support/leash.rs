//! A process that tidies up when this one is gone, however it ends: no Drop runs after SIGKILL or a test's time limit.

use std::io::Write as _;
use std::process::{Child, Command, Stdio};

/// While this lives nothing happens. When the test process dies without dropping it, the script runs.
pub struct Leash(Child);

impl Leash {
    /// `script` is run by sh with `args` as `$1`, `$2`, …
    pub fn new(script: &str, args: &[&str]) -> Self {
        let script = format!("read -r over && exit 0\n{script}");
        let mut command = Command::new("sh");
        command.args(["-c", &script, "leash"]).args(args);
        Self(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if let Some(mut pipe) = self.0.stdin.take() {
            let _ = pipe.write_all(b"over\n");
        }
        let _ = self.0.wait();
    }
}
