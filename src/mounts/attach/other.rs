//! Other systems: `fuser` mounts, with the libfuse of macFUSE.

use std::io;
use std::path::PathBuf;

use fuser::{Config, MountOption, Session, SessionACL};

use super::super::place::Place;
use super::super::{MountError, SUBTYPE};
use super::Wishes;
use crate::fuse::OdmoeFs;

/// A mount that is made when it is served.
pub struct Made {
    directory: PathBuf,
    options: Vec<MountOption>,
    /// Whether this process can unmount it by itself.
    pub by_ourselves: bool,
}

impl Made {
    /// There is no table to find it in.
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

/// Chooses the options of a mount.
pub fn make(place: &Place, wishes: &Wishes) -> Result<Made, MountError> {
    let labels = wishes.security_labels.iter().cloned();
    let options = [
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::NoAtime,
        MountOption::DefaultPermissions,
        MountOption::FSName(wishes.source.clone()),
        MountOption::CUSTOM(format!("subtype={SUBTYPE}")),
    ];
    Ok(Made {
        directory: place.path().to_owned(),
        options: options
            .into_iter()
            .chain(labels.map(MountOption::CUSTOM))
            .collect(),
        by_ourselves: false,
    })
}
