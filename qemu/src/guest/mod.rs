//! One run of one guest, from the arguments to its exit status.

pub mod boot;
pub mod init;
pub mod keeper;
pub mod output;
pub mod supervise;
pub mod terminal;
pub mod workspace;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};

use crate::accel::Accel;
use crate::cache::Cache;
use crate::cli::{CpuList, GuestArgs};
use crate::driver;
use crate::net::port_name;
use crate::nic::{self, Mac, Nic};
use crate::progress::say;
use crate::vmm::Machine;

use boot::BootFiles;
use init::Plan;
use keeper::Keeper;
use supervise::{Ending, Supervisor};
use terminal::Terminal;
use workspace::Workspace;

/// What the guest is for.
#[derive(Debug, Clone)]
pub enum Purpose {
    /// Run this command and end.
    Command(Vec<OsString>),
    /// Talk to the terminal.
    Shell,
}

/// An ordinary interface of the guest.
#[derive(Debug, Clone)]
pub struct Interface {
    /// The host's interface that it is plugged into.
    pub port: String,
    /// Its address.
    pub mac: Mac,
    /// Its IP addresses with their prefix lengths, as text.
    pub addresses: Vec<String>,
}

/// Everything about the one guest that the virtual machine monitors need to know.
#[derive(Debug)]
pub struct Spec {
    /// Memory in mebibytes.
    pub mem_mib: u64,
    /// Number of CPUs.
    pub cpus: u8,
    /// The virtual NICs; the socket of the `n`th appears in the workspace as `nic<n>`.
    pub nics: Vec<Nic>,
    /// The ordinary interfaces.
    pub interfaces: Vec<Interface>,
    /// Whether there is a shared folder.
    pub share: bool,
    /// Whether a terminal is attached.
    pub shell: bool,
    /// More words for the kernel's command line.
    pub append: String,
}

/// What a guest is put together from.
struct Parts {
    machine: Machine,
    accel: Option<Accel>,
    module: Option<PathBuf>,
}

/// Boots a guest and returns the exit status for this process.
pub fn run(cache: &Cache, args: &GuestArgs, purpose: &Purpose) -> Result<u8> {
    check_host(args)?;
    let deadline = args.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let machine = Machine::get(cache, args.kind)?;
    let module = driver::for_guest(cache, args, &machine)?;
    let accel = machine.accel(args.accel)?;
    let spec = spec(args, purpose)?;
    let ports: Vec<String> = spec.interfaces.iter().map(|interface| interface.port.clone()).collect();
    let keeper = Keeper::start(&args.net, machine.port_kind(), &ports)?;
    let result = boot(cache, args, purpose, &Parts { machine, accel, module }, &spec, deadline);
    keeper.finish();
    result
}

fn check_host(args: &GuestArgs) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("guests need root: for network namespaces, tap interfaces and mounts of their own");
    }
    if let Some(CpuList(list)) = &args.pin {
        check_cpus(list)?;
    }
    match &args.share {
        Some(dir) if !dir.is_dir() => bail!("--share {}: not a folder", dir.display()),
        _ => Ok(()),
    }
}

/// Each by itself, as the kernel takes a list in which only some are there.
fn check_cpus(list: &[usize]) -> Result<()> {
    let is_there =
        |cpu: usize| std::thread::spawn(move || init::run_on(&[cpu])).join().is_ok_and(|result| result.is_ok());
    match list.iter().find(|&&cpu| !is_there(cpu)) {
        Some(cpu) => bail!("--pin: this machine has no CPU {cpu} that may be used (`nproc` tells how many there are)"),
        None => Ok(()),
    }
}

fn spec(args: &GuestArgs, purpose: &Purpose) -> Result<Spec> {
    let nics = args.nics.iter().map(|path| nic::probe(path)).collect::<Result<Vec<_>>>()?;
    let count = nics.len().max(args.ips.len()).max(1);
    let interfaces = (0..count).map(|index| interface(args, &nics, index)).collect::<Result<_>>()?;
    Ok(Spec {
        mem_mib: args.mem.mib,
        cpus: args.cpus,
        nics,
        interfaces,
        share: args.share.is_some(),
        shell: matches!(purpose, Purpose::Shell),
        append: args.append.clone().unwrap_or_default(),
    })
}

fn interface(args: &GuestArgs, nics: &[Nic], index: usize) -> Result<Interface> {
    let mac = match nics.get(index) {
        Some(nic) => nic.mac,
        None => Mac::random()?,
    };
    let list = args.ips.get(index).map(|list| list.0.as_slice()).unwrap_or_default();
    let addresses = list.iter().map(|(address, length)| format!("{address}/{length}")).collect();
    Ok(Interface { port: port_name(std::process::id(), index), mac, addresses })
}

fn boot(
    cache: &Cache,
    args: &GuestArgs,
    purpose: &Purpose,
    parts: &Parts,
    spec: &Spec,
    deadline: Option<Instant>,
) -> Result<u8> {
    let workspace = Workspace::enter(&cache.run_dir(), spec, args.share.as_deref())?;
    let Parts { machine, accel, module } = parts;
    machine.write_boot(&workspace, &BootFiles { spec, purpose, machine, module: module.as_deref() })?;
    let plan = Plan {
        namespace: args.net.namespace_file(),
        cpus: args.pin.as_ref().map(|list| list.0.clone()).unwrap_or_default(),
        argv: machine.command_line(spec, &workspace, *accel)?,
        console: workspace.console(),
        tmp: workspace.path().to_owned(),
    };
    let supervisor = Supervisor::new(&workspace, deadline, args.verbose)?;
    let terminal = spec.shell.then(Terminal::open).transpose()?;
    if spec.shell {
        // Every key is the guest's from here on, Ctrl-C too.
        say(&format!("booting; what ends a guest that shows no prompt: kill {}", std::process::id()));
    }
    let (child, lifeline) = start(&plan, &workspace, terminal.as_ref())?;
    let ending = supervisor.wait(child)?;
    drop((lifeline, terminal));
    report(&ending, &workspace, args)
}

/// Starts the first process of the guest's own namespaces. It dies with the lifeline that is returned.
fn start(plan: &Plan, workspace: &Workspace, terminal: Option<&Terminal>) -> Result<(std::process::Child, OwnedFd)> {
    let file = workspace.path().join("plan");
    std::fs::write(&file, serde_json::to_vec(plan)?).context("cannot write the plan")?;
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("cannot make a pipe")?;
    unshare(CloneFlags::CLONE_NEWPID).context("cannot make a process namespace")?;
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    command.arg("internal-init").arg(file).stderr(Stdio::inherit());
    // The lifeline and, for a shell, the terminal.
    command
        .stdin(read)
        .stdout(terminal.map_or_else(|| Ok(Stdio::null()), |terminal| terminal.handle().map(Stdio::from))?);
    Ok((command.spawn().context("cannot start the guest's first process")?, write))
}

fn report(ending: &Ending, workspace: &Workspace, args: &GuestArgs) -> Result<u8> {
    match ending {
        Ending::Status(status) => Ok(*status),
        Ending::Signal(signal) => Ok(128 + *signal),
        Ending::OutputClosed => Ok(141),
        Ending::Timeout => {
            say(&format!("no end after {} s: the guest was stopped", args.timeout.unwrap_or_default()));
            Ok(124)
        }
        Ending::Failed(why) => bail!("{why}; its last messages were:\n{}", crate::progress::tail(&workspace.console())),
    }
}
