//! The path over a host's RDMA NIC, on a NIC that the kernel knows: in a guest that plays the host, with rxe for the NIC.
//!
//! The in-process guest's own tests run there as programs of the host, which see virtual NICs that reach each other over rxe. The [whole
//! chain](nested) is a guest within that guest, with a router between them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::bed::Bed;
use super::child::sibling;
use super::conformance::RXE;
use super::guest::{Guest, launcher_path};

/// How long the tests of one program may take.
const PATIENCE: Duration = Duration::from_mins(10);

/// Tests of the in-process guest that are run over a NIC.
#[derive(Debug)]
pub struct Suite {
    /// What it is called.
    pub name: &'static str,
    /// The file in `tests/tests`.
    file: &'static str,
    /// Which way: a value of `FREEFLOW_TEST_PATH`.
    path: &'static str,
    /// More arguments for it.
    arguments: &'static str,
    /// Variables of its environment.
    settings: &'static str,
    /// So many bytes must be seen to go through the NIC.
    carries: u64,
}

const fn suite(name: &'static str) -> Suite {
    Suite { name, file: name, path: "nic:rxe0", arguments: "--test-threads=2", settings: "", carries: 0 }
}

/// Each virtual NIC on a host of its own. The same NIC is that of all of them.
const fn between(name: &'static str, file: &'static str, carries: u64) -> Suite {
    Suite { name, path: "fabric:rxe0", carries, ..suite(file) }
}

const fn carried(name: &'static str, carries: u64) -> Suite {
    Suite { carries, ..suite(name) }
}

/// Those that `make test` runs. Not `rc` until it is known why it failed over rxe now and then (docs/status.md).
pub const FEW: [&str; 4] = ["uc", "srq", "real_nic", "srq between hosts"];

/// All, in the order in which they run. Left out are those in which nothing is connected or registered that a NIC would see (`fuzz_corpus`,
/// `hostile_descriptors`, `odp_commands`), that look at a clock (`fairness`, `rates`), that need several hosts and a NIC that is fake, or none (`fabric`, `tcp`), or for whose 10,000 queue pairs the guest is too small (`scale`).
pub const SUITES: [Suite; 30] = [
    carried("rc", 1 << 20),
    carried("uc", 1 << 14),
    carried("srq", 1 << 10),
    carried("errors", 1),
    // The NIC itself at bad moments.
    Suite { arguments: "--ignored --test-threads=1", ..suite("real_nic") },
    suite("atomics"),
    suite("bad_commands"),
    carried("bad_requests", 1),
    carried("events", 1),
    suite("fast_reg"),
    suite("gsi"),
    // Left out of these two is what looks at a clock.
    Suite { arguments: "--test-threads=2 --skip a_deaf_destination", ..suite("hostile_guest") },
    suite("hostile_verbs"),
    Suite { arguments: "--test-threads=2 --skip connecting_again_and_again", ..suite("hostile_vmm") },
    // Memory that a NIC has pinned stays when its file is cut short, and traffic goes on.
    Suite { arguments: "--test-threads=2 --skip memory_truncated", ..carried("lifecycle", 1) },
    suite("mcast"),
    // A tenth of its operations: each is some system calls, which are dear in the guest.
    Suite { settings: "FREEFLOW_OPS=4000", ..carried("model", 1) },
    suite("objects"),
    suite("odp"),
    suite("resize"),
    suite("tenants"),
    suite("ud"),
    suite("verbs"),
    suite("windows"),
    suite("words"),
    between("rc between hosts", "rc", 1 << 20),
    // What is not reliable may get lost between hosts.
    Suite {
        arguments: "--test-threads=2 --skip datagrams_and_unreliable",
        ..between("srq between hosts", "srq", 1 << 10)
    },
    // What is longer than its receive is told to the NIC, and rxe's status for it is another one than the specification's.
    Suite {
        arguments: "--test-threads=2 --skip send_longer_than_the_receive",
        ..between("errors between hosts", "errors", 1)
    },
    Suite {
        arguments: "--test-threads=2 --skip memory_truncated",
        ..between("lifecycle between hosts", "lifecycle", 1)
    },
    Suite { settings: "FREEFLOW_OPS=4000", ..between("model between hosts", "model", 1) },
];

/// What the kernel of the host says of its NIC.
struct Traces {
    resources: String,
    sent: u64,
}

impl Suite {
    /// By its name.
    pub fn named(name: &str) -> Option<&'static Self> {
        SUITES.iter().find(|suite| suite.name == name)
    }

    /// Runs its tests in the guest that plays the host.
    pub fn run(&self, bed: &Bed, nic: usize) -> Result<()> {
        let host = bed.guest(nic)?;
        host.must(&format!("rdma link show rxe0/1 >/dev/null 2>&1 || {{ {RXE}\n}}")).context("no rxe in the guest")?;
        let program = program(self.file)?;
        std::fs::copy(&program, bed.share().join("program")).context("cannot give the guest a test program")?;
        let before = Traces::of(host)?;
        let Self { settings, arguments, path, .. } = self;
        let run = format!("{settings} FREEFLOW_TEST_PATH={path} exec /share/program {arguments} 2>&1");
        let done = host.run(&run, PATIENCE)?;
        ensure!(done.status == 0, "status {}:\n{}", done.status, done.output);
        let after = Traces::of(host)?;
        ensure!(
            after.resources == before.resources,
            "left on the NIC: {}before: {}",
            after.resources,
            before.resources
        );
        let carried = after.sent - before.sent;
        ensure!(carried >= self.carries, "rxe has sent {carried} bytes only:\n{}", done.output);
        Ok(())
    }
}

impl Traces {
    fn of(host: &Guest) -> Result<Self> {
        let resources = host.must("rdma resource show rxe0")?;
        let statistic = host.must("rdma statistic show link rxe0/1")?;
        let sent = counter(&statistic, "sent_bytes").with_context(|| format!("no sent_bytes in: {statistic}"))?;
        Ok(Self { resources, sent })
    }
}

/// One of `rdma statistic`.
fn counter(statistic: &str, name: &str) -> Option<u64> {
    statistic.split_whitespace().skip_while(|word| *word != name).nth(1)?.parse().ok()
}

/// What cargo says of a thing that it has built.
#[derive(Debug, Deserialize)]
struct Built {
    target: Target,
    executable: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

/// The program of some tests, built if need be.
fn program(name: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--quiet", "--no-run", "--message-format=json", "--workspace", "--test", name]);
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR"))).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = cargo.output().context("cannot start cargo, which builds the tests")?;
    ensure!(output.status.success(), "cargo cannot build the tests of {name} ({})", output.status);
    let found = programs(&String::from_utf8_lossy(&output.stdout)).remove(name);
    found.with_context(|| format!("cargo has not built the tests of {name}"))
}

fn programs(messages: &str) -> BTreeMap<String, PathBuf> {
    let built = messages.lines().filter_map(|line| serde_json::from_str::<Built>(line).ok());
    let tests = built.filter(|built| built.target.kind == ["test"]);
    tests.filter_map(|built| Some((built.target.name, built.executable?))).collect()
}

/// The suite of a name in a list.
pub fn check(bed: &Bed, nic: usize, name: &str) -> Result<()> {
    match Suite::named(name) {
        Some(suite) => suite.run(bed, nic),
        None => bail!("no tests are called {name}"),
    }
}

/// The script of both guests.
const NESTED: &str = include_str!("nested.sh");

/// Perftest in a User-mode Linux guest, on virtual NICs of a router that runs in a guest of ours, over rxe of that guest.
pub fn nested(bed: &Bed, nic: usize) -> Result<()> {
    let parts = [
        (launcher_path(&["path", "uml-kernel"])?, "linux"),
        (launcher_path(&["module", "--vmm", "uml"])?, "virtio_rdma.ko"),
        (sibling("FREEFLOW_ROUTER_BIN", "freeflow-router")?, "freeflow-router"),
    ];
    for (from, name) in parts {
        std::fs::copy(&from, bed.share().join(name)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    bed.put("nested.sh", NESTED)?;
    let done = bed.guest(nic)?.run("exec bash /share/nested.sh host", PATIENCE)?;
    ensure!(done.status == 0, "status {}:\n{}", done.status, done.output);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_what_cargo_says() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"x"},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"rc"},"executable":"/t/rc-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(programs(messages), BTreeMap::from([("rc".to_owned(), PathBuf::from("/t/rc-1"))]));
    }

    #[test]
    fn counters_are_found() {
        let text = "link rxe0/1 sent_pkts 7 sent_bytes 4096 rcvd_bytes 5 ";
        assert_eq!((counter(text, "sent_bytes"), counter(text, "link_downed")), (Some(4096), None));
    }

    /// Every file in `tests/tests` is run, or left out for a reason that is said above.
    #[test]
    fn what_is_run_is_there() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
        let left_out =
            ["fuzz_corpus", "hostile_descriptors", "odp_commands", "fabric", "fairness", "rates", "scale", "tcp"];
        for file in files.filter(|file| file.extension().is_some_and(|ending| ending == "rs")) {
            let name = file.file_stem().unwrap().to_str().unwrap();
            assert!(Suite::named(name).is_some() != left_out.contains(&name), "{name}");
        }
        for name in SUITES.iter().map(|suite| suite.name).chain(FEW) {
            let file = Suite::named(name).expect(name).file;
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(file).with_extension("rs");
            assert!(path.exists(), "{name}");
        }
    }
}
