//! A QEMU that has the generic vhost-user device: the host's, or one of Debian backports in a root file system of its own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Result;

use crate::cache::{Cache, Recipe};
use crate::roots::bootstrap;
use crate::sandbox;

/// The device without which a virtual NIC cannot be attached; in QEMU since 10.2.
const DEVICE: &str = "vhost-user-test-device-pci";
const PROGRAM: &str = "qemu-system-x86_64";
const SUITES: [&str; 2] = ["trixie", "trixie-backports"];

/// Where QEMU is.
#[derive(Debug, Clone)]
pub enum Binary {
    /// On the host, under this name.
    Host(PathBuf),
    /// Inside this root file system.
    Root(PathBuf),
}

impl Binary {
    /// `$FREEFLOW_QEMU`, else the host's if it has the device, else Debian's, from the cache.
    pub fn get(cache: &Cache) -> Result<Self> {
        if let Some(path) = std::env::var_os("FREEFLOW_QEMU") {
            return Ok(Self::Host(path.into()));
        }
        if host_has_device() {
            return Ok(Self::Host(PROGRAM.into()));
        }
        let recipe = Recipe::new("qemu").with("1").with(SUITES.concat());
        let dir = cache.get(&recipe, |steps, dir| {
            steps.step(&format!("installing Debian's QEMU (this machine has none with {DEVICE})"));
            // Named with its suite, so that what it shares with other packages comes from there too.
            let hook =
                format!("chroot \"$1\" apt-get install --yes --no-install-recommends -t {} qemu-system-x86", SUITES[1]);
            bootstrap(steps, &SUITES, "ca-certificates", &dir.join("root"), &["--customize-hook", &hook])
        })?;
        Ok(Self::Root(dir.join("root")))
    }

    /// The folder `workspace` as QEMU sees it.
    pub fn base(&self, workspace: &Path) -> PathBuf {
        match self {
            Self::Host(_) => workspace.to_owned(),
            Self::Root(_) => "/mnt".into(),
        }
    }

    /// The command that runs QEMU with `words`.
    pub fn command(&self, workspace: &Path, words: Vec<OsString>) -> Result<Vec<OsString>> {
        match self {
            Self::Host(program) => Ok([vec![program.clone().into_os_string()], words].concat()),
            Self::Root(root) => sandbox::wrap(root, workspace, [vec![PROGRAM.into()], words].concat()),
        }
    }

    /// Tells one QEMU from another.
    pub fn identity(&self) -> String {
        match self {
            Self::Host(program) => {
                let version = Command::new(program).arg("--version").stderr(Stdio::null()).output();
                version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
            }
            Self::Root(root) => root.display().to_string(),
        }
    }
}

fn host_has_device() -> bool {
    let help = Command::new(PROGRAM).args(["-device", "help"]).stderr(Stdio::null()).output();
    help.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(DEVICE))
}
