//! The heat map as a picture for reports: one self-contained SVG file.

use std::fmt::Write as _;

use super::heat::{Grid, Heat, Measure};

/// If there are more, experts or layers share cells.
const MAX_COLUMNS: usize = 512;
const MAX_ROWS: usize = 256;
/// The width of the map in pixels, which the columns share, and the bounds of a column's width.
const MAP_WIDTH: usize = 1200;
const CELL_WIDTH: (usize, usize) = (2, 40);
const CELL_HEIGHT: usize = 14;
/// Room around the map for its labels.
const LEFT: usize = 70;
const TOP: usize = 70;
const BELOW: usize = 60;
const RIGHT: usize = 20;
/// Height of a label.
const LABEL_HEIGHT: usize = 14;
const STEPS: u64 = 10;

/// Draws a heat map.
pub fn draw(heat: &Heat, measure: Measure, title: &str, seconds: f64) -> String {
    let grid = Grid::of(heat, MAX_ROWS, MAX_COLUMNS);
    let columns = grid.experts.div_ceil(grid.experts_per_cell).max(1);
    let cell = (MAP_WIDTH / columns).clamp(CELL_WIDTH.0, CELL_WIDTH.1);
    let (map_width, map_height) = (cell * columns, CELL_HEIGHT * grid.rows.len());
    let width = (LEFT + map_width + RIGHT).max(500);
    let height = TOP + map_height + BELOW;
    let seconds = seconds as u64;
    let darkest = match grid.shared() {
        None => format!("of each expert in {seconds} s; the darkest is"),
        Some(shared) => format!("of experts in {seconds} s; the darkest cell ({shared}) is"),
    };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"26\" font-size=\"18\">{}</text>\n\
         <text x=\"{LEFT}\" y=\"46\">{} {darkest} {}</text>\n\
         <text x=\"{LEFT}\" y=\"64\">layer by row, {}</text>\n",
        escaped(title),
        measure.name(),
        escaped(&measure.text(grid.hottest)),
        grid.scale(),
    );
    // Writing to a String cannot fail.
    let _ = map(&mut out, &grid, cell, measure);
    let _ = legend(&mut out, TOP + map_height + 24);
    out + "</svg>\n"
}

fn map(out: &mut String, grid: &Grid, cell: usize, measure: Measure) -> std::fmt::Result {
    let every = LABEL_HEIGHT.div_ceil(CELL_HEIGHT);
    for (n, row) in grid.rows.iter().enumerate() {
        let y = TOP + n * CELL_HEIGHT;
        if n % every == 0 {
            writeln!(
                out,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                LEFT - 6,
                y + CELL_HEIGHT - 3,
                row.label()
            )?;
        }
        for (column, value) in row.cells.iter().enumerate() {
            let Some(value) = *value else { continue };
            writeln!(
                out,
                "<rect class=\"cell\" x=\"{}\" y=\"{y}\" width=\"{cell}\" height=\"{CELL_HEIGHT}\" fill=\"{}\"><title>{}: {}</title></rect>",
                LEFT + column * cell,
                colour(grid.step(value, STEPS)),
                grid.cell_in_words(row, column),
                escaped(&measure.text(value)),
            )?;
        }
    }
    Ok(())
}

fn legend(out: &mut String, y: usize) -> std::fmt::Result {
    writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">unused</text>",
        LEFT - 6,
        y + 11
    )?;
    for step in 0..=STEPS {
        let x = LEFT + step as usize * 20;
        let fill = colour(step);
        writeln!(
            out,
            "<rect x=\"{x}\" y=\"{y}\" width=\"20\" height=\"14\" fill=\"{fill}\" stroke=\"#ccc\"/>"
        )?;
    }
    let x = LEFT + (STEPS as usize + 1) * 20 + 6;
    writeln!(out, "<text x=\"{x}\" y=\"{}\">hottest</text>", y + 11)
}

/// From pale yellow over orange to dark red; unused is grey.
fn colour(step: u64) -> String {
    if step == 0 {
        return "#eeeeee".to_owned();
    }
    let share = step as f64 / STEPS as f64;
    let mix = |from: f64, to: f64| (from + (to - from) * share) as u8;
    format!(
        "#{:02x}{:02x}{:02x}",
        mix(255.0, 128.0),
        mix(235.0, 0.0),
        mix(170.0, 38.0)
    )
}

/// Text for XML; characters that XML does not allow are left out.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => out.push(c),
        }
    }
    out
}
