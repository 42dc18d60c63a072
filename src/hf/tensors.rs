//! Which rows of which tensors of the GGUF each tensor of the directory is made of.
//!
//! The problem: a directory has other names, other cuts and other orders than the GGUF, and each of
//! its dialects again others, but the numbers are the same ones.
//!
//! The plan: nearly every difference is a matter of rows. A tensor is a list of [`Piece`]s, and a
//! piece is a progression of [`Rows`] of one tensor of the GGUF, as they lie or transposed. So an
//! expert is a slice of a stack, a half of a fused stack every other slice, and a reordered head two
//! progressions. Experts of one stack differ only in where they begin, so an [`Entry`] stands for all
//! of them.

mod attention;
mod experts;

use std::ops::Range;

use self::attention::{Share, attention_share};
use super::HfError;
use super::architectures::{Architecture, Heads, Row};
use super::facts::{Facts, Found, in_layer};
use super::mlx_lm;
use super::pieces::{Entry, Piece, Rows};
use super::rope;

/// All tensors of a directory.
const MAX_TENSORS: u64 = 1 << 20;
/// All pieces of them; those of the largest Llama are 34,000.
const MAX_PIECES: usize = 1 << 20;

/// The dialect of a directory's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// That of the checkpoint on Hugging Face, which transformers reads: a tensor for each expert.
    Checkpoint,
    /// That of mlx-lm's own checkpoints: experts in stacks.
    Mlx,
}

/// Which file of the directory a tensor lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Embeddings,
    Layer(u64),
    Head,
}

/// The tensors of a directory, and those of the GGUF that it does without.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    /// In the order of the files.
    pub entries: Vec<(Place, Entry)>,
    /// Indices into the tensors of the model, and the reasons.
    pub left_out: Vec<(u32, &'static str)>,
}

const EXPRESSED: &str = "config.json expresses it as rope_scaling";
const DROPPED: &str = "mlx-lm drops the layers that predict further tokens";

/// Lists the tensors of a directory.
pub(super) fn list(
    facts: &Facts,
    architecture: &Architecture,
    naming: Naming,
) -> Result<Tensors, HfError> {
    let mut list = List {
        facts,
        naming,
        tensors: Tensors::default(),
        used: vec![false; facts.model.tensors.len()],
        pieces: 0,
        count: 0,
    };
    list.whole_model(architecture.model_type)?;
    for layer in facts.layer_numbers()? {
        list.layer(layer, architecture, &[])?;
    }
    let extra = facts.extra_layer_numbers()?;
    if !extra.is_empty() && architecture.extra_layer.is_empty() {
        let problem = format!(
            "is {}, but {} has no such layers",
            extra.end - extra.start,
            architecture.model_type
        );
        return Err(facts.keys.wrong("nextn_predict_layers", problem));
    }
    match naming {
        Naming::Mlx => list.leave_out_layers(extra),
        Naming::Checkpoint => {
            for layer in extra {
                list.layer(layer, architecture, architecture.extra_layer)?;
            }
        }
    }
    list.finish()
}

/// Lists tensors, and keeps count of what was used.
struct List<'a> {
    facts: &'a Facts<'a>,
    naming: Naming,
    tensors: Tensors,
    /// By index of the model's tensors.
    used: Vec<bool>,
    pieces: usize,
    count: u64,
}

impl<'a> List<'a> {
    fn whole_model(&mut self, kind: &str) -> Result<(), HfError> {
        self.linear_at(Place::Embeddings, "token_embd", "model.embed_tokens")?;
        self.norm_at(Place::Head, "output_norm", "model.norm")?;
        if self.facts.tensor("output.weight").is_some() {
            self.linear_at(Place::Head, "output", "lm_head")?;
        } else if self.naming == Naming::Mlx && mlx_lm::needs_head(kind) {
            self.linear_at(Place::Head, "token_embd", "lm_head")?;
            let (_, entry) = self.tensors.entries.last_mut().expect("it was just added");
            entry.repeats = true;
        }
        if let Some(found) = self.facts.tensor(rope::FACTORS) {
            self.leave_out(found, EXPRESSED);
        }
        Ok(())
    }

    fn layer(
        &mut self,
        layer: u64,
        architecture: &Architecture,
        extra: &[Row],
    ) -> Result<(), HfError> {
        let kind = match self.facts.is_moe_layer(layer) {
            true => architecture.moe_layer,
            false => architecture.dense_layer,
        };
        for row in architecture.every_layer.iter().chain(kind).chain(extra) {
            self.row(layer, row)?;
        }
        Ok(())
    }

    fn row(&mut self, layer: u64, row: &Row) -> Result<(), HfError> {
        let place = Place::Layer(layer);
        let from = |name: &str| format!("blk.{layer}.{name}");
        let to = |name: &str| format!("model.layers.{layer}.{name}");
        let is_there = |name: &str| self.facts.of_layer(layer, name).is_some();
        match *row {
            Row::Maybe(row) => {
                // What any layer has, config.json says of all of them.
                let name = row.tensor();
                match is_there(&name) || self.facts.first(&name)?.is_some() {
                    true => self.row(layer, row),
                    false => Ok(()),
                }
            }
            Row::Norm(gguf, hf) | Row::WideNorm(gguf, hf) => {
                self.norm_at(place, &from(gguf), &to(hf))
            }
            Row::SingleLine(gguf, hf) => {
                let found = self.needed(&format!("{}.weight", from(gguf)))?;
                let columns = self.vector(found)?;
                let rows = self.all(found, columns);
                self.add(place, &format!("{}.weight", to(hf)), &[1, columns], rows)
            }
            Row::Router(gguf, hf) => {
                self.linear_at(place, &from(gguf), &to(hf))?;
                if let Some((_, entry)) = self.tensors.entries.last_mut() {
                    entry.is_layer = false;
                }
                Ok(())
            }
            Row::Biased(gguf, hf) => {
                if self.facts.of_matrix(layer, gguf, "bias").is_none() {
                    return Err(HfError::MissingTensor(from(&format!("{gguf}.bias"))));
                }
                self.row(layer, &Row::Linear(gguf, hf))
            }
            Row::Linear(gguf, hf) => match attention_share(gguf) {
                Some(share) => self.attention(layer, gguf, share, &to(hf), false),
                None => self.linear_at(place, &from(gguf), &to(hf)),
            },
            Row::Rotary(gguf, hf, heads) => {
                let share = match heads {
                    Heads::Query => Share::Query,
                    Heads::KeyValue => Share::Key,
                };
                self.attention(layer, gguf, share, &to(hf), true)
            }
            Row::Vector(gguf, hf) | Row::Precise(gguf, hf) => {
                let found = self.needed(&from(gguf))?;
                let columns = self.vector(found)?;
                let rows = self.all(found, columns);
                self.add(place, &to(hf), &[columns], rows)?;
                if let (Row::Precise(..), Some((_, entry))) = (row, self.tensors.entries.last_mut())
                {
                    entry.precise = true;
                }
                Ok(())
            }
            Row::Experts(experts) => self.experts(layer, experts),
            Row::KeyValueUp(in_mlx) => self.key_value_up(layer, in_mlx),
        }
    }

    fn norm_at(&mut self, place: Place, gguf: &str, hf: &str) -> Result<(), HfError> {
        let found = self.needed(&format!("{gguf}.weight"))?;
        let columns = self.vector(found)?;
        let rows = self.all(found, columns);
        self.add(place, &format!("{hf}.weight"), &[columns], rows)
    }

    fn linear_at(&mut self, place: Place, gguf: &str, hf: &str) -> Result<(), HfError> {
        let found = self.needed(&format!("{gguf}.weight"))?;
        let [columns, rows] = self.matrix(found)?;
        let all = self.all(found, columns);
        self.add(place, &format!("{hf}.weight"), &[rows, columns], all)?;
        if let Some(bias) = self.facts.tensor(&format!("{gguf}.bias")) {
            let length = self.vector(bias)?;
            let all = self.all(bias, length);
            self.add(place, &format!("{hf}.bias"), &[length], all)?;
        }
        Ok(())
    }

    fn needed(&self, name: &str) -> Result<Found<'a>, HfError> {
        let found = self.facts.tensor(name);
        found.ok_or_else(|| HfError::MissingTensor(name.to_owned()))
    }

    /// Columns and rows of a matrix.
    fn matrix(&self, found: Found) -> Result<[u64; 2], HfError> {
        match found.info.ne {
            [columns, rows, 1, 1] => Ok([columns, rows]),
            _ => Err(found.wrong("a matrix was expected")),
        }
    }

    /// The length of a vector.
    fn vector(&self, found: Found) -> Result<u64, HfError> {
        match found.info.ne {
            [_, 1, 1, 1] if found.info.ggml_type.block_size > 1 => {
                Err(found.wrong("a vector should not be quantised"))
            }
            [length, 1, 1, 1] => Ok(length),
            _ => Err(found.wrong("a vector was expected")),
        }
    }

    /// The whole tensor.
    fn all(&mut self, found: Found, columns: u64) -> Vec<Piece> {
        self.claim(found);
        vec![Piece::Rows(Rows {
            tensor: found.index,
            columns,
            first: 0,
            count: found.rows(),
            step: 1,
        })]
    }

    fn claim(&mut self, found: Found) {
        self.used[found.index as usize] = true;
    }

    fn add(
        &mut self,
        place: Place,
        name: &str,
        shape: &[u64],
        pieces: Vec<Piece>,
    ) -> Result<(), HfError> {
        self.count += 1;
        self.pieces += pieces.len();
        if self.count > MAX_TENSORS || self.pieces > MAX_PIECES {
            return Err(HfError::TooManyTensors(self.count.max(self.pieces as u64)));
        }
        let entry = Entry {
            name: (name.into(), "".into()),
            shape: shape.into(),
            pieces: joined(pieces).into(),
            experts: None,
            precise: false,
            repeats: false,
            is_layer: shape.len() > 1 && name.ends_with(".weight"),
        };
        self.tensors.entries.push((place, entry));
        Ok(())
    }

    fn leave_out(&mut self, found: Found, reason: &'static str) {
        self.claim(found);
        self.tensors.left_out.push((found.index, reason));
    }

    fn leave_out_layers(&mut self, layers: Range<u64>) {
        for (index, tensor) in (0..).zip(&self.facts.model.tensors) {
            let info = &tensor.info;
            if in_layer(&info.name).is_some_and(|(layer, _)| layers.contains(&layer)) {
                self.leave_out(Found { index, info }, DROPPED);
            }
        }
    }

    fn finish(mut self) -> Result<Tensors, HfError> {
        let tensors = self.facts.model.tensors.iter().zip(&self.used);
        let unknown = tensors.filter(|(_, used)| !**used);
        let unknown: Vec<_> = unknown
            .map(|(tensor, _)| tensor.info.name.clone())
            .collect();
        if !unknown.is_empty() {
            return Err(HfError::NoName(unknown));
        }
        if self.count > MAX_TENSORS {
            return Err(HfError::TooManyTensors(self.count));
        }
        self.tensors.entries.sort_by_key(|(place, _)| *place);
        self.tensors.left_out.sort_unstable();
        Ok(self.tensors)
    }
}

/// Joins rows that follow each other.
fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        if let (Some(Piece::Rows(last)), Piece::Rows(next)) = (joined.last_mut(), piece)
            && (last.tensor, last.columns) == (next.tensor, next.columns)
            && (last.step, next.step) == (1, 1)
            && last.first + last.count == next.first
        {
            last.count += next.count;
            continue;
        }
        joined.push(piece);
    }
    joined
}
