//! What each form of a model takes, as a table: for `inspect` and `doctor`. The working set is the base
//! and the experts of a token.

use odmoe_fs::inspect::{FormReport, FormsReport, Memory};

use super::screen::Screen;
use super::text;

/// Draws the table, with a heading above it; those of the same sizes share a line. With `memory`,
/// it says whether the working set fits into what is free.
pub fn table(report: &FormsReport, memory: Option<Memory>, screen: &Screen) -> String {
    let heading = screen.heading("in each form (--as)") + "\n";
    if report.forms.len() == 1 {
        let text = "  raw only: the numbers of some of its types are not known\n";
        return heading + &screen.fit(text);
    }
    let cell = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), text::size);
    let here = memory.map_or_else(String::new, |memory| {
        format!("{} free", text::size(memory.available))
    });
    let titles = ["  form", "an expert", "working set", "all"];
    let [form, expert, active, all] = titles.map(str::to_owned);
    let mut rows = vec![[form, expert, active, all, here]];
    let sizes = |form: &FormReport| (form.expert_bytes, form.active.bytes, form.bytes);
    for alike in report.forms.chunk_by(|a, b| sizes(a) == sizes(b)) {
        let names = alike.iter().map(|form| match form.requant {
            true => format!("{} --requant", form.form),
            false => form.form.to_owned(),
        });
        let (expert, active, all) = sizes(&alike[0]);
        let fits = memory.and_then(|memory| Some(memory.verdict(active?)));
        rows.push([
            format!("  {}", names.collect::<Vec<_>>().join(", ")),
            cell(expert),
            cell(active),
            text::size(all),
            fits.unwrap_or_default().to_owned(),
        ]);
    }
    let table = match memory {
        Some(_) => screen.whole_table(rows),
        None => {
            let rows = rows.into_iter();
            screen.whole_table(rows.map(|[a, b, c, d, _]| [a, b, c, d]).collect())
        }
    };
    let not_packed = report.not_packed.iter();
    let types: Vec<String> = not_packed
        .map(|(name, amount)| format!("{name} in {}", text::counted(amount.tensors, "tensor")))
        .collect();
    let not_packed = match types.is_empty() {
        true => String::new(),
        false => format!("  mlx shows as plain F16 numbers: {}\n", types.join(", ")),
    };
    heading + &table + &screen.fit(&not_packed)
}
