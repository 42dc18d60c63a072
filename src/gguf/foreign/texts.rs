//! Files that hold a text: pointers, web pages, manifests, and answers of servers.

use super::{Foreign, THE_MODEL_ITSELF};

/// Texts are quoted up to this many characters.
const QUOTED_CHARS: usize = 100;
pub(super) const LOG_IN: &str =
    "log in, accept the model's terms if it has any, and download it again";
pub(super) const ADDRESS: &str = "check the address, and download it again";

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

pub(super) fn text(head: &[u8], file_bytes: u64) -> Option<Foreign> {
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
