//! The tree of a fixed model, byte for byte: it is the same on every machine and in every version
//! with the same layout number. If this test fails, users' trees change: raise `odmoe.layout`.

use std::path::Path;
use std::process::Command;

use odmoe_fs::model::Model;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Writes `torture-small`, which has one of nearly every trap, with a payload of distinct words.
fn torture(folder: &Path, options: &[&str]) {
    let program = Path::new(env!("CARGO_BIN_EXE_odmoe-fs")).with_file_name("examples/sparse_gguf");
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/torture-small.json");
    let written = Command::new(&program)
        .args([&table, &folder.join("torture.gguf")])
        .arg("--fill-words")
        .args(options)
        .output()
        .unwrap_or_else(|e| panic!("{program:?}: {e}; `cargo build --examples` makes it"));
    assert!(written.status.success(), "{written:?}");
}

/// A hash of every path, inode number, size and byte.
fn hash(model: &Path) -> String {
    let model = Model::open(model).unwrap();
    let tree = model.tree();
    let mut hash = Sha256::new();
    for ino in 1..=tree.len() {
        let (path, size) = (tree.path(ino).unwrap(), tree.size(ino).unwrap());
        hash.update(format!("{ino} {:?} {path:?} {size}\n", tree.kind(ino)));
        hash.update(model.read(ino).unwrap());
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn the_tree_of_torture_small_is_what_it_always_was() {
    let folder = TempDir::new().unwrap();
    torture(folder.path(), &[]);
    assert_eq!(
        hash(&folder.path().join("torture.gguf")),
        "619e0815fc27b5dff182ec3ec851f1b3e09ecf3b670d18294076494f0cb9ceca"
    );
}

#[test]
fn the_tree_of_torture_small_in_three_parts_is_what_it_always_was() {
    let folder = TempDir::new().unwrap();
    torture(folder.path(), &["--splits", "3", "--first-empty"]);
    let part = folder.path().join("torture-00002-of-00003.gguf");
    assert_eq!(
        hash(&part),
        "be2993a587f0d1227e6c01a8ed62adbe4c29f4e8581b5aea0f9da840cb19f4dd"
    );
}
