//! Links, and the counting of what was fetched over them.

use std::fs::{self, File};
use std::path::Path;

use serde_json::Value;

use crate::support::files;
use crate::support::mount::packmule;
use crate::support::stage::{Stage, on_every_store};
use crate::support::web;

const PARAMETER: &str = "x-packmule-link=";

/// A link's id, which stands in its query.
fn id(link: &str) -> &str {
    let (_, query) = link.split_once('?').unwrap();
    query.split('&').find_map(|pair| pair.strip_prefix(PARAMETER)).unwrap_or_else(|| panic!("{link} has no id"))
}

/// A GET as S3's log has it.
fn line(link: &str, request: &str, address: &str, status: u16, sent: usize) -> String {
    let (_, uri) = link.split_once("//").unwrap().1.split_once('/').unwrap();
    format!(
        "79a59df9 releases [06/Feb/2019:00:02:10 +0000] {address} - {request} REST.GET.OBJECT dir/a%2520b \"GET /{uri} HTTP/1.1\" {status} - {sent} 11 70 10 \"-\" \"curl/8.5.0\" - s9lz= SigV4 - QueryString releases.s3.amazonaws.com TLSv1.3 - -\n"
    )
}

on_every_store! {
    /// Every link has an id of its own that nobody can change, and the log of what was fetched tells one from the other.
    fn links_are_told_apart(store) {
        let stage = Stage::new(store);
        fs::create_dir(stage.path("dir")).unwrap();
        fs::write(stage.path("dir/a b"), "hello world").unwrap();
        let of_file = stage.mount.ask(&["link"], &stage.path("dir/a b"));
        let endpoint = format!("endpoint_url={}", stage.store.endpoint());
        let of_object = stage.mount.ask(&["link", "-o", &endpoint], Path::new(&format!("s3://{}/dir/a b", stage.store.bucket())));
        let (first, second) = (of_file.trim(), of_object.trim());
        for link in [first, second] {
            let answer = web::get(link);
            assert_eq!((answer.status, answer.text().as_str()), (200, "hello world"), "{link}");
            assert_eq!(web::get(&link.replace(id(link), "aaaaaaaaaaaa")).status, 403, "the id is signed");
        }
        assert_ne!(id(first), id(second));

        let logs = tempfile::tempdir().unwrap();
        let log = [line(first, "R1", "192.0.2.1", 200, 11), line(first, "R1", "192.0.2.1", 200, 11), line(second, "R2", "192.0.2.1", 206, 4)];
        fs::write(logs.path().join("2019-02-06-00-21-47-A1206F460EXAMPLE"), log.concat()).unwrap();
        let told: Value = serde_json::from_str(&stage.mount.ask(&["links", "--json"], logs.path())).unwrap();
        let of = |link: &str| told["links"].as_array().unwrap().iter().find(|told| told["link"] == id(link)).unwrap();
        assert_eq!((&of(first)["complete"], &of(first)["started"], &of(first)["bytes"]), (&1.into(), &0.into(), &11.into()), "{told}");
        assert_eq!((&of(second)["complete"], &of(second)["started"], &of(second)["bytes"]), (&0.into(), &1.into(), &4.into()), "{told}");
        assert_eq!(of(first)["object"], "s3://releases/dir/a b");
    }
}

/// What cannot be read is one line, fails the command, and keeps nobody from the rest.
#[test]
fn an_unreadable_log_is_named_and_the_rest_counted() {
    let home = tempfile::tempdir().unwrap();
    let (good, bad) = (home.path().join("good"), home.path().join("bad.gz"));
    fs::write(&good, line("http://h/k?x-packmule-link=abcdefghijkl", "R1", "::1", 200, 11)).unwrap();
    fs::write(&bad, [0x1f, 0x8b, 8, 0]).unwrap();
    let said = files::output(packmule(home.path(), &[]).arg("links").arg(&bad).arg(&good));
    let (out, err) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert_eq!(said.status.code(), Some(1));
    assert!(out.lines().nth(1).unwrap().starts_with("abcdefghijkl         1 "), "{out}");
    assert!(err.lines().count() == 2 && err.contains("bad.gz") && err.contains("fetch it again"), "{err}");

    let piped = packmule(home.path(), &[]).args(["links", "-"]).stdin(File::open(&good).unwrap()).output().unwrap();
    assert!(piped.status.success() && piped.stdout == said.stdout, "{piped:?}");
    assert_eq!(files::output(packmule(home.path(), &[]).arg("links")).status.code(), Some(2));
}
