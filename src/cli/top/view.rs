//! The live view: the counters of a mount, drawn again for each sample.

use std::path::Path;
use std::time::{Duration, Instant};

use odmoe_fs::stats::{Snapshot, Use};
use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style};
use ratatui::text::{Line, Span};

use super::super::failure::Result;
use super::super::text;
use super::heat::{Grid, Heat, Measure};
use super::sample::Sample;
use super::terminal::LiveTerminal;
use super::{fetched, latencies};

/// From grey to red, in the 256 colours that most terminals have.
const COLOURS: [u8; 7] = [236, 58, 100, 142, 172, 202, 196];
/// Width of the layers' labels.
const LABEL_COLUMNS: u16 = 9;

struct View<'a> {
    root: &'a Path,
    sample: Sample,
    /// The sample before, and the seconds between the two.
    before: Option<(Sample, f64)>,
    measure: Measure,
    /// Show only what was counted between the last two samples.
    recent: bool,
    colours: bool,
}

/// Shows a mount until the user ends the view or the mount stops answering.
pub fn run(root: &Path, sample: Sample, measure: Measure, interval: Duration) -> Result<()> {
    let mut view = View {
        root,
        sample,
        before: None,
        measure,
        recent: false,
        colours: text::may_be_coloured(),
    };
    view.show(&mut LiveTerminal::take()?, interval)
}

impl View<'_> {
    fn show(&mut self, terminal: &mut LiveTerminal, interval: Duration) -> Result<()> {
        let mut next = Instant::now() + interval;
        loop {
            terminal.draw(|frame| self.draw(frame))?;
            if let Some(key) = terminal.key(next)? {
                if self.ends(key) {
                    return Ok(());
                }
                continue;
            }
            if Instant::now() < next {
                continue;
            }
            self.add(Sample::of(self.root)?);
            next = Instant::now() + interval;
        }
    }

    /// Takes a newer sample.
    fn add(&mut self, sample: Sample) {
        let seconds = sample.stats.seconds - self.sample.stats.seconds;
        let before = std::mem::replace(&mut self.sample, sample);
        // If another mount has taken the place of the one before, it counts from 0.
        self.before = (seconds > 0.0).then_some((before, seconds));
    }

    /// Obeys a key. `true` if it ends the view.
    fn ends(&mut self, key: KeyEvent) -> bool {
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('h') => self.measure = self.measure.next(),
            KeyCode::Char('r') => self.recent = !self.recent,
            _ => {}
        }
        false
    }

    fn draw(&self, frame: &mut Frame) {
        let areas = Layout::vertical([
            Constraint::Length(self.head().len() as u16),
            Constraint::Min(0),
            Constraint::Length(1),
        ]);
        let [head, map, foot] = areas.areas(frame.area());
        for (line, row) in self.head().into_iter().zip(head.rows()) {
            frame.render_widget(Line::from(line), row);
        }
        self.draw_map(frame, map);
        let keys = "q ends   h opens, reads or bytes   r all or only the last interval";
        frame.render_widget(Line::from(keys), foot);
    }

    fn head(&self) -> Vec<String> {
        let stats = &self.sample.stats;
        let before = self.before.as_ref();
        let rate = |of: fn(&Use) -> u64| {
            let of = |stats: &Snapshot| of(&stats.experts) + of(&stats.base);
            before.map_or(0.0, |(before, seconds)| {
                of(stats).saturating_sub(of(&before.stats)) as f64 / seconds
            })
        };
        let what = if self.recent {
            "in the last interval"
        } else {
            "since the mount"
        };
        let mut lines = vec![
            format!(
                "{} on {}",
                text::name(&stats.architecture),
                text::path(self.root)
            ),
            format!(
                "{} reads/s   {}/s   {} opens/s   {} errors",
                text::count(rate(|used| used.reads) as u64),
                text::size(rate(|used| used.bytes) as u64),
                text::count(rate(|used| used.opens) as u64),
                text::count(stats.errors)
            ),
            latencies(&stats.latency),
        ];
        lines.extend(stats.remote.as_ref().map(fetched));
        lines.push(format!(
            "{} of experts {what}, by layer",
            self.measure.name()
        ));
        lines
    }

    fn draw_map(&self, frame: &mut Frame, area: Rect) {
        let mut heat = Heat::of(&self.sample, self.measure);
        if self.recent {
            let before = self
                .before
                .as_ref()
                .map(|(before, _)| Heat::of(before, self.measure));
            heat = heat.since(&before.unwrap_or_default());
        }
        let columns = area.width.saturating_sub(LABEL_COLUMNS + 1);
        let lines = area.height.saturating_sub(1);
        if columns == 0 || lines == 0 {
            return;
        }
        let grid = Grid::of(&heat, lines.into(), columns.into());
        let mut rows = area.rows();
        for (row, place) in grid.rows.iter().zip(&mut rows) {
            let mut spans = vec![Span::raw(format!("{:>9} ", row.label()))];
            spans.extend(row.cells.iter().map(|cell| self.cell(&grid, *cell)));
            frame.render_widget(Line::from(spans), place);
        }
        if let Some(place) = rows.next() {
            let caption = format!("{:>9} {}", "", grid.caption(self.measure));
            frame.render_widget(Line::from(caption), place);
        }
    }

    fn cell(&self, grid: &Grid, cell: Option<u64>) -> Span<'static> {
        match cell.filter(|_| self.colours) {
            None => Span::raw(grid.shade(cell).to_string()),
            Some(value) => {
                let colour = COLOURS[grid.step(value, COLOURS.len() as u64 - 1) as usize];
                Span::styled("█", Style::new().fg(Color::Indexed(colour)))
            }
        }
    }
}
