//! Running a command of a cached root file system: in it, with the host's devices, and without changing it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::guest::workspace::bind;

/// The command that runs `command` in `root`, where the folder `mnt` appears as `/mnt`.
pub fn wrap(root: &Path, mnt: &Path, command: impl IntoIterator<Item = OsString>) -> Result<Vec<OsString>> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut argv = vec![program.into_os_string(), "internal-enter".into(), root.into(), mnt.into(), "--".into()];
    argv.extend(command);
    Ok(argv)
}

/// Becomes the command; returns only when that fails.
pub fn enter(root: &Path, mnt: &Path, command: &[OsString]) -> Result<()> {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).context("cannot detach the mounts")?;
    bind(root, root)?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, root, none, read_only, none).context("cannot make the root file system read-only")?;
    for dir in ["dev", "proc", "sys"] {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&Path::new("/").join(dir)), &root.join(dir), none, flags, none)
            .with_context(|| format!("cannot mount {dir}"))?;
    }
    mount(Some("tmpfs"), &root.join("tmp"), Some("tmpfs"), MsFlags::empty(), none).context("cannot mount /tmp")?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(mnt), &root.join("mnt"), none, flags, none)
        .with_context(|| format!("cannot mount {}", mnt.display()))?;
    nix::unistd::chroot(root).context("cannot change the root")?;
    std::env::set_current_dir("/").context("cannot change the folder")?;
    let (program, args) = command.split_first().ok_or_else(|| anyhow!("no command"))?;
    let error =
        Command::new(program).args(args).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8").exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}
