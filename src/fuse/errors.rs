//! Read errors in the log.
//!
//! The problem: a reader gets only an errno, so the log must name the file of the tree, the part of
//! the model and the range. But thousands of failing reads of a dying disk must not bury everything
//! else in the log.
//!
//! The plan: the first error of each part is logged at once, later ones at most every [`PAUSE`],
//! with the number of errors in between. A part that has changed or is gone is logged once, since
//! that does not change back.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::source::ReadError;

/// Short enough to show that a disk goes on failing, and at most 8,640 lines a day.
const PAUSE: Duration = Duration::from_secs(10);

/// The errors of each part that were logged or counted.
#[derive(Debug, Default)]
pub struct ErrorLog {
    parts: Mutex<Vec<Part>>,
    /// Whether any errors are unlogged. Readers look only at this.
    has_unlogged: AtomicBool,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    /// When a failed read was last logged.
    logged: Option<Instant>,
    /// Failed reads since then.
    unlogged: u64,
    /// Whether it was logged that the part has changed.
    logged_change: bool,
    /// Whether it was logged that the part cannot be opened again.
    logged_missing: bool,
}

impl ErrorLog {
    /// Logs the error with which `request` is refused, or counts it if another was logged lately.
    pub fn log(&self, request: impl fmt::Display, error: &ReadError) {
        if let Some(line) = self.line(request, error, Instant::now()) {
            tracing::error!("{line}");
        }
    }

    /// Logs the number of unlogged errors, if the last message is old enough. Costs next to nothing
    /// if there are none.
    pub fn log_overdue(&self) {
        if self.has_unlogged.load(Ordering::Relaxed) {
            log_all(&self.unlogged(Instant::now(), PAUSE));
        }
    }

    /// Logs the number of unlogged errors, at the end of the mount.
    pub fn log_rest(&self) {
        log_all(&self.unlogged(Instant::now(), Duration::ZERO));
    }

    fn line(&self, request: impl fmt::Display, error: &ReadError, now: Instant) -> Option<String> {
        let mut parts = self.parts.lock();
        let part = part(&mut parts, error.path());
        match error {
            _ if error.is_change() => {
                let is_logged = std::mem::replace(&mut part.logged_change, true);
                (!is_logged).then(|| format!("{request}: {error}; reads of it fail from now on"))
            }
            ReadError::Reopen { .. } => {
                let is_logged = std::mem::replace(&mut part.logged_missing, true);
                (!is_logged).then(|| format!("{request}: {error}"))
            }
            _ => {
                if part.logged.is_some_and(|logged| now < logged + PAUSE) {
                    part.unlogged += 1;
                    self.has_unlogged.store(true, Ordering::Relaxed);
                    return None;
                }
                part.logged = Some(now);
                Some(match std::mem::take(&mut part.unlogged) {
                    0 => format!("{request}: {error}"),
                    more => format!("{request}: {error} (and {more} more since the last message)"),
                })
            }
        }
    }

    /// A line for each part with unlogged errors whose last message is at least as old as `pause`.
    fn unlogged(&self, now: Instant, pause: Duration) -> Vec<String> {
        let mut parts = self.parts.lock();
        let mut lines = Vec::new();
        for part in parts.iter_mut().filter(|part| part.unlogged > 0) {
            if part.logged.is_none_or(|logged| now >= logged + pause) {
                let more = std::mem::take(&mut part.unlogged);
                part.logged = Some(now);
                let reads = if more == 1 { "read has" } else { "reads have" };
                lines.push(format!("{:?}: {more} more {reads} failed", part.path));
            }
        }
        let has_unlogged = parts.iter().any(|part| part.unlogged > 0);
        self.has_unlogged.store(has_unlogged, Ordering::Relaxed);
        lines
    }
}

fn log_all(lines: &[String]) {
    lines.iter().for_each(|line| tracing::error!("{line}"));
}

fn part<'a>(parts: &'a mut Vec<Part>, path: &Path) -> &'a mut Part {
    let place = parts.iter().position(|part| part.path == path);
    let place = place.unwrap_or_else(|| {
        parts.push(Part {
            path: path.to_owned(),
            logged: None,
            unlogged: 0,
            logged_change: false,
            logged_missing: false,
        });
        parts.len() - 1
    });
    &mut parts[place]
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn failed(part: &str, offset: u64) -> ReadError {
        ReadError::Read {
            path: part.into(),
            offset,
            cause: io::Error::from_raw_os_error(libc::EIO),
        }
    }

    #[test]
    fn the_first_error_is_logged_at_once_with_file_range_and_part() {
        let log = ErrorLog::default();
        let request = "read \"experts/a\": 100 bytes at 7";
        let line = log.line(request, &failed("/m.gguf", 4096), Instant::now());
        let expected = "read \"experts/a\": 100 bytes at 7: \"/m.gguf\" cannot be read at byte 4096: Input/output error (os error 5)";
        assert_eq!(line.as_deref(), Some(expected));
    }

    #[test]
    fn a_dying_disk_is_logged_once_in_a_while_with_a_count() {
        let (log, start) = (ErrorLog::default(), Instant::now());
        let at = |seconds: u32| log.line("x", &failed("/m", 0), start + seconds * SECOND);
        assert!(at(0).is_some());
        for second in 1..10 {
            assert_eq!(at(second), None, "{second}");
        }
        assert!(
            at(10)
                .unwrap()
                .ends_with("(and 9 more since the last message)")
        );
        assert_eq!(at(19), None);
        assert!(
            at(25)
                .unwrap()
                .ends_with("(and 1 more since the last message)")
        );
        assert!(at(35).unwrap().ends_with("(os error 5)"));
    }

    #[test]
    fn each_part_has_its_own_first_error() {
        let (log, now) = (ErrorLog::default(), Instant::now());
        for part in ["/1", "/2", "/3"] {
            assert!(log.line("x", &failed(part, 0), now).is_some());
            assert!(log.line("x", &failed(part, 0), now).is_none());
        }
    }

    #[test]
    fn errors_are_counted_even_when_they_stop_and_none_of_them_twice() {
        let (log, start) = (ErrorLog::default(), Instant::now());
        for _ in 0..5 {
            log.line("x", &failed("/1", 0), start);
        }
        log.line("x", &failed("/2", 0), start);
        assert_eq!(log.unlogged(start + 9 * SECOND, PAUSE), [""; 0]);
        let line = "\"/1\": 4 more reads have failed";
        assert_eq!(log.unlogged(start + 10 * SECOND, PAUSE), [line]);
        assert_eq!(log.unlogged(start + 99 * SECOND, PAUSE), [""; 0]);
        assert!(!log.has_unlogged.load(Ordering::Relaxed));
        // That was a message like any other.
        assert_eq!(log.line("x", &failed("/1", 0), start + 11 * SECOND), None);
        let line = "\"/1\": 1 more read has failed";
        assert_eq!(log.unlogged(start + 11 * SECOND, Duration::ZERO), [line]);
    }

    #[test]
    fn every_error_is_in_some_message() {
        let (log, start) = (ErrorLog::default(), Instant::now());
        let mut logged = 0;
        let number = |line: &str| {
            let mut words = line
                .split(' ')
                .filter_map(|w| w.trim_start_matches('(').parse().ok());
            words.next_back().unwrap_or(0)
        };
        for n in 0..1000_u64 {
            let now = start + Duration::from_millis(n * n % 997 + n * 37);
            if let Some(line) = log.line("x", &failed("/1", 0), now) {
                let more = line.split_once("(and ").map_or(0, |(_, rest)| number(rest));
                logged += 1 + more;
            }
            let overdue = log.unlogged(now, PAUSE);
            logged += overdue.iter().map(|line| number(line)).sum::<u64>();
        }
        let rest = log.unlogged(start + 3600 * SECOND, Duration::ZERO);
        logged += rest.iter().map(|line| number(line)).sum::<u64>();
        assert_eq!(logged, 1000);
    }

    #[test]
    fn a_change_is_logged_once_whatever_else_fails() {
        let (log, start) = (ErrorLog::default(), Instant::now());
        let changed = ReadError::Changed { path: "/m".into() };
        let gone = |path: &str| ReadError::Reopen {
            path: path.into(),
            cause: io::ErrorKind::NotFound.into(),
        };
        assert!(log.line("x", &failed("/m", 0), start).is_some());
        let line = log.line("x", &changed, start).unwrap();
        assert!(line.starts_with("x: \"/m\" has changed"), "{line}");
        assert!(line.ends_with("; reads of it fail from now on"), "{line}");
        assert!(log.line("x", &gone("/m"), start).is_some());
        for hours in 0..100 {
            let now = start + hours * 3600 * SECOND;
            assert_eq!(log.line("x", &changed, now), None);
            assert_eq!(log.line("x", &gone("/m"), now), None);
        }
        assert!(log.line("x", &gone("/other"), start).is_some());
        assert_eq!(log.unlogged(start + 3600 * SECOND, PAUSE), [""; 0]);
    }
}
