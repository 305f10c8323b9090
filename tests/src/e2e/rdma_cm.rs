//! Programs that connect through the RDMA connection manager (`rdma_cm`, over management datagrams), and those that run on top of it
//! unchanged: entries for [`apps`](super::apps).

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::apps::{App, Ends, Listens, Places, Run};
use super::bed::Bed;
use super::guest::Guest;
use super::interrupt::within;
use super::router::address_of;

/// How long one program may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// All of them.
pub static RDMA_CM: &[App] = &[
    RPING,
    ends("ucmatose", "ucmatose -p $PORT", "ucmatose -s $ADDRESS -p $PORT", "-c 4 -C 20 -S 4096", &["return status 0"]),
    ends("rdma_client", "rdma_server -p $PORT", "rdma_client -s $ADDRESS -p $PORT", "", &["rdma_client: end 0"]),
    CMTIME,
    ends("rstream", "rstream -b $ADDRESS -p $PORT", "rstream -s $ADDRESS -p $PORT", STREAM, &["64k"]),
    ends("riostream", "riostream -b $ADDRESS -p $PORT", "riostream -s $ADDRESS -p $PORT", STREAM, &["64k"]),
    ends("ib_send_bw -R", "ib_send_bw -F -R -p $PORT", "ib_send_bw -F -R -p $PORT $ADDRESS", "-n 200", &[" 65536 "]),
    ends("ib_read_lat -R", "ib_read_lat -F -R -p $PORT", "ib_read_lat -F -R -p $PORT $ADDRESS", "-n 50", &[" 2 "]),
    ends("ib_send_bw -R -c UD", "ib_send_bw -F -R -p $PORT", "ib_send_bw -F -R -p $PORT $ADDRESS", UD, &[" 1024 "]),
    UDADDY,
    MCKEY,
    App::steps("librspreload under netcat", preloaded),
];

/// Connects, sends and compares.
pub const RPING: App = ends(
    "rping -v -V",
    "rping -s -a $ADDRESS -p $PORT",
    "rping -c -a $ADDRESS -p $PORT",
    "-v -V -C 20",
    &["rdma-ping-19"],
);
const UDADDY: App = App::steps("udaddy", udaddy);
const MCKEY: App = App::steps("mckey", mckey);

/// Within one guest the connection manager takes the made-up queue pairs of its second half for stale ones.
const CMTIME: App = App::steps("cmtime", cmtime);

/// A few for `make test`: connections, datagrams and multicast.
pub static FEW: &[App] = &[RPING, UDADDY, MCKEY];

/// Every byte is compared.
const STREAM: &str = "-S 65536 -C 100 -T v";
const UD: &str = "-c UD -n 200 -s 1024";

const fn ends(
    name: &'static str,
    server: &'static str,
    client: &'static str,
    flags: &'static str,
    expected: &'static [&'static str],
) -> App {
    let forbidden = &["rror", "failed", "mismatch", "verification"];
    let ends = Ends { environment: "", server, client, flags, listens: Listens::RdmaCm, expected, forbidden };
    App { name, places: Places::BetweenAndWithin, run: Run::Ends(ends), figure: None }
}

/// A server in the first guest and a client in the second, for servers whose port is not to be chosen; `ready` tells whether the
/// server is, whose output is in `/tmp/served`. What both printed.
fn served(bed: &Bed, server: &str, ready: &str, client: &str) -> Result<String> {
    let (first, second) = (bed.guest(0)?, bed.guest(1)?);
    let before = [bed.router.counters(0)?, bed.router.counters(1)?];
    let job = first.start_script(&format!("{server} >/tmp/served 2>&1; status=$?; cat /tmp/served; exit $status"))?;
    wait_until(first, ready)?;
    let (client, server) = (second.run(client, PATIENCE)?, job.wait(PATIENCE)?);
    let outputs = format!("server:\n{}\nclient:\n{}", server.output, client.output);
    if (server.status, client.status) != (0, 0) {
        let counted = [0, 1].map(|nic| bed.router.counted_since(nic, &before[nic]));
        bail!("status {} and {}, counted {counted:?}\n{outputs}", server.status, client.status);
    }
    Ok(outputs)
}

/// Waits until a condition of the shell holds.
pub(crate) fn wait_until(guest: &Guest, condition: &str) -> Result<()> {
    let wait = format!(
        "for turn in {{1..400}}; do {{ {condition}; }} 2>/dev/null && exit; tick; done; cat /tmp/served; exit 1"
    );
    guest.must(&wait).map(drop)
}

/// The server of rdma-core 44 does not end by itself, that of 56 does.
fn cmtime(bed: &Bed) -> Result<String> {
    let (server, client) = (bed.guest(0)?, bed.guest(1)?);
    server.must("cmtime -p 9006 -c 20 >/tmp/served 2>&1 3<&- & echo $! >/tmp/cmtime.pid")?;
    wait_until(server, "rdma_listens 9006")?;
    let done = client.run(&format!("{} cmtime -s {} -p 9006 -c 20", within(60), address_of(0)), PATIENCE)?;
    let served = server.must("kill $(</tmp/cmtime.pid) 2>/dev/null; cat /tmp/served")?;
    let outputs = format!("server:\n{served}\nclient:\n{}", done.output);
    ensure!(done.status == 0 && done.output.contains("destroy"), "status {}\n{outputs}", done.status);
    ensure!(!outputs.contains("rror") && !outputs.contains("failed"), "{outputs}");
    Ok(outputs)
}

/// Datagrams with addresses that the connection manager resolved.
fn udaddy(bed: &Bed) -> Result<String> {
    let client = format!("{} udaddy -s {} -c 2 -C 20 -S 1024", within(30), address_of(0));
    served(bed, &format!("{} udaddy -c 2 -C 20 -S 1024", within(60)), "rdma_listens 7174", &client)
}

/// The receiver waits for all datagrams that the sender sends to the group.
fn mckey(bed: &Bed) -> Result<String> {
    let flags = "-m 239.7.7.7 -C 20 -S 1024";
    let end = |nic, seconds| format!("{} stdbuf -oL mckey {flags} -b {}", within(seconds), address_of(nic));
    let output = served(bed, &end(0, 60), "grep -q joined /tmp/served", &format!("{} -s", end(1, 30)))?;
    ensure!(output.matches("data transfers complete").count() == 2, "{output}");
    Ok(output)
}

/// Bytes that [`preloaded`] sends.
const FILE_BYTES: u64 = 8 << 20;

/// A program that knows nothing but TCP sends a file over RDMA (rsockets). Of the common ones few can: librspreload leaves alone what
/// makes sockets with `SOCK_CLOEXEC` (Perl, Python) or accepts with `accept4` (OpenBSD's netcat).
fn preloaded(bed: &Bed) -> Result<String> {
    let nc = format!("LD_PRELOAD=$(echo /usr/lib/*/rsocket/librspreload.so) {} nc.traditional -n", within(30));
    let sum = bed.guest(0)?.must(&format!("head -c {FILE_BYTES} /dev/urandom >/tmp/file; sha256sum </tmp/file"))?;
    let before = bed.router.nics()?[0].counters.send_bytes;
    let server = format!("{nc} -l -s {} -p 9004 -q 0 </tmp/file", address_of(0));
    let output = served(
        bed,
        &format!("{{ {server}; }}"),
        "rdma_listens 9004",
        &format!("{nc} {} 9004 </dev/null | sha256sum; exit ${{PIPESTATUS[0]}}", address_of(0)),
    )?;
    let carried = bed.router.nics()?[0].counters.send_bytes - before;
    ensure!(carried >= FILE_BYTES, "only {carried} bytes went over the virtual NIC\n{output}");
    ensure!(output.contains(sum.trim()), "checksum {sum}\n{output}");
    Ok(output)
}
