//! `freeflow nic`: virtual NICs that come and go while the router runs.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, anyhow};
use clap::{ArgGroup, Args, Subcommand};
use comfy_table::Table;
use freeflow_backend::{BitRate, Mac, NicQuota, NicStatus, PathChoice, Profile, Rates};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{addresses_of, guest_of};
use crate::inventory::NewNic;
use crate::router::{Added, RateSet, Removed};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Have a virtual NIC, and print the socket for its VMM; one that is there already and is the same is left alone.
    ///
    /// The router keeps it over restarts.
    #[command(after_help = ADD_EXAMPLES)]
    Add(Box<Add>),
    /// Change how fast a virtual NIC and its queue pairs may be, at once; what is not named stays.
    #[command(after_help = SET_EXAMPLES, group(ArgGroup::new("change").args(RATES).required(true).multiple(true)))]
    Set {
        /// Its name.
        name: String,
        #[command(flatten)]
        rate: Limits,
    },
    /// Have no such virtual NIC: its VMM is disconnected, and everything of its guest is freed. It is no mistake if there is none.
    Del {
        /// Its name.
        name: String,
    },
    /// Everything about one virtual NIC but its counters, which `freeflow stats` has.
    Show {
        /// Its name.
        name: String,
    },
}

const ADD_EXAMPLES: &str = "Examples:
  freeflow nic add --tenant blue --ip 10.32.0.5/12
  freeflow nic add --name db --ip 10.0.0.1 --ip fd00::1 --mac 02:00:00:00:00:01 --qps 1024
  qemu-system-x86_64 ... -chardev socket,id=rdma,path=$(freeflow nic add --ip 10.32.0.5)";

/// What `nic set` changes: fields of [`Limits`].
const RATES: [&str; 5] = ["rate", "ops", "qp_rate", "qp_ops", "burst_ms"];

const SET_EXAMPLES: &str = "Examples:
  freeflow nic set db --rate 2.5G --qp-ops 100000
  freeflow nic set db --rate none";

/// Limits of rates. Work requests count for the virtual NIC that posts them, and payload in whichever direction it goes.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Limits {
    /// Most payload per second, in bit/s: a number with k, M, G or T; or none.
    #[arg(long, value_name = "BITS", value_parser = limit::<BitRate>)]
    rate: Option<Limit<BitRate>>,
    /// Most work requests per second; or none.
    #[arg(long, value_name = "N", value_parser = limit::<NonZeroU64>)]
    ops: Option<Limit<NonZeroU64>>,
    /// The same as --rate for each queue pair.
    #[arg(long, value_name = "BITS", value_parser = limit::<BitRate>)]
    qp_rate: Option<Limit<BitRate>>,
    /// The same as --ops for each queue pair.
    #[arg(long, value_name = "N", value_parser = limit::<NonZeroU64>)]
    qp_ops: Option<Limit<NonZeroU64>>,
    /// Who was below its rate may exceed it until what it missed in so many milliseconds is made up for [default: 10].
    #[arg(long, value_name = "MS")]
    burst_ms: Option<u32>,
}

/// A limit, or that there is none.
type Limit<T> = Result<T, Unlimited>;

/// There is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unlimited;

fn limit<T: FromStr<Err: ToString>>(text: &str) -> Result<Limit<T>, String> {
    if text == "none" { Ok(Err(Unlimited)) } else { text.parse().map(Ok).map_err(|error: T::Err| error.to_string()) }
}

impl Limits {
    /// What was given, in place of what is.
    pub fn over(&self, present: &Rates) -> Rates {
        Rates {
            bits: self.rate.map_or(present.bits, Result::ok),
            ops: self.ops.map_or(present.ops, Result::ok),
            qp_bits: self.qp_rate.map_or(present.qp_bits, Result::ok),
            qp_ops: self.qp_ops.map_or(present.qp_ops, Result::ok),
            burst_ms: self.burst_ms.unwrap_or(present.burst_ms),
        }
    }
}

#[derive(Debug, Args)]
pub struct Add {
    /// Name for people and commands [default: TENANT-ADDRESS].
    #[arg(long)]
    name: Option<String>,
    /// Tenant: virtual NICs of different tenants do not see each other, even with the same addresses.
    #[arg(long, default_value = "default")]
    tenant: String,
    /// Address that the guest may use; may be given more than once. The length of a prefix is taken and ignored: there are no subnets here.
    #[arg(long, required = true, value_name = "ADDRESS[/PREFIX]", value_parser = address)]
    ip: Vec<IpAddr>,
    /// MAC of the guest's ordinary interface [default: 02:ff and the last four bytes of the first address].
    #[arg(long)]
    mac: Option<Mac>,
    /// Unix socket for the VMM [default: NAME.sock beside the control socket].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Completion vectors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    vectors: u16,
    /// Data-path workers that serve it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    workers: u16,
    /// How bytes get to peers: auto, as is best; nic, through the host's RDMA NIC, if the peer does so too.
    #[arg(long, default_value_t)]
    path: PathChoice,
    #[command(flatten)]
    rate: Limits,
    /// Most queue pairs; short for `--limit max_qp=N`.
    #[arg(long, value_name = "N")]
    qps: Option<u32>,
    /// A limit of the device by its name in the configuration (docs/operations.md); may be given more than once.
    #[arg(long = "limit", value_name = "NAME=N")]
    limits: Vec<String>,
    /// How much of the host's RDMA NIC it may have: max-bytes, max-mr, max-map, max-pd, max-qp or max-cqe (docs/nic.md); may be given more than once.
    #[arg(long = "quota", value_name = "NAME=N")]
    quotas: Vec<String>,
}

impl Add {
    /// For the router.
    ///
    /// # Errors
    /// When there is no such limit or quota.
    pub fn to_nic(&self) -> Result<NewNic> {
        Ok(NewNic {
            name: self.name.clone(),
            tenant: self.tenant.clone(),
            ip: self.ip.clone(),
            mac: self.mac,
            socket: self.socket.as_deref().map(std::path::absolute).transpose()?,
            vectors: self.vectors,
            workers: self.workers,
            path: self.path,
            rate: self.rate.over(&Rates::default()),
            quota: self.quota()?,
            limits: self.profile()?,
        })
    }

    fn profile(&self) -> Result<Profile> {
        let qps = self.qps.map(|n| format!("max_qp={n}"));
        let lines: Vec<_> = self.limits.iter().cloned().chain(qps).collect();
        fields("limits", &lines)
    }

    fn quota(&self) -> Result<NicQuota> {
        fields("quotas of the host's NIC", &self.quotas)
    }
}

/// Fields that are given as NAME=N; what is left out is as ever.
fn fields<T: DeserializeOwned>(what: &str, lines: &[String]) -> Result<T> {
    // Only what is wrong: where it is in a file is nothing to whoever wrote no file.
    toml::from_str(&lines.join("\n")).map_err(|error| anyhow!("not {what}: {}: {}", lines.join(" "), error.message()))
}

/// An address, with or without the length of its network's prefix.
fn address(text: &str) -> Result<IpAddr, String> {
    let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let address: IpAddr = address.parse().map_err(|error| format!("{error}"))?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    match prefix.map(str::parse::<u8>) {
        None => Ok(address),
        Some(Ok(length)) if length <= longest => Ok(address),
        _ => Err(format!("a prefix of it has 0 to {longest} bits")),
    }
}

/// Only what a script needs.
pub fn added(added: &Added) -> String {
    added.socket.display().to_string()
}

pub fn removed(removed: &Removed) -> String {
    let name = &removed.name;
    if removed.removed { format!("removed {name}") } else { format!("there was no virtual NIC {name}") }
}

pub fn rate_set(set: &RateSet) -> String {
    let until = if set.kept { "" } else { ", until the next start: the virtual NIC comes from the configuration" };
    format!("{}: {}{until}", set.name, rate_of(&set.rate))
}

fn rate_of(rates: &Rates) -> String {
    let named = |name: &str, value: Option<String>| value.map(|value| format!("{value} {name}"));
    let parts = [
        named("bit/s", rates.bits.map(|rate| rate.to_string())),
        named("ops/s", rates.ops.map(|ops| ops.to_string())),
        named("bit/s per QP", rates.qp_bits.map(|rate| rate.to_string())),
        named("ops/s per QP", rates.qp_ops.map(|ops| ops.to_string())),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() {
        return "unlimited".to_owned();
    }
    format!("{}, burst {} ms", parts.join(", "), rates.burst_ms)
}

pub fn table(nic: &NicStatus) -> Table {
    let mut table = super::table(&["VIRTUAL NIC", &nic.config.name]);
    let objects = nic.objects;
    let rows = [
        ("tenant", nic.config.tenant.clone()),
        ("addresses", addresses_of(nic)),
        ("mac", nic.config.mac.to_string()),
        ("socket", nic.socket.clone()),
        ("guest", guest_of(nic).to_owned()),
        ("gids", nic.gids.join(" ")),
        ("path", nic.config.path.to_string()),
        ("rate", rate_of(&nic.config.rates)),
        ("vectors", nic.config.num_vectors.to_string()),
        ("workers", nic.config.num_workers.to_string()),
        ("pds, mrs, cqs, qps", [objects.pds, objects.mrs, objects.cqs, objects.qps].map(|n| n.to_string()).join(", ")),
    ];
    table.add_rows(rows.map(|(name, value)| [name.to_owned(), value]));
    table.add_rows(rows_of(&nic.config.profile, ""));
    table.add_rows(rows_of(&nic.config.quota, "host's NIC: "));
    table
}

/// A row for each field.
fn rows_of(of: &impl Serialize, before: &str) -> Vec<[String; 2]> {
    let fields = serde_json::to_value(of).ok().and_then(|value| value.as_object().cloned()).unwrap_or_default();
    fields.into_iter().map(|(name, value)| [format!("{before}{name}"), value.to_string()]).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        add: Add,
    }

    fn quota(given: &[&str]) -> Result<NicQuota> {
        let line = ["add", "--ip", "10.0.0.1"].iter().chain(given);
        Line::parse_from(line).add.to_nic().map(|nic| nic.quota)
    }

    #[test]
    fn quotas_are_by_name() {
        assert_eq!(quota(&[]).unwrap(), NicQuota::default());
        let some = quota(&["--quota", "max-bytes=4096", "--quota", "max-qp=7"]).unwrap();
        assert_eq!(some, NicQuota { max_bytes: 4096, max_qp: 7, ..NicQuota::default() });
        for bad in ["max-mw=3", "max-qp", "max-qp=many", "max-qp=-1"] {
            let error = quota(&["--quota", bad]).unwrap_err();
            assert!(format!("{error:#}").contains(bad), "{error:#}");
        }
    }

    #[test]
    fn prefixes_are_checked_and_forgotten() {
        assert_eq!(address("10.32.0.5/12").unwrap(), IpAddr::from([10, 32, 0, 5]));
        assert_eq!(address("fd00::1/64").unwrap(), "fd00::1".parse::<IpAddr>().unwrap());
        for bad in ["10.32.0.5/33", "10.32.0.5/", "10.32.0", "fd00::1/129", ""] {
            address(bad).unwrap_err();
        }
    }
}
