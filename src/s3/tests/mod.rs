//! The client against a server in this process whose every answer is scripted, byte for byte.
#![allow(clippy::unwrap_used)]

mod answers;
mod faults;
mod signatures;
mod uploads;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::Store;
use super::client::{Client, ClientConfig};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `GET /b/k?x`.
    pub line: String,
    /// Lower-case names.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

/// What the server does with a request.
pub enum Reply {
    /// Status line, headers and body; the connection closes.
    Raw(String),
    /// Closes without a byte.
    Close,
    /// Says nothing, ever.
    Silence,
}

/// An answer with its length stated.
pub fn reply(status: &str, headers: &[(&str, &str)], body: &str) -> Reply {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    Reply::Raw(format!("HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()))
}

/// An S3 error.
pub fn refuse(status: &str, code: &str) -> Reply {
    reply(status, &[("content-type", "application/xml")], &format!("<Error><Code>{code}</Code><Message>told</Message></Error>"))
}

/// The scripted server: `script(n, request)` answers the n-th request (from 0).
pub struct Server {
    pub url: String,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<Seen> {
    let mut text = Vec::new();
    let end = loop {
        if let Some(end) = text.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        let mut chunk = [0u8; 4096];
        let got = stream.read(&mut chunk).await.ok().filter(|got| *got > 0)?;
        text.extend_from_slice(&chunk[..got]);
    };
    let head = String::from_utf8_lossy(&text[..end]).into_owned();
    let mut lines = head.lines();
    let line = lines.next()?.trim_end_matches(" HTTP/1.1").to_owned();
    let headers: Vec<(String, String)> =
        lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
    let length = headers.iter().find(|(name, _)| name == "content-length").map_or(0, |(_, value)| value.parse().unwrap());
    let mut body = text[end + 4..].to_vec();
    while body.len() < length {
        let mut chunk = [0u8; 65_536];
        let got = stream.read(&mut chunk).await.ok().filter(|got| *got > 0)?;
        body.extend_from_slice(&chunk[..got]);
    }
    Some(Seen { line, headers, body })
}

impl Server {
    pub async fn start(script: impl Fn(usize, &Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (shared, script) = (Arc::clone(&seen), Arc::new(script));
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (shared, script) = (Arc::clone(&shared), Arc::clone(&script));
                tokio::spawn(async move {
                    let Some(request) = read_request(&mut stream).await else { return };
                    let number = {
                        let mut all = shared.lock();
                        all.push(request.clone());
                        all.len() - 1
                    };
                    match script(number, &request) {
                        Reply::Raw(text) => {
                            let _ = stream.write_all(text.as_bytes()).await;
                            let _ = stream.shutdown().await;
                        }
                        Reply::Close => {}
                        Reply::Silence => tokio::time::sleep(Duration::from_secs(600)).await,
                    }
                });
            }
        });
        Self { url, seen, task }
    }

    pub fn count(&self) -> usize {
        self.seen.lock().len()
    }

    pub fn request(&self, index: usize) -> Seen {
        self.seen.lock()[index].clone()
    }

    /// The store of bucket `b`, with keys from a password file of its own.
    pub fn bucket(&self, change: impl FnOnce(&mut ClientConfig)) -> Arc<dyn Store> {
        self.client(change).open("b").unwrap()
    }

    pub fn client(&self, change: impl FnOnce(&mut ClientConfig)) -> Arc<Client> {
        let mut config = ClientConfig {
            endpoint_url: Some(self.url.parse().unwrap()),
            region: Some("us-east-1".into()),
            passwd_file: Some(passwd("AK:SK\n")),
            ..ClientConfig::default()
        };
        change(&mut config);
        Client::new(config).unwrap()
    }
}

/// A password file that stays for the test's life.
pub fn passwd(text: &str) -> std::path::PathBuf {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file.into_temp_path().keep().unwrap()
}
