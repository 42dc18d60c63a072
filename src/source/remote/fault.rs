//! What can go wrong between us and a server, and whether asking again helps.
//!
//! No text here has a URL with its query in it, nor anything that a server has said in a body: both
//! may hold signatures.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use crate::explain::{Explain, Hint};

/// Why bytes of a remote part cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "remote.")]
pub enum Fault {
    #[error("it is no longer what it was when it was opened: {0}")]
    Changed(String),
    #[error("the server sends the whole file where a range was asked for (status 200)")]
    NoRanges,
    #[error("the server sends a web page where a range of a file was asked for (status 200)")]
    Page,
    #[error("the file on the server is empty")]
    Empty,
    #[error("the server refuses the first bytes of a file that has {0} bytes (status 416)")]
    RefusedRange(u64),
    #[error("the server sends another range than was asked for: {0}")]
    OtherRange(String),
    #[error("the server sends it encoded ({0}), so its bytes are not the file's")]
    Encoded(String),
    #[error(
        "the server gives neither an ETag nor a time, so a change of the file would go unnoticed"
    )]
    Unpinnable,
    #[error("the server says that it is not there (status {0})")]
    Missing(u16),
    #[error("the server wants credentials (status 401)")]
    Unauthorized(Kind),
    #[error("the server denies access (status 403)")]
    Forbidden(Kind),
    #[error("no credentials: {0}")]
    Credentials(String),
    #[error("{name} {problem}")]
    Setting {
        name: String,
        problem: &'static str,
        hint: &'static str,
    },
    #[error("the server answers with status {0}")]
    Status(u16),
    #[error("the server is busy or out of order (status {status})")]
    Busy {
        status: u16,
        /// When the server wants to be asked again.
        after: Option<Duration>,
    },
    #[error("the server cannot be reached: {0}")]
    Connect(String),
    #[error("the endpoint {0} is plain HTTP, which anybody on the way can read and change")]
    Plain(String),
    #[error("the proxy cannot be used: {0}")]
    Proxy(String),
    #[error("the server's name cannot be resolved")]
    Name,
    #[error("the connection cannot be trusted: {0}")]
    Tls(String),
    #[error("nothing came from the server for {} seconds", .0.as_secs())]
    Stalled(Duration),
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("the server leads nowhere: {0}")]
    Redirect(String),
    #[error("it is not in the cache, and --offline forbids to fetch it")]
    Offline,
    #[error(
        "its parts in the cache were never opened together, so they may be of different models"
    )]
    Scattered,
    #[error("the cache in {folder:?} cannot be used: {cause}")]
    Cache { folder: PathBuf, cause: String },
    #[error("the read that was to fetch it has failed")]
    Abandoned,
    #[error("the client cannot be set up: {0}")]
    Client(String),
}

/// Whose credentials are missing, for the hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Web,
    Signed,
    /// Without a signature, beside a file of URLs.
    Unsigned,
    Hub,
    S3,
    Google,
    Azure,
}

impl Kind {
    fn hint(self) -> &'static str {
        match self {
            Self::Web => {
                "a server that wants a password or a token cannot be used; if it gives signed URLs, write one into a file and pass --url-file"
            }
            Self::Signed => "the signature may have expired: write fresh URLs into the file",
            Self::Unsigned => {
                "write a signed URL of this file, too, into the file of URLs, on a line of its own"
            }
            Self::Hub => {
                "accept the model's terms on its page, and put a token into HF_TOKEN or log in with `hf auth login`"
            }
            Self::S3 => {
                "check AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL; a public bucket needs AWS_SKIP_SIGNATURE=true"
            }
            Self::Google => {
                "check GOOGLE_APPLICATION_CREDENTIALS, or log in with `gcloud auth application-default login`; a public bucket needs GOOGLE_SKIP_SIGNATURE=true"
            }
            Self::Azure => {
                "check AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN; a public container needs AZURE_SKIP_SIGNATURE=true"
            }
        }
    }
}

impl Explain for Fault {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        let hint = match self {
            Self::Changed(_) => {
                "unmount and mount again, or run the command again, to use what is there now"
            }
            Self::NoRanges | Self::RefusedRange(_) => {
                "ask whoever runs the server to allow ranges (Accept-Ranges: bytes), or download the model"
            }
            Self::OtherRange(_) | Self::Encoded(_) => {
                "go around what stands between you and the server, such as a proxy, or download the model"
            }
            Self::Unpinnable => "pass --unpinned if you know that nobody replaces the file",
            Self::Page => {
                "look at it in a browser: it may want a login, for which signed URLs (--url-file) are the way"
            }
            Self::Empty | Self::Missing(_) => "check the address",
            Self::Unauthorized(kind) | Self::Forbidden(kind) => kind.hint(),
            Self::Credentials(_) => {
                "set them in the environment or in the usual files; `odmoe-fs doctor URL` says which were found"
            }
            Self::Setting { hint, .. } => hint,
            Self::Status(_) => return None,
            Self::Busy { .. } | Self::Stalled(_) | Self::Broken(_) => {
                "try again later; `odmoe-fs doctor URL` measures the way to the server"
            }
            Self::Connect(_) | Self::Name => "check the address, the network and the proxy",
            Self::Plain(_) => "use https://, or pass --insecure-http if you trust the network",
            Self::Proxy(_) => {
                "check HTTPS_PROXY, HTTP_PROXY and ALL_PROXY, where http://USER:PASSWORD@HOST:PORT names a user, and except hosts in NO_PROXY"
            }
            Self::Tls(text) if text.contains("expired") || text.contains("not valid yet") => {
                "check the clock of this machine, or ask whoever runs the server for a certificate that is valid now"
            }
            Self::Tls(text) if text.contains("not valid for name") => {
                "check the host in the address: the server's certificate is for another"
            }
            Self::Tls(text) if text.contains("corrupt message") => {
                "check the port in the address: there the server seems to speak plain HTTP"
            }
            Self::Tls(text) if text.contains("CaUsedAsEndEntity") => {
                "the server's certificate is one of an authority: it needs one for itself, with CA:FALSE"
            }
            Self::Tls(_) => {
                "if the server has a certificate of its own, name the file of its authority in SSL_CERT_FILE"
            }
            Self::Redirect(_) => "check the address",
            Self::Offline => "run it without --offline, or fetch it first with `odmoe-fs fetch`",
            Self::Scattered => {
                "run it once without --offline, so that all parts are looked at together"
            }
            Self::Cache { .. } => "name a folder that you can write to with --cache-dir",
            Self::Abandoned | Self::Client(_) => return None,
        };
        Some(hint.into())
    }
}

/// What to do about a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Ask again after a while, but not before this.
    Retry(Option<Duration>),
    /// Ask once more with fresh credentials, or for a fresh signed URL.
    Renew,
    /// Nothing that we can do.
    None,
}

impl Fault {
    /// What may help.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Busy { after, .. } => Remedy::Retry(*after),
            Self::Connect(_) | Self::Name | Self::Stalled(_) | Self::Broken(_) => {
                Remedy::Retry(None)
            }
            Self::Unauthorized(_) | Self::Forbidden(_) => Remedy::Renew,
            _ => Remedy::None,
        }
    }

    /// The fault behind a status other than 2xx and 3xx.
    pub fn of_status(status: u16, after: Option<Duration>, kind: Kind) -> Self {
        match status {
            401 => Self::Unauthorized(kind),
            403 => Self::Forbidden(kind),
            407 => Self::unknown_to_proxy(),
            404 | 410 => Self::Missing(status),
            408 | 429 | 500..=599 => Self::Busy { status, after },
            412 => {
                Self::Changed("the server has another file in its place (status 412)".to_owned())
            }
            416 => Self::Changed("it has become shorter (status 416)".to_owned()),
            _ => Self::Status(status),
        }
    }

    fn unknown_to_proxy() -> Self {
        Self::Proxy("it wants a user and a password (status 407)".to_owned())
    }

    /// The fault behind an error of the HTTP client, whose own text may name a signed URL.
    pub fn of_client(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let innermost = innermost(&error);
        let text = innermost.to_string();
        if text.contains("proxy authorization required") {
            return Self::unknown_to_proxy();
        }
        let of_tls = ["certificate", "TLS", "handshake", "corrupt message"];
        if of_tls.iter().any(|word| text.contains(word)) {
            return Self::Tls(text);
        }
        if text.contains("lookup address") || text.contains("dns error") {
            return Self::Name;
        }
        match error {
            e if e.is_timeout() && e.is_connect() => Self::Connect("it does not answer".to_owned()),
            e if e.is_connect() => Self::Connect(text),
            e if e.is_builder() => Self::Client(text),
            _ => Self::Broken(text),
        }
    }
}

/// The error that others were made of.
fn innermost(error: &dyn Error) -> &dyn Error {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_the_remedy_that_is_promised() {
        let remedy = |status| Fault::of_status(status, None, Kind::Web).remedy();
        for status in [408, 429, 500, 502, 503, 504, 507, 599] {
            assert_eq!(remedy(status), Remedy::Retry(None), "{status}");
        }
        for status in [401, 403] {
            assert_eq!(remedy(status), Remedy::Renew, "{status}");
        }
        for status in [400, 404, 405, 410, 412, 416, 418, 451] {
            assert_eq!(remedy(status), Remedy::None, "{status}");
        }
        let after = Some(Duration::from_secs(3));
        let busy = Fault::of_status(429, after, Kind::Web);
        assert_eq!(busy.remedy(), Remedy::Retry(after));
    }

    #[test]
    fn an_object_that_was_replaced_or_cut_has_changed() {
        for status in [412, 416] {
            let fault = Fault::of_status(status, None, Kind::S3);
            assert!(matches!(fault, Fault::Changed(_)), "{status}");
        }
    }

    #[test]
    fn missing_rights_have_the_hint_of_their_store() {
        for (kind, word) in [
            (Kind::Hub, "HF_TOKEN"),
            (Kind::S3, "AWS_PROFILE"),
            (Kind::Google, "gcloud"),
            (Kind::Azure, "AZURE_"),
            (Kind::Signed, "expired"),
            (Kind::Web, "--url-file"),
            (Kind::Unsigned, "of this file, too"),
        ] {
            for fault in [Fault::Unauthorized(kind), Fault::Forbidden(kind)] {
                assert!(fault.hint().unwrap().contains(word));
            }
        }
    }
}
