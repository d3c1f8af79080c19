use super::*;

fn child(table: &mut Table, name: &str, kind: Kind, since: Option<Instant>) -> Ino {
    let mut node = Node::new(ROOT, name.into(), name.to_owned(), kind, SystemTime::now());
    node.since = since;
    table.insert(node)
}

#[test]
fn a_name_newer_than_the_listing_is_not_forgotten_as_absent() {
    let mut table = Table::new(SystemTime::now(), 256 << 20);
    table.install(ROOT, Arc::new(Listing::empty(Instant::now())));
    let known = child(&mut table, "known", Kind::File, None);
    let new = child(&mut table, "new", Kind::File, Some(Instant::now()));
    table.forget(known, 1);
    table.forget(new, 1);
    assert!(table.get(known).is_none(), "the listing speaks of it");
    assert!(table.get(new).is_some(), "the listing says that it is absent");
    table.install(ROOT, Arc::new(Listing::empty(Instant::now())));
    assert!(table.get(new).is_none(), "a newer listing speaks of it");
}

#[test]
fn links_of_a_directory_count_its_subdirectories() {
    let mut table = Table::new(SystemTime::now(), 256 << 20);
    let links = |table: &Table| table.links(table.get(ROOT).unwrap());
    assert_eq!(links(&table), 1, "not known");
    table.install(ROOT, Arc::new(Listing::empty(Instant::now())));
    assert_eq!(links(&table), 2);
    child(&mut table, "file", Kind::File, Some(Instant::now()));
    child(&mut table, "dir", Kind::Directory, Some(Instant::now()));
    assert_eq!(links(&table), 3);
    table.unlink(ROOT, OsStr::new("dir"));
    assert_eq!(links(&table), 2);
}
