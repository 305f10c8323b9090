//! Certificates of hosts: ours, and who signs those of others. TLS 1.3 only, both sides with a certificate, and every session from the beginning:
//! nothing is resumed that a newer authority would refuse.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::client::danger::ServerCertVerifier;
use tokio_rustls::rustls::client::{Resumption, WebPkiServerVerifier};
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use webpki::EndEntityCert;

use super::HostName;

/// What is spoken inside (RFC 7301), so that no other server with a certificate of the same authority is taken for a router.
const PROTOCOL: &[u8] = b"freeflow-session";

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is not what it should be.
    #[error("{} has no {what} in PEM", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Why it is not there.
        source: pem::Error,
    },
    /// A file has nothing.
    #[error("{} has no certificate", .0.display())]
    Empty(PathBuf),
    /// A certificate in it is none.
    #[error("a certificate in {} cannot be used", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// Certificate and key cannot be used together.
    #[error("the certificate in {} and the key in {} cannot be used together", cert.display(), key.display())]
    Own {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// No verifier can be made of what `ca` has.
    #[error("certificates of others cannot be checked")]
    Verifier(#[from] VerifierBuilderError),
    /// This processor cannot do what TLS needs.
    #[error("no TLS")]
    System(#[source] rustls::Error),
}

/// A file's name and its content.
#[derive(Debug, Clone, Copy)]
pub struct Pem<'a> {
    /// Its name, for what goes wrong.
    pub path: &'a Path,
    /// Its content.
    pub text: &'a [u8],
}

impl Pem<'_> {
    fn certificates(self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(self.text).collect();
        let found =
            found.map_err(|source| TlsError::Pem { path: self.path.to_owned(), what: "certificates", source })?;
        if found.is_empty() { Err(TlsError::Empty(self.path.to_owned())) } else { Ok(found) }
    }

    fn key(self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(self.text).map_err(|source| TlsError::Pem {
            path: self.path.to_owned(),
            what: "private key",
            source,
        })
    }
}

/// Ready for sessions.
#[derive(Clone)]
pub struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    /// What is wrong with our own certificate, as others will see it.
    complaint: Option<String>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("complaint", &self.complaint).finish_non_exhaustive()
    }
}

impl Tls {
    /// For the host of this name: who signs certificates, ours with those between, its key.
    ///
    /// # Errors
    /// When they cannot be used at all. What others will not like in ours is a [complaint](Self::complaint).
    pub fn new(name: &HostName, ca: Pem<'_>, cert: Pem<'_>, key: Pem<'_>) -> Result<Self, TlsError> {
        let provider = Arc::new(default_provider());
        let roots = Arc::new(authorities(ca)?);
        let (chain, secret) = (cert.certificates()?, key.key()?);
        let own = |source| TlsError::Own { cert: cert.path.to_owned(), key: key.path.to_owned(), source };
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build()?;
        let complaint = complaint(name, &chain, &*clients, &*servers);

        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::System)?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), secret.clone_key())
            .map_err(own)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        let mut client =
            client(provider)?.with_webpki_verifier(servers).with_client_auth_cert(chain, secret).map_err(own)?;
        client.resumption = Resumption::disabled();
        // The name is nobody else's business.
        client.enable_sni = false;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { server: Arc::new(server), client: Arc::new(client), complaint })
    }

    /// What is wrong with our own certificate, so that others will not accept it.
    pub fn complaint(&self) -> Option<&str> {
        self.complaint.as_deref()
    }

    /// For a connection that somebody else has made.
    pub fn acceptor(&self) -> TlsAcceptor {
        self.server.clone().into()
    }

    /// For a connection that we have made.
    pub fn connector(&self) -> TlsConnector {
        self.client.clone().into()
    }
}

type ClientBuilder = rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>;

fn client(provider: Arc<CryptoProvider>) -> Result<ClientBuilder, TlsError> {
    ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]).map_err(TlsError::System)
}

fn authorities(ca: Pem<'_>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in ca.certificates()? {
        roots.add(certificate).map_err(|source| TlsError::Authority { path: ca.path.to_owned(), source })?;
    }
    Ok(roots)
}

/// What others would say to our certificate now.
fn complaint(
    name: &HostName,
    chain: &[CertificateDer<'_>],
    clients: &dyn ClientCertVerifier,
    servers: &dyn ServerCertVerifier,
) -> Option<String> {
    let (own, between) = chain.split_first()?;
    let server = match server_name(name) {
        Ok(name) => servers.verify_server_cert(own, between, &name, &[], UnixTime::now()).map(drop),
        Err(why) => return Some(why),
    };
    let client = clients.verify_client_cert(own, between, UnixTime::now()).map(drop);
    server.and(client).err().map(|error| error.to_string())
}

/// A host's name as certificates have it.
///
/// # Errors
/// When a certificate cannot have it.
pub fn server_name(name: &HostName) -> Result<ServerName<'static>, String> {
    let wrong = |error| format!("no certificate can be for {name}: {error}");
    ServerName::try_from(name.as_str().to_owned()).map_err(wrong)
}

/// Which of these hosts a certificate is for, which TLS has found to be good.
pub fn proven<'a>(certificate: &CertificateDer<'_>, hosts: impl IntoIterator<Item = &'a HostName>) -> Vec<HostName> {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else { return Vec::new() };
    let is_for = |name: &&HostName| {
        let name = server_name(name);
        name.is_ok_and(|name| certificate.verify_is_valid_for_subject_name(&name).is_ok())
    };
    hosts.into_iter().filter(is_for).cloned().collect()
}
