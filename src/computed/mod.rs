//! Any range of a computed array, from the blocks beneath it.
//!
//! The problem: a reader asks for any bytes of an array, but arrays are made of whole units of
//! blocks. And the two or three arrays of a tensor come from the same blocks, which should be read
//! from the disk once.
//!
//! The plan: whole units are computed where they are wanted; the two at the edges, of which only a
//! part is wanted, beside. Blocks are read in steps, since a few bytes of scales come from many
//! bytes of blocks. What was read for one array of a tensor gives the small ones, scales and biases,
//! too, which are kept until they are asked for (`stash`).

pub mod arranged;
mod stash;

use std::ops::{Deref, Range};

pub use self::stash::Stash;
use crate::codec::{Codec, Unit};
use crate::spare::Spare;

/// Bytes of blocks that are read at a time: about what a request of the kernel needs, and little
/// enough for the caches of a processor.
const STEP_BYTES: usize = 256 << 10;
/// The largest unit of any output: 256 numbers of four bytes.
const MAX_UNIT_BYTES: usize = 1024;

/// Memory for blocks that something is computed from.
static BLOCKS: Spare = Spare::new();
/// Memory for small arrays that are computed beside another one.
static BESIDE: Spare = Spare::new();

/// One array of a tensor: how it is computed, and what else can be computed from the same blocks.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// Identifies the tensor.
    pub tensor: u32,
    /// Which of the tensor's arrays is asked for: 0 is the largest.
    pub array: usize,
    pub codec: Codec,
    /// Bytes of the tensor's first array.
    pub largest: u64,
    /// The scales and biases of the tensor, as far as it has them.
    pub small: [Option<Small>; 2],
}

/// Scales or biases.
#[derive(Debug, Clone, Copy)]
pub struct Small {
    pub codec: Codec,
    /// Bytes of the whole array.
    pub bytes: u64,
}

/// The blocks of a tensor.
pub trait Blocks {
    type Error;

    /// Some blocks, in memory.
    type Held<'a>: Deref<Target = [u8]>;

    /// The blocks in a range of the tensor's bytes; `space` is memory for them.
    fn read<'a>(
        &self,
        range: Range<u64>,
        space: &'a mut Vec<u8>,
    ) -> Result<Self::Held<'a>, Self::Error>;

    /// Called with ranges that nothing will be computed from soon.
    fn done(&self, range: Range<u64>);
}

/// Fills `out` with the bytes of an array from `offset` on.
pub fn range<B: Blocks>(
    job: &Job,
    stash: &Stash,
    blocks: &B,
    offset: u64,
    out: &mut [u8],
) -> Result<(), B::Error> {
    for gap in stash.give(job, offset, out) {
        let (offset, out) = (offset + gap.start as u64, &mut out[gap]);
        BLOCKS.lend(|space| steps(job, stash, blocks, space, offset, out))?;
    }
    stash.gave(job, out.len() as u64);
    Ok(())
}

/// Computes a range in steps.
fn steps<B: Blocks>(
    job: &Job,
    stash: &Stash,
    blocks: &B,
    space: &mut Vec<u8>,
    offset: u64,
    out: &mut [u8],
) -> Result<(), B::Error> {
    let unit = job.codec.unit();
    let mut rest = out;
    let mut first = offset / unit.out as u64;
    let mut skip = (offset % unit.out as u64) as usize;
    while !rest.is_empty() {
        let units = (skip + rest.len()).div_ceil(unit.out);
        let units = units.min((STEP_BYTES / unit.blocks).max(1));
        let start = first * unit.blocks as u64;
        let held = blocks.read(start..start + (units * unit.blocks) as u64, space)?;
        let wanted = rest.len().min(units * unit.out - skip);
        let (here, after) = rest.split_at_mut(wanted);
        compute(job.codec, &held, skip, here);
        let are_kept = compute_beside(job, stash, first, &held);
        // A unit of which only the first bytes were asked for is needed again.
        let whole = (skip + wanted) / unit.out;
        if job.array == 0 && are_kept {
            blocks.done(start..start + (whole * unit.blocks) as u64);
        }
        rest = after;
        first += units as u64;
        skip = 0;
    }
    Ok(())
}

/// The range of a tensor's blocks from which a range of an array is computed.
pub fn blocks_of(unit: Unit, range: Range<u64>) -> Range<u64> {
    let first = range.start / unit.out as u64;
    let end = range.end.div_ceil(unit.out as u64);
    first * unit.blocks as u64..end * unit.blocks as u64
}

/// Computes and keeps the small arrays of a tensor that were not asked for yet, other than the one
/// that is being read. Returns whether the blocks are of no use for them any more.
fn compute_beside(job: &Job, stash: &Stash, first_unit: u64, blocks: &[u8]) -> bool {
    let mut are_kept = true;
    for (n, small) in job.small.iter().enumerate() {
        let Some(small) = small.filter(|_| n + 1 != job.array) else {
            continue;
        };
        let unit = small.codec.unit();
        let start = first_unit * unit.out as u64;
        let range = start..start + (blocks.len() / unit.blocks * unit.out) as u64;
        if !stash.wants(job.tensor, n, small.bytes, &range) {
            continue;
        }
        are_kept &= BESIDE.lend(|space| {
            let len = (range.end - range.start) as usize;
            if space.len() < len {
                space.resize(len, 0);
            }
            small.codec.compute(blocks, &mut space[..len]);
            stash.put(job.tensor, n, start, &space[..len])
        });
    }
    are_kept
}

/// Computes the output of blocks, without its first `skip` bytes, as far as there is room.
fn compute(codec: Codec, blocks: &[u8], skip: usize, out: &mut [u8]) {
    let unit = codec.unit();
    let mut edge = [0; MAX_UNIT_BYTES];
    let edge = &mut edge[..unit.out];
    let (mut blocks, mut out) = (blocks, out);
    if skip > 0 {
        let (first, rest) = blocks.split_at(unit.blocks);
        codec.compute(first, edge);
        let wanted = out.len().min(unit.out - skip);
        let (here, after) = std::mem::take(&mut out).split_at_mut(wanted);
        here.copy_from_slice(&edge[skip..skip + wanted]);
        (blocks, out) = (rest, after);
    }
    let whole = out.len() / unit.out;
    let (middle, last) = blocks.split_at(whole * unit.blocks);
    let (here, after) = out.split_at_mut(whole * unit.out);
    codec.compute(middle, here);
    if !after.is_empty() {
        codec.compute(&last[..unit.blocks], edge);
        after.copy_from_slice(&edge[..after.len()]);
    }
}
