//! FUSE passthrough: a large file that the cache has whole and proved is read by the kernel itself, without a word to the mount.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::double::{Fault, When};
use crate::support::files::{self, close, noise, sh};
use crate::support::mount::{Mount, can_mount};
use crate::support::stage::Stage;
use crate::support::store::Store;

const MIB: usize = 1 << 20;

/// Root, on a kernel that has it (since 6.9), with a cache on no stacked filesystem.
fn is_possible(mount: &Mount) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut parts = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let root = nix::unistd::geteuid().is_root();
    let stacked = matches!(nix::sys::statfs::statfs(mount.home()).unwrap().filesystem_type().0, 0x794c_7630);
    let possible = root && version >= (6, 9) && !stacked;
    // A kernel may be built without it: then it says so to the mount.
    possible && !mount.log().contains("does not read cache files by itself")
}

/// Reads a whole file while the mount's process stands still; false where that needs it.
fn reads_without_us(mount: &Mount, file: &File, content: &[u8]) -> bool {
    let file = file.try_clone().unwrap();
    // Not from pages that the kernel kept.
    files::sh(mount.home(), "sync; echo 1 > /proc/sys/vm/drop_caches");
    let pid = Pid::from_raw(mount.pid() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    let (tell, told) = mpsc::channel();
    let length = content.len();
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; length];
        let read = file.read_exact_at(&mut bytes, 0);
        let _ = tell.send(());
        read.map(|()| bytes)
    });
    let alone = told.recv_timeout(Duration::from_secs(2)).is_ok();
    kill(pid, Signal::SIGCONT).unwrap();
    assert!(reader.join().unwrap().unwrap() == content);
    alone
}

fn read_all(stage: &Stage, name: &str, content: &[u8]) {
    assert!(fs::read(stage.path(name)).unwrap() == content, "{name}");
}

/// The file, passed through: one that was written here a moment ago is summed first.
fn passed(stage: &Stage, name: &str, content: &[u8]) -> File {
    for _ in 0..10 {
        read_all(stage, name, content);
        let file = File::open(stage.path(name)).unwrap();
        if reads_without_us(&stage.mount, &file, content) {
            return file;
        }
    }
    panic!("{name} is not passed through");
}

/// What `packmule cache empty` says.
fn empty(stage: &Stage) -> String {
    let said = files::output(stage.mount.command().args(["cache", "empty"]).arg(stage.dir()));
    assert!(said.status.success(), "{said:?}");
    String::from_utf8_lossy(&said.stdout).into_owned()
}

fn stage() -> Option<(Stage, Vec<u8>)> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    let content = noise(1, 9 * MIB);
    store.put("setup.exe", content.clone());
    Some((Stage::new(store), content))
}

/// Promise 16: "A file of 8 MiB and more that is on this machine whole, all of whose blocks were fetched or compared since the mount, is
/// read by the kernel itself"
#[test]
fn a_proved_file_is_read_by_the_kernel_itself() {
    let Some((mut stage, content)) = stage() else { return };
    read_all(&stage, "setup.exe", &content);
    let file = File::open(stage.path("setup.exe")).unwrap();
    let possible = is_possible(&stage.mount);
    assert_eq!(reads_without_us(&stage.mount, &file, &content), possible);
    drop(file);

    // After a remount nothing is proved before it was read once.
    stage.mount.remount();
    let file = File::open(stage.path("setup.exe")).unwrap();
    assert!(!reads_without_us(&stage.mount, &file, &content));
    drop(file);
    let file = File::open(stage.path("setup.exe")).unwrap();
    assert_eq!(reads_without_us(&stage.mount, &file, &content), possible);
    // It is being read: it stays.
    empty(&stage);
    assert_eq!(reads_without_us(&stage.mount, &file, &content), possible);
    if possible {
        drop(file);
        stage.double().reset_requests();
        read_all(&stage, "setup.exe", &content);
        assert_eq!(stage.double().requests().of("GetObject"), 0);
        // Nobody reads it any more: the last close reaches the mount a moment after it.
        stage.store.eventually("it goes", |_| empty(&stage).contains("in 0 files, 0 of them whole"));
    }
}

/// Others that nobody reads go first, however recently they were read.
#[test]
fn a_passed_file_is_not_evicted_before_idle_ones() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let content = noise(1, 9 * MIB);
    store.put("setup.exe", content.clone());
    (0..6).for_each(|n| store.put(&format!("many/{n}"), noise(n, 8 * MIB)));
    let stage = Stage::with(store, &["cache_size=24M"]);
    read_all(&stage, "setup.exe", &content);
    if !is_possible(&stage.mount) {
        return;
    }
    let file = passed(&stage, "setup.exe", &content);
    (0..6).for_each(|n| read_all(&stage, &format!("many/{n}"), &noise(n, 8 * MIB)));
    assert!(reads_without_us(&stage.mount, &file, &content));
    drop(file);
    stage.double().reset_requests();
    read_all(&stage, "setup.exe", &content);
    assert_eq!(stage.double().requests().of("GetObject"), 0);
}

/// Promise 16: "who has it open reads on what it opened, even where this mount changes the file"
#[test]
fn who_writes_gets_another_inode() {
    let Some((stage, content)) = stage() else { return };
    if !is_possible(&stage.mount) {
        return;
    }
    let old = passed(&stage, "setup.exe", &content);
    // By every way to write.
    let writer = OpenOptions::new().write(true).open(stage.path("setup.exe")).unwrap();
    writer.write_all_at(b"new", 0).unwrap();
    close(writer).unwrap();
    let changed = [b"new", &content[3..]].concat();
    assert!(stage.store.bytes("setup.exe") == changed);
    read_all(&stage, "setup.exe", &changed);
    assert!(reads_without_us(&stage.mount, &old, &content), "who has it open reads on what it opened");

    let second = passed(&stage, "setup.exe", &changed);
    nix::unistd::truncate(&stage.path("setup.exe"), 5).unwrap();
    assert_eq!(stage.store.bytes("setup.exe"), changed[..5]);
    assert_eq!(fs::read(stage.path("setup.exe")).unwrap(), changed[..5]);
    assert!(reads_without_us(&stage.mount, &second, &changed));

    files::write(&stage.path("setup.exe"), &content).unwrap();
    let third = passed(&stage, "setup.exe", &content);
    files::write(&stage.path("setup.exe"), b"short").unwrap();
    assert_eq!(stage.store.bytes("setup.exe"), "short");
    assert_eq!(fs::read(stage.path("setup.exe")).unwrap(), b"short");
    assert!(reads_without_us(&stage.mount, &third, &content));
    // Gone and renamed names, too.
    files::write(&stage.path("setup.exe"), &content).unwrap();
    let fourth = passed(&stage, "setup.exe", &content);
    fs::rename(stage.path("setup.exe"), stage.path("other.exe")).unwrap();
    read_all(&stage, "other.exe", &content);
    fs::remove_file(stage.path("other.exe")).unwrap();
    assert!(reads_without_us(&stage.mount, &fourth, &content));
    assert_eq!(stage.store.keys(), Vec::<String>::new());
}

/// truncate(2) has no handle: who opens the file while it waits for the store does not keep the old content for everybody.
#[test]
fn a_truncation_is_seen_by_who_opened_meanwhile() {
    let Some((stage, content)) = stage() else { return };
    read_all(&stage, "setup.exe", &content);
    std::thread::sleep(Duration::from_millis(1200));
    stage.double().fault(When::operation("HeadObject"), Fault::Delay(Duration::from_millis(600)));
    std::thread::scope(|scope| {
        let truncates = scope.spawn(|| nix::unistd::truncate(&stage.path("setup.exe"), 5).unwrap());
        std::thread::sleep(Duration::from_millis(200));
        let meanwhile = File::open(stage.path("setup.exe")).unwrap();
        truncates.join().unwrap();
        assert_eq!(fs::read(stage.path("setup.exe")).unwrap(), content[..5]);
        drop(meanwhile);
    });
    assert_eq!(stage.store.bytes("setup.exe"), content[..5]);
}

/// The kernel fails an open with EIO that mixes the two ways to read on one inode: readers, writers and mappings at random.
#[test]
fn opens_of_both_kinds_never_fail() {
    let Some((stage, content)) = stage() else { return };
    let until = Instant::now() + Duration::from_secs(8);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for lane in 0..3 {
            let (stage, over) = (&stage, &over);
            scope.spawn(move || {
                let mut turn = lane;
                while !over.load(Ordering::Relaxed) {
                    turn += 1;
                    let file = File::open(stage.path("setup.exe")).unwrap_or_else(|error| panic!("open: {error}"));
                    let mut bytes = vec![0; 9 * MIB];
                    let from = if turn % 3 == 0 { 8 * MIB } else { 0 };
                    // Replaced meanwhile, and not to be had any more: ESTALE, and no other bytes.
                    match file.read_exact_at(&mut bytes[from..], from as u64) {
                        Ok(()) => assert!(bytes[from..].iter().zip(&noise(1, 9 * MIB)[from..]).skip(8).all(|(one, other)| one == other)),
                        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ESTALE), "{error}"),
                    }
                }
            });
        }
        let stage = &stage;
        for turn in 0_u64.. {
            if Instant::now() > until {
                break;
            }
            std::thread::sleep(Duration::from_millis(150));
            let writer = OpenOptions::new().read(true).write(true).open(stage.path("setup.exe")).unwrap();
            writer.write_all_at(&turn.to_le_bytes(), 0).unwrap();
            close(writer).unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(stage.store.bytes("setup.exe")[8..], content[8..]);
    sh(stage.dir(), "cmp setup.exe setup.exe");
}
