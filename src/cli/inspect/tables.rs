//! Tensors as tables, cut to the width of a terminal and whole in a pipe.

use std::path::Path;

use odmoe_fs::inspect::{ArrayReport, ExpertReport, TensorReport};

use super::super::screen::Screen;
use super::super::text;

/// All tensors: on a terminal in human units and cut names, else in bytes.
pub fn tensors(tensors: &[TensorReport], screen: &Screen) -> String {
    let head = ["bytes", "offset", "part", "type", "shape", "name"].map(str::to_owned);
    let rows = tensors.iter().map(|tensor| {
        [
            screen.bytes(tensor.bytes),
            tensor.offset.to_string(),
            tensor.part.to_string(),
            tensor.ggml_type.to_owned(),
            shape(&tensor.shape),
            text::name(tensor.name),
        ]
    });
    screen.table(std::iter::once(head).chain(rows).collect())
}

fn shape(dims: &[u64]) -> String {
    format!("{dims:?}").replace(", ", ",")
}

/// Where one expert lies.
pub fn expert(report: &ExpertReport, screen: &Screen) -> String {
    let head = ["tensor", "type", "shape", "bytes", "offset", "part"].map(str::to_owned);
    let arrays: Vec<_> = report.tensors.iter().flat_map(|t| &t.arrays).collect();
    let rows = report.tensors.iter().map(|tensor| {
        let part = Path::new(&tensor.part_path);
        let part = part.file_name().unwrap_or_default().to_string_lossy();
        [
            text::name(tensor.name),
            tensor.ggml_type.to_owned(),
            shape(&tensor.shape),
            text::count(tensor.bytes),
            text::count(tensor.offset),
            text::name(&part),
        ]
    });
    let names: Vec<_> = report
        .tensors
        .iter()
        .map(|t| text::name(t.gguf_name))
        .collect();
    let title = format!(
        "{}: {} bytes, of which {} are its header\n",
        report.path,
        text::count(report.bytes),
        text::count(report.header_bytes),
    );
    let table = screen.table(std::iter::once(head).chain(rows).collect());
    let sources = format!("from {}\n", names.join(", "));
    let shown = match arrays.is_empty() {
        true => String::new(),
        false => format!("\nas {}:\n{}", report.form, self::arrays(&arrays, screen)),
    };
    screen.fit(&title) + &table + &screen.fit(&sources) + &shown
}

/// The arrays of a file.
fn arrays(arrays: &[&ArrayReport], screen: &Screen) -> String {
    let head = ["array", "dtype", "shape", "bytes"].map(str::to_owned);
    let rows = arrays.iter().map(|array| {
        [
            text::name(&array.name),
            array.dtype.to_owned(),
            shape(&array.shape),
            text::count(array.bytes),
        ]
    });
    screen.table(std::iter::once(head).chain(rows).collect())
}
