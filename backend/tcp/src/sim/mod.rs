//! Two and more hosts in one thread, with a network that breaks, stalls and forgets as a seed says. Every byte that is written, every
//! completion and every size of what is kept is checked against a model.
//!
//! `FREEFLOW_SCHEDULES=n` runs so many seeds, `FREEFLOW_SEED=n` just that one; a failure prints its seed.

mod device;
mod plan;
mod rng;
mod wire;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use world::World;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn run(seed: u64, mut world: World) -> World {
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    if let Err(panic) = outcome {
        eprintln!("seed {seed}: {}", world.describe());
        eprintln!("again: FREEFLOW_SEED={seed} cargo test -p freeflow-tcp schedules");
        std::panic::resume_unwind(panic);
    }
    world
}

#[test]
fn messages_happen_once_and_in_order_whatever_befalls_connections_in_thousands_of_schedules() {
    if let Some(seed) = number("FREEFLOW_SEED") {
        run(seed, World::new(seed));
        return;
    }
    let count = number("FREEFLOW_SCHEDULES").unwrap_or(2_000);
    let start = Instant::now();
    let cuts: u64 = (0..count).map(|seed| u64::from(run(seed, World::new(seed)).cuts)).sum();
    let rate = u128::from(count) * 1000 / start.elapsed().as_millis().max(1);
    println!("{count} schedules with {cuts} cuts, {rate} a second");
    assert!(cuts > count / 2, "so little happens that nothing is shown: {cuts} cuts");
}

#[test]
fn a_thousand_queue_pairs_on_64_hosts() {
    for seed in 0..4 {
        let world = run(seed, World::large(seed, 64));
        assert!(world.qps() > 900 && world.cuts > 0, "{} QPs, {} cuts", world.qps(), world.cuts);
    }
}
