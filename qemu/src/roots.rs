//! Root file systems: folders with a minimal Debian in them, made by `mmdebstrap`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::apt::{self, Apt};
use crate::cache::{Cache, Recipe};
use crate::cli::KindArgs;
use crate::progress::Steps;

/// What a guest's user space consists of, beside the essential packages. Nothing in it is ours.
const GUEST_PACKAGES: &str = "mount,kmod,procps,iproute2,iputils-ping,ethtool,strace,rdma-core,ibverbs-utils,\
    ibverbs-providers,rdmacm-utils,perftest,python3-pyverbs";
/// What comes on top of that for [`Software::Apps`].
const APP_PACKAGES: &str = "ucx-utils,libfabric-bin,openmpi-bin,python3-mpi4py,iperf3,e2fsprogs,netcat-traditional,\
    redis-server,nginx,curl,socat";

/// A Debian release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Distro {
    /// Debian 12: kernel 6.1, rdma-core 44.
    Bookworm,
    /// Debian 13: kernel 6.12, rdma-core 56.
    Trixie,
}

impl Distro {
    /// All that can be guests.
    pub const ALL: [Self; 2] = [Self::Bookworm, Self::Trixie];

    /// The release's code name.
    pub fn codename(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

impl std::fmt::Display for Distro {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.codename())
    }
}

/// How much is installed in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Software {
    /// rdma-core, perftest and what they are used with.
    Base,
    /// The same and UCX, libfabric, Open MPI, and programs to run over the network (up to 280 MB more).
    Apps,
}

impl Software {
    fn packages(self) -> String {
        match self {
            Self::Base => GUEST_PACKAGES.to_owned(),
            Self::Apps => format!("{GUEST_PACKAGES},{APP_PACKAGES}"),
        }
    }
}

/// What a kind of guest is called in the cache: its distribution, and its software unless that is the usual.
pub fn root_name(kind: KindArgs) -> String {
    match kind.software {
        Software::Base => kind.distro.to_string(),
        Software::Apps => format!("{}-apps", kind.distro),
    }
}

/// The user space of a guest: stock packages only. Never written to.
pub fn guest_root(cache: &Cache, kind: KindArgs) -> Result<PathBuf> {
    let packages = kind.software.packages();
    let recipe = Recipe::new(&format!("root-{}", root_name(kind))).with("1").with(&packages);
    cache.get(&recipe, |steps, dir| {
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        steps.step("installing Debian packages");
        bootstrap(steps, &[kind.distro.codename()], &packages, dir, &[])
    })
}

/// A static busybox: the commands of a guest's first moments, before it has its root.
pub fn busybox(cache: &Cache) -> Result<PathBuf> {
    let recipe = Recipe::new("busybox").with("1");
    let dir = cache.get(&recipe, |steps, dir| {
        let apt = Apt::new(steps, dir.join("apt"), &[Distro::Trixie.codename()])?;
        apt.unpack(steps, "busybox-static", &dir.join("deb"))?;
        let binary = ["bin/busybox", "usr/bin/busybox"]
            .map(|path| dir.join("deb").join(path))
            .into_iter()
            .find(|path| path.exists());
        fs::rename(binary.context("no busybox in its package")?, dir.join("busybox"))?;
        fs::remove_dir_all(dir.join("deb"))?;
        Ok(fs::remove_dir_all(dir.join("apt"))?)
    })?;
    Ok(dir.join("busybox"))
}

/// Installs `packages` of the first of `suites` into the folder `target`, with `options` for mmdebstrap.
pub fn bootstrap(steps: &Steps, suites: &[&str], packages: &str, target: &Path, options: &[&str]) -> Result<()> {
    let sources = target.with_extension("list");
    apt::write_sources(&sources, suites)?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=apt", "--mode=root", "--format=directory"]);
    command.args(["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"]);
    command.args(apt::shared_settings()?.iter().map(|setting| format!("--aptopt={}", aptopt(setting))));
    command.arg(format!("--include={packages}")).args(options);
    command.arg(suites[0]).args([target, &sources]);
    let result = steps.run(&mut command);
    fs::remove_file(&sources)?;
    result
}

/// `Key=value` in the syntax of apt's configuration files, which mmdebstrap wants.
fn aptopt(setting: &str) -> String {
    let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
    format!("{key} \"{value}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_rewritten_for_mmdebstrap() {
        assert_eq!(aptopt("Acquire::Retries=3"), "Acquire::Retries \"3\"");
    }
}
