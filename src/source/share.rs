//! Parts lent to system calls that copy or share ranges of files.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use super::{ReadError, Source};
use crate::sys::copy;

/// The unit of `st_blocks`, whatever the file system allocates by.
const STAT_BLOCK_BYTES: u64 = 512;

impl Source {
    /// Lends the descriptor of a part (0-based), and checks afterwards that the part is still as it
    /// was when it was opened. If it is not, the result is worthless and an error is returned.
    pub fn with_part<T>(&self, part: u32, borrow: impl FnOnce(&File) -> T) -> Result<T, ReadError> {
        self.part(part).with_file(borrow)
    }

    /// The runs of data in a byte range of a part, in order, with holes between them. Reads
    /// nothing.
    pub fn data(&self, part: u32, range: Range<u64>) -> Result<Vec<Range<u64>>, ReadError> {
        if self.part(part).file().is_none() {
            return Ok(vec![range]);
        }
        let found = self.with_part(part, |file| data_of(file, &range))?;
        found.map_err(|cause| self.part(part).read_error(range.start, cause))
    }

    /// Bytes of a part's file.
    pub fn part_bytes(&self, part: u32) -> u64 {
        self.part(part).bytes()
    }
}

fn data_of(file: &File, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let metadata = file.metadata()?;
    // No holes. Asking would walk the list of all blocks of the part, for every tensor.
    if metadata.blocks() * STAT_BLOCK_BYTES >= metadata.len() {
        return Ok(vec![range.clone()]);
    }
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut place = range.start;
    while place < range.end {
        match copy::next_data(file, place) {
            Ok(Some(run)) if run.start < range.end => {
                place = run.end;
                runs.push(run.start.max(range.start)..run.end.min(range.end));
            }
            Ok(_) => break,
            // The file system cannot tell.
            Err(_) => return Ok(vec![range.clone()]),
        }
    }
    Ok(runs)
}
