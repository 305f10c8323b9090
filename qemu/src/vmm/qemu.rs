//! QEMU: a virtual machine with a distribution's own kernel.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::binary::Binary;
use super::{BootFacts, image};
use crate::accel::{self, Accel, Choice};
use crate::cache::Cache;
use crate::cli::KindArgs;
use crate::guest::Spec;
use crate::guest::boot::{BootFiles, skeleton};
use crate::guest::workspace::Workspace;
use crate::kernel::debian::DebianKernel;
use crate::roots::{busybox, guest_root, root_name};
use crate::{cpio, progress, sandbox};

/// Virtio id of the device: QEMU has no name for 42 and aborts on it.
const VIRTIO_ID: u32 = virtio_rdma::VIRTIO_ID_RDMA_ALT;
/// What the kernel is told beside where its console is: nothing that changes what is tested, all that makes emulation faster.
const KERNEL_WORDS: &str = "console=ttyS0 panic=-1 mitigations=off tsc=reliable no_timer_check audit=0 apparmor=0";

/// The parts of a QEMU guest.
#[derive(Debug)]
pub struct Qemu {
    binary: Binary,
    kernel: DebianKernel,
    image: PathBuf,
    busybox: PathBuf,
    cache: Cache,
}

impl Qemu {
    /// Finds or makes them.
    pub fn get(cache: &Cache, kind: KindArgs) -> Result<Self> {
        let binary = Binary::get(cache)?;
        let root = guest_root(cache, kind)?;
        let kernel = DebianKernel::get(cache, kind.distro)?;
        let image = image::get(cache, &root_name(kind), &root, &kernel)?;
        Ok(Self { binary, kernel, image, busybox: busybox(cache)?, cache: cache.clone() })
    }

    /// The kernel.
    pub fn kernel(&self) -> &DebianKernel {
        &self.kernel
    }

    /// Names the kernel.
    pub fn kernel_id(&self) -> String {
        let entry = self.kernel.dir.file_name().unwrap_or_default().to_string_lossy();
        format!("{entry} ({})", self.kernel.release)
    }

    /// The command that builds the module whose sources are in `dir`.
    pub fn module_build(&self, dir: &Path) -> Result<Command> {
        let make: [OsString; 5] =
            ["make".into(), "-C".into(), self.kernel.headers().into(), "M=/mnt".into(), "modules".into()];
        let argv = sandbox::wrap(&self.kernel.build_root(), dir, make)?;
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]);
        Ok(command)
    }

    /// What the guest's first program is told.
    pub fn boot_facts(&self) -> BootFacts {
        BootFacts { vmm: "qemu", root: PathBuf::new(), modules: PathBuf::new(), tty: "ttyS1" }
    }

    /// Which accelerator to use; found out by starting a guest when nobody knows yet.
    pub fn accel(&self, choice: Choice) -> Result<Accel> {
        accel::choose(&self.cache, choice, &self.binary, &self.kernel.image(), &self.busybox)
    }

    /// Writes the initial RAM disk.
    pub fn write_boot(&self, workspace: &Workspace, files: &BootFiles<'_>) -> Result<()> {
        let boot = workspace.boot();
        skeleton(&boot, &self.busybox)?;
        progress::quiet(Command::new("cp").arg("-r").args([self.kernel.early(), boot.join("modules")]))?;
        std::fs::rename(boot.join("modules/insmod"), boot.join("guest/insmod"))?;
        files.write(workspace, &boot.join("guest"))?;
        let mut initrd = BufWriter::new(File::create(workspace.path().join("initrd"))?);
        cpio::pack(&boot, &mut initrd)
            .and_then(|()| Ok(initrd.flush()?))
            .context("cannot write the initial RAM disk")?;
        workspace.bring(&self.image, "root.ext4")?;
        workspace.bring(&self.kernel.image(), "vmlinuz")
    }

    /// The command line that boots the guest.
    pub fn command_line(&self, spec: &Spec, workspace: &Workspace, accel: Accel) -> Result<Vec<OsString>> {
        let base = self.binary.base(workspace.path());
        let mut line = Line { base, words: accel.options() };
        line.machine(spec);
        line.disks(spec);
        for (index, interface) in spec.interfaces.iter().enumerate() {
            line.add(
                "-netdev",
                format!("tap,id=net{index},ifname={},script=no,downscript=no,vhost=off", interface.port),
            );
            line.add("-device", format!("virtio-net-pci,netdev=net{index},mac={},romfile=", interface.mac));
        }
        for (index, nic) in spec.nics.iter().enumerate() {
            let path = line.path(&format!("nic{index}"));
            line.add("-chardev", format!("socket,id=nic{index},path={path}"));
            let size = size_of::<virtio_rdma::config::Config>();
            let device = format!("vhost-user-test-device-pci,chardev=nic{index},virtio-id={VIRTIO_ID}");
            line.add("-device", format!("{device},num_vqs={},config_size={size}", nic.queues));
        }
        self.binary.command(workspace.path(), line.words)
    }
}

/// A command line in the making.
struct Line {
    base: PathBuf,
    words: Vec<OsString>,
}

impl Line {
    fn add(&mut self, option: &str, value: impl Into<OsString>) {
        self.words.extend([OsString::from(option), value.into()]);
    }

    /// A file of the workspace as QEMU sees it.
    fn path(&self, name: &str) -> String {
        self.base.join(name).display().to_string()
    }

    fn machine(&mut self, spec: &Spec) {
        let mem = spec.mem_mib;
        self.add("-machine", "q35,usb=off,vmport=off");
        self.add("-smp", spec.cpus.to_string());
        self.add("-m", format!("{mem}M"));
        // Shared, so that the router can reach it.
        self.add("-object", format!("memory-backend-memfd,id=mem,size={mem}M,share=on"));
        self.add("-numa", "node,memdev=mem");
        self.words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
        self.add("-display", "none");
        self.add("-kernel", self.path("vmlinuz"));
        self.add("-initrd", self.path("initrd"));
        self.add("-append", format!("{KERNEL_WORDS} {}", spec.append));
        self.add("-chardev", format!("file,id=console,append=on,path={}", self.path("console")));
        self.add("-serial", "chardev:console");
        if spec.shell {
            // The terminal is QEMU's standard input; opened through /proc, it can be written to as well.
            self.add("-chardev", "serial,id=tty,path=/proc/self/fd/0");
            self.add("-serial", "chardev:tty");
        }
    }

    fn disks(&mut self, spec: &Spec) {
        self.add("-drive", format!("if=none,id=root,format=raw,read-only=on,file={}", self.path("root.ext4")));
        self.add("-device", "virtio-blk-pci,drive=root");
        self.folder("ctl");
        if spec.share {
            self.folder("share");
        }
    }

    fn folder(&mut self, name: &str) {
        self.add("-fsdev", format!("local,id={name},security_model=none,multidevs=remap,path={}", self.path(name)));
        self.add("-device", format!("virtio-9p-pci,fsdev={name},mount_tag={name}"));
    }
}
