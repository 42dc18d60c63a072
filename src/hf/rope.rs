//! Rotary positions: from llama.cpp's keys, and for Llama 3 from its tensor of factors, to
//! `rope_theta` and `rope_scaling`.

use serde_json::{Map, Value as Json, json};

use super::HfError;
use super::facts::Facts;
use super::keys::shortest;
use crate::gguf::{ModelHeader, Tensor};

/// What llama.cpp takes where a model does not say.
const DEFAULT_THETA: f32 = 10_000.0;
/// Of DeepSeek's kind of YaRN: a file holds a tenth of `mscale_all_dim`.
const LOG_MULTIPLIER_SHARE: f32 = 0.1;
/// The tensor of Llama 3's factors.
pub(super) const FACTORS: &str = "rope_freqs.weight";
/// Heads of real models are at most 512 wide.
const MAX_FACTORS: u64 = 1 << 14;

/// The tensor whose numbers a directory depends on, if the model has one: F32, and short.
pub fn factors(model: &ModelHeader) -> Option<&Tensor> {
    let mut tensors = model.tensors.iter();
    let found = tensors.find(|tensor| tensor.info.name == FACTORS)?;
    let is_readable = found.info.ggml_type.name == "F32" && found.info.bytes / 4 <= MAX_FACTORS;
    is_readable.then_some(found)
}

pub(super) fn theta(facts: &Facts) -> Result<f32, HfError> {
    let theta = facts.keys.float_above_0("rope.freq_base")?;
    Ok(theta.unwrap_or(DEFAULT_THETA))
}

pub(super) fn scaling(facts: &Facts) -> Result<Json, HfError> {
    let keys = &facts.keys;
    // Files of 2023 have the other key. llama.cpp takes 0 for none, and linear for no type.
    let factor = match keys.float_from_0("rope.scaling.factor")? {
        None => keys.float_from_0("rope.scale_linear")?,
        factor => factor,
    };
    let factor = factor.filter(|&factor| factor > 0.0);
    let kind = keys.text("rope.scaling.type")?;
    let factor = match (kind, factor) {
        (Some("none"), _) | (None, None | Some(1.0)) => return llama3(facts),
        (_, None) => return Err(HfError::MissingKey(keys.full("rope.scaling.factor"))),
        (_, Some(factor)) => factor,
    };
    if let Some(found) = facts.tensor(FACTORS) {
        // llama.cpp applies both.
        let key = keys.full("rope.scaling.factor");
        let problem = format!("{key} is {factor}, and config.json cannot express both");
        return Err(found.wrong(problem));
    }
    match kind {
        None | Some("linear") => Ok(json!({
            "type": "linear",
            "rope_type": "linear",
            "factor": shortest(factor),
        })),
        Some("yarn") => yarn(facts, factor),
        other => {
            let problem = format!(
                "is {:?}, which config.json cannot express",
                other.unwrap_or("")
            );
            Err(keys.wrong("rope.scaling.type", problem))
        }
    }
}

fn yarn(facts: &Facts, factor: f32) -> Result<Json, HfError> {
    let keys = &facts.keys;
    let mut scaling = Map::new();
    let mut set = |name: &str, value: Json| scaling.insert(name.to_owned(), value);
    set("type", "yarn".into());
    set("rope_type", "yarn".into());
    set("factor", shortest(factor).into());
    let original = keys.count("rope.scaling.original_context_length")?;
    set("original_max_position_embeddings", original.into());
    for (name, key, default) in [
        ("beta_fast", "rope.scaling.yarn_beta_fast", Some(32.0)),
        ("beta_slow", "rope.scaling.yarn_beta_slow", Some(1.0)),
        ("attention_factor", "rope.scaling.yarn_attn_factor", None),
    ] {
        if let Some(value) = keys.float_above_0(key)?.or(default) {
            set(name, shortest(value).into());
        }
    }
    if let Some(factor) = keys.float_from_0("rope.scaling.yarn_ext_factor")? {
        set("extrapolation_factor", shortest(factor).into());
    }
    if let Some(stored) = log_multiplier(facts)? {
        // The file does not hold `mscale`, but it is the same in every published model.
        let all_dim = undo_share(stored);
        set("mscale", all_dim.into());
        set("mscale_all_dim", all_dim.into());
    }
    if facts.model.architecture() == Some("gpt-oss") {
        set("truncate", false.into());
    }
    Ok(scaling.into())
}

/// DeepSeek's: llama.cpp reads it for no other architecture of ours, and takes 0 for none.
fn log_multiplier(facts: &Facts) -> Result<Option<f32>, HfError> {
    if facts.model.architecture() != Some("deepseek2") {
        return Ok(None);
    }
    let stored = facts
        .keys
        .float_from_0("rope.scaling.yarn_log_multiplier")?;
    Ok(stored.filter(|&stored| stored > 0.0))
}

/// The number of the fewest digits of which a tenth, in 32 bits, was stored.
fn undo_share(stored: f32) -> f64 {
    let near = f64::from(stored) / f64::from(LOG_MULTIPLIER_SHARE);
    let rounded = (0..9).map(|digits| format!("{near:.digits$}").parse().unwrap_or(near));
    rounded
        .into_iter()
        .find(|number: &f64| (0.1 * number) as f32 == stored)
        .unwrap_or(near)
}

/// Llama 3's scaling. llama.cpp computes the factor of each frequency when it converts a model,
/// and keeps nothing else.
fn llama3(facts: &Facts) -> Result<Json, HfError> {
    let Some(found) = facts.tensor(FACTORS) else {
        return Ok(Json::Null);
    };
    let inexpressible = || HfError::RopeFactors(FACTORS.to_owned());
    let factors = facts.rope_factors.ok_or_else(inexpressible)?;
    let width = facts.head_width()?;
    if found.info.ne[0] != factors.len() as u64 || width != 2 * factors.len() as u64 {
        return Err(found.wrong(format!("heads are {width} wide")));
    }
    if factors.iter().all(|&factor| factor == 1.0) {
        return Ok(Json::Null);
    }
    let kind = Llama3::of(factors, theta(facts)?).ok_or_else(inexpressible)?;
    Ok(json!({
        "type": "llama3",
        "rope_type": "llama3",
        "factor": shortest(kind.factor),
        "low_freq_factor": kind.low,
        "high_freq_factor": kind.high,
        "original_max_position_embeddings": kind.original,
    }))
}

/// The parameters of Llama 3's scaling: long waves are stretched by the factor, short ones not at
/// all, and those between by something between.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Llama3 {
    factor: f32,
    low: f64,
    high: f64,
    original: u64,
}

impl Llama3 {
    /// Finds parameters that give exactly these factors, but for the last digits.
    fn of(factors: &[f32], theta: f32) -> Option<Self> {
        let factor = factors.iter().copied().fold(1.0, f32::max);
        let published = |original| Self {
            factor,
            low: 1.0,
            high: 4.0,
            original,
        };
        let fits = |kind: &Self| kind.gives(factors, theta);
        let known = [8192, 4096, 2048, 16384, 32768, 131_072].map(published);
        let known = known.into_iter().find(fits);
        known.or_else(|| Self::solve(factors, theta, factor).into_iter().find(fits))
    }

    /// Parameters that may give these factors. Between the bounds, what a wave keeps of its
    /// frequency lies on a line, so two waves there determine both bounds.
    fn solve(factors: &[f32], theta: f32, factor: f32) -> Vec<Self> {
        let waves = wavelengths(factors.len(), theta);
        let waves = || factors.iter().copied().zip(waves.iter().copied());
        // 1 / ((1 - s) / factor + s), with s = (original / wave - low) / (high - low)
        let share = |f: f32| {
            let (f, factor) = (f64::from(f), f64::from(factor));
            (1.0 / f - 1.0 / factor) / (1.0 - 1.0 / factor)
        };
        let between = waves().filter(|(f, _)| *f > 1.0 && *f < factor);
        let between: Vec<_> = between.map(|(f, wave)| (1.0 / wave, share(f))).collect();
        if let [first, .., last] = between[..] {
            let [low, high] = bounds(first, last);
            // Only ratios are determined.
            let original = (1.0 / low).round();
            let high = (high / low * 1e4).round() / 1e4;
            let is_sane = (1.0..1e9).contains(&original) && high > 1.0 && high.is_finite();
            return is_sane
                .then_some(Self::bounded(factor, original, [1.0, high]))
                .into_iter()
                .collect();
        }
        // One or none leave a choice, and any choice gives the same factors: that a bound is at the
        // next wave, or just before it, since mlx-lm does not stretch a wave of just that length.
        let short = waves().rfind(|(f, _)| *f == 1.0);
        let long = waves().find(|(f, _)| *f == factor);
        let short = short.map(|(_, wave)| (1.0 / wave, 1.0));
        let long = long.map(|(_, wave)| (1.0 / (0.999 * wave), 0.0));
        let points: Vec<_> = short.into_iter().chain(between).chain(long).collect();
        let pairs = points.windows(2).map(|pair| bounds(pair[0], pair[1]));
        let original = 8192.0;
        pairs
            .map(|ends| Self::bounded(factor, original, ends.map(|end| end * original)))
            .collect()
    }

    fn bounded(factor: f32, original: f64, [low, high]: [f64; 2]) -> Self {
        Self {
            factor,
            low,
            high,
            original: original as u64,
        }
    }

    fn gives(&self, factors: &[f32], theta: f32) -> bool {
        let (long, short) = (
            self.original as f64 / self.low,
            self.original as f64 / self.high,
        );
        let factor = f64::from(self.factor);
        let waves = wavelengths(factors.len(), theta);
        factors.iter().zip(waves).all(|(&found, wave)| {
            let expected = if wave < short {
                1.0
            } else if wave > long {
                factor
            } else {
                let smooth = (self.original as f64 / wave - self.low) / (self.high - self.low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            };
            (f64::from(found) - expected).abs() <= 1e-4 * expected
        })
    }
}

/// Where the line through two points is 0 and where it is 1.
fn bounds(a: (f64, f64), b: (f64, f64)) -> [f64; 2] {
    let slope = (b.1 - a.1) / (b.0 - a.0);
    [0.0, 1.0].map(|share| a.0 + (share - a.1) / slope)
}

/// The length of the wave of each pair of dimensions, in tokens.
fn wavelengths(pairs: usize, theta: f32) -> Vec<f64> {
    let exponent = |pair| pair as f64 / pairs as f64;
    let wave = |pair| std::f64::consts::TAU * f64::from(theta).powf(exponent(pair));
    (0..pairs).map(wave).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(kind: Llama3, pairs: usize, theta: f32) -> Vec<f32> {
        let (long, short) = (
            kind.original as f64 / kind.low,
            kind.original as f64 / kind.high,
        );
        let factor = |wave: f64| {
            if wave < short {
                1.0
            } else if wave > long {
                kind.factor
            } else {
                let smooth = (kind.original as f64 / wave - kind.low) / (kind.high - kind.low);
                (1.0 / ((1.0 - smooth) / f64::from(kind.factor) + smooth)) as f32
            }
        };
        wavelengths(pairs, theta).into_iter().map(factor).collect()
    }

    #[test]
    fn the_parameters_of_llama_3_come_back_from_its_factors() {
        for (factor, low, high, original) in [
            (8.0, 1.0, 4.0, 8192),
            (32.0, 1.0, 4.0, 8192),
            (4.0, 1.0, 8.0, 1000),
            (16.0, 1.0, 2.5, 4096),
        ] {
            let kind = Llama3 {
                factor,
                low,
                high,
                original,
            };
            let factors = factors(kind, 64, 500_000.0);
            assert_eq!(Llama3::of(&factors, 500_000.0), Some(kind));
        }
    }

    #[test]
    fn factors_of_few_waves_between_the_bounds_are_met() {
        // The factor, the bounds, what they are of, the base of the waves, their number.
        for (factor, low, high, original, theta, pairs) in [
            (3.5, 2.0, 4.0, 2048, 1e6, 32),
            (3.5, 1.0, 1.05, 5000, 1e6, 32),
            (16.0, 1.0, 4.0, 3000, 1e6, 8),
            (8.0, 1.0, 1.2, 100, 1e4, 16),
        ] {
            let kind = Llama3 {
                factor,
                low,
                high,
                original,
            };
            let factors = factors(kind, pairs, theta);
            assert!(factors.iter().filter(|&&f| f > 1.0 && f < factor).count() < 2);
            assert!(Llama3::of(&factors, theta).is_some());
        }
    }

    #[test]
    fn factors_of_another_kind_are_not_taken_for_llama_3s() {
        let made_up: Vec<f32> = (0..32).map(|n| 1.0 + (n % 5) as f32).collect();
        assert_eq!(Llama3::of(&made_up, 10_000.0), None);
        assert_eq!(Llama3::of(&[f32::NAN; 8], 10_000.0), None);
        assert_eq!(Llama3::of(&[1.0, 8.0, 3.0, 1.0], 1e-9), None);
    }

    #[test]
    fn a_tenth_in_32_bits_is_undone() {
        for number in [1.0, 0.707, 0.5, 1.25] {
            assert_eq!(undo_share((0.1 * number) as f32), number);
        }
    }
}
