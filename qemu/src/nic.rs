//! What a virtual NIC's socket tells before a guest is attached to it.
//!
//! The launcher connects as a short-lived vhost-user frontend and reads the configuration space: that says whether
//! it is our device at all, how many virtqueues it has, and which MAC the interface beside it must have.

use std::fs::File;
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_rdma::config::Config;
use virtio_rdma::zerocopy::FromBytes;

/// How long a router may take to answer; it is silent while another guest has the device.
const PATIENCE: Duration = Duration::from_secs(3);

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A random address from the range that is free for local use.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 6];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut bytes))
            .context("cannot read /dev/urandom")?;
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Ok(Self(bytes))
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&parts.join(":"))
    }
}

/// A virtual NIC that somebody serves.
#[derive(Debug, Clone)]
pub struct Nic {
    /// Its socket, an absolute path.
    pub socket: PathBuf,
    /// Number of its virtqueues.
    pub queues: usize,
    /// Address of the ordinary interface beside it.
    pub mac: Mac,
}

/// Asks the device behind `socket` what it is.
pub fn probe(socket: &Path) -> Result<Nic> {
    let bytes = read_config(socket).with_context(|| format!("--nic {}", socket.display()))?;
    let (config, _) = Config::read_from_prefix(&bytes)
        .map_err(|_| anyhow!("--nic {}: a short configuration space", socket.display()))?;
    if !config.is_ours() {
        bail!("--nic {}: the device there is no virtual RDMA NIC of this version of Freeflow", socket.display());
    }
    let socket = socket.canonicalize().with_context(|| format!("cannot resolve {}", socket.display()))?;
    Ok(Nic { socket, queues: config.num_queues(), mac: Mac(config.mac) })
}

fn read_config(socket: &Path) -> Result<Vec<u8>> {
    let stream =
        UnixStream::connect(socket).context("nobody listens there (is the router running, with this virtual NIC?)")?;
    let line = stream.try_clone()?;
    let (done, ended) = mpsc::channel::<()>();
    let frontend = Frontend::from_stream(stream, 1);
    // The frontend waits for ever on a silent device: hang up when it takes too long.
    thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let silent = ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
            if silent {
                // Hung up already if that fails.
                let _ = line.shutdown(Shutdown::Both);
            }
            silent
        });
        let config = ask(frontend);
        drop(done);
        let silent = watch.join().unwrap_or(false);
        config.context(if silent { BUSY } else { STRANGER })
    })
}

const BUSY: &str = "no answer: does another guest have this virtual NIC?";
const STRANGER: &str = "what listens there is no virtual RDMA NIC (`freeflow nics` shows their sockets)";

fn ask(mut frontend: Frontend) -> Result<Vec<u8>> {
    frontend.set_owner()?;
    let offered = frontend.get_features()?;
    let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if offered & protocol_bit == 0 {
        bail!("no vhost-user device with protocol features");
    }
    frontend.set_features(protocol_bit)?;
    let protocol = frontend.get_protocol_features()?;
    if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
        bail!("no vhost-user device with a configuration space");
    }
    frontend.set_protocol_features(VhostUserProtocolFeatures::CONFIG)?;
    let buffer = [0; size_of::<Config>()];
    let size = buffer.len() as u32;
    let config = frontend.get_config(0, size, VhostUserConfigFlags::empty(), &buffer);
    config.map(|(_, payload)| payload).context("cannot read its configuration space")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_addresses_are_local_unicast() {
        let mac = Mac::random().unwrap();
        assert_eq!(mac.0[0] & 3, 2);
        assert_ne!(mac, Mac::random().unwrap());
    }

    #[test]
    fn addresses_are_shown_as_usual() {
        assert_eq!(Mac([2, 0, 0xab, 0, 0, 1]).to_string(), "02:00:ab:00:00:01");
    }

    #[test]
    fn an_unserved_socket_is_named_in_the_error() {
        let error = probe(Path::new("/nonexistent/a.sock")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/a.sock: nobody listens there"), "{error:#}");
    }
}
