//! Stock perftest in real guests, on our device and on rxe in the same guest, in turn.

use anyhow::{Context, Result};

use super::alternate;
use super::table::{Bar, Row};
use crate::e2e::bed::Bed;
use crate::e2e::guest::{Distro, Guest, Kind, Vmm};
use crate::e2e::hosts::Layout;
use crate::e2e::pair::{PATIENCE, Pair, judge};
use crate::e2e::perf::{Perf, Program, READ_LAT, WRITE_BW};
use crate::e2e::router::address_of;

/// An RDMA device of the guest, with its address.
pub(super) type Device = (&'static str, String);

/// Makes rxe usable beside our device, on an interface of its own.
pub(super) const RXE: &str = "modprobe -a rdma_rxe dummy 2>/dev/null
ip link add rxenet type dummy && ip address add 10.43.0.1/24 dev rxenet && ip link set rxenet up
rdma link add rxe0 type rxe netdev rxenet
DEV=rxe0; rescan";

/// Every row of this module for one kind of guest.
///
/// # Errors
/// When the guest or a program in it fails.
pub fn rows(vmm: Vmm) -> Result<Vec<Row>> {
    let bed = Bed::start(&[Kind::base(vmm, Distro::Trixie)], 1, Layout::ONE)?;
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
    let ours: Device = ("rxe_vrdma0", address_of(guest.nic).to_string());
    let rxe: Device = ("rxe0", "10.43.0.1".to_owned());
    let (value, other, ratio) = alternate(|| loopback(guest, &program, &ours), || loopback(guest, &program, &rxe))?;
    let against = format!("rxe {other:.2} {}", program.unit());
    Ok(Row::ratio(name, value, program.unit(), &against, ratio, bar))
}

/// Both ends in one guest.
pub(super) fn loopback(guest: &Guest, program: &Program, (device, address): &Device) -> Result<f64> {
    let pair = Pair::start_on(guest, device, address, |port| program.command(port))?;
    Ok(judge(&pair.wait(PATIENCE)?, program)?.value)
}
