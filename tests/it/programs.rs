//! Ordinary programs at their work: each on a local folder and on a mount, then compared with each other, with the
//! bucket, and after a remount.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::double::{Double, Object};
use crate::support::files::{self, Content, Node, assert_same, sh, tree, without_times};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

/// Something to work with: files of all sizes, folders, links, modes and old times.
fn material(dir: &Path) -> PathBuf {
    let source = dir.join("source");
    std::fs::create_dir_all(source.join("sub/empty")).unwrap();
    for (index, size) in [0, 1, 4095, 70_000, 1 << 20, 9 << 20].into_iter().enumerate() {
        let name = source.join(["sub", ""][index % 2]).join(format!("file {index}.dat"));
        std::fs::write(name, files::noise(index as u64, size)).unwrap();
    }
    sh(
        &source,
        "echo '#!/bin/sh' > run.sh; chmod 755 run.sh; echo secret > private; chmod 600 private
         ln -s 'file 3.dat' link; ln -s ../run.sh sub/up; ln -s nowhere dangling
         find . -exec touch -h -d '2019-05-06 07:08:09 UTC' {} +",
    );
    source
}

/// What the bucket holds of files and links, keys as paths.
fn in_bucket(store: &Store, nodes: &BTreeMap<PathBuf, Node>) {
    for (path, node) in nodes {
        let key = path.to_str().unwrap();
        match &node.content {
            Content::File(bytes) => assert!(store.bytes(key) == *bytes, "{key} differs in the bucket"),
            Content::Link(target) => assert_eq!(store.bytes(key), target.to_str().unwrap().as_bytes(), "{key}"),
            Content::Folder => {}
        }
    }
    assert_eq!(store.unfinished_uploads(), Vec::<String>::new());
}

/// Runs a script in a local folder and in the mount; `$S` is the material. Everything must be alike, and stay.
fn alike(store: Store, times_too: bool, script: &str) {
    let local = tempfile::Builder::new().prefix("packmule-local-").tempdir().unwrap();
    let source = material(local.path());
    let work = local.path().join("work");
    std::fs::create_dir(&work).unwrap();
    let script = format!("umask 022; S='{}'\n{script}", source.display());
    sh(&work, &script);
    let mut stage = Stage::new(store);
    sh(stage.dir(), &script);
    let look = |dir: &Path| if times_too { tree(dir) } else { without_times(tree(dir)) };
    let expected = look(&work);
    assert_same(&expected, &look(stage.dir()), "local and mounted");
    stage.mount.remount();
    assert_same(&expected, &look(stage.dir()), "local and remounted");
    in_bucket(&stage.store, &expected);
    stage.mount.umount();
}

/// A server of plain files with ranges, for wget: the double, with a link.
fn served(bytes: &[u8]) -> Double {
    let double = Double::start(&["web"]);
    double.put_object("web", "file.iso", Object::new(bytes.to_vec()));
    double
}

on_every_store! {
    /// Promise 29: "They survive a remount, `cp -a`, `rsync -a`, `tar x`, `git clone`."
    fn cp_keeps_everything(store) {
        alike(store, true, "cp -a \"$S\" copy; cp -r \"$S/sub\" plain; touch -h -d @1557126489 plain plain/*; cp -a copy/private again");
    }

    /// rsync -a; "a second run sends nothing"
    fn rsync_sends_once(store) {
        alike(
            store,
            true,
            "rsync -a \"$S/\" copy/
             sent=$(rsync -ai \"$S/\" copy/ | grep -v '/$' || true); [ -z \"$sent\" ] || { echo \"sent again: $sent\"; exit 1; }",
        );
    }

    /// After a remount rsync still finds nothing to send.
    fn rsync_after_a_remount(store) {
        let local = tempfile::tempdir().unwrap();
        let source = material(local.path());
        let mut stage = Stage::new(store);
        files::run(stage.dir(), "rsync", &["-a", &format!("{}/", source.display()), "copy/"]);
        stage.mount.remount();
        let sent = files::run(stage.dir(), "rsync", &["-ai", &format!("{}/", source.display()), "copy/"]);
        let files_sent: Vec<_> = sent.lines().filter(|line| !line.ends_with('/')).collect();
        assert_eq!(files_sent, Vec::<&str>::new());
    }

    /// tar x, and tar c of what was unpacked.
    fn tar_unpacks(store) {
        alike(
            store,
            true,
            "tar -C \"$S\" -cf \"$S/../in.$$.tar\" sub run.sh private link dangling; mkdir out; tar -C out -xpf \"$S/../in.$$.tar\"
             tar -C out -cf - . | tar -tf - | sort > \"$S/../listing.$$\"; rm \"$S/../in.$$.tar\"; grep -q sub/up \"$S/../listing.$$\"",
        );
    }

    /// zip and unzip.
    fn unzip_unpacks(store) {
        alike(store, true, "(cd \"$S\" && zip -qry - . ) > archive.zip; TZ=UTC unzip -q archive.zip -d out; find out -type l -exec touch -h -d @1557126489 {} +; unzip -tq archive.zip; rm archive.zip");
    }

    /// git clone, change, commit, gc, fsck.
    fn git_works(store) {
        alike(
            store,
            false,
            "export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
             export GIT_AUTHOR_DATE='2020-01-01T00:00:00Z' GIT_COMMITTER_DATE='2020-01-01T00:00:00Z'
             if [ ! -d \"$S/../origin\" ]; then cp -a \"$S\" \"$S/../origin\"; (cd \"$S/../origin\"; git init -q -b main; git add .; git commit -qm first); fi
             git clone -q \"$S/../origin\" clone; cd clone; echo more >> run.sh; git rm -q private; git add -A; git commit -qm second
             git gc -q; git fsck --full --strict; git status --porcelain > status; [ \"$(cat status)\" = '?? status' ]; rm status
             git log --oneline | wc -l | grep -qx 2; git cat-file -p HEAD:run.sh > shown; rm -rf .git",
        );
    }

    /// sqlite: transactions, an index, a rollback, vacuum, integrity.
    fn sqlite_works(store) {
        alike(
            store,
            false,
            "sqlite3 db 'create table t(a integer primary key, b text); begin; with recursive n(i) as (select 1 union all select i+1 from n where i<5000) insert into t select i, hex(i*i) from n; commit; create index x on t(b);'
             sqlite3 db 'begin; delete from t; rollback; update t set b=b||b where a%7=0; delete from t where a%11=0; vacuum;'
             [ \"$(sqlite3 db 'pragma integrity_check')\" = ok ]; sqlite3 db 'select count(*), sum(length(b)) from t' > result; sqlite3 db .dump > dump; rm db",
        );
    }

    /// gcc: compile, link, run from the mount.
    fn gcc_works(store) {
        alike(
            store,
            false,
            "printf '#include <stdio.h>\\nint f(void);int main(void){printf(\"%%d\\\\n\",f());return 0;}\\n' > main.c; printf 'int f(void){return 42;}\\n' > f.c
             gcc -c main.c; gcc -c f.c; ar rcD libf.a f.o; gcc -o prog main.o -L. -lf; ./prog > out; grep -qx 42 out; strip prog",
        );
    }

    /// sed -i.
    fn sed_edits_in_place(store) {
        alike(store, false, "cp \"$S/run.sh\" .; seq 20000 > numbers; sed -i 's/^1/one/' numbers run.sh; sed -i.bak 2d numbers");
    }

    /// An editor's save with a backup: write a new file, rename the old to a backup, rename the new over it.
    fn an_editor_saves_with_backup(store) {
        alike(
            store,
            false,
            "echo first > doc.txt; for round in 1 2 3; do cp -p doc.txt doc.txt~; echo round $round >> doc.txt; done
             cat doc.txt > .doc.txt.swp; echo more >> .doc.txt.swp; mv doc.txt doc.txt~; mv .doc.txt.swp doc.txt; sync doc.txt
             printf 'a\\nb\\n' > v.txt; vi -es -u NONE -c 'set backup writebackup' -c '%s/a/A/' -c wq v.txt || ed -s v.txt <<E
,s/a/A/
w
E
             rm -f v.txt~; grep -qx A v.txt",
        );
    }

    /// Several processes append to one file: no line is lost or torn.
    fn several_processes_append(store) {
        let mut stage = Stage::new(store);
        sh(stage.dir(), "for p in 1 2 3 4; do (for i in $(seq 50); do echo \"process $p line $i\" >> log; done) & done; wait");
        let mut expected: Vec<String> = (1..=4).flat_map(|p| (1..=50).map(move |i| format!("process {p} line {i}"))).collect();
        expected.sort();
        let sorted = |text: &[u8]| {
            let mut lines: Vec<String> = String::from_utf8(text.to_vec()).unwrap().lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&std::fs::read(stage.path("log")).unwrap()), expected);
        assert_eq!(sorted(&stage.store.bytes("log")), expected);
        stage.mount.remount();
        assert_eq!(sorted(&std::fs::read(stage.path("log")).unwrap()), expected);
    }

    /// wget -c goes on where a download ended.
    fn wget_continues(store) {
        let bytes = files::noise(77, 12 << 20);
        let web = served(&bytes);
        let mut stage = Stage::new(store);
        std::fs::write(stage.path("file.iso"), &bytes[..5_000_000]).unwrap();
        let home = stage.store.home().to_owned();
        let link = crate::support::client::block_on(async {
            let elsewhere = crate::support::client::connect_to(&web, &home);
            elsewhere.bucket.presign_get("file.iso", 600, &[]).await.unwrap()
        });
        files::output(Command::new("wget").args(["-q", "--no-proxy", "-c", "-O", "file.iso", &link]).current_dir(stage.dir()));
        assert!(std::fs::read(stage.path("file.iso")).unwrap() == bytes);
        assert!(stage.store.bytes("file.iso") == bytes);
        assert!(web.requests().bytes_down < 8 << 20, "wget began again from the start");
        stage.mount.remount();
        assert!(std::fs::read(stage.path("file.iso")).unwrap() == bytes);
    }

    /// Shell redirections of every kind.
    fn shells_redirect(store) {
        alike(
            store,
            false,
            "echo a > f; echo b >> f; cat < f > g; cat f g > h; : > empty; echo x | tee t1 t2 > /dev/null; (echo 1; echo 2 >&2) > both 2>&1
             head -c 3000000 \"$S/file 5.dat\" > part; dd if=\"$S/file 5.dat\" of=dd bs=100000 skip=3 seek=7 count=20 2>/dev/null; split -n 4 part piece; cat piece* | cmp - part; sort -o f f",
        );
    }

    /// find -delete, mv between folders, cp -u, install, ln -sf, mkdir -p, rm -rf.
    fn housekeeping(store) {
        alike(
            store,
            false,
            "cp -a \"$S\" a; mkdir -p x/y/z; mv a/sub x/y/; mv a b; install -m 640 b/private x/installed; ln -sf y/sub x/link; ln -sfn z x/link
             find x -name '*.dat' -size -2 -delete; cp -u b/run.sh x/; rm -rf b; rmdir x/y/z || true; mkdir x/y/z; mv -T x/y q",
        );
    }
}
