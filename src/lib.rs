//! Mixture-of-Experts GGUF models as one small safetensors file per expert, without converting
//! them: mounted through FUSE, written as real files, or read in place by a program.
//!
//! The way of the data, each step a module:
//!
//! ```text
//! model.gguf ─> gguf ──────> layout ───────> tree ──┬─> served, fuse, mounts   serve it
//!               what is      what goes       files  ├─> materialize            writes it
//!               in it        where           = extents └─> verify              compares with it
//!               source: the only code that reads model bytes
//! ```
//!
//! `gguf`, `safetensors`, `layout` and `tree` are pure: bytes or values in, values out.
//! [`model::Model`] puts the steps together.
//!
//! As a dependency, leave out the command line: `odmoe-fs = { version = "0.1", default-features = false }`.
//!
//! # Without FUSE
//!
//! Find an expert in a model, and get its matrices without a copy:
//!
//! ```
//! # use odmoe_fs::gguf::{GgmlType, write::Writer};
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("model.gguf");
//! # let mut writer = Writer::new();
//! # for name in ["gate", "down", "up"] {
//! #     let f32_ = GgmlType::from_name("F32").unwrap();
//! #     writer.tensor(&format!("blk.3.ffn_{name}_exps.weight"), &[8, 8, 20], f32_);
//! # }
//! # let header = writer.header();
//! # let mut bytes = header.bytes;
//! # bytes.resize(header.file_bytes as usize, 7);
//! # std::fs::write(&path, bytes)?;
//! use odmoe_fs::model::Model;
//!
//! let model = Model::open(&path)?; // any part of a split set
//! let file = model.layout().expert(3, 17).expect("layer 3 has an expert 17");
//! for tensor in model.layout().tensors(file) {
//!     // SAFETY: nobody changes the model while it is mapped.
//!     let part = unsafe { model.source().map(tensor.gguf_part)? };
//!     let start = tensor.gguf_offset as usize;
//!     let blocks: &[u8] = &part[start..start + tensor.bytes as usize];
//!     println!("{} {} {:?}: {} bytes", tensor.name, tensor.ggml_type, tensor.shape.dims(), blocks.len());
//!     # assert_eq!((tensor.shape.dims(), blocks.len(), blocks[0]), (&[8, 8][..], 256, 7));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Or read the file that the mount would show, header and all:
//!
//! ```no_run
//! # let model = odmoe_fs::model::Model::open("model.gguf".as_ref())?;
//! let file = model.tree().find("experts/layer_03_expert_017.safetensors").unwrap();
//! let bytes: Vec<u8> = model.read(file)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(unsafe_code)]

// Places in files are passed to the kernel as its `off_t`, which must hold them.
#[cfg(not(target_pointer_width = "64"))]
compile_error!("odmoe-fs is for 64-bit machines");

pub mod codec;
mod computed;
pub mod doctor;
mod downloads;
pub mod explain;
pub mod folder;
pub mod form;
pub mod fuse;
pub mod gguf;
pub mod hf;
pub mod host;
pub mod inspect;
pub mod layout;
pub mod materialize;
pub mod model;
pub mod mounts;
mod on_disk;
mod predictor;
pub mod process;
pub mod safetensors;
pub mod served;
pub mod show;
pub mod source;
mod spare;
pub mod stats;
mod sys;
pub mod toy;
pub mod tree;
pub mod units;
pub mod verify;
pub mod work;
