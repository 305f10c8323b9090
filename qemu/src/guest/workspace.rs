//! The files of one run: a memory file system that only the launcher and its guest see.
//!
//! It is mounted in a mount namespace of the launcher's own, so it goes when the last of them ends.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::Spec;

/// The folder of one run.
#[derive(Debug)]
pub struct Workspace {
    dir: PathBuf,
}

impl Workspace {
    /// Moves this process into its own mount namespace and makes the folder at `dir`, which exists and is empty.
    pub fn enter(dir: &Path, spec: &Spec, share: Option<&Path>) -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
        let none: Option<&str> = None;
        // Slave: what the host unmounts later goes here too, and nothing of ours shows up on the host.
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).context("cannot detach the mounts")?;
        let flags = MsFlags::MS_NOSUID;
        // No limit: it also holds the memory of a User-mode Linux guest.
        mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some("mode=700,size=0"))
            .context("cannot mount a memory file system")?;
        let workspace = Self { dir: dir.to_owned() };
        for sub in ["boot", "ctl"] {
            fs::create_dir(dir.join(sub))?;
        }
        for (index, nic) in spec.nics.iter().enumerate() {
            bind_file(&nic.socket, &workspace.nic(index))?;
        }
        if let Some(share) = share {
            fs::create_dir(workspace.share())?;
            bind(share, &workspace.share())?;
        }
        File::create(workspace.console())?;
        Ok(workspace)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// What the guest boots from.
    pub fn boot(&self) -> PathBuf {
        self.dir.join("boot")
    }

    /// Where the guest writes its output and status.
    pub fn ctl(&self) -> PathBuf {
        self.dir.join("ctl")
    }

    /// The user's shared folder.
    pub fn share(&self) -> PathBuf {
        self.dir.join("share")
    }

    /// The socket of a virtual NIC.
    pub fn nic(&self, index: usize) -> PathBuf {
        self.dir.join(format!("nic{index}"))
    }

    /// What the guest's kernel says.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console")
    }

    /// Makes a file of the host visible here under `name`.
    pub fn bring(&self, file: &Path, name: &str) -> Result<()> {
        bind_file(file, &self.dir.join(name))
    }
}

fn bind_file(from: &Path, to: &Path) -> Result<()> {
    File::create(to)?;
    bind(from, to)
}

/// Makes `from` appear at `to`.
pub fn bind(from: &Path, to: &Path) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("cannot mount {} at {}", from.display(), to.display()))
}
