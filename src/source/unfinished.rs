//! Downloads that have not finished, recognised by the names that programs give them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What programs append to the name of a file until its download is complete, in lower case.
const ENDINGS: &[&str] = &[
    ".part",
    ".partial",
    "-partial",
    ".incomplete",
    ".crdownload",
    ".download",
    ".downloadinprogress",
    ".opdownload",
    ".aria2__temp",
    ".filepart",
    ".tmp",
    ".!qb",
    ".!ut",
];
/// What they lay beside a file until then, and what to do.
const BESIDE: &[(&str, &str)] = &[
    (".aria2", "go on with `aria2c -c`"), // the only one that makes the file as long at once
    (".st", "go on with `axel`"),
    (".part", WAIT),
    (".crdownload", WAIT),
    (".downloadInProgress", WAIT),
];
const WAIT: &str = "let it finish, or start it again";

/// Advice for a file whose download has not finished, as its own name or a file beside it shows;
/// `None` if neither does.
pub(super) fn advice(path: &Path) -> Option<String> {
    by_name(path).or_else(|| BESIDE.iter().find_map(|beside| by_neighbour(path, beside)))
}

/// The same of a file that is as long as it should be, as some programs make it at the start. Asks
/// the file system one thing only, since a model may have a thousand parts.
pub(super) fn advice_if_whole(path: &Path) -> Option<String> {
    by_name(path).or_else(|| by_neighbour(path, &BESIDE[0]))
}

fn by_name(path: &Path) -> Option<String> {
    let name = path.file_name().filter(|name| has_ending(name))?;
    Some(format!(
        "{name:?} is what programs call a download that has not finished: {WAIT}"
    ))
}

fn by_neighbour(path: &Path, &(ending, go_on): &(&str, &str)) -> Option<String> {
    let mut beside = path.file_name()?.to_owned();
    beside.push(ending);
    let is_there = path.with_file_name(&beside).symlink_metadata().is_ok();
    is_there
        .then(|| format!("{beside:?} beside it shows that its download has not finished: {go_on}"))
}

/// The name under which a file's download may be found while it lasts.
pub(super) fn download_of(folder: &Path, name: &OsStr) -> Option<OsString> {
    let endings = ENDINGS
        .iter()
        .copied()
        .chain([".downloadInProgress", ".!qB", ".!ut"]);
    endings
        .map(|ending| {
            let mut download = name.to_owned();
            download.push(ending);
            download
        })
        .find(|download| folder.join(download).symlink_metadata().is_ok())
}

fn has_ending(name: &OsStr) -> bool {
    let name = name.as_bytes().to_ascii_lowercase();
    ENDINGS
        .iter()
        .any(|ending| name.ends_with(ending.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_downloads_are_recognised_whatever_else_is_in_them() {
        for name in [
            &b"m.gguf.part"[..],
            b"m.gguf.incomplete",
            b"mod\xe8le.gguf.crdownload",
            b"sha256-00ff-partial",
            b"m.gguf.downloadInProgress",
            b"m.gguf.!qB",
            b"m.gguf.tmp",
        ] {
            assert!(has_ending(OsStr::from_bytes(name)), "{name:?}");
        }
        for name in [&b"m.gguf"[..], b"part.gguf", b"m.gguf.part1of2", b"partial"] {
            assert!(!has_ending(OsStr::from_bytes(name)), "{name:?}");
        }
    }
}
