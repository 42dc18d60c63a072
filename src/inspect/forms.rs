//! What each form of a model would take.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{ActiveReport, Amount, ExpertLayerReport, expert_layers};
use crate::form::Form;
use crate::layout::Layout;
use crate::model::Model;

/// What a form would take. Bytes are payload.
#[derive(Debug, Clone, Serialize)]
pub struct FormReport {
    /// As `--as` has it.
    pub form: &'static str,
    /// Whether `--requant` is given, too.
    pub requant: bool,
    /// Of an expert, on average; `None` if there are no experts.
    pub expert_bytes: Option<u64>,
    pub active: ActiveReport,
    /// Of all files.
    pub bytes: u64,
}

/// What every form would take, and what MLX cannot pack.
#[derive(Debug, Clone, Serialize)]
pub struct FormsReport {
    /// Those that are possible; only `raw` if the model has types whose numbers are not known.
    pub forms: Vec<FormReport>,
    /// By type, the quantised tensors that `--as mlx` shows as plain numbers, and their bytes in the
    /// model.
    pub not_packed: BTreeMap<&'static str, Amount>,
}

impl FormsReport {
    /// Works out the sizes of all forms, without reading any payload.
    pub fn new(model: &Model) -> Self {
        let layout = model.layout();
        let mut not_packed: BTreeMap<_, Amount> = BTreeMap::new();
        for (ggml_type, bytes) in layout.not_packed().unwrap_or_default() {
            let amount = not_packed.entry(ggml_type).or_default();
            amount.tensors += 1;
            amount.bytes += bytes;
        }
        let mut forms = Form::ALL.to_vec();
        if !not_packed.is_empty() {
            forms.push(Form::REQUANTISED);
        }
        let forms = forms.into_iter();
        Self {
            forms: forms.filter_map(|form| of(layout, form)).collect(),
            not_packed,
        }
    }
}

fn of(layout: &Layout, form: Form) -> Option<FormReport> {
    let payloads = layout.payloads_as(form)?;
    let layers: Vec<ExpertLayerReport> = expert_layers(layout, &payloads);
    let experts = layout.experts().len() as u64;
    let expert_bytes: u64 = layers.iter().map(|layer| layer.bytes).sum();
    Some(FormReport {
        form: form.name(),
        requant: form == Form::REQUANTISED,
        expert_bytes: expert_bytes.checked_div(experts),
        active: ActiveReport::new(layout, &payloads, &layers),
        bytes: payloads.iter().sum(),
    })
}
