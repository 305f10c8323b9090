//! `freeflow`: look at a running router.

use std::process::ExitCode;

use clap::Parser;
use freeflow_router::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("freeflow: {error:#}");
            ExitCode::FAILURE
        }
    }
}
