//! From a tensor's name to its place: a routed expert's matrix, or a file of the base model.

/// A file of `base_model/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Component {
    Embeddings,
    AttentionLayers,
    Norms,
    LmHead,
}

impl Component {
    /// In the order of `metadata.json`.
    pub const ALL: [Self; 4] = [
        Self::Embeddings,
        Self::AttentionLayers,
        Self::Norms,
        Self::LmHead,
    ];

    /// The name of the file, without `.safetensors`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embeddings => "embeddings",
            Self::AttentionLayers => "attention_layers",
            Self::Norms => "norms",
            Self::LmHead => "lm_head",
        }
    }

    /// The component of a tensor that is not a routed expert's.
    pub fn of(name: &str) -> Self {
        let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
        // Tables of which a token needs only single rows, however large they are.
        if name.contains("token_embd")
            || name.contains("engram_embd")
            || starts(&["position_embd.", "token_types.", "per_layer_token_embd."])
        {
            Self::Embeddings
        } else if matches!(name, "output.weight" | "output.bias") {
            Self::LmHead
        } else if name.contains("norm") {
            Self::Norms
        } else {
            Self::AttentionLayers
        }
    }
}

/// The three matrices of an expert: `w2(silu(w1 x) * w3 x)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Matrix {
    /// `w1`
    Gate,
    /// `w2`
    Down,
    /// `w3`
    Up,
}

impl Matrix {
    /// The name in an expert's file: `w1`, `w2` or `w3`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gate => "w1",
            Self::Down => "w2",
            Self::Up => "w3",
        }
    }

    fn of_word(word: &str) -> Option<Self> {
        match word {
            "gate" => Some(Self::Gate),
            "down" => Some(Self::Down),
            "up" => Some(Self::Up),
            _ => None,
        }
    }
}

/// The parsed name of a tensor of routed experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertName<'a> {
    pub layer: u32,
    pub holds: Holds,
    /// `weight`, `bias`, `scale`, …
    pub suffix: &'a str,
}

/// Which experts and matrices a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// One matrix of every expert of the layer.
    Stack(Matrix),
    /// For each expert, the rows of the gate matrix and then those of the up matrix.
    FusedStack,
    /// One matrix of one expert.
    One { matrix: Matrix, expert: u32 },
}

impl<'a> ExpertName<'a> {
    /// Parses the name of a tensor of routed experts; `None` for every other name. Names are
    /// matched whole: `v.blk.3.ffn_gate_exps.weight`, `…_chexps` and `…_shexp` are other names.
    pub fn parse(name: &'a str) -> Option<Self> {
        let (layer, name) = name.strip_prefix("blk.")?.split_once('.')?;
        let layer = number(layer)?;
        let (holds, suffix) = if let Some(rest) = name.strip_prefix("ffn.experts.") {
            let (expert, rest) = rest.split_once('.')?;
            let (word, suffix) = rest.split_once('.')?;
            let matrix = match word {
                "w1" => Matrix::Gate,
                "w2" => Matrix::Down,
                "w3" => Matrix::Up,
                _ => return None,
            };
            let expert = number(expert)?;
            (Holds::One { matrix, expert }, suffix)
        } else {
            let (stem, rest) = name.strip_prefix("ffn_")?.split_once('.')?;
            match stem.strip_suffix("_exps") {
                Some("gate_up") => (Holds::FusedStack, rest),
                Some(word) => (Holds::Stack(Matrix::of_word(word)?), rest),
                None => {
                    let matrix = Matrix::of_word(stem)?;
                    let (expert, suffix) = rest.split_once('.')?;
                    let expert = number(expert)?;
                    (Holds::One { matrix, expert }, suffix)
                }
            }
        };
        // Some writers of NVFP4 append the scales' names to that of the weight.
        let suffix = match suffix.strip_prefix("weight.") {
            Some(of_weight @ ("scale" | "input_scale")) => of_weight,
            _ => suffix,
        };
        (!suffix.is_empty() && !suffix.contains('.')).then_some(Self {
            layer,
            holds,
            suffix,
        })
    }
}

/// A number in a name: digits only.
fn number(word: &str) -> Option<u32> {
    word.bytes().all(|b| b.is_ascii_digit()).then_some(())?;
    word.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_namings_of_routed_experts_are_recognised() {
        let parse = |name| ExpertName::parse(name).map(|e| (e.layer, e.holds, e.suffix));
        let one = |matrix, expert| Holds::One { matrix, expert };
        use Matrix::*;
        for (name, expected) in [
            (
                "blk.3.ffn_gate_exps.weight",
                (3, Holds::Stack(Gate), "weight"),
            ),
            (
                "blk.12.ffn_down_exps.scale",
                (12, Holds::Stack(Down), "scale"),
            ),
            (
                "blk.0.ffn_up_exps.input_scale",
                (0, Holds::Stack(Up), "input_scale"),
            ),
            (
                "blk.2.ffn_gate_up_exps.bias",
                (2, Holds::FusedStack, "bias"),
            ),
            ("blk.4.ffn_up.7.weight", (4, one(Up, 7), "weight")),
            (
                "blk.4.ffn.experts.1023.w2.weight",
                (4, one(Down, 1023), "weight"),
            ),
            (
                "blk.7.ffn_gate_exps.weight.scale",
                (7, Holds::Stack(Gate), "scale"),
            ),
            (
                "blk.7.ffn_down_exps.weight.input_scale",
                (7, Holds::Stack(Down), "input_scale"),
            ),
            (
                "blk.7.ffn_gate_up_exps.weight.scale",
                (7, Holds::FusedStack, "scale"),
            ),
            ("blk.4.ffn_up.7.weight.scale", (4, one(Up, 7), "scale")),
            (
                "blk.4.ffn.experts.3.w1.weight.scale",
                (4, one(Gate, 3), "scale"),
            ),
        ] {
            assert_eq!(parse(name), Some(expected), "{name}");
        }
    }

    #[test]
    fn names_that_only_look_like_experts_stay_in_the_base() {
        for name in [
            "v.blk.3.ffn_gate_exps.weight",
            "dec.blk.0.ffn_gate_exps.weight",
            "blk.3.ffn_gate_chexps.weight",
            "blk.3.ffn_gate_shexp.weight",
            "blk.3.ffn_norm_exps.weight",
            "blk.3.ffn_gate_exps",
            "blk.3.ffn_gate_exps.",
            "blk.3.ffn_gate_exps.weight.1",
            "blk.3.ffn_gate_exps.weight.bias",
            "blk.3.ffn_gate_exps.weight.scale.1",
            "blk.3.ffn_gate_exps.bias.scale",
            "blk.3.ffn_gate_exps.weight.",
            "blk.3.ffn_gate_shexp.weight.scale",
            "blk.3.ffn_gate.weight.scale",
            "blk.3.ffn_gate.weight",
            "blk.3.ffn_gate_inp.weight",
            "blk.-1.ffn_gate_exps.weight",
            "blk.+1.ffn_gate_exps.weight",
            "blk.99999999999.ffn_gate_exps.weight",
            "blk.3.ffn.experts.0.w4.weight",
            "blk.3.ffn.gate.weight",
            "blk..ffn_gate_exps.weight",
        ] {
            assert_eq!(ExpertName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides_the_component() {
        use Component::*;
        for (name, component) in [
            ("token_embd.weight", Embeddings),
            ("token_embd_norm.weight", Embeddings),
            ("per_layer_token_embd.weight", Embeddings),
            ("blk.1.engram_embd.weight", Embeddings),
            ("blk.14.engram_embd_norm.weight", Embeddings),
            ("blk.1.engram_k_norm.weight", Norms),
            ("blk.1.engram_q.weight", AttentionLayers),
            ("blk.6.nextn.embed_tokens.weight", AttentionLayers),
            ("position_embd.weight", Embeddings),
            ("token_types.weight", Embeddings),
            ("output.weight", LmHead),
            ("output.bias", LmHead),
            ("output.scale", AttentionLayers),
            ("output_norm.weight", Norms),
            ("blk.1.ffn_norm_exps.weight", Norms),
            ("blk.0.attn_output.weight", AttentionLayers),
            ("blk.0.ssm_a", AttentionLayers),
        ] {
            assert_eq!(Component::of(name), component, "{name}");
        }
    }
}
