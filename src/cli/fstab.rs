//! Options as mount(8) and /etc/fstab say them, and `mount.fuse.odmoe`, the name by which mount(8)
//! calls this program: `mount.fuse.odmoe MODEL DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::{Args, Command};

use super::mount::MountArgs;

/// The name of the helper, which is a link to this program.
const HELPER: &str = "mount.fuse.odmoe";

/// Options of every file system, which are mount(8)'s and systemd's business, or say what a mount of ours
/// is anyhow or can never be.
const EVERY_FILE_SYSTEMS: &[&str] = &[
    "async",
    "atime",
    "auto",
    "comment",
    "default_permissions",
    "defaults",
    "dev",
    "diratime",
    "exec",
    "group",
    "helper",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nouser",
    "owner",
    "relatime",
    "ro",
    "rw",
    "silent",
    "strictatime",
    "suid",
    "sync",
    "user",
    "users",
    "_netdev",
];

/// One option of a list in the words of our command line; `None` if it says nothing to us.
fn flag(option: &str) -> Result<Option<OsString>, String> {
    let (name, value) = match option.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (option, None),
    };
    if option.is_empty()
        || EVERY_FILE_SYSTEMS.contains(&name)
        || name.starts_with("x-")
        || name.starts_with("X-")
    {
        return Ok(None);
    }
    let long = name.replace('_', "-");
    let command = MountArgs::augment_args(Command::new("mount"));
    if !command
        .get_arguments()
        .any(|argument| argument.get_long() == Some(&long))
    {
        return Err(format!("-o {option}: there is no such option"));
    }
    Ok(Some(match value {
        Some(value) => format!("--{long}={value}").into(),
        None => format!("--{long}").into(),
    }))
}

/// All options of some lists; with `is_sloppy` those that do not exist are left out.
pub fn flags<'a>(
    lists: impl IntoIterator<Item = &'a str>,
    is_sloppy: bool,
) -> Result<Vec<OsString>, String> {
    let options = lists.into_iter().flat_map(|list| list.split(','));
    options
        .filter_map(|option| flag(option).transpose())
        .filter(|flag| !(is_sloppy && flag.is_err()))
        .collect()
}

/// A call by mount(8).
pub struct HelperCall {
    /// The same in the words of our command line.
    pub arguments: Vec<OsString>,
    /// To check all, and mount nothing (`mount -f`).
    pub is_fake: bool,
}

impl HelperCall {
    /// `None` if this program was called by its own name.
    pub fn of(arguments: &[OsString]) -> Option<Result<Self, String>> {
        let program = Path::new(arguments.first()?).file_name()?;
        (program == HELPER).then(|| Self::parse(&arguments[1..]))
    }

    fn parse(arguments: &[OsString]) -> Result<Self, String> {
        let (mut lists, mut places) = (Vec::new(), Vec::new());
        let (mut is_fake, mut is_sloppy, mut verbose) = (false, false, false);
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.to_str() {
                Some("-o") => lists.push(text(rest.next())?),
                // The type is known, and a namespace is entered by mount(8) itself.
                Some("-t" | "-N") => drop(rest.next()),
                Some(letters) if letters.len() > 1 && letters.starts_with('-') => {
                    for letter in letters[1..].chars() {
                        match letter {
                            'f' => is_fake = true,
                            's' => is_sloppy = true,
                            'v' => verbose = true,
                            'n' => {} // there is no table to keep out of
                            _ => {
                                return Err(format!(
                                    "{HELPER}: -{letter}: there is no such option"
                                ));
                            }
                        }
                    }
                }
                _ => places.push(argument.clone()),
            }
        }
        if places.len() != 2 {
            return Err(format!(
                "usage: {HELPER} MODEL.gguf DIR [-sfnv] [-o OPTIONS]"
            ));
        }
        let mut arguments = vec![OsString::from("odmoe-fs"), "mount".into()];
        arguments.extend(verbose.then(|| OsString::from("-v")));
        arguments.extend(flags(lists, is_sloppy)?);
        arguments.push("--".into());
        arguments.extend(places);
        Ok(Self { arguments, is_fake })
    }
}

fn text(argument: Option<&OsString>) -> Result<&str, String> {
    argument
        .map(OsString::as_os_str)
        .and_then(OsStr::to_str)
        .ok_or_else(|| format!("{HELPER}: -o needs options"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &str) -> Result<String, String> {
        let flags = flags([list], false)?;
        Ok(flags.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[test]
    fn options_of_fstab_become_ours_and_those_of_others_are_left_out() {
        let list = "rw,noauto,x-systemd.automount,user=me,,allow_other,uid=7,keep-source-cache,cache=direct";
        let ours = "--allow-other --uid=7 --keep-source-cache --cache=direct";
        assert_eq!(words(list).unwrap(), ours);
        assert!(words("frobnicate=1").unwrap_err().contains("frobnicate"));
    }

    #[test]
    fn a_call_by_mount_is_understood() {
        let parse = |line: &str| {
            let words: Vec<_> = line.split(' ').map(OsString::from).collect();
            HelperCall::parse(&words)
        };
        let call = parse("/m.gguf /mnt -sv -o rw,what,gid=3 -t fuse.odmoe").unwrap();
        let expected = [
            "odmoe-fs", "mount", "-v", "--gid=3", "--", "/m.gguf", "/mnt",
        ];
        assert_eq!(call.arguments, expected);
        assert!(!call.is_fake && parse("/m.gguf /mnt -f").unwrap().is_fake);
        assert!(parse("/m.gguf /mnt -o what").is_err());
        assert!(parse("/m.gguf").is_err());
    }
}
