//! What a model directory needs of a model beyond its header.

use std::io::BufReader;
use std::path::Path;

use super::ModelError;
use crate::gguf::ModelHeader;
use crate::hf::{self, Inputs};
use crate::source::{ReadError, Source};

/// Bytes of a part that are read at a time when long values are parsed.
const READER_BYTES: usize = 1 << 20;

/// The factors of rotary positions, if the model has some.
pub(super) fn rope_factors(
    header: &ModelHeader,
    source: &Source,
) -> Result<Option<Vec<f32>>, ReadError> {
    let Some(tensor) = hf::rope_factors(header) else {
        return Ok(None);
    };
    let mut bytes = vec![0; tensor.info.bytes as usize];
    source.read_at(tensor.part, tensor.info.offset, &mut bytes)?;
    let (factors, _) = bytes.as_chunks::<4>();
    let factors = factors.iter().map(|bytes| f32::from_le_bytes(*bytes));
    Ok(Some(factors.collect()))
}

/// Reads what a model directory needs of a model beyond its header.
pub(super) fn inputs(
    header: &ModelHeader,
    source: &Source,
    path: &Path,
) -> Result<Inputs, ModelError> {
    let mut inputs = Inputs::default();
    let bytes = header.parts[0].file_bytes;
    for key in hf::LONG_KEYS {
        let Some(kv) = header.get(key).filter(|kv| !kv.value.is_kept()) else {
            continue;
        };
        let reader = BufReader::with_capacity(READER_BYTES, source.reader(0, bytes));
        let whole = kv
            .read_whole(reader, bytes)
            .map_err(|cause| ModelError::Header {
                path: path.to_owned(),
                cause,
            })?;
        inputs.values.insert(key, whole);
    }
    inputs.rope_factors = rope_factors(header, source)?;
    Ok(inputs)
}
