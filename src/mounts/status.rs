//! The odmoe-fs mounts, and whether each answers.
//!
//! The problem: `stat` hangs on a mount whose daemon is stopped, and on a dead one the kernel may
//! answer it from memory.
//!
//! The plan: the mount table lists the mounts. Child processes ask all of them at the same time,
//! and a mount that has not answered within a second counts as not answering. No state is kept in
//! files.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::SUBTYPE;
use super::processes::{descriptor_fields, process_folder, process_ids};
use super::table::{self, MountEntry};
use crate::host::DEVICE;
use crate::source::Traffic;
use crate::sys::probe::{Answer, Probe};

/// How long a mount may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// An odmoe-fs mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountStatus {
    pub directory: PathBuf,
    /// The model's path; `None` if the table cannot hold it and this user may not look into the
    /// process.
    pub model: Option<OsString>,
    /// The process that serves it; `None` if it is dead or this user may not look into it.
    pub pid: Option<u32>,
    pub state: State,
    /// What it has asked of servers; `None` if its model is on this machine, or nothing is known.
    pub traffic: Option<Traffic>,
}

/// Whether a mount can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Alive,
    /// It answers, but parts of its model have changed since it was mounted, so reads of them fail.
    Changed,
    /// Its process is stopped, or waits for something.
    NotAnswering,
    /// Its process is dead.
    Stale,
    /// It is another user's.
    NotReadable,
    /// Another mount lies on top of it.
    Hidden,
}

impl State {
    /// The state in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Changed => "changed",
            Self::NotAnswering => "not answering",
            Self::Stale => "stale",
            Self::NotReadable => "not readable",
            Self::Hidden => "hidden",
        }
    }

    fn of(answer: Option<Answer>) -> Self {
        match answer {
            None => Self::NotAnswering,
            Some(Answer::Alive) => Self::Alive,
            Some(Answer::Changed) => Self::Changed,
            // ECONNABORTED if the connection was aborted.
            Some(Answer::Error(libc::ENOTCONN | libc::ECONNABORTED)) => Self::Stale,
            // Most often EACCES.
            Some(Answer::Error(_)) => Self::NotReadable,
        }
    }
}

/// All odmoe-fs mounts, in the order they were made. This takes little more than a second, whatever
/// state they are in.
pub fn status() -> Vec<MountStatus> {
    let table = table::mount_table();
    let mounts: Vec<_> = table.iter().filter(|m| m.is_odmoe()).cloned().collect();
    let directories: Vec<_> = mounts.iter().map(|m| m.directory.as_path()).collect();
    let mut states = states(&directories);
    for (mount, (state, _)) in mounts.iter().zip(&mut states) {
        // Another mount hides it, and has answered instead.
        if table::visible(&table, &mount.directory) != Some(mount) {
            *state = State::Hidden;
        }
    }
    let processes = processes();
    let one = |(mount, (state, traffic)): (MountEntry, (State, Option<Traffic>))| {
        let process = serving(&mount, &processes);
        MountStatus {
            pid: process.map(|process| process.pid),
            model: model_of(&mount, process),
            directory: mount.directory,
            state,
            traffic,
        }
    };
    mounts.into_iter().zip(states).map(one).collect()
}

/// The model's path, if it can be found out.
fn model_of(mount: &MountEntry, process: Option<&Process>) -> Option<OsString> {
    match &mount.source {
        // The path was not put into the table, since it could be taken for options.
        source if source == SUBTYPE => process.and_then(Process::model),
        source => Some(source.clone()),
    }
}

/// What a mount is of: its model or, if that cannot be found out, the source in the table.
pub(super) fn source_name(mount: &MountEntry) -> String {
    let model = model_of(mount, serving(mount, &processes()));
    let name = model.as_ref().unwrap_or(&mount.source);
    name.to_string_lossy().into_owned()
}

/// The state of the mount on a directory, within little more than a second.
pub fn state_of(directory: &Path) -> State {
    states(&[directory])[0].0
}

/// The process that serves a mount, if it can be seen.
pub(super) fn pid_of(mount: &MountEntry) -> Option<u32> {
    let processes = processes();
    Some(serving(mount, &processes)?.pid)
}

/// The process that serves a mount. The number of a connection is soon reused, while the daemon
/// that had it before may still be ending, so this is the process that started last.
fn serving<'a>(mount: &MountEntry, processes: &'a [Process]) -> Option<&'a Process> {
    let serving = processes.iter().filter(|process| process.serves(mount));
    serving.max_by_key(|process| process.started)
}

/// Asks all of them at the same time. One that has not answered in time counts as not answering.
fn states(directories: &[&Path]) -> Vec<(State, Option<Traffic>)> {
    let mut probes: Vec<_> = directories.iter().map(|d| Probe::ask(d).ok()).collect();
    let give_up = Instant::now() + PATIENCE;
    loop {
        let waiting = probes
            .iter_mut()
            .flatten()
            .filter(|probe| !probe.is_answered());
        let mut waiting: Vec<&mut Probe> = waiting.collect();
        let left = give_up.saturating_duration_since(Instant::now());
        if waiting.is_empty() || left.is_zero() {
            break;
        }
        let mut pipes: Vec<_> = waiting
            .iter()
            .map(|probe| PollFd::new(probe, PollFlags::IN))
            .collect();
        let timeout = left.try_into().ok();
        if poll(&mut pipes, timeout.as_ref()).is_err() {
            continue; // interrupted
        }
        let answered: Vec<bool> = pipes
            .iter()
            .map(|pipe| !pipe.revents().is_empty())
            .collect();
        for (probe, _) in waiting
            .iter_mut()
            .zip(answered)
            .filter(|(_, answered)| *answered)
        {
            probe.answer();
        }
    }
    let state = |probe: &mut Option<Probe>| match probe {
        Some(probe) => (
            State::of(probe.is_answered().then(|| probe.answer())),
            Traffic::of_numbers(probe.numbers()),
        ),
        None => (State::NotReadable, None), // no process could be started
    };
    probes.iter_mut().map(state).collect()
}

/// A process that has opened the FUSE device.
struct Process {
    pid: u32,
    /// In ticks since the machine was started.
    started: u64,
    /// The connections that it serves, by the minor device numbers of their mounts. Only recent
    /// kernels list them.
    connections: Vec<String>,
    arguments: Vec<Vec<u8>>,
}

/// Every process that serves a FUSE file system and that this user may look into.
fn processes() -> Vec<Process> {
    process_ids().filter_map(Process::of).collect()
}

/// The files that a process has open.
fn open_files(pid: u32) -> impl Iterator<Item = PathBuf> {
    let descriptors = process_folder(pid).join("fd").read_dir();
    let descriptors = descriptors.into_iter().flatten().flatten();
    descriptors.filter_map(|descriptor| descriptor.path().read_link().ok())
}

impl Process {
    fn of(pid: u32) -> Option<Self> {
        if !open_files(pid).any(|file| file == Path::new(DEVICE)) {
            return None;
        }
        let folder = process_folder(pid);
        let arguments = std::fs::read(folder.join("cmdline")).unwrap_or_default();
        // PID (NAME) STATE ..., see proc_pid_stat(5); the start is field 22.
        let stat = std::fs::read_to_string(folder.join("stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let started = fields.split_whitespace().nth(19);
        Some(Self {
            pid,
            started: started.and_then(|ticks| ticks.parse().ok()).unwrap_or(0),
            connections: descriptor_fields(pid, "fuse_connection:"),
            arguments: arguments.split(|b| *b == 0).map(<[u8]>::to_vec).collect(),
        })
    }

    /// The model, or a part of it: the file that a daemon of ours keeps open.
    fn model(&self) -> Option<OsString> {
        let mut files = open_files(self.pid);
        let model = files.find(|file| file.extension().is_some_and(|e| e == "gguf"))?;
        Some(model.into_os_string())
    }

    fn serves(&self, mount: &MountEntry) -> bool {
        if self.connections.is_empty() {
            // An older kernel. A relative path cannot be compared, since the daemon has changed its
            // working directory.
            let directory = mount.directory.as_os_str().as_bytes();
            return self.arguments.iter().any(|argument| argument == directory);
        }
        let connection = mount.device.strip_prefix("0:");
        connection.is_some_and(|number| self.connections.iter().any(|n| n == number))
    }
}
