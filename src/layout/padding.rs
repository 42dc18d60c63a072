//! Where the payload of a file begins.

use super::{ArrayView, Layout, PAGE_BYTES, PAYLOAD_ALIGNMENT};

impl Layout {
    /// Chooses the start of the payload. With computed arrays it is a page boundary. Otherwise the
    /// padding is less than a page, aligns the payload, and makes the most of its bytes congruent with
    /// their place in the model: their whole pages are whole pages of the model. Of equals, the
    /// smallest.
    pub(super) fn choose_padding(&self, arrays: &[ArrayView], unpadded: u64) -> u64 {
        // For each tensor, the payload start modulo a page that makes it congruent, and its bytes.
        let mut candidates: Vec<(u64, u64)> = Vec::with_capacity(arrays.len());
        let mut payload_offset = 0u64;
        let mut is_computed = false;
        for view in arrays {
            let bytes = view.bytes;
            let residue = view.tensor.gguf_offset.wrapping_sub(payload_offset) % PAGE_BYTES;
            if view.tensor.shown.is_computed() {
                is_computed = true;
            } else if bytes > 0 && residue.is_multiple_of(PAYLOAD_ALIGNMENT) {
                candidates.push((residue, bytes));
            }
            payload_offset += bytes;
        }
        if is_computed {
            return unpadded.next_multiple_of(PAGE_BYTES);
        }
        candidates.sort_unstable();
        let smallest = unpadded.next_multiple_of(PAYLOAD_ALIGNMENT);
        let mut best = (smallest, 0);
        for group in candidates.chunk_by(|a, b| a.0 == b.0) {
            let bytes: u64 = group.iter().map(|(_, bytes)| bytes).sum();
            let start = smallest + group[0].0.wrapping_sub(smallest) % PAGE_BYTES;
            if bytes > best.1 || (bytes == best.1 && start < best.0) {
                best = (start, bytes);
            }
        }
        best.0
    }
}
