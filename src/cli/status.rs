//! `status`: our mounts, and whether each answers.

use odmoe_fs::mounts::{MountStatus, status};
use odmoe_fs::source::Traffic;
use serde::Serialize;

use super::screen::Screen;
use super::{Result, print, print_json, text};

/// List the mounts of odmoe-fs on this machine, and whether each answers
///
/// A mount is alive; changed, when a part of its model has been written to since it was mounted, so
/// that reads of that part fail; not answering, when its process is stopped or waits for the disk;
/// stale, when its process is dead (`umount` removes it, and so does the next `mount` there); not
/// readable, when it belongs to another user; or hidden, when another mount lies on top of it.
#[derive(clap::Args)]
pub struct StatusArgs {
    /// Print a JSON array of {"directory", "model", "pid", "state"}, and "remote" of a model elsewhere
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Line {
    directory: String,
    model: Option<String>,
    pid: Option<u32>,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    remote: Option<Traffic>,
}

impl Line {
    fn of(mount: MountStatus) -> Self {
        Self {
            directory: mount.directory.to_string_lossy().into_owned(),
            model: mount
                .model
                .map(|model| model.to_string_lossy().into_owned()),
            pid: mount.pid,
            state: mount.state.name(),
            remote: mount.traffic,
        }
    }
}

pub fn run(args: &StatusArgs) -> Result<()> {
    let lines: Vec<Line> = status().into_iter().map(Line::of).collect();
    if args.json {
        return print_json(&lines);
    }
    if lines.is_empty() {
        return print("no odmoe-fs mounts\n");
    }
    let head = ["DIRECTORY", "STATE", "PID", "MODEL"].map(str::to_owned);
    let rows = lines.iter().map(|line| {
        let pid = line.pid.map_or("-".into(), |pid| pid.to_string());
        [
            text::name(&line.directory),
            line.state.to_owned(),
            pid,
            line.model.as_deref().map_or("-".into(), text::name),
        ]
    });
    let rows = std::iter::once(head).chain(rows).collect();
    let screen = Screen::of_stdout();
    print(&(screen.whole_table(rows) + &fetched(&lines, &screen)))
}

/// What the mounts of models elsewhere have fetched, below the table of all.
fn fetched(lines: &[Line], screen: &Screen) -> String {
    let rows = lines.iter().filter_map(|line| {
        let traffic = line.remote?;
        Some([
            text::name(&line.directory),
            text::size(traffic.fetched_bytes),
            traffic
                .hits()
                .map_or("-".into(), |hits| format!("{hits} %")),
            text::count(traffic.errors),
        ])
    });
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return String::new();
    }
    let head = ["DIRECTORY", "FETCHED", "FROM CACHE", "ERRORS"].map(str::to_owned);
    let rows = std::iter::once(head).chain(rows).collect();
    format!("\n{}", screen.whole_table(rows))
}
