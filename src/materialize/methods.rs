//! How the bytes of each file get to the target: left out, shared, or copied.
//!
//! A file of the tree is a list of extents, but sharing and leaving out work in whole blocks.
//! [`Methods::segments`] cuts a file into runs of one method each. The same cut tells what a plan
//! costs and does the work.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::error::FIND_ROOM;
use super::write::file_times;
use super::{MaterializeError, Options, io_error};
use crate::folder::Folder;
use crate::model::Model;
use crate::source::ReadError;
use crate::sys::{self, copy};
use crate::tree::{Content, Ino};

/// Room that a file system is assumed to take for a file besides its bytes.
const FILE_OVERHEAD_BYTES: u64 = 4096;

/// The units in which file systems store times, if not in nanoseconds: NTFS and SMB, UDF, exFAT,
/// ext4 with small inodes and HFS+, FAT.
const UNITS: [Duration; 5] = [
    Duration::from_nanos(100),
    Duration::from_micros(1),
    Duration::from_millis(10),
    Duration::from_secs(1),
    Duration::from_secs(2),
];

/// Whether files share disk blocks with the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reflink {
    /// Where the file system can.
    #[default]
    Auto,
    /// Every whole block of a file that is a block of the model; fails if the file system cannot.
    Always,
    /// Never: the files are independent of the model even on a failing disk.
    Never,
}

/// The methods that the target's file system offers for this model.
#[derive(Debug)]
pub(super) struct Methods {
    /// Bytes of a block of the file system.
    pub block: u64,
    /// Bytes that may still be written to it.
    pub available: u64,
    /// Whether the blocks of each part of the model can be shared. Tried, not guessed.
    shares: Vec<bool>,
    /// The forms that the tree's time may take in the target: some file systems store whole
    /// seconds, or 32 bits of them.
    pub times: Vec<SystemTime>,
    /// Why no file can be created there.
    pub unwritable: Option<io::Error>,
    /// Nothing was tried: that would have changed the target.
    pub is_untried: bool,
    /// Why blocks of the first part that cannot be shared cannot.
    pub refusal: Option<String>,
    /// One call flushes everything that was written; otherwise each file is flushed by itself.
    pub flushes_whole: bool,
    /// Copying inside the kernel is worth trying.
    pub in_kernel: bool,
}

/// A run of bytes of a file that get to the target by one method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// First byte in the file.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    pub method: Method,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// A hole of the model stays a hole.
    Hole,
    /// Whole blocks of a part (0-based), from this byte of it on.
    Share {
        part: u32,
        offset: u64,
    },
    Copy,
}

/// The cost of a plan, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// To be shared with the model instead of being written.
    pub shared: u64,
    /// To be written.
    pub copied: u64,
    /// In holes of the model, which stay holes.
    pub holes: u64,
    /// Room that will be taken.
    pub room: u64,
}

impl Methods {
    /// Tries out what is possible in a folder, with a file without a name, which leaves no trace.
    /// Where the file system has no such files, it takes one that is removed at once; a dry run
    /// tries nothing there.
    pub fn probe(
        model: &Model,
        folder: &Folder,
        options: &Options,
    ) -> Result<Self, MaterializeError> {
        let room = sys::room(folder.file());
        let room = room.map_err(io_error(FIND_ROOM, folder.path()))?;
        let mut methods = Self {
            block: room.block,
            available: room.available,
            shares: vec![false; model.source().paths().len()],
            times: vec![model.source().modified()],
            unwritable: None,
            is_untried: false,
            refusal: None,
            flushes_whole: false,
            in_kernel: false,
        };
        let mut unnamed = None;
        let probe = match folder.nameless() {
            Ok(None) if options.dry_run => folder.check_writable().map(|()| None),
            Ok(None) => folder.temporary().map(|(probe, named)| {
                unnamed = Some(named);
                Some(probe)
            }),
            probe => probe,
        };
        match probe {
            Ok(Some(probe)) => {
                methods.try_out(model, &probe, options.reflink)?;
                drop(unnamed);
                return Ok(methods);
            }
            Ok(None) => {
                methods.is_untried = true;
                methods.refusal = Some("a dry run makes no file here to try it with".into());
            }
            // An error only if there is something to write.
            Err(e) => methods.unwritable = Some(e),
        }
        let coarser = UNITS.map(|unit| in_whole(methods.times[0], unit));
        methods.times.extend(coarser);
        Ok(methods)
    }

    fn try_out(
        &mut self,
        model: &Model,
        probe: &File,
        reflink: Reflink,
    ) -> Result<(), MaterializeError> {
        // Where no times are stored, no file ever has this one, and all are compared.
        let stored = probe
            .set_times(file_times(self.times[0]))
            .and_then(|()| probe.metadata()?.modified());
        self.times.extend(stored);
        self.flushes_whole = copy::flushes_whole(probe);
        if model.source().is_remote() {
            self.refusal = Some("the model is not on this machine".into());
            return Ok(());
        }
        if reflink == Reflink::Never {
            self.refusal = Some("not wanted".into());
            return Ok(());
        }
        for (part, path) in model.source().paths().enumerate() {
            // The header of a part is never a hole.
            let len = self.block.min(model.source().part_bytes(part as u32));
            let clone = |file: &File| copy::clone_range(file, 0, len, probe, 0);
            match model.source().with_part(part as u32, clone)? {
                Ok(()) => self.shares[part] = true,
                Err(e) if self.refusal.is_none() => self.refusal = Some(refusal(&e, path)),
                Err(_) => {}
            }
        }
        // On a disk, reading and writing past the cache is as fast and disturbs no other program.
        // Where that is refused, a network file system may copy on its server.
        self.in_kernel = !copy::takes_uncached_writes(probe);
        Ok(())
    }

    /// Cuts a file of the tree into runs, in order.
    pub fn segments(&self, model: &Model, ino: Ino) -> Result<Vec<Segment>, ReadError> {
        let mut cut = Cut(Vec::new());
        for extent in model.tree().extents(ino) {
            match extent.content {
                Content::Made(_) | Content::Computed(_) => cut.push(extent.len, Method::Copy),
                Content::Model { part, offset } => {
                    let mut place = offset;
                    for run in model.source().data(part, offset..offset + extent.len)? {
                        cut.push(run.start - place, Method::Hole);
                        self.cut_data(part, &run, &mut cut);
                        place = run.end;
                    }
                    cut.push(offset + extent.len - place, Method::Hole);
                }
            }
        }
        Ok(cut.0)
    }

    /// Cuts a run of data of a part. Whole blocks that lie at a block boundary of the file, too,
    /// can be shared; the edges cannot.
    fn cut_data(&self, part: u32, run: &Range<u64>, cut: &mut Cut) {
        let offset = run.start.next_multiple_of(self.block);
        let last = run.end - run.end % self.block;
        let congruent = cut.end() % self.block == run.start % self.block;
        if self.shares[part as usize] && congruent && offset < last {
            cut.push(offset - run.start, Method::Copy);
            cut.push(last - offset, Method::Share { part, offset });
            cut.push(run.end - last, Method::Copy);
        } else {
            cut.push(run.end - run.start, Method::Copy);
        }
    }

    /// Adds the cost of a file.
    pub fn add_cost(&self, model: &Model, ino: Ino, cost: &mut Cost) -> Result<(), ReadError> {
        for segment in self.segments(model, ino)? {
            match segment.method {
                Method::Hole => cost.holes += segment.len,
                Method::Share { .. } => cost.shared += segment.len,
                Method::Copy => {
                    cost.copied += segment.len;
                    let end = (segment.start + segment.len).next_multiple_of(self.block);
                    cost.room += end - (segment.start - segment.start % self.block);
                }
            }
        }
        cost.room += FILE_OVERHEAD_BYTES;
        Ok(())
    }
}

/// A time rounded down to whole units.
fn in_whole(time: SystemTime, unit: Duration) -> SystemTime {
    let unit = unit.as_nanos();
    let over = match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => since.as_nanos() % unit,
        Err(before) => (unit - before.duration().as_nanos() % unit) % unit,
    };
    time - Duration::from_nanos(over as u64)
}

/// The runs so far, side by side. Neighbours of the same method become one, except shared
/// ones, each of which has a source of its own.
struct Cut(Vec<Segment>);

impl Cut {
    fn end(&self) -> u64 {
        self.0.last().map_or(0, |last| last.start + last.len)
    }

    fn push(&mut self, len: u64, method: Method) {
        let start = self.end();
        match self.0.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.method == method => last.len += len,
            _ => self.0.push(Segment { start, len, method }),
        }
    }
}

/// Why blocks of a part cannot be shared, in words.
pub(super) fn refusal(error: &io::Error, part: &Path) -> String {
    match error.raw_os_error() {
        Some(libc::EXDEV) => format!("{part:?} lies on another file system"),
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::ENOSYS) => {
            "the file system does not offer that, as XFS and btrfs do".into()
        }
        _ => format!("sharing those of {part:?} fails: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: Method = Method::Share {
        part: 0,
        offset: 8192,
    };

    /// Cuts a run of data that lands at `start` in the file.
    fn cut(shares: bool, start: u64, run: Range<u64>) -> Vec<(u64, u64, Method)> {
        let methods = Methods {
            block: 4096,
            available: 0,
            shares: vec![shares],
            times: vec![SystemTime::UNIX_EPOCH],
            unwritable: None,
            is_untried: false,
            refusal: None,
            flushes_whole: true,
            in_kernel: false,
        };
        let mut cut = Cut(Vec::new());
        cut.push(start, Method::Hole);
        methods.cut_data(0, &run, &mut cut);
        let runs = cut.0.iter().skip_while(|s| s.method == Method::Hole);
        runs.map(|s| (s.start, s.len, s.method)).collect()
    }

    #[test]
    fn whole_blocks_at_the_same_place_within_a_block_are_shared_and_edges_are_copied() {
        use Method::Copy;
        let edges = [(100, 3996, Copy), (4096, 4096, SHARED), (8192, 1, Copy)];
        assert_eq!(cut(true, 100, 4196..12289), edges);
        assert_eq!(cut(true, 4096, 8192..12288), [(4096, 4096, SHARED)]);
        // Nothing but edges, another place within a block, a part that cannot be shared.
        assert_eq!(cut(true, 100, 4196..12287), [(100, 8091, Copy)]);
        assert_eq!(cut(true, 101, 4196..12289), [(101, 8093, Copy)]);
        assert_eq!(cut(false, 100, 4196..12289), [(100, 8093, Copy)]);
    }

    #[test]
    fn times_are_cut_to_whole_units_also_before_1970() {
        let at = |nanoseconds: i64| {
            let distance = Duration::from_nanos(nanoseconds.unsigned_abs());
            match nanoseconds < 0 {
                true => SystemTime::UNIX_EPOCH - distance,
                false => SystemTime::UNIX_EPOCH + distance,
            }
        };
        for (time, expected) in [
            (
                3_987_654_321,
                [21, 321, 7_654_321, 987_654_321, 1_987_654_321],
            ),
            (0, [0; 5]),
            (-1, [99, 999, 9_999_999, 999_999_999, 1_999_999_999]),
            (-2_000_000_000, [0; 5]),
        ] {
            let cut = UNITS.map(|unit| at(time).duration_since(in_whole(at(time), unit)).unwrap());
            assert_eq!(cut.map(|over| over.as_nanos()), expected);
        }
    }

    #[test]
    fn runs_of_the_same_way_become_one() {
        let mut cut = Cut(Vec::new());
        for (len, method) in [
            (5, Method::Copy),
            (0, Method::Hole),
            (7, Method::Copy),
            (1, Method::Hole),
        ] {
            cut.push(len, method);
        }
        let runs: Vec<_> = cut.0.iter().map(|s| (s.start, s.len)).collect();
        assert_eq!(runs, [(0, 12), (12, 1)]);
    }
}
