//! The sizes that a model's files would have in other forms.

use std::collections::BTreeMap;

use super::{Layout, View};
use crate::form::{Form, Shown};

impl Layout {
    /// The payload bytes of each of [`files`](Self::files) in another form; `None` if the model has
    /// types whose numbers are not known.
    pub fn payloads_as(&self, form: Form) -> Option<Vec<u64>> {
        let of_view = |view: &View| {
            let (ggml_type, name) = self.type_and_name(view);
            let shown = Shown::of(form, ggml_type, name, &view.shape)?;
            Some(match shown {
                Shown::Stored => view.bytes,
                shown => shown.bytes(ggml_type, &view.shape),
            })
        };
        let views: Vec<u64> = self.views.iter().map(of_view).collect::<Option<_>>()?;
        let files = self.files.iter().map(|file| {
            let pieces = file.pieces.start as usize..file.pieces.end as usize;
            let bytes = self.pieces[pieces]
                .iter()
                .map(|piece| views[piece.view as usize]);
            bytes.fold(0, u64::saturating_add)
        });
        Some(files.collect())
    }

    /// The type and payload bytes in the model of each quantised tensor that MLX cannot take packed
    /// as it is, in the order of the model; `None` if the model has types whose numbers are not
    /// known.
    pub fn not_packed(&self) -> Option<Vec<(&'static str, u64)>> {
        // Several views may be of one tensor; all of them are shown alike.
        let mut found = BTreeMap::new();
        for view in &self.views {
            let (ggml_type, name) = self.type_and_name(view);
            let shown = Shown::of(Form::MLX, ggml_type, name, &view.shape)?;
            if matches!(shown, Shown::Numbers(_)) {
                let bytes = self.model.tensors[view.tensor as usize].info.bytes;
                found.insert(view.tensor, (ggml_type.name, bytes));
            }
        }
        Some(found.into_values().collect())
    }
}
