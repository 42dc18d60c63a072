//! Folders held by their descriptors, and files that get their names when they are complete.
//!
//! The problem: between a look at a path and its use, somebody may put a link, a pipe or another
//! folder in its place.
//!
//! The plan: a [`Folder`] is opened once. Everything in it is reached through that descriptor and a
//! single name, and no link is followed. Only regular files are opened, and no open waits for
//! another process. New files are created under random names ([`Unnamed`]), and are renamed when
//! they are complete, or removed.

use std::collections::hash_map::RandomState;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;

/// Temporary files are named `.odmoe-RANDOM.tmp`: no loader takes them for a model.
const TEMPORARY_PREFIX: &str = ".odmoe-";
const TEMPORARY_SUFFIX: &str = ".tmp";

/// Comparing a file must not change its access time. Only its owner may ask for that.
#[cfg(target_os = "linux")]
const UNTOUCHED: OFlags = OFlags::NOATIME;
#[cfg(not(target_os = "linux"))]
const UNTOUCHED: OFlags = OFlags::empty();

/// A folder that stays the same even if it is moved, or something else put in its place.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
    file: Arc<File>,
}

/// The result of looking a name up in a folder.
#[derive(Debug)]
pub enum Entry<T> {
    Missing,
    /// What was asked for.
    There(T),
    /// Something else.
    Other(Kind),
}

/// The kind of an entry of a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    Folder,
    Link,
    /// A device, pipe or socket.
    Special,
}

impl Kind {
    fn of(mode: rustix::fs::RawMode) -> Self {
        match FileType::from_raw_mode(mode) {
            FileType::RegularFile => Self::File,
            FileType::Directory => Self::Folder,
            FileType::Symlink => Self::Link,
            _ => Self::Special,
        }
    }

    /// Its name, with an article.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "a regular file",
            Self::Folder => "a directory",
            Self::Link => "a link",
            Self::Special => "a device, pipe or socket",
        }
    }
}

impl Folder {
    /// Opens a folder by a path that a user has named, and follows its links. A folder that may be
    /// entered but not read can be held, but not listed, locked or flushed.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let named = or_here(path);
        let opened = match rustix::fs::open(named, flags, Mode::empty()) {
            #[cfg(target_os = "linux")]
            Err(Errno::ACCESS) => rustix::fs::open(named, flags | OFlags::PATH, Mode::empty()),
            opened => opened,
        };
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(opened?.into()),
        })
    }

    /// Opens the folder of a file that need not exist.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        Self::open(path.parent().unwrap_or(Path::new("")))
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its descriptor, for asking for room and for flushing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Another descriptor of the folder, for reading its entries or for a lock.
    pub fn again(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(untouched(|more| {
            self.open_at(OsStr::new("."), flags | more)
        })?)
    }

    fn open_at(&self, name: &OsStr, flags: OFlags) -> Result<File, Errno> {
        // New files get the usual permissions, as the umask has them.
        let mode = Mode::from_raw_mode(0o666);
        Ok(rustix::fs::openat(&self.file, name, flags, mode)?.into())
    }

    fn stat(&self, name: &OsStr) -> Result<Stat, Errno> {
        rustix::fs::statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// The kind of an entry; links are not followed. `None` if there is no such entry.
    pub fn kind(&self, name: &OsStr) -> io::Result<Option<Kind>> {
        match self.stat(name) {
            Ok(stat) => Ok(Some(Kind::of(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Opens a folder in this one.
    pub fn folder(&self, name: &OsStr) -> io::Result<Entry<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match self.open_at(name, flags) {
            Ok(file) => Ok(Entry::There(Self {
                path: self.path.join(name),
                file: Arc::new(file),
            })),
            Err(Errno::NOENT) => Ok(Entry::Missing),
            // A link is either of them, depending on the system.
            Err(e @ (Errno::LOOP | Errno::NOTDIR)) => match self.kind(name)? {
                Some(kind) if kind != Kind::Folder => Ok(Entry::Other(kind)),
                _ => Err(e.into()), // exchanged in between
            },
            Err(e) => Err(e.into()),
        }
    }

    /// Opens a folder in this one, and creates it if it is missing.
    pub fn make_folder(&self, name: &OsStr) -> io::Result<Entry<Self>> {
        match rustix::fs::mkdirat(&self.file, name, Mode::from_raw_mode(0o777)) {
            Ok(()) | Err(Errno::EXIST) => self.folder(name),
            Err(e) => Err(e.into()),
        }
    }

    /// Opens a regular file for reading.
    pub fn open_file(&self, name: &OsStr) -> io::Result<Entry<(File, Metadata)>> {
        // Merely opening a device may have an effect.
        match self.kind(name)? {
            None => return Ok(Entry::Missing),
            Some(Kind::File) => {}
            Some(kind) => return Ok(Entry::Other(kind)),
        }
        // Never waits for the writer of a pipe that has taken the file's place.
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match untouched(|more| self.open_at(name, flags | more)) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(Entry::Missing),
            Err(Errno::LOOP) => return Ok(Entry::Other(Kind::Link)),
            Err(Errno::NXIO) => return Ok(Entry::Other(Kind::Special)),
            Err(e) => return Err(e.into()),
        };
        let metadata = file.metadata()?;
        if metadata.is_file() {
            return Ok(Entry::There((file, metadata)));
        }
        Ok(Entry::Other(match metadata.is_dir() {
            true => Kind::Folder,
            false => Kind::Special,
        }))
    }

    /// The names in it, without `.` and `..`.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        let entries = self.entries()?;
        Ok(entries.into_iter().map(|(name, _)| name).collect())
    }

    /// The names in it with their kinds, as far as the folder itself knows them. Nothing that is
    /// mounted on an entry is asked, since it may never answer.
    pub fn entries(&self) -> io::Result<Vec<(OsString, Option<Kind>)>> {
        let mut entries = Vec::new();
        for entry in Dir::new(self.again()?)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                let kind = match entry.file_type() {
                    FileType::Unknown => None,
                    kind => Some(Kind::of(kind.as_raw_mode())),
                };
                entries.push((OsStr::from_bytes(name).to_owned(), kind));
            }
        }
        Ok(entries)
    }

    /// Whether the path that it was opened by still leads to it.
    pub fn is_in_place(&self) -> bool {
        let held = self.file.metadata();
        let named = or_here(&self.path).metadata();
        let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
        held.is_ok_and(|held| named.is_ok_and(|named| identity(named) == identity(held)))
    }

    /// Whether a folder of this one still has its name.
    pub fn still_holds(&self, folder: &Self) -> bool {
        let name = folder.path.file_name().unwrap_or_default();
        let held = rustix::fs::fstat(&folder.file);
        let identity = |stat: Stat| (stat.st_dev, stat.st_ino);
        held.is_ok_and(|held| {
            self.stat(name)
                .is_ok_and(|named| identity(named) == identity(held))
        })
    }

    /// Fails if this user cannot create files in it, as far as that is known without trying.
    pub fn check_writable(&self) -> io::Result<()> {
        let access = Access::WRITE_OK | Access::EXEC_OK;
        let flags = AtFlags::EACCESS; // that of the process, also if it is set-user-id
        Ok(rustix::fs::accessat(&self.file, ".", access, flags)?)
    }

    /// Creates a file without a name. `None` if the file system has no such files.
    pub fn nameless(&self) -> io::Result<Option<File>> {
        #[cfg(target_os = "linux")]
        {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            match self.open_at(OsStr::new("."), flags) {
                Ok(file) => Ok(Some(file)),
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS) => Ok(None),
                Err(e) => Err(e.into()),
            }
        }
        #[cfg(not(target_os = "linux"))]
        Ok(None)
    }

    /// Creates a file under a random name, which it keeps until it is complete.
    pub fn temporary(&self) -> io::Result<(File, Unnamed<'_>)> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            let random = RandomState::new().build_hasher().finish();
            let name: OsString =
                format!("{TEMPORARY_PREFIX}{random:016x}{TEMPORARY_SUFFIX}").into();
            match self.open_at(&name, flags) {
                Ok(file) => {
                    let folder = self;
                    return Ok((file, Unnamed { folder, name }));
                }
                Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The temporary files in it, of killed or of living runs, and the bytes of room that each
    /// takes.
    pub fn temporaries(&self) -> io::Result<Vec<(OsString, u64)>> {
        /// The unit of `st_blocks`, whatever the file system allocates by.
        const STAT_BLOCK_BYTES: u64 = 512;
        let mut found = Vec::new();
        for name in self.names()? {
            let text = name.as_bytes();
            if !text.starts_with(TEMPORARY_PREFIX.as_bytes())
                || !text.ends_with(TEMPORARY_SUFFIX.as_bytes())
            {
                continue;
            }
            match self.stat(&name) {
                Ok(stat) if Kind::of(stat.st_mode) == Kind::File => {
                    found.push((name, stat.st_blocks as u64 * STAT_BLOCK_BYTES));
                }
                Ok(_) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(found)
    }

    /// Removes a file.
    pub fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.file, name, AtFlags::empty())?)
    }
}

/// The working directory if the path is empty, as that of a bare file name's folder is.
fn or_here(path: &Path) -> &Path {
    match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    }
}

/// Opens a file so that reading does not change its access time, if this user may ask for that.
fn untouched(open: impl Fn(OFlags) -> Result<File, Errno>) -> Result<File, Errno> {
    match open(UNTOUCHED) {
        Err(Errno::PERM) => open(OFlags::empty()),
        opened => opened,
    }
}

/// A file under a random name. It is removed on drop, unless it has got its own name.
#[derive(Debug)]
pub struct Unnamed<'a> {
    folder: &'a Folder,
    name: OsString,
}

impl Unnamed<'_> {
    /// Gives the file its name, and replaces the file that has it.
    pub fn replace(mut self, name: &OsStr) -> io::Result<()> {
        self.rename(name)
    }

    /// Gives the file its name. Fails with [`AlreadyExists`](io::ErrorKind::AlreadyExists) if
    /// something else has it.
    pub fn persist(mut self, name: &OsStr) -> io::Result<()> {
        let folder = &self.folder.file;
        let flags = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(folder, &self.name, folder, name, flags) {
            Ok(()) => {
                self.name.clear();
                return Ok(());
            }
            // Some network file systems, and most FUSE ones, cannot do that.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
        match rustix::fs::linkat(folder, &self.name, folder, name, AtFlags::empty()) {
            Ok(()) => Ok(()), // the random name is removed on drop
            Err(Errno::EXIST) => Err(Errno::EXIST.into()),
            // exFAT and FAT have no links either. Here, a file that appears between look and rename
            // is lost; other runs are kept away by the lock on the target.
            Err(_) => match self.folder.kind(name)? {
                Some(_) => Err(Errno::EXIST.into()),
                None => self.rename(name),
            },
        }
    }

    fn rename(&mut self, name: &OsStr) -> io::Result<()> {
        let folder = &self.folder.file;
        rustix::fs::renameat(folder, &self.name, folder, name)?;
        self.name.clear();
        Ok(())
    }
}

impl Drop for Unnamed<'_> {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            // If that fails, the next run removes it.
            let _ = self.folder.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    fn folder() -> (TempDir, Folder) {
        let scratch = TempDir::new().unwrap();
        let folder = Folder::open(scratch.path()).unwrap();
        (scratch, folder)
    }

    #[test]
    fn a_file_gets_its_name_once_and_never_takes_that_of_another_unasked() {
        let (scratch, folder) = folder();
        let made = |text: &str| {
            let (mut file, unnamed) = folder.temporary().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            unnamed
        };
        let read = || fs::read_to_string(scratch.path().join("x")).unwrap();
        made("one").persist("x".as_ref()).unwrap();
        let refused = made("two").persist("x".as_ref()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(read(), "one");
        made("three").replace("x".as_ref()).unwrap();
        assert_eq!(read(), "three");
        assert_eq!(folder.names().unwrap(), ["x"]);
    }

    #[test]
    fn what_gets_no_name_is_removed_and_what_is_left_of_others_is_found() {
        let (scratch, folder) = folder();
        drop(folder.temporary().unwrap());
        assert_eq!(folder.names().unwrap(), [""; 0]);
        fs::write(scratch.path().join(".odmoe-killed.tmp"), [1; 5000]).unwrap();
        fs::write(scratch.path().join(".odmoe-other"), "").unwrap();
        fs::create_dir(scratch.path().join(".odmoe-folder.tmp")).unwrap();
        let found = folder.temporaries().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0, ".odmoe-killed.tmp");
    }

    #[test]
    fn only_regular_files_are_opened_and_links_are_never_followed() {
        let (scratch, folder) = folder();
        let at = |name| scratch.path().join(name);
        fs::write(at("file"), "x").unwrap();
        fs::create_dir(at("folder")).unwrap();
        symlink("file", at("link")).unwrap();
        symlink("folder", at("link to a folder")).unwrap();
        let opened = |name: &str| match folder.open_file(name.as_ref()).unwrap() {
            Entry::There((_, metadata)) => Ok(metadata.len()),
            Entry::Missing => Err(None),
            Entry::Other(kind) => Err(Some(kind)),
        };
        assert_eq!(opened("file"), Ok(1));
        assert_eq!(opened("nothing"), Err(None));
        assert_eq!(opened("folder"), Err(Some(Kind::Folder)));
        assert_eq!(opened("link"), Err(Some(Kind::Link)));
        for (name, kind) in [
            ("file", Kind::File),
            ("link", Kind::Link),
            ("link to a folder", Kind::Link),
        ] {
            for entry in [
                folder.folder(name.as_ref()),
                folder.make_folder(name.as_ref()),
            ] {
                assert!(matches!(entry.unwrap(), Entry::Other(found) if found == kind));
            }
        }
        assert!(matches!(
            folder.make_folder("new".as_ref()).unwrap(),
            Entry::There(_)
        ));
    }

    #[test]
    fn a_folder_stays_what_it_was_when_its_name_leads_elsewhere() {
        let (scratch, folder) = folder();
        let Entry::There(held) = folder.make_folder("a".as_ref()).unwrap() else {
            panic!("it was made");
        };
        assert!(held.is_in_place() && folder.still_holds(&held));
        fs::rename(scratch.path().join("a"), scratch.path().join("b")).unwrap();
        symlink("b", scratch.path().join("a")).unwrap();
        assert!(held.is_in_place(), "a user may name it by a link");
        assert!(!folder.still_holds(&held), "but none is followed below it");
        fs::remove_file(scratch.path().join("a")).unwrap();
        fs::create_dir(scratch.path().join("a")).unwrap();
        assert!(!held.is_in_place() && !folder.still_holds(&held));
        drop(held.temporary().unwrap());
    }
}
