//! Long work on many files: each is dealt with by one of a few threads, which say how far they are.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::sys::process::descriptor_limit;

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

/// Threads that find descriptors to work with: a file and a part that must be opened again for each.
/// Parts that are kept open may take two thirds of all descriptors, and we a few.
fn most_jobs() -> usize {
    let limit = descriptor_limit();
    let left = usize::try_from(limit / 3).unwrap_or(usize::MAX);
    (left.saturating_sub(8) / 2).max(1)
}

/// Deals with each item in one of `jobs` threads, or fewer where descriptors are short, until one
/// fails; its error is the result. Each thread makes itself a `state`, such as a buffer.
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
        for _ in 0..jobs.get().min(items.len()).min(most_jobs()) {
            scope.spawn(worker);
        }
    });
    first_error.into_inner().map_or(Ok(()), Err)
}
