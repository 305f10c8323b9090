//! Between two hosts, beside TCP over the same pair of virtual Ethernet interfaces. Each host has one core: its worker, its guest and, in its
//! turn, the other end of the TCP connection that it is compared with, run there.

use std::hint::spin_loop;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use freeflow_backend::stepped::{SteppedHost, SteppedNic};
use freeflow_backend::tcp::{Conn, Limits, Ticket};
use freeflow_backend::{Dialer, EngineConfig, Gid, NicId, PeerId, Peering};
use freeflow_router::config::EngineSettings;
use freeflow_router::overlay::{Addresses, Elsewhere};

use super::path::Cores;
use super::table::{Bar, Row};
use super::traffic::LIST;
use super::{RUNS, alternate, median};
use crate::guest::verbs::{Op, Qp, QpSpec, Rc, RcOptions, SendWr, connect};
use crate::guest::{Guest, GuestConfig};
use crate::mesh::{greeting, host_id};
use crate::netns::{self, Namespace};
use crate::router::{Hosts, RouterSpec, TestRouter};
use crate::sys::pin_thread;
use virtio_rdma::ib::SendFlags;

const ADDRESSES: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
const PORT: u16 = 7471;
const LARGE: usize = 1 << 20;
const SMALL: usize = 64;
/// Large messages that are under way at once.
const DEPTH: usize = 8;
/// QPs that small messages go over.
const QPS: usize = 16;
/// Small messages of each that are under way at once.
const WINDOW: usize = 4 * LIST;
/// How long a run lasts.
const RUN: Duration = Duration::from_millis(700);

/// Every row of this module.
///
/// # Errors
/// When namespaces cannot be made, or a work request fails.
pub fn rows(cores: Option<Cores>) -> Result<Vec<Row>> {
    let Some(cores) = cores else {
        return Ok(vec![Row::not_measurable("between hosts", "needs two processors")]);
    };
    let spaces = netns::pair(ADDRESSES)?;
    let mut two = Two::start(&spaces, [cores.poster, cores.worker])?;
    Ok(vec![bandwidth(&mut two, &spaces)?, round_trip(&mut two, &spaces)?, rate(&mut two)?, first(&mut two)?])
}

/// Two hosts with a guest on each.
struct Two {
    guests: [Guest; 2],
    hosts: [SteppedHost; 2],
    _nics: Vec<Arc<Mutex<SteppedNic>>>,
    cores: [usize; 2],
}

/// Says what connections are wanted.
#[derive(Debug)]
struct Wanted(Sender<Conn>);

impl Dialer for Wanted {
    fn dial(&self, _peer: PeerId, _link: u16, conn: Conn) {
        // Nobody listens any more at the end.
        let _ = self.0.send(conn);
    }
}

impl Two {
    fn start(spaces: &[Namespace; 2], cores: [usize; 2]) -> Result<Self> {
        let engine = EngineSettings { workers: 1, ..EngineSettings::default() };
        let spec = RouterSpec { engine, vectors: 1, device: None, hosts: Hosts::One, ..RouterSpec::of(2) };
        let config = spec.config(Path::new("/"), |nic| format!("n{nic}"));
        let (mut hosts, mut nics, mut guests) = (Vec::new(), Vec::new(), Vec::new());
        let (wanted, dials) = channel();
        let ticket: Ticket = rand::random();
        for (number, settings) in config.nic.iter().enumerate() {
            let other = config.nic[1 - number].to_nic();
            let (peer, nic) = (PeerId(1 - number as u32), settings.to_nic());
            let overlay = Arc::new(Addresses::default());
            let gids = other.addresses.iter().map(|&ip| Gid::of(ip)).chain([Gid::link_local(other.mac.0)]);
            let gids = gids.map(|gid| (gid, peer)).collect();
            overlay.set_elsewhere(Elsewhere::from([(other.tenant, gids)]));
            overlay.add(NicId(0), &nic);
            overlay.set_numbers_of(peer, Some(overlay.numbers()));
            let mut host = SteppedHost::new(EngineConfig::default(), overlay, None)?;
            let nic = Arc::new(Mutex::new(host.add_nic(NicId(0), nic)));
            let guest =
                GuestConfig { memory_size: 64 << 20, gids: TestRouter::gids_of(number), ..GuestConfig::default() };
            guests.push(Guest::direct(&nic, guest)?);
            host.join(Peering {
                peer,
                name: format!("host{}", 1 - number).into(),
                theirs: host_id(1 - number),
                ours: host_id(number),
                dials: number == 0,
                epoch: rand::random(),
                lanes: 1,
                limits: forbearing(),
                tickets: vec![ticket],
                dialer: Arc::new(Wanted(wanted.clone())),
            });
            nics.push(nic);
            hosts.push(host);
        }
        let hosts = <[SteppedHost; 2]>::try_from(hosts).ok().context("two hosts")?;
        let guests = <[Guest; 2]>::try_from(guests).ok().context("two guests")?;
        let mut two = Self { guests, hosts, _nics: nics, cores };
        two.connect(spaces, &dials)?;
        Ok(two)
    }

    /// Makes the connection that the first one wants.
    fn connect(&mut self, spaces: &[Namespace; 2], dials: &Receiver<Conn>) -> Result<()> {
        let listener = spaces[1].run(|| Ok(TcpListener::bind((ADDRESSES[1], PORT))?))?;
        let conn = loop {
            self.step();
            if let Ok(conn) = dials.try_recv() {
                break conn;
            }
        };
        let stream = spaces[0].run(|| Ok(TcpStream::connect((ADDRESSES[1], PORT))?))?;
        self.hosts[0].dialed(PeerId(1), 0, conn, Ok(stream));
        (0..100).for_each(|_| self.step());
        let (stream, first, _) = greeting(listener.accept()?.0)?;
        self.hosts[1].accepted(PeerId(0), 0, stream, first);
        (0..100).for_each(|_| self.step());
        Ok(())
    }

    fn step(&mut self) {
        self.hosts.iter_mut().for_each(work);
    }

    /// A connected pair.
    fn pair(&self, spec: &QpSpec, len: usize) -> Result<(Rc, Rc)> {
        Ok(Rc::pair_with(&self.guests[0], &self.guests[1], spec, len, &options())?)
    }

    /// Both hosts work, a core each, until the first one's guest has come to its end; what that says. Guests get their turn after each look of
    /// their worker.
    fn run<T: Send>(
        &mut self,
        first: impl FnOnce(&mut dyn FnMut()) -> Result<T> + Send,
        mut second: impl FnMut() -> Result<()> + Send,
    ) -> Result<T> {
        let (ended, cores) = (AtomicBool::new(false), self.cores);
        let [one, other] = &mut self.hosts;
        std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                pin_thread(0, cores[1])?;
                while !ended.load(Ordering::Relaxed) {
                    work(other);
                    second()?;
                }
                anyhow::Ok(())
            });
            let here = scope.spawn(|| {
                let result =
                    pin_thread(0, cores[0]).map_err(anyhow::Error::from).and_then(|()| first(&mut || work(one)));
                ended.store(true, Ordering::Relaxed);
                result
            });
            let result = here.join().expect("the first host ends");
            there.join().expect("the second host ends")?;
            result
        })
    }
}

/// A host's worker looks everywhere once.
fn work(host: &mut SteppedHost) {
    host.step(0, Instant::now());
}

/// Hosts do not work between two measurements: that must not look as if they were dead.
fn forbearing() -> Limits {
    let day = freeflow_tcp::Nanos(86_400_000_000_000);
    Limits { silence: day, keepalive: day, ..Limits::default() }
}

fn options() -> RcOptions {
    RcOptions { timeout: 0, ..RcOptions::default() }
}

/// GB/s of WRITEs of 1 MiB, beside one stream of iperf3.
fn bandwidth(two: &mut Two, spaces: &[Namespace; 2]) -> Result<Row> {
    let (a, b) = two.pair(&QpSpec::rc().depth(15), LARGE)?;
    let cores = two.cores;
    let (value, other, ratio) = alternate(|| stream(two, &a, &b), || iperf3(spaces, cores))?;
    let against = format!("iperf3 {other:.2} GB/s");
    Ok(Row::ratio("between hosts, 1 MiB WRITE", value, "GB/s", &against, ratio, Bar::AtLeast(0.8)))
}

fn stream(two: &mut Two, a: &Rc, b: &Rc) -> Result<f64> {
    let (from, to) = ([a.mr.sge(0, LARGE)], Op::Write(b.mr.remote(0)));
    two.run(
        |step| {
            let post = || a.qp.post(SendWr::new(1, to, &from));
            let start = Instant::now();
            (0..DEPTH).try_for_each(|_| post())?;
            let mut done = 0u32;
            while start.elapsed() < RUN {
                step();
                while let Some(wc) = a.cq.poll() {
                    wc.ok();
                    done += 1;
                    post()?;
                }
            }
            let time = start.elapsed().as_secs_f64();
            for _ in 0..DEPTH {
                next(a, step);
            }
            Ok(f64::from(done) * f64::from(LARGE as u32) / time / 1e9)
        },
        || Ok(()),
    )
}

/// Waits for a completion.
fn next(a: &Rc, step: &mut dyn FnMut()) {
    loop {
        step();
        if let Some(wc) = a.cq.poll() {
            wc.ok();
            return;
        }
    }
}

fn iperf3(spaces: &[Namespace; 2], cores: [usize; 2]) -> Result<f64> {
    let program = |space: &Namespace, core: usize| {
        let mut command = space.command("taskset");
        command.args(["-c", &core.to_string(), "iperf3"]);
        command
    };
    let mut server = program(&spaces[1], cores[1]);
    let mut server = server.args(["-s", "-1"]).stdout(Stdio::null()).spawn().context("iperf3")?;
    std::thread::sleep(Duration::from_millis(200));
    let output = program(&spaces[0], cores[0]).args(["-c", ADDRESSES[1], "-t", "1", "-J"]).output();
    let ended = server.wait();
    let report: serde_json::Value = serde_json::from_slice(&output.context("iperf3")?.stdout)?;
    ensure!(ended?.success(), "iperf3 (Debian package iperf3) fails");
    let bits = report.pointer("/end/sum_received/bits_per_second").and_then(serde_json::Value::as_f64);
    Ok(bits.context("iperf3 says no rate")? / 8e9)
}

/// Microseconds of a small WRITE from posting to completion, beside as many bytes to and fro over TCP.
fn round_trip(two: &mut Two, spaces: &[Namespace; 2]) -> Result<Row> {
    let (a, b) = two.pair(&QpSpec::rc().depth(15), 4096)?;
    let cores = two.cores;
    let (value, other, ratio) = alternate(|| write_time(two, &a, &b), || ping_pong(spaces, cores))?;
    let against = format!("TCP {other:.2} us");
    Ok(Row::ratio("between hosts, 64 B WRITE round trip, p50", value, "us", &against, ratio, Bar::AtMost(1.3)))
}

fn write_time(two: &mut Two, a: &Rc, b: &Rc) -> Result<f64> {
    two.run(
        |step| {
            let mut times = Vec::new();
            let end = Instant::now() + RUN;
            while Instant::now() < end {
                let start = Instant::now();
                a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, SMALL)]))?;
                next(a, step);
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
            Ok(median(times))
        },
        || Ok(()),
    )
}

/// The same bytes over a TCP connection whose ends never sleep.
fn ping_pong(spaces: &[Namespace; 2], cores: [usize; 2]) -> Result<f64> {
    let listener = spaces[1].run(|| Ok(TcpListener::bind((ADDRESSES[1], PORT + 1))?))?;
    let mut here = spaces[0].run(|| Ok(TcpStream::connect((ADDRESSES[1], PORT + 1))?))?;
    let mut there = listener.accept()?.0;
    for stream in [&here, &there] {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
    }
    std::thread::scope(|scope| {
        scope.spawn(move || {
            pin_thread(0, cores[1])?;
            let mut bytes = [0; SMALL];
            while spin_read(&mut there, &mut bytes)? {
                there.write_all(&bytes)?;
            }
            anyhow::Ok(())
        });
        let pinger = scope.spawn(move || {
            pin_thread(0, cores[0])?;
            let (mut bytes, mut times) = ([0; SMALL], Vec::new());
            let end = Instant::now() + RUN;
            while Instant::now() < end {
                let start = Instant::now();
                here.write_all(&bytes)?;
                ensure!(spin_read(&mut here, &mut bytes)?, "the other end has closed");
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
            Ok(median(times))
        });
        pinger.join().expect("the pinger ends")
    })
}

/// Reads all of it without sleeping; false at the end of the stream.
fn spin_read(stream: &mut TcpStream, bytes: &mut [u8]) -> Result<bool> {
    let mut done = 0;
    while done < bytes.len() {
        match stream.read(&mut bytes[done..]) {
            Ok(0) => return Ok(false),
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// Million small SENDs a second.
fn rate(two: &mut Two) -> Result<Row> {
    let spec = QpSpec::rc().depth(4 * WINDOW as u32 - 1);
    let (a, b) = two.pair(&spec, 4096)?;
    let (cq_a, cq_b) = (two.guests[0].create_cq(8192)?, two.guests[1].create_cq(8192)?);
    let (senders, takers) = (a.pd.create_qps(&spec, &cq_a, QPS)?, b.pd.create_qps(&spec, &cq_b, QPS)?);
    for ((one, other), number) in senders.iter().zip(&takers).zip(0..) {
        connect(one, other, &options())?;
        other.post_recvs(number, &[b.mr.sge(0, SMALL)], 3 * WINDOW)?;
    }
    let sge = [a.mr.sge(0, SMALL)];
    let list: Vec<_> = (0..LIST)
        .map(|i| {
            SendWr::new(0, Op::Send, &sge).flags(if i + 1 == LIST { SendFlags::SIGNALED } else { SendFlags::empty() })
        })
        .collect();
    let mut rates = Vec::new();
    for _ in 0..RUNS {
        let rate = two.run(
            |step| {
                let start = Instant::now();
                let by_number = |number| senders.iter().find(|qp: &&Qp| qp.number() == number);
                for _ in 0..WINDOW / LIST {
                    senders.iter().try_for_each(|qp| qp.post_send(&list))?;
                }
                let mut done = 0u32;
                while start.elapsed() < RUN {
                    step();
                    for wc in cq_a.poll_many(QPS) {
                        done += LIST as u32;
                        by_number(wc.ok().qpn()).context("a QP of ours")?.post_send(&list)?;
                    }
                }
                let time = start.elapsed().as_secs_f64();
                let mut left = QPS * WINDOW / LIST;
                while left > 0 {
                    step();
                    left -= cq_a.poll_many(QPS).len();
                }
                Ok(f64::from(done) / time / 1e6)
            },
            || {
                let mut counts = [0; QPS];
                for wc in cq_b.poll_many(QPS * WINDOW) {
                    counts[wc.ok().wr_id() as usize] += 1;
                }
                for (qp, (number, count)) in takers.iter().zip((0..).zip(counts)).filter(|(_, (_, count))| *count > 0) {
                    qp.post_recvs(number, &[b.mr.sge(0, SMALL)], count)?;
                }
                Ok(())
            },
        )?;
        rates.push(rate);
    }
    Ok(Row::at_least("between hosts, 64 B SEND, 16 QPs", median(rates), "M/s", 1.0))
}

/// Round trips that the first message of a QP takes more than others.
fn first(two: &mut Two) -> Result<Row> {
    let mut more = Vec::new();
    let (known, there) = two.pair(&QpSpec::rc(), 4096)?;
    for _ in 0..40 {
        let (a, b) = two.pair(&QpSpec::rc(), 4096)?;
        more.push(two.run(
            |step| {
                let mut time = |from: &Rc, to: &Rc| {
                    let start = Instant::now();
                    from.qp.post(SendWr::new(1, Op::Write(to.mr.remote(0)), &[from.mr.sge(0, 8)]))?;
                    next(from, step);
                    anyhow::Ok(start.elapsed().as_secs_f64())
                };
                // The other host's thread has to be there first.
                (0..50).try_for_each(|_| time(&known, &there).map(drop))?;
                let first = time(&a, &b)?;
                let warm = median((0..200).map(|_| time(&a, &b)).collect::<Result<_>>()?);
                Ok((first - warm) / warm)
            },
            || Ok(()),
        )?);
    }
    Ok(Row::at_most("between hosts, first WRITE of a QP, more than a warm one", median(more), "round trips", 2.0))
}
