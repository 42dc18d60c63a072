//! Downloads that have not finished, recognised by the names that programs give them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// A suffix that programs add to the name of an incomplete file, or to that of a file which they
/// keep beside it until it is complete; and how to finish the download.
pub struct Mark(&'static str, &'static str);

pub const MARKS: [Mark; 22] = [
    Mark(".aria2", "continue it with `aria2c -c`"), // also KoboldCpp, which calls aria2
    Mark(".aria2__temp", RESTART),                  // aria2, of its control file
    Mark(".st", "continue it with `axel`"),
    Mark(".part", RESTART), // Firefox, wget2, Transmission, KTorrent, LM Studio
    Mark(".partial", RESTART), // Internet Explorer, rsync with a folder of parts
    Mark("-partial", RESTART), // Ollama
    Mark(".incomplete", RESTART), // the Hugging Face Hub
    Mark(".crdownload", RESTART), // Chrome and Edge
    Mark(".opdownload", RESTART), // Opera
    Mark(".download", RESTART), // Safari
    Mark(".downloading", RESTART), // several app stores and managers
    Mark(".downloadInProgress", RESTART), // llama.cpp
    Mark(".tmp", RESTART),  // copies by many programs
    Mark(".!qB", RESTART),  // qBittorrent
    Mark(".!ut", RESTART),  // µTorrent
    Mark(".!bt", RESTART),  // BitTorrent
    Mark(".!bc", RESTART),  // BitComet
    Mark(".bc!", RESTART),  // BitComet, older
    Mark(".az!", RESTART),  // Vuze
    Mark(".fdmdownload", RESTART), // Free Download Manager
    Mark(".filepart", RESTART), // WinSCP
    Mark(".lftp-pget-status", RESTART), // lftp
];
const RESTART: &str = "let it finish, or start it again";

impl Mark {
    /// Whether a file's own name has it, in whatever case.
    pub fn is_on(&self, name: &OsStr) -> bool {
        let (name, mark) = (name.as_bytes(), self.0.as_bytes());
        name.len() > mark.len() && name[name.len() - mark.len()..].eq_ignore_ascii_case(mark)
    }

    /// The name of a file with the mark added.
    pub fn added_to(&self, name: &OsStr) -> OsString {
        OsString::from_vec([name.as_bytes(), self.0.as_bytes()].concat())
    }
}

/// Advice for a file whose download has not finished, as its own name or a file beside it shows;
/// `None` if neither does.
pub fn advice(path: &Path) -> Option<String> {
    let name = path.file_name()?;
    if MARKS.iter().any(|mark| mark.is_on(name)) {
        return Some(format!(
            "{name:?} is what programs call a download that has not finished: {RESTART}"
        ));
    }
    let exists = |mark: &&Mark| {
        let beside = path.with_file_name(mark.added_to(name));
        beside.symlink_metadata().is_ok()
    };
    let mark = MARKS.iter().find(exists)?;
    let beside = mark.added_to(name);
    Some(format!(
        "{beside:?} beside it shows that its download has not finished: {}",
        mark.1
    ))
}

/// The name under which a file's download lies in a folder until it is complete.
pub fn download_of(folder: &Path, name: &OsStr) -> Option<OsString> {
    let mut downloads = MARKS.iter().map(|mark| mark.added_to(name));
    downloads.find(|download| folder.join(download).symlink_metadata().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_downloads_are_those_that_end_in_a_mark() {
        let is_marked = |name: &[u8]| {
            let name = OsStr::from_bytes(name);
            MARKS.iter().any(|mark| mark.is_on(name))
        };
        for name in [
            &b"m.gguf.part"[..],
            b"mod\xe8le.gguf.crdownload",
            b"sha256-00ff-partial",
            b"m.gguf.downloadInProgress",
            b"m.gguf.!qb",
        ] {
            assert!(is_marked(name), "{name:?}");
        }
        for name in [
            &b"m.gguf"[..],
            b"m.part.gguf",
            b"m.gguf.part1of2",
            b"partial",
            b".part",
        ] {
            assert!(!is_marked(name), "{name:?}");
        }
    }
}
