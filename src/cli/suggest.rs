//! What somebody meant who typed what other programs call it.
//!
//! The problem: users come from the converter that this program replaces (mlx-od-moe), from
//! llama.cpp, mount(8) and cp, and type what these take. clap's own suggestions go by spelling, and
//! do not find what is called otherwise.

use std::ffi::OsString;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue};

/// Commands that do not exist, and what to type instead.
const COMMANDS: &[(&[&str], &str)] = &[
    (
        &["convert", "export", "extract", "split", "unpack", "write"],
        "nothing needs to be converted: 'odmoe-fs mount MODEL.gguf DIR' shows the files at once, \
         'odmoe-fs materialize MODEL.gguf DIR' writes them",
    ),
    (
        &["chat", "generate", "run", "serve", "server"],
        "odmoe-fs shows files and computes nothing: 'odmoe-fs mount MODEL.gguf DIR', then point \
         the loader or server at DIR",
    ),
    (
        &["download", "pull"],
        "'odmoe-fs mount URL DIR' shows a model that is elsewhere and fetches what is read; \
         'odmoe-fs fetch URL' fetches it beforehand",
    ),
    (
        &[
            "cat", "dump", "info", "ls", "list", "metadata", "show", "tree",
        ],
        "'odmoe-fs inspect MODEL.gguf' shows what is in a model, 'odmoe-fs status' which are \
         mounted",
    ),
    (
        &["df", "mounts", "ps"],
        "'odmoe-fs status' lists the mounts",
    ),
    (
        &["check", "cmp", "compare", "diff", "fsck", "validate"],
        "'odmoe-fs verify MODEL.gguf' checks a model, 'odmoe-fs verify MODEL.gguf DIR' a tree",
    ),
    (
        &["heat", "monitor", "stats"],
        "'odmoe-fs top DIR' shows what a mount made with --stats has counted",
    ),
    (
        &["create", "create-toy-model", "make", "new"],
        "'odmoe-fs toy OUT.gguf' writes a small model",
    ),
];

/// Options that do not exist, by the command where they were typed (or all), and what to type
/// instead.
const OPTIONS: &[(&[&str], &[&str], &str)] = &[
    (
        &["toy"],
        &["--out", "--outfile", "--output", "-o"],
        "the file to write needs no option: 'odmoe-fs toy OUT.gguf'",
    ),
    (&["toy"], &["--num-layers"], "use '--layers N'"),
    (&["toy"], &["--num-experts"], "use '--experts N'"),
    (&["toy"], &["--vocab-size"], "use '--vocab N'"),
    (
        &[],
        &["--gguf", "--input", "--model", "-i", "-m"],
        "the model needs no option, and comes first, as in 'odmoe-fs mount MODEL.gguf DIR'",
    ),
    (
        &[],
        &[
            "--dir",
            "--out",
            "--outdir",
            "--output",
            "--output-dir",
            "-o",
        ],
        "the directory needs no option, and comes after the model, as in 'odmoe-fs materialize \
         MODEL.gguf DIR'",
    ),
    (
        &["materialize"],
        &["--num-layers"],
        "the model says how many layers it has; '--layers 0-3' writes the experts of some",
    ),
    (
        &["materialize"],
        &["--num-experts"],
        "the model says how many experts it has; '--experts 0,5' writes some of each layer",
    ),
    (
        &[],
        &["--num-experts", "--num-layers"],
        "leave it out: the model says how many it has",
    ),
    (
        &["materialize", "verify"],
        &[
            "--num-workers",
            "--parallel",
            "--threads",
            "--workers",
            "-j",
        ],
        "use '--jobs N'",
    ),
    (
        &["materialize"],
        &["--overwrite", "-f"],
        "'--force' replaces files that are in the way",
    ),
    (
        &["mount"],
        &["--read-only", "-r"],
        "leave it out: a mount is always read-only",
    ),
    (
        &["mount"],
        &["--debug", "-d"],
        "'odmoe-fs -vv mount -f MODEL.gguf DIR' shows every request",
    ),
    (
        &["mount"],
        &["--allow-root"],
        "'--allow-other' lets root in, too",
    ),
    (
        &["mount"],
        &["--background", "--daemon"],
        "leave it out: a mount goes to the background by itself",
    ),
    (
        &["umount"],
        &["--force", "-f", "-l", "-z"],
        "'--lazy' takes away a mount that is in use",
    ),
];

/// Puts what was meant into the error, in place of clap's guess, if it is known.
pub fn improve(error: &mut clap::Error, arguments: &[OsString]) {
    if let Some(tip) = tip(error, arguments) {
        error.remove(ContextKind::SuggestedArg);
        error.remove(ContextKind::SuggestedSubcommand);
        let tips = ContextValue::StyledStrs(vec![StyledStr::from(tip)]);
        error.insert(ContextKind::Suggested, tips);
    }
}

fn tip(error: &clap::Error, arguments: &[OsString]) -> Option<&'static str> {
    let typed = |kind| match error.get(kind) {
        Some(ContextValue::String(typed)) => Some(typed.as_str()),
        _ => None,
    };
    if let Some(command) = typed(ContextKind::InvalidSubcommand) {
        let known = COMMANDS.iter().find(|(names, _)| names.contains(&command));
        return known.map(|(_, tip)| *tip);
    }
    let option = typed(ContextKind::InvalidArg)?;
    let known = OPTIONS.iter().find(|(commands, options, _)| {
        let here = commands.is_empty() || commands.iter().any(|c| arguments.iter().any(|a| a == c));
        here && options.contains(&option)
    });
    known.map(|(_, _, tip)| *tip)
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory};

    use super::super::Cli;
    use super::*;

    /// Whether a command, or one of them all, takes an option.
    fn takes(command: Option<&Command>, option: &str) -> bool {
        let program = Cli::command();
        let commands = match command {
            Some(command) => vec![command],
            None => program.get_subcommands().collect(),
        };
        let is = |argument: &clap::Arg| {
            argument
                .get_long()
                .map(|long| format!("--{long}"))
                .as_deref()
                == Some(option)
                || argument
                    .get_short()
                    .map(|short| format!("-{short}"))
                    .as_deref()
                    == Some(option)
        };
        let globals = program.get_arguments().filter(|a| a.is_global_set());
        let mut arguments = commands
            .iter()
            .flat_map(|c| c.get_arguments())
            .chain(globals);
        arguments.any(is)
    }

    #[test]
    fn nothing_that_exists_is_taken_for_something_else() {
        let program = Cli::command();
        for name in COMMANDS.iter().flat_map(|(names, _)| *names) {
            assert!(program.find_subcommand(name).is_none(), "{name}");
        }
        for (commands, options, _) in OPTIONS {
            for option in *options {
                for command in *commands {
                    assert!(
                        !takes(program.find_subcommand(command), option),
                        "{command} {option}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_tip_names_commands_and_options_that_exist() {
        let program = Cli::command();
        let tips = COMMANDS.iter().map(|(_, tip)| *tip);
        for tip in tips.chain(OPTIONS.iter().map(|(_, _, tip)| *tip)) {
            for line in tip.split('\'').skip(1).step_by(2) {
                let mut words = line.split(' ');
                let command = words.find(|word| program.find_subcommand(word).is_some());
                assert!(command.is_some() == line.starts_with("odmoe-fs"), "{line}");
            }
            for option in tip.split([' ', '\'']).filter(|word| word.starts_with("--")) {
                assert!(takes(None, option), "{option}");
            }
        }
    }
}
