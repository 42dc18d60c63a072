//! Requests for Amazon S3, Google Cloud Storage and Azure, signed by object_store.
//!
//! The problem: object_store has the credentials and signatures of all stores. But it forgets what a
//! server says of when to ask again, shortens ranges in silence, accepts encoded bodies, and puts
//! signed URLs into its errors.
//!
//! The plan: it makes and signs the request for a range, and our own client sends it. Its HTTP
//! client is ours, which keeps such a request instead of sending it; what object_store then says of
//! the failure is dropped. Requests for credentials are sent as they are.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use object_store::aws::AmazonS3Builder;
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{ClientOptions, GetOptions, GetRange, ObjectStore, RetryConfig};
use parking_lot::Mutex;
use reqwest::{Request, Response};

use super::address::StoreKind;
use super::client::Client;
use super::credentials::{aws_profile, variable};
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
        let path = Path::parse(key)
            .map_err(|_| Fault::Client("the key has empty or relative names in it".to_owned()))?;
        let store = Self {
            kind,
            bucket: bucket.to_owned(),
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
        let made = make(self.kind, &self.bucket, Keeping(self.http.clone()));
        let made = made.map_err(|e| Fault::Credentials(without_secrets(&e)))?;
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

    /// The region of a bucket that is not in the one that was asked.
    pub fn other_region(&self, response: &Response) -> Option<String> {
        let status = response.status().as_u16();
        let region = response.headers().get("x-amz-bucket-region")?;
        let region = region.to_str().ok()?;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        ([301, 307, 400].contains(&status) && region.chars().all(is_plain))
            .then(|| format!("set AWS_REGION={region}"))
    }
}

fn make(
    kind: StoreKind,
    bucket: &str,
    http: Keeping,
) -> object_store::Result<Arc<dyn ObjectStore>> {
    // Whether plain HTTP is allowed is checked when a request is sent; metadata services use it.
    let options = ClientOptions::new().with_allow_http(true);
    let retry = RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    };
    Ok(match kind {
        StoreKind::S3 => {
            let mut builder = AmazonS3Builder::from_env().with_client_options(options);
            let profile = aws_profile();
            let get = |name: &str| profile.get(name).filter(|value| !value.is_empty());
            if variable("AWS_ACCESS_KEY_ID").is_none()
                && let (Some(id), Some(secret)) =
                    (get("aws_access_key_id"), get("aws_secret_access_key"))
            {
                builder = builder
                    .with_access_key_id(id)
                    .with_secret_access_key(secret);
                if let Some(token) = get("aws_session_token") {
                    builder = builder.with_token(token);
                }
            }
            let has_region = ["AWS_REGION", "AWS_DEFAULT_REGION"].map(variable);
            if has_region.iter().all(Option::is_none)
                && let Some(region) = get("region")
            {
                builder = builder.with_region(region);
            }
            let names = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"];
            if names.map(variable).iter().all(Option::is_none)
                && let Some(endpoint) = get("endpoint_url")
            {
                builder = builder.with_endpoint(endpoint);
            }
            let builder = builder.with_bucket_name(bucket).with_retry(retry);
            Arc::new(builder.with_http_connector(http).build()?)
        }
        StoreKind::Google => {
            let mut builder = GoogleCloudStorageBuilder::from_env().with_client_options(options);
            // As in Google's own libraries, which then sign nothing.
            if let Some(host) = variable("STORAGE_EMULATOR_HOST") {
                let scheme = if host.contains("://") { "" } else { "http://" };
                let url = format!("{scheme}{}", host.trim_end_matches('/'));
                builder = builder.with_base_url(&url).with_skip_signature(true);
            }
            let builder = builder.with_bucket_name(bucket).with_retry(retry);
            Arc::new(builder.with_http_connector(http).build()?)
        }
        StoreKind::Azure => {
            let mut builder = MicrosoftAzureBuilder::from_env().with_client_options(options);
            for (key, value) in azure_connection() {
                builder = builder.with_config(key, value);
            }
            let builder = builder.with_container_name(bucket).with_retry(retry);
            Arc::new(builder.with_http_connector(http).build()?)
        }
    })
}

/// What `AZURE_STORAGE_CONNECTION_STRING` says, as the portal of Azure writes it; nothing if it is not
/// set, or if an account is named by other variables.
fn azure_connection() -> Vec<(AzureConfigKey, String)> {
    let Some(text) = variable("AZURE_STORAGE_CONNECTION_STRING") else {
        return Vec::new();
    };
    if variable("AZURE_STORAGE_ACCOUNT_NAME").is_some() {
        return Vec::new();
    }
    let pairs = text.split(';').filter_map(|pair| pair.split_once('='));
    let key = |name: &str| match name.trim() {
        "AccountName" => Some(AzureConfigKey::AccountName),
        "AccountKey" => Some(AzureConfigKey::AccessKey),
        "SharedAccessSignature" => Some(AzureConfigKey::SasKey),
        "BlobEndpoint" => Some(AzureConfigKey::Endpoint),
        _ => None,
    };
    let known = pairs.filter_map(|(name, value)| Some((key(name)?, value.trim().to_owned())));
    known.collect()
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
