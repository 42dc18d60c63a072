//! The matrices of attention: heads in the order of the directory.

use super::{List, Naming, Place};
use crate::hf::HfError;
use crate::hf::architectures::InMlx;
use crate::hf::facts::Found;
use crate::hf::pieces::{Piece, Rows};

/// Rows of a matrix whose rows are reordered.
const MAX_REORDERED_ROWS: u64 = 1 << 17;
/// Heads of a layer: each may be a piece of its own.
const MAX_HEADS: u64 = 1 << 16;
const REPEATED: &str = "it repeats attn_kv_b";

impl<'a> List<'a> {
    /// One of the matrices that queries, keys and values come from, and its bias: a tensor of its
    /// own, or its share of a tensor of all three.
    pub(super) fn attention(
        &mut self,
        layer: u64,
        gguf: &str,
        share: Share,
        hf: &str,
        reordered: bool,
    ) -> Result<(), HfError> {
        for suffix in ["weight", "bias"] {
            let own = self.facts.of_layer(layer, &format!("{gguf}.{suffix}"));
            let Some(found) = self.facts.of_matrix(layer, gguf, suffix) else {
                if suffix == "weight" {
                    return Err(HfError::MissingTensor(format!("blk.{layer}.{gguf}.weight")));
                }
                continue;
            };
            let is_matrix = suffix == "weight";
            let [columns, rows] = match is_matrix {
                true => self.matrix(found)?,
                false => [1, self.vector(found)?],
            };
            let (first, count, heads) = if own.is_some() && !reordered {
                (0, rows, 0) // nothing has to be known of heads
            } else {
                let width = self.facts.head_width()?;
                let queries = self.facts.query_heads()? * width;
                let keys = self.facts.key_value_head_count()? * width;
                let (first, count) = match share {
                    Share::Query => (0, queries),
                    Share::Key => (queries, keys),
                    Share::Value => (queries + keys, keys),
                };
                let (first, whole) = match own {
                    Some(_) => (0, count),
                    None => (first, queries + 2 * keys),
                };
                if whole != rows {
                    return Err(found.wrong(format!("its heads would take {whole} rows")));
                }
                (first, count, count / width)
            };
            let run = |first, count, step| {
                Piece::Rows(Rows {
                    tensor: found.index,
                    columns,
                    first,
                    count,
                    step,
                })
            };
            let pieces = if reordered {
                self.check_reordering(found, count, heads)?;
                let half = count / heads / 2;
                let starts = (0..heads).map(|head| first + head * 2 * half);
                // Even rows are a head's first half, odd ones its second.
                starts
                    .flat_map(|start| [run(start, half, 2), run(start + 1, half, 2)])
                    .collect()
            } else {
                vec![run(first, count, 1)]
            };
            let shape = match is_matrix {
                true => vec![count, columns],
                false => vec![count],
            };
            self.claim(found);
            self.add(
                Place::Layer(layer),
                &format!("{hf}.{suffix}"),
                &shape,
                pieces,
            )?;
        }
        Ok(())
    }

    fn check_reordering(&self, found: Found, rows: u64, heads: u64) -> Result<(), HfError> {
        let problem = if found.info.ggml_type.interleave > 1 {
            "its rows are interleaved, so they cannot be put into another order".to_owned()
        } else if rows > MAX_REORDERED_ROWS {
            "it has more rows than any real model".to_owned()
        } else if heads == 0 || !rows.is_multiple_of(2 * heads) {
            format!("its heads, {heads}, have an odd number of rows")
        } else {
            return Ok(());
        };
        Err(found.wrong(problem))
    }

    /// `kv_b_proj`: for each head the rows of keys, then those of values. llama.cpp has keys and
    /// values apart, and the keys of each head transposed; in older files it is whole.
    pub(super) fn key_value_up(&mut self, layer: u64, in_mlx: InMlx) -> Result<(), HfError> {
        let facts = self.facts;
        let heads = facts.query_heads()?;
        let rank = facts.keys.count("attention.kv_lora_rank")?;
        let (keys, values) = (facts.plain_head_width()?, facts.value_head_width()?);
        if heads > MAX_HEADS {
            return Err(facts.keys.wrong("attention.head_count", "is too large"));
        }
        let place = Place::Layer(layer);
        let is_split = in_mlx == InMlx::Split && self.naming == Naming::Mlx;
        let name = |projection| format!("model.layers.{layer}.self_attn.{projection}.weight");
        let run = |found: Found, first, count| Rows {
            tensor: found.index,
            columns: found.info.ne[0],
            first,
            count,
            step: 1,
        };
        let check = |found: Found<'a>, columns, rows: Option<u64>| match found.info.ne[0] == columns
            && Some(found.rows()) == rows
        {
            true => Ok(found),
            false => Err(found.wrong(format!(
                "{heads} heads of {keys} and {values} and a rank of {rank} need another shape"
            ))),
        };
        let parts = ["attn_k_b", "attn_v_b"].map(|n| facts.of_layer(layer, &format!("{n}.weight")));
        let (of_keys, of_values): (Vec<Piece>, Vec<Piece>);
        if let Some(whole) = facts.of_layer(layer, "attn_kv_b.weight") {
            for part in parts.into_iter().flatten() {
                self.leave_out(part, REPEATED);
            }
            let head = keys + values;
            let whole = check(whole, rank, heads.checked_mul(head))?;
            self.claim(whole);
            if !is_split {
                let all = vec![Piece::Rows(run(whole, 0, heads * head))];
                return self.add(place, &name("kv_b_proj"), &[heads * head, rank], all);
            }
            of_keys = (0..heads)
                .map(|h| Piece::Transposed(run(whole, h * head, keys)))
                .collect();
            of_values = (0..heads)
                .map(|h| Piece::Rows(run(whole, h * head + keys, values)))
                .collect();
        } else {
            let [Some(k), Some(v)] = parts else {
                let name = format!("blk.{layer}.attn_k_b.weight");
                return Err(HfError::MissingTensor(name));
            };
            let k = check(k, keys, heads.checked_mul(rank))?;
            let v = check(v, rank, heads.checked_mul(values))?;
            self.claim(k);
            self.claim(v);
            if !is_split {
                let head = |h| {
                    [
                        Piece::Transposed(run(k, h * rank, rank)),
                        Piece::Rows(run(v, h * values, values)),
                    ]
                };
                let pieces = (0..heads).flat_map(head).collect();
                let shape = [heads * (keys + values), rank];
                return self.add(place, &name("kv_b_proj"), &shape, pieces);
            }
            of_keys = vec![Piece::Rows(run(k, 0, heads * rank))];
            of_values = vec![Piece::Rows(run(v, 0, heads * values))];
        }
        self.add(place, &name("embed_q"), &[heads, rank, keys], of_keys)?;
        self.add(
            place,
            &name("unembed_out"),
            &[heads, values, rank],
            of_values,
        )
    }
}

/// Which of the three matrices of attention.
#[derive(Clone, Copy)]
pub(super) enum Share {
    Query,
    Key,
    Value,
}

pub(super) fn attention_share(gguf: &str) -> Option<Share> {
    match gguf {
        "attn_q" => Some(Share::Query),
        "attn_k" => Some(Share::Key),
        "attn_v" => Some(Share::Value),
        _ => None,
    }
}
