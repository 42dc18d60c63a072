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

use std::ops::Range;

use super::HfError;
use super::architectures::{Architecture, Experts, Heads, InCheckpoint, InMlx, Row};
use super::facts::{Facts, Found};
use super::rope;
use crate::layout::Matrix;

/// All tensors of a directory.
const MAX_TENSORS: u64 = 1 << 20;
/// All pieces of them; those of the largest Llama are 34,000.
const MAX_PIECES: usize = 1 << 20;
/// Rows of a matrix whose rows are reordered.
const MAX_REORDERED_ROWS: u64 = 1 << 17;
/// Heads of a layer, and experts of a layer: each may be a piece of its own.
const MAX_HEADS: u64 = 1 << 16;
const MAX_EXPERTS: u64 = 1 << 16;

/// The dialect of a directory's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// That of the checkpoint on Hugging Face, which transformers reads: a tensor for each expert.
    Checkpoint,
    /// That of mlx-lm's own checkpoints: experts in stacks.
    Mlx,
}

/// Some rows of a tensor of the GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Index into [`ModelHeader::tensors`](crate::gguf::ModelHeader::tensors).
    pub tensor: u32,
    /// Elements of a row: the tensor's first dimension, or 1 where a vector is taken apart.
    pub columns: u64,
    /// The first row, counted through all dimensions but the first.
    pub first: u64,
    pub count: u64,
    /// From one row to the next; 1 if they lie side by side.
    pub step: u64,
}

/// A run of the elements of a tensor of the directory, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// These rows, as they lie.
    Rows(Rows),
    /// The matrix of these rows, transposed.
    Transposed(Rows),
    /// The matrix of the rows of both in turn, one of the first and one of the second, transposed.
    TransposedInTurn(Rows, Rows),
}

impl Piece {
    /// The rows that it takes.
    pub fn rows(&self) -> impl Iterator<Item = Rows> {
        let (first, second) = match *self {
            Self::Rows(rows) | Self::Transposed(rows) => (rows, None),
            Self::TransposedInTurn(first, second) => (first, Some(second)),
        };
        [first].into_iter().chain(second)
    }

    /// The same piece, so many rows further on.
    fn moved(self, rows: u64) -> Self {
        let by = |mut moved: Rows| {
            moved.first += rows;
            moved
        };
        match self {
            Self::Rows(rows) => Self::Rows(by(rows)),
            Self::Transposed(rows) => Self::Transposed(by(rows)),
            Self::TransposedInTurn(first, second) => Self::TransposedInTurn(by(first), by(second)),
        }
    }
}

/// A tensor of the directory, or one for each expert of a stack.
#[derive(Debug)]
pub(super) struct Entry {
    /// If there are several: before and after the number of the expert.
    name: (Box<str>, Box<str>),
    /// Row-major.
    shape: Box<[u64]>,
    pieces: Box<[Piece]>,
    /// If there are several: how many, and from the rows of one to those of the next.
    experts: Option<(u32, u64)>,
    precise: bool,
    is_layer: bool,
}

/// A tensor of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HfTensor {
    pub name: String,
    /// The logical shape, row-major.
    pub shape: Vec<u64>,
    /// What it is made of, in the order of its elements.
    pub pieces: Vec<Piece>,
    /// Whether it stays in F32 whatever the others become.
    pub precise: bool,
    /// Whether it is the weight of a module that loaders can quantise: a linear layer, an embedding
    /// or a stack of experts.
    pub is_layer: bool,
}

impl Entry {
    /// How many tensors it stands for.
    pub fn count(&self) -> u32 {
        self.experts.map_or(1, |(count, _)| count)
    }

    pub fn tensors(&self) -> impl Iterator<Item = HfTensor> + '_ {
        (0..self.count()).map(move |expert| {
            let (before, after) = &self.name;
            let (name, moved) = match self.experts {
                None => (before.to_string(), 0),
                Some((_, rows)) => (format!("{before}{expert}{after}"), u64::from(expert) * rows),
            };
            HfTensor {
                name,
                shape: self.shape.to_vec(),
                pieces: self.pieces.iter().map(|piece| piece.moved(moved)).collect(),
                precise: self.precise,
                is_layer: self.is_layer,
            }
        })
    }
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
const REPEATED: &str = "it repeats attn_kv_b";

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
    list.whole_model()?;
    for layer in facts.layer_numbers()? {
        list.layer(layer, architecture, &[])?;
    }
    let extra = facts.extra_layer_numbers()?;
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

/// The matrices of a layer's experts that are one of gate, down and up.
enum Stack<'a> {
    /// One after another in a tensor: the first row of the first, and from one to the next.
    Together {
        found: Found<'a>,
        experts: u64,
        first: u64,
        rows: u64,
        stride: u64,
    },
    /// A tensor each.
    Apart(Vec<Found<'a>>),
}

impl<'a> List<'a> {
    fn whole_model(&mut self) -> Result<(), HfError> {
        self.linear_at(Place::Embeddings, "token_embd", "model.embed_tokens")?;
        self.norm_at(Place::Head, "output_norm", "model.norm")?;
        if self.facts.tensor("output.weight").is_some() {
            self.linear_at(Place::Head, "output", "lm_head")?;
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
            self.row(layer, row, true)?;
        }
        Ok(())
    }

    fn row(&mut self, layer: u64, row: &Row, required: bool) -> Result<(), HfError> {
        let place = Place::Layer(layer);
        let from = |name: &str| format!("blk.{layer}.{name}");
        let to = |name: &str| format!("model.layers.{layer}.{name}");
        let is_there = |name: &str| self.facts.of_layer(layer, name).is_some();
        match *row {
            Row::Maybe(row) => self.row(layer, row, false),
            Row::Norm(gguf, _) | Row::SingleLine(gguf, _)
                if !required && !is_there(&format!("{gguf}.weight")) =>
            {
                Ok(())
            }
            Row::Linear(gguf, _) | Row::Router(gguf, _)
                if !required && !is_there(&format!("{gguf}.weight")) =>
            {
                Ok(())
            }
            Row::Vector(gguf, _) | Row::Precise(gguf, _) if !required && !is_there(gguf) => Ok(()),
            Row::Norm(gguf, hf) => self.norm_at(place, &from(gguf), &to(hf)),
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

    /// One of the matrices that queries, keys and values come from, and its bias: a tensor of its
    /// own, or its share of a tensor of all three.
    fn attention(
        &mut self,
        layer: u64,
        gguf: &str,
        share: Share,
        hf: &str,
        reordered: bool,
    ) -> Result<(), HfError> {
        for suffix in ["weight", "bias"] {
            let own = self.facts.of_layer(layer, &format!("{gguf}.{suffix}"));
            let fused = || self.facts.of_layer(layer, &format!("attn_qkv.{suffix}"));
            let Some(found) = own.or_else(fused) else {
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

    fn experts(&mut self, layer: u64, names: Experts) -> Result<(), HfError> {
        let stacks = [Matrix::Gate, Matrix::Down, Matrix::Up];
        let mut found = Vec::with_capacity(stacks.len());
        for matrix in stacks {
            found.push(self.stack(layer, matrix)?);
        }
        let stacks: [Stack; 3] = found.try_into().unwrap_or_else(|_| unreachable!());
        match (self.naming, names.checkpoint) {
            (Naming::Mlx, _) => self.stacked(layer, names.mlx, &stacks),
            (_, InCheckpoint::Each(module, names)) => self.each(layer, module, names, &stacks),
            (_, InCheckpoint::Interleaved(module)) => self.interleaved(layer, module, &stacks),
        }
    }

    /// Finds the experts' matrices of one kind.
    fn stack(&mut self, layer: u64, matrix: Matrix) -> Result<Stack<'a>, HfError> {
        let stated = self.facts.keys.count("expert_count")?;
        let facts = self.facts;
        let word = word(matrix);
        let own = facts.of_layer(layer, &format!("ffn_{word}_exps.weight"));
        let fused = match matrix {
            Matrix::Down => None,
            _ => facts.of_layer(layer, "ffn_gate_up_exps.weight"),
        };
        let Some(found) = own.or(fused) else {
            let single = |expert| format!("blk.{layer}.ffn_{word}.{expert}.weight");
            if facts.tensor(&single(0)).is_none() {
                let name = format!("blk.{layer}.ffn_{word}_exps.weight");
                return Err(HfError::MissingTensor(name));
            }
            let mut singles = Vec::new();
            for expert in 0..stated {
                let found = self.needed(&single(expert))?;
                self.matrix(found)?;
                self.claim(found);
                singles.push(found);
            }
            if let Some(other) = singles.iter().find(|one| one.info.ne != singles[0].info.ne) {
                return Err(other.wrong("the other experts' matrices have another shape"));
            }
            return Ok(Stack::Apart(singles));
        };
        let [_, rows, experts, fourth] = found.info.ne;
        if experts != stated || fourth != 1 {
            let key = facts.keys.full("expert_count");
            return Err(found.wrong(format!("{key} is {stated}")));
        }
        if experts > MAX_EXPERTS {
            return Err(found.wrong("it has more experts than any real model"));
        }
        let (first, own_rows) = match (own, matrix) {
            (Some(_), _) => (0, rows),
            (None, _) if !rows.is_multiple_of(2) => {
                return Err(found.wrong("it should hold as many rows of gate as of up"));
            }
            (None, Matrix::Gate) => (0, rows / 2),
            (None, _) => (rows / 2, rows / 2),
        };
        let interleave = u64::from(found.info.ggml_type.interleave);
        if !own_rows.is_multiple_of(interleave) {
            return Err(found.wrong(format!("its rows are interleaved by {interleave}")));
        }
        self.claim(found);
        Ok(Stack::Together {
            found,
            experts,
            first,
            rows: own_rows,
            stride: rows,
        })
    }

    /// All experts of a layer in one tensor, as mlx-lm has them.
    fn stacked(&mut self, layer: u64, module: &str, stacks: &[Stack; 3]) -> Result<(), HfError> {
        let projections = ["gate_proj", "down_proj", "up_proj"];
        for (stack, projection) in stacks.iter().zip(projections) {
            let [experts, rows, columns] = stack.shape();
            let pieces = stack.pieces().collect();
            let name = format!("model.layers.{layer}.{module}.{projection}.weight");
            let shape = [experts, rows, columns];
            self.add(Place::Layer(layer), &name, &shape, pieces)?;
        }
        for (matrix, projection) in [Matrix::Gate, Matrix::Down, Matrix::Up]
            .into_iter()
            .zip(projections)
        {
            let Some((rows, [experts, length])) = self.expert_bias(layer, matrix)? else {
                continue;
            };
            let name = format!("model.layers.{layer}.{module}.{projection}.bias");
            self.add(Place::Layer(layer), &name, &[experts, length], rows)?;
        }
        Ok(())
    }

    /// A tensor for each expert.
    fn each(
        &mut self,
        layer: u64,
        module: &str,
        names: [&str; 3],
        stacks: &[Stack; 3],
    ) -> Result<(), HfError> {
        for (stack, projection) in stacks.iter().zip(names) {
            let [experts, rows, columns] = stack.shape();
            let before = format!("model.layers.{layer}.{module}.");
            let after = format!(".{projection}.weight");
            let shape = [rows, columns];
            match stack {
                Stack::Together { stride, .. } => {
                    let pieces = stack.pieces().take(1).collect();
                    self.add(Place::Layer(layer), &before, &shape, pieces)?;
                    self.count += experts - 1;
                    let (_, entry) = self.tensors.entries.last_mut().expect("it was just added");
                    entry.name.1 = after.into();
                    entry.is_layer = true;
                    entry.experts = Some((experts as u32, *stride));
                }
                Stack::Apart(_) => {
                    for (expert, piece) in stack.pieces().enumerate() {
                        let name = format!("{before}{expert}{after}");
                        self.add(Place::Layer(layer), &name, &shape, vec![piece])?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Stacks of transposed matrices, the columns of gate and up in turn.
    fn interleaved(
        &mut self,
        layer: u64,
        module: &str,
        stacks: &[Stack; 3],
    ) -> Result<(), HfError> {
        let [gate, down, up] = stacks;
        let ([experts, inner, width], [_, out, _]) = (gate.shape(), down.shape());
        if up.shape() != gate.shape() {
            let name = format!("blk.{layer}.ffn_up_exps.weight");
            return Err(self.needed(&name)?.wrong("gate has another shape"));
        }
        let rows = |piece: Piece| piece.rows().next().expect("a piece has rows");
        let place = Place::Layer(layer);
        let pairs = gate.pieces().zip(up.pieces());
        let pieces = pairs.map(|(gate, up)| Piece::TransposedInTurn(rows(gate), rows(up)));
        let pieces = pieces.collect();
        let name = |projection| format!("model.layers.{layer}.{module}.{projection}");
        let shape = [experts, width, 2 * inner];
        self.add(place, &name("gate_up_proj"), &shape, pieces)?;
        let pieces = down.pieces().map(|piece| Piece::Transposed(rows(piece)));
        let pieces = pieces.collect();
        self.add(place, &name("down_proj"), &[experts, inner, out], pieces)?;

        let bias = |list: &mut Self, matrix| {
            let bias = list.expert_bias(layer, matrix)?;
            let name = format!("blk.{layer}.ffn_{}_exps.bias", word(matrix));
            bias.ok_or(HfError::MissingTensor(name))
        };
        let (gate, [experts, inner]) = bias(self, Matrix::Gate)?;
        let (up, _) = bias(self, Matrix::Up)?;
        let split = |pieces: &[Piece], expert: u64| {
            let mut all = pieces.iter().flat_map(Piece::rows);
            let run = all.next().expect("a piece has rows");
            Rows {
                first: run.first + expert * run.step,
                count: 1,
                ..run
            }
        };
        let pairs = (0..experts)
            .map(|expert| Piece::TransposedInTurn(split(&gate, expert), split(&up, expert)));
        let pieces = pairs.collect();
        let shape = [experts, 2 * inner];
        self.add(place, &name("gate_up_proj_bias"), &shape, pieces)?;
        let (down, [experts, out]) = bias(self, Matrix::Down)?;
        self.add(place, &name("down_proj_bias"), &[experts, out], down)
    }

    /// The biases of all experts of a layer: their rows, and their number and length.
    #[expect(clippy::type_complexity, reason = "it is taken apart at once")]
    fn expert_bias(
        &mut self,
        layer: u64,
        matrix: Matrix,
    ) -> Result<Option<(Vec<Piece>, [u64; 2])>, HfError> {
        let name = format!("ffn_{}_exps.bias", word(matrix));
        let Some(found) = self.facts.of_layer(layer, &name) else {
            return Ok(None);
        };
        let [length, experts, third, fourth] = found.info.ne;
        if experts != self.facts.keys.count("expert_count")? || (third, fourth) != (1, 1) {
            return Err(found.wrong("it should hold one row for each expert"));
        }
        let all = self.all(found, length);
        Ok(Some((all, [experts, length])))
    }

    /// `kv_b_proj`: for each head the rows of keys, then those of values. llama.cpp has keys and
    /// values apart, and the keys of each head transposed; in older files it is whole.
    fn key_value_up(&mut self, layer: u64, in_mlx: InMlx) -> Result<(), HfError> {
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
            let number = info.name.strip_prefix("blk.");
            let number = number.and_then(|rest| rest.split('.').next()?.parse().ok());
            if number.is_some_and(|number| layers.contains(&number)) {
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

impl Stack<'_> {
    /// Experts, rows and columns.
    fn shape(&self) -> [u64; 3] {
        match self {
            Self::Together {
                found,
                experts,
                rows,
                ..
            } => [*experts, *rows, found.info.ne[0]],
            Self::Apart(singles) => {
                let [columns, rows, ..] = singles[0].info.ne;
                [singles.len() as u64, rows, columns]
            }
        }
    }

    /// The matrices, expert by expert.
    fn pieces(&self) -> Box<dyn Iterator<Item = Piece> + '_> {
        let piece = |found: &Found, first, count| {
            Piece::Rows(Rows {
                tensor: found.index,
                columns: found.info.ne[0],
                first,
                count,
                step: 1,
            })
        };
        match *self {
            Self::Together {
                ref found,
                experts,
                first,
                rows,
                stride,
            } => Box::new((0..experts).map(move |e| piece(found, first + e * stride, rows))),
            Self::Apart(ref singles) => {
                Box::new(singles.iter().map(move |one| piece(one, 0, one.info.ne[1])))
            }
        }
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

/// Which of the three matrices of attention.
#[derive(Clone, Copy)]
enum Share {
    Query,
    Key,
    Value,
}

fn attention_share(gguf: &str) -> Option<Share> {
    match gguf {
        "attn_q" => Some(Share::Query),
        "attn_k" => Some(Share::Key),
        "attn_v" => Some(Share::Value),
        _ => None,
    }
}

fn word(matrix: Matrix) -> &'static str {
    match matrix {
        Matrix::Gate => "gate",
        Matrix::Down => "down",
        Matrix::Up => "up",
    }
}
