//! What the tensors of a directory are made of: rows of the GGUF's.

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
    pub(super) name: (Box<str>, Box<str>),
    /// Row-major.
    pub(super) shape: Box<[u64]>,
    pub(super) pieces: Box<[Piece]>,
    /// If there are several: how many, and from the rows of one to those of the next.
    pub(super) experts: Option<(u32, u64)>,
    pub(super) precise: bool,
    pub(super) is_layer: bool,
    /// Whether another tensor has the same rows: a head that is tied to the embeddings.
    pub(super) repeats: bool,
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
