//! Progress of work that takes more than a second.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use odmoe_fs::work::Progress;

use super::{Diagnostics, text};

/// Progress on stderr, after the first second: a bar on a terminal that can move its cursor, else a
/// line for every tenth of the bytes.
pub struct Meter {
    bar: ProgressBar,
    lines: bool,
    total_bytes: u64,
    bytes: AtomicU64,
    files: AtomicU64,
    tenths: AtomicU64,
    started: Instant,
}

impl Meter {
    pub fn new(total_bytes: u64, quiet: bool) -> Self {
        let has_bar = io::stderr().is_terminal() && !text::is_dumb();
        let bar = if quiet || !has_bar {
            ProgressBar::hidden()
        } else {
            let style = ProgressStyle::with_template(
                "{wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}{msg}, {eta} left",
            );
            ProgressBar::new(total_bytes).with_style(style.expect("the template is valid"))
        };
        Self {
            bar,
            lines: !quiet && !has_bar,
            total_bytes,
            bytes: AtomicU64::new(0),
            files: AtomicU64::new(0),
            tenths: AtomicU64::new(0),
            started: Instant::now(),
        }
    }

    pub fn add(&self, progress: Progress) {
        let bytes = self.bytes.fetch_add(progress.bytes, Ordering::Relaxed) + progress.bytes;
        let files = self.files.fetch_add(progress.files, Ordering::Relaxed) + progress.files;
        self.bar.inc(progress.bytes);
        if progress.files > 0 {
            self.bar.set_message(finished(files));
        }
        let tenth = bytes * 10 / self.total_bytes.max(1);
        let elapsed = self.started.elapsed();
        if self.lines
            && elapsed > Duration::from_secs(1)
            && self.tenths.fetch_max(tenth, Ordering::Relaxed) < tenth
        {
            let rate = bytes as f64 / elapsed.as_secs_f64();
            let _ = writeln!(
                Diagnostics,
                "{}0 %: {} of {}{}, {}/s",
                tenth,
                text::size(bytes),
                text::size(self.total_bytes),
                finished(files),
                text::size(rate as u64)
            );
        }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// `, 3 files`; nothing before the first, and of work that finishes none.
fn finished(files: u64) -> String {
    match files {
        0 => String::new(),
        _ => format!(", {}", text::counted(files as usize, "file")),
    }
}
