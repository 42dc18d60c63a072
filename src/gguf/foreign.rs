//! What a file is that should be a GGUF and is not, as its first bytes tell.
//!
//! The problem: most files that are refused never were a model. Git has left a pointer in the place
//! of the file, a download has saved an error under the model's name, the model is still packed, or
//! it is in another format. Each of these needs another next step.
//!
//! The plan: look at what the reader has buffered anyway, and name only what is certain: signatures
//! by a table, then texts by their words, then a GGUF that begins further on.

use std::borrow::Cow;

use super::MAGIC;
use super::error::Problem;

/// Bytes that are looked at, at most.
const HEAD_BYTES: usize = 64 << 10;
/// Nothing is certain from fewer bytes of a longer file.
const ENOUGH_BYTES: u64 = 512;
/// Texts are quoted up to this many characters.
const QUOTED_CHARS: usize = 100;

/// A file of another kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// What it is, with an article: "a gzip archive".
    pub what: Cow<'static, str>,
    /// What to do about it.
    pub advice: Cow<'static, str>,
}

impl Foreign {
    fn new(
        what: impl Into<Cow<'static, str>>,
        advice: impl Into<Cow<'static, str>>,
    ) -> Option<Self> {
        Some(Self {
            what: what.into(),
            advice: advice.into(),
        })
    }
}

/// What is wrong with a file of `file_bytes` bytes that begins with `head`; `None` for a GGUF, for
/// the beginning of one, and for everything that is not certain.
pub(super) fn recognise(head: &[u8], file_bytes: u64) -> Option<Problem> {
    let head = &head[..head.len().min(HEAD_BYTES)];
    if file_bytes == 0 {
        return Some(Problem::EmptyFile);
    }
    if (head.len() as u64) < file_bytes.min(ENOUGH_BYTES)
        || head.starts_with(&MAGIC)
        || MAGIC.starts_with(head)
    {
        return None;
    }
    signature(head)
        .or_else(|| safetensors(head, file_bytes))
        .or_else(|| program(head))
        .or_else(|| importance_matrix(head))
        .or_else(|| text(head, file_bytes))
        .or_else(|| further_on(head))
        .map(Problem::Foreign)
        .or_else(|| zeros(head))
}

/// Formats with a signature: its place, its bytes, what the file is, and what to do.
#[rustfmt::skip]
const SIGNATURES: &[(usize, &[u8], &str, &str)] = &[
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
const THE_MODEL_ITSELF: &str = "give the model itself";
const LITTLE_ENDIAN: &str = "take the little-endian file";
const BINARY: &str =
    "that cannot be undone: download it again, with a program that writes the file itself";
const DOUBLE: &str = "give the file without `._` in front of its name";
const TORRENT: &str = "let a BitTorrent program fetch the model";

fn signature(head: &[u8]) -> Option<Foreign> {
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

fn safetensors(head: &[u8], file_bytes: u64) -> Option<Foreign> {
    let (length, json) = head.split_first_chunk::<8>()?;
    let length = u64::from_le_bytes(*length);
    let fits = length >= 2 && length <= file_bytes.saturating_sub(8);
    let begins = json.starts_with(b"{\"") || json.starts_with(b"{}") || json.starts_with(b"{ ");
    if !(fits && begins) {
        return None;
    }
    Foreign::new("a safetensors file", CONVERT)
}

fn program(head: &[u8]) -> Option<Foreign> {
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
fn importance_matrix(head: &[u8]) -> Option<Foreign> {
    let (counts, name) = head.split_first_chunk::<8>()?;
    let small = |word: &[u8]| word[2..] == [0, 0] && word[..2] != [0, 0];
    let is_name = name.starts_with(b"blk.") || name.starts_with(b"output.weight");
    if !(small(&counts[..4]) && small(&counts[4..]) && is_name) {
        return None;
    }
    Foreign::new("an importance matrix of llama.cpp", THE_MODEL)
}

// --- texts ------------------------------------------------------------------------------------

const LOG_IN: &str = "log in, accept the model's terms if it has any, and download it again";
const ADDRESS: &str = "check the address, and download it again";

/// Words of servers that refuse, in lower case, and what to do then.
#[rustfmt::skip]
const REFUSALS: &[(&str, &str)] = &[
    ("has expired", "get a new link, and download it again"),
    ("too many requests", "wait for a while, and download it again"),
    ("rate limit", "wait for a while, and download it again"),
    ("invalid username or password", LOG_IN),
    ("invalid credentials", LOG_IN),
    ("is restricted", LOG_IN),
    ("gated repo", LOG_IN),
    ("is gated", LOG_IN),
    ("be authenticated", LOG_IN),
    ("authentication", LOG_IN),
    ("unauthorized", LOG_IN),
    ("not authorized", LOG_IN),
    ("access denied", LOG_IN),
    ("accessdenied", LOG_IN),
    ("forbidden", LOG_IN),
    ("not found", ADDRESS),
    ("nosuchkey", ADDRESS),
    ("does not exist", ADDRESS),
];
/// Servers answer briefly; a longer text may hold these words for any reason.
const ANSWER_BYTES: usize = 2048;

fn text(head: &[u8], file_bytes: u64) -> Option<Foreign> {
    if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") {
        return utf16(head);
    }
    let is_whole = head.len() as u64 == file_bytes;
    let text = match str::from_utf8(head) {
        Ok(text) => text,
        // The last character may be cut.
        Err(e) if e.error_len().is_none() && !is_whole => {
            str::from_utf8(&head[..e.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    if text.contains(|c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\x0c')) {
        return None;
    }
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.is_empty() {
        return None;
    }
    pointer(text)
        .or_else(|| page(text))
        .or_else(|| manifest(text, is_whole))
        .or_else(|| plain(text, is_whole))
}

fn utf16(head: &[u8]) -> Option<Foreign> {
    let (wide, _) = head.as_chunks::<2>();
    let swapped = head[0] == 0xfe;
    let ascii = |pair: &[u8; 2]| {
        let (low, high) = if swapped {
            (pair[1], pair[0])
        } else {
            (pair[0], pair[1])
        };
        high == 0 && (low.is_ascii_graphic() || low.is_ascii_whitespace())
    };
    // Most messages are ASCII, and no binary file is for 32 characters.
    let plain = wide.len() > 1 && wide[1..].iter().take(32).all(ascii);
    plain
        .then(|| {
            Foreign::new(
                "a text in UTF-16",
                "look at what it says, and give the model itself",
            )
        })
        .flatten()
}

/// What git keeps in place of a large file.
fn pointer(text: &str) -> Option<Foreign> {
    if text.starts_with("version https://git-lfs.github.com/spec/")
        || text.starts_with("version https://hawser.github.com/spec/")
    {
        let size = text.lines().find_map(|line| line.strip_prefix("size "));
        let size = size.and_then(|size| size.trim().parse::<u64>().ok());
        let bytes = size.map_or_else(String::new, |size| format!(" of {size} bytes"));
        return Foreign::new(
            format!("a Git LFS pointer to a file{bytes}"),
            "fetch that with `git lfs pull` in its repository",
        );
    }
    let line = text.lines().next()?;
    if line.starts_with("/annex/objects/") || line.contains(".git/annex/objects/") {
        return Foreign::new(
            "a git-annex pointer",
            "fetch the file itself with `git annex get`",
        );
    }
    None
}

fn page(text: &str) -> Option<Foreign> {
    let beginning: String = text.chars().take(1024).collect();
    let beginning = beginning.to_ascii_lowercase();
    let tags = ["<!doctype html", "<html", "<head", "<body"];
    let is_page = tags.iter().any(|tag| beginning.starts_with(tag))
        || (beginning.starts_with('<') && beginning.contains("<html"));
    if !is_page {
        return None;
    }
    Foreign::new(
        "a web page, which a download has saved in place of the model",
        "use the link of the file itself (`/resolve/` in place of `/blob/` on Hugging Face), and log in if the site asks for it",
    )
}

/// The manifest of a model in Ollama's store, which names the blob that is the model.
fn manifest(text: &str, is_whole: bool) -> Option<Foreign> {
    const MODEL: &str = "application/vnd.ollama.image.model";
    if !is_whole || !text.starts_with('{') || !text.contains(MODEL) {
        return None;
    }
    let json: serde_json::Value = serde_json::from_str(text).ok()?;
    let layers = json["layers"].as_array()?;
    let model = layers.iter().find(|layer| layer["mediaType"] == MODEL)?;
    let hash = model["digest"].as_str()?.strip_prefix("sha256:")?;
    if hash.is_empty() || !hash.bytes().all(|b| b.is_ascii_hexdigit()) || hash.len() > 128 {
        return None;
    }
    Foreign::new(
        "a manifest of Ollama",
        format!("give the model that it names, blobs/sha256-{hash} in Ollama's folder"),
    )
}

fn plain(text: &str, is_whole: bool) -> Option<Foreign> {
    let what = match text.as_bytes()[0] {
        b'{' | b'[' => "a JSON text",
        b'<' => "an XML text",
        _ => "a text",
    };
    if !is_whole {
        return Foreign::new(what, THE_MODEL_ITSELF);
    }
    if text.lines().any(|line| line.starts_with("FROM ")) {
        return Foreign::new(
            "a Modelfile of Ollama",
            "give the model that its line FROM names",
        );
    }
    let lower = text.to_lowercase();
    let refusal = REFUSALS.iter().find(|(words, _)| lower.contains(words));
    let advice = match refusal {
        Some((_, advice)) if text.len() < ANSWER_BYTES => advice,
        _ => THE_MODEL_ITSELF,
    };
    Foreign::new(format!("{what} ({:?})", quoted(text)), advice)
}

fn quoted(text: &str) -> String {
    let mut words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = words.char_indices().nth(QUOTED_CHARS) {
        words.truncate(words[..end].trim_end().len());
        words.push('…');
    }
    words
}

// --- the rest ---------------------------------------------------------------------------------

/// A GGUF behind something else.
fn further_on(head: &[u8]) -> Option<Foreign> {
    let is_header =
        |bytes: &[u8]| bytes.starts_with(&MAGIC) && matches!(bytes[4..], [2 | 3, 0, 0, 0]);
    let at = head.windows(8).position(is_header)?;
    Foreign::new(
        format!("a file in which a GGUF begins only at byte {at}"),
        format!(
            "cut off what is in front of it: `tail -c +{} FILE >model.gguf`",
            at + 1
        ),
    )
}

fn zeros(head: &[u8]) -> Option<Problem> {
    let all = head.iter().all(|&byte| byte == 0);
    all.then_some(Problem::Zeros(head.len()))
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|w| w == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(head: &[u8]) -> Option<Foreign> {
        match recognise(head, head.len() as u64)? {
            Problem::Foreign(foreign) => Some(foreign),
            _ => None,
        }
    }

    fn what(head: &[u8]) -> String {
        of(head).map_or_else(String::new, |foreign| foreign.what.into_owned())
    }

    fn advice(head: &[u8]) -> String {
        of(head).map_or_else(String::new, |foreign| foreign.advice.into_owned())
    }

    #[test]
    fn every_signature_is_found_at_its_place_and_nowhere_else() {
        for (at, bytes, expected, _) in SIGNATURES {
            let mut head = vec![0xf5; 1024];
            head[*at..at + bytes.len()].copy_from_slice(bytes);
            assert_eq!(what(&head), *expected);
            head.insert(0, 0xf5);
            assert_eq!(of(&head), None, "{expected}, moved");
            // Too little of a longer file is not judged.
            assert!(recognise(&head[..100], 1 << 40).is_none());
        }
    }

    #[test]
    fn a_gguf_and_its_beginning_are_not_foreign() {
        for head in [&b"GGUF\x03\0\0\0"[..], b"GGUF", b"GGU", b"G"] {
            assert_eq!(of(head), None);
        }
        assert!(matches!(recognise(b"", 0), Some(Problem::EmptyFile)));
        assert!(recognise(b"", 10).is_none()); // it shrank while we looked
    }

    #[test]
    fn pointers_of_git_say_what_fetches_the_file() {
        let pointer =
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7c\nsize 7516192768\n";
        assert_eq!(
            what(pointer),
            "a Git LFS pointer to a file of 7516192768 bytes"
        );
        assert!(advice(pointer).contains("`git lfs pull`"));
        assert_eq!(
            what(b"version https://git-lfs.github.com/spec/v1\nsize many\n"),
            "a Git LFS pointer to a file"
        );
        for annex in [
            "/annex/objects/SHA256E-s7--00ff.gguf\n",
            "../../.git/annex/objects/aa/bb/SHA256E-s7--00ff.gguf/SHA256E-s7--00ff.gguf",
        ] {
            assert_eq!(what(annex.as_bytes()), "a git-annex pointer");
        }
    }

    #[test]
    fn pages_are_recognised_whatever_comes_first() {
        for page in [
            "<!DOCTYPE html><html>",
            "\u{feff}\n  <!doctype HTML>\n<title>Log in</title>",
            "<?xml version='1.0'?>\n<!-- hello -->\n<html xmlns='...'>",
            "<HTML><BODY>504 Gateway Time-out",
        ] {
            assert!(what(page.as_bytes()).starts_with("a web page"), "{page}");
        }
        let long = format!("<!doctype html>{}", "é".repeat(HEAD_BYTES));
        assert!(what(long.as_bytes()).starts_with("a web page"));
    }

    #[test]
    fn answers_of_servers_are_quoted_with_what_they_call_for() {
        for (text, kind, expected) in [
            ("Invalid username or password.", "a text", LOG_IN),
            ("Entry not found", "a text", ADDRESS),
            ("404: Not Found", "a text", ADDRESS),
            (
                r#"{"error":"Access to model a/b is restricted. You must be authenticated."}"#,
                "a JSON text",
                LOG_IN,
            ),
            (
                "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
                "an XML text",
                "get a new link, and download it again",
            ),
            ("hello", "a text", THE_MODEL_ITSELF),
        ] {
            let foreign = of(text.as_bytes()).unwrap();
            assert!(foreign.what.starts_with(kind), "{foreign:?}");
            assert_eq!(foreign.advice, expected, "{text}");
        }
        assert_eq!(what(b"Entry not found\n"), r#"a text ("Entry not found")"#);
        let long = "word ".repeat(100);
        let shown = what(long.as_bytes());
        assert!(
            shown.ends_with("word…\")") && shown.chars().count() < 120,
            "{shown}"
        );
        // Only what is short enough for an answer is taken for one.
        let story = format!("It was not found. {}", "And so on. ".repeat(500));
        assert_eq!(advice(story.as_bytes()), THE_MODEL_ITSELF);
    }

    #[test]
    fn a_manifest_of_ollama_names_the_blob_of_the_model() {
        let layer = |kind: &str, hash: &str| {
            format!(
                r#"{{"mediaType":"application/vnd.ollama.image.{kind}","digest":"sha256:{hash}","size":7}}"#
            )
        };
        let of_layers =
            |layers: &[String]| format!(r#"{{"schemaVersion":2,"layers":[{}]}}"#, layers.join(","));
        let text = of_layers(&[layer("template", "11"), layer("model", "22aF")]);
        assert_eq!(what(text.as_bytes()), "a manifest of Ollama");
        assert!(advice(text.as_bytes()).contains("blobs/sha256-22aF "));
        // Nothing that is no hash becomes a path.
        let text = of_layers(&[layer("model", "../../x")]);
        assert!(what(text.as_bytes()).starts_with("a JSON text"));
    }

    #[test]
    fn archives_that_are_zip_files_are_told_apart_by_their_first_entry() {
        let zip = |name: &str| {
            let mut bytes = b"PK\x03\x04".to_vec();
            bytes.resize(30, 0);
            bytes.extend(name.as_bytes());
            what(&bytes)
        };
        assert_eq!(zip("archive/data.pkl"), "a PyTorch checkpoint");
        assert_eq!(zip("pytorch_model-00001/data/0"), "a PyTorch checkpoint");
        assert_eq!(zip("arr_0.npy"), "a NumPy archive");
        assert_eq!(zip("model.gguf"), "a zip archive");
    }

    #[test]
    fn programs_may_hold_a_model() {
        let mut windows = b"MZ".to_vec();
        windows.resize(0x3c, 0);
        windows.extend([0x80, 0, 0, 0]);
        assert_eq!(of(&windows), None);
        windows.resize(0x80, 0);
        windows.extend(b"PE\0\0");
        assert_eq!(what(&windows), "a program");
        assert_eq!(what(b"\x7fELF\x02\x01"), "a program");
        let llamafile = b"MZqFpD='\n\n\0\x10\0\xf8";
        assert!(what(llamafile).starts_with("a llamafile"));
        assert!(advice(llamafile).contains("unzip"));
    }

    #[test]
    fn safetensors_files_have_a_length_that_fits() {
        let file = |length: u64, json: &[u8]| {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend(json);
            what(&bytes)
        };
        let json = br#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
        let length = json.len() as u64;
        assert_eq!(file(length, json), "a safetensors file");
        assert_eq!(file(2, b"{}"), "a safetensors file");
        assert_eq!(file(length + 1, json), "");
        assert_eq!(file(u64::MAX, json), "");
    }

    #[test]
    fn a_gguf_behind_something_else_is_found() {
        let mut bytes = vec![0xf5; 1000];
        bytes.extend(b"GGUF\x09\0\0\0");
        assert_eq!(of(&bytes), None);
        bytes.extend(b"GGUF\x03\0\0\0");
        assert_eq!(
            what(&bytes),
            "a file in which a GGUF begins only at byte 1008"
        );
        assert!(advice(&bytes).contains("`tail -c +1009 FILE >model.gguf`"));
    }

    #[test]
    fn uncertain_contents_are_not_named() {
        for head in [
            &b"\xf5\xf6\xf7\xf8 and so on"[..],
            b"GGUX\x03\0\0\0",
            b"text with \x1b[2J an escape",
            b"\xff\xfe\xf5\xf6\xf7",
            b"  \n ",
        ] {
            assert_eq!(of(head), None, "{head:?}");
        }
        let zeros = recognise(&[0; 4096], 1 << 40);
        assert!(matches!(zeros, Some(Problem::Zeros(4096))));
        let importance = b"\x99\0\0\0\x15\0\0\0blk.0.attn_k.weight";
        assert_eq!(what(importance), "an importance matrix of llama.cpp");
        let wide: Vec<u8> = "\u{feff}Entry not found"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        assert_eq!(what(&wide), "a text in UTF-16");
    }
}
