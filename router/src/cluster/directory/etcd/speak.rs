//! The task that does what the registrar wants, and tells who claims and releases how it went.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::mpsc::error::TryRecvError;

use super::Trouble;
use super::client::Link;
use super::registrar::{Answer, Heard, Registrar, Task};
use crate::cluster::directory::{Board, Claim, Refused};

/// What others want.
#[derive(Debug)]
pub enum Order {
    /// These addresses are to be ours.
    Claim(Claim, SyncSender<Result<(), Refused>>),
    /// Those of the virtual NIC of this name are to be free.
    Release(Arc<str>, SyncSender<()>),
}

/// The registrar with all that it needs.
pub struct Speaker {
    registrar: Registrar,
    link: Link,
    orders: UnboundedReceiver<Order>,
    claims: HashMap<Arc<str>, Vec<SyncSender<Result<(), Refused>>>>,
    releases: HashMap<Arc<str>, Vec<SyncSender<()>>>,
    start: Instant,
    trouble: Trouble,
    board: Arc<Board>,
}

impl Speaker {
    /// Takes orders from `orders`.
    pub fn new(registrar: Registrar, link: Link, orders: UnboundedReceiver<Order>, board: Arc<Board>) -> Self {
        Self {
            registrar,
            link,
            orders,
            claims: HashMap::new(),
            releases: HashMap::new(),
            start: Instant::now(),
            trouble: Trouble::new("nothing can be said to other hosts, nor claimed"),
            board,
        }
    }

    /// Until nobody can give orders any more.
    pub async fn run(mut self) {
        while self.obey_all() {
            let task = self.registrar.task(self.start.elapsed());
            self.answer();
            match task {
                Task::Rest(time) => {
                    if let Ok(Some(order)) = tokio::time::timeout(time, self.orders.recv()).await {
                        self.obey(order);
                    }
                }
                task => self.perform(task).await,
            }
            self.answer();
            self.board.set_refused(self.registrar.refused().count());
        }
        Box::pin(self.farewell()).await;
    }

    /// Whether there may be more to come.
    fn obey_all(&mut self) -> bool {
        loop {
            match self.orders.try_recv() {
                Ok(order) => self.obey(order),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Claim(claim, answer) => {
                self.claims.entry(claim.nic.clone()).or_default().push(answer);
                self.registrar.claim(claim);
            }
            Order::Release(name, answer) => {
                self.claims.remove(&name);
                self.registrar.release(&name);
                self.releases.entry(name).or_default().push(answer);
            }
        }
    }

    async fn perform(&mut self, task: Task) {
        let heard = match self.link.register(task).await {
            Ok(heard) => {
                self.trouble.over();
                heard
            }
            Err(cause) => {
                self.trouble.failed(&cause);
                self.link.break_off();
                Heard::Failed
            }
        };
        if heard == Heard::LeaseGone {
            log::warn!("etcd has ended this host's lease: everything is said again");
        }
        self.registrar.hear(heard, self.start.elapsed());
    }

    fn answer(&mut self) {
        for answer in self.registrar.answers() {
            match answer {
                Answer::Claimed(name, result) => self.claimed(&name, &result),
                Answer::Released(name) => {
                    // Whoever asked may have lost interest, here and below.
                    for waiting in self.releases.remove(&name).into_iter().flatten() {
                        let _ = waiting.try_send(());
                    }
                }
                Answer::Namesake(address) => log::error!(
                    "etcd has another host of this one's name, at {address}: give this host a name of its own ([cluster] name), or \
                     wait until the lease ends if that is where it was before"
                ),
            }
        }
    }

    fn claimed(&mut self, name: &Arc<str>, result: &Result<(), Refused>) {
        match (self.claims.remove(name), result) {
            (Some(waiting), result) => waiting.into_iter().for_each(|sender| drop(sender.try_send(result.clone()))),
            (None, Ok(())) => log::debug!("virtual NIC {name:?} has its addresses"),
            (None, Err(refused)) => log::error!("virtual NIC {name:?} is here, but others do not find it: {refused}"),
        }
    }

    async fn farewell(mut self) {
        if let Some(lease) = self.registrar.lease()
            && let Err(error) = self.link.revoke(lease).await
        {
            log::warn!("etcd cannot be told that this host goes, and keeps it until its lease ends: {error}");
        }
    }
}
