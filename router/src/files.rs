//! What a router needs of the file system while it runs: sockets for VMMs, and a place to remember which virtual NICs it was given.

use std::fmt;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use freeflow_backend::vhost::socket::listen;
use serde::{Deserialize, Serialize};

use crate::cluster::settings::TlsSettings;
use crate::config::Config;

/// Owner and group may connect.
const SOCKET_MODE: u32 = 0o660;

/// The file system, or somebody who may use it.
pub trait Files: fmt::Debug + Send + Sync {
    /// A Unix socket at `path` that its owner and group may connect to.
    ///
    /// # Errors
    /// When somebody listens there, something else has the path, or the socket cannot be made.
    fn listen(&self, path: &Path) -> io::Result<UnixListener>;

    /// Keeps `text` for the next start, all of it or none.
    ///
    /// # Errors
    /// When it cannot be written.
    fn save(&self, text: &str) -> io::Result<()>;

    /// Opens the directory's file, for reading.
    ///
    /// # Errors
    /// When there is none, or it may not be read.
    fn open_directory(&self) -> io::Result<File>;

    /// Opens a file with certificates, for reading.
    ///
    /// # Errors
    /// When there is none, or it may not be read.
    fn open_tls(&self, which: TlsFile) -> io::Result<File>;
}

/// This process uses the file system itself.
#[derive(Debug, Default)]
pub struct Direct {
    /// Where to keep what is saved; without it nothing is kept.
    pub state: Option<PathBuf>,
    /// The directory's file, if it has one.
    pub directory: Option<PathBuf>,
    /// Files with certificates, if it has such.
    pub tls: Option<TlsSettings>,
}

/// Which of the files with certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsFile {
    /// Who signs.
    Ca,
    /// This host's.
    Cert,
    /// Its key.
    Key,
}

impl TlsFile {
    /// As the configuration calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ca => "ca",
            Self::Cert => "cert",
            Self::Key => "key",
        }
    }
}

impl Direct {
    /// What the daemon with this configuration may use.
    pub fn of(config: &Config) -> Self {
        let cluster = config.cluster.as_ref();
        Self {
            state: Some(config.state().to_owned()),
            directory: cluster.and_then(|cluster| cluster.directory.clone()),
            tls: cluster.map(|cluster| cluster.tls.clone()),
        }
    }
}

impl Files for Direct {
    fn listen(&self, path: &Path) -> io::Result<UnixListener> {
        let listener = listen(path)?;
        std::fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
        Ok(listener)
    }

    fn save(&self, text: &str) -> io::Result<()> {
        self.state.as_deref().map_or(Ok(()), |path| replace(path, text))
    }

    fn open_directory(&self) -> io::Result<File> {
        File::open(self.directory.as_deref().ok_or(io::ErrorKind::NotFound)?)
    }

    fn open_tls(&self, which: TlsFile) -> io::Result<File> {
        let tls = self.tls.as_ref().ok_or(io::ErrorKind::NotFound)?;
        File::open(match which {
            TlsFile::Ca => &tls.ca,
            TlsFile::Cert => &tls.cert,
            TlsFile::Key => &tls.key,
        })
    }
}

/// Writes beside the file and renames, so that a crash leaves the old content or the new.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    File::open(folder)?.sync_all()
}

/// Makes the folder that a socket goes into.
pub(crate) fn make_parent(socket: &Path) -> Result<()> {
    match socket.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_replaces_what_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep").join("nics.toml");
        let files = Direct { state: Some(path.clone()), ..Direct::default() };
        for text in ["a long first text", "short"] {
            files.save(text).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else stays");
        std::fs::create_dir(path.with_extension("new")).unwrap();
        files.save("not written").unwrap_err();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "short");
    }

    #[test]
    fn owner_and_group_may_connect() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _listener = Direct::default().listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, SOCKET_MODE);
    }
}
