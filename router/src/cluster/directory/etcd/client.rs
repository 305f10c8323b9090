//! Talking to etcd: each task of the mirror and of the registrar as one or two calls.

use std::net::ToSocketAddrs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use etcd_client::{
    Certificate, Channel, Client, Compare, CompareOp, ConnectOptions, DeleteOptions, Error, GetOptions, Identity,
    KeyValue, PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchResponse, WatchStream,
};
use tonic::Code;
use tonic::transport::{Endpoint, Uri};

use super::record::Prefix;
use super::{mirror, registrar};
use crate::cluster::settings::EtcdSettings;

/// How long a call may take.
const CALL: Duration = Duration::from_secs(3);
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(2);
/// Most bytes of an answer. A page of our own keys is far smaller; one key can have 1.5 MiB.
const MAX_ANSWER: usize = 16 << 20;

/// What went wrong, for the log.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Where etcd is, and as whom to go there.
#[derive(Debug, Clone)]
pub struct Connector {
    endpoints: Vec<Endpoint>,
    options: ConnectOptions,
}

impl Connector {
    /// Reads files and looks names up, which a sealed daemon cannot.
    ///
    /// # Errors
    /// When a file cannot be read or a name is not known.
    pub fn new(settings: &EtcdSettings) -> Result<Self> {
        let mut options = ConnectOptions::new().with_require_leader(true).with_auto_token_refresh(true);
        if let (Some(user), Some(file)) = (&settings.user, &settings.password_file) {
            let password = std::fs::read_to_string(file)
                .with_context(|| format!("cannot read etcd's password, {}", file.display()))?;
            options = options.with_user(user, password.trim_end_matches(['\r', '\n']));
        }
        let tls = tls(settings)?;
        let each = settings.endpoints.iter().map(|text| {
            endpoints(text, tls.as_ref()).with_context(|| format!("cannot use the endpoint {text} of etcd"))
        });
        let endpoints = each.collect::<Result<Vec<_>>>()?.concat();
        Ok(Self { endpoints, options })
    }

    /// A new connection, at the latest in use when the first call is made.
    async fn connect(&self) -> Result<Client, Cause> {
        let channel = tonic::transport::Channel::balance_list(self.endpoints.iter().cloned());
        Ok(in_time(Client::from_channel(Channel::Tonic(channel), Some(self.options.clone()))).await?)
    }
}

fn tls(settings: &EtcdSettings) -> Result<Option<TlsOptions>> {
    let read = |path: &std::path::Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let Some(ca) = &settings.ca else { return Ok(None) };
    let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca)?));
    Ok(Some(match (&settings.cert, &settings.key) {
        (Some(cert), Some(key)) => tls.identity(Identity::from_pem(read(cert)?, read(key)?)),
        _ => tls,
    }))
}

/// One for each address of the name in it.
fn endpoints(text: &str, tls: Option<&TlsOptions>) -> Result<Vec<Endpoint>> {
    let named: Uri = text.parse()?;
    let (scheme, host) = (named.scheme_str().context("it has no scheme")?, named.host().context("it has no host")?);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = named.port_u16().unwrap_or(2379);
    let addresses: Vec<_> = (host, port).to_socket_addrs()?.collect();
    if addresses.is_empty() {
        bail!("{host} has no address");
    }
    let each = addresses.into_iter().map(|address| -> Result<Endpoint> {
        let uri: Uri = format!("{scheme}://{address}").parse()?;
        let endpoint = Endpoint::from(uri).origin(named.clone()).connect_timeout(CONNECT);
        Ok(match tls {
            Some(tls) => endpoint.tls_config(tls.clone().domain_name(host))?,
            None => endpoint,
        })
    });
    each.collect()
}

async fn in_time<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(CALL, call).await {
        Ok(result) => result,
        Err(_) => Err(Error::IoError(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("no answer within {} s", CALL.as_secs()),
        ))),
    }
}

/// A connection that is made when it is needed, and made anew after a failure.
pub struct Link {
    connector: Connector,
    prefix: Prefix,
    client: Option<Client>,
}

/// A watch.
#[derive(Debug)]
pub struct Opened(WatchStream);

impl Link {
    /// Not connected yet.
    pub fn new(connector: Connector, prefix: Prefix) -> Self {
        Self { connector, prefix, client: None }
    }

    /// After a failure: the next call is made on another connection.
    pub fn break_off(&mut self) {
        self.client = None;
    }

    async fn client(&mut self) -> Result<&mut Client, Cause> {
        if self.client.is_none() {
            self.client = Some(self.connector.connect().await?);
        }
        self.client.as_mut().ok_or_else(|| "not connected".into())
    }

    /// A page of keys.
    pub async fn list(&mut self, from: Vec<u8>, revision: i64, limit: i64) -> Result<mirror::Heard, Cause> {
        let options = GetOptions::new().with_range(self.prefix.end()).with_revision(revision).with_limit(limit);
        let mut kv = self.client().await?.kv_client().max_decoding_message_size(MAX_ANSWER);
        let mut page = match in_time(kv.get(from, Some(options))).await {
            Err(Error::GRpcStatus(status)) if status.code() == Code::OutOfRange => {
                return Ok(mirror::Heard::OutOfRange);
            }
            page => page?,
        };
        let header = page.take_header().ok_or("an answer without a header")?;
        Ok(mirror::Heard::Page {
            cluster: header.cluster_id(),
            revision: header.revision(),
            more: page.more(),
            records: page.take_kvs().into_iter().map(KeyValue::into_key_value).collect(),
        })
    }

    /// Watches all keys.
    pub async fn watch(&mut self, from: i64) -> Result<Opened, Cause> {
        let options = WatchOptions::new().with_range(self.prefix.end()).with_start_revision(from).with_fragment();
        let prefix = self.prefix.as_bytes().to_vec();
        let mut watch = self.client().await?.watch_client().max_decoding_message_size(MAX_ANSWER);
        Ok(Opened(in_time(watch.watch(prefix, Some(options))).await?))
    }

    /// Does what the registrar wants done.
    pub async fn register(&mut self, task: registrar::Task) -> Result<registrar::Heard, Cause> {
        let client = self.client().await?;
        let heard = in_time(register(client, task)).await;
        Ok(match heard {
            Err(Error::LeaseKeepAliveError(_)) => registrar::Heard::LeaseGone,
            Err(Error::GRpcStatus(status)) if status.code() == Code::NotFound => registrar::Heard::LeaseGone,
            heard => heard?,
        })
    }

    /// Gives the lease back, and with it all that hangs on it.
    pub async fn revoke(&mut self, lease: registrar::LeaseId) -> Result<(), Cause> {
        in_time(self.client().await?.lease_client().revoke(lease)).await?;
        Ok(())
    }
}

async fn register(client: &Client, task: registrar::Task) -> Result<registrar::Heard, Error> {
    use registrar::{Heard, Task};
    Ok(match task {
        Task::Grant(ttl) => Heard::Granted(client.lease_client().grant(ttl.as_secs().cast_signed(), None).await?.id()),
        Task::Keep(lease) => {
            client.lease_client().keep_alive(lease).await?;
            Heard::Kept
        }
        Task::Put(lease, puts) => put(client, lease, puts).await?,
        Task::Check(lease, records) => {
            let same = records.into_iter().flat_map(|(key, value)| {
                let hangs = Compare::lease(key.clone(), CompareOp::Equal, lease);
                [Compare::value(key, CompareOp::Equal, value), hangs]
            });
            let seen = client.kv_client().txn(Txn::new().when(same.collect::<Vec<_>>())).await?;
            if seen.succeeded() { Heard::Same } else { Heard::Different }
        }
        Task::Remove(key, value) => {
            let ours = Compare::value(key.clone(), CompareOp::Equal, value);
            let remove = TxnOp::delete(key, Some(DeleteOptions::new()));
            client.kv_client().txn(Txn::new().when([ours]).and_then([remove])).await?;
            Heard::Removed
        }
        Task::Rest(_) => Heard::Failed,
    })
}

async fn put(client: &Client, lease: i64, puts: Vec<registrar::Put>) -> Result<registrar::Heard, Error> {
    let as_it_was: Vec<_> =
        puts.iter().map(|put| Compare::mod_revision(put.key.clone(), CompareOp::Equal, put.was)).collect();
    let looks: Vec<_> = puts.iter().map(|put| TxnOp::get(put.key.clone(), None)).collect();
    let options = PutOptions::new().with_lease(lease);
    let ops: Vec<_> = puts.into_iter().map(|put| TxnOp::put(put.key, put.value, Some(options.clone()))).collect();
    let done = client.kv_client().txn(Txn::new().when(as_it_was).and_then(ops).or_else(looks)).await?;
    if done.succeeded() {
        return Ok(registrar::Heard::Put);
    }
    let found = done.op_responses().into_iter().filter_map(|response| match response {
        TxnOpResponse::Get(mut found) => Some(found.take_kvs()),
        _ => None,
    });
    let occupant = |kv: KeyValue| {
        let changed = kv.mod_revision();
        let (key, value) = kv.into_key_value();
        registrar::Occupant { key, value, changed }
    };
    Ok(registrar::Heard::Occupied(found.flatten().map(occupant).collect()))
}

impl Opened {
    /// What comes next. Nothing new for a while is looked into: etcd must say that there is nothing.
    pub async fn next(&mut self) -> Result<mirror::Heard, Cause> {
        let message = if let Ok(message) = tokio::time::timeout(CALL, self.0.message()).await {
            message?
        } else {
            self.0.request_progress().await?;
            in_time(self.0.message()).await?
        };
        understand(&message.ok_or("etcd has ended the watch")?)
    }
}

fn understand(message: &WatchResponse) -> Result<mirror::Heard, Cause> {
    if message.compact_revision() != 0 {
        return Ok(mirror::Heard::OutOfRange);
    }
    if message.canceled() {
        return Err(format!("etcd has cancelled the watch: {}", message.cancel_reason()).into());
    }
    let header = message.header().ok_or("an answer without a header")?;
    if message.created() {
        return Ok(mirror::Heard::Watching(header.cluster_id(), header.revision()));
    }
    let kvs = || message.events().iter().filter_map(etcd_client::Event::kv);
    let changes = kvs().map(|kv| match kv.version() {
        0 => mirror::Change::Delete(kv.key().to_vec()),
        _ => mirror::Change::Put(kv.key().to_vec(), kv.value().to_vec()),
    });
    Ok(mirror::Heard::Changes(kvs().map(KeyValue::mod_revision).max().unwrap_or(0), changes.collect()))
}
