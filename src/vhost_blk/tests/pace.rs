//! A kick descriptor that is always readable costs no processor, and delays neither completions nor new requests much.

mod kit;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use vhost::VhostBackend;
use vhost_blk::ServeOptions;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

const ALL: u64 = F_VERSION_1 | F_FLUSH;
/// The longest pause, and what a busy machine adds.
const SOON: Duration = Duration::from_millis(500);

/// A guest whose queue 0 has a semaphore at its maximum as kick descriptor: each read of it takes one.
fn start(disk: &Arc<MemoryDisk>) -> (TestServer, Guest) {
    let server = TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(1, 256));
    let mut guest = Guest::connect(&server.path, ALL);
    guest.add_queue(32);
    let semaphore = EventFd::new(EFD_NONBLOCK | EFD_SEMAPHORE).unwrap();
    semaphore.write(u64::MAX - 1).unwrap();
    guest.frontend.set_vring_kick(0, &semaphore).unwrap();
    (server, guest)
}

fn sleeps(server: &TestServer) -> u64 {
    server.options.metrics.snapshot()[0].sleeps
}

/// The queue sleeps for most of the time.
fn assert_paced(server: &TestServer) {
    let fresh = sleeps(server);
    until("it has learnt", || sleeps(server) > fresh + 80);
    let before = sleeps(server);
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(400) {
        std::thread::yield_now();
    }
    // Two sleeps for each pause of 10 ms.
    let slept = sleeps(server) - before;
    assert!(slept <= 100, "{slept} sleeps in 400 ms");
}

/// Makes a request of one sector available, without a kick.
fn offer(guest: &mut Guest, kind: u32) {
    let (header, status, data) = (guest.header(kind, 0), guest.put(&[UNTOUCHED]), guest.alloc(512));
    let writes = if kind == T_IN { WRITE } else { 0 };
    let head = guest.chain(0, &[(header, 16, 0), (data, 512, writes), (status, 1, WRITE)]);
    guest.make_available(0, head);
}

fn assert_soon(guest: &mut Guest, what: &str) {
    let began = Instant::now();
    guest.next_used(0);
    assert!(began.elapsed() < SOON, "{what}: {:?}", began.elapsed());
}

#[test]
fn an_idle_queue_is_paced() {
    let disk = MemoryDisk::new(64);
    let (server, mut guest) = start(&disk);
    assert_paced(&server);
    offer(&mut guest, T_IN);
    assert_soon(&mut guest, "a new request");
}

#[test]
fn a_queue_whose_requests_wait_for_space_is_paced() {
    let disk = MemoryDisk::new(64);
    let (server, mut guest) = start(&disk);
    disk.full.store(true, Ordering::SeqCst);
    offer(&mut guest, T_OUT);
    until("it waits", || disk.held.load(Ordering::SeqCst) == 1);
    assert_paced(&server);
    offer(&mut guest, T_IN);
    assert_soon(&mut guest, "a new request");
    assert_paced(&server);
    let frontend = guest.frontend.clone();
    let began = Instant::now();
    frontend.get_vring_base(0).unwrap();
    assert!(began.elapsed() < SOON, "a stop: {:?}", began.elapsed());
}

#[test]
fn a_completion_ends_a_pause() {
    let disk = MemoryDisk::later(64);
    let (server, mut guest) = start(&disk);
    disk.gate.close();
    offer(&mut guest, T_IN);
    disk.await_submitted(1);
    assert_paced(&server);
    disk.gate.open();
    assert_soon(&mut guest, "a completion");
}
