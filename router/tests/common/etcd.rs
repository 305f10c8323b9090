//! A real etcd for a test, on the loopback, with its data in a folder of its own.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use freeflow_router::cluster::settings::EtcdSettings;
use freeflow_tests::bed::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::SOON;

/// The server.
#[derive(Debug)]
pub struct Server {
    folder: tempfile::TempDir,
    client: u16,
    peer: u16,
    args: Vec<String>,
    child: Option<Child>,
}

impl Server {
    /// One that talks to anybody.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// One with more arguments; with a certificate among them it talks TLS.
    pub fn start_with(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        let [client, peer] = free_ports();
        let mut server = Self { folder, client, peer, args, child: None };
        server.resume();
        server
    }

    fn scheme(&self) -> &'static str {
        if self.args.iter().any(|arg| arg == "--cert-file") { "https" } else { "http" }
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.client))
    }

    /// Starts it, again with what it had.
    pub fn resume(&mut self) {
        let (client, peer) =
            (format!("{}://localhost:{}", self.scheme(), self.client), format!("http://127.0.0.1:{}", self.peer));
        let listen = format!("{}://{}", self.scheme(), self.address());
        let data = self.folder.path().join("data");
        let mut command = Command::new("etcd");
        command.args(["--name", "test", "--listen-client-urls", &listen, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("test={peer}")]).arg("--data-dir").arg(data).args(&self.args);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.child = Some(child.unwrap_or_else(|error| match error.kind() {
            ErrorKind::NotFound => {
                panic!("this test needs etcd: install it with qemu/setup (Debian's package etcd-server)")
            }
            _ => panic!("etcd does not start: {error}"),
        }));
        eventually("start of etcd", SOON, || TcpStream::connect(self.address()).is_ok());
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.as_ref().unwrap().id().cast_signed()), signal).unwrap();
    }

    /// Ends it by a signal. Its data stay.
    pub fn end(&mut self, signal: Signal) {
        self.signal(signal);
        self.child.take().unwrap().wait().unwrap();
    }

    /// Ends it, and its data are lost.
    pub fn lose(&mut self) {
        self.end(Signal::SIGKILL);
        std::fs::remove_dir_all(self.folder.path().join("data")).unwrap();
    }

    /// For a directory.
    pub fn settings(&self) -> EtcdSettings {
        settings_at(&format!("{}://localhost:{}", self.scheme(), self.client))
    }
}

/// For a directory, with this endpoint.
pub fn settings_at(endpoint: &str) -> EtcdSettings {
    toml::from_str(&format!("endpoints = ['{endpoint}']\nttl = '5s'")).unwrap()
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// That nobody has at this moment.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Two that nobody has at this moment.
fn free_ports() -> [u16; 2] {
    let listeners = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.each_ref().map(|listener| listener.local_addr().unwrap().port())
}

/// A way to etcd that can be cut.
#[derive(Debug)]
pub struct Way {
    address: SocketAddr,
    /// Connections that go through; `None` while nothing does.
    streams: Arc<Mutex<Option<Vec<TcpStream>>>>,
    over: Arc<AtomicBool>,
}

impl Way {
    /// To an address.
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let way = Self { address, streams: Arc::new(Mutex::new(Some(Vec::new()))), over: Arc::default() };
        let (streams, over) = (way.streams.clone(), way.over.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().take_while(|_| !over.load(Ordering::SeqCst)) {
                if let Some(streams) = &mut *streams.lock().unwrap_or_else(PoisonError::into_inner) {
                    // What cannot be connected is closed, as it would be without us.
                    let _ = stream.and_then(|stream| join(stream, TcpStream::connect(target)?, streams));
                }
            }
        });
        way
    }

    /// As an endpoint.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Nothing gets through, and what is on its way is lost.
    pub fn cut(&self) {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner).take();
        for stream in streams.into_iter().flatten() {
            // It may have ended.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// New connections get through again.
    pub fn mend(&self) {
        *self.streams.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        self.cut();
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

fn join(a: TcpStream, b: TcpStream, streams: &mut Vec<TcpStream>) -> io::Result<()> {
    for (mut from, mut to) in [(a.try_clone()?, b.try_clone()?), (b.try_clone()?, a.try_clone()?)] {
        std::thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    }
    streams.extend([a, b]);
    Ok(())
}

/// A file in a folder, as text.
pub fn path(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().unwrap().to_owned()
}
