//! How numbers and names look on a screen.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use indicatif::HumanCount;
use odmoe_fs::units::Size;
use unicode_width::UnicodeWidthStr;

/// `1.50 GiB`
pub fn size(bytes: u64) -> String {
    Size(bytes).to_string()
}

/// The bytes of `4096`, `512K`, `1M` or `2GiB`: units are powers of 1024.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &*text[digits.len()..].to_ascii_uppercase() {
        "" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// `23,040`
pub fn count(n: impl TryInto<u64>) -> String {
    HumanCount(n.try_into().unwrap_or(u64::MAX)).to_string()
}

/// `1 file`, `2 files`
pub fn counted(n: usize, noun: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", count(n as u64))
}

/// A name from a model, which may hold anything, made safe for a terminal: nothing in it moves the
/// cursor, turns the direction of writing, or is invisible.
pub fn name(name: &str) -> String {
    let is_seen = |c: char| c.escape_debug().len() == 1 || "\"'\\".contains(c);
    if !name.chars().all(is_seen) {
        name.escape_debug().to_string()
    } else {
        name.to_owned()
    }
}

/// A path, made safe for a terminal.
pub fn path(path: &Path) -> String {
    name(&path.to_string_lossy())
}

/// Whether the user wants colours (https://no-color.org) and the terminal has them.
pub fn may_be_coloured() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty()) && !is_dumb()
}

/// Whether a terminal only prints line after line: without colours or a cursor that moves.
pub fn is_dumb() -> bool {
    std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb")
}

/// Columns as wide as what is in them, those of numbers to the right, the last one open. The first
/// row may be a head.
pub fn table<const N: usize>(rows: Vec<[String; N]>) -> String {
    let widths = widths(&rows);
    let is_number = |cell: &str| cell.starts_with(|c: char| c.is_ascii_digit());
    let are_numbers: [bool; N] =
        std::array::from_fn(|n| rows.iter().skip(1).all(|row| is_number(&row[n])));
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).zip(are_numbers).enumerate();
        let cells: Vec<String> = cells
            .map(
                |(n, ((cell, width), is_number))| match is_number && n + 1 < N {
                    true => right(cell, width),
                    false => left(cell, width),
                },
            )
            .collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// How wide each column is on a terminal.
pub fn widths<const N: usize>(rows: &[[String; N]]) -> [usize; N] {
    std::array::from_fn(|n| rows.iter().map(|row| row[n].width()).max().unwrap_or(0))
}

/// Text at the left of so many columns.
pub fn left(text: &str, columns: usize) -> String {
    text.to_owned() + &" ".repeat(columns.saturating_sub(text.width()))
}

/// Text at the right of so many columns.
pub fn right(text: &str, columns: usize) -> String {
    " ".repeat(columns.saturating_sub(text.width())) + text
}

/// A path, quoted for a shell if need be.
pub fn shell(path: &Path) -> String {
    let text = self::path(path);
    if path.to_str() != Some(&*text) {
        // Bytes that a terminal must not get, in the quotes that shells undo.
        let escaped = path.as_os_str().as_bytes().iter().map(|byte| match byte {
            b'\'' | b'\\' => format!("\\{}", char::from(*byte)),
            b' '..=b'~' => char::from(*byte).into(),
            _ => format!("\\{byte:03o}"),
        });
        return format!("$'{}'", escaped.collect::<String>());
    }
    let plain = |c: char| c.is_alphanumeric() || "/._-+@%,:=".contains(c);
    if text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// `0, 3-60` for sorted numbers.
pub fn ranges(numbers: &[u32]) -> String {
    numbers
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| match run {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_numbers_are_folded() {
        assert_eq!(ranges(&[0, 3, 4, 5, 9]), "0, 3-5, 9");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn sizes_are_read_with_and_without_units() {
        let sizes = ["4096", "512K", "1m", "2GiB", "128kib"].map(parse_size);
        let bytes = [4096, 512 << 10, 1 << 20, 2 << 30, 128 << 10];
        assert_eq!(sizes, bytes.map(Some));
        for text in [
            "",
            "K",
            "1.5M",
            "-1",
            "1KB",
            "1iB",
            "1KIBIB",
            "1 M",
            "99999999999G",
        ] {
            assert_eq!(parse_size(text), None, "{text:?}");
        }
    }

    #[test]
    fn names_cannot_move_the_cursor() {
        assert_eq!(name("blk.0.模型"), "blk.0.模型");
        assert_eq!(name("a\u{1b}[2J\n"), "a\\u{1b}[2J\\n");
        assert_eq!(name("a\u{202e}\u{2028}"), "a\\u{202e}\\u{2028}");
        assert_eq!(name("it's \"so\""), "it's \"so\"");
    }
}
