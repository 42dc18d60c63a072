//! The `odmoe-fs` command: parse the command line, run, turn the error into an exit status.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
