//! The way to the bytes of a part: from its address to a URL that answers, and the pin that every
//! answer must have.
//!
//! The problem: the Hub and other servers answer with a redirect to a signed URL that expires, and
//! count every question; stores want each request signed; and behind each of them the file may be
//! replaced at any time.
//!
//! The plan: the first request walks from the address through the redirects and remembers where it
//! arrived. All later requests go there. When that URL stops answering, one request walks again, and
//! what it finds must be the same file.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;
use reqwest::header::{
    AUTHORIZATION, HeaderMap, HeaderValue, IF_MATCH, IF_UNMODIFIED_SINCE, RANGE,
};
use reqwest::{Method, Request, Response, Url};

use super::Options;
use super::address::{Address, Place, hub_endpoint, hub_url};
use super::client::{Client, TRICKLE_BYTES};
use super::credentials::hub_token;
use super::fault::{Fault, Kind, Remedy};
use super::pin::{Facts, Pin};
use super::proxy;
use super::retry::Backoff;
#[cfg(not(target_os = "macos"))]
use super::stores::Store;
use std::sync::atomic::Ordering::Relaxed;

/// Redirects that are followed, at most.
const HOPS: usize = 5;

/// The commit of the Hub that all parts of a model are read at.
pub type Commit = Arc<OnceLock<String>>;

/// The way to one part.
#[derive(Debug)]
pub struct Route {
    start: Start,
    kind: Kind,
    unpinned: bool,
    pin: OnceLock<Pin>,
    /// Where the last walk has arrived.
    reached: Mutex<Option<Arc<Reached>>>,
    /// Held while one request walks; how and when the last walk has failed.
    walking: tokio::sync::Mutex<Option<(Instant, Fault)>>,
}

enum Start {
    Web {
        url: Url,
        name: String,
        /// Where a fresh URL for this name may be.
        url_file: Option<PathBuf>,
    },
    Hub {
        endpoint: Url,
        repository: String,
        revision: String,
        file: String,
        commit: Commit,
    },
    #[cfg(not(target_os = "macos"))]
    Store(Store),
}

impl std::fmt::Debug for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Start") // may hold signatures and tokens
    }
}

/// A URL that answers with ranges.
struct Reached {
    url: Url,
    /// Behind a fresh signed URL, the same content may have another ETag.
    pin: Pin,
    is_redirected: bool,
}

impl std::fmt::Debug for Reached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.pin.fmt(f)
    }
}

impl Route {
    /// The way to a file. Nothing is asked yet.
    pub fn new(
        address: &Address,
        client: &Client,
        options: &Options,
        commit: &Commit,
    ) -> Result<Self, Fault> {
        proxy::check()?;
        let (start, kind) = match address.place() {
            Place::Web(url) => {
                let start = Start::Web {
                    url: url.clone(),
                    name: address.file_name(),
                    url_file: options.url_file.clone(),
                };
                let kind = match options.url_file {
                    _ if address.is_signed() => Kind::Signed,
                    Some(_) => Kind::Unsigned,
                    None => Kind::Web,
                };
                (start, kind)
            }
            Place::Hub {
                repository,
                revision,
                file,
            } => {
                let endpoint = hub_endpoint().ok_or_else(|| Fault::Setting {
                    name: "HF_ENDPOINT".to_owned(),
                    problem: "does not hold the URL of a server, without a user",
                    hint: "write https:// and the host into it",
                })?;
                client.check_endpoint(&endpoint)?;
                let start = Start::Hub {
                    endpoint,
                    repository: repository.clone(),
                    revision: revision.clone(),
                    file: file.clone(),
                    commit: commit.clone(),
                };
                (start, Kind::Hub)
            }
            #[cfg(not(target_os = "macos"))]
            Place::Store { kind, bucket, key } => {
                let store = Store::new(*kind, bucket, key, client)?;
                let kind = store.kind();
                (Start::Store(store), kind)
            }
            #[cfg(target_os = "macos")]
            Place::Store { .. } => {
                return Err(Fault::Client(
                    "this build does not sign requests for stores".to_owned(),
                ));
            }
        };
        Ok(Self {
            start,
            kind,
            unpinned: options.unpinned,
            pin: OnceLock::new(),
            reached: Mutex::default(),
            walking: tokio::sync::Mutex::default(),
        })
    }

    /// The state of the file that everything is read from; `None` before the first answer.
    pub fn pin(&self) -> Option<&Pin> {
        self.pin.get()
    }

    /// Accepts only this state from now on.
    pub fn set_pin(&self, pin: Pin) {
        let _ = self.pin.set(pin);
    }

    /// Fetches a range into the buffer, which it must fit; returns how many bytes that are. They
    /// are fewer only if the file ends before the range does.
    pub async fn fetch(
        &self,
        client: &Client,
        range: Range<u64>,
        buffer: &mut [u8],
    ) -> Result<usize, Fault> {
        let _slot = client.slots.acquire().await;
        let mut backoff = Backoff::new(Instant::now());
        let (mut done, mut renewed) = (0, false);
        loop {
            let (before, begun) = (done, Instant::now());
            let rest = range.start + done as u64..range.end;
            let fault = match self.attempt(client, rest, buffer, &mut done).await {
                Ok(()) => {
                    client.note_answer(&self.host());
                    return Ok(done);
                }
                Err(fault) => fault,
            };
            let now = Instant::now();
            if done >= before + TRICKLE_BYTES {
                match fault {
                    // One that sends a little and then nothing, again and again, is not waited for
                    // longer.
                    Fault::Stalled(silence) => {
                        backoff.received_for((now - begun).saturating_sub(silence));
                    }
                    _ => backoff.progressed(now),
                }
            }
            match fault.remedy() {
                Remedy::Renew if !renewed => {
                    renewed = true;
                    #[cfg(not(target_os = "macos"))]
                    if let Start::Store(store) = &self.start {
                        store.renew();
                    }
                }
                Remedy::Retry(after) => {
                    let Some(wait) = backoff.wait(after, chance(), now) else {
                        return Err(fault);
                    };
                    client.note_wait(&self.host(), &fault, backoff.waited(now) + wait);
                    tracing::debug!("asked again in {} ms: {fault}", wait.as_millis());
                    tokio::time::sleep(wait).await;
                }
                _ => return Err(fault),
            }
            client.counters.retries.fetch_add(1, Relaxed);
        }
    }

    /// Asks once, and puts what comes behind the first `done` bytes of the buffer.
    async fn attempt(
        &self,
        client: &Client,
        range: Range<u64>,
        buffer: &mut [u8],
        done: &mut usize,
    ) -> Result<(), Fault> {
        let (facts, response) = self.open(client, &range).await?;
        let bytes = (facts.range.end - facts.range.start) as usize;
        let space = &mut buffer[*done..][..bytes];
        client.body(response, space, done).await
    }

    /// Asks for a range; the answer is certainly that range of the pinned file.
    async fn open(&self, client: &Client, range: &Range<u64>) -> Result<(Facts, Response), Fault> {
        #[cfg(not(target_os = "macos"))]
        if let Start::Store(store) = &self.start {
            let request = store.signed(range, self.pin()).await?;
            client.check_endpoint(request.url())?;
            let response = client.send(request).await?;
            if let Some(fault) = store.elsewhere(&response) {
                return Err(fault);
            }
            let facts = self.facts(client, &response, range)?;
            self.accept(&facts.pin, true)?;
            return Ok((facts, response));
        }
        let reached = self.reached.lock().clone();
        if let Some(reached) = reached {
            return self.ask(client, &reached, range).await;
        }
        let begun = Instant::now();
        let mut last_failure = self.walking.lock().await;
        // Another may have arrived meanwhile.
        let reached = self.reached.lock().clone();
        if let Some(reached) = reached {
            drop(last_failure);
            return self.ask(client, &reached, range).await;
        }
        // Or has failed, as all who waited for it would, one after the other.
        if let Some((at, fault)) = &*last_failure
            && *at > begun
        {
            return Err(fault.clone());
        }
        let walked = self.walk(client, range).await;
        if let Err(fault) = &walked {
            *last_failure = Some((Instant::now(), fault.clone()));
        }
        walked
    }

    /// Asks where an earlier request has arrived, and forgets that place if it answers no more.
    async fn ask(
        &self,
        client: &Client,
        reached: &Arc<Reached>,
        range: &Range<u64>,
    ) -> Result<(Facts, Response), Fault> {
        let asked = self.ask_there(client, reached, range).await;
        if let Err(fault) = &asked
            && fault.remedy() == Remedy::Renew
        {
            self.forget(reached);
        }
        asked
    }

    async fn ask_there(
        &self,
        client: &Client,
        reached: &Reached,
        range: &Range<u64>,
    ) -> Result<(Facts, Response), Fault> {
        let request = ranged(reached.url.clone(), range, Some(&reached.pin));
        let response = client.send(request).await?;
        let status = response.status();
        // Expired URLs are answered with each of these.
        let is_expired = [400, 401, 403, 404, 410].contains(&status.as_u16());
        let can_expire = reached.is_redirected || self.kind == Kind::Signed;
        if status.is_redirection() || (can_expire && is_expired) {
            return Err(Fault::Forbidden(self.kind));
        }
        let facts = self.facts(client, &response, range)?;
        let mut found = facts.pin.clone();
        found.linked.clone_from(&reached.pin.linked);
        reached.pin.check(&found, true)?;
        Ok((facts, response))
    }

    /// Goes from the address through all redirects.
    async fn walk(&self, client: &Client, range: &Range<u64>) -> Result<(Facts, Response), Fault> {
        let (mut url, token) = self.start_url(client.insecure_http)?;
        let origin = url.origin();
        let is_hub = matches!(self.start, Start::Hub { .. });
        let (mut linked, mut linked_size) = (None, None);
        for hop in 0..=HOPS {
            let pin = self.pin().filter(|pin| !is_hub && pin.linked.is_none());
            let mut request = ranged(url.clone(), range, pin);
            if let Some(token) = &token
                && url.origin() == origin
            {
                request.headers_mut().insert(AUTHORIZATION, token.clone());
            }
            let response = client.send(request).await?;
            if is_hub && url.origin() == origin {
                let headers = response.headers();
                self.note_commit(headers);
                linked = header(headers, "x-linked-etag").or(linked);
                let size = header(headers, "x-linked-size");
                linked_size = size.and_then(|size| size.parse().ok()).or(linked_size);
            }
            if response.status().is_redirection() {
                url = client.next(&url, &response)?;
                continue;
            }
            let mut facts = self.facts(client, &response, range)?;
            if linked_size.is_some_and(|size: u64| size != facts.pin.size) {
                let what = "it has not the size that the Hub says";
                return Err(Fault::Changed(what.to_owned()));
            }
            facts.pin.linked = linked;
            self.accept(&facts.pin, false)?;
            let reached = Reached {
                url,
                pin: facts.pin.clone(),
                is_redirected: hop > 0,
            };
            *self.reached.lock() = Some(Arc::new(reached));
            return Ok((facts, response));
        }
        Err(Fault::Redirect(format!("more than {HOPS} redirects")))
    }

    /// Where a walk starts, and with which token: by what the files of both say now.
    fn start_url(&self, insecure_http: bool) -> Result<(Url, Option<HeaderValue>), Fault> {
        match &self.start {
            Start::Web {
                url,
                name,
                url_file,
            } => {
                let file = url_file.as_deref();
                let listed = file.and_then(|file| listed_url(file, name, insecure_http));
                Ok((listed.unwrap_or_else(|| url.clone()), None))
            }
            Start::Hub {
                endpoint,
                repository,
                revision,
                file,
                commit,
            } => {
                let revision = commit.get().unwrap_or(revision);
                let url = hub_url(endpoint, repository, revision, file);
                Ok((url, hub_token()?))
            }
            #[cfg(not(target_os = "macos"))]
            Start::Store(_) => unreachable!("requests for stores are signed"),
        }
    }

    /// The server that is asked, for messages: its name and port, or the bucket.
    fn host(&self) -> String {
        let of = |url: &Url| {
            let port = url.port().map_or(String::new(), |port| format!(":{port}"));
            format!("{}{port}", url.host_str().unwrap_or_default())
        };
        match (&*self.reached.lock(), &self.start) {
            (Some(reached), _) => of(&reached.url),
            (None, Start::Web { url, .. } | Start::Hub { endpoint: url, .. }) => of(url),
            #[cfg(not(target_os = "macos"))]
            (None, Start::Store(store)) => store.shown(),
        }
    }

    fn note_commit(&self, headers: &HeaderMap) {
        if let Start::Hub { commit, .. } = &self.start
            && let Some(found) = header(headers, "x-repo-commit")
        {
            let _ = commit.set(found);
        }
    }

    fn facts(
        &self,
        client: &Client,
        response: &Response,
        range: &Range<u64>,
    ) -> Result<Facts, Fault> {
        let status = response.status().as_u16();
        if status == 416 && self.pin().is_none() {
            return Err(Facts::of_refused_range(response.headers()));
        }
        if !response.status().is_success() {
            return Err(client.fault(response, self.kind));
        }
        Facts::of(status, response.headers(), range)
    }

    /// The first pin is taken, every other one compared with it.
    fn accept(&self, found: &Pin, same_route: bool) -> Result<(), Fault> {
        if !found.holds() && !self.unpinned {
            return Err(Fault::Unpinnable);
        }
        self.pin
            .get_or_init(|| found.clone())
            .check(found, same_route)
    }

    /// Has the next request walk again, unless another has done so since this was reached.
    fn forget(&self, reached: &Arc<Reached>) {
        let mut now = self.reached.lock();
        if now.as_ref().is_some_and(|now| Arc::ptr_eq(now, reached)) {
            *now = None;
        }
    }
}

/// The URL that a file of URLs has for a part now.
fn listed_url(file: &Path, name: &str, insecure_http: bool) -> Option<Url> {
    // A pipe has said it once.
    if !file.metadata().is_ok_and(|found| found.is_file()) {
        return None;
    }
    let listed = Address::of_file(file, insecure_http).ok()?;
    let ours = listed.iter().find(|other| other.file_name() == name)?;
    match ours.place() {
        Place::Web(url) => Some(url.clone()),
        _ => None,
    }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    Some(value.to_owned()).filter(|value| !value.is_empty())
}

/// A request for a range, which is answered only by the pinned file.
fn ranged(url: Url, range: &Range<u64>, pin: Option<&Pin>) -> Request {
    let mut request = Request::new(Method::GET, url);
    let headers = request.headers_mut();
    let mut insert = |name, value: &str| {
        // What a server has said of itself can be said to it.
        HeaderValue::from_str(value).map(|value| headers.insert(name, value))
    };
    let _ = insert(RANGE, &format!("bytes={}-{}", range.start, range.end - 1));
    if let Some(etag) = pin.and_then(Pin::if_match) {
        let _ = insert(IF_MATCH, etag);
    }
    if let Some(time) = pin.and_then(Pin::if_unmodified_since) {
        let _ = insert(IF_UNMODIFIED_SINCE, time);
    }
    request
}

/// A number that differs between requests which fail at the same time.
fn chance() -> u8 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(Instant::now()) as u8
}
