//! Where credentials come from: s3fs's password file, or AWS's chain (environment, profile, SSO, process, web identity, ECS,
//! IMDSv2), with or without a role on top. Kept until they are about to end or the store refuses them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqsign_aws_v4::{
    AssumeRoleCredentialProvider, AssumeRoleWithWebIdentityCredentialProvider, Credential, ECSCredentialProvider, EnvCredentialProvider,
    IMDSv2CredentialProvider, ProcessCredentialProvider, ProfileCredentialProvider, RequestSigner, SSOCredentialProvider,
};
use reqsign_core::{
    CommandExecute, CommandOutput, Context, Env, HttpSend, OsEnv, ProvideCredential, ProvideCredentialChain, ProvideCredentialDyn, Signer,
    SigningCredential as _,
};
use reqsign_file_read_tokio::TokioFileRead;
use reqsign_http_send_reqwest::ReqwestHttpSend;

use super::passwd;
use super::profile::{self, Profiles};

/// What was asked for.
#[derive(Clone, Debug, Default)]
pub struct CredentialsConfig {
    /// A profile's name; it then goes before the environment's keys.
    pub profile: Option<String>,
    /// s3fs's password file.
    pub passwd_file: Option<PathBuf>,
    /// Instead of `~/.aws/credentials`.
    pub credentials_file: Option<PathBuf>,
    /// A role to assume with what the chain gives.
    pub role_arn: Option<String>,
    /// `ExternalId` of that role.
    pub external_id: Option<String>,
    /// Only the machine's or container's own role (`auto` or its name).
    pub iam_role: Option<String>,
    /// Sign nothing.
    pub no_sign_request: bool,
    /// Region of STS.
    pub region: Option<String>,
}

type Provider = Arc<dyn ProvideCredentialDyn<Credential = Credential>>;

enum Source {
    Anonymous,
    Passwd(PathBuf),
    Chain(Provider),
}

/// How often credentials are read again only because a refusal may be about them.
const DOUBT: Duration = Duration::from_secs(60);

struct Kept {
    credential: Credential,
    since: Instant,
}

/// The credentials of a mount.
pub struct Credentials {
    source: Source,
    context: Context,
    /// By bucket for a password file, else under `None`. The lock is held while they are fetched: one fetch for all.
    cached: tokio::sync::Mutex<HashMap<Option<String>, Kept>>,
    missing: String,
    told: Arc<Told>,
}

/// What the providers of a chain told, in words.
#[derive(Debug, Default)]
struct Told {
    /// Which gave the credentials that are used.
    winner: parking_lot::Mutex<Option<String>>,
    /// The last one that was to give some and failed, and why.
    failed: parking_lot::Mutex<Option<String>>,
}

/// A provider that says so when it gave credentials.
#[derive(Debug)]
struct Named {
    provider: Provider,
    name: String,
    /// Whose failure is worth a word: a machine that has no metadata service is no fault.
    is_set_up: bool,
    told: Arc<Told>,
}

impl ProvideCredential for Named {
    type Credential = Credential;

    async fn provide_credential(&self, context: &Context) -> reqsign_core::Result<Option<Credential>> {
        let found = self.provider.provide_credential_dyn(context).await.inspect_err(|error| {
            // The chain goes on to the next one, and at its end nobody knows why this one had nothing.
            if self.is_set_up {
                *self.told.failed.lock() = Some(format!("{}: {error}", self.name));
            }
        })?;
        if found.is_some() {
            *self.told.winner.lock() = Some(self.name.clone());
        }
        Ok(found)
    }
}

/// Names providers of a chain.
#[derive(Clone)]
struct Names {
    told: Arc<Told>,
    /// What is done with their credentials.
    purpose: String,
}

impl Names {
    fn of(&self, name: impl Into<String>, provider: impl ProvideCredential<Credential = Credential> + 'static) -> Named {
        Named { provider: Arc::new(provider), name: name.into() + &self.purpose, is_set_up: true, told: self.told.clone() }
    }

    fn for_role(&self, role: &str) -> Self {
        Self { purpose: format!(", which assume {role}{}", self.purpose), ..self.clone() }
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let source = match &self.source {
            Source::Anonymous => "anonymous",
            Source::Passwd(_) => "passwd_file",
            Source::Chain(_) => "chain",
        };
        f.debug_struct("Credentials").field("source", &source).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads no credentials yet, but names a file or profile that cannot be used.
    ///
    /// # Errors
    /// One line with the remedy.
    pub fn new(config: &CredentialsConfig, client: reqwest::Client) -> Result<Self, String> {
        let context = context(client)?;
        let told: Arc<Told> = Arc::default();
        let source = if config.no_sign_request {
            Source::Anonymous
        } else if let Some(path) = &config.passwd_file {
            Source::Passwd(path.clone())
        } else {
            Source::Chain(chain(config, &context, &Names { told: told.clone(), purpose: String::new() })?)
        };
        Ok(Self { source, context, cached: tokio::sync::Mutex::default(), missing: missing(config), told })
    }

    /// Where the last ones came from, in words.
    pub fn source(&self) -> String {
        match &self.source {
            Source::Anonymous => "none: requests go unsigned (no_sign_request)".to_owned(),
            Source::Passwd(path) => format!("the keys in {} (passwd_file)", path.display()),
            Source::Chain(_) => self.told.winner.lock().clone().unwrap_or_else(|| "nowhere yet".to_owned()),
        }
    }

    /// True when nothing is signed.
    pub fn is_anonymous(&self) -> bool {
        matches!(self.source, Source::Anonymous)
    }

    /// Usable credentials for a bucket; `None` when requests are to go unsigned.
    ///
    /// # Errors
    /// One line: none found, or the file or service that failed.
    pub async fn get(&self, bucket: Option<&str>) -> Result<Option<Credential>, String> {
        let slot = self.slot(bucket);
        let mut cached = self.cached.lock().await;
        if let Some(found) = cached.get(&slot).filter(|kept| kept.credential.is_valid()) {
            return Ok(Some(found.credential.clone()));
        }
        let fresh = match &self.source {
            Source::Anonymous => return Ok(None),
            Source::Passwd(path) => {
                let (path, bucket) = (path.clone(), slot.clone());
                tokio::task::spawn_blocking(move || passwd::read(&path, bucket.as_deref())).await.map_err(|error| error.to_string())??
            }
            Source::Chain(provider) => match provider.provide_credential_dyn(&self.context).await {
                Ok(Some(credential)) => credential,
                Ok(None) => {
                    let failed =
                        self.told.failed.lock().take().map(|failed| format!(" ({})", failed.replace('\n', " "))).unwrap_or_default();
                    return Err(format!("{}{failed}", self.missing));
                }
                Err(error) => return Err(format!("{}: {error}", self.missing)),
            },
        };
        cached.insert(slot, Kept { credential: fresh.clone(), since: Instant::now() });
        Ok(Some(fresh))
    }

    /// The store refused `used`: forgets it, so that the next [`Credentials::get`] reads again. False when there is nothing to
    /// read again or somebody already did.
    pub async fn refused(&self, used: &Credential) -> bool {
        if self.is_anonymous() {
            return false;
        }
        self.cached.lock().await.retain(|_, kept| !same(&kept.credential, used));
        true
    }

    /// For a refusal that does not say whether it is about the key: reads again (at most once a minute) and tells whether the
    /// credentials are others now.
    pub async fn rotated(&self, bucket: Option<&str>, used: &Credential) -> bool {
        let slot = self.slot(bucket);
        {
            let mut cached = self.cached.lock().await;
            match cached.get(&slot) {
                Some(kept) if !same(&kept.credential, used) => return true,
                Some(kept) if kept.since.elapsed() < DOUBT => return false,
                _ => cached.remove(&slot),
            };
        }
        matches!(self.get(bucket).await, Ok(Some(fresh)) if !same(&fresh, used))
    }

    fn slot(&self, bucket: Option<&str>) -> Option<String> {
        bucket.filter(|_| matches!(self.source, Source::Passwd(_))).map(str::to_owned)
    }
}

fn same(one: &Credential, other: &Credential) -> bool {
    one.access_key_id == other.access_key_id && one.session_token == other.session_token && one.secret_access_key == other.secret_access_key
}

fn missing(config: &CredentialsConfig) -> String {
    if let Some(file) = &config.credentials_file {
        return format!("no credentials found in credentials_file {}", file.display());
    }
    if config.iam_role.is_some() {
        return "no credentials found: this machine or container has no IAM role (iam_role)".to_owned();
    }
    match &config.profile {
        Some(profile) => format!("no credentials found in profile {profile}; run: aws configure --profile {profile}"),
        None => match unreadable(&profile::paths(None)) {
            Some((path, error)) => {
                format!("no credentials found, and {} cannot be read: {error}; make it readable for the user who mounts", path.display())
            }
            None => {
                "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, run `aws configure`, or name passwd_file= or profile="
                    .to_owned()
            }
        },
    }
}

/// The first of AWS's files that is there and that this user may not read.
fn unreadable(paths: &[PathBuf]) -> Option<(&PathBuf, std::io::Error)> {
    let refused = |path| Some((path, std::fs::File::open(path).err()?));
    paths.iter().filter_map(refused).find(|(_, error)| error.kind() == std::io::ErrorKind::PermissionDenied)
}

/// The environment as AWS's tools read it: a variable that is set to nothing is not set.
#[derive(Debug)]
struct Environment;

impl Env for Environment {
    fn var(&self, key: &str) -> Option<String> {
        OsEnv.var(key).filter(|value| !value.is_empty())
    }

    fn vars(&self) -> HashMap<String, String> {
        OsEnv.vars().into_iter().filter(|(_, value)| !value.is_empty()).collect()
    }

    fn home_dir(&self) -> Option<PathBuf> {
        OsEnv.home_dir()
    }
}

fn chain(config: &CredentialsConfig, context: &Context, names: &Names) -> Result<Provider, String> {
    if let Some(path) = &config.credentials_file {
        let unreadable = |error| format!("credentials_file {}: {error}; name a readable file", path.display());
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        // One that only names roles and single sign-on (`shared_config`) is no secret; `~/.aws` is judged by nobody else either.
        if text.contains("aws_secret_access_key") {
            passwd::is_private("credentials_file", path, &std::fs::metadata(path).map_err(unreadable)?)?;
        }
    }
    let profiles = Profiles::load(&profile::paths(config.credentials_file.as_deref()));
    let above = config.role_arn.as_ref().map_or_else(|| names.clone(), |role| names.for_role(role));
    let base: Provider = if config.iam_role.is_some() {
        Arc::new(ProvideCredentialChain::new().push(container(&above)).push(instance(&above)))
    } else {
        let environment = std::env::var("AWS_PROFILE").ok().filter(|name| !name.is_empty());
        if let Some(name) = &config.profile
            && !profiles.contains(name)
        {
            return Err(format!("profile {name} is not in ~/.aws/config or ~/.aws/credentials; run: aws configure --profile {name}"));
        }
        let name = config.profile.clone().or(environment).unwrap_or_else(|| "default".to_owned());
        from_profile(config, context, &profiles, &name, 0, &above)?
    };
    Ok(match &config.role_arn {
        Some(role) => assume(context, base, role, config.external_id.as_deref(), None, config.region.as_deref()),
        None => base,
    })
}

fn environment(names: &Names) -> Named {
    names.of("the environment's keys (AWS_ACCESS_KEY_ID)", EnvCredentialProvider::new())
}

fn container(names: &Names) -> Named {
    Named { is_set_up: false, ..names.of("the container's role", ECSCredentialProvider::new()) }
}

fn instance(names: &Names) -> Named {
    Named { is_set_up: false, ..names.of("the machine's role (IMDSv2)", IMDSv2CredentialProvider::new()) }
}

fn file_profile(config: &CredentialsConfig, name: &str, names: &Names) -> Named {
    let provider = ProfileCredentialProvider::new().with_profile(name);
    match &config.credentials_file {
        Some(path) => names.of(format!("profile {name} of {}", path.display()), provider.with_credentials_file(path.to_string_lossy())),
        None => names.of(format!("profile {name}"), provider),
    }
}

/// The chain as one profile means it; roles of profiles may build on each other, five deep.
fn from_profile(
    config: &CredentialsConfig,
    context: &Context,
    profiles: &Profiles,
    name: &str,
    depth: u8,
    names: &Names,
) -> Result<Provider, String> {
    if depth > 5 {
        return Err(format!("profile {name}: source_profile goes in a circle"));
    }
    let settings = profiles.get(name);
    let region = settings.region.as_deref().or(config.region.as_deref());
    // Keys that were set in the environment go before the profile, unless the profile was asked for by name.
    let explicit = config.profile.is_some() || config.credentials_file.is_some() || depth > 0;
    let Some(role) = &settings.role_arn else {
        // reqsign's own order.
        let mut chain = ProvideCredentialChain::new();
        if !explicit {
            chain = chain.push(environment(names));
        }
        chain = chain.push(file_profile(config, name, names));
        chain = chain.push(names.of(format!("AWS SSO, by profile {name}"), SSOCredentialProvider::default().with_profile(name)));
        if config.credentials_file.is_none() {
            let token = AssumeRoleWithWebIdentityCredentialProvider::default();
            chain = chain.push(names.of("a web identity token (AWS_WEB_IDENTITY_TOKEN_FILE)", token));
        }
        let process = ProcessCredentialProvider::default().with_profile(name);
        chain = chain.push(names.of(format!("credential_process of profile {name}"), process));
        if config.credentials_file.is_none() {
            chain = chain.push(container(names)).push(instance(names));
        }
        return Ok(Arc::new(chain));
    };
    let of_role = names.for_role(role);
    let assumed: Provider = if let Some(token) = &settings.web_identity_token_file {
        let provider = AssumeRoleWithWebIdentityCredentialProvider::with_config(role.clone(), PathBuf::from(token));
        Arc::new(names.of(format!("role {role}, by the token in {token}"), provider))
    } else {
        let base: Provider = match (settings.source_profile.as_deref(), settings.credential_source.as_deref()) {
            (Some(source), _) if source == name => Arc::new(file_profile(config, name, &of_role)),
            (Some(source), _) => from_profile(config, context, profiles, source, depth + 1, &of_role)?,
            (None, Some("Environment")) => Arc::new(environment(&of_role)),
            (None, Some("Ec2InstanceMetadata")) => Arc::new(instance(&of_role)),
            (None, Some("EcsContainer")) => Arc::new(container(&of_role)),
            (None, _) => return Err(format!("profile {name} has role_arn but neither source_profile nor credential_source")),
        };
        assume(
            context,
            base,
            role,
            settings.external_id.as_deref().or(config.external_id.as_deref()),
            settings.role_session_name.as_deref(),
            region,
        )
    };
    if explicit {
        return Ok(assumed);
    }
    Ok(Arc::new(ProvideCredentialChain::new().push(environment(names)).push(assumed)))
}

fn assume(
    context: &Context,
    base: Provider,
    role: &str,
    external_id: Option<&str>,
    session: Option<&str>,
    region: Option<&str>,
) -> Provider {
    let region = region.unwrap_or("us-east-1");
    let signer = Signer::new(context.clone(), base, RequestSigner::new("sts", region));
    let mut provider = AssumeRoleCredentialProvider::new(role.to_owned(), signer)
        .with_role_session_name(session.unwrap_or("packmule").to_owned())
        .with_region(region.to_owned())
        .with_regional_sts_endpoint();
    if let Some(id) = external_id {
        provider = provider.with_external_id(id.to_owned());
    }
    Arc::new(provider)
}

fn context(client: reqwest::Client) -> Result<Context, String> {
    // Metadata services are link-local plain HTTP: never through a proxy, and absent ones must not hold up a mount.
    let local = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .connect_timeout(Duration::from_secs(1))
        .timeout(Duration::from_secs(5))
        .build()
        .map_err(|error| super::http::root_cause(&error))?;
    let http = Http { local: ReqwestHttpSend::new(local), remote: ReqwestHttpSend::new(client) };
    Ok(Context::new().with_file_read(TokioFileRead).with_http_send(http).with_env(Environment).with_command_execute(Command))
}

/// Sends to metadata services directly and to STS and SSO as S3 requests go.
#[derive(Debug)]
struct Http {
    local: ReqwestHttpSend,
    remote: ReqwestHttpSend,
}

impl HttpSend for Http {
    async fn http_send(&self, request: http::Request<Bytes>) -> reqsign_core::Result<http::Response<Bytes>> {
        let host = request.uri().host().unwrap_or("").trim_matches(['[', ']']);
        let near = match host.parse::<IpAddr>() {
            Ok(IpAddr::V4(ip)) => ip.is_link_local() || ip.is_loopback(),
            Ok(IpAddr::V6(ip)) => ip.is_unique_local() || ip.is_loopback(),
            Err(_) => host == "localhost",
        };
        if near {
            return self.local.http_send(request).await;
        }
        let limit = Duration::from_secs(30);
        match tokio::time::timeout(limit, self.remote.http_send(request)).await {
            Ok(answer) => answer,
            Err(_) => Err(reqsign_core::Error::unexpected(format!("no answer within {} s", limit.as_secs()))),
        }
    }
}

/// Runs `credential_process`.
#[derive(Debug)]
struct Command;

impl CommandExecute for Command {
    async fn command_execute<'a>(&'a self, program: &'a str, args: &'a [&'a str]) -> reqsign_core::Result<CommandOutput> {
        let failed = |text: String| reqsign_core::Error::unexpected(format!("credential_process {program}: {text}"));
        let run = tokio::process::Command::new(program).args(args).stdin(std::process::Stdio::null()).kill_on_drop(true).output();
        let output = tokio::time::timeout(Duration::from_secs(60), run)
            .await
            .map_err(|_| failed("no answer within 60 s".into()))?
            .map_err(|error| failed(error.to_string()))?;
        Ok(CommandOutput { status: output.status.code().unwrap_or(-1), stdout: output.stdout, stderr: output.stderr })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn secret_file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[tokio::test]
    async fn a_rotated_file_is_read_again_after_a_refusal() {
        let file = secret_file("K1:S1\n");
        let config = CredentialsConfig { passwd_file: Some(file.path().into()), ..Default::default() };
        let credentials = Credentials::new(&config, reqwest::Client::new()).unwrap();
        let first = credentials.get(Some("b")).await.unwrap().unwrap();
        std::fs::write(file.path(), "K2:S2\n").unwrap();
        assert_eq!(credentials.get(Some("b")).await.unwrap().unwrap().access_key_id, "K1");
        assert!(credentials.refused(&first).await);
        assert_eq!(credentials.get(Some("b")).await.unwrap().unwrap().access_key_id, "K2");
        assert!(!format!("{credentials:?}").contains("S2"));
    }

    #[tokio::test]
    async fn a_credentials_file_and_its_profile() {
        let file = secret_file("[release]\naws_access_key_id = AK\naws_secret_access_key = SK\n");
        let config =
            CredentialsConfig { credentials_file: Some(file.path().into()), profile: Some("release".into()), ..Default::default() };
        let credentials = Credentials::new(&config, reqwest::Client::new()).unwrap();
        assert_eq!(credentials.get(None).await.unwrap().unwrap().access_key_id, "AK");
        let absent = CredentialsConfig { profile: Some("nobody".into()), ..config };
        assert!(Credentials::new(&absent, reqwest::Client::new()).unwrap_err().contains("profile nobody"));
    }

    #[tokio::test]
    async fn nothing_is_signed_when_asked() {
        let config = CredentialsConfig { no_sign_request: true, ..Default::default() };
        let credentials = Credentials::new(&config, reqwest::Client::new()).unwrap();
        assert!(credentials.is_anonymous() && credentials.get(None).await.unwrap().is_none());
    }
}
