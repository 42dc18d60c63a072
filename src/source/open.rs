//! From the path of one file to all parts of its model.

use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use super::Source;
use super::error::OpenError;
use super::part::{Identity, PartFile, open_regular};
use super::place::Part;
use crate::gguf::{
    Header, HeaderError, Joined, ModelHeader, OLLAMA_GPT_OSS, OLLAMA_MXFP4, PartName, Problem,
    SplitKeys,
};
use crate::sys;

/// Headers are read in pieces of this size. It is small since a model may have 1,097 parts.
const HEADER_BUFFER_BYTES: usize = 64 << 10;

/// Opens a model by the path of its file, or of any part of a split set, and reads the headers.
pub fn open(path: &Path) -> Result<(ModelHeader, Source), OpenError> {
    let path = std::path::absolute(path).map_err(|cause| OpenError::io(path.to_owned(), cause))?;
    let given = Opened::new(path)?;
    match SplitKeys::of(&given.header) {
        Ok(None) => join(vec![given], 0),
        Ok(Some(keys)) => join(open_set(given, keys)?, keys.no as usize),
        Err(cause) => Err(joined_in([&given]).unwrap_or(OpenError::Split {
            path: given.path,
            cause,
        })),
    }
}

/// A part whose header was read.
pub(super) struct Opened {
    pub path: PathBuf,
    pub header: Header,
    pub part: Part,
    /// The GGUF that follows the tensors, if there is one.
    pub joined: Option<Joined>,
}

impl Opened {
    fn new(path: PathBuf) -> Result<Self, OpenError> {
        let (file, metadata) = match open_regular(&path) {
            Ok(opened) => opened,
            Err(cause) => return Err(OpenError::io(path, cause)),
        };
        let reader = BufReader::with_capacity(HEADER_BUFFER_BYTES, &file);
        let header = match Header::read(reader, metadata.len()) {
            Ok(header) => header,
            Err(mut cause) => {
                if is_ollamas(&path, &cause) {
                    cause.problem = Problem::OllamaMxfp4;
                }
                return Err(OpenError::header(path, &file, cause));
            }
        };
        // Nothing behind the tensors is needed, so an error there is none of the model.
        let joined = Joined::find(BufReader::new(&file), &header, metadata.len());
        let joined = joined.ok().flatten();
        let part = PartFile::new(path.clone(), Identity::of(&metadata), Some(file));
        Ok(Self {
            path,
            header,
            part: Part::File(part),
            joined,
        })
    }
}

/// Whether a type that llama.cpp removed is Ollama's, as the first part of the set tells: only that
/// part has an architecture.
fn is_ollamas(path: &Path, cause: &HeaderError) -> bool {
    if !matches!(
        cause.problem,
        Problem::RetiredType {
            id: OLLAMA_MXFP4,
            ..
        }
    ) {
        return false;
    }
    let first = || {
        let name = PartName::parse(path.file_name()?)?;
        let path = path.with_file_name(name.sibling(1));
        let (file, metadata) = (name.number > 1).then(|| open_regular(&path).ok())??;
        Some(Header::read(BufReader::new(file), metadata.len()))
    };
    match first() {
        Some(Ok(header)) => header.architecture() == Some(OLLAMA_GPT_OSS),
        Some(Err(e)) => matches!(e.problem, Problem::OllamaMxfp4),
        None => false,
    }
}

/// Opens the siblings of a part: beside the given path first, since a download cache may show parts
/// as links into a store of other names; then beside the file that the path leads to.
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
    let Some((folder, name)) = places.first() else {
        return Err(joined_in([&given])
            .unwrap_or_else(|| OpenError::name(given.path, given_number, keys.count)));
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
                if let Part::File(file) = &mut part.part
                    && parts.len() >= kept_open
                {
                    file.close();
                }
                parts.push(part);
            }
            None => missing.push(name.sibling(number)),
        }
    }
    if !missing.is_empty() {
        return Err(
            joined_in(&parts).unwrap_or_else(|| OpenError::missing(folder.clone(), name, missing))
        );
    }
    Ok(parts)
}

/// The error of the first file that holds several parts of a set, which explains whatever else is
/// wrong with the set.
pub(super) fn joined_in<'a>(parts: impl IntoIterator<Item = &'a Opened>) -> Option<OpenError> {
    parts.into_iter().find_map(|part| {
        Some(OpenError::Joined {
            path: part.path.clone(),
            joined: part.joined.clone()?,
        })
    })
}

fn open_sibling(places: &[(PathBuf, PartName)], number: u64) -> Result<Option<Opened>, OpenError> {
    let mut dangling = None;
    for (folder, name) in places {
        let path = folder.join(name.sibling(number));
        match Opened::new(path.clone()) {
            Err(error) if is_not_found(&error) => {
                // A dangling link is the error if the part is in no other place.
                if path.is_symlink() {
                    dangling = dangling.or(Some(error));
                }
            }
            result => return result.map(Some),
        }
    }
    dangling.map_or(Ok(None), Err)
}

fn is_not_found(error: &OpenError) -> bool {
    matches!(error, OpenError::Io { cause, .. } if cause.kind() == io::ErrorKind::NotFound)
}

/// A third of the descriptors: another is for reading past the page cache, and the rest for the
/// process around us.
fn descriptors_to_keep() -> usize {
    let limit = sys::process::descriptor_limit();
    usize::try_from(limit / 3).unwrap_or(usize::MAX)
}

pub(super) fn join(parts: Vec<Opened>, given: usize) -> Result<(ModelHeader, Source), OpenError> {
    let joined = joined_in(&parts);
    let mut headers = Vec::with_capacity(parts.len());
    let mut files = Vec::with_capacity(parts.len());
    for part in parts {
        headers.push((part.header, part.part.bytes()));
        files.push(part.part);
    }
    let header = match ModelHeader::join(headers) {
        Ok(header) => header,
        Err((part, cause)) => {
            let path = files[part].path().to_owned();
            return Err(joined.unwrap_or(OpenError::Split { path, cause }));
        }
    };
    if let Some(OpenError::Joined { path, joined }) = joined {
        tracing::warn!("{path:?} {joined}; only what its first header describes is shown");
    }
    if let Some(what) = header.accessory() {
        let path = files[given].path();
        tracing::warn!("{path:?} is {what}, not a model; give the model that it belongs to");
    }
    Ok((header, Source::new(files, given)))
}
