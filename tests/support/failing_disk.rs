//! A disk that fails when it is told to: shows the files of a folder, read-only, and takes its faults
//! from a file that may change at any time, one fault a line:
//!
//! ```text
//! eio START END       reads that touch these bytes of any file fail
//! short START END     reads that touch them end after half of what was asked for
//! empty START END     reads that touch them give nothing, as at the end of the file
//! hang START END      reads that touch them wait until the line is gone
//! ```
//!
//! Of holes it tells only by how many blocks a file takes, as many network file systems do.
//!
//! Nothing is cached, so that every read of whoever uses the disk comes here; or, with `--cached`, the
//! kernel caches and reads ahead as it does of other file systems. With `--requests FILE` each request
//! is written there, a line each, in the order in which they came:
//!
//! ```text
//! open NAME HANDLE [direct]
//! read NAME HANDLE OFFSET SIZE
//! ```

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use clap::Parser;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen,
    Request, SessionACL,
};

/// Show the files of a folder through a disk that fails when it is told to
#[derive(Parser)]
struct Cli {
    folder: PathBuf,
    directory: PathBuf,
    /// The file of faults; none while it does not exist
    faults: PathBuf,
    /// Let the kernel cache and read ahead
    #[arg(long)]
    cached: bool,
    /// Threads that answer: by default more than the readers of any test, some of which hang
    #[arg(long, default_value_t = 64)]
    threads: usize,
    /// Where to write what is asked for
    #[arg(long)]
    requests: Option<PathBuf>,
}

struct FailingDisk {
    cached: bool,
    requests: Option<Mutex<File>>,
    handles: AtomicU64,
    /// By inode number, which counts from 2.
    files: BTreeMap<u64, (OsString, File)>,
    faults: PathBuf,
}

const ROOT: u64 = 1;
const NOT_CACHED: Duration = Duration::ZERO;

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let mut names: Vec<_> = fs::read_dir(&cli.folder)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    names.sort();
    let open = |(index, name): (usize, OsString)| {
        let file = File::open(cli.folder.join(&name))?;
        Ok((ROOT + 1 + index as u64, (name, file)))
    };
    let disk = FailingDisk {
        files: names
            .into_iter()
            .enumerate()
            .map(open)
            .collect::<std::io::Result<_>>()?,
        faults: cli.faults,
        cached: cli.cached,
        requests: match cli.requests {
            Some(path) => Some(Mutex::new(File::create(path)?)),
            None => None,
        },
        handles: AtomicU64::new(0),
    };
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::FSName("failing-disk".to_owned()),
    ];
    if cli.cached {
        // As rclone and sshfs have it; fuser's own requests are larger.
        let max_read = MountOption::CUSTOM("max_read=131072".to_owned());
        config.mount_options.push(max_read);
    }
    config.acl = SessionACL::All;
    config.n_threads = Some(cli.threads);
    fuser::mount(disk, &cli.directory, &config)?;
    Ok(())
}

impl FailingDisk {
    fn tell(&self, request: &str) {
        if let Some(requests) = &self.requests {
            let mut requests = requests.lock().expect("nothing here panics");
            writeln!(requests, "{request}").expect("the disk has room");
        }
    }

    fn name(&self, ino: u64) -> String {
        let file = self.files.get(&ino);
        file.map_or_else(String::new, |(name, _)| name.to_string_lossy().into_owned())
    }

    /// What is to happen to a read.
    fn fault(&self, start: u64, end: u64) -> Option<String> {
        let faults = fs::read_to_string(&self.faults).unwrap_or_default();
        faults.lines().find_map(|line| {
            let words: Vec<_> = line.split(' ').collect();
            let [kind, from, to] = words[..] else {
                return None;
            };
            let (from, to): (u64, u64) = (from.parse().ok()?, to.parse().ok()?);
            (start < to && from < end).then(|| kind.to_owned())
        })
    }

    fn attributes(&self, ino: u64) -> Option<FileAttr> {
        let (kind, perm, size, blocks, modified) = if ino == ROOT {
            (FileType::Directory, 0o555, 0, 0, UNIX_EPOCH)
        } else {
            let metadata = self.files.get(&ino)?.1.metadata().ok()?;
            (
                FileType::RegularFile,
                0o444,
                metadata.size(),
                metadata.blocks(),
                metadata.modified().ok()?,
            )
        };
        Some(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks,
            atime: modified,
            mtime: modified,
            ctime: modified,
            crtime: modified,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for FailingDisk {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let ino = self
            .files
            .iter()
            .find(|(_, (n, _))| n == name)
            .map(|(ino, _)| *ino);
        match ino.and_then(|ino| self.attributes(ino)) {
            Some(attributes) => reply.entry(&NOT_CACHED, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino.0) {
            Some(attributes) => reply.attr(&NOT_CACHED, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let handle = self.handles.fetch_add(1, Ordering::Relaxed);
        let is_direct = flags.0 & libc::O_DIRECT != 0;
        let direct = if is_direct { " direct" } else { "" };
        self.tell(&format!("open {} {handle}{direct}", self.name(ino.0)));
        let flags = match self.cached {
            true => FopenFlags::FOPEN_KEEP_CACHE,
            false => FopenFlags::FOPEN_DIRECT_IO,
        };
        reply.opened(FileHandle(handle), flags);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (name, handle) = (self.name(ino.0), handle.0);
        self.tell(&format!("read {name} {handle} {offset} {size}"));
        let Some((_, file)) = self.files.get(&ino.0) else {
            return reply.error(Errno::ENOENT);
        };
        let end = offset + u64::from(size);
        let mut wanted = size as usize;
        loop {
            match self.fault(offset, end).as_deref() {
                Some("eio") => return reply.error(Errno::EIO),
                Some("empty") => return reply.data(&[]),
                Some("short") => wanted = wanted.div_ceil(2),
                Some("hang") => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                _ => {}
            }
            break;
        }
        let mut buffer = vec![0; wanted];
        let mut filled = 0;
        while filled < wanted {
            match file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(_) => return reply.error(Errno::EIO),
            }
        }
        reply.data(&buffer[..filled]);
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        for (place, (ino, (name, _))) in self.files.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*ino), place as u64 + 1, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }
}
