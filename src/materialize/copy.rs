//! Writes the bytes of one file, each run by the cheapest method that works.
//!
//! Runs that must be copied go through a buffer, past the page cache on both sides
//! (`RWF_DONTCACHE`). So pages of the model that other programs have cached stay cached, 578 GiB do
//! not wash the cache out, and the disk begins with each piece at once, which leaves little for the
//! flush at the end of a group. For measurements against `cp`, see docs/performance.md.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::methods::{Method, Methods, Reflink, Segment, refusal};
use super::{MaterializeError, Progress, io_error};
use crate::model::Model;
use crate::sys::copy;
use crate::tree::{Ino, Origin, Slice};

/// The most bytes of all buffers together.
const BUFFERS_BYTES: usize = 64 << 20;
/// The most bytes of one buffer: larger ones are no faster.
const BUFFER_BYTES: usize = 4 << 20;
/// Shorter runs are written through the page cache: a page in which two runs meet would otherwise
/// go to the disk twice, and runs this short gain nothing from reserved room.
const SMALL_BYTES: u64 = 64 << 10;
/// The kernel copies in pieces of this size, so that a signal takes effect soon.
const KERNEL_PIECE_BYTES: u64 = 64 << 20;

/// A buffer for one of `jobs` workers. Its size is a power of two, so that pieces end where pages
/// do.
pub(super) fn buffer(jobs: usize) -> Vec<u8> {
    let bytes = (BUFFERS_BYTES / jobs.next_power_of_two()).min(BUFFER_BYTES);
    vec![0; bytes]
}

/// Shared by all workers of a run.
pub(super) struct Copier<'a> {
    pub model: &'a Model,
    pub methods: &'a Methods,
    pub reflink: Reflink,
    pub stop: &'a AtomicBool,
    pub progress: &'a (dyn Fn(Progress) + Sync),
    /// Cleared once the kernel has refused.
    pub in_kernel: AtomicBool,
}

/// A file being written.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub ino: Ino,
    pub file: &'a File,
    /// Its future name.
    pub path: &'a Path,
}

impl Copier<'_> {
    /// Writes all bytes of a file.
    pub fn write(&self, target: Target, buffer: &mut [u8]) -> Result<(), MaterializeError> {
        let size = self.model.tree().size(target.ino).unwrap_or(0);
        let resized = target.file.set_len(size);
        resized.map_err(io_error("write", target.path))?;
        // Sharing comes first: it must flush the file, which is quick while nothing is written.
        let mut rest = Vec::new();
        for segment in self.methods.segments(self.model, target.ino)? {
            if !self.spare(target, segment)? {
                rest.push(segment);
            }
        }
        for segment in rest {
            self.copy(target, segment, buffer)?;
        }
        Ok(())
    }

    /// Shares a run or leaves it out, if it need not be copied. Returns whether it did.
    fn spare(&self, target: Target, segment: Segment) -> Result<bool, MaterializeError> {
        if let Method::Share { part, offset } = segment.method {
            self.check_stop()?;
            let (file, at) = (target.file, segment.start);
            let clone = |from: &File| copy::clone_range(from, offset, segment.len, file, at);
            match self.model.source().with_part(part, clone)? {
                Ok(()) => {}
                // If the disk is full, copying the run fails as well. XFS also reports this where
                // only one of its groups has no room to count the sharing.
                Err(e) if !copy::is_refusal(&e) && e.kind() != io::ErrorKind::StorageFull => {
                    return Err(io_error("write", target.path)(e));
                }
                Err(e) if self.reflink == Reflink::Always => {
                    let part = self.model.source().paths().nth(part as usize);
                    return Err(MaterializeError::CannotShare {
                        target: target.path.to_owned(),
                        reason: refusal(&e, part.unwrap_or(Path::new(""))),
                    });
                }
                Err(_) => return Ok(false),
            }
        }
        let spared = segment.method != Method::Copy;
        if spared {
            self.report(segment.len);
        }
        Ok(spared)
    }

    fn copy(
        &self,
        target: Target,
        segment: Segment,
        buffer: &mut [u8],
    ) -> Result<(), MaterializeError> {
        let Target { ino, file, path } = target;
        if segment.len >= SMALL_BYTES {
            match copy::allocate(file, segment.start, segment.len) {
                Err(e) if !copy::is_refusal(&e) => {
                    return Err(io_error("reserve room for", path)(e));
                }
                _ => {}
            }
        }
        let end = segment.start + segment.len;
        let mut place = segment.start;
        while place < end {
            self.check_stop()?;
            let copied = match self.copy_in_kernel(target, place, end - place)? {
                0 => {
                    // Pieces end where pages do, so that no page is written twice.
                    let piece = buffer.len() - (place % buffer.len() as u64) as usize;
                    let piece = &mut buffer[..piece.min((end - place) as usize)];
                    self.model.will_read(ino, place);
                    let read = self.model.read_at(ino, place, piece)?;
                    assert_eq!(read, piece.len(), "a file has all bytes of its runs");
                    if segment.len < SMALL_BYTES {
                        file.write_all_at(piece, place)
                    } else {
                        copy::write_all_uncached(file, piece, place)
                    }
                    .map_err(io_error("write", path))?;
                    read as u64
                }
                copied => copied,
            };
            place += copied;
            self.report(copied);
        }
        Ok(())
    }

    /// Copies a piece from `place` on inside the kernel, if it can; returns its bytes. Its errors
    /// are not reported: copying through the buffer meets them again.
    fn copy_in_kernel(
        &self,
        target: Target,
        place: u64,
        len: u64,
    ) -> Result<u64, MaterializeError> {
        if !self.in_kernel.load(Ordering::Relaxed) || self.model.source().is_remote() {
            return Ok(0);
        }
        let slice = self.model.tree().slices(target.ino, place, len).next();
        let Some(Slice {
            origin: Origin::Part(part),
            offset,
            len,
        }) = slice
        else {
            return Ok(0);
        };
        let len = len.min(KERNEL_PIECE_BYTES);
        let copy = |from: &File| copy::copy_range(from, offset, target.file, place, len);
        let copied = self.model.source().with_part(part, copy)?.unwrap_or(0);
        if copied == 0 {
            self.in_kernel.store(false, Ordering::Relaxed);
        }
        Ok(copied)
    }

    fn check_stop(&self) -> Result<(), MaterializeError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(MaterializeError::Stopped);
        }
        Ok(())
    }

    fn report(&self, bytes: u64) {
        (self.progress)(Progress { bytes, files: 0 });
    }
}
