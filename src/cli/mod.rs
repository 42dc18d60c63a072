//! The command line: definitions here, one file per command. The only code that prints.

mod demo;
mod diagnostics;
mod docs;
mod doctor;
mod failure;
#[cfg(feature = "remote")]
mod fetch;
mod form;
mod forms;
mod fstab;
mod inspect;
mod materialize;
mod model;
mod mount;
mod progress;
#[cfg(feature = "remote")]
mod reach;
mod screen;
mod show;
mod status;
mod stop;
mod suggest;
mod text;
mod top;
mod toy;
mod umount;
mod verify;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use odmoe_fs::process::{
    close_inherited_descriptors, ignore_file_size_signal, no_new_privileges,
    raise_descriptor_limit, reset_inherited_signals,
};

use self::diagnostics::{Diagnostics, LogFormat, Volume};
use self::failure::{Context, FOUND_SOMETHING, Failure, Result, WRONG_USAGE, exit_code};
use self::fstab::HelperCall;
use self::model::ModelArg;
use self::stop::Stop;

/// Mount a Mixture-of-Experts GGUF model as one small safetensors file per expert, without
/// converting it.
#[derive(Parser)]
#[command(name = "odmoe-fs", version, max_term_width = 100)]
struct Cli {
    /// Print more on stderr; given twice, a mount logs every request of the kernel
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Messages")]
    verbose: u8,
    /// Print only errors on stderr
    #[arg(
        short,
        long,
        global = true,
        conflicts_with = "verbose",
        help_heading = "Messages"
    )]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Mount(mount::MountArgs),
    Umount(umount::UmountArgs),
    Status(status::StatusArgs),
    Materialize(materialize::MaterializeArgs),
    #[cfg(feature = "remote")]
    Fetch(fetch::FetchArgs),
    Verify(verify::VerifyArgs),
    Inspect(inspect::InspectArgs),
    Top(top::TopArgs),
    Toy(toy::ToyArgs),
    Demo(demo::DemoArgs),
    Doctor(doctor::DoctorArgs),
    Man(docs::ManArgs),
    Completions(docs::CompletionsArgs),
}

impl Command {
    /// Whether it may run the set-user-id helper that mounts and unmounts for users.
    fn mounts(&self) -> bool {
        matches!(
            self,
            Self::Mount(_) | Self::Umount(_) | Self::Demo(_) | Self::Doctor(_)
        )
    }

    fn answers_in_json(&self) -> bool {
        match self {
            Self::Status(args) => args.json,
            Self::Verify(args) => args.json,
            Self::Inspect(args) => args.json,
            Self::Doctor(args) => args.json,
            Self::Top(args) => args.json,
            _ => false,
        }
    }
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    match HelperCall::of(&arguments) {
        None => match parse(&arguments) {
            Ok(cli) => execute(&cli),
            Err(e) => usage(&e),
        },
        Some(call) => help_mount(call),
    }
}

/// Why a command line cannot be obeyed.
enum Wrong {
    /// Or a call for help.
    Line(clap::Error),
    /// An option of `-o`.
    Option(Failure),
}

/// Parses a command line, and what its `-o` options stand for.
fn parse(arguments: &[OsString]) -> std::result::Result<Cli, Wrong> {
    let cli = Cli::try_parse_from(arguments).map_err(|mut e| {
        suggest::improve(&mut e, arguments);
        Wrong::Line(e)
    })?;
    let Command::Mount(args) = &cli.command else {
        return Ok(cli);
    };
    let lists = args.options.iter().map(String::as_str);
    let flags = fstab::flags(lists, false).map_err(Wrong::Option)?;
    let command = arguments.iter().position(|argument| argument == "mount");
    let (before, after) = arguments.split_at(command.map_or(1, |at| at + 1));
    Cli::try_parse_from(before.iter().chain(&flags).chain(after)).map_err(Wrong::Line)
}

/// Mounts for mount(8), in whose exit statuses 1 is a wrong call and 32 a mount that failed.
fn help_mount(call: Result<HelperCall>) -> ExitCode {
    const WRONG_CALL: u8 = 1;
    const NOT_MOUNTED: u8 = 32;
    let call = match call {
        Ok(call) => call,
        Err(e) => {
            e.report(false);
            return ExitCode::from(WRONG_CALL);
        }
    };
    match parse(&call.arguments) {
        Err(wrong) => {
            usage(&wrong);
            ExitCode::from(WRONG_CALL)
        }
        Ok(mut cli) => {
            if let Command::Mount(args) = &mut cli.command {
                args.is_fake = call.is_fake;
            }
            match execute(&cli) {
                ExitCode::SUCCESS => ExitCode::SUCCESS,
                code if code == ExitCode::from(WRONG_USAGE) => ExitCode::from(WRONG_CALL),
                _ => ExitCode::from(NOT_MOUNTED),
            }
        }
    }
}

fn execute(cli: &Cli) -> ExitCode {
    if let Err(e) = set_up(cli) {
        return exit_code(Err(e), false);
    }
    let volume = Volume {
        quiet: cli.quiet,
        verbose: cli.verbose,
    };
    let (format, to_journal) = match &cli.command {
        Command::Mount(args) => (args.log_format, args.logs_to_journal()),
        _ => (LogFormat::Text, false),
    };
    diagnostics::start(volume, format, to_journal);
    // Writing beyond `ulimit -f` must be an error, not the end of the process; a cache can do without.
    ignore_file_size_signal();
    // With a higher limit more parts of a split set stay open; without, fewer do.
    let _ = raise_descriptor_limit();
    if !cli.command.mounts() {
        no_new_privileges();
    }
    let json = cli.command.answers_in_json();
    let result = match &cli.command {
        Command::Mount(args) => mount::run(args),
        Command::Umount(args) => umount::run(args),
        Command::Status(args) => status::run(args),
        Command::Materialize(args) => materialize::run(args, cli.quiet),
        #[cfg(feature = "remote")]
        Command::Fetch(args) => fetch::run(args, cli.quiet),
        Command::Verify(args) => return found(verify::run(args, cli.quiet), json),
        Command::Inspect(args) => inspect::run(args),
        Command::Top(args) => top::run(args),
        Command::Toy(args) => toy::run(args, cli.quiet),
        Command::Demo(args) => demo::run(args),
        Command::Doctor(args) => return found(doctor::run(args), json),
        Command::Man(args) => docs::man(args),
        Command::Completions(args) => docs::complete(args),
    };
    exit_code(result, json)
}

/// Frees this process of what its caller may have handed down. To be called before anything is
/// opened.
fn set_up(cli: &Cli) -> Result<()> {
    reset_inherited_signals().context("cannot reset signals")?;
    if let Command::Mount(args) = &cli.command
        && args.leaves_a_daemon()
    {
        // SAFETY: nothing was opened yet, and std opens nothing by itself.
        unsafe { close_inherited_descriptors() }.context("cannot close inherited descriptors")?;
    }
    Ok(())
}

/// The exit status of a command that looks whether all is well.
fn found(is_well: Result<bool>, json: bool) -> ExitCode {
    match is_well {
        Ok(false) => ExitCode::from(FOUND_SOMETHING),
        result => exit_code(result.map(drop), json),
    }
}

/// Prints what is wrong with a command line, or the help that it asks for.
fn usage(wrong: &Wrong) -> ExitCode {
    let json = std::env::args_os().any(|argument| argument == "--json");
    let error = match wrong {
        Wrong::Line(error) => error,
        Wrong::Option(failure) => {
            failure.report(json);
            return ExitCode::from(WRONG_USAGE);
        }
    };
    if let Err(e) = error.print() {
        // Help that could not be printed is a failure.
        return match e.kind() {
            io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        };
    }
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    if json {
        let text = error.to_string();
        let mut lines = text.lines().map(str::trim);
        let message: Vec<_> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
        let failure = Failure::usage(message.join(" ").trim_start_matches("error: "));
        let tip = lines.find_map(|line| line.strip_prefix("tip: "));
        match tip {
            Some(tip) => failure.hint(tip.to_owned()),
            None => failure,
        }
        .print_json();
    }
    ExitCode::from(WRONG_USAGE)
}

/// Prints a result.
fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|e| Failure::output(&e))
}

/// Prints a result for programs.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value).map_err(|e| Failure::unknown(&e))?;
    print(&(json + "\n"))
}

/// Prints what was done. That it cannot be printed does not undo it.
fn say(text: &str) {
    if let Err(e) = print(text)
        && !e.is_closed_output()
    {
        tracing::warn!("{}", e.message);
    }
}
