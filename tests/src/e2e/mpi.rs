//! Open MPI over UCX, its data compared (`ucx_perftest` compares none): entries for [`apps`](super::apps).

use std::time::Duration;

use anyhow::{Result, ensure};

use super::apps::App;
use super::bed::Bed;
use super::router::address_of;

/// All of them.
pub static MPI: &[App] = &[
    App::steps("Open MPI over UCX rc, data compared", |bed| ranks(bed, "rc_verbs,ud_verbs,self")),
    App::steps("Open MPI over UCX ud, data compared", |bed| ranks(bed, "ud_verbs,self")),
];

/// How long all ranks may take.
const PATIENCE: Duration = Duration::from_mins(2);

/// Bytes that a rank sends at least.
const BYTES: u64 = 24 << 20;

/// A rank in each guest. Without TCP and shared memory to fall back on: that is for Open MPI's own daemons, which `mpirun` starts
/// through a script instead of ssh.
fn ranks(bed: &Bed, transports: &str) -> Result<String> {
    let (first, second) = (bed.guest(0)?, bed.guest(1)?);
    bed.put("mpi_check.py", include_str!("mpi_check.py"))?;
    bed.put("mpi_rsh", include_str!("mpi_rsh"))?;
    first.must("chmod +x /share/mpi_rsh; rm -f /share/mpi.cmd /share/mpi.status")?;
    let environment = format!("export UCX_TLS={transports} UCX_NET_DEVICES=$DEV:1 UCX_IB_GID_INDEX=$GID");
    let daemon = format!(
        "rescan || exit; {environment}\nfor turn in {{1..600}}; do [ -e /share/mpi.cmd ] && break; tick; done\n\
        timeout 100 bash /share/mpi.cmd; status=$?; echo $status >/share/mpi.status; exit $status"
    );
    let hosts = format!("{}:2,{}:2", address_of(1), address_of(0));
    let run = format!(
        "rescan || exit; {environment}\ntimeout 100 mpirun --allow-run-as-root -H {hosts} --map-by ppr:1:node \
        --mca plm_rsh_agent /share/mpi_rsh --mca pml ucx --mca osc ucx --mca btl self python3 /share/mpi_check.py"
    );
    let before = bed.router.nics()?[1].counters.send_bytes;
    let daemon = first.start_script(&daemon)?;
    let done = second.run(&run, PATIENCE)?;
    let other = daemon.wait(PATIENCE)?;
    let carried = bed.router.nics()?[1].counters.send_bytes - before;
    let output = format!("mpirun:\n{}\nthe other guest:\n{}", done.output, other.output);
    ensure!((done.status, other.status) == (0, 0), "status {} and {}\n{output}", done.status, other.status);
    ensure!(output.matches("all equal").count() == 2, "{output}");
    ensure!(carried >= BYTES, "only {carried} bytes went over the virtual NIC\n{output}");
    Ok(output)
}
