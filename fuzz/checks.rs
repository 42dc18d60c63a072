//! What must hold for any bytes: in the GGUF reader, on the whole way from bytes to files, in the
//! slices that answer reads, and in the numbers of blocks.
//!
//! The fuzz targets call these with a fuzzer's bytes; `tests/fuzzed.rs` calls them with the seeds
//! and with damaged seeds, so that every run of the tests fuzzes a little.

use std::alloc::{GlobalAlloc, Layout as Allocation, System};
use std::cell::Cell;
use std::ffi::OsStr;
use std::io::{self, BufRead, Cursor, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;

use odmoe_fs::codec::{Codec, Float, Map, Output};
use odmoe_fs::form::Form;
use odmoe_fs::gguf::{GGML_TYPES, Header, Joined, ModelHeader, PartName, looks_like_raw_cut};
use odmoe_fs::hf::{Directory, Inputs, Naming};
use odmoe_fs::layout::{Doc, Layout};
use odmoe_fs::tree::{Content, DocId, Kind, NewFile, Origin, ROOT, RecipeId, Tree};

/// Heap that a byte of a header may cost, at most: a key/value of 14 bytes becomes a record, an
/// entry in a set of names, and what both leave unused as they grow.
const BYTES_PER_BYTE: usize = 64;
/// Heap for each expert that a tensor's shape announces: a file with a name, its tensors and runs.
const BYTES_PER_EXPERT: usize = 1024;
/// Heap that any input may cost: a key or string of 64 KiB may lie in the hole of a sparse file.
const CONSTANT_BYTES: usize = 192 << 10;
/// Calls of the reader per byte of a header, at most: a call takes a byte or more.
const CALLS_PER_BYTE: u64 = 4;
/// Calls to look behind the tensors of all headers that follow each other in a file, at most.
const CALLS_BETWEEN_HEADERS: u64 = 64 * 16;

// --- memory and work, counted -----------------------------------------------------------------

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, which also records each thread's peak.
pub struct Counting;

fn count(grown: usize, shrunk: usize) {
    // A thread that is ending no longer has counters.
    let _ = LIVE.try_with(|live| {
        let now = live.get().wrapping_add(grown).wrapping_sub(shrunk);
        live.set(now);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now)));
    });
}

// SAFETY: all of it is the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Allocation) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Allocation) {
        count(0, layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The result of some work, and its peak of heap.
fn measured<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = work();
    (result, PEAK.get().saturating_sub(before))
}

/// A reader that counts how often it is called.
struct Counted<'a> {
    bytes: Cursor<&'a [u8]>,
    calls: &'a Cell<u64>,
}

impl Counted<'_> {
    fn called(&self) {
        self.calls.set(self.calls.get() + 1);
    }
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.called();
        self.bytes.read(buffer)
    }
}

impl BufRead for Counted<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.called();
        self.bytes.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.bytes.consume(count);
    }
}

impl Seek for Counted<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.called();
        self.bytes.seek(to)
    }
}

fn read_header(bytes: &[u8], file_bytes: u64) -> Option<Header> {
    let calls = Cell::new(0);
    let reader = Counted {
        bytes: Cursor::new(bytes),
        calls: &calls,
    };
    let (header, peak) = measured(|| Header::read(reader, file_bytes));
    let bound = BYTES_PER_BYTE * bytes.len() + CONSTANT_BYTES;
    assert!(
        peak <= bound,
        "{peak} bytes of heap for {} of header",
        bytes.len()
    );
    let calls = calls.get();
    assert!(
        calls <= CALLS_PER_BYTE * bytes.len() as u64 + 16,
        "{calls} calls for {} bytes",
        bytes.len()
    );
    match header {
        Ok(header) => Some(header),
        Err(e) => {
            assert_is_one_line(&e.to_string());
            None
        }
    }
}

/// A message to a user must not move the cursor, and must not be endless.
fn assert_is_one_line(text: &str) {
    assert!(!text.contains(char::is_control), "{text:?}");
    assert!(text.len() < 4096, "{} bytes of message", text.len());
}

// --- the checks -------------------------------------------------------------------------------

/// Any bytes are a header or an error, in little memory and few steps.
pub fn gguf(data: &[u8]) {
    name(&data[..data.len().min(255)]);
    let Some(header) = read_header(data, data.len() as u64) else {
        return;
    };
    joined(data, &header);
    for tensor in &header.tensors {
        assert!(
            tensor
                .offset
                .checked_add(tensor.bytes)
                .is_some_and(|end| end <= data.len() as u64)
        );
        assert!(!tensor.name.is_empty() && tensor.name.len() <= 63 && !tensor.name.contains('\0'));
    }
    for kv in &header.key_values {
        assert!(
            header.key_value_range.start < kv.range.start
                && kv.range.end <= header.key_value_range.end
        );
        let (whole, peak) = measured(|| kv.read_whole(Cursor::new(data), data.len() as u64));
        whole.expect("what was skipped can be read");
        let bound = BYTES_PER_BYTE * (kv.range.end - kv.range.start) as usize + CONSTANT_BYTES;
        assert!(
            peak <= bound,
            "{peak} bytes of heap for the value of {:?}",
            kv.key
        );
    }
}

/// Looking behind the tensors takes little memory and few steps, too.
fn joined(data: &[u8], first: &Header) {
    let calls = Cell::new(0);
    let reader = Counted {
        bytes: Cursor::new(data),
        calls: &calls,
    };
    let (found, peak) = measured(|| Joined::find(reader, first, data.len() as u64));
    assert!(peak <= BYTES_PER_BYTE * data.len() + CONSTANT_BYTES);
    let most = CALLS_PER_BYTE * data.len() as u64 + CALLS_BETWEEN_HEADERS;
    assert!(calls.get() <= most, "{} calls", calls.get());
    if let Some(joined) = found.expect("memory can be read") {
        assert!(joined.at >= first.data_end() && joined.parts.len() >= 2);
        assert!(data[joined.at as usize..].starts_with(b"GGUF"));
        assert_is_one_line(&joined.to_string());
    }
}

/// Any bytes that a file name can have are those of a part, whose siblings have them too, or not.
fn name(bytes: &[u8]) {
    let name = OsStr::from_bytes(bytes);
    if let Some(part) = PartName::parse(name) {
        assert_eq!(part.sibling(part.number), name);
        let sibling = PartName::parse(&part.sibling(7)).expect("a sibling is a part");
        assert_eq!((sibling.number, sibling.count), (7, part.count));
        assert!(!looks_like_raw_cut(name));
    }
    looks_like_raw_cut(name);
}

/// Any parts of a model are files of a tree, or an error.
///
/// The first byte of the input is the number of parts. Before each part, a byte is the length of
/// the hole that follows it; each part but the last then starts with its own length (two bytes).
pub fn model(data: &[u8]) {
    let Some(files) = parts_of(data) else {
        return;
    };
    let mut headers = Vec::new();
    for (bytes, file_bytes) in &files {
        match read_header(bytes, *file_bytes) {
            Some(header) => headers.push((header, *file_bytes)),
            None => return,
        }
    }
    let form = FORMS[usize::from(data[0] / 4) % FORMS.len()];
    let experts: u64 = headers
        .iter()
        .flat_map(|(header, _)| &header.tensors)
        .map(announced)
        .sum();
    let (laid_out, peak) = measured(|| {
        let model = ModelHeader::join(headers).map_err(|(_, e)| e.to_string())?;
        Layout::new(model, form).map_err(|e| e.to_string())
    });
    let experts = usize::try_from(experts).unwrap_or(usize::MAX);
    let bound = (BYTES_PER_EXPERT.saturating_mul(experts))
        .saturating_add(BYTES_PER_BYTE * data.len() + CONSTANT_BYTES)
        .min(MOST_BYTES);
    assert!(
        peak <= bound,
        "{peak} bytes of heap for {experts} experts in {} bytes",
        data.len()
    );
    match laid_out {
        Ok((layout, tree)) => {
            check_tree(&layout, &tree);
            check_directory(layout.model());
        }
        Err(said) => {
            assert_is_one_line(&said);
            assert!(!said.contains("this is a bug"), "{said}");
        }
    }
}

/// A model has a directory, or there is a reason why not.
fn check_directory(model: &ModelHeader) {
    for naming in [Naming::Checkpoint, Naming::Mlx] {
        match Directory::new(model, naming, &Inputs::default()) {
            Ok(directory) => {
                let tensors = directory.files().iter();
                let tensors = tensors.flat_map(|file| directory.tensors(file));
                assert!(tensors.count() > 0);
            }
            Err(cause) => {
                let said = cause.to_string();
                assert_is_one_line(&said);
                assert!(!said.contains("this is a bug"), "{said}");
            }
        }
    }
}

/// What quantised tensors are shown as.
const FORMS: [Form; 6] = [
    Form::Raw,
    Form::Numbers(Float::Bf16),
    mlx(Float::F16, false),
    mlx(Float::F16, true),
    mlx(Float::F32, true),
    Form::Numbers(Float::F32),
];

const fn mlx(scales: Float, requant: bool) -> Form {
    Form::Mlx { scales, requant }
}

/// Heap for the largest tree that is not refused.
const MOST_BYTES: usize = 512 << 20;

/// Experts that a tensor can have by its shape.
fn announced(tensor: &odmoe_fs::gguf::TensorInfo) -> u64 {
    tensor.dims().iter().copied().max().unwrap_or(1)
}

/// The bytes of each part, and the size of its file.
fn parts_of(data: &[u8]) -> Option<Vec<(&[u8], u64)>> {
    let (&first, mut rest) = data.split_first()?;
    let count = first % 4 + 1;
    let mut files = Vec::new();
    for number in 1..=count {
        let (&hole, bytes) = rest.split_first()?;
        let length = if number == count {
            bytes.len()
        } else {
            let (length, bytes) = bytes.split_first_chunk::<2>()?;
            rest = bytes;
            usize::from(u16::from_le_bytes(*length)).min(bytes.len())
        };
        let bytes = if number == count { bytes } else { rest };
        let (part, behind) = bytes.split_at(length);
        rest = behind;
        let hole = if hole == 0 { 0 } else { 1 << (hole % 44) };
        files.push((part, part.len() as u64 + hole));
    }
    Some(files)
}

/// Documents that are looked at: all of a small tree, some of a large one.
const LOOKED_AT: usize = 64;

fn check_tree(layout: &Layout, tree: &Tree) {
    for ino in tree.files() {
        let path = tree.path(ino).unwrap();
        let (directory, name) = path.split_once('/').unwrap();
        assert!(matches!(directory, "base_model" | "experts"), "{path}");
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._".contains(c);
        assert!(name.chars().all(plain) && !name.starts_with('.'), "{path}");
        assert_eq!(tree.find(&path), Some(ino));
    }
    if layout.form() == Form::Raw {
        let total: u64 = layout.model().tensors.iter().map(|t| t.info.bytes).sum();
        let files = layout.files().iter();
        assert_eq!(files.map(|file| file.payload_bytes).sum::<u64>(), total);
    }
    if tree.len() > 4096 {
        return; // smaller ones are checked, and each run must be short
    }
    for ino in tree.files().take(LOOKED_AT) {
        let is_tensors = tree.path(ino).unwrap().ends_with(".safetensors");
        let mut end = 0;
        for extent in tree.extents(ino) {
            assert!(extent.start == end && extent.len > 0);
            end += extent.len;
            if let Content::Made(doc) = extent.content {
                let mut bytes = Vec::new();
                layout.render(Doc::of_id(doc), &mut bytes).unwrap();
                assert_eq!(bytes.len() as u64, extent.len);
                if is_tensors {
                    check_header(&bytes);
                } else if tree.path(ino).unwrap().ends_with(".json") {
                    serde_json::from_slice::<serde_json::Value>(&bytes).unwrap();
                }
            }
        }
        assert_eq!(tree.size(ino), Some(end));
    }
}

/// The reference parser must accept a header.
fn check_header(bytes: &[u8]) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(length + 8, bytes.len() as u64);
    let parsed: serde_json::Value = serde_json::from_slice(&bytes[8..]).unwrap();
    let tensors = parsed
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "__metadata__");
    let end = tensors
        .map(|(_, t)| t["data_offsets"][1].as_u64().unwrap())
        .max();
    if end.unwrap_or(0) < 1 << 16 {
        let mut whole = bytes.to_vec();
        whole.resize(bytes.len() + end.unwrap_or(0) as usize, 0);
        safetensors::SafeTensors::deserialize(&whole).unwrap();
    }
}

/// The slices of any range of any file are what a walk over its bytes gives.
pub fn slices(data: &[u8]) {
    let mut bytes = data.iter().copied();
    let mut next = || bytes.next();
    let mut runs = Vec::new();
    let Some(count) = next() else { return };
    for _ in 0..count % 12 {
        let (Some(len), Some(kind), Some(offset)) = (next(), next(), next()) else {
            return;
        };
        let content = match kind % 4 {
            0 => Content::Made(DocId(u32::from(offset))),
            1 => Content::Computed(RecipeId(u32::from(offset))),
            _ => Content::Model {
                part: u32::from(kind),
                offset: u64::from(offset) * 1000,
            },
        };
        runs.push((u64::from(len % 50), content));
    }
    // Every byte by itself: where it comes from.
    let naive: Vec<(Origin, u64)> = runs
        .iter()
        .flat_map(|&(len, content)| {
            (0..len).map(move |at| match content {
                Content::Made(doc) => (Origin::Made(doc), at),
                Content::Model { part, offset } => (Origin::Part(part), offset + at),
                Content::Computed(id) => (Origin::Computed(id), at),
            })
        })
        .collect();
    let file = |name: &str, runs| NewFile {
        name: name.into(),
        runs,
    };
    let other = vec![(7, Content::Made(DocId(9)))];
    let tree = Tree::new(vec![(
        "d",
        vec![file("a", other.clone()), file("b", runs), file("c", other)],
    )]);
    let ino = tree.find("d/b").unwrap();
    assert_eq!(tree.size(ino), Some(naive.len() as u64));
    while let (Some(offset), Some(len)) = (next(), next()) {
        // Also far behind the end.
        let far = |n: u8| if n == 255 { u64::MAX } else { u64::from(n) * 3 };
        let (offset, len) = (far(offset), far(len));
        let answer: Vec<_> = tree
            .slices(ino, offset, len)
            .inspect(|slice| assert!(slice.len > 0))
            .flat_map(|slice| (0..slice.len).map(move |at| (slice.origin, slice.offset + at)))
            .collect();
        let from = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(naive.len());
        let to = usize::try_from(offset.saturating_add(len))
            .unwrap_or(usize::MAX)
            .min(naive.len());
        assert_eq!(answer, naive[from..to.max(from)]);
    }
    for ino in ROOT..=tree.len() + 1 {
        assert_eq!(
            tree.slices(ino, 0, 1).count() > 0,
            tree.kind(ino) == Some(Kind::File) && tree.size(ino) != Some(0)
        );
    }
}

/// Blocks of any bytes have every output that their type has, and a range of them that range of it.
/// The bytes choose a type, an output, the range, and are the blocks.
pub fn codec(data: &[u8]) {
    const FLOATS: [Float; 3] = [Float::F32, Float::F16, Float::Bf16];
    const MAPS: [Map; 2] = [Map::Exact, Map::Requantised];
    let [ggml_type, output, from, to, blocks @ ..] = data else {
        return;
    };
    let ggml_type = &GGML_TYPES[usize::from(*ggml_type) % GGML_TYPES.len()];
    let output = usize::from(*output);
    let (float, map) = (FLOATS[output % 3], MAPS[output / 3 % 2]);
    let output = match output / 6 % 4 {
        0 => Output::Numbers(float),
        1 => Output::Weight(map),
        2 => Output::Scales(map, float),
        _ => Output::Biases(map, float),
    };
    let Some(codec) = Codec::of(ggml_type, output) else {
        return;
    };
    let unit = codec.unit();
    assert_eq!(unit.blocks, ggml_type.block_bytes as usize);
    let units = blocks.len() / unit.blocks;
    let compute = |from: usize, to: usize| {
        let mut out = vec![0; (to - from) * unit.out];
        let computed = &mut out[..];
        let blocks = &blocks[from * unit.blocks..to * unit.blocks];
        let ((), heap) = measured(|| codec.compute(blocks, computed));
        assert_eq!(heap, 0, "{codec:?} takes memory");
        out
    };
    let (from, to) = (
        usize::from(*from) % (units + 1),
        usize::from(*to) % (units + 1),
    );
    let (from, to) = (from.min(to), from.max(to));
    let whole = compute(0, units);
    assert_eq!(compute(from, to), whole[from * unit.out..to * unit.out]);
    let mut portable = vec![0; whole.len()];
    codec.compute_portably(&blocks[..units * unit.blocks], &mut portable);
    assert_eq!(portable, whole);
}
