//! The checks of `fuzz/` on the seeds and on randomly damaged seeds: a little fuzzing in every run of
//! the tests.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use proptest::sample::Index;

#[path = "../fuzz/checks.rs"]
mod checks;
#[path = "support/seeds.rs"]
mod seeds;

#[global_allocator]
static ALLOCATOR: checks::Counting = checks::Counting;

static CODEC: LazyLock<Vec<Vec<u8>>> = LazyLock::new(seeds::codec);
static GGUF: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| small(seeds::gguf()));
static MODEL: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| small(seeds::model()));

fn small(mut seeds: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    seeds.retain(|seed| seed.len() <= 4096);
    seeds
}

/// One byte, changed, removed or put in; or the end, cut off.
#[derive(Debug, Clone, Copy)]
enum Damage {
    Change(u8),
    Remove,
    Insert(u8),
    Cut,
}

fn damage() -> impl Strategy<Value = (Index, Damage)> {
    let damage = prop_oneof![
        4 => any::<u8>().prop_map(Damage::Change),
        1 => Just(Damage::Remove),
        1 => any::<u8>().prop_map(Damage::Insert),
        1 => Just(Damage::Cut),
    ];
    (any::<Index>(), damage)
}

fn damaged(seed: &[u8], damages: &[(Index, Damage)]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for (index, damage) in damages {
        if bytes.is_empty() {
            break;
        }
        let at = index.index(bytes.len());
        match *damage {
            Damage::Change(byte) => bytes[at] = byte,
            Damage::Remove => drop(bytes.remove(at)),
            Damage::Insert(byte) => bytes.insert(at, byte),
            Damage::Cut => bytes.truncate(at),
        }
    }
    bytes
}

#[test]
fn every_seed_passes() {
    let (gguf, model) = (seeds::gguf(), seeds::model());
    assert!(gguf.len() > 60 && model.len() > 60);
    gguf.iter().for_each(|seed| checks::gguf(seed));
    model.iter().for_each(|seed| checks::model(seed));
    CODEC.iter().for_each(|seed| checks::codec(seed));
}

/// Inputs that broke something are kept, and must never do so again.
#[test]
fn inputs_that_fuzzers_found_pass() {
    for (check, name) in [
        (checks::gguf as fn(&[u8]), "gguf"),
        (checks::model, "model"),
        (checks::slices, "slices"),
        (checks::codec, "codec"),
    ] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data/fuzzed")
            .join(name);
        for entry in folder.read_dir().into_iter().flatten() {
            check(&fs::read(entry.unwrap().path()).unwrap());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damaged_headers_are_headers_or_errors(seed in any::<Index>(), damages in prop::collection::vec(damage(), 1..8)) {
        checks::gguf(&damaged(&GGUF[seed.index(GGUF.len())], &damages));
    }

    #[test]
    fn damaged_models_are_trees_or_errors(seed in any::<Index>(), damages in prop::collection::vec(damage(), 1..8)) {
        checks::model(&damaged(&MODEL[seed.index(MODEL.len())], &damages));
    }

    #[test]
    fn slices_are_what_a_walk_gives(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        checks::slices(&bytes);
    }

    #[test]
    fn damaged_blocks_are_computed(seed in any::<Index>(), damages in prop::collection::vec(damage(), 1..8)) {
        checks::codec(&damaged(&CODEC[seed.index(CODEC.len())], &damages));
    }
}
