//! What the credentials may do in the bucket, and what the store can do: tried under one key.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use md5::{Digest as _, Md5};

use super::{Finding, Tell, Verdict};
use crate::config::Config;
use crate::s3::client::{Client, ClientConfig};
use crate::s3::{Checksum, ChecksumKind, Condition, ETag, ErrorKind, GetRequest, ListRequest, PutOptions, Result, Store, is_archive_class};

/// How long a store that does not answer is waited for.
const PATIENCE: Duration = Duration::from_secs(15);

/// What the test object holds.
const BODY: &[u8] = b"packmule doctor was here; this object can be deleted\n";

/// Lists, writes, reads and deletes. False where the bucket cannot even be listed.
pub(super) async fn examine(
    config: &Config,
    settings: ClientConfig,
    client: &Client,
    (bucket, prefix): (&str, &str),
    tell: &mut Tell<'_>,
) -> bool {
    let store = match client.probe(bucket, prefix, Duration::ZERO, PATIENCE).await {
        Ok(store) => store,
        Err(error) => {
            let mut finding = Finding::refused("list", Verdict::Bad, &error);
            if error.kind == ErrorKind::AccessDenied {
                finding.remedy =
                    Some(format!("grant s3:ListBucket on {bucket} to these credentials, or name the prefix that they may list"));
            }
            tell(finding);
            return false;
        }
    };
    tell(Finding::good("list", format!("s3://{bucket}/{prefix} can be listed")));
    if config.mount.ro {
        tell(reads_what_is_there(store.as_ref(), prefix).await);
        tell(Finding::aside("write", "not tried: the mount is to be read-only (ro)"));
        return true;
    }
    // A client that has seen no listing: it knows no marker of a user's to try conditional writes with.
    let trial = match Client::new(settings).and_then(|client| client.open(bucket)) {
        Ok(store) => Trial { store, key: format!("{prefix}.packmule-doctor-{:016x}", rand::random::<u64>()), versioned: false.into() },
        Err(error) => {
            tell(Finding::refused("write", Verdict::Bad, &error));
            return true;
        }
    };
    if trial.writes(tell).await {
        trial.reads(tell).await;
        tell(trial.conditions().await);
        tell(trial.checksums().await);
        tell(trial.multipart().await);
        trial.deletes(config, client, tell).await;
    } else {
        tell(reads_what_is_there(store.as_ref(), prefix).await);
    }
    true
}

/// The right to read, where nothing may be written: by a byte of the first object.
async fn reads_what_is_there(store: &dyn Store, prefix: &str) -> Finding {
    let request = ListRequest { prefix: prefix.to_owned(), max_keys: Some(10), ..ListRequest::default() };
    let page = match store.list(request).await {
        Ok(page) => page,
        Err(error) => return Finding::refused("read", Verdict::Bad, &error),
    };
    let mut refused = None;
    for entry in page.entries.iter().filter(|entry| entry.size > 0 && !is_archive_class(entry.storage_class.as_deref())) {
        match store.get(&entry.key, GetRequest { range: Some(0..1), ..GetRequest::default() }).await {
            Ok(_) => return Finding::good("read", "objects can be read"),
            Err(error) => refused = Some(error),
        }
    }
    match refused {
        Some(error) if error.kind == ErrorKind::AccessDenied => Finding::refused("read", Verdict::Bad, &error),
        Some(error) => Finding::refused("read", Verdict::Note, &error),
        None => Finding::aside("read", "not tried: no object was found to read"),
    }
}

/// The checksum of [`BODY`], as a mount sends it.
fn sum(kind: ChecksumKind) -> Option<Checksum> {
    match kind {
        ChecksumKind::Off => None,
        ChecksumKind::Md5 => Some(Checksum::Md5(Md5::digest(BODY).into())),
        ChecksumKind::Crc32c => Some(Checksum::Crc32c(crc_fast::crc32_iscsi(BODY))),
        ChecksumKind::Crc64Nvme => Some(Checksum::Crc64Nvme(crc_fast::crc64_nvme(BODY))),
    }
}

struct Trial {
    store: Arc<dyn Store>,
    key: String,
    /// What is overwritten here stays as a version.
    versioned: AtomicBool,
}

impl Trial {
    fn kind(&self) -> ChecksumKind {
        self.store.capabilities().upload_checksum
    }

    /// With the right checksum, unless there is another in `options`.
    async fn put(&self, options: PutOptions) -> Result<()> {
        let checksum = options.checksum.or_else(|| sum(self.kind()));
        let put = self.store.put(&self.key, Arc::new(Bytes::from_static(BODY)), PutOptions { checksum, ..options }).await;
        put.map(|outcome| self.versioned.store(outcome.version_id.is_some(), Relaxed))
    }

    fn shown(&self) -> String {
        format!("s3://{}/{}", self.store.bucket(), self.key)
    }

    /// False where nothing can be written.
    async fn writes(&self, tell: &mut Tell<'_>) -> bool {
        let error = match self.put(PutOptions::default()).await {
            Ok(()) => {
                tell(Finding::good("write", "objects can be written"));
                return true;
            }
            Err(error) => error,
        };
        if error.kind == ErrorKind::AccessDenied {
            // A bucket's policy may take conditional writes alone.
            let options = PutOptions { condition: Some(Condition::Absent), ..PutOptions::default() };
            if self.put(options).await.is_ok() {
                tell(Finding::note(
                    "write",
                    "only conditional writes are allowed here (a policy asks for If-None-Match or If-Match): new files and changed ones can be stored, folders' markers cannot",
                    "let the policy except keys that end in /, and leave on_conflict as it is (keep)",
                ));
                return true;
            }
        }
        if error.kind != ErrorKind::AccessDenied {
            // It may be there though its answer was none.
            let _ = self.store.delete(&self.key, None).await;
        }
        let mut finding = Finding::refused("write", Verdict::Bad, &error);
        if error.kind == ErrorKind::AccessDenied {
            // AWS names the right, which may be one to a key of KMS or to tags.
            if !error.message.is_empty() {
                finding.found += &format!(": {}", error.message.replace(['\n', '\r'], " "));
            }
            finding.remedy =
                Some("grant s3:PutObject (and what the message names) to these credentials, or mount with -o ro to read only".to_owned());
        }
        tell(finding);
        false
    }

    async fn reads(&self, tell: &mut Tell<'_>) {
        let read = async {
            let mut answer = self.store.get(&self.key, GetRequest::default()).await?;
            let mut bytes = Vec::new();
            while let Some(chunk) = answer.body.next().await {
                bytes.extend_from_slice(&chunk?);
            }
            Ok(bytes)
        };
        tell(match read.await {
            Ok(bytes) if bytes == BODY => Finding::good("read", "what was written comes back byte for byte"),
            Ok(bytes) => Finding::bad(
                "read",
                format!("{} other bytes come back than the {} that were written", bytes.len(), BODY.len()),
                "do not use this store; ask its administrator, and check that no proxy answers instead",
            ),
            Err(error) => Finding::refused("read", Verdict::Bad, &error),
        });
    }

    /// Two people who save the same file at the same time: a new one, or one that both have seen.
    async fn conditions(&self) -> Finding {
        const CHECK: &str = "conditional writes";
        let conditions = [Condition::Absent, Condition::Matches(ETag::new("d41d8cd98f00b204e9800998ecf8427f"))];
        let mut kept = 0;
        for condition in conditions {
            match self.put(PutOptions { condition: Some(condition), ..PutOptions::default() }).await {
                Err(error) if error.kind == ErrorKind::PreconditionFailed => kept += 1,
                Ok(()) => {}
                Err(error) => return Finding::refused(CHECK, Verdict::Note, &error),
            }
        }
        match kept {
            2 => Finding::good(CHECK, "the store refuses to overwrite what somebody else has just written"),
            1 => Finding::aside(CHECK, "kept in part: of If-None-Match and If-Match the store heeds one alone"),
            _ => Finding::aside(
                CHECK,
                "not kept, and the store does not say so: of two that write one name the last wins, and the other is not told",
            ),
        }
    }

    async fn checksums(&self) -> Finding {
        const CHECK: &str = "checksums";
        loop {
            let kind = self.kind();
            let wrong = match kind {
                ChecksumKind::Off => return Finding::aside(CHECK, "none are sent (upload_checksums=off, or the store refuses them)"),
                ChecksumKind::Md5 => Checksum::Md5([1; 16]),
                ChecksumKind::Crc32c => Checksum::Crc32c(1),
                ChecksumKind::Crc64Nvme => Checksum::Crc64Nvme(1),
            };
            match self.put(PutOptions { checksum: Some(wrong), ..PutOptions::default() }).await {
                // Found by its answer: it took them.
                Err(error) if error.kind == ErrorKind::BadDigest && error.status == 0 => {
                    return Finding::aside(
                        CHECK,
                        "the store stores bytes that were damaged on their way; packmule finds that by its answer, and sends them again",
                    );
                }
                Err(error) if matches!(error.kind, ErrorKind::BadDigest | ErrorKind::InvalidRequest) => {
                    return Finding::good(CHECK, "the store refuses bytes that were damaged on their way");
                }
                Err(error) => return Finding::refused(CHECK, Verdict::Note, &error),
                // It knows no CRC, which was found out by that: Content-MD5 is sent from now on.
                Ok(()) if self.kind() != kind => {}
                Ok(()) => {
                    return Finding::aside(
                        CHECK,
                        "the store does not check what it receives: over plain HTTP a byte that turns on its way is not noticed before it is read",
                    );
                }
            }
        }
    }

    /// What a file larger than a part needs, and what resumes or ends one that was broken off.
    async fn multipart(&self) -> Finding {
        const CHECK: &str = "multipart";
        let tried = async {
            let upload = self.store.create_multipart(&self.key, PutOptions::default()).await?;
            let sent = self.store.upload_part(&self.key, &upload, 1, Arc::new(Bytes::from_static(BODY)), sum(self.kind())).await;
            let parts = self.store.list_parts(&self.key, &upload).await;
            let uploads = self.store.list_uploads(&self.key).await;
            let aborted = self.store.abort_multipart(&self.key, &upload).await;
            if let (Ok(part), true) = (&sent, aborted.is_err()) {
                // Completed it is an object, which goes with the others.
                let parts = [part.clone()];
                let _ = self.store.complete_multipart(&self.key, &upload, &parts, part.size, PutOptions::default()).await;
            }
            sent?;
            aborted?;
            let listed = parts.and_then(|parts| Ok((!parts.is_empty(), uploads?.iter().any(|pending| pending.upload_id == upload))));
            Ok(listed)
        };
        let grant = |finding: Finding, rights: &str| Finding { remedy: Some(format!("grant {rights}")), ..finding };
        match tried.await {
            Ok(Ok((true, true))) => {
                Finding::good(CHECK, "large files can be sent in parts, and uploads that were broken off be found, resumed and ended")
            }
            Ok(Ok(_)) => Finding::aside(
                CHECK,
                "large files can be sent in parts, but the store does not list unfinished uploads: what a crash leaves may stay and be paid for",
            ),
            Ok(Err(error)) => {
                let finding = Finding::refused(CHECK, Verdict::Note, &error);
                let finding = Finding { found: format!("uploads that are broken off cannot be resumed: {}", finding.found), ..finding };
                match error.kind {
                    ErrorKind::AccessDenied => grant(finding, "s3:ListMultipartUploadParts and s3:ListBucketMultipartUploads"),
                    _ => finding,
                }
            }
            Err(error) => {
                let finding = Finding::refused(CHECK, Verdict::Bad, &error);
                match error.kind {
                    ErrorKind::AccessDenied => grant(finding, "s3:PutObject and s3:AbortMultipartUpload"),
                    _ => finding,
                }
            }
        }
    }

    async fn deletes(&self, config: &Config, client: &Client, tell: &mut Tell<'_>) {
        if let Err(error) = self.store.delete(&self.key, None).await {
            let verdict = if config.allow_delete { Verdict::Bad } else { Verdict::Note };
            let mut finding = Finding::refused("delete", verdict, &error);
            finding.found += &format!("; the test object {} is still there", self.shown());
            if error.kind == ErrorKind::AccessDenied {
                finding.remedy = Some("grant s3:DeleteObject, or mount with -o allow_delete=no; renames need it too".to_owned());
            }
            return tell(finding);
        }
        // Where versions are kept, the test's own are not to stay.
        if let (Err(_), true) = (client.erase(self.store.bucket(), &self.key).await, self.versioned.load(Relaxed)) {
            return tell(Finding::note(
                "delete",
                format!(
                    "objects can be deleted; versions of the test object {} stay, which these credentials may not remove",
                    self.shown()
                ),
                "a lifecycle rule for noncurrent versions ends them, or s3:ListBucketVersions and s3:DeleteObjectVersion",
            ));
        }
        tell(match self.store.head(&self.key).await {
            Err(error) if error.kind == ErrorKind::NoSuchKey => Finding::good("delete", "objects can be deleted"),
            Err(error) => Finding::refused("delete", Verdict::Note, &error),
            Ok(_) => Finding::bad("delete", format!("{} is still there after it was deleted", self.shown()), "ask whoever runs the store"),
        });
    }
}
