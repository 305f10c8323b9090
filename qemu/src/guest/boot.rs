//! The files that a guest's first programs read. `assets/init` and `assets/stage2` are their other side.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::workspace::Workspace;
use super::{Purpose, Spec, terminal};
use crate::vmm::Machine;

const INIT: &str = include_str!("../../assets/init");
const STAGE2: &str = include_str!("../../assets/stage2");
/// The commands that `init` uses.
const APPLETS: [&str; 9] = ["chroot", "cp", "insmod", "ln", "mkdir", "mount", "poweroff", "sh", "uname"];
/// The folders that `init` mounts things on.
const FOLDERS: [&str; 8] = ["bin", "dev", "guest", "lower", "proc", "root", "rw", "sys"];
/// Clock rate to report where not even the host knows one.
const SOME_MHZ: &str = "2000.000";

/// Makes the skeleton that every guest of this release of the launcher boots from in `dir`.
pub fn skeleton(dir: &Path, busybox: &Path) -> Result<()> {
    for folder in FOLDERS {
        fs::create_dir(dir.join(folder))?;
    }
    fs::copy(busybox, dir.join("bin/busybox")).with_context(|| format!("cannot copy {}", busybox.display()))?;
    for applet in APPLETS {
        symlink("busybox", dir.join("bin").join(applet))?;
    }
    fs::write(dir.join("init"), INIT)?;
    fs::set_permissions(dir.join("init"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(())
}

/// What one guest's files are made from.
#[derive(Debug)]
pub struct BootFiles<'a> {
    /// The guest.
    pub spec: &'a Spec,
    /// What it is for.
    pub purpose: &'a Purpose,
    /// What runs it.
    pub machine: &'a Machine,
    /// The module to load.
    pub module: Option<&'a Path>,
}

impl BootFiles<'_> {
    /// Writes them into the folder `dir`, which becomes `/guest`.
    pub fn write(&self, workspace: &Workspace, dir: &Path) -> Result<()> {
        let put = |name: &str, content: &[u8]| {
            fs::write(dir.join(name), content).with_context(|| format!("cannot write {name}"))
        };
        put("stage2", STAGE2.as_bytes())?;
        put("env", &self.environment(workspace))?;
        put("nics", self.interfaces().as_bytes())?;
        put("command", &self.command())?;
        match self.module {
            Some(module) => fs::copy(module, dir.join(crate::driver::MODULE))
                .map(drop)
                .with_context(|| format!("cannot copy {}", module.display())),
            None => Ok(()),
        }
    }

    fn environment(&self, workspace: &Workspace) -> Vec<u8> {
        let facts = self.machine.boot_facts();
        let share = if self.spec.share { workspace.share() } else { PathBuf::new() };
        let shell = matches!(self.purpose, Purpose::Shell);
        let mhz = host_mhz().unwrap_or_else(|| SOME_MHZ.to_owned());
        let mut text = Vec::new();
        let mut set = |name: &str, value: &OsStr| {
            text.extend_from_slice(name.as_bytes());
            text.push(b'=');
            text.extend_from_slice(&quote(value));
            text.push(b'\n');
        };
        set("FF_VMM", facts.vmm.as_ref());
        set("FF_ROOT", facts.root.as_ref());
        set("FF_MODULES", facts.modules.as_ref());
        set("FF_CTL", workspace.ctl().as_ref());
        set("FF_SHARE", share.as_ref());
        set("FF_HOSTNAME", self.hostname().as_ref());
        set("FF_MHZ", mhz.as_ref());
        set("FF_MODE", if shell { "shell" } else { "run" }.as_ref());
        set("FF_TTY", facts.tty.as_ref());
        set("FF_TERM", std::env::var_os("TERM").unwrap_or_else(|| OsString::from("linux")).as_ref());
        set("FF_STTY", terminal::size_settings().as_ref());
        text
    }

    /// A name that differs between guests, from the first interface's address.
    fn hostname(&self) -> String {
        let tail = self.spec.interfaces.first().map(|interface| interface.mac.0).unwrap_or_default();
        format!("guest-{:02x}{:02x}{:02x}", tail[3], tail[4], tail[5])
    }

    fn interfaces(&self) -> String {
        let mut text = String::new();
        for (index, interface) in self.spec.interfaces.iter().enumerate() {
            // Addresses were parsed: nothing to quote.
            let _ = writeln!(text, "nic eth{index} {} {}", interface.mac, interface.addresses.join(" "));
        }
        text
    }

    fn command(&self) -> Vec<u8> {
        let Purpose::Command(argv) = self.purpose else { return Vec::new() };
        let words: Vec<Vec<u8>> = argv.iter().map(|word| quote(word)).collect();
        [b"set -- ".to_vec(), words.join(&b' '), b"\n".to_vec()].concat()
    }
}

/// A word in single quotes for a shell: exact for any bytes.
fn quote(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend_from_slice(b"'\\''"),
            other => quoted.push(*other),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// The clock rate of the host's first CPU, as `/proc/cpuinfo` has it.
fn host_mhz() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz"))?;
    line.split_once(':').map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn quoting_survives_a_shell() {
        let words = ["plain", "two  spaces", "it's", "$HOME `x` \\ \"", "", "a\nb", "--"];
        let mut odd: Vec<OsString> = words.iter().map(OsString::from).collect();
        odd.push(OsString::from_vec(vec![0xff, b'\'', 0xfe]));
        let script =
            [b"printf '%s\\0' ".to_vec(), odd.iter().map(|word| quote(word)).collect::<Vec<_>>().join(&b' ')].concat();
        let output = std::process::Command::new("sh").arg("-c").arg(OsString::from_vec(script)).output().unwrap();
        let expected: Vec<u8> = odd.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect();
        assert_eq!(output.stdout, expected);
    }

    #[test]
    fn the_init_uses_only_what_it_has() {
        for applet in APPLETS {
            assert!(INIT.contains(applet), "{applet} is not used");
        }
    }
}
