//! What this host says in etcd: where it is, and which addresses are its own. No I/O and no clock.
//!
//! All of it hangs on a lease, which etcd ends some time after it has last heard of this host. A lease that has ended is made again, and everything
//! is said again; so is what somebody else has removed, at the latest after the time of a lease. Claims and releases come between what is heard and the next task, never while a task is under way. An address is claimed in a transaction that fails if anybody has it. What an earlier life of this host has said is taken over.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::super::{Claim, Owner, Refused};
use super::record::{self, Key, Prefix, Record};
use crate::cluster::HostName;

/// How long to wait after failures.
const RETRY: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(2);
/// How often what others have is asked for again.
const AGAIN: Duration = Duration::from_secs(1);

/// A lease.
pub type LeaseId = i64;

/// A key to be put, by a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Put {
    /// The key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
    /// When it must have been changed last; 0: it must not be there.
    pub was: i64,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// Get a lease of so long.
    Grant(Duration),
    /// Keep it.
    Keep(LeaseId),
    /// Put all of these, or none.
    Put(LeaseId, Vec<Put>),
    /// See whether all these keys have these values, and hang on the lease.
    Check(LeaseId, Vec<(Vec<u8>, Vec<u8>)>),
    /// Remove a key if it has this value.
    Remove(Vec<u8>, Vec<u8>),
    /// Nothing, for so long.
    Rest(Duration),
}

/// What is there in place of what was to be put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupant {
    /// The key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
    /// When it was changed last.
    pub changed: i64,
}

/// What came of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A lease.
    Granted(LeaseId),
    /// The lease goes on.
    Kept,
    /// There is no such lease.
    LeaseGone,
    /// All was put.
    Put,
    /// Nothing was: these are there.
    Occupied(Vec<Occupant>),
    /// All is as it was put.
    Same,
    /// It is not: somebody else was at it.
    Different,
    /// The key does not have that value any more.
    Removed,
    /// etcd is away.
    Failed,
}

/// For whoever claimed or released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// How the claim of the virtual NIC of this name went.
    Claimed(Arc<str>, Result<(), Refused>),
    /// The addresses of the virtual NIC of this name are free.
    Released(Arc<str>),
    /// Another host of this name is there.
    Namesake(SocketAddr),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// To be put in place of what was there at these times.
    Wanted(BTreeMap<Vec<u8>, i64>),
    /// Ours, as was seen at this time.
    Held(Duration),
    /// Another's; asked for again at this time.
    Refused(Refused, Duration),
}

impl State {
    fn fresh() -> Self {
        Self::Wanted(BTreeMap::new())
    }

    fn is_held(&self) -> bool {
        matches!(self, Self::Held(_))
    }
}

#[derive(Debug)]
struct Lease {
    id: LeaseId,
    kept: Duration,
}

/// What is to go.
#[derive(Debug)]
enum Leaving {
    /// A key, if it has this value.
    Key(Vec<u8>, Vec<u8>),
    /// Nothing more of the virtual NIC of this name.
    Done(Arc<str>),
}

/// What is being done, for when it is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Doing {
    Nothing,
    Host,
    Nic(Arc<str>),
}

#[derive(Debug)]
struct Nic {
    claim: Claim,
    state: State,
}

/// The registrar.
#[derive(Debug)]
pub struct Registrar {
    prefix: Prefix,
    host: HostName,
    address: SocketAddr,
    ttl: Duration,
    lease: Option<Lease>,
    at: State,
    nics: BTreeMap<Arc<str>, Nic>,
    leaving: VecDeque<Leaving>,
    doing: Doing,
    failures: u32,
    /// Not before.
    rest_until: Duration,
    answers: Vec<Answer>,
}

impl Registrar {
    /// Of a host at an address, with leases of so long.
    pub fn new(prefix: Prefix, host: HostName, address: SocketAddr, ttl: Duration) -> Self {
        Self {
            prefix,
            host,
            address,
            ttl,
            lease: None,
            at: State::fresh(),
            nics: BTreeMap::new(),
            leaving: VecDeque::new(),
            doing: Doing::Nothing,
            failures: 0,
            rest_until: Duration::ZERO,
            answers: Vec::new(),
        }
    }

    /// These addresses are to be ours.
    pub fn claim(&mut self, claim: Claim) {
        let name = claim.nic.clone();
        if let Err(refused) = record::check(&claim) {
            self.answers.push(Answer::Claimed(name, Err(refused)));
            return;
        }
        match self.nics.get(&name) {
            Some(nic) if nic.claim == claim && nic.state.is_held() => {
                self.answers.push(Answer::Claimed(name, Ok(())));
            }
            Some(nic) if nic.claim == claim && matches!(nic.state, State::Wanted(_)) => {}
            other => {
                if other.is_some_and(|nic| nic.claim != claim) {
                    self.leave(&name);
                }
                self.nics.insert(name, Nic { claim, state: State::fresh() });
            }
        }
    }

    /// The addresses of this virtual NIC are to be free.
    pub fn release(&mut self, name: &str) {
        let name: Arc<str> = name.into();
        self.leave(&name);
        self.leaving.push_back(Leaving::Done(name));
    }

    fn leave(&mut self, name: &str) {
        if let Some(nic) = self.nics.remove(name) {
            let records = self.records(&nic.claim);
            self.leaving.extend(records.into_iter().map(|(key, value)| Leaving::Key(key, value)));
        }
    }

    /// The lease, to be given back at the end.
    pub fn lease(&self) -> Option<LeaseId> {
        self.lease.as_ref().map(|lease| lease.id)
    }

    /// What is to be said to others.
    pub fn answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.answers)
    }

    /// Virtual NICs whose addresses are ours.
    #[cfg(test)]
    pub fn held(&self) -> impl Iterator<Item = &Claim> {
        self.nics.values().filter(|nic| nic.state.is_held()).map(|nic| &nic.claim)
    }

    /// Virtual NICs that are here, and whose addresses are another's.
    pub fn refused(&self) -> impl Iterator<Item = (&Claim, &Refused)> {
        self.nics.values().filter_map(|nic| match &nic.state {
            State::Refused(refused, _) => Some((&nic.claim, refused)),
            _ => None,
        })
    }

    /// What to do now.
    pub fn task(&mut self, now: Duration) -> Task {
        self.doing = Doing::Nothing;
        self.answer_released();
        if now < self.rest_until {
            return Task::Rest(self.rest_until.saturating_sub(now));
        }
        let Some(lease) = &self.lease else { return Task::Grant(self.ttl) };
        let (id, keep_at) = (lease.id, lease.kept + self.ttl / 3);
        if keep_at <= now {
            return Task::Keep(id);
        }
        if let Some(Leaving::Key(key, value)) = self.leaving.front() {
            return Task::Remove(key.clone(), value.clone());
        }
        if let Some(puts) = self.next_put(now) {
            return Task::Put(id, puts);
        }
        if let Some(records) = self.next_check(now) {
            return Task::Check(id, records);
        }
        Task::Rest(self.next_time().map_or(keep_at, |next| next.min(keep_at)).saturating_sub(now))
    }

    fn answer_released(&mut self) {
        while let Some(Leaving::Done(name)) = self.leaving.front() {
            self.answers.push(Answer::Released(name.clone()));
            self.leaving.pop_front();
        }
    }

    /// When something that was refused is asked for again, or looked whether it is still there.
    fn next_time(&self) -> Option<Duration> {
        let states = self.nics.values().map(|nic| &nic.state).chain([&self.at]);
        let times = states.filter_map(|state| match state {
            State::Refused(_, again) => Some(*again),
            State::Held(seen) => Some(*seen + self.ttl),
            State::Wanted(_) => None,
        });
        times.min()
    }

    fn next_put(&mut self, now: Duration) -> Option<Vec<Put>> {
        if let Some(was) = due(&self.at, now) {
            self.doing = Doing::Host;
            return Some(puts([self.host_record()], &was));
        }
        if !self.at.is_held() {
            // Another host of this name would take our virtual NICs for its own, and we those of its.
            return None;
        }
        // Who has not been asked for yet comes before who was refused, and then who has waited longest.
        let first = |(_, nic): &(_, &Nic)| match &nic.state {
            State::Refused(_, again) => *again,
            _ => Duration::ZERO,
        };
        let next = self.nics.iter().filter(|(_, nic)| due(&nic.state, now).is_some()).min_by_key(first);
        let (name, was) = next.and_then(|(name, nic)| Some((name.clone(), due(&nic.state, now)?)))?;
        let records = self.records(&self.nics.get(&name)?.claim);
        self.doing = Doing::Nic(name);
        Some(puts(records, &was))
    }

    fn next_check(&mut self, now: Duration) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
        let due = |state: &State| matches!(state, State::Held(seen) if *seen + self.ttl <= now);
        if due(&self.at) {
            self.doing = Doing::Host;
            return Some(vec![self.host_record()]);
        }
        let (name, nic) = self.nics.iter().find(|(_, nic)| due(&nic.state))?;
        let (name, records) = (name.clone(), self.records(&nic.claim));
        self.doing = Doing::Nic(name);
        Some(records)
    }

    fn host_record(&self) -> (Vec<u8>, Vec<u8>) {
        (self.prefix.write(&Key::Host(self.host.clone())).into_bytes(), record::host_value(self.address))
    }

    fn records(&self, claim: &Claim) -> Vec<(Vec<u8>, Vec<u8>)> {
        let value = record::address_value(&self.wanted(claim));
        let key = |gid| self.prefix.write(&Key::Address(claim.tenant.clone(), gid)).into_bytes();
        let mut records: Vec<_> = claim.gids().map(|gid| (key(gid), value.clone())).collect();
        // A transaction has each key once.
        records.sort();
        records.dedup();
        records
    }

    fn wanted(&self, claim: &Claim) -> Owner {
        Owner { host: self.host.clone(), nic: claim.nic.clone() }
    }

    /// What came of the task.
    pub fn hear(&mut self, heard: Heard, now: Duration) {
        if heard != Heard::Failed {
            self.failures = 0;
        }
        match heard {
            Heard::Granted(id) => self.granted(id, now),
            Heard::Kept => self.lease.iter_mut().for_each(|lease| lease.kept = now),
            Heard::LeaseGone => self.lease = None,
            Heard::Put => self.put(now),
            Heard::Same => self.done(State::Held(now)),
            Heard::Different => self.done(State::fresh()),
            Heard::Occupied(occupants) => self.occupied(&occupants, now),
            Heard::Removed => drop(self.leaving.pop_front()),
            Heard::Failed => {
                self.failures = self.failures.saturating_add(1);
                let doubled = RETRY.start().saturating_mul(1 << (self.failures - 1).min(16));
                self.rest_until = now + doubled.min(*RETRY.end());
            }
        }
    }

    /// Whatever hung on the lease before is gone with it, or will be.
    fn granted(&mut self, id: LeaseId, now: Duration) {
        self.lease = Some(Lease { id, kept: now });
        for state in self.nics.values_mut().map(|nic| &mut nic.state).chain([&mut self.at]) {
            if state.is_held() {
                *state = State::fresh();
            }
        }
    }

    fn put(&mut self, now: Duration) {
        if let Doing::Nic(name) = &self.doing {
            self.answers.push(Answer::Claimed(name.clone(), Ok(())));
        }
        self.done(State::Held(now));
    }

    fn done(&mut self, state: State) {
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing => {}
            Doing::Host => self.at = state,
            Doing::Nic(name) => drop(self.nics.entry(name).and_modify(|nic| nic.state = state)),
        }
    }

    fn occupied(&mut self, occupants: &[Occupant], now: Duration) {
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing => {}
            Doing::Host => self.at = self.host_occupied(occupants, now),
            Doing::Nic(name) => {
                let Some(nic) = self.nics.get(&name) else { return };
                let state = self.judge(&nic.claim, occupants, now);
                if let State::Refused(refused, _) = &state
                    && !matches!(&nic.state, State::Refused(before, _) if before == refused)
                {
                    self.answers.push(Answer::Claimed(name.clone(), Err(refused.clone())));
                }
                self.nics.entry(name).and_modify(|nic| nic.state = state);
            }
        }
    }

    /// A host of our name and address is an earlier life of ours.
    fn host_occupied(&mut self, occupants: &[Occupant], now: Duration) -> State {
        let other = occupants.iter().find_map(|occupant| match self.read(occupant) {
            Some(Record::Host(_, address)) if address != self.address => Some(address),
            _ => None,
        });
        let Some(address) = other else { return State::Wanted(versions(occupants)) };
        if !matches!(self.at, State::Refused(..)) {
            self.answers.push(Answer::Namesake(address));
        }
        State::Refused(Refused::Forbidden(String::new()), now + AGAIN)
    }

    fn judge(&self, claim: &Claim, occupants: &[Occupant], now: Duration) -> State {
        let refusal = occupants.iter().find_map(|occupant| match self.read(occupant) {
            Some(Record::Address(_, _, owner)) if owner.host == self.host => None,
            Some(Record::Address(tenant, gid, owner)) => {
                let wanted = self.wanted(claim);
                Some(Refused::Taken { address: gid.address(), tenant, owner, wanted })
            }
            _ => {
                let key = String::from_utf8_lossy(&occupant.key);
                Some(Refused::Forbidden(format!("key {key} of etcd is not as a router writes it: delete it")))
            }
        });
        match refusal {
            Some(refused) => State::Refused(refused, now + AGAIN),
            None => State::Wanted(versions(occupants)),
        }
    }

    fn read(&self, occupant: &Occupant) -> Option<Record> {
        record::read(&self.prefix, &occupant.key, &occupant.value)
    }
}

/// What has to be there for a state to be changed now, if it is to be.
fn due(state: &State, now: Duration) -> Option<BTreeMap<Vec<u8>, i64>> {
    match state {
        State::Wanted(was) => Some(was.clone()),
        State::Refused(_, again) if *again <= now => Some(BTreeMap::new()),
        State::Held(_) | State::Refused(..) => None,
    }
}

fn versions(occupants: &[Occupant]) -> BTreeMap<Vec<u8>, i64> {
    occupants.iter().map(|occupant| (occupant.key.clone(), occupant.changed)).collect()
}

fn puts(records: impl IntoIterator<Item = (Vec<u8>, Vec<u8>)>, was: &BTreeMap<Vec<u8>, i64>) -> Vec<Put> {
    let put = |(key, value)| Put { was: was.get(&key).copied().unwrap_or(0), key, value };
    records.into_iter().map(put).collect()
}
