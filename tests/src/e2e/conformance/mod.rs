//! rdma-core's own tests in real guests: on our device, and to compare on rxe in the same guests.
//!
//! * `suite.py` is the guests' end: it runs the tests as Debian ships them.
//! * [`verdict`] is how one test ended, [`skips`] what `docs/verbs.md` says of those that are skipped.
//! * [`compare`] lays both devices side by side.

pub mod compare;
pub mod skips;
pub mod verdict;

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::bed::Bed;
use super::guest::{Distro, Job, Kind, Vmm};
use super::report::Reporter;
use super::suite::Scene;
use compare::Comparison;
use verdict::Verdict;

const SUITE: &str = include_str!("suite.py");
/// How long the whole suite may take, on a busy machine and with some tests that hang.
const PATIENCE: Duration = Duration::from_mins(15);
/// Makes rxe usable beside our device, on an interface of its own.
pub const RXE: &str = "modprobe -a rdma_rxe dummy 2>/dev/null
ip link add rxenet type dummy && ip address add 10.43.0.1/24 dev rxenet && ip link set rxenet up
rdma link add rxe0 type rxe netdev rxenet
DEV=rxe0; rescan";

/// The tests whose name matches the pattern, on one RDMA device of each guest; the guests share the work.
///
/// What fails gets a second run with nothing beside it: some tests expect completions within a moment of the post, and fail on
/// rxe, too, when the machine is busy (`suite.py` mends one of those as rdma-core has).
fn run(bed: &Bed, device: &str, pattern: &str) -> Result<Vec<Verdict>> {
    bed.put("suite.py", SUITE)?;
    let mut verdicts = run_in(bed, bed.nics(), device, pattern)?;
    ensure!(!verdicts.is_empty(), "no test is called {pattern}");
    for verdict in verdicts.iter_mut().filter(|verdict| verdict.kind.is_fault()) {
        *verdict = run_in(bed, 0..1, device, &verdict.test)?.pop().context("a test is gone")?;
    }
    verdicts.sort_by(|a, b| a.test.cmp(&b.test));
    Ok(verdicts)
}

fn run_in(bed: &Bed, nics: Range<usize>, device: &str, pattern: &str) -> Result<Vec<Verdict>> {
    let claims = format!("/share/claims.{device}");
    let script = format!("rescan; exec python3 /share/suite.py {device} {claims} '{pattern}'");
    bed.guest(0)?.must(&format!("rm -rf {claims}; mkdir {claims}"))?;
    let jobs = nics.map(|nic| bed.guest(nic)?.start_script(&script)).collect::<Result<Vec<Job>>>()?;
    let mut verdicts = Vec::new();
    for job in jobs {
        let done = job.wait(PATIENCE)?;
        ensure!(done.status == 0, "the suite ended with status {}:\n{}", done.status, done.output);
        verdicts.extend(verdict::parse(&done.output)?);
    }
    Ok(verdicts)
}

/// Our half: nothing fails, and what is skipped is what `docs/verbs.md` says.
pub fn ours(bed: &Bed) -> Result<Vec<Verdict>> {
    let verdicts = run(bed, OURS, "*")?;
    let faults: Vec<String> = verdicts.iter().filter(|verdict| verdict.kind.is_fault()).map(Verdict::report).collect();
    let skips = skips::check(&verdicts, bed.kind(0).distro);
    match (faults.is_empty(), skips) {
        (true, skips) => skips.map(|()| verdicts),
        (false, Ok(())) => bail!("{} tests fail\n{}", faults.len(), faults.join("\n")),
        (false, Err(skips)) => bail!("{} tests fail\n{}\n{skips:#}", faults.len(), faults.join("\n")),
    }
}

/// Name of our device.
pub const OURS: &str = "rxe_vrdma0";

/// Both devices in two guests of a distribution; what to print.
pub fn against_rxe(distro: Distro, pattern: &str, reporter: &mut Reporter) -> Result<Option<Comparison>> {
    let scene = Scene::new(vec![Kind::base(Vmm::Uml, distro); 2], [].into_iter());
    let place = scene.place();
    let Some(bed) = scene.boot(&place, reporter)? else { return Ok(None) };
    let mut comparison = None;
    reporter.check(&place, "rdma-core's tests: none fails, all that pass on rxe pass", || {
        let ours = run(&bed, OURS, pattern)?;
        bed.settle()?;
        bed.complaints()?;
        bed.nics().try_for_each(|nic| bed.guest(nic)?.must(RXE).map(drop)).context("rxe does not work")?;
        let found = comparison.insert(Comparison::new(distro, ours, run(&bed, "rxe0", pattern)?));
        found.judge().map(|()| None)
    })?;
    Ok(comparison)
}
