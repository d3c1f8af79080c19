//! What Prometheus is told, as its own client reads it.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;

use http::Method;

use crate::signatures::python;
use crate::support::double::{Fault, When};
use crate::support::files::{self, output};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::seaweed::free_ports;
use crate::support::stage::Stage;
use crate::support::store::Store;
use crate::support::web;

/// Prints a line a sample: its name with its labels in order, and its value.
const READ: &str = "import sys
from prometheus_client.parser import text_string_to_metric_families
for family in text_string_to_metric_families(open(sys.argv[1]).read()):
    for sample in family.samples:
        print(sample.name + ''.join(' %s=%s' % pair for pair in sorted(sample.labels.items())) + '\\t%r' % sample.value)";

fn scrape(address: SocketAddr) -> BTreeMap<String, f64> {
    let page = web::send(Method::GET, &format!("http://{address}/metrics"), &[], Vec::new()).unwrap();
    assert_eq!(page.status, 200);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), page.text()).unwrap();
    let read = output(Command::new(python()).args(["-c", READ]).arg(file.path()));
    assert!(read.status.success(), "{}\n{}", String::from_utf8_lossy(&read.stderr), page.text());
    let text = String::from_utf8(read.stdout).unwrap();
    text.lines().map(|line| line.rsplit_once('\t').unwrap()).map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
}

#[test]
fn prometheus_reads_what_a_mount_does() {
    if !can_mount() {
        return;
    }
    let (store, address) = (Store::double(), SocketAddr::from(([127, 0, 0, 1], free_ports::<1>()[0])));
    let mut stage = Stage { mount: Mount::start(Setup::of(&store).option(&format!("metrics_addr={address}"))), store };
    fs::write(stage.path("file"), "content").unwrap();
    assert_eq!(fs::read_to_string(stage.path("file")).unwrap(), "content");
    stage.double().fault(When::operation("PutObject").key("refused"), Fault::Error(403, "AccessDenied"));
    files::write(&stage.path("refused"), b"content").unwrap_err();

    let told = scrape(address);
    let of = |name: &str| told.get(name).copied().unwrap_or_else(|| panic!("no {name} in {told:#?}"));
    let at_least = |name: &str, least: f64| assert!(of(name) >= least, "{name}: {}", of(name));
    at_least("packmule_s3_requests_total operation=PutObject status=200", 1.0);
    at_least("packmule_s3_requests_total operation=PutObject status=403", 1.0);
    at_least("packmule_s3_request_seconds_count operation=PutObject", 2.0);
    at_least("packmule_s3_bytes_total direction=sent", 7.0);
    for operation in ["create", "write", "flush", "lookup"] {
        at_least(&format!("packmule_operation_seconds_count operation={operation}"), 1.0);
        let all = of(&format!("packmule_operation_seconds_count operation={operation}"));
        assert!((of(&format!("packmule_operation_seconds_bucket le=+Inf operation={operation}")) - all).abs() < 0.5, "{operation}");
    }
    at_least("packmule_uptime_seconds", 0.0);
    at_least("packmule_queue_files state=parked", 1.0);
    at_least("packmule_queue_bytes state=parked", 7.0);
    assert!(of("packmule_queue_files state=queued") < 0.5 && of("packmule_queue_deletes") < 0.5);
    assert!(told.keys().any(|name| name.starts_with("packmule_mount ") && name.contains("source=s3://releases")), "{told:#?}");
    // No secret, and nothing else than metrics.
    let page = web::send(Method::GET, &format!("http://{address}/metrics"), &[], Vec::new()).unwrap().text();
    assert!(!page.contains(stage.store.secret_key()) && !page.contains(stage.store.access_key()));
    for (method, path) in [(Method::GET, "/"), (Method::POST, "/metrics"), (Method::GET, "/etc/passwd")] {
        assert_eq!(web::send(method, &format!("http://{address}{path}"), &[], Vec::new()).unwrap().status, 404, "{path}");
    }
    stage.mount.umount_leaving("refused");
    assert!(std::net::TcpStream::connect(address).is_err(), "the port is free again");
}

#[test]
fn an_address_that_is_taken_fails_the_mount_in_a_line() {
    if !can_mount() {
        return;
    }
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let store = Store::double();
    let failure = Mount::try_start(Setup::of(&store).option(&format!("metrics_addr={address}"))).err().expect("it mounted");
    assert_eq!(failure.status.code(), Some(32));
    assert!(failure.stderr.contains(&format!("metrics_addr={address}")) && failure.stderr.contains("free port"), "{}", failure.stderr);
}
