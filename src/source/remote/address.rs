//! Where a remote model is: a URL, taken apart, and never shown with what is secret in it.
//!
//! A query string may be a signature, and a user name in a URL comes with a password. So neither is
//! taken from the command line, which every user of the machine can read; a file may hold URLs with
//! queries (`--url-file`). Whatever shows an [`Address`] shows it without.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use reqwest::Url;

use crate::explain::{Explain, Hint, hint_of};

/// Where the Hugging Face Hub is, unless `HF_ENDPOINT` names another place.
const HUB: &str = "https://huggingface.co";

/// Why a text is not the address of a model.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::EnumProperty, PartialEq, Eq)]
#[strum(serialize_all = "snake_case", prefix = "address.")]
pub enum AddressError {
    #[error("{0:?} is not a kind of address that models have")]
    #[strum(props(hint = "use https://, s3://, gs://, az:// or hf://"))]
    Scheme(String),
    #[error("it does not begin with a kind of address")]
    #[strum(props(hint = "use https://, s3://, gs://, az:// or hf://"))]
    NoScheme,
    #[error("{0} cannot be read as a URL")]
    #[strum(props(hint = "check it; spaces and the like are written %20"))]
    Malformed(String),
    #[error(
        "the URL names a user or a password, which everybody could read in the list of processes"
    )]
    #[strum(props(
        hint = "leave them out; tokens come from HF_TOKEN, keys from AWS_* and the like, and a signed URL from a file (--url-file)"
    ))]
    Password,
    #[error("the URL has a query (`?...`), which everybody could read in the list of processes")]
    #[strum(props(
        hint = "if it is a signed URL, write it into a file and give that with --url-file; otherwise leave the query out"
    ))]
    Query,
    #[error("{shown} is plain HTTP, which anybody on the way can read and change")]
    #[strum(props(hint = "use https://, or pass --insecure-http if you trust the network"))]
    Plain { shown: String },
    #[error("{0} names no file")]
    #[strum(props(hint = "name the model's file, or any part of a split set"))]
    NoFile(String),
    #[error("{0} is not hf://ORG/REPO/FILE.gguf, with @REVISION after REPO if need be")]
    #[strum(props(hint = "copy ORG/REPO and the path of the file from the model's page"))]
    Hub(String),
    #[error("{0} is the page that shows the file, not the file")]
    #[strum(props(hint = "replace /blob/ by /resolve/, or use hf://ORG/REPO/FILE.gguf"))]
    Page(String),
    #[error("{path:?}, the file of URLs, cannot be read: {cause}")]
    #[strum(props(hint = "check its path and its permissions, with `namei -l PATH`"))]
    File { path: PathBuf, cause: String },
    #[error("line {number} of {path:?}: {}", in_a_file(cause))]
    Line {
        path: PathBuf,
        number: usize,
        cause: Box<AddressError>,
    },
    #[error("{0:?} holds no URL")]
    #[strum(props(hint = "write the signed URL of each part into it, one on a line"))]
    EmptyFile(PathBuf),
    #[error("{0} is in a store that this build of odmoe-fs does not know")]
    #[strum(props(hint = "use https:// with a signed URL (--url-file)"))]
    NoStores(String),
}

impl Explain for AddressError {
    fn code(&self) -> &'static str {
        match self {
            Self::Line { cause, .. } => cause.code(),
            _ => self.into(),
        }
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Line { cause, .. } => match **cause {
                Self::Query => Some("use the signed https:// URL, or leave the query out".into()),
                ref cause => cause.hint(),
            },
            _ => hint_of(self),
        }
    }
}

/// What is wrong with an address in a file, which does not show in the list of processes.
fn in_a_file(cause: &AddressError) -> String {
    match cause {
        AddressError::Password => "the URL names a user or a password, which are not sent".into(),
        AddressError::Query => "the address of a store or of the Hub has a query".into(),
        cause => cause.to_string(),
    }
}

/// The kinds of stores that sign requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    S3,
    Google,
    Azure,
}

impl StoreKind {
    /// The scheme of its addresses.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }
}

/// A file at some place.
#[derive(Clone, PartialEq, Eq)]
pub enum Place {
    /// Behind a URL, which may have a signature as its query.
    Web(Url),
    /// In a bucket or container, under a key.
    Store {
        kind: StoreKind,
        bucket: String,
        key: String,
    },
    /// On the Hub.
    Hub {
        /// `ORG/REPO`
        repository: String,
        /// A branch, tag or commit.
        revision: String,
        file: String,
    },
}

/// The address of a remote model, or of one part of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Address(Place);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Web(url) => f.write_str(&shown(url)),
            Place::Store { kind, bucket, key } => {
                write!(f, "{}://{bucket}/{key}", kind.scheme())
            }
            Place::Hub {
                repository,
                revision,
                file,
            } => match revision.as_str() {
                "main" => write!(f, "hf://{repository}/{file}"),
                _ => write!(f, "hf://{repository}@{revision}/{file}"),
            },
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A URL without its query, its fragment and its user.
pub fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}

/// Whether an argument is meant as a URL: no path of a file begins like one.
pub fn is_url(argument: &Path) -> bool {
    let text = argument.as_os_str().to_string_lossy();
    text.split_once("://").is_some_and(|(scheme, _)| {
        let is_letter = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(is_letter)
    })
}

impl Address {
    /// The address that a command line names: without anything secret in it.
    pub fn parse(text: &str, insecure_http: bool) -> Result<Self, AddressError> {
        let mut address = Self::any(text, insecure_http)?;
        if let Place::Web(url) = &mut address.0 {
            // The Hub's page copies links with this query, which changes nothing for us.
            if url.query() == Some("download=true") {
                url.set_query(None);
            }
            if url.query().is_some() {
                return Err(AddressError::Query);
            }
        }
        Ok(address)
    }

    /// The addresses in a file: one on a line, with queries; lines that begin with `#` say nothing.
    pub fn of_file(path: &Path, insecure_http: bool) -> Result<Vec<Self>, AddressError> {
        let text = std::fs::read_to_string(path).map_err(|cause| AddressError::File {
            path: path.to_owned(),
            cause: cause.to_string(),
        })?;
        // Editors of Windows begin with a mark.
        let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
        let lines = (1..).zip(lines);
        let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let address = |(number, line)| {
            Self::any(line, insecure_http).map_err(|cause| AddressError::Line {
                path: path.to_owned(),
                number,
                cause: Box::new(cause),
            })
        };
        let addresses: Vec<Self> = lines.map(address).collect::<Result<_, _>>()?;
        match addresses.is_empty() {
            true => Err(AddressError::EmptyFile(path.to_owned())),
            false => Ok(addresses),
        }
    }

    fn any(text: &str, insecure_http: bool) -> Result<Self, AddressError> {
        let (scheme, rest) = text.split_once("://").ok_or(AddressError::NoScheme)?;
        let place = match scheme.to_ascii_lowercase().as_str() {
            "https" | "http" => web(text, insecure_http)?,
            "s3" | "s3a" => store(StoreKind::S3, rest)?,
            "gs" => store(StoreKind::Google, rest)?,
            "az" | "azure" => store(StoreKind::Azure, rest)?,
            "hf" => hub(rest)?,
            _ => return Err(AddressError::Scheme(scheme.to_owned())),
        };
        Ok(Self(place))
    }

    /// Its parts.
    pub fn place(&self) -> &Place {
        &self.0
    }

    /// The name of the file, as it is on a disk.
    pub fn file_name(&self) -> String {
        match &self.0 {
            Place::Web(url) => {
                let last = url.path_segments().and_then(|mut names| names.next_back());
                decoded(last.unwrap_or_default())
            }
            Place::Store { key: path, .. } | Place::Hub { file: path, .. } => {
                path.rsplit('/').next().unwrap_or(path).to_owned()
            }
        }
    }

    /// A file beside it. A signature is good for one file, so the query goes.
    pub fn sibling(&self, name: &str) -> Self {
        let beside = |path: &str| match path.rsplit_once('/') {
            Some((folder, _)) => format!("{folder}/{name}"),
            None => name.to_owned(),
        };
        Self(match &self.0 {
            Place::Web(url) => {
                let mut url = url.clone();
                url.set_query(None);
                if let Ok(mut names) = url.path_segments_mut() {
                    names.pop().push(name);
                }
                Place::Web(url)
            }
            Place::Store { kind, bucket, key } => Place::Store {
                kind: *kind,
                bucket: bucket.clone(),
                key: beside(key),
            },
            Place::Hub {
                repository,
                revision,
                file,
            } => Place::Hub {
                repository: repository.clone(),
                revision: revision.clone(),
                file: beside(file),
            },
        })
    }

    /// The same file at a commit of the Hub.
    pub fn at_commit(&self, commit: &str) -> Self {
        let mut place = self.0.clone();
        if let Place::Hub { revision, .. } = &mut place {
            commit.clone_into(revision);
        }
        Self(place)
    }

    /// Whether requests for it carry a signature in the URL.
    pub fn is_signed(&self) -> bool {
        matches!(&self.0, Place::Web(url) if url.query().is_some())
    }
}

fn web(text: &str, insecure_http: bool) -> Result<Place, AddressError> {
    let hidden = || AddressError::Malformed(text.split('?').next().unwrap_or_default().to_owned());
    // Whatever is wrong with it, a password must not be shown.
    let has_user = text.split_once("://").is_some_and(|(_, rest)| {
        rest.split(['/', '?', '#'])
            .next()
            .unwrap_or("")
            .contains('@')
    });
    if has_user {
        return Err(AddressError::Password);
    }
    let mut url = Url::parse(text).map_err(|_| hidden())?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(AddressError::Password);
    }
    url.set_fragment(None);
    if url.host_str().is_none() {
        return Err(hidden());
    }
    check_plain(&url, insecure_http)?;
    let names: Vec<&str> = url.path_segments().into_iter().flatten().collect();
    if names.last().is_none_or(|name| name.is_empty()) {
        return Err(AddressError::NoFile(shown(&url)));
    }
    let is_hub = url.host_str() == Some("huggingface.co");
    if is_hub && names.get(2) == Some(&"blob") {
        return Err(AddressError::Page(shown(&url)));
    }
    Ok(Place::Web(url))
}

/// Refuses plain HTTP that leaves the machine, unless that is wanted.
pub fn check_plain(url: &Url, insecure_http: bool) -> Result<(), AddressError> {
    if url.scheme() == "https" || insecure_http || is_loopback(url) {
        return Ok(());
    }
    Err(AddressError::Plain { shown: shown(url) })
}

/// Whether a URL is one of HTTP, with TLS or without.
pub fn is_http(url: &Url) -> bool {
    ["http", "https"].contains(&url.scheme()) && url.has_host()
}

/// Whether a URL leads to this machine.
pub fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn store(kind: StoreKind, rest: &str) -> Result<Place, AddressError> {
    let shown = || {
        let path = rest.split('?').next().unwrap_or_default();
        format!("{}://{path}", kind.scheme())
    };
    let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.contains('@') {
        return Err(AddressError::Password);
    }
    if rest.contains('?') {
        return Err(AddressError::Query);
    }
    if bucket.is_empty() || key.is_empty() || key.ends_with('/') {
        return Err(AddressError::NoFile(shown()));
    }
    if cfg!(target_os = "macos") {
        return Err(AddressError::NoStores(shown()));
    }
    Ok(Place::Store {
        kind,
        bucket: bucket.to_owned(),
        key: key.to_owned(),
    })
}

fn hub(rest: &str) -> Result<Place, AddressError> {
    if rest.contains('?') {
        return Err(AddressError::Query);
    }
    let malformed = || AddressError::Hub(format!("hf://{rest}"));
    let mut names = rest.split('/');
    let (Some(owner), Some(name)) = (names.next(), names.next()) else {
        return Err(malformed());
    };
    if owner.contains('@') {
        return Err(AddressError::Password);
    }
    let (name, revision) = match name.split_once('@') {
        Some((name, revision)) => (name, revision),
        None => (name, "main"),
    };
    let mut names: Vec<&str> = names.collect();
    let mut revision = decoded(revision);
    // Such revisions have slashes, and are written with and without escaping them.
    if revision == "refs" && names.len() > 2 && ["pr", "convert"].contains(&names[0]) {
        revision = format!("refs/{}/{}", names[0], names[1]);
        names.drain(..2);
    }
    let empty = |part: &&str| part.is_empty() || *part == "." || *part == "..";
    let parts = [owner, name, &revision];
    if parts.iter().any(empty) || names.is_empty() || names.iter().any(empty) {
        return Err(malformed());
    }
    Ok(Place::Hub {
        repository: format!("{owner}/{name}"),
        revision,
        file: names.join("/"),
    })
}

/// Where the Hub is; `None` if `HF_ENDPOINT` does not say.
pub fn hub_endpoint() -> Option<Url> {
    let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|e| !e.is_empty());
    let url = Url::parse(endpoint.as_deref().unwrap_or(HUB)).ok()?;
    let has_user = !url.username().is_empty() || url.password().is_some();
    (is_http(&url) && !has_user).then_some(url)
}

/// The URL that answers for a file of the Hub.
pub fn hub_url(endpoint: &Url, repository: &str, revision: &str, file: &str) -> Url {
    let mut url = endpoint.clone();
    if let Ok(mut names) = url.path_segments_mut() {
        names.pop_if_empty().extend(repository.split('/'));
        // A slash in a revision is escaped, as the Hub wants it.
        names.push("resolve").push(revision).extend(file.split('/'));
    }
    url
}

/// A text with its `%20` and the like undone; what is not UTF-8 then stays as it was.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = |digit: u8| (digit as char).to_digit(16);
        let escaped = match (first, tail) {
            (b'%', [a, b, ..]) => hex(*a).zip(hex(*b)).map(|(a, b)| (a * 16 + b) as u8),
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests;
