//! The program, under whichever name it is called: `packmule`, or the helper that mount(8) or umount(8) looks for.

use std::path::Path;
use std::process::ExitCode;

use packmule::{cli, daemon};

fn main() -> ExitCode {
    daemon::refuse_core_dumps();
    let arguments: Vec<_> = std::env::args_os().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default();
    if name.starts_with("mount.") {
        cli::helper::mount(&arguments)
    } else if name.starts_with("umount.") {
        cli::helper::umount(&arguments)
    } else {
        cli::run(arguments)
    }
}
