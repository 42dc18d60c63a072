//! From the path of one file to all parts of its model.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::{Identity, PageCache, PartFile, Source, open_regular};
use crate::gguf::{
    Header, HeaderError, ModelHeader, PartName, SplitError, SplitKeys, looks_like_raw_cut,
};
use crate::sys;

/// Headers are read in pieces of this size; 1,097 parts make it worth while to keep it small.
const HEADER_BUFFER_BYTES: usize = 64 << 10;

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "model.")]
pub enum OpenError {
    #[error("cannot open {path:?}: {cause}")]
    Io { path: PathBuf, cause: io::Error },
    #[error("{path:?}: {cause}{}", raw_cut_hint(.path))]
    Header { path: PathBuf, cause: HeaderError },
    #[error("{path:?}: {cause}")]
    Split { path: PathBuf, cause: SplitError },
    #[error(
        "{path:?} is part {number} of {count}, but its name does not end in {expected:?}, so the other parts cannot be found; give the parts the names that they were published with"
    )]
    PartName {
        path: PathBuf,
        number: u64,
        count: u64,
        expected: String,
    },
    #[error("{} of {count} parts missing in {folder:?}: {}; download the whole set into one folder", .missing.len(), shortened(.missing))]
    Missing {
        folder: PathBuf,
        missing: Vec<OsString>,
        count: u64,
    },
}

fn raw_cut_hint(path: &Path) -> String {
    match path.file_name() {
        Some(name) if looks_like_raw_cut(name) => format!(
            "; {name:?} looks like one piece of a file that was cut by bytes: join all pieces first, in order, with `cat PIECES > model.gguf`"
        ),
        _ => String::new(),
    }
}

fn shortened(names: &[OsString]) -> String {
    const SHOWN: usize = 3;
    let shown = names.iter().take(SHOWN).map(|name| format!("{name:?}"));
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

/// Opens a model by the path of its file, or of any part of a split set, and reads the headers.
pub fn open(path: &Path) -> Result<(ModelHeader, Source), OpenError> {
    let path = std::path::absolute(path).map_err(|cause| OpenError::Io {
        path: path.to_owned(),
        cause,
    })?;
    let given = Opened::new(path)?;
    let keys = SplitKeys::of(&given.header).map_err(|cause| OpenError::Split {
        path: given.path.clone(),
        cause,
    })?;
    match keys {
        None => join(vec![given], 0),
        Some(keys) => join(open_set(given, keys)?, keys.no as usize),
    }
}

/// A part whose header was read.
struct Opened {
    path: PathBuf,
    header: Header,
    identity: Identity,
    file: Option<File>,
}

impl Opened {
    fn new(path: PathBuf) -> Result<Self, OpenError> {
        let (file, metadata) = open_regular(&path).map_err(|cause| OpenError::Io {
            path: path.clone(),
            cause,
        })?;
        let reader = BufReader::with_capacity(HEADER_BUFFER_BYTES, &file);
        let header = Header::read(reader, metadata.len()).map_err(|cause| OpenError::Header {
            path: path.clone(),
            cause,
        })?;
        Ok(Self {
            path,
            header,
            identity: Identity::of(&metadata),
            file: Some(file),
        })
    }
}

/// Opens the siblings of a part: beside the path that was given first, since a download cache may
/// show parts as links into a store of other names; then beside what it leads to.
fn open_set(given: Opened, keys: SplitKeys) -> Result<Vec<Opened>, OpenError> {
    let given_number = keys.no + 1;
    let resolved = given.path.canonicalize().ok();
    let places: Vec<(PathBuf, PartName)> = [Some(given.path.clone()), resolved]
        .into_iter()
        .flatten()
        .filter_map(|path| {
            let name = PartName::parse(path.file_name()?)?;
            (name.number == given_number && name.count == keys.count)
                .then(|| Some((path.parent()?.to_owned(), name)))?
        })
        .collect();
    let Some((folder, _)) = places.first() else {
        return Err(OpenError::PartName {
            path: given.path,
            number: given_number,
            count: keys.count,
            expected: PartName::ending(given_number, keys.count),
        });
    };

    let kept_open = descriptors_to_keep();
    let mut given = Some(given);
    let mut parts: Vec<Opened> = Vec::new();
    let mut missing = Vec::new();
    for number in 1..=keys.count {
        let part = if number == given_number {
            given.take()
        } else {
            open_sibling(&places, number)?
        };
        match part {
            Some(mut part) => {
                if parts.len() >= kept_open {
                    part.file = None;
                }
                parts.push(part);
            }
            None => missing.push(places[0].1.sibling(number)),
        }
    }
    if !missing.is_empty() {
        return Err(OpenError::Missing {
            folder: folder.clone(),
            missing,
            count: keys.count,
        });
    }
    Ok(parts)
}

fn open_sibling(places: &[(PathBuf, PartName)], number: u64) -> Result<Option<Opened>, OpenError> {
    for (folder, name) in places {
        match Opened::new(folder.join(name.sibling(number))) {
            Err(OpenError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {}
            result => return result.map(Some),
        }
    }
    Ok(None)
}

/// A third of the descriptors: another is for reading past the page cache, and the rest for the
/// process around us.
fn descriptors_to_keep() -> usize {
    let limit = sys::process::descriptor_limit().unwrap_or(256);
    usize::try_from(limit / 3).unwrap_or(usize::MAX)
}

fn join(parts: Vec<Opened>, given: usize) -> Result<(ModelHeader, Source), OpenError> {
    let mut headers = Vec::with_capacity(parts.len());
    let mut files = Vec::with_capacity(parts.len());
    for part in parts {
        headers.push((part.header, part.identity.bytes));
        files.push(PartFile {
            path: part.path,
            identity: part.identity,
            file: part.file,
            direct: None,
            changed: AtomicBool::new(false),
            missed: AtomicBool::new(false),
        });
    }
    let header = ModelHeader::join(headers).map_err(|(part, cause)| OpenError::Split {
        path: files[part].path.clone(),
        cause,
    })?;
    let source = Source {
        parts: files,
        given,
        page_cache: PageCache::default(),
    };
    Ok((header, source))
}
