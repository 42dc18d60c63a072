//! The command line: definitions here, one file per command. The only code that prints.

mod demo;
mod inspect;
mod materialize;
mod mount;
mod text;
mod toy;
mod umount;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing::Level;

/// Mount a Mixture-of-Experts GGUF model as one small safetensors file per expert, without
/// converting it.
#[derive(Parser)]
#[command(name = "odmoe-fs", version, max_term_width = 100)]
struct Cli {
    /// Say more on stderr; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Say only errors on stderr
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Mount(mount::MountArgs),
    Umount(umount::UmountArgs),
    Materialize(materialize::MaterializeArgs),
    Inspect(inspect::InspectArgs),
    Toy(toy::ToyArgs),
    Demo(demo::DemoArgs),
}

/// The model of a command.
#[derive(clap::Args)]
struct ModelArg {
    /// The GGUF file, or any part of a split set; the other parts are found beside it
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    start_diagnostics(&cli);
    // More parts of a split set can stay open. Where it is refused, fewer do.
    let _ = odmoe_fs::source::raise_descriptor_limit();
    let result = match &cli.command {
        Command::Mount(args) => mount::run(args),
        Command::Umount(args) => umount::run(args),
        Command::Materialize(args) => materialize::run(args, cli.quiet),
        Command::Inspect(args) => inspect::run(args),
        Command::Toy(args) => toy::run(args),
        Command::Demo(args) => return demo::run(args),
    };
    exit_code(result)
}

fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            // Not eprintln!, which panics when stderr is gone.
            let _ = writeln!(io::stderr(), "error: {e:#}");
            match e.downcast_ref::<Interrupted>() {
                Some(Interrupted(signal)) => ExitCode::from(128 + *signal as u8),
                None => ExitCode::FAILURE,
            }
        }
    }
}

/// The context of an error when a signal ended the work: the exit status is 128 and its number.
#[derive(Debug)]
struct Interrupted(i32);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted by signal {}", self.0)
    }
}

/// Whether the reader of our output has seen enough, as `head` does.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints a result.
fn print(text: &str) -> anyhow::Result<()> {
    io::stdout().write_all(text.as_bytes())?;
    io::stdout().flush()?;
    Ok(())
}

fn start_diagnostics(cli: &Cli) {
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => Level::ERROR,
        (false, 0) => Level::WARN,
        (false, 1) => Level::INFO,
        (false, _) => Level::DEBUG,
    };
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_max_level(level)
        .with_target(false)
        .without_time()
        .with_ansi(colours)
        .init();
}
