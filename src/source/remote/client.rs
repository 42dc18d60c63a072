//! Sending requests: one HTTP client, its runtime, and how many requests it sends at a time.
//!
//! The client follows no redirect by itself, since each step may say something of the file and may
//! lead to another origin, and it never accepts an encoding.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Request, Response, Url, redirect};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio::time::{sleep_until, timeout, timeout_at};

use super::address::{check_plain, is_http};
use super::fault::{Fault, Kind};
use super::pin::retry_after;
use super::proxy;
use super::retry::PATIENCE;
use crate::process::Signals;

/// Requests that are under way at the same time. At 20 ms and 100 MB/s per connection, 32 pieces of
/// 1 MiB came in 36 to 38 ms, and four in 174 ms (docs/performance.md).
pub const REQUESTS: usize = 32;
/// How long a server may send nothing.
const STALL: Duration = Duration::from_secs(10);
/// As good as nothing, in that time: what sends less keeps readers waiting for ever.
pub const TRICKLE_BYTES: usize = 1 << 10;
/// How long the end of a body may take once all of its bytes are there.
const END: Duration = Duration::from_secs(1);
/// How long a person waits without wondering why.
const NOTICEABLE: Duration = Duration::from_secs(2);
/// Threads that move bytes. Two keep more than a gigabyte a second moving.
const THREADS: usize = 2;
/// How programs introduce themselves.
const USER_AGENT: &str = concat!("odmoe-fs/", env!("CARGO_PKG_VERSION"));

/// What was asked of servers, and what came.
#[derive(Debug, Default)]
pub struct Counters {
    pub requests: AtomicU64,
    /// Bytes of the model that came from servers.
    pub fetched: AtomicU64,
    /// Bytes of the model that came from the cache on disk.
    pub cached: AtomicU64,
    /// Requests that were repeated.
    pub retries: AtomicU64,
    /// Reads that failed in the end.
    pub errors: AtomicU64,
}

/// The HTTP client of a model.
#[derive(Debug)]
pub struct Client {
    pub http: reqwest::Client,
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
    pub slots: Semaphore,
    pub counters: Counters,
    pub insecure_http: bool,
    /// Until when servers want no request.
    pause: Mutex<Option<Instant>>,
    /// When it was said that a server is waited for; `None` once it has answered.
    wait_noted: Mutex<Option<Instant>>,
}

impl Client {
    /// A client with threads of its own.
    pub fn new(insecure_http: bool) -> Result<Self, Fault> {
        let failed = |e: &dyn std::error::Error| Fault::Client(e.to_string());
        #[cfg(not(target_os = "macos"))]
        // An error means that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let mut builder = reqwest::Client::builder();
        if proxy::are_all_excepted() {
            builder = builder.no_proxy();
        }
        let http = builder
            .user_agent(USER_AGENT)
            .default_headers(headers)
            .redirect(redirect::Policy::none())
            // Pieces share no connection, so that a slow one holds up no other.
            .http1_only()
            .connect_timeout(STALL)
            .pool_max_idle_per_host(REQUESTS)
            .build()
            .map_err(Fault::of_client)?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("remote")
            // A model is opened before a mount's signals are blocked.
            .on_thread_start(Signals::block_all)
            .enable_all()
            .build()
            .map_err(|e| failed(&e))?;
        Ok(Self {
            http,
            runtime: Some(runtime),
            slots: Semaphore::new(REQUESTS),
            counters: Counters::default(),
            insecure_http,
            pause: Mutex::default(),
            wait_noted: Mutex::default(),
        })
    }

    /// Waits for something on a thread that is not the runtime's.
    pub fn wait<T>(&self, what: impl Future<Output = T>) -> T {
        let runtime = self.runtime.as_ref();
        runtime.expect("it is there until the end").block_on(what)
    }

    /// Sends a request, and waits for the head of the answer.
    pub async fn send(&self, mut request: Request) -> Result<Response, Fault> {
        // A redirect may name a user and a password: they are never sent, and libraries log them.
        let url = request.url_mut();
        let _ = url.set_username("");
        let _ = url.set_password(None);
        let pause = *self.pause.lock();
        if let Some(until) = pause {
            sleep_until(until.into()).await;
        }
        self.counters.requests.fetch_add(1, Relaxed);
        match timeout(STALL, self.http.execute(request)).await {
            Err(_) => Err(Fault::Stalled(STALL)),
            Ok(Err(e)) => Err(Fault::of_client(e)),
            Ok(Ok(response)) => Ok(response),
        }
    }

    /// Fills the buffer with the body of an answer, and counts in `done` what has come so far.
    pub async fn body(
        &self,
        mut response: Response,
        buffer: &mut [u8],
        done: &mut usize,
    ) -> Result<(), Fault> {
        let mut rest = buffer;
        let (mut deadline, mut trickled) = (Instant::now() + STALL, 0);
        while !rest.is_empty() {
            let chunk = match timeout_at(deadline.into(), response.chunk()).await {
                Err(_) => return Err(Fault::Stalled(STALL)),
                Ok(Err(e)) => return Err(Fault::of_client(e)),
                Ok(Ok(None)) => return Err(Fault::Broken("the answer ended early".to_owned())),
                Ok(Ok(Some(chunk))) => chunk,
            };
            if chunk.len() > rest.len() {
                return Err(Fault::OtherRange(
                    "more bytes came than were announced".to_owned(),
                ));
            }
            let (here, after) = rest.split_at_mut(chunk.len());
            here.copy_from_slice(&chunk);
            rest = after;
            *done += chunk.len();
            trickled += chunk.len();
            if trickled >= TRICKLE_BYTES {
                (deadline, trickled) = (Instant::now() + STALL, 0);
            }
            self.counters.fetched.fetch_add(chunk.len() as u64, Relaxed);
        }
        // The end of the body, after which the connection can be used again.
        match timeout(END, response.chunk()).await {
            Ok(Ok(Some(more))) if !more.is_empty() => Err(Fault::OtherRange(
                "more bytes came than were announced".to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// The fault behind a status other than 2xx. If the server wants a pause, all requests make it.
    pub fn fault(&self, response: &Response, kind: Kind) -> Fault {
        let after = retry_after(response.headers());
        let fault = Fault::of_status(response.status().as_u16(), after, kind);
        if let Fault::Busy {
            after: Some(after), ..
        } = fault
            && after < PATIENCE
        {
            let until = Instant::now() + after;
            let mut pause = self.pause.lock();
            *pause = (*pause).max(Some(until));
        }
        fault
    }

    /// Says that a server is waited for, unless it was said of another request just now, or will not
    /// be for long. `host` holds nothing secret.
    pub fn note_wait(&self, host: &str, fault: &Fault, long: Duration) {
        let mut noted = self.wait_noted.lock();
        if long < NOTICEABLE || noted.is_some_and(|at| at.elapsed() < PATIENCE) {
            return;
        }
        *noted = Some(Instant::now());
        let patience = PATIENCE.as_secs();
        tracing::warn!("waiting for {host}: {fault}; trying again for up to {patience} s");
    }

    /// Says that a server answers again, if it was waited for.
    pub fn note_answer(&self, host: &str) {
        if self.wait_noted.lock().take().is_some() {
            tracing::info!("{host} answers again");
        }
    }

    /// Where an answer of 3xx leads.
    pub fn next(&self, from: &Url, response: &Response) -> Result<Url, Fault> {
        let location = response.headers().get(LOCATION);
        let location = location.and_then(|value| value.to_str().ok());
        let nowhere = || Fault::Redirect("it does not say where to go".to_owned());
        let url = from
            .join(location.ok_or_else(nowhere)?)
            .map_err(|_| nowhere())?;
        if !is_http(&url) {
            return Err(Fault::Redirect("it leads to no URL of HTTP".to_owned()));
        }
        if self.is_plain(&url) {
            let what = "it leads to plain HTTP on another machine";
            return Err(Fault::Redirect(what.to_owned()));
        }
        Ok(url)
    }

    /// Refuses the endpoint of a store that is plain HTTP beyond this machine, unless that is wanted.
    pub fn check_endpoint(&self, url: &Url) -> Result<(), Fault> {
        match self.is_plain(url) {
            true => Err(Fault::Plain(url.origin().ascii_serialization())),
            false => Ok(()),
        }
    }

    fn is_plain(&self, url: &Url) -> bool {
        check_plain(url, self.insecure_http).is_err()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
