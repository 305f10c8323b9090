//! This host's certificates in files, read at the start and again when the operator says so.

use std::fs::File;
use std::io::{self, Read};

use anyhow::{Context, Result};

use super::tls::{Pem, Tls};
use super::{ClusterSettings, HostName};
use crate::files::{Files, TlsFile};

/// Most bytes of a file.
const MAX_FILE: u64 = 1 << 20;

/// What `files` has for the host of this name. What others will not like in it is for the log, and no reason not to serve the guests that are here.
///
/// # Errors
/// When a file cannot be read or used.
pub fn read(settings: &ClusterSettings, name: &HostName, files: &dyn Files) -> Result<Tls> {
    let paths = &settings.tls;
    let [ca, cert, key] =
        [(TlsFile::Ca, &paths.ca), (TlsFile::Cert, &paths.cert), (TlsFile::Key, &paths.key)].map(|(which, path)| {
            let text = files.open_tls(which).and_then(read_file);
            text.with_context(|| format!("cannot read {} ([cluster.tls] {})", path.display(), which.name()))
        });
    let (ca, cert, key) = (ca?, cert?, key?);
    let pem = |path, text| Pem { path, text };
    let tls = Tls::new(name, pem(&paths.ca, &ca), pem(&paths.cert, &cert), pem(&paths.key, &key))?;
    if let Some(complaint) = tls.complaint() {
        log::error!("other hosts will not accept the certificate in {}: {complaint}", paths.cert.display());
    }
    Ok(tls)
}

fn read_file(file: File) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is far too long"));
    }
    Ok(text)
}
