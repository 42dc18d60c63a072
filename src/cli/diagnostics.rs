//! Messages: to the standard error as long as somebody waits for the command, and from a daemon to a
//! file or the journal.
//!
//! All of this is set up before the daemon is forked off. That says then that it is the daemon, and
//! later that it has left the terminal.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::dynamic_filter_fn;
use tracing_subscriber::fmt;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Layer, Registry};

use super::text;

/// How much is printed.
#[derive(Clone, Copy)]
pub struct Volume {
    pub quiet: bool,
    pub verbose: u8,
}

/// The form of a mount's messages.
#[derive(Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// A JSON object on each line
    Json,
}

/// Where a daemon writes, once it is known.
static LOG: OnceLock<File> = OnceLock::new();

/// Whether this process is the daemon, whose messages are logged.
static IS_LOGGED: AtomicBool = AtomicBool::new(false);
/// Whether there still is a caller to tell.
static HAS_TERMINAL: AtomicBool = AtomicBool::new(true);

/// This process is the daemon.
pub fn log_from_here() {
    IS_LOGGED.store(true, Ordering::Relaxed);
}

/// From here on only the log is written to.
pub fn leave_terminal() {
    HAS_TERMINAL.store(false, Ordering::Relaxed);
}

/// Sends a daemon's messages to a file from now on.
pub fn log_to(file: &File) -> io::Result<()> {
    let _ = LOG.set(file.try_clone()?);
    Ok(())
}

/// Sets messages up, once and before the first of them. Daemons without a log file write to the
/// journal.
pub fn start(volume: Volume, format: LogFormat, to_journal: bool) {
    let printed = match (volume.quiet, volume.verbose) {
        (true, _) => Level::ERROR,
        (false, 0) => Level::WARN,
        (false, 1) => Level::INFO,
        (false, _) => Level::DEBUG,
    };
    // A log holds more than what a person must know at once.
    let logged = if volume.quiet {
        printed
    } else {
        printed.max(Level::INFO)
    };
    let here = dynamic_filter_fn(move |metadata, _| {
        metadata.level() <= &printed && HAS_TERMINAL.load(Ordering::Relaxed)
    });
    let in_daemon = move || {
        dynamic_filter_fn(move |metadata, _| {
            metadata.level() <= &logged && IS_LOGGED.load(Ordering::Relaxed)
        })
        .with_max_level_hint(LevelFilter::from_level(logged))
    };
    let colours = io::stderr().is_terminal() && text::may_be_coloured();
    let terminal = lines(format, || Diagnostics, colours, false);
    let file = lines(format, || Log, false, true);
    let here = here.with_max_level_hint(LevelFilter::from_level(printed));
    let mut layers = vec![
        terminal.with_filter(here).boxed(),
        file.with_filter(in_daemon()).boxed(),
    ];
    if let Some(journal) = to_journal.then(journal).flatten() {
        layers.push(journal.with_filter(in_daemon()).boxed());
    }
    tracing_subscriber::registry().with(layers).init();
}

/// Messages as lines, with the time in a log and in JSON.
fn lines<W, O>(
    format: LogFormat,
    writer: W,
    colours: bool,
    with_time: bool,
) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: Fn() -> O + Send + Sync + 'static,
    O: Write,
{
    let layer = fmt::layer().with_target(false).with_writer(writer);
    match format {
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
        LogFormat::Text if with_time => layer.with_ansi(colours).boxed(),
        LogFormat::Text => layer.with_ansi(colours).without_time().boxed(),
    }
}

/// The journal of systemd, if there is one.
#[cfg(target_os = "linux")]
fn journal() -> Option<tracing_journald::Layer> {
    let journal = tracing_journald::layer().ok()?;
    Some(journal.with_syslog_identifier("odmoe-fs".to_owned()))
}

#[cfg(not(target_os = "linux"))]
fn journal() -> Option<tracing_subscriber::layer::Identity> {
    None
}

/// The standard error. A message that cannot be written is lost: it must not stop the work.
pub struct Diagnostics;

impl Write for Diagnostics {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The file of a daemon, if it has one.
struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(mut file) = LOG.get() {
            let _ = file.write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
