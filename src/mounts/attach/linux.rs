//! Linux: root mounts with the system call, on the directory that was checked and not on its name.
//! Others mount with the set-user-id helper, which checks by itself. `fuser` could do both, but
//! resolves the directory's name once more.

use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use fuser::{Config, Session, SessionACL};
use rustix::mount::{MountFlags, mount};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};

use super::super::place::Place;
use super::super::processes::connections;
use super::super::{MountError, SUBTYPE};
use super::Wishes;
use crate::explain::Hint;
use crate::fuse::OdmoeFs;
use crate::host::{self, DEVICE};

/// A mount that was just made.
pub struct Made {
    /// The descriptor by which it is served.
    device: OwnedFd,
    /// Whether this process made it by itself, and so can unmount it.
    pub by_ourselves: bool,
}

impl Made {
    /// Its device number, `major:minor`, if the kernel tells.
    pub fn device_number(&self) -> Option<String> {
        let info = format!("/proc/self/fdinfo/{}", self.device.as_raw_fd());
        let info = fs::read_to_string(info).ok()?;
        let connection = connections(&info).next()?;
        Some(format!("0:{connection}"))
    }

    /// Begins to serve it.
    pub fn serve(
        self,
        file_system: OdmoeFs,
        acl: SessionACL,
        config: Config,
    ) -> io::Result<Session<OdmoeFs>> {
        Session::from_fd(file_system, self.device, acl, config)
    }
}

/// Mounts on a directory that is held.
pub fn make(place: &Place, wishes: &Wishes) -> Result<Made, MountError> {
    let refused = |said: &str| {
        let said = said.trim().trim_start_matches("fusermount3: ");
        MountError::Refused {
            directory: place.path().to_owned(),
            reason: said.to_owned(),
            hint: cure(said),
        }
    };
    if host::may_mount() != Some(false) {
        match by_ourselves(place, wishes) {
            Ok(device) => {
                return Ok(Made {
                    device,
                    by_ourselves: true,
                });
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {} // the helper may
            Err(e) => return Err(refused(&e.to_string())),
        }
    }
    let helper = host::fusermount().ok_or_else(|| refused(NOT_PERMITTED))?;
    let device = by_helper(&helper, place, wishes).map_err(|said| refused(&said))?;
    Ok(Made {
        device,
        by_ourselves: false,
    })
}

fn by_ourselves(place: &Place, wishes: &Wishes) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open(DEVICE)?;
    let user = rustix::process::getuid().as_raw();
    let group = rustix::process::getgid().as_raw();
    // `rootmode` is that of a directory.
    let options = format!(
        "fd={},rootmode=40000,user_id={user},group_id={group},subtype={SUBTYPE},default_permissions{}",
        device.as_raw_fd(),
        wishes.options()
    );
    let flags = MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC
        | MountFlags::NOATIME;
    // The working directory is the one name that nobody can give to another directory.
    place.enter()?;
    let mounted = mount(
        wishes.source.as_str(),
        ".",
        "fuse",
        flags,
        Some(std::ffi::CString::new(options)?.as_c_str()),
    );
    std::env::set_current_dir("/")?;
    mounted?;
    Ok(device.into())
}

/// Mounts with the helper, which sends the descriptor through a socket; fails with what it said.
///
/// Protocol: fusermount3(1) and `util/fusermount.c` of libfuse 3.
fn by_helper(helper: &Path, place: &Place, wishes: &Wishes) -> Result<OwnedFd, String> {
    let failed = |e: io::Error| format!("{helper:?} cannot be run: {e}");
    // Not closed by `exec`: the helper inherits its end. No other program is started meanwhile.
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::empty(),
        None,
    )
    .map_err(|e| failed(e.into()))?;
    rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    let options = format!(
        "ro,nosuid,nodev,noexec,noatime,default_permissions,fsname={},subtype={SUBTYPE}{}",
        wishes.source,
        wishes.options()
    );
    let child = Command::new(helper)
        .args(["-o", &options, "--"])
        .arg(place.path())
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    drop(theirs);
    let received = receive(&ours);
    let output = child.wait_with_output().map_err(failed)?;
    let said = String::from_utf8_lossy(&output.stderr);
    match received {
        Ok(Some(device)) if output.status.success() => {
            for line in said.lines() {
                tracing::info!("{line}");
            }
            Ok(device)
        }
        Err(e) => Err(failed(e)),
        // It has unmounted again what it could not hand over.
        _ if said.trim().is_empty() => Err(format!("{helper:?} ended with {}", output.status)),
        _ => Err(said.trim().to_owned()),
    }
}

/// The descriptor that comes through a socket; `None` at its end.
fn receive(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    loop {
        let pieces = &mut [IoSliceMut::new(&mut byte)];
        match recvmsg(socket, pieces, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(_) => break,
        }
    }
    let device = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(device)
}

/// What mount(2) says to those who may not.
const NOT_PERMITTED: &str = "Operation not permitted";

/// What to do about what the mount helper or the kernel said, in the usual cases, as far as their
/// cause is established.
fn cure(said: &str) -> Option<Hint> {
    if said.contains("write access") || said.contains("ermission denied") {
        return Some("you must own the directory, or be allowed to write to it".into());
    }
    if said.contains(NOT_PERMITTED) {
        return match (host::container_cure(), host::may_mount()) {
            (Some(cure), _) => Some(format!("start the container with {cure}").into()),
            (None, Some(false)) if rustix::process::geteuid().is_root() => {
                Some("this root lacks CAP_SYS_ADMIN, so mount as a root that has it".into())
            }
            _ => None,
        };
    }
    let is_limited = said.contains("too many FUSE");
    is_limited.then(|| "raise mount_max in /etc/fuse.conf".into())
}
