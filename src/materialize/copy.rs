//! The bytes of one file, each run in the cheapest way that works.
//!
//! Runs that must be copied go through a buffer, past the page cache on both sides
//! (`RWF_DONTCACHE`): what others had cached of the model stays, 578 GiB do not wash the cache out,
//! and since the disk begins with each piece at once, the flush at the end of a group finds nothing
//! left to do. Measured on ext4, 2 GiB cold and flushed, against `cp`: see docs/performance.md.

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

/// Bytes of all buffers together, at most.
const BUFFERS_BYTES: usize = 64 << 20;
/// Bytes of one buffer, at most: larger ones are no faster.
const BUFFER_BYTES: usize = 4 << 20;
/// Runs below this are written through the page cache: a page that two runs meet in would else go
/// to the disk twice, and runs of so few bytes need no room of their own reserved.
const SMALL_BYTES: u64 = 64 << 10;
/// The kernel copies in pieces of this size, so that a signal is obeyed soon.
const KERNEL_PIECE_BYTES: u64 = 64 << 20;

/// A buffer for one of `jobs` workers: a power of two, so that pieces end where pages do.
pub(super) fn buffer(jobs: usize) -> Vec<u8> {
    let bytes = (BUFFERS_BYTES / jobs.next_power_of_two()).min(BUFFER_BYTES);
    vec![0; bytes]
}

/// What all workers of a run share.
pub(super) struct Copier<'a> {
    pub model: &'a Model,
    pub methods: &'a Methods,
    pub reflink: Reflink,
    pub stop: &'a AtomicBool,
    pub progress: &'a (dyn Fn(Progress) + Sync),
    /// Cleared when the kernel has refused.
    pub in_kernel: AtomicBool,
}

/// A file being written.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub ino: Ino,
    pub file: &'a File,
    /// The name that it will have.
    pub path: &'a Path,
}

impl Copier<'_> {
    /// Writes all bytes of a file.
    pub fn write(&self, target: Target, buffer: &mut [u8]) -> Result<(), MaterializeError> {
        let size = self.model.tree().size(target.ino).unwrap_or(0);
        let resized = target.file.set_len(size);
        resized.map_err(io_error("write", target.path))?;
        // Sharing first: it has nothing to flush while nothing is written.
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

    /// Deals with a run that need not be copied; says whether it was one.
    fn spare(&self, target: Target, segment: Segment) -> Result<bool, MaterializeError> {
        if let Method::Share { part, offset } = segment.method {
            self.check_stop()?;
            let (file, at) = (target.file, segment.start);
            let clone = |from: &File| copy::clone_range(from, offset, segment.len, file, at);
            match self.model.source().with_part(part, clone)? {
                Ok(()) => {}
                // A full disk says so again when the run is copied; XFS says it also where one of its
                // groups has no room for what counts the sharing.
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
                    // Up to where a page ends, so that no page is written in two pieces.
                    let piece = buffer.len() - (place % buffer.len() as u64) as usize;
                    let piece = &mut buffer[..piece.min((end - place) as usize)];
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

    /// Copies a piece from `place` on if the kernel does it by itself; returns its bytes. Whatever
    /// hinders it, the way through the buffer meets too, and reports.
    fn copy_in_kernel(
        &self,
        target: Target,
        place: u64,
        len: u64,
    ) -> Result<u64, MaterializeError> {
        if !self.in_kernel.load(Ordering::Relaxed) {
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
