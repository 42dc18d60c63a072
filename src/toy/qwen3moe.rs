//! A toy of a real architecture, with a tokenizer that works: Qwen3 with experts.
//!
//! The tokenizer knows every byte, so that any text has tokens. Further tokens are pairs of letters,
//! as far as the vocabulary has room for them; what is left of it is unused.

use super::plan::CONTEXT_LENGTH;
use super::{Arch, Naming, Toy, ToyError, VOCABULARIES};
use crate::gguf::{Value, ValueType};

const END: &str = "<|endoftext|>";
/// All bytes, and the end of a text.
const LEAST_VOCABULARY: u32 = 257;

// `tokenizer.ggml.token_type`, as llama.cpp numbers it.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;

/// Fails if there is no such model.
pub(super) fn check(toy: &Toy) -> Result<(), ToyError> {
    if toy.naming == Naming::Reference {
        return Err(ToyError::ForeignNaming(Arch::Qwen3Moe.name()));
    }
    if !toy.dim.is_multiple_of(2) {
        return Err(ToyError::OddWidth(toy.dim));
    }
    if toy.vocab < LEAST_VOCABULARY {
        return Err(ToyError::OutOfRange {
            option: "--vocab",
            value: toy.vocab,
            range: LEAST_VOCABULARY..=*VOCABULARIES.end(),
        });
    }
    Ok(())
}

/// The heads of attention.
pub(super) struct Heads {
    pub queries: u64,
    /// Of keys and values.
    pub keys: u64,
    pub width: u64,
}

impl Heads {
    /// Eight heads of queries to two of keys, or as many as leave an even width.
    pub fn of(toy: &Toy) -> Self {
        let queries = 1 << (toy.dim.trailing_zeros() - 1).min(3);
        Self {
            queries,
            keys: (queries / 4).max(1),
            width: u64::from(toy.dim) / queries,
        }
    }
}

pub(super) fn key_values(toy: &Toy) -> Vec<(String, Value)> {
    let heads = Heads::of(toy);
    let string = |text: &str| Value::String(text.to_owned());
    let mut pairs = vec![
        (
            "general.architecture".to_owned(),
            string(Arch::Qwen3Moe.name()),
        ),
        ("general.name".to_owned(), string("Toy Qwen3 MoE")),
        ("general.quantization_version".to_owned(), Value::U32(2)), // GGML_QNT_VERSION
    ];
    let numbers = [
        ("block_count", toy.layers),
        ("context_length", CONTEXT_LENGTH),
        ("embedding_length", toy.dim),
        ("feed_forward_length", toy.ffn_dim),
        ("expert_feed_forward_length", toy.ffn_dim),
        ("expert_count", toy.experts),
        ("expert_used_count", toy.experts_used()),
        ("attention.head_count", heads.queries as u32),
        ("attention.head_count_kv", heads.keys as u32),
        ("attention.key_length", heads.width as u32),
        ("attention.value_length", heads.width as u32),
    ];
    let numbers = numbers.map(|(key, n)| (key, Value::U32(n)));
    let floats = [
        ("rope.freq_base", Value::F32(1e6)),
        ("attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
    ];
    let of_architecture = numbers.into_iter().chain(floats);
    pairs.extend(of_architecture.map(|(key, value)| (format!("qwen3moe.{key}"), value)));
    let of_tokenizer = tokenizer(toy.vocab as usize);
    pairs.extend(of_tokenizer.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)));
    pairs
}

fn tokenizer(vocabulary: usize) -> [(&'static str, Value); 7] {
    let mut tokens: Vec<(String, i32)> = byte_characters()
        .map(|character| (character.to_string(), NORMAL))
        .collect();
    tokens.push((END.to_owned(), CONTROL));
    let room = vocabulary - tokens.len();
    let letters = || 'a'..='z';
    // After a space, then after each other letter.
    let firsts = [SPACE].into_iter().chain(letters());
    let pairs = firsts.flat_map(|first| letters().map(move |second| (first, second)));
    let pairs: Vec<(char, char)> = pairs.take(room).collect();
    tokens.extend(pairs.iter().map(|(a, b)| (format!("{a}{b}"), NORMAL)));
    while tokens.len() < vocabulary {
        tokens.push((format!("[PAD{}]", tokens.len()), UNUSED));
    }
    let merges = pairs.iter().map(|(a, b)| Value::String(format!("{a} {b}")));
    let merges = Value::array(ValueType::String, merges.collect());
    let kinds = tokens.iter().map(|(_, kind)| Value::I32(*kind)).collect();
    let end = tokens.iter().position(|(text, _)| text == END).unwrap_or(0);
    let texts = tokens.into_iter().map(|(text, _)| Value::String(text));
    [
        ("model", Value::String("gpt2".to_owned())),
        ("pre", Value::String("qwen2".to_owned())),
        ("tokens", Value::array(ValueType::String, texts.collect())),
        ("token_type", Value::array(ValueType::I32, kinds)),
        ("merges", merges),
        ("eos_token_id", Value::U32(end as u32)),
        ("add_bos_token", Value::Bool(false)),
    ]
}

/// The character that stands for a space.
const SPACE: char = '\u{120}';

/// The characters that stand for bytes in byte-level tokenizers: the printable ones for themselves,
/// then the others in order, from U+0100 on.
fn byte_characters() -> impl Iterator<Item = char> {
    let is_plain = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let plain = (0..=u8::MAX).filter(is_plain).map(char::from);
    let others = (0..=u8::MAX).filter(move |byte| !is_plain(byte));
    let others = others.zip('\u{100}'..).map(|(_, character)| character);
    plain.chain(others)
}
