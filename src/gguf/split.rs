//! Split sets: the naming rule, and whether parts belong together.
//!
//! `gguf-split` and gguf-py write `PREFIX-00001-of-00009.gguf`, … with `split.no` (0-based),
//! `split.count` and `split.tensors.count` in every part and all other keys in the first. Each
//! part has its own alignment and data start; a tensor never spans parts.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use super::header::Header;
use super::limits::{MAX_MODEL_BYTES, MAX_PARTS, MAX_TENSORS};
use super::tensor::TensorInfo;
use super::value::KeyValue;
use crate::explain::{Explain, Hint, hint_of};

/// What a part says of the set it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitKeys {
    /// 0-based number of this part.
    pub no: u64,
    /// Number of parts.
    pub count: u64,
    /// Number of tensors in all parts together.
    pub tensors: u64,
}

impl SplitKeys {
    /// The split keys of a part; `None` for a whole file. `split.count` decides, not the
    /// file name; 0 and 1 mean whole (`gguf-split --merge` leaves 0 behind).
    pub fn of(header: &Header) -> Result<Option<Self>, SplitError> {
        let number = |key: &'static str| {
            header
                .get(key)
                .map(|kv| kv.value.as_u64().ok_or(SplitError::BadKey { key }))
                .transpose()
        };
        let count = number("split.count")?.unwrap_or(0);
        if count <= 1 {
            return Ok(None);
        }
        if count > MAX_PARTS {
            return Err(SplitError::TooManyParts { count });
        }
        let required = |key| number(key)?.ok_or(SplitError::MissingKey { key, count });
        let keys = Self {
            no: required("split.no")?,
            count,
            tensors: required("split.tensors.count")?,
        };
        if keys.no >= count {
            return Err(SplitError::NumberBeyondCount { no: keys.no, count });
        }
        Ok(Some(keys))
    }
}

/// A part's file name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartName {
    /// Any bytes that a file name can have, so not always UTF-8.
    pub prefix: OsString,
    /// 1-based, as written in the name.
    pub number: u64,
    pub count: u64,
}

impl PartName {
    /// Takes `PREFIX-00002-of-00009.gguf` apart; `None` if the name does not follow the rule to
    /// the letter (at least five digits, padded with zeros).
    pub fn parse(name: &OsStr) -> Option<Self> {
        let stem = name.as_bytes().strip_suffix(b".gguf")?;
        let (rest, count) = split_last(stem, b"-of-")?;
        let (prefix, number) = split_last(rest, b"-")?;
        let parsed = Self {
            prefix: OsStr::from_bytes(prefix).to_owned(),
            number: decimal(number)?,
            count: decimal(count)?,
        };
        (parsed.sibling(parsed.number) == name).then_some(parsed)
    }

    /// The name of part `number` (1-based) of the same set.
    pub fn sibling(&self, number: u64) -> OsString {
        let mut name = self.prefix.clone();
        name.push(Self::ending(number, self.count));
        name
    }

    /// The ending of the name of part `number` (1-based) of `count`.
    pub fn ending(number: u64, count: u64) -> String {
        format!("-{number:05}-of-{count:05}.gguf")
    }
}

/// The bytes before and after the last `mark`.
fn split_last<'a>(bytes: &'a [u8], mark: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = bytes.windows(mark.len()).rposition(|w| w == mark)?;
    Some((&bytes[..at], &bytes[at + mark.len()..]))
}

fn decimal(digits: &[u8]) -> Option<u64> {
    str::from_utf8(digits).ok()?.parse().ok()
}

/// Whether a file name is that of one piece of a file that was cut by bytes (`.part1of2`,
/// `.gguf-split-a`, `.gguf.001`). Such a piece has no header of its own and must be joined with the
/// others first.
pub fn looks_like_raw_cut(name: &OsStr) -> bool {
    let name = name.as_bytes().to_ascii_lowercase();
    let digits = |s: &[u8]| !s.is_empty() && s.iter().all(u8::is_ascii_digit);
    let letters = |s: &[u8]| !s.is_empty() && s.len() <= 3 && s.iter().all(u8::is_ascii_lowercase);
    if let Some((_, tail)) = split_last(&name, b".part") {
        let tail = without_dashes(tail);
        return match split_last(tail, b"of") {
            Some((number, count)) => {
                digits(without_dashes(number)) && digits(without_dashes(count))
            }
            None => digits(tail) || letters(tail),
        };
    }
    [&b"-split-"[..], b"-part-", b"."]
        .into_iter()
        .filter_map(|mark| Some((mark, split_last(&name, mark)?)))
        .any(|(mark, (head, tail))| {
            let is_gguf = head.windows(5).any(|w| w == b".gguf");
            // `split` counts from aa; others are endings such as .bak.
            let counts =
                letters(tail) && (mark != b"." || tail.starts_with(b"a") && tail.len() == 2);
            is_gguf && (digits(tail) || counts)
        })
}

/// Strips dashes and underscores from both ends.
fn without_dashes(bytes: &[u8]) -> &[u8] {
    let is_plain = |b: &u8| !matches!(b, b'-' | b'_');
    let Some(first) = bytes.iter().position(is_plain) else {
        return b"";
    };
    let last = bytes.iter().rposition(is_plain).unwrap_or(first);
    &bytes[first..=last]
}

/// Why the parts of a set do not make a model.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::EnumProperty, PartialEq, Eq)]
#[strum(serialize_all = "snake_case", prefix = "split.")]
pub enum SplitError {
    #[error("{key} is not a count")]
    #[strum(props(hint = "split the model again with a current llama-gguf-split"))]
    BadKey { key: &'static str },
    #[error("split.count is {count}, but {key} is missing")]
    #[strum(props(hint = "split the model again with a current llama-gguf-split"))]
    MissingKey { key: &'static str, count: u64 },
    #[error("split.count is {count}, but the format allows only {MAX_PARTS} parts")]
    #[strum(props(hint = "split the model again with a current llama-gguf-split"))]
    TooManyParts { count: u64 },
    #[error("the parts together are larger than any file system can show")]
    #[strum(props(hint = "check that they are those of one model"))]
    TooLarge,
    #[error("the parts together hold {0} tensors, more than any real model")]
    #[strum(props(hint = "if yours has so many, report it to odmoe-fs"))]
    TooManyTensors(u64),
    #[error("split.no is {no}, but split.count is {count}")]
    #[strum(props(hint = "split the model again with a current llama-gguf-split"))]
    NumberBeyondCount { no: u64, count: u64 },
    #[error("this is not part of a split set, but part {number} of {count} was expected here")]
    #[strum(props(hint = "put that part in its place, or give this file another name"))]
    NotAPart { number: u64, count: u64 },
    #[error("split.no is {found}, but in this place it must be {expected}")]
    #[strum(props(hint = "give the file the name that it was published with"))]
    WrongNumber { found: u64, expected: u64 },
    #[error("{key} is {found}, but {expected} in the first part")]
    #[strum(props(hint = "keep the parts of one model and one version in a folder of their own"))]
    Disagree {
        key: &'static str,
        found: u64,
        expected: u64,
    },
    #[error("tensor {name:?} is in part {first} and again in part {second}")]
    #[strum(props(hint = "check that all parts are of one model and one version"))]
    DuplicateTensor {
        name: String,
        first: usize,
        second: usize,
    },
    #[error("the parts together hold {found} tensors, but split.tensors.count is {expected}")]
    #[strum(props(hint = "check that all parts are of one model and one version"))]
    TensorCount { found: u64, expected: u64 },
}

impl Explain for SplitError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        hint_of(self)
    }
}

/// What the headers of all parts say together.
#[derive(Debug)]
pub struct ModelHeader {
    /// GGUF version of the first part.
    pub version: u32,
    /// The first part's key/values.
    pub key_values: Vec<KeyValue>,
    /// The bytes of the key/value section in the first part.
    pub key_value_range: Range<u64>,
    pub parts: Vec<Part>,
    /// Every tensor, by part and then in the order of the part's table.
    pub tensors: Vec<Tensor>,
}

/// One file of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub file_bytes: u64,
    pub alignment: u32,
    pub data_start: u64,
}

/// A tensor and the part that it lies in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Index into [`ModelHeader::parts`].
    pub part: u32,
    pub info: TensorInfo,
}

impl ModelHeader {
    /// Joins the headers of all parts, each with its file's size, in order. An error comes with
    /// the index of the part it was found in.
    ///
    /// # Panics
    /// If there is no part.
    pub fn join(headers: Vec<(Header, u64)>) -> Result<Self, (usize, SplitError)> {
        check_totals(&headers).map_err(|e| (0, e))?;
        let split = check_keys(&headers)?;
        let mut parts = Vec::with_capacity(headers.len());
        let mut tensors = Vec::with_capacity(headers.iter().map(|(h, _)| h.tensors.len()).sum());
        let mut first = None;
        for (index, (header, file_bytes)) in headers.into_iter().enumerate() {
            parts.push(Part {
                file_bytes,
                alignment: header.alignment,
                data_start: header.data_start,
            });
            tensors.extend(header.tensors.into_iter().map(|info| Tensor {
                part: index as u32,
                info,
            }));
            first.get_or_insert((header.version, header.key_values, header.key_value_range));
        }
        check_tensors(&tensors, split)?;
        let (version, key_values, key_value_range) = first.expect("a model has a first part");
        Ok(Self {
            version,
            key_values,
            key_value_range,
            parts,
            tensors,
        })
    }

    /// The pair with this key.
    pub fn get(&self, key: &str) -> Option<&KeyValue> {
        self.key_values.iter().find(|kv| kv.key == key)
    }

    /// `general.architecture`, the prefix of most keys.
    pub fn architecture(&self) -> Option<&str> {
        self.get("general.architecture")?.value.as_str()
    }

    /// What the file is if it only belongs to a model, with an article: adapters, projectors and
    /// the like are GGUF files, too.
    pub fn accessory(&self) -> Option<&'static str> {
        let text = |key| self.get(key).and_then(|kv| kv.value.as_str());
        match (text("general.type"), self.architecture()) {
            (Some("mmproj"), _) | (None, Some("clip")) => Some("a multimodal projector"),
            (Some("adapter"), _) => Some("an adapter"),
            (Some("imatrix"), _) | (None, Some("imatrix")) => Some("an importance matrix"),
            (_, Some("controlvector")) => Some("a control vector"),
            _ if self.tensors.is_empty() => Some("a GGUF without tensors"),
            _ => None,
        }
    }

    /// The pair with the key `ARCHITECTURE.name`.
    pub fn get_of_architecture(&self, name: &str) -> Option<&KeyValue> {
        self.get(&format!("{}.{name}", self.architecture()?))
    }
}

fn check_keys(headers: &[(Header, u64)]) -> Result<Option<SplitKeys>, (usize, SplitError)> {
    let first = SplitKeys::of(&headers[0].0).map_err(|e| (0, e))?;
    if headers.len() == 1 && first.is_none() {
        return Ok(None);
    }
    for (index, (header, _)) in headers.iter().enumerate() {
        let fail = |error| (index, error);
        let Some(keys) = SplitKeys::of(header).map_err(fail)? else {
            return Err(fail(SplitError::NotAPart {
                number: index as u64 + 1,
                count: headers.len() as u64,
            }));
        };
        if keys.no != index as u64 {
            return Err(fail(SplitError::WrongNumber {
                found: keys.no,
                expected: index as u64,
            }));
        }
        let first = first.unwrap_or(keys);
        for (key, found, expected) in [
            ("split.count", keys.count, headers.len() as u64),
            ("split.tensors.count", keys.tensors, first.tensors),
        ] {
            if found != expected {
                return Err(fail(SplitError::Disagree {
                    key,
                    found,
                    expected,
                }));
            }
        }
    }
    Ok(first)
}

/// Limits of each part must hold for all parts together, since a tree is made of all of them.
fn check_totals(headers: &[(Header, u64)]) -> Result<(), SplitError> {
    headers
        .iter()
        .try_fold(0u64, |sum, (_, bytes)| sum.checked_add(*bytes))
        .filter(|&sum| sum <= MAX_MODEL_BYTES)
        .ok_or(SplitError::TooLarge)?;
    let tensors = headers.iter().map(|(h, _)| h.tensors.len() as u64).sum();
    if tensors > MAX_TENSORS {
        return Err(SplitError::TooManyTensors(tensors));
    }
    Ok(())
}

fn check_tensors(tensors: &[Tensor], split: Option<SplitKeys>) -> Result<(), (usize, SplitError)> {
    let Some(split) = split else {
        return Ok(()); // one file, whose names Header::read compared
    };
    let mut seen: HashMap<&str, u32> = HashMap::with_capacity(tensors.len());
    for tensor in tensors {
        if let Some(first) = seen.insert(&tensor.info.name, tensor.part) {
            let error = SplitError::DuplicateTensor {
                name: tensor.info.name.clone(),
                first: first as usize + 1,
                second: tensor.part as usize + 1,
            };
            return Err((tensor.part as usize, error));
        }
    }
    let found = tensors.len() as u64;
    if found != split.tensors {
        let expected = split.tensors;
        return Err((0, SplitError::TensorCount { found, expected }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::value::Value;
    use super::super::write::Writer;
    use super::*;

    #[test]
    fn part_names_follow_the_rule_to_the_letter() {
        let parse = |name: &str| PartName::parse(OsStr::new(name));
        let name = parse("grok-1-IQ3_XS-split-00002-of-00009.gguf").unwrap();
        assert_eq!(name.prefix, "grok-1-IQ3_XS-split");
        assert_eq!((name.number, name.count), (2, 9));
        assert_eq!(name.sibling(9), "grok-1-IQ3_XS-split-00009-of-00009.gguf");
        assert!(parse("m-100001-of-123456.gguf").is_some());
        assert!(parse("-00001-of-00002.gguf").is_some());
        for name in [
            "m-2-of-9.gguf",
            "m-002-of-009.gguf",
            "m-000002-of-00009.gguf",
            "m-+0002-of-00009.gguf",
            "m-00002-of-00009",
            "m-٠٠٠٠٢-of-٠٠٠٠٩.gguf",
            "m.gguf",
            ".gguf",
            "",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_prefix_of_any_bytes_is_kept_in_the_names_of_the_siblings() {
        for prefix in [
            &b"mod\xe8le"[..],
            b"\xff\xfe",
            b"a\n\x1b[2J; b",
            "模型".as_bytes(),
        ] {
            let name = [prefix, b"-00001-of-00002.gguf"].concat();
            let parsed = PartName::parse(OsStr::from_bytes(&name)).unwrap();
            assert_eq!(parsed.prefix.as_bytes(), prefix);
            let sibling = [prefix, b"-00002-of-00002.gguf"].concat();
            assert_eq!(parsed.sibling(2).as_bytes(), sibling);
        }
    }

    fn part(count: Value, tensors: i32) -> Header {
        let mut writer = Writer::new();
        writer.key_value("split.no", &Value::U16(0));
        writer.key_value("split.count", &count);
        writer.key_value("split.tensors.count", &Value::I32(tensors));
        let file = writer.header();
        Header::read(std::io::Cursor::new(&file.bytes), file.file_bytes).unwrap()
    }

    #[test]
    fn a_count_that_no_set_can_have_is_refused_at_once() {
        let count = 1 << 40;
        assert_eq!(
            SplitKeys::of(&part(Value::U64(count), 0)),
            Err(SplitError::TooManyParts { count })
        );
    }

    #[test]
    fn parts_whose_sizes_add_up_beyond_all_file_systems_are_refused() {
        let size = i64::MAX as u64 / 2;
        let parts = [(); 3].map(|()| (part(Value::U16(3), 0), size));
        let error = ModelHeader::join(parts.into()).unwrap_err();
        assert_eq!(error, (0, SplitError::TooLarge));
    }

    #[test]
    fn raw_cuts_are_recognised_by_name() {
        for name in [
            &b"m.gguf.part1of2"[..],
            b"m.gguf.part-01-of-02",
            b"m.gguf.part2",
            b"m.gguf.partaa",
            b"m.gguf-split-a",
            b"m.gguf-part-ab",
            b"m.gguf.001",
            b"m.gguf.ab",
            b"mod\xe8le.GGUF.Part1of2",
            b"\xff.gguf-split-a",
        ] {
            assert!(looks_like_raw_cut(OsStr::from_bytes(name)), "{name:?}");
        }
        for name in [
            &b"m.gguf"[..],
            b"m-00001-of-00002.gguf",
            b"m-split-00001-of-00002.gguf",
            b"sha256-00ff",
            b"my.partition.gguf",
            b"m.gguf.part",
            b"m.gguf.tmp",
            b"m.gguf.bak",
            b"m.gguf.gz",
            b"m.gguf.part\xe8",
            b"m.gguf.part--",
            b"mod\xe8le.gguf",
        ] {
            assert!(!looks_like_raw_cut(OsStr::from_bytes(name)), "{name:?}");
        }
    }
}
