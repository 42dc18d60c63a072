//! The header of a file that does not have the one that it should.
//!
//! The problem: another program may have rewritten the file, with less metadata or with the tensors
//! in another order. Then every tensor is at another place, but still has the right bytes.
//!
//! The plan: read such a header as a loader does, and compare each tensor at the place that it
//! gives. If no loader would accept the header, compare the tensors where they should be.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::safetensors::{LENGTH_WORD_BYTES, MAX_HEADER_BYTES, METADATA_KEY};

/// A header longer than this, and longer than twice the expected one, is not read.
const MOST_BYTES: u64 = 1 << 20;

/// The places of tensors according to a file's own header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct FoundHeader {
    /// By name; bytes of the file.
    pub tensors: HashMap<String, Range<u64>>,
    /// The end of the last one.
    pub end: u64,
}

impl FoundHeader {
    /// Reads the header of a file of `size` bytes. `None` if a loader would not accept it.
    pub fn read(file: &File, size: u64, expected_bytes: u64) -> Option<Self> {
        let found = Self::parse(&json_of(file, MOST_BYTES.max(2 * expected_bytes))?)?;
        // Loaders refuse a file that is longer than its tensors; its length word may be damaged.
        (found.end >= size).then_some(found)
    }

    fn parse(json: &[u8]) -> Option<Self> {
        let start = LENGTH_WORD_BYTES + json.len() as u64;
        let entries: HashMap<String, Value> = serde_json::from_slice(json).ok()?;
        let mut found = Self {
            tensors: HashMap::with_capacity(entries.len()),
            end: start,
        };
        for (name, entry) in entries {
            if name == METADATA_KEY {
                continue;
            }
            let offset = |index| {
                let offset = entry.get("data_offsets")?.get(index)?.as_u64()?;
                start.checked_add(offset)
            };
            let range = offset(0)?..offset(1)?;
            if range.start > range.end {
                return None;
            }
            found.end = found.end.max(range.end);
            found.tensors.insert(name, range);
        }
        Some(found)
    }
}

/// The metadata of a file, if it has a header that is no longer than safetensors allows.
pub(super) fn metadata(file: &File) -> Option<HashMap<String, String>> {
    let json = json_of(file, MAX_HEADER_BYTES)?;
    let mut entries: HashMap<String, Value> = serde_json::from_slice(&json).ok()?;
    serde_json::from_value(entries.remove(METADATA_KEY)?).ok()
}

/// The JSON of a header of at most so many bytes.
fn json_of(file: &File, most: u64) -> Option<Vec<u8>> {
    let mut word = [0; LENGTH_WORD_BYTES as usize];
    file.read_exact_at(&mut word, 0).ok()?;
    let length = u64::from_le_bytes(word);
    // A damaged length word must not make us allocate what the file does not have.
    if length > most || length > file.metadata().ok()?.len() {
        return None;
    }
    let mut json = vec![0; length as usize];
    file.read_exact_at(&mut json, LENGTH_WORD_BYTES).ok()?;
    Some(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_of_the_file_and_nonsense_says_nothing() {
        let json =
            br#"{"__metadata__":{"a":"b"},"x":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}}"#;
        let found = FoundHeader::parse(json).unwrap();
        let start = 8 + json.len() as u64;
        assert_eq!(
            found.tensors,
            [("x".to_owned(), start + 3..start + 5)].into()
        );
        assert_eq!(found.end, start + 5);
        for nonsense in [
            "",
            "[]",
            "{} x",
            r#"{"x":1}"#,
            r#"{"x":{"data_offsets":[1]}}"#,
            r#"{"x":{"data_offsets":[5,3]}}"#,
            r#"{"x":{"data_offsets":[-1,3]}}"#,
            r#"{"x":{"data_offsets":[0,18446744073709551615]}}"#,
        ] {
            assert_eq!(FoundHeader::parse(nonsense.as_bytes()), None, "{nonsense}");
        }
    }
}
