//! Long work on many files: each is dealt with by one of a few threads, which say how far they are.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Builder;

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
    let limit = descriptor_limit().unwrap_or(256);
    let left = usize::try_from(limit / 3).unwrap_or(usize::MAX);
    (left.saturating_sub(8) / 2).max(1)
}

/// Address space that must be left when a thread is started, for its stack and for what all of them
/// allocate while they work: what is refused then ends the process.
const SPARE_BYTES: usize = 32 << 20;

/// Deals with each item in one of `jobs` threads until one fails; the error of the first that does,
/// in the order of the items, is the result. Each thread gets a `state` of its own, such as a buffer. The calling thread is one of them, and the
/// only one where a limit allows no more: there are fewer where descriptors are short, or where a
/// thread is refused (`ulimit -u`, the pids limit of a control group, `ulimit -v`).
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
    let jobs = jobs.get().min(items.len()).min(most_jobs());
    let own_state = state();
    std::thread::scope(|scope| {
        let start = || {
            Vec::<u8>::new().try_reserve_exact(SPARE_BYTES)?;
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
