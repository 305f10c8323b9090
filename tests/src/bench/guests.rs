//! Stock perftest in real guests, on our device and on rxe in the same guest, in turn.

use anyhow::{Context, Result};

use super::alternate;
use super::table::{Bar, Row};
use crate::e2e::bed::Bed;
use crate::e2e::guest::{Distro, Guest, Kind, Vmm};
use crate::e2e::perf::{Perf, Program, READ_LAT, WRITE_BW};

/// Makes rxe usable beside our device: on an interface of its own.
const RXE: &str = "modprobe rdma_rxe 2>/dev/null; modprobe dummy 2>/dev/null
ip link add rxenet type dummy && ip address add 10.43.0.1/24 dev rxenet && ip link set rxenet up
rdma link add rxe0 type rxe netdev rxenet
for turn in {1..50}; do rdma link show rxe0/1 | grep -q ACTIVE && break; sleep 0.1; done
rescan; rdma link show rxe0/1";

/// Every row of this module for one kind of guest.
///
/// # Errors
/// When the guest or a program in it fails.
pub fn rows(vmm: Vmm) -> Result<Vec<Row>> {
    let bed = Bed::start(&[Kind { vmm, distro: Distro::Trixie }])?;
    let guest = bed.guest(0)?;
    guest.must(RXE).context("rxe does not work in the guest")?;
    let (least, bandwidth_count, most, latency_count) = match vmm {
        Vmm::Uml => (10.0, 1_000, 1.0, 1_000),
        Vmm::Qemu => (30.0, 200, 0.2, 200),
    };
    let bandwidth = Perf::new(WRITE_BW, 65_536, bandwidth_count);
    let latency = Perf::new(READ_LAT, 64, latency_count);
    let name = |what: &str| format!("{} {what}, one guest", vmm.name());
    Ok(vec![
        compare(guest, &name("ib_write_bw 64 KiB"), bandwidth, Bar::AtLeast(least))?,
        compare(guest, &name("ib_read_lat 64 B"), latency, Bar::AtMost(most))?,
    ])
}

fn compare(guest: &Guest, name: &str, perf: Perf, bar: Bar) -> Result<Row> {
    let program = Program::from(perf);
    let (value, other, ratio) =
        alternate(|| loopback(guest, &program, "rxe_vrdma0", "eth0"), || loopback(guest, &program, "rxe0", "rxenet"))?;
    let against = format!("rxe {other:.2} {}", program.unit());
    Ok(Row::ratio(name, value, program.unit(), &against, ratio, bar))
}

/// Both ends in one guest, on the RoCE v2 GID of the device's IPv4 address.
fn loopback(guest: &Guest, program: &Program, device: &str, netdev: &str) -> Result<f64> {
    let command = program.command(20_000);
    let script = format!(
        "DEV={device}
ip=$(ip -4 -br address show {netdev} | awk '{{ split($3, a, \"/\"); print a[1] }}')
for f in /sys/class/infiniband/$DEV/ports/1/gid_attrs/types/*; do
  grep -q v2 $f 2>/dev/null || continue; n=${{f##*/}}
  grep -q '0000:0000:0000:0000:0000:ffff' /sys/class/infiniband/$DEV/ports/1/gids/$n && GID=$n
done
{command} >/tmp/bench-server 2>&1 & server=$!
for turn in {{1..100}}; do grep -q -i ' :4E20 ' /proc/net/tcp && break; grep -q -i ':4E20 00000000:0000 0A' /proc/net/tcp /proc/net/tcp6 && break; sleep 0.1; done
{command} $ip || {{ cat /tmp/bench-server; exit 1; }}
wait $server"
    );
    let output = guest.must(&script)?;
    Ok(program.read(&output)?.value)
}
