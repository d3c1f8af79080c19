//! What the option table says beside `--help`: docs/options.md, and the manual page packmule.toml(5).

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

#[cfg(test)]
use crate::config::table::TUNING;
use crate::config::table::{Kind, OPTIONS, Opt};
use crate::config::words::accepts;

/// Another program's words for an option, each with the unit of a bare number under it.
fn also(option: &Opt, word: impl Fn(&str) -> String) -> String {
    let words: Vec<String> = option.aliases.iter().map(|alias| format!("{}{}", word(alias.name), bare_unit(alias.unit))).collect();
    words.join(", ")
}

fn bare_unit(unit: u64) -> &'static str {
    match unit {
        1 => "",
        1024 => " (KiB)",
        _ => " (MiB)",
    }
}

/// docs/options.md, as the option table has it.
#[cfg(test)]
pub fn options_markdown() -> String {
    let mut text = String::from(
        "# Options\n\nMade from the option table (`src/config/table.rs`); after a change, `PACKMULE_WRITE_DOCS=1 cargo test --lib options_page` writes it again.\n\n\
         Every option is `-o name=value` in the fstab, `--name value` on the command line (`_` and `-` are alike), `PACKMULE_NAME=value` in the environment and `name = \"value\"` in\n\
         `/etc/packmule.toml` or `~/.config/packmule/config.toml` (there also for one source, under `[mount.\"s3://bucket/\"]`, and for a mount with a name, under `[mount.NAME]`: packmule.toml(5)). Defaults < files < environment < command line.\n\
         Sizes take K, M, G and T (binary), times `30s`, `5m`, `1h30m`. A bare number is bytes or seconds, except under another program's word, where it has that program's unit.\n",
    );
    let mut last = None;
    for option in OPTIONS {
        if last.replace(option.group) != Some(option.group) {
            text += &format!("\n## {}\n\n| option | also | takes | default | |\n|---|---|---|---|---|\n", option.group.title());
        }
        let also = also(option, |word| format!("`{word}`"));
        let row = [format!("`{}`", option.name), also, accepts(&option.kind), option.default.into(), option.help.into()];
        text += &format!("| {} |\n", row.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
    let words: Vec<String> = TUNING.iter().map(|(word, _)| format!("`{word}`")).collect();
    text + "\n## Taken and ignored, with one warning\n\n" + &words.join(" ") + "\n"
}

/// A manual page under way.
struct Page(Roff);

impl Page {
    fn section(&mut self, title: &str) {
        self.0.control("SH", [title.to_uppercase().as_str()]);
    }

    fn paragraph(&mut self, text: impl Into<Vec<Inline>>) {
        self.0.control("PP", []).text(text.into());
    }

    /// A word, and below it what it means.
    fn item(&mut self, word: impl Into<Vec<Inline>>, text: impl Into<Vec<Inline>>) {
        self.0.control("TP", []).text(word.into()).text(text.into());
    }

    /// Lines as they are.
    fn example(&mut self, lines: &str) {
        self.0.control("PP", []).control("RS", ["4"]).control("EX", []);
        self.0.text([roman(lines.trim_end())]);
        self.0.control("EE", []).control("RE", []);
    }
}

/// packmule.toml(5).
pub fn config_page() -> String {
    let source = concat!("packmule ", env!("CARGO_PKG_VERSION"));
    let mut page = Page(Roff::new());
    page.0.control("TH", ["packmule.toml", "5", "", source, "packmule"]);
    page.section("name");
    page.0.text([roman("packmule.toml - what mounts of packmule are like where nothing else is said")]);
    page.section("synopsis");
    page.0.text([italic("/etc/packmule.toml")]).control("br", []).text([italic("~/.config/packmule/config.toml")]);
    files(&mut page);
    sections(&mut page);
    options(&mut page);
    page.section("example");
    page.example(EXAMPLE);
    page.section("see also");
    page.0.text([roman("packmule(1), packmule-mount(1), packmule-config-check(1), mount.packmule(8)")]);
    page.0.to_roff()
}

fn files(page: &mut Page) {
    page.section("description");
    page.paragraph([
        roman("Both files are TOML, and either may be missing. Of an option that is said several times the last of these counts: its default, "),
        italic("/etc/packmule.toml"),
        roman(", the user's "),
        italic("config.toml"),
        roman(" (below "),
        bold("XDG_CONFIG_HOME"),
        roman(" where that is set), the environment ("),
        bold("PACKMULE_CACHE_SIZE=10G"),
        roman("), the fstab or the command line. "),
        bold("PACKMULE_CONFIG"),
        roman(" names a file that is read instead of both; empty, none is read."),
    ]);
    page.paragraph([
        bold("packmule config check"),
        roman(" reads them as a mount would, and names the first line that is wrong. So does every mount: a file that is wrong anywhere, or names an unknown option, fails it."),
    ]);
    page.paragraph([
        roman("Values are strings, numbers, booleans, or lists, which are joined by commas: "),
        bold("cache_size = \"20G\""),
        roman(", "),
        bold("max_connections = 16"),
        roman(", "),
        bold("ro = true"),
        roman(". Sizes take K, M, G and T (binary), times "),
        bold("30s"),
        roman(", "),
        bold("5m"),
        roman(" or "),
        bold("1h30m"),
        roman("; a bare number is bytes or seconds, except under another program's word, where it has that program's unit. Keys of an account are not kept here: see "),
        bold("profile"),
        roman(" and "),
        bold("passwd_file"),
        roman("."),
    ]);
}

fn sections(page: &mut Page) {
    page.section("sections");
    page.paragraph([roman("Options above the first section are those of every mount.")]);
    page.item(
        [bold("[mount."), italic("NAME"), bold("]")],
        [
            roman("A mount with a name. "),
            bold("source"),
            roman(" is what is mounted ("),
            bold("s3://BUCKET/PREFIX/"),
            roman(") and "),
            bold("mountpoint"),
            roman(" where; any option may follow, and counts for this mount alone. "),
            bold("packmule mount NAME"),
            roman(" mounts it, and so does "),
            bold("systemctl start packmule@NAME"),
            roman(" (with "),
            bold("--user"),
            roman(", a user's). Options on the command line count more."),
        ],
    );
    page.item(
        [bold("[mount.\"s3://"), italic("BUCKET/"), bold("\"]")],
        [roman("Options of every mount of this source, whoever mounts it, the fstab too.")],
    );
    page.item(
        [bold("[prices]")],
        [
            roman("What the store asks for: "),
            bold("put"),
            roman(" and "),
            bold("get"),
            roman(" for 1,000 requests, "),
            bold("out"),
            roman(" for 1 GB, and "),
            bold("currency"),
            roman(". The same as the options "),
            bold("price_put"),
            roman(", "),
            bold("price_get"),
            roman(", "),
            bold("price_out"),
            roman(" and "),
            bold("currency"),
            roman("."),
        ],
    );
    page.item(
        [bold("[[header_rules]]")],
        [
            roman("What new objects are stored with. "),
            bold("match"),
            roman(
                " is a pattern or a list of them: one without / looks at a file's name, another at the whole key. The rest are headers: ",
            ),
            bold("content_type"),
            roman(", "),
            bold("cache_control"),
            roman(", "),
            bold("content_disposition"),
            roman(", "),
            bold("content_encoding"),
            roman(", "),
            bold("content_language"),
            roman(", "),
            bold("expires"),
            roman(" and "),
            bold("website_redirect"),
            roman(". Every rule that matches counts; of two that set one header the later wins. "),
            bold("[[mount."),
            italic("NAME"),
            bold(".header_rules]]"),
            roman(" are those of one mount, and "),
            bold("header_rules = \"FILE\""),
            roman(" names a file that has them as [[rule]]."),
        ],
    );
}

fn options(page: &mut Page) {
    page.section("options");
    page.paragraph([
        roman("The same words as "),
        bold("-o"),
        roman(" takes in the fstab; _ and - are alike. Other programs' words stand in brackets. packmule-mount(1) lists them too."),
    ]);
    let mut last = None;
    // What is taken and means nothing is said by mount(8).
    for option in OPTIONS.iter().filter(|option| !matches!(option.kind, Kind::Nothing)) {
        if last.replace(option.group) != Some(option.group) {
            page.0.control("SS", [option.group.title()]);
        }
        let also = also(option, str::to_owned);
        let word = if also.is_empty() { vec![bold(option.name)] } else { vec![bold(option.name), roman(format!(" [{also}]"))] };
        let default = if option.default.is_empty() { String::new() } else { format!(" Default: {}.", option.default) };
        page.item(word, [roman(format!("{}. Takes {}.{default}", option.help, accepts(&option.kind)))]);
    }
}

const EXAMPLE: &str = r#"cache_size = "20G"
profile = "work"

[mount.releases]
source = "s3://releases/"
mountpoint = "/srv/releases"
allow_other = true
write_back = "5s"

[mount."s3://archive/"]
ro = true

[prices]
put = 0.005
get = 0.0004
out = 0.09

[[header_rules]]
match = ["*.html", "docs/**"]
cache_control = "no-cache"
"#;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_page_of_the_config_file_has_every_option_and_section() {
        let page = config_page();
        for option in OPTIONS.iter().filter(|option| !matches!(option.kind, Kind::Nothing)) {
            assert!(page.contains(&format!("\\fB{}\\fR", option.name)), "{}", option.name);
        }
        for section in ["[mount.", "[prices]", "[[header_rules]]", "PACKMULE_CONFIG", "SH EXAMPLE"] {
            assert!(page.contains(section), "{section}");
        }
        let source = crate::config::Source::parse("s3://releases/").unwrap();
        let named = crate::config::Named { name: "releases".into(), source, mountpoint: None };
        let mut typed = crate::config::Typed::default();
        typed.file(std::path::Path::new("example"), EXAMPLE, crate::config::Of::Name(&named), &[]).unwrap();
        assert_eq!((typed.allow_other, typed.price_out, typed.rules.len(), typed.ro), (Some(true), Some(0.09), 1, None));
        // A line of text that begins with a dot or an apostrophe would be a command to the formatter.
        let known = ["TH", "SH", "SS", "PP", "TP", "RS", "RE", "EX", "EE", "br", "ie", "el"];
        for line in page.lines().filter(|line| line.starts_with(['.', '\''])) {
            assert!(known.contains(&line.trim_start_matches('.').split([' ', '\\']).next().unwrap_or_default()), "{line}");
        }
    }
}
