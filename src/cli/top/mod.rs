//! `top`: which experts are hot, and how fast a mount is read.
//!
//! A [`Sample`] holds the counters of a mount, [`Heat`] those of its experts. They are shown live
//! (`view`), printed, or drawn (`svg`).

mod heat;
mod sample;
mod svg;
mod terminal;
mod view;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use odmoe_fs::explain::{Explain, Hint, hint_of};
use odmoe_fs::mounts::odmoe_mount_of;
use odmoe_fs::stats::Latency;

use self::heat::{Grid, Heat, Measure};
use self::sample::Sample;
use super::failure::{Context, Failure, Result};
use super::screen::Screen;
use super::{print, print_json, say, text};
use odmoe_fs::source::Traffic;

/// Show which experts of a mount are hot, and how fast it is read
///
/// The mount must have been made with --stats. Only requests that reach the file system are
/// counted. Reads that the kernel answers from its cache do not, so opens are the best measure of
/// how often an expert is used.
#[derive(clap::Args)]
pub struct TopArgs {
    /// The directory that the model is mounted on
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Print the counters once, and exit
    #[arg(long)]
    once: bool,
    /// Print the counters as one JSON object (with --once)
    #[arg(long, requires = "once")]
    pub json: bool,
    /// Ask the mount and wait as long as that takes, as a process that can be left waiting.
    #[arg(long, hide = true, requires = "json")]
    ask: bool,
    /// Write the heat map to an SVG file, and exit
    #[arg(long, value_name = "FILE.svg", conflicts_with = "once")]
    export: Option<PathBuf>,
    /// What makes an expert hot, for --once, --export and the start of the live view
    #[arg(long, value_enum, value_name = "WHAT", default_value_t)]
    heat: Measure,
    /// Seconds between updates of the live view
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
}

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::EnumProperty)]
#[strum(serialize_all = "snake_case", prefix = "top.")]
pub enum TopError {
    #[error("{0:?} is not an odmoe-fs mount")]
    #[strum(props(hint = "pick one from `odmoe-fs status`"))]
    NotOurs(PathBuf),
    #[error("the mount on {0:?} counts nothing")]
    #[strum(props(
        hint = "mount it with --stats: `odmoe-fs mount --replace --stats MODEL.gguf DIR`"
    ))]
    NotCounted(PathBuf),
    #[error("the mount on {0:?} does not answer")]
    #[strum(props(hint = "`odmoe-fs status` shows which process serves it"))]
    NotAnswering(PathBuf),
    #[error("the mount on {0:?} was unmounted, or its process has died")]
    #[strum(props(hint = "mount it again with --stats"))]
    Stale(PathBuf),
    #[error("the mount on {0:?} belongs to another user")]
    #[strum(props(hint = "run this as that user"))]
    NotReadable(PathBuf),
}

impl Explain for TopError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        hint_of(self)
    }
}

pub fn run(args: &TopArgs) -> Result<()> {
    let mount =
        odmoe_mount_of(&args.directory).ok_or_else(|| TopError::NotOurs(args.directory.clone()))?;
    let root = mount.directory;
    if args.ask {
        return print_json(&Sample::ask(&root)?);
    }
    let sample = Sample::of(&root)?;
    if let Some(path) = &args.export {
        return export(&sample, &root, args.heat, path);
    }
    if args.json {
        return print_json(&sample);
    }
    if args.once {
        let screen = Screen::of_stdout();
        let text = in_words(&sample, &root, args.heat, &screen);
        return print(&screen.spell(screen.fit(&text)));
    }
    view::run(&root, sample, args.heat, Duration::from_secs(args.interval))
}

/// The printed map fits the lines of a terminal.
const COLUMNS: usize = 64;
/// What stands before a row of the map.
const LABELS: usize = 10;
const ROWS: usize = 128;

fn in_words(sample: &Sample, root: &Path, measure: Measure, screen: &Screen) -> String {
    let stats = &sample.stats;
    let heat = Heat::of(sample, measure);
    let mut out = format!(
        "{} on {}, counted for {} s\n",
        text::name(&stats.architecture),
        text::path(root),
        stats.seconds as u64
    );
    for (name, used) in [("experts", stats.experts), ("base", stats.base)] {
        out += &format!(
            "{name:<8} {:>16} {:>18} {:>12}\n",
            Measure::Opens.text(used.opens),
            Measure::Reads.text(used.reads),
            Measure::Bytes.text(used.bytes)
        );
    }
    out += &format!("latency  {}\n", latencies(&stats.latency));
    if stats.errors > 0 {
        out += &format!("errors   {}\n", text::count(stats.errors));
    }
    if let Some(traffic) = &stats.remote {
        out += &format!("fetched  {}\n", fetched(traffic));
    }
    if heat.hottest() == 0 {
        return out + "no expert was used yet\n";
    }
    out += &format!("\n{} of experts, by layer\n", measure.name());
    let columns = screen
        .columns()
        .map_or(COLUMNS, |all| all.saturating_sub(LABELS));
    let grid = Grid::of(&heat, ROWS, columns.min(COLUMNS));
    for row in &grid.rows {
        let cells: String = row.cells.iter().map(|cell| grid.shade(*cell)).collect();
        out += &format!("{:>9} {}\n", row.label(), cells.trim_end());
    }
    out += &format!("{:>9} {}\n", "", grid.scale());
    out += "\nhottest experts\n";
    for (layer, expert, value) in heat.top(10) {
        out += &format!(
            "  layer {layer:<4} expert {expert:<5} {:>12}\n",
            measure.text(value)
        );
    }
    out
}

/// What a model elsewhere has cost so far.
fn fetched(traffic: &Traffic) -> String {
    let hits = traffic.hits().unwrap_or(0);
    format!(
        "{} in {} requests, {hits} % from the cache, {} failed",
        text::size(traffic.fetched_bytes),
        text::count(traffic.requests),
        text::count(traffic.errors)
    )
}

fn latencies(latency: &Latency) -> String {
    let micros = |n: u64| match n {
        0..1000 => format!("{n} µs"),
        1000..1_000_000 => format!("{:.1} ms", n as f64 / 1e3),
        _ => format!("{:.1} s", n as f64 / 1e6),
    };
    format!(
        "half of the reads within {}, 90 % {}, 99 % {}, all {}",
        micros(latency.p50_us),
        micros(latency.p90_us),
        micros(latency.p99_us),
        micros(latency.max_us)
    )
}

fn export(sample: &Sample, root: &Path, measure: Measure, path: &Path) -> Result<()> {
    let extension = path.extension();
    if !extension.is_some_and(|extension| extension.eq_ignore_ascii_case("svg")) {
        let message = format!("{path:?} does not end in .svg");
        return Err(Failure::new(message).hint("choose a name that does"));
    }
    let heat = Heat::of(sample, measure);
    let title = format!("{} on {}", sample.stats.architecture, root.display());
    let drawing = svg::draw(&heat, measure, &title, sample.stats.seconds);
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // An older picture is replaced only when this one is complete.
    let write = || {
        let file = tempfile::Builder::new().make_in(folder, |path| File::create_new(path))?;
        file.as_file().write_all(drawing.as_bytes())?;
        file.persist(path).map_err(|e| e.error)
    };
    write().with_context(|| format!("cannot write {path:?}"))?;
    say(&format!("wrote {}\n", text::path(path)));
    Ok(())
}
