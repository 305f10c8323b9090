//! Programs that run in one guest and need no other end.

use std::time::Duration;

use anyhow::{Result, ensure};
use freeflow_backend::Objects;

use super::bed::Bed;
use super::guest::Guest;

/// A script, and what its output must contain.
#[derive(Debug)]
pub struct Solo {
    /// For people.
    pub name: &'static str,
    script: &'static str,
    expected: &'static [&'static str],
}

/// Port events are made by taking the interface down, a change of GIDs (18) by taking its address away and giving it back.
const ASYNCWATCH: &str = ">/tmp/events
stdbuf -o0 ibv_asyncwatch -d $DEV >/tmp/events & watch=$!
until grep -q FD /tmp/events; do [ -d /proc/$watch ] || exit 1; tick; done
address=$(ip -4 -br address show eth0 | while read -r _ _ first _; do echo $first; done)
ip link set eth0 down; sleep 0.3; ip link set eth0 up
ip address del $address dev eth0; ip address replace $address dev eth0
for turn in {1..100}; do grep -q '(9)' /tmp/events && grep -q '(18)' /tmp/events && break; tick; done
kill $watch; cat /tmp/events; rescan";

/// All of them.
pub const SOLOS: [Solo; 4] = [
    Solo {
        name: "ibv_devinfo -v",
        script: "ibv_devinfo -v -d $DEV",
        expected: &[
            "rxe_vrdma0",
            "PORT_ACTIVE",
            "Ethernet",
            "::ffff:10.42.0.",
            "RoCE v2",
            "max_qp_wr:",
            "max_mr_size:",
        ],
    },
    Solo {
        name: "rdma link",
        script: "rdma link show $DEV/1",
        expected: &["state ACTIVE", "physical_state LINK_UP", "netdev eth0"],
    },
    Solo {
        name: "ibv_asyncwatch",
        script: ASYNCWATCH,
        expected: &["async event FD", "(10), port 1", "(9), port 1", "(18), port 1"],
    },
    Solo { name: "ibv_devices", script: "ibv_devices", expected: &["rxe_vrdma0"] },
];

impl Solo {
    /// Runs it.
    pub fn run(&self, guest: &Guest) -> Result<()> {
        let output = guest.must(self.script)?;
        let missing: Vec<_> = self.expected.iter().filter(|part| !output.contains(**part)).collect();
        ensure!(missing.is_empty(), "not found: {missing:?} in\n{output}");
        Ok(())
    }
}

/// `rdma resource` shows what the router has, no more and no less.
pub fn rdma_resource(bed: &Bed, nic: usize) -> Result<()> {
    let guest = bed.guest(nic)?;
    let before = bed.router.objects(nic)?;
    let job = guest.start_script("rescan && serve 17999 ibv_rc_pingpong -d $DEV -g $GID -p 17999")?;
    let seen = guest.must("until [ -e /share/listens.17999 ]; do tick; done; rdma resource show $DEV");
    let objects = bed.router.objects(nic)?;
    guest.must("die 17999 server")?;
    job.wait(Duration::from_secs(20))?;
    guest.forget_port(17999)?;
    let shown = seen?;
    ensure!(objects.qps == before.qps + 1, "the router shows {objects:?}");
    // The kernel has a region of all memory for each protection domain of its own, which is not shown.
    let hidden = before.mrs;
    for (name, count) in counted(Objects { mrs: objects.mrs - hidden, ..objects }) {
        let words: Vec<&str> = shown.split_whitespace().collect();
        let found = words.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1].to_owned());
        ensure!(found == Some(count.to_string()), "{name}: the router has {count}; shown: {shown}");
    }
    Ok(())
}

fn counted(objects: Objects) -> [(&'static str, usize); 4] {
    [("pd", objects.pds), ("cq", objects.cqs), ("qp", objects.qps), ("mr", objects.mrs)]
}
