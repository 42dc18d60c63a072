//! What reading a model from servers has cost so far.

use serde::{Deserialize, Serialize};

/// Requests and bytes since a model was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub requests: u64,
    /// Bytes of the model that came from servers.
    pub fetched_bytes: u64,
    /// Bytes of the model that came from the cache on disk.
    pub cached_bytes: u64,
    /// Requests that were repeated.
    pub retries: u64,
    /// Reads that failed in the end.
    pub errors: u64,
}

impl Traffic {
    /// How many numbers it is.
    pub const FIELDS: usize = 5;

    /// As numbers, in order.
    pub fn to_numbers(self) -> [u64; Self::FIELDS] {
        let Self {
            requests,
            fetched_bytes,
            cached_bytes,
            retries,
            errors,
        } = self;
        [requests, fetched_bytes, cached_bytes, retries, errors]
    }

    /// From the numbers in that order; `None` of a model that asks no server.
    pub fn of_numbers(numbers: [u64; Self::FIELDS]) -> Option<Self> {
        let [requests, fetched_bytes, cached_bytes, retries, errors] = numbers;
        let found = Self {
            requests,
            fetched_bytes,
            cached_bytes,
            retries,
            errors,
        };
        (found != Self::default()).then_some(found)
    }

    /// The percentage of the bytes that the cache had; `None` before anything was read.
    pub fn hits(&self) -> Option<u64> {
        let all = self.fetched_bytes + self.cached_bytes;
        (self.cached_bytes * 100).checked_div(all)
    }
}
