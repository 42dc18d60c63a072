//! Tensors as tables: cut to the width of a terminal, whole where a program reads.

use std::path::Path;

use odmoe_fs::layout::TensorFile;
use odmoe_fs::model::Model;
use odmoe_fs::safetensors::Dtype;
use serde::Serialize;

use super::super::text;
use super::picture::Screen;
use super::report::TensorReport;

/// All tensors: on a terminal in human units and cut names, else in bytes.
pub fn tensors(tensors: &[TensorReport], screen: &Screen) -> String {
    let head = ["bytes", "offset", "part", "type", "shape", "name"].map(str::to_owned);
    let rows = tensors.iter().map(|tensor| {
        [
            screen.bytes(tensor.bytes),
            tensor.offset.to_string(),
            tensor.part.to_string(),
            tensor.ggml_type.to_owned(),
            shape(&tensor.shape),
            text::name(tensor.name),
        ]
    });
    screen.table(std::iter::once(head).chain(rows).collect())
}

fn shape(dims: &[u64]) -> String {
    format!("{dims:?}").replace(", ", ",")
}

/// Where one expert lies.
#[derive(Serialize)]
pub struct ExpertReport<'a> {
    /// Within the tree.
    path: String,
    /// Of the file, header and payload.
    bytes: u64,
    header_bytes: u64,
    tensors: Vec<ExpertTensor<'a>>,
}

#[derive(Serialize)]
struct ExpertTensor<'a> {
    name: &'a str,
    gguf_name: &'a str,
    ggml_type: &'static str,
    /// Row-major, in elements.
    shape: Vec<u64>,
    dtype: &'static str,
    /// 0-based.
    part: u32,
    part_path: String,
    /// The first byte within that file.
    offset: u64,
    bytes: u64,
}

impl<'a> ExpertReport<'a> {
    pub fn new(model: &'a Model, file: &TensorFile) -> Self {
        let paths: Vec<&Path> = model.source().paths().collect();
        let tensors = model.layout().tensors(file).map(|tensor| ExpertTensor {
            name: tensor.name,
            gguf_name: tensor.gguf_name,
            ggml_type: tensor.ggml_type.name,
            shape: tensor.shape.dims().to_vec(),
            dtype: Dtype::of(tensor.ggml_type).name(),
            part: tensor.gguf_part,
            part_path: paths[tensor.gguf_part as usize]
                .to_string_lossy()
                .into_owned(),
            offset: tensor.gguf_offset,
            bytes: tensor.bytes,
        });
        Self {
            path: file.kind.path(),
            bytes: file.bytes(),
            header_bytes: file.header_bytes,
            tensors: tensors.collect(),
        }
    }

    pub fn text(&self, screen: &Screen) -> String {
        let head = ["tensor", "type", "shape", "bytes", "offset", "part"].map(str::to_owned);
        let rows = self.tensors.iter().map(|tensor| {
            let part = Path::new(&tensor.part_path);
            let part = part.file_name().unwrap_or_default().to_string_lossy();
            [
                text::name(tensor.name),
                tensor.ggml_type.to_owned(),
                shape(&tensor.shape),
                text::count(tensor.bytes),
                text::count(tensor.offset),
                text::name(&part),
            ]
        });
        let names: Vec<_> = self
            .tensors
            .iter()
            .map(|t| text::name(t.gguf_name))
            .collect();
        format!(
            "{}: {} bytes, of which {} are its header\n{}from {}\n",
            self.path,
            text::count(self.bytes),
            text::count(self.header_bytes),
            screen.table(std::iter::once(head).chain(rows).collect()),
            names.join(", "),
        )
    }
}
