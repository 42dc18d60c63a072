//! Reading ahead shows in nothing but time: here are the bytes that readers get meanwhile.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

use parking_lot::MutexGuard;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;
use tempfile::TempDir;

use super::super::*;
use crate::gguf::write::Writer;
use crate::gguf::{GgmlType, Value};
use crate::model::Bytes;
use crate::source::PageCache;
use crate::source::fetch::buffers::{BUFFERS, DISK_POOL};
use crate::source::fetch::tests::{alone, folder_on_disk, wait_for};
use crate::sys;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// What the kernel asks for at a time.
const REQUEST_BYTES: u64 = 128 * KIB;

/// One layer of experts on disk, alone with the buffers of the process.
struct Sample {
    _folder: TempDir,
    paths: Vec<PathBuf>,
    served: Served,
    _alone: MutexGuard<'static, ()>,
}

/// What a model is made of.
#[derive(Debug, Clone, Copy)]
struct Kind {
    experts: u64,
    /// Of each matrix, a row having 1024 numbers.
    rows: u64,
    /// `F32` rows are pages, so that pages of files are pages of the model; those of `Q8_0` have
    /// 1088 bytes.
    ggml_type: &'static str,
    /// One for each matrix, or one for all.
    parts: usize,
    /// Whether payloads are holes.
    sparse: bool,
}

impl Kind {
    const fn sparse(experts: u64, rows: u64) -> Self {
        Self {
            experts,
            rows,
            ggml_type: "F32",
            parts: 1,
            sparse: true,
        }
    }

    fn write(self, folder: &Path) -> Vec<PathBuf> {
        let matrices = ["down", "gate", "up"];
        let each = matrices.len() / self.parts;
        let write_part = |(part, matrices): (usize, &[&str])| {
            let mut writer = Writer::new();
            let alignment = if self.ggml_type == "F32" { 4096 } else { 32 };
            writer.key_value("general.alignment", &Value::U32(alignment));
            writer.key_value("split.no", &Value::U16(part as u16));
            writer.key_value("split.count", &Value::U16(self.parts as u16));
            writer.key_value("split.tensors.count", &Value::I32(3));
            for matrix in matrices {
                let name = format!("blk.0.ffn_{matrix}_exps.weight");
                let ggml_type = GgmlType::from_name(self.ggml_type).unwrap();
                writer.tensor(&name, &[1024, self.rows, self.experts], ggml_type);
            }
            let written = writer.header();
            let mut bytes = written.bytes;
            if !self.sparse {
                while (bytes.len() as u64) < written.file_bytes {
                    let word = scramble(part as u64, bytes.len() as u64);
                    bytes.extend_from_slice(&word.to_le_bytes());
                }
                bytes.truncate(written.file_bytes as usize);
            }
            let path = folder.join(format!("m-{:05}-of-{:05}.gguf", part + 1, self.parts));
            fs::write(&path, bytes).unwrap();
            let file = File::options().write(true).open(&path).unwrap();
            file.set_len(written.file_bytes).unwrap();
            file.sync_all().unwrap();
            path
        };
        (0..).zip(matrices.chunks(each)).map(write_part).collect()
    }

    fn make(self) -> Sample {
        let alone = alone();
        let folder = folder_on_disk();
        let paths = self.write(folder.path());
        let sample = Sample {
            served: serve(&paths[0]),
            _folder: folder,
            paths,
            _alone: alone,
        };
        sample.evict();
        sample
    }
}

/// Words that no other place has.
fn scramble(part: u64, place: u64) -> u64 {
    let z = (part << 48 | place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (z ^ z >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ part
}

impl Sample {
    /// Takes the model out of the page cache.
    fn evict(&self) {
        let files = self.paths.iter().map(|path| File::open(path).unwrap());
        files.for_each(|file| sys::read::forget(&file));
    }

    fn experts(&self) -> Vec<Ino> {
        let tree = self.served.model().tree();
        let all = tree.children(tree.find("experts").unwrap()).unwrap();
        all.filter(|&file| tree.name(file) != Some("registry.json"))
            .collect()
    }

    fn size(&self, file: Ino) -> u64 {
        self.served.model().tree().size(file).unwrap()
    }

    /// Whether a byte of a file lies in memory that was fetched.
    fn is_held(&self, file: Ino, offset: u64) -> bool {
        let mut space = Vec::new();
        let range = offset..offset + 1;
        let bytes = self.served.model().bytes(file, range, &mut space);
        matches!(bytes.unwrap(), Bytes::Held(_))
    }
}

/// A model as a mount serves it, with no reader yet.
fn serve(path: &Path) -> Served {
    let mut model = Model::open(path).unwrap();
    model.set_page_cache(PageCache::Unchanged);
    Served::new(model, super::OWNER, Cache::Mount)
}

/// The bytes that a request gets.
fn read(served: &Served, file: Ino, offset: u64, len: u64) -> Result<Vec<u8>, Refusal> {
    let mut answer = None;
    let reply = |read: Result<&[u8], Refusal>| answer = Some(read.map(<[u8]>::to_vec));
    served.read(file, offset, len, reply);
    answer.unwrap()
}

/// Requests for a file in order: from a place on, so many, so large.
#[derive(Debug, Clone)]
struct Reader {
    file: Index,
    start: Index,
    block: u64,
    blocks: u64,
    /// Whether every second request arrives before the first.
    swapped: bool,
}

impl Reader {
    fn requests(&self, sample: &Sample) -> Vec<(Ino, u64, u64)> {
        let file = *self.file.get(&sample.experts());
        // From the start of the file, or from the middle of it, and some beyond the end.
        let places = sample.size(file) as usize + 2;
        let start = self.start.index(2 * places).saturating_sub(places) as u64;
        let order = |n: u64| if self.swapped { n ^ 1 } else { n };
        let places = (0..self.blocks).map(|n| start + order(n) * self.block);
        places.map(|place| (file, place, self.block)).collect()
    }
}

fn readers() -> impl Strategy<Value = Vec<Reader>> {
    let block = prop_oneof![
        prop::sample::select(vec![0, 1, 4096, 70_000, REQUEST_BYTES, MIB, 3 * MIB]),
        1..2 * MIB,
    ];
    let reader = (
        any::<(Index, Index, bool)>(),
        block,
        prop_oneof![Just(40u64), 1..40u64],
    );
    let reader = reader.prop_map(|((file, start, swapped), block, blocks)| Reader {
        file,
        start,
        block,
        blocks,
        swapped,
    });
    prop::collection::vec(reader, 1..7)
}

#[test]
fn readers_get_the_bytes_of_the_model_in_whatever_order_they_read() {
    for (ggml_type, parts, rows) in [
        ("F32", 1, 300),
        ("F32", 3, 300),
        ("Q8_0", 1, 1501),
        ("Q8_0", 3, 1501),
    ] {
        let sample = Kind {
            experts: 3,
            rows,
            ggml_type,
            parts,
            sparse: false,
        }
        .make();
        let files = sample.experts();
        let wholes: Vec<_> = files
            .iter()
            .map(|&file| sample.served.model().read(file).unwrap())
            .collect();
        let check = |served: &Served, (file, offset, len): (Ino, u64, u64)| {
            let whole = &wholes[files.iter().position(|&f| f == file).unwrap()];
            let end = whole.len().min((offset + len) as usize);
            let wanted = &whole[end.min(offset as usize)..end];
            let got = read(served, file, offset, len).unwrap();
            assert!(got == wanted, "{len} bytes at {offset} of {file}");
        };
        let config = ProptestConfig {
            cases: 8,
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        let run = |(readers, threads): (Vec<Reader>, bool)| {
            sample.evict();
            let served = serve(&sample.paths[0]);
            let requests = readers.iter().map(|reader| reader.requests(&sample));
            if threads {
                std::thread::scope(|scope| {
                    for requests in requests {
                        scope.spawn(|| requests.into_iter().for_each(|r| check(&served, r)));
                    }
                });
            } else {
                let mut requests: Vec<_> = requests.map(Vec::into_iter).collect();
                while !requests.is_empty() {
                    requests.retain_mut(|r| r.next().map(|r| check(&served, r)).is_some());
                }
            }
            drop(served);
            wait_for(|| DISK_POOL.unused() == BUFFERS);
            Ok(())
        };
        let mut runner = TestRunner::new(config);
        runner.run(&(readers(), any::<bool>()), run).unwrap();
    }
}

#[test]
fn many_readers_share_the_buffers_and_give_all_of_them_back() {
    let kind = Kind {
        // Fewer than the predictor knows at a time.
        experts: (BUFFERS + BUFFERS / 2) as u64,
        rows: 60,
        ggml_type: "F32",
        parts: 1,
        sparse: false,
    };
    let sample = kind.make();
    let model = Model::open(&sample.paths[0]).unwrap();
    let files = sample.experts();
    let size = sample.size(files[0]);
    let mut fewest = BUFFERS;
    for offset in (0..size).step_by(REQUEST_BYTES as usize) {
        for &file in &files {
            let mut wanted = vec![0; REQUEST_BYTES.min(size - offset) as usize];
            model.read_at(file, offset, &mut wanted).unwrap();
            let got = read(&sample.served, file, offset, REQUEST_BYTES).unwrap();
            assert!(got == wanted, "{file} at {offset}");
            fewest = fewest.min(DISK_POOL.unused());
        }
    }
    assert_eq!(fewest, 0, "there are more readers than buffers");
    // All have read to the end.
    wait_for(|| DISK_POOL.unused() == BUFFERS);
}

#[test]
fn readers_that_stop_midway_lose_their_buffers_to_others() {
    let sample = Kind::sparse(BUFFERS as u64 + 1, 4000).make();
    let files = sample.experts();
    let (last, stopped) = files.split_last().unwrap();
    let read_in_order = |file: Ino, blocks: Range<u64>| {
        for n in blocks {
            read(&sample.served, file, n * REQUEST_BYTES, REQUEST_BYTES).unwrap();
        }
    };
    stopped.iter().for_each(|file| read_in_order(*file, 0..2));
    assert_eq!(DISK_POOL.unused(), 0);
    read_in_order(*last, 0..300);
    assert!(sample.is_held(*last, 300 * REQUEST_BYTES));
    drop(sample.served);
    wait_for(|| DISK_POOL.unused() == BUFFERS);
}

#[test]
fn scattered_reads_of_an_expert_are_answered_from_memory() {
    let kind = Kind {
        experts: 2,
        rows: 700,
        ggml_type: "F32",
        parts: 3,
        sparse: false,
    };
    let sample = kind.make();
    let file = sample.experts()[0];
    let whole = sample.served.model().read(file).unwrap();
    let places = (0..sample.size(file) - REQUEST_BYTES).step_by(700 << 10);
    for place in places.clone().take(8) {
        let got = read(&sample.served, file, place, REQUEST_BYTES).unwrap();
        assert!(got == whole[place as usize..][..REQUEST_BYTES as usize]);
    }
    for place in places {
        assert!(sample.is_held(file, place + MIB / 2), "{place}");
    }
    // All of it, in any order.
    for n in (0..sample.size(file).div_ceil(MIB)).rev() {
        let place = n * MIB;
        let got = read(&sample.served, file, place, MIB).unwrap();
        assert!(got == whole[place as usize..][..got.len()]);
    }
    wait_for(|| DISK_POOL.unused() == BUFFERS);
}

#[test]
fn nothing_is_fetched_where_the_model_keeps_its_pages() {
    let sample = Kind::sparse(2, 3000).make();
    let model = Model::open(&sample.paths[0]).unwrap();
    let served = Served::new(model, super::OWNER, Cache::Model);
    for n in 0..8 {
        read(
            &served,
            sample.experts()[0],
            n * REQUEST_BYTES,
            REQUEST_BYTES,
        )
        .unwrap();
    }
    assert_eq!(DISK_POOL.unused(), BUFFERS);
}
