//! What `metadata.json` says of the form of a tree.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Layout;
use super::documents::Map;
use crate::codec::Mlx;
use crate::form::{Form, Shown};
use crate::safetensors::Dtype;

/// The form of quantised tensors, unless it is raw.
#[derive(Serialize)]
pub(super) struct FormReport<'a> {
    form: &'static str,
    #[serde(flatten)]
    mlx: Option<MlxReport<'a>>,
}

/// What `mx.quantized_matmul` needs to know.
#[derive(Serialize)]
struct MlxReport<'a> {
    /// The dtype of scales and biases in affine mode, and of what is not packed.
    scales: &'static str,
    /// Whether types without an exact map were quantised anew.
    requant: bool,
    /// By name in the model, of each tensor that is packed.
    quantization: Map<Vec<(&'a str, Quantization)>>,
}

#[derive(Serialize)]
struct Quantization {
    mode: &'static str,
    bits: u32,
    group_size: u32,
}

impl<'a> FormReport<'a> {
    /// `None` for a raw tree, whose documents say nothing of forms.
    pub(super) fn of(layout: &'a Layout) -> Option<Self> {
        let mlx = match layout.form {
            Form::Raw => return None,
            Form::Numbers(_) => None,
            Form::Mlx { scales, requant } => Some(MlxReport {
                scales: Dtype::from(scales).name(),
                requant,
                quantization: Map(quantized(layout)),
            }),
        };
        Some(Self {
            form: layout.form.name(),
            mlx,
        })
    }
}

/// The tensors of the model that are shown packed; all views of one are shown alike.
fn quantized(layout: &Layout) -> Vec<(&str, Quantization)> {
    let packed = layout.views.iter().filter_map(|view| match view.shown {
        Shown::Mlx { mlx, .. } => Some((view.tensor, mlx)),
        _ => None,
    });
    let packed: BTreeMap<u32, Mlx> = packed.collect();
    let entry = |(tensor, mlx): (u32, Mlx)| {
        let name = layout.model.tensors[tensor as usize].info.name.as_str();
        let quantization = Quantization {
            mode: mlx.mode.name(),
            bits: mlx.bits,
            group_size: mlx.group_size,
        };
        (name, quantization)
    };
    packed.into_iter().map(entry).collect()
}
