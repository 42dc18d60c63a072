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
            stats.read(file, bytes);
            stats.took(Duration::from_micros(n % 1000));
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
