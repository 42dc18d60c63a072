//! Tensors whose rows are shown in another order than they have in the model.
//!
//! The problem: a range of such an array is made of a little of many rows, the next range of the
//! same rows again, and several arrays are made of one tensor. So every byte of it is needed many
//! times, and a tensor may be larger than the memory.
//!
//! The plan: read such tensors in windows, and keep those that were used last.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::layout::Stored;
use crate::source::{ReadError, Run, Source};

/// Bytes of a window.
const WINDOW_BYTES: u64 = 1 << 20;
/// Windows that are kept: the matrices of four experts of gpt-oss, as many as a loader reads at a
/// time. They and the buffers of `source::fetch` are within the memory that a daemon may use.
const KEPT: usize = 40;

/// The bytes of a window; `None` until somebody has read them, and others wait.
type Slot = Arc<Mutex<Option<Arc<Vec<u8>>>>>;

/// The windows that were used last.
#[derive(Debug, Default)]
pub(super) struct Windows(Mutex<VecDeque<Window>>);

#[derive(Debug)]
struct Window {
    part: u32,
    start: u64,
    bytes: Slot,
}

impl Windows {
    /// The windows of a tensor that are neither here nor being read, of those that hold a range of
    /// its part.
    pub fn missing(&self, tensor: &Stored, range: Range<u64>) -> Vec<Run> {
        let kept = self.0.lock();
        let windows = windows_of(tensor, range);
        let missing = windows.filter(|run| !kept.iter().any(|window| window.is(run)));
        missing.collect()
    }

    /// A reader of a tensor.
    pub fn of<'a>(&'a self, source: &'a Source, tensor: Stored) -> Reader<'a> {
        Reader {
            windows: self,
            source,
            tensor,
            held: None,
        }
    }

    fn hold(&self, run: Run, source: &Source) -> Result<Arc<Vec<u8>>, ReadError> {
        let bytes = self.slot(&run);
        let mut bytes = bytes.lock();
        if let Some(bytes) = &*bytes {
            return Ok(bytes.clone());
        }
        let mut read = vec![0; run.len as usize];
        source.read_at(run.part, run.offset, &mut read)?;
        Ok(bytes.insert(Arc::new(read)).clone())
    }

    /// The place of a window, which now is the one that was used last.
    fn slot(&self, run: &Run) -> Slot {
        let mut kept = self.0.lock();
        let known = kept.iter().position(|window| window.is(run));
        let window = known.and_then(|at| kept.remove(at)).unwrap_or(Window {
            part: run.part,
            start: run.offset,
            bytes: Arc::default(),
        });
        let bytes = window.bytes.clone();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(window);
        bytes
    }
}

impl Window {
    fn is(&self, run: &Run) -> bool {
        (self.part, self.start) == (run.part, run.offset)
    }
}

/// The windows of a tensor that hold a range of its part.
fn windows_of(tensor: &Stored, range: Range<u64>) -> impl Iterator<Item = Run> {
    let (part, end) = (tensor.part, tensor.tensor + tensor.tensor_bytes);
    let first = (range.start - tensor.tensor) / WINDOW_BYTES;
    let starts = (tensor.tensor + first * WINDOW_BYTES..range.end).step_by(WINDOW_BYTES as usize);
    starts.map(move |offset| Run {
        part,
        offset,
        len: WINDOW_BYTES.min(end - offset),
    })
}

/// Reads a tensor. It holds the window that it has read last.
pub(super) struct Reader<'a> {
    windows: &'a Windows,
    source: &'a Source,
    tensor: Stored,
    held: Option<(Run, Arc<Vec<u8>>)>,
}

impl Reader<'_> {
    /// Fills the buffer from `offset` of the part, within the tensor.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let (mut rest, mut place) = (buffer, offset);
        while !rest.is_empty() {
            let (run, bytes) = self.window(place)?;
            let start = (place - run.offset) as usize;
            let len = rest.len().min(bytes.len() - start);
            let (here, after) = rest.split_at_mut(len);
            here.copy_from_slice(&bytes[start..start + len]);
            (rest, place) = (after, place + len as u64);
        }
        Ok(())
    }

    fn window(&mut self, place: u64) -> Result<(Run, &[u8]), ReadError> {
        let held = match self.held.take() {
            Some(held) if held.0.range().contains(&place) => held,
            _ => {
                let run = windows_of(&self.tensor, place..place + 1).next();
                let run = run.expect("a place has a window");
                (run, self.windows.hold(run, self.source)?)
            }
        };
        let (run, bytes) = self.held.insert(held);
        Ok((*run, bytes))
    }
}
