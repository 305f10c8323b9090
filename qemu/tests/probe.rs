//! What the launcher makes of the vhost-user sockets that it is given.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use freeflow_qemu::nic;
use virtio_rdma::config::{Config, MAGIC};
use virtio_rdma::zerocopy::{FromZeros, IntoBytes};

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_CONFIG: u32 = 24;
/// Version 1, and the flag of a reply.
const REPLY: u32 = 5;
const VERSION_1_AND_PROTOCOL: u64 = 1 << 32 | 1 << 30;
const CONFIG: u64 = 1 << 9;

/// A vhost-user device that has nothing but a configuration space.
struct Device {
    dir: tempfile::TempDir,
}

impl Device {
    fn serve(features: u64, config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // Ends with an error when the frontend hangs up.
                let _ = answer(&mut stream.unwrap(), features, &config);
            }
        });
        Self { dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }
}

fn answer(stream: &mut UnixStream, features: u64, config: &Config) -> std::io::Result<()> {
    loop {
        let mut header = [0; 12];
        stream.read_exact(&mut header)?;
        let word = |index: usize| u32::from_le_bytes(header[index * 4..][..4].try_into().unwrap());
        let mut body = vec![0; word(2) as usize];
        stream.read_exact(&mut body)?;
        let reply = match word(0) {
            GET_FEATURES => features.to_le_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => CONFIG.to_le_bytes().to_vec(),
            GET_CONFIG => [&body[..12], config.as_bytes()].concat(),
            _ => continue,
        };
        let header = [word(0), REPLY, reply.len() as u32].map(u32::to_le_bytes).concat();
        stream.write_all(&[header, reply].concat())?;
    }
}

fn config() -> Config {
    let mut config = Config::new_zeroed();
    config.magic.set(MAGIC);
    config.version.set(virtio_rdma::ABI_VERSION);
    config.num_event_queues.set(2);
    config.num_doorbell_queues.set(3);
    config.mac = [2, 0, 0, 0, 0, 9];
    config
}

#[test]
fn our_device_tells_its_queues_and_its_mac() {
    let device = Device::serve(VERSION_1_AND_PROTOCOL, config());
    for _ in 0..2 {
        let nic = nic::probe(&device.socket()).unwrap();
        assert_eq!((nic.queues, nic.mac.to_string().as_str()), (6, "02:00:00:00:00:09"));
    }
}

#[test]
fn another_device_is_refused() {
    let mut other = config();
    other.magic.set(1);
    let error = nic::probe(&Device::serve(VERSION_1_AND_PROTOCOL, other).socket()).unwrap_err();
    assert!(format!("{error:#}").contains("no virtual RDMA NIC"), "{error:#}");
    let error = nic::probe(&Device::serve(0, config()).socket()).unwrap_err();
    assert!(format!("{error:#}").contains("no vhost-user device"), "{error:#}");
}

#[test]
fn a_busy_device_is_not_waited_for_long() {
    let dir = tempfile::tempdir().unwrap();
    let _silent = UnixListener::bind(dir.path().join("s")).unwrap();
    let error = nic::probe(&dir.path().join("s")).unwrap_err();
    assert!(format!("{error:#}").contains("no answer"), "{error:#}");
}

#[test]
fn a_service_of_another_kind_is_told_from_a_busy_device() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // The other end may be gone.
            let _ = stream.unwrap().write_all(b"{\"error\":\"no request\"}\n");
        }
    });
    let error = nic::probe(&dir.path().join("s")).unwrap_err();
    assert!(format!("{error:#}").contains("what listens there is no virtual RDMA NIC"), "{error:#}");
}
