//! The header of one GGUF file: what it says, checked as a whole.

use std::io::{BufRead, Seek};
use std::ops::Range;

use super::cursor::{Cursor, Keep};
use super::error::{HeaderError, Problem};
use super::limits::*;
use super::tensor::TensorInfo;
use super::value::{KeyValue, Value};
use super::{DEFAULT_ALIGNMENT, FIXED_HEADER_BYTES};

/// What the header of one GGUF file says, checked against the file's size.
#[derive(Debug)]
pub struct Header {
    /// 2 or 3; the two have the same layout.
    pub version: u32,
    pub key_values: Vec<KeyValue>,
    /// The bytes of the whole key/value section in the file.
    pub key_value_range: Range<u64>,
    /// In the order of the tensor table, which is also the order of their data.
    pub tensors: Vec<TensorInfo>,
    /// Tensor data starts at multiples of this many bytes.
    pub alignment: u32,
    /// Where tensor data starts in the file; the end of the header if there are no tensors.
    pub data_start: u64,
}

impl Header {
    /// Reads the header of a GGUF of `file_bytes` bytes from a reader at its first byte.
    ///
    /// Time and memory are bounded by the header's real size; the payload is never read.
    pub fn read<R: BufRead + Seek>(reader: R, file_bytes: u64) -> Result<Self, HeaderError> {
        let mut cursor = Cursor {
            reader,
            position: 0,
            file_bytes,
            keep: Keep::Short,
        };
        let version = cursor.fixed_header()?;
        let n_tensors =
            cursor.count("the number of tensors", MIN_TENSOR_INFO_BYTES, MAX_TENSORS)?;
        let n_kv = cursor.count(
            "the number of key/values",
            MIN_KEY_VALUE_BYTES,
            MAX_KEY_VALUES,
        )?;

        let key_values = cursor.key_values(n_kv)?;
        let key_value_range = FIXED_HEADER_BYTES..cursor.position;
        let alignment = alignment(&key_values)?;

        let infos_start = cursor.position;
        let architecture = architecture(&key_values);
        let mut tensors = cursor.tensor_infos(n_tensors, architecture)?;
        let data_start = if tensors.is_empty() {
            cursor.position
        } else {
            // The position is at most MAX_HEADER_BYTES and the alignment fits into 32 bits.
            cursor.position.next_multiple_of(alignment.into())
        };
        if data_start > file_bytes {
            return Err(HeaderError {
                offset: infos_start,
                field: format!("the start of the tensor data (aligned to {alignment})"),
                problem: Problem::BeyondEnd {
                    end: described_end(&tensors, data_start),
                    file_bytes,
                },
            });
        }
        place(&mut tensors, data_start, alignment, file_bytes)?;
        Ok(Self {
            version,
            key_values,
            key_value_range,
            tensors: tensors.into_iter().map(|(info, _)| info).collect(),
            alignment,
            data_start,
        })
    }

    /// Where the last tensor ends in the file, without padding.
    pub fn data_end(&self) -> u64 {
        let last = self.tensors.last();
        last.map_or(self.data_start, |info| info.offset + info.bytes)
    }

    /// `general.architecture`; absent in parts of a split set after the first.
    pub fn architecture(&self) -> Option<&str> {
        architecture(&self.key_values)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&KeyValue> {
        self.key_values.iter().find(|kv| kv.key == key)
    }
}

fn architecture(key_values: &[KeyValue]) -> Option<&str> {
    let kv = key_values
        .iter()
        .find(|kv| kv.key == "general.architecture");
    kv?.value.as_str()
}

fn alignment(key_values: &[KeyValue]) -> Result<u32, HeaderError> {
    let Some(kv) = key_values.iter().find(|kv| kv.key == "general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let problem = match &kv.value {
        Value::U32(n) if n.is_power_of_two() => return Ok(*n),
        Value::U32(n) => Problem::AlignmentValue(*n),
        other => Problem::AlignmentType(other.value_type()),
    };
    Err(HeaderError {
        offset: kv.range.start,
        field: "general.alignment".into(),
        problem,
    })
}

/// Turns offsets relative to the data into offsets in the file, and checks that each is where the
/// tensors before it end: no gap, no overlap, nothing outside the file.
fn place(
    tensors: &mut [(TensorInfo, u64)],
    data_start: u64,
    alignment: u32,
    file_bytes: u64,
) -> Result<(), HeaderError> {
    let described_end = described_end(tensors, data_start);
    let mut expected = 0u64;
    for (index, (info, at)) in tensors.iter_mut().enumerate() {
        let fail = |field: &str, problem| HeaderError {
            offset: *at,
            field: format!("tensor {index} {:?}, {field}", info.name),
            problem,
        };
        if info.offset != expected {
            return Err(fail(
                "offset",
                Problem::Offset {
                    found: info.offset,
                    expected,
                },
            ));
        }
        let overflow = || Problem::Bytes {
            dims: info.dims().to_vec(),
            ggml_type: info.ggml_type,
        };
        let offset = data_start + expected; // expected <= file_bytes - data_start, see below
        let end = offset
            .checked_add(info.bytes)
            .ok_or_else(|| fail("data", overflow()))?;
        if end > file_bytes {
            let end = end.max(described_end);
            return Err(fail("data", Problem::BeyondEnd { end, file_bytes }));
        }
        // The padding after the last tensor may be missing, so it may round beyond the file; a
        // tensor after that fails the check above.
        expected = expected
            .checked_add(info.bytes)
            .and_then(|end| end.checked_next_multiple_of(alignment.into()))
            .filter(|end| data_start.checked_add(*end).is_some())
            .ok_or_else(|| fail("data", overflow()))?;
        info.offset = offset;
    }
    Ok(())
}

/// Where the last tensor ends, as far as the table can be believed: for messages.
fn described_end(tensors: &[(TensorInfo, u64)], data_start: u64) -> u64 {
    let last = tensors.last();
    last.map_or(data_start, |(info, _)| {
        let end = data_start.saturating_add(info.offset);
        end.saturating_add(info.bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::super::types::GgmlType;
    use super::super::value::ValueType;
    use super::super::write::Writer;
    use super::*;
    use crate::explain::Explain;
    use std::io::Cursor as IoCursor;

    fn read(bytes: &[u8]) -> Result<Header, HeaderError> {
        Header::read(IoCursor::new(bytes), bytes.len() as u64)
    }

    fn string_array(len: usize) -> Value {
        Value::Array {
            of: ValueType::String,
            len: len as u64,
            items: Some((0..len).map(|i| Value::String(i.to_string())).collect()),
        }
    }

    #[test]
    fn short_values_are_kept_and_long_ones_are_skipped() {
        let long = "x".repeat(70_000);
        let mut writer = Writer::new();
        writer.key_value("short", &string_array(64));
        writer.key_value("long", &string_array(65));
        writer.key_value("text", &Value::String(long));
        writer.key_value("last", &Value::F64(1.5));
        let header = read(&writer.header().bytes).unwrap();
        assert_eq!(header.get("short").unwrap().value, string_array(64));
        assert_eq!(
            header.get("long").unwrap().value,
            Value::Array {
                of: ValueType::String,
                len: 65,
                items: None
            }
        );
        assert_eq!(header.get("text").unwrap().value, Value::LongString(70_000));
        assert_eq!(header.get("last").unwrap().value, Value::F64(1.5));
        let last = &header.get("last").unwrap().range;
        assert_eq!(last.end, header.key_value_range.end);
        assert_eq!(last.end - last.start, 8);
    }

    #[test]
    fn skipped_values_can_be_read_later() {
        let long = Value::String("x".repeat(70_000));
        let nested = Value::array(ValueType::Array, vec![string_array(1), string_array(70)]);
        let mut writer = Writer::new();
        for (key, value) in [("a", &long), ("b", &nested), ("c", &string_array(65))] {
            writer.key_value(key, value);
        }
        let file = writer.header().bytes;
        let header = read(&file).unwrap();
        for (key, value) in [("c", &string_array(65)), ("b", &nested), ("a", &long)] {
            let kv = header.get(key).unwrap();
            assert_ne!(kv.value, *value);
            let whole = kv.read_whole(IoCursor::new(&file), file.len() as u64);
            assert_eq!(whole.unwrap(), *value);
        }
    }

    #[test]
    fn every_prefix_of_a_file_is_refused_without_a_panic() {
        let mut writer = Writer::new();
        writer.key_value("general.architecture", &Value::String("toy".into()));
        writer.key_value("a", &string_array(3));
        writer.tensor("t", &[32, 2], GgmlType::from_name("Q4_0").unwrap());
        let written = writer.header();
        let mut file = written.bytes;
        file.resize(file.len() + 36, 7);
        assert_eq!(read(&file).unwrap().tensors[0].bytes, 36);
        for cut in 0..file.len() {
            assert!(read(&file[..cut]).is_err(), "cut to {cut} bytes");
        }
    }

    #[test]
    fn a_file_that_is_cut_off_is_compared_with_the_end_of_its_last_tensor() {
        let mut writer = Writer::new();
        for name in ["a", "b", "c"] {
            writer.tensor(name, &[32, 100], GgmlType::from_name("Q8_0").unwrap());
        }
        let written = writer.header();
        let whole = written.data[2].0 + written.data[2].1;
        for (bytes, tensor, percent) in [
            (written.bytes.len() as u64, 0, 1),
            (written.data[1].0 + 10, 1, 34),
            (whole - 1, 2, 99),
        ] {
            let error = Header::read(IoCursor::new(&written.bytes), bytes).unwrap_err();
            assert!(error.hint().unwrap().contains("not complete"));
            let error = error.to_string();
            let end = format!(
                "the tensors end at byte {whole}, but the file has only {bytes} bytes ({percent} %)"
            );
            assert!(error.ends_with(&end), "{error}");
            assert!(error.starts_with(&format!("tensor {tensor} ")), "{error}");
        }
    }

    #[test]
    fn an_error_names_the_field_and_the_byte() {
        let mut writer = Writer::new();
        writer.key_value("general.alignment", &Value::U32(3));
        let error = read(&writer.header().bytes).unwrap_err();
        assert_eq!(
            error.to_string(),
            "general.alignment, at byte 53: 3 is not a power of two"
        );
        assert!(error.hint().unwrap().contains("convert the model again"));
    }
}
