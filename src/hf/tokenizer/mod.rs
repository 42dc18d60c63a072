//! tokenizer.json and its neighbours, from `tokenizer.*`.
//!
//! The problem: loaders read the format of the library `tokenizers`, where a GGUF has lists of
//! tokens, scores, kinds and merges.
//!
//! The plan: two kinds of tokenizers cover the models that have a directory. Byte-level BPE is a
//! list of merges and the expressions of its pre-tokenizer (`pre`), which a GGUF only names.
//! SentencePiece's BPE has scores instead of merges: every way to put a token together from two
//! others is a merge, and the best score comes first. For any other kind there is no tokenizer.json,
//! and a warning that says so.

mod pre;

use std::collections::HashMap;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value as Json, json};

use self::pre::Pre;
use super::{Document as File, Inputs};
use crate::gguf::{ModelHeader, Value};

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const KINDS: &str = "tokenizer.ggml.token_type";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
pub(super) const TEMPLATE: &str = "tokenizer.chat_template";

// `tokenizer.ggml.token_type`, as llama.cpp numbers it.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

/// The space of SentencePiece.
const SPACE: &str = "\u{2581}";
/// Longer tokens of SentencePiece are not put together from others: those of real models have 16
/// characters at most, and each character costs a look.
const MAX_MERGED_CHARACTERS: usize = 256;

/// The files of a tokenizer.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub files: Vec<File>,
    pub warnings: Vec<String>,
    /// `bos_token_id` and `eos_token_id`.
    pub ids: Map<String, Json>,
}

pub(super) fn files(model: &ModelHeader, inputs: &Inputs) -> Files {
    let mut made = Files::default();
    let tokenizer = Tokenizer::of(model, inputs);
    match tokenizer
        .as_ref()
        .map_err(String::clone)
        .and_then(Tokenizer::json)
    {
        Ok(json) => made.add("tokenizer.json", &json),
        Err(reason) => made
            .warnings
            .push(format!("there is no tokenizer.json: {reason}")),
    }
    if let Ok(tokenizer) = &tokenizer {
        made.add("tokenizer_config.json", &tokenizer.config());
        made.ids = tokenizer.special_ids();
        let mut generation = made.ids.clone();
        generation.insert("_from_model_config".to_owned(), true.into());
        made.add("generation_config.json", &generation);
    }
    if let Some(Value::String(template)) = inputs.value(model, TEMPLATE) {
        made.files
            .push(("chat_template.jinja", template.as_bytes().into()));
    }
    let keys = model.key_values.iter().map(|kv| kv.key.as_str());
    let named = keys.filter_map(|key| key.strip_prefix(TEMPLATE)?.strip_prefix('.'));
    let named: Vec<_> = named.collect();
    if !named.is_empty() {
        let named = named.join(", ");
        made.warnings.push(format!(
            "the directory has the default chat template alone, not {named}"
        ));
    }
    made
}

impl Files {
    fn add(&mut self, name: &'static str, json: &impl Serialize) {
        let bytes = serde_json::to_vec(json).expect("it is made of JSON's own values");
        self.files.push((name, bytes.into()));
    }
}

/// tokenizer.json.
#[derive(Serialize)]
struct Document<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Json>,
    normalizer: Json,
    pre_tokenizer: Json,
    post_processor: Json,
    decoder: Json,
    model: Bpe<'a>,
}

#[derive(Serialize)]
struct Bpe<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: (),
    unk_token: Option<&'a str>,
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Vocabulary<'a>,
    merges: Vec<Merge<'a>>,
}

/// Numbers by tokens.
struct Vocabulary<'a>(&'a [&'a str]);

impl Serialize for Vocabulary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().zip(0u64..))
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum Merge<'a> {
    /// Two tokens with a space between them.
    Text(&'a str),
    Pair([&'a str; 2]),
}

struct Tokenizer<'a> {
    model: &'a ModelHeader,
    tokens: Vec<&'a str>,
    kinds: Vec<i64>,
    scores: Vec<f32>,
    merges: Option<Vec<&'a str>>,
}

fn strings(value: Option<&Value>) -> Option<Vec<&str>> {
    match value? {
        Value::Array {
            items: Some(items), ..
        } => items.iter().map(Value::as_str).collect(),
        _ => None,
    }
}

fn numbers<T>(value: Option<&Value>, number: fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    match value? {
        Value::Array {
            items: Some(items), ..
        } => items.iter().map(number).collect(),
        _ => None,
    }
}

impl<'a> Tokenizer<'a> {
    fn of(model: &'a ModelHeader, inputs: &'a Inputs) -> Result<Self, String> {
        let value = |key| inputs.value(model, key);
        let tokens = strings(value(TOKENS)).ok_or_else(|| format!("{TOKENS} is missing"))?;
        let count = tokens.len();
        let as_kind = |value: &Value| match *value {
            Value::I32(kind) => Some(i64::from(kind)),
            ref value => value.as_u64().map(|kind| kind as i64),
        };
        let as_score = |value: &Value| match *value {
            Value::F32(score) if !score.is_nan() => Some(score),
            _ => None,
        };
        let kinds = match value(KINDS) {
            None => vec![NORMAL; count],
            kinds => numbers(kinds, as_kind)
                .ok_or_else(|| format!("{KINDS} does not hold whole numbers alone"))?,
        };
        let scores = match value(SCORES) {
            None => vec![0.0; count],
            scores => numbers(scores, as_score)
                .ok_or_else(|| format!("{SCORES} does not hold numbers alone"))?,
        };
        if kinds.len() != count || scores.len() != count {
            return Err(format!(
                "{TOKENS}, {KINDS} and {SCORES} are not of one length"
            ));
        }
        Ok(Self {
            model,
            tokens,
            kinds,
            scores,
            merges: strings(value(MERGES)),
        })
    }

    fn key(&self, name: &str) -> Option<&'a Value> {
        let kv = self.model.get(&format!("tokenizer.ggml.{name}"));
        kv.map(|kv| &kv.value)
    }

    fn text(&self, name: &str) -> Option<&'a str> {
        self.key(name)?.as_str()
    }

    fn flag(&self, name: &str) -> Option<bool> {
        match self.key(name)? {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// The number and text of a special token.
    fn special(&self, name: &str) -> Option<(u64, &'a str)> {
        let id = self.key(&format!("{name}_token_id"))?.as_u64()?;
        Some((id, *self.tokens.get(usize::try_from(id).ok()?)?))
    }

    fn pre(&self) -> Option<&'static Pre> {
        Pre::of(self.text("pre")?)
    }

    fn adds_first(&self) -> bool {
        let usual = match self.text("model") {
            Some("llama") => true,
            _ => self.pre().is_some_and(|pre| pre.adds_first),
        };
        self.flag("add_bos_token").unwrap_or(usual)
    }

    fn adds_last(&self) -> bool {
        self.flag("add_eos_token").unwrap_or(false)
    }

    fn special_ids(&self) -> Map<String, Json> {
        let mut ids = Map::new();
        if let Some((id, _)) = self.special("bos") {
            ids.insert("bos_token_id".to_owned(), id.into());
        }
        let ends = ["eos", "eot", "eom"].into_iter();
        let mut ends: Vec<u64> = ends
            .filter_map(|name| Some(self.special(name)?.0))
            .collect();
        let mut seen = Vec::new();
        ends.retain(|id| {
            !seen.contains(id) && {
                seen.push(*id);
                true
            }
        });
        match ends[..] {
            [] => {}
            [one] => drop(ids.insert("eos_token_id".to_owned(), one.into())),
            _ => drop(ids.insert("eos_token_id".to_owned(), ends.into())),
        }
        ids
    }

    fn config(&self) -> Json {
        let mut config = Map::new();
        let mut set = |name: &str, value: Json| config.insert(name.to_owned(), value);
        set("tokenizer_class", "PreTrainedTokenizerFast".into());
        set("clean_up_tokenization_spaces", false.into());
        set("add_bos_token", self.adds_first().into());
        set("add_eos_token", self.adds_last().into());
        let names = [
            ("bos", "bos"),
            ("eos", "eos"),
            ("unknown", "unk"),
            ("padding", "pad"),
        ];
        for (gguf, hf) in names {
            if let Some((_, text)) = self.special(gguf) {
                set(&format!("{hf}_token"), text.into());
            }
        }
        if let Some(length) = self.model.get_of_architecture("context_length") {
            let length = length.value.as_u64();
            set("model_max_length", length.into());
        }
        config.into()
    }

    fn json(&self) -> Result<Document<'_>, String> {
        match self.text("model") {
            Some("gpt2") => self.byte_level(),
            Some("llama") => Ok(self.sentence_piece()),
            other => Err(format!(
                "tokenizers of the kind {:?} are not known",
                other.unwrap_or("")
            )),
        }
    }

    fn byte_level(&self) -> Result<Document<'_>, String> {
        let name = self.text("pre").unwrap_or("");
        let pre = self
            .pre()
            .ok_or_else(|| format!("the pre-tokenizer {name:?} is not known"))?;
        let merges = self.merges.as_ref();
        let merges = merges.ok_or_else(|| format!("{MERGES} is missing"))?;
        let splits = pre.expressions.iter().map(|expression| {
            json!({
                "type": "Split",
                "pattern": {"Regex": expression},
                "behavior": "Isolated",
                "invert": false,
            })
        });
        let bytes = json!({
            "type": "ByteLevel",
            "add_prefix_space": false,
            "trim_offsets": false,
            "use_regex": false,
        });
        let steps: Vec<Json> = splits.chain([bytes.clone()]).collect();
        Ok(Document {
            pre_tokenizer: json!({"type": "Sequence", "pretokenizers": steps}),
            decoder: bytes,
            model: Bpe {
                ignore_merges: pre.ignores_merges,
                merges: merges.iter().map(|merge| Merge::Text(merge)).collect(),
                ..self.bpe()
            },
            ..self.document()
        })
    }

    fn sentence_piece(&self) -> Document<'_> {
        let prefix = self.flag("add_space_prefix").unwrap_or(true);
        let mut normal = Vec::new();
        let mut end = Vec::new();
        if prefix {
            normal.push(json!({"type": "Prepend", "prepend": SPACE}));
            end.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        normal.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE}));
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        decoders.extend(end);
        let unknown = self.kinds.iter().position(|kind| *kind == UNKNOWN);
        Document {
            normalizer: json!({"type": "Sequence", "normalizers": normal}),
            decoder: json!({"type": "Sequence", "decoders": decoders}),
            model: Bpe {
                unk_token: unknown.map(|id| self.tokens[id]),
                fuse_unk: true,
                byte_fallback: self.kinds.contains(&BYTE),
                merges: self.merges_of_scores(),
                ..self.bpe()
            },
            ..self.document()
        }
    }

    /// Every way to put a token together from two others, the best score first.
    fn merges_of_scores(&self) -> Vec<Merge<'a>> {
        let is_piece = |id: usize| matches!(self.kinds[id], NORMAL | USER_DEFINED);
        let pieces = (0..self.tokens.len()).filter(|&id| is_piece(id));
        let ids: HashMap<&str, usize> = pieces.map(|id| (self.tokens[id], id)).collect();
        let mut merges: Vec<(usize, usize, usize)> = Vec::new();
        for (&token, &id) in &ids {
            let cuts = token.char_indices().skip(1).take(MAX_MERGED_CHARACTERS);
            merges.extend(cuts.filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some((id, *ids.get(left)?, *ids.get(right)?))
            }));
        }
        merges.sort_by(|a, b| {
            let length = |id: usize| self.tokens[id].chars().count();
            let by_score = self.scores[b.0].total_cmp(&self.scores[a.0]);
            let by_length = length(b.1).cmp(&length(a.1));
            by_score.then(by_length).then(a.cmp(b))
        });
        let texts = |(_, left, right): (usize, usize, usize)| {
            Merge::Pair([self.tokens[left], self.tokens[right]])
        };
        merges.into_iter().map(texts).collect()
    }

    /// A tokenizer without rules, to be filled in.
    fn document(&self) -> Document<'_> {
        Document {
            version: "1.0",
            truncation: (),
            padding: (),
            added_tokens: self.added_tokens(),
            normalizer: Json::Null,
            pre_tokenizer: Json::Null,
            post_processor: self.post_processor(),
            decoder: Json::Null,
            model: self.bpe(),
        }
    }

    fn bpe(&self) -> Bpe<'_> {
        Bpe {
            kind: "BPE",
            dropout: (),
            unk_token: None,
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab: Vocabulary(&self.tokens),
            merges: Vec::new(),
        }
    }

    /// Tokens that are found in a text before anything else.
    fn added_tokens(&self) -> Vec<Json> {
        let tokens = self.tokens.iter().zip(&self.kinds).enumerate();
        let tokens = tokens.filter(|(_, (token, _))| !token.is_empty());
        let added = tokens.filter_map(|(id, (token, kind))| {
            let special = match *kind {
                UNKNOWN | CONTROL => true,
                USER_DEFINED => false,
                _ => return None,
            };
            Some(json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": special,
            }))
        });
        added.collect()
    }

    /// Puts special tokens before and after a text.
    fn post_processor(&self) -> Json {
        let first = self.special("bos").filter(|_| self.adds_first());
        let last = self.special("eos").filter(|_| self.adds_last());
        if first.is_none() && last.is_none() {
            return Json::Null;
        }
        let mut specials = Map::new();
        let mut template = |name: &str, place: u64| {
            let mut parts = Vec::new();
            let mut special = |token: Option<(u64, &str)>| {
                if let Some((id, text)) = token {
                    parts.push(json!({"SpecialToken": {"id": text, "type_id": place}}));
                    let special = json!({"id": text, "ids": [id], "tokens": [text]});
                    specials.insert(text.to_owned(), special);
                }
                parts.len()
            };
            let before = special(first);
            special(last);
            parts.insert(before, json!({"Sequence": {"id": name, "type_id": place}}));
            parts
        };
        let single = template("A", 0);
        let pair = [single.clone(), template("B", 1)].concat();
        json!({
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": specials,
        })
    }
}
