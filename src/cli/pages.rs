//! Completions, manual pages and docs/options.md: all made from the commands and the option table.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use clap::{ArgMatches, Command};
use clap_complete::Shell;

use super::commands::{self, path_of};

/// `packmule completions SHELL`.
pub fn completions(matches: &ArgMatches) -> anyhow::Result<()> {
    let shell: Shell = matches.get_one::<String>("shell").map(String::as_str).unwrap_or_default().parse().map_err(anyhow::Error::msg)?;
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut commands::program(), "packmule", &mut script);
    show(&script)
}

/// `packmule man [--dir DIRECTORY]`: packmule(1) on stdout, or it and a page a command as files.
pub fn man(matches: &ArgMatches) -> anyhow::Result<()> {
    match path_of(matches, "dir") {
        Some(dir) => write_pages(&dir),
        None => show(&page(commands::program())?),
    }
}

fn write_pages(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot be made", dir.display()))?;
    let mut program = commands::program();
    program.build();
    let mut pages = vec![("packmule.1".to_owned(), page(program.clone())?)];
    for command in program.get_subcommands() {
        let name = format!("packmule-{}", command.get_name());
        pages.push((format!("{name}.1"), page(command.clone().name(name.clone()))?));
    }
    for (name, text) in pages {
        let file = dir.join(name);
        std::fs::write(&file, text).with_context(|| format!("{}: cannot be written", file.display()))?;
    }
    Ok(())
}

fn page(command: Command) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text)?;
    Ok(text)
}

/// A reader that goes away (`| head`) is no error.
pub fn show(text: &[u8]) -> anyhow::Result<()> {
    match io::stdout().write_all(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
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
    use crate::config::table::{OPTIONS, TUNING};
    use crate::config::words::accepts;

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

    /// docs/options.md, as the option table has it.
    fn options_markdown() -> String {
        let mut text = String::from(
            "# Options\n\nMade from the option table (`src/config/table.rs`); after a change, `PACKMULE_WRITE_DOCS=1 cargo test --lib options_page` writes it again.\n\n\
             Every option is `-o name=value` in the fstab, `--name value` on the command line (`_` and `-` are alike), `PACKMULE_NAME=value` in the environment and `name = \"value\"` in\n\
             `/etc/packmule.toml` or `~/.config/packmule/config.toml` (there also for one source, under `[mount.\"s3://bucket/\"]`). Defaults < files < environment < command line.\n\
             Sizes take K, M, G and T (binary), times `30s`, `5m`, `1h30m`. A bare number is bytes or seconds, except under another program's word, where it has that program's unit.\n",
        );
        let mut last = None;
        for option in OPTIONS {
            if last.replace(option.group) != Some(option.group) {
                text += &format!("\n## {}\n\n| option | also | takes | default | |\n|---|---|---|---|---|\n", option.group.title());
            }
            let also: Vec<String> = option.aliases.iter().map(|alias| format!("`{}`{}", alias.name, bare_unit(alias.unit))).collect();
            let row = [format!("`{}`", option.name), also.join(", "), accepts(&option.kind), option.default.into(), option.help.into()];
            text += &format!("| {} |\n", row.map(|cell| cell.replace('|', "\\|")).join(" | "));
        }
        let words: Vec<String> = TUNING.iter().map(|(word, _)| format!("`{word}`")).collect();
        text + "\n## Taken and ignored, with one warning\n\n" + &words.join(" ") + "\n"
    }

    fn bare_unit(unit: u64) -> &'static str {
        match unit {
            1 => "",
            1024 => " (KiB)",
            _ => " (MiB)",
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
