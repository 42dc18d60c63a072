//! One remote part: each byte of it fetched once, whoever asks for it.
//!
//! The problem: many readers want the same bytes at the same time, from a server that is slow to
//! answer and fast to send.
//!
//! The plan: a table of what is under way. A read takes from the cache what is there, waits for what
//! others have asked for, and asks for the rest in pieces, all of them at the same time.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use parking_lot::{Condvar, Mutex};

use super::cache::index::{PIECE_BYTES, piece_end};
use super::cache::{CachedPart, Found, cached_bytes, holds_all};
use super::client::Client;
use super::fault::{Fault, Remedy};
use super::pin::Pin;
use super::route::Route;
use crate::source::{ReadError, Traffic};

/// How long a failed range fails at once when it is asked for again: the kernel repeats a failed
/// request page by page, and none of these should wait as long as the first.
const ECHO: Duration = Duration::from_secs(1);

/// A part behind a URL.
#[derive(Debug)]
pub struct RemotePart {
    /// The address, without anything secret.
    pub path: PathBuf,
    client: Arc<Client>,
    /// `None` if nothing may be asked for.
    route: Option<Route>,
    pin: Pin,
    cache: Option<CachedPart>,
    /// What is under way.
    flights: Mutex<Vec<Arc<Flight>>>,
    landed: Condvar,
    /// Why all reads fail, once the file was replaced.
    changed: OnceLock<Fault>,
    failures: Mutex<Vec<Failure>>,
    /// Which file of the tree each range belongs to, in order.
    units: OnceLock<Box<[Unit]>>,
}

/// A range of the part that belongs to one file of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    pub range: Range<u64>,
    pub number: u64,
}

#[derive(Debug)]
struct Failure {
    at: Instant,
    range: Range<u64>,
    fault: Fault,
}

/// A piece that one thread fetches, and that others may wait for.
#[derive(Debug)]
struct Flight {
    range: Range<u64>,
    landed: OnceLock<Result<Arc<[u8]>, Fault>>,
}

/// A piece that this thread is to fetch. However that ends, and be it by a panic, the piece leaves the
/// table, and those who wait for it hear of it.
struct Flown<'a> {
    part: &'a RemotePart,
    flight: Arc<Flight>,
}

impl Drop for Flown<'_> {
    fn drop(&mut self) {
        self.part.land(&self.flight, &[], Err(Fault::Abandoned));
    }
}

/// How a range of a read comes.
struct Step<'a> {
    start: u64,
    bytes: &'a mut [u8],
    from: From<'a>,
}

enum From<'a> {
    Cache,
    Server(Flown<'a>),
    Another(Arc<Flight>),
    Echo(Fault),
}

impl RemotePart {
    pub fn new(
        path: PathBuf,
        client: Arc<Client>,
        route: Option<Route>,
        pin: Pin,
        cache: Option<CachedPart>,
    ) -> Self {
        Self {
            path,
            client,
            route,
            pin,
            cache,
            flights: Mutex::default(),
            landed: Condvar::new(),
            changed: OnceLock::new(),
            failures: Mutex::default(),
            units: OnceLock::new(),
        }
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.pin.size
    }

    /// When it was last changed, as far as its server says.
    pub fn modified(&self) -> SystemTime {
        self.pin.modified().unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// The state of the file.
    pub(in crate::source) fn pin(&self) -> &Pin {
        &self.pin
    }

    /// What was asked for all parts of the model together.
    pub fn traffic(&self) -> Traffic {
        let counters = &self.client.counters;
        Traffic {
            requests: counters.requests.load(Relaxed),
            fetched_bytes: counters.fetched.load(Relaxed),
            cached_bytes: counters.cached.load(Relaxed),
            retries: counters.retries.load(Relaxed),
            errors: counters.errors.load(Relaxed),
        }
    }

    /// Says which file of the tree each range belongs to, in order.
    pub fn set_units(&self, units: Vec<Unit>) {
        let _ = self.units.set(units.into());
    }

    /// Keeps bytes that came from the server.
    pub fn keep(&self, start: u64, bytes: &[u8]) {
        let (mut place, mut rest) = (start, bytes);
        while let Some(cache) = &self.cache
            && !rest.is_empty()
        {
            let len = (piece_end(place) - place).min(rest.len() as u64);
            let (piece, after) = rest.split_at(len as usize);
            cache.keep(place, piece, self.unit(place));
            (place, rest) = (place + len, after);
        }
    }

    /// The most bytes that the cache may hold, of all models together.
    pub fn capacity(&self) -> u64 {
        self.cache.as_ref().map_or(0, CachedPart::capacity)
    }

    /// What the cache has of it.
    pub(super) fn cache(&self) -> Option<&CachedPart> {
        self.cache.as_ref()
    }

    /// Has nothing of the cache leave that is read or written from now on, nor what it has of some
    /// ranges.
    pub fn spare_cached(&self, ranges: impl Iterator<Item = Range<u64>>) {
        if let Some(cache) = &self.cache {
            cache.spare(ranges);
        }
    }

    /// Whether there is a cache to fill.
    pub fn has_cache(&self) -> bool {
        self.cache.is_some()
    }

    /// Whether the cache has all of a range.
    pub fn is_cached(&self, range: &Range<u64>) -> bool {
        let cache = self.cache.as_ref();
        cache.is_some_and(|cache| holds_all(cache, range))
    }

    /// Bytes of a range that the cache has.
    pub fn cached_bytes(&self, range: &Range<u64>) -> u64 {
        let cache = self.cache.as_ref();
        cache.map_or(0, |cache| cached_bytes(cache, range))
    }

    /// Fails if the file was seen to be replaced.
    pub fn is_unchanged(&self) -> Result<(), ReadError> {
        match self.changed.get() {
            Some(fault) => Err(self.error(0, fault.clone())),
            None => Ok(()),
        }
    }

    /// Fills the whole buffer from `offset`, or fails.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.read_pieces(offset, buffer, PIECE_BYTES)
    }

    /// As [`read`](Self::read); a server is asked for about `longest` bytes at a time.
    fn read_pieces(&self, offset: u64, buffer: &mut [u8], longest: u64) -> Result<(), ReadError> {
        self.check_unchanged()?;
        let read = self.read_steps(offset, buffer, longest);
        // What came before the change is right, but nobody must see a mixture of both states.
        self.check_unchanged()?;
        read.map_err(|fault| {
            self.client.counters.errors.fetch_add(1, Relaxed);
            self.error(offset, fault)
        })
    }

    /// The same, for a read that fails then.
    pub fn check_unchanged(&self) -> Result<(), ReadError> {
        self.is_unchanged().inspect_err(|_| {
            self.client.counters.errors.fetch_add(1, Relaxed);
        })
    }

    /// Reads a range into a buffer that begins where a direct read of it does, `skip` bytes before.
    /// As a stream it is asked for all at once; else its pieces come side by side, and sooner.
    pub fn read_chunk(
        &self,
        range: &Range<u64>,
        skip: usize,
        buffer: &mut [u8],
        is_streamed: bool,
    ) -> Result<(), ReadError> {
        self.check_unchanged()?;
        let bytes = range.end - range.start;
        let cache = self.cache.as_ref();
        if cache.is_some_and(|cache| cache.read_chunk(range, buffer)) {
            self.client.counters.cached.fetch_add(bytes, Relaxed);
            return self.check_unchanged();
        }
        let longest = if is_streamed { bytes } else { PIECE_BYTES };
        self.read_pieces(
            range.start,
            &mut buffer[skip..skip + bytes as usize],
            longest,
        )
    }

    /// Fetches what the cache lacks of a range, piece by piece, each into `space`.
    pub fn fill_cache(&self, range: Range<u64>, space: &mut Vec<u8>) -> Result<(), ReadError> {
        let mut place = range.start;
        while place < range.end {
            let found = match &self.cache {
                Some(cache) => cache.look(place),
                None => Found::From(None),
            };
            match found {
                Found::Until(end) => place = end,
                Found::From(next) => {
                    let end = next.unwrap_or(range.end).min(range.end);
                    let end = end.min(piece_end(place));
                    space.resize((end - place) as usize, 0);
                    self.read(place, space)?;
                    place = end;
                }
            }
        }
        Ok(())
    }

    fn error(&self, offset: u64, cause: Fault) -> ReadError {
        ReadError::Remote {
            path: self.path.clone(),
            offset,
            cause,
        }
    }

    fn read_steps(&self, offset: u64, buffer: &mut [u8], longest: u64) -> Result<(), Fault> {
        let steps = self.plan(offset, buffer, longest);
        let (mut ours, mut others, mut damaged) = (Vec::new(), Vec::new(), Vec::new());
        let mut result = Ok(());
        for step in steps {
            match step.from {
                From::Server(flown) => ours.push((flown, step.bytes)),
                From::Another(flight) => others.push((flight, step.start, step.bytes)),
                From::Echo(fault) => result = Err(fault),
                From::Cache => {
                    let cache = self.cache.as_ref();
                    match cache.is_some_and(|cache| cache.read(step.start, step.bytes)) {
                        true => {
                            let bytes = step.bytes.len() as u64;
                            self.client.counters.cached.fetch_add(bytes, Relaxed);
                        }
                        false => damaged.push((step.start, step.bytes)),
                    }
                }
            }
        }
        // Ours first, so that no two readers wait for each other.
        let is_all_here = ours.is_empty();
        let fetched = ours
            .into_iter()
            .map(|(flown, bytes)| self.fetch(flown, bytes));
        let fetched = join_all(fetched);
        if !is_all_here {
            for fetched in self.client.wait(fetched) {
                result = result.and(fetched);
            }
        }
        for (flight, start, bytes) in others {
            result = result.and_then(|()| self.wait_for(&flight, start, bytes));
        }
        result?;
        for (start, bytes) in damaged {
            self.read_steps(start, bytes, longest)?;
        }
        Ok(())
    }

    /// Decides how each byte comes, and notes what this read is about to fetch.
    fn plan<'a>(&'a self, offset: u64, buffer: &'a mut [u8], longest: u64) -> Vec<Step<'a>> {
        let end = offset + buffer.len() as u64;
        let mut steps = Vec::new(); // dropped after the guard of the table, which its pieces lock
        let mut flights = self.flights.lock();
        let (mut rest, mut place) = (buffer, offset);
        while !rest.is_empty() {
            let (until, from) = self.next_step(&mut flights, place, end, longest);
            let (bytes, after) = rest.split_at_mut((until - place) as usize);
            steps.push(Step {
                start: place,
                bytes,
                from,
            });
            (rest, place) = (after, until);
        }
        steps
    }

    fn next_step(
        &self,
        flights: &mut Vec<Arc<Flight>>,
        place: u64,
        end: u64,
        longest: u64,
    ) -> (u64, From<'_>) {
        let holds = |flight: &&Arc<Flight>| flight.range.contains(&place);
        if let Some(flight) = flights.iter().find(holds) {
            return (flight.range.end.min(end), From::Another(flight.clone()));
        }
        let cut = match longest > PIECE_BYTES {
            true => place + longest,
            false => piece_end(place),
        };
        let mut until = end.min(cut);
        match self.cache.as_ref().map(|cache| cache.look(place)) {
            Some(Found::Until(held)) => return (held.min(end), From::Cache),
            Some(Found::From(Some(next))) => until = until.min(next),
            Some(Found::From(None)) | None => {}
        }
        let others = flights.iter().map(|flight| flight.range.start);
        until = others.filter(|start| *start > place).fold(until, u64::min);
        let range = place..until;
        if let Some(fault) = self.recent_failure(&range) {
            return (until, From::Echo(fault));
        }
        let flight = Arc::new(Flight {
            range,
            landed: OnceLock::new(),
        });
        flights.push(flight.clone());
        (until, From::Server(Flown { part: self, flight }))
    }

    fn recent_failure(&self, range: &Range<u64>) -> Option<Fault> {
        let mut failures = self.failures.lock();
        failures.retain(|failure| failure.at.elapsed() < ECHO);
        let touches = |f: &&Failure| f.range.start < range.end && range.start < f.range.end;
        failures.iter().find(touches).map(|f| f.fault.clone())
    }

    async fn fetch(&self, flown: Flown<'_>, bytes: &mut [u8]) -> Result<(), Fault> {
        let range = flown.flight.range.clone();
        let fetched = match &self.route {
            Some(route) => route.fetch(&self.client, range.clone(), bytes).await,
            None => Err(Fault::Offline),
        };
        let fetched = fetched.map(|read| debug_assert_eq!(read, bytes.len()));
        match &fetched {
            Ok(()) => self.keep(range.start, bytes),
            Err(fault @ Fault::Changed(_)) => drop(self.changed.set(fault.clone())),
            Err(fault) => {
                if matches!(fault.remedy(), Remedy::Retry(_)) {
                    let at = Instant::now();
                    let fault = fault.clone();
                    self.failures.lock().push(Failure { at, range, fault });
                }
            }
        }
        self.land(&flown.flight, bytes, fetched.clone());
        fetched
    }

    fn unit(&self, place: u64) -> u64 {
        let units = self.units.get().map_or(&[][..], |units| units);
        let after = units.partition_point(|unit| unit.range.start <= place);
        let before = after.checked_sub(1).map(|at| &units[at]);
        let unit = before.filter(|unit| unit.range.contains(&place));
        unit.map_or(0, |unit| unit.number)
    }

    /// Takes a piece off the table, and hands it to those who wait for it. Only the first time counts.
    fn land(&self, flight: &Arc<Flight>, bytes: &[u8], fetched: Result<(), Fault>) {
        let mut flights = self.flights.lock();
        flights.retain(|other| !Arc::ptr_eq(other, flight));
        let is_waited_for = Arc::strong_count(flight) > 1;
        if is_waited_for {
            let _ = flight.landed.set(fetched.map(|()| bytes.into()));
            self.landed.notify_all();
        }
    }

    fn wait_for(&self, flight: &Flight, start: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let mut flights = self.flights.lock();
        let landed = loop {
            match flight.landed.get() {
                Some(landed) => break landed,
                None => self.landed.wait(&mut flights),
            }
        };
        drop(flights);
        let piece = landed.as_ref().map_err(Fault::clone)?;
        let skip = (start - flight.range.start) as usize;
        bytes.copy_from_slice(&piece[skip..skip + bytes.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_for_a_piece_that_nobody_fetches_any_more_hears_of_it() {
        let client = Arc::new(Client::new(false).unwrap());
        let pin = Pin {
            size: 100,
            ..Pin::default()
        };
        let part = RemotePart::new("m.gguf".into(), client, None, pin, None);
        let mut buffer = [0; 100];
        let steps = part.plan(0, &mut buffer, PIECE_BYTES);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| part.read(10, &mut [0; 20]));
            // The table, this thread and the one that waits.
            while Arc::strong_count(&part.flights.lock()[0]) < 3 {
                std::thread::yield_now();
            }
            drop(steps); // as a panic would
            let cause = match waiting.join().unwrap() {
                Err(ReadError::Remote { cause, .. }) => cause,
                other => panic!("{other:?}"),
            };
            assert_eq!(cause, Fault::Abandoned);
        });
        assert!(part.flights.lock().is_empty());
    }
}
