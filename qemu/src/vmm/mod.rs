//! What runs guests: how each kind gets its parts, and its command line.

pub mod binary;
pub mod image;
pub mod qemu;
pub mod uml;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::accel::{Accel, Choice};
use crate::cache::Cache;
use crate::cli::{KindArgs, Vmm};
use crate::guest::Spec;
use crate::guest::boot::BootFiles;
use crate::guest::workspace::Workspace;
use crate::net::PortKind;

/// A virtual machine monitor with everything that it needs to boot a guest.
#[derive(Debug)]
pub enum Machine {
    /// User-mode Linux.
    Uml(uml::Uml),
    /// A virtual machine.
    Qemu(qemu::Qemu),
}

/// What the first program of a guest has to know about its machine.
#[derive(Debug)]
pub struct BootFacts {
    /// `uml` or `qemu`.
    pub vmm: &'static str,
    /// The root file system: a folder of the host, or empty.
    pub root: PathBuf,
    /// Kernel modules that are not in the root file system: a folder of the host, or empty.
    pub modules: PathBuf,
    /// The terminal device for a shell.
    pub tty: &'static str,
}

impl Machine {
    /// Finds or makes everything for one kind of guest.
    pub fn get(cache: &Cache, kind: KindArgs) -> Result<Self> {
        match kind.vmm {
            Vmm::Uml => Ok(Self::Uml(uml::Uml::get(cache, kind)?)),
            Vmm::Qemu => Ok(Self::Qemu(qemu::Qemu::get(cache, kind)?)),
        }
    }

    /// What its network interfaces are plugged into.
    pub fn port_kind(&self) -> PortKind {
        match self {
            Self::Uml(_) => PortKind::Veth,
            Self::Qemu(_) => PortKind::Tap,
        }
    }

    /// Names the kernel, for people and for cache keys.
    pub fn kernel_id(&self) -> String {
        match self {
            Self::Uml(uml) => uml.kernel_id(),
            Self::Qemu(qemu) => qemu.kernel_id(),
        }
    }

    /// The command that builds the module whose sources are in `dir`.
    pub fn module_build(&self, dir: &Path) -> Result<Command> {
        match self {
            Self::Uml(uml) => Ok(uml.module_build(dir)),
            Self::Qemu(qemu) => qemu.module_build(dir),
        }
    }

    /// The accelerator, for the kind of machine that has one. Says which on standard error.
    pub fn accel(&self, choice: Choice) -> Result<Option<Accel>> {
        match self {
            Self::Uml(_) => Ok(None),
            Self::Qemu(qemu) => qemu.accel(choice).map(Some),
        }
    }

    /// The command line that boots the guest.
    pub fn command_line(&self, spec: &Spec, workspace: &Workspace, accel: Option<Accel>) -> Result<Vec<OsString>> {
        match self {
            Self::Uml(uml) => Ok(uml.command_line(spec, workspace)),
            Self::Qemu(qemu) => qemu.command_line(spec, workspace, accel.unwrap_or(Accel::Tcg)),
        }
    }

    /// Writes what the guest boots from.
    pub fn write_boot(&self, workspace: &Workspace, files: &BootFiles<'_>) -> Result<()> {
        match self {
            Self::Uml(uml) => uml.write_boot(workspace, files),
            Self::Qemu(qemu) => qemu.write_boot(workspace, files),
        }
    }

    /// What the guest's first program is told.
    pub fn boot_facts(&self) -> BootFacts {
        match self {
            Self::Uml(uml) => uml.boot_facts(),
            Self::Qemu(qemu) => qemu.boot_facts(),
        }
    }
}
