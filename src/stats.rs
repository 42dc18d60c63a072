//! Counters of a mount: requests, bytes, latencies, and the opens and reads of each expert.
//!
//! The problem: a user wants to see which experts are hot, and counting must cost readers nothing.
//!
//! The plan: atomics, one set for each file, and a histogram of latencies whose buckets grow with
//! the numbers. A [`Snapshot`] is taken while readers continue to count, so its counters are of
//! slightly different moments. Hence nothing in it is the difference of two sums, and a request is
//! counted in the total before it is counted by file: the sum over all files never exceeds the
//! total.
//!
//! Reads that the kernel answers from its cache never reach a file system. Of a cached file, only
//! opens are counted.

use std::collections::HashSet;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::layout::{FileKind, Layout};
use crate::model::Model;
use crate::source::Traffic;
use crate::tree::Ino;

/// The extended attribute of a mount's root that holds a [`Snapshot`].
pub const STATS_ATTRIBUTE: &str = "user.odmoe.stats";
/// The prefix of the other attributes' names; a layer's number follows it. Each holds
/// [`ExpertUse`]s.
pub const HEAT_ATTRIBUTE: &str = "user.odmoe.heat.";
/// The longest value, and the longest list of names, that Linux accepts (`XATTR_SIZE_MAX` and
/// `XATTR_LIST_MAX` of include/uapi/linux/limits.h).
const MAX_ATTRIBUTE_BYTES: usize = 64 << 10;
/// Real models have at most 128 layers. This many always fit into one attribute.
const MAX_LISTED_LAYERS: usize = 1000;

/// The counters of one mount.
#[derive(Debug)]
pub struct Stats {
    started: Instant,
    operations: [AtomicU64; Operation::ALL.len()],
    errors: AtomicU64,
    latencies: Histogram,
    /// Counters by inode number, also of files without tensors.
    files: Box<[Counter]>,
    /// The layer, number and inode of each expert, in order.
    experts: Box<[(u32, u32, Ino)]>,
    /// The inodes of all other files.
    base: Box<[Ino]>,
}

/// The kinds of requests that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Lookup,
    Getattr,
    Open,
    Read,
    Readdir,
    Statfs,
}

impl Operation {
    const ALL: [(Self, &str); 6] = [
        (Self::Lookup, "lookup"),
        (Self::Getattr, "getattr"),
        (Self::Open, "open"),
        (Self::Read, "read"),
        (Self::Readdir, "readdir"),
        (Self::Statfs, "statfs"),
    ];
}

#[derive(Debug, Default)]
struct Counter {
    opens: AtomicU64,
    reads: AtomicU64,
    bytes: AtomicU64,
}

/// How often files were opened and read, and how many bytes were read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    pub opens: u64,
    /// Requests of the kernel, not calls of programs: the kernel joins, splits and saves them.
    pub reads: u64,
    pub bytes: u64,
}

impl std::ops::AddAssign for Use {
    fn add_assign(&mut self, other: Self) {
        self.opens += other.opens;
        self.reads += other.reads;
        self.bytes += other.bytes;
    }
}

/// The use of one expert: its number, opens, reads and bytes.
pub type ExpertUse = (u32, u64, u64, u64);

/// Consecutive numbers: the first and the last.
pub type Span = (u32, u32);

/// All counters except those of single experts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub architecture: String,
    /// Time since the mount was made.
    pub seconds: f64,
    /// By operation.
    pub requests: std::collections::BTreeMap<String, u64>,
    /// Reads that ended with an error.
    pub errors: u64,
    pub latency: Latency,
    /// Use of all other files: `base_model/`, and the documents.
    pub base: Use,
    /// Use of all experts together.
    pub experts: Use,
    /// `[layer, experts]`: the number of experts of each layer that has any.
    pub layers: Vec<(u32, u32)>,
    /// Whether there are more layers than are listed.
    pub layers_cut: bool,
    /// The experts' numbers, for each layer where they do not run from 0 without a gap:
    /// `[layer, [[first, last], ...]]`. Layers are left out where all would be too long for an
    /// attribute.
    #[serde(default)]
    pub numbers: Vec<(u32, Vec<Span>)>,
    /// What was asked of servers, if the model is elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<Traffic>,
}

/// How long reads took from request to reply, in microseconds. Percentiles are rounded up to the
/// end of a bucket, by at most an eighth.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

impl Stats {
    /// Counters for a model's tree, all zero.
    pub fn new(model: &Model) -> Self {
        let tree = model.tree();
        let experts = model.layout().experts().iter().filter_map(|file| {
            let FileKind::Expert { layer, expert } = file.kind else {
                return None;
            };
            Some((layer, expert, tree.find(&file.kind.path())?))
        });
        let experts: Box<[_]> = experts.collect();
        let of_experts: HashSet<Ino> = experts.iter().map(|expert| expert.2).collect();
        let base = tree.files().filter(|file| !of_experts.contains(file));
        let inodes = tree.files().max().map_or(0, |last| last + 1);
        Self {
            started: Instant::now(),
            operations: Default::default(),
            errors: AtomicU64::new(0),
            latencies: Histogram::default(),
            files: (0..inodes).map(|_| Counter::default()).collect(),
            base: base.collect(),
            experts,
        }
    }

    /// Counts a request.
    pub fn count(&self, operation: Operation) {
        self.operations[operation as usize].fetch_add(1, Relaxed);
    }

    /// Counts an open of a file.
    pub fn opened(&self, file: Ino) {
        self.count(Operation::Open);
        if let Some(counter) = self.files.get(file as usize) {
            counter.opens.fetch_add(1, Release);
        }
    }

    /// Counts a read; `bytes` is `None` if the answer is an error.
    pub fn read(&self, file: Ino, bytes: Option<u64>) {
        self.count(Operation::Read);
        let Some(bytes) = bytes else {
            self.errors.fetch_add(1, Release);
            return;
        };
        if let Some(counter) = self.files.get(file as usize) {
            counter.reads.fetch_add(1, Release);
            counter.bytes.fetch_add(bytes, Relaxed);
        }
    }

    /// Notes how long a read took, from the request to the reply.
    pub fn took(&self, time: Duration) {
        self.latencies.add(time);
    }

    /// All counters except those of single experts.
    pub fn snapshot(&self, layout: &Layout) -> Snapshot {
        // Parts before wholes: readers count in the other order.
        let base = self.sum(self.base.iter().copied());
        let experts = self.sum(self.experts.iter().map(|expert| expert.2));
        let errors = self.errors.load(Acquire);
        let count = |operation: Operation| self.operations[operation as usize].load(Relaxed);
        let layers: Vec<_> = self
            .layers()
            .map(|layer| (layer[0].0, layer.len() as u32))
            .collect();
        let listed = self.layers().take(MAX_LISTED_LAYERS);
        let numbers = listed.filter_map(|layer| {
            let numbers = runs(layer);
            (numbers != [(0, layer.len() as u32 - 1)]).then_some((layer[0].0, numbers))
        });
        Snapshot {
            architecture: layout.model().architecture().unwrap_or_default().to_owned(),
            seconds: self.started.elapsed().as_secs_f64(),
            requests: Operation::ALL
                .iter()
                .map(|&(operation, name)| (name.to_owned(), count(operation)))
                .collect(),
            errors,
            latency: self.latencies.get(),
            base,
            experts,
            layers_cut: layers.len() > MAX_LISTED_LAYERS,
            layers: layers.into_iter().take(MAX_LISTED_LAYERS).collect(),
            numbers: numbers.collect(),
            remote: None,
        }
    }

    /// The experts, layer by layer.
    fn layers(&self) -> impl Iterator<Item = &[(u32, u32, Ino)]> {
        self.experts.chunk_by(|a, b| a.0 == b.0)
    }

    /// The use of some files together.
    fn sum(&self, files: impl Iterator<Item = Ino>) -> Use {
        let mut sum = Use::default();
        files.for_each(|file| sum += self.files[file as usize].get());
        sum
    }

    /// The experts of a layer that were used, the hottest first: by opens, then by bytes.
    pub fn heat(&self, layer: u32) -> Vec<ExpertUse> {
        let start = self.experts.partition_point(|expert| expert.0 < layer);
        let experts = self.experts[start..]
            .iter()
            .take_while(|expert| expert.0 == layer);
        let mut used: Vec<ExpertUse> = experts
            .map(|(_, expert, ino)| {
                let used = self.files[*ino as usize].get();
                (*expert, used.opens, used.reads, used.bytes)
            })
            .filter(|(_, opens, reads, _)| *opens > 0 || *reads > 0)
            .collect();
        used.sort_by_key(|&(expert, opens, _, bytes)| (std::cmp::Reverse((opens, bytes)), expert));
        used
    }

    /// The value of an extended attribute of the root; `None` if it does not exist. A value that is
    /// too long for the kernel is cut at its cold end.
    pub fn attribute(
        &self,
        name: &[u8],
        layout: &Layout,
        traffic: Option<Traffic>,
    ) -> Option<Vec<u8>> {
        let name = std::str::from_utf8(name).ok()?;
        if name == STATS_ATTRIBUTE {
            let mut snapshot = self.snapshot(layout);
            snapshot.remote = traffic;
            loop {
                let value = serde_json::to_vec(&snapshot).ok()?;
                let kept = snapshot.numbers.len() / 2;
                if value.len() <= MAX_ATTRIBUTE_BYTES || snapshot.numbers.is_empty() {
                    return Some(value);
                }
                snapshot.numbers.truncate(kept);
            }
        }
        let layer: u32 = name.strip_prefix(HEAT_ATTRIBUTE)?.parse().ok()?;
        self.experts
            .binary_search_by_key(&layer, |expert| expert.0)
            .ok()?;
        let mut heat = self.heat(layer);
        loop {
            let value = serde_json::to_vec(&heat).ok()?;
            if value.len() <= MAX_ATTRIBUTE_BYTES {
                return Some(value);
            }
            heat.truncate(heat.len() * MAX_ATTRIBUTE_BYTES / value.len());
        }
    }

    /// The names of all extended attributes of the root, each ended by NUL.
    pub fn attribute_names(&self) -> Vec<u8> {
        let mut names = format!("{STATS_ATTRIBUTE}\0").into_bytes();
        for layer in self.layers() {
            let name = format!("{HEAT_ATTRIBUTE}{}\0", layer[0].0);
            if names.len() + name.len() > MAX_ATTRIBUTE_BYTES {
                break;
            }
            names.extend(name.into_bytes());
        }
        names
    }
}

/// The numbers of a layer's experts.
fn runs(layer: &[(u32, u32, Ino)]) -> Vec<Span> {
    layer
        .chunk_by(|a, b| a.1 + 1 == b.1)
        .map(|run| (run[0].1, run[run.len() - 1].1))
        .collect()
}

impl Counter {
    fn get(&self) -> Use {
        Use {
            opens: self.opens.load(Acquire),
            reads: self.reads.load(Acquire),
            bytes: self.bytes.load(Relaxed),
        }
    }
}

/// Buckets of each power of two: each is an eighth of it wide.
const SUBBUCKETS: u64 = 8;
/// Up to 2^40 µs, which is twelve days.
const BUCKETS: usize = 8 * 40;

/// Numbers of microseconds in buckets that grow with them.
#[derive(Debug)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            max: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    fn add(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        // First the bound of all percentiles.
        self.max.fetch_max(micros, Relaxed);
        self.buckets[Self::bucket(micros)].fetch_add(1, Release);
    }

    /// Numbers below 16 have a bucket each; above, each power of two has eight.
    fn bucket(micros: u64) -> usize {
        if micros < 2 * SUBBUCKETS {
            return micros as usize;
        }
        let power = u64::from(micros.ilog2());
        let within = (micros >> (power - 3)) - SUBBUCKETS;
        let bucket = (power - 2) * SUBBUCKETS + within;
        (bucket as usize).min(BUCKETS - 1)
    }

    /// The largest number that falls into a bucket.
    fn end(bucket: usize) -> u64 {
        let bucket = bucket as u64;
        if bucket < 2 * SUBBUCKETS {
            return bucket;
        }
        let power = bucket / SUBBUCKETS + 2;
        let within = bucket % SUBBUCKETS;
        ((SUBBUCKETS + within + 1) << (power - 3)) - 1
    }

    fn get(&self) -> Latency {
        let counts: Vec<u64> = self
            .buckets
            .iter()
            .map(|bucket| bucket.load(Acquire))
            .collect();
        let total: u64 = counts.iter().sum();
        let max = self.max.load(Relaxed);
        let percentile = |percent: u64| {
            let wanted = (total * percent).div_ceil(100);
            let mut seen = 0;
            let bucket = counts.iter().position(|count| {
                seen += count;
                seen >= wanted && seen > 0
            });
            bucket.map_or(0, |bucket| Self::end(bucket).min(max))
        };
        Latency {
            p50_us: percentile(50),
            p90_us: percentile(90),
            p99_us: percentile(99),
            max_us: max,
        }
    }
}

#[cfg(test)]
mod tests;
