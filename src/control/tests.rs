use super::*;

#[test]
fn requests_are_what_they_were() {
    for request in [
        Request::Ping,
        Request::Umount { timeout_ms: None },
        Request::Flush { path: Some("/m/a".into()), as_is: true, timeout_ms: Some(1500) },
        Request::Read { id: u64::MAX, offset: 1, length: 2, fetch: false },
        Request::Link { path: "/m/a b".into(), expires_seconds: 60 },
    ] {
        let line = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
    }
    assert_eq!(serde_json::to_string(&Request::Status).unwrap(), r#"{"request":"status"}"#);
    assert_eq!(serde_json::from_str::<Request>(r#"{"request":"umount"}"#).unwrap(), Request::Umount { timeout_ms: None });
}

#[test]
fn a_status_of_an_older_mount_is_understood() {
    let mut told = serde_json::to_value(Status { pid: 7, ..Status::default() }).unwrap();
    for newer in ["read_only", "conflicts", "pins", "renames"] {
        assert!(told.as_object_mut().unwrap().remove(newer).is_some(), "{newer}");
    }
    assert_eq!(serde_json::from_value::<Status>(told).unwrap(), Status { pid: 7, ..Status::default() });
}

#[test]
fn a_mount_that_hangs_is_not_waited_for() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut client = Client { stream: BufReader::new(ours), mountpoint: "/m".into() };
    let error = client.call(&Request::Status).unwrap_err().to_string();
    assert!(error.contains("/m: its packmule hangs"), "{error}");
}

#[test]
fn socket_names_are_short_and_differ() {
    let long = PathBuf::from("/".to_owned() + &"a".repeat(4000));
    assert_eq!(socket_name(&long).len(), 21);
    assert_ne!(socket_name(&long), socket_name(Path::new("/a")));
}

#[test]
fn a_path_below_what_exists_is_resolved() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(dir.path(), dir.path().join("link")).unwrap();
    let resolved = resolve(&dir.path().join("link/no/such")).unwrap();
    assert_eq!(resolved, dir.path().canonicalize().unwrap().join("no/such"));
}

#[test]
fn a_process_that_nobody_reaped_has_ended() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    assert!(runs(std::process::id()) && runs(child.id()));
    child.kill().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while runs(child.id()) && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!runs(child.id()) && Path::new("/proc").join(child.id().to_string()).exists());
    child.wait().unwrap();
    assert!(!runs(child.id()));
}
