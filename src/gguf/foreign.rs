//! What a file is that should be a GGUF and is not, as its first bytes tell.
//!
//! The problem: most files that are refused never were a model. Git has left a pointer in the place
//! of the file, a download has saved an error under the model's name, the model is still packed, or
//! it is in another format. Each of these needs another next step.
//!
//! The plan: look at what the reader has buffered anyway, and name only what is certain: binary
//! formats by their signatures, then texts by their words, then a GGUF that begins further on.

mod formats;
mod texts;

use std::borrow::Cow;

use super::MAGIC;
use super::error::Problem;

/// Bytes that are looked at, at most.
const HEAD_BYTES: usize = 64 << 10;
/// Nothing is certain from fewer bytes of a longer file.
const ENOUGH_BYTES: u64 = 512;

/// What to do about a file that has nothing to do with a model.
const THE_MODEL_ITSELF: &str = "give the model itself";

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
    formats::signature(head)
        .or_else(|| formats::safetensors(head, file_bytes))
        .or_else(|| formats::program(head))
        .or_else(|| formats::importance_matrix(head))
        .or_else(|| texts::text(head, file_bytes))
        .or_else(|| further_on(head))
        .map(Problem::Foreign)
        .or_else(|| zeros(head))
}

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

#[cfg(test)]
mod tests;
