//! Options as in mount(8) and /etc/fstab, and `mount.fuse.odmoe`, the name by which mount(8)
//! calls this program: `mount.fuse.odmoe MODEL DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::{Args, Command};
use odmoe_fs::show::Show;

use super::failure::{Failure, Result};
use super::mount::MountArgs;

/// The name of the helper, which is a link to this program.
const HELPER: &str = "mount.fuse.odmoe";

/// How mount(8) calls it.
const USAGE: &str = "usage: mount.fuse.odmoe MODEL.gguf DIR [-sfnv] [-o OPTIONS]";

/// Options of every file system, as mount(8) and libmount list them. They are mount(8)'s and
/// systemd's business, or ask for what a read-only tree is anyway, or can never be.
const EVERY_FILE_SYSTEMS: &[&str] = &[
    "_netdev",
    "_rnetdev",
    "async",
    "atime",
    "auto",
    "comment",
    "default_permissions",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "group",
    "helper",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "nogroup",
    "noiversion",
    "nolazytime",
    "nomand",
    "noowner",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "nouser",
    "nousers",
    "owner",
    "relatime",
    "ro",
    "rw",
    "silent",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "uhelper",
    "user",
    "users",
];

/// Options that label a mount for SELinux.
const SECURITY_LABELS: [&str; 4] = ["context", "defcontext", "fscontext", "rootcontext"];
/// It exists where SELinux is on. Elsewhere its labels mean nothing, and mount(8) drops them, too.
const SELINUX: &str = "/sys/fs/selinux/enforce";

/// Options that users of other file systems know, and what to do instead.
const REFUSED: &[(&[&str], &str)] = &[
    (
        &["encryption", "loop", "offset", "sizelimit"],
        "leave it out: a model is read as a file, without a loop device",
    ),
    (
        &["remount"],
        "unmount and mount again, or use `odmoe-fs mount --replace`",
    ),
    (&["allow_root"], "use allow_other, which lets root in, too"),
    (&["direct_io"], "use cache=direct"),
    (&["max_readahead"], "use readahead=SIZE"),
    (
        &["idle_threads", "max_idle_threads", "max_threads"],
        "use threads=N",
    ),
    (
        &["auto_unmount"],
        "leave it out: the next mount on the directory repairs one whose process was killed",
    ),
    (
        &["umask", "fmask", "dmask"],
        "leave it out: files are 0444 and directories 0555, and uid= and gid= set the owner",
    ),
    (
        &[
            "ac_attr_timeout",
            "attr_timeout",
            "auto_cache",
            "big_writes",
            "entry_timeout",
            "fsname",
            "hard_remove",
            "intr",
            "kernel_cache",
            "max_read",
            "max_write",
            "negative_timeout",
            "noauto_cache",
            "subtype",
            "use_ino",
        ],
        "leave it out: it is an option of libfuse, which odmoe-fs does without",
    ),
];

/// One option of a list as an argument of our command line; `None` if we can ignore it.
fn flag(option: &str) -> Result<Option<OsString>> {
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
    if SECURITY_LABELS.contains(&name) {
        let label = format!("--security-label={option}");
        return Ok(Path::new(SELINUX).exists().then(|| label.into()));
    }
    let long = name.replace('_', "-");
    let command = MountArgs::augment_args(Command::new("mount"));
    if !command
        .get_arguments()
        .any(|argument| argument.get_long() == Some(&long))
    {
        let known = REFUSED.iter().find(|(names, _)| names.contains(&name));
        let hint = known.map_or("`odmoe-fs mount --help` lists the options", |(_, hint)| {
            hint
        });
        let message = format!("-o {option}: there is no such option");
        return Err(Failure::usage(message).hint(hint));
    }
    Ok(Some(match value {
        Some(value) => format!("--{long}={}", unquoted(value)).into(),
        None => format!("--{long}").into(),
    }))
}

/// A value without the double quotes that keep its commas together.
fn unquoted(value: &str) -> &str {
    let inner = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
    inner.unwrap_or(value)
}

/// The options of a list, which commas separate except in double quotes, as in labels.
fn options(list: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    list.split(move |c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    })
}

/// All options of some lists; with `is_sloppy` unknown ones are dropped.
pub fn flags<'a>(
    lists: impl IntoIterator<Item = &'a str>,
    is_sloppy: bool,
) -> Result<Vec<OsString>> {
    let mut joined: Vec<Cow<str>> = Vec::new();
    for option in lists.into_iter().flat_map(options) {
        match joined.last_mut() {
            // Its value is a list, too, and no option has the name of an item.
            Some(last) if last.starts_with("show=") && option.parse::<Show>().is_ok() => {
                last.to_mut().push(',');
                last.to_mut().push_str(option);
            }
            _ => joined.push(option.into()),
        }
    }
    let options = joined.iter();
    options
        .filter_map(|option| flag(option).transpose())
        .filter(|flag| !(is_sloppy && flag.is_err()))
        .collect()
}

/// A call by mount(8).
pub struct HelperCall {
    /// The same as a command line of ours.
    pub arguments: Vec<OsString>,
    /// Whether to check everything and mount nothing (`mount -f`).
    pub is_fake: bool,
}

impl HelperCall {
    /// `None` if this program was called by its own name.
    pub fn of(arguments: &[OsString]) -> Option<Result<Self>> {
        let program = Path::new(arguments.first()?).file_name()?;
        (program == HELPER).then(|| Self::parse(&arguments[1..]))
    }

    fn parse(arguments: &[OsString]) -> Result<Self> {
        let (mut lists, mut places) = (Vec::new(), Vec::new());
        let (mut is_fake, mut is_sloppy, mut verbose) = (false, false, false);
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.to_str() {
                Some("-o") => lists.push(text(rest.next())?),
                // The type is known, and mount(8) itself enters the namespace.
                Some("-t" | "-N") => drop(rest.next()),
                Some(letters) if letters.len() > 1 && letters.starts_with('-') => {
                    for letter in letters[1..].chars() {
                        match letter {
                            'f' => is_fake = true,
                            's' => is_sloppy = true,
                            'v' => verbose = true,
                            'n' => {} // there is no table to keep out of
                            _ => {
                                let message = format!("-{letter}: there is no such option");
                                return Err(Failure::usage(message).hint(USAGE));
                            }
                        }
                    }
                }
                _ => places.push(argument.clone()),
            }
        }
        if places.len() != 2 {
            let message = "a model and a directory are needed, and nothing else";
            return Err(Failure::usage(message).hint(USAGE));
        }
        let mut arguments = vec![OsString::from("odmoe-fs"), "mount".into()];
        arguments.extend(verbose.then(|| OsString::from("-v")));
        arguments.extend(flags(lists, is_sloppy)?);
        arguments.push("--".into());
        arguments.extend(places);
        Ok(Self { arguments, is_fake })
    }
}

fn text(argument: Option<&OsString>) -> Result<&str> {
    argument
        .map(OsString::as_os_str)
        .and_then(OsStr::to_str)
        .ok_or_else(|| Failure::usage("-o needs options").hint(USAGE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &str) -> String {
        let flags = flags([list], false).unwrap();
        flags.join(OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn options_of_fstab_become_ours_and_those_of_others_are_left_out() {
        let list = "rw,noauto,x-systemd.automount,user=me,,allow_other,uid=7,keep-source-cache,\
            cache=direct";
        let ours = "--allow-other --uid=7 --keep-source-cache --cache=direct";
        assert_eq!(words(list), ours);
        let refused = flags(["frobnicate=1"], false).unwrap_err();
        assert_eq!(refused.message, "-o frobnicate=1: there is no such option");
        assert_eq!(
            refused.hint.unwrap(),
            "`odmoe-fs mount --help` lists the options"
        );
    }

    #[test]
    fn every_option_that_mount_documents_for_all_file_systems_is_accepted() {
        let list = "async,atime,noatime,auto,noauto,context=\"u:r:t:s0:c1,c2\",fscontext=a,\
            defcontext=b,rootcontext=@target,defaults,dev,nodev,diratime,nodiratime,dirsync,exec,\
            noexec,group,iversion,noiversion,mand,nomand,_netdev,nofail,relatime,norelatime,strictatime,\
            nostrictatime,lazytime,nolazytime,suid,nosuid,silent,loud,owner,ro,rw,sync,user,nouser,\
            users,X-mount.mkdir=0755,X-mount.subdir=a,x-systemd.requires=b,nosymfollow,comment=c,\
            user=me,uhelper=udisks2,helper=d,ro=recursive";
        // Labels are handed on where SELinux is on.
        let ours = words(list);
        let mut ours = ours.split_whitespace();
        assert!(ours.all(|word| word.starts_with("--security-label=")));
    }

    #[test]
    fn commas_in_quotes_do_not_separate() {
        let parts = |list| options(list).collect::<Vec<_>>();
        assert_eq!(
            parts(r#"ro,context="a:s0:c1,c2",uid=7"#),
            ["ro", r#"context="a:s0:c1,c2""#, "uid=7"]
        );
        assert_eq!(parts(r#"a="b,c"#), [r#"a="b,c"#]);
        assert_eq!(parts(""), [""]);
        assert_eq!(words(r#"log_file="/a,b""#), "--log-file=/a,b");
        assert_eq!(
            words("ro,show=base,hf,uid=7,as=mlx"),
            "--show=base,hf --uid=7 --as=mlx"
        );
        assert_eq!(words(r#"show="base,hf",uid=7"#), "--show=base,hf --uid=7");
    }

    #[test]
    fn an_option_of_another_file_system_is_refused_with_what_to_do_instead() {
        for (option, hint) in [
            ("allow_root", "allow_other"),
            ("remount", "--replace"),
            ("loop=/dev/loop0", "loop device"),
            ("direct_io", "cache=direct"),
            ("attr_timeout=1", "libfuse"),
            ("umask=022", "0444"),
        ] {
            let refused = flags([option], false).unwrap_err();
            assert!(refused.hint.unwrap().contains(hint), "{option}");
            assert!(flags([option], true).unwrap().is_empty());
        }
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
