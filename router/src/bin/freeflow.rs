//! `freeflow`: look at a running router.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;
use freeflow_router::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(text) => print(&text),
        Err(error) => {
            eprintln!("freeflow: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> ExitCode {
    if text.is_empty() {
        return ExitCode::SUCCESS;
    }
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("freeflow: cannot write: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}
