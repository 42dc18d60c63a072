//! Counting the bytes that are written.

use std::io::{self, Write};

/// Counts the bytes that pass through it; with [`io::sink`] it only counts.
pub(super) struct CountingWriter<W> {
    out: W,
    pub(super) bytes: u64,
}

impl<W> CountingWriter<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, bytes: 0 }
    }
}

impl<W: Write> Write for CountingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
