//! Whether the threads that serve a mount can start, found out before it is made; and whether they
//! have.
//!
//! fuser starts its workers when the mount is made already. If one cannot start, the session ends
//! and leaves a mount that nobody serves; if one has no memory, the process aborts.

use std::io;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use crate::sys::process::use_one_arena;

/// The buffer of a worker of fuser, for requests of 16 MiB, and what a reply of ours takes, 1 MiB.
const WORKER_BYTES: usize = 18 << 20;
/// What std reserves for a thread's stack.
const STACK_BYTES: usize = 2 << 20;
/// fuser's own thread that waits for its workers, and ours that waits for signals.
const OTHER_THREADS: usize = 2;
/// The buffers for reading ahead (33 MiB), the stacks of its threads, and room for documents.
const READING_BYTES: usize = 64 << 20;
/// Threads that read ahead. They start with the first reader, and are missed if they cannot.
const READING_THREADS: usize = 4;

/// Starts as many threads as a mount of so many workers will have, with as much memory, and ends
/// them again. From here on the process has one arena for all of them.
///
/// The memory is not taken from the allocator, which would keep it, and would take later buffers from
/// what is not fresh: then zeroing them uses them.
pub(super) fn try_workers(workers: usize) -> io::Result<()> {
    use_one_arena();
    let threads = workers + OTHER_THREADS + READING_THREADS;
    // All at once: a lack of memory while a thread starts is no error but the end of the process.
    let bytes = workers * WORKER_BYTES + threads * STACK_BYTES + READING_BYTES;
    drop(MmapMut::map_anon(bytes)?);
    let gate = parking_lot::Mutex::new(());
    std::thread::scope(|scope| {
        let closed = gate.lock();
        let started: Vec<_> = (0..threads)
            .map(|_| {
                // Held until all of them are there.
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

/// Waits until a session has all its workers. Fails with the session if it ends before that.
pub(super) fn wait_for_workers(
    session: JoinHandle<io::Result<()>>,
    workers: usize,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let give_up = Instant::now() + STARTING;
    loop {
        let count = count();
        // Where threads cannot be counted, that it has not ended must do.
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

/// The workers of fuser in this process, which it calls `fuser-0` and so on.
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
