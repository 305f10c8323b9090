//! Users of RDMA in the guests' kernels, SMC-R and `NVMe`: entries for [`apps`](super::apps).

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::apps::App;
use super::bed::Bed;
use super::child::sibling;
use super::guest::Guest;
use super::interrupt::within;
use super::rdma_cm::wait_until;
use super::router::address_of;

/// All of them.
pub static KERNEL_USERS: &[App] = &[
    SMC_R,
    App::steps("SMC sockets whose peer has none", smc_to_tcp),
    App::steps("NVMe over RDMA, with a file system on it", nvme),
];

const SMC_R: App = App::steps("SMC-R under an unmodified web server and client", smc);

/// How long one program may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// What goes before a program that is to use SMC.
pub(crate) const PRELOAD: &str = "export LD_PRELOAD=/share/libfreeflow_smc.so";

/// The file goes over the virtual NIC, and nothing but our library says so to the programs.
fn smc(bed: &Bed) -> Result<String> {
    let (output, carried) = with_smc(bed, || web(bed, [PRELOAD; 2], "listens 8080"))?;
    ensure!(carried >= WEB_BYTES, "only {carried} bytes went over the virtual NIC\n{output}");
    Ok(output)
}

/// A server without SMC is reached over TCP.
fn smc_to_tcp(bed: &Bed) -> Result<String> {
    let (output, carried) = with_smc(bed, || web(bed, ["", PRELOAD], "listens 8080"))?;
    ensure!(carried < WEB_BYTES, "{carried} bytes went over the virtual NIC\n{output}");
    Ok(output)
}

/// What programs printed in two guests that have SMC, and how many bytes their virtual NICs sent meanwhile.
pub(super) fn with_smc(bed: &Bed, talk: impl FnOnce() -> Result<String>) -> Result<(String, u64)> {
    load_smc(bed)?;
    let ends = [bed.guest(0)?, bed.guest(1)?];
    let before = bed.router.sent_bytes()?;
    let output = talk();
    let carried = bed.router.sent_bytes()? - before;
    each(ends, NEW_DEVICE)?;
    each(ends, NO_SMC)?;
    Ok((output?, carried))
}

/// Gives two guests SMC, and the library that [`PRELOAD`] names.
pub(crate) fn load_smc(bed: &Bed) -> Result<()> {
    let library = sibling("FREEFLOW_SMC_LIB", "libfreeflow_smc.so")?;
    fs::copy(&library, bed.share().join("libfreeflow_smc.so")).context("cannot hand the library to the guests")?;
    each([bed.guest(0)?, bed.guest(1)?], "modprobe smc")
}

/// Has the device go and come again. SMC keeps its queue pairs for ten minutes, and `ib_core` the completion queues of its pool, for
/// whoever comes next; both give them up when the device goes.
const NEW_DEVICE: &str = "rmmod virtio_rdma && insmod $MODULE && rescan || exit";

/// Ends SMC.
const NO_SMC: &str = "for turn in {1..200}; do rmmod smc 2>/tmp/why && exit; tick; done; cat /tmp/why; exit 1";

/// Bytes of the file that [`web`] fetches.
const WEB_BYTES: u64 = 8 << 20;

/// A web server in the first guest, of which the second fetches a file; checksums are compared. The shell of each is prepared first.
fn web(bed: &Bed, [server, client]: [&str; 2], ready: &str) -> Result<String> {
    let (first, address) = (bed.guest(0)?, address_of(0));
    first.must(&format!("mkdir -p /tmp/web; head -c {WEB_BYTES} /dev/urandom >/tmp/web/file"))?;
    let sum = first.must("sha256sum </tmp/web/file")?;
    let serve = format!(
        "cd /tmp/web || exit; {server}\npython3 -m http.server 8080 --bind {address} >/tmp/served 2>&1 & \
        echo $! >/tmp/web.pid; wait"
    );
    let job = first.start_script(&serve)?;
    wait_until(first, ready)?;
    let fetch = format!(
        "from urllib.request import urlopen; import hashlib; \
        print(hashlib.sha256(urlopen('http://{address}:8080/file').read()).hexdigest())"
    );
    let client = bed.guest(1)?.run(&format!("{client}\n{} python3 -c \"{fetch}\"", within(30)), PATIENCE)?;
    let log = first.must("kill $(</tmp/web.pid); cat /tmp/served")?;
    job.wait(PATIENCE)?;
    let output = format!("server:\n{log}\nclient:\n{}", client.output);
    ensure!(client.output.split_whitespace().next() == sum.split_whitespace().next(), "checksum {sum}\n{output}");
    Ok(output)
}

fn each(guests: [&Guest; 2], script: &str) -> Result<()> {
    guests.into_iter().try_for_each(|guest| guest.must(script).map(drop))
}

/// Bytes that [`nvme`] writes at least.
const DISK_BYTES: u64 = 16 << 20;

/// A disk of the first guest in the second, over the virtual NIC.
fn nvme(bed: &Bed) -> Result<String> {
    let (target, host) = (bed.guest(0)?, bed.guest(1)?);
    let at = format!("ADDRESS={}", address_of(0));
    target.must(&format!("{at}\n{}", include_str!("nvme_target.sh")))?;
    let before = bed.router.nics()?[0].counters.send_bytes;
    let output = host.must(&format!("{at}\n{}", include_str!("nvme_host.sh")));
    let carried = bed.router.nics()?[0].counters.send_bytes - before;
    target.must(include_str!("nvme_target_end.sh"))?;
    each([target, host], NEW_DEVICE)?;
    ensure!(carried >= DISK_BYTES, "only {carried} bytes came over the virtual NIC\n{}", output?);
    output
}
