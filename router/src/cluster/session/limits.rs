//! Times and bounds of sessions.

use std::time::Duration;

use freeflow_tcp::Nanos;

use super::wire::VERSIONS;

/// Times and bounds.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Versions of the protocol that are spoken, oldest and newest.
    pub versions: (u16, u16),
    /// A host that is not heard of for so long is gone, and what is kept for it.
    pub dead_after: Duration,
    /// A session on which nothing is heard for so long is closed, and another tried.
    pub silence: Duration,
    /// Who has said nothing for so long says something.
    pub keepalive: Duration,
    /// A new session must be in order after this time.
    pub agreement: Duration,
    /// After a session, the next is tried after this time, and after twice as long each time that it does not work.
    pub redial: Duration,
    /// But no longer than this.
    pub longest_redial: Duration,
    /// Messages that may come at once.
    pub burst: u32,
    /// And in the long run.
    pub messages_per_second: u32,
    /// Most workers of a host.
    pub workers: u16,
    /// Most lanes of a link.
    pub lanes: u16,
    /// Most tenants of a host.
    pub tenants: usize,
    /// Most bytes of a tenant's name.
    pub tenant_name: usize,
}

/// Most tenants of a host in a cluster.
pub const MAX_TENANTS: usize = 8192;
/// Most bytes of a tenant's name.
pub const MAX_TENANT_NAME: usize = 255;

impl Limits {
    /// With a host gone after so long. Within that time silence is noticed, and a second session tried.
    pub fn new(dead_after: Duration) -> Self {
        Self {
            versions: VERSIONS,
            dead_after,
            silence: dead_after / 2,
            keepalive: dead_after / 6,
            agreement: Duration::from_secs(2),
            redial: Duration::from_millis(50).min(dead_after / 4),
            // Several are tried before a host is given up.
            longest_redial: Duration::from_secs(2).min(dead_after / 4),
            burst: 1000,
            messages_per_second: 200,
            workers: 256,
            lanes: 64,
            tenants: MAX_TENANTS,
            tenant_name: MAX_TENANT_NAME,
        }
    }

    /// Those of data connections: one that is silent ends, and is made again, before the host is given up.
    pub fn of_links(&self) -> freeflow_tcp::Limits {
        let nanos = |time: Duration| Nanos(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        let usual = freeflow_tcp::Limits::default();
        freeflow_tcp::Limits {
            keepalive: usual.keepalive.min(nanos(self.keepalive)),
            silence: usual.silence.min(nanos(self.silence)),
            longest_redial: usual.longest_redial.min(nanos(self.longest_redial)),
            ..usual
        }
    }
}
