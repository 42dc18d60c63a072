//! Files in another binary format, by their signatures and headers.

use super::{Foreign, THE_MODEL_ITSELF};

/// Formats with a signature: its place, its bytes, what the file is, and what to do.
#[rustfmt::skip]
pub(super) const SIGNATURES: &[(usize, &[u8], &str, &str)] = &[
    (257, b"ustar", "a tar archive", "unpack it with `tar -xf`"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it with `gunzip`"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it with `unzstd`"),
    (0, b"\xfd7zXZ\0", "an xz archive", "unpack it with `unxz`"),
    (0, b"\x04\x22\x4d\x18", "an lz4 archive", "unpack it with `unlz4`"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it with `7z x`"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it with `unrar x`"),
    (4, b"1AY&SY", "a bzip2 archive", "unpack it with `bunzip2`"),
    (0, b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20", "a PyTorch checkpoint", CONVERT),
    (0, b"\x80\x02}", "a Python pickle", CONVERT),
    (0, b"\x80\x03}", "a Python pickle", CONVERT),
    (0, b"\x80\x04\x95", "a Python pickle", CONVERT),
    (0, b"\x80\x05\x95", "a Python pickle", CONVERT),
    (0, b"\x93NUMPY", "a NumPy array", CONVERT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", CONVERT),
    (0, b"lmgg", "a model in GGML's format from before GGUF", CONVERT_OLD),
    (0, b"ggml", "a model in GGML's format from before GGUF", CONVERT_OLD),
    (0, b"fmgg", "a model in the format GGMF from before GGUF", CONVERT_OLD),
    (0, b"ggmf", "a model in the format GGMF from before GGUF", CONVERT_OLD),
    (0, b"tjgg", "a model in the format GGJT from before GGUF", CONVERT_OLD),
    (0, b"ggjt", "a model in the format GGJT from before GGUF", CONVERT_OLD),
    (0, b"algg", "a LoRA adapter in the format GGLA from before GGUF", THE_MODEL),
    (0, b"ggla", "a LoRA adapter in the format GGLA from before GGUF", THE_MODEL),
    (0, b"nsgg", "a saved session of llama.cpp", THE_MODEL),
    (0, b"qsgg", "a saved session of llama.cpp", THE_MODEL),
    (0, b"FUGG", "a GGUF for big-endian machines, with its magic swapped", LITTLE_ENDIAN),
    (0, b"\xff\xfeG\0G\0U\0F\0", "a GGUF that PowerShell's `>` has turned into UTF-16 text", BINARY),
    (0, b"\xef\xbb\xbfGGUF", "a GGUF that some program has saved as text", BINARY),
    (0, b"\0\x05\x16\x07", "an AppleDouble file, in which macOS keeps attributes of another", DOUBLE),
    (0, b"%PDF-", "a PDF document", THE_MODEL_ITSELF),
    (0, b"d8:announce", "a torrent", TORRENT),
    (0, b"d13:announce-list", "a torrent", TORRENT),
    (0, b"d10:created by", "a torrent", TORRENT),
];

const CONVERT: &str = "convert the model to GGUF with llama.cpp's convert_hf_to_gguf.py";
const CONVERT_OLD: &str = "convert the original model again with a current llama.cpp";
const THE_MODEL: &str = "give the model that it belongs to";
const LITTLE_ENDIAN: &str = "take the little-endian file";
const BINARY: &str =
    "that cannot be undone: download it again, with a program that writes the file itself";
const DOUBLE: &str = "give the file without `._` in front of its name";
const TORRENT: &str = "let a BitTorrent program fetch the model";

pub(super) fn signature(head: &[u8]) -> Option<Foreign> {
    let is_at = |at: usize, bytes: &[u8]| head.get(at..).is_some_and(|h| h.starts_with(bytes));
    if is_at(0, b"PK\x03\x04") || is_at(0, b"PK\x05\x06") {
        return zip(head);
    }
    let found = SIGNATURES
        .iter()
        .find(|(at, bytes, _, _)| is_at(*at, bytes));
    found.and_then(|&(_, _, what, advice)| Foreign::new(what, advice))
}

/// Checkpoints of PyTorch and arrays of NumPy are zip archives, too, as the name of the first
/// entry shows.
fn zip(head: &[u8]) -> Option<Foreign> {
    let first = &head[..head.len().min(256)];
    if contains(first, b"/data.pkl") || contains(first, b"/data/") || contains(first, b"/.format") {
        Foreign::new("a PyTorch checkpoint", CONVERT)
    } else if contains(first, b".npy") {
        Foreign::new("a NumPy archive", CONVERT)
    } else {
        Foreign::new("a zip archive", "unpack it with `unzip`")
    }
}

pub(super) fn safetensors(head: &[u8], file_bytes: u64) -> Option<Foreign> {
    let (length, json) = head.split_first_chunk::<8>()?;
    let length = u64::from_le_bytes(*length);
    let fits = length >= 2 && length <= file_bytes.saturating_sub(8);
    let begins = json.starts_with(b"{\"") || json.starts_with(b"{}") || json.starts_with(b"{ ");
    if !(fits && begins) {
        return None;
    }
    Foreign::new("a safetensors file", CONVERT)
}

pub(super) fn program(head: &[u8]) -> Option<Foreign> {
    const UNZIP: &str = "take the model out of it with `unzip FILE '*.gguf'`";
    const MAYBE_UNZIP: &str =
        "give the model itself; `unzip FILE '*.gguf'` takes it out of a llamafile";
    if head.starts_with(b"MZqFpD") || head.starts_with(b"jartsr=") {
        return Foreign::new("a llamafile, which is a program", UNZIP);
    }
    let new_header = || {
        let at = u32::from_le_bytes(*head.get(0x3c..)?.first_chunk()?);
        head.get(at as usize..)
    };
    let is_program = head.starts_with(b"\x7fELF")
        || head.starts_with(b"\xcf\xfa\xed\xfe")
        || (head.starts_with(b"MZ") && new_header().is_some_and(|h| h.starts_with(b"PE\0\0")));
    is_program
        .then(|| Foreign::new("a program", MAYBE_UNZIP))
        .flatten()
}

/// The format from before importance matrices were GGUF files: a count, and then entries with the
/// length of their name and the name.
pub(super) fn importance_matrix(head: &[u8]) -> Option<Foreign> {
    let (counts, name) = head.split_first_chunk::<8>()?;
    let small = |word: &[u8]| word[2..] == [0, 0] && word[..2] != [0, 0];
    let is_name = name.starts_with(b"blk.") || name.starts_with(b"output.weight");
    if !(small(&counts[..4]) && small(&counts[4..]) && is_name) {
        return None;
    }
    Foreign::new("an importance matrix of llama.cpp", THE_MODEL)
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|w| w == word)
}
