//! Fork, exec, many processes and many threads in one guest, their data compared.

use anyhow::{Result, ensure};

use super::bed::Bed;

const SCRIPT: &str = include_str!("processes.py");
/// What scripts in guests import, by its name there.
pub const RC_PAIR: (&str, &str) = ("rc_pair.py", include_str!("rc_pair.py"));
/// What `processes.py` can do, with a word for people.
pub const KINDS: [(&str, &str); 4] = [
    ("fork", "forks of a process with registered memory"),
    ("exec", "programs that a process starts"),
    ("many", "32 processes with 3 contexts each"),
    ("threads", "200 threads on one completion queue"),
];

/// One of [`KINDS`].
pub fn check(bed: &Bed, nic: usize, kind: &str) -> Result<()> {
    bed.put(RC_PAIR.0, RC_PAIR.1)?;
    bed.put("processes.py", SCRIPT)?;
    let output = bed.guest(nic)?.must(&format!("rescan; exec python3 /share/processes.py $DEV $GID {kind}"))?;
    ensure!(output.trim_end() == "all data arrived", "{output}");
    Ok(())
}
