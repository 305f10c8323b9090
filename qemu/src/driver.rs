//! The guest driver: the one thing of ours that a guest gets, built for its kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, Recipe};
use crate::cli::GuestArgs;
use crate::progress::{Steps, say};
use crate::vmm::Machine;

/// File name of the module.
pub const MODULE: &str = "virtio_rdma.ko";

/// The driver's sources in this checkout.
fn default_sources() -> PathBuf {
    let fixed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../virtio-rdma/driver");
    std::env::var_os("FREEFLOW_DRIVER").map_or(fixed, PathBuf::from)
}

/// The module to load in a guest, if it is to have any.
pub fn for_guest(cache: &Cache, args: &GuestArgs, machine: &Machine) -> Result<Option<PathBuf>> {
    let sources = match &args.driver {
        Some(path) if path.as_os_str() == "none" => return Ok(None),
        Some(path) if path.extension().is_some_and(|extension| extension == "ko") => return Ok(Some(path.clone())),
        Some(path) => path.clone(),
        None if args.nics.is_empty() => return Ok(None),
        None => default_sources(),
    };
    if args.driver.is_none() && !sources.join("Kbuild").exists() {
        say(&format!("no driver sources in {}: the guest starts without the driver", sources.display()));
        return Ok(None);
    }
    build(cache, machine, Some(&sources)).map(Some)
}

/// Builds the module out of `sources` (this checkout's by default) for the kernel of `machine`.
pub fn build(cache: &Cache, machine: &Machine, sources: Option<&Path>) -> Result<PathBuf> {
    let sources = sources.map_or_else(default_sources, Path::to_owned);
    if !sources.join("Kbuild").exists() {
        bail!("{} has no Kbuild file: these are no driver sources", sources.display());
    }
    let copy = tempfile::tempdir().context("cannot make a temporary folder")?;
    copy_sources(&sources, copy.path())?;
    let recipe = Recipe::new("driver").with("1").with(machine.kernel_id()).with_tree(copy.path())?;
    let entry = cache.get(&recipe, |steps, dir| make(steps, machine, copy.path(), dir))?;
    Ok(entry.join(MODULE))
}

/// Copies what a build reads: a build by hand in the same folder must neither be disturbed nor disturb.
fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        let target = to.join(&name);
        if entry.file_type()?.is_dir() {
            fs::create_dir(&target)?;
            copy_sources(&entry.path(), &target)?;
        } else if is_source(&text) {
            fs::copy(entry.path(), &target).with_context(|| format!("cannot copy {text}"))?;
        }
    }
    Ok(())
}

fn is_source(name: &str) -> bool {
    let source = Path::new(name).extension().is_some_and(|extension| extension == "c" || extension == "h");
    (source && !name.ends_with(".mod.c")) || matches!(name, "Kbuild" | "Makefile" | "Kconfig")
}

fn make(steps: &Steps, machine: &Machine, sources: &Path, dir: &Path) -> Result<()> {
    let work = dir.join("work");
    let copied = Command::new("cp").arg("-r").args([sources, &work]).status()?;
    if !copied.success() {
        bail!("cannot copy the driver's sources");
    }
    steps.step(&format!("building the driver for {}", machine.kernel_id()));
    steps.run(&mut machine.module_build(&work)?)?;
    fs::rename(work.join(MODULE), dir.join(MODULE)).with_context(|| format!("the build made no {MODULE}"))?;
    steps.run(Command::new("strip").arg("--strip-debug").arg(dir.join(MODULE)))?;
    Ok(fs::remove_dir_all(&work)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_builds_leave_is_no_source() {
        for name in ["main.c", "a.h", "Kbuild", "Makefile"] {
            assert!(is_source(name), "{name}");
        }
        for name in ["virtio_rdma.ko", "main.o", "virtio_rdma.mod.c", ".main.o.cmd", "Module.symvers", "dkms.conf"] {
            assert!(!is_source(name), "{name}");
        }
    }
}
