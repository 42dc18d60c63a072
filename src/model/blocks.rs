//! The blocks that arrays are computed from.

use std::ops::Range;

use super::Bytes;
use crate::computed::{self, Blocks, Job};
use crate::layout::Recipe;
use crate::source::{ReadError, Run, Source};

/// The blocks from which a range of an array is computed.
pub(super) fn blocks_run(recipe: &Recipe, job: &Job, range: Range<u64>) -> Run {
    let blocks = computed::blocks_of(job.codec.unit(), range);
    Run {
        part: recipe.part,
        offset: recipe.offset + blocks.start,
        len: blocks.end - blocks.start,
    }
}

/// The blocks of a tensor, in their part.
pub(super) struct PartBlocks<'a> {
    pub(super) source: &'a Source,
    pub(super) recipe: Recipe,
}

impl PartBlocks<'_> {
    fn run(&self, range: Range<u64>) -> Run {
        Run {
            part: self.recipe.part,
            offset: self.recipe.offset + range.start,
            len: range.end - range.start,
        }
    }
}

impl Blocks for PartBlocks<'_> {
    type Error = ReadError;
    type Held<'a> = Bytes<'a>;

    fn read<'a>(&self, range: Range<u64>, space: &'a mut Vec<u8>) -> Result<Bytes<'a>, ReadError> {
        let run = self.run(range);
        if let Some(held) = self.source.borrow(run) {
            return Ok(Bytes::Held(held));
        }
        let len = run.len as usize;
        if space.len() < len {
            space.resize(len, 0);
        }
        let bytes = &mut space[..len];
        self.source.look_at(run, bytes)?;
        Ok(Bytes::Read(bytes))
    }

    fn done(&self, range: Range<u64>) {
        self.source.give_up(self.run(range));
    }
}
