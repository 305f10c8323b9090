//! The user's terminal, while a guest has it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};

/// The terminal, lent to a guest: its settings are put back when this goes.
#[derive(Debug)]
pub struct Terminal {
    file: File,
    settings: Termios,
}

impl Terminal {
    /// Opens the terminal of this process.
    pub fn open() -> Result<Self> {
        // By its own name: `/dev/tty` means nothing to the guest's processes, which are of another session.
        let path = nix::unistd::ttyname(std::io::stdin()).context("a shell needs a terminal (`run` does not)")?;
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let settings = tcgetattr(&file).context("cannot read the terminal's settings")?;
        Ok(Self { file, settings })
    }

    /// Another handle of it.
    pub fn handle(&self) -> Result<OwnedFd> {
        Ok(self.file.try_clone().context("cannot duplicate the terminal")?.into())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nothing can be done if the terminal is gone.
        let _ = tcsetattr(&self.file, SetArg::TCSADRAIN, &self.settings);
    }
}

/// The terminal's size as arguments for the guest's `stty`; something usual where there is none.
pub fn size_settings() -> String {
    let measured = || -> Option<String> {
        let output = Command::new("stty").arg("size").stdin(Stdio::inherit()).stderr(Stdio::null()).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let (rows, columns) = text.trim().split_once(' ')?;
        let (rows, columns): (u16, u16) = (rows.parse().ok()?, columns.parse().ok()?);
        (rows > 0 && columns > 0).then(|| format!("rows {rows} cols {columns}"))
    };
    measured().unwrap_or_else(|| "rows 24 cols 80".to_owned())
}
