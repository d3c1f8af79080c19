//! The README's promises and the tests that prove them: each row has a test that quotes it, `/// Promise 12: "…"`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// How many promises there are.
const PROMISES: u32 = 29;

const BEGIN: &str = "<!-- promises:";
const END: &str = "<!-- promises end -->";

/// The numbers of the README's rows, in their order, each with the tests that it names.
fn rows() -> Vec<(u32, Vec<String>)> {
    let readme = include_str!("../../README.md");
    let (_, after) = readme.split_once(BEGIN).unwrap_or_else(|| panic!("README.md has no {BEGIN}"));
    let (table, _) = after.split_once(END).unwrap_or_else(|| panic!("README.md has no {END}"));
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let numbered = table.lines().map(cells).filter_map(|cells| Some((cells.first()?.parse().ok()?, cells)));
    let rows = numbered.map(|(number, cells)| {
        assert!(cells.len() == 4 && cells.iter().all(|cell| !cell.is_empty()), "the row of promise {number}: {cells:?}");
        (number, cells[3].split(',').map(|test| test.trim().trim_matches('`').to_owned()).collect())
    });
    rows.collect()
}

/// The tests that quote each promise.
fn quoted() -> BTreeMap<u32, BTreeSet<String>> {
    let mut found: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let suite = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let quotations = quotations(&std::fs::read_to_string(&path).unwrap());
        for (number, test) in quotations.unwrap_or_else(|wrong| panic!("{suite}.rs: {wrong}")) {
            found.entry(number).or_default().insert(format!("{suite}::{test}"));
        }
    }
    found
}

/// Every number quoted in a file, with the test below it.
fn quotations(text: &str) -> Result<Vec<(u32, String)>, String> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let Some(rest) = line.strip_prefix("/// Promise ") else { continue };
        let wrong = |what: &str| format!("line {}: {what}: {line}", index + 1);
        let (number, quote) = rest.split_once(": ").unwrap_or_default();
        let number = number.parse().map_err(|_| wrong("a promise has a number"))?;
        if !quote.starts_with('"') {
            return Err(wrong("a promise is quoted"));
        }
        let below = lines[index..].iter().find(|line| !line.starts_with("///") && !line.starts_with("#["));
        let test = below.and_then(|line| line.strip_prefix("fn ")).and_then(|rest| rest.split('(').next());
        found.push((number, test.ok_or_else(|| wrong("no test stands below"))?.to_owned()));
    }
    Ok(found)
}

#[test]
fn the_readme_has_every_promise_once_and_in_order() {
    let numbers: Vec<u32> = rows().into_iter().map(|(number, _)| number).collect();
    assert_eq!(numbers, (1..=PROMISES).collect::<Vec<_>>());
}

#[test]
fn every_promise_is_quoted_by_the_tests_that_its_row_names() {
    let quoted = quoted();
    for (number, named) in rows() {
        let tests = quoted.get(&number).unwrap_or_else(|| panic!("no test quotes promise {number}"));
        let lacking: Vec<_> = named.iter().filter(|test| !tests.contains(*test)).collect();
        assert!(lacking.is_empty(), "the row of promise {number} names {lacking:?}; quoted by {tests:?}");
    }
}

#[test]
fn no_test_quotes_what_is_not_promised() {
    let rows = rows();
    let unknown: Vec<_> = quoted().into_iter().filter(|(number, _)| rows.iter().all(|(row, _)| row != number)).collect();
    assert!(unknown.is_empty(), "README.md has no row for {unknown:?}");
}

#[test]
fn quotations_are_read_and_judged() {
    let both = "/// Promise 3: \"a\"\n    /// Promise 4: \"b\"\n    #[test]\n    fn both() {";
    assert_eq!(quotations(both).unwrap(), [(3, "both".to_owned()), (4, "both".to_owned())]);
    for wrong in ["/// Promise 3: \"a\"\nconst X: u32 = 1;", "/// Promise three: \"a\"\nfn f() {}", "/// Promise 3: a\nfn f() {}"] {
        assert!(quotations(wrong).is_err(), "{wrong}");
    }
}
