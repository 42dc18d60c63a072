//! `man` and `completions`, generated from the definition of the command line.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::failure::{Context, EXIT_STATUSES, Failure, Result};
use super::{Cli, print};

/// Print the manual page of odmoe-fs, or of one of its commands
///
/// To read it: odmoe-fs man | man -l -
#[derive(clap::Args)]
pub struct ManArgs {
    /// The command
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
    /// Write the pages of all commands to a directory instead
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    all: Option<PathBuf>,
}

/// Print a script that completes command lines in a shell
///
/// For bash: odmoe-fs completions bash > ~/.local/share/bash-completion/completions/odmoe-fs
#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    shell: Shell,
}

pub fn complete(args: &CompletionsArgs) -> Result<()> {
    let mut out = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "odmoe-fs", &mut out);
    // For bash, clap_complete 4.6 names the commands of a program with a hyphen in two ways, so
    // that their options would not be found.
    print(&text(out)?.replace("odmoe__subcmd__fs", "odmoe__fs"))
}

pub fn man(args: &ManArgs) -> Result<()> {
    // `help` has no page of its own: --help says the same.
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build(); // so that commands know their full names
    if let Some(folder) = &args.all {
        return write_all(&program, folder);
    }
    let page = match &args.command {
        None => page(&program)?,
        Some(name) => match program.find_subcommand(name) {
            Some(command) => page(command)?,
            None => {
                let failure = Failure::usage(format!("there is no command {name:?}"));
                return Err(failure.hint("choose one of those that `odmoe-fs --help` lists"));
            }
        },
    };
    print(&page)
}

fn write_all(program: &Command, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {folder:?}"))?;
    let write = |name: &str, page: &str| {
        let path = folder.join(format!("{name}.1"));
        fs::write(&path, page).with_context(|| format!("cannot write {path:?}"))
    };
    for command in std::iter::once(program).chain(program.get_subcommands()) {
        write(name(command), &page(command)?)?;
        for alias in command.get_visible_aliases() {
            // The page of an alias is that of its command.
            let source = format!(".so man1/{}.1\n", name(command));
            write(&format!("{}-{alias}", name(program)), &source)?;
        }
    }
    Ok(())
}

/// The name of a built command: `odmoe-fs` or `odmoe-fs-mount`.
fn name(command: &Command) -> &str {
    command.get_display_name().unwrap_or(command.get_name())
}

fn page(command: &Command) -> Result<String> {
    let page = Man::new(command.clone()).source(concat!("odmoe-fs ", env!("CARGO_PKG_VERSION")));
    let mut out = Vec::new();
    page.render(&mut out)?;
    let mut roff = Roff::new();
    section(&mut roff, "EXIT STATUS", &EXIT_STATUSES);
    let is_program = command.get_name() == "odmoe-fs";
    if is_program {
        section(&mut roff, "FILES", &FILES);
        section(&mut roff, "ENVIRONMENT", &ENVIRONMENT);
        section(&mut roff, "EXAMPLES", &EXAMPLES);
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(match is_program {
        true => "mount(8), fstab(5), fuse(8), fusermount3(1)",
        false => "odmoe-fs(1)",
    })]);
    roff.to_writer(&mut out)?;
    text(out)
}

fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| Failure::unknown(&e))
}

fn section(roff: &mut Roff, title: &str, entries: &[(&str, &str)]) {
    roff.control("SH", [title]);
    for (name, meaning) in entries {
        roff.control("TP", [])
            .text([bold(*name)])
            .text([roman(*meaning)]);
    }
}

/// Files that the program uses.
const FILES: [(&str, &str); 3] = [
    (
        "/dev/fuse",
        "The FUSE device. Mounting needs the right to open it.",
    ),
    (
        "/etc/fuse.conf",
        "Its line user_allow_other lets users pass --allow-other; mount_max limits their mounts.",
    ),
    (
        "/sbin/mount.fuse.odmoe",
        "A link to this program, for mount -t fuse.odmoe and for /etc/fstab.",
    ),
];
const ENVIRONMENT: [(&str, &str); 4] = [
    ("NO_COLOR", "If set, nothing is coloured."),
    (
        "TERM",
        "If dumb, nothing is coloured, bars are ASCII, and top has no live view.",
    ),
    (
        "FUSERMOUNT_PATH",
        "The mount helper for users, instead of the fusermount3 on PATH.",
    ),
    (
        "NOTIFY_SOCKET",
        "The socket on which mount -f tells systemd that it is ready.",
    ),
];
const EXAMPLES: [(&str, &str); 4] = [
    (
        "odmoe-fs mount model-00001-of-00009.gguf /mnt/odmoe",
        "Mount a model of nine parts.",
    ),
    (
        "mount -t fuse.odmoe -o allow_other /models/model.gguf /mnt/odmoe",
        "The same with mount(8), for every user.",
    ),
    (
        "/models/model.gguf /mnt/odmoe fuse.odmoe allow_other,nofail 0 0",
        "The same as a line of /etc/fstab.",
    ),
    (
        "odmoe-fs verify model.gguf /mnt/odmoe",
        "Compare a tree with its model, byte for byte.",
    ),
];
