//! What a tree on disk shows, as its directories tell.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::VerifyError;
use super::listing::open_root;
use crate::layout::{BASE_DIRECTORY, EXPERTS_DIRECTORY, HF_DIRECTORY, JOINED_PATH};
use crate::show::Show;

/// What a tree shows: what there is of it, or the usual two directories if there is nothing. The model
/// itself may lie beside them under the name of the joined file.
pub fn shown_in(root: &Path, model: &Path) -> Result<Show, VerifyError> {
    let path = root;
    let root = open_root(root)?;
    let has = |name: &str| matches!(root.kind(name.as_ref()), Ok(Some(_)));
    let show = Show {
        base: has(BASE_DIRECTORY),
        experts: has(EXPERTS_DIRECTORY),
        joined: has(JOINED_PATH) && !is_same(&path.join(JOINED_PATH), model),
        hf: has(HF_DIRECTORY),
    };
    Ok(match show {
        Show::NOTHING => Show::default(),
        show => show,
    })
}

fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| path.metadata().map(|m| (m.dev(), m.ino()));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}
