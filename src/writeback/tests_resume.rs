//! What the store has of an interrupted upload is not sent again.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;

use super::tests::{MIB, World, pattern, until, write_all};
use super::tests_durable::{crash, run};
use super::*;
use crate::s3::ErrorKind;

/// A store whose ETags are MD5s, or not.
fn world(opaque: bool) -> World {
    let world = World::new();
    world.store.opaque.store(opaque, Relaxed);
    world
}

/// Queued, so that no writer is held back by a store that takes nothing more.
async fn open_queue(world: &World) -> Writeback {
    world.open_with(|config| config.write_back = Duration::from_millis(1)).await
}

/// From now on the store takes so many parts and no more, and what `refused` names not at all.
fn take(world: &World, mut parts: u32, refused: &'static [&'static str]) {
    world.store.fail(move |op, _| match op {
        "Part" if parts > 0 => {
            parts -= 1;
            None
        }
        "Part" => Some(ErrorKind::Network),
        op => refused.contains(&op).then_some(ErrorKind::Network),
    });
}

fn arrived(world: &World) -> usize {
    world.store.inner.lock().uploads.values().map(|upload| upload.parts.len()).sum()
}

/// Opens the spool and waits until all of it is in S3; how often parts were sent and copied.
fn resumed(world: &World, key: &str, expected: &[u8]) -> (usize, usize) {
    run(async {
        let writeback = world.open().await;
        until(|| world.files().is_empty() && world.nothing_pending() && writeback.status().is_empty()).await;
        assert!(world.bytes(key) == expected);
    });
    (world.store.count("Part"), world.store.count("PartCopy"))
}

#[test]
fn parts_that_arrived_are_known_by_etag_or_checksum() {
    for opaque in [false, true] {
        let world = crash(world(opaque), |world| async move {
            let writeback = open_queue(&world).await;
            take(&world, 2, &[]);
            let staged = world.new_file(&writeback, "a").await;
            write_all(&staged, &pattern(30 * MIB, 0)).await;
            staged.publish().await.unwrap();
            until(|| arrived(&world) == 2).await;
        });
        assert_eq!(resumed(&world, "a", &pattern(30 * MIB, 0)), (2, 0), "opaque: {opaque}");
        assert_eq!(world.store.count("Create"), 0);
    }
}

#[test]
fn a_part_of_the_right_size_and_other_bytes_is_sent_again() {
    for opaque in [false, true] {
        let world = crash(world(opaque), |world| async move {
            let writeback = open_queue(&world).await;
            take(&world, 4, &["Complete"]);
            let staged = world.new_file(&writeback, "a").await;
            write_all(&staged, &pattern(30 * MIB, 0)).await;
            staged.publish().await.unwrap();
            until(|| world.store.count("Complete") > 0).await;
        });
        let other = pattern(8 * MIB, 9);
        let upload = world.store.inner.lock().uploads.keys().next().unwrap().clone();
        world.store.part(&upload, 2, other).unwrap();
        assert_eq!(resumed(&world, "a", &pattern(30 * MIB, 0)), (1, 0), "opaque: {opaque}");
    }
}

/// An object of 64 MiB that is changed in two places: two parts are sent, three are copied.
async fn change_two_places(world: &World, writeback: &Writeback) {
    let staged = world.existing(writeback, "o").await;
    for at in [10, 40] {
        staged.write(at * MIB as u64, pattern(MIB, 7)).await.unwrap();
    }
    staged.publish().await.unwrap();
}

fn changed_in_two_places() -> Vec<u8> {
    let mut bytes = pattern(64 * MIB, 1).to_vec();
    for at in [10, 40] {
        bytes[at * MIB..(at + 1) * MIB].copy_from_slice(&pattern(MIB, 7));
    }
    bytes
}

#[test]
fn changed_parts_of_an_object_that_arrived_are_not_sent_again() {
    for opaque in [false, true] {
        let world = world(opaque);
        world.store.put_bytes("o", pattern(64 * MIB, 1));
        let world = crash(world, |world| async move {
            let writeback = open_queue(&world).await;
            take(&world, 2, &["PartCopy"]);
            change_two_places(&world, &writeback).await;
            until(|| arrived(&world) == 2).await;
        });
        assert_eq!(resumed(&world, "o", &changed_in_two_places()), (0, 3), "opaque: {opaque}");
    }
}

#[test]
fn copied_parts_are_known_by_what_complete_was_sent_with() {
    for opaque in [false, true] {
        let world = world(opaque);
        world.store.put_bytes("o", pattern(64 * MIB, 1));
        let world = crash(world, |world| async move {
            let writeback = open_queue(&world).await;
            take(&world, 2, &["Complete"]);
            change_two_places(&world, &writeback).await;
            until(|| world.store.count("Complete") > 0).await;
        });
        assert_eq!(resumed(&world, "o", &changed_in_two_places()), (0, 0), "opaque: {opaque}");
        assert_eq!(world.store.count("Create"), 0);
    }
}

#[test]
fn parts_that_arrived_before_an_object_was_found_not_to_be_copied_are_not_sent_again() {
    let world = World::new();
    world.store.put_bytes("o", pattern(64 * MIB, 1));
    let world = crash(world, |world| async move {
        let writeback = open_queue(&world).await;
        world.store.fail({
            let (mut copies, mut parts) = (false, 3);
            move |op, _| match op {
                "PartCopy" => {
                    copies = true;
                    Some(ErrorKind::NotImplemented)
                }
                // Nothing before the copy was refused, and three parts after that.
                "Part" if copies && parts > 0 => {
                    parts -= 1;
                    None
                }
                "Part" => Some(ErrorKind::Network),
                _ => None,
            }
        });
        change_two_places(&world, &writeback).await;
        until(|| world.store.count("Create") == 2 && arrived(&world) == 3).await;
    });
    assert_eq!(resumed(&world, "o", &changed_in_two_places()), (5, 0));
}

#[test]
fn a_completed_upload_is_recognised_by_its_checksum() {
    let world = crash(world(true), |world| async move {
        let writeback = open_queue(&world).await;
        take(&world, 4, &["Complete!", "Head"]);
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(30 * MIB, 0)).await;
        staged.publish().await.unwrap();
        until(|| world.store.object("a").is_some()).await;
    });
    assert_eq!(resumed(&world, "a", &pattern(30 * MIB, 0)), (0, 0));
    assert_eq!((world.store.count("Create"), world.store.count("Put")), (0, 0));
}

#[test]
fn what_was_appended_to_a_published_file_and_arrived_is_not_sent_again() {
    let world = crash(world(true), |world| async move {
        let writeback = open_queue(&world).await;
        let staged = world.new_file(&writeback, "a").await;
        write_all(&staged, &pattern(30 * MIB, 0)).await;
        staged.publish().await.unwrap();
        until(|| world.store.object("a").is_some() && writeback.status().is_empty()).await;
        take(&world, 1, &["PartCopy"]);
        staged.append(Bytes::from_static(b"tail")).await.unwrap();
        staged.publish().await.unwrap();
        until(|| arrived(&world) == 1).await;
    });
    let expected = [&pattern(30 * MIB, 0)[..], b"tail"].concat();
    assert_eq!(resumed(&world, "a", &expected), (0, 1));
}

/// A queued file of several parts is written again while they travel: what it holds then in the middle of its new content is no object,
/// nor the beginning of the new one, whatever the parts are made of.
#[test]
fn a_queued_file_that_is_written_again_makes_no_object_of_both() {
    for closed in [false, true] {
        run(async {
            let world = World::new();
            let writeback = world
                .open_with(|config| {
                    (config.write_back, config.part_size, config.max_connections) = (Duration::from_millis(10), Some(5 << 20), 1)
                })
                .await;
            let staged = world.new_file(&writeback, "f").await;
            let old = pattern(6 << 20, 1);
            staged.write(0, old.clone()).await.unwrap();
            *world.store.delay.lock() = Duration::from_millis(300);
            assert!(staged.publish().await.unwrap().is_none());
            until(|| world.store.count("Part") == 1).await;
            // Behind the part that travels, and past the end.
            let new = pattern(1 << 20, 2);
            staged.write((5 << 20) + (512 << 10), new.clone()).await.unwrap();
            let mut whole = old.to_vec();
            whole.truncate((5 << 20) + (512 << 10));
            whole.extend_from_slice(&new);
            if closed {
                assert!(staged.publish().await.unwrap().is_none());
            }
            let began = std::time::Instant::now();
            while began.elapsed() < Duration::from_secs(3) {
                let object = world.store.object("f").map(|object| object.bytes);
                let right = |bytes: &Bytes| *bytes == old || closed && *bytes == whole;
                assert!(object.as_ref().is_none_or(right), "closed {closed}: {:?} bytes of both", object.map(|object| object.len()));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(world.store.object("f").is_some(), closed);
        });
    }
}
