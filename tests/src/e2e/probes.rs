//! What a virtual NIC does not offer: each attempt gives the error that `docs/verbs.md` names.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use super::bed::Bed;
use crate::page;

const PROBES: &str = include_str!("probes.py");

/// Makes all attempts in one guest.
pub fn check(bed: &Bed, nic: usize) -> Result<()> {
    bed.put("probes.py", PROBES)?;
    let output = bed.guest(nic)?.must("rescan; exec python3 /share/probes.py $DEV")?;
    let (seen, listed) = (seen(&output), listed(page::VERBS));
    ensure!(seen == listed, "docs/verbs.md lists {listed:?}, but the guest sees\n{output}");
    Ok(())
}

/// Lines of `NAME ERRNO`.
fn seen(output: &str) -> BTreeMap<&str, &str> {
    output.lines().filter_map(|line| line.split_once(' ')).collect()
}

fn listed(page: &str) -> BTreeMap<&str, &str> {
    let rows = page::rows(page, "Not offered").into_iter();
    rows.filter_map(|row| Some((*page::names(row.first()?).first()?, *page::names(row.get(2)?).first()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_probe_is_listed() {
        let methods = PROBES.lines().filter_map(|line| line.strip_prefix("    def ")?.strip_suffix("(self):"));
        let probes: Vec<&str> =
            methods.take_while(|name| *name != "__init__").filter(|name| !name.starts_with('_')).collect();
        let listed: Vec<&str> = listed(page::VERBS).into_keys().collect();
        assert!(probes.len() > 10 && probes.iter().all(|probe| listed.contains(probe)), "{probes:?} {listed:?}");
    }
}
