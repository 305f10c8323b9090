//! Hosts around an etcd in one thread, with everything that can go wrong with it, in an order that a seed decides: answers that get lost (before or
//! after the deed), watches that break, compaction, leases that end, an etcd that is away or loses its data, garbage. `FREEFLOW_SCHEDULES=n` runs more,
//! `FREEFLOW_SEED=n` one again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use freeflow_backend::Mac;

use super::super::{Claim, Known, Refused};
use super::mirror::{self, Change, Mirror};
use super::record::{self, Prefix, Record};
use super::registrar::{self, Answer, Occupant, Registrar};

const TTL: Duration = Duration::from_secs(9);
const HOSTS: usize = 3;

/// `SplitMix64`.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

fn prefix() -> Prefix {
    Prefix::new("/freeflow")
}

#[derive(Debug, Clone)]
struct Value {
    bytes: Vec<u8>,
    changed: i64,
    lease: i64,
}

/// What etcd does with what we ask of it.
#[derive(Debug)]
struct Etcd {
    cluster: u64,
    revision: i64,
    compacted: i64,
    values: BTreeMap<Vec<u8>, Value>,
    log: Vec<(i64, Change)>,
    leases: BTreeMap<i64, Duration>,
    next_lease: i64,
}

impl Etcd {
    fn new(cluster: u64) -> Self {
        Self {
            cluster,
            revision: 1,
            compacted: 0,
            values: BTreeMap::new(),
            log: Vec::new(),
            leases: BTreeMap::new(),
            next_lease: 100 * cluster.cast_signed(),
        }
    }

    fn put(&mut self, key: Vec<u8>, value: Vec<u8>, lease: i64) {
        self.log.push((self.revision, Change::Put(key.clone(), value.clone())));
        self.values.insert(key, Value { bytes: value, changed: self.revision, lease });
    }

    fn delete(&mut self, key: &[u8]) {
        if self.values.remove(key).is_some() {
            self.log.push((self.revision, Change::Delete(key.to_vec())));
        }
    }

    fn end_leases(&mut self, now: Duration) {
        let ended: BTreeSet<_> = self.leases.iter().filter(|(_, end)| **end <= now).map(|(id, _)| *id).collect();
        self.leases.retain(|id, _| !ended.contains(id));
        let gone: Vec<_> =
            self.values.iter().filter(|(_, v)| ended.contains(&v.lease)).map(|(k, _)| k.clone()).collect();
        self.revision += i64::from(!gone.is_empty());
        for key in gone {
            self.delete(&key);
        }
    }

    fn list(&self, from: &[u8], revision: i64, limit: usize) -> mirror::Heard {
        if revision != 0 && (revision < self.compacted || revision > self.revision) {
            return mirror::Heard::OutOfRange;
        }
        let at = if revision == 0 { self.revision } else { revision };
        let values = self.as_of(at);
        let mut rest = values.range(from.to_vec()..prefix().end());
        let records: Vec<_> = rest.by_ref().take(limit).map(|(k, v)| (k.clone(), v.clone())).collect();
        mirror::Heard::Page { cluster: self.cluster, revision: self.revision, records, more: rest.next().is_some() }
    }

    fn as_of(&self, revision: i64) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut values = BTreeMap::new();
        for (_, change) in self.log.iter().filter(|(at, _)| *at <= revision) {
            match change {
                Change::Put(key, value) => drop(values.insert(key.clone(), value.clone())),
                Change::Delete(key) => drop(values.remove(key)),
            }
        }
        values
    }

    fn perform(&mut self, task: &registrar::Task, now: Duration) -> registrar::Heard {
        use registrar::{Heard, Task};
        match task {
            Task::Grant(ttl) => {
                self.next_lease += 1;
                self.leases.insert(self.next_lease, now + *ttl);
                Heard::Granted(self.next_lease)
            }
            Task::Keep(id) => match self.leases.get_mut(id) {
                Some(end) => {
                    *end = now + TTL;
                    Heard::Kept
                }
                None => Heard::LeaseGone,
            },
            Task::Remove(key, value) => {
                if self.values.get(key).is_some_and(|there| there.bytes == *value) {
                    self.revision += 1;
                    self.delete(key);
                }
                Heard::Removed
            }
            Task::Put(lease, puts) => self.put_all(*lease, puts),
            Task::Check(lease, records) => {
                let same = |(key, value): &(Vec<u8>, Vec<u8>)| {
                    self.values.get(key).is_some_and(|there| there.bytes == *value && there.lease == *lease)
                };
                if records.iter().all(same) { Heard::Same } else { Heard::Different }
            }
            Task::Rest(_) => unreachable!("nobody asks etcd to rest"),
        }
    }

    fn put_all(&mut self, lease: i64, puts: &[registrar::Put]) -> registrar::Heard {
        let is = |put: &registrar::Put| self.values.get(&put.key).map_or(0, |there| there.changed) == put.was;
        if !puts.iter().all(is) {
            let there = puts.iter().filter_map(|put| Some((&put.key, self.values.get(&put.key)?)));
            let occupant = |(key, v): (&Vec<u8>, &Value)| Occupant {
                key: key.clone(),
                value: v.bytes.clone(),
                changed: v.changed,
            };
            return registrar::Heard::Occupied(there.map(occupant).collect());
        }
        if !self.leases.contains_key(&lease) {
            return registrar::Heard::LeaseGone;
        }
        self.revision += 1;
        for put in puts {
            self.put(put.key.clone(), put.value.clone(), lease);
        }
        registrar::Heard::Put
    }

    fn known(&self) -> Known {
        let mut known = Known::default();
        for (key, value) in &self.values {
            match record::read(&prefix(), key, &value.bytes) {
                Some(Record::Host(name, address)) => known.set_host(name, address),
                Some(Record::Address(tenant, gid, owner)) => drop(known.set_owner(&tenant, gid, owner)),
                None => {}
            }
        }
        known
    }
}

struct Host {
    mirror: Mirror,
    registrar: Registrar,
    known: Known,
    /// How far a watch has come, and in the life of which etcd.
    watch: Option<(u64, i64)>,
    mirror_rests: Duration,
    wants: BTreeMap<String, Claim>,
    answers: Vec<Answer>,
}

struct World {
    rng: Rng,
    now: Duration,
    etcd: Etcd,
    away: bool,
    calm: bool,
    hosts: Vec<Host>,
}

fn claim(nic: u64, last: u8) -> Claim {
    let ip = vec![[10, 0, 0, last].into()];
    Claim { nic: format!("nic{nic}").into(), tenant: "blue".into(), ip, mac: Mac([2, 0, 0, 0, 0, last]) }
}

fn host(n: usize) -> Host {
    let address = format!("192.0.2.{}:7471", n + 1).parse().unwrap();
    Host {
        mirror: Mirror::new(prefix(), TTL),
        registrar: Registrar::new(prefix(), format!("host{n}").parse().unwrap(), address, TTL),
        known: Known::default(),
        watch: None,
        mirror_rests: Duration::ZERO,
        wants: BTreeMap::new(),
        answers: Vec::new(),
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let hosts = (0..HOSTS).map(host).collect();
        Self { rng: Rng(seed), now: Duration::ZERO, etcd: Etcd::new(1), away: false, calm: false, hosts }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.rng.below(200));
        if !self.away {
            self.etcd.end_leases(self.now);
        }
        let n = self.rng.below(HOSTS as u64) as usize;
        match self.rng.below(8) {
            0..=2 => self.listen(n),
            3..=5 => self.speak(n),
            6 => self.somebody_wants(n),
            _ => self.misfortune(n),
        }
    }

    fn somebody_wants(&mut self, n: usize) {
        let nic = self.rng.below(3);
        let host = &mut self.hosts[n];
        if self.rng.one_in(3) {
            host.wants.remove(&format!("nic{nic}"));
            host.registrar.release(&format!("nic{nic}"));
        } else {
            // Beside each other on a host no two have the same: the inventory sees to that.
            let last = (self.rng.below(3) * 3 + nic) as u8;
            host.wants.insert(format!("nic{nic}"), claim(nic, last));
            host.registrar.claim(claim(nic, last));
        }
    }

    fn misfortune(&mut self, n: usize) {
        match self.rng.below(40) {
            0..=3 => self.away = true,
            4..=11 => self.away = false,
            12..=15 => self.hosts[n].watch = None,
            16..=17 => self.etcd.compacted = self.etcd.revision,
            18 => self.etcd = Etcd::new(self.etcd.cluster + 1),
            19 => {
                // The daemon was killed, and starts again.
                let wants = std::mem::take(&mut self.hosts[n].wants);
                self.hosts[n] = host(n);
                for claim in wants.values() {
                    self.hosts[n].registrar.claim(claim.clone());
                }
                self.hosts[n].wants = wants;
            }
            20 => self.now += TTL,
            21 if !self.away => {
                let key = format!("/freeflow/v1/address/blue/10.0.0.{}", self.rng.below(9));
                self.etcd.revision += 1;
                self.etcd.put(key.into(), b"garbage".to_vec(), 0);
            }
            22..=24 => self.remove_garbage(),
            _ => {}
        }
    }

    fn remove_garbage(&mut self) {
        let garbage: Vec<_> =
            self.etcd.values.iter().filter(|(_, v)| v.bytes == b"garbage").map(|(key, _)| key.clone()).collect();
        self.etcd.revision += i64::from(!garbage.is_empty());
        for key in garbage {
            self.etcd.delete(&key);
        }
    }

    fn lost(&mut self) -> bool {
        self.away || !self.calm && self.rng.one_in(6)
    }

    fn listen(&mut self, n: usize) {
        if self.now < self.hosts[n].mirror_rests {
            return;
        }
        let lost = self.lost();
        let host = &mut self.hosts[n];
        let heard = match host.mirror.task() {
            _ if host.mirror_rests != Duration::ZERO => {
                host.mirror_rests = Duration::ZERO;
                mirror::Heard::Rested
            }
            mirror::Task::Rest(time) => {
                host.mirror_rests = self.now + time;
                return;
            }
            _ if lost => {
                host.watch = None;
                mirror::Heard::Failed
            }
            mirror::Task::List { from, revision, limit } => {
                host.watch = None;
                self.etcd.list(&from, revision, usize::try_from(limit.min(3)).unwrap())
            }
            mirror::Task::Watch(from) => match host.watch {
                Some((cluster, at)) if cluster == self.etcd.cluster => {
                    let new: Vec<_> = self.etcd.log.iter().filter(|(revision, _)| *revision >= at).cloned().collect();
                    host.watch = Some((cluster, self.etcd.revision + 1));
                    // Sometimes half of a revision, and then the connection breaks.
                    let half = !self.calm && self.rng.one_in(5);
                    let take = if half { new.len() / 2 } else { new.len() };
                    if half {
                        host.watch = None;
                    }
                    let new = &new[..take];
                    let last = new.last().map_or(0, |(revision, _)| *revision);
                    mirror::Heard::Changes(last, new.iter().map(|(_, change)| change.clone()).collect())
                }
                Some(_) => {
                    host.watch = None;
                    mirror::Heard::Failed
                }
                None if from < self.etcd.compacted => mirror::Heard::OutOfRange,
                None => {
                    host.watch = Some((self.etcd.cluster, from));
                    mirror::Heard::Watching(self.etcd.cluster, self.etcd.revision)
                }
            },
        };
        host.mirror.hear(heard, self.now);
        if let Some(known) = host.mirror.news() {
            host.known = known;
        }
    }

    fn speak(&mut self, n: usize) {
        let task = self.hosts[n].registrar.task(self.now);
        let answers = self.hosts[n].registrar.answers();
        self.hosts[n].answers.extend(answers);
        if matches!(task, registrar::Task::Rest(_)) {
            return;
        }
        // An answer may be lost though the deed is done.
        let lost = self.lost();
        let done = !self.away && (!lost || self.rng.one_in(2));
        let heard = if done { self.etcd.perform(&task, self.now) } else { registrar::Heard::Failed };
        let host = &mut self.hosts[n];
        host.registrar.hear(if lost { registrar::Heard::Failed } else { heard }, self.now);
        let answers = host.registrar.answers();
        for answer in &answers {
            if let Answer::Claimed(_, Err(Refused::Taken { owner, wanted, .. })) = answer {
                assert_ne!(owner.host, wanted.host, "a host does not stand in its own way");
            }
        }
        host.answers.extend(answers);
    }

    /// Everything works from now on, for long enough.
    fn settle(&mut self) {
        (self.away, self.calm) = (false, true);
        self.remove_garbage();
        let until = self.now + TTL * 6;
        while self.now < until {
            self.now += Duration::from_millis(50);
            self.etcd.end_leases(self.now);
            for n in 0..HOSTS {
                self.speak(n);
                self.listen(n);
            }
        }
    }

    fn check(&self) {
        let truth = self.etcd.known();
        assert_eq!(truth.hosts().count(), HOSTS);
        for (n, host) in self.hosts.iter().enumerate() {
            assert_eq!(host.known, truth, "what host {n} knows");
            assert!(host.mirror.connected());
            let held: BTreeSet<_> = host.registrar.held().map(|claim| claim.nic.to_string()).collect();
            let refused: BTreeSet<_> = host.registrar.refused().map(|(claim, _)| claim.nic.to_string()).collect();
            assert!(held.is_disjoint(&refused));
            let wants: BTreeSet<_> = host.wants.keys().cloned().collect();
            assert_eq!(&held | &refused, wants, "host {n}");
            for claim in host.registrar.held() {
                for gid in claim.gids() {
                    let owner = truth.owner("blue", gid).unwrap();
                    assert_eq!((owner.host.as_str(), &owner.nic), (format!("host{n}").as_str(), &claim.nic));
                }
            }
            for (claim, why) in host.registrar.refused() {
                let Refused::Taken { owner, .. } = why else { panic!("{why}") };
                let owners: Vec<_> = claim.gids().filter_map(|gid| truth.owner("blue", gid)).collect();
                assert!(owners.contains(&owner), "{why}");
            }
        }
        for (_, gid, owner) in truth.addresses() {
            let host = &self.hosts[owner.host.as_str().strip_prefix("host").unwrap().parse::<usize>().unwrap()];
            let nic = &host.wants[owner.nic.as_ref()];
            assert!(nic.gids().any(|wanted| wanted == gid), "{gid} is left behind by {owner}");
        }
    }
}

fn schedules() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().map(|text: String| text.parse::<u64>().unwrap());
    match (number("FREEFLOW_SEED"), number("FREEFLOW_SCHEDULES")) {
        (Some(seed), _) => seed..seed + 1,
        (None, count) => 0..count.unwrap_or(1000),
    }
}

#[test]
fn whatever_happens_all_agree_in_the_end() {
    for seed in schedules() {
        let run = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..600 {
                world.step();
            }
            world.settle();
            world.check();
        });
        assert!(run.is_ok(), "again with: FREEFLOW_SEED={seed}");
    }
}

fn page(cluster: u64, revision: i64, keys: &[(&str, &str)], more: bool) -> mirror::Heard {
    let records = keys.iter().map(|(k, v)| (format!("/freeflow/v1/{k}").into(), v.as_bytes().to_vec())).collect();
    mirror::Heard::Page { cluster, revision, records, more }
}

const HOST: &str = r#"{"address":"192.0.2.1:7471"}"#;
const NIC: &str = r#"{"host":"host1","nic":"a"}"#;

fn listed(keys: &[(&str, &str)]) -> Mirror {
    let mut mirror = Mirror::new(prefix(), TTL);
    mirror.hear(page(1, 10, keys, false), Duration::ZERO);
    mirror.hear(mirror::Heard::Watching(1, 10), Duration::ZERO);
    mirror
}

#[test]
fn pages_are_asked_for_as_of_the_first_and_smaller_if_they_are_too_large() {
    let mut mirror = Mirror::new(prefix(), TTL);
    let from = b"/freeflow/v1/".to_vec();
    assert_eq!(mirror.task(), mirror::Task::List { from: from.clone(), revision: 0, limit: 1000 });
    mirror.hear(page(1, 10, &[("host/host1", HOST)], true), Duration::ZERO);
    let next = b"/freeflow/v1/host/host1\0".to_vec();
    assert_eq!(mirror.task(), mirror::Task::List { from: next, revision: 10, limit: 1000 });
    assert_eq!(mirror.news(), None, "half a list is none");
    mirror.hear(mirror::Heard::OutOfRange, Duration::ZERO);
    assert_eq!(mirror.task(), mirror::Task::List { from, revision: 0, limit: 500 });
    for _ in 0..9 {
        mirror.hear(mirror::Heard::OutOfRange, Duration::ZERO);
    }
    assert_eq!(mirror.task(), mirror::Task::Rest(Duration::from_millis(50)), "a key that is too large by itself");
}

#[test]
fn what_is_known_is_served_while_etcd_is_away() {
    let mut mirror = listed(&[("host/host1", HOST), ("address/blue/10.0.0.1", NIC)]);
    assert_eq!(mirror.news().unwrap().addresses().count(), 1);
    let mut waits = Vec::new();
    for _ in 0..8 {
        mirror.hear(mirror::Heard::Failed, Duration::ZERO);
        let mirror::Task::Rest(time) = mirror.task() else { panic!("{:?}", mirror.task()) };
        waits.push(time.as_millis());
        mirror.hear(mirror::Heard::Rested, Duration::ZERO);
        assert_eq!(mirror.task(), mirror::Task::Watch(10));
    }
    assert_eq!(waits, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
    assert!(!mirror.connected());
    assert_eq!(mirror.news(), None);
    mirror.hear(mirror::Heard::OutOfRange, Duration::ZERO);
    assert!(matches!(mirror.task(), mirror::Task::List { revision: 0, .. }), "compacted");
}

#[test]
fn hosts_of_an_etcd_that_lost_its_data_have_time_to_come_back() {
    let mut mirror = listed(&[("host/host1", HOST), ("address/blue/10.0.0.1", NIC), ("address/blue/10.0.0.2", NIC)]);
    let before = mirror.news().unwrap();
    mirror.hear(mirror::Heard::Failed, Duration::ZERO);
    mirror.hear(mirror::Heard::Rested, Duration::ZERO);
    mirror.hear(mirror::Heard::Watching(1, 2), Duration::ZERO);
    let moved = [("address/blue/10.0.0.2", r#"{"host":"host2","nic":"b"}"#)];
    mirror.hear(page(1, 2, &moved, false), Duration::from_secs(1));
    let known = mirror.news().unwrap();
    assert_eq!(known.host("host1"), before.host("host1"));
    let owner =
        |known: &Known, last| known.owner("blue", claim(0, last).gids().next().unwrap()).map(ToString::to_string);
    assert_eq!(owner(&known, 1), owner(&before, 1));
    assert_eq!(owner(&known, 2).unwrap(), "virtual NIC \"b\" of host host2", "what is said now counts for more");
    mirror.tick(TTL);
    assert_eq!(mirror.news(), None);
    mirror.tick(TTL + Duration::from_secs(1));
    assert_eq!((mirror.news().unwrap().addresses().count(), mirror.ignored()), (1, 0));
}

#[test]
fn garbage_is_ignored_and_takes_the_place_of_what_was() {
    let bad =
        [("host/host1", "7"), ("address/blue/10.0.0.1", NIC), ("what/ever", NIC), ("address/blue/010.0.0.1", NIC)];
    let mut mirror = listed(&bad);
    assert_eq!((mirror.news().unwrap().addresses().count(), mirror.ignored()), (1, 3));
    let put = |key: &str, value: &[u8]| Change::Put(format!("/freeflow/v1/{key}").into(), value.to_vec());
    let changes = vec![put("address/blue/10.0.0.1", b"{}"), Change::Delete(b"\xff".to_vec())];
    mirror.hear(mirror::Heard::Changes(11, changes), Duration::ZERO);
    assert_eq!((mirror.news().unwrap(), mirror.ignored()), (Known::default(), 4));
}

#[test]
fn more_than_there_can_be_is_ignored() {
    let mut mirror = listed(&[]);
    let address = |n: usize| format!("/freeflow/v1/address/blue/10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255);
    let puts = |range: std::ops::Range<usize>| range.map(|n| Change::Put(address(n).into(), NIC.into())).collect();
    mirror.hear(mirror::Heard::Changes(11, puts(0..mirror::MAX_RECORDS + 5)), Duration::ZERO);
    assert_eq!((mirror.news().unwrap().addresses().count(), mirror.ignored()), (mirror::MAX_RECORDS, 5));
    mirror.hear(mirror::Heard::Changes(12, vec![Change::Delete(address(0).into())]), Duration::ZERO);
    mirror.hear(mirror::Heard::Changes(13, puts(mirror::MAX_RECORDS..mirror::MAX_RECORDS + 2)), Duration::ZERO);
    assert_eq!((mirror.news().unwrap().addresses().count(), mirror.ignored()), (mirror::MAX_RECORDS, 6));
}

/// A registrar that has said where its host is.
fn registered(etcd: &mut Etcd, n: usize) -> Registrar {
    let mut registrar = host(n).registrar;
    run(&mut registrar, etcd, Duration::ZERO);
    registrar
}

/// Until it has nothing to do.
fn run(registrar: &mut Registrar, etcd: &mut Etcd, now: Duration) -> Vec<Answer> {
    loop {
        match registrar.task(now) {
            registrar::Task::Rest(_) => return registrar.answers(),
            task => {
                let heard = etcd.perform(&task, now);
                registrar.hear(heard, now);
            }
        }
    }
}

#[test]
fn a_duplicate_is_refused_with_both_owners() {
    let mut etcd = Etcd::new(1);
    let (mut first, mut second) = (registered(&mut etcd, 0), registered(&mut etcd, 1));
    first.claim(claim(1, 1));
    assert_eq!(run(&mut first, &mut etcd, Duration::ZERO), [Answer::Claimed("nic1".into(), Ok(()))]);
    second.claim(claim(2, 1));
    let [Answer::Claimed(_, Err(refused))] = &run(&mut second, &mut etcd, Duration::ZERO)[..] else {
        panic!("not refused")
    };
    let expected = "address 10.0.0.1 of tenant \"blue\" belongs to virtual NIC \"nic1\" of host host0, and virtual NIC \"nic2\" of host host1 cannot have it, too";
    assert_eq!(refused.to_string(), expected);
    let second_later = Duration::from_secs(1);
    assert_eq!(run(&mut second, &mut etcd, second_later), [], "said once");
    first.release("nic1");
    assert_eq!(run(&mut first, &mut etcd, second_later), [Answer::Released("nic1".into())]);
    let answers = run(&mut second, &mut etcd, second_later * 2);
    assert_eq!(answers, [Answer::Claimed("nic2".into(), Ok(()))], "it waits for its turn");
}

#[test]
fn what_an_earlier_life_said_is_taken_over_and_a_namesake_is_not() {
    let mut etcd = Etcd::new(1);
    let mut first = registered(&mut etcd, 0);
    first.claim(claim(1, 1));
    run(&mut first, &mut etcd, Duration::ZERO);
    let mut again = host(0).registrar;
    again.claim(claim(1, 1));
    assert_eq!(run(&mut again, &mut etcd, Duration::ZERO), [Answer::Claimed("nic1".into(), Ok(()))]);
    etcd.end_leases(Duration::ZERO);
    let elsewhere = "192.0.2.77:7471".parse().unwrap();
    let mut namesake = Registrar::new(prefix(), "host0".parse().unwrap(), elsewhere, TTL);
    namesake.claim(claim(1, 1));
    assert_eq!(run(&mut namesake, &mut etcd, Duration::ZERO), [Answer::Namesake("192.0.2.1:7471".parse().unwrap())]);
    assert_eq!(run(&mut namesake, &mut etcd, Duration::from_secs(1)), [], "said once");
    assert_eq!(namesake.held().count(), 0);
    etcd.end_leases(TTL);
    let answers = run(&mut namesake, &mut etcd, TTL);
    assert_eq!(answers, [Answer::Claimed("nic1".into(), Ok(()))]);
}

#[test]
fn garbage_in_a_key_is_nobodys_and_not_ours_to_remove() {
    let mut etcd = Etcd::new(1);
    let mut registrar = registered(&mut etcd, 0);
    etcd.put(b"/freeflow/v1/address/blue/10.0.0.1".to_vec(), b"\xff".to_vec(), 0);
    registrar.claim(claim(1, 1));
    let answers = run(&mut registrar, &mut etcd, Duration::ZERO);
    let [Answer::Claimed(_, Err(refused))] = &answers[..] else { panic!("{answers:?}") };
    assert!(refused.to_string().contains("key /freeflow/v1/address/blue/10.0.0.1 of etcd is not as"), "{refused}");
}

#[test]
fn a_lease_is_kept_and_made_again_when_it_ended() {
    let mut etcd = Etcd::new(1);
    let mut registrar = registered(&mut etcd, 0);
    registrar.claim(claim(1, 1));
    run(&mut registrar, &mut etcd, Duration::ZERO);
    assert_eq!(registrar.task(Duration::ZERO), registrar::Task::Rest(TTL / 3));
    let first = registrar.lease().unwrap();
    assert_eq!(registrar.task(TTL / 3), registrar::Task::Keep(first));
    run(&mut registrar, &mut etcd, TTL / 3);
    etcd.end_leases(TTL);
    assert_eq!(etcd.known().addresses().count(), 2);
    etcd.end_leases(TTL * 2);
    assert_eq!(etcd.known(), Known::default());
    run(&mut registrar, &mut etcd, TTL * 2);
    assert_ne!(registrar.lease().unwrap(), first);
    assert_eq!((etcd.known().addresses().count(), etcd.known().hosts().count()), (2, 1));
}

#[test]
fn what_somebody_removes_is_said_again() {
    let mut etcd = Etcd::new(1);
    let mut registrar = registered(&mut etcd, 0);
    registrar.claim(claim(1, 1));
    run(&mut registrar, &mut etcd, Duration::ZERO);
    let before = etcd.known();
    for key in etcd.values.keys().cloned().collect::<Vec<_>>() {
        etcd.delete(&key);
        let mut now = Duration::ZERO;
        for _ in 0..4 {
            now += TTL / 3;
            run(&mut registrar, &mut etcd, now);
        }
        assert_eq!(etcd.known(), before);
        registrar = registered(&mut etcd, 0);
        registrar.claim(claim(1, 1));
        run(&mut registrar, &mut etcd, Duration::ZERO);
    }
}
