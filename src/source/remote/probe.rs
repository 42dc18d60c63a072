//! What can be found out of a server without reading a model: for `doctor`.

use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::Options;
use super::address::{Address, Place, StoreKind};
use super::client::Client;
use super::credentials::{aws_profile, hub_token_source, variable};
use super::fault::Fault;
use super::pin::Pin;
use super::route::{Commit, Route};

/// Bytes of the first request.
const FIRST_BYTES: u64 = 64 << 10;
/// Bytes that each connection fetches.
const SAMPLE_BYTES: u64 = 1 << 20;
/// Connections at the same time.
pub const CONNECTIONS: u64 = 16;

/// What a server answered.
#[derive(Debug)]
pub struct Found {
    pub pin: Pin,
    /// How long a small range took.
    pub latency: Duration,
    /// Bytes a second of one connection, and of [`CONNECTIONS`]; `None` if the file is too short to
    /// tell.
    pub one: Option<f64>,
    pub many: Option<f64>,
}

impl Found {
    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.pin.size
    }

    /// Whether a change of the file would be noticed.
    pub fn is_pinned(&self) -> bool {
        self.pin.holds()
    }

    /// By what a change of the file would be noticed.
    pub fn pinned(&self) -> &'static str {
        self.pin.in_words()
    }
}

/// Asks for a few ranges of a file. At most 17 MiB are fetched.
pub fn probe(address: &Address, insecure_http: bool) -> Result<Found, Fault> {
    let client = Client::new(insecure_http)?;
    let options = Options {
        unpinned: true,
        ..Options::default()
    };
    let route = Route::new(address, &client, &options, &Commit::default())?;
    let fetch = async |range: std::ops::Range<u64>| {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        route.fetch(&client, range, &mut bytes).await
    };
    client.wait(async {
        fetch(0..FIRST_BYTES).await?;
        let pin = route.pin().cloned().unwrap_or_default();
        let begun = Instant::now();
        fetch(0..1).await?;
        let latency = begun.elapsed();
        let sample = |n: u64| {
            let start = (n * SAMPLE_BYTES) % pin.size;
            start..(start + SAMPLE_BYTES).min(pin.size)
        };
        let is_long = pin.size >= CONNECTIONS * SAMPLE_BYTES;
        let (mut one, mut many) = (None, None);
        if is_long {
            let begun = Instant::now();
            fetch(sample(0)).await?;
            one = Some(SAMPLE_BYTES as f64 / begun.elapsed().as_secs_f64());
            let all = (0..CONNECTIONS).map(|n| fetch(sample(n)));
            let begun = Instant::now();
            for fetched in join_all(all).await {
                fetched?;
            }
            let bytes = (CONNECTIONS * SAMPLE_BYTES) as f64;
            many = Some(bytes / begun.elapsed().as_secs_f64());
        }
        Ok(Found {
            pin,
            latency,
            one,
            many,
        })
    })
}

/// Where credentials for an address were found, never what they are.
pub fn credentials(address: &Address) -> String {
    let set = |names: &[&'static str]| {
        let set = names.iter().filter(|name| variable(name).is_some());
        set.copied().collect::<Vec<_>>().join(", ")
    };
    let (found, files) = match address.place() {
        Place::Web(_) => return "none are needed, or they are in the URL".to_owned(),
        Place::Hub { .. } => (
            hub_token_source().unwrap_or_default().to_owned(),
            String::new(),
        ),
        Place::Store { kind, .. } => match kind {
            StoreKind::S3 => {
                let names = [
                    "AWS_ACCESS_KEY_ID",
                    "AWS_SESSION_TOKEN",
                    "AWS_PROFILE",
                    "AWS_WEB_IDENTITY_TOKEN_FILE",
                    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
                    "AWS_SKIP_SIGNATURE",
                ];
                let has_profile = aws_profile().contains_key("aws_access_key_id");
                let files = if has_profile {
                    "a profile in the AWS files"
                } else {
                    ""
                };
                (set(&names), files.to_owned())
            }
            StoreKind::Google => {
                let names = [
                    "GOOGLE_APPLICATION_CREDENTIALS",
                    "GOOGLE_SERVICE_ACCOUNT",
                    "GOOGLE_SERVICE_ACCOUNT_PATH",
                    "GOOGLE_SERVICE_ACCOUNT_KEY",
                    "GOOGLE_SKIP_SIGNATURE",
                    "STORAGE_EMULATOR_HOST",
                ];
                (set(&names), String::new())
            }
            StoreKind::Azure => {
                let names = [
                    "AZURE_STORAGE_ACCOUNT_KEY",
                    "AZURE_STORAGE_SAS_TOKEN",
                    "AZURE_STORAGE_SAS_KEY",
                    "AZURE_CLIENT_ID",
                    "AZURE_FEDERATED_TOKEN_FILE",
                    "AZURE_SKIP_SIGNATURE",
                    "AZURE_STORAGE_CONNECTION_STRING",
                    "AZURE_STORAGE_USE_EMULATOR",
                ];
                (set(&names), String::new())
            }
        },
    };
    let both = [found, files];
    let both: Vec<_> = both.into_iter().filter(|text| !text.is_empty()).collect();
    match both.is_empty() {
        true => "none were found in the environment".to_owned(),
        false => format!("found: {}", both.join(", ")),
    }
}
