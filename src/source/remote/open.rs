//! From the address of one part to all parts of a model.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::Options;
use super::address::Address;
use super::cache::{Cache, CachedPart};
use super::client::{Client, REQUESTS};
use super::fault::Fault;
use super::head::{FIRST_BYTES, Head};
use super::part::RemotePart;
use super::pin::{Pin, fingerprint};
use super::route::{Commit, Route};
use crate::gguf::{Header, Joined, ModelHeader, PartName, SplitKeys};
use crate::source::error::OpenError;
use crate::source::open::{Opened, join, joined_in};
use crate::source::place::Part;
use crate::source::{ReadError, Source};

/// Opens a model by the address of its file, or of any part of a split set, and reads the headers,
/// all of them at the same time. The other addresses are those of other parts, if they are known.
pub fn open(
    given: &Address,
    others: &[Address],
    options: &Options,
) -> Result<(ModelHeader, Source), OpenError> {
    let shared = Shared::new(others, options).map_err(|e| remote(given, e))?;
    let opened = shared.open(given)?;
    let name = PartName::parse(given.file_name().as_ref());
    // Nothing is asked for by the name alone, which may promise any number of parts.
    let name = match (SplitKeys::of(&opened.header), name) {
        // Whatever has the other names is none of ours.
        (Ok(None), _) => return join(vec![opened], 0),
        (Ok(Some(keys)), Some(name)) if keys.count == name.count && keys.no + 1 == name.number => {
            name
        }
        (Ok(Some(keys)), _) => return Err(OpenError::name(opened.path, keys.no + 1, keys.count)),
        (Err(cause), _) => {
            let path = opened.path.clone();
            return Err(joined_in([&opened]).unwrap_or(OpenError::Split { path, cause }));
        }
    };
    let folder = opened.path.parent().unwrap_or(Path::new("")).to_owned();
    let given_at = name.number.saturating_sub(1) as usize;
    let parts = shared.set(given, &name, given_at, opened);
    let missing = missing(&parts, &name);
    if !missing.is_empty() {
        return Err(OpenError::Missing {
            folder,
            missing,
            count: name.count,
            hint: "check that the whole set is there, under its published names".to_owned(),
        });
    }
    let parts: Vec<Opened> = parts.into_iter().collect::<Result<_, _>>()?;
    opened_together(&parts, options.offline).map_err(|cause| OpenError::Remote {
        path: parts[given_at].path.clone(),
        cause,
    })?;
    join(parts, given_at)
}

/// Notes in the cache that its parts are of one model, or looks for the notes if there is no other way
/// to tell: an opening that failed may have replaced some of them.
fn opened_together(parts: &[Opened], is_offline: bool) -> Result<(), Fault> {
    let cached = parts
        .iter()
        .filter_map(|opened| opened.part.remote()?.cache());
    let cached: Vec<&CachedPart> = cached.collect();
    let pins: Vec<Pin> = cached.iter().map(|part| part.pin()).collect();
    let set = fingerprint(&pins);
    for part in cached {
        if !is_offline {
            part.note_set(set);
        } else if part.set() != Some(set) {
            return Err(Fault::Scattered);
        }
    }
    Ok(())
}

/// The names of the parts that their server does not have.
fn missing(parts: &[Result<Opened, OpenError>], name: &PartName) -> Vec<OsString> {
    let is_missing = |part: &Result<Opened, OpenError>| {
        matches!(
            part,
            Err(OpenError::Remote {
                cause: Fault::Missing(_),
                ..
            })
        )
    };
    let numbered = (1..).zip(parts).filter(|(_, part)| is_missing(part));
    numbered.map(|(number, _)| name.sibling(number)).collect()
}

fn remote(address: &Address, cause: Fault) -> OpenError {
    OpenError::Remote {
        path: address.to_string().into(),
        cause,
    }
}

/// What comes of a cache that cannot be used: reading goes on without it, unless it is needed.
fn unusable<T>(options: &Options, folder: PathBuf, cause: &io::Error) -> Result<Option<T>, Fault> {
    let fault = Fault::Cache {
        folder,
        cause: cause.to_string(),
    };
    if options.needs_cache {
        return Err(fault);
    }
    tracing::warn!("{fault}; what is read is not kept");
    Ok(None)
}

/// What all parts of a model have in common.
struct Shared<'a> {
    addresses: &'a [Address],
    options: &'a Options,
    client: Arc<Client>,
    cache: Option<Arc<Cache>>,
    commit: Commit,
}

impl<'a> Shared<'a> {
    fn new(addresses: &'a [Address], options: &'a Options) -> Result<Self, Fault> {
        let folder = options.folder_of_cache();
        let cache = match folder.map(|folder| (Cache::open(&folder, options.cache_bytes), folder)) {
            None => None,
            Some((Ok(cache), _)) => Some(cache),
            Some((Err(cause), folder)) => unusable(options, folder, &cause)?,
        };
        Ok(Self {
            addresses,
            options,
            client: Arc::new(Client::new(options.insecure_http)?),
            cache,
            commit: Commit::default(),
        })
    }

    /// Opens a part, and reads its header.
    fn open(&self, address: &Address) -> Result<Opened, OpenError> {
        let (part, first) = self.part(address).map_err(|e| remote(address, e))?;
        head(part, first)
    }

    /// A part, and the first bytes of it unless the cache has them.
    fn part(&self, address: &Address) -> Result<(RemotePart, Vec<u8>), Fault> {
        let (shown, name) = (address.to_string(), address.file_name());
        let cache = self.cache.as_ref();
        let cached = cache.and_then(|cache| cache.find(&shown, &name).ok().flatten());
        let made = |route, pin, cache| {
            let path = PathBuf::from(&shown);
            RemotePart::new(path, self.client.clone(), route, pin, cache)
        };
        let options = self.options;
        if options.offline {
            let cached = cached.ok_or(Fault::Offline)?;
            return Ok((made(None, cached.pin(), Some(cached)), Vec::new()));
        }
        let client = &self.client;
        let route = Route::new(address, client, options, &self.commit)?;
        // What is in the cache only needs to be confirmed.
        let known = cached.as_ref().map(CachedPart::pin).filter(Pin::holds);
        let wanted = if known.is_some() { 1 } else { FIRST_BYTES };
        let mut first = vec![0; wanted as usize];
        let read = client.wait(route.fetch(client, 0..wanted, &mut first))?;
        first.truncate(read);
        let pin = route.pin().cloned().unwrap_or_default();
        let is_same = known.is_some_and(|known| known.check(&pin, false).is_ok());
        if is_same {
            return Ok((made(Some(route), pin, cached), Vec::new()));
        }
        drop(cached);
        let cached = match cache.map(|cache| (cache.create(&shown, &name, &pin), cache)) {
            None => None,
            Some((Ok(cached), _)) => Some(cached),
            Some((Err(cause), cache)) => unusable(options, cache.folder().to_owned(), &cause)?,
        };
        let part = made(Some(route), pin, cached);
        part.keep(0, &first);
        Ok((part, first))
    }

    /// All parts of a set with their headers, in order.
    fn set(
        &self,
        given: &Address,
        name: &PartName,
        given_at: usize,
        opened: Opened,
    ) -> Vec<Result<Opened, OpenError>> {
        let others: Vec<_> = (1..=name.count).filter(|n| *n != name.number).collect();
        let results: Vec<_> = others.iter().map(|_| Mutex::new(None)).collect();
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(number) = others.get(at) else {
                    return;
                };
                *results[at].lock() = Some(self.open(&self.sibling(given, name, *number)));
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..others.len().min(REQUESTS) {
                scope.spawn(work);
            }
            work();
        });
        let results = results.into_iter().map(Mutex::into_inner);
        let mut parts: Vec<_> = results.map(|part| part.expect("each was opened")).collect();
        parts.insert(given_at, Ok(opened));
        parts
    }

    /// The address of another part: one that was given, or that of a file beside it.
    fn sibling(&self, given: &Address, name: &PartName, number: u64) -> Address {
        let wanted = name.sibling(number).to_string_lossy().into_owned();
        let mut known = self.addresses.iter();
        let known = known.find(|address| address.file_name() == wanted);
        known.cloned().unwrap_or_else(|| given.sibling(&wanted))
    }
}

/// Reads the header of a part.
fn head(part: RemotePart, first: Vec<u8>) -> Result<Opened, OpenError> {
    let path = part.path.clone();
    let failed = |e: ReadError| match e {
        ReadError::Remote { path, cause, .. } => OpenError::Remote { path, cause },
        other => OpenError::Remote {
            path: other.path().to_owned(),
            cause: Fault::Client(other.to_string()),
        },
    };
    let mut reader = Head::new(&part, first);
    let header = match Header::read(&mut reader, part.bytes()) {
        Ok(header) => header,
        Err(cause) => {
            return Err(match reader.failed {
                Some(e) => failed(e),
                None => OpenError::Header {
                    path,
                    cause: Box::new(cause),
                    hint: None,
                },
            });
        }
    };
    let joined = Joined::find(&mut reader, &header, part.bytes());
    Ok(Opened {
        path,
        header,
        joined: joined.ok().flatten(),
        part: Part::Remote(Box::new(part)),
    })
}
