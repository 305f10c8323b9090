//! The guest launcher's program; `qemu/guest` builds and runs it.

use std::process::ExitCode;

use clap::Parser;
use freeflow_qemu::cli::Cli;
use freeflow_qemu::{commands, progress};

/// Exit status when the launcher itself fails, as with `env`, `timeout` and `docker run`.
const LAUNCHER_FAILED: u8 = 125;

fn main() -> ExitCode {
    progress::program_start();
    match commands::dispatch(Cli::parse()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("freeflow-guest: {error:#}");
            ExitCode::from(LAUNCHER_FAILED)
        }
    }
}
