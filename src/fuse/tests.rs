//! A fault of our own in a callback, which no file and no kernel can cause from outside.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use fuser::{Config, MountOption, Session};
use tempfile::TempDir;

use super::*;
use crate::gguf::GgmlType;
use crate::gguf::write::Writer;
use crate::model::Model;
use crate::served::Owner;

/// The name of the callback that must panic.
static PANICS: Mutex<Option<&str>> = Mutex::new(None);

pub(super) fn panic_if_wanted(operation: &str) {
    let wanted = *PANICS.lock().unwrap();
    assert_ne!(wanted, Some(operation), "as the test wants");
}

fn model(folder: &TempDir) -> Model {
    let mut writer = Writer::new();
    let f32 = GgmlType::from_name("F32").unwrap();
    for name in ["gate", "down", "up"] {
        writer.tensor(&format!("blk.0.ffn_{name}_exps.weight"), &[32, 32, 2], f32);
    }
    let written = writer.header();
    let path = folder.path().join("model.gguf");
    fs::write(&path, &written.bytes).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(written.file_bytes).unwrap();
    Model::open(&path).unwrap()
}

/// Promise: A panic in a callback costs its caller EIO, and the mount goes on.
#[test]
fn a_panic_in_a_callback_is_eio_for_its_caller_and_the_mount_goes_on() {
    let folder = TempDir::new().unwrap();
    let root = folder.path().join("mnt");
    fs::create_dir(&root).unwrap();
    let (uid, gid) = crate::sys::process::effective_ids();
    let served = Served::new(model(&folder), Owner { uid, gid }, Cache::Model);
    let file_system = OdmoeFs::new(served);
    let mut config = Config::default();
    config.mount_options = vec![MountOption::RO];
    config.n_threads = Some(2);
    let session = Session::new(file_system, &root, &config)
        .unwrap()
        .spawn()
        .unwrap();

    let expert = root.join("experts/layer_00_expert_000.safetensors");
    let read = || fs::read(&expert).map(|bytes| bytes.len());
    let size = read().unwrap();
    let eio = |result: io::Result<usize>| result.unwrap_err().raw_os_error() == Some(libc::EIO);
    let panic_in = |operation| *PANICS.lock().unwrap() = operation;
    // Each worker, and each more than once.
    for _ in 0..8 {
        panic_in(Some("read"));
        assert!(eio(read()));
        panic_in(Some("lookup"));
        assert!(eio(fs::metadata(root.join("experts/nothing")).map(|_| 0)));
        panic_in(None);
        assert_eq!(read().unwrap(), size);
    }
    let held = File::open(&expert).unwrap();
    panic_in(Some("read"));
    assert!(eio(held.read_at(&mut [0; 16], 0)));
    panic_in(None);
    assert_eq!(held.read_at(&mut [0; 16], 0).unwrap(), 16);
    drop(held);
    drop(session);
}
