//! The command line.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use thiserror::Error;

use crate::accel::Choice;
use crate::net::{NetName, PortKind};
use crate::roots::{Distro, Software};

const EXAMPLES: &str = "\
Examples:
  # List the RDMA devices of a guest that has the virtual NIC served on /run/freeflow/a.sock:
  qemu/guest run --nic /run/freeflow/a.sock --ip 10.0.0.1/24 -- ibv_devinfo

  # Two guests on one network, the second with the older distribution:
  qemu/guest run --nic a.sock --ip 10.0.0.1/24 -- ib_write_bw &
  qemu/guest run --distro bookworm --nic b.sock --ip 10.0.0.2/24 -- ib_write_bw 10.0.0.1

  # The fastest start, for trying things out:
  qemu/guest shell --vmm uml

Everything that a guest needs is made on first use and kept in $FREEFLOW_CACHE, else
$XDG_CACHE_HOME/freeflow, else ~/.cache/freeflow. `prepare` does it ahead of time. Needs root.

Exit status of `run`: that of COMMAND (128 + N if signal N ended it); 124 after a timeout; 125 if
the guest could not be started or died; 130 after Ctrl-C, 143 after SIGTERM.";

/// Boots throw-away Linux guests with Freeflow's virtual RDMA NICs.
///
/// A guest runs a real kernel and an unmodified Debian user space; the only thing of ours in it is the
/// kernel module. Nothing of a guest outlives it.
#[derive(Debug, Parser)]
#[command(name = "qemu/guest", version, after_help = EXAMPLES, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Boot a guest, run COMMAND in it, and end with its exit status.
    Run(RunArgs),
    /// Boot a guest with a prompt on this terminal; leave it with `exit`.
    Shell(GuestArgs),
    /// Make and cache what guests need, ahead of time.
    Prepare(PrepareArgs),
    /// Print where a part of the cache is, making it when missing.
    Path {
        /// Which part.
        part: Part,
    },
    /// Build the guest driver for one kind of guest; print where the module is, or the compiler's complaints.
    Module(ModuleArgs),
    /// Internal: holds a guest's membership in a network until its standard input ends.
    #[command(hide = true)]
    InternalKeep {
        /// The network.
        #[arg(long)]
        net: NetName,
        /// Kind of the ports to make in it.
        #[arg(long, value_enum)]
        kind: PortKind,
        /// Names of these ports.
        ports: Vec<String>,
    },
    /// Internal: runs a plan as the first process of a guest's namespaces.
    #[command(hide = true)]
    InternalInit {
        /// File that holds the plan.
        plan: PathBuf,
    },
    /// Internal: runs a command inside a cached root file system.
    #[command(hide = true)]
    InternalEnter {
        /// The root file system, read-only.
        root: PathBuf,
        /// Folder that appears as /mnt.
        mnt: PathBuf,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Vmm {
    /// A virtual machine, with the distribution's own kernel.
    Qemu,
    /// User-mode Linux 7.2: up in a second, user code at native speed, system calls slow.
    Uml,
}

/// Parts of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Kernel tree to build modules for User-mode Linux against: make -C DIR ARCH=um M=$PWD.
    UmlBuild,
    /// The User-mode Linux kernel itself.
    UmlKernel,
    /// Root file system with the headers and the compiler of Debian 12's kernel (use `module` to build in it).
    BookwormHeaders,
    /// The same for Debian 13.
    TrixieHeaders,
    /// The guest's user space, Debian 12.
    BookwormRoot,
    /// The guest's user space, Debian 13.
    TrixieRoot,
}

/// Which kind of guest.
#[derive(Debug, Clone, Copy, Args)]
pub struct KindArgs {
    /// What runs the guest.
    #[arg(long, value_enum, default_value = "qemu")]
    pub vmm: Vmm,
    /// The guest's user space, and with QEMU its kernel.
    #[arg(long, value_enum, default_value = "trixie")]
    pub distro: Distro,
    /// How much is installed in the guest.
    #[arg(long, value_enum, default_value = "base")]
    pub software: Software,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The guest.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// The command and its arguments, passed on exactly as they are (no shell in between).
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// How a guest is to be.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// Its kind.
    #[command(flatten)]
    pub kind: KindArgs,
    /// Give the guest the virtual NIC that a router serves on this vhost-user socket. May be repeated.
    #[arg(long = "nic", value_name = "SOCKET")]
    pub nics: Vec<PathBuf>,
    /// Address of eth0, and of eth1 when given again, and so on (several for one interface: ADDR/LEN,ADDR/LEN).
    /// eth0 rides beside the first virtual NIC (with its MAC), eth1 beside the second.
    #[arg(long = "ip", value_name = "ADDR/LEN")]
    pub ips: Vec<AddressList>,
    /// The plain IP network of the eth interfaces; guests on the same one reach each other.
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub net: NetName,
    /// The guest's memory: a number with K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub mem: MemSize,
    /// The guest's CPUs.
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub cpus: u8,
    /// Keep the guest's processes on these host CPUs, such as 0 or 0,2-3. User-mode Linux makes system calls six times faster on one.
    #[arg(long, value_name = "CPULIST")]
    pub pin: Option<CpuList>,
    /// Host folder that appears in the guest as /share, writable.
    #[arg(long, value_name = "HOSTDIR")]
    pub share: Option<PathBuf>,
    /// Give up after this many seconds, boot included.
    #[arg(long, value_name = "SECS")]
    pub timeout: Option<u64>,
    /// How QEMU runs the guest's code; `auto` tries KVM once by starting a guest.
    #[arg(long, value_enum, default_value = "auto")]
    pub accel: Choice,
    /// Sources of the driver, or a built module (.ko), or `none` to load no driver.
    #[arg(long, value_name = "PATH")]
    pub driver: Option<PathBuf>,
    /// Words to append to the guest kernel's command line.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Show the guest kernel's messages on standard error.
    #[arg(long, short)]
    pub verbose: bool,
}

/// Arguments of `prepare`.
#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// One kind of guest.
    #[command(flatten)]
    pub kind: KindArgs,
    /// Every kind of guest with the base software.
    #[arg(long, conflicts_with_all = ["vmm", "distro", "software"])]
    pub all: bool,
}

/// Arguments of `module`.
#[derive(Debug, Args)]
pub struct ModuleArgs {
    /// Kind of guest to build for.
    #[command(flatten)]
    pub kind: KindArgs,
    /// Folder with the driver's sources.
    #[arg(value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Why an argument was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BadArgument {
    /// Not a size.
    #[error("a size is a number with K, M or G, such as 512M, of at least 64M")]
    Size,
    /// Not a list of CPUs.
    #[error("a list of CPUs looks like 0 or 0,2-3")]
    Cpus,
    /// Not an address.
    #[error("an address looks like 10.0.0.1/24 or fd00::1/64")]
    Address,
}

/// An amount of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemSize {
    /// Mebibytes.
    pub mib: u64,
}

impl FromStr for MemSize {
    type Err = BadArgument;

    fn from_str(text: &str) -> Result<Self, BadArgument> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let number: u64 = digits.parse().map_err(|_| BadArgument::Size)?;
        let mib = match text[digits.len()..].to_ascii_uppercase().as_str() {
            "K" | "KB" | "KIB" => Some(number / 1024),
            "M" | "MB" | "MIB" => Some(number),
            "G" | "GB" | "GIB" => number.checked_mul(1024),
            _ => None,
        };
        mib.filter(|mib| *mib >= 64).map(|mib| Self { mib }).ok_or(BadArgument::Size)
    }
}

/// A list of host CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

impl FromStr for CpuList {
    type Err = BadArgument;

    fn from_str(text: &str) -> Result<Self, BadArgument> {
        let number = |text: &str| text.parse::<usize>().ok().filter(|cpu| *cpu < 1024).ok_or(BadArgument::Cpus);
        let mut cpus = Vec::new();
        for part in text.split(',') {
            match part.split_once('-') {
                Some((first, last)) => cpus.extend(number(first)?..=number(last)?),
                None => cpus.push(number(part)?),
            }
        }
        if cpus.is_empty() { Err(BadArgument::Cpus) } else { Ok(Self(cpus)) }
    }
}

/// The addresses of one interface, each with its prefix length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressList(pub Vec<(IpAddr, u8)>);

impl FromStr for AddressList {
    type Err = BadArgument;

    fn from_str(text: &str) -> Result<Self, BadArgument> {
        text.split(',').map(parse_address).collect::<Option<_>>().map(Self).ok_or(BadArgument::Address)
    }
}

fn parse_address(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = text.split_once('/')?;
    let (address, length): (IpAddr, u8) = (address.parse().ok()?, length.parse().ok()?);
    let longest = if address.is_ipv4() { 32 } else { 128 };
    (length <= longest).then_some((address, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_is_passed_on_as_it_is() {
        let cli = Cli::parse_from(["guest", "run", "--nic", "a", "--nic", "b", "--", "sh", "-c", "exit  7", "--nic"]);
        let Action::Run(args) = cli.action else { panic!("not run") };
        assert_eq!(args.command, ["sh", "-c", "exit  7", "--nic"]);
        assert_eq!(args.guest.nics, [PathBuf::from("a"), PathBuf::from("b")]);
    }

    #[test]
    fn sizes() {
        assert_eq!("2G".parse(), Ok(MemSize { mib: 2048 }));
        assert_eq!("512m".parse(), Ok(MemSize { mib: 512 }));
        for bad in ["", "G", "12", "1M", "-1G", "99999999999999999999G", "18446744073709551615G", "1T"] {
            assert_eq!(bad.parse::<MemSize>(), Err(BadArgument::Size), "{bad}");
        }
    }

    #[test]
    fn cpu_lists() {
        assert_eq!("0,2-4".parse(), Ok(CpuList(vec![0, 2, 3, 4])));
        for bad in ["", "a", "1-", "3-1", "0,,1", "99999"] {
            assert_eq!(bad.parse::<CpuList>(), Err(BadArgument::Cpus), "{bad}");
        }
    }

    #[test]
    fn addresses() {
        assert_eq!("10.0.0.1/24,fd00::1/64".parse::<AddressList>().unwrap().0.len(), 2);
        for bad in ["", "10.0.0.1", "10.0.0.1/33", "fd00::1/129", "x/1", "10.0.0.1/24,"] {
            assert_eq!(bad.parse::<AddressList>(), Err(BadArgument::Address), "{bad}");
        }
    }
}
