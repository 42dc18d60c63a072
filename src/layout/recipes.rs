//! How the arrays of a tree are computed.

use super::{Layout, MAX_ARRAYS, Recipe};
use crate::codec::Codec;
use crate::computed::{Job, Small};
use crate::tree::RecipeId;

impl Layout {
    /// How an array of the tree is computed.
    pub fn recipe(&self, id: RecipeId) -> Recipe {
        let (piece, n) = (id.0 / MAX_ARRAYS, id.0 % MAX_ARRAYS);
        let tensor = self.view(self.pieces[piece as usize]);
        let codec = tensor.shown.codec(n as usize, tensor.ggml_type);
        Recipe {
            part: tensor.gguf_part,
            offset: tensor.gguf_offset,
            len: tensor.bytes,
            codec: codec.expect("only computed arrays have recipes"),
        }
    }

    /// What the computation of an array needs to know.
    pub(crate) fn job(&self, id: RecipeId) -> Job {
        let (piece, array) = (id.0 / MAX_ARRAYS, (id.0 % MAX_ARRAYS) as usize);
        let tensor = self.view(self.pieces[piece as usize]);
        let codec =
            |n| (n < tensor.shown.arrays()).then(|| tensor.shown.codec(n, tensor.ggml_type))?;
        let bytes = |codec: Codec| {
            let unit = codec.unit();
            tensor.bytes / unit.blocks as u64 * unit.out as u64
        };
        let small = |n| {
            codec(n).map(|codec| Small {
                codec,
                bytes: bytes(codec),
            })
        };
        Job {
            tensor: piece,
            array,
            codec: codec(array).expect("only computed arrays have recipes"),
            largest: codec(0).map_or(0, bytes),
            small: [small(1), small(2)],
        }
    }

    /// Bytes of the model that are read for an array and for no array before it.
    pub(crate) fn source_bytes(&self, id: RecipeId) -> u64 {
        match self.array_of(id) {
            (0, _) => self.recipe(id).len,
            _ => 0,
        }
    }

    /// Which of its tensor's arrays a computed array is, and how many there are.
    pub(super) fn array_of(&self, id: RecipeId) -> (usize, usize) {
        let tensor = self.view(self.pieces[(id.0 / MAX_ARRAYS) as usize]);
        ((id.0 % MAX_ARRAYS) as usize, tensor.shown.arrays())
    }
}
