//! Folders held by their descriptors, and files that get their names when they are complete.
//!
//! The problem: a path that was looked at may lead elsewhere when it is used. Somebody may have put
//! a link, a pipe or another folder in its place.
//!
//! The plan: a [`Folder`] is opened once. Everything in it is reached by that descriptor and a
//! single name, which is never followed through a link. Nothing but a regular file is opened as
//! one, and no open waits for anybody. New files are made under random names ([`Unnamed`]) and are
//! renamed when they are complete, or removed.

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

/// Looking at a file is no use of it, so its time of access stays. Only its owner may ask for that.
#[cfg(target_os = "linux")]
const UNTOUCHED: OFlags = OFlags::NOATIME;
#[cfg(not(target_os = "linux"))]
const UNTOUCHED: OFlags = OFlags::empty();

/// A folder that stays the same, whoever moves it or puts something else in its place.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
    file: Arc<File>,
}

/// What has a name in a folder.
#[derive(Debug)]
pub enum Entry<T> {
    Missing,
    /// What was asked for.
    There(T),
    /// Something else.
    Other(Kind),
}

/// What an entry of a folder is.
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

    /// In words, with its article.
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
    /// Opens a folder by a path that a user has named, whose links are followed. One that may be
    /// passed through but not read is held, too; it cannot be listed, locked or flushed.
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

    /// Opens the folder that a file of this path lies in, or would lie in.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        Self::open(path.parent().unwrap_or(Path::new("")))
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its descriptor, to ask for room, and to flush.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A descriptor of its own, to read the folder's entries or to lock it.
    pub fn again(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(untouched(|more| {
            self.open_at(OsStr::new("."), flags | more)
        })?)
    }

    fn open_at(&self, name: &OsStr, flags: OFlags) -> Result<File, Errno> {
        // New files get the rights that any new file gets.
        let mode = Mode::from_raw_mode(0o666);
        Ok(rustix::fs::openat(&self.file, name, flags, mode)?.into())
    }

    fn stat(&self, name: &OsStr) -> Result<Stat, Errno> {
        rustix::fs::statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// What a name is; links are not followed. `None` if there is nothing of that name.
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
                _ => Err(e.into()), // exchanged meanwhile
            },
            Err(e) => Err(e.into()),
        }
    }

    /// Opens a folder in this one, and makes it if it is not there.
    pub fn make_folder(&self, name: &OsStr) -> io::Result<Entry<Self>> {
        match rustix::fs::mkdirat(&self.file, name, Mode::from_raw_mode(0o777)) {
            Ok(()) | Err(Errno::EXIST) => self.folder(name),
            Err(e) => Err(e.into()),
        }
    }

    /// Opens a regular file for reading.
    pub fn open_file(&self, name: &OsStr) -> io::Result<Entry<(File, Metadata)>> {
        // Opening a device may already do something to it.
        match self.kind(name)? {
            None => return Ok(Entry::Missing),
            Some(Kind::File) => {}
            Some(kind) => return Ok(Entry::Other(kind)),
        }
        // A pipe that has taken the file's place would be waited for.
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

    /// The names in it, but for `.` and `..`.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        let entries = self.entries()?;
        Ok(entries.into_iter().map(|(name, _)| name).collect())
    }

    /// The names in it, and what each of them is, as far as the folder itself tells: what is mounted
    /// on one is not asked, and may never answer.
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

    /// Fails if this user can make no file in it, as far as that is known without trying.
    pub fn check_writable(&self) -> io::Result<()> {
        let access = Access::WRITE_OK | Access::EXEC_OK;
        let flags = AtFlags::EACCESS; // that of the process, also if it is set-user-id
        Ok(rustix::fs::accessat(&self.file, ".", access, flags)?)
    }

    /// Makes a file that never has a name. `None` where the file system has no such files.
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

    /// Makes a file under a random name, which it has until it is complete.
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

    /// The temporary files in it, and the bytes of room that each takes. They are those of runs
    /// that were killed, or of runs that are alive.
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

/// The working directory is the folder of a name alone.
fn or_here(path: &Path) -> &Path {
    match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    }
}

/// Opens without changing the time of access, where that may be asked for.
fn untouched(open: impl Fn(OFlags) -> Result<File, Errno>) -> Result<File, Errno> {
    match open(UNTOUCHED) {
        Err(Errno::PERM) => open(OFlags::empty()),
        opened => opened,
    }
}

/// A file under a random name. It is removed, unless it gets its own.
#[derive(Debug)]
pub struct Unnamed<'a> {
    folder: &'a Folder,
    name: OsString,
}

impl Unnamed<'_> {
    /// Gives the file its name, in the place of what has it.
    pub fn replace(mut self, name: &OsStr) -> io::Result<()> {
        self.rename(name)
    }

    /// Gives the file its name, unless something has it: then the error is
    /// [`AlreadyExists`](io::ErrorKind::AlreadyExists).
    pub fn persist(mut self, name: &OsStr) -> io::Result<()> {
        let folder = &self.folder.file;
        let flags = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(folder, &self.name, folder, name, flags) {
            Ok(()) => {
                self.name.clear();
                return Ok(());
            }
            // Some network file systems, and most that are mounted through FUSE.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
        match rustix::fs::linkat(folder, &self.name, folder, name, AtFlags::empty()) {
            Ok(()) => Ok(()), // and the random name is removed
            Err(Errno::EXIST) => Err(Errno::EXIST.into()),
            // exFAT and FAT have neither. Then something that comes at this very moment is lost,
            // unless it comes from another run, which the lock on the target keeps away.
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
            // What cannot be removed is left to the next run, which cleans.
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
