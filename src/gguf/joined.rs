//! GGUF files that follow each other in one file, as `cat` leaves the parts of a split set.
//!
//! The problem: only the first header counts, so such a file looks like a single part of a set
//! that has lost its name, and its other parts seem to be missing.
//!
//! The plan: look for another header right behind the last tensor, and read on from header to
//! header. It is done only where a file is longer than its header says, which few are.

use std::fmt;
use std::io::{self, BufRead, Read, Seek, SeekFrom};

use super::header::Header;
use super::limits::MAX_HEADER_BYTES;
use super::split::SplitKeys;
use super::{DEFAULT_ALIGNMENT, FIXED_HEADER_BYTES, MAGIC};

/// Headers that are read, at most. Together they are not longer than the longest single one.
const MOST_HEADERS: usize = 64;

/// A file that goes on with another GGUF behind its last tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// Where the second GGUF begins.
    pub at: u64,
    /// What each says of the set it belongs to, in their order; `None` if it is not part of one,
    /// or cannot be read. At least two, and not more than were looked at.
    pub parts: Vec<Option<SplitKeys>>,
}

impl Joined {
    /// What follows the tensors of `first`, whose header the reader begins with; `None` if that is
    /// not another GGUF.
    pub fn find<R: BufRead + Seek>(
        mut reader: R,
        first: &Header,
        file_bytes: u64,
    ) -> io::Result<Option<Self>> {
        let keys = |header: &Header| SplitKeys::of(header).ok().flatten();
        let Some(second) = next(&mut reader, first, 0, file_bytes)? else {
            return Ok(None);
        };
        let mut parts = vec![keys(first)];
        let mut budget = MAX_HEADER_BYTES;
        let mut at = second;
        loop {
            reader.seek(SeekFrom::Start(at))?;
            let section = Section {
                reader: &mut reader,
                start: at,
            };
            let Ok(header) = Header::read(section, file_bytes - at) else {
                parts.push(None);
                break;
            };
            parts.push(keys(&header));
            budget = budget.saturating_sub(header.data_start);
            if budget == 0 || parts.len() == MOST_HEADERS {
                break;
            }
            match next(&mut reader, &header, at, file_bytes)? {
                Some(next) => at = next,
                None => break,
            }
        }
        Ok(Some(Self { at: second, parts }))
    }

    /// The numbers of the parts (1-based) in their order, and how many the set has; `None` if not
    /// all are of one set.
    pub fn numbers(&self) -> Option<(Vec<u64>, u64)> {
        let count = (*self.parts.first()?)?.count;
        let numbers = self.parts.iter().map(|keys| {
            let keys = keys.filter(|keys| keys.count == count)?;
            Some(keys.no + 1)
        });
        Some((numbers.collect::<Option<_>>()?, count))
    }
}

impl fmt::Display for Joined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.at;
        let Some((numbers, count)) = self.numbers() else {
            return write!(f, "goes on with another GGUF at byte {at}");
        };
        let found = numbers.len();
        let more = if found == MOST_HEADERS {
            " or more"
        } else {
            ""
        };
        write!(
            f,
            "holds {found}{more} of the {count} parts of a split set, one behind the other"
        )?;
        if !numbers.iter().copied().eq(1..=found as u64) {
            let order: Vec<String> = numbers.iter().map(u64::to_string).collect();
            write!(f, " in the order {}", order.join(", "))?;
        }
        write!(f, ": part {} begins at byte {at}", numbers[1])
    }
}

/// Where another GGUF begins behind the tensors of a header that begins at `start`. The last
/// tensor may be padded, to its own alignment or to that of `gguf-split`.
fn next<R: BufRead + Seek>(
    reader: &mut R,
    header: &Header,
    start: u64,
    file_bytes: u64,
) -> io::Result<Option<u64>> {
    let end = header.data_end();
    let padded = |alignment: u32| end.checked_next_multiple_of(alignment.into());
    let mut places = vec![end];
    places.extend(padded(header.alignment));
    places.extend(padded(DEFAULT_ALIGNMENT));
    if places.contains(&(file_bytes - start)) {
        return Ok(None); // as nearly all files, of which nothing more needs to be read
    }
    for place in places {
        let place = start.saturating_add(place);
        if place.saturating_add(FIXED_HEADER_BYTES) > file_bytes {
            continue;
        }
        let mut beginning = [0; 8];
        reader.seek(SeekFrom::Start(place))?;
        reader.read_exact(&mut beginning)?;
        if beginning[..4] == MAGIC && matches!(beginning[4..], [2 | 3, 0, 0, 0]) {
            return Ok(Some(place));
        }
    }
    Ok(None)
}

/// A reader whose first byte is another one's byte `start`.
struct Section<'a, R> {
    reader: &'a mut R,
    start: u64,
}

impl<R: Read> Read for Section<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

impl<R: BufRead> BufRead for Section<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.reader.consume(count);
    }
}

impl<R: Seek> Seek for Section<'_, R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => SeekFrom::Start(self.start.saturating_add(at)),
            relative => relative,
        };
        Ok(self.reader.seek(to)?.saturating_sub(self.start))
    }

    fn seek_relative(&mut self, by: i64) -> io::Result<()> {
        self.reader.seek_relative(by)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::types::GgmlType;
    use super::super::value::Value;
    use super::super::write::Writer;
    use super::*;

    /// A whole file with two tensors; the last one's padding may be missing.
    fn file(part: Option<(u16, u16)>, alignment: u32, padded: bool) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.key_value("general.alignment", &Value::U32(alignment));
        if let Some((no, count)) = part {
            writer.key_value("split.no", &Value::U16(no));
            writer.key_value("split.count", &Value::U16(count));
            writer.key_value("split.tensors.count", &Value::I32(2));
        }
        for name in ["a", "b"] {
            writer.tensor(name, &[3], GgmlType::from_name("F32").unwrap());
        }
        let written = writer.header();
        let mut bytes = written.bytes;
        let end = written.data[1].0 + written.data[1].1;
        bytes.resize(if padded { written.file_bytes } else { end } as usize, 7);
        bytes
    }

    fn find(bytes: &[u8]) -> Option<Joined> {
        let file_bytes = bytes.len() as u64;
        let first = Header::read(Cursor::new(bytes), file_bytes).unwrap();
        Joined::find(Cursor::new(bytes), &first, file_bytes).unwrap()
    }

    #[test]
    fn parts_one_behind_the_other_are_found_in_their_order() {
        for (order, expected) in [
            (
                &[0, 1, 2][..],
                "holds 3 of the 3 parts of a split set, one behind the other: part 2",
            ),
            (
                &[0, 2, 1],
                "holds 3 of the 3 parts of a split set, one behind the other in the order 1, 3, 2: part 3",
            ),
            (
                &[1, 0],
                "holds 2 of the 3 parts of a split set, one behind the other in the order 2, 1: part 1",
            ),
        ] {
            let parts: Vec<_> = order
                .iter()
                .map(|&no| file(Some((no, 3)), 32, true))
                .collect();
            let joined = find(&parts.concat()).unwrap();
            assert_eq!(joined.at, parts[0].len() as u64);
            let expected = format!("{expected} begins at byte {}", joined.at);
            assert_eq!(joined.to_string(), expected);
        }
    }

    #[test]
    fn the_padding_of_the_last_tensor_may_be_missing_or_of_another_alignment() {
        let second = file(Some((1, 2)), 32, true);
        for (alignment, padding) in [(32, 0), (32, 20), (64, 20), (1, 0), (4096, 20)] {
            let mut bytes = file(Some((0, 2)), alignment, false);
            bytes.resize(bytes.len() + padding, 0);
            let at = bytes.len() as u64;
            bytes.extend(&second);
            assert_eq!(find(&bytes).unwrap().at, at, "{alignment} {padding}");
        }
    }

    #[test]
    fn what_follows_may_be_no_part_of_a_set() {
        let whole = file(None, 32, true);
        let joined = find(&[&whole[..], &whole[..]].concat()).unwrap();
        let at = whole.len();
        let expected = format!("goes on with another GGUF at byte {at}");
        assert_eq!(joined.to_string(), expected);
        // A header that cannot be read.
        let mut bytes = whole.clone();
        bytes.extend(b"GGUF\x03\0\0\0");
        bytes.resize(bytes.len() + 100, 0xff);
        assert_eq!(find(&bytes).unwrap().to_string(), expected);
    }

    #[test]
    fn padding_and_other_bytes_behind_the_tensors_are_nothing() {
        let whole = file(None, 32, true);
        for rest in [&[0; 4096][..], b"GGUF", b"GGUF\x03\0\0\0", &[0xf5; 100]] {
            assert_eq!(find(&[&whole[..], rest].concat()), None);
        }
    }

    #[test]
    fn only_so_many_headers_are_read() {
        let part = file(Some((0, 999)), 32, true);
        let joined = find(&part.repeat(200)).unwrap();
        assert_eq!(joined.parts.len(), MOST_HEADERS);
        assert!(
            joined
                .to_string()
                .starts_with("holds 64 or more of the 999 parts")
        );
    }
}
