//! Long work on many files: a few threads take one file after another, and report their progress.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Builder;

use memmap2::MmapMut;
use parking_lot::Mutex;

use crate::sys::process::{descriptor_limit, use_one_arena};

/// The work done since the last report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written or compared.
    pub bytes: u64,
    /// Files finished.
    pub files: u64,
}

/// The default number of threads: one for each processor, but at most 8. More only wait for the
/// disk.
pub fn default_jobs() -> NonZeroUsize {
    let processors = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    processors.min(const { NonZeroUsize::new(8).unwrap() })
}

/// The most threads that the limit on descriptors allows. Each needs one for a file and one for a
/// part that is opened again; parts that are kept open may take two thirds of all, and the rest of
/// the process needs a few.
fn most_jobs() -> usize {
    let limit = descriptor_limit();
    let left = usize::try_from(limit / 3).unwrap_or(usize::MAX);
    (left.saturating_sub(8) / 2).max(1)
}

/// Address space that must be free before another thread is started: for its stack, and for
/// whatever the threads allocate later, since a failed allocation ends the process.
const SPARE_BYTES: usize = 32 << 20;

/// Works on all items in `jobs` threads until one item fails. The result is the error of the first
/// failed item, in the order of `items`. Each thread gets a `state` of its own, such as a buffer.
///
/// The calling thread is one of them. There are fewer, down to that one, if descriptors are short
/// or if a thread is refused (`ulimit -u`, the pids limit of a control group, `ulimit -v`).
pub(crate) fn in_parallel<T: Copy + Sync, S: Send, E: Send>(
    jobs: NonZeroUsize,
    items: &[T],
    state: impl Fn() -> S,
    work: impl Fn(T, &mut S) -> Result<(), E> + Sync,
) -> Result<(), E> {
    if items.is_empty() {
        return Ok(());
    }
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let first_error: Mutex<Option<(usize, E)>> = Mutex::new(None);
    let worker = |mut state: S| {
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(&item) = items.get(index) else {
                break;
            };
            if let Err(e) = work(item, &mut state) {
                failed.store(true, Ordering::Relaxed);
                let mut first = first_error.lock();
                if first.as_ref().is_none_or(|(earlier, _)| index < *earlier) {
                    *first = Some((index, e));
                }
            }
        }
    };
    // Otherwise each thread reserves an arena when it pleases, perhaps between our look at the room
    // and the allocation for which it was.
    use_one_arena();
    let jobs = jobs.get().min(items.len()).min(most_jobs());
    let own_state = state();
    std::thread::scope(|scope| {
        let start = || {
            // Mapped rather than allocated: a compiler may leave out an allocation that is not used.
            drop(MmapMut::map_anon(SPARE_BYTES)?);
            let (worker, state) = (&worker, state());
            Builder::new().spawn_scoped(scope, move || worker(state))?;
            Ok(())
        };
        for started in 1..jobs {
            if let Err::<(), io::Error>(e) = start() {
                tracing::info!("going on with {started} of {jobs} threads: {e}");
                break;
            }
        }
        worker(own_state);
    });
    match first_error.into_inner() {
        Some((_, e)) => Err(e),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(jobs: usize, work: impl Fn(usize) -> Result<(), usize> + Sync) -> Result<(), usize> {
        let items: Vec<usize> = (0..100).collect();
        let jobs = NonZeroUsize::new(jobs).unwrap();
        in_parallel(jobs, &items, || (), |item, ()| work(item))
    }

    #[test]
    fn every_item_is_dealt_with_once_by_any_number_of_threads() {
        for jobs in [1, 2, 7, 300] {
            let done = Mutex::new(Vec::new());
            run(jobs, |item| {
                done.lock().push(item);
                Ok(())
            })
            .unwrap();
            let mut done = done.into_inner();
            done.sort();
            assert_eq!(done, (0..100).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_first_item_that_fails_is_the_one_that_is_told() {
        let together = std::sync::Barrier::new(2);
        let failed = run(2, |item| match item {
            10 => {
                together.wait(); // the other thread has failed, or is about to
                Err(10)
            }
            11 => {
                together.wait();
                Err(11)
            }
            _ => Ok(()),
        });
        assert_eq!(failed, Err(10));
        assert_eq!(
            run(5, |item| if item < 20 { Ok(()) } else { Err(item) }),
            Err(20)
        );
    }
}
