//! `freeflow-e2e`: unmodified programs between real guests.

use std::process::ExitCode;

fn main() -> ExitCode {
    freeflow_tests::e2e::cli::main()
}
