//! Requests for Amazon S3, Google Cloud Storage and Azure, signed by object_store.
//!
//! The problem: object_store has the credentials and signatures of all stores. But it forgets what a
//! server says of when to ask again, shortens ranges in silence, accepts encoded bodies, and puts
//! signed URLs into its errors.
//!
//! The plan: it makes and signs the request for a range, and our own client sends it. Its HTTP
//! client is ours, which keeps such a request instead of sending it; what object_store then says of
//! the failure is dropped. Requests for credentials are sent as they are.

use std::collections::HashMap;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use async_trait::async_trait;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{ClientOptions, GetOptions, GetRange, ObjectStore, RetryConfig};
use parking_lot::Mutex;
use reqwest::{Request, Response, Url};

use super::address::{StoreKind, is_http};
use super::client::Client;
use super::credentials::{aws_profile, from_start, variable};
use super::fault::{Fault, Kind};
use super::pin::Pin;

/// An object of a store.
pub struct Store {
    kind: StoreKind,
    bucket: String,
    path: Path,
    http: reqwest::Client,
    /// `None` once its credentials were refused, until the next request.
    signer: Mutex<Option<Arc<dyn ObjectStore>>>,
}

impl Store {
    /// An object that requests will be signed for.
    pub fn new(kind: StoreKind, bucket: &str, key: &str, client: &Client) -> Result<Self, Fault> {
        let path = Path::parse(key).map_err(|_| Fault::Setting {
            name: "the key".to_owned(),
            problem: "has empty or relative names in it, for which no request can be signed here",
            hint: "write a signed URL of the object into a file and pass --url-file",
        })?;
        let store = Self {
            kind,
            bucket: checked("the bucket", bucket, Form::Name)?,
            path,
            http: client.http.clone(),
            signer: Mutex::new(None),
        };
        store.signer()?;
        Ok(store)
    }

    /// Whose credentials it needs.
    pub fn kind(&self) -> Kind {
        match self.kind {
            StoreKind::S3 => Kind::S3,
            StoreKind::Google => Kind::Google,
            StoreKind::Azure => Kind::Azure,
        }
    }

    /// The bucket.
    pub fn shown(&self) -> String {
        format!("{}://{}", self.kind.scheme(), self.bucket)
    }

    /// Has credentials looked for anew.
    pub fn renew(&self) {
        *self.signer.lock() = None;
    }

    fn signer(&self) -> Result<Arc<dyn ObjectStore>, Fault> {
        let mut signer = self.signer.lock();
        if let Some(signer) = &*signer {
            return Ok(signer.clone());
        }
        let made = make(self.kind, &self.bucket, Keeping(self.http.clone()))?;
        *signer = Some(made.clone());
        Ok(made)
    }

    /// A signed request for a range of the object, as it was pinned.
    pub async fn signed(&self, range: &Range<u64>, pin: Option<&Pin>) -> Result<Request, Fault> {
        let kept = Kept::default();
        let mut options = GetOptions {
            range: Some(GetRange::Bounded(range.clone())),
            if_match: pin.and_then(Pin::if_match).map(str::to_owned),
            ..GetOptions::default()
        };
        options.extensions.insert(kept.clone());
        let answer = self.signer()?.get_opts(&self.path, options).await;
        let Some(request) = kept.0.lock().take() else {
            // No credentials were found, or the service that gives them does not answer.
            let error = answer.err().map(|e| without_secrets(&e));
            return Err(Fault::Credentials(error.unwrap_or_default()));
        };
        let (head, _) = request.into_parts();
        let url = head.uri.to_string().parse();
        let url = url.map_err(|_| Fault::Client("the store has no usable URL".to_owned()))?;
        let mut request = Request::new(head.method, url);
        *request.headers_mut() = head.headers;
        Ok(request)
    }

    /// Where a bucket is that is not where it was asked for.
    pub fn elsewhere(&self, response: &Response) -> Option<Fault> {
        let status = response.status().as_u16();
        let region = response.headers().get("x-amz-bucket-region");
        let region = region.and_then(|region| region.to_str().ok());
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let region = region.filter(|region| region.chars().all(is_plain));
        let moved = response.status().is_redirection();
        let text = match (self.kind, region) {
            (StoreKind::S3, Some(region)) if moved || status == 400 => {
                format!("the bucket is in another region: set AWS_REGION={region}")
            }
            (StoreKind::S3, None) if moved => format!(
                "the bucket is somewhere else (status {status}): set AWS_REGION and AWS_ENDPOINT_URL to where it is"
            ),
            _ if moved => format!("requests for the bucket go somewhere else (status {status})"),
            _ => return None,
        };
        Some(Fault::Redirect(text))
    }
}

fn make(kind: StoreKind, bucket: &str, http: Keeping) -> Result<Arc<dyn ObjectStore>, Fault> {
    // Whether plain HTTP is allowed is checked when a request is sent; metadata services use it.
    let options = ClientOptions::new().with_allow_http(true);
    let retry = RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    };
    let failed = |e| Fault::Credentials(without_secrets(&e));
    Ok(match kind {
        StoreKind::S3 => {
            let mut builder = AmazonS3Builder::new().with_client_options(options);
            for (key, value) in from_environment("AWS_")?.into_iter().chain(aws_settings()?) {
                builder = builder.with_config(key, value);
            }
            let builder = builder.with_bucket_name(bucket).with_retry(retry);
            Arc::new(builder.with_http_connector(http).build().map_err(failed)?)
        }
        StoreKind::Google => {
            let mut builder = GoogleCloudStorageBuilder::new().with_client_options(options);
            if let Some(path) = variable("SERVICE_ACCOUNT") {
                let path = checked("SERVICE_ACCOUNT", &path, Form::Path)?;
                builder = builder.with_service_account_path(path);
            }
            for (key, value) in from_environment("GOOGLE_")? {
                builder = builder.with_config(key, value);
            }
            // As in Google's own libraries, which then sign nothing.
            if let Some(host) = variable("STORAGE_EMULATOR_HOST") {
                let scheme = if host.contains("://") { "" } else { "http://" };
                let url = format!("{scheme}{}", host.trim());
                let url = checked("STORAGE_EMULATOR_HOST", &url, Form::Url)?;
                builder = builder.with_base_url(&url).with_skip_signature(true);
            }
            let builder = builder.with_bucket_name(bucket).with_retry(retry);
            Arc::new(builder.with_http_connector(http).build().map_err(failed)?)
        }
        StoreKind::Azure => {
            let mut builder = MicrosoftAzureBuilder::new().with_client_options(options);
            if let Some(endpoint) = variable("IDENTITY_ENDPOINT") {
                let endpoint = checked("IDENTITY_ENDPOINT", &endpoint, Form::Url)?;
                builder = builder.with_msi_endpoint(endpoint);
            }
            for (key, value) in from_environment("AZURE_")?
                .into_iter()
                .chain(azure_connection()?)
            {
                builder = builder.with_config(key, value);
            }
            let builder = builder.with_container_name(bucket).with_retry(retry);
            Arc::new(builder.with_http_connector(http).build().map_err(failed)?)
        }
    })
}

/// What the value of a setting looks like. object_store panics while it signs if one does not.
#[derive(Debug, Clone, Copy)]
enum Form {
    Url,
    /// A part of a host or a path.
    Name,
    /// Goes into a header.
    Line,
    /// Of a file.
    Path,
    Any,
}

impl Form {
    fn of_variable(name: &str) -> Self {
        match name {
            "AWS_ENDPOINT_URL"
            | "AWS_ENDPOINT"
            | "AWS_ENDPOINT_URL_S3"
            | "AWS_ENDPOINT_URL_STS"
            | "AWS_METADATA_ENDPOINT"
            | "AWS_CONTAINER_CREDENTIALS_FULL_URI"
            | "GOOGLE_BASE_URL"
            | "AZURE_STORAGE_ENDPOINT"
            | "AZURE_ENDPOINT"
            | "AZURE_MSI_ENDPOINT"
            | "AZURE_IDENTITY_ENDPOINT"
            | "AZURE_FABRIC_TOKEN_SERVICE_URL"
            | "AZURE_STORAGE_AUTHORITY_HOST"
            | "AZURE_AUTHORITY_HOST" => Self::Url,
            "AWS_REGION" | "AWS_DEFAULT_REGION" | "AZURE_STORAGE_ACCOUNT_NAME" => Self::Name,
            "GOOGLE_SERVICE_ACCOUNT"
            | "GOOGLE_SERVICE_ACCOUNT_PATH"
            | "GOOGLE_APPLICATION_CREDENTIALS" => Self::Path,
            name if name.ends_with("_FILE") => Self::Path,
            // The text of a file.
            "GOOGLE_SERVICE_ACCOUNT_KEY" => Self::Any,
            _ => Self::Line,
        }
    }
}

/// A setting without the blanks around it, which come with keys that were copied. What is wrong with
/// it is said without showing it: it may be a secret.
fn checked(name: &str, value: &str, form: Form) -> Result<String, Fault> {
    let value = value.trim();
    let fault = |problem, hint| Fault::Setting {
        name: name.to_owned(),
        problem,
        hint,
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.$".contains(c);
    match form {
        Form::Url => {
            let url = Url::parse(value).ok().filter(|url| {
                let is_bare = url.query().is_none() && url.fragment().is_none();
                is_http(url) && is_bare && url.username().is_empty() && url.password().is_none()
            });
            let url = url.map(|url| url.as_str().trim_end_matches('/').to_owned());
            url.ok_or_else(|| {
                let hint = "write it as https://HOST or http://HOST:PORT, without user and query";
                fault("is not the URL of a server", hint)
            })
        }
        Form::Name if !value.chars().all(is_name) => Err(fault(
            "has characters in it that such a name cannot have",
            "use letters, digits, hyphens and dots only",
        )),
        Form::Line if value.chars().any(|c| c.is_control() || !c.is_ascii()) => Err(fault(
            "has characters in it that cannot be sent",
            "look for line ends in the middle of it, and copy it anew",
        )),
        Form::Path => Ok(from_start(value.into()).to_string_lossy().into_owned()),
        _ => Ok(value.to_owned()),
    }
}

/// The settings of the environment that object_store knows.
fn from_environment<K: FromStr>(prefix: &str) -> Result<Vec<(K, String)>, Fault> {
    let mut found = Vec::new();
    for (name, value) in std::env::vars_os() {
        if let (Some(name), Some(value)) = (name.to_str(), value.to_str())
            && name.starts_with(prefix)
            && !value.trim().is_empty()
            && let Ok(key) = name.to_ascii_lowercase().parse()
        {
            found.push((key, checked(name, value, Form::of_variable(name))?));
        }
    }
    Ok(found)
}

/// What a profile of the AWS tools says where the environment says nothing.
fn aws_settings() -> Result<Vec<(AmazonS3ConfigKey, String)>, Fault> {
    let profile = aws_profile();
    let is_unset = |names: &[&str]| names.iter().all(|name| variable(name).is_none());
    let mut wanted = Vec::new();
    let has = |name| profile.get(name).is_some_and(|value| !value.is_empty());
    if is_unset(&["AWS_ACCESS_KEY_ID"]) && has("aws_access_key_id") && has("aws_secret_access_key")
    {
        wanted.extend([
            (
                AmazonS3ConfigKey::AccessKeyId,
                "aws_access_key_id",
                Form::Line,
            ),
            (
                AmazonS3ConfigKey::SecretAccessKey,
                "aws_secret_access_key",
                Form::Line,
            ),
            (AmazonS3ConfigKey::Token, "aws_session_token", Form::Line),
        ]);
    }
    if wanted.is_empty() && is_unset(&OTHER_KEYS) {
        usable(&profile)?;
    }
    if is_unset(&["AWS_REGION", "AWS_DEFAULT_REGION"]) {
        wanted.push((AmazonS3ConfigKey::Region, "region", Form::Name));
    }
    if is_unset(&["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"]) {
        wanted.push((AmazonS3ConfigKey::Endpoint, "endpoint_url", Form::Url));
    }
    wanted.retain(|(_, name, _)| has(name));
    let settings = wanted.into_iter().map(|(key, name, form)| {
        let value = checked(&format!("{name} of the AWS profile"), &profile[name], form)?;
        Ok((key, value))
    });
    settings.collect()
}

/// Variables that lead to keys of AWS without a profile, or do without keys.
const OTHER_KEYS: [&str; 5] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
];

/// Fails if a profile without keys of its own is not there, or has another way to them. A machine of
/// Amazon may have keys for a program without a profile.
fn usable(profile: &HashMap<String, String>) -> Result<(), Fault> {
    let name = variable("AWS_PROFILE");
    if profile.is_empty() {
        return match name {
            None => Ok(()),
            Some(name) => Err(Fault::Credentials(format!(
                "AWS_PROFILE names {name:?}, and the files of the AWS tools have no such profile"
            ))),
        };
    }
    let ways = [
        "credential_process",
        "sso_session",
        "sso_start_url",
        "login_session",
    ];
    let ways = ways.into_iter().chain(["role_arn", "credential_source"]);
    let Some(way) = ways.into_iter().find(|way| profile.contains_key(*way)) else {
        return Ok(());
    };
    let name = name.unwrap_or_else(|| "default".to_owned());
    Err(Fault::Credentials(format!(
        "the AWS profile {name:?} gets its keys by {way}, which is not supported; `eval \"$(aws configure export-credentials --profile {name} --format env)\"` puts them into the environment"
    )))
}

/// What `AZURE_STORAGE_CONNECTION_STRING` says, as the portal of Azure writes it; nothing if it is not
/// set, or if an account is named by other variables.
fn azure_connection() -> Result<Vec<(AzureConfigKey, String)>, Fault> {
    const NAME: &str = "AZURE_STORAGE_CONNECTION_STRING";
    let Some(text) = variable(NAME) else {
        return Ok(Vec::new());
    };
    if variable("AZURE_STORAGE_ACCOUNT_NAME").is_some() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let (mut account, mut suffix, mut scheme) = (None, None, "https".to_owned());
    for (name, value) in text.split(';').filter_map(|pair| pair.split_once('=')) {
        let checked = |form| checked(&format!("{} of {NAME}", name.trim()), value, form);
        match name.trim() {
            "AccountName" => account = Some(checked(Form::Name)?),
            "EndpointSuffix" => suffix = Some(checked(Form::Name)?),
            "DefaultEndpointsProtocol" => scheme = checked(Form::Name)?,
            "AccountKey" => found.push((AzureConfigKey::AccessKey, checked(Form::Line)?)),
            "SharedAccessSignature" => found.push((AzureConfigKey::SasKey, checked(Form::Line)?)),
            "BlobEndpoint" => found.push((AzureConfigKey::Endpoint, checked(Form::Url)?)),
            "UseDevelopmentStorage" => {
                found.push((AzureConfigKey::UseEmulator, checked(Form::Name)?));
            }
            _ => {}
        }
    }
    let has_endpoint = found
        .iter()
        .any(|(key, _)| *key == AzureConfigKey::Endpoint);
    if let (Some(account), Some(suffix), false) = (&account, suffix, has_endpoint) {
        let url = format!("{scheme}://{account}.blob.{suffix}");
        let url = checked(&format!("EndpointSuffix of {NAME}"), &url, Form::Url)?;
        found.push((AzureConfigKey::Endpoint, url));
    }
    found.extend(account.map(|account| (AzureConfigKey::AccountName, account)));
    Ok(found)
}

/// The innermost cause of an error of object_store, unless it repeats what the environment holds.
fn without_secrets(error: &object_store::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    let text = innermost.to_string();
    let is_ours = |name: &str| {
        let begins = ["AWS_", "AZURE_", "GOOGLE_"].into_iter();
        begins.into_iter().any(|prefix| name.starts_with(prefix))
    };
    let mut secrets = std::env::vars().filter(|(name, value)| is_ours(name) && value.len() > 5);
    let names_url = text.contains("://") || text.contains('?');
    if names_url || secrets.any(|(_, value)| text.contains(&value)) {
        return "those of the environment cannot be used".to_owned();
    }
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// Where a request is kept.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Option<HttpRequest>>>);

/// An HTTP client that keeps requests for objects, and sends all others.
#[derive(Debug, Clone)]
struct Keeping(reqwest::Client);

#[derive(Debug, thiserror::Error)]
#[error("the request was kept")]
struct WasKept;

impl HttpConnector for Keeping {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Keeping {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if let Some(kept) = request.extensions_mut().remove::<Kept>() {
            *kept.0.lock() = Some(request);
            return Err(HttpError::new(HttpErrorKind::Unknown, WasKept));
        }
        self.0.call(request).await
    }
}
