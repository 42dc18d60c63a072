//! Other systems: `fuser` mounts, with the libfuse of macFUSE.

use std::io;
use std::path::PathBuf;

use fuser::{Config, MountOption, Session, SessionACL};

use super::super::place::Place;
use super::super::{MountError, SUBTYPE};
use super::MountParameters;
use crate::fuse::OdmoeFs;

/// A mount that is made when it is served.
pub struct NewMount {
    directory: PathBuf,
    options: Vec<MountOption>,
    /// Whether it can be unmounted without a helper.
    pub directly: bool,
}

impl NewMount {
    /// `None`: there is no mount table that would show it.
    pub fn device_number(&self) -> Option<String> {
        None
    }

    /// Mounts, and begins to serve.
    pub fn serve(
        self,
        file_system: OdmoeFs,
        acl: SessionACL,
        mut config: Config,
    ) -> io::Result<Session<OdmoeFs>> {
        config.acl = acl;
        config.mount_options = self.options;
        Session::new(file_system, self.directory, &config)
    }
}

/// Chooses the options; the session makes the mount.
pub fn make(place: &Place, parameters: &MountParameters) -> Result<NewMount, MountError> {
    let labels = parameters.security_labels.iter().cloned();
    let options = [
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::NoAtime,
        MountOption::DefaultPermissions,
        MountOption::FSName(parameters.source.clone()),
        MountOption::CUSTOM(format!("subtype={SUBTYPE}")),
    ];
    Ok(NewMount {
        directory: place.path().to_owned(),
        options: options
            .into_iter()
            .chain(labels.map(MountOption::CUSTOM))
            .collect(),
        directly: false,
    })
}
