//! The values of config.json that are more than one key.

use serde_json::{Value as Json, json};

use super::facts::{Facts, SIGMOID, SOFTMAX};
use super::keys::shortest;
use super::{HfError, rope};
use crate::gguf::Value;

type Result = std::result::Result<Json, HfError>;

pub fn layers(facts: &Facts) -> Result {
    Ok(facts.layer_count()?.into())
}

pub fn extra_layers(facts: &Facts) -> Result {
    let extra = facts.extra_layer_numbers()?;
    Ok((extra.end - extra.start).into())
}

pub fn key_value_heads(facts: &Facts) -> Result {
    Ok(facts.key_value_head_count()?.into())
}

pub fn norm_epsilon(facts: &Facts) -> Result {
    let name = "attention.layer_norm_rms_epsilon";
    let epsilon = facts.keys.float_from_0(name)?;
    Ok(shortest(epsilon.ok_or_else(|| facts.missing(name))?).into())
}

pub fn rope_theta(facts: &Facts) -> Result {
    Ok(shortest(rope::theta(facts)?).into())
}

pub fn rope_scaling(facts: &Facts) -> Result {
    rope::scaling(facts)
}

pub fn vocabulary(facts: &Facts) -> Result {
    let name = "token_embd.weight";
    let embedding = facts.tensor(name);
    let embedding = embedding.ok_or_else(|| HfError::MissingTensor(name.to_owned()))?;
    facts.keys.number("vocab_size")?; // the rows of the embedding are the truth
    Ok(embedding.info.ne[1].into())
}

pub fn ties_embeddings(facts: &Facts) -> Result {
    Ok(facts.tensor("output.weight").is_none().into())
}

pub fn head_dim(facts: &Facts) -> Result {
    let width = facts.head_width()?;
    facts.keys.number("rope.dimension_count")?;
    Ok(width.into())
}

/// The part of each head that has positions.
pub fn rotary_share(facts: &Facts) -> Result {
    let (width, rotary) = (
        facts.head_width()?,
        facts.keys.count("rope.dimension_count")?,
    );
    if rotary > width {
        let problem = format!("is {rotary}, but heads are {width} wide");
        return Err(facts.keys.wrong("rope.dimension_count", problem));
    }
    // Loaders multiply and cut off, so that the nearest number may be a hair too small.
    let mut share = rotary as f64 / width as f64;
    if ((share * width as f64) as u64) < rotary {
        share = share.next_up();
    }
    Ok(share.into())
}

pub fn query_rank(facts: &Facts) -> Result {
    Ok(match facts.first("attn_q_a.weight")? {
        None => Json::Null,
        found => facts.stated_or("attention.q_lora_rank", found, 1)?.into(),
    })
}

pub fn plain_head_dim(facts: &Facts) -> Result {
    Ok(facts.plain_head_width()?.into())
}

pub fn value_head_dim(facts: &Facts) -> Result {
    Ok(facts.value_head_width()?.into())
}

pub fn dense_width(facts: &Facts) -> Result {
    let dense = facts.first("ffn_up.weight")?;
    Ok(facts.stated_or("feed_forward_length", dense, 1)?.into())
}

pub fn expert_width(facts: &Facts) -> Result {
    facts.keys.has("feed_forward_length"); // where it is not of experts, it says nothing
    let down = match facts.first("ffn_down_exps.weight")? {
        None => facts.first("ffn_down.0.weight")?,
        found => found,
    };
    let key = match facts.keys.has("expert_feed_forward_length") {
        true => "expert_feed_forward_length",
        false => "feed_forward_length",
    };
    Ok(facts.stated_or(key, down, 0)?.into())
}

pub fn shared_width(facts: &Facts) -> Result {
    let shared = facts.first("ffn_down_shexp.weight")?;
    let key = "expert_shared_feed_forward_length";
    Ok(facts.stated_or(key, shared, 0)?.into())
}

/// How many experts a token uses.
pub fn experts_used(facts: &Facts) -> Result {
    let (used, all) = (
        facts.keys.count("expert_used_count")?,
        facts.keys.count("expert_count")?,
    );
    if used > all {
        let problem = format!("is {used}, but there are only {all} experts");
        return Err(facts.keys.wrong("expert_used_count", problem));
    }
    Ok(used.into())
}

/// How many experts' worth of rows every token uses.
pub fn shared_experts(facts: &Facts) -> Result {
    let name = "ffn_down_shexp.weight";
    let key = "expert_shared_count";
    let stated = facts.keys.number(key)?;
    let width = expert_width(facts)?.as_u64().unwrap_or(0);
    let Some(found) = facts.first(name)? else {
        let stated = stated.unwrap_or(0);
        let with_experts = facts
            .layer_numbers()?
            .find(|&layer| facts.is_moe_layer(layer));
        return match with_experts {
            Some(layer) if stated > 0 => Err(HfError::MissingTensor(format!("blk.{layer}.{name}"))),
            _ => Ok(stated.into()),
        };
    };
    let count = found.info.ne[0].checked_div(width).unwrap_or(0);
    if count * width != found.info.ne[0] || stated.is_some_and(|stated| stated != count) {
        let key = facts.keys.full(key);
        let stated = stated.map_or("missing".to_owned(), |stated| stated.to_string());
        return Err(found.wrong(format!("{key} is {stated}, and experts are {width} wide")));
    }
    Ok(count.into())
}

/// What the outputs of experts are multiplied by; llama.cpp takes 0 for 1.
pub fn routed_scale(facts: &Facts) -> Result {
    let scale = facts.keys.float_from_0("expert_weights_scale")?;
    let scale = scale.filter(|&scale| scale > 0.0).unwrap_or(1.0);
    Ok(shortest(scale).into())
}

/// That the weights of the experts of a token are not divided by their sum: DeepSeek-V2's classes
/// never do, whatever `norm_topk_prob` says.
pub fn weights_as_they_are(facts: &Facts) -> Result {
    let key = "expert_weights_norm";
    match facts.keys.flag(key)? {
        Some(true) => Err(facts
            .keys
            .wrong(key, "is true, which no loader of deepseek_v2 does")),
        _ => Ok(false.into()),
    }
}

/// The layers without experts, where they may be anywhere.
pub fn dense_layers(facts: &Facts) -> Result {
    let layers = facts.layer_numbers()?;
    let dense: Vec<u64> = layers.filter(|&layer| !facts.is_moe_layer(layer)).collect();
    Ok(dense.into())
}

/// How many layers without experts come first, where all others have some.
pub fn leading_dense_layers(facts: &Facts) -> Result {
    facts.keys.number("leading_dense_block_count")?; // the layers themselves are the truth
    let mut layers = facts.layer_numbers()?;
    let dense = layers
        .clone()
        .take_while(|&layer| !facts.is_moe_layer(layer));
    let dense = dense.count() as u64;
    match layers.find(|&layer| layer > dense && !facts.is_moe_layer(layer)) {
        Some(layer) => Err(HfError::MissingTensor(format!(
            "blk.{layer}.ffn_gate_inp.weight"
        ))),
        None => Ok(dense.into()),
    }
}

/// That experts are chosen by sigmoids; llama.cpp takes 0 for nothing said.
pub fn sigmoid(facts: &Facts) -> Result {
    match facts.keys.number("expert_gating_func")? {
        None | Some(0 | SIGMOID) => Ok("sigmoid".into()),
        Some(other) => {
            let problem = format!("is {other}, but only {SIGMOID} (sigmoid) can be expressed");
            Err(facts.keys.wrong("expert_gating_func", problem))
        }
    }
}

/// That experts are chosen by softmax; llama.cpp takes 0 for nothing said.
pub fn softmax(facts: &Facts) -> Result {
    match facts.keys.number("expert_gating_func")? {
        None | Some(0 | SOFTMAX) => Ok("softmax".into()),
        Some(other) => {
            let problem = format!("is {other}, but only {SOFTMAX} (softmax) can be expressed");
            Err(facts.keys.wrong("expert_gating_func", problem))
        }
    }
}

/// Groups of experts, of which a token uses some. Files of before October 2025 do not say, so
/// that those of DeepSeek's two large models are given here.
fn group_counts(facts: &Facts) -> std::result::Result<(u64, u64), HfError> {
    let stated = (
        facts.keys.number("expert_group_count")?,
        facts.keys.number("expert_group_used_count")?,
    );
    let (groups, used) = match stated {
        (Some(groups), Some(used)) => (groups, used),
        _ => match (facts.layer_count()?, facts.keys.number("expert_count")?) {
            (61, Some(256)) => (8, 4),
            (60, Some(160)) => (8, 3),
            _ => (1, 1),
        },
    };
    let experts = facts.keys.count("expert_count")?;
    if groups == 0 || !experts.is_multiple_of(groups) {
        let problem = format!("is {groups}, with {experts} experts");
        return Err(facts.keys.wrong("expert_group_count", problem));
    }
    if used == 0 || used > groups {
        let problem = format!("is {used}, but there are {groups} groups");
        return Err(facts.keys.wrong("expert_group_used_count", problem));
    }
    Ok((groups, used))
}

pub fn groups(facts: &Facts) -> Result {
    Ok(group_counts(facts)?.0.into())
}

pub fn groups_used(facts: &Facts) -> Result {
    Ok(group_counts(facts)?.1.into())
}

/// How V2 chooses experts.
pub fn softmax_choice(facts: &Facts) -> Result {
    Ok(match group_counts(facts)? {
        (1, _) => "greedy".into(),
        _ => "group_limited_greedy".into(),
    })
}

pub fn clamp(facts: &Facts) -> Result {
    let clamp = facts.keys.float("attention.clamp_kqv")?;
    Ok(clamp
        .filter(|&clamp| clamp > 0.0)
        .map_or(Json::Null, |c| shortest(c).into()))
}

/// Sliding and full attention in turn.
pub fn alternating_layers(facts: &Facts) -> Result {
    let key = "attention.sliding_window_pattern";
    let pattern = facts
        .keys
        .has(key)
        .then(|| facts.model.get(&facts.keys.full(key)));
    let slides: Vec<bool> = match pattern.flatten().map(|kv| &kv.value) {
        None => facts.layer_numbers()?.map(|layer| layer % 2 == 0).collect(),
        Some(Value::Array {
            items: Some(items), ..
        }) => {
            let flags = items.iter().map(|item| match item {
                Value::Bool(slides) => Some(*slides),
                _ => None,
            });
            let flags: Option<Vec<bool>> = flags.collect();
            flags
                .filter(|flags| flags.len() as u64 == facts.layer_count().unwrap_or(0))
                .ok_or_else(|| facts.keys.wrong(key, "must say yes or no for each layer"))?
        }
        Some(_) => return Err(facts.keys.wrong(key, "must say yes or no for each layer")),
    };
    let kinds = slides.iter().map(|slides| match slides {
        true => "sliding_attention",
        false => "full_attention",
    });
    Ok(json!(kinds.collect::<Vec<_>>()))
}
