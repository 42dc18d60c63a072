//! Where tensors begin in the parts of a model.

use std::ops::Range;
use std::sync::OnceLock;

use crate::gguf::ModelHeader;

/// The part and the offset of each tensor, in order, once somebody asks.
#[derive(Debug, Default)]
pub struct Starts(OnceLock<Box<[(u32, u64)]>>);

impl Starts {
    /// From where the tensor begins that holds a place of a part to where the next one does.
    pub fn around(&self, header: &ModelHeader, part: u32, place: u64) -> Range<u64> {
        let starts = self.0.get_or_init(|| {
            let tensors = header.tensors.iter();
            let mut starts: Box<[_]> = tensors.map(|t| (t.part, t.info.offset)).collect();
            starts.sort_unstable();
            starts
        });
        let next = starts.partition_point(|start| *start <= (part, place));
        let start = next.checked_sub(1).map(|index| starts[index]);
        let in_part = |start: Option<(u32, u64)>| start.filter(|(of, _)| *of == part);
        let first = in_part(start).map_or(0, |(_, offset)| offset);
        let end = in_part(starts.get(next).copied()).map_or(u64::MAX, |(_, offset)| offset);
        first..end
    }
}
