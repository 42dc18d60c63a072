//! Long work on many files: each is dealt with by one of a few threads, which say how far they are.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

/// What was done since the last report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written, or compared.
    pub bytes: u64,
    /// Files that are done.
    pub files: u64,
}

/// Threads for work on files: the processors, but at most 8; more only wait for the disk.
pub fn default_jobs() -> NonZeroUsize {
    let processors = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    processors.min(const { NonZeroUsize::new(8).unwrap() })
}

/// Deals with each item in one of `jobs` threads, in order of their starts, until one fails; its
/// error is the result. Each thread makes itself a `state`, such as a buffer.
pub(crate) fn in_parallel<T: Copy + Sync, S, E: Send>(
    jobs: NonZeroUsize,
    items: &[T],
    state: impl Fn() -> S + Sync,
    work: impl Fn(T, &mut S) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let first_error = Mutex::new(None);
    let worker = || {
        let mut state = state();
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(&item) = items.get(index) else {
                break;
            };
            if let Err(e) = work(item, &mut state) {
                failed.store(true, Ordering::Relaxed);
                first_error.lock().get_or_insert(e);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.get().min(items.len()) {
            scope.spawn(worker);
        }
    });
    first_error.into_inner().map_or(Ok(()), Err)
}
