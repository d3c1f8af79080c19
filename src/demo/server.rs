//! The embedded S3 server: loopback only, a free port, keys made for this run.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::store::FolderStore;

/// A running server. Dropping it ends the listener; connections end with the runtime.
pub(super) struct Server {
    pub address: SocketAddr,
    /// A credentials file of the AWS kind with its keys, readable by this user alone.
    pub credentials: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// 20 letters and digits that begin as AWS's key ids do, and 40 for the secret.
fn random_text(prefix: &str, length: usize) -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let random: Vec<u8> = (0..length - prefix.len()).map(|_| rand::random()).collect();
    prefix.chars().chain(random.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)]))).collect()
}

impl Server {
    /// Serves the folder `data`; its keys are written to `credentials`.
    pub(super) async fn start(data: &Path, credentials: PathBuf) -> anyhow::Result<Self> {
        let (id, secret) = (random_text("AKIA", 20), random_text("", 40));
        write_private(&credentials, &format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n"))
            .with_context(|| format!("{}: cannot be written", credentials.display()))?;

        let store = FolderStore::new(data).map_err(anyhow::Error::msg)?;
        let mut service = S3ServiceBuilder::new(store);
        service.set_auth(SimpleAuth::from_single(id, secret));
        let service = service.build();

        let listener = TcpListener::bind("127.0.0.1:0").await.context("no free port on loopback")?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let service = service.clone();
                tokio::spawn(async move {
                    // A client that hangs up is no news.
                    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Ok(Self { address, credentials, task })
    }
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}
