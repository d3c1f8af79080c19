//! Batches of deletes, in which a key goes only as the version that was named: also where the store's DeleteObjects does not look.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::StreamExt as _;
use http::Method;
use md5::{Digest as _, Md5};

use super::bucket::Bucket;
use super::operation::Operation;
use super::request::{Call, Payload};
use super::xml::{self, Element};
use super::{DELETE_MOST, ETag, ErrorKind, LIST_MOST, ListRequest, Result, S3Error, response};

/// Keys asked for or deleted one by one at once.
const SINGLY: usize = 16;

/// Of fewer keys too much may lie between them.
const LOOKED_AT_LEAST: usize = 16;

/// The ETag of no object.
const NO_OBJECT: &str = "00000000000000000000000000000000";

/// A key, and the version of it that is meant; `None`: whatever is there.
type Named = (String, Option<ETag>);
/// The keys that are what was named, and those that are not, or cannot be looked at.
type Looked = (Vec<Named>, Vec<(String, S3Error)>);

/// The keys that DeleteObjects did not delete, and why.
pub(crate) fn read_refused(root: &Element) -> impl Iterator<Item = (String, response::ErrorBody)> {
    root.all("Error").map(|error| {
        let key = error.child("Key").map(|key| key.text.clone()).unwrap_or_default();
        let told = response::ErrorBody {
            code: error.text_of("Code").map(str::to_owned),
            message: error.text_of("Message").unwrap_or("").to_owned(),
            ..response::ErrorBody::default()
        };
        (key, told)
    })
}

impl Bucket {
    /// Deletes keys that are what was named; answers those that failed.
    pub(super) async fn delete_keys(&self, keys: &[Named]) -> Result<Vec<(String, S3Error)>> {
        let (keys, mut failed) = match self.first_look(keys).await? {
            Some(looked) => looked,
            None if self.compares(keys).await? => (keys.to_vec(), Vec::new()),
            None => self.unchanged(keys).await?,
        };
        let batched = self.capabilities.lock().delete_many;
        let (batch, mut single): (Vec<_>, Vec<_>) = keys.into_iter().partition(|(key, _)| batched && xml::can_carry(key));
        for chunk in batch.chunks(DELETE_MOST) {
            match self.delete_batch(chunk).await {
                // A store that fails for some keys only, as one that has just lost a node does, is asked for each of them again.
                Ok(some) => {
                    let (again, for_good): (Vec<_>, Vec<_>) = some.into_iter().partition(|(_, error)| error.kind.passes());
                    single.extend(chunk.iter().filter(|(key, _)| again.iter().any(|(failed, _)| failed == key)).cloned());
                    failed.extend(for_good);
                }
                Err(error) if error.kind == ErrorKind::NotImplemented => {
                    if std::mem::replace(&mut self.capabilities.lock().delete_many, false) {
                        tracing::warn!(bucket = self.name(), "the store lacks DeleteObjects: keys are deleted one by one");
                    }
                    single.extend(chunk.iter().cloned());
                }
                Err(error) => return Err(error),
            }
        }
        let deletes = single.into_iter().map(|(key, etag)| async move {
            let answer = self.delete_key(&key, etag).await;
            answer.err().map(|error| (key, error))
        });
        let mut deletes = futures::stream::iter(deletes).buffer_unordered(SINGLY);
        while let Some(answer) = deletes.next().await {
            failed.extend(answer);
        }
        Ok(failed)
    }

    async fn delete_batch(&self, keys: &[Named]) -> Result<Vec<(String, S3Error)>> {
        let mut body = String::from("<Delete xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Quiet>true</Quiet>");
        for (key, etag) in keys {
            body.push_str(&format!("<Object><Key>{}</Key>", xml::escape(key)));
            if let Some(etag) = etag {
                body.push_str(&format!("<ETag>{}</ETag>", xml::escape(&etag.quoted())));
            }
            body.push_str("</Object>");
        }
        body.push_str("</Delete>");
        let mut call = Call::new(&self.core, Operation::DeleteObjects, Method::POST).query("delete", "");
        call.header("content-md5", &STANDARD.encode(Md5::digest(&body)))?;
        call.header("content-type", "application/xml")?;
        let call = call.payload(Payload::Bytes(Bytes::from(body)));
        let answer = self.core.xml(&self.place, &call, "DeleteResult").await?;
        let error = |(key, told): (String, response::ErrorBody)| {
            let resource = self.place.resource(Some(&key));
            (key, response::error(Operation::DeleteObjects.name(), &resource, answer.status, &answer.headers, &told))
        };
        Ok(read_refused(&answer.body).map(error).filter(|(_, error)| error.kind != ErrorKind::NoSuchKey).collect())
    }

    /// The first time that many keys go: where one listing tells of all of them, they are as good as compared, for one request. To find
    /// out whether the store does that by itself takes two, which pay later. `None` where it is to be found out, or known.
    async fn first_look(&self, keys: &[Named]) -> Result<Option<Looked>> {
        let named: Vec<&str> = keys.iter().filter(|(_, etag)| etag.is_some()).map(|(key, _)| key.as_str()).collect();
        let known = self.capabilities.lock().conditional_deletes.is_some();
        if known || named.len() < LOOKED_AT_LEAST || self.looked.swap(true, Relaxed) {
            return Ok(None);
        }
        let now = self.listed(&named).await?;
        let all = named.iter().all(|key| now.contains_key(*key));
        Ok(all.then(|| self.compare(keys, now.into_iter().map(|(key, etag)| (key, Ok(etag))).collect())))
    }

    /// True where the store compares the ETags of these keys by itself, or none is given. Found out once, by a key that is to go: sent
    /// with the ETag of no object it is refused, or gone as it should be.
    async fn compares(&self, keys: &[Named]) -> Result<bool> {
        if keys.iter().all(|(_, etag)| etag.is_none()) {
            return Ok(true);
        }
        let _one = self.probe.lock().await;
        {
            let capabilities = self.capabilities.lock();
            if let Some(known) = capabilities.conditional_deletes.or((!capabilities.delete_many).then_some(false)) {
                return Ok(known);
            }
        }
        // Not a marker: a directory has to wait for what is below it.
        let goes = keys.iter().find(|(key, etag)| etag.is_some() && !key.ends_with('/') && xml::can_carry(key));
        let Some((key, etag)) = goes else { return Ok(false) };
        match self.head_object(key).await {
            Ok(head) if Some(&head.etag) == etag.as_ref() => {}
            Err(error) if error.kind.passes() => return Err(error),
            _ => return Ok(false),
        }
        let refused = match self.delete_batch(&[(key.clone(), Some(ETag::new(NO_OBJECT)))]).await {
            Ok(refused) => refused,
            // Who sends the keys finds the same, and sends them one by one.
            Err(error) if error.kind == ErrorKind::NotImplemented => return Ok(false),
            Err(error) => return Err(error),
        };
        let compares = match refused.first() {
            None => false,
            Some((_, error)) if error.kind == ErrorKind::PreconditionFailed => true,
            Some(_) => return Ok(false),
        };
        self.capabilities.lock().conditional_deletes = Some(compares);
        if !compares {
            tracing::debug!(bucket = self.name(), "DeleteObjects ignores ETags here: keys are looked at before they are deleted");
        }
        Ok(compares)
    }

    /// The keys that are what was named, and those that are another version by now, as a store that compares would refuse them.
    async fn unchanged(&self, keys: &[Named]) -> Result<Looked> {
        let named: Vec<&str> = keys.iter().filter(|(_, etag)| etag.is_some()).map(|(key, _)| key.as_str()).collect();
        let mut now: HashMap<String, Result<ETag>> = self.listed(&named).await?.into_iter().map(|(key, etag)| (key, Ok(etag))).collect();
        let missing: Vec<String> = named.into_iter().filter(|key| !now.contains_key(*key)).map(str::to_owned).collect();
        let looks = missing.into_iter().map(|key| async move {
            let found = self.head_object(&key).await;
            (key, found)
        });
        let mut looks = futures::stream::iter(looks).buffer_unordered(SINGLY);
        while let Some((key, found)) = looks.next().await {
            match found {
                Err(error) if error.kind.passes() => return Err(error),
                found => now.insert(key, found.map(|head| head.etag)),
            };
        }
        Ok(self.compare(keys, now))
    }

    /// By what a look at each key found.
    fn compare(&self, keys: &[Named], mut now: HashMap<String, Result<ETag>>) -> Looked {
        let (mut same, mut failed) = (Vec::new(), Vec::new());
        for (key, etag) in keys {
            match (etag, now.remove(key)) {
                (Some(named), Some(Ok(found))) if found != *named => {
                    let resource = self.place.resource(Some(key));
                    let message = "another version has the name by now";
                    failed.push((
                        key.clone(),
                        S3Error::local(ErrorKind::PreconditionFailed, Operation::DeleteObjects.name(), resource, message),
                    ));
                }
                // Gone already.
                (Some(_), Some(Err(error))) if error.kind == ErrorKind::NoSuchKey => {}
                (Some(_), Some(Err(error))) => failed.push((key.clone(), error)),
                _ => same.push((key.clone(), etag.clone())),
            }
        }
        (same, failed)
    }

    /// The ETags of these keys by listing where they lie: no more pages than the keys would fill if nothing lay between them, and one.
    async fn listed(&self, keys: &[&str]) -> Result<HashMap<String, ETag>> {
        let mut found = HashMap::new();
        let (Some(first), Some(last)) = (keys.iter().min(), keys.iter().max()) else { return Ok(found) };
        let common = first.char_indices().zip(last.chars()).find(|((_, one), other)| one != other).map_or(first.len(), |((at, _), _)| at);
        // Begins so and is shorter: right before it.
        let before = first.char_indices().next_back().map_or("", |(at, _)| &first[..at]);
        let mut request = ListRequest {
            prefix: first[..common].to_owned(),
            start_after: Some(before.to_owned()).filter(|before| before.len() > common),
            ..ListRequest::default()
        };
        for _ in 0..=keys.len().div_ceil(LIST_MOST) {
            let page = match self.list_page(request.clone()).await {
                Ok(page) => page,
                Err(error) if error.kind.passes() => return Err(error),
                // Not allowed: each key is asked for.
                Err(_) => break,
            };
            found.extend(page.entries.into_iter().map(|entry| (entry.key, entry.etag)));
            request.continuation = page.next;
            if request.continuation.is_none() || keys.iter().all(|key| found.contains_key(*key)) {
                break;
            }
        }
        Ok(found)
    }
}
