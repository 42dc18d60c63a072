//! What a file system answers to every question, those included that no kernel asks.

mod reading;

use std::fs::{self, File};
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::gguf::GgmlType;
use crate::gguf::write::Writer;
use crate::stats::{STATS_ATTRIBUTE, Snapshot};

const OWNER: Owner = Owner { uid: 7, gid: 8 };
const EXPERT: &str = "experts/layer_00_expert_002.safetensors";

/// A model of three experts and a norm, whose bytes count up, served.
struct Sample {
    _folder: TempDir,
    path: PathBuf,
    served: Served,
}

impl Sample {
    fn new(cache: Cache, counts: bool) -> Self {
        let folder = TempDir::new().unwrap();
        let mut writer = Writer::new();
        let f32 = GgmlType::from_name("F32").unwrap();
        for name in ["gate", "down", "up"] {
            writer.tensor(&format!("blk.0.ffn_{name}_exps.weight"), &[32, 32, 3], f32);
        }
        writer.tensor("output_norm.weight", &[32], f32);
        let written = writer.header();
        let mut bytes = written.bytes;
        let payload = bytes.len()..written.file_bytes as usize;
        bytes.extend(payload.map(|n| (n % 251) as u8));
        let path = folder.path().join("model.gguf");
        fs::write(&path, bytes).unwrap();
        let mut served = Served::new(Model::open(&path).unwrap(), OWNER, cache);
        if counts {
            served.count();
        }
        Self {
            _folder: folder,
            path,
            served,
        }
    }

    fn find(&self, path: &str) -> Ino {
        self.served.model().tree().find(path).unwrap()
    }

    fn read(&self, file: Ino, offset: u64, len: u64) -> Result<Vec<u8>, Refusal> {
        let mut answer = None;
        let reply = |read: Result<&[u8], Refusal>| answer = Some(read.map(<[u8]>::to_vec));
        self.served.read(file, offset, len, reply);
        answer.unwrap()
    }

    /// The names, inodes and next offsets of so many entries.
    fn list(&self, directory: Ino, offset: u64, most: usize) -> Vec<(String, Ino, u64)> {
        let mut listed = Vec::new();
        let add = |entry: Attributes, next: u64, name: &str| {
            listed.push((name.to_owned(), entry.ino, next));
            match listed.len() < most {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        };
        self.served.list(directory, offset, add).unwrap();
        listed
    }

    fn counted(&self) -> Snapshot {
        let name = STATS_ATTRIBUTE.as_bytes();
        let value = self.served.extended_attribute(ROOT, name).unwrap();
        serde_json::from_slice(&value).unwrap()
    }
}

#[test]
fn names_lead_to_attributes() {
    let sample = Sample::new(Cache::Mount, false);
    let served = &sample.served;
    let experts = served.lookup(ROOT, b"experts").unwrap();
    assert_eq!((experts.kind, experts.size), (Kind::Directory, 0));
    assert_eq!((experts.permissions, experts.links), (0o555, 2));
    let name = b"layer_00_expert_002.safetensors";
    let expert = served.lookup(experts.ino, name).unwrap();
    assert_eq!(expert.ino, sample.find(EXPERT));
    assert_eq!(
        (expert.kind, expert.permissions, expert.links),
        (Kind::File, 0o444, 1)
    );
    assert_eq!(expert.size, served.model().tree().size(expert.ino).unwrap());
    assert_eq!(expert.blocks, expert.size.div_ceil(512));
    assert_eq!(expert.owner, OWNER);
    assert_eq!(
        expert.modified,
        fs::metadata(&sample.path).unwrap().modified().unwrap()
    );
    assert_eq!(served.attributes(expert.ino).unwrap(), expert);
    // Itself, its name in itself, and `..` of both directories.
    assert_eq!(served.attributes(ROOT).unwrap().links, 4);
}

#[test]
fn every_node_leads_to_itself_and_to_its_directory() {
    let sample = Sample::new(Cache::Mount, false);
    let tree = sample.served.model().tree();
    for ino in ROOT..=tree.len() {
        let found = |name| sample.served.lookup(ino, name).unwrap().ino;
        assert_eq!(found(b"."), ino);
        assert_eq!(Some(found(b"..")), tree.parent(ino));
    }
}

#[test]
fn what_is_not_there_is_refused() {
    let sample = Sample::new(Cache::Mount, false);
    let served = &sample.served;
    let beyond = served.model().tree().len() + 1;
    let expert = sample.find(EXPERT);
    for name in [&b"nothing"[..], b"", b"Experts", b"experts\0", &[0xff; 255]] {
        let refused = served.lookup(ROOT, name).unwrap_err();
        assert!(matches!(refused, Refusal::NotFound), "{name:?}: {refused}");
    }
    for parent in [0, expert, beyond, u64::MAX] {
        let refused = served.lookup(parent, b"experts").unwrap_err();
        assert!(matches!(refused, Refusal::NotFound), "{parent}: {refused}");
    }
    for parent in [0, beyond, u64::MAX] {
        for name in [&b"."[..], b".."] {
            let refused = served.lookup(parent, name).unwrap_err();
            assert!(matches!(refused, Refusal::NotFound), "{parent}: {refused}");
        }
    }
    let refused = served.lookup(ROOT, &[b'x'; 256]).unwrap_err();
    assert!(matches!(refused, Refusal::NameTooLong), "{refused}");
    for ino in [0, beyond, u64::MAX] {
        let refused = served.attributes(ino).unwrap_err();
        assert!(matches!(refused, Refusal::NotFound), "{ino}: {refused}");
    }
    for ino in [0, expert, beyond] {
        let refused = served.list(ino, 0, |_, _, _| ControlFlow::Continue(()));
        assert!(matches!(refused, Err(Refusal::NotADirectory)), "{ino}");
    }
}

#[test]
fn a_directory_can_be_listed_from_every_entry_on() {
    let sample = Sample::new(Cache::Mount, false);
    let directory = sample.find("experts");
    let all = sample.list(directory, 0, 99);
    let names: Vec<_> = all.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names[..2], [".", ".."]);
    assert_eq!(names.len(), 6);
    assert!(names[2..].is_sorted() && names.contains(&"registry.json"));
    assert_eq!((all[0].1, all[1].1), (directory, ROOT));
    for from in 0..=all.len() {
        for most in 1..=all.len() {
            let end = all.len().min(from + most);
            let listed = sample.list(directory, from as u64, most);
            assert_eq!(listed, all[from..end], "{most} from {from}");
        }
    }
    for from in [7, 1 << 40, u64::MAX - 1, u64::MAX] {
        assert_eq!(sample.list(directory, from, 99), [], "{from}");
    }
    assert_eq!(
        sample.list(ROOT, 0, 99)[..2].iter().map(|e| e.1).max(),
        Some(ROOT)
    );
}

#[test]
fn reads_give_the_bytes_of_the_model_up_to_the_end_of_the_file() {
    for cache in [Cache::Mount, Cache::Model, Cache::Both] {
        let sample = Sample::new(cache, false);
        let file = sample.find(EXPERT);
        let whole = sample.served.model().read(file).unwrap();
        let size = whole.len() as u64;
        for offset in [
            0,
            1,
            8,
            4095,
            4096,
            5000,
            size - 1,
            size,
            size + 1,
            u64::MAX,
        ] {
            for len in [0, 1, 100, 4096, 70_000, u64::MAX] {
                let from = offset.min(size) as usize;
                let to = offset.saturating_add(len).min(size) as usize;
                let read = sample.read(file, offset, len).unwrap();
                assert_eq!(read, whole[from..to], "{len} bytes at {offset}");
            }
        }
        // Nothing of what is no file.
        assert_eq!(sample.read(ROOT, 0, 10).unwrap(), b"");
        assert_eq!(sample.read(u64::MAX, 0, 10).unwrap(), b"");
    }
}

#[test]
fn a_part_that_has_changed_is_refused_and_what_is_not_of_it_is_not() {
    let sample = Sample::new(Cache::Mount, true);
    let file = sample.find(EXPERT);
    let part = File::options().write(true).open(&sample.path).unwrap();
    part.set_len(1000).unwrap();
    for _ in 0..2 {
        let refused = sample.read(file, 5000, 100).unwrap_err();
        assert!(
            matches!(refused, Refusal::Io(ReadError::Changed { .. })),
            "{refused}"
        );
    }
    assert_eq!(sample.read(file, 0, 8).unwrap().len(), 8);
    let registry = sample.find("experts/registry.json");
    assert!(sample.read(registry, 0, 100).unwrap().starts_with(b"{"));
    let counted = sample.counted();
    assert_eq!((counted.errors, counted.requests["read"]), (2, 4));
}

#[test]
fn files_need_no_opening_unless_opens_are_counted_or_the_model_keeps_the_pages() {
    for (cache, counts, opening) in [
        (Cache::Mount, false, Opening::NotNeeded),
        (Cache::Both, false, Opening::NotNeeded),
        (Cache::Mount, true, Opening::KeepsPages),
        (Cache::Both, true, Opening::KeepsPages),
        (Cache::Model, false, Opening::KeepsNothing),
        (Cache::Model, true, Opening::KeepsNothing),
    ] {
        let sample = Sample::new(cache, counts);
        assert_eq!(sample.served.open(sample.find(EXPERT)), opening);
    }
}

#[test]
fn the_room_is_that_of_the_tree() {
    let sample = Sample::new(Cache::Mount, false);
    let tree = sample.served.model().tree();
    let bytes: u64 = tree.files().map(|file| tree.size(file).unwrap()).sum();
    let room = sample.served.room();
    assert_eq!(room.blocks, bytes.div_ceil(room.block_bytes.into()));
    assert_eq!((room.nodes, room.name_bytes), (tree.len(), 255));
}

#[test]
fn only_the_root_has_extended_attributes_and_only_where_something_is_counted() {
    let sample = Sample::new(Cache::Mount, false);
    let name = STATS_ATTRIBUTE.as_bytes();
    for ino in [ROOT, sample.find(EXPERT)] {
        let value = sample.served.extended_attribute(ino, name);
        assert!(matches!(value, Err(Refusal::Unsupported)));
        let names = sample.served.extended_attributes(ino);
        assert!(matches!(names, Err(Refusal::Unsupported)));
    }
    let sample = Sample::new(Cache::Mount, true);
    let names = sample.served.extended_attributes(ROOT).unwrap();
    assert_eq!(names, b"user.odmoe.stats\0user.odmoe.heat.0\0");
    assert_eq!(
        sample
            .served
            .extended_attributes(sample.find(EXPERT))
            .unwrap(),
        b""
    );
    for (ino, name) in [
        (ROOT, &b"user.odmoe.heat.1"[..]),
        (ROOT, b"user.odmoe.heat.x"),
        (ROOT, b"security.capability"),
        (ROOT, b"user.\xff"),
        (sample.find(EXPERT), name),
    ] {
        let value = sample.served.extended_attribute(ino, name);
        assert!(matches!(value, Err(Refusal::NoAttribute)), "{name:?}");
    }
}

#[test]
fn each_request_is_counted_once() {
    let sample = Sample::new(Cache::Mount, true);
    let (served, file) = (&sample.served, sample.find(EXPERT));
    served.lookup(ROOT, b"experts").unwrap();
    served.lookup(ROOT, b"nothing").unwrap_err();
    served.attributes(file).unwrap();
    served.open(file);
    sample.read(file, 0, 100).unwrap();
    sample
        .read(sample.find("base_model/metadata.json"), 0, 10)
        .unwrap();
    sample.list(ROOT, 0, 99);
    served.room();
    let counted = sample.counted();
    let expected = [
        ("getattr", 1),
        ("lookup", 2),
        ("open", 1),
        ("read", 2),
        ("readdir", 1),
        ("statfs", 1),
    ];
    let requests = counted.requests.iter().map(|(name, n)| (name.as_str(), *n));
    assert_eq!(requests.collect::<Vec<_>>(), expected);
    let used = (
        counted.experts.opens,
        counted.experts.reads,
        counted.experts.bytes,
    );
    assert_eq!(used, (1, 1, 100));
    assert_eq!((counted.base.reads, counted.base.bytes), (1, 10));
}
