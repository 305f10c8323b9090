//! Memory with on-demand paging in one guest, whose mappings change under traffic, its data compared.

use anyhow::{Result, ensure};

use super::bed::Bed;
use super::processes::RC_PAIR;

const SCRIPT: &str = include_str!("paging.py");
/// What `paging.py` can do, with a word for people.
pub const KINDS: [(&str, &str); 8] = [
    ("replace", "on-demand memory, munmap and mmap under traffic"),
    ("discard", "on-demand memory, MADV_DONTNEED under traffic"),
    ("move", "on-demand memory, mremap under traffic"),
    ("unmap", "on-demand memory, munmap under traffic"),
    ("protect", "on-demand memory, mprotect under traffic"),
    ("fork", "on-demand memory, fork under traffic"),
    ("swap", "on-demand memory, swapped out under traffic"),
    ("prefetch", "on-demand memory, ibv_advise_mr"),
];

/// Swap space for as long as the script runs: a file in memory, which cannot be swapped to itself.
const SWAP: &str = "modprobe loop 2>/dev/null; mkdir /tmp/swap && mount -t tmpfs none /tmp/swap || exit
truncate -s 64M /tmp/swap/file && disk=$(losetup --find --show /tmp/swap/file) || exit
mkswap -q $disk && swapon $disk || exit
end() { swapoff $disk; losetup -d $disk; umount /tmp/swap && rmdir /tmp/swap; }
trap end EXIT";

/// Puts `paging.py` where guests see it.
pub fn put(bed: &Bed) -> Result<()> {
    bed.put(RC_PAIR.0, RC_PAIR.1)?;
    bed.put("paging.py", SCRIPT)
}

/// One of [`KINDS`].
pub fn check(bed: &Bed, nic: usize, kind: &str) -> Result<()> {
    put(bed)?;
    let prepare = if kind == "swap" { SWAP } else { "" };
    let output = bed.guest(nic)?.must(&format!("{prepare}\nrescan; python3 /share/paging.py $DEV $GID {kind}"))?;
    ensure!(output.trim_end() == "all data as it must be", "{output}");
    Ok(())
}
