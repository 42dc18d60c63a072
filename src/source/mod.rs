//! The parts of a model on disk: found, opened, and read by range. The only code that reads
//! model bytes.
//!
//! The problem: a mount lives for weeks, and meanwhile its source may be renamed, replaced,
//! truncated or rewritten. Readers must get the bytes that were there at the start, or an error.
//!
//! The plan: hold the descriptors, so that names do not matter. After every read compare size and
//! time of change with those at the start; a part that differs answers errors from then on. Where
//! a split set has more parts than descriptors, the first parts stay open and the others are
//! opened for each read, which must find the same inode.
//!
//! Whoever keeps the bytes elsewhere (a mount in the kernel's cache of its own files, a copy on
//! disk) wants no second copy of them in memory: with [`PageCache::Unchanged`] reads leave the
//! page cache of the parts as they found it. Then the kernel cannot read ahead, and [`fetch`] does.
//! A part that comes from a server or another program is read as such a file is best read: through
//! one descriptor, and by the kernel's own read-ahead.

pub(crate) mod fetch;
mod open;
mod part;
mod share;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use memmap2::Mmap;

pub use open::{OpenError, open};

use self::fetch::{Chunk, Fetch};
pub(crate) use self::fetch::{Held, Pace, Run};
use self::part::PartFile;
use crate::sys;
pub use crate::sys::process::raise_descriptor_limit;

/// The open parts of a model.
#[derive(Debug)]
pub struct Source {
    shared: Arc<Shared>,
    /// Which part the model was opened by.
    given: usize,
    /// How many threads fetch what will be asked for, once there was something to fetch.
    threads: OnceLock<usize>,
}

/// What the threads need that fetch.
#[derive(Debug)]
struct Shared {
    parts: Vec<PartFile>,
    fetch: Fetch,
}

/// What reading does to the page cache of the parts. Those on a network or FUSE file system are always
/// read through it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PageCache {
    /// What was read stays there, as after every read.
    #[default]
    Filled,
    /// What was there stays, nothing is added, as far as kernel and file system allow.
    Unchanged,
}

/// Why a range of a part cannot be read. To a reader of a mount all of them are EIO.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "read.")]
pub enum ReadError {
    #[error(
        "{path:?} has changed since it was opened; open it again once nobody writes to it: unmount and mount, or say the same command"
    )]
    Changed { path: PathBuf },
    #[error("{path:?} cannot be opened again: {cause}; {}", reopen_hint(.cause))]
    Reopen { path: PathBuf, cause: io::Error },
    #[error("{path:?} cannot be read at byte {offset}: {cause}")]
    Read {
        path: PathBuf,
        offset: u64,
        cause: io::Error,
    },
}

impl ReadError {
    /// The path of the part.
    pub fn path(&self) -> &Path {
        match self {
            Self::Changed { path } | Self::Reopen { path, .. } | Self::Read { path, .. } => path,
        }
    }
}

fn reopen_hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => "allow more open files with `ulimit -n`",
        _ => "put it back, reads of it fail until then",
    }
}

impl Source {
    fn new(parts: Vec<PartFile>, given: usize) -> Self {
        let fetch = Fetch::default();
        Self {
            shared: Arc::new(Shared { parts, fetch }),
            given,
            threads: OnceLock::new(),
        }
    }

    /// Chooses what reading does to the page cache.
    pub fn set_page_cache(&mut self, page_cache: PageCache) {
        let shared = Arc::get_mut(&mut self.shared);
        // Who serves a model owns it: from then on nobody can call this.
        let shared = shared.expect("nothing is fetched before a model is served");
        for part in &mut shared.parts {
            part.set_page_cache(page_cache);
        }
    }

    /// Whether reads can leave the page cache of all parts as they found it.
    pub fn can_leave_page_cache(&self) -> bool {
        let mut parts = self.shared.parts.iter();
        parts.all(PartFile::can_leave_page_cache)
    }

    /// Fills the buffer from `offset` of a part (0-based): all of it, or an error.
    pub fn read_at(&self, part: u32, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let file = self.part(part);
        let range = offset..offset + buffer.len() as u64;
        let (mut rest, mut place) = (buffer, offset);
        for chunk in self.holding(part, &range) {
            let piece = chunk.range().start.max(place)..chunk.range().end.min(range.end);
            if piece.is_empty() {
                continue;
            }
            let Some(held) = chunk.hold(&self.shared.parts, piece.clone()) else {
                continue; // read below, or with what lies before the next chunk
            };
            let (before, after) = rest.split_at_mut((piece.start - place) as usize);
            if !before.is_empty() {
                file.read(place, before)?;
            }
            let (here, after) = after.split_at_mut(held.len());
            here.copy_from_slice(&held);
            (rest, place) = (after, piece.end);
        }
        if !rest.is_empty() {
            file.read(place, rest)?;
        }
        Ok(())
    }

    /// How far ahead of its readers this source is worth reading; `None` if it is not.
    pub(crate) fn pace(&self) -> Option<Pace> {
        let is_fetchable = self.shared.parts.iter().any(PartFile::is_fetchable);
        is_fetchable.then_some(Pace::DISK)
    }

    /// Fetches what a reader will ask for, in this order: now the first `near` bytes of it, and a little
    /// more. That is instead of all that it was said to want before; with no runs it wants nothing
    /// more. The number tells it from other readers.
    pub(crate) fn fetch_ahead(&self, reader: u64, runs: &[Run], near: u64) {
        let shared = &self.shared;
        let chunks = shared.fetch.want(&shared.parts, reader, runs, near);
        if chunks.is_empty() {
            return;
        }
        let threads = self
            .threads
            .get_or_init(|| start_threads(shared, Pace::DISK.threads));
        // Without any, whoever asks for a chunk reads it.
        if *threads > 0 {
            shared.fetch.queue(chunks);
        }
    }

    /// A range of a part as it lies in memory, if it was fetched in one piece.
    pub(crate) fn held(&self, run: Run) -> Option<Held> {
        let range = run.offset..run.offset + run.len;
        let whole = |chunk: &Arc<Chunk>| {
            let held = chunk.range();
            held.start <= range.start && range.end <= held.end
        };
        let chunk = self.holding(run.part, &range).into_iter().find(whole)?;
        chunk.hold(&self.shared.parts, range)
    }

    fn holding(&self, part: u32, range: &Range<u64>) -> Vec<Arc<Chunk>> {
        match self.threads.get() {
            Some(_) => self.shared.fetch.holding(part, range),
            None => Vec::new(), // nothing was ever fetched
        }
    }

    fn part(&self, part: u32) -> &PartFile {
        &self.shared.parts[part as usize]
    }

    /// When the newest part was last modified.
    pub fn modified(&self) -> SystemTime {
        let parts = self.shared.parts.iter();
        let parts = parts.map(|part| part.identity.modified());
        parts.max().unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// The paths of the parts, absolute, in order.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.shared.parts.iter().map(|part| part.path.as_path())
    }

    /// The path of the part that the model was opened by, absolute.
    pub fn given_path(&self) -> &Path {
        &self.shared.parts[self.given].path
    }

    /// Maps a part (0-based) for reading: its tensors without a copy, each at its
    /// [`gguf_offset`](crate::safetensors::TensorView::gguf_offset).
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

/// Starts the threads that read what is queued; returns how many there are.
fn start_threads(shared: &Arc<Shared>, threads: usize) -> usize {
    let start = |n: &usize| {
        let shared = shared.clone();
        let started = std::thread::Builder::new()
            .name(format!("fetch-{n}"))
            .spawn(move || shared.fetch.read_queued(&shared.parts));
        started
            .inspect_err(|e| {
                tracing::warn!("a thread for reading ahead cannot be started: {e}");
            })
            .is_ok()
    };
    (0..threads).filter(start).count()
}
