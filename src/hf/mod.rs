//! Model directories: a GGUF under the names that transformers and mlx-lm expect.
//!
//! The problem: those programs open a directory of `config.json`, tokenizer files and safetensors
//! files whose tensors have the names and shapes of the original checkpoint. A GGUF has other names,
//! some matrices in another order, and its hyper-parameters under other keys.
//!
//! The plan: a table per architecture (`architectures`) says what becomes what. From it and the
//! model's header, `tensors` lists every tensor of the directory as rows of the GGUF's tensors, and
//! `config` writes config.json. Both are pure: what a tensor becomes is known from its shape.
//! `partition` proves that no row is lost or served twice. Where the bytes of a tensor are not rows
//! as they lie, its pieces say so, and whoever serves them computes them.

mod architectures;
mod config;
mod error;
mod facts;
mod keys;
mod mlx_lm;
mod partition;
mod pieces;
mod rope;
mod shapes;
mod tensors;
mod tokenizer;
mod values;

use std::collections::HashMap;
use std::ops::Range;

use serde_json::{Map, Value as Json};

pub use self::architectures::names as architectures;
pub use self::error::HfError;
use self::facts::Facts;
use self::pieces::Entry;
pub use self::pieces::{HfTensor, Piece, Rows};
pub use self::rope::factors as rope_factors;
pub use self::tensors::Naming;
use self::tensors::Place;
use crate::gguf::{ModelHeader, Value};

/// A file of a directory that holds no tensors: its name and its bytes.
pub type Document = (&'static str, Box<[u8]>);

/// What a directory needs of a model beyond its header.
#[derive(Debug, Default)]
pub struct Inputs {
    /// The numbers of the tensor that [`rope_factors`] names, if there is one.
    pub rope_factors: Option<Vec<f32>>,
    /// The whole values of the keys that [`LONG_KEYS`] lists, where a header does not keep them.
    pub values: HashMap<&'static str, Value>,
}

/// Keys whose values may be too long to be kept in a header, but which a directory needs whole.
pub const LONG_KEYS: [&str; 5] = [
    tokenizer::TOKENS,
    tokenizer::SCORES,
    tokenizer::KINDS,
    tokenizer::MERGES,
    tokenizer::TEMPLATE,
];

impl Inputs {
    /// The whole value of a key, if it is known.
    fn value<'a>(&'a self, model: &'a ModelHeader, key: &str) -> Option<&'a Value> {
        self.values
            .get(key)
            .or_else(|| Some(&model.get(key)?.value))
    }
}

/// A model directory, as far as it does not depend on the form of the tensors.
#[derive(Debug)]
pub struct Directory {
    entries: Vec<Entry>,
    files: Vec<WeightFile>,
    config: Map<String, Json>,
    documents: Vec<Document>,
    left_out: Vec<(u32, &'static str)>,
    warnings: Vec<String>,
}

/// A safetensors file of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightFile {
    pub name: String,
    entries: Range<usize>,
}

impl Directory {
    /// Plans the directory of a model.
    pub fn new(model: &ModelHeader, naming: Naming, inputs: &Inputs) -> Result<Self, HfError> {
        let facts = Facts::new(model, inputs.rope_factors.as_deref())?;
        let architecture = architectures::of(&facts)
            .ok_or_else(|| HfError::Architecture(model.architecture().map(str::to_owned)))?;
        let tensors = tensors::list(&facts, architecture, naming)?;
        shapes::check(&facts, architecture, &tensors)?;
        let mut config = config::of(&facts, architecture)?;
        partition::check(model, &tensors)?;
        let tokenizer = tokenizer::files(model, inputs);
        config.extend(tokenizer.ids);
        let mut warnings = tokenizer.warnings;
        if naming == Naming::Mlx {
            let kind = architecture.model_type;
            warnings.extend(mlx_lm::warnings(&facts, kind, &config)?);
        }
        let unread = facts.keys.unread();
        if !unread.is_empty() {
            let unread = unread.join(", ");
            warnings.push(format!("config.json has no place for {unread}"));
        }
        let places: Vec<Place> = tensors.entries.iter().map(|(place, _)| *place).collect();
        Ok(Self {
            files: files(&places),
            entries: tensors
                .entries
                .into_iter()
                .map(|(_, entry)| entry)
                .collect(),
            config,
            documents: tokenizer.files,
            left_out: tensors.left_out,
            warnings,
        })
    }

    /// The safetensors files: embeddings, then one for each layer, last the final norm and head.
    pub fn files(&self) -> &[WeightFile] {
        &self.files
    }

    /// The tensors of a file.
    pub fn tensors(&self, file: &WeightFile) -> impl Iterator<Item = HfTensor> + '_ {
        self.entries[file.entries.clone()]
            .iter()
            .flat_map(Entry::tensors)
    }

    /// What config.json says, but for the dtype and the quantisation.
    pub fn config(&self) -> &Map<String, Json> {
        &self.config
    }

    /// Tensors of the model that the directory does without, by their index in
    /// [`ModelHeader::tensors`], and why.
    pub fn left_out(&self) -> &[(u32, &'static str)] {
        &self.left_out
    }

    /// The files of the tokenizer, and what else does not depend on the form: names and bytes.
    pub fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// What the directory cannot express.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// The files, given the place of each entry, in order.
fn files(places: &[Place]) -> Vec<WeightFile> {
    let runs: Vec<_> = places.chunk_by(|a, b| a == b).map(<[Place]>::len).collect();
    let count = runs.len();
    let mut end = 0;
    let file = |(number, length): (usize, usize)| {
        let start = end;
        end += length;
        WeightFile {
            name: format!("model-{number:05}-of-{count:05}.safetensors"),
            entries: start..end,
        }
    };
    (1..).zip(runs).map(file).collect()
}
