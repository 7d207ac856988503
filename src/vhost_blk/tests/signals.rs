//! Call descriptors that block the thread that raises them: no stop, no message and no next session waits for that.

mod kit;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::host::make_blocking;
use vhost::VhostBackend;
use vhost_blk::ServeOptions;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// These tests look for a thread by its name, so one of them runs at a time.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A guest whose only queue is stuck in a write to the call descriptor. It was full, and became blocking after the
/// session had checked it.
fn stuck() -> (TestServer, Guest, EventFd) {
    stuck_on(&MemoryDisk::new(64))
}

fn stuck_on(disk: &Arc<MemoryDisk>) -> (TestServer, Guest, EventFd) {
    let server = TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(4, 128));
    let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
    let queue = guest.add_queue(16);
    guest.read(queue, 0, 512);
    let call = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    guest.frontend.set_vring_call(queue, &call).expect("it is taken");
    guest.read(queue, 0, 512);
    // Full: every further raise fails until the descriptor is made blocking, and blocks from then on.
    // The interrupt of the read may still come between the two calls.
    until("the counter is full", || {
        let _ = call.read();
        call.write(u64::MAX - 1).is_ok()
    });
    make_blocking(&call);
    guest.offer_write(queue, 0);
    guest.kick(queue);
    let done = guest.queues[queue].seen_used.wrapping_add(1);
    until("the request is done", || guest.used_index(queue) == done);
    until("the worker is in its write", || in_write().is_some());
    (server, guest, call)
}

/// The worker of the first queue, if it sleeps in a write.
fn in_write() -> Option<()> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let mut workers = tasks.flatten().filter(|task| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "strata-q0")
    });
    let call = std::fs::read_to_string(workers.next()?.path().join("syscall")).ok()?;
    (call.split(' ').next()? == libc::SYS_write.to_string()).then_some(())
}

/// It waits for the frontend; a watchdog must not end the daemon for that.
#[test]
fn a_worker_in_a_signal_that_blocks_is_not_stuck() {
    let _one = one_at_a_time();
    let (server, _guest, _call) = stuck();
    assert!(never(|| server.options.pulse.steps()[1].is_some()), "it is in a step");
}

#[test]
fn a_stop_ends_a_signal_that_blocks() {
    let _one = one_at_a_time();
    let (server, _guest, _call) = stuck();
    server.finish().expect("it ends well");
}

#[test]
fn a_frontend_that_leaves_a_blocking_signal_is_followed_by_the_next() {
    let _one = one_at_a_time();
    let (server, guest, _call) = stuck();
    drop(guest);
    let mut next = Guest::connect(&server.path, F_VERSION_1);
    let queue = next.add_queue(16);
    next.read(queue, 0, 512);
}

#[test]
fn a_queue_that_is_stopped_in_a_signal_answers() {
    let _one = one_at_a_time();
    let (_server, guest, _call) = stuck();
    assert_eq!(guest.frontend.get_vring_base(0).expect("an answer"), 3);
}

/// The queue that is stopped may wait for the one that is held by its signal, for example for clusters.
#[test]
fn a_stop_of_one_queue_ends_the_signal_of_another() {
    let _one = one_at_a_time();
    let disk = MemoryDisk::new(64);
    let (server, mut guest, _call) = stuck_on(&disk);
    let other = guest.add_queue(16);
    disk.slow.store(true, Ordering::SeqCst);
    disk.gate.close();
    guest.offer_write(other, 0);
    guest.kick(other);
    until("the other worker is in the disk", || server.options.pulse.steps()[1 + other].is_some());
    assert!(never(|| in_write().is_none()), "nothing ends the signal so far");
    let frontend = guest.frontend.clone();
    let base = std::thread::spawn(move || frontend.get_vring_base(other));
    until("the signal has ended", || in_write().is_none());
    disk.gate.open();
    assert_eq!(base.join().expect("no panic").expect("an answer"), 1);
}

#[test]
fn a_full_descriptor_that_comes_while_the_queue_runs_blocks_nobody() {
    let _one = one_at_a_time();
    let server = TestServer::start(Arc::new(Shared(MemoryDisk::new(64))), ServeOptions::new(4, 128));
    let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
    let queue = guest.add_queue(16);
    let call = EventFd::new(0).expect("an eventfd");
    call.write(u64::MAX - 1).expect("fills the counter");
    guest.frontend.set_vring_call(queue, &call).expect("it is taken");
    guest.read(queue, 0, 512);
    assert_eq!(call.read().expect("its count"), u64::MAX - 1);
}
