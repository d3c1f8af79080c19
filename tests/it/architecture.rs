//! The layers of the design, read from the sources: a lower layer never imports a higher one.

use std::path::{Path, PathBuf};

/// What each layer may import of its own crate; modules that are not named here stand above all of them.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("ranges", &[]),
    ("glob", &[]),
    ("failpoint", &[]),
    ("measure", &[]),
    ("aws", &[]),
    ("s3", &["aws", "measure"]),
    ("cache", &["s3", "ranges", "measure"]),
    ("writeback", &["s3", "ranges", "failpoint", "measure"]),
    ("cost", &["s3"]),
    ("publish", &["aws", "s3", "writeback", "glob", "ranges"]),
    ("vfs", &["cache", "writeback", "s3", "ranges", "glob", "failpoint"]),
    ("fuse", &["vfs", "measure"]),
];

/// Crates that stay in their layers.
const CONFINED: &[(&str, &[&str])] = &[("fuser", &["fuse"]), ("reqwest", &["aws", "s3"]), ("clap", &["cli", "main"])];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below a folder of the project with this extension.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // What the compiler made of the fuzz targets is not ours.
                folders.extend((!path.ends_with("target")).then_some(path));
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

/// The first component below src/: `src/vfs/path.rs` and `src/vfs.rs` are both `vfs`.
fn module(path: &Path) -> String {
    let below = path.strip_prefix(root().join("src")).unwrap();
    Path::new(below.components().next().unwrap().as_os_str()).file_stem().unwrap().to_str().unwrap().to_owned()
}

/// The lines of a file that are code: comments and what follows `#[cfg(test)]` may name anything.
fn code(path: &Path) -> Vec<(usize, String)> {
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().enumerate().take_while(|(_, line)| line.trim() != "#[cfg(test)]");
    lines.map(|(index, line)| (index + 1, line.split("//").next().unwrap_or_default().to_owned())).collect()
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The modules that a line names after `crate::`, `{a, b}` included.
fn imports(line: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        if line[..at].bytes().next_back().is_some_and(is_word) {
            continue;
        }
        let rest = &line[at + "crate::".len()..];
        let list = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or_default(),
            None => rest,
        };
        let entries = if rest.starts_with('{') { list.split(',').collect() } else { vec![list] };
        for entry in entries {
            let name: String = entry.trim().bytes().take_while(|byte| is_word(*byte)).map(char::from).collect();
            names.push(name);
        }
    }
    names
}

#[test]
fn no_layer_imports_a_higher_one() {
    let mut wrong = Vec::new();
    for path in files("src", "rs") {
        let module = module(&path);
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == module) else { continue };
        for (number, line) in code(&path) {
            for name in imports(&line) {
                if name != module && !allowed.contains(&name.as_str()) {
                    wrong.push(format!("{}:{number}: {module} may not import {name}", shown(&path)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn foreign_crates_stay_in_their_layers() {
    let mut wrong = Vec::new();
    for path in files("src", "rs") {
        let module = module(&path);
        for (number, line) in code(&path) {
            for (name, homes) in CONFINED {
                if line.contains(&format!("{name}::")) && !homes.contains(&module.as_str()) {
                    wrong.push(format!("{}:{number}: {name} belongs into {homes:?}", shown(&path)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_layer_of_the_table_exists() {
    for (name, _) in MAY_IMPORT {
        let exists = root().join(format!("src/{name}.rs")).exists() || root().join(format!("src/{name}/mod.rs")).exists();
        assert!(exists, "there is no module {name}");
    }
}

/// "No file over 600 lines"
#[test]
fn no_file_is_over_six_hundred_lines() {
    let sources = ["src", "tests"].into_iter().flat_map(|folder| files(folder, "rs"));
    let long: Vec<_> = sources
        .filter_map(|path| {
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            (lines > 600).then(|| format!("{}: {lines}", shown(&path)))
        })
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// Packages come through the package managers' own configuration: no registry is named in the project.
#[test]
fn no_registry_is_named() {
    let hosts =
        [["crates", "io"], ["pypi", "org"], ["pythonhosted", "org"], ["npmjs", "org"], ["deb.debian", "org"]].map(|parts| parts.join("."));
    let scripts =
        std::fs::read_dir(root().join("scripts")).into_iter().flatten().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let kept = ["rs", "toml", "md"].into_iter().flat_map(|extension| ["src", "tests"].map(|folder| files(folder, extension))).flatten();
    let mut wrong = Vec::new();
    for path in kept.chain(scripts).chain([root().join("Cargo.toml")]) {
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        wrong.extend(hosts.iter().filter(|host| text.contains(host.as_str())).map(|host| format!("{} names {host}", shown(&path))));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
