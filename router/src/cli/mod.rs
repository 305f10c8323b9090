//! The `freeflow` command: what a running router has, as tables or JSON, and changes to it.

mod directory;
mod hosts;
mod nic;
mod top;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};
use freeflow_backend::{NicStatus, QpStatus};
use serde::Serialize;

use crate::api::{self, Stats};
use crate::config::DEFAULT_CONTROL;

/// Look at the virtual RDMA NICs of this host, add and remove them.
///
/// Asks the daemon freeflow-router over its Unix socket; whoever may open that socket may ask.
#[derive(Debug, Parser)]
#[command(name = "freeflow", version, after_help = EXAMPLES)]
pub struct Cli {
    /// The daemon's socket.
    #[arg(long, global = true, value_name = "SOCKET", default_value = DEFAULT_CONTROL, env = "FREEFLOW_CONTROL")]
    control: PathBuf,
    /// Print JSON instead of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  freeflow nics                       which virtual NICs there are, and who is connected
  freeflow qps --nic a                queue pairs of virtual NIC a: state, peer, path, traffic
  freeflow stats --json | jq .nics    all counters
  freeflow top                        what they do now
  freeflow hosts                      other hosts, and whether there is a session with each
  freeflow directory --tenant blue    on which host each virtual NIC of a tenant is
  freeflow nic add --ip 10.32.0.5     a new virtual NIC; prints the socket for its VMM
  freeflow nic del default-10.32.0.5  and away with it";

#[derive(Debug, Subcommand)]
enum Command {
    /// Virtual NICs: addresses, socket, whether a guest is there, objects.
    Nics,
    /// Queue pairs: state, peer, path and traffic.
    Qps {
        /// Only those of this virtual NIC.
        #[arg(long, value_name = "NAME")]
        nic: Option<String>,
    },
    /// Objects and counters of each virtual NIC.
    Stats {
        /// Only this virtual NIC.
        #[arg(long, value_name = "NAME")]
        nic: Option<String>,
    },
    /// What virtual NICs and queue pairs do now, again and again; with --json a line for each look.
    Top(top::Top),
    /// Other hosts: where they are, whether there is a session with each, and why not.
    Hosts,
    /// Who lives where: the virtual NICs of all hosts, as this one knows them.
    Directory {
        /// Only those of this tenant.
        #[arg(long, value_name = "NAME")]
        tenant: Option<String>,
    },
    /// Add, change, remove and show a virtual NIC.
    #[command(subcommand)]
    Nic(nic::Command),
}

impl Cli {
    /// Runs the command and returns what it prints at its end, if anything.
    ///
    /// # Errors
    /// When the daemon cannot be asked.
    pub fn run(&self) -> Result<String> {
        let keep = |only: &Option<String>, name: &str| only.as_deref().is_none_or(|n| n == name);
        match &self.command {
            Command::Nics => self.show(api::nics(&self.control)?, |nics| nics_table(nics)),
            Command::Qps { nic } => {
                self.check_name(nic.as_deref())?;
                let mut qps = api::qps(&self.control)?;
                qps.retain(|qp| keep(nic, &qp.nic));
                self.show(qps, |qps| qps_table(qps))
            }
            Command::Stats { nic } => {
                self.check_name(nic.as_deref())?;
                let mut stats = api::stats(&self.control)?;
                stats.nics.retain(|n| keep(nic, &n.config.name));
                self.show(stats, stats_table)
            }
            Command::Top(top) => top.run(&self.control, self.json).map(|()| String::new()),
            Command::Hosts => self.show(api::hosts(&self.control)?, |hosts| hosts::table(hosts)),
            Command::Directory { tenant } => {
                self.say(api::directory(&self.control, tenant.as_deref())?, directory::text)
            }
            Command::Nic(command) => self.nic(command),
        }
    }

    fn find(&self, name: &str) -> Result<NicStatus> {
        self.check_name(Some(name))?;
        let found = api::nics(&self.control)?.into_iter().find(|nic| nic.config.name == *name);
        found.with_context(|| format!("virtual NIC {name:?} has just gone"))
    }

    /// Whether there is a virtual NIC of this name, so that a wrong one does not look like an idle one.
    fn check_name(&self, name: Option<&str>) -> Result<()> {
        let Some(name) = name else { return Ok(()) };
        let nics = api::nics(&self.control)?;
        let names: Vec<_> = nics.iter().map(|nic| nic.config.name.as_str()).collect();
        ensure!(!names.is_empty(), "there is no virtual NIC {name:?}, and no other");
        ensure!(names.contains(&name), "there is no virtual NIC {name:?}, only {}", names.join(", "));
        Ok(())
    }

    fn nic(&self, command: &nic::Command) -> Result<String> {
        match command {
            nic::Command::Add(add) => self.say(api::add(&self.control, add.to_nic()?)?, nic::added),
            nic::Command::Set { name, rate } => {
                let present = self.find(name)?.config.rates;
                self.say(api::set_rate(&self.control, name, rate.over(&present))?, nic::rate_set)
            }
            nic::Command::Del { name } => self.say(api::remove(&self.control, name)?, nic::removed),
            nic::Command::Show { name } => self.show(self.find(name)?, nic::table),
        }
    }

    fn show<T: Serialize>(&self, value: T, table: impl FnOnce(&T) -> Table) -> Result<String> {
        self.say(value, |value| table(value).trim_fmt())
    }

    fn say<T: Serialize>(&self, value: T, human: impl FnOnce(&T) -> String) -> Result<String> {
        if self.json { Ok(serde_json::to_string_pretty(&value)?) } else { Ok(human(&value)) }
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header.iter().copied());
    table
}

fn nics_table(nics: &[NicStatus]) -> Table {
    let mut table = table(&["NAME", "TENANT", "ADDRESSES", "MAC", "GUEST", "QPS", "MRS", "CQS", "SOCKET"]);
    for nic in nics {
        table.add_row([
            nic.config.name.clone(),
            nic.config.tenant.clone(),
            addresses_of(nic),
            nic.config.mac.to_string(),
            guest_of(nic).to_owned(),
            nic.objects.qps.to_string(),
            nic.objects.mrs.to_string(),
            nic.objects.cqs.to_string(),
            nic.socket.clone(),
        ]);
    }
    table
}

fn addresses_of(nic: &NicStatus) -> String {
    let addresses: Vec<_> = nic.config.addresses.iter().map(ToString::to_string).collect();
    addresses.join(" ")
}

fn guest_of(nic: &NicStatus) -> &'static str {
    match (nic.connected, nic.running) {
        (false, _) => "none",
        (true, false) => "starting",
        (true, true) => "running",
    }
}

fn qps_table(qps: &[QpStatus]) -> Table {
    let mut table =
        table(&["NIC", "QPN", "TYPE", "STATE", "PEER", "PATH", "WAITING", "REQUESTS", "BYTES", "WHY THIS PATH"]);
    for qp in qps {
        let peer = qp.remote_gid.as_ref().zip(qp.remote_qpn).map(|(gid, qpn)| format!("{gid} {qpn:#08x}"));
        table.add_row([
            qp.nic.clone(),
            format!("{:#08x}", qp.qpn),
            qp.kind.clone(),
            qp.state.clone(),
            peer.unwrap_or_else(|| "-".to_owned()),
            qp.path.clone().unwrap_or_else(|| "-".to_owned()),
            qp.waiting.clone().unwrap_or_else(|| "-".to_owned()),
            qp.completed.to_string(),
            qp.bytes.to_string(),
            qp.why.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table
}

fn stats_table(stats: &Stats) -> Table {
    let mut header = vec!["COUNTER"];
    header.extend(stats.nics.iter().map(|n| n.config.name.as_str()));
    let mut table = table(&header);
    let columns: Vec<_> = stats.nics.iter().map(values).collect();
    let names = columns.first().map_or_else(Vec::new, |c| c.iter().map(|(name, _)| name.clone()).collect());
    for (row, name) in names.into_iter().enumerate() {
        let cells = columns.iter().map(|column| column[row].1.to_string());
        table.add_row(std::iter::once(name).chain(cells));
    }
    table
}

/// Objects and counters by name, in the order in which they are declared.
fn values(nic: &NicStatus) -> Vec<(String, u64)> {
    let objects = serde_json::to_value(nic.objects);
    let counters = serde_json::to_value(&nic.counters);
    let maps = [objects, counters].into_iter().filter_map(Result::ok);
    let fields = maps.filter_map(|value| value.as_object().cloned()).flatten();
    fields.filter_map(|(name, value)| value.as_u64().map(|v| (name, v))).collect()
}
