//! What kind of file system a file lies on.

use std::fs::File;

/// The `f_type` (statfs(2)) of file systems whose bytes come from a server or another program.
///
/// Names in capitals are from Linux's include/uapi/linux/magic.h. The others are from the file
/// systems' own sources: fs/vboxsf/super.c and fs/orangefs of Linux, client_module of BeeGFS,
/// Lustre's LL_SUPER_MAGIC; or, where the sources are not public, from src/stat.c of GNU coreutils.
#[cfg(target_os = "linux")]
const ELSEWHERE: [(u32, &str); 23] = [
    (0x6573_5546, "FUSE_SUPER_MAGIC"), // rclone, sshfs, Gluster, virtiofs, ntfs-3g, ...
    (0x0000_6969, "NFS_SUPER_MAGIC"),
    (0xff53_4d42, "CIFS_SUPER_MAGIC"),
    (0xfe53_4d42, "SMB2_SUPER_MAGIC"),
    (0x0000_517b, "SMB_SUPER_MAGIC"),
    (0x0102_1997, "V9FS_MAGIC"), // virtual machines, WSL
    (0x00c3_6400, "CEPH_SUPER_MAGIC"),
    (0x5346_414f, "AFS_SUPER_MAGIC"),
    (0x6b41_4653, "AFS_FS_MAGIC"),
    (0x7375_7245, "CODA_SUPER_MAGIC"),
    (0x0000_564c, "NCP_SUPER_MAGIC"),
    (0x00c0_ffee, "HOSTFS_SUPER_MAGIC"),
    (0x786f_4256, "vboxsf"),
    (0x2003_0528, "orangefs"),
    (0x1983_0326, "beegfs"),
    (0x0bd0_0bd0, "lustre"),
    (0x4750_4653, "gpfs"),
    (0xaad7_aaea, "panfs"),
    (0xbacb_acbc, "vmhgfs"),
    (0x7c7c_6673, "prl_fs"),
    (0xbeef_dead, "snfs"),
    (0x0131_11a8, "ibrix"),
    (0x6163_6673, "acfs"),
];

/// Whether the bytes of a file come from a server or another program rather than from a disk of
/// this machine. Unknown file systems count as being on a disk.
#[cfg(target_os = "linux")]
pub fn comes_from_elsewhere(file: &File) -> bool {
    // As wide as in the kernel, which is narrower than libc's type.
    let kind = rustix::fs::fstatfs(file).map(|stats| stats.f_type as u32);
    kind.is_ok_and(|kind| ELSEWHERE.iter().any(|(magic, _)| *magic == kind))
}

#[cfg(not(target_os = "linux"))]
pub fn comes_from_elsewhere(_: &File) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_file_beside_this_program_and_one_of_the_kernel_are_here() {
        let program = std::env::current_exe().unwrap();
        for path in [program.to_str().unwrap(), "/proc/self/status", "/dev/null"] {
            assert!(!comes_from_elsewhere(&File::open(path).unwrap()), "{path}");
        }
    }

    #[test]
    fn no_file_system_of_a_disk_is_in_the_list() {
        // From include/uapi/linux/magic.h: ext4, XFS, Btrfs, tmpfs, overlayfs, F2FS, exFAT, EROFS.
        for disk in [
            0x0000_ef53,
            0x5846_5342,
            0x9123_683e,
            0x0102_1994,
            0x794c_7630,
            0xf2f5_2010,
            0x2011_bab0,
            0xe0f5_e1e2,
        ] {
            assert!(ELSEWHERE.iter().all(|(magic, _)| *magic != disk));
        }
        let mut magics = ELSEWHERE.map(|(magic, _)| magic);
        magics.sort_unstable();
        assert!(magics.windows(2).all(|w| w[0] != w[1]), "twice in the list");
    }
}
