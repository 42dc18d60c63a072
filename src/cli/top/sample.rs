//! The counters of a mount, asked of the mount itself.
//!
//! The problem: a daemon may stop at any moment, also after it has answered, and a process that
//! waits for an answer that it has taken in hand cannot even be killed.
//!
//! The plan: another process of this program asks, and this one waits for it no longer than
//! [`PATIENCE`].

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use odmoe_fs::mounts::{State, state_of};
use odmoe_fs::stats::{ExpertUse, HEAT_ATTRIBUTE, STATS_ATTRIBUTE, Snapshot};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::super::failure::{Context, Failure, Result};
use super::TopError;

/// How long a mount that has just answered may take to tell its counters, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);

/// The counters of a mount at one moment.
#[derive(Serialize, Deserialize)]
pub struct Sample {
    pub stats: Snapshot,
    /// The used experts of each layer, the hottest first: `[expert, opens, reads, bytes]`.
    pub heat: Vec<LayerHeat>,
}

#[derive(Serialize, Deserialize)]
pub struct LayerHeat {
    pub layer: u32,
    pub experts: Vec<ExpertUse>,
}

/// What the other process prints when it fails.
#[derive(Deserialize)]
struct Refused {
    error: Failure,
}

impl Sample {
    /// Asks a mount for its counters.
    pub fn of(root: &Path) -> Result<Self> {
        let fail = |error: fn(PathBuf) -> TopError| Err(Failure::from(error(root.to_owned())));
        match state_of(root) {
            State::Alive | State::Changed => {}
            State::NotAnswering => return fail(TopError::NotAnswering),
            State::Stale => return fail(TopError::Stale),
            State::NotReadable | State::Hidden => return fail(TopError::NotReadable),
        }
        let program = match cfg!(target_os = "linux") {
            true => PathBuf::from("/proc/self/exe"), // also after the program was replaced
            false => std::env::current_exe()?,
        };
        let mut child = Command::new(program)
            .args(["top", "--once", "--json", "--ask", "--"])
            .arg(root)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot ask the mount")?;
        let mut output = child.stdout.take().context("the pipe is missing")?;
        let (sender, receiver) = mpsc::channel();
        let read = move || {
            let mut json = Vec::new();
            let _ = output.read_to_end(&mut json); // what is missing is no JSON
            let _ = sender.send(json); // perhaps nobody waits any more
        };
        let reader = std::thread::Builder::new()
            .spawn(read)
            .context("cannot start a thread")?;
        let Ok(json) = receiver.recv_timeout(PATIENCE) else {
            let _ = child.kill(); // it ends when it can
            return fail(TopError::NotAnswering);
        };
        // The view blocks signals next, but in its own thread only: another one would die of them.
        let _ = reader.join();
        match child.wait()?.success() {
            true => parsed(&json),
            false => Err(parsed::<Refused>(&json)?.error),
        }
    }

    /// Asks a mount, and waits as long as that takes.
    pub fn ask(root: &Path) -> Result<Self> {
        let stats = attribute(root, STATS_ATTRIBUTE)?;
        let stats = stats.ok_or_else(|| TopError::NotCounted(root.to_owned()))?;
        let stats: Snapshot = parsed(&stats)?;
        let heat = stats.layers.iter().map(|&(layer, _)| {
            let value = attribute(root, &format!("{HEAT_ATTRIBUTE}{layer}"))?;
            let experts = parsed(&value.unwrap_or_default())?;
            Ok(LayerHeat { layer, experts })
        });
        Ok(Self {
            heat: heat.collect::<Result<_>>()?,
            stats,
        })
    }
}

fn parsed<T: DeserializeOwned>(json: &[u8]) -> Result<T> {
    serde_json::from_slice(json).map_err(|e| Failure::unknown(&e))
}

/// An extended attribute; `None` if the file has no such.
fn attribute(path: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let mut value = vec![0; 64 << 10]; // the longest value that Linux allows
    match rustix::fs::getxattr(path, name, &mut value) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(
            rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS,
        ) => Ok(None),
        Err(e) => Err(std::io::Error::from(e)).with_context(|| format!("cannot ask {path:?}")),
    }
}
