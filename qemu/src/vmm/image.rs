//! The disk image of a QEMU guest: a guest's root file system with its kernel's modules, read-only.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use crate::cache::{Cache, Recipe};
use crate::kernel::debian::DebianKernel;
use crate::progress::Steps;

/// Finds or makes the image for a root file system and a kernel.
pub fn get(cache: &Cache, name: &str, root: &Path, kernel: &DebianKernel) -> Result<PathBuf> {
    let identity = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let recipe = Recipe::new(&format!("image-{name}"))
        .with("1")
        .with(identity(root))
        .with(identity(&kernel.dir))
        .with(&kernel.release);
    let dir = cache.get(&recipe, |steps, dir| build(steps, dir, root, kernel))?;
    Ok(dir.join("root.ext4"))
}

fn build(steps: &Steps, dir: &Path, root: &Path, kernel: &DebianKernel) -> Result<()> {
    steps.step("making a disk image");
    let tree = dir.join("tree");
    // Hard links: nothing is written through them.
    steps.run(Command::new("cp").arg("-al").args([root, &tree]))?;
    let modules = tree.join("usr/lib/modules");
    fs::create_dir_all(&modules)?;
    steps.run(Command::new("cp").arg("-a").args([kernel.modules(), modules]))?;
    let size = steps.output(Command::new("du").args(["-sk"]).arg(&tree))?;
    let kib: u64 =
        size.split_whitespace().next().and_then(|word| word.parse().ok()).ok_or_else(|| anyhow!("du said {size:?}"))?;
    let blocks = format!("{}k", kib + kib / 4 + 64 * 1024);
    // No journal, no reserve: it is never written to.
    let mut mke2fs = Command::new("mke2fs");
    mke2fs
        .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
        .arg(&tree)
        .arg(dir.join("root.ext4"))
        .arg(blocks);
    // Debian keeps it where users other than root do not look.
    mke2fs.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    steps.run(&mut mke2fs)?;
    fs::remove_dir_all(&tree).context("cannot remove the copied root file system")
}
