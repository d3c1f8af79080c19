//! What the credentials may do in the bucket, and what the store can do: tried under one key.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;

use super::{Finding, Tell, Verdict};
use crate::config::Config;
use crate::s3::client::Client;
use crate::s3::{Checksum, ChecksumKind, Condition, ErrorKind, GetRequest, ListRequest, PutOptions, Result, Store};

/// How long a store that does not answer is waited for.
const PATIENCE: Duration = Duration::from_secs(15);

/// What the test object holds.
const BODY: &[u8] = b"packmule doctor was here; this object can be deleted\n";

/// Lists, writes, reads and deletes. False where the bucket cannot even be listed.
pub(super) async fn examine(config: &Config, client: &Client, bucket: &str, prefix: &str, tell: &mut Tell<'_>) -> bool {
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
    let key = format!("{prefix}.packmule-doctor-{:016x}", rand::random::<u64>());
    let trial = Trial { store: store.as_ref(), key: &key };
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
    let Some(entry) = page.entries.iter().find(|entry| entry.size > 0) else {
        return Finding::aside("read", "not tried: there is no object to read");
    };
    match store.get(&entry.key, GetRequest { range: Some(0..1), ..GetRequest::default() }).await {
        Ok(_) => Finding::good("read", "objects can be read"),
        Err(error) => Finding::refused("read", Verdict::Bad, &error),
    }
}

struct Trial<'a> {
    store: &'a dyn Store,
    key: &'a str,
}

impl Trial<'_> {
    async fn put(&self, options: PutOptions) -> Result<()> {
        self.store.put(self.key, Arc::new(Bytes::from_static(BODY)), options).await.map(drop)
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
        let mut finding = Finding::refused("write", Verdict::Bad, &error);
        finding.remedy = Some(match finding.remedy {
            Some(remedy) if error.kind != ErrorKind::AccessDenied => remedy,
            _ => "grant s3:PutObject to these credentials, or mount with -o ro to read only".to_owned(),
        });
        tell(finding);
        false
    }

    async fn reads(&self, tell: &mut Tell<'_>) {
        let read = async {
            let mut answer = self.store.get(self.key, GetRequest::default()).await?;
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

    /// Two people who save the same file at the same time.
    async fn conditions(&self) -> Finding {
        let options = PutOptions { condition: Some(Condition::Absent), ..PutOptions::default() };
        match self.put(options).await {
            Err(error) if error.kind == ErrorKind::PreconditionFailed => {
                Finding::good("conditional writes", "the store refuses to overwrite what somebody else has just written")
            }
            Ok(()) => Finding::aside(
                "conditional writes",
                "not kept: packmule looks before it overwrites, but of two that write a name in the same moment one is lost",
            ),
            Err(error) => Finding::refused("conditional writes", Verdict::Note, &error),
        }
    }

    async fn checksums(&self) -> Finding {
        let unchecked = Finding::aside(
            "checksums",
            "the store does not check what it receives: over plain HTTP a byte that turns on its way is not noticed before it is read",
        );
        let wrong = match self.store.capabilities().upload_checksum {
            ChecksumKind::Off => return Finding::aside("checksums", "none are sent (upload_checksums=off)"),
            ChecksumKind::Md5 => Checksum::Md5([1; 16]),
            ChecksumKind::Crc32c => Checksum::Crc32c(1),
            ChecksumKind::Crc64Nvme => Checksum::Crc64Nvme(1),
        };
        match self.put(PutOptions { checksum: Some(wrong), ..PutOptions::default() }).await {
            Err(error) if matches!(error.kind, ErrorKind::BadDigest | ErrorKind::InvalidRequest) => {
                Finding::good("checksums", "the store refuses bytes that were damaged on their way")
            }
            Err(error) => Finding::refused("checksums", Verdict::Note, &error),
            Ok(()) => unchecked,
        }
    }

    /// What a file larger than a part needs, and what resumes or ends one that was broken off.
    async fn multipart(&self) -> Finding {
        const CHECK: &str = "multipart";
        let tried = async {
            let upload = self.store.create_multipart(self.key, PutOptions::default()).await?;
            let sent = self.store.upload_part(self.key, &upload, 1, Arc::new(Bytes::from_static(BODY)), None).await;
            let parts = self.store.list_parts(self.key, &upload).await;
            let uploads = self.store.list_uploads(self.key).await;
            let aborted = self.store.abort_multipart(self.key, &upload).await;
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
        if let Err(error) = self.store.delete(self.key, None).await {
            let verdict = if config.allow_delete { Verdict::Bad } else { Verdict::Note };
            let mut finding = Finding::refused("delete", verdict, &error);
            finding.found += &format!("; the test object s3://{}/{} is still there", self.store.bucket(), self.key);
            if error.kind == ErrorKind::AccessDenied {
                finding.remedy = Some("grant s3:DeleteObject, or mount with -o allow_delete=no; renames need it too".to_owned());
            }
            return tell(finding);
        }
        // Where versions are kept, the test's own are not to stay; who may not remove them has lost nothing.
        let _ = client.erase(self.store.bucket(), self.key).await;
        tell(match self.store.head(self.key).await {
            Err(error) if error.kind == ErrorKind::NoSuchKey => Finding::good("delete", "objects can be deleted"),
            Err(error) => Finding::refused("delete", Verdict::Note, &error),
            Ok(_) => Finding::bad(
                "delete",
                format!("s3://{}/{} is still there after it was deleted", self.store.bucket(), self.key),
                "ask whoever runs the store",
            ),
        });
    }
}
