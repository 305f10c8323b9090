//! What is run where: for `make test`, small and complete; for `make matrix`, the full product.

use super::guest::{Distro, Kind, Vmm};
use super::hosts::Layout;
use super::nic;
use super::perf::{
    MORE_TOOLS, Measure, Perf, Pingpong, PingpongKind, Program, READ_BW, SEND_BW, SEND_LAT, Sizes, TOOLS, Tool, UD_BW,
    WRITE_BW,
};
use super::rdma_cm;
use super::suite::{Check, Scene};

const UML_TRIXIE: Kind = Kind::base(Vmm::Uml, Distro::Trixie);
const UML_BOOKWORM: Kind = Kind::base(Vmm::Uml, Distro::Bookworm);
const QEMU_TRIXIE: Kind = Kind::base(Vmm::Qemu, Distro::Trixie);
const QEMU_BOOKWORM: Kind = Kind::base(Vmm::Qemu, Distro::Bookworm);

/// For a few minutes: each program once, and the life cycle.
pub fn quick() -> Vec<Scene> {
    let checks = Check::solos(0).chain(each_program(0, 1)).chain(Check::life());
    vec![Scene::new(vec![UML_TRIXIE; 2], checks)]
}

/// For `make test`.
pub fn full() -> Vec<Scene> {
    let everything = || Check::solos(0).chain(each_flag(0, 1)).chain(each_program(0, 0)).chain(crowds());
    let own_tests = || Check::processes(0).chain(Check::paging(0)).chain([Check::NotOffered(0)]);
    let both_ways = || each_program(0, 1).chain(each_program(1, 0)).chain(crowds());
    vec![
        Scene::new(
            vec![UML_TRIXIE; 2],
            everything()
                .chain(managed())
                .chain(own_tests())
                .chain([Check::Conformance, ten_thousand_qps()])
                .chain(Check::life()),
        ),
        Scene::new(
            vec![UML_BOOKWORM; 2],
            everything().chain(managed()).chain(own_tests()).chain(Check::life_but_router()),
        ),
        Scene { spread: 2, ..Scene::new(vec![UML_BOOKWORM, UML_TRIXIE], each_program(0, 1).chain(crowds())) },
        Scene::new(vec![UML_TRIXIE, QEMU_TRIXIE], both_ways()),
        Scene::new(vec![QEMU_TRIXIE; 2], everything().chain(managed()).chain(Check::life())),
        Scene { spread: 2, ..Scene::new(vec![QEMU_BOOKWORM; 2], Check::solos(0).chain(each_program(0, 1))) },
        Scene { layout: Layout::on(2), ..Scene::new(vec![UML_TRIXIE; 2], each_program(0, 1).chain(managed())) },
        Scene::new(vec![UML_TRIXIE], nic::FEW.into_iter().map(|name| Check::OverNic(0, name))),
    ]
}

/// For `make debug-kernel`: whatever has the driver do something else.
pub fn driver() -> Vec<Scene> {
    let once = || Check::solos(0).chain(each_program(0, 1)).chain(managed());
    let own_tests = || Check::processes(0).chain(Check::paging(0)).chain([Check::NotOffered(0)]);
    vec![
        Scene::new(vec![UML_TRIXIE; 2], once().chain(own_tests()).chain([Check::Conformance]).chain(Check::life())),
        Scene::new(vec![UML_BOOKWORM; 2], once().chain(own_tests()).chain(Check::life_but_router())),
    ]
}

/// For `make nic`.
pub fn nic() -> Vec<Scene> {
    vec![
        Scene::new(vec![UML_TRIXIE], nic::SUITES.iter().map(|suite| Check::OverNic(0, suite.name))),
        // User-mode Linux does not run in User-mode Linux.
        Scene::new(vec![QEMU_TRIXIE], [Check::Nested(0)].into_iter()),
    ]
}

/// In one guest, each connected to one in another.
fn ten_thousand_qps() -> Check {
    Check::pair(0, 1, Perf { qps: 10_000, ..Perf::new(WRITE_BW, 8, 5) })
}

/// A few programs that use the connection manager.
fn managed() -> impl Iterator<Item = Check> {
    rdma_cm::FEW.iter().map(|app| Check::App(0, 1, app))
}

/// For hours. What happens within one guest is run once for each kind.
pub fn matrix() -> Vec<Scene> {
    let kinds = [UML_TRIXIE, UML_BOOKWORM, QEMU_TRIXIE, QEMU_BOOKWORM];
    let beds = kinds.iter().flat_map(|a| kinds.iter().map(move |b| [*a, *b]));
    let scene = |[a, b]: [Kind; 2]| {
        let old = [a, b].iter().any(|kind| kind.distro == Distro::Bookworm);
        let within = (a == b).then(|| Check::solos(0).chain(product(0, 0, old)));
        let checks = within.into_iter().flatten().chain(product(0, 1, old)).chain(Check::life());
        Scene::new(vec![a, b], checks)
    };
    beds.map(scene).collect()
}

/// A size that suits a program.
fn usual_size(tool: Tool) -> u64 {
    if tool.is_atomic() {
        return 8;
    }
    match (tool.measure, tool.is_datagram()) {
        (Measure::Bandwidth, true) => 1024,
        (Measure::Bandwidth, false) => 65_536,
        (Measure::Latency, _) => 64,
    }
}

fn usual(tool: Tool) -> Perf {
    Perf::new(tool, usual_size(tool), if tool.is_bandwidth() { 200 } else { 20 })
}

fn pingpongs() -> [Program; 6] {
    let pingpong = |kind, size, events| Pingpong { kind, size, iterations: 100, events }.into();
    [
        pingpong(PingpongKind::Rc, 4096, false),
        pingpong(PingpongKind::Rc, 1_000_003, true),
        pingpong(PingpongKind::Ud, 1024, false),
        pingpong(PingpongKind::Ud, 2048, true),
        pingpong(PingpongKind::Uc, 10_000, true),
        pingpong(PingpongKind::Srq, 4096, true),
    ]
}

/// Each program once.
fn each_program(server: usize, client: usize) -> impl Iterator<Item = Check> {
    let programs = TOOLS.into_iter().chain(MORE_TOOLS).map(|tool| Program::from(usual(tool)));
    programs.chain(pingpongs()).map(move |program| Check::pair(server, client, program))
}

/// Each program with each flag that it knows.
fn each_flag(server: usize, client: usize) -> impl Iterator<Item = Check> {
    let more = MORE_TOOLS.into_iter().map(usual);
    let programs = TOOLS.into_iter().flat_map(flagged).chain(more).map(Program::from);
    programs.chain(pingpongs()).map(move |program| Check::pair(server, client, program))
}

fn flagged(tool: Tool) -> Vec<Perf> {
    let plain = usual(tool);
    let iterations = if tool.is_bandwidth() { 50 } else { 10 };
    let mut runs = vec![Perf { sizes: Sizes::All, iterations, ..plain }];
    if tool.is_bandwidth() {
        runs.push(Perf { both_ways: true, ..plain });
        runs.push(Perf { qps: 64, iterations: 20, sizes: Sizes::One(1024), ..plain });
    }
    if tool.has_events() {
        runs.push(Perf { events: true, ..plain });
    }
    if tool.has_inline() {
        runs.push(Perf { inline: Some(64), sizes: Sizes::One(64), ..plain });
    }
    if tool.has_odp() {
        runs.push(Perf { odp: true, ..plain });
    }
    runs
}

/// Two processes in each guest, and in one.
fn crowds() -> impl Iterator<Item = Check> {
    let of = |ends: [(usize, usize, Tool); 2]| {
        Check::Together(ends.map(|(server, client, tool)| (server, client, usual(tool).into())).to_vec())
    };
    [
        of([(0, 1, WRITE_BW), (0, 1, SEND_LAT)]),
        of([(0, 1, SEND_BW), (1, 0, READ_BW)]),
        of([(0, 1, UD_BW), (1, 0, WRITE_BW)]),
        of([(0, 0, SEND_BW), (0, 1, WRITE_BW)]),
    ]
    .into_iter()
}

/// Every combination of flags and sizes that a program knows; `old` if the perftest of Debian 12 is at one end.
fn product(server: usize, client: usize, old: bool) -> impl Iterator<Item = Check> {
    let more = MORE_TOOLS.into_iter().map(usual);
    let runs = TOOLS.into_iter().flat_map(combinations).filter(move |perf| !old || !forgets_completions(perf));
    let programs = runs.chain(more).map(Program::from);
    programs.chain(pingpongs()).map(move |program| Check::pair(server, client, program))
}

fn combinations(tool: Tool) -> Vec<Perf> {
    let when = |wanted: bool| if wanted { vec![false, true] } else { vec![false] };
    let inlines = if tool.has_inline() { vec![None, Some(64)] } else { vec![None] };
    let mut runs = Vec::new();
    for (sizes, iterations) in sizes(tool) {
        for qps in if tool.is_bandwidth() { vec![1, 2, 64] } else { vec![1] } {
            for both_ways in when(tool.is_bandwidth()) {
                for events in when(tool.has_events()) {
                    for &inline in &inlines {
                        runs.push(Perf { sizes, qps, both_ways, events, inline, ..Perf::new(tool, 0, iterations) });
                    }
                }
            }
        }
    }
    runs.retain(fits);
    runs
}

fn sizes(tool: Tool) -> Vec<(Sizes, u32)> {
    let mut sizes = vec![(Sizes::All, 100), (Sizes::One(2), 1000), (Sizes::One(1000), 1000)];
    if !tool.is_datagram() {
        sizes.extend([(Sizes::One(65_537), 1000), (Sizes::One(8 << 20), 100)]);
    }
    sizes
}

/// perftest before 23.07 (commit 14955fe) looks for a bounded number of completions after each event, and then waits for the next one:
/// when the last of several queue pairs complete at once, it waits for ever. On rxe they complete too slowly for that.
fn forgets_completions(perf: &Perf) -> bool {
    perf.events && perf.tool.is_bandwidth() && perf.qps > if perf.both_ways { 1 } else { 2 }
}

/// perftest has a buffer of twice the greatest size for each queue pair: a guest's memory must hold them.
fn fits(perf: &Perf) -> bool {
    let greatest = match perf.sizes {
        Sizes::One(size) => size,
        Sizes::All if perf.tool.is_datagram() => 4096,
        Sizes::All => 8 << 20,
    };
    greatest * u64::from(perf.qps) <= 64 << 20
}
