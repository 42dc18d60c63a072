//! The parts of a model on disk: found, opened, and read by range. The only code that reads
//! model bytes.
//!
//! The problem: a mount lives for weeks, and meanwhile its source may be renamed, replaced,
//! truncated or rewritten. Readers must get the bytes that were there at the start, or an error.
//!
//! The plan: hold the descriptors, so that names do not matter. After every read, compare size and
//! modification time with those at the start; a part that differs answers errors from then on. If a
//! split set has more parts than there are descriptors, the first parts stay open, and the others
//! are opened for each read, which must find the same inode.
//!
//! A mount keeps the bytes in the kernel's cache of its own files, and a copy keeps them on a disk;
//! neither wants them in memory a second time. With [`PageCache::Unchanged`], reads leave the page
//! cache of the parts as they found it. The kernel cannot read ahead then, so `fetch` does. A part
//! that comes from a server or another program is read the way such files are best read: through
//! one descriptor, with the kernel's own read-ahead.

mod error;
pub(crate) mod fetch;
mod folder;
mod open;
mod part;
mod place;
mod reader;
#[cfg(feature = "remote")]
pub mod remote;
mod share;
mod store;
mod traffic;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use memmap2::Mmap;
use parking_lot::Mutex;

pub use error::OpenError;
pub use open::open;
pub use traffic::Traffic;

pub use self::fetch::Run;
use self::fetch::{Chunk, Fetch};
pub(crate) use self::fetch::{Held, Near, Pace};
use self::place::Part;
use crate::explain::{Explain, Hint, hint_of};
use crate::sys;

/// The open parts of a model.
#[derive(Debug)]
pub struct Source {
    shared: Arc<Shared>,
    /// Which part the model was opened by.
    given: usize,
    /// They start when there is something to fetch.
    threads: OnceLock<Mutex<Threads>>,
}

/// The threads that fetch: as many as the slowest thing needs that was fetched so far. On a disk,
/// more than it needs would only get in each other's way.
#[derive(Debug, Default)]
struct Threads {
    wanted: usize,
    /// Not always as many as wanted.
    running: usize,
}

/// What the fetching threads need.
#[derive(Debug)]
struct Shared {
    parts: Vec<Part>,
    fetch: Fetch,
}

/// What reading does to the page cache of the parts. Parts on a network or FUSE file system are
/// always read through it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PageCache {
    /// It keeps what was read, as after every ordinary read.
    #[default]
    Filled,
    /// It keeps what it had and gets nothing new, as far as kernel and file system allow.
    Unchanged,
}

/// Why a range of a part cannot be read. For a reader of a mount, each of these is EIO.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::EnumProperty)]
#[strum(serialize_all = "snake_case", prefix = "read.")]
pub enum ReadError {
    #[error("{path:?} has changed since it was opened")]
    #[strum(props(
        hint = "wait until nothing writes to it, then mount it again, or run the command again"
    ))]
    Changed { path: PathBuf },
    #[error("{path:?} cannot be opened again: {cause}")]
    Reopen { path: PathBuf, cause: io::Error },
    #[error("{path:?} cannot be read at byte {offset}: {cause}")]
    Read {
        path: PathBuf,
        offset: u64,
        cause: io::Error,
    },
    #[cfg(feature = "remote")]
    #[error("{path:?} cannot be read at byte {offset}: {cause}")]
    Remote {
        path: PathBuf,
        offset: u64,
        cause: remote::Fault,
    },
}

impl ReadError {
    /// The path of the part.
    pub fn path(&self) -> &Path {
        match self {
            Self::Changed { path } | Self::Reopen { path, .. } | Self::Read { path, .. } => path,
            #[cfg(feature = "remote")]
            Self::Remote { path, .. } => path,
        }
    }

    /// Whether the part is not what it was when it was opened, so that all reads of it fail.
    pub fn is_change(&self) -> bool {
        match self {
            Self::Changed { .. } => true,
            Self::Reopen { .. } | Self::Read { .. } => false,
            #[cfg(feature = "remote")]
            Self::Remote { cause, .. } => matches!(cause, remote::Fault::Changed(_)),
        }
    }
}

fn reopen_hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => "allow more open files with `ulimit -n`",
        _ => "put it back; until then, reads of it fail",
    }
}

impl Explain for ReadError {
    fn code(&self) -> &'static str {
        match self {
            #[cfg(feature = "remote")]
            Self::Remote { cause, .. } => cause.code(),
            _ => self.into(),
        }
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Read { cause, .. } => cause.hint(),
            Self::Reopen { cause, .. } => Some(reopen_hint(cause).into()),
            Self::Changed { .. } => hint_of(self),
            #[cfg(feature = "remote")]
            Self::Remote { cause, .. } => cause.hint(),
        }
    }
}

impl Source {
    fn new(parts: Vec<Part>, given: usize) -> Self {
        let is_remote = parts.iter().any(|part| part.file().is_none());
        let fetch = if is_remote {
            Fetch::costly()
        } else {
            Fetch::default()
        };
        Self {
            shared: Arc::new(Shared { parts, fetch }),
            given,
            threads: OnceLock::new(),
        }
    }

    /// Chooses what reading does to the page cache.
    pub fn set_page_cache(&mut self, page_cache: PageCache) {
        let shared = Arc::get_mut(&mut self.shared);
        // Serving takes the model by value, so nobody can call this afterwards.
        let shared = shared.expect("nothing is fetched before a model is served");
        for part in &mut shared.parts {
            part.set_page_cache(page_cache);
        }
        let insists = |part: &&Part| part.insists_on_page_cache(page_cache);
        let others = shared.parts.iter().filter(insists);
        let (others, all) = (others.count(), shared.parts.len());
        if others > 0 {
            tracing::info!(
                "{others} of {all} parts are on a network or FUSE file system: they are read through its cache"
            );
        }
    }

    /// Whether reads can leave the page cache of all parts as they found it.
    pub fn can_leave_page_cache(&self) -> bool {
        let mut parts = self.shared.parts.iter();
        parts.all(Part::can_leave_page_cache)
    }

    /// Fills the whole buffer from `offset` of a part (0-based), or fails.
    pub fn read_at(&self, part: u32, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let run = Run {
            part,
            offset,
            len: buffer.len() as u64,
        };
        self.fill(run, buffer, Held::give_up)
    }

    /// Fills a buffer with a run, or fails. What was fetched of it stays, since it is needed again.
    pub(crate) fn look_at(&self, run: Run, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.fill(run, buffer, |_| {})
    }

    fn fill(&self, run: Run, buffer: &mut [u8], used: fn(&Held)) -> Result<(), ReadError> {
        let file = self.part(run.part);
        let range = run.range();
        let (mut rest, mut place) = (buffer, run.offset);
        for chunk in self.holding(run.part, &range) {
            let piece = chunk.range().start.max(place)..chunk.range().end.min(range.end);
            if piece.is_empty() {
                continue;
            }
            let Some(held) = chunk.hold(&self.shared.parts, piece.clone()) else {
                continue; // read below, or together with the gap before the next chunk
            };
            let (before, after) = rest.split_at_mut((piece.start - place) as usize);
            if !before.is_empty() {
                file.read(place, before)?;
            }
            let (here, after) = after.split_at_mut(held.len());
            here.copy_from_slice(&held);
            used(&held);
            (rest, place) = (after, piece.end);
        }
        if !rest.is_empty() {
            file.read(place, rest)?;
        }
        Ok(())
    }

    /// Notes that nobody needs what was fetched of a run any more, as far as is known.
    pub(crate) fn give_up(&self, run: Run) {
        for chunk in self.holding(run.part, &run.range()) {
            chunk.give_up(&run.range());
        }
    }

    /// Says which file of the tree each range of each remote part belongs to.
    #[cfg(feature = "remote")]
    pub(crate) fn set_units(&self, units: Vec<Vec<remote::Unit>>) {
        for (part, units) in self.shared.parts.iter().zip(units) {
            if let Some(part) = part.remote() {
                part.set_units(units);
            }
        }
    }

    /// What was asked of servers so far, and what came; `None` of a model on this machine.
    pub fn traffic(&self) -> Option<Traffic> {
        #[cfg(feature = "remote")]
        return self.remote_parts().next().map(|part| part.traffic());
        #[cfg(not(feature = "remote"))]
        None
    }

    /// The remote parts, in order; none of a model on this machine.
    #[cfg(feature = "remote")]
    pub fn remote_parts(&self) -> impl Iterator<Item = &remote::RemotePart> {
        self.shared.parts.iter().filter_map(Part::remote)
    }

    /// Whether the parts are somewhere else. They are all in one place.
    pub fn is_remote(&self) -> bool {
        self.shared.parts.iter().any(|part| part.file().is_none())
    }

    /// How far to read ahead of readers of this source; `None` if that is of no use.
    pub(crate) fn pace(&self) -> Option<Pace> {
        let is_fetchable = self.shared.parts.iter().any(Part::is_fetchable);
        let pace = if self.is_remote() {
            Pace::LINK
        } else {
            Pace::DISK
        };
        is_fetchable.then_some(pace)
    }

    /// Fetches what a reader will ask for, in this order: about the first `near` bytes of it now.
    /// This replaces what the reader wanted before; no runs mean that it wants nothing more. The
    /// number tells readers apart.
    pub(crate) fn fetch_ahead(&self, reader: u64, runs: &[Run], near: impl Into<Near>) {
        let Near {
            from_server,
            from_disk,
        } = near.into();
        let shared = &self.shared;
        let (pace, near) = match self.is_remote() {
            false => (Pace::DISK, from_disk),
            true if self.is_on_disk(runs, from_server) => {
                (Pace::DISK, from_disk.min(Pace::DISK.ahead))
            }
            true => (Pace::LINK, from_server),
        };
        let fetch = &shared.fetch;
        let chunks = fetch.want(&shared.parts, reader, runs, near, &pace);
        if chunks.is_empty() {
            return;
        }
        let mut threads = self.threads.get_or_init(Mutex::default).lock();
        if threads.wanted < pace.threads {
            threads.running += start_threads(shared, threads.wanted..pace.threads);
            threads.wanted = pace.threads;
        }
        // Without threads, whoever asks for a chunk reads it.
        if threads.running > 0 {
            shared.fetch.queue(chunks);
        }
    }

    /// Whether the first `near` bytes of some runs come from a disk: the cache of a remote part is
    /// read at the pace of one.
    pub(crate) fn is_on_disk(&self, runs: &[Run], near: u64) -> bool {
        let mut left = near;
        runs.iter().all(|run| {
            let len = run.len.min(left);
            left -= len;
            self.part(run.part)
                .is_on_disk(&(run.offset..run.offset + len))
        })
    }

    /// The bytes of a run, in the memory they were fetched into; `None` unless one chunk holds them
    /// all.
    pub(crate) fn held(&self, run: Run) -> Option<Held> {
        let held = self.borrow(run)?;
        held.give_up();
        Some(held)
    }

    /// The same. What was fetched stays, since it is needed again.
    pub(crate) fn borrow(&self, run: Run) -> Option<Held> {
        let range = run.range();
        let whole = |chunk: &Arc<Chunk>| {
            let held = chunk.range();
            held.start <= range.start && range.end <= held.end
        };
        let chunk = self.holding(run.part, &range).into_iter().find(whole)?;
        chunk.hold(&self.shared.parts, range)
    }

    /// Whether all of a run is in memory, or will be soon.
    pub(crate) fn is_begun(&self, run: Run) -> bool {
        let range = run.range();
        let mut place = range.start;
        for chunk in self.holding(run.part, &range) {
            let held = chunk.range();
            if held.start <= place {
                place = place.max(held.end);
            }
        }
        place >= range.end
    }

    fn holding(&self, part: u32, range: &Range<u64>) -> Vec<Arc<Chunk>> {
        match self.threads.get() {
            Some(_) => self.shared.fetch.holding(part, range),
            None => Vec::new(), // nothing was fetched yet
        }
    }

    fn part(&self, part: u32) -> &Part {
        &self.shared.parts[part as usize]
    }

    /// Fails if a part is not as it was when the model was opened.
    pub(crate) fn check_unchanged(&self, part: u32) -> Result<(), ReadError> {
        self.part(part).is_unchanged()
    }

    /// How many parts are not as they were when the model was opened.
    pub fn changed_parts(&self) -> u64 {
        let parts = self.shared.parts.iter();
        parts.filter(|part| part.is_unchanged().is_err()).count() as u64
    }

    /// When the newest part was last modified. Of a model elsewhere, which has whole seconds or none,
    /// the rest of the second is made of what tells its files from others, such as their ETags.
    pub fn modified(&self) -> SystemTime {
        self.newest() + self.fingerprint().unwrap_or_default()
    }

    fn newest(&self) -> SystemTime {
        let parts = self.shared.parts.iter();
        let parts = parts.map(Part::modified);
        parts.max().unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Whether what was made of this model is known by a time: by its own, or by the form of it that
    /// a file system has stored.
    pub(crate) fn is_told_by(&self, time: SystemTime) -> bool {
        if !self.is_remote() {
            return true;
        }
        let Some(fingerprint) = self.fingerprint() else {
            return false;
        };
        let newest = self.newest();
        newest > SystemTime::UNIX_EPOCH || time == newest + fingerprint
    }

    /// A part of a second that other states of a model elsewhere hardly have. `None` if nothing is
    /// known by which they would differ, and of models on this machine.
    #[cfg(feature = "remote")]
    fn fingerprint(&self) -> Option<Duration> {
        // The unit of times on NTFS and SMB, which other file systems store as well.
        const TICK: Duration = Duration::from_nanos(100);
        const TICKS: u64 = 10_000_000;
        let pins = || self.remote_parts().map(remote::RemotePart::pin);
        let are_told_apart = self.is_remote() && pins().all(|pin| pin.holds());
        are_told_apart.then(|| TICK * (remote::fingerprint(pins()) % TICKS) as u32)
    }

    #[cfg(not(feature = "remote"))]
    fn fingerprint(&self) -> Option<Duration> {
        None
    }

    /// The paths of the parts, absolute, in order.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.shared.parts.iter().map(Part::path)
    }

    /// The absolute path of the part that the model was opened by.
    pub fn given_path(&self) -> &Path {
        self.shared.parts[self.given].path()
    }

    /// Maps a part (0-based) for reading: its tensors without a copy, each at its
    /// [`gguf_offset`](crate::layout::TensorView::gguf_offset).
    ///
    /// # Safety
    /// Nobody may change the part's file while the map lives: a truncated file raises SIGBUS, a
    /// rewritten one changes bytes behind shared references.
    #[allow(unsafe_code)]
    pub unsafe fn map(&self, part: u32) -> Result<Mmap, ReadError> {
        // SAFETY: the caller promises that the file does not change.
        let map = self.with_part(part, |file| unsafe { sys::map(file) })?;
        map.map_err(|cause| self.part(part).read_error(0, cause))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.shared.fetch.close();
    }
}

/// Starts threads that read queued chunks, with these numbers; returns how many did start.
fn start_threads(shared: &Arc<Shared>, numbers: Range<usize>) -> usize {
    let start = |n: &usize| {
        let shared = shared.clone();
        let started = std::thread::Builder::new()
            .name(format!("fetch-{n}"))
            .spawn(move || shared.fetch.read_queued(&shared.parts));
        started
            .inspect_err(|e| {
                tracing::warn!("a thread for reading ahead could not be started: {e}");
            })
            .is_ok()
    };
    numbers.filter(start).count()
}
