//! `packmule demo`: the whole path on one machine. An S3 server (s3s-fs) within this program, a bucket, a mount; a real file
//! is copied in through the mount and read back by plain HTTP with a time-limited link.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use self::server::Server;
use crate::config::{Argument, Config, Environment, Invocation};
use crate::daemon;
use crate::mount::Mount;
use crate::s3::Account;

mod release;
mod server;
mod store;

/// The bucket.
const BUCKET: &str = "releases";

/// The file's name in it.
const NAME: &str = "packmule-demo.tar";

/// Lifetime of the link in seconds.
const LINK_SECONDS: u64 = 3600;

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Do it all, unmount, end with 0 or 1.
    pub check: bool,
    /// Where everything goes; `None`: a fresh folder under the temporary directory, removed at the end.
    pub folder: Option<PathBuf>,
}

/// The folders of one demo.
struct Place {
    /// Removes a fresh folder at the end.
    _fresh: Option<tempfile::TempDir>,
    data: PathBuf,
    mountpoint: PathBuf,
    original: PathBuf,
    credentials: PathBuf,
    home: PathBuf,
    log: PathBuf,
    base: PathBuf,
}

impl Place {
    fn make(options: &Options) -> io::Result<Self> {
        let fresh = match options.folder {
            Some(_) => None,
            None => Some(tempfile::Builder::new().prefix("packmule-demo-").tempdir()?),
        };
        let base = match (&options.folder, &fresh) {
            (Some(folder), _) => std::path::absolute(folder)?,
            (None, Some(fresh)) => fresh.path().to_owned(),
            (None, None) => std::env::temp_dir(),
        };
        let place = Self {
            data: base.join("data"),
            mountpoint: base.join("mount"),
            original: base.join("original.tar"),
            credentials: base.join("credentials"),
            home: base.join("home"),
            log: base.join("packmule.log"),
            base,
            _fresh: fresh,
        };
        for folder in [&place.data, &place.mountpoint, &place.home] {
            std::fs::create_dir_all(folder)?;
        }
        Ok(place)
    }

    fn config(&self, server: &Server) -> anyhow::Result<Config> {
        let word = |name: &str, value: &Path| Argument::Word(name.into(), Some(value.display().to_string()));
        let arguments = vec![
            Argument::Word("endpoint_url".into(), Some(format!("http://{}", server.address))),
            Argument::Word("region".into(), Some("us-east-1".into())),
            word("credentials_file", &server.credentials),
            word("log_file", &self.log),
        ];
        let invocation = Invocation { source: format!("s3://{BUCKET}/"), mountpoint: self.mountpoint.clone(), arguments, sloppy: false };
        Ok(Config::load(&invocation, &Environment::isolated(&self.home))?)
    }
}

/// Runs the demo; says what goes wrong in one line.
pub fn run(options: &Options) -> ExitCode {
    let result = daemon::runtime().map_err(anyhow::Error::from).and_then(|runtime| {
        let result = runtime.block_on(demo(options));
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("packmule demo: {}", daemon::one_line(&error));
            ExitCode::FAILURE
        }
    }
}

async fn demo(options: &Options) -> anyhow::Result<()> {
    let place = Place::make(options).context("no folder for the demo")?;
    let server = Server::start(&place.data, place.credentials.clone()).await?;
    let config = place.config(&server)?;
    daemon::log::start(&config, false)?;
    daemon::log::log_panics();
    let mut stop = daemon::Stop::new()?;

    say(format_args!("S3 server    http://{} (s3s-fs, within this program)", server.address));
    make_bucket(&config).await?;
    say(format_args!("bucket       s3://{BUCKET}, its files in {}", place.data.join(BUCKET).display()));
    let mut mount = Mount::start(&config).await?;
    say(format_args!("mounted      {}", place.mountpoint.display()));

    let outcome = tokio::select! {
        outcome = show(&place, &server, &mount) => outcome,
        () = stop.asked() => Err(anyhow::anyhow!("interrupted")),
    };
    if outcome.is_ok() && !options.check {
        say(format_args!(
            "\nCtrl-C ends it: unmounts, and {}.",
            if options.folder.is_some() { "leaves the folder" } else { "removes the folder" }
        ));
        tokio::select! {
            () = stop.asked() => {}
            () = mount.ended() => {}
            asker = mount.umount_asked() => asker.answer(mount.drain().await).await,
        }
    }
    let left = mount.drain().await;
    mount.unmount().await?;
    outcome?;
    ensure!(left.is_empty(), "{} files did not reach the bucket: the log {} says why", left.len(), place.log.display());
    say(format_args!("unmounted    {}", place.mountpoint.display()));
    Ok(())
}

fn say(line: std::fmt::Arguments<'_>) {
    // A closed standard output is no reason to leave the mount behind.
    let _ = writeln!(io::stdout(), "{line}");
}

async fn make_bucket(config: &Config) -> anyhow::Result<()> {
    let client = crate::s3::client::Client::new(config.client.clone()).map_err(|error| anyhow::anyhow!(error.to_string()))?;
    match client.create_bucket(BUCKET).await {
        // A folder that was used before.
        Err(error) if error.kind == crate::s3::ErrorKind::BucketExists => Ok(()),
        result => result.map_err(|error| anyhow::anyhow!(error.to_string())),
    }
}

/// Copies, reads back, compares, and says where to look.
async fn show(place: &Place, server: &Server, mount: &Mount) -> anyhow::Result<()> {
    let original = place.original.clone();
    let files = tokio::task::spawn_blocking(move || release::write(&original)).await?.context("cannot make the file to copy")?;
    let (from, to) = (place.original.clone(), place.mountpoint.join(NAME));
    let size = std::fs::metadata(&from)?.len();
    say(format_args!("file         {NAME}: {:.1} MiB, {files} programs and libraries of this machine", mib(size)));

    let started = Instant::now();
    let sent = tokio::task::spawn_blocking(move || copy_in(&from, &to)).await??;
    say(format_args!("copied in    {:.2} s until close() returned: the object is in the bucket", started.elapsed().as_secs_f64()));

    let store = mount.client().bucket(BUCKET).await?;
    let link = store.presign_get(NAME, LINK_SECONDS, &[]).await?;
    let (received, length) = fetch(&link).await.context("the link does not answer")?;
    say(format_args!("read back    {:.1} MiB by plain HTTP", mib(length)));
    let on_disk = place.data.join(BUCKET).join(NAME);
    let kept = tokio::task::spawn_blocking(move || checksum(&on_disk)).await??;
    say(format_args!(
        "sha256       {sent}  copied in\n             {received}  read by the link\n             {kept}  in the bucket's folder"
    ));
    ensure!(sent == received && sent == kept && length == size, "the checksums differ: what came back is not what was copied in");
    say(format_args!("             all the same\n"));

    say(format_args!("Look at it yourself:"));
    say(format_args!("  ls -l {}", place.mountpoint.display()));
    say(format_args!("  ls -l {}", place.data.join(BUCKET).display()));
    say(format_args!("  curl -O -J '{link}'   # for {} minutes", LINK_SECONDS / 60));
    say(format_args!(
        "  AWS_SHARED_CREDENTIALS_FILE={} AWS_REGION=us-east-1 aws --endpoint-url http://{} s3 ls s3://{BUCKET}/",
        server.credentials.display(),
        server.address
    ));
    say(format_args!("  everything else (log, spool, cache) is in {}", place.base.display()));
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// As a file manager copies: 1 MiB at a time, and close() tells whether it worked.
fn copy_in(from: &Path, to: &Path) -> anyhow::Result<String> {
    let size = std::fs::metadata(from)?.len();
    let bar = if io::stderr().is_terminal() { ProgressBar::new(size) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("copying      {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}")?;
    bar.set_style(style);
    bar.enable_steady_tick(Duration::from_millis(100));

    let mut source = File::open(from)?;
    let mut target = File::create(to).with_context(|| format!("{}: cannot be made", to.display()))?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let length = source.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        hasher.update(&buffer[..length]);
        target.write_all(&buffer[..length]).with_context(|| format!("{}: cannot be written", to.display()))?;
        bar.inc(length as u64);
    }
    // Dropping a File hides what close() says.
    nix::unistd::close(target).with_context(|| format!("{}: close", to.display()))?;
    bar.finish_and_clear();
    Ok(hex::encode(hasher.finalize()))
}

fn checksum(path: &Path) -> anyhow::Result<String> {
    let (mut file, mut hasher, mut buffer) =
        (File::open(path).with_context(|| path.display().to_string())?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hasher.finalize())),
            length => hasher.update(&buffer[..length]),
        }
    }
}

/// GET without any S3 about it: checksum and length of the body.
async fn fetch(link: &str) -> anyhow::Result<(String, u64)> {
    let url = url::Url::parse(link)?;
    let authority = format!("{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or(80));
    let stream = tokio::net::TcpStream::connect(&authority).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let target = link.split_once(&authority).map(|(_, target)| target).unwrap_or("/");
    let request = http::Request::get(target).header("host", &authority).body(Empty::new())?;
    let response = sender.send_request(request).await?;
    ensure!(response.status().is_success(), "HTTP status {}", response.status());
    let (mut body, mut hasher, mut length) = (response.into_body(), Sha256::new(), 0);
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            hasher.update(&data);
            length += data.len() as u64;
        }
    }
    connection.abort();
    Ok((hex::encode(hasher.finalize()), length))
}
