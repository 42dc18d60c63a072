//! The command line: definitions here, one file per command. The only code that prints.

mod demo;
mod inspect;
mod materialize;
mod mount;
mod progress;
mod status;
mod stop;
mod text;
mod toy;
mod umount;
mod verify;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use odmoe_fs::mounts::no_new_privileges;
use tracing::Level;

use self::stop::{Interrupted, Stop};

/// Mount a Mixture-of-Experts GGUF model as one small safetensors file per expert, without
/// converting it.
#[derive(Parser)]
#[command(name = "odmoe-fs", version, max_term_width = 100)]
struct Cli {
    /// Say more on stderr; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Messages")]
    verbose: u8,
    /// Say only errors on stderr
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
    Verify(verify::VerifyArgs),
    Inspect(inspect::InspectArgs),
    Toy(toy::ToyArgs),
    Demo(demo::DemoArgs),
}

impl Command {
    /// Whether it may need the set-user-id helper that mounts and unmounts for users.
    fn mounts(&self) -> bool {
        matches!(self, Self::Mount(_) | Self::Umount(_) | Self::Demo(_))
    }
}

/// The model of a command.
#[derive(clap::Args)]
struct ModelArg {
    /// The GGUF file, or any part of a split set; the other parts are found beside it
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
}

/// The exit status of `verify` when a tree is not that of the model.
const FOUND_A_DIFFERENCE: u8 = 3;

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    start_diagnostics(&cli);
    // More parts of a split set can stay open. Where it is refused, fewer do.
    let _ = odmoe_fs::source::raise_descriptor_limit();
    if !cli.command.mounts() {
        no_new_privileges();
    }
    let result = match &cli.command {
        Command::Mount(args) => mount::run(args),
        Command::Umount(args) => umount::run(args),
        Command::Status(args) => status::run(args),
        Command::Materialize(args) => materialize::run(args, cli.quiet),
        Command::Verify(args) => match verify::run(args, cli.quiet) {
            Ok(false) => return ExitCode::from(FOUND_A_DIFFERENCE),
            result => result.map(drop),
        },
        Command::Inspect(args) => inspect::run(args),
        Command::Toy(args) => toy::run(args),
        Command::Demo(args) => demo::run(args),
    };
    exit_code(result)
}

fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            // In one piece, whatever else writes there.
            let _ = Diagnostics.write_all(format!("error: {e:#}\n").as_bytes());
            match e.downcast_ref::<Interrupted>() {
                Some(Interrupted(signal)) => ExitCode::from(128 + *signal as u8),
                None => ExitCode::FAILURE,
            }
        }
    }
}

/// Whether the reader of our output has seen enough, as `head` does.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|e| e.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints a result.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .context("cannot write to the standard output")
}

/// Says what was done. It is done even if nobody can be told.
fn say(text: &str) {
    if let Err(e) = print(text)
        && !is_broken_pipe(&e)
    {
        tracing::warn!("{e:#}");
    }
}

/// The standard error, where a message that cannot be written is lost: it must not stop the work.
struct Diagnostics;

impl Write for Diagnostics {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn start_diagnostics(cli: &Cli) {
    let to_log = matches!(&cli.command, Command::Mount(args) if args.log_file.is_some());
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => Level::ERROR,
        (false, 0) if !to_log => Level::WARN,
        (false, 0) => Level::INFO,
        (false, 1) => Level::INFO,
        (false, _) => Level::DEBUG,
    };
    let colours =
        io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let diagnostics = tracing_subscriber::fmt()
        .with_writer(|| Diagnostics)
        .with_max_level(level)
        .with_target(false)
        .with_ansi(colours && !to_log);
    if to_log {
        diagnostics.init(); // with the time
    } else {
        diagnostics.without_time().init();
    }
}
