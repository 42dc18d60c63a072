//! Bars, tables and lines that fit a terminal: its width, its colours and its characters.
//!
//! A pipe gets the same text without bars, colours and cuts, so that there is only one to keep
//! true.

use std::io::{self, IsTerminal};

use ratatui::crossterm::style::{Color, Stylize};
use ratatui::crossterm::terminal;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::text;

/// Where a command prints to.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    /// `None` if it is not a terminal: then nothing is drawn, broken or cut.
    columns: Option<usize>,
    colours: bool,
    unicode: bool,
}

/// Where a terminal does not tell its width.
const USUAL_COLUMNS: usize = 80;
/// A narrower terminal breaks lines by itself.
const FEWEST_COLUMNS: usize = 20;
/// Where a row of a table continues.
const FOLD_INDENT: usize = 4;
/// Of a shorter name, nothing could be recognised.
const FEWEST_NAME_COLUMNS: usize = 12;

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
        let is_utf8 = locale.is_some_and(|l| l.contains("UTF-8") || l.contains("UTF8"));
        Self {
            columns,
            colours: columns.is_some() && text::may_be_coloured(),
            unicode: columns.is_none() || is_utf8 && !text::is_dumb(),
        }
    }

    /// Columns of the terminal, if it is one.
    pub fn columns(&self) -> Option<usize> {
        self.columns
    }

    /// Whether a line is too long.
    pub fn overflows(&self, line: &str) -> bool {
        self.columns.is_some_and(|columns| line.width() > columns)
    }

    /// A bar that takes its share of `width`, and blanks up to it.
    pub fn bar(&self, share: f64, width: usize, colour: Color) -> String {
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

    /// A line that stands above others.
    pub fn heading(&self, line: &str) -> String {
        let line = self.wrap(line, 0, 2);
        if !self.colours {
            return line;
        }
        let lines: Vec<String> = line.lines().map(|line| line.bold().to_string()).collect();
        lines.join("\n")
    }

    /// A name without its middle, if it needs more columns than the terminal has besides some that
    /// are reserved.
    pub fn cut(&self, name: &str, reserved: usize) -> String {
        let dots = if self.unicode { "…" } else { "..." };
        match self.columns {
            Some(columns) => cut(name, columns.saturating_sub(reserved), dots),
            None => name.to_owned(),
        }
    }

    /// Rows in aligned columns. Names in the last column lose their middle where a line would
    /// break; if there is no room even for that, rows continue on the next line.
    pub fn table<const N: usize>(&self, rows: Vec<[String; N]>) -> String {
        let Some(columns) = self.columns else {
            return text::table(rows);
        };
        let before: usize = text::widths(&rows)[..N - 1].iter().map(|w| w + 2).sum();
        let last = rows.iter().map(|row| row[N - 1].width()).max().unwrap_or(0);
        let is_folded = before + last.min(FEWEST_NAME_COLUMNS) > columns;
        let before = if is_folded { FOLD_INDENT } else { before };
        let mut rows = rows;
        for row in &mut rows {
            row[N - 1] = self.cut(&row[N - 1], before);
        }
        match is_folded {
            true => self.folded(&rows),
            false => text::table(rows),
        }
    }

    /// The same, but nothing is cut: for paths, which people copy from a screen.
    pub fn whole_table<const N: usize>(&self, rows: Vec<[String; N]>) -> String {
        let width = text::widths(&rows).iter().sum::<usize>() + 2 * (N - 1);
        match self.columns {
            Some(columns) if width > columns => self.folded(&rows),
            _ => text::table(rows),
        }
    }

    /// Each row on as many lines as its cells need.
    fn folded<const N: usize>(&self, rows: &[[String; N]]) -> String {
        let columns = self.columns.unwrap_or(usize::MAX);
        let mut out = String::new();
        for row in rows {
            let mut at = 0;
            for (n, cell) in row.iter().enumerate() {
                let cell = if n == 0 { cell.trim_end() } else { cell.trim() };
                if n > 0 && at + 2 + cell.width() > columns {
                    out += "\n";
                    out += &" ".repeat(FOLD_INDENT);
                    at = FOLD_INDENT;
                } else if n > 0 {
                    out += "  ";
                    at += 2;
                }
                out += cell;
                at += cell.width();
            }
            out += "\n";
        }
        out
    }

    /// Text whose long lines continue on further ones, indented by two more columns.
    pub fn fit(&self, text: &str) -> String {
        let lines = text.split_inclusive('\n').map(|line| {
            let (line, end) = match line.strip_suffix('\n') {
                Some(line) => (line, "\n"),
                None => (line, ""),
            };
            let indent = line.len() - line.trim_start_matches(' ').len();
            self.wrap(line, 0, indent + 2) + end
        });
        lines.collect()
    }

    /// A text to the right of a label, or below it if that leaves little room.
    pub fn beside(&self, label: &str, text: &str) -> String {
        const FEWEST_TEXT_COLUMNS: usize = 30;
        const INDENT: usize = 6;
        let start = label.width();
        match self.columns {
            Some(columns) if start + FEWEST_TEXT_COLUMNS.min(text.width()) > columns => {
                let text = self.wrap(text, INDENT, INDENT);
                format!("{}\n{}{text}", label.trim_end(), " ".repeat(INDENT))
            }
            _ => label.to_owned() + &self.wrap(text, start, start),
        }
    }

    /// A line that begins at a column and, if it is too long, continues on further ones at
    /// `indent`. Words are not broken.
    pub fn wrap(&self, line: &str, start: usize, indent: usize) -> String {
        let Some(columns) = self.columns.filter(|c| start + line.width() > *c) else {
            return line.to_owned();
        };
        let mut out = String::new();
        let mut at = start;
        // A run of blanks belongs to the word behind it.
        let mut rest = line;
        while !rest.is_empty() {
            let blanks = rest.len() - rest.trim_start_matches(' ').len();
            let end = rest[blanks..].find(' ').map_or(rest.len(), |n| blanks + n);
            let (word, after) = rest.split_at(end);
            let is_first = out.is_empty();
            if !is_first && at + word.width() > columns {
                out += "\n";
                out += &" ".repeat(indent);
                out += word.trim_start();
                at = indent + word.trim_start().width();
            } else {
                out += word;
                at += word.width();
            }
            rest = after;
        }
        out
    }

    /// Text in the characters of the terminal: our shades and dots become ASCII if need be.
    pub fn spell(&self, text: String) -> String {
        if self.unicode {
            return text;
        }
        let ascii = |c| match c {
            '·' => '.',
            '░' => '-',
            '▒' => '+',
            '▓' => '*',
            '█' => '#',
            'µ' => 'u',
            c => c,
        };
        text.chars().map(ascii).collect()
    }
}

/// A name of at most so many columns, without its middle if it is longer.
fn cut(name: &str, width: usize, dots: &str) -> String {
    let Some(kept) = width
        .checked_sub(dots.width())
        .filter(|_| name.width() > width)
    else {
        return name.to_owned();
    };
    let start = prefix(name.chars(), kept.div_ceil(2));
    // What combines with the character before it, stays with it.
    let end: String = prefix(name.chars().rev(), kept / 2).chars().rev().collect();
    let end = end.trim_start_matches(|c: char| c.width().unwrap_or(0) == 0);
    start + dots + end
}

/// The characters that fit so many columns.
fn prefix(chars: impl Iterator<Item = char>, width: usize) -> String {
    let mut left = width;
    chars
        .take_while(|c| {
            let fits = c.width().unwrap_or(0) <= left;
            left -= if fits { c.width().unwrap_or(0) } else { 0 };
            fits
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(columns: usize, unicode: bool) -> Screen {
        Screen {
            columns: Some(columns),
            colours: false,
            unicode,
        }
    }

    #[test]
    fn long_names_lose_their_middle() {
        assert_eq!(cut("blk.10.ffn_gate_exps.weight", 11, "…"), "blk.1…eight");
        assert_eq!(cut("short", 11, "…"), "short");
    }

    #[test]
    fn wide_characters_take_two_columns_and_combining_marks_none() {
        assert_eq!(cut("模型模型模型", 7, "…"), "模…型");
        assert_eq!(cut("模型模型模型", 12, "…"), "模型模型模型");
        assert_eq!(
            cut("e\u{301}e\u{301}e\u{301}e\u{301}", 3, "…"),
            "e\u{301}…e\u{301}"
        );
        for width in 1..20 {
            for name in [
                "模型模型-a-very-long-name-模型",
                "e\u{301}\u{302}abc模e\u{301}xyz模型模型",
            ] {
                assert!(cut(name, width, "…").width() <= width, "{name} {width}");
            }
        }
    }

    #[test]
    fn bars_are_as_long_as_their_share_and_never_vanish() {
        let screen = |unicode| screen(80, unicode);
        assert_eq!(screen(true).bar(0.5, 10, Color::Cyan), "█████     ");
        assert_eq!(screen(true).bar(0.0001, 4, Color::Cyan), "▏   ");
        assert_eq!(screen(false).bar(0.0001, 4, Color::Cyan), "#   ");
        assert_eq!(screen(true).bar(0.0, 4, Color::Cyan), "    ");
        assert_eq!(screen(true).bar(1.0, 4, Color::Cyan), "████");
    }

    #[test]
    fn lines_break_between_words_and_go_on_further_in() {
        let narrow = screen(20, true);
        assert_eq!(narrow.fit("short\n"), "short\n");
        assert_eq!(
            narrow.fit("  one two three four five\nsix"),
            "  one two three four\n    five\nsix"
        );
        assert_eq!(narrow.wrap("aaa bbbb", 14, 6), "aaa\n      bbbb");
        assert_eq!(
            narrow.fit("模型模型模 型模型模型\n"),
            "模型模型模\n  型模型模型\n"
        );
        // There is no place to break.
        let word = "a-word-that-is-longer-than-that";
        assert_eq!(narrow.fit(word), word);
    }

    #[test]
    fn a_text_stands_beside_its_label_or_below_it() {
        let label = "note  a long name  ";
        let text = "one two three four five six seven";
        assert_eq!(
            screen(50, true).beside(label, text),
            format!(
                "{label}one two three four five six\n{}seven",
                " ".repeat(19)
            )
        );
        assert_eq!(
            screen(40, true).beside(label, text),
            "note  a long name\n      one two three four five six seven"
        );
        assert_eq!(
            screen(40, true).beside(label, "short"),
            "note  a long name  short"
        );
    }

    #[test]
    fn tables_are_cut_or_folded_so_that_they_fit() {
        let rows = || {
            vec![
                ["bytes", "shape", "name"].map(str::to_owned),
                ["1.5 GiB", "[4,5]", "blk.0.ffn_gate_exps.weight"].map(str::to_owned),
                ["900 KiB", "[512,2048]", "模型模型模型模型模型"].map(str::to_owned),
            ]
        };
        assert_eq!(
            screen(34, true).table(rows()),
            "  bytes  shape       name\n\
             1.5 GiB  [4,5]       blk.0.…weight\n\
             900 KiB  [512,2048]  模型模…型模型\n"
        );
        assert_eq!(
            screen(30, true).table(rows()),
            "bytes  shape  name\n\
             1.5 GiB  [4,5]\n    blk.0.ffn_gate_exps.weight\n\
             900 KiB  [512,2048]\n    模型模型模型模型模型\n"
        );
        for columns in [30, 34, 40, 60] {
            let table = screen(columns, true).table(rows());
            assert!(table.lines().all(|line| line.width() <= columns), "{table}");
        }
        assert!(screen(40, true).whole_table(rows()).contains("_gate_exps"));
    }

    #[test]
    fn shades_have_a_spelling_in_ascii() {
        let text = "·░▒▓█ 5 µs".to_owned();
        assert_eq!(screen(80, true).spell(text.clone()), text);
        assert_eq!(screen(80, false).spell(text), ".-+*# 5 us");
    }
}
