//! The mount's end of the control socket.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::{MAX_REQUEST, Request, Response, make_socket_dir, socket_dir, socket_name};

/// Connections served at once; the others wait in the listen queue.
const MAX_CONNECTIONS: usize = 16;

/// How long a client may be silent between requests.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// What answers: the mount.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Answers one request.
    async fn handle(&self, request: Request) -> Response;
}

/// The socket and the task that serves it. Dropping it ends both.
#[derive(Debug)]
pub struct Server {
    socket: PathBuf,
    /// Inode of the socket: by the time we go, the next mount in the same place may have made its own.
    inode: u64,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens for the mount at `mountpoint`. Must be called within the runtime.
    ///
    /// # Errors
    /// When the socket cannot be made; the mount can do without it.
    pub fn start(mountpoint: &Path, handler: Arc<dyn Handler>) -> io::Result<Self> {
        let dir = socket_dir();
        make_socket_dir(&dir)?;
        let socket = dir.join(socket_name(mountpoint));
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&socket)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
        let inode = std::fs::symlink_metadata(&socket)?.ino();
        Ok(Self { socket, inode, task: tokio::spawn(serve(listener, handler)) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        if std::fs::symlink_metadata(&self.socket).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

async fn serve(listener: UnixListener, handler: Arc<dyn Handler>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let handler = handler.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    if let Err(error) = converse(stream, handler.as_ref()).await {
                        tracing::debug!(%error, "a control connection ended early");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "control socket");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Request, answer, request, answer, until the client hangs up, is silent too long or sends a line that is too long.
async fn converse(stream: UnixStream, handler: &dyn Handler) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut bounded = (&mut reader).take(MAX_REQUEST);
        let length =
            tokio::time::timeout(IDLE_TIMEOUT, bounded.read_until(b'\n', &mut line)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        if length == 0 {
            return Ok(());
        }
        let complete = line.last() == Some(&b'\n');
        let response = match serde_json::from_slice(&line) {
            Ok(request) if complete => handler.handle(request).await,
            Ok(_) => return Ok(()),
            Err(error) => Response::Error { message: format!("not a request that this mount knows: {error}") },
        };
        let mut answer = serde_json::to_vec(&response).map_err(io::Error::other)?;
        answer.push(b'\n');
        writer.write_all(&answer).await?;
        if !complete {
            // The rest of an endless line is nobody's request.
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    struct Echo;

    #[async_trait]
    impl Handler for Echo {
        async fn handle(&self, request: Request) -> Response {
            match request {
                Request::Refresh => Response::Ok,
                _ => Response::Error { message: "no".into() },
            }
        }
    }

    async fn say(bytes: &[u8]) -> Vec<u8> {
        let (mut client, server) = UnixStream::pair().unwrap();
        let task = tokio::spawn(async move { converse(server, &Echo).await });
        let _ = client.write_all(bytes).await;
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        let _ = task.await.unwrap();
        answer
    }

    #[tokio::test]
    async fn requests_are_answered_in_turn() {
        let answer = say(b"{\"request\":\"refresh\"}\n{\"request\":\"ping\"}\n").await;
        assert_eq!(answer, b"{\"response\":\"ok\"}\n{\"response\":\"error\",\"message\":\"no\"}\n");
    }

    #[tokio::test]
    async fn nonsense_is_answered_and_an_endless_line_ends_the_connection() {
        assert!(say(b"\xff\0{}\n").await.starts_with(b"{\"response\":\"error\""));
        assert!(say(&vec![b'x'; MAX_REQUEST as usize * 2]).await.len() < 1000);
    }
}
