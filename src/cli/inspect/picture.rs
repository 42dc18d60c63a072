//! A model as a picture: bars as long as what they stand for, in the width of the terminal.
//!
//! The same goes into a pipe without bars and colours, so that there is one text to keep true.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::path::Path;

use odmoe_fs::inspect::{Amount, LayerReport, MATRICES, Report};
use ratatui::crossterm::style::{Color, Stylize};
use ratatui::crossterm::terminal;

use super::super::text;

/// What is written to.
pub struct Screen {
    /// `None` if nobody looks: then nothing is drawn, and nothing cut.
    columns: Option<usize>,
    colours: bool,
    unicode: bool,
}

/// Where a terminal does not tell its width.
const USUAL_COLUMNS: usize = 80;
/// Below that, lines break.
const FEWEST_COLUMNS: usize = 60;

impl Screen {
    pub fn of_stdout() -> Self {
        let columns = io::stdout().is_terminal().then(|| {
            let size = terminal::size().map_or(0, |(columns, _)| usize::from(columns));
            let size = if size == 0 { USUAL_COLUMNS } else { size };
            size.max(FEWEST_COLUMNS)
        });
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .filter_map(std::env::var_os)
            .find(|value| !value.is_empty());
        let locale = locale.map(|locale| locale.to_string_lossy().to_uppercase());
        Self {
            colours: columns.is_some() && text::may_be_coloured(),
            unicode: locale.is_some_and(|l| l.contains("UTF-8") || l.contains("UTF8")),
            columns,
        }
    }

    /// A bar that takes its share of `width`, and blanks up to it.
    fn bar(&self, share: f64, width: usize, colour: Color) -> String {
        let cells = share.clamp(0.0, 1.0) * width as f64;
        let (mut bar, full) = if self.unicode {
            const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
            let eighths = ((cells * 8.0).round() as usize).max(usize::from(share > 0.0));
            let bar = "█".repeat(eighths / 8) + EIGHTHS[eighths % 8];
            (bar, eighths.div_ceil(8))
        } else {
            let full = (cells.round() as usize).max(usize::from(share > 0.0));
            ("#".repeat(full), full)
        };
        let blanks = " ".repeat(width.saturating_sub(full));
        if self.colours {
            bar = bar.with(colour).to_string();
        }
        bar + &blanks
    }

    /// Bytes for a person, or for a program.
    pub fn bytes(&self, bytes: u64) -> String {
        match self.columns {
            Some(_) => text::size(bytes),
            None => bytes.to_string(),
        }
    }

    /// Columns as wide as what is in them, numbers to the right, and the last one cut in the middle where the line would
    /// break.
    pub fn table<const N: usize>(&self, mut rows: Vec<[String; N]>) -> String {
        for column in 0..N - 1 {
            let is_number =
                |row: &[String; N]| row[column].starts_with(|c: char| c.is_ascii_digit());
            if rows[1..].iter().all(is_number) {
                let width = rows.iter().map(|row| row[column].chars().count()).max();
                let width = width.unwrap_or(0);
                rows.iter_mut()
                    .for_each(|row| row[column] = format!("{:>width$}", row[column]));
            }
        }
        if let Some(columns) = self.columns {
            let widest = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
            let before: usize = (0..N - 1)
                .map(|column| widest(column).unwrap_or(0) + 2)
                .sum();
            let left = columns.saturating_sub(before).max(12);
            let dots = if self.unicode { "…" } else { "..." };
            for row in &mut rows {
                row[N - 1] = cut(&row[N - 1], left, dots);
            }
        }
        text::table(rows)
    }

    fn heading(&self, text: &str) -> String {
        if self.colours {
            text.bold().to_string()
        } else {
            text.to_owned()
        }
    }
}

/// A name of at most so many characters, without its middle if it is longer.
fn cut(name: &str, width: usize, dots: &str) -> String {
    let length = name.chars().count();
    let Some(kept) = width
        .checked_sub(dots.chars().count())
        .filter(|_| length > width)
    else {
        return name.to_owned();
    };
    let (start, end) = (kept.div_ceil(2), kept / 2);
    let start: String = name.chars().take(start).collect();
    let end: String = name.chars().skip(length - end).collect();
    start + dots + &end
}

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
        screen.heading(&text::name(&file_name.to_string_lossy()))
    )?;
    writeln!(
        out,
        "{}, GGUF v{}, {} in {}, {}",
        text::name(report.architecture.unwrap_or("unknown architecture")),
        report.gguf_version,
        text::size(report.bytes),
        text::counted(report.parts.len(), "part"),
        text::counted(report.tensor_count, "tensor"),
    )?;
    if report.parts.len() > 1 {
        let sizes = report.parts.iter().map(|part| part.bytes);
        let (least, most) = (sizes.clone().min().unwrap_or(0), sizes.max().unwrap_or(0));
        writeln!(
            out,
            "parts of {} to {}",
            text::size(least),
            text::size(most)
        )?;
    }
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
    let widest = |text: fn(&Bar) -> &str| bars.iter().map(|b| text(b).chars().count()).max();
    let label = widest(|bar| &bar.label).unwrap_or(0);
    let remark = widest(|bar| &bar.remark).unwrap_or(0);
    let others = 2 + label + 2 + SIZE_COLUMNS + 2 + remark + 2;
    let room = screen
        .columns
        .and_then(|columns| columns.checked_sub(others));
    for bar in bars {
        let drawn = match room.filter(|room| *room >= 5) {
            Some(room) => {
                let share = bar.bytes as f64 / largest.max(1) as f64;
                screen.bar(share, room.min(MOST_BAR_COLUMNS), colour) + "  "
            }
            None => String::new(),
        };
        let size = text::size(bar.bytes);
        let line = |remark: &str| {
            format!(
                "  {:label$}  {drawn}{size:>SIZE_COLUMNS$}  {remark}",
                bar.label
            )
        };
        // Where there is no room, the second half of a remark gives way.
        let is_too_long = |line: &str| {
            screen
                .columns
                .is_some_and(|most| line.chars().count() > most)
        };
        let line = match bar.remark.split_once(',') {
            Some((half, _)) if drawn.is_empty() && is_too_long(&line(&bar.remark)) => line(half),
            _ => line(&bar.remark),
        };
        writeln!(out, "{}", line.trim_end())?;
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
    writeln!(
        out,
        "  {} in {} ({}), {per_layer} per layer\n  {} each on average",
        text::count(experts.files as u64),
        text::counted(numbers.len(), "layer"),
        text::ranges(&numbers),
        text::size(experts.bytes / experts.files as u64),
    )?;
    for incomplete in &experts.incomplete {
        let word = |name: &&str| {
            MATRICES
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, word)| *word)
        };
        let missing: Vec<_> = incomplete.missing.iter().filter_map(word).collect();
        writeln!(
            out,
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
            out,
            "  {used} per layer for a token: {},\n  with the base {}",
            text::size(bytes),
            text::size(all)
        ),
        _ => writeln!(
            out,
            "  the model does not say how many of them a token uses"
        ),
    }
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
    let needs = [
        ("base", Some(report.active.base_bytes)),
        ("base and the experts of a token", report.active.bytes),
        ("whole model", Some(report.bytes)),
    ];
    for (what, bytes) in needs {
        let Some(bytes) = bytes else { continue };
        let verdict = match bytes {
            bytes if bytes <= memory.available => "fits",
            bytes if bytes <= memory.total => "fits if others make room",
            _ => "does not fit",
        };
        writeln!(
            out,
            "  {what:<31}  {:>SIZE_COLUMNS$}  {verdict}",
            text::size(bytes)
        )?;
    }
    Ok(())
}

fn tree(report: &Report, screen: &Screen, out: &mut String) -> std::fmt::Result {
    let tree = &report.tree;
    writeln!(out, "\n{}", screen.heading("the mounted tree"))?;
    let base = report.components.len();
    let documents = tree.files - base - report.experts.files;
    writeln!(
        out,
        "  {}, {}\n  {}, {}, {}",
        text::counted(tree.files, "file"),
        text::size(tree.bytes),
        text::counted(report.experts.files, "expert"),
        text::counted(base, "base file"),
        text::counted(documents, "document"),
    )?;
    writeln!(
        out,
        "  materialized on XFS or btrfs it shares {}\n  with the model, and {} are copied",
        text::size(tree.sharable_bytes),
        text::size(tree.incongruent_bytes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_lose_their_middle() {
        assert_eq!(cut("blk.10.ffn_gate_exps.weight", 11, "…"), "blk.1…eight");
        assert_eq!(cut("short", 11, "…"), "short");
        assert_eq!(cut("模型模型模型", 3, "…"), "模…型");
    }

    #[test]
    fn bars_are_as_long_as_their_share_and_never_vanish() {
        let screen = |unicode| Screen {
            columns: Some(80),
            colours: false,
            unicode,
        };
        assert_eq!(screen(true).bar(0.5, 10, Color::Cyan), "█████     ");
        assert_eq!(screen(true).bar(0.0001, 4, Color::Cyan), "▏   ");
        assert_eq!(screen(false).bar(0.0001, 4, Color::Cyan), "#   ");
        assert_eq!(screen(true).bar(0.0, 4, Color::Cyan), "    ");
        assert_eq!(screen(true).bar(1.0, 4, Color::Cyan), "████");
    }
}
