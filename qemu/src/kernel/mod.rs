//! Kernels for guests, each with its modules and with what is needed to build further modules for it.

pub mod debian;
pub mod uml;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

/// The one kernel release under a `lib/modules`-like folder.
pub fn release(modules: &Path) -> Result<String> {
    let mut entries = std::fs::read_dir(modules).with_context(|| format!("cannot list {}", modules.display()))?;
    let entry = entries.next().ok_or_else(|| anyhow!("no modules in {}", modules.display()))??;
    entry.file_name().into_string().map_err(|name| anyhow!("odd kernel release {}", PathBuf::from(name).display()))
}
