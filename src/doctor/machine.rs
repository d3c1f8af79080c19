//! What can be known without S3: the kernel's FUSE, disks, names, connections and clocks.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use nix::unistd::{AccessFlags, access, geteuid};

use super::{Finding, Tell, Verdict};
use crate::config::{Config, MountFlags, resolve};
use crate::mount;
use crate::s3::client::Client;
use crate::s3::response::SKEW_MOST;

/// `Date` is cut to the second, and a minute's error is on its way to more.
const SKEW_NOTED: Duration = Duration::from_secs(60);

/// Names that take longer to be resolved are as good as unknown.
const RESOLVE_MOST: Duration = Duration::from_secs(10);

/// The device, the helper, and whom a mount may be shown to.
pub(super) fn fuse(flags: Option<&MountFlags>) -> Vec<Finding> {
    let wrong = |check, error: anyhow::Error| {
        let line = format!("{error:#}");
        let own = line.strip_prefix(&format!("{check}: ")).unwrap_or(&line).to_owned();
        let (found, remedy) = own.split_once(": ").map_or((own.as_str(), ""), |(found, remedy)| (found, remedy));
        Finding { remedy: Some(remedy.to_owned()).filter(|remedy| !remedy.is_empty()), ..Finding::bad(check, found, "") }
    };
    let device = mount::device().map_or_else(|error| wrong("/dev/fuse", error), |()| Finding::good("/dev/fuse", "can be opened"));
    let helper = match mount::helper() {
        Ok(Some(path)) => setuid(&path),
        Ok(None) => may_mount(&std::fs::read_to_string("/proc/self/status").unwrap_or_default()),
        Err(error) => wrong("fusermount3", error),
    };
    let others = match flags.map(mount::others) {
        Some(Err(error)) => wrong("allow_other", error),
        _ if geteuid().is_root() => Finding::good("allow_other", "root may show a mount to other users"),
        _ if mount::user_allow_other() => Finding::good("allow_other", "user_allow_other is in /etc/fuse.conf"),
        _ => Finding::note(
            "allow_other",
            "only you will see what you mount",
            "for other users to see it, root puts the line user_allow_other into /etc/fuse.conf",
        ),
    };
    vec![device, helper, others]
}

/// An ordinary user mounts by a helper that is root's.
fn setuid(helper: &Path) -> Finding {
    let shown = helper.display();
    let is_setuid = std::fs::metadata(helper).is_ok_and(|metadata| metadata.mode() & 0o4000 != 0 && metadata.uid() == 0);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if !is_setuid {
        return Finding::note(
            "fusermount3",
            format!("{shown} is not setuid root: an ordinary user cannot mount by it"),
            "reinstall the package fuse3",
        );
    }
    if field(&status, "NoNewPrivs:") == Some("1") {
        let remedy = "mount outside of this container or service, or without no-new-privileges (NoNewPrivileges=)";
        return Finding::bad("fusermount3", format!("{shown} may not become root here (no_new_privs)"), remedy);
    }
    Finding::good("fusermount3", shown.to_string())
}

/// Root mounts by itself, where it has the right: bit 21 of the capabilities is CAP_SYS_ADMIN.
fn may_mount(status: &str) -> Finding {
    let capabilities = field(status, "CapEff:").and_then(|mask| u64::from_str_radix(mask, 16).ok());
    match capabilities {
        Some(mask) if mask & (1 << 21) == 0 => Finding::bad(
            "fusermount3",
            "root may not mount here (no CAP_SYS_ADMIN)",
            "a container needs --cap-add SYS_ADMIN --device /dev/fuse",
        ),
        _ => Finding::good("fusermount3", "not needed: root mounts by itself"),
    }
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// Room for the cache, for what is on its way to S3, and for what is remembered.
pub(super) fn disks(config: &Config) -> Vec<Finding> {
    let floor = config.min_free_space;
    // A mount does without a cache on disk.
    let cache = match disk("cache_dir", &config.cache_dir, floor) {
        Disk::Wrong(finding) => Finding { verdict: Verdict::Note, ..finding },
        Disk::Room(usable, text) if usable < LITTLE => {
            Finding::note("cache_dir", format!("{text}: little is kept of what is read"), another("cache_dir"))
        }
        Disk::Room(_, text) => Finding::good("cache_dir", text),
    };
    let mut found = vec![cache];
    if !config.mount.ro {
        found.push(match disk("spool_dir", &config.spool_dir, floor) {
            Disk::Wrong(finding) => finding,
            Disk::Room(0, text) => Finding::bad("spool_dir", format!("{text}: nothing can be written"), another("spool_dir")),
            Disk::Room(usable, text) if usable < LITTLE => {
                Finding::note("spool_dir", format!("{text}: no file larger than that can be written"), another("spool_dir"))
            }
            Disk::Room(_, text) => Finding::good("spool_dir", text),
        });
    }
    if let Disk::Wrong(finding) = disk("state", &config.state_dir, 0) {
        found.push(Finding { remedy: Some("make it writable, or name another place with XDG_STATE_HOME".to_owned()), ..finding });
    }
    found
}

/// Less than this is worth a word.
const LITTLE: u64 = 1 << 30;

fn another(check: &str) -> String {
    format!("free some room, or name a directory on another disk with {check}=")
}

enum Disk {
    Wrong(Finding),
    /// So many bytes above the floor, and that in words.
    Room(u64, String),
}

/// Where a directory is, or will be made.
fn disk(check: &'static str, dir: &Path, floor: u64) -> Disk {
    let Some(there) = dir.ancestors().find(|path| path.exists()) else {
        return Disk::Wrong(Finding::bad(check, format!("{}: no such disk", dir.display()), format!("name another with {check}=")));
    };
    if !there.is_dir() {
        let found = format!("{}: {} is not a directory", dir.display(), there.display());
        return Disk::Wrong(Finding::bad(check, found, format!("name another with {check}=")));
    }
    if access(there, AccessFlags::W_OK | AccessFlags::X_OK).is_err() {
        let remedy = format!("make {} writable for whoever mounts, or name another directory with {check}=", there.display());
        return Disk::Wrong(Finding::bad(check, format!("{}: may not be written to", dir.display()), remedy));
    }
    let usable = resolve::disk(there).1.saturating_sub(floor);
    let shown = |bytes| ByteSize::b(bytes).display().iec();
    Disk::Room(usable, format!("{}: {} are free above min_free_space ({})", dir.display(), shown(usable), shown(floor)))
}

/// Name, connection (TLS included) and clock; false where nothing more can be asked.
pub(super) async fn network(config: &Config, client: &Client, bucket: Option<&str>, tell: &mut Tell<'_>) -> bool {
    let url = match client.url_of(bucket) {
        Ok(url) => url,
        Err(error) => {
            tell(Finding::refused("source", Verdict::Bad, &error));
            return false;
        }
    };
    let (host, port) = (url.host_str().unwrap_or_default().to_owned(), url.port_or_known_default().unwrap_or(443));
    if let Some(proxy) = &config.client.proxy {
        tell(Finding::good("name", format!("{host} is the proxy's to resolve ({})", proxy.host_str().unwrap_or_default())));
    } else {
        // What the environment names as a proxy may know a name that this machine does not: the connection decides.
        tell(resolve(&host, port).await);
    }
    let before = SystemTime::now();
    match client.clock(bucket).await {
        Err(error) => {
            tell(Finding::refused("connection", Verdict::Bad, &error));
            false
        }
        Ok(theirs) => {
            let how = match (url.scheme(), config.client.no_check_certificate) {
                ("https", false) => "over TLS, with a certificate that is trusted here",
                ("https", true) => "over TLS; anybody may answer, because no_check_certificate takes every certificate",
                _ => "without TLS: who listens in on the way reads all of it",
            };
            tell(Finding::good("connection", format!("{host} port {port} answers, {how}")));
            let clock = clock(theirs, before);
            // What is not signed has no time in it.
            let unsigned = config.client.no_sign_request && clock.verdict == Verdict::Bad;
            tell(if unsigned { Finding { verdict: Verdict::Note, ..clock } } else { clock });
            true
        }
    }
}

async fn resolve(host: &str, port: u16) -> Finding {
    let remedy = "check the spelling of endpoint_url and bucket, /etc/resolv.conf, and the network";
    match tokio::time::timeout(RESOLVE_MOST, tokio::net::lookup_host((host.trim_matches(['[', ']']), port))).await {
        Ok(Ok(addresses)) => {
            let shown: Vec<String> = addresses.map(|address: SocketAddr| address.ip().to_string()).take(3).collect();
            Finding::good("name", format!("{host} is {}", shown.join(", ")))
        }
        Ok(Err(error)) => Finding::note("name", format!("{host} cannot be resolved ({error})"), remedy),
        Err(_) => Finding::note("name", format!("{host} is not resolved within {} s", RESOLVE_MOST.as_secs()), remedy),
    }
}

fn clock(theirs: Option<SystemTime>, ours: SystemTime) -> Finding {
    let Some(theirs) = theirs else { return Finding::aside("clock", "the store does not tell the time") };
    let (off, word) = match ours.duration_since(theirs) {
        Ok(ahead) => (ahead, "ahead of"),
        Err(behind) => (behind.duration(), "behind"),
    };
    let shown = humantime::format_duration(Duration::from_secs(off.as_secs()));
    let text = format!("this machine's is {shown} {word} the store's");
    let remedy = "set it: timedatectl set-ntp true";
    if off >= SKEW_MOST {
        Finding::bad("clock", text + ", and S3 refuses requests from 15 minutes on", remedy)
    } else if off >= SKEW_NOTED {
        Finding::note("clock", text, remedy)
    } else {
        Finding::good("clock", "agrees with the store's")
    }
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_judged() {
        let now = SystemTime::now();
        let verdict = |theirs| clock(Some(theirs), now).verdict;
        assert_eq!(verdict(now - Duration::from_secs(2)), Verdict::Good);
        assert_eq!(verdict(now + Duration::from_secs(100)), Verdict::Note);
        let far = clock(Some(now - Duration::from_secs(3600)), now);
        assert_eq!((far.verdict, far.found.contains("1h ahead of")), (Verdict::Bad, true), "{far}");
        assert_eq!(clock(None, now).verdict, Verdict::Note);
    }

    #[test]
    fn a_disk_that_cannot_be_used_is_named() {
        let Disk::Wrong(file) = disk("spool_dir", &Path::new("/proc/self/status").join("spool"), 0) else {
            panic!("a file is no directory")
        };
        assert!(file.verdict == Verdict::Bad && file.found.contains("is not a directory"), "{file}");
        let Disk::Room(usable, text) = disk("spool_dir", &std::env::temp_dir().join("packmule-not-there/spool"), u64::MAX) else {
            panic!("a directory that can be made")
        };
        assert!(usable == 0 && text.contains("packmule-not-there/spool: 0 B are free"), "{text}");
    }

    #[test]
    fn root_without_the_right_to_mount_is_told_so() {
        let status = |mask: &str| may_mount(&format!("Name:\tx\nCapEff:\t{mask}\n")).verdict;
        assert_eq!((status("00000000a80425fb"), status("000001ffffffffff")), (Verdict::Bad, Verdict::Good));
    }
}
