//! Migration of a running guest: which pages the dirty log has, and that a copy made by it is complete.

mod kit;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};
use vhost_blk::ServeOptions;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

const ALL: u64 = F_VERSION_1 | F_FLUSH | F_INDIRECT | F_EVENT_IDX;
const LOG_ALL: u64 = 1 << 26;
const VRING_F_LOG: u32 = 1;
const PAGE: u64 = 4096;
/// Bytes of a log for the guest's two regions.
const LOG_BYTES: u64 = 2 * REGION / PAGE / 8;
/// What only the device writes: the second region.
const DEVICE_AREA: u64 = REGION;

fn start(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(4, 1024))
}

fn page_of(address: u64) -> u64 {
    address & !(PAGE - 1)
}

/// A dirty log that the guest's frontend keeps, and its mapping.
struct Log {
    file: File,
    bits: MmapRegion<()>,
}

impl Log {
    /// Makes a new log and tells the device to use it.
    fn begin(guest: &Guest) -> Self {
        let log = Self::new(LOG_BYTES);
        log.send(guest, LOG_BYTES).expect("the log is taken");
        log
    }

    fn new(bytes: u64) -> Self {
        let file = memfd(bytes);
        let mapped = FileOffset::new(file.try_clone().expect("a copy"), 0);
        Log { file, bits: MmapRegion::from_file(mapped, bytes as usize).expect("a mapping") }
    }

    fn send(&self, guest: &Guest, bytes: u64) -> vhost::Result<()> {
        let region =
            VhostUserDirtyLogRegion { mmap_size: bytes, mmap_offset: 0, mmap_handle: self.file.as_raw_fd() };
        guest.frontend.set_log_base(0, Some(region))
    }

    /// The addresses of the marked pages, which are marked no more.
    fn fetch(&self) -> BTreeSet<u64> {
        // No mark may come between the look and the clearing.
        let fetch = |at: u64| {
            let byte = self.bits.get_atomic_ref::<AtomicU8>(at as usize).expect("a byte of the log");
            byte.swap(0, Ordering::SeqCst)
        };
        let bits: Vec<u8> = (0..LOG_BYTES).map(fetch).collect();
        let marked = |page: &u64| bits[(page / 8) as usize] & (1 << (page % 8)) != 0;
        (0..LOG_BYTES * 8).filter(marked).map(|page| page * PAGE).collect()
    }
}

/// The addresses of a queue, its used ring logged where it is.
fn logged(guest: &Guest, queue: usize) -> VringConfigData {
    let used = guest.queues[queue].used;
    VringConfigData { flags: VRING_F_LOG, log_addr: Some(used), ..guest.config(queue) }
}

/// Turns logging on as QEMU does: the log, the feature, then the addresses of each ring.
fn begin_logging(guest: &Guest) -> Log {
    let log = Log::begin(guest);
    guest.frontend.set_features(guest.features | F_PROTOCOL | LOG_ALL).expect("features");
    for queue in 0..guest.queues.len() {
        guest.frontend.set_vring_addr(queue, &logged(guest, queue)).expect("addresses");
    }
    log
}

#[test]
fn what_the_device_writes_is_logged_and_nothing_else() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    let used_page = guest.queues[queue].used;
    let log = Log::begin(&guest);
    guest.read(queue, 0, 512);
    assert!(log.fetch().is_empty(), "LOG_ALL is not negotiated yet");
    let log = begin_logging(&guest);
    log.fetch();
    let (data, status) = (DEVICE_AREA + 3 * PAGE - 100, DEVICE_AREA + 9 * PAGE);
    let header = guest.header(T_IN, 0);
    let read = guest.chain(queue, &[(header, 16, 0), (data, 512, WRITE), (status, 1, WRITE)]);
    guest.run(queue, read);
    let expected = [page_of(data), page_of(data + PAGE), status, used_page];
    assert_eq!(log.fetch(), BTreeSet::from(expected));
    let header = guest.header(T_OUT, 0);
    let write = guest.chain(queue, &[(header, 16, 0), (data, 512, 0), (status, 1, WRITE)]);
    guest.run(queue, write);
    assert_eq!(log.fetch(), BTreeSet::from([status, used_page]), "a write changes its status alone");
    let header = guest.header(T_GET_ID, 0);
    let id = guest.chain(queue, &[(header, 16, 0), (data, 20, WRITE), (status, 1, WRITE)]);
    guest.run(queue, id);
    assert_eq!(log.fetch(), BTreeSet::from([page_of(data), status, used_page]));
    // Much is offered and little is written: 20 bytes, and then nothing but the status.
    let header = guest.header(T_GET_ID, 0);
    let id = guest.chain(queue, &[(header, 16, 0), (data, 20 * PAGE as u32, WRITE), (status, 1, WRITE)]);
    guest.run(queue, id);
    assert_eq!(log.fetch(), BTreeSet::from([page_of(data), status, used_page]));
    let header = guest.header(T_IN, 0);
    let mut parts = vec![(header, 16, 0)];
    parts.extend([(0, u32::MAX, WRITE); 1000]);
    parts.push((status, 1, WRITE));
    let claims = guest.indirect_chain(queue, &parts);
    guest.run(queue, claims);
    assert_eq!(guest.get(status, 1), [IOERR]);
    assert_eq!(
        log.fetch(),
        BTreeSet::from([status, used_page]),
        "a chain that claims gigabytes writes its status"
    );
    guest.frontend.set_features(ALL | F_PROTOCOL).expect("features");
    guest.frontend.set_vring_addr(queue, &guest.config(queue)).expect("addresses");
    log.fetch();
    guest.read(queue, 0, 512);
    assert!(log.fetch().is_empty(), "logging is off again");
}

/// What is handed back goes into the descriptor ring, which is logged where it is. The frontend names an address for the
/// device's event suppression alone.
#[test]
fn both_parts_of_a_packed_ring_are_logged() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL | F_PACKED);
    let queue = guest.add_queue(512);
    let log = begin_logging(&guest);
    let elsewhere = VringConfigData { log_addr: Some(DEVICE_AREA + 5 * PAGE), ..logged(&guest, queue) };
    guest.frontend.set_vring_addr(queue, &elsewhere).expect("addresses");
    let descriptors = guest.queues[queue].descriptors;
    let [first, second, event] = [descriptors, descriptors + PAGE, DEVICE_AREA + 5 * PAGE];
    assert!(
        log.fetch().is_superset(&BTreeSet::from([first, second, event])),
        "all of it when the ring starts"
    );
    let (header, status) = (guest.header(T_FLUSH, 0), guest.put(&[UNTOUCHED]));
    let sleeps = || server.options.metrics.total().sleeps;
    for number in 0..512 {
        let before = sleeps();
        until("it sleeps", || sleeps() > 0);
        log.fetch();
        let flush = guest.chain(queue, &[(header, 16, 0), (status, 1, WRITE)]);
        guest.run(queue, flush);
        until("it sleeps again", || sleeps() > before);
        let page = if number % 256 < 128 { first } else { second };
        let expected = BTreeSet::from([page, page_of(status), event]);
        let mut marked = BTreeSet::new();
        until("the wish for kicks is logged", || {
            marked.append(&mut log.fetch());
            marked.contains(&event)
        });
        assert_eq!(marked, expected, "{number}");
    }
}

#[test]
fn the_used_ring_is_logged_at_the_address_that_the_frontend_names() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL & !F_EVENT_IDX);
    let queue = guest.add_queue(16);
    let log = begin_logging(&guest);
    let elsewhere = VringConfigData { log_addr: Some(DEVICE_AREA + 5 * PAGE - 4), ..logged(&guest, queue) };
    guest.frontend.set_vring_addr(queue, &elsewhere).expect("addresses");
    let pages = BTreeSet::from([DEVICE_AREA + 4 * PAGE, DEVICE_AREA + 5 * PAGE]);
    assert!(log.fetch().is_superset(&pages), "all of it when the ring starts");
    let status = guest.put(&[UNTOUCHED]);
    let header = guest.header(T_FLUSH, 0);
    let flush = guest.chain(queue, &[(header, 16, 0), (status, 1, WRITE)]);
    guest.run(queue, flush);
    until("flags, index and element are logged", || {
        let mut marked = log.fetch();
        marked.remove(&page_of(status));
        marked == pages || {
            guest.run(queue, flush);
            false
        }
    });
    let unlogged = VringConfigData { flags: 0, ..elsewhere };
    guest.frontend.set_vring_addr(queue, &unlogged).expect("addresses");
    log.fetch();
    guest.run(queue, flush);
    assert_eq!(log.fetch(), BTreeSet::from([page_of(status)]), "no flag, no log of the used ring");
    // A used ring that the log has no bits for does not start.
    let outside = VringConfigData { log_addr: Some(2 * REGION - 64), ..elsewhere };
    guest.frontend.set_vring_addr(queue, &outside).expect("addresses");
    guest.make_available(queue, flush);
    guest.kick(queue);
    let seen = guest.queues[queue].seen_used;
    assert!(never(|| guest.used_index(queue) != seen));
    guest.frontend.set_vring_addr(queue, &elsewhere).expect("addresses");
    guest.next_used(queue);
}

/// Copies a guest's device area and used rings by its dirty log while requests are in flight, as a migration does.
#[test]
fn a_copy_made_by_the_log_is_complete() {
    [ALL, ALL | F_PACKED].into_iter().for_each(copy_by_log);
}

fn copy_by_log(features: u64) {
    const SECTORS: u64 = 4096;
    const PASSES: usize = 60;
    const REQUESTS: usize = 60;
    let disk = MemoryDisk::later(SECTORS);
    for (at, byte) in disk.bytes.lock().unwrap().iter_mut().enumerate() {
        *byte = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0] | 1;
    }
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, features);
    for _ in 0..2 {
        // Its used ring has more than two pages.
        guest.add_queue(1024);
    }
    let mut log = begin_logging(&guest);
    let mut copy = guest.get(0, 2 * REGION as usize);
    let mut old: Vec<Log> = Vec::new();
    let mut random = 88_172_645_463_325_252u64;
    let mut below = |limit: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % limit
    };
    for pass in 0..PASSES {
        for queue in 0..2 {
            for _ in 0..REQUESTS {
                let (header, sectors) = (guest.header(T_IN, below(SECTORS - 16)), 1 + below(16) as u32);
                let data = DEVICE_AREA + below(REGION - 16 * 512 - 1);
                let status = DEVICE_AREA + below(REGION);
                let parts = [(header, 16, 0), (data, 512 * sectors, WRITE), (status, 1, WRITE)];
                let head = guest.chain(queue, &parts);
                guest.make_available(queue, head);
            }
            guest.kick(queue);
        }
        // QEMU keeps its log, Cloud Hypervisor replaces it in each pass.
        let pages = match pass % 3 {
            0 => {
                disk.gate.close();
                let was = std::mem::replace(&mut log, replace_log_behind_gate(&guest, &disk));
                old.push(was);
                old[old.len() - 1].fetch()
            }
            _ => log.fetch(),
        };
        copy_pages(&guest, &mut copy, &pages);
        for queue in 0..2 {
            for _ in 0..REQUESTS {
                guest.next_used(queue);
            }
        }
        until("the copy is complete, some marks being later than the used index", || {
            copy_pages(&guest, &mut copy, &log.fetch());
            is_complete(&guest, &copy)
        });
    }
    for queue in 0..2 {
        guest.frontend_base(queue);
    }
    copy_pages(&guest, &mut copy, &log.fetch());
    assert!(is_complete(&guest, &copy), "something was written after the rings had stopped, and not logged");
    for log in &old {
        assert!(log.fetch().is_empty(), "an old log was written after its successor was acknowledged");
    }
}

/// Sends a new log while the disk holds all requests back; they go on while the message waits for them.
fn replace_log_behind_gate(guest: &Guest, disk: &Arc<MemoryDisk>) -> Log {
    let gate = Arc::clone(&disk.gate);
    let opener = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(2));
        gate.open();
    });
    let log = Log::begin(guest);
    opener.join().expect("the gate is open");
    log
}

/// Whether a copy of the guest's memory has all that the device wrote.
fn is_complete(guest: &Guest, copy: &[u8]) -> bool {
    let now = guest.get(0, 2 * REGION as usize);
    let ring = |driver: &Driver| {
        let (descriptors, used) = (driver.descriptors as usize, driver.used as usize);
        match driver.packed {
            // The device has written wherever the driver has, and later: everything was handed back.
            Some(_) => [descriptors..descriptors + 16 * usize::from(driver.size), used..used + 4],
            None => [used..used + 4 + 8 * usize::from(driver.size) + 2, 0..0],
        }
    };
    let area = DEVICE_AREA as usize..now.len();
    guest.queues.iter().flat_map(ring).chain([area]).all(|range| copy[range.clone()] == now[range])
}

fn copy_pages(guest: &Guest, copy: &mut [u8], pages: &BTreeSet<u64>) {
    for page in pages {
        let at = *page as usize;
        copy[at..at + PAGE as usize].copy_from_slice(&guest.get(*page, PAGE as usize));
    }
}

#[test]
fn the_disk_is_released_when_a_migrated_guest_has_stopped() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let releases = || disk.releases.load(Ordering::SeqCst);
    let mut guest = Guest::connect(&server.path, ALL);
    for _ in 0..2 {
        guest.add_queue(16);
    }
    let stop_both = |guest: &mut Guest| (0..2).for_each(|queue| assert_eq!(guest.frontend_base(queue), 0));
    let start_both = |guest: &mut Guest| {
        for queue in 0..2 {
            guest.clear_rings(queue);
            guest.start_queue(queue, 0);
        }
    };
    stop_both(&mut guest);
    assert_eq!(releases(), 0, "a guest that restarts keeps its disk");
    let _log = begin_logging(&guest);
    stop_both(&mut guest);
    assert_eq!(releases(), 0, "no queue ran");
    start_both(&mut guest);
    guest.frontend_base(0);
    assert_eq!(releases(), 0, "one queue still runs");
    guest.frontend_base(1);
    assert_eq!(releases(), 1);
    // The migration failed: the guest goes on here.
    start_both(&mut guest);
    guest.read(0, 0, 512);
    // Cloud Hypervisor stops its queues so.
    for queue in 0..2 {
        guest.frontend.set_vring_enable(queue, false).expect("a pause");
    }
    assert_eq!(releases(), 2);
}

#[test]
fn a_migrated_guest_does_not_go_on_without_what_is_not_durable() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    let _log = begin_logging(&guest);
    guest.write(queue, 0, &pattern(512, 1));
    disk.broken.store(true, Ordering::SeqCst);
    assert!(guest.frontend.get_vring_base(queue).is_err());
    assert_eq!(disk.releases.load(Ordering::SeqCst), 0);
}

/// The frontend did not get the base of the ring, so the region still has the place. The next session goes on there.
#[test]
fn a_base_that_was_refused_stays_in_the_region() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let (mut guest, region) = Guest::connect_as_cloud(&server.path, ALL | F_PACKED, &[13]);
    let _log = begin_logging(&guest);
    guest.write(0, 0, &pattern(512, 1));
    disk.broken.store(true, Ordering::SeqCst);
    assert!(guest.frontend.get_vring_base(0).is_err());
    disk.broken.store(false, Ordering::SeqCst);
    guest.reconnect(&server.path, Some(&region));
    assert_eq!(guest.read(0, 0, 512), pattern(512, 1));
}

#[test]
fn a_log_that_is_too_short_is_refused() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let guest = Guest::connect(&server.path, ALL);
    let log = Log::new(LOG_BYTES);
    assert!(log.send(&guest, LOG_BYTES - 1).is_err(), "it has no bit for the last pages");
    // SET_LOG_BASE has a reply of its own, so a refusal ends the session.
    assert!(guest.frontend.get_features().is_err());
    let guest = Guest::connect(&server.path, ALL);
    assert!(Log::new(LOG_BYTES - 1).send(&guest, LOG_BYTES).is_err(), "its file is shorter");
}

#[test]
fn memory_beyond_the_log_is_refused_while_logging_is_on() {
    use vhost::VhostUserMemoryRegionInfo;
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    let _log = begin_logging(&guest);
    let file = memfd(REGION);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: EXTRA,
        userspace_addr: USER + EXTRA,
        mmap_handle: file.as_raw_fd(),
        ..guest.region(0)
    };
    assert!(guest.frontend.add_mem_region(&region).is_err());
    guest.read(queue, 0, 512);
    guest.frontend.set_features(ALL | F_PROTOCOL).expect("features");
    guest.frontend.add_mem_region(&region).expect("nothing is logged now");
}

/// The log may have come before a region that it has no bits for: then logging cannot begin.
#[test]
fn logging_is_refused_with_a_log_that_is_too_short_by_now() {
    use vhost::VhostUserMemoryRegionInfo;
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    let _log = Log::begin(&guest);
    let file = memfd(REGION);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: EXTRA,
        userspace_addr: USER + EXTRA,
        mmap_handle: file.as_raw_fd(),
        ..guest.region(0)
    };
    guest.frontend.add_mem_region(&region).expect("nothing is logged yet");
    assert!(guest.frontend.set_features(ALL | F_PROTOCOL | LOG_ALL).is_err());
    guest.read(queue, 0, 512);
    guest.frontend.remove_mem_region(&region).expect("removed");
    guest.frontend.set_features(ALL | F_PROTOCOL | LOG_ALL).expect("it covers all again");
    guest.read(queue, 0, 512);
}
