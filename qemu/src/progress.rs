//! What a person sees while something long is made: a line per step, and the end of the log when a step fails.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

/// How much of a log is shown when a step fails.
const TAIL_BYTES: u64 = 4096;

/// Prints one line on standard error, with the seconds since the program's start.
pub fn say(text: &str) {
    eprintln!("[{:6.1} s] {text}", program_start().elapsed().as_secs_f32());
}

/// The first call fixes the moment that [`say`] counts from.
pub fn program_start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// The last lines of a file, for error messages.
pub fn tail(path: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|error| format!("(cannot read {}: {error})", path.display()))
}

/// Runs the commands that make one thing, with all their output in one log file.
#[derive(Debug)]
pub struct Steps {
    name: String,
    log: PathBuf,
}

impl Steps {
    /// Starts an empty log at `log` for the thing called `name`.
    pub fn new(name: &str, log: PathBuf) -> Result<Self> {
        File::create(&log).with_context(|| format!("cannot write the log {}", log.display()))?;
        Ok(Self { name: name.to_owned(), log })
    }

    /// Announces the next step.
    pub fn step(&self, text: &str) {
        say(&format!("{}: {text}", self.name));
    }

    /// Runs a command to its end; its failure shows the end of the log.
    pub fn run(&self, command: &mut Command) -> Result<()> {
        let status = guarded(command)
            .stdin(Stdio::null())
            .stdout(self.log_end()?)
            .stderr(self.log_end()?)
            .status()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        if status.success() {
            return Ok(());
        }
        Err(self.failure(command, &status.to_string()))
    }

    /// Runs a command and returns what it wrote to standard output.
    pub fn output(&self, command: &mut Command) -> Result<String> {
        let output = guarded(command)
            .stdin(Stdio::null())
            .stderr(self.log_end()?)
            .output()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        if !output.status.success() {
            return Err(self.failure(command, &output.status.to_string()));
        }
        String::from_utf8(output.stdout)
            .with_context(|| format!("{} wrote something that is no text", command.get_program().display()))
    }

    fn log_end(&self) -> Result<File> {
        File::options()
            .append(true)
            .open(&self.log)
            .with_context(|| format!("cannot write the log {}", self.log.display()))
    }

    fn failure(&self, command: &Command, status: &str) -> anyhow::Error {
        let program = command.get_program().to_string_lossy();
        anyhow!("{}: {program} failed ({status}); the end of {}:\n{}", self.name, self.log.display(), tail(&self.log))
    }
}

/// The same command, ended by the kernel when this process dies.
fn guarded(command: &Command) -> Command {
    let mut guarded = Command::new("setpriv");
    guarded.args(["--pdeathsig", "TERM", "--"]).arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        guarded.current_dir(dir);
    }
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => guarded.env(key, value),
            None => guarded.env_remove(key),
        };
    }
    guarded
}

/// Runs a short command silently; its own error output becomes the message when it fails.
pub fn quiet(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
