//! `--show`: what a tree shows, for every command that opens a model to show it.

use odmoe_fs::model::Model;
use odmoe_fs::show::Show;

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ShowArgs {
    /// What to show, in a list: base (base_model/), experts (experts/), joined (model.gguf, all parts in
    /// one file) and hf (hf/, a directory for transformers or mlx-lm)
    #[arg(long, value_name = "LIST", default_value_t, help_heading = "Form")]
    show: Show,
}

impl ShowArgs {
    pub fn show(self) -> Show {
        self.show
    }
}

/// Warns of what a model directory cannot express.
pub fn warn_of_directory(model: &Model) {
    if let Some(directory) = model.layout().hf() {
        for warning in directory.warnings() {
            let path = model.source().given_path();
            tracing::warn!("hf/ of {path:?} is not complete: {warning}");
        }
    }
}
