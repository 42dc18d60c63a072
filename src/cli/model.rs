//! The model of a command: a file on this machine, or an address.

#[cfg(feature = "remote")]
use std::path::absolute;
use std::path::{Path, PathBuf};

use odmoe_fs::form::Form;
use odmoe_fs::model::{Model, ModelError};
use odmoe_fs::show::Show;
#[cfg(feature = "remote")]
use odmoe_fs::source::OpenError;
#[cfg(feature = "remote")]
use odmoe_fs::source::remote::{Address, AddressError, Options, is_url};

use super::failure::{Failure, Result};

/// The model of a command.
#[derive(clap::Args)]
pub struct ModelArg {
    /// The GGUF file, or any part of a split set; the other parts are found beside it. Or its
    /// address: https://..., s3://BUCKET/KEY, gs://..., az://... or hf://ORG/REPO[@REVISION]/FILE
    #[cfg_attr(
        feature = "remote",
        arg(value_name = "MODEL.gguf", required_unless_present = "url_file")
    )]
    #[cfg_attr(
        not(feature = "remote"),
        arg(value_name = "MODEL.gguf", required = true)
    )]
    model: Option<PathBuf>,
    #[cfg(feature = "remote")]
    #[command(flatten)]
    remote: RemoteArgs,
}

/// The heading of these options in the help.
#[cfg(feature = "remote")]
const ELSEWHERE: &str = "Models elsewhere";

/// How a model is read that is not on this machine.
#[cfg(feature = "remote")]
#[derive(clap::Args)]
struct RemoteArgs {
    /// Read the model's address from a file, in the place of MODEL: one line for each part
    ///
    /// For signed URLs, which the list of processes must not show.
    #[arg(long, value_name = "FILE", help_heading = ELSEWHERE)]
    url_file: Option<PathBuf>,
    /// Keep what is fetched in this folder [default: $XDG_CACHE_HOME/odmoe-fs]
    #[arg(long, value_name = "DIR", help_heading = ELSEWHERE)]
    cache_dir: Option<PathBuf>,
    /// Let the cache grow to this size, such as 100G; 0 for no cache [default: half of the free space]
    ///
    /// A twentieth of the file system always stays free.
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = ELSEWHERE)]
    cache_size: Option<u64>,
    /// Ask no server: read only what is in the cache
    #[arg(long, help_heading = ELSEWHERE)]
    offline: bool,
    /// Read a file even if its server gives neither an ETag nor a time, so that a change of it would
    /// go unnoticed
    #[arg(long, help_heading = ELSEWHERE)]
    unpinned: bool,
    /// Allow plain http:// to other machines, which anybody on the way can read and change
    #[arg(long, help_heading = ELSEWHERE)]
    insecure_http: bool,
}

#[cfg(feature = "remote")]
fn size(text: &str) -> std::result::Result<u64, String> {
    let bytes = super::text::parse_size(text);
    bytes.ok_or_else(|| "it must be a size such as 500M or 100G, or 0".to_owned())
}

impl ModelArg {
    /// What was given, to be shown: it holds nothing secret.
    pub fn shown(&self) -> &Path {
        #[cfg(feature = "remote")]
        if let Some(file) = &self.remote.url_file {
            return file;
        }
        self.model.as_deref().unwrap_or(Path::new(""))
    }

    /// Opens a model elsewhere, whose cache is to be filled.
    #[cfg(feature = "remote")]
    pub fn open_to_cache(&self) -> Result<Model> {
        let Some((given, others)) = self.addresses()? else {
            let message = format!("{:?} is a file on this machine", self.shown());
            return Err(Failure::new(message).hint("nothing needs to be fetched: mount it"));
        };
        let options = Options {
            needs_cache: true,
            ..self.remote.options()
        };
        let (form, show) = (Form::Raw, Show::default());
        Ok(Model::open_remote(&given, &others, &options, form, show)?)
    }

    /// Opens the model.
    pub fn open(&self, form: Form, show: Show) -> std::result::Result<Model, ModelError> {
        #[cfg(feature = "remote")]
        if let Some((given, others)) = self.addresses().map_err(OpenError::from)? {
            return Model::open_remote(&given, &others, &self.remote.options(), form, show);
        }
        Model::open_shown(self.shown(), form, show)
    }

    /// Where the cache of a model elsewhere is; `None` of a file, or without a cache.
    #[cfg(feature = "remote")]
    pub fn cache_folder(&self) -> Option<PathBuf> {
        let is_url = self.model.as_deref().is_some_and(is_url) || self.remote.url_file.is_some();
        self.remote.options().folder_of_cache().filter(|_| is_url)
    }

    /// The address of the model, and those of other parts that are known; `None` of a file.
    #[cfg(feature = "remote")]
    pub fn addresses(&self) -> std::result::Result<Option<(Address, Vec<Address>)>, AddressError> {
        let insecure = self.remote.insecure_http;
        if let Some(file) = &self.remote.url_file {
            let mut all = Address::of_file(file, insecure)?;
            let given = all.remove(0);
            return Ok(Some((given, all)));
        }
        match &self.model {
            Some(model) if is_url(model) => {
                let given = Address::parse(&model.to_string_lossy(), insecure)?;
                Ok(Some((given, Vec::new())))
            }
            _ => Ok(None),
        }
    }

    /// The directory of a command. If the model's address comes from a file, it is the only path.
    pub fn directory(&self, given: Option<&PathBuf>) -> Result<PathBuf> {
        let directory = self.take_directory(given)?;
        directory.ok_or_else(|| Failure::usage("a directory is needed").hint("name one"))
    }

    /// The same for a command that need not have one.
    pub fn take_directory(&self, given: Option<&PathBuf>) -> Result<Option<PathBuf>> {
        #[cfg(feature = "remote")]
        if self.remote.url_file.is_some() {
            return match (&self.model, given) {
                (Some(_), Some(_)) => {
                    Err(Failure::usage("--url-file takes the place of the model")
                        .hint("name the directory alone"))
                }
                (only, _) => Ok(only.clone()),
            };
        }
        Ok(given.cloned())
    }
}

#[cfg(feature = "remote")]
impl RemoteArgs {
    fn options(&self) -> Options {
        Options {
            insecure_http: self.insecure_http,
            // A mount is made by a process that is in another folder.
            url_file: self.url_file.as_deref().and_then(|f| absolute(f).ok()),
            unpinned: self.unpinned,
            offline: self.offline,
            cache_folder: self.cache_dir.clone(),
            cache_bytes: self.cache_size,
            needs_cache: false,
        }
    }
}
