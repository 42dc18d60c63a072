//! Experts as a map: a row for each layer, a column for each expert number. If there are more than
//! fit, neighbours share a cell, which shows their sum.

use std::collections::HashMap;

use odmoe_fs::stats::Span;

use super::super::text;
use super::sample::Sample;

/// What makes an expert hot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Measure {
    /// How often its file was opened
    #[default]
    Opens,
    /// How many requests to read it came
    Reads,
    /// How many bytes of it were read
    Bytes,
}

impl Measure {
    pub fn name(self) -> &'static str {
        match self {
            Self::Opens => "opens",
            Self::Reads => "reads",
            Self::Bytes => "bytes",
        }
    }

    pub fn next(self) -> Self {
        match self {
            Self::Opens => Self::Reads,
            Self::Reads => Self::Bytes,
            Self::Bytes => Self::Opens,
        }
    }

    pub fn text(self, value: u64) -> String {
        match self {
            Self::Opens => text::counted(value as usize, "open"),
            Self::Reads => text::counted(value as usize, "read"),
            Self::Bytes => text::size(value),
        }
    }
}

/// How hot each expert is.
#[derive(Debug, Clone, Default)]
pub struct Heat {
    /// The layers that have experts, and the numbers of these.
    layers: Vec<(u32, Vec<Span>)>,
    /// By layer and expert; unused experts are left out.
    values: HashMap<(u32, u32), u64>,
}

impl Heat {
    pub fn of(sample: &Sample, measure: Measure) -> Self {
        let experts = sample.heat.iter().flat_map(|layer| {
            layer.experts.iter().map(|&(expert, opens, reads, bytes)| {
                let value = match measure {
                    Measure::Opens => opens,
                    Measure::Reads => reads,
                    Measure::Bytes => bytes,
                };
                ((layer.layer, expert), value)
            })
        });
        Self {
            layers: numbers(sample),
            values: experts.filter(|(_, value)| *value > 0).collect(),
        }
    }

    /// What was counted since an earlier sample.
    pub fn since(&self, earlier: &Self) -> Self {
        let grown = |(key, value): (&(u32, u32), &u64)| {
            let before = earlier.values.get(key).copied().unwrap_or(0);
            Some((*key, value.checked_sub(before).filter(|grown| *grown > 0)?))
        };
        Self {
            layers: self.layers.clone(),
            values: self.values.iter().filter_map(grown).collect(),
        }
    }

    pub fn hottest(&self) -> u64 {
        self.values.values().copied().max().unwrap_or(0)
    }

    /// The hottest experts: layer, number, heat.
    pub fn top(&self, n: usize) -> Vec<(u32, u32, u64)> {
        let mut all: Vec<_> = self
            .values
            .iter()
            .map(|(&(l, e), &value)| (l, e, value))
            .collect();
        all.sort_by_key(|&(layer, expert, value)| (std::cmp::Reverse(value), layer, expert));
        all.truncate(n);
        all
    }
}

/// The numbers of each layer's experts. A mount may not list all of them; used experts are added in
/// any case.
fn numbers(sample: &Sample) -> Vec<(u32, Vec<Span>)> {
    let stats = &sample.stats;
    let listed: HashMap<_, _> = stats.numbers.iter().map(|(l, runs)| (*l, runs)).collect();
    let used: HashMap<_, _> = sample.heat.iter().map(|l| (l.layer, &l.experts)).collect();
    let layers = stats.layers.iter().map(|&(layer, count)| {
        let mut runs = match listed.get(&layer) {
            Some(runs) => (*runs).clone(),
            None => vec![(0, count.saturating_sub(1))],
        };
        let used = used.get(&layer).into_iter().copied().flatten();
        let unlisted: Vec<Span> = used
            .map(|&(expert, ..)| expert)
            .filter(|expert| {
                let run = runs.get(runs.partition_point(|run| run.1 < *expert));
                run.is_none_or(|run| *expert < run.0)
            })
            .map(|expert| (expert, expert))
            .collect();
        runs.extend(unlisted);
        (layer, runs)
    });
    layers.collect()
}

/// A map that fits.
pub struct Grid {
    pub rows: Vec<Row>,
    /// The numbers of experts that share a column.
    pub experts_per_cell: usize,
    /// The layers that share a row.
    pub layers_per_row: usize,
    /// The sum of the hottest cell.
    pub hottest: u64,
    /// One more than the highest number of an expert.
    pub experts: usize,
}

/// One layer, or some that share a row.
pub struct Row {
    pub first: u32,
    pub last: u32,
    /// The sum of what is in a cell; `None` where there are no experts.
    pub cells: Vec<Option<u64>>,
}

/// `3`, or `3-7`
fn numbers_in_words(first: usize, last: usize) -> String {
    if first == last {
        first.to_string()
    } else {
        format!("{first}-{last}")
    }
}

impl Row {
    pub fn label(&self) -> String {
        numbers_in_words(self.first as usize, self.last as usize)
    }
}

impl Grid {
    pub fn of(heat: &Heat, max_rows: usize, max_columns: usize) -> Self {
        let highest = heat.layers.iter().flat_map(|layer| &layer.1);
        let experts = highest.map(|run| run.1 as usize + 1).max().unwrap_or(0);
        let experts_per_cell = experts.div_ceil(max_columns.max(1)).max(1);
        let layers_per_row = heat.layers.len().div_ceil(max_rows.max(1)).max(1);
        let rows: Vec<Row> = heat
            .layers
            .chunks(layers_per_row)
            .map(|layers| Row {
                first: layers[0].0,
                last: layers[layers.len() - 1].0,
                cells: cells(heat, layers, experts, experts_per_cell),
            })
            .collect();
        let hottest = rows
            .iter()
            .flat_map(|row| &row.cells)
            .flatten()
            .copied()
            .max();
        Self {
            rows,
            experts_per_cell,
            layers_per_row,
            hottest: hottest.unwrap_or(0),
            experts,
        }
    }

    /// How hot a cell is, in `steps`; 0 is unused. By the square root, so that lukewarm cells show.
    pub fn step(&self, value: u64, steps: u64) -> u64 {
        if value == 0 || self.hottest == 0 {
            return 0;
        }
        let share = (value as f64 / self.hottest as f64).sqrt();
        ((share * steps as f64).ceil() as u64).clamp(1, steps)
    }

    /// A cell as a character.
    pub fn shade(&self, cell: Option<u64>) -> char {
        const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];
        match cell {
            None => ' ',
            Some(value) => SHADES[self.step(value, 4) as usize],
        }
    }

    /// What the columns are.
    pub fn scale(&self) -> String {
        let last = self.experts.saturating_sub(1);
        match self.experts_per_cell {
            1 => format!("experts 0 to {last}"),
            n => format!("experts 0 to {last}, {n} in each column"),
        }
    }

    /// What the columns are, and how hot the hottest cell is, in one line of a terminal.
    pub fn caption(&self, measure: Measure) -> String {
        let last = self.experts.saturating_sub(1);
        let hottest = measure.text(self.hottest);
        match self.shared() {
            None => format!("experts 0 to {last}; the hottest has {hottest}"),
            Some(shared) => format!("experts 0 to {last}; hottest cell ({shared}): {hottest}"),
        }
    }

    /// What a cell holds unless that is one expert: `6 experts of 4 layers`.
    pub fn shared(&self) -> Option<String> {
        match (self.experts_per_cell, self.layers_per_row) {
            (1, 1) => None,
            (1, layers) => Some(format!("{layers} layers")),
            (experts, 1) => Some(format!("{experts} experts")),
            (experts, layers) => Some(format!("{experts} experts of {layers} layers")),
        }
    }

    /// Which layers and experts a cell holds: `layer 3, expert 17`.
    pub fn cell_in_words(&self, row: &Row, column: usize) -> String {
        let noun = |noun: &str, is_one| format!("{noun}{}", if is_one { "" } else { "s" });
        let first = column * self.experts_per_cell;
        let last = (first + self.experts_per_cell).min(self.experts) - 1;
        format!(
            "{} {}, {} {}",
            noun("layer", row.first == row.last),
            row.label(),
            noun("expert", first == last),
            numbers_in_words(first, last)
        )
    }
}

fn cells(
    heat: &Heat,
    layers: &[(u32, Vec<Span>)],
    experts: usize,
    per_cell: usize,
) -> Vec<Option<u64>> {
    let columns = experts.div_ceil(per_cell);
    let mut cells = vec![None; columns];
    for (layer, runs) in layers {
        for expert in runs.iter().flat_map(|run| run.0..=run.1) {
            let cell = &mut cells[expert as usize / per_cell];
            let value = heat.values.get(&(*layer, expert)).copied().unwrap_or(0);
            *cell = Some(cell.unwrap_or(0) + value);
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use odmoe_fs::stats::Snapshot;

    use super::super::sample::LayerHeat;
    use super::*;

    fn heat() -> Heat {
        Heat {
            layers: vec![(1, vec![(0, 7)]), (2, vec![(0, 7)]), (3, vec![(0, 3)])],
            values: [((1, 0), 100), ((2, 7), 1), ((3, 3), 25)].into(),
        }
    }

    #[test]
    fn nothing_is_lost_when_experts_and_layers_share_cells() {
        for (rows, columns) in [(9, 9), (3, 8), (2, 3), (1, 1)] {
            let grid = Grid::of(&heat(), rows, columns);
            assert!(grid.rows.len() <= rows && grid.rows[0].cells.len() <= columns);
            let sum: u64 = grid.rows.iter().flat_map(|row| &row.cells).flatten().sum();
            assert_eq!(sum, 126);
        }
        let grid = Grid::of(&heat(), 2, 4);
        assert_eq!(grid.rows[0].label(), "1-2");
        assert_eq!(grid.rows[1].cells, [Some(0), Some(25), None, None]);
    }

    #[test]
    fn a_cell_that_is_shared_is_not_called_an_expert() {
        let caption = |rows, columns| Grid::of(&heat(), rows, columns).caption(Measure::Opens);
        let own = "experts 0 to 7; the hottest has 100 opens";
        assert_eq!(caption(3, 8), own);
        assert_eq!(caption(30, 80), own);
        for (rows, columns, cell) in [
            (3, 3, "3 experts"),
            (2, 8, "2 layers"),
            (2, 4, "2 experts of 2 layers"),
            (1, 1, "8 experts of 3 layers"),
        ] {
            let hottest = if columns == 1 { 126 } else { 100 };
            let shared = format!("experts 0 to 7; hottest cell ({cell}): {hottest} opens");
            assert_eq!(caption(rows, columns), shared);
        }
        let grid = Grid::of(&heat(), 2, 3);
        assert_eq!(
            grid.cell_in_words(&grid.rows[0], 1),
            "layers 1-2, experts 3-5"
        );
        assert_eq!(grid.cell_in_words(&grid.rows[1], 2), "layer 3, experts 6-7");
        let grid = Grid::of(&heat(), 3, 7);
        assert_eq!(grid.cell_in_words(&grid.rows[0], 3), "layer 1, experts 6-7");
        let grid = Grid::of(&heat(), 3, 8);
        assert_eq!(grid.cell_in_words(&grid.rows[1], 7), "layer 2, expert 7");
    }

    /// What a mount with one layer says.
    fn sample(count: u32, numbers: &[Span], used: &[u32]) -> Sample {
        let stats = serde_json::json!({
            "architecture": "x", "seconds": 1.0, "requests": {}, "errors": 0,
            "latency": {"p50_us": 0, "p90_us": 0, "p99_us": 0, "max_us": 0},
            "base": {"opens": 0, "reads": 0, "bytes": 0},
            "experts": {"opens": 0, "reads": 0, "bytes": 0},
            "layers": [[0, count]], "layers_cut": false, "numbers": [[0, numbers]],
        });
        let mut stats: Snapshot = serde_json::from_value(stats).unwrap();
        stats.numbers.retain(|(_, numbers)| !numbers.is_empty());
        let experts = used.iter().map(|&expert| (expert, 7, 0, 0)).collect();
        let heat = vec![LayerHeat { layer: 0, experts }];
        Sample { stats, heat }
    }

    #[test]
    fn experts_are_shown_at_their_numbers_and_gaps_are_empty() {
        let sparse = [(0, 0), (2, 2), (4, 4)];
        // The last says nothing of its numbers, as a mount with very many gaps does.
        for (numbers, used, cells) in [
            (&sparse[..], &[4][..], "· · █"),
            (&sparse, &[0, 2], "█ █ ·"),
            (&[(3, 5)], &[5], "   ··█"),
            (&[], &[], "···"),
            (&[], &[4], "··· █"),
        ] {
            let heat = Heat::of(&sample(3, numbers, used), Measure::Opens);
            let grid = Grid::of(&heat, 9, 9);
            let shown: String = grid.rows[0].cells.iter().map(|c| grid.shade(*c)).collect();
            assert_eq!(shown, cells, "{numbers:?} {used:?}");
            let last = cells.chars().count() - 1;
            assert_eq!(grid.scale(), format!("experts 0 to {last}"));
            let sum: u64 = grid.rows[0].cells.iter().flatten().sum();
            assert_eq!(sum, 7 * used.len() as u64);
        }
    }

    #[test]
    fn numbers_far_apart_share_cells() {
        let numbers = [(0, 0), (1_000_000, 1_000_000), (u32::MAX, u32::MAX)];
        let heat = Heat::of(&sample(3, &numbers, &[0, u32::MAX]), Measure::Opens);
        let grid = Grid::of(&heat, 1, 10);
        let cells = &grid.rows[0].cells;
        assert_eq!((cells.len(), cells[0], cells[9]), (10, Some(7), Some(7)));
        assert_eq!(cells[1..9], [None; 8]);
    }

    #[test]
    fn the_hottest_is_black_and_only_the_unused_is_empty() {
        let grid = Grid::of(&heat(), 3, 8);
        let shades: String = grid.rows[0].cells.iter().map(|c| grid.shade(*c)).collect();
        assert_eq!(shades, "█·······");
        assert_eq!(grid.shade(Some(1)), '░');
        assert_eq!(grid.shade(None), ' ');
    }

    #[test]
    fn what_was_added_is_the_difference() {
        let mut earlier = heat();
        earlier.values.insert((1, 0), 60);
        earlier.values.remove(&(2, 7));
        assert_eq!(heat().since(&earlier).top(5), [(1, 0, 40), (2, 7, 1)]);
        assert_eq!(heat().since(&heat()).hottest(), 0);
    }
}
