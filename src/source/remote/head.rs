//! Reading the head of a remote part: in few requests, each for more than the one before, since
//! nobody knows how long a header is. Most end in the first; the others have a tokenizer in them, of
//! 5 to 10 MB.

use std::io::{self, BufRead, Read, Seek, SeekFrom};

use super::part::RemotePart;
use crate::source::ReadError;

/// Bytes of the first request.
pub const FIRST_BYTES: u64 = 64 << 10;
/// A request is for this many times what was read before.
const GROWTH: u64 = 16;
/// Beyond this it is for as much as was read before.
const LARGE_BYTES: u64 = 4 << 20;

/// A part as a reader that can seek.
pub struct Head<'a> {
    part: &'a RemotePart,
    place: u64,
    /// The bytes that are there, and where they start.
    window: Vec<u8>,
    start: u64,
    /// Why the last read failed.
    pub failed: Option<ReadError>,
}

impl<'a> Head<'a> {
    /// A reader at the start of a part, of which the first bytes may be there already.
    pub fn new(part: &'a RemotePart, first: Vec<u8>) -> Self {
        Self {
            part,
            place: 0,
            window: first,
            start: 0,
            failed: None,
        }
    }

    /// The bytes from the current place on.
    fn rest(&self) -> &[u8] {
        let skip = self.place.checked_sub(self.start);
        let skip = skip.and_then(|skip| usize::try_from(skip).ok());
        skip.and_then(|skip| self.window.get(skip..))
            .unwrap_or_default()
    }
}

impl BufRead for Head<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.rest().is_empty() && self.place < self.part.bytes() {
            let is_next = self.place == self.start + self.window.len() as u64;
            let read = if is_next { self.place } else { 0 };
            let wanted = if read < LARGE_BYTES {
                GROWTH * read
            } else {
                read
            };
            let left = self.part.bytes() - self.place;
            let wanted = wanted.clamp(FIRST_BYTES, LARGE_BYTES.max(read)).min(left);
            self.window.clear();
            self.window.resize(wanted as usize, 0);
            self.start = self.place;
            if let Err(e) = self.part.read(self.place, &mut self.window) {
                let text = e.to_string();
                self.window.clear();
                self.failed = Some(e);
                return Err(io::Error::other(text));
            }
        }
        Ok(self.rest())
    }

    fn consume(&mut self, bytes: usize) {
        self.place += bytes as u64;
    }
}

impl Read for Head<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let count = bytes.len().min(buffer.len());
        buffer[..count].copy_from_slice(&bytes[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl Seek for Head<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(place) => Some(place),
            SeekFrom::Current(by) => self.place.checked_add_signed(by),
            SeekFrom::End(by) => self.part.bytes().checked_add_signed(by),
        };
        self.place = place.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.place)
    }
}
