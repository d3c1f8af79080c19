//! Reading: promises 14 to 17.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;

use crate::support::files::{self, close, noise, sh};
use crate::support::stage::{Stage, on_every_store};

const MIB: usize = 1 << 20;

on_every_store! {
    /// Whole files and pieces of them, at any offset, short only at the end.
    fn reads_whole_and_in_pieces(store) {
        let bytes = noise(1, 13 * MIB + 5);
        store.put("dir/f", bytes.clone());
        store.put("empty", "");
        let stage = Stage::new(store);
        assert!(fs::read(stage.path("dir/f")).unwrap() == bytes);
        assert_eq!(fs::read(stage.path("empty")).unwrap(), b"");
        let file = File::open(stage.path("dir/f")).unwrap();
        for (at, len) in [(0, 1), (MIB - 1, 2), (8 * MIB - 3, 100_000), (5, 3 * MIB), (13 * MIB, 5)] {
            let mut piece = vec![0; len];
            file.read_exact_at(&mut piece, at as u64).unwrap();
            assert!(piece == bytes[at..at + len], "{len} bytes at {at}");
        }
        let mut past = [0; 10];
        assert_eq!(file.read_at(&mut past, 13 * MIB as u64).unwrap(), 5);
        assert_eq!(file.read_at(&mut past, 14 * MIB as u64).unwrap(), 0);
    }

    /// Promise 14: "Read after write, and after close everywhere."
    fn another_mount_reads_after_close(store) {
        let one = Stage::new(store);
        files::write(&one.path("f"), b"first").unwrap();
        let two = crate::support::mount::Mount::start(crate::support::mount::Setup::of(&one.store));
        assert_eq!(fs::read(two.path("f")).unwrap(), b"first");
        files::write(&one.path("f"), b"second, longer").unwrap();
        // "A first open of a file listed or fetched within the last second asks nothing more."
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert_eq!(fs::read(two.path("f")).unwrap(), b"second, longer", "open() sees it at once");
    }

    /// Promise 14: "Another client's change is seen within `metadata_ttl` (5 s), and at once by open()"
    fn another_client_s_change_is_seen(store) {
        store.put("f", "old");
        let stage = Stage::with(store, &["metadata_ttl=1s"]);
        assert_eq!(fs::read(stage.path("f")).unwrap(), b"old");
        std::thread::sleep(std::time::Duration::from_millis(1100));
        stage.store.put("f", "changed by others");
        stage.store.put("g", "new");
        assert_eq!(fs::read(stage.path("f")).unwrap(), b"changed by others");
        std::thread::sleep(std::time::Duration::from_millis(1500));
        assert_eq!(fs::metadata(stage.path("f")).unwrap().len(), 17);
        assert_eq!(files::names(stage.dir()), ["f", "g"]);
        stage.store.delete("g");
        std::thread::sleep(std::time::Duration::from_millis(1500));
        assert_eq!(files::names(stage.dir()), ["f"]);
        assert!(!stage.path("g").exists());
    }

    /// mmap reads, SEEK_END, and many readers at once.
    fn many_readers_and_mmap(store) {
        let bytes = noise(2, 9 * MIB);
        store.put("f", bytes.clone());
        let stage = Stage::new(store);
        std::thread::scope(|scope| {
            for start in 0..6_usize {
                let (stage, bytes) = (&stage, &bytes);
                scope.spawn(move || {
                    let mut file = File::open(stage.path("f")).unwrap();
                    let at = start * MIB + 17;
                    file.seek(SeekFrom::Start(at as u64)).unwrap();
                    let mut piece = vec![0; 2 * MIB];
                    file.read_exact(&mut piece).unwrap();
                    assert!(piece == bytes[at..at + 2 * MIB]);
                });
            }
        });
        let script = "import mmap,hashlib\nf=open('f','rb')\nm=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\nprint(hashlib.md5(m).hexdigest())";
        assert_eq!(files::run(stage.dir(), "python3", &["-c", script]).trim(), crate::support::double::md5(&bytes));
    }

    /// Promise 7: "Only changed parts travel; the rest is copied inside S3."
    fn changes_in_the_middle(store) {
        let mut bytes = noise(3, 20 * MIB);
        store.put("big", bytes.clone());
        store.put("small", "0123456789");
        let stage = Stage::new(store);
        let big = files::open_existing(&stage.path("big"));
        big.write_all_at(&[0xee; 300], 9_999_999).unwrap();
        bytes[9_999_999..10_000_299].fill(0xee);
        let mut around = vec![0; 1000];
        big.read_exact_at(&mut around, 9_999_500).unwrap();
        assert!(around == bytes[9_999_500..10_000_500], "own changes amid the object's bytes");
        close(big).unwrap();
        assert!(stage.store.bytes("big") == bytes);
        let small = files::open_existing(&stage.path("small"));
        small.write_all_at(b"XY", 4).unwrap();
        close(small).unwrap();
        assert_eq!(stage.store.bytes("small"), "0123XY6789");
        let mut longer = OpenOptions::new().append(true).open(stage.path("big")).unwrap();
        std::io::Write::write_all(&mut longer, b"tail").unwrap();
        close(longer).unwrap();
        bytes.extend_from_slice(b"tail");
        assert!(stage.store.bytes("big") == bytes);
        assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    }

    /// Copies inside the mount, by whatever call cp chooses.
    fn copies_inside_the_mount(store) {
        let bytes = noise(4, 17 * MIB);
        store.put("a", bytes.clone());
        let stage = Stage::new(store);
        sh(stage.dir(), "cp a b; mkdir d; cp b d/; cat a > c; cmp a b; cmp b c; cmp c d/b");
        for key in ["b", "c", "d/b"] {
            assert!(stage.store.bytes(key) == bytes, "{key}");
        }
    }

    /// A mount of a prefix shows what is below it, and writes there.
    fn a_prefix_of_a_bucket(store) {
        store.put("site/index.html", "<p>");
        store.put("elsewhere", "no");
        let setup = crate::support::mount::Setup::of(&store);
        let source = format!("{}/site/", setup.source);
        let mount = crate::support::mount::Mount::start(setup.source(&source));
        assert_eq!(files::names(mount.dir()), ["index.html"]);
        files::write(&mount.path("style.css"), b"p{}").unwrap();
        assert_eq!(store.keys(), ["elsewhere", "site/index.html", "site/style.css"]);
    }
}
