//! Routed experts: the run of a tensor that holds each matrix of each expert.
//!
//! One expert of a stacked tensor is one contiguous run, since GGML stores the matrices of a tensor
//! without padding and the expert axis is the slowest (`nb[2] = nb[1] * ne[1]`).

use std::collections::BTreeMap;

use super::error::described;
use super::names::{ExpertName, Holds, Matrix};
use super::{LayoutError, View};

use crate::form::Shown;
use crate::gguf::{ModelHeader, OLLAMA_GPT_OSS, Tensor};
use crate::safetensors::Shape;

/// llama.cpp allows 1,024 experts. These limits keep a hostile file from asking for a tree that
/// does not fit into memory.
const MAX_EXPERTS_PER_LAYER: u64 = 1 << 16;
const MAX_EXPERTS: u64 = 1 << 18;

/// The routed experts of one layer.
#[derive(Debug, Default)]
pub(super) struct Layer {
    /// The number of experts in the stacked weights; 0 if there are no such weights.
    pub stacked: u32,
    /// Views of stacks: one run for each of the `stacked` experts.
    pub stacks: Vec<View>,
    /// Tensors of single experts, by expert.
    pub singles: BTreeMap<u32, Vec<View>>,
}

impl Layer {
    /// The numbers of the layer's experts, in order.
    pub fn experts(&self) -> impl Iterator<Item = u32> + '_ {
        let beyond = self
            .singles
            .range(self.stacked..)
            .map(|(&expert, _)| expert);
        (0..self.stacked).chain(beyond)
    }
}

/// Finds the routed experts, by layer, and clears the flags of their tensors in `base`, which has
/// one for each tensor of the model.
pub(super) fn routed_experts(
    model: &ModelHeader,
    base: &mut [bool],
) -> Result<BTreeMap<u32, Layer>, LayoutError> {
    let tensors = &model.tensors[..];
    let mut by_layer: BTreeMap<u32, Vec<(u32, ExpertName)>> = BTreeMap::new();
    for (index, tensor) in tensors.iter().enumerate() {
        if let Some(name) = ExpertName::parse(&tensor.info.name) {
            let named = (index as u32, name);
            by_layer.entry(name.layer).or_default().push(named);
        }
    }
    let sign_of_ollama = sign_of_ollama(model);
    let mut layers = BTreeMap::new();
    let mut total = 0;
    for (number, named) in by_layer {
        let layer = layer(tensors, &named, base)?;
        check_order_of_rows(tensors, &layer, &sign_of_ollama)?;
        let experts = layer.experts().count() as u64;
        total += experts;
        if experts > MAX_EXPERTS_PER_LAYER || total > MAX_EXPERTS {
            return Err(LayoutError::TooManyExperts {
                layer: number,
                experts,
                total,
            });
        }
        if experts > 0 {
            layers.insert(number, layer);
        }
    }
    Ok(layers)
}

fn layer(
    tensors: &[Tensor],
    named: &[(u32, ExpertName)],
    base: &mut [bool],
) -> Result<Layer, LayoutError> {
    let stacked = stacked_experts(tensors, named)?;
    let mut layer = Layer {
        stacked: stacked.unwrap_or(0),
        ..Layer::default()
    };
    for &(index, ref name) in named {
        let tensor = &tensors[index as usize];
        let views = match (name.holds, stacked) {
            (Holds::One { matrix, expert }, _) => {
                base[index as usize] = false;
                let view = View::whole(index, tensor, Some(slot(matrix, name.suffix)));
                layer.singles.entry(expert).or_default().push(view);
                continue;
            }
            // Without stacked weights, the number of experts is unknown.
            (_, None) => continue,
            (Holds::Stack(matrix), Some(count)) => {
                let view = stack(tensor, index, name, matrix, count)?;
                view.into_iter().collect()
            }
            (Holds::FusedStack, Some(count)) => fused_stack(tensor, index, name, count)?,
        };
        base[index as usize] = views.is_empty();
        layer.stacks.extend(views);
    }
    check_sources(tensors, &layer)?;
    Ok(layer)
}

/// The evidence that Ollama wrote a gpt-oss: the architecture, or attention sinks without the
/// suffix `weight` that they have in llama.cpp.
fn sign_of_ollama(model: &ModelHeader) -> Option<String> {
    if model.architecture() == Some(OLLAMA_GPT_OSS) {
        return Some(format!("general.architecture is {OLLAMA_GPT_OSS:?}"));
    }
    let are_sinks = |name: &str| name.starts_with("blk.") && name.ends_with(".attn_sinks");
    let sinks = model
        .tensors
        .iter()
        .find(|tensor| are_sinks(&tensor.info.name))?;
    Some(format!("{:?} has no suffix", sinks.info.name))
}

/// Fails if the gate and up rows of a fused stack alternate: then no expert has a run of either.
fn check_order_of_rows(
    tensors: &[Tensor],
    layer: &Layer,
    sign: &Option<String>,
) -> Result<(), LayoutError> {
    // A fused stack has two views, next to each other.
    let fused = (layer.stacks.windows(2)).find(|pair| pair[0].tensor == pair[1].tensor);
    let (Some([gate, _]), Some(sign)) = (fused, sign) else {
        return Ok(());
    };
    Err(LayoutError::AlternatingRows {
        tensor: described(&tensors[gate.tensor as usize]),
        sign: sign.clone(),
    })
}

/// Fails if two tensors have the same name in the same expert.
fn check_sources(tensors: &[Tensor], layer: &Layer) -> Result<(), LayoutError> {
    let two_sources = |first: &View, second: &View| LayoutError::TwoSources {
        name: first.name.as_deref().unwrap_or_default().to_owned(),
        first: described(&tensors[first.tensor.min(second.tensor) as usize]),
        second: described(&tensors[first.tensor.max(second.tensor) as usize]),
    };
    let sorted = |views: &[View]| -> Result<Vec<View>, LayoutError> {
        let mut views = views.to_vec();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        match views.windows(2).find(|pair| pair[0].name == pair[1].name) {
            Some(pair) => Err(two_sources(&pair[0], &pair[1])),
            None => Ok(views),
        }
    };
    let stacks = sorted(&layer.stacks)?;
    for (&expert, singles) in &layer.singles {
        for single in sorted(singles)? {
            if expert < layer.stacked
                && let Ok(at) = stacks.binary_search_by(|stack| stack.name.cmp(&single.name))
            {
                return Err(two_sources(&single, &stacks[at]));
            }
        }
    }
    Ok(())
}

/// The number of experts of a layer's stacked weights, which must agree.
/// An empty stack counts as none: there is nothing to slice.
fn stacked_experts(
    tensors: &[Tensor],
    named: &[(u32, ExpertName)],
) -> Result<Option<u32>, LayoutError> {
    let mut first: Option<(u32, u32)> = None;
    for &(index, ref name) in named {
        let tensor = &tensors[index as usize];
        let is_stack = !matches!(name.holds, Holds::One { .. });
        if !is_stack || name.suffix != "weight" || tensor.info.bytes == 0 {
            continue;
        }
        if tensor.info.ne[3] != 1 {
            return Err(LayoutError::FourthDimension(described(tensor)));
        }
        let count = tensor.info.ne[2];
        let count = u32::try_from(count).map_err(|_| LayoutError::TooManyExperts {
            layer: name.layer,
            experts: count,
            total: count,
        })?;
        match first {
            None => first = Some((index, count)),
            Some((_, expected)) if expected == count => {}
            Some((other, _)) => {
                return Err(LayoutError::ExpertCounts {
                    first: described(&tensors[other as usize]),
                    second: described(tensor),
                });
            }
        }
    }
    Ok(first.map(|(_, count)| count))
}

fn slot(matrix: Matrix, suffix: &str) -> Box<str> {
    format!("{}.{suffix}", matrix.name()).into()
}

/// The expert axis for a suffix: the third GGUF dimension of a weight, the second of a bias, the
/// first of everything else.
fn expert_axis(suffix: &str) -> usize {
    match suffix {
        "weight" => 2,
        "bias" => 1,
        _ => 0,
    }
}

/// The bytes of one of `count` experts in a stack, if the stack can be cut between experts.
fn expert_bytes(tensor: &Tensor, suffix: &str, count: u32) -> Option<u64> {
    let info = &tensor.info;
    let axis = expert_axis(suffix);
    let sliceable = info.ne[axis] == u64::from(count)
        && info.ne[axis + 1..].iter().all(|&n| n == 1)
        // Within a row, only single elements can be sliced.
        && (axis > 0 || (info.ggml_type.block_size == 1 && info.ggml_type.row_meta == 0));
    sliceable.then(|| info.bytes / u64::from(count))
}

/// Fails unless an expert's slice of a row-interleaved type is whole groups of rows.
fn check_interleave(tensor: &Tensor, rows: u64) -> Result<(), LayoutError> {
    let interleave = tensor.info.ggml_type.interleave;
    if !rows.is_multiple_of(u64::from(interleave)) {
        return Err(LayoutError::Interleave {
            tensor: described(tensor),
            rows,
            interleave,
        });
    }
    Ok(())
}

fn rows_per_expert(tensor: &Tensor, suffix: &str) -> u64 {
    tensor.info.ne[1..expert_axis(suffix).max(1)]
        .iter()
        .product()
}

/// The view of a stack of one matrix; `None` if the tensor does not have one entry per expert and
/// stays in the base.
fn stack(
    tensor: &Tensor,
    index: u32,
    name: &ExpertName,
    matrix: Matrix,
    count: u32,
) -> Result<Option<View>, LayoutError> {
    let Some(bytes) = expert_bytes(tensor, name.suffix, count) else {
        return Ok(None);
    };
    if name.suffix == "weight" && bytes == 0 {
        return Ok(None);
    }
    check_interleave(tensor, rows_per_expert(tensor, name.suffix))?;
    let dims = tensor.info.dims();
    let dims = &dims[..dims.len().min(expert_axis(name.suffix))];
    Ok(Some(View {
        tensor: index,
        name: Some(slot(matrix, name.suffix)),
        shape: Shape::of_dims(dims),
        first: 0,
        bytes,
        stride: bytes,
        shown: Shown::Stored,
    }))
}

/// The two views of a fused stack, gate rows first; none if the tensor stays in the base.
fn fused_stack(
    tensor: &Tensor,
    index: u32,
    name: &ExpertName,
    count: u32,
) -> Result<Vec<View>, LayoutError> {
    let Some(bytes) = expert_bytes(tensor, name.suffix, count) else {
        return Ok(vec![]);
    };
    let info = &tensor.info;
    let mut dims = info.ne;
    let half_dims = match name.suffix {
        "weight" => {
            if bytes == 0 {
                return Ok(vec![]);
            }
            if !info.ne[1].is_multiple_of(2) {
                return Err(LayoutError::OddFusedRows(described(tensor)));
            }
            dims[1] /= 2;
            check_interleave(tensor, dims[1])?;
            &dims[..2]
        }
        // One row per expert, whose first half is the gate's; the middle must be between two
        // blocks.
        "bias" => {
            let two_blocks = 2 * u64::from(info.ggml_type.block_size);
            let halves = info.ne[0].is_multiple_of(two_blocks);
            if !halves || info.ggml_type.row_meta != 0 {
                return Ok(vec![]);
            }
            check_interleave(tensor, 1)?;
            dims[0] /= 2;
            &dims[..1]
        }
        // A single value per expert has no halves.
        _ => return Ok(vec![]),
    };
    let half = |matrix, first| View {
        tensor: index,
        name: Some(slot(matrix, name.suffix)),
        shape: Shape::of_dims(half_dims),
        first,
        bytes: bytes / 2,
        stride: bytes,
        shown: Shown::Stored,
    };
    Ok(vec![half(Matrix::Gate, 0), half(Matrix::Up, bytes / 2)])
}
