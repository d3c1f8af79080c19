//! Completions, manual pages and docs/options.md: all made from the commands and the option table.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use clap::{ArgMatches, Command};
use clap_complete::Shell;

use super::commands::{self, path_of};
use super::{helper, reference};

/// `packmule completions SHELL`.
pub fn completions(matches: &ArgMatches) -> anyhow::Result<()> {
    let shell: Shell = matches.get_one::<String>("shell").map(String::as_str).unwrap_or_default().parse().map_err(anyhow::Error::msg)?;
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut commands::program(), "packmule", &mut script);
    show(&script)
}

/// `packmule man [--dir DIRECTORY]`: packmule(1) on stdout, or every page as a file.
pub fn man(matches: &ArgMatches) -> anyhow::Result<()> {
    match path_of(matches, "dir") {
        Some(dir) => write_pages(&dir),
        None => show(&page(commands::program(), "1")?),
    }
}

/// packmule(1) and a page a command, the helpers of mount(8), and packmule.toml(5).
fn write_pages(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot be made", dir.display()))?;
    let mut pages = Vec::new();
    commands_pages(commands::program(), "packmule", &mut pages)?;
    for helper in [helper::mount_grammar(), helper::umount_grammar()] {
        let name = helper.get_name().to_owned();
        pages.push((format!("{name}.8"), page(helper, "8")?));
    }
    pages.push(("packmule.toml.5".to_owned(), reference::config_page().into_bytes()));
    for (name, text) in pages {
        let file = dir.join(name);
        std::fs::write(&file, text).with_context(|| format!("{}: cannot be written", file.display()))?;
    }
    Ok(())
}

/// The page of a command, then those of its own commands: `packmule-cache.1`, `packmule-cache-pin.1`, ….
fn commands_pages(mut command: Command, name: &str, pages: &mut Vec<(String, Vec<u8>)>) -> io::Result<()> {
    command.build();
    let below: Vec<Command> = command.get_subcommands().cloned().collect();
    pages.push((format!("{name}.1"), page(command.name(name.to_owned()).display_name(name.to_owned()), "1")?));
    for command in below {
        let name = format!("{name}-{}", command.get_name());
        commands_pages(command, &name, pages)?;
    }
    Ok(())
}

fn page(command: Command, section: &str) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let source = concat!("packmule ", env!("CARGO_PKG_VERSION"));
    clap_mangen::Man::new(command).section(section).source(source).manual("packmule").render(&mut text)?;
    Ok(text)
}

/// A reader that goes away (`| head`) is no error.
pub fn show(text: &[u8]) -> anyhow::Result<()> {
    is_read(text)?;
    Ok(())
}

/// As [`show`]; false where the reader went away.
pub fn is_read(text: &[u8]) -> io::Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true),
    }
}

/// As [`show`], of a line.
pub fn say(line: &str) -> anyhow::Result<()> {
    show(format!("{line}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use reference::options_markdown;

    #[test]
    fn every_page_and_completion_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        write_pages(dir.path()).unwrap();
        let mount = std::fs::read_to_string(dir.path().join("packmule-mount.1")).unwrap();
        assert!(mount.contains("cache\\-size") && !mount.contains("big\\-writes"));
        for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
            let matches = commands::program().try_get_matches_from(["packmule", "completions", shell]).unwrap();
            let shell: Shell = matches.subcommand().unwrap().1.get_one::<String>("shell").unwrap().parse().unwrap();
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut commands::program(), "packmule", &mut script);
            assert!(!script.is_empty());
        }
    }

    #[test]
    fn options_page_is_up_to_date() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/options.md");
        if std::env::var_os("PACKMULE_WRITE_DOCS").is_some() {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, options_markdown()).unwrap();
        }
        assert!(
            std::fs::read_to_string(&file).unwrap() == options_markdown(),
            "docs/options.md is old: PACKMULE_WRITE_DOCS=1 cargo test --lib options_page"
        );
    }
}
