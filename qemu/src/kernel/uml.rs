//! The User-mode Linux kernel, built from the kernel sources of Debian backports.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::Apt;
use crate::cache::{Cache, Recipe};
use crate::progress::Steps;

const SUITES: [&str; 2] = ["trixie", "trixie-backports"];
const SOURCE: &str = "linux-source-7.2";
const CONFIG: &str = include_str!("../../assets/uml.config");
/// Why is said in it.
const PATCH: &str = include_str!("../../assets/uml-interrupts.patch");
/// As [`CONFIG`], besides, in a kernel that looks for mistakes.
const DEBUG_CONFIG: &str = include_str!("../../assets/uml-debug.config");
/// What such a kernel would find in itself.
const DEBUG_PATCH: &str = include_str!("../../assets/uml-debug.patch");
/// Folders of the source tree that no module build reads, once the kernel is built.
const UNNEEDED: &str = "Documentation LICENSES block certs crypto drivers fs init io_uring ipc kernel lib mm net rust samples \
    security sound usr virt tools/perf tools/testing linux vmlinux vmlinux.o vmlinux.a vmlinux.unstripped";

/// A User-mode Linux kernel in the cache.
#[derive(Debug, Clone)]
pub struct UmlKernel {
    /// The entry's folder.
    pub dir: PathBuf,
}

impl UmlKernel {
    /// Finds or builds it; with `FREEFLOW_UML_DEBUG` set, one that looks for mistakes of drivers, and is many times slower.
    pub fn get(cache: &Cache) -> Result<Self> {
        let kind = if std::env::var_os("FREEFLOW_UML_DEBUG").is_some() { Kind::debug() } else { Kind::usual() };
        let dir = cache.get(&kind.recipe(), |steps, dir| kind.build(steps, dir))?;
        Ok(Self { dir })
    }

    /// The kernel, an executable of the host.
    pub fn image(&self) -> PathBuf {
        self.dir.join("linux")
    }

    /// The folder that holds its modules by release, like `/lib/modules`.
    pub fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }

    /// The tree against which further modules can be built (with `ARCH=um`).
    pub fn build_dir(&self) -> PathBuf {
        self.dir.join("build")
    }
}

/// What makes a kernel out of the sources.
struct Kind {
    name: &'static str,
    config: String,
    patches: &'static [&'static str],
}

impl Kind {
    fn usual() -> Self {
        Self { name: "uml-kernel", config: CONFIG.to_owned(), patches: &[PATCH] }
    }

    fn debug() -> Self {
        Self { name: "uml-kernel-debug", config: [CONFIG, DEBUG_CONFIG].concat(), patches: &[PATCH, DEBUG_PATCH] }
    }

    fn recipe(&self) -> Recipe {
        let recipe = Recipe::new(self.name).with("1").with(SOURCE).with(&self.config);
        self.patches.iter().fold(recipe, Recipe::with).with(UNNEEDED)
    }

    fn build(&self, steps: &Steps, dir: &Path) -> Result<()> {
        let apt = Apt::new(steps, dir.join("apt"), &SUITES)?;
        apt.unpack(steps, SOURCE, &dir.join("deb"))?;
        let tree = dir.join("build");
        unpack(steps, &dir.join(format!("deb/usr/src/{SOURCE}.tar.xz")), &tree)?;
        self.patches.iter().try_for_each(|patch| mend(steps, &tree, patch))?;
        configure(steps, &tree, &self.config)?;
        compile(steps, &tree)?;
        install(steps, &tree, dir)?;
        prune(steps, &tree)?;
        for leftover in ["apt", "deb"] {
            fs::remove_dir_all(dir.join(leftover))?;
        }
        Ok(())
    }
}

fn unpack(steps: &Steps, tarball: &Path, tree: &Path) -> Result<()> {
    steps.step("unpacking the kernel's sources");
    fs::create_dir_all(tree)?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(tree).args(["--strip-components=1", "--exclude=*/Documentation/*/*", "-xf"]).arg(tarball);
    steps.run(&mut tar)
}

/// The first line of a patch says what it is for.
fn mend(steps: &Steps, tree: &Path, patch: &str) -> Result<()> {
    steps.step(patch.lines().next().unwrap_or_default());
    fs::write(tree.join("a.patch"), patch)?;
    steps.run(Command::new("patch").args(["-p1", "--forward", "--input=a.patch"]).current_dir(tree))
}

fn make(tree: &Path, targets: &[&str]) -> Command {
    let jobs = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let mut make = Command::new("make");
    make.arg("-C").arg(tree).args(["ARCH=um", &format!("-j{jobs}")]).args(targets);
    make
}

/// The default configuration with our lines over it, checked: `olddefconfig` drops silently what it cannot do.
fn configure(steps: &Steps, tree: &Path, wanted: &str) -> Result<()> {
    steps.step("configuring");
    steps.run(&mut make(tree, &["defconfig"]))?;
    let path = tree.join(".config");
    let config = fs::read_to_string(&path)?;
    fs::write(&path, config + wanted)?;
    steps.run(&mut make(tree, &["olddefconfig"]))?;
    let result = fs::read_to_string(&path)?;
    let missing = missing_lines(wanted, &result);
    if !missing.is_empty() {
        bail!("the kernel does not honour these lines of its configuration: {}", missing.join(", "));
    }
    Ok(())
}

/// Lines of `wanted` that the configuration `result` does not fulfil.
fn missing_lines<'a>(wanted: &'a str, result: &str) -> Vec<&'a str> {
    let fulfilled = |line: &str| match line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set")) {
        Some(name) => !result.lines().any(|other| other.strip_prefix(name).is_some_and(|rest| rest.starts_with('='))),
        None => !line.starts_with("CONFIG_") || result.lines().any(|other| other == line),
    };
    wanted.lines().filter(|line| !fulfilled(line)).collect()
}

fn compile(steps: &Steps, tree: &Path) -> Result<()> {
    steps.step("building the kernel (7 minutes on 2 CPUs)");
    steps.run(&mut make(tree, &["all"]))?;
    steps.run(&mut make(tree, &["modules_prepare", "scripts/module.lds"]))
}

fn install(steps: &Steps, tree: &Path, dir: &Path) -> Result<()> {
    steps.step("installing");
    let staging = dir.join("staging");
    let path = format!("INSTALL_MOD_PATH={}", staging.display());
    steps.run(&mut make(tree, &["modules_install", "INSTALL_MOD_STRIP=1", &path]))?;
    fs::rename(staging.join("lib/modules"), dir.join("modules"))?;
    fs::remove_dir_all(&staging)?;
    let release = super::release(&dir.join("modules"))?;
    fs::remove_file(dir.join("modules").join(release).join("build"))?;
    fs::copy(tree.join("linux"), dir.join("linux")).context("no kernel came out of the build")?;
    Ok(())
}

/// Leaves of the tree only what a module build reads: 100 MB of 2 GB.
fn prune(steps: &Steps, tree: &Path) -> Result<()> {
    steps.step("keeping what module builds need");
    steps.run(Command::new("rm").arg("-rf").args(UNNEEDED.split_whitespace()).current_dir(tree))?;
    for arch in fs::read_dir(tree.join("arch"))? {
        let arch = arch?;
        if arch.file_type()?.is_dir() && arch.file_name() != "um" && arch.file_name() != "x86" {
            fs::remove_dir_all(arch.path())?;
        }
    }
    let find = ["arch", "-name", "*.[aco]", "-delete"];
    steps.run(Command::new("find").args(find).current_dir(tree))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfulfilled_lines_are_found() {
        let wanted = "# a comment\nCONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\n# CONFIG_D is not set\n";
        let result = "CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=y\nCONFIG_DD=y\n";
        assert_eq!(missing_lines(wanted, result), ["CONFIG_B=m", "# CONFIG_C is not set"]);
    }
}
