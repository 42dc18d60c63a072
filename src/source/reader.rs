//! A part of a model as a stream, for what is parsed rather than served.

use std::io::{self, Read, Seek, SeekFrom};

use super::Source;

/// Reads a part from any position on.
#[derive(Debug)]
pub struct PartReader<'a> {
    source: &'a Source,
    part: u32,
    /// Bytes of the part.
    bytes: u64,
    position: u64,
}

impl Source {
    /// A stream of the bytes of a part, which has `bytes` of them.
    pub fn reader(&self, part: u32, bytes: u64) -> PartReader<'_> {
        PartReader {
            source: self,
            part,
            bytes,
            position: 0,
        }
    }
}

impl Read for PartReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.bytes.saturating_sub(self.position);
        let len = left.min(buffer.len() as u64) as usize;
        let read = self
            .source
            .read_at(self.part, self.position, &mut buffer[..len]);
        read.map_err(io::Error::other)?;
        self.position += len as u64;
        Ok(len)
    }
}

impl Seek for PartReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(by) => self.bytes.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
