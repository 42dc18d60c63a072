//! A model as a picture: bars as long as what they stand for, in the width of the terminal.

use std::fmt::Write as _;
use std::path::Path;

use odmoe_fs::inspect::{Amount, LayerReport, MATRICES, Report};
use ratatui::crossterm::style::Color;
use unicode_width::UnicodeWidthStr;

use super::super::screen::Screen;
use super::super::{forms, text};

/// One line of a chart.
struct Bar {
    label: String,
    bytes: u64,
    remark: String,
}

pub fn draw(report: &Report, screen: &Screen) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(report, screen, &mut out);
    out
}

fn write(report: &Report, screen: &Screen, out: &mut String) -> std::fmt::Result {
    let first = Path::new(report.parts[0].path.as_ref());
    let file_name = first.file_name().unwrap_or(first.as_os_str());
    writeln!(
        out,
        "{}",
        screen.heading(&screen.cut(&text::name(&file_name.to_string_lossy()), 0))
    )?;
    let mut text = format!(
        "{}, GGUF v{}, {} in {}, {}\n",
        text::name(report.architecture.unwrap_or("unknown architecture")),
        report.gguf_version,
        text::size(report.bytes),
        text::counted(report.parts.len(), "part"),
        text::counted(report.tensor_count, "tensor"),
    );
    if report.parts.len() > 1 {
        let sizes = report.parts.iter().map(|part| part.bytes);
        let (least, most) = (sizes.clone().min().unwrap_or(0), sizes.max().unwrap_or(0));
        let (least, most) = (text::size(least), text::size(most));
        writeln!(text, "parts of {least} to {most}")?;
    }
    out.write_str(&screen.fit(&text))?;
    chart(
        out,
        screen,
        "bytes by component",
        Color::Cyan,
        &components(report),
    )?;
    chart(
        out,
        screen,
        "bytes by GGML type",
        Color::Green,
        &types(report),
    )?;
    chart(
        out,
        screen,
        "bytes of one layer",
        Color::Yellow,
        &layers(report),
    )?;
    experts(report, screen, out)?;
    write!(out, "\n{}", forms::table(&report.forms, None, screen))?;
    memory(report, screen, out)?;
    tree(report, screen, out)
}

fn components(report: &Report) -> Vec<Bar> {
    let mut bars: Vec<Bar> = report
        .components
        .iter()
        .map(|(name, amount)| Bar::new((*name).to_owned(), *amount))
        .collect();
    if report.experts.files > 0 {
        bars.push(Bar {
            label: "experts".to_owned(),
            bytes: report.experts.bytes,
            remark: text::counted(report.experts.files, "expert"),
        });
    }
    bars.sort_by_key(|bar| std::cmp::Reverse(bar.bytes));
    bars
}

fn types(report: &Report) -> Vec<Bar> {
    let types = report.ggml_types.iter();
    let mut bars: Vec<_> = types
        .map(|(name, amount)| Bar::new((*name).to_owned(), *amount))
        .collect();
    bars.sort_by_key(|bar| std::cmp::Reverse(bar.bytes));
    bars
}

/// Neighbours of the same kind share a line, with the mean of their sizes.
fn layers(report: &Report) -> Vec<Bar> {
    let alike = |a: &LayerReport, b: &LayerReport| {
        a.layer + 1 == b.layer && (a.kind, a.experts) == (b.kind, b.experts)
    };
    let runs = report.layers.chunk_by(alike);
    let bar = |run: &[LayerReport]| {
        let sizes = run
            .iter()
            .map(|layer| layer.base_bytes + layer.expert_bytes);
        let (least, most) = (
            sizes.clone().min().unwrap_or(0),
            sizes.clone().max().unwrap_or(0),
        );
        let kind = match run[0].experts {
            0 => "dense".to_owned(),
            experts => format!("MoE, {}", text::counted(experts, "expert")),
        };
        let numbers: Vec<u32> = run.iter().map(|layer| layer.layer).collect();
        let range = if least == most {
            String::new()
        } else {
            format!(", {} to {}", text::size(least), text::size(most))
        };
        Bar {
            label: format!("{} {kind}", text::ranges(&numbers)),
            bytes: sizes.sum::<u64>() / run.len() as u64,
            remark: format!("{}{range}", if run.len() > 1 { "each" } else { "" }),
        }
    };
    runs.map(bar).collect()
}

impl Bar {
    fn new(label: String, amount: Amount) -> Self {
        Self {
            label,
            bytes: amount.bytes,
            remark: text::counted(amount.tensors, "tensor"),
        }
    }
}

/// The widths of what stands beside a bar.
const SIZE_COLUMNS: usize = 11;
const MOST_BAR_COLUMNS: usize = 60;
/// A shorter bar shows nothing.
const FEWEST_BAR_COLUMNS: usize = 5;

fn chart(
    out: &mut String,
    screen: &Screen,
    title: &str,
    colour: Color,
    bars: &[Bar],
) -> std::fmt::Result {
    let Some(largest) = bars.iter().map(|bar| bar.bytes).max() else {
        return Ok(());
    };
    writeln!(out, "\n{}", screen.heading(title))?;
    // Two blanks between columns; the label gives way if it and the size do not fit.
    let labels = bars
        .iter()
        .map(|bar| screen.cut(&bar.label, 2 + 2 + SIZE_COLUMNS));
    let labels: Vec<String> = labels.collect();
    let label_columns = labels.iter().map(|label| label.width()).max().unwrap_or(0);
    let remark_columns = bars.iter().map(|bar| bar.remark.width()).max().unwrap_or(0);
    let others = 2 + label_columns + 2 + SIZE_COLUMNS + 2 + remark_columns + 2;
    let room = screen
        .columns()
        .and_then(|columns| columns.checked_sub(others))
        .filter(|room| *room >= FEWEST_BAR_COLUMNS);
    for (bar, label) in bars.iter().zip(labels) {
        let drawn = room.map_or(String::new(), |room| {
            let share = bar.bytes as f64 / largest.max(1) as f64;
            screen.bar(share, room.min(MOST_BAR_COLUMNS), colour) + "  "
        });
        let label = text::left(&label, label_columns);
        let size = text::size(bar.bytes);
        let line = |remark: &str| {
            let line = format!("  {label}  {drawn}{size:>SIZE_COLUMNS$}  {remark}");
            line.trim_end().to_owned()
        };
        // Where there is no room for a bar, the second half of a remark gives way, then all of it.
        let half = bar.remark.split(',').next().unwrap_or("");
        let lines = [line(&bar.remark), line(half), line("")];
        let fits = |line: &&String| room.is_some() || !screen.overflows(line);
        writeln!(out, "{}", lines.iter().find(fits).unwrap_or(&lines[2]))?;
    }
    Ok(())
}

fn experts(report: &Report, screen: &Screen, out: &mut String) -> std::fmt::Result {
    let experts = &report.experts;
    writeln!(out, "\n{}", screen.heading("experts"))?;
    if experts.files == 0 {
        return writeln!(out, "  none: this model has no routed experts");
    }
    let numbers: Vec<u32> = experts.layers.iter().map(|layer| layer.layer).collect();
    let counts = experts.layers.iter().map(|layer| layer.experts);
    let per_layer = match (counts.clone().min(), counts.max()) {
        (Some(min), Some(max)) if min != max => format!("{min} to {max}"),
        (_, max) => max.unwrap_or(0).to_string(),
    };
    let mut text = format!(
        "  {} in {} ({}), {per_layer} per layer\n  {} each on average\n",
        text::count(experts.files as u64),
        text::counted(numbers.len(), "layer"),
        text::ranges(&numbers),
        text::size(experts.bytes / experts.files as u64),
    );
    for incomplete in &experts.incomplete {
        let word = |name: &&str| {
            MATRICES
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, word)| *word)
        };
        let missing: Vec<_> = incomplete.missing.iter().filter_map(word).collect();
        writeln!(
            text,
            "  {} without {} matrix, the first in layer {}: {}",
            text::count(incomplete.experts as u64),
            missing.join(" and "),
            incomplete.first.0,
            incomplete.first.1,
        )?;
    }
    let active = &report.active;
    match (active.experts_per_layer, active.expert_bytes, active.bytes) {
        (Some(used), Some(bytes), Some(all)) => writeln!(
            text,
            "  {used} per layer for a token: {},\n  with the base {}",
            text::size(bytes),
            text::size(all)
        ),
        _ => writeln!(
            text,
            "  the model does not say how many of them a token uses"
        ),
    }?;
    out.write_str(&screen.fit(&text))
}

fn memory(report: &Report, screen: &Screen, out: &mut String) -> std::fmt::Result {
    let Some(memory) = report.memory else {
        return Ok(());
    };
    let title = format!(
        "memory here: {}, of which {} are free",
        text::size(memory.total),
        text::size(memory.available)
    );
    writeln!(out, "\n{}", screen.heading(&title))?;
    let whole = match report.form {
        "raw" => report.bytes,
        _ => report.active.base_bytes + report.experts.bytes,
    };
    let needs = [
        ("base", Some(report.active.base_bytes)),
        ("base and the experts of a token", report.active.bytes),
        ("whole model", Some(whole)),
    ];
    let rows = needs.into_iter().filter_map(|(what, bytes)| {
        let bytes = bytes?;
        let size = format!("{:>SIZE_COLUMNS$}", text::size(bytes));
        Some([format!("  {what}"), size, memory.verdict(bytes).to_owned()])
    });
    out.write_str(&screen.whole_table(rows.collect()))
}

fn tree(report: &Report, screen: &Screen, out: &mut String) -> std::fmt::Result {
    let tree = &report.tree;
    writeln!(out, "\n{}", screen.heading("the mounted tree"))?;
    let shows = |name| tree.show.split(',').any(|shown| shown == name);
    let shown = |name, files| if shows(name) { files } else { 0 };
    let base = shown("base", report.components.len());
    let experts = shown("experts", report.experts.files);
    let joined = usize::from(shows("joined"));
    let documents = tree.files - base - experts - joined - tree.hf_files;
    let mut text = format!(
        "  {}, {}\n  {}, {}, {}\n",
        text::counted(tree.files, "file"),
        text::size(tree.bytes),
        text::counted(experts, "expert"),
        text::counted(base, "base file"),
        text::counted(documents, "document"),
    );
    if tree.sharable_bytes > 0 {
        writeln!(
            text,
            "  materialized on XFS or btrfs it shares {}\n  with the model, and {} are copied",
            text::size(tree.sharable_bytes),
            text::size(tree.bytes - tree.sharable_bytes),
        )?;
    }
    match &report.hf.reason {
        None if tree.hf_files > 0 => writeln!(text, "  hf/: {} of them", tree.hf_files),
        None => writeln!(text, "  hf/: possible, with --show base,experts,hf"),
        Some(reason) => writeln!(text, "  hf/: not possible, since {reason}"),
    }?;
    out.write_str(&screen.fit(&text))
}
