//! A mount that serves zeroes: the tree of a model, as `odmoe-fs` shows it, whose files hold no
//! data. What reading it costs is what FUSE itself costs, and no file system on FUSE gets below.
//!
//! Names, attributes and the answers to opens are the product's own; only `read` is not. Threads,
//! descriptors and read-ahead are set by who starts it, as the product has them.

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;

use clap::Parser;
use fuser::{
    Config, FileHandle, Filesystem, INodeNo, KernelConfig, LockOwner, MountOption, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyXattr, Request, SessionACL,
};
use odmoe_fs::fuse::OdmoeFs;
use odmoe_fs::model::Model;
use odmoe_fs::served::{Cache, Owner, Served};

/// Mount a model's tree with zeroes in all files, and stay until it is unmounted
#[derive(Parser)]
struct Cli {
    model: PathBuf,
    directory: PathBuf,
    /// Worker threads
    #[arg(long, value_name = "N", default_value_t = 4)]
    threads: usize,
    /// A descriptor of its own for each worker
    #[arg(long)]
    clone_fd: bool,
}

/// More than the kernel asks for at a time, 1 MiB.
static ZEROES: [u8; 4 << 20] = [0; 4 << 20];

struct Floor(OdmoeFs);

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let owner = Owner { uid: 0, gid: 0 };
    let served = Served::new(Model::open(&cli.model)?, owner, Cache::Mount);
    let floor = Floor(OdmoeFs::new(served));
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::NoAtime,
        MountOption::DefaultPermissions,
        MountOption::FSName("floor".to_owned()),
    ];
    config.acl = SessionACL::Owner;
    config.n_threads = Some(cli.threads);
    config.clone_fd = cli.clone_fd;
    fuser::mount(floor, &cli.directory, &config)?;
    Ok(())
}

impl Filesystem for Floor {
    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let file_bytes = self.0.served().model().tree().size(ino.0).unwrap_or(0);
        let left = file_bytes.saturating_sub(offset).min(size.into());
        reply.data(&ZEROES[..left as usize]);
    }

    fn init(&mut self, request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.0.init(request, config)
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.0.lookup(request, parent, name, reply);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        self.0.getattr(request, ino, fh, reply);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.0.open(request, ino, flags, reply);
    }

    fn opendir(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.0.opendir(request, ino, flags, reply);
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.0.readdir(request, ino, fh, offset, reply);
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.0.readdirplus(request, ino, fh, offset, reply);
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.0.statfs(request, ino, reply);
    }

    fn getxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        self.0.getxattr(request, ino, name, size, reply);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.0.listxattr(request, ino, size, reply);
    }
}
