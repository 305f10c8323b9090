//! How QEMU runs the guest's code: with KVM where that works, else emulated.
//!
//! `/dev/kvm` may open where no guest can run (nested, restricted or broken virtualisation), so KVM counts as working
//! only after a guest has run with it. That is found out once per kernel of the host.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::cache::{Cache, Recipe};
use crate::cpio;
use crate::guest::boot::skeleton;
use crate::progress::say;
use crate::vmm::binary::Binary;

/// What the guest of the probe says when it runs.
const SIGN_OF_LIFE: &str = "freeflow: the probe runs";
/// What QEMU says when KVM cannot go on.
const KVM_ERROR: &str = "KVM internal error";
/// How long the probe may take; a second is usual.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// KVM where a guest really starts with it, emulation elsewhere.
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

/// What is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accel {
    /// QEMU's options.
    pub fn options(self) -> Vec<OsString> {
        let words = match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        };
        words.map(OsString::from).to_vec()
    }
}

/// Decides, and says so on standard error.
pub fn choose(cache: &Cache, choice: Choice, qemu: &Binary, kernel: &Path, busybox: &Path) -> Result<Accel> {
    let (accel, why) = match choice {
        Choice::Kvm => (Accel::Kvm, "as asked for"),
        Choice::Tcg => (Accel::Tcg, "as asked for"),
        Choice::Auto if !Path::new("/dev/kvm").exists() => (Accel::Tcg, "there is no /dev/kvm"),
        Choice::Auto if kvm_works(cache, qemu, kernel, busybox)? => (Accel::Kvm, "a guest runs with it"),
        Choice::Auto => (Accel::Tcg, "no guest starts with this machine's KVM"),
    };
    match accel {
        Accel::Kvm => say(&format!("qemu: using KVM ({why})")),
        Accel::Tcg => say(&format!("qemu: using emulation, which is slow ({why})")),
    }
    Ok(accel)
}

fn kvm_works(cache: &Cache, qemu: &Binary, kernel: &Path, busybox: &Path) -> Result<bool> {
    let host = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let cpu = host("/proc/cpuinfo")
        .lines()
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("model"))
        .collect::<String>();
    let recipe = Recipe::new("kvm-probe").with("1").with(host("/proc/version")).with(cpu).with(qemu.identity());
    let entry = cache.get(&recipe, |steps, dir| {
        steps.step("starting a guest with KVM, to see whether that works");
        let works = probe(dir, qemu, kernel, busybox)?;
        steps.step(if works { "it does" } else { "it does not" });
        Ok(fs::write(dir.join("works"), works.to_string())?)
    })?;
    let answer = fs::read_to_string(entry.join("works")).context("cannot read what the probe for KVM found")?;
    Ok(answer == "true")
}

/// Boots a kernel that only says hello. `dir` keeps what it said.
fn probe(dir: &Path, qemu: &Binary, kernel: &Path, busybox: &Path) -> Result<bool> {
    let boot = dir.join("boot");
    fs::create_dir(&boot)?;
    skeleton(&boot, busybox)?;
    fs::write(boot.join("init"), format!("#!/bin/busybox sh\necho '{SIGN_OF_LIFE}'\n/bin/poweroff -f\n"))?;
    cpio::pack(&boot, &mut File::create(dir.join("initrd"))?)?;
    fs::copy(kernel, dir.join("vmlinuz"))?;
    let base = qemu.base(dir);
    let file = |name: &str| base.join(name).into_os_string();
    let mut words = Accel::Kvm.options();
    let plain = "-machine q35 -m 256M -nodefaults -no-user-config -no-reboot -display none -serial stdio";
    words.extend(plain.split(' ').map(OsString::from));
    words.extend(["-kernel".into(), file("vmlinuz"), "-initrd".into(), file("initrd")]);
    words.extend(["-append", "console=ttyS0 panic=-1"].map(OsString::from));
    let log = dir.join("log");
    let works = run(&qemu.command(dir, words)?, &log)?;
    for leftover in ["initrd", "vmlinuz"] {
        fs::remove_file(dir.join(leftover))?;
    }
    fs::remove_dir_all(&boot)?;
    Ok(works)
}

fn run(argv: &[OsString], log: &Path) -> Result<bool> {
    let out = File::create(log)?;
    let Some((program, args)) = argv.split_first() else { bail!("no command") };
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(args);
    let mut child =
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).spawn().context("cannot start QEMU")?;
    let started = Instant::now();
    let said = |words: &str| fs::read(log).is_ok_and(|text| String::from_utf8_lossy(&text).contains(words));
    // After an internal error QEMU stays, with the guest paused.
    while started.elapsed() < PATIENCE && !said(SIGN_OF_LIFE) && !said(KVM_ERROR) && child.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_millis(50));
    }
    let works = said(SIGN_OF_LIFE);
    drop(child.kill());
    child.wait()?;
    Ok(works)
}
