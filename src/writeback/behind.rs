//! What was only appended to a file goes behind whatever somebody else has made of it meanwhile (promise 12).

use std::ops::Range;
use std::sync::Arc;

use super::entry::Entry;
use super::intent::Intent;
use super::manifest::Phase;
use super::publish::StoreReader;
use super::spool::blocking;
use super::transfer::{self, Trouble, Writer};
use super::{Error, Expect, Target};
use crate::s3::ObjectHead;

/// Bytes moved at once.
const PIECE: u64 = 1 << 20;

/// True when all that the content adds to its base was appended.
pub(crate) fn is_append(entry: &Entry) -> bool {
    entry.intent.lock().appended.is_some()
}

/// What was appended goes behind `theirs` from now on: that is the base, and its headers and tags are kept.
pub(crate) async fn behind(entry: &Arc<Entry>, target: &Target, theirs: ObjectHead) -> Result<(), Trouble> {
    let Target { store, key } = target;
    let tags = if theirs.tag_count > 0 { store.get_tags(key).await.map_err(Trouble::S3)? } else { Vec::new() };
    let (base, size) = (StoreReader::base(target, &theirs), theirs.size);
    let rebase = move |intent: &mut Intent| {
        intent.attributes.headers = theirs.headers;
        intent.attributes.storage_class = theirs.storage_class;
        intent.attributes.tags = tags;
        intent.base = Some(base);
        intent.expect = Expect::Version(theirs.etag);
        intent.sent.clear();
        (intent.fetches, intent.completing, intent.rebased) = (false, None, true);
        if intent.phase.frees() {
            intent.phase = Phase::Sealed;
        }
    };
    let writer = entry.writer.clone().lock_owned().await;
    Ok(move_to(entry, &writer, size, rebase).await?)
}

/// What a crash has left on its way is put where its base ends.
pub(crate) async fn go_on(entry: &Arc<Entry>) -> Result<(), Error> {
    let writer = entry.writer.clone().lock_owned().await;
    let end = {
        let intent = entry.intent.lock();
        intent.base.as_ref().map(|base| base.size).filter(|end| intent.appended.is_some_and(|from| from != *end))
    };
    match end {
        Some(end) => move_to(entry, &writer, end, |_| {}).await,
        None => Ok(()),
    }
}

/// Moves what was appended to `to`, where its base ends once `rebase` has said which that is.
async fn move_to(entry: &Arc<Entry>, writer: &Writer, to: u64, rebase: impl FnOnce(&mut Intent)) -> Result<(), Error> {
    let (mut from, mut content, durable) = {
        let intent = entry.intent.lock();
        let content = entry.content.lock().clone();
        (intent.appended.unwrap_or(content.size), content, intent.durable.is_some())
    };
    let len = content.size.saturating_sub(from);
    // Bytes are never moved over themselves: while the record does not tell where they are, they still are where it says.
    if from.abs_diff(to) < len && from != to {
        let aside = content.size.max(to.saturating_add(len));
        copy_within(entry, writer, from..from + len, aside, durable).await?;
        from = aside;
        content.moved(from..from + len);
        entry.persist_moved(&content, from).await?;
    }
    if from != to {
        copy_within(entry, writer, from..from + len, to, durable).await?;
    }
    {
        let mut intent = entry.intent.lock();
        rebase(&mut intent);
        intent.appended = Some(to);
        let mut content = entry.content.lock();
        content.moved(to..to + len);
        content.rebased(to);
    }
    entry.persist(false).await?;
    let file = entry.file.clone();
    blocking(move || file.set_len(to + len)).await?;
    entry.charge();
    Ok(())
}

/// Copies bytes of the spool file to another place in it. They are those that were written, or it fails.
async fn copy_within(entry: &Arc<Entry>, writer: &Writer, range: Range<u64>, to: u64, durable: bool) -> Result<(), Error> {
    transfer::undamaged(entry, range.clone(), Some(writer)).await?;
    entry.rolling.lock().forget(0..u64::MAX);
    let moving = entry.clone();
    blocking(move || {
        let mut at = range.start;
        while at < range.end {
            let bytes = transfer::read_exact(&moving.file, at, PIECE.min(range.end - at) as usize)?;
            let place = to + (at - range.start);
            moving.file.write_all_at(&bytes, place)?;
            moving.rolling.lock().wrote(place, &bytes);
            at += bytes.len() as u64;
        }
        if durable { moving.file.sync() } else { Ok(()) }
    })
    .await
}
