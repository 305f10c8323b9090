//! The subcommands.

use std::path::PathBuf;

use anyhow::Result;

use crate::cache::Cache;
use crate::cli::{Action, Cli, KindArgs, ModuleArgs, Part, PrepareArgs, Vmm};
use crate::guest::{self, Purpose, init, keeper};
use crate::kernel::debian::DebianKernel;
use crate::kernel::uml::UmlKernel;
use crate::roots::{Distro, Software, guest_root};
use crate::vmm::Machine;
use crate::{driver, sandbox};

/// Does what the command line says; returns the exit status.
pub fn dispatch(cli: Cli) -> Result<u8> {
    match cli.action {
        Action::Run(args) => guest::run(&Cache::open()?, &args.guest, &Purpose::Command(args.command)),
        Action::Shell(args) => guest::run(&Cache::open()?, &args, &Purpose::Shell),
        Action::Prepare(args) => prepare(&args),
        Action::Path { part } => path(part),
        Action::Module(args) => module(&args),
        Action::InternalKeep { net, kind, ports } => keeper::keep(net, kind, ports).map(|()| 0),
        Action::InternalInit { plan } => init::run(&plan),
        Action::InternalEnter { root, mnt, command } => sandbox::enter(&root, &mnt, &command).map(|()| 0),
    }
}

fn base(vmm: Vmm, distro: Distro) -> KindArgs {
    KindArgs { vmm, distro, software: Software::Base }
}

fn prepare(args: &PrepareArgs) -> Result<u8> {
    let cache = Cache::open()?;
    let mut kinds = vec![args.kind];
    if args.all {
        let both = |distro| [Vmm::Uml, Vmm::Qemu].map(|vmm| base(vmm, distro));
        kinds = Distro::ALL.into_iter().flat_map(both).collect();
    }
    for kind in kinds {
        Machine::get(&cache, kind)?;
    }
    Ok(0)
}

fn path(part: Part) -> Result<u8> {
    let cache = Cache::open()?;
    let path: PathBuf = match part {
        Part::UmlBuild => UmlKernel::get(&cache)?.build_dir(),
        Part::UmlKernel => UmlKernel::get(&cache)?.image(),
        Part::BookwormHeaders => DebianKernel::get(&cache, Distro::Bookworm)?.build_root(),
        Part::TrixieHeaders => DebianKernel::get(&cache, Distro::Trixie)?.build_root(),
        Part::BookwormRoot => guest_root(&cache, base(Vmm::Uml, Distro::Bookworm))?,
        Part::TrixieRoot => guest_root(&cache, base(Vmm::Uml, Distro::Trixie))?,
    };
    println!("{}", path.display());
    Ok(0)
}

fn module(args: &ModuleArgs) -> Result<u8> {
    let cache = Cache::open()?;
    let machine = Machine::get(&cache, args.kind)?;
    println!("{}", driver::build(&cache, &machine, args.dir.as_deref())?.display());
    Ok(0)
}
