//! The matrices of experts, from stacks or from tensors of their own.

use super::{List, Naming, Place};
use crate::hf::HfError;
use crate::hf::architectures::{Experts, InCheckpoint};
use crate::hf::facts::Found;
use crate::hf::pieces::{Piece, Rows};
use crate::layout::Matrix;

/// Experts of a layer: each may be a piece of its own.
const MAX_EXPERTS: u64 = 1 << 16;

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
    pub(super) fn experts(&mut self, layer: u64, names: Experts) -> Result<(), HfError> {
        let stacks = [Matrix::Gate, Matrix::Down, Matrix::Up];
        let mut found = Vec::with_capacity(stacks.len());
        for matrix in stacks {
            found.push(self.stack(layer, matrix)?);
        }
        let stacks: [Stack; 3] = found.try_into().unwrap_or_else(|_| unreachable!());
        match (self.naming, names.checkpoint) {
            (Naming::Mlx, _) => self.stacked(layer, names, &stacks),
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
    fn stacked(&mut self, layer: u64, names: Experts, stacks: &[Stack; 3]) -> Result<(), HfError> {
        let module = names.mlx;
        let projections = ["gate_proj", "down_proj", "up_proj"];
        for (stack, projection) in stacks.iter().zip(projections) {
            let [experts, rows, columns] = stack.shape();
            let pieces = stack.pieces().collect();
            let name = format!("model.layers.{layer}.{module}.{projection}.weight");
            let shape = [experts, rows, columns];
            self.add(Place::Layer(layer), &name, &shape, pieces)?;
        }
        if !names.are_biased() {
            return Ok(());
        }
        let matrices = [Matrix::Gate, Matrix::Down, Matrix::Up];
        for (matrix, projection) in matrices.into_iter().zip(projections) {
            let (rows, [experts, length]) = self.expert_bias(layer, matrix)?;
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

        let (gate, [experts, inner]) = self.expert_bias(layer, Matrix::Gate)?;
        let (up, _) = self.expert_bias(layer, Matrix::Up)?;
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
        let (down, [experts, out]) = self.expert_bias(layer, Matrix::Down)?;
        self.add(place, &name("down_proj_bias"), &[experts, out], down)
    }

    /// The biases of all experts of a layer: their rows, and their number and length.
    fn expert_bias(
        &mut self,
        layer: u64,
        matrix: Matrix,
    ) -> Result<(Vec<Piece>, [u64; 2]), HfError> {
        let found = self.needed(&format!("blk.{layer}.ffn_{}_exps.bias", word(matrix)))?;
        let [length, experts, third, fourth] = found.info.ne;
        if experts != self.facts.keys.count("expert_count")? || (third, fourth) != (1, 1) {
            return Err(found.wrong("it should hold one row for each expert"));
        }
        let all = self.all(found, length);
        Ok((all, [experts, length]))
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

fn word(matrix: Matrix) -> &'static str {
    match matrix {
        Matrix::Gate => "gate",
        Matrix::Down => "down",
        Matrix::Up => "up",
    }
}
