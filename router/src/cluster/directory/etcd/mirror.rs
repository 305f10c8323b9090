//! What etcd says, as it changes: what to do on each thing that is heard from it. No I/O and no clock.
//!
//! All keys are listed, page by page, as of one revision; from there on changes are watched. A watch that breaks goes on after the last change that was
//! heard; where etcd has forgotten those changes (compaction), everything is listed again. What is known is served all the time.

use std::time::Duration;

use super::super::Known;
use super::record::{self, Key, Prefix, Record};

/// Keys of a page, at first.
const PAGE: i64 = 1000;
/// More than so many keys are not looked at.
pub const MAX_RECORDS: usize = 500_000;
/// How long to wait after failures.
const RETRY: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(2);

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// Get a page.
    List {
        /// The first key.
        from: Vec<u8>,
        /// As of when; 0 is now.
        revision: i64,
        /// How many keys at most.
        limit: i64,
    },
    /// Watch, from this revision on. What was heard of it may come again: half of it may have been missed.
    Watch(i64),
    /// Wait, then say [`Heard::Rested`].
    Rest(Duration),
}

/// A key that was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It has this value.
    Put(Vec<u8>, Vec<u8>),
    /// It is gone.
    Delete(Vec<u8>),
}

/// What came of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Keys and values of a page.
    Page {
        /// Which etcd it is.
        cluster: u64,
        /// As of when.
        revision: i64,
        /// Keys and values in order.
        records: Vec<(Vec<u8>, Vec<u8>)>,
        /// Whether there are keys after these.
        more: bool,
    },
    /// The watch has begun, at this etcd and revision.
    Watching(u64, i64),
    /// Changes, the last of them of this revision.
    Changes(i64, Vec<Change>),
    /// What was asked for is not there any more, or too large to be had at once.
    OutOfRange,
    /// etcd is away.
    Failed,
    /// The time of [`Task::Rest`] is over.
    Rested,
}

#[derive(Debug)]
enum Phase {
    /// So many keys are known of those that there were at a revision.
    Listing {
        from: Vec<u8>,
        revision: i64,
        known: Said,
    },
    Watching,
    Resting,
}

/// What was said, and how many keys that were.
#[derive(Debug, Clone, Default)]
struct Said {
    known: Known,
    records: usize,
}

/// What was known of an etcd that has lost it since, until this time.
#[derive(Debug)]
struct Stale {
    known: Known,
    until: Duration,
}

/// The mirror.
#[derive(Debug)]
pub struct Mirror {
    prefix: Prefix,
    /// How long hosts have to come back to an etcd that has lost its data.
    grace: Duration,
    phase: Phase,
    page: i64,
    said: Said,
    stale: Option<Stale>,
    /// Which etcd, and up to where it was heard. `None` until all was listed once.
    at: Option<(u64, i64)>,
    failures: u32,
    connected: bool,
    /// A watch has begun, and may have to make up for what was missed.
    behind: bool,
    changed: bool,
    ignored: u64,
}

impl Mirror {
    /// Knows nothing yet.
    pub fn new(prefix: Prefix, grace: Duration) -> Self {
        let phase = Phase::Listing { from: prefix.as_bytes().to_vec(), revision: 0, known: Said::default() };
        Self {
            prefix,
            grace,
            phase,
            page: PAGE,
            said: Said::default(),
            stale: None,
            at: None,
            failures: 0,
            connected: false,
            behind: false,
            changed: false,
            ignored: 0,
        }
    }

    /// What to do now.
    pub fn task(&self) -> Task {
        match &self.phase {
            Phase::Listing { from, revision, .. } => {
                Task::List { from: from.clone(), revision: *revision, limit: self.page }
            }
            Phase::Watching => Task::Watch(self.at.map_or(0, |(_, revision)| revision)),
            Phase::Resting => {
                let doubled = RETRY.start().saturating_mul(1 << self.failures.saturating_sub(1).min(16));
                Task::Rest(doubled.min(*RETRY.end()))
            }
        }
    }

    /// Whether changes are heard of as they happen.
    pub fn connected(&self) -> bool {
        self.connected
    }

    /// Keys that made no sense, or were too many.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// What is known, if it has changed since this was asked last.
    pub fn news(&mut self) -> Option<Known> {
        std::mem::take(&mut self.changed).then(|| match &self.stale {
            Some(stale) => self.said.known.over(&stale.known),
            None => self.said.known.clone(),
        })
    }

    /// What came of the task.
    pub fn hear(&mut self, heard: Heard, now: Duration) {
        self.tick(now);
        match heard {
            Heard::Page { cluster, revision, records, more } => self.page(cluster, revision, records, more, now),
            Heard::Watching(cluster, revision) => self.watching(cluster, revision),
            Heard::Changes(revision, changes) => self.changes(revision, changes),
            Heard::OutOfRange => self.out_of_range(),
            Heard::Failed => self.fail(),
            Heard::Rested => self.phase = self.resume(),
        }
    }

    /// Time passes.
    pub fn tick(&mut self, now: Duration) {
        if self.stale.as_ref().is_some_and(|stale| stale.until <= now) {
            self.stale = None;
            self.changed = true;
        }
    }

    fn watching(&mut self, cluster: u64, revision: i64) {
        self.failures = 0;
        if self.at.is_some_and(|(other, at)| other != cluster || revision < at) {
            // What it says from here on is not about what we know.
            self.phase = self.listing();
        } else {
            self.behind = self.at.is_none_or(|(_, at)| at != revision);
            self.connected = !self.behind;
        }
    }

    fn resume(&self) -> Phase {
        if self.at.is_some() { Phase::Watching } else { self.listing() }
    }

    fn listing(&self) -> Phase {
        Phase::Listing { from: self.prefix.as_bytes().to_vec(), revision: 0, known: Said::default() }
    }

    fn fail(&mut self) {
        self.connected = false;
        self.failures = self.failures.saturating_add(1);
        self.phase = Phase::Resting;
    }

    /// A watch that cannot go on, or a list: from the beginning, in smaller pages if it was a page.
    fn out_of_range(&mut self) {
        self.connected = false;
        match self.phase {
            Phase::Watching => {
                self.phase = self.listing();
            }
            _ if self.page > 1 => {
                self.page /= 2;
                self.phase = self.listing();
            }
            _ => {
                // Garbage that is too large to be looked at: nothing can be known while it is there.
                self.page = PAGE;
                self.fail();
            }
        }
    }

    fn page(&mut self, cluster: u64, now_at: i64, records: Vec<(Vec<u8>, Vec<u8>)>, more: bool, now: Duration) {
        let Phase::Listing { from, revision, known } = &mut self.phase else { return };
        if *revision == 0 {
            *revision = now_at;
        }
        let revision = *revision;
        let last = records.last().map(|(key, _)| key.clone());
        for (key, value) in records {
            self.ignored += u64::from(!known.put(&self.prefix, &key, &value));
        }
        match last {
            // The next key in order.
            Some(last) if more => *from = [last.as_slice(), &[0]].concat(),
            _ => {
                let known = std::mem::take(known);
                self.listed(cluster, revision, known, now);
            }
        }
    }

    fn listed(&mut self, cluster: u64, revision: i64, said: Said, now: Duration) {
        let lost = self.at.is_some_and(|(other, before)| other != cluster || revision < before);
        if lost {
            let known = self.said.known.over(&self.stale.take().map_or_else(Known::default, |stale| stale.known));
            self.stale = Some(Stale { known, until: now + self.grace });
        }
        self.said = said;
        self.changed = true;
        self.at = Some((cluster, revision));
        self.phase = Phase::Watching;
    }

    fn changes(&mut self, revision: i64, changes: Vec<Change>) {
        let Some((_, at)) = &mut self.at else { return };
        *at = (*at).max(revision);
        (self.connected, self.behind) = (self.connected || self.behind, false);
        for change in changes {
            match change {
                Change::Put(key, value) => {
                    self.ignored += u64::from(!self.said.put(&self.prefix, &key, &value));
                }
                Change::Delete(key) => {
                    if let Some(key) = self.prefix.read(&key) {
                        self.said.forget(&key);
                        if let Some(stale) = &mut self.stale {
                            forget(&mut stale.known, &key);
                        }
                    }
                }
            }
            self.changed = true;
        }
    }
}

impl Said {
    /// Whether the key and its value make sense.
    fn put(&mut self, prefix: &Prefix, key: &[u8], value: &[u8]) -> bool {
        let Some(key_read) = prefix.read(key) else { return false };
        // What a key said before its value made no sense is not so any more.
        self.forget(&key_read);
        if self.records >= MAX_RECORDS {
            return false;
        }
        match record::read(prefix, key, value) {
            Some(Record::Host(name, address)) => self.known.set_host(name, address),
            Some(Record::Address(tenant, gid, owner)) => {
                self.known.set_owner(&tenant, gid, owner);
            }
            None => return false,
        }
        self.records += 1;
        true
    }

    fn forget(&mut self, key: &Key) {
        self.records -= usize::from(forget(&mut self.known, key));
    }
}

fn forget(known: &mut Known, key: &Key) -> bool {
    match key {
        Key::Host(name) => known.forget_host(name.as_str()),
        Key::Address(tenant, gid) => known.forget_owner(tenant, *gid),
    }
}
