//! Why a model cannot be opened, and what to do about it, as far as what lies around it tells.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

#[cfg(feature = "remote")]
use super::remote::{AddressError, Fault};
use super::{folder, store};
use crate::downloads;
use crate::explain::{Explain, Hint};
use crate::gguf::{HeaderError, Joined, PartName, Problem, SplitError, looks_like_raw_cut};
use crate::layout::METADATA_GGUF_PATH;
use crate::sys::copy::next_data;

/// Names that an error lists, at most.
const NAMES_SHOWN: usize = 3;

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "model.")]
pub enum OpenError {
    #[error("cannot open {path:?}: {cause}")]
    Io {
        path: PathBuf,
        cause: io::Error,
        hint: Option<Hint>,
    },
    #[cfg(feature = "remote")]
    #[error(transparent)]
    Address(#[from] AddressError),
    #[cfg(feature = "remote")]
    #[error("cannot open {path:?}: {cause}")]
    Remote { path: PathBuf, cause: Fault },
    #[error("{path:?} is a directory")]
    Directory { path: PathBuf, hint: String },
    #[error("{path:?}: {cause}")]
    Header {
        path: PathBuf,
        cause: Box<HeaderError>,
        /// What to do, where more is known than the cause tells.
        hint: Option<String>,
    },
    #[error("{path:?} {joined}")]
    Joined { path: PathBuf, joined: Joined },
    #[error("{path:?}: {cause}")]
    Split { path: PathBuf, cause: SplitError },
    #[error(
        "{path:?} is part {number} of {count}, but its name does not end in {expected:?}, so the other parts cannot be found"
    )]
    PartName {
        path: PathBuf,
        number: u64,
        count: u64,
        expected: String,
    },
    #[error(
        "{path:?} is part {number} of {count} in a store that names files by their content, so the other parts cannot be found beside it"
    )]
    Stored {
        path: PathBuf,
        number: u64,
        count: u64,
        hint: String,
    },
    #[error("{} of {count} parts missing in {folder:?}: {}", .missing.len(), shortened(.missing))]
    Missing {
        folder: PathBuf,
        missing: Vec<OsString>,
        count: u64,
        hint: String,
    },
}

impl Explain for OpenError {
    fn code(&self) -> &'static str {
        match self {
            Self::Header { cause, .. } => cause.code(),
            Self::Split { cause, .. } => cause.code(),
            #[cfg(feature = "remote")]
            Self::Address(cause) => cause.code(),
            #[cfg(feature = "remote")]
            Self::Remote { cause, .. } => cause.code(),
            _ => self.into(),
        }
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Io { hint, .. } => hint.clone(),
            Self::Directory { hint, .. }
            | Self::Stored { hint, .. }
            | Self::Missing { hint, .. } => Some(hint.clone().into()),
            Self::Header { hint, cause, .. } => match hint {
                Some(hint) => Some(hint.clone().into()),
                None => cause.hint(),
            },
            Self::Joined { joined, .. } => Some(joined_hint(joined).into()),
            Self::Split { cause, .. } => cause.hint(),
            #[cfg(feature = "remote")]
            Self::Address(cause) => cause.hint(),
            #[cfg(feature = "remote")]
            Self::Remote { cause, .. } => cause.hint(),
            Self::PartName { .. } => {
                Some("give the parts the names that they were published with".into())
            }
        }
    }
}

impl OpenError {
    /// An error of the system, of a path that was to be opened.
    pub(super) fn io(path: PathBuf, cause: io::Error) -> Self {
        if path.is_dir() {
            let hint = directory_hint(&path);
            return Self::Directory { path, hint };
        }
        let hint = io_hint(&path, &cause);
        Self::Io { path, cause, hint }
    }

    /// A header that was refused.
    pub(super) fn header(path: PathBuf, file: &File, cause: HeaderError) -> Self {
        let hint = header_hint(&path, file, &cause);
        Self::Header {
            path,
            cause: Box::new(cause),
            hint,
        }
    }

    /// A part under a name that is not a part's.
    pub(super) fn name(path: PathBuf, number: u64, count: u64) -> Self {
        let resolved = path.canonicalize().ok();
        for blob in [Some(&path), resolved.as_ref()].into_iter().flatten() {
            if let Some(root) = store::of(blob) {
                let link = store::link_to(&root, blob, number, count);
                let hint = stored_hint(link, count);
                let (path, number) = (path.clone(), number);
                return Self::Stored {
                    path,
                    number,
                    count,
                    hint,
                };
            }
        }
        let expected = PartName::ending(number, count);
        Self::PartName {
            path,
            number,
            count,
            expected,
        }
    }

    /// Parts of a set that are not in its folder.
    pub(super) fn missing(folder: PathBuf, set: &PartName, missing: Vec<OsString>) -> Self {
        let downloads = missing.iter().take(NAMES_SHOWN);
        let download = downloads
            .filter_map(|name| downloads::download_of(&folder, name))
            .next();
        let hint = match (download, store::download_command(&folder, set)) {
            (Some(name), _) => {
                format!("{name:?} has not finished: let it finish, or start it again")
            }
            (None, Some(command)) => format!("fetch them with `{command}`"),
            (None, None) => "download the whole set into one folder".to_owned(),
        };
        Self::Missing {
            folder,
            missing,
            count: set.count,
            hint,
        }
    }
}

fn io_hint(path: &Path, cause: &io::Error) -> Option<Hint> {
    match (cause.kind(), cause.raw_os_error()) {
        (io::ErrorKind::NotFound, _) => not_found_hint(path).map(Hint::Owned),
        // A device or a pipe; a socket.
        (io::ErrorKind::InvalidInput, _) | (_, Some(libc::ENXIO)) => {
            Some("a model is read in many places, so save it as a file first".into())
        }
        _ => None,
    }
    .or_else(|| cause.hint())
}

fn not_found_hint(path: &Path) -> Option<String> {
    if let Ok(target) = path.read_link() {
        return Some(format!(
            "it is a link to {target:?}, which is not there: put that back"
        ));
    }
    let mut longer = path.as_os_str().to_owned();
    longer.push(".gguf");
    let exists = Path::new(&longer).exists();
    exists.then(|| format!("{longer:?} is there"))
}

/// Better advice on a header's problem, from the name of the file, its neighbours or its holes.
fn header_hint(path: &Path, file: &File, cause: &HeaderError) -> Option<String> {
    let could_be_cut = matches!(
        cause.problem,
        Problem::Magic(_)
            | Problem::EmptyFile
            | Problem::Zeros(_)
            | Problem::Truncated { .. }
            | Problem::Count { .. }
            | Problem::BeyondEnd { .. }
            | Problem::Empty
    );
    if !could_be_cut {
        return None;
    }
    let name = path.file_name()?;
    if looks_like_raw_cut(name) {
        return Some(format!(
            "{name:?} looks like one piece of a file that was cut by bytes: join all pieces first, in order, with `cat PIECES > model.gguf`"
        ));
    }
    let unwritten = || {
        const UNWRITTEN: &str = "nothing was ever written there: wait for the download or copy of the file to end, or start it again";
        let is_hole = match next_data(file, cause.offset) {
            Ok(Some(data)) => data.start > cause.offset,
            Ok(None) => true,
            Err(_) => false,
        };
        let is_inside = matches!(cause.problem, Problem::Zeros(_) | Problem::Empty);
        (is_inside && is_hole).then(|| UNWRITTEN.to_owned())
    };
    downloads::advice(path).or_else(unwritten)
}

fn joined_hint(joined: &Joined) -> &'static str {
    match joined.numbers() {
        Some(_) => {
            "mount the parts as they were published, or join them with `llama-gguf-split --merge FIRST_PART MODEL.gguf`"
        }
        None => "keep each GGUF in a file of its own",
    }
}

fn stored_hint(link: Option<store::Link>, count: u64) -> String {
    let Some(store::Link { path, parts }) = link else {
        return "link all parts into one folder with `ln -s`, under their published names, and give one of the links"
            .to_owned();
    };
    if parts == count {
        return format!("give the link that leads to it: {path:?}");
    }
    let set = path.file_name().and_then(PartName::parse);
    let command = set.and_then(|set| store::download_command(path.parent()?, &set));
    let first = match command {
        Some(command) => format!("fetch the others with `{command}`"),
        None => "fetch the others".to_owned(),
    };
    format!(
        "{first}, since there are only {parts}, and then give the link that leads to it: {path:?}"
    )
}

fn directory_hint(folder: &Path) -> String {
    let (mut models, mut has_safetensors) = (Vec::new(), false);
    for (path, kind) in folder::entries(folder) {
        let ends_in = |extension| {
            path.extension()
                .is_some_and(|e| e.eq_ignore_ascii_case(extension))
        };
        if !(kind.is_file() || kind.is_symlink()) {
            continue;
        }
        has_safetensors |= ends_in("safetensors");
        // The metadata of a tree that we have written is no model.
        if ends_in("gguf") && !path.ends_with(METADATA_GGUF_PATH) {
            models.push(path.strip_prefix(folder).unwrap_or(&path).to_owned());
        }
    }
    models.sort();
    // Of a split set, any part will do.
    models.dedup_by(|b, a| {
        let part = |path: &Path| path.file_name().and_then(PartName::parse);
        let is_same = |(a, b): (PartName, PartName)| (a.prefix, a.count) == (b.prefix, b.count);
        a.parent() == b.parent() && part(a).zip(part(b)).is_some_and(is_same)
    });
    match &models[..] {
        [] if has_safetensors => {
            "what is in it is a model in safetensors: convert that to GGUF with llama.cpp's convert_hf_to_gguf.py".to_owned()
        }
        [] => "give a GGUF file".to_owned(),
        [model] => format!("give the model in it: {model:?}"),
        several => format!("give one of the models in it: {}", shortened(several)),
    }
}

fn shortened(names: &[impl fmt::Debug]) -> String {
    let shown = names
        .iter()
        .take(NAMES_SHOWN)
        .map(|name| format!("{name:?}"));
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if names.len() > NAMES_SHOWN {
        text.push_str(&format!(" and {} more", names.len() - NAMES_SHOWN));
    }
    text
}
