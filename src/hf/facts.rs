//! What config.json must say of a model, from its keys and the shapes of its tensors.
//!
//! What no key says, the shape of a tensor does. `shapes` then compares all of them.

use std::collections::HashMap;
use std::ops::Range;

use super::HfError;
use super::keys::Keys;
use crate::gguf::{ModelHeader, TensorInfo};

/// `expert_gating_func`, as llama.cpp numbers it.
pub(super) const SOFTMAX: u64 = 1;
pub(super) const SIGMOID: u64 = 2;

/// A model as its table sees it.
pub(super) struct Facts<'a> {
    pub model: &'a ModelHeader,
    pub keys: Keys<'a>,
    /// The numbers of `rope_freqs.weight`, if there is such a tensor and they were read.
    pub rope_factors: Option<&'a [f32]>,
    by_name: HashMap<&'a str, u32>,
    /// The first layer that has a tensor, by its name there.
    first_layers: HashMap<&'a str, u64>,
}

/// A tensor and its place in [`ModelHeader::tensors`].
#[derive(Clone, Copy)]
pub(super) struct Found<'a> {
    pub index: u32,
    pub info: &'a TensorInfo,
}

impl Found<'_> {
    /// Rows in all dimensions together.
    pub fn rows(&self) -> u64 {
        self.info.ne[1..].iter().product()
    }

    pub fn wrong(&self, problem: impl Into<String>) -> HfError {
        HfError::Tensor {
            name: self.info.name.clone(),
            dims: self.info.dims().to_vec(),
            ggml_type: self.info.ggml_type,
            problem: problem.into(),
        }
    }
}

/// The layer of a tensor, and its name there.
pub(super) fn in_layer(name: &str) -> Option<(u64, &str)> {
    let (layer, name) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, name))
}

impl<'a> Facts<'a> {
    pub fn new(model: &'a ModelHeader, rope_factors: Option<&'a [f32]>) -> Result<Self, HfError> {
        let architecture = model.architecture().ok_or(HfError::Architecture(None))?;
        let names = model.tensors.iter().map(|tensor| tensor.info.name.as_str());
        let mut first_layers = HashMap::new();
        for name in names.clone() {
            if let Some((layer, name)) = in_layer(name) {
                let first = first_layers.entry(name).or_insert(layer);
                *first = layer.min(*first);
            }
        }
        Ok(Self {
            model,
            keys: Keys::new(model, architecture),
            rope_factors,
            by_name: names.zip(0..).collect(),
            first_layers,
        })
    }

    /// The tensor of exactly this name.
    pub fn tensor(&self, name: &str) -> Option<Found<'a>> {
        let index = *self.by_name.get(name)?;
        let info = &self.model.tensors[index as usize].info;
        Some(Found { index, info })
    }

    /// A tensor of a layer, with its suffix.
    pub fn of_layer(&self, layer: u64, name: &str) -> Option<Found<'a>> {
        self.tensor(&format!("blk.{layer}.{name}"))
    }

    /// The weight or bias of a matrix of a layer; of queries, keys and values, it may be that of
    /// all three.
    pub fn of_matrix(&self, layer: u64, name: &str, suffix: &str) -> Option<Found<'a>> {
        let own = self.of_layer(layer, &format!("{name}.{suffix}"));
        own.or_else(|| match name {
            "attn_q" | "attn_k" | "attn_v" => self.of_layer(layer, &format!("attn_qkv.{suffix}")),
            _ => None,
        })
    }

    pub fn layer_count(&self) -> Result<u64, HfError> {
        let blocks = self.keys.count("block_count")?;
        let extra = self.stated_extra_layers()?;
        blocks
            .checked_sub(extra)
            .filter(|&layers| layers > 0)
            .ok_or_else(|| {
                let problem = format!("is {extra}, but there are only {blocks} layers");
                self.keys.wrong("nextn_predict_layers", problem)
            })
    }

    /// The layers of the model itself.
    pub fn layer_numbers(&self) -> Result<Range<u64>, HfError> {
        Ok(0..self.layer_count()?)
    }

    /// Layers after those, which predict further tokens, as far as the file holds them.
    pub fn extra_layer_numbers(&self) -> Result<Range<u64>, HfError> {
        let first = self.layer_count()?;
        let stated = self.stated_extra_layers()?;
        let is_there = |layer: &u64| self.of_layer(*layer, "attn_norm.weight").is_some();
        let found = (first..first + stated).take_while(is_there);
        Ok(first..first + found.count() as u64)
    }

    fn stated_extra_layers(&self) -> Result<u64, HfError> {
        Ok(self.keys.number("nextn_predict_layers")?.unwrap_or(0))
    }

    pub fn is_moe_layer(&self, layer: u64) -> bool {
        self.of_layer(layer, "ffn_gate_inp.weight").is_some()
    }

    /// By its tensors, so that a wrong count of experts is found later, and named.
    pub fn has_experts(&self) -> bool {
        let names = self.model.tensors.iter().map(|tensor| &tensor.info.name);
        names
            .into_iter()
            .any(|name| name.ends_with(".ffn_gate_inp.weight"))
    }

    pub fn has_latent_attention(&self) -> bool {
        self.keys.has("attention.kv_lora_rank")
    }

    /// Whether experts are chosen by sigmoids, which tells V3 from V2.
    pub fn scores_by_sigmoid(&self) -> bool {
        match self.keys.number("expert_gating_func").ok().flatten() {
            Some(function) => function == SIGMOID,
            // Files of before 2025 do not say, but V2 has no such tensor.
            None => {
                let names = self.model.tensors.iter();
                names
                    .map(|t| &t.info.name)
                    .any(|name| name.ends_with(".exp_probs_b.bias"))
            }
        }
    }

    pub fn query_heads(&self) -> Result<u64, HfError> {
        self.keys.count("attention.head_count")
    }

    pub fn key_value_head_count(&self) -> Result<u64, HfError> {
        let heads = self.query_heads()?;
        let stated = self.keys.number("attention.head_count_kv")?;
        if self.has_latent_attention() {
            // llama.cpp counts the latent vector as the one head, which it is in its arithmetic.
            return Ok(heads);
        }
        match stated.unwrap_or(heads) {
            0 => Err(self.keys.wrong("attention.head_count_kv", "is 0")),
            count if !heads.is_multiple_of(count) => {
                let problem = format!("is {count}, which does not divide {heads} heads");
                Err(self.keys.wrong("attention.head_count_kv", problem))
            }
            count => Ok(count),
        }
    }

    pub fn head_width(&self) -> Result<u64, HfError> {
        let (hidden, heads) = (self.keys.count("embedding_length")?, self.query_heads()?);
        let width = match self.keys.number("attention.key_length")? {
            Some(width) => width,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let problem = format!("is {heads}, which does not divide a width of {hidden}");
                return Err(self.keys.wrong("attention.head_count", problem));
            }
        };
        if width == 0 {
            return Err(self.keys.wrong("attention.key_length", "is 0"));
        }
        match self.keys.number("attention.value_length")? {
            Some(values) if values != width => {
                let keys = self.keys.full("attention.key_length");
                let problem = format!("is {values}, but {keys} is {width}");
                Err(self.keys.wrong("attention.value_length", problem))
            }
            _ => Ok(width),
        }
    }

    /// The width of the part of each head that has no positions (MLA).
    pub fn plain_head_width(&self) -> Result<u64, HfError> {
        let rotary = self.keys.count("rope.dimension_count")?;
        let stated = self.keys.number("attention.key_length_mla")?;
        let old = self.keys.number("attention.key_length")?;
        if let (None, Some(keys)) = (stated, self.of_layer(0, "attn_k_b.weight")) {
            return Ok(keys.info.ne[0]);
        }
        let whole = stated.or(old);
        let whole = whole.ok_or_else(|| self.missing("attention.key_length_mla"))?;
        whole
            .checked_sub(rotary)
            .filter(|&width| width > 0)
            .ok_or_else(|| {
                let problem = format!("is {whole}, but {rotary} of that have positions");
                self.keys.wrong("attention.key_length_mla", problem)
            })
    }

    pub fn value_head_width(&self) -> Result<u64, HfError> {
        let stated = self.keys.number("attention.value_length_mla")?;
        let old = self.keys.number("attention.value_length")?;
        let width = match (stated, self.of_layer(0, "attn_v_b.weight")) {
            (None, Some(values)) => Some(values.rows() / self.query_heads()?),
            (stated, _) => stated.or(old),
        };
        match width {
            None => Err(self.missing("attention.value_length_mla")),
            Some(0) => Err(self.keys.wrong("attention.value_length_mla", "is 0")),
            Some(width) => Ok(width),
        }
    }

    pub fn missing(&self, name: &str) -> HfError {
        HfError::MissingKey(self.keys.full(name))
    }

    /// A number that a key states, or else the shape of a tensor.
    pub fn stated_or(&self, key: &str, found: Option<Found>, axis: usize) -> Result<u64, HfError> {
        match (self.keys.number(key)?, found) {
            (None, Some(found)) => Ok(found.info.ne[axis]),
            _ => self.keys.count(key),
        }
    }

    /// The first layer's tensor of this name.
    pub fn first(&self, name: &str) -> Result<Option<Found<'a>>, HfError> {
        let layers = self.layer_numbers()?;
        let first = self.first_layers.get(name);
        let first = first.filter(|layer| layers.contains(layer));
        Ok(first.and_then(|&layer| self.of_layer(layer, name)))
    }
}
