//! `inspect`: what is in a model, and what the mount would show.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use odmoe_fs::layout::{File, FileKind, Layout};
use odmoe_fs::model::Model;
use odmoe_fs::safetensors::{Dtype, Shape};
use serde::Serialize;

use super::{ModelArg, print, text};

/// Say what is in a model, and what mounting it would show
#[derive(clap::Args)]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelArg,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let model = Model::open(&args.model.model)?;
    let report = Report::new(&model, args.tensors);
    if args.json {
        let mut json = serde_json::to_string_pretty(&report)?;
        json.push('\n');
        print(&json)
    } else {
        print(&report.text())
    }
}

#[derive(Serialize)]
struct Report<'a> {
    architecture: Option<&'a str>,
    gguf_version: u32,
    parts: Vec<PartReport<'a>>,
    /// Bytes of all parts.
    bytes: u64,
    tensor_count: usize,
    ggml_types: BTreeMap<&'static str, Amount>,
    components: BTreeMap<&'static str, Amount>,
    experts: ExpertsReport,
    tree: TreeReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<TensorReport<'a>>>,
}

#[derive(Serialize)]
struct PartReport<'a> {
    path: std::borrow::Cow<'a, str>,
    bytes: u64,
    alignment: u32,
    data_start: u64,
    tensors: usize,
}

/// A number of tensors and their bytes.
#[derive(Serialize, Default, Clone, Copy)]
struct Amount {
    tensors: usize,
    bytes: u64,
}

#[derive(Serialize)]
struct ExpertsReport {
    files: usize,
    /// Payload bytes of all experts.
    bytes: u64,
    used_per_token: Option<serde_json::Value>,
    layers: Vec<LayerReport>,
}

#[derive(Serialize)]
struct LayerReport {
    layer: u32,
    experts: usize,
    bytes: u64,
}

#[derive(Serialize)]
struct TreeReport {
    files: usize,
    bytes: u64,
    /// Payload bytes that are at another place modulo 4096 than in the model: a file system that
    /// shares blocks has to copy them.
    incongruent_bytes: u64,
    incongruent_expert_bytes: u64,
}

#[derive(Serialize)]
struct TensorReport<'a> {
    name: &'a str,
    part: u32,
    ggml_type: &'static str,
    /// Row-major, in elements.
    shape: Vec<u64>,
    dtype: &'static str,
    offset: u64,
    bytes: u64,
}

impl<'a> Report<'a> {
    fn new(model: &'a Model, tensors: bool) -> Self {
        let layout = model.layout();
        let header = layout.model();
        let mut ggml_types: BTreeMap<_, Amount> = BTreeMap::new();
        let mut per_part = vec![0; header.parts.len()];
        for tensor in &header.tensors {
            let amount = ggml_types.entry(tensor.info.ggml_type.name).or_default();
            amount.tensors += 1;
            amount.bytes += tensor.info.bytes;
            per_part[tensor.part as usize] += 1;
        }
        let parts = model.source().paths().zip(&header.parts).zip(per_part);
        let parts = parts.map(|((path, part), tensors)| PartReport {
            path: path.to_string_lossy(),
            bytes: part.file_bytes,
            alignment: part.alignment,
            data_start: part.data_start,
            tensors,
        });
        let incongruent = |files: &[File]| files.iter().map(|f| f.incongruent_bytes).sum();
        let used = layout.expert_used_count();
        Self {
            architecture: header.architecture(),
            gguf_version: header.version,
            parts: parts.collect(),
            bytes: header.parts.iter().map(|part| part.file_bytes).sum(),
            tensor_count: header.tensors.len(),
            ggml_types,
            components: components(layout),
            experts: ExpertsReport {
                files: layout.experts().len(),
                bytes: layout.experts().iter().map(|f| f.payload_bytes).sum(),
                used_per_token: used.and_then(|value| value.as_u64()).map(Into::into),
                layers: layers(layout),
            },
            tree: TreeReport {
                files: model.tree().files().count(),
                bytes: model.tree().total_size(),
                incongruent_bytes: incongruent(layout.files()),
                incongruent_expert_bytes: incongruent(layout.experts()),
            },
            tensors: tensors.then(|| tensor_reports(layout)),
        }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let first = Path::new(self.parts[0].path.as_ref());
        let file_name = first.file_name().unwrap_or(first.as_os_str());
        writeln!(out, "{}", text::name(&file_name.to_string_lossy()))?;
        let architecture = self.architecture.unwrap_or("unknown");
        writeln!(
            out,
            "  model       {}, GGUF v{}, {} in {}",
            text::name(architecture),
            self.gguf_version,
            text::size(self.bytes),
            text::counted(self.parts.len(), "part"),
        )?;
        writeln!(
            out,
            "  tensors     {}",
            text::count(self.tensor_count as u64)
        )?;
        let mut by_size: Vec<_> = self.ggml_types.iter().collect();
        by_size.sort_by_key(|(_, amount)| std::cmp::Reverse(amount.bytes));
        for (ggml_type, amount) in by_size {
            writeln!(out, "    {ggml_type:<18} {}", amount.text())?;
        }
        writeln!(out, "  base_model/")?;
        for (component, amount) in &self.components {
            writeln!(out, "    {component:<18} {}", amount.text())?;
        }
        let experts = &self.experts;
        if experts.files == 0 {
            writeln!(out, "  experts/    none: this model has no routed experts")?;
        } else {
            let numbers: Vec<u32> = experts.layers.iter().map(|layer| layer.layer).collect();
            writeln!(
                out,
                "  experts/    {} of {} on average, {}",
                text::counted(experts.files, "expert"),
                text::size(experts.bytes / experts.files as u64),
                text::size(experts.bytes),
            )?;
            writeln!(out, "    layers             {}", text::ranges(&numbers))?;
            writeln!(out, "    experts per layer  {}", experts.per_layer())?;
            if let Some(used) = &experts.used_per_token {
                writeln!(out, "    used per token     {used}")?;
            }
        }
        writeln!(
            out,
            "  tree        {}, {}; {} of it cannot share disk blocks with the model (not page-congruent)",
            text::counted(self.tree.files, "file"),
            text::size(self.tree.bytes),
            text::size(self.tree.incongruent_bytes),
        )?;
        self.write_tensors(out)
    }

    fn write_tensors(&self, out: &mut String) -> std::fmt::Result {
        let Some(tensors) = &self.tensors else {
            return Ok(());
        };
        let columns = ("bytes", "offset", "part", "type", "shape", "name");
        writeln!(
            out,
            "\n{:>14} {:>16} {:>5}  {:<9} {:<22} {}",
            columns.0, columns.1, columns.2, columns.3, columns.4, columns.5
        )?;
        for tensor in tensors {
            let shape = format!("{:?}", tensor.shape);
            writeln!(
                out,
                "{:>14} {:>16} {:>5}  {:<9} {shape:<22} {}",
                tensor.bytes,
                tensor.offset,
                tensor.part,
                tensor.ggml_type,
                text::name(tensor.name),
            )?;
        }
        Ok(())
    }
}

impl Amount {
    fn text(self) -> String {
        let tensors = text::counted(self.tensors, "tensor");
        format!("{tensors:>13}, {}", text::size(self.bytes))
    }
}

impl ExpertsReport {
    fn per_layer(&self) -> String {
        let counts = self.layers.iter().map(|layer| layer.experts);
        match (counts.clone().min(), counts.max()) {
            (Some(min), Some(max)) if min != max => format!("{min} to {max}"),
            (_, max) => max.unwrap_or(0).to_string(),
        }
    }
}

fn components(layout: &Layout) -> BTreeMap<&'static str, Amount> {
    let files = layout.files().iter().filter_map(|file| match file.kind {
        FileKind::Base(component) => Some((component, file)),
        FileKind::Expert { .. } => None,
    });
    let amounts = files.map(|(component, file)| {
        let amount = Amount {
            tensors: layout.tensors(file).len(),
            bytes: file.payload_bytes,
        };
        (component.name(), amount)
    });
    amounts.collect()
}

fn layers(layout: &Layout) -> Vec<LayerReport> {
    let mut layers: Vec<LayerReport> = Vec::new();
    for file in layout.experts() {
        let FileKind::Expert { layer, .. } = file.kind else {
            continue;
        };
        match layers.last_mut().filter(|last| last.layer == layer) {
            Some(last) => {
                last.experts += 1;
                last.bytes += file.payload_bytes;
            }
            None => layers.push(LayerReport {
                layer,
                experts: 1,
                bytes: file.payload_bytes,
            }),
        }
    }
    layers
}

fn tensor_reports(layout: &Layout) -> Vec<TensorReport<'_>> {
    let tensors = layout.model().tensors.iter();
    let reports = tensors.map(|tensor| TensorReport {
        name: &tensor.info.name,
        part: tensor.part,
        ggml_type: tensor.info.ggml_type.name,
        shape: Shape::of_dims(tensor.info.dims()).dims().to_vec(),
        dtype: Dtype::of(tensor.info.ggml_type).name(),
        offset: tensor.info.offset,
        bytes: tensor.info.bytes,
    });
    reports.collect()
}
