//! Serving from a daemon, and learning whether it came up.
//!
//! The caller waits at a pipe: the daemon writes one byte when it serves, or the reason why it
//! cannot. If it dies, the pipe closes, and its exit status is the reason.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use super::{Mount, MountError};
use crate::sys::process::{Ended, Forked, fork, leave_caller, wait_for};

/// What the daemon says when it serves; no error message starts with it.
const READY: u8 = 0;

impl Mount {
    /// Serves from a process of its own, which keeps nothing of this one's terminal; its messages
    /// go to `log`, or nowhere. Returns when the tree answers. To be called before the process
    /// has a second thread.
    pub fn serve_in_background(self, log: Option<&File>) -> Result<(), MountError> {
        let directory = self.directory().to_owned();
        let (mut told, teller) = io::pipe().map_err(MountError::Background)?;
        match fork().map_err(MountError::Background)? {
            Forked::Child => {
                drop(told);
                let status = run_daemon(self, log, teller);
                std::process::exit(status);
            }
            Forked::Parent { child } => {
                drop(teller);
                let mut said = Vec::new();
                told.read_to_end(&mut said)
                    .map_err(MountError::Background)?;
                match said.first() {
                    Some(&READY) => wait_until_it_answers(&directory).inspect_err(|_| {
                        // Better none than one that does not answer.
                        let _ = super::unmount(&directory, true);
                    }),
                    Some(_) => Err(MountError::Daemon(
                        String::from_utf8_lossy(&said).into_owned(),
                    )),
                    None => {
                        let fate = fate_of(child);
                        // What it mounted, if it came so far, nobody serves.
                        let _ = super::preflight::unmount_stale(&directory);
                        Err(MountError::DaemonDied(fate))
                    }
                }
            }
        }
    }
}

fn run_daemon(mount: Mount, log: Option<&File>, teller: io::PipeWriter) -> i32 {
    let mut teller = Some(teller);
    let mut tell = |message: &[u8]| {
        // The caller may be gone; that is no reason to stop serving.
        if let Some(mut pipe) = teller.take() {
            let _ = pipe.write_all(message);
        }
    };
    let served = leave_caller(log)
        .map_err(MountError::Background)
        .and_then(|()| mount.serve(|| tell(&[READY])));
    match served {
        Ok(()) => 0,
        Err(e) => {
            tracing::error!("{e}");
            tell(e.to_string().as_bytes());
            1
        }
    }
}

fn wait_until_it_answers(directory: &Path) -> Result<(), MountError> {
    match directory
        .join(crate::layout::EXPERTS_DIRECTORY)
        .symlink_metadata()
    {
        Ok(_) => Ok(()),
        Err(cause) => Err(MountError::Session {
            directory: directory.to_owned(),
            cause,
        }),
    }
}

fn fate_of(child: rustix::process::Pid) -> String {
    match wait_for(child) {
        Ok(Ended::Killed(libc::SIGABRT)) => "it gave up, as it does without memory".to_owned(),
        Ok(Ended::Killed(signal)) => format!("killed by signal {signal}"),
        Ok(Ended::Exited(status)) => format!("exit status {status}"),
        Err(e) => e.to_string(),
    }
}
