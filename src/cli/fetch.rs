//! `fetch`: fills the cache with a remote model, or a part of it.

use std::sync::atomic::{AtomicUsize, Ordering};

use odmoe_fs::layout::METADATA_GGUF_PATH;
use odmoe_fs::materialize::{Numbers, Selection};
use odmoe_fs::model::Model;
use odmoe_fs::source::Run;
use odmoe_fs::source::remote::{EDGE_BYTES, RECORD_BYTES, REQUESTS, RemotePart, piece_end};
use odmoe_fs::work::Progress;
use parking_lot::Mutex;

use super::failure::{Failure, Result};
use super::progress::Meter;
use super::{ModelArg, Stop, say, text};

/// Fill the cache with a model that is elsewhere, or with a part of it
///
/// Later mounts read from the cache what is in it, with --offline without asking its server. After an
/// interruption, the same command goes on where it was.
#[derive(clap::Args)]
pub struct FetchArgs {
    #[command(flatten)]
    model: ModelArg,
    /// Fetch only base_model/
    #[arg(long, conflicts_with_all = ["experts_only", "layers", "experts"])]
    base_only: bool,
    /// Fetch only the experts
    #[arg(long)]
    experts_only: bool,
    /// Fetch only the experts of these layers, such as 0-3,7
    #[arg(long, value_name = "LIST")]
    layers: Option<Numbers>,
    /// Fetch only the experts with these numbers, such as 0,5
    #[arg(long, value_name = "LIST")]
    experts: Option<Numbers>,
}

pub fn run(args: &FetchArgs, quiet: bool) -> Result<()> {
    // Whatever a signal leaves unfinished, the cache does not count as there.
    let _stop = Stop::at_once(false)?;
    let model = args.model.open_to_cache()?;
    let parts: Vec<&RemotePart> = model.source().remote_parts().collect();
    if parts.iter().any(|part| !part.has_cache()) {
        return Err(Failure::new("there is no cache to fill")
            .hint("leave out --cache-size 0, and name a folder with --cache-dir"));
    }
    let pieces = pieces(&model, &args.selection(&model)?);
    for (part, number) in parts.iter().zip(0..) {
        let of_part = pieces.iter().filter(|run| run.part == number);
        part.spare_cached(of_part.map(Run::range));
    }
    let wanted: u64 = pieces.iter().map(|run| run.len).sum();
    let (needed, room) = (needed(&pieces), parts[0].capacity());
    if needed > room {
        return Err(Failure::new(format!(
            "{} are needed, and the cache may hold only {}",
            text::size(needed),
            text::size(room)
        ))
        .hint("choose --layers or --experts, allow more with --cache-size, or use another disk with --cache-dir"));
    }
    let cached = |run: &Run| parts[run.part as usize].cached_bytes(&run.range());
    let there: u64 = pieces.iter().map(cached).sum();
    let missing: Vec<Run> = pieces
        .iter()
        .filter(|run| cached(run) < run.len)
        .copied()
        .collect();
    let meter = Meter::new(wanted - there, quiet);
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        let mut space = Vec::new();
        while let Some(run) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failed.lock().is_some() {
                return;
            }
            let part = parts[run.part as usize];
            let lacking = run.len - part.cached_bytes(&run.range());
            match part.fill_cache(run.range(), &mut space) {
                // All the rest would be fetched for nothing.
                Ok(()) if cached(run) < run.len => next.store(missing.len(), Ordering::Relaxed),
                Ok(()) => meter.add(Progress {
                    bytes: lacking,
                    files: 0,
                }),
                Err(e) => {
                    failed.lock().get_or_insert(e);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..REQUESTS.min(missing.len()) {
            scope.spawn(work);
        }
    });
    meter.finish();
    if let Some(e) = failed.into_inner() {
        return Err(e.into());
    }
    let lacking: u64 = pieces.iter().map(|run| run.len - cached(run)).sum();
    if lacking > 0 {
        let message = format!("{} could not be kept in the cache", text::size(lacking));
        return Err(Failure::new(message).hint(
            "make room on its disk, allow more with --cache-size, or choose another with --cache-dir",
        ));
    }
    say(&match wanted - there {
        0 => format!(
            "nothing to fetch: all {} that were chosen are in the cache\n",
            text::size(wanted)
        ),
        fetched => format!(
            "fetched {}; all {} that were chosen are in the cache\n",
            text::size(fetched),
            text::size(wanted)
        ),
    });
    Ok(())
}

impl FetchArgs {
    fn selection(&self, model: &Model) -> Result<Selection> {
        let selection = Selection {
            without_base: self.experts_only,
            without_experts: self.base_only,
            layers: self.layers.clone(),
            experts: self.experts.clone(),
        };
        selection.check(model.layout())?;
        Ok(selection)
    }
}

/// Bytes that some pieces take in a cache: with their records, and the blocks of a file system at both
/// ends of those that follow each other.
fn needed(pieces: &[Run]) -> u64 {
    let mut sorted = pieces.to_vec();
    sorted.sort_unstable_by_key(|run| (run.part, run.offset));
    let breaks = sorted
        .windows(2)
        .filter(|two| !two[0].is_followed_by(&two[1]));
    let bytes: u64 = pieces.iter().map(|run| run.len + RECORD_BYTES as u64).sum();
    bytes + (breaks.count() as u64 + 1) * EDGE_BYTES
}

/// The bytes of the model that a selection of its files is made of, in pieces, each once.
fn pieces(model: &Model, selection: &Selection) -> Vec<Run> {
    let files = model.layout().files().iter();
    let chosen = files.filter(|file| selection.takes(file.kind));
    let mut paths: Vec<String> = chosen.map(|file| file.kind.path()).collect();
    if !selection.without_base {
        paths.push(METADATA_GGUF_PATH.to_owned());
    }
    let inos: Vec<_> = paths
        .iter()
        .filter_map(|path| model.tree().find(path))
        .collect();
    let mut pieces = Vec::new();
    for run in model.wanted(&inos) {
        let mut place = run.offset;
        while place < run.offset + run.len {
            let len = piece_end(place).min(run.offset + run.len) - place;
            pieces.push(Run {
                part: run.part,
                offset: place,
                len,
            });
            place += len;
        }
    }
    pieces
}
