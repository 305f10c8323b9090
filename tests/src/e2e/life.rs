//! Ends at bad moments: of programs, guests, the driver and the router. None leaks, none hangs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use freeflow_backend::{Objects, Rates};

use super::bed::Bed;
use super::guest::{Done, Guest};
use super::interrupt::wait_for;
use super::paging;
use super::pair::{self, Pair, Role};
use super::perf::{Perf, Program, SEND_BW, WRITE_BW};

/// A scenario on a bed; server in guest 0 and client in guest 1 unless it says otherwise.
pub type Scenario = fn(&mut Bed) -> Result<()>;

/// All of them, in an order in which each finds what it needs; the last leaves no router.
pub const SCENARIOS: [(&str, Scenario); 10] = [
    ("a rate holds perftest, and is lifted, in mid traffic", held_to_a_rate),
    ("kill -9 of the client in mid traffic", client_killed),
    ("kill -9 of the server in mid traffic", server_killed),
    ("driver unload and reload", driver_reloaded),
    ("device removal in mid traffic", device_removed),
    ("a device that does not answer is given up, then bound again", device_given_up),
    ("kill of a guest in mid traffic, then a new one", guest_killed),
    ("guest reboot", guest_rebooted),
    ("kill of both guests in mid traffic", both_killed),
    ("router stop in mid traffic", router_stopped),
];

/// How long an end may take to notice that the other is gone.
const NOTICE: Duration = Duration::from_secs(40);

/// How long the driver may wait for a device that has gone silent.
const GIVE_UP: Duration = Duration::from_secs(100);

fn endless(port: u16) -> String {
    format!("ib_write_bw -F -d $DEV -x $GID -p {port} -s 65536 -D 300")
}

/// Traffic that goes on until something ends it.
fn traffic(bed: &Bed, server: usize, client: usize) -> Result<Pair<'_>> {
    let pair = Pair::start(bed.guest(server)?, bed.guest(client)?, endless)?;
    let started = bed.router.wait_traffic(client);
    started
        .with_context(|| format!("server:\n{}\nclient:\n{}", pair.output(Role::Server), pair.output(Role::Client)))?;
    Ok(pair)
}

/// New connections work, in both directions.
fn works(bed: &Bed) -> Result<()> {
    let (a, b) = (bed.guest(0)?, bed.guest(1)?);
    let run = |server, client, tool| {
        pair::run(server, client, &Program::from(Perf::new(tool, 4096, 50)))
            .context("new connections do not work")
            .map(drop)
    };
    run(a, b, WRITE_BW)?;
    run(b, a, SEND_BW)
}

/// What perftest prints for `IBV_WC_RETRY_EXC_ERR`.
fn must_be_retry_error(done: &Done) -> Result<()> {
    ensure!(done.status != 0 && done.output.contains("status 12"), "not status 12 (RETRY_EXC_ERR):\n{}", done.output);
    Ok(())
}

/// By the host's clock and the router's counters: a guest's own clock is not to be trusted when the machine is busy.
fn held_to_a_rate(bed: &mut Bed) -> Result<()> {
    const BYTES_PER_SECOND: u64 = 10_000_000;
    let pair = traffic(bed, 0, 1)?;
    bed.router.set_rate(1, Rates { bits: "80M".parse().ok(), ..Rates::default() })?;
    let (start, before) = (Instant::now(), bed.router.counters(1)?);
    std::thread::sleep(Duration::from_secs(2));
    let (after, time) = (bed.router.counters(1)?, start.elapsed());
    let moved = after.send_bytes - before.send_bytes;
    let allowed = BYTES_PER_SECOND * time.as_millis() as u64 / 1000;
    ensure!(100 * moved <= 105 * allowed, "{moved} bytes in {time:?}, where {allowed} are allowed");
    ensure!(moved > 0 && after.rate_waits > before.rate_waits, "nothing moves, or nothing was held: {after:?}");
    bed.router.set_rate(1, Rates::default())?;
    let lifted = bed.router.counters(1)?;
    bed.router.wait_bytes(1, lifted.send_bytes + 4 * BYTES_PER_SECOND)?;
    ensure!(bed.router.counters(1)?.rate_waits == lifted.rate_waits, "it is still held");
    pair.kill(Role::Client)?;
    pair.wait_one(Role::Client, NOTICE)?;
    pair.wait_one(Role::Server, NOTICE)?;
    bed.settle()
}

fn client_killed(bed: &mut Bed) -> Result<()> {
    let pair = traffic(bed, 0, 1)?;
    pair.kill(Role::Client)?;
    pair.wait_one(Role::Client, NOTICE)?;
    pair.wait_one(Role::Server, NOTICE)?;
    bed.settle()?;
    works(bed)
}

fn server_killed(bed: &mut Bed) -> Result<()> {
    let pair = traffic(bed, 0, 1)?;
    pair.kill(Role::Server)?;
    must_be_retry_error(&pair.wait_one(Role::Client, NOTICE)?)?;
    pair.wait_one(Role::Server, NOTICE)?;
    bed.settle()?;
    works(bed)
}

fn driver_reloaded(bed: &mut Bed) -> Result<()> {
    let guest = bed.guest(1)?;
    for _ in 0..3 {
        guest.must("rmmod virtio_rdma")?;
        bed.router.settle(1, Objects::default())?;
        guest.must("insmod $MODULE && rescan")?;
    }
    works(bed)
}

fn device_removed(bed: &mut Bed) -> Result<()> {
    let guest = bed.guest(1)?;
    let device = guest.must("device")?;
    let device = device.trim();
    let pair = traffic(bed, 0, 1)?;
    guest.must(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_rdma/unbind"))?;
    bed.router.settle(1, Objects::default())?;
    // perftest need not understand what happened; that it can be killed is what counts.
    for role in [Role::Client, Role::Server] {
        pair.kill(role)?;
        pair.wait_one(role, NOTICE)?;
    }
    guest.must(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_rdma/bind && rescan"))?;
    works(bed)
}

/// Bytes that the program of [`device_given_up`] has given to the device, and gives back when it does not answer.
const GIVEN: u64 = 64 << 20;

/// Starts `ibv_asyncwatch`, and a program that has given memory with on-demand paging to the device.
const BEFORE: &str = "echo 3 >/sys/module/virtio_rdma/parameters/command_timeout
>/tmp/events; rm -f /tmp/go
stdbuf -o0 ibv_asyncwatch -d $DEV >/tmp/events & echo $! >/tmp/watch
until grep -q FD /tmp/events; do [ -d /proc/$! ] || exit 1; tick; done
python3 -u /share/paging.py $DEV $GID give_back >/tmp/given 2>&1 & echo $! >/tmp/program
until grep -q ready /tmp/given; do [ -d /proc/$! ] || { cat /tmp/given; exit 1; }; tick; done";

/// Has the program give it back; both are to notice (8 is `IBV_EVENT_DEVICE_FATAL`).
const MEANWHILE: &str = "touch /tmp/go
while [ -d /proc/$(</tmp/program) ]; do tick; done
kill $(</tmp/watch)
cat /tmp/given /tmp/events; grep -q 'given back' /tmp/given && grep -q '(8)' /tmp/events";

/// How many pages that were given back a CPU keeps for itself, where they do not count as free: up to 64 MB, unless a fraction of all
/// memory is named here (0 for the kernel's own choice).
const LISTS: &str = "/proc/sys/vm/percpu_pagelist_high_fraction";

/// Pages that a silent device might still use are not used otherwise, also those that are not pinned, and are not lost either.
fn device_given_up(bed: &mut Bed) -> Result<()> {
    paging::put(bed)?;
    let guest = bed.guest(1)?;
    let device = guest.must("device")?;
    let device = device.trim();
    guest.must(&format!("echo 100000 >{LISTS}; rescan; exec python3 /share/paging.py $DEV $GID prefetch"))?;
    let before = settled_memory(guest)?;
    guest.must(&format!("rescan; {BEFORE}"))?;
    let output = bed.router.paused(|| guest.must(MEANWHILE))?;
    let meanwhile = settled_memory(guest)?;
    ensure!(meanwhile + GIVEN * 3 / 4 < before, "of {before} bytes {meanwhile} are free\n{output}");
    guest.must(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_rdma/unbind"))?;
    let after = settled_memory(guest)?;
    ensure!(after + GIVEN / 4 > before, "of {before} bytes {meanwhile} were free, and {after} are");
    guest.must(&format!("echo 0 >{LISTS}; echo 60 >/sys/module/virtio_rdma/parameters/command_timeout"))?;
    guest.must(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_rdma/bind && rescan"))?;
    bed.settle()?;
    works(bed)
}

/// Bytes of a guest that are free, once that number stands still: what a program had is not all given back when it has ended.
fn settled_memory(guest: &Guest) -> Result<u64> {
    const STILL: u64 = 1 << 20;
    let mut before = free_memory(guest)?;
    wait_for("memory to stand still", NOTICE, || {
        guest.must("sleep 0.5")?;
        let now = free_memory(guest)?;
        let still = now.abs_diff(std::mem::replace(&mut before, now)) < STILL;
        Ok(still.then_some(now))
    })
}

fn free_memory(guest: &Guest) -> Result<u64> {
    let text = guest.must("grep MemAvailable: /proc/meminfo")?;
    let kilobytes = text.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    Ok(kilobytes.with_context(|| format!("not a number: {text}"))? << 10)
}

fn guest_killed(bed: &mut Bed) -> Result<()> {
    let pair = traffic(bed, 1, 0)?;
    bed.guest(1)?.signal_kill();
    bed.router.settle(1, Objects::default()).context("of a guest that was killed")?;
    wait_for("the end of the connection", NOTICE, || Ok((!bed.router.nics()?[1].connected).then_some(())))?;
    must_be_retry_error(&pair.wait_one(Role::Client, NOTICE)?)?;
    drop(bed.take(1)?);
    bed.settle()?;
    bed.reboot(1)?;
    works(bed)
}

fn guest_rebooted(bed: &mut Bed) -> Result<()> {
    bed.take(1)?.shut_down()?;
    bed.settle()?;
    bed.reboot(1)?;
    works(bed)
}

fn both_killed(bed: &mut Bed) -> Result<()> {
    traffic(bed, 0, 1)?;
    for nic in bed.nics() {
        bed.take(nic)?.kill()?;
    }
    bed.settle()?;
    bed.nics().try_for_each(|nic| bed.reboot(nic))?;
    works(bed)
}

fn router_stopped(bed: &mut Bed) -> Result<()> {
    bed.complaints()?;
    let pair = traffic(bed, 0, 1)?;
    let took = bed.router.stop_now()?;
    ensure!(took < Duration::from_secs(5), "the router took {} s to stop", took.as_secs_f64());
    for nic in bed.nics() {
        ensure!(!bed.router.socket(nic).exists(), "{} is left", bed.router.socket(nic).display());
    }
    [Role::Client, Role::Server].into_iter().try_for_each(|role| pair.kill(role))?;
    for role in [Role::Client, Role::Server] {
        pair.wait_one(role, GIVE_UP).context("a program outlives the router")?;
    }
    bed.nics().try_for_each(|nic| bed.guest(nic)?.must("rdma link").map(drop)).context("without the router")?;
    bed.shut_down().context("guests whose router is gone")
}
