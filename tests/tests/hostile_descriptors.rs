//! A VMM that takes all descriptors of the router. Alone in its program, since all tests of one share their descriptors.
#![allow(missing_docs, reason = "a test program")]

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::GuestConfig;
use freeflow_tests::guest::vhost::Connection;
use freeflow_tests::logs;
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;

const LONG: Duration = Duration::from_secs(10);
/// What the device offers.
const SLOTS: u64 = 509;

/// Adds one page more as often as the device takes it, and returns how often that was.
fn add_regions(connection: &mut Connection, of: &VhostUserMemoryRegionInfo) -> u64 {
    let region = |n: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: (1 << 40) + n * 4096,
        memory_size: 4096,
        userspace_addr: (1 << 44) + n * 4096,
        mmap_offset: 0,
        mmap_handle: of.mmap_handle,
    };
    let mut more = (0..2 * SLOTS).take_while(|&n| connection.frontend().add_mem_region(&region(n)).is_ok());
    more.by_ref().count() as u64
}

#[test]
fn a_virtual_nic_outlives_a_lack_of_descriptors() {
    logs::collect();
    let bed = Bed::new(2);
    let regions = bed.guests[0].memory().regions();
    let added = bed.guests[0].with_connection(|c| Ok(add_regions(c, &regions[0].info()))).unwrap();
    assert_eq!(added + regions.len() as u64, SLOTS);

    bed.guests[1].disconnect();
    eventually("the end of the connection", LONG, || !bed.router.is_connected(1));
    let null = File::open("/dev/null").unwrap();
    let mut eaten: Vec<File> = std::iter::from_fn(|| null.try_clone().ok()).collect();
    // One for our end of the connection, and none for the router's.
    eaten.pop();
    let stream = UnixStream::connect(bed.router.socket_of(1)).unwrap();
    eventually("failure to accept", LONG, || !logs::lines_with("Too many open files").is_empty());
    drop((stream, eaten));
    drop(bed.router.guest(1, GuestConfig::default()));
}
