//! The lists of checks, and how they are run.

use anyhow::{Context, Result};

use super::apps::{self, App};
use super::bed::Bed;
use super::conformance;
use super::guest::Kind;
use super::hosts::Layout;
use super::life::{SCENARIOS, Scenario};
use super::nic;
use super::paging;
use super::pair;
use super::perf::Program;
use super::probes;
use super::processes;
use super::report::{Figure, Reporter};
use super::solo::{self, SOLOS, Solo};

/// One check on a bed.
#[derive(Debug)]
pub enum Check {
    /// A program between two guests or within one.
    Pair {
        /// Virtual NIC of the server's guest.
        server: usize,
        /// Virtual NIC of the client's guest.
        client: usize,
        /// What runs.
        program: Program,
    },
    /// Several programs at once, each with its server's and client's guest.
    Together(Vec<(usize, usize, Program)>),
    /// A program in one guest.
    Solo(usize, &'static Solo),
    /// `rdma resource` in one guest.
    Resource(usize),
    /// One of [`apps`], with its server's and client's guest.
    App(usize, usize, &'static App),
    /// One of [`processes::KINDS`] in one guest.
    Processes(usize, &'static str, &'static str),
    /// One of [`paging::KINDS`] in one guest.
    Paging(usize, &'static str, &'static str),
    /// One of [`nic::SUITES`], in a guest that plays the host.
    OverNic(usize, &'static str),
    /// Perftest in a guest within the guest, over that one's NIC.
    Nested(usize),
    /// What is not offered, in one guest.
    NotOffered(usize),
    /// rdma-core's own tests, shared by all guests.
    Conformance,
    /// A scenario of [`life`](super::life).
    Life(&'static str, Scenario),
}

/// A bed and the checks that are made on it.
#[derive(Debug)]
pub struct Scene {
    /// The guests.
    pub kinds: Vec<Kind>,
    /// Workers and completion vectors of each virtual NIC.
    pub spread: u16,
    /// Hosts that the guests are on.
    pub layout: Layout,
    /// In this order.
    pub checks: Vec<Check>,
}

impl Check {
    /// A program with its server in one guest and its client in the other.
    pub fn pair(server: usize, client: usize, program: impl Into<Program>) -> Self {
        Self::Pair { server, client, program: program.into() }
    }

    /// Everything that needs one guest only.
    pub fn solos(nic: usize) -> impl Iterator<Item = Self> {
        SOLOS.iter().map(move |solo| Self::Solo(nic, solo)).chain([Self::Resource(nic)])
    }

    /// Forks, programs, many processes and threads.
    pub fn processes(nic: usize) -> impl Iterator<Item = Self> {
        processes::KINDS.into_iter().map(move |(kind, name)| Self::Processes(nic, kind, name))
    }

    /// On-demand paging while mappings change.
    pub fn paging(nic: usize) -> impl Iterator<Item = Self> {
        paging::KINDS.into_iter().map(move |(kind, name)| Self::Paging(nic, kind, name))
    }

    /// The life cycle, but for the end of the router, which takes a minute (so long a driver waits for its device).
    pub fn life_but_router() -> impl Iterator<Item = Self> {
        Self::life().take(SCENARIOS.len() - 1)
    }

    /// The life cycle.
    pub fn life() -> impl Iterator<Item = Self> {
        SCENARIOS.into_iter().map(|(name, scenario)| Self::Life(name, scenario))
    }

    fn name(&self) -> String {
        match self {
            Self::Pair { server, client, program } => format!("{}: {}", way(*server, *client), program.label()),
            Self::Together(programs) => {
                let one = |(server, client, program): &(usize, usize, Program)| {
                    format!("{}: {}", way(*server, *client), program.label())
                };
                programs.iter().map(one).collect::<Vec<_>>().join(" | ")
            }
            Self::Solo(nic, solo) => format!("guest {nic}: {}", solo.name),
            Self::Resource(nic) => format!("guest {nic}: rdma resource"),
            Self::App(server, client, app) => format!("{}: {}", way(*server, *client), app.name),
            Self::Processes(nic, _, name) | Self::Paging(nic, _, name) => format!("guest {nic}: {name}"),
            Self::OverNic(nic, name) => format!("guest {nic} as a host: tests of {name} over its NIC (rxe)"),
            Self::Nested(nic) => format!("guest {nic} as a host: perftest in a guest within it, over its NIC (rxe)"),
            Self::NotOffered(nic) => format!("guest {nic}: what is not offered"),
            Self::Conformance => "rdma-core's tests".to_owned(),
            Self::Life(name, _) => (*name).to_owned(),
        }
    }

    fn run(&self, bed: &mut Bed) -> Result<Option<Figure>> {
        match self {
            Self::Pair { server, client, program } => {
                let row = pair::run(bed.guest(*server)?, bed.guest(*client)?, program)?;
                return Ok(Some(Figure::of(program, row))).and_then(|figure| bed.settle().map(|()| figure));
            }
            Self::Together(programs) => together(bed, programs)?,
            Self::Solo(nic, solo) => solo.run(bed.guest(*nic)?)?,
            Self::Resource(nic) => solo::rdma_resource(bed, *nic)?,
            Self::App(server, client, app) => {
                let figure = apps::run(bed, (*server, *client), app)?;
                return bed.settle().map(|()| figure);
            }
            Self::Processes(nic, kind, _) => processes::check(bed, *nic, kind)?,
            Self::Paging(nic, kind, _) => paging::check(bed, *nic, kind)?,
            Self::OverNic(nic, name) => nic::check(bed, *nic, name)?,
            Self::Nested(nic) => nic::nested(bed, *nic)?,
            Self::NotOffered(nic) => probes::check(bed, *nic)?,
            Self::Conformance => conformance::ours(bed).map(drop)?,
            // Scenarios see to what they leave: the last leaves no router to ask.
            Self::Life(_, scenario) => return scenario(bed).map(|()| None),
        }
        bed.settle().map(|()| None)
    }
}

fn way(server: usize, client: usize) -> String {
    if server == client { format!("within {server}") } else { format!("{client} to {server}") }
}

fn together(bed: &Bed, programs: &[(usize, usize, Program)]) -> Result<()> {
    let ends =
        programs.iter().map(|(server, client, program)| Ok((bed.guest(*server)?, bed.guest(*client)?, *program)));
    pair::run_all(ends.collect::<Result<Vec<_>>>()?.into_iter())
}

/// Every `of`th check, beginning with number `number`: `2/40`. All parts together are everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    number: usize,
    of: usize,
}

impl std::str::FromStr for Part {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, of) = text.split_once('/').ok_or("wanted is a part of all, such as 2/40")?;
        match (number.parse(), of.parse()) {
            (Ok(number), Ok(of)) if (1..=of).contains(&number) => Ok(Self { number, of }),
            _ => Err("the first number is from 1 to the second"),
        }
    }
}

impl Part {
    /// Leaves this part of the checks in the scenes, and no scene without checks.
    pub fn keep(self, scenes: &mut Vec<Scene>) {
        let mut turn = 0;
        let mut mine = |_: &Check| {
            turn += 1;
            (turn - 1) % self.of == self.number - 1
        };
        for scene in &mut *scenes {
            scene.checks.retain(&mut mine);
        }
        scenes.retain(|scene| !scene.checks.is_empty());
    }
}

impl Scene {
    /// With one worker.
    pub fn new(kinds: Vec<Kind>, checks: impl Iterator<Item = Check>) -> Self {
        Self { kinds, spread: 1, layout: Layout::ONE, checks: checks.collect() }
    }

    /// For people.
    pub fn place(&self) -> String {
        let names: Vec<String> = self.kinds.iter().map(ToString::to_string).collect();
        let guests = if names.iter().all(|name| *name == names[0]) { names[0].clone() } else { names.join("+") };
        let workers = if self.spread == 1 { String::new() } else { format!("/{} workers", self.spread) };
        let hosts = if self.layout.hosts == 1 { String::new() } else { format!("/{}", self.layout) };
        guests + &workers + &hosts
    }

    /// Makes the checks that are wanted; boots guests again when a failed check has left them unusable.
    pub fn run(&self, reporter: &mut Reporter) -> Result<()> {
        let place = self.place();
        let wanted: Vec<&Check> = self.checks.iter().filter(|check| reporter.wants(&place, &check.name())).collect();
        let mut bed: Option<Bed> = None;
        for check in wanted {
            if bed.is_none() {
                bed = self.boot(&place, reporter)?;
            }
            let Some(running) = &mut bed else { return Ok(()) };
            let passed = reporter.check(&place, &check.name(), || check.run(running))?;
            if !passed && !running.is_healthy() {
                bed = None;
            }
        }
        bed.map_or(Ok(()), |bed| finish(bed, &place, reporter))
    }

    /// Starts the bed; `None` when that failed, which is reported.
    pub fn boot(&self, place: &str, reporter: &mut Reporter) -> Result<Option<Bed>> {
        let mut bed = None;
        reporter.check(place, "boot", || {
            self.kinds.iter().try_for_each(|kind| kind.prepare())?;
            bed = Some(Bed::start(&self.kinds, self.spread, self.layout).context("no bed")?);
            Ok(None)
        })?;
        Ok(bed)
    }
}

/// The end of a bed is a check, too.
fn finish(mut bed: Bed, place: &str, reporter: &mut Reporter) -> Result<()> {
    if !bed.has_guests() {
        return Ok(());
    }
    let end = || {
        bed.complaints()?;
        bed.shut_down()?;
        bed.settle()?;
        Ok(None)
    };
    reporter.check(place, "shutdown: no complaints, nothing left", end).map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::lists;
    use super::*;

    fn checks(scenes: &[Scene]) -> usize {
        scenes.iter().map(|scene| scene.checks.len()).sum()
    }

    #[test]
    fn parts_are_everything_and_nothing_twice() {
        let part = |number| {
            let mut scenes = lists::full();
            Part { number, of: 7 }.keep(&mut scenes);
            checks(&scenes)
        };
        assert_eq!((1..=7).map(part).sum::<usize>(), checks(&lists::full()));
        assert!(part(1) - part(7) <= 1);
    }

    #[test]
    fn parts_that_are_none_are_refused() {
        assert_eq!("2/40".parse(), Ok(Part { number: 2, of: 40 }));
        for bad in ["", "2", "0/3", "4/3", "1/0", "a/b"] {
            assert!(bad.parse::<Part>().is_err(), "{bad}");
        }
    }
}
