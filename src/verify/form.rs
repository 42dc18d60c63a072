//! The form of a tree on disk, as the tree itself gives it.
//!
//! `metadata.json` names it. If that is lost or damaged, the headers of files do: then the tree is
//! compared in the right form all the same, and only what is damaged differs.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::listing::open_root;
use super::{VerifyError, header};
use crate::codec::{Float, Map, Mlx};
use crate::folder::{Entry, Folder};
use crate::form::Form;
use crate::gguf::GgmlType;
use crate::layout::{BASE_DIRECTORY, EXPERTS_DIRECTORY, METADATA_PATH};

/// More than the `metadata.json` of any model.
const MOST_METADATA_BYTES: u64 = 1 << 30;

/// What `metadata.json` says of the form.
#[derive(Deserialize)]
struct Metadata {
    /// What every version of it has.
    #[serde(rename = "extracted")]
    _extracted: bool,
    /// Absent in a raw tree.
    form: Option<String>,
    scales: Option<String>,
    #[serde(default)]
    requant: bool,
}

/// The form that a tree was made in. What says nothing about it counts as raw blocks.
pub fn form_of(root: &Path) -> Result<Form, VerifyError> {
    Ok(known_form(&open_root(root)?).unwrap_or_default())
}

/// The form that a folder was made in, if it holds a tree that says so.
pub(crate) fn known_form_of(root: &Path) -> Option<Form> {
    known_form(&open_root(root).ok()?)
}

fn known_form(root: &Folder) -> Option<Form> {
    by_metadata(root).or_else(|| by_headers(root))
}

fn by_metadata(root: &Folder) -> Option<Form> {
    let name = Path::new(METADATA_PATH).file_name()?;
    let (file, _) = there(there(root.folder(BASE_DIRECTORY.as_ref()))?.open_file(name))?;
    let file = BufReader::new(file.take(MOST_METADATA_BYTES));
    let metadata: Metadata = serde_json::from_reader(file).ok()?;
    let Some(form) = metadata.form else {
        return Some(Form::Raw);
    };
    match &form[..] {
        "mlx" => Some(Form::Mlx {
            scales: float(&metadata.scales?)?,
            requant: metadata.requant,
        }),
        other => Some(Form::Numbers(float(other)?)),
    }
}

/// Searches headers for what they say, until it is enough.
fn by_headers(root: &Folder) -> Option<Form> {
    let mut found = None;
    for directory in [BASE_DIRECTORY, EXPERTS_DIRECTORY] {
        let Some(folder) = there(root.folder(directory.as_ref())) else {
            continue;
        };
        for name in folder.names().ok()? {
            let is_tensors = Path::new(&name).extension() == Some("safetensors".as_ref());
            let opened = is_tensors.then(|| there(folder.open_file(&name))).flatten();
            let Some(form) = opened.and_then(|(file, _)| by_header(&file)) else {
                continue;
            };
            match form {
                // Another file may hold types that were quantised anew.
                Form::Mlx { requant: false, .. } => found = Some(form),
                form => return Some(form),
            }
        }
    }
    found
}

fn by_header(file: &File) -> Option<Form> {
    let metadata = header::metadata(file)?;
    let Some(form) = metadata.get("odmoe.form") else {
        metadata.get("odmoe.layout")?;
        return Some(Form::Raw);
    };
    if form != "mlx" {
        return Some(Form::Numbers(float(form)?));
    }
    let tensors: Value = serde_json::from_str(metadata.get("odmoe.tensors")?).ok()?;
    let mut scales = Float::F16;
    let mut requant = false;
    for tensor in tensors.as_object()?.values() {
        let form = &tensor["form"];
        let dtype = form["scales"].as_str().or(form["dtype"].as_str());
        if let Some(dtype) = dtype.and_then(float) {
            scales = dtype;
        }
        let ggml_type = tensor["ggml_type"].as_str().and_then(GgmlType::from_name);
        requant |= form.get("mode").is_some()
            && ggml_type.is_some_and(|ggml_type| Mlx::of(ggml_type, Map::Exact).is_none());
    }
    Some(Form::Mlx { scales, requant })
}

/// A dtype by its name, in either case.
fn float(name: &str) -> Option<Float> {
    let floats = [Float::F32, Float::F16, Float::Bf16];
    floats
        .into_iter()
        .find(|float| Form::Numbers(*float).name().eq_ignore_ascii_case(name))
}

fn there<T>(entry: std::io::Result<Entry<T>>) -> Option<T> {
    match entry {
        Ok(Entry::There(found)) => Some(found),
        _ => None,
    }
}
