//! `freeflow-router`: the daemon.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Result;
use clap::{Parser, Subcommand};
use freeflow_backend::verbs::DeviceChoice;
use freeflow_backend::{Mac, NicQuota, PathChoice, Profile, Rates};
use freeflow_router::cluster::settings::TlsSettings;
use freeflow_router::config::NicSettings;
use freeflow_router::files::Direct;
use freeflow_router::sandbox::{Seccomp, Security};
use freeflow_router::{Config, daemon, steward};

/// Serve virtual RDMA NICs to the virtual machines of this host.
///
/// Each virtual NIC is a vhost-user socket that a VMM connects to (QEMU: `-chardev socket,path=SOCKET`). They come from
/// a configuration file, from --nic, and later from `freeflow nic add`.
#[derive(Debug, Parser)]
#[command(name = "freeflow-router", version, after_help = EXAMPLES)]
struct Args {
    /// Configuration file (TOML).
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A virtual NIC: name=NAME,ip=ADDRESS[,ip=ADDRESS...],socket=PATH[,tenant=NAME][,mac=MAC][,path=auto|nic], and how much of the host's RDMA
    /// NIC it may have: [,max-bytes=N][,max-mr=N][,max-map=N][,max-pd=N][,max-qp=N][,max-cqe=N].
    #[arg(long, value_name = "NIC", value_parser = parse_nic)]
    nic: Vec<NicSettings>,
    /// Unix socket for the freeflow command [default: /run/freeflow/control.sock].
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// File that keeps the virtual NICs of `freeflow nic add` for the next start [default: /var/lib/freeflow/nics.toml].
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// The host's RDMA NIC, for virtual NICs with path=nic: auto for the first that can be used, or NAME or NAME:PORT as `rdma link` shows
    /// them. RoCE v2 only, with its port's first GID made from an IPv4 address, else IPv6 [default: auto if a virtual NIC has path=nic at the
    /// start, else none].
    #[arg(long, value_name = "DEVICE")]
    rdma_device: Option<DeviceChoice>,
    /// Address at which Prometheus finds figures, such as 127.0.0.1:9464 [default: none].
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
    /// Data-path worker threads [default: 1].
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Cores to pin the workers to, in order.
    #[arg(long, value_name = "CORE", value_delimiter = ',')]
    cores: Vec<usize>,
    /// Microseconds that a worker polls after the last work before it sleeps [default: 50].
    #[arg(long, value_name = "US")]
    poll_us: Option<u64>,
    /// User to go on as once started, by name or number [default: stay].
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// What happens at system calls that the daemon does not need: enforce (it is ended), log, off [default: enforce].
    #[arg(long, value_name = "MODE")]
    seccomp: Option<Seccomp>,
    /// Check the configuration and exit; files that it names (certificates, the directory) are not read.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

/// What this program is beside the daemon.
#[derive(Debug, Subcommand)]
enum Part {
    /// The process that makes sockets and files for the daemon, which starts it.
    #[command(hide = true)]
    Steward {
        #[arg(long)]
        state: PathBuf,
        #[arg(long)]
        directory: Option<PathBuf>,
        #[arg(long, requires = "cert", requires = "key")]
        ca: Option<PathBuf>,
        #[arg(long)]
        cert: Option<PathBuf>,
        #[arg(long)]
        key: Option<PathBuf>,
        #[arg(long)]
        user: Option<String>,
        #[arg(long)]
        seccomp: Seccomp,
    },
}

const EXAMPLES: &str = "Examples:
  freeflow-router --config /etc/freeflow/router.toml
  freeflow-router --nic name=a,ip=10.0.0.1,socket=/run/freeflow/a.sock \\
                  --nic name=b,ip=10.0.0.2,socket=/run/freeflow/b.sock

A configuration file:
  [[nic]]
  name = \"a\"
  tenant = \"blue\"
  ip = [\"10.0.0.1\", \"fd00::1\"]
  socket = \"/run/freeflow/a.sock\"

Two virtual NICs that reach each other through the host's RDMA NIC (docs/nic.md):
  freeflow-router --rdma-device mlx5_0 \\
                  --nic name=a,ip=10.0.0.1,socket=/run/freeflow/a.sock,path=nic \\
                  --nic name=b,ip=10.0.0.2,socket=/run/freeflow/b.sock,path=nic

The log goes to standard error; RUST_LOG=debug shows more.";

const NIC_KEYS: &str =
    "name, ip, socket, tenant, mac, path, and for the host's NIC max-bytes, max-mr, max-map, max-pd, max-qp, max-cqe";

fn number<T: FromStr<Err: Display>>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|error| format!("{key}={value}: {error}"))
}

fn parse_nic(text: &str) -> Result<NicSettings, String> {
    let (mut name, mut socket, mut tenant, mut mac, mut ip) = (None, None, None, None, Vec::new());
    let mut path = PathChoice::Auto;
    let mut quota = NicQuota::default();
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
        match key {
            "name" => name = Some(value.to_owned()),
            "socket" => socket = Some(PathBuf::from(value)),
            "tenant" => tenant = Some(value.to_owned()),
            "mac" => mac = Some(value.parse::<Mac>()?),
            "path" => path = value.parse()?,
            "max-bytes" => quota.max_bytes = number(key, value)?,
            "max-mr" => quota.max_mr = number(key, value)?,
            "max-map" => quota.max_map = number(key, value)?,
            "max-pd" => quota.max_pd = number(key, value)?,
            "max-qp" => quota.max_qp = number(key, value)?,
            "max-cqe" => quota.max_cqe = number(key, value)?,
            "ip" => ip.push(value.parse::<IpAddr>().map_err(|e| format!("{value:?}: {e}"))?),
            _ => {
                return Err(format!("unknown key {key:?}: use {NIC_KEYS}"));
            }
        }
    }
    Ok(NicSettings {
        name: name.ok_or("name=NAME is missing")?,
        tenant: tenant.unwrap_or_else(|| "default".to_owned()),
        ip,
        mac,
        socket: socket.ok_or("socket=PATH is missing")?,
        vectors: 1,
        workers: 1,
        path,
        quota,
        rate: Rates::default(),
        limits: Profile::default(),
    })
}

impl Args {
    fn config(self) -> Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::load(path)?,
            None => Config::default(),
        };
        config.nic.extend(self.nic);
        config.control = self.control.or(config.control);
        config.state = self.state.or(config.state);
        config.rdma_device = self.rdma_device.or(config.rdma_device);
        config.metrics = self.metrics.or(config.metrics);
        config.engine.workers = self.workers.unwrap_or(config.engine.workers);
        config.engine.poll_us = self.poll_us.unwrap_or(config.engine.poll_us);
        if !self.cores.is_empty() {
            config.engine.cores = self.cores;
        }
        config.security.user = self.user.or(config.security.user);
        config.security.seccomp = self.seccomp.unwrap_or(config.security.seccomp);
        config.check()?;
        Ok(config)
    }
}

/// The log as `RUST_LOG` asks for, without the libraries that know nothing of our limits on what guests can make us write.
fn logger() -> env_logger::Builder {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(log::LevelFilter::Info);
    for library in ["virtio_queue", "vhost", "vm_memory"] {
        builder.filter_module(library, log::LevelFilter::Off);
    }
    builder.parse_default_env();
    builder
}

/// As many descriptors as we may have: a VMM may bring 509 memory regions, and what is allowed at first is often 1024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        log::warn!("cannot raise the limit of descriptors: {error}");
    }
}

fn main() -> ExitCode {
    logger().init();
    raise_descriptor_limit();
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("freeflow-router: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut args: Args) -> Result<()> {
    if let Some(Part::Steward { state, directory, ca, cert, key, user, seccomp }) = args.part.take() {
        let daemon = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
        let tls = ca.zip(cert).zip(key).map(|((ca, cert), key)| TlsSettings { ca, cert, key });
        let files = Direct { state: Some(state), directory, tls };
        return steward::serve(&daemon, &Security { user, seccomp }, &files);
    }
    let check = args.check;
    let config = args.config()?;
    if check {
        let nics = if config.nic.len() == 1 { "virtual NIC" } else { "virtual NICs" };
        println!("the configuration is valid: {} {nics}; files that it names are read at the start", config.nic.len());
        return Ok(());
    }
    daemon::run(&config)
}

#[cfg(test)]
mod tests {
    use freeflow_backend::NicQuota;
    use log::{Level, Log, Metadata};

    #[test]
    fn a_virtual_nic_on_the_command_line_takes_quotas() {
        let parse = |more: &str| super::parse_nic(&format!("name=a,ip=10.0.0.1,socket=/s{more}"));
        assert_eq!(parse("").unwrap().quota, NicQuota::default());
        let quota = NicQuota { max_bytes: 4096, max_mr: 2, max_map: 3, max_pd: 4, max_qp: 5, max_cqe: 6 };
        assert_eq!(parse(",max-bytes=4096,max-mr=2,max-map=3,max-pd=4,max-qp=5,max-cqe=6").unwrap().quota, quota);
        assert!(parse(",max-qp=-1").unwrap_err().contains("max-qp=-1"));
        assert!(parse(",max-mw=1").unwrap_err().contains("max-cqe"));
    }

    #[test]
    fn libraries_do_not_log() {
        let logger = super::logger().build();
        let logs = |target, level| logger.enabled(&Metadata::builder().target(target).level(level).build());
        assert!(!logs("virtio_queue::queue", Level::Error));
        assert!(!logs("vhost::vhost_user", Level::Error));
        assert!(!logs("vm_memory", Level::Error));
        assert!(logs("freeflow_backend", Level::Error));
    }
}
