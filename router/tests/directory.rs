//! The directory as a daemon has it: which virtual NICs it lets come, and what `freeflow directory` shows.
#![allow(missing_docs, reason = "a test program")]

#[path = "common/authority.rs"]
mod authority;
mod common;

use std::path::PathBuf;

use authority::Authority;
use common::{Daemon, Place, SOON};
use freeflow_tests::bed::eventually;
use serde_json::Value;

const HOSTS: &str = r#"
[[host]]
name = "host1"
address = "192.0.2.1:7471"
nic = [{ name = "a", tenant = "blue", ip = ["10.0.0.1"] }, { name = "b", tenant = "blue", ip = ["10.0.0.2"] }]

[[host]]
name = "host2"
address = "192.0.2.2:7471"
nic = [{ name = "c", tenant = "blue", ip = ["10.0.0.3"] }, { name = "c", tenant = "red", ip = ["10.0.0.1"] }]
"#;

/// A file of hosts, and a configuration that names it.
struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let files = Self { folder: tempfile::tempdir().unwrap() };
        std::os::unix::fs::chown(files.folder.path(), Some(65534), None).unwrap();
        files.write(HOSTS);
        let hosts = files.folder.path().join("hosts.toml");
        let authority = Authority::new();
        let tls = authority::write(files.folder.path(), &authority, &authority.sign(&["host1"]));
        let [ca, cert, key] = tls.map(|path| path.display().to_string());
        let config = format!(
            "[cluster]\nname = 'host1'\nlisten = '127.0.0.1:0'\ndirectory = '{}'\ntls = {{ ca = {ca:?}, cert = {cert:?}, key = {key:?} }}\n",
            hosts.display()
        );
        std::fs::write(files.config(), config).unwrap();
        files
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("router.toml")
    }

    fn write(&self, hosts: &str) {
        let new = self.folder.path().join("new");
        std::fs::write(&new, hosts).unwrap();
        std::fs::rename(new, self.folder.path().join("hosts.toml")).unwrap();
    }

    fn start<'a>(&self, place: &'a Place) -> Daemon<'a> {
        place.start_with(0, &["--config", self.config().to_str().unwrap()])
    }
}

fn add(daemon: &Daemon<'_>, name: &str, ip: &str) -> Result<(), String> {
    let args = ["nic", "add", "--tenant", "blue", "--name", name, "--ip", ip];
    let output = daemon.freeflow(&args);
    if output.status.success() { Ok(()) } else { Err(String::from_utf8(output.stderr).unwrap()) }
}

fn owner(daemon: &Daemon<'_>, tenant: &str, ip: &str) -> Option<String> {
    let view: Value = serde_json::from_str(&daemon.says(&["directory", "--json", "--tenant", tenant])).unwrap();
    let has = |nic: &&Value| nic["addresses"].as_array().unwrap().iter().any(|address| address == ip);
    view["nics"].as_array().unwrap().iter().find(has).map(|nic| nic["host"].as_str().unwrap().to_owned())
}

#[test]
fn a_host_has_what_the_file_gives_it_and_no_more() {
    let (files, place) = (Files::new(), Place::new());
    let daemon = files.start(&place);
    add(&daemon, "a", "10.0.0.1").unwrap();
    let taken = add(&daemon, "x", "10.0.0.3").unwrap_err();
    let both = "belongs to virtual NIC \"c\" of host host2, and virtual NIC \"x\" of host host1 cannot have it";
    assert!(taken.contains(both), "{taken}");
    let unknown = add(&daemon, "x", "10.0.0.4").unwrap_err();
    assert!(
        unknown.contains("hosts.toml does not give address 10.0.0.4") && unknown.contains("[[host.nic]]"),
        "{unknown}"
    );
    assert_eq!(daemon.says(&["nics"]).lines().count(), 2, "a heading and one virtual NIC");
    let shown = daemon.says(&["directory", "--tenant", "blue"]);
    assert!(shown.contains("hosts.toml: up to date; 2 hosts, 3 virtual NICs"), "{shown}");
    assert_eq!(owner(&daemon, "red", "10.0.0.1").as_deref(), Some("host2"));
    assert_eq!(owner(&daemon, "green", "10.0.0.1"), None);
    let (status, log) = daemon.stop();
    assert!(status.success(), "{status}\n{log}");
}

/// By a daemon that may open no files any more.
#[test]
fn a_virtual_nic_moves_by_the_file() {
    let (files, place) = (Files::new(), Place::new());
    let daemon = files.start(&place);
    add(&daemon, "x", "10.0.0.3").unwrap_err();
    files.write("[[host]]\nname = 7");
    eventually("the complaint", SOON, || daemon.says(&["directory"]).contains("cut off for"));
    assert_eq!(owner(&daemon, "blue", "10.0.0.3").as_deref(), Some("host2"));
    files.write(&HOSTS.replace("10.0.0.3", "10.0.0.4").replace("10.0.0.2", "10.0.0.3"));
    eventually("the move", SOON, || owner(&daemon, "blue", "10.0.0.3").as_deref() == Some("host1"));
    add(&daemon, "x", "10.0.0.3").unwrap();
    let (_, log) = daemon.stop();
    assert_eq!(log.matches("line 2: ").count(), 1, "{log}");
}

#[test]
fn what_went_elsewhere_while_the_router_was_away_is_kept_but_not_served() {
    let (files, place) = (Files::new(), Place::new());
    let daemon = files.start(&place);
    add(&daemon, "a", "10.0.0.1").unwrap();
    add(&daemon, "b", "10.0.0.2").unwrap();
    daemon.stop();
    files.write(&HOSTS.replace("10.0.0.3", "10.0.0.9").replace("10.0.0.2", "10.0.0.3"));
    let daemon = files.start(&place);
    let shown = daemon.says(&["nics"]);
    assert!(shown.contains("10.0.0.1") && !shown.contains("10.0.0.2"), "{shown}");
    assert!(std::fs::read_to_string(place.state()).unwrap().contains("10.0.0.2"));
    let (_, log) = daemon.stop();
    assert!(log.contains("virtual NIC \"b\" is not started: ") && log.contains("[[host.nic]]"), "{log}");
    files.write(HOSTS);
    let daemon = files.start(&place);
    assert!(daemon.says(&["nics"]).contains("10.0.0.2"));
    assert_eq!(daemon.says(&["nic", "del", "b"]), "removed b");
}

#[test]
fn what_cannot_be_used_is_said_at_the_start() {
    let (files, place) = (Files::new(), Place::new());
    let config = files.config();
    let refused = || place.refuses(&["--config", config.to_str().unwrap()]);
    files.write(&HOSTS.replace("10.0.0.3", "10.0.0.2"));
    let error = refused();
    assert!(
        error.contains("hosts.toml: line 10: ") && error.contains("virtual NIC \"b\" of host host1 has it (line 5)"),
        "{error}"
    );
    files.write(&HOSTS.replace("host1", "host3"));
    assert!(refused().contains("it does not have this host, host1"), "{}", refused());
    assert!(Place::new().start(0).fails(&["directory"]).contains("no [cluster]"));
}
