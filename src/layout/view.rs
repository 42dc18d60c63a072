//! What a file holds: tensors of the model, and the arrays that stand for them.

use std::io::{self, Write};

use crate::codec::Mode;
use crate::form::Shown;
use crate::gguf::GgmlType;
use crate::safetensors::{Array, Dtype, Shape, write_json};

/// One tensor of a file, and what it is in the model.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The name in the file.
    pub name: &'a str,
    /// The logical shape, row-major.
    pub shape: Shape,
    pub ggml_type: &'static GgmlType,
    /// Bytes in the model.
    pub bytes: u64,
    /// Where the bytes come from: the tensor's name in the model, …
    pub gguf_name: &'a str,
    /// … the part (0-based), …
    pub gguf_part: u32,
    /// … and the first byte in that part's file.
    pub gguf_offset: u64,
    /// What stands for it in the file.
    pub shown: Shown,
}

impl<'a> TensorView<'a> {
    /// Its `n`-th array.
    pub fn array(&self, n: usize) -> Array<'a> {
        self.shown.array(n, self.ggml_type, self.name, &self.shape)
    }

    /// All of its arrays.
    pub fn arrays(&self) -> impl Iterator<Item = Array<'a>> + '_ {
        (0..self.shown.arrays()).map(|n| self.array(n))
    }

    /// Bytes of all of its arrays.
    pub fn shown_bytes(&self) -> u64 {
        match self.shown {
            Shown::Stored => self.bytes,
            shown => shown.bytes(self.ggml_type, &self.shape),
        }
    }

    /// Of each of its arrays, the bytes of an element and of the whole.
    pub(super) fn sizes(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        (0..self.shown.arrays()).map(|n| {
            let (dtype, shape) = self.shown.elements(n, self.ggml_type, &self.shape);
            (dtype.width(), shape.bytes(dtype))
        })
    }

    /// The widest of their elements, in bytes.
    pub(super) fn width(&self) -> u64 {
        let widths = self.sizes().map(|(width, _)| width);
        widths.max().unwrap_or(1)
    }
}

/// An array of a file.
#[derive(Debug, Clone, Copy)]
pub struct ArrayView<'a> {
    /// The tensor that it stands for, alone or with others.
    pub tensor: TensorView<'a>,
    /// Which of the tensor's arrays it is.
    pub(super) n: usize,
    /// The place of the tensor among the pieces of all files.
    pub(super) piece: u32,
    /// Bytes of an element.
    pub(super) width: u64,
    /// Bytes of payload.
    pub(super) bytes: u64,
}

impl<'a> ArrayView<'a> {
    /// As its header describes it.
    pub fn array(&self) -> Array<'a> {
        self.tensor.array(self.n)
    }
}

/// Writes the JSON object of `odmoe.tensors`: what each tensor of a file is in the model.
pub(super) fn write_tensors<'a>(
    out: &mut impl Write,
    tensors: impl Iterator<Item = TensorView<'a>>,
) -> io::Result<()> {
    let mut comma = "{";
    for tensor in tensors {
        out.write_all(comma.as_bytes())?;
        write_json(out, tensor.name)?;
        out.write_all(b":{\"ggml_type\":")?;
        write_json(out, tensor.ggml_type.name)?;
        out.write_all(b",\"shape\":")?;
        write_json(out, tensor.shape.dims())?;
        out.write_all(b",\"gguf_name\":")?;
        write_json(out, tensor.gguf_name)?;
        out.write_all(b",\"gguf_part\":")?;
        write_json(out, &tensor.gguf_part)?;
        out.write_all(b",\"gguf_offset\":")?;
        write_json(out, &tensor.gguf_offset)?;
        write_form(out, tensor.shown)?;
        out.write_all(b"}")?;
        comma = ",";
    }
    // A file without tensors does not exist, but its header would still be valid.
    out.write_all(if comma == "{" { b"{}" } else { b"}" })
}

/// Writes what was done to a tensor, if anything was.
fn write_form(out: &mut impl Write, shown: Shown) -> io::Result<()> {
    match shown {
        Shown::Stored => Ok(()),
        Shown::Numbers(float) => {
            out.write_all(b",\"form\":{\"dtype\":")?;
            write_json(out, Dtype::from(float).name())?;
            out.write_all(b"}")
        }
        Shown::Mlx { mlx, scales, .. } => {
            let dtype = match mlx.mode {
                Mode::Affine => Dtype::from(scales),
                Mode::Mxfp4 | Mode::Nvfp4 => Dtype::U8,
            };
            out.write_all(b",\"form\":{\"mode\":")?;
            write_json(out, mlx.mode.name())?;
            out.write_all(b",\"bits\":")?;
            write_json(out, &mlx.bits)?;
            out.write_all(b",\"group_size\":")?;
            write_json(out, &mlx.group_size)?;
            out.write_all(b",\"scales\":")?;
            write_json(out, dtype.name())?;
            out.write_all(b",\"exact\":")?;
            write_json(out, &mlx.is_exact(scales))?;
            out.write_all(b"}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors::{InString, write_header_json};

    fn view<'a>(name: &'a str, ne: &[u64], ggml_type: &str) -> TensorView<'a> {
        let ggml_type = GgmlType::from_name(ggml_type).unwrap();
        let mut whole = [1; 4];
        whole[..ne.len()].copy_from_slice(ne);
        TensorView {
            name,
            shape: Shape::of_dims(ne),
            ggml_type,
            bytes: ggml_type.tensor_bytes(whole).unwrap(),
            gguf_name: name,
            gguf_part: 0,
            gguf_offset: 123,
            shown: Shown::Stored,
        }
    }

    #[test]
    fn the_reference_crate_reads_a_header_with_hostile_names() {
        let names = ["a\"b\\c", "../../x\n\u{1b}[31m", "", "模型"];
        let tensors = names.map(|name| view(name, &[256, 3], "Q4_K"));
        let arrays = tensors.iter().flat_map(TensorView::arrays);
        let mut file = Vec::new();
        let write = |out: &mut InString<'_, Vec<u8>>| write_tensors(out, tensors.iter().copied());
        write_header_json(
            &mut file,
            &[("format", "pt")],
            "odmoe.tensors",
            write,
            arrays,
        )
        .unwrap();
        let length = file.len() as u64;
        file.splice(0..0, length.to_le_bytes());
        file.resize(file.len() + 4 * 3 * 144, 0);
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&file).unwrap();
        for name in names {
            assert_eq!(parsed.tensor(name).unwrap().shape(), [3, 144]);
        }
        let sources = &metadata.metadata().as_ref().unwrap()["odmoe.tensors"];
        let sources: serde_json::Value = serde_json::from_str(sources).unwrap();
        assert_eq!(sources[names[0]]["shape"], serde_json::json!([3, 256]));
        assert_eq!(sources[names[1]]["gguf_name"], names[1]);
    }

    #[test]
    fn scalars_and_empty_tensors_keep_their_shape() {
        assert_eq!(view("s", &[], "F32").array(0).bytes, 4);
        assert_eq!(view("e", &[0], "F32").array(0).bytes, 0);
        let row = view("r", &[512], "IQ4_KS").array(0);
        assert_eq!(row.shape.dims(), [2 * 136 + 4]);
    }
}
