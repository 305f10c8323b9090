//! The default directory: a file that is the same on every host, read again when it changes. What is wrong in a new one is refused as a whole, and
//! the old one holds.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use freeflow_backend::Gid;
use tokio::sync::watch;

use super::{Board, Claim, Directory, Health, HostsFile, Known, Owner, Refused};
use crate::cluster::{ClusterSettings, HostName};
use crate::config::default_mac;
use crate::files::Files;

/// Most bytes of a file: more than 100,000 virtual NICs.
const MAX_FILE: u64 = 16 << 20;
/// How often it is looked at. It is read when it has not changed from one look to the next, so that nobody sees half of it.
const LOOK: Duration = Duration::from_millis(250);

/// The file, as it is known and watched.
#[derive(Debug)]
pub struct StaticFile {
    shared: Arc<Shared>,
    /// Dropped to end the thread.
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    host: HostName,
    path: PathBuf,
    board: Board,
    claims: Mutex<BTreeMap<Arc<str>, Claim>>,
}

impl StaticFile {
    /// Reads the file at `path`, which `files` opens, for this host.
    ///
    /// # Errors
    /// When it cannot be read or makes no sense, or says something else about this host than its own configuration.
    pub fn start(settings: &ClusterSettings, host: HostName, path: &Path, files: Arc<dyn Files>) -> Result<Self> {
        let cannot = || format!("cannot use the directory {}", path.display());
        let mut source = Source { files, seen: None, read: None };
        let known = source.read_now().with_context(cannot)?;
        check_own(&known, &host, settings).with_context(cannot)?;
        let board = Board::new(known);
        board.set_connected(true);
        let shared = Arc::new(Shared { host, path: path.to_owned(), board, claims: Mutex::default() });
        let (stop, stopped) = mpsc::channel();
        let watched = shared.clone();
        let thread = std::thread::Builder::new().name("directory".to_owned()).spawn(move || {
            let mut reloads = Reloads::default();
            while stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                if let Some(result) = source.look() {
                    watched.take(result, &mut reloads);
                }
            }
        })?;
        Ok(Self { shared, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for StaticFile {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// What the file must say about the host that reads it.
fn check_own(known: &Known, host: &HostName, settings: &ClusterSettings) -> Result<()> {
    let Some(address) = known.host(host.as_str()) else {
        bail!(
            "it does not have this host, {host}: add [[host]] with name = \"{host}\" and address = \"ADDRESS:{}\", here and on every other host \
             (or say [cluster] name = NAME if this host has another name there)",
            settings.listen.port()
        );
    };
    match settings.advertise {
        Some(other) if other != address => {
            bail!("it says that this host, {host}, is at {address}, and [cluster] advertise says {other}")
        }
        _ => Ok(()),
    }
}

/// Which content a file has, as far as the file system tells.
type Stamp = (u64, u64, u64, i64, i64);

fn stamp(metadata: &Metadata) -> Stamp {
    (metadata.dev(), metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

/// Where the file's content comes from.
#[derive(Debug)]
struct Source {
    files: Arc<dyn Files>,
    /// At the last look.
    seen: Option<Stamp>,
    /// When it was read last.
    read: Option<Stamp>,
}

impl Source {
    /// New content, if there is any and it has come to rest.
    fn look(&mut self) -> Option<Result<Known>> {
        let (file, now) = match self.open() {
            Ok(opened) => opened,
            Err(error) => {
                // When it is back it may be the very same.
                (self.seen, self.read) = (None, None);
                return Some(Err(error.into()));
            }
        };
        let before = self.seen.replace(now);
        if before != Some(now) || self.read == Some(now) {
            return None;
        }
        self.read = Some(now);
        Some(parse(&file))
    }

    fn read_now(&mut self) -> Result<Known> {
        let (file, now) = self.open()?;
        (self.seen, self.read) = (Some(now), Some(now));
        parse(&file)
    }

    fn open(&self) -> io::Result<(File, Stamp)> {
        let file = self.files.open_directory()?;
        let stamp = stamp(&file.metadata()?);
        Ok((file, stamp))
    }
}

fn parse(file: &File) -> Result<Known> {
    let mut text = String::new();
    if file.take(MAX_FILE + 1).read_to_string(&mut text)? as u64 > MAX_FILE {
        bail!("it has more than {} MiB", MAX_FILE >> 20);
    }
    Ok(HostsFile::parse(&text)?)
}

/// What was last said about new content, so that it is said once.
#[derive(Debug, Default)]
struct Reloads {
    complaint: Option<String>,
}

impl Shared {
    /// Whether anything is to be said about it.
    fn take(&self, result: Result<Known>, reloads: &mut Reloads) -> bool {
        let path = self.path.display();
        match result {
            Ok(known) => {
                let (hosts, addresses) = (known.hosts().count(), known.addresses().count());
                log::info!("directory {path}: {hosts} hosts, {addresses} addresses");
                reloads.complaint = None;
                self.board.post(known);
                self.board.set_connected(true);
                self.check_claims();
                true
            }
            Err(error) => {
                let complaint = format!("{error:#}");
                self.board.set_connected(false);
                let new = reloads.complaint.as_ref() != Some(&complaint);
                if new {
                    log::error!("directory {path}: {complaint}; what it said before holds");
                }
                reloads.complaint = Some(complaint);
                new
            }
        }
    }

    /// Addresses that the file gives away while a virtual NIC has them: others go to the new place, and this one does not know.
    fn check_claims(&self) {
        for (claim, refused) in self.refused(&self.claims()) {
            log::error!("virtual NIC {:?} is here, but others do not find it: {refused}", claim.nic);
        }
    }

    fn refused<'a>(&self, claims: &'a BTreeMap<Arc<str>, Claim>) -> Vec<(&'a Claim, Refused)> {
        let refused = |claim: &'a Claim| Some((claim, self.check(claim).err()?));
        let all: Vec<_> = claims.values().filter_map(refused).collect();
        self.board.set_refused(all.len());
        all
    }

    fn check(&self, claim: &Claim) -> Result<(), Refused> {
        let known = self.board.snapshot();
        claim.gids().try_for_each(|gid| match known.owner(&claim.tenant, gid) {
            Some(owner) if owner.host == self.host => Ok(()),
            Some(owner) => Err(Refused::Taken {
                address: gid.address(),
                tenant: claim.tenant.clone(),
                owner: owner.clone(),
                wanted: Owner { host: self.host.clone(), nic: claim.nic.clone() },
            }),
            None => Err(Refused::Forbidden(self.what_to_write(claim, gid))),
        })
    }

    fn what_to_write(&self, claim: &Claim, missing: Gid) -> String {
        let mac = match claim.mac {
            mac if mac == default_mac(claim.ip.first().copied()) => String::new(),
            mac => format!("\n  mac = \"{mac}\""),
        };
        let ip: Vec<_> = claim.ip.iter().map(|ip| format!("\"{ip}\"")).collect();
        format!(
            "{} does not give address {missing} of tenant {:?} to this host, {}: write there, on every host, after its [[host]]\n  \
             [[host.nic]]\n  name = {:?}\n  tenant = {:?}\n  ip = [{}]{mac}",
            self.path.display(),
            claim.tenant,
            self.host,
            claim.nic,
            claim.tenant,
            ip.join(", "),
        )
    }

    fn claims(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Claim>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Directory for StaticFile {
    fn snapshot(&self) -> Arc<Known> {
        self.shared.board.snapshot()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.shared.board.changed()
    }

    fn health(&self) -> Health {
        self.shared.board.health()
    }

    fn claim(&self, claim: Claim) -> Receiver<Result<(), Refused>> {
        let result = self.shared.check(&claim);
        let mut claims = self.shared.claims();
        claims.insert(claim.nic.clone(), claim);
        self.shared.refused(&claims);
        answered(result)
    }

    fn release(&self, nic: &str) -> Receiver<()> {
        let mut claims = self.shared.claims();
        claims.remove(nic);
        self.shared.refused(&claims);
        answered(())
    }

    fn source(&self) -> String {
        self.shared.path.display().to_string()
    }
}

fn answered<T>(answer: T) -> Receiver<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    sender.try_send(answer).unwrap_or_else(|_| unreachable!("there is room for one"));
    receiver
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::files::Direct;

    const ONE: &str = "
        [[host]]
        name = 'host1'
        address = '192.0.2.1:7471'
        nic = [{ tenant = 'blue', ip = ['10.0.0.1'] }]
        [[host]]
        name = 'host2'
        address = '192.0.2.2:7471'
        nic = [{ tenant = 'blue', name = 'b', ip = ['10.0.0.2'] }]
    ";

    struct Bed {
        folder: tempfile::TempDir,
    }

    impl Bed {
        fn new(text: &str) -> Self {
            let bed = Self { folder: tempfile::tempdir().unwrap() };
            bed.write(text);
            bed
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join("hosts.toml")
        }

        fn write(&self, text: &str) {
            let new = self.folder.path().join("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(&new, self.path()).unwrap();
        }

        fn start(&self, host: &str, more: &str) -> Result<StaticFile> {
            let path = self.path();
            let text =
                format!("directory = '{}'\n{more}\ntls = {{ ca = 'ca', cert = 'cert', key = 'key' }}", path.display());
            let files = Direct { directory: Some(path.clone()), ..Direct::default() };
            StaticFile::start(&toml::from_str(&text).unwrap(), host.parse().unwrap(), &path, Arc::new(files))
        }
    }

    fn claim(directory: &StaticFile, ip: &[&str]) -> Result<(), String> {
        let ip: Vec<_> = ip.iter().map(|ip| ip.parse().unwrap()).collect();
        let mac = default_mac(ip.first().copied());
        let claim = Claim { nic: "x".into(), tenant: "blue".into(), ip, mac };
        directory.claim(claim).recv().unwrap().map_err(|refused| refused.to_string())
    }

    fn eventually(what: &str, mut ready: impl FnMut() -> bool) {
        let start = Instant::now();
        while !ready() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_host_has_what_the_file_gives_it() {
        let bed = Bed::new(ONE);
        let directory = bed.start("host1", "").unwrap();
        claim(&directory, &["10.0.0.1"]).unwrap();
        let taken = claim(&directory, &["10.0.0.2"]).unwrap_err();
        let both = "address 10.0.0.2 of tenant \"blue\" belongs to virtual NIC \"b\" of host host2, and virtual NIC \"x\" of host host1 cannot";
        assert!(taken.contains(both), "{taken}");
        let unknown = claim(&directory, &["10.0.0.3", "fd00::3"]).unwrap_err();
        let hint = "[[host.nic]]\n  name = \"x\"\n  tenant = \"blue\"\n  ip = [\"10.0.0.3\", \"fd00::3\"]";
        assert!(unknown.contains("hosts.toml does not give address 10.0.0.3") && unknown.ends_with(hint), "{unknown}");
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let bed = Bed::new(ONE);
        let directory = bed.start("host1", "").unwrap();
        let mut changed = directory.changed();
        changed.mark_unchanged();
        bed.write(&ONE.replace("10.0.0.2", "10.0.0.3"));
        eventually("the new file", || changed.has_changed().unwrap());
        assert!(claim(&directory, &["10.0.0.3"]).unwrap_err().contains("host2"));
        assert_eq!(directory.health(), Health { connected: true, age: Duration::ZERO, refused: 1 });
    }

    #[test]
    fn of_a_bad_file_nothing_is_taken() {
        let bed = Bed::new(ONE);
        let directory = bed.start("host1", "").unwrap();
        let before = directory.snapshot();
        for bad in ["host = 7", "[[host]]\nname = 'host1'\naddress = '192.0.2.9:7471'\n[["] {
            bed.write(bad);
            eventually("the complaint", || !directory.health().connected);
            assert_eq!(directory.snapshot(), before);
            bed.write(ONE);
            eventually("peace", || directory.health().connected);
        }
        std::fs::rename(bed.path(), bed.folder.path().join("away")).unwrap();
        eventually("the complaint", || !directory.health().connected);
        std::fs::rename(bed.folder.path().join("away"), bed.path()).unwrap();
        eventually("peace", || directory.health().connected);
        assert_eq!(directory.snapshot(), before);
    }

    #[test]
    fn a_complaint_is_made_once() {
        let bed = Bed::new(ONE);
        let directory = bed.start("host1", "").unwrap();
        let mut reloads = Reloads::default();
        let mut complain = |why: &'static str| directory.shared.take(Err(anyhow::Error::msg(why)), &mut reloads);
        assert_eq!([complain("a"), complain("a"), complain("b"), complain("a")], [true, false, true, true]);
        assert!(directory.shared.take(parse(&File::open(bed.path()).unwrap()), &mut reloads));
        assert!(directory.shared.take(Err(anyhow::Error::msg("a")), &mut reloads));
    }

    #[test]
    fn the_file_and_the_host_agree_on_where_it_is() {
        let bed = Bed::new(ONE);
        for (host, more, expected) in [
            ("host3", "", "it does not have this host, host3: add [[host]]"),
            (
                "host1",
                "advertise = '192.0.2.7:7471'",
                "host1, is at 192.0.2.1:7471, and [cluster] advertise says 192.0.2.7:7471",
            ),
        ] {
            let error = format!("{:#}", bed.start(host, more).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
        bed.start("host1", "advertise = '192.0.2.1:7471'").unwrap();
        bed.write("host = 7");
        let error = format!("{:#}", bed.start("host1", "").unwrap_err());
        assert!(error.contains("hosts.toml: line 1: "), "{error}");
    }

    #[test]
    fn a_file_has_bounds() {
        let bed = Bed::new(&"# far too much\n".repeat((MAX_FILE / 15) as usize + 1));
        let error = format!("{:#}", bed.start("host1", "").unwrap_err());
        assert!(error.contains("more than 16 MiB"), "{error}");
    }

    #[test]
    fn half_of_a_file_is_not_read() {
        let bed = Bed::new(ONE);
        let path = bed.path();
        let mut source = Source {
            files: Arc::new(Direct { directory: Some(path.clone()), ..Direct::default() }),
            seen: None,
            read: None,
        };
        source.read_now().unwrap();
        assert!(source.look().is_none());
        std::fs::write(&path, &ONE[..ONE.len() / 2]).unwrap();
        assert!(source.look().is_none(), "it has just changed");
        std::fs::write(&path, ONE).unwrap();
        assert!(source.look().is_none(), "and again");
        source.look().unwrap().unwrap();
        assert!(source.look().is_none());
    }
}
