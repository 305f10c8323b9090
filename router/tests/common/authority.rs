//! Certificates for tests.
#![allow(dead_code, reason = "shared by test programs")]

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

/// Who signs.
pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A host's.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub cert: String,
    pub key: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        // A name that no other has, as no two authorities should.
        params
            .distinguished_name
            .push(DnType::CommonName, format!("Freeflow's tests {:?}", &key.public_key_raw()[..8]));
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// For these names, as good as any.
    pub fn sign(&self, names: &[&str]) -> Certificate {
        self.sign_until(names, 2999)
    }

    /// Good from 2000 to the beginning of that year.
    pub fn sign_until(&self, names: &[&str], year: i32) -> Certificate {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        Certificate { cert: params.signed_by(&key, &self.issuer).unwrap().pem(), key: key.serialize_pem() }
    }
}

/// Writes `ca.pem`, `cert.pem` and `key.pem` into a folder.
pub fn write(folder: &Path, authority: &Authority, certificate: &Certificate) -> [PathBuf; 3] {
    let files = [("ca.pem", &authority.pem), ("cert.pem", &certificate.cert), ("key.pem", &certificate.key)];
    files.map(|(name, text)| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    })
}
