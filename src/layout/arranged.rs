//! Arrays of a model directory whose order is not that of the model.

use std::ops::Range;

use super::directory::{is_side_by_side, of_rows, row_of};
use crate::computed::arranged::{Apart, Transposed};
use crate::form::Shown;
use crate::gguf::ModelHeader;
use crate::hf::{Piece, Rows};
use crate::safetensors::Dtype;

/// How an array of the directory that is not in the order of the model is made.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arranged {
    Apart {
        rows: Stored,
        apart: Apart,
    },
    Transposed {
        /// The second counts only if there are two.
        matrices: [Stored; 2],
        transposed: Transposed,
    },
}

impl Arranged {
    /// What of the model, in the parts' files, holds what a range of the array is made of.
    pub fn needs(&self, range: Range<u64>) -> Vec<(Stored, Range<u64>)> {
        let at = |rows: &Stored, range: Range<u64>| {
            (*rows, rows.offset + range.start..rows.offset + range.end)
        };
        match self {
            Self::Apart { rows, apart } => vec![at(rows, apart.stored(&range))],
            Self::Transposed {
                matrices,
                transposed,
            } => {
                let matrices = matrices[..transposed.matrices as usize].iter();
                let all = matrices.enumerate();
                all.map(|(n, rows)| at(rows, 0..transposed.stored(n)))
                    .collect()
            }
        }
    }
}

/// Where rows of a tensor lie in the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored {
    /// 0-based.
    pub part: u32,
    /// First byte of the first row in the part's file.
    pub offset: u64,
    /// First byte of the tensor in the part's file.
    pub tensor: u64,
    /// Bytes of the tensor.
    pub tensor_bytes: u64,
}

/// How an array of a piece is made; `None` if its rows lie side by side.
pub(super) fn arranged(
    piece: &Piece,
    shown: Shown,
    n: usize,
    model: &ModelHeader,
) -> Option<Arranged> {
    let (tensor, rows) = of_rows(piece, model);
    let codec = shown.codec(n, tensor.info.ggml_type);
    let row = row_of(&rows, model).1;
    let two = match piece {
        Piece::Rows(rows) if is_side_by_side(rows) => return None,
        Piece::Rows(_) => {
            return Some(Arranged::Apart {
                rows: stored(&rows, model),
                apart: Apart {
                    row,
                    step: row * rows.step,
                    count: rows.count,
                    codec,
                },
            });
        }
        Piece::Transposed(one) => [*one, *one],
        Piece::TransposedInTurn(one, other) => [*one, *other],
    };
    let width = match shown {
        Shown::Numbers(float) => Dtype::from(float).width(),
        _ => Dtype::of(tensor.info.ggml_type).width(),
    };
    let transposed = Transposed {
        rows: rows.count,
        columns: rows.columns,
        matrices: piece.rows().count() as u64,
        row: two.map(|rows| row_of(&rows, model).1),
        width,
        codecs: two.map(|rows| {
            let tensor = &model.tensors[rows.tensor as usize];
            shown.codec(n, tensor.info.ggml_type)
        }),
    };
    Some(Arranged::Transposed {
        matrices: two.map(|rows| stored(&rows, model)),
        transposed,
    })
}

fn stored(rows: &Rows, model: &ModelHeader) -> Stored {
    let (tensor, _, offset) = row_of(rows, model);
    Stored {
        part: tensor.part,
        offset,
        tensor: tensor.info.offset,
        tensor_bytes: tensor.info.bytes,
    }
}
