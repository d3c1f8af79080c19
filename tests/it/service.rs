//! A mount as a service: what it tells the service manager, and that the machine is not shut down over its uploads.

use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use zbus::OwnedFd;

use crate::support::double::{Fault, When};
use crate::support::files::{self, noise};
use crate::support::leash::Leash;
use crate::support::mount::{Mount, Setup, can_mount, mount_namespace};
use crate::support::stage::Stage;
use crate::support::store::Store;

/// How long something may take that is to happen.
const PATIENCE: Duration = Duration::from_secs(60);

fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !seen() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The service manager's end of `NOTIFY_SOCKET`, and what it has heard.
struct Manager(UnixDatagram, String);

impl Manager {
    fn at(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        Self(socket, String::new())
    }

    fn hears(&mut self, word: &str) {
        let mut datagram = [0; 4096];
        until(word, || {
            if let Ok(length) = self.0.recv(&mut datagram) {
                self.1 += &String::from_utf8_lossy(&datagram[..length]);
                self.1 += "\n";
            }
            self.1.lines().any(|line| line.starts_with(word))
        });
    }
}

/// Type=notify: ready when the filesystem answers, stopping when it was asked to, and more time as long as it takes.
/// Promise 25: "SIGTERM wait for the work"
#[test]
fn the_service_manager_hears_how_it_stands() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let folder = tempfile::tempdir().unwrap();
    let mut manager = Manager::at(&folder.path().join("notify"));
    let setup = Setup::of(&store).option("write_back=1h").env("NOTIFY_SOCKET", folder.path().join("notify").to_str().unwrap());
    let mut mount = Mount::start(setup);
    manager.hears("READY=1");
    manager.hears("STATUS=mounted on ");
    files::write(&mount.path("f"), &noise(1, 300_000)).unwrap();
    store.as_double().unwrap().fault(When::operation("PutObject").key("f"), Fault::Delay(Duration::from_secs(2)));
    mount.umount();
    manager.hears("STOPPING=1");
    manager.hears("STATUS=storing 1 file (293.0 KiB)");
    manager.hears("EXTEND_TIMEOUT_USEC=60000000");
    assert_eq!(store.bytes("f").len(), 300_000);
}

/// What logind is asked for, and the other ends of the locks that it gave.
#[derive(Default)]
struct Asked {
    words: Vec<[String; 4]>,
    locks: Vec<std::io::PipeReader>,
}

/// systemd-logind's part of the bus.
struct Logind {
    asked: Arc<Mutex<Asked>>,
    /// polkit's answer to `block`.
    blocks: bool,
}

#[zbus::interface(name = "org.freedesktop.login1.Manager")]
impl Logind {
    fn inhibit(&self, what: String, who: String, why: String, mode: String) -> zbus::fdo::Result<OwnedFd> {
        let refused = mode == "block" && !self.blocks;
        let mut asked = self.asked.lock().unwrap();
        asked.words.push([what, who, why, mode]);
        if refused {
            return Err(zbus::fdo::Error::InteractiveAuthorizationRequired("not without a session".to_owned()));
        }
        let (reader, writer) = std::io::pipe().unwrap();
        asked.locks.push(reader);
        Ok(std::os::fd::OwnedFd::from(writer).into())
    }
}

/// A system bus of the test's own: D-Bus's reference daemon. It ends with this value, or with the test.
struct Bus {
    address: String,
    daemon: Child,
    _leash: Leash,
    _logind: zbus::Connection,
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// With `logind` on it.
fn bus(folder: &Path, asked: &Arc<Mutex<Asked>>, blocks: bool) -> Bus {
    let address = format!("unix:path={}", folder.join("bus").display());
    let config = format!(
        "<busconfig><type>system</type><listen>{address}</listen><auth>EXTERNAL</auth><policy context=\"default\"><allow user=\"*\"/><allow own=\"*\"/>\
         <allow send_destination=\"*\"/><allow receive_sender=\"*\"/></policy></busconfig>"
    );
    fs::write(folder.join("bus.conf"), config).unwrap();
    let daemon = Command::new("dbus-daemon")
        .arg(format!("--config-file={}", folder.join("bus.conf").display()))
        .args(["--nofork", "--nopidfile"])
        .stdin(Stdio::null())
        .spawn()
        .expect("dbus-daemon is installed by ./scripts/setup test");
    let leash = Leash::new("kill \"$1\"", &[&daemon.id().to_string()]);
    let mut connection = None;
    until("the bus", || {
        let built = zbus::connection::Builder::address(address.as_str());
        let logind = Logind { asked: asked.clone(), blocks };
        let built = built.name("org.freedesktop.login1").serve_at("/org/freedesktop/login1", logind);
        connection = RUNTIME.block_on(built.build()).ok();
        connection.is_some()
    });
    Bus { address, daemon, _leash: leash, _logind: connection.unwrap() }
}

static RUNTIME: std::sync::LazyLock<tokio::runtime::Runtime> = std::sync::LazyLock::new(|| tokio::runtime::Runtime::new().unwrap());

/// While something is on its way the machine is not shut down: what blocks, or where only a delay is allowed, what delays.
fn the_machine_stays_up(blocks: bool, modes: &[&str]) {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let asked = Arc::new(Mutex::new(Asked::default()));
    let bus = bus(folder.path(), &asked, blocks);
    let store = Store::double();
    let setup = Setup::of(&store).option("write_back=1h").env("DBUS_SYSTEM_BUS_ADDRESS", &bus.address);
    let stage = Stage { mount: Mount::start(setup), store };
    std::thread::sleep(Duration::from_secs(5));
    assert!(asked.lock().unwrap().words.is_empty(), "nothing is on its way");
    files::write(&stage.path("f"), b"on its way").unwrap();
    until("a lock", || !asked.lock().unwrap().locks.is_empty());
    {
        let asked = asked.lock().unwrap();
        let told: Vec<&str> = asked.words.iter().map(|words| words[3].as_str()).collect();
        assert_eq!(told, modes);
        let [what, who, why, _] = asked.words.last().unwrap();
        assert_eq!((what.as_str(), who.as_str()), ("shutdown", "packmule"));
        assert!(why.starts_with("1 file (10 B) on the way to s3://"), "{why}");
    }
    let mut lock = asked.lock().unwrap().locks.pop().unwrap();
    let ends = std::thread::spawn(move || lock.read(&mut [0; 1]).unwrap());
    std::thread::sleep(Duration::from_secs(3));
    assert!(!ends.is_finished(), "the lock went before the upload");
    stage.mount.ask(&["flush"], &stage.path("f"));
    until("the lock goes with the upload", || ends.is_finished());
    assert_eq!(ends.join().unwrap(), 0, "its last holder closed it");
}

#[test]
fn a_shutdown_is_blocked_while_something_is_on_its_way() {
    the_machine_stays_up(true, &["block"]);
}

#[test]
fn a_service_without_a_session_delays_a_shutdown() {
    the_machine_stays_up(false, &["block", "delay"]);
}

/// journald's end of its socket, in a mount namespace where the mount finds it in its place.
struct Journald(UnixDatagram);

impl Journald {
    /// What came, a record a line: its priority and its message.
    fn records(&self) -> Vec<(String, String)> {
        self.0.set_nonblocking(true).unwrap();
        let (mut found, mut datagram) = (Vec::new(), [0; 65536]);
        while let Ok(length) = self.0.recv(&mut datagram) {
            let record = String::from_utf8(datagram[..length].to_vec()).unwrap();
            let field = |name: &str| {
                let mut values = record.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
                let value = values.next().unwrap_or_else(|| panic!("no {name} in {record:?}")).to_owned();
                assert_eq!(values.next(), None, "{record:?}");
                value
            };
            assert_eq!((field("SYSLOG_IDENTIFIER").as_str(), record.lines().count()), ("packmule", 3), "{record:?}");
            found.push((field("PRIORITY"), field("MESSAGE")));
        }
        found
    }
}

/// A background mount logs to the journal where one listens: a record an event, an error with bucket, key and request id, whatever the key.
/// "returns 32 and one line in the journal when it cannot"
#[test]
fn the_journal_has_a_record_for_each_event() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let folder = tempfile::tempdir().unwrap();
    let (run, point) = (folder.path().join("journal"), folder.path().join("mnt"));
    fs::create_dir(&run).unwrap();
    fs::create_dir(&point).unwrap();
    let journald = Journald(UnixDatagram::bind(run.join("socket")).unwrap());
    store.as_double().unwrap().fault(When::operation("PutObject").key("for\nged"), Fault::Error(403, "AccessDenied"));
    let setup = Setup::of(&store);
    let packmule = env!("CARGO_BIN_EXE_packmule");
    // /run may have no systemd/journal, and may hold one that is somebody's: neither is touched.
    let script = format!(
        "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind '{run}' /run/systemd/journal && \
         '{packmule}' mount {source} '{point}' -o '{options}' && {{ printf x >'{point}/for\nged' || :; }} && '{packmule}' umount '{point}'; \
         '{packmule}' mount s3://no-such-bucket '{point}' -o '{options}'; test $? = 32",
        run = run.display(),
        source = setup.source,
        point = point.display(),
        options = setup.options.join(","),
    );
    let mut command = mount_namespace();
    command.args(["sh", "-c", &script]).env("HOME", folder.path()).env("XDG_STATE_HOME", folder.path().join("state"));
    command.env("XDG_CACHE_HOME", folder.path().join("cache")).envs(setup.env.iter().map(|(name, value)| (name, value)));
    let said = files::output(&mut command);
    let stderr = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.success(), "{stderr}");
    let records = journald.records();
    let has = |priority: &str, words: &[&str]| {
        records.iter().any(|(of, message)| of == priority && words.iter().all(|word| message.contains(word)))
    };
    assert!(has("6", &["mounted", "source="]) && has("6", &["unmounted"]), "{records:?}");
    assert!(has("3", &["for\\nged", "PutObject", "AccessDenied", "request id FAULT0000000001"]), "{records:?}");
    assert!(has("3", &["no-such-bucket"]), "{records:?}");
    assert!(!folder.path().join("state/packmule/log").exists(), "the journal has it");
    assert!(records.iter().all(|(_, message)| !message.contains(store.secret_key())));
}
