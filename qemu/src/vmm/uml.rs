//! User-mode Linux: the guest's kernel is a process of the host.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::BootFacts;
use crate::cache::Cache;
use crate::cli::KindArgs;
use crate::guest::Spec;
use crate::guest::boot::{BootFiles, skeleton};
use crate::guest::workspace::Workspace;
use crate::kernel::uml::UmlKernel;
use crate::roots::{busybox, guest_root};

/// Virtio id of the device, where the VMM does not mind a new one.
const VIRTIO_ID: u32 = virtio_rdma::VIRTIO_ID_RDMA;

/// The parts of a User-mode Linux guest.
#[derive(Debug)]
pub struct Uml {
    kernel: UmlKernel,
    root: PathBuf,
    busybox: PathBuf,
}

impl Uml {
    /// Finds or makes them.
    pub fn get(cache: &Cache, kind: KindArgs) -> Result<Self> {
        Ok(Self { kernel: UmlKernel::get(cache)?, root: guest_root(cache, kind)?, busybox: busybox(cache)? })
    }

    /// Names the kernel.
    pub fn kernel_id(&self) -> String {
        self.kernel.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The command that builds the module whose sources are in `dir`.
    pub fn module_build(&self, dir: &Path) -> Command {
        let mut make = Command::new("make");
        make.arg("-C").arg(self.kernel.build_dir()).args(["ARCH=um", "modules"]).arg(format!("M={}", dir.display()));
        make
    }

    /// What the guest's first program is told.
    pub fn boot_facts(&self) -> BootFacts {
        BootFacts { vmm: "uml", root: self.root.clone(), modules: self.kernel.modules(), tty: "tty1" }
    }

    /// Writes the folder that is the guest's first root file system.
    pub fn write_boot(&self, workspace: &Workspace, files: &BootFiles<'_>) -> Result<()> {
        skeleton(&workspace.boot(), &self.busybox)?;
        files.write(workspace, &workspace.boot().join("guest"))
    }

    /// The command line that boots the guest.
    pub fn command_line(&self, spec: &Spec, workspace: &Workspace) -> Vec<OsString> {
        let mut args = vec![self.kernel.image().into_os_string()];
        let mut add = |text: String| args.push(text.into());
        add(format!("mem={}M", spec.mem_mib));
        add(format!("ncpus={}", spec.cpus));
        add("seccomp=auto".into());
        add("root=/dev/root".into());
        add("rootfstype=hostfs".into());
        add(format!("rootflags={}", workspace.boot().display()));
        add("rw".into());
        add("init=/init".into());
        // Panics end the process instead of leaving it hanging.
        add("panic=-1".into());
        // A virtqueue's interrupt (SIGIO) that comes while interrupts are off is only marked as pending, and an idle
        // processor looks for a pending SIGALRM alone before it sleeps. With its tick stopped it could sleep on the
        // interrupt for ever; with the tick it finds it within 10 ms.
        add("nohz=off".into());
        add("con=null".into());
        add("con0=null,fd:1".into());
        if spec.shell {
            add("con1=fd:0,fd:0".into());
        }
        add(format!("uml_dir={}/", workspace.path().display()));
        add("umid=uml".into());
        for index in 0..spec.nics.len() {
            add(format!("virtio_uml.device={}:{VIRTIO_ID}", workspace.nic(index).display()));
        }
        for (index, interface) in spec.interfaces.iter().enumerate() {
            add(format!("vec{index}:transport=raw,ifname={},mac={},depth=64,gro=1", interface.port, interface.mac));
        }
        args.extend(spec.append.split_whitespace().map(OsString::from));
        args
    }
}
