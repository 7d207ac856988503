//! How a ring stops. A stop drains a bounded number of bytes, and all rings are told before one is waited for. A
//! pause serves what the guest has made available.

mod kit;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::host::not_taken;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost_blk::{Request, ServeOptions};

const ALL: u64 = F_VERSION_1 | F_FLUSH | F_INDIRECT;
/// Bytes of a large request: many times what a queue may have in flight.
const LARGE: u64 = 128 << 20;
const SECTORS: u64 = LARGE / 512;
/// Bytes that a queue gives to the disk between two looks for a stop.
const BATCH_MAX: u64 = 4 << 20;
/// Bytes of a large request that the disk has at a time.
const IN_FLIGHT: u64 = 32 << 20;
/// Requests for them.
const PIECES: u64 = IN_FLIGHT / (2 << 20);

fn serve(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(4, 256))
}

/// A daemon, and a guest with one queue of this size.
fn serve_queue(disk: &Arc<MemoryDisk>, size: u16) -> (TestServer, Guest, usize) {
    serve_with(disk, ALL, size)
}

fn serve_with(disk: &Arc<MemoryDisk>, features: u64, size: u16) -> (TestServer, Guest, usize) {
    let server = serve(disk);
    let mut guest = Guest::connect(&server.path, features);
    let queue = guest.add_queue(size);
    (server, guest, queue)
}

fn offer_read(guest: &mut Guest, queue: usize) -> (u32, u64) {
    let (header, status, data) = (guest.header(T_IN, 0), guest.put(&[UNTOUCHED]), guest.alloc(512));
    let head = guest.indirect_chain(queue, &[(header, 16, 0), (data, 512, WRITE), (status, 1, WRITE)]);
    guest.make_available(queue, head);
    (u32::from(head), status)
}

/// Makes a write of a sector, filled with its number, available without a kick; returns the address of its status.
fn offer_marked_write(guest: &mut Guest, queue: usize, sector: u8) -> u64 {
    let (header, data) = (guest.header(T_OUT, u64::from(sector)), guest.put(&[sector; 512]));
    let status = guest.put(&[UNTOUCHED]);
    let head = guest.indirect_chain(queue, &[(header, 16, 0), (data, 512, 0), (status, 1, WRITE)]);
    guest.make_available(queue, head);
    status
}

/// Waits until the worker reports that it stops.
fn await_error(guest: &Guest, queue: usize) {
    until("the error", || guest.queues[queue].error.read().is_ok());
}

/// Corrupts a ring, and waits until its worker has found that.
fn corrupt(guest: &mut Guest, queue: usize) {
    guest.make_available(queue, guest.queues[queue].size);
    guest.kick(queue);
    await_error(guest, queue);
}

#[test]
fn a_batch_is_bounded_in_bytes() {
    let disk = MemoryDisk::new(SECTORS);
    disk.bytes.lock().unwrap()[LARGE as usize - 1] = 77;
    let (_server, mut guest, queue) = serve_queue(&disk, 64);
    let offered: Vec<_> = (0..3).map(|_| guest.offer_large_read(queue, LARGE)).collect();
    let zeroes = guest.put(&segment(0, SECTORS as u32, 1));
    let (header, status) = (guest.header(T_WRITE_ZEROES, 0), guest.put(&[UNTOUCHED]));
    guest.kick(queue);
    for (head, status) in offered {
        assert_eq!(guest.next_used(queue), (head, LARGE as u32 + 1));
        assert_eq!(guest.get(status, 1), [OK]);
    }
    assert_eq!(guest.get(2 * REGION - 1, 1), [77], "the end of the disk is at the end of the memory");
    let batches = std::mem::take(&mut *disk.batches.lock().unwrap());
    assert_eq!(batches.iter().sum::<u64>(), 3 * LARGE);
    assert!(batches.iter().all(|bytes| *bytes <= BATCH_MAX), "{batches:?}");
    // A discard or write zeroes of many clusters is bounded as well, here at 64 MiB a piece.
    let head = guest.indirect_chain(queue, &[(header, 16, 0), (zeroes, 16, 0), (status, 1, WRITE)]);
    assert_eq!((guest.run(queue, head), guest.get(status, 1)), (1, vec![OK]));
    assert_eq!(*disk.batches.lock().unwrap(), [64 << 20, 64 << 20]);
    assert!(disk.bytes.lock().unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn zeroes_that_become_data_are_bounded_as_data() {
    let disk = MemoryDisk::with(SECTORS, false, |profile| profile.zeroes_are_data = true);
    let (_server, mut guest, queue) = serve_queue(&disk, 64);
    let zeroes = guest.put(&segment(0, SECTORS as u32, 1));
    let (header, status) = (guest.header(T_WRITE_ZEROES, 0), guest.put(&[UNTOUCHED]));
    let head = guest.indirect_chain(queue, &[(header, 16, 0), (zeroes, 16, 0), (status, 1, WRITE)]);
    assert_eq!((guest.run(queue, head), guest.get(status, 1)), (1, vec![OK]));
    let batches = std::mem::take(&mut *disk.batches.lock().unwrap());
    assert_eq!(batches.iter().sum::<u64>(), LARGE);
    assert!(batches.iter().all(|bytes| *bytes <= BATCH_MAX), "{batches:?}");
}

/// Small requests may be much work: the disk knows, and the worker asks it.
#[test]
fn a_disk_without_room_gets_no_more_requests() {
    let disk = MemoryDisk::later(SECTORS);
    let (_server, mut guest, queue) = serve_queue(&disk, 64);
    disk.gate.close();
    disk.room.store(3, Ordering::SeqCst);
    (0..10).for_each(|_| _ = offer_read(&mut guest, queue));
    let large = guest.offer_large_read(queue, LARGE);
    guest.kick(queue);
    disk.await_submitted(3);
    assert!(never(|| disk.submitted.load(Ordering::SeqCst) > 3), "there is no room");
    let frontend = guest.frontend.clone();
    let base = std::thread::spawn(move || frontend.get_vring_base(0).unwrap());
    assert!(never(|| base.is_finished()), "the disk has requests");
    disk.gate.open();
    assert_eq!(base.join().unwrap(), 3, "the others are still in the ring");
    guest.start_queue(queue, 3);
    until("all are done", || guest.used_index(queue) == 11);
    assert_eq!(guest.get(large.1, 1), [OK], "in pieces, three at a time");
}

#[test]
fn a_stop_drains_what_the_disk_has_and_puts_the_rest_back() {
    // In a packed ring the base counts descriptors: three and one. It names the place twice.
    for (features, left) in [(ALL, 2), (ALL | F_PACKED, 0x8004_8004)] {
        let disk = MemoryDisk::later(SECTORS);
        let (_server, mut guest, queue) = serve_with(&disk, features, 64);
        guest.read(queue, 0, 512);
        disk.gate.close();
        let first = offer_read(&mut guest, queue);
        let large = guest.offer_large_read(queue, LARGE);
        let last = offer_read(&mut guest, queue);
        guest.kick(queue);
        disk.await_submitted(2 + PIECES);
        assert!(never(|| disk.submitted.load(Ordering::SeqCst) > 2 + PIECES), "no more is in flight");
        let frontend = guest.frontend.clone();
        let base = std::thread::spawn(move || frontend.get_vring_base(0).unwrap());
        assert!(never(|| base.is_finished()), "the disk has requests");
        disk.gate.open();
        assert_eq!(base.join().unwrap(), left, "the large read and the one after it are still in the ring");
        assert_eq!(disk.submitted.load(Ordering::SeqCst), 2 + PIECES);
        assert_eq!(guest.next_used(queue).0, first.0);
        assert_eq!(guest.used_index(queue), 2);
        assert_eq!(guest.get(large.1, 1), [UNTOUCHED]);
        guest.start_queue(queue, left as u16);
        assert_eq!(guest.next_used(queue), (large.0, LARGE as u32 + 1));
        assert_eq!(guest.next_used(queue), (last.0, 513));
        assert_eq!([large.1, last.1].map(|status| guest.get(status, 1)), [[OK], [OK]]);
    }
}

#[test]
fn a_disconnect_leaves_the_ring_as_it_is() {
    let disk = MemoryDisk::later(SECTORS);
    let (server, mut guest, queue) = serve_queue(&disk, 64);
    disk.gate.close();
    let large: Vec<_> = (0..8).map(|_| guest.offer_large_read(queue, LARGE)).collect();
    guest.kick(queue);
    disk.await_submitted(PIECES);
    server.stop.stop();
    assert!(never(|| disk.submitted.load(Ordering::SeqCst) > PIECES));
    disk.gate.open();
    server.finish().unwrap();
    assert_eq!(disk.submitted.load(Ordering::SeqCst), PIECES);
    assert_eq!(guest.used_index(queue), 0, "a frontend that counts the used ring sends all again");
    assert!(large.iter().all(|(_, status)| guest.get(*status, 1) == [UNTOUCHED]));
}

#[test]
fn all_rings_are_told_before_the_first_is_waited_for() {
    let disk = MemoryDisk::later(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let (held, other) = (guest.add_queue(16), guest.add_queue(16));
    disk.gate.close();
    offer_read(&mut guest, held);
    guest.kick(held);
    disk.await_submitted(1);
    let mut frontend = guest.frontend.clone();
    let reset = std::thread::spawn(move || frontend.reset_device().unwrap());
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        assert!(Instant::now() < deadline, "the second ring is served while the first one drains");
        let (header, id) = (guest.header(T_GET_ID, 0), guest.put(&[UNTOUCHED; 21]));
        let head = guest.chain(other, &[(header, 16, 0), (id, 21, WRITE)]);
        let used = guest.used_index(other);
        guest.make_available(other, head);
        guest.kick(other);
        if never(|| guest.used_index(other) != used) {
            break;
        }
    }
    assert!(!reset.is_finished(), "the first ring still drains");
    disk.gate.open();
    reset.join().unwrap();
}

/// Else a ring among many that never end would be stopped at its share of the processors.
#[test]
fn other_rings_take_nothing_while_one_is_stopped() {
    let disk = MemoryDisk::later(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let (stopped, other) = (guest.add_queue(16), guest.add_queue(16));
    disk.gate.close();
    offer_read(&mut guest, stopped);
    guest.kick(stopped);
    disk.await_submitted(1);
    let frontend = guest.frontend.clone();
    let base = std::thread::spawn(move || frontend.get_vring_base(stopped).unwrap());
    let deadline = Instant::now() + Duration::from_secs(10);
    let used = loop {
        assert!(Instant::now() < deadline, "the other ring is served all the time");
        let (header, id) = (guest.header(T_GET_ID, 0), guest.put(&[UNTOUCHED; 21]));
        let head = guest.chain(other, &[(header, 16, 0), (id, 21, WRITE)]);
        let used = guest.used_index(other);
        guest.make_available(other, head);
        guest.kick(other);
        if never(|| guest.used_index(other) != used) {
            break used;
        }
    };
    until("the other ring goes on, however long the stop takes", || guest.used_index(other) != used);
    assert!(!base.is_finished());
    disk.gate.open();
    assert_eq!(base.join().unwrap(), 1);
    guest.queues[other].seen_used = guest.used_index(other);
    guest.read(other, 0, 512);
}

/// Cloud Hypervisor pauses a machine by disabling its rings, and resumes with the available index as base.
#[test]
fn a_pause_serves_what_is_available() {
    let disk = MemoryDisk::later(64);
    let (_server, mut guest, queue) = serve_queue(&disk, 256);
    let written = 63;
    // The machine stops after the index was stored, and before the kick.
    let statuses: Vec<_> = (0..written).map(|sector| offer_marked_write(&mut guest, queue, sector)).collect();
    guest.frontend.set_vring_enable(queue, false).unwrap();
    assert_eq!(guest.used_index(queue), u16::from(written));
    assert!(statuses.iter().all(|status| guest.get(*status, 1) == [OK]));
    assert_eq!(disk.requests.lock().unwrap().last(), Some(&Request::Flush));
    assert_eq!(guest.frontend_base(queue), u32::from(written));
    guest.start_queue(queue, guest.queues[queue].next_available);
    guest.queues[queue].seen_used = u16::from(written);
    for sector in 0..written {
        assert_eq!(guest.read(queue, u64::from(sector), 512), [sector; 512]);
    }
}

#[test]
fn a_guest_that_goes_on_cannot_prolong_a_pause() {
    let disk = MemoryDisk::new(64);
    let (_server, mut guest, queue) = serve_queue(&disk, 256);
    let (frontend, paused) = (guest.frontend.clone(), AtomicBool::new(false));
    for _ in 0..20 {
        std::thread::scope(|scope| {
            let mut frontend = frontend.clone();
            let paused = &paused;
            scope.spawn(move || {
                frontend.set_vring_enable(queue, false).unwrap();
                paused.store(true, Ordering::SeqCst);
            });
            let mut offered = 0;
            until("the pause", || {
                // The ring is never empty, and never overflows.
                while offered < 200
                    && guest.queues[queue].next_available.wrapping_sub(guest.used_index(queue)) < 64
                {
                    offer_read(&mut guest, queue);
                    offered += usize::from(paused.load(Ordering::SeqCst));
                }
                paused.load(Ordering::SeqCst)
            });
        });
        paused.store(false, Ordering::SeqCst);
        guest.frontend.set_vring_enable(queue, true).unwrap();
        let all = guest.queues[queue].next_available;
        until("what came after the pause", || guest.used_index(queue) == all);
    }
}

/// What rings answered before they stopped must not stay in a cache that is off.
#[test]
fn a_cache_that_is_turned_off_is_flushed_with_no_ring_running() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, ALL | F_CONFIG_WCE);
    let queue = guest.add_queue(64);
    guest.write(queue, 0, &[1; 512]);
    assert_eq!(guest.frontend_base(queue), 1, "the ring has stopped");
    let turn_off = |guest: &mut Guest| guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]);
    let flushes =
        || disk.requests.lock().unwrap().iter().filter(|request| **request == Request::Flush).count();
    assert_eq!(flushes(), 0);
    turn_off(&mut guest).unwrap();
    assert_eq!(flushes(), 1);
    turn_off(&mut guest).unwrap();
    assert_eq!(flushes(), 1, "it was off already");
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[1]).unwrap();
    disk.broken.store(true, Ordering::SeqCst);
    turn_off(&mut guest).unwrap_err();
    assert_eq!(guest.read_config(32, 1), Some(vec![0]));
}

/// A frontend that copies the image after a pause must not believe it to be whole.
#[test]
fn a_pause_that_cannot_flush_is_refused() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, ALL | F_CONFIG_WCE);
    let queue = guest.add_queue(64);
    guest.write(queue, 0, &[1; 512]);
    disk.broken.store(true, Ordering::SeqCst);
    let status = offer_marked_write(&mut guest, queue, 7);
    guest.frontend.set_vring_enable(queue, false).unwrap_err();
    assert_eq!(guest.get(status, 1), [OK], "the ring was served and stopped all the same");
    assert_eq!(guest.frontend_base(queue), 2, "the session goes on");
    guest.start_queue(queue, 2);
    // So with a cache that is turned off.
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap_err();
    assert_eq!(guest.read_config(32, 1), Some(vec![0]));
    disk.broken.store(false, Ordering::SeqCst);
    guest.frontend.set_vring_enable(queue, false).unwrap();
    guest.frontend.set_vring_enable(queue, true).unwrap();
    // A frontend that asks for no answer can learn of it only by the session's end.
    disk.broken.store(true, Ordering::SeqCst);
    guest.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
    guest.frontend.set_vring_enable(queue, false).unwrap();
    guest.frontend.get_features().unwrap_err();
    Guest::connect(&server.path, ALL);
}

/// A worker ends by itself when its ring is corrupt. A guest's write that it answered before must be durable all the same.
#[test]
fn a_pause_of_a_corrupt_ring_flushes() {
    let disk = MemoryDisk::new(64);
    let (_server, mut guest, queue) = serve_queue(&disk, 64);
    guest.write(queue, 0, &[1; 512]);
    corrupt(&mut guest, queue);
    guest.frontend.set_vring_enable(queue, false).unwrap();
    assert_eq!(disk.requests.lock().unwrap().last(), Some(&Request::Flush));
}

#[test]
fn a_pause_of_a_corrupt_ring_that_could_not_flush_is_refused() {
    let disk = MemoryDisk::new(64);
    let (_server, mut guest, queue) = serve_queue(&disk, 64);
    guest.write(queue, 0, &[1; 512]);
    disk.broken.store(true, Ordering::SeqCst);
    corrupt(&mut guest, queue);
    guest.frontend.set_vring_enable(queue, false).unwrap_err();
    guest.frontend.set_vring_enable(queue, false).unwrap_err();
    assert_eq!(guest.frontend_base(queue), 1, "the session goes on");
}

#[test]
fn the_cache_of_a_disk_with_a_corrupt_ring_is_flushed() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, ALL | F_CONFIG_WCE);
    let (first, other) = (guest.add_queue(64), guest.add_queue(64));
    corrupt(&mut guest, first);
    guest.write(other, 0, &[1; 512]);
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert_eq!(disk.requests.lock().unwrap().last(), Some(&Request::Flush));
}

#[test]
fn a_pause_of_a_queue_whose_worker_failed_is_refused() {
    let disk = MemoryDisk::new(64);
    let (_server, mut guest, queue) = serve_queue(&disk, 64);
    guest.write(queue, 0, &[1; 512]);
    disk.trap.store(true, Ordering::SeqCst);
    offer_read(&mut guest, queue);
    guest.kick(queue);
    await_error(&guest, queue);
    guest.frontend.set_vring_enable(queue, false).unwrap_err();
    // It is refused until something flushes for this ring.
    guest.frontend.set_vring_enable(queue, false).unwrap_err();
}

#[test]
fn a_stop_of_the_server_ends_a_pause() {
    let disk = MemoryDisk::later(SECTORS);
    let server = serve(&disk);
    let stream = UnixStream::connect(&server.path).unwrap();
    let ours = stream.try_clone().unwrap();
    let mut guest = Guest::negotiate(stream, ALL);
    let queue = guest.add_queue(64);
    disk.gate.close();
    let offered = 8;
    for _ in 0..offered {
        guest.offer_large_read(queue, LARGE);
    }
    guest.kick(queue);
    disk.await_submitted(PIECES);
    let mut frontend = guest.frontend.clone();
    let pause = std::thread::spawn(move || frontend.set_vring_enable(queue, false));
    until("the message is on its way", || pause.is_finished() || not_taken(&ours) == 0);
    assert!(never(|| pause.is_finished()), "it waits for the disk");
    server.stop.stop();
    assert!(never(|| disk.submitted.load(Ordering::SeqCst) > PIECES));
    disk.gate.open();
    server.finish().unwrap();
    pause.join().unwrap().expect_err("not all was served, nor is it durable");
    assert!(guest.used_index(queue) < offered, "{} were served", guest.used_index(queue));
}

#[test]
fn a_frontend_that_leaves_ends_a_pause() {
    let disk = MemoryDisk::later(SECTORS);
    let server = serve(&disk);
    let stream = UnixStream::connect(&server.path).unwrap();
    let ours = stream.try_clone().unwrap();
    let mut guest = Guest::negotiate(stream, ALL);
    let queue = guest.add_queue(64);
    disk.gate.close();
    for _ in 0..8 {
        guest.offer_large_read(queue, LARGE);
    }
    guest.kick(queue);
    disk.await_submitted(PIECES);
    let mut frontend = guest.frontend.clone();
    let pause = std::thread::spawn(move || drop(frontend.set_vring_enable(queue, false)));
    until("the message is on its way", || not_taken(&ours) == 0);
    assert!(never(|| pause.is_finished()), "it waits for the disk");
    ours.shutdown(std::net::Shutdown::Both).unwrap();
    pause.join().unwrap();
    assert!(never(|| disk.submitted.load(Ordering::SeqCst) > PIECES));
    disk.gate.open();
    let mut next = Guest::connect(&server.path, ALL);
    let fresh = next.add_queue(64);
    next.read(fresh, 0, 512);
    assert!(guest.used_index(queue) < 8, "{} were served", guest.used_index(queue));
}
