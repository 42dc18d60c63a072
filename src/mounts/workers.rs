//! Whether the threads of a mount can start, tested before it is made, and whether they have
//! started.
//!
//! fuser starts its workers after the mount is made. If one cannot start, the session ends and
//! leaves a mount that nobody serves. If one gets no memory, the process aborts.

use std::io;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use crate::sys::process::use_one_arena;

/// A worker of fuser has a buffer for requests of 16 MiB, and needs 1 MiB for a reply of ours.
const WORKER_BYTES: usize = 18 << 20;
/// The stack that std reserves for a thread.
const STACK_BYTES: usize = 2 << 20;
/// fuser's thread that waits for its workers, and ours that waits for signals.
const OTHER_THREADS: usize = 2;
/// The buffers for reading ahead (41 MiB), the stacks of its threads, and room for documents.
const READING_BYTES: usize = 64 << 20;
/// The threads that read ahead. They start with the first reader; a mount works without them, but
/// more slowly.
const READING_THREADS: usize = 4;

/// Starts as many threads as a mount with so many workers has, with as much memory, and ends them
/// again. From here on, all threads of the process share one arena of the allocator.
///
/// The memory is mapped rather than allocated. The allocator would keep it for later buffers, and
/// memory that is not fresh must be zeroed, which makes it resident.
pub(super) fn try_workers(workers: usize) -> io::Result<()> {
    use_one_arena();
    let threads = workers + OTHER_THREADS + READING_THREADS;
    // All at once: a thread that lacks memory when it starts ends the process.
    let bytes = workers * WORKER_BYTES + threads * STACK_BYTES + READING_BYTES;
    drop(MmapMut::map_anon(bytes)?);
    let gate = parking_lot::Mutex::new(());
    std::thread::scope(|scope| {
        let closed = gate.lock();
        let started: Vec<_> = (0..threads)
            .map(|_| {
                // They wait here until all of them have started.
                Builder::new().spawn_scoped(scope, || drop(gate.lock()))
            })
            .collect();
        drop(closed);
        started.into_iter().try_for_each(|thread| {
            let ended = thread?.join();
            ended.map_err(|_| io::Error::other("a thread panicked"))
        })
    })
}

/// How long workers may take to start.
const STARTING: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(1);

/// Waits until a session has all its workers. Fails with the session's error if it ends before
/// that.
pub(super) fn wait_for_workers(
    session: JoinHandle<io::Result<()>>,
    workers: usize,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let give_up = Instant::now() + STARTING;
    loop {
        let count = count();
        // Where threads cannot be counted, a session that has not ended must suffice.
        if count.is_none_or(|count| count >= workers) {
            return Ok(session);
        }
        if session.is_finished() {
            let ended = session
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the session panicked")));
            return Err(ended.err().unwrap_or_else(ended_early));
        }
        if Instant::now() > give_up {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("only {count:?} of {workers} workers have started"),
            ));
        }
        std::thread::sleep(POLL);
    }
}

fn ended_early() -> io::Error {
    io::Error::other("it was unmounted before it could be used")
}

/// The number of fuser's workers in this process, which are named `fuser-0` and so on.
fn count() -> Option<usize> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let names = tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    let is_worker = |name: &String| {
        let number = name.trim_end().strip_prefix("fuser-");
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    Some(names.filter(is_worker).count())
}
