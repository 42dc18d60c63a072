//! The promise that nothing is lost: every row of every tensor is in the directory, once, or its
//! tensor is left out for a reason.
//!
//! It is checked on the finished list rather than on the reasoning that made it.

use super::HfError;
use super::pieces::Rows;
use super::tensors::Tensors;
use crate::gguf::ModelHeader;

/// A progression of elements of one tensor.
struct Run {
    tensor: u32,
    first: u64,
    /// Elements of a row, and from one row to the next.
    columns: u64,
    step: u64,
    count: u64,
}

pub(super) fn check(model: &ModelHeader, tensors: &Tensors) -> Result<(), HfError> {
    let mut runs = Vec::new();
    for (_, entry) in tensors.entries.iter().filter(|(_, entry)| !entry.repeats) {
        for tensor in entry.tensors() {
            runs.extend(tensor.pieces.iter().flat_map(|piece| piece.rows()).map(run));
        }
    }
    runs.sort_unstable_by_key(|run| (run.tensor, run.first));
    let mut runs = &runs[..];
    let mut left_out = tensors.left_out.iter().map(|(index, _)| *index).peekable();
    for (index, tensor) in (0u32..).zip(&model.tensors) {
        let own = runs.partition_point(|run| run.tensor == index);
        let (own, others) = runs.split_at(own);
        runs = others;
        let elements = tensor.info.ne.iter().product();
        let is_left_out = left_out.next_if_eq(&index).is_some();
        if is_left_out != own.is_empty() || !(is_left_out || covers(own, elements)) {
            return Err(HfError::Partition(tensor.info.name.clone()));
        }
    }
    match runs {
        [] => Ok(()),
        _ => Err(HfError::Partition("an unknown tensor".to_owned())),
    }
}

fn run(rows: Rows) -> Run {
    Run {
        tensor: rows.tensor,
        first: rows.first.saturating_mul(rows.columns),
        columns: rows.columns,
        step: rows.step.saturating_mul(rows.columns),
        count: rows.count,
    }
}

/// Whether the runs, which are sorted, cover so many elements without gap and overlap.
fn covers(runs: &[Run], elements: u64) -> bool {
    // Rows that lie side by side are one interval; others are as many as they are.
    let mut intervals: Vec<(u64, u64)> = Vec::with_capacity(runs.len());
    for run in runs {
        if run.step == run.columns || run.count == 1 {
            intervals.push((run.first, run.columns.saturating_mul(run.count)));
        } else {
            let starts = (0..run.count).map(|n| run.first + n * run.step);
            intervals.extend(starts.map(|start| (start, run.columns)));
        }
    }
    intervals.sort_unstable();
    let mut end = 0;
    for (start, length) in intervals {
        if start != end {
            return false;
        }
        end += length;
    }
    end == elements
}
