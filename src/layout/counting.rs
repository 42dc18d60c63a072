use std::io::{self, Write};

/// Passes on what is written into it, and counts the bytes; with [`io::sink`] it only counts.
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
