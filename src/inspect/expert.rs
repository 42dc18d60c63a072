//! Where one expert lies: the slices of the model that its file is made of.

use std::path::Path;

use serde::Serialize;

use crate::form::Form;
use crate::layout::TensorFile;
use crate::model::Model;
use crate::safetensors::{Array, Dtype};

/// Where one expert lies.
#[derive(Debug, Clone, Serialize)]
pub struct ExpertReport<'a> {
    /// Within the tree.
    pub path: String,
    /// The form of quantised tensors.
    pub form: &'static str,
    /// Of the file, header and payload.
    pub bytes: u64,
    pub header_bytes: u64,
    pub tensors: Vec<ExpertTensor<'a>>,
}

/// One tensor of an expert's file.
#[derive(Debug, Clone, Serialize)]
pub struct ExpertTensor<'a> {
    /// In the file.
    pub name: &'a str,
    /// In the model.
    pub gguf_name: &'a str,
    pub ggml_type: &'static str,
    /// Row-major, in elements.
    pub shape: Vec<u64>,
    /// Of the blocks or numbers in the model.
    pub dtype: &'static str,
    /// What stands for it in the file; absent in the raw form, where it is the tensor itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub arrays: Vec<ArrayReport>,
    /// 0-based.
    pub part: u32,
    pub part_path: String,
    /// The first byte within that file.
    pub offset: u64,
    pub bytes: u64,
}

/// One array of an expert's file, in a form with numbers.
#[derive(Debug, Clone, Serialize)]
pub struct ArrayReport {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<u64>,
    pub bytes: u64,
}

impl From<Array<'_>> for ArrayReport {
    fn from(array: Array<'_>) -> Self {
        Self {
            name: array.name.into_owned(),
            dtype: array.dtype.name(),
            shape: array.shape.dims().to_vec(),
            bytes: array.bytes,
        }
    }
}

impl<'a> ExpertReport<'a> {
    /// Describes one of [`crate::layout::Layout::experts`].
    pub fn new(model: &'a Model, file: &TensorFile) -> Self {
        let paths: Vec<&Path> = model.source().paths().collect();
        let tensors = model.layout().tensors(file).map(|tensor| ExpertTensor {
            name: tensor.name,
            gguf_name: tensor.gguf_name,
            ggml_type: tensor.ggml_type.name,
            shape: tensor.shape.dims().to_vec(),
            dtype: Dtype::of(tensor.ggml_type).name(),
            arrays: match model.layout().form() {
                Form::Raw => Vec::new(),
                _ => tensor.arrays().map(ArrayReport::from).collect(),
            },
            part: tensor.gguf_part,
            part_path: paths[tensor.gguf_part as usize]
                .to_string_lossy()
                .into_owned(),
            offset: tensor.gguf_offset,
            bytes: tensor.bytes,
        });
        Self {
            path: file.kind.path(),
            form: model.layout().form().name(),
            bytes: file.bytes(),
            header_bytes: file.header_bytes,
            tensors: tensors.collect(),
        }
    }
}
