//! The promise that nothing is lost: every byte of every tensor is in exactly one file, once.
//!
//! It is checked on the finished tree, with the extents that will be served, rather than on the
//! reasoning that produced them.

use super::{Layout, Recipe};
use crate::explain::{Explain, Hint};
use crate::gguf::ModelHeader;
use crate::tree::{Content, RecipeId, Tree};

/// A breach of the partition: a fault of this program, never of a model.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("byte {offset} of part {part} {what}: this is a bug in odmoe-fs")]
pub struct PartitionError {
    /// 1-based.
    pub part: u32,
    pub offset: u64,
    pub what: &'static str,
}

impl Explain for PartitionError {
    fn code(&self) -> &'static str {
        "layout.partition"
    }

    fn hint(&self) -> Option<Hint> {
        Some("please report it with the model's name".into())
    }
}

/// Checks the safetensors files of a tree against the tensors of its model: each run of the model
/// feeds one tensor, as it is or through all of its arrays.
pub(super) fn check(layout: &Layout, tree: &Tree) -> Result<(), PartitionError> {
    let files = tree.files().filter(|&ino| {
        tree.name(ino)
            .is_some_and(|name| name.ends_with(".safetensors"))
    });
    let mut served = Vec::new();
    let mut computed: Vec<RecipeId> = Vec::new();
    for extent in files.flat_map(|ino| tree.extents(ino)) {
        match extent.content {
            Content::Made(_) => {}
            Content::Model { part, offset } => served.push((part, offset, extent.len)),
            Content::Computed(id) => {
                let Recipe {
                    part,
                    offset,
                    len,
                    codec,
                } = layout.recipe(id);
                let unit = codec.unit();
                if extent.len != len / unit.blocks as u64 * unit.out as u64 {
                    return fail(part, offset, "feeds an array of another size");
                }
                computed.push(id);
                if layout.array_of(id).0 == 0 {
                    served.push((part, offset, len));
                }
            }
        }
    }
    computed.sort_unstable();
    let mut next = 0;
    for (place, &id) in computed.iter().enumerate() {
        let (n, arrays) = layout.array_of(id);
        if n != next {
            let recipe = layout.recipe(id);
            return fail(
                recipe.part,
                recipe.offset,
                "feeds some arrays of its tensor only",
            );
        }
        next = (n + 1) % arrays;
        if place + 1 == computed.len() && next != 0 {
            let recipe = layout.recipe(id);
            return fail(
                recipe.part,
                recipe.offset,
                "feeds some arrays of its tensor only",
            );
        }
    }
    check_runs(&layout.model, served)
}

fn fail(part: u32, offset: u64, what: &'static str) -> Result<(), PartitionError> {
    Err(PartitionError {
        part: part + 1,
        offset,
        what,
    })
}

/// Checks runs of parts, (part, offset, length) each, against the tensors of a model.
fn check_runs(model: &ModelHeader, mut served: Vec<(u32, u64, u64)>) -> Result<(), PartitionError> {
    served.sort_unstable();
    let mut served = served.into_iter().peekable();
    // Tensors come by part and offset, since a header's offsets are a running sum.
    for tensor in &model.tensors {
        let mut at = tensor.info.offset;
        let end = at + tensor.info.bytes;
        while at < end {
            match served.next_if(|&(part, offset, _)| (part, offset) <= (tensor.part, at)) {
                None => return fail(tensor.part, at, "belongs to a tensor, but is in no file"),
                Some((part, offset, len)) if (part, offset) == (tensor.part, at) => at += len,
                Some((part, offset, _)) => {
                    return fail(part, offset, "is in two files, or belongs to no tensor");
                }
            }
        }
        if at > end {
            return fail(tensor.part, end, "is served beyond the end of its tensor");
        }
    }
    match served.next() {
        Some((part, offset, _)) => fail(part, offset, "is in two files, or belongs to no tensor"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::write::Writer;
    use crate::gguf::{GgmlType, Header};

    fn check(runs: &[(u64, u64)]) -> Option<&'static str> {
        let mut writer = Writer::new();
        for name in ["a", "empty", "b"] {
            let dims = [if name == "empty" { 0 } else { 16 }];
            writer.tensor(name, &dims, GgmlType::from_name("F32").unwrap());
        }
        let file = writer.header();
        let start = file.bytes.len() as u64;
        let header = Header::read(std::io::Cursor::new(&file.bytes), file.file_bytes).unwrap();
        let model = ModelHeader::join(vec![(header, file.file_bytes)]).unwrap();
        let runs = runs.iter().map(|&(at, len)| (0, start + at, len));
        let checked = check_runs(&model, runs.collect());
        checked.err().map(|error| error.what)
    }

    #[test]
    fn gaps_overlaps_and_strays_are_found() {
        // Two tensors of 64 bytes, an empty one between them.
        assert_eq!(check(&[(64, 64), (0, 32), (32, 32)]), None);
        let lost = Some("belongs to a tensor, but is in no file");
        let twice = Some("is in two files, or belongs to no tensor");
        assert_eq!(check(&[(64, 64), (32, 32)]), lost);
        assert_eq!(check(&[(0, 64), (64, 32)]), lost);
        assert_eq!(check(&[(0, 64), (32, 32), (64, 64)]), twice);
        assert_eq!(check(&[(0, 64), (0, 64), (64, 64)]), twice);
        assert_eq!(check(&[(0, 64), (64, 64), (128, 4)]), twice);
        assert_eq!(
            check(&[(0, 65), (65, 63)]),
            Some("is served beyond the end of its tensor")
        );
    }
}
