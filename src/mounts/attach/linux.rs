//! Linux: root mounts with the system call, on the directory that was checked rather than on its
//! name. Other users mount with the set-user-id helper, which makes its own checks. `fuser` can do
//! both, but it would resolve the directory's name again.

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
use super::MountParameters;
use crate::explain::Hint;
use crate::fuse::OdmoeFs;
use crate::host::{self, DEVICE};

/// A mount that was just made.
pub struct NewMount {
    /// The descriptor through which it is served.
    device: OwnedFd,
    /// Whether it was made without the helper, and so can be unmounted without it.
    pub directly: bool,
}

impl NewMount {
    /// Its device number, `major:minor`, if the kernel shows it.
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

/// Mounts on a directory that is held open.
pub fn make(place: &Place, parameters: &MountParameters) -> Result<NewMount, MountError> {
    let refused = |said: &str| {
        let said = said.trim().trim_start_matches("fusermount3: ");
        MountError::Refused {
            directory: place.path().to_owned(),
            reason: said.to_owned(),
            hint: hint_for(said),
        }
    };
    if host::may_mount() != Some(false) {
        match directly(place, parameters) {
            Ok(device) => {
                return Ok(NewMount {
                    device,
                    directly: true,
                });
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {} // the helper may
            Err(e) => return Err(refused(&e.to_string())),
        }
    }
    let helper = host::fusermount().ok_or_else(|| refused(NOT_PERMITTED))?;
    let device = with_helper(&helper, place, parameters).map_err(|said| refused(&said))?;
    Ok(NewMount {
        device,
        directly: false,
    })
}

fn directly(place: &Place, parameters: &MountParameters) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open(DEVICE)?;
    let user = rustix::process::getuid().as_raw();
    let group = rustix::process::getgid().as_raw();
    // `rootmode` is that of a directory.
    let options = format!(
        "fd={},rootmode=40000,user_id={user},group_id={group},subtype={SUBTYPE},default_permissions{}",
        device.as_raw_fd(),
        parameters.options()
    );
    let flags = MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC
        | MountFlags::NOATIME;
    // The working directory is the one name that nobody else can redirect.
    place.enter()?;
    let mounted = mount(
        parameters.source.as_str(),
        ".",
        "fuse",
        flags,
        Some(std::ffi::CString::new(options)?.as_c_str()),
    );
    std::env::set_current_dir("/")?;
    mounted?;
    Ok(device.into())
}

/// Mounts with the helper, which sends the descriptor through a socket. The error is its message.
///
/// Protocol: fusermount3(1) and `util/fusermount.c` of libfuse 3.
fn with_helper(
    helper: &Path,
    place: &Place,
    parameters: &MountParameters,
) -> Result<OwnedFd, String> {
    let failed = |e: io::Error| format!("{helper:?} cannot be run: {e}");
    // Not close-on-exec, since the helper inherits its end. No other program is started meanwhile.
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
        parameters.source,
        parameters.options()
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
        // The helper has unmounted again what it could not hand over.
        _ if said.trim().is_empty() => Err(format!("{helper:?} ended with {}", output.status)),
        _ => Err(said.trim().to_owned()),
    }
}

/// Receives a descriptor through a socket; `None` at its end.
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

/// The message of mount(2) to a process that lacks CAP_SYS_ADMIN.
const NOT_PERMITTED: &str = "Operation not permitted";

/// What to do about a message of the mount helper or the kernel, in those usual cases in which the
/// cause is certain.
fn hint_for(said: &str) -> Option<Hint> {
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
