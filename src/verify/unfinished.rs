//! Signs that a model was never completely written.
//!
//! The problem: a download that reserves its room first has its final size, and soon a valid
//! header. It is well-formed, though most of it is a hole, which reads as zeros.
//!
//! The plan: ask the file system which bytes of the tensors were never written, and look beside the
//! parts for the files that downloads keep there until they are complete. Neither is proof: a copy
//! may have turned zeros of the model into holes, and such a file may be left over. So the report
//! states these facts and nothing more.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::downloads::MARKS;
use crate::folder::Folder;
use crate::gguf::Tensor;
use crate::model::Model;
use crate::source::ReadError;
use crate::sys::copy;
use crate::units::Size;

/// The unit of `st_blocks`, whatever the file system allocates by.
const STAT_BLOCK_BYTES: u64 = 512;
/// The number of places that a glance looks at.
const GLANCES: u64 = 64;

/// The signs that a model is incomplete.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Bytes of tensors that are holes, and all bytes of tensors.
    pub unwritten_bytes: u64,
    pub tensor_bytes: u64,
    /// Tensors with holes, and all tensors.
    pub unwritten_tensors: usize,
    pub tensors: usize,
    /// The name of the first tensor with a hole, in the order of the model.
    pub first_tensor: Option<String>,
    /// Bytes of all parts.
    pub part_bytes: u64,
    /// Bytes that the parts take on the file system, if it shows no hole but these are fewer than
    /// half. Then the parts are compressed, or have holes that the file system does not show.
    pub stored_bytes: Option<u64>,
    /// Parts, and files beside them, with names of incomplete downloads.
    pub marks: Vec<PathBuf>,
}

impl Unfinished {
    /// Looks at every tensor. Reads no payload, but walks the block lists of all parts.
    pub fn of(model: &Model) -> Result<Self, ReadError> {
        let tensors = &model.layout().model().tensors;
        if model.source().is_remote() {
            // A server has no holes, and shows nothing of what lies beside a file.
            return Ok(Self {
                tensors: tensors.len(),
                tensor_bytes: tensors.iter().map(|tensor| tensor.info.bytes).sum(),
                ..Self::default()
            });
        }
        let mut found = Self {
            tensors: tensors.len(),
            tensor_bytes: tensors.iter().map(|tensor| tensor.info.bytes).sum(),
            marks: marks(model),
            ..Self::default()
        };
        let mut stored = Some(0);
        for part_tensors in tensors.chunk_by(|a, b| a.part == b.part) {
            let part = part_tensors[0].part;
            let (data, room) = model.source().with_part(part, |file| {
                let room = file.metadata().map_or(0, |metadata| metadata.blocks());
                (data_of(file), room * STAT_BLOCK_BYTES)
            })?;
            // Some file systems do not report room either.
            stored = stored.filter(|_| room > 0).map(|stored| stored + room);
            found.part_bytes += model.source().part_bytes(part);
            found.count(part_tensors, &data);
        }
        if found.unwritten_bytes == 0 {
            found.stored_bytes = stored.filter(|stored| *stored < found.part_bytes / 2);
        }
        Ok(found)
    }

    /// Like [`of`](Self::of), but walks the block lists only if a few places suggest it: the ends of
    /// parts, and some all over the tensors.
    pub fn at_a_glance(model: &Model) -> Result<Self, ReadError> {
        if model.source().is_remote() {
            return Ok(Self::default());
        }
        if looks_unwritten(model)? {
            return Self::of(model);
        }
        Ok(Self {
            marks: marks(model),
            ..Self::default()
        })
    }

    /// Whether there is no sign that the model is incomplete.
    pub fn is_nothing(&self) -> bool {
        self.unwritten_bytes == 0 && self.stored_bytes.is_none() && self.marks.is_empty()
    }

    /// Counts the bytes of tensors of a part that are not in its runs of data.
    fn count(&mut self, tensors: &[Tensor], data: &[Range<u64>]) {
        for tensor in tensors {
            let info = &tensor.info;
            let range = info.offset..info.offset + info.bytes;
            let first = data.partition_point(|run| run.end <= range.start);
            let runs = data[first..].iter().take_while(|run| run.start < range.end);
            let there = runs.map(|run| run.end.min(range.end) - run.start.max(range.start));
            let unwritten = info.bytes - there.sum::<u64>();
            if unwritten > 0 {
                self.unwritten_bytes += unwritten;
                self.unwritten_tensors += 1;
                self.first_tensor.get_or_insert_with(|| info.name.clone());
            }
        }
    }
}

impl Unfinished {
    /// The signs in words, each a sentence without a full stop.
    pub fn reasons(&self) -> Vec<String> {
        let unwritten = self.first_tensor.as_ref().map(|first| {
            format!(
                "{} of {} of tensor data were never written (holes, which read as zeros), in {} of {} tensors, the first {first:?}",
                Size(self.unwritten_bytes),
                Size(self.tensor_bytes),
                self.unwritten_tensors,
                self.tensors,
            )
        });
        let stored = self.stored_bytes.map(|stored| {
            format!(
                "only {} of {} take room, and the file system does not show which bytes were never written",
                Size(stored),
                Size(self.part_bytes)
            )
        });
        let marks = self
            .marks
            .iter()
            .map(|mark| format!("{mark:?} has the name of an incomplete download"));
        unwritten.into_iter().chain(stored).chain(marks).collect()
    }
}

/// The runs of data of a whole file. If the file system cannot tell, all of it is data.
fn data_of(file: &std::fs::File) -> Vec<Range<u64>> {
    let mut runs = Vec::new();
    let mut place = 0;
    loop {
        match copy::next_data(file, place) {
            Ok(Some(run)) if run.end > run.start => {
                place = run.end;
                runs.push(run);
            }
            Ok(_) => return runs,
            Err(_) => {
                runs.push(place..u64::MAX);
                return runs;
            }
        }
    }
}

/// Whether the end of a part is in a hole, as in a download that was interrupted, or a quarter of a
/// few places that are spread over all tensors.
fn looks_unwritten(model: &Model) -> Result<bool, ReadError> {
    let tensors = &model.layout().model().tensors;
    let all: u64 = tensors.iter().map(|tensor| tensor.info.bytes).sum();
    let mut wanted = (0..GLANCES.min(all)).map(|n| (all / GLANCES.min(all)) * n);
    let mut next = wanted.next();
    let (mut looks, mut holes, mut before) = (0, 0, 0);
    for part_tensors in tensors.chunk_by(|a, b| a.part == b.part) {
        let mut places = Vec::new();
        let mut last = None;
        for tensor in part_tensors {
            let info = &tensor.info;
            while let Some(place) = next.filter(|place| *place < before + info.bytes) {
                places.push(info.offset + place - before);
                next = wanted.next();
            }
            before += info.bytes;
            last = last.max((info.offset + info.bytes).checked_sub(1));
        }
        looks += places.len();
        let (found, is_cut) = model.source().with_part(part_tensors[0].part, |file| {
            let is_hole = |place: &u64| match copy::next_data(file, *place) {
                Ok(Some(run)) => run.start > *place,
                Ok(None) => true,
                Err(_) => false,
            };
            let found = places.iter().filter(|place| is_hole(place)).count();
            (found, last.as_ref().is_some_and(is_hole))
        })?;
        if is_cut {
            return Ok(true);
        }
        holes += found;
    }
    Ok(holes * 4 > looks)
}

/// Parts, and files beside them, with names of incomplete downloads. If a folder cannot be listed,
/// only the names of the parts themselves count.
fn marks(model: &Model) -> Vec<PathBuf> {
    let mut listed: HashMap<PathBuf, HashSet<OsString>> = HashMap::new();
    let mut found = Vec::new();
    for part in model.source().paths() {
        // In a download cache, a part may be a link to a file of another name.
        let resolved = part.canonicalize().ok().filter(|path| path != part);
        for path in [Some(part.to_owned()), resolved].into_iter().flatten() {
            let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
                continue;
            };
            let names = listed
                .entry(folder.to_owned())
                .or_insert_with(|| names(folder).unwrap_or_default());
            if MARKS.iter().any(|mark| mark.is_on(name)) {
                found.push(path.clone());
            }
            let marked = MARKS.iter().map(|mark| mark.added_to(name));
            let beside = marked.filter(|name| names.contains(name));
            found.extend(beside.map(|name| folder.join(name)));
        }
    }
    found.sort();
    found.dedup();
    found
}

fn names(folder: &Path) -> io::Result<HashSet<OsString>> {
    Ok(Folder::open(folder)?.names()?.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgmlType, TensorInfo};

    fn tensor(name: &str, range: Range<u64>) -> Tensor {
        Tensor {
            part: 0,
            info: TensorInfo {
                name: name.to_owned(),
                ne: [1; 4],
                n_dims: 1,
                ggml_type: GgmlType::from_name("I8").unwrap(),
                offset: range.start,
                bytes: range.end - range.start,
            },
        }
    }

    #[test]
    fn only_what_of_tensors_is_in_holes_is_counted() {
        let tensors = [
            tensor("whole", 100..200),
            tensor("begins in a hole", 200..300),
            tensor("has one in it", 300..400),
            tensor("is one", 500..600),
            tensor("is nothing", 600..600),
        ];
        // The hole from 400 to 500 is padding.
        let data = [0..200, 250..310, 320..330, 390..400, 600..900];
        let mut found = Unfinished::default();
        found.count(&tensors, &data);
        assert_eq!(found.unwritten_bytes, 50 + (100 - 10 - 10 - 10) + 100);
        assert_eq!(found.unwritten_tensors, 3);
        assert_eq!(found.first_tensor.as_deref(), Some("begins in a hole"));
        let mut found = Unfinished::default();
        found.count(&tensors, &[0..250, 250..u64::MAX]);
        assert!(found.is_nothing());
    }
}
