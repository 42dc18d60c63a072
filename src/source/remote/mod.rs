//! Parts that are somewhere else: behind a URL, in an object store, on the Hugging Face Hub.
//!
//! The problem: a server is far away, may be busy, may send something else than was asked for, and
//! may replace the file at any time; and nobody wants to fetch a byte twice.
//!
//! The plan: an [`Address`] says where a part is. A `Route` leads from there to a URL that answers,
//! and accepts only answers of the state that was pinned by the first one. A `RemotePart` asks for
//! each byte once, in pieces, many at a time. A `Cache` keeps them on disk. The rest of
//! [`source`](crate::source) does not know the difference.

mod address;
pub mod cache;
mod client;
mod credentials;
mod fault;
mod head;
mod open;
mod part;
mod pin;
pub mod probe;
mod proxy;
mod retry;
mod route;
#[cfg(not(target_os = "macos"))]
mod stores;

use std::path::PathBuf;

pub use self::cache::index::{RECORD_BYTES, piece_end};
pub use self::cache::room::EDGE_BYTES;
pub use address::{Address, AddressError, Place, StoreKind, is_url};
pub use client::REQUESTS;
pub use fault::{Fault, Kind};
pub use open::open;
pub use part::{RemotePart, Unit};
pub(super) use pin::fingerprint;

/// How remote models are read.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Plain HTTP may leave this machine.
    pub insecure_http: bool,
    /// The file that the addresses came from, absolute: it may get fresh URLs.
    pub url_file: Option<PathBuf>,
    /// A file whose changes would go unnoticed may be read.
    pub unpinned: bool,
    /// Nothing is asked of servers: what the cache has must do.
    pub offline: bool,
    /// The folder of the cache, instead of the usual one.
    pub cache_folder: Option<PathBuf>,
    /// The most bytes of the cache; 0 for none. Without it, half of what is free.
    pub cache_bytes: Option<u64>,
    /// Without a cache nothing is read at all.
    pub needs_cache: bool,
}

impl Options {
    /// The folder of the cache; `None` if there is to be none.
    pub fn folder_of_cache(&self) -> Option<PathBuf> {
        let folder = self.cache_folder.clone().or_else(cache::usual_folder)?;
        (self.cache_bytes != Some(0)).then_some(folder)
    }
}
