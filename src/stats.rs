//! Counters of a mount: requests, bytes, latencies, and the opens and reads of each expert.
//!
//! The problem: a user wants to see which experts are hot, and counting must cost readers nothing.
//!
//! The plan: atomics, one set for each file, and a histogram of latencies whose buckets grow with
//! the numbers. A [`Snapshot`] is taken while readers go on counting, so its counters are of
//! slightly different moments. Hence nothing in it is the difference of two sums, and a request is
//! counted as a whole before it is counted by file: the numbers of files never exceed those of all
//! requests.
//!
//! Reads that the kernel answers from its cache never reach a file system: of a cached file, only
//! opens are seen.

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
/// The prefix of the others' names; a layer's number follows it. Each holds [`ExpertUse`]s.
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
    /// Requests of the kernel, not calls of programs: it joins, splits and saves them.
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
    /// How many experts each layer has that has any: `[layer, experts]`.
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

    /// Counts a read that was answered; `bytes` is `None` if the answer was an error.
    pub fn read(&self, file: Ino, bytes: Option<u64>, took: Duration) {
        self.count(Operation::Read);
        self.latencies.add(took);
        let Some(bytes) = bytes else {
            self.errors.fetch_add(1, Release);
            return;
        };
        if let Some(counter) = self.files.get(file as usize) {
            counter.reads.fetch_add(1, Release);
            counter.bytes.fetch_add(bytes, Relaxed);
        }
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
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::gguf::GgmlType;
    use crate::gguf::write::Writer;

    /// A model with experts of these numbers in its only layer, and one base tensor.
    fn model(folder: &std::path::Path, experts: &[u32]) -> Model {
        let mut writer = Writer::new();
        let f32 = GgmlType::from_name("F32").unwrap();
        for name in ["gate", "down", "up"] {
            for expert in experts {
                let name = format!("blk.0.ffn_{name}.{expert}.weight");
                writer.tensor(&name, &[8, 8], f32);
            }
        }
        writer.tensor("output_norm.weight", &[8], f32);
        let written = writer.header();
        let mut bytes = written.bytes;
        bytes.resize(written.file_bytes as usize, 0);
        let path = folder.join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        Model::open(&path).unwrap()
    }

    #[test]
    fn a_snapshot_that_is_taken_while_readers_count_is_never_more_than_they_counted() {
        const READERS: u64 = 4;
        const SNAPSHOTS: usize = 20_000;
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), &[0, 1, 2]);
        let stats = Stats::new(&model);
        let is_over = AtomicBool::new(false);
        /// Ends the readers even if an assertion fails.
        struct Ends<'a>(&'a AtomicBool);
        impl Drop for Ends<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let count = |file: Ino, first: u64| {
            for n in (first..).take_while(|_| !is_over.load(Relaxed)) {
                stats.opened(file);
                let bytes = (n % 3 > 0).then_some(10);
                stats.read(file, bytes, Duration::from_micros(n % 1000));
            }
        };
        let base = model.tree().find("base_model/norms.safetensors").unwrap();
        std::thread::scope(|scope| {
            let count = &count;
            for n in 0..READERS {
                // The last one reads a base file, the others experts.
                let expert = stats.experts[n as usize % 3].2;
                let file = if n + 1 < READERS { expert } else { base };
                scope.spawn(move || count(file, n));
            }
            let _ends = Ends(&is_over);
            let mut before = stats.snapshot(model.layout());
            for _ in 0..SNAPSHOTS {
                let now = stats.snapshot(model.layout());
                let sum = |s: &Snapshot, of: fn(&Use) -> u64| of(&s.base) + of(&s.experts);
                let opens = sum(&now, |used| used.opens);
                let reads = sum(&now, |used| used.reads) + now.errors;
                assert!(opens <= now.requests["open"], "{now:?}");
                assert!(reads <= now.requests["read"], "{now:?}");
                for of in [|u: &Use| u.opens, |u: &Use| u.reads, |u: &Use| u.bytes] {
                    assert!(of(&before.base) <= of(&now.base), "{before:?} {now:?}");
                    assert!(
                        of(&before.experts) <= of(&now.experts),
                        "{before:?} {now:?}"
                    );
                }
                let latency = now.latency;
                assert!(latency.p50_us <= latency.p90_us && latency.p90_us <= latency.p99_us);
                assert!(latency.p99_us <= latency.max_us && latency.max_us < 1000);
                before = now;
            }
        });
        let last = stats.snapshot(model.layout());
        let reads = last.base.reads + last.experts.reads;
        assert_eq!(last.requests["read"], reads + last.errors);
        assert_eq!(last.base.bytes + last.experts.bytes, 10 * reads);
    }

    #[test]
    fn numbers_are_given_of_layers_whose_experts_are_not_counted_from_0_without_a_gap() {
        let cases: [(&[u32], &[Span]); 6] = [
            (&[0], &[]),
            (&[0, 1, 2], &[]),
            (&[0, 2, 4], &[(0, 0), (2, 2), (4, 4)]),
            (&[1, 2], &[(1, 2)]),
            (&[5], &[(5, 5)]),
            (
                &[0, 1, 7, 8, 100_000],
                &[(0, 1), (7, 8), (100_000, 100_000)],
            ),
        ];
        for (experts, runs) in cases {
            let folder = tempfile::tempdir().unwrap();
            let model = model(folder.path(), experts);
            let said = Stats::new(&model).snapshot(model.layout());
            assert_eq!(said.layers, [(0, experts.len() as u32)]);
            let said = said.numbers.into_iter().flat_map(|(_, runs)| runs);
            assert_eq!(said.collect::<Vec<_>>(), runs, "{experts:?}");
        }
    }

    #[test]
    fn numbers_that_are_too_long_for_an_attribute_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let even: Vec<u32> = (0..10_000).map(|n| 2 * n).collect();
        let model = model(folder.path(), &even);
        let stats = Stats::new(&model);
        let attribute = |name: &str| {
            stats
                .attribute(name.as_bytes(), model.layout(), None)
                .unwrap()
        };
        let value = attribute(STATS_ATTRIBUTE);
        assert!(value.len() <= MAX_ATTRIBUTE_BYTES);
        let said: Snapshot = serde_json::from_slice(&value).unwrap();
        assert_eq!((said.layers, said.numbers), (vec![(0, 10_000)], vec![]));
        // Which experts were used is said all the same.
        stats.opened(stats.experts[9_999].2);
        let used: Vec<ExpertUse> = serde_json::from_slice(&attribute("user.odmoe.heat.0")).unwrap();
        assert_eq!(used, [(19_998, 1, 0, 0)]);
    }

    #[test]
    fn buckets_follow_each_other_without_gap_and_are_at_most_an_eighth_wide() {
        let mut last = 0;
        for micros in 0..100_000 {
            let bucket = Histogram::bucket(micros);
            assert!(bucket == last || bucket == last + 1);
            assert!(Histogram::end(bucket) >= micros);
            assert!(Histogram::end(bucket) - micros <= micros / 8);
            last = bucket;
        }
        assert_eq!(Histogram::bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_those_of_what_was_added() {
        let histogram = Histogram::default();
        assert_eq!(histogram.get(), Latency::default());
        (1..=100).for_each(|n| histogram.add(Duration::from_micros(n)));
        let latency = histogram.get();
        assert!((50..=56).contains(&latency.p50_us), "{latency:?}");
        assert!((90..=100).contains(&latency.p90_us), "{latency:?}");
        assert_eq!(latency.max_us, 100);
    }
}
