//! A router and real guests on its virtual NICs.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freeflow_backend::Objects;
use tempfile::TempDir;

use super::guest::{AGENT, Guest, Kind, Site};
use super::hosts::{Layout, Network};
use super::router::{RouterProcess, name_of};

/// Makes network names unique in this process.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Everything one series of checks runs on. Dropping it ends the guests, then the router, then removes the files.
#[derive(Debug)]
pub struct Bed {
    guests: Vec<Option<Guest>>,
    /// The router.
    pub router: RouterProcess,
    kinds: Vec<Kind>,
    idle: Vec<Objects>,
    net: String,
    layout: Layout,
    dir: TempDir,
}

impl Bed {
    /// Starts a router and one guest of each kind given, and waits until they are ready. Each virtual NIC has `spread`
    /// workers and completion vectors. With several hosts each has a router.
    pub fn start(kinds: &[Kind], spread: u16, layout: Layout) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("freeflow-e2e-").tempdir().context("cannot make a folder")?;
        fs::create_dir(dir.path().join("share"))?;
        fs::write(dir.path().join("share/agent"), AGENT).context("cannot write the agent")?;
        let router = RouterProcess::start(dir.path(), kinds.len(), spread, layout)?;
        let net = format!("e2e-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let idle = vec![Objects::default(); kinds.len()];
        let mut bed = Self { guests: Vec::new(), router, kinds: kinds.to_vec(), idle, net, layout, dir };
        bed.guests = (0..kinds.len()).map(|nic| bed.boot(nic).map(Some)).collect::<Result<_>>()?;
        for nic in 0..kinds.len() {
            bed.wait_ready(nic)?;
        }
        if layout.network == Network::Vxlan {
            bed.join_by_vxlan().context("no VXLAN")?;
        }
        Ok(bed)
    }

    fn join_by_vxlan(&self) -> Result<()> {
        let hosts = self.router.hosts()?;
        (0..self.layout.hosts)
            .try_for_each(|host| hosts.join_by_vxlan(host, &format!("freeflow-{}", self.net_of(host))))?;
        // VXLAN takes 50 bytes of each packet.
        self.guests.iter().flatten().try_for_each(|guest| guest.must("ip link set eth0 mtu 1450").map(drop))
    }

    /// The network that the guest of a virtual NIC is on, as the launcher calls it.
    fn net_of(&self, nic: usize) -> String {
        match self.layout.network {
            Network::Bridge => self.net.clone(),
            Network::Vxlan => format!("{}-{}", self.net, nic % self.layout.hosts),
        }
    }

    /// The folder that all guests see as `/share`.
    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    fn boot(&self, nic: usize) -> Result<Guest> {
        let (share, net) = (self.share(), self.net_of(nic));
        Guest::start(self.kinds[nic], &Site { share: &share, net: &net, socket: self.router.socket(nic), nic })
    }

    fn wait_ready(&mut self, nic: usize) -> Result<()> {
        self.guests[nic].as_mut().context("the guest is gone")?.wait_ready()?;
        self.idle[nic] = self.router.objects(nic)?;
        Ok(())
    }

    /// Puts a file where all guests see it, as `/share/NAME`.
    pub fn put(&self, name: &str, content: &str) -> Result<()> {
        fs::write(self.dir.path().join("share").join(name), content).with_context(|| format!("cannot write {name}"))
    }

    /// A guest that is there.
    pub fn guest(&self, nic: usize) -> Result<&Guest> {
        self.guests[nic].as_ref().with_context(|| format!("guest {nic} is not running"))
    }

    /// Takes a guest out, to end it.
    pub fn take(&mut self, nic: usize) -> Result<Guest> {
        self.guests[nic].take().with_context(|| format!("guest {nic} is not running"))
    }

    /// Boots the guest of a virtual NIC again.
    pub fn reboot(&mut self, nic: usize) -> Result<()> {
        self.guests[nic] = Some(self.boot(nic)?);
        self.wait_ready(nic)
    }

    /// Whether there is a guest.
    pub fn has_guests(&self) -> bool {
        self.guests.iter().any(Option::is_some)
    }

    /// Numbers of the virtual NICs.
    pub fn nics(&self) -> std::ops::Range<usize> {
        0..self.kinds.len()
    }

    /// The kind of the guest on a virtual NIC.
    pub fn kind(&self, nic: usize) -> Kind {
        self.kinds[nic]
    }

    /// Waits until every guest has the objects of an idle one, and nothing of any other is left.
    pub fn settle(&self) -> Result<()> {
        self.nics().try_for_each(|nic| match self.guests[nic] {
            // The guest's kernel itself may have objects. Its GIDs follow its addresses.
            Some(_) => self.router.settle(nic, Objects { gids: self.router.objects(nic)?.gids, ..self.idle[nic] }),
            None => self.router.settle(nic, Objects::default()),
        })
    }

    /// Whether every guest still answers, and has nothing left of what it did.
    pub fn is_healthy(&self) -> bool {
        let answers =
            |guest: &Guest| guest.run("echo hello", Duration::from_secs(20)).is_ok_and(|done| done.status == 0);
        self.guests.iter().all(|guest| guest.as_ref().is_some_and(answers)) && self.settle().is_ok()
    }

    /// Fails when a kernel or the router has noticed a bug.
    pub fn complaints(&self) -> Result<()> {
        for guest in self.guests.iter().flatten() {
            let found = guest.run("complaints", Duration::from_mins(1))?.output;
            ensure!(found.is_empty(), "the kernel of guest {} complains:\n{found}", name_of(guest.nic));
        }
        let log = self.router.log();
        ensure!(!log.contains("panicked") && !log.contains("ERROR"), "the router complains:\n{log}");
        Ok(())
    }

    /// Shuts all guests down as their users would.
    pub fn shut_down(&mut self) -> Result<()> {
        self.guests.iter_mut().filter_map(Option::take).try_for_each(Guest::shut_down)
    }
}
