//! The shapes and biases that config.json implies, and whether the model has them.
//!
//! Loaders make a model from config.json alone, all layers of a kind alike. A tensor of another
//! shape, or a bias that the class lacks, would fail there or be passed over, so it is an error
//! here.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use serde_json::Value as Json;

use super::HfError;
use super::architectures::Architecture;
use super::facts::{Facts, Found, in_layer};
use super::tensors::Tensors;
use super::values;

type Result<T> = std::result::Result<T, HfError>;

/// Checks every tensor that the directory does not leave out.
pub(super) fn check(facts: &Facts, architecture: &Architecture, tensors: &Tensors) -> Result<()> {
    let mut known = HashMap::new();
    let mut left_out = tensors.left_out.iter().map(|(index, _)| *index).peekable();
    for (index, tensor) in (0..).zip(&facts.model.tensors) {
        if left_out.next_if_eq(&index).is_some() {
            continue;
        }
        let info = &tensor.info;
        let found = Found { index, info };
        let (module, is_bias) = module(&info.name);
        if is_bias && !architecture.has_bias(module) {
            return Err(found.wrong(format!("{} has no such bias", architecture.class)));
        }
        let shape = match known.entry(module) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(shape(facts, architecture, module)?),
        };
        if let Some(shape) = shape {
            fits(facts, found, &shape[usize::from(is_bias)..])?;
        }
    }
    Ok(())
}

/// A tensor's name without its layer, the number of its expert and its suffix, and whether it is a
/// bias.
fn module(name: &str) -> (&str, bool) {
    let name = in_layer(name).map_or(name, |(_, name)| name);
    let (module, suffix) = name.rsplit_once('.').unwrap_or((name, ""));
    let module = match module.split_once('.') {
        Some(("ffn_gate", _)) => "ffn_gate_exps",
        Some(("ffn_up", _)) => "ffn_up_exps",
        Some(("ffn_down", _)) => "ffn_down_exps",
        _ => module,
    };
    (module, suffix == "bias" && module != "exp_probs_b")
}

/// The first dimensions of a tensor; the length of a bias is the number of rows.
fn fits(facts: &Facts, found: Found, shape: &[Size]) -> Result<()> {
    let dimensions = found.info.ne.iter().zip(shape);
    let mut wrong = dimensions.filter(|(length, size)| **length != size.length);
    let Some((_, wrong)) = wrong.next() else {
        return Ok(());
    };
    let lengths: Vec<_> = shape.iter().map(|size| size.length).collect();
    let stated = wrong.keys.iter().filter_map(|key| {
        let value = facts.keys.number(key).ok().flatten()?;
        Some(format!("{} is {value}", facts.keys.full(key)))
    });
    let stated: Vec<_> = stated.collect();
    let since = match stated.is_empty() {
        true => "as in other layers".to_owned(),
        false => format!("since {}", stated.join(" and ")),
    };
    Err(found.wrong(format!("it should be {lengths:?}, {since}")))
}

/// The length of a dimension, and the keys that may say so.
struct Size {
    length: u64,
    keys: Vec<&'static str>,
}

impl Size {
    fn twice(self) -> Self {
        let length = 2 * self.length;
        Self { length, ..self }
    }

    fn and(mut self, other: Self) -> Self {
        self.length += other.length;
        self.keys.extend(other.keys);
        self
    }
}

/// Columns and rows of the matrix of a module; of a vector, its length and 1. `None` where nothing
/// is left to check.
fn shape(facts: &Facts, architecture: &Architecture, module: &str) -> Result<Option<[Size; 2]>> {
    let size = |length, keys: &[_]| Size {
        length,
        keys: keys.to_vec(),
    };
    let count = |key| Ok(size(facts.keys.count(key)?, &[key]));
    let value = |found: fn(&Facts) -> Result<Json>, keys: &[_]| {
        Ok(size(found(facts)?.as_u64().unwrap_or(0), keys))
    };
    let hidden = || count("embedding_length");
    let heads = || count("attention.head_count");
    let rank = || count("attention.kv_lora_rank");
    let rotary = || count("rope.dimension_count");
    let experts = || count("expert_count");
    let vocabulary = || value(values::vocabulary, &[]);
    let query_rank = || value(values::query_rank, &["attention.q_lora_rank"]);
    let dense = || value(values::dense_width, &["feed_forward_length"]);
    let width = || {
        let keys = ["expert_feed_forward_length", "feed_forward_length"];
        value(
            values::expert_width,
            &keys[..1 + usize::from(!facts.keys.has(keys[0]))],
        )
    };
    let shared = || {
        let keys = ["expert_shared_feed_forward_length", "expert_shared_count"];
        value(values::shared_width, &keys)
    };
    let has_latent = facts.has_latent_attention();
    let head = || match has_latent {
        true => Ok(size(facts.plain_head_width()?, &["attention.key_length_mla"]).and(rotary()?)),
        false => Ok(size(facts.head_width()?, &["attention.key_length"])),
    };
    let value_head = || match has_latent {
        true => Ok(size(
            facts.value_head_width()?,
            &["attention.value_length_mla"],
        )),
        false => head(),
    };
    let all = |heads: Size, head: Size| {
        let length = heads.length * head.length;
        Size {
            length,
            ..heads.and(head)
        }
    };
    let queries = || Ok(all(heads()?, head()?));
    let keys = || {
        let heads = size(facts.key_value_head_count()?, &["attention.head_count_kv"]);
        Ok(all(heads, head()?))
    };
    let one = || size(1, &[]);
    Ok(Some(match module {
        "token_embd" | "output" | "nextn.embed_tokens" | "nextn.shared_head_head" => {
            [hidden()?, vocabulary()?]
        }
        "output_norm"
        | "attn_norm"
        | "ffn_norm"
        | "post_attention_norm"
        | "nextn.enorm"
        | "nextn.hnorm"
        | "nextn.shared_head_norm"
        | "ffn_gate_inp_shexp" => [hidden()?, one()],
        "nextn.eh_proj" => [hidden()?.twice(), hidden()?],
        "attn_q" => [hidden()?, queries()?],
        "attn_k" | "attn_v" => [hidden()?, keys()?],
        "attn_qkv" => [hidden()?, queries()?.and(keys()?.twice())],
        "attn_output" => [all(heads()?, value_head()?), hidden()?],
        "attn_q_norm" if architecture.has_wide_norms() => [queries()?, one()],
        "attn_k_norm" if architecture.has_wide_norms() => [keys()?, one()],
        "attn_q_norm" | "attn_k_norm" => [head()?, one()],
        "attn_sinks" => [heads()?, one()],
        "attn_q_a" => [hidden()?, query_rank()?],
        "attn_q_a_norm" => [query_rank()?, one()],
        "attn_q_b" => [query_rank()?, queries()?],
        "attn_kv_a_mqa" => [hidden()?, rank()?.and(rotary()?)],
        "attn_kv_a_norm" => [rank()?, one()],
        "ffn_gate" | "ffn_up" => [hidden()?, dense()?],
        "ffn_down" => [dense()?, hidden()?],
        "ffn_gate_inp" => [hidden()?, experts()?],
        "exp_probs_b" => [experts()?, one()],
        "ffn_gate_exps" | "ffn_up_exps" => [hidden()?, width()?],
        "ffn_gate_up_exps" => [hidden()?, width()?.twice()],
        "ffn_down_exps" => [width()?, hidden()?],
        "ffn_gate_shexp" | "ffn_up_shexp" => [hidden()?, shared()?],
        "ffn_down_shexp" => [shared()?, hidden()?],
        _ => return Ok(None),
    }))
}
