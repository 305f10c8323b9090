//! A Debian release's own kernel: its image, the modules that a guest may want, and a root file system to build
//! further modules in (with that release's compiler).

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use crate::apt::Apt;
use crate::cache::{Cache, Recipe};
use crate::progress::Steps;
use crate::roots::{Distro, bootstrap};

/// The metapackage of the kernel. (The one for clouds has no RDMA.)
const METAPACKAGE: &str = "linux-image-amd64";
const BUILD_PACKAGES: &str = "make,gcc,libc6-dev";
/// Modules to keep, by how their path under `kernel/` starts; those that they need come with them.
const WANTED: [&str; 28] = [
    "drivers/infiniband/core/",
    "drivers/infiniband/sw/",
    "drivers/infiniband/ulp/",
    "drivers/virtio/",
    "drivers/nvme/",
    "drivers/block/virtio_blk",
    "drivers/block/loop",
    "drivers/block/null_blk",
    "drivers/char/virtio_console",
    "drivers/net/virtio_net",
    "drivers/net/bonding/",
    "drivers/net/dummy",
    "drivers/net/ipvlan/",
    "drivers/net/macvlan",
    "drivers/net/tun",
    "drivers/net/veth",
    "drivers/net/vxlan",
    "fs/9p/",
    "fs/ext4/",
    "fs/nfs",
    "fs/overlayfs/",
    "net/9p/",
    "net/8021q/",
    "net/bridge/",
    "net/ipv",
    "net/rds/",
    "net/smc/",
    "net/sunrpc/",
];
/// Modules that a guest needs before it has its root file system.
const EARLY: [&str; 6] = ["virtio_pci", "virtio_blk", "ext4", "overlay", "9p", "9pnet_virtio"];
/// Further ones, whose sources the release may have built in or named otherwise.
const EARLY_IF_THERE: [&str; 3] = ["virtio_net", "crc32c_intel", "crc32c_generic"];

/// A distribution kernel in the cache.
#[derive(Debug, Clone)]
pub struct DebianKernel {
    /// The entry's folder.
    pub dir: PathBuf,
    /// What `uname -r` says in it.
    pub release: String,
}

impl DebianKernel {
    /// Finds or makes it.
    pub fn get(cache: &Cache, distro: Distro) -> Result<Self> {
        let mut recipe = Recipe::new(&format!("kernel-{distro}")).with("1").with(METAPACKAGE).with(BUILD_PACKAGES);
        for part in WANTED.iter().chain(&EARLY).chain(&EARLY_IF_THERE) {
            recipe = recipe.with(part);
        }
        let dir = cache.get(&recipe, |steps, dir| build(steps, dir, distro))?;
        let release = super::release(&dir.join("lib/modules"))?;
        Ok(Self { dir, release })
    }

    /// The kernel, as a boot loader takes it.
    pub fn image(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// Its modules (the folder named after the release).
    pub fn modules(&self) -> PathBuf {
        self.dir.join("lib/modules").join(&self.release)
    }

    /// A folder with the modules to load first; `insmod` in it lists them in order.
    pub fn early(&self) -> PathBuf {
        self.dir.join("early")
    }

    /// The root file system in which further modules can be built.
    pub fn build_root(&self) -> PathBuf {
        self.dir.join("build-root")
    }

    /// The headers, as a path inside [`build_root`](Self::build_root).
    pub fn headers(&self) -> PathBuf {
        Path::new("/usr/src").join(format!("linux-headers-{}", self.release))
    }
}

fn build(steps: &Steps, dir: &Path, distro: Distro) -> Result<()> {
    let apt = Apt::new(steps, dir.join("apt"), &[distro.codename()])?;
    let package = apt.dependency(steps, METAPACKAGE, "linux-image-")?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    let deb = dir.join("deb");
    apt.unpack(steps, &package, &deb)?;
    fs::rename(deb.join("boot").join(format!("vmlinuz-{release}")), dir.join("vmlinuz"))?;
    fs::create_dir(dir.join("lib"))?;
    let modules = ["lib/modules", "usr/lib/modules"].map(|path| deb.join(path)).into_iter().find(|path| path.exists());
    fs::rename(modules.context("no modules in the kernel's package")?, dir.join("lib/modules"))?;
    select_modules(steps, dir, &release)?;
    collect_early(steps, dir, &release)?;
    steps.step(&format!("installing the headers and the compiler of {release}"));
    let build_root = dir.join("build-root");
    bootstrap(steps, &[distro.codename()], &format!("linux-headers-{release},{BUILD_PACKAGES}"), &build_root, &[])?;
    fs::remove_dir_all(deb)?;
    Ok(fs::remove_dir_all(dir.join("apt"))?)
}

/// Deletes the modules that no guest here can use, and unpacks the others: emulated CPUs are slow at that.
fn select_modules(steps: &Steps, dir: &Path, release: &str) -> Result<()> {
    steps.step("selecting modules");
    let depmod = || {
        let mut command = Command::new("depmod");
        command.arg("-b").arg(dir).arg(release);
        command
    };
    steps.run(&mut depmod())?;
    let modules = dir.join("lib/modules").join(release);
    let dependencies = fs::read_to_string(modules.join("modules.dep")).context("depmod made no modules.dep")?;
    let (keep, all) = closure(&dependencies);
    for module in all.difference(&keep) {
        fs::remove_file(modules.join(module)).with_context(|| format!("cannot remove {module}"))?;
    }
    let packed = keep.iter().filter(|module| has_extension(module, "xz"));
    let mut unpack = Command::new("xz");
    unpack.arg("-d").args(packed).current_dir(&modules);
    if keep.iter().any(|module| has_extension(module, "xz")) {
        steps.run(&mut unpack)?;
    }
    steps.run(&mut depmod())
}

fn has_extension(path: &str, wanted: &str) -> bool {
    Path::new(path).extension().is_some_and(|extension| extension == wanted)
}

/// The wanted modules with all that they need, and all modules, of a `modules.dep`.
fn closure(dependencies: &str) -> (BTreeSet<&str>, BTreeSet<&str>) {
    let needs: HashMap<&str, Vec<&str>> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module, needs.split_whitespace().collect()))
        .collect();
    let wanted = |module: &&str| {
        let path = module.strip_prefix("kernel/").unwrap_or(module);
        // Everything in crypto and lib is small, and may be asked for by name at run time.
        path.starts_with("crypto/") || path.starts_with("lib/") || WANTED.iter().any(|prefix| path.starts_with(prefix))
    };
    let all: BTreeSet<&str> = needs.keys().copied().collect();
    let mut keep = BTreeSet::new();
    let mut todo: Vec<&str> = all.iter().copied().filter(|module| wanted(module)).collect();
    while let Some(module) = todo.pop() {
        if keep.insert(module) {
            todo.extend(needs.get(module).into_iter().flatten());
        }
    }
    (keep, all)
}

/// Puts the modules for the initial RAM disk into one folder, with the order in which to load them.
fn collect_early(steps: &Steps, dir: &Path, release: &str) -> Result<()> {
    let early = dir.join("early");
    fs::create_dir(&early)?;
    let show = |module: &str| {
        let mut modprobe = Command::new("modprobe");
        modprobe.arg("-d").arg(dir).args(["-S", release, "--show-depends", module]);
        modprobe
    };
    let mut listing: String = EARLY.into_iter().map(|module| steps.output(&mut show(module))).collect::<Result<_>>()?;
    listing.extend(EARLY_IF_THERE.into_iter().filter_map(|module| steps.output(&mut show(module)).ok()));
    let mut order: Vec<String> = Vec::new();
    for path in listing.lines().filter_map(|line| line.strip_prefix("insmod ")).map(|path| Path::new(path.trim())) {
        let name =
            path.file_name().ok_or_else(|| anyhow!("odd path {}", path.display()))?.to_string_lossy().into_owned();
        if !order.contains(&name) {
            fs::copy(path, early.join(&name)).with_context(|| format!("cannot copy {}", path.display()))?;
            order.push(name);
        }
    }
    Ok(fs::write(early.join("insmod"), order.join("\n") + "\n")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_modules_bring_what_they_need() {
        let text = "kernel/drivers/infiniband/core/ib_core.ko.xz:\n\
            kernel/drivers/infiniband/sw/rxe/rdma_rxe.ko.xz: kernel/x/udp_tunnel.ko.xz kernel/drivers/infiniband/core/ib_core.ko.xz\n\
            kernel/x/udp_tunnel.ko.xz: kernel/x/deeper.ko.xz\n\
            kernel/x/deeper.ko.xz:\n\
            kernel/drivers/gpu/drm.ko.xz:\n";
        let (keep, all) = closure(text);
        assert_eq!((keep.len(), all.len()), (4, 5));
        assert!(!keep.contains("kernel/drivers/gpu/drm.ko.xz") && keep.contains("kernel/x/deeper.ko.xz"));
    }
}
