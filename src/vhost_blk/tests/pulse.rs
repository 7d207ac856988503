//! The pulse shows a thread that is stuck in one step, and what the server does.

mod kit;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::host::not_taken;
use vhost::VhostBackend;
use vhost_blk::{Pulse, ServeOptions, Stage};

const ALL: u64 = F_VERSION_1 | F_FLUSH;

#[test]
fn a_stuck_thread_is_seen() {
    let disk = MemoryDisk::new(64);
    let server = TestServer::start(Arc::new(Shared(Arc::clone(&disk))), ServeOptions::new(2, 128));
    let pulse = Arc::clone(&server.options.pulse);
    let mut guest = Guest::connect(&server.path, ALL);
    guest.add_queue(16);
    guest.read(0, 0, 512);
    until("all wait", || pulse.steps() == [None; 3]);
    // A call for the disk that does not return.
    disk.slow.store(true, Ordering::SeqCst);
    disk.gate.close();
    guest.offer_write(0, 0);
    guest.kick(0);
    until("the worker is in a step", || pulse.steps()[1].is_some() && never(|| pulse.steps()[1].is_none()));
    let stuck = pulse.steps();
    assert!(never(|| pulse.steps() != stuck), "it stays in that step, and nobody else is in one");
    let frontend = guest.frontend.clone();
    let base = std::thread::spawn(move || frontend.get_vring_base(0).unwrap());
    // The session's thread waits for the worker, which alone is stuck.
    assert!(never(|| pulse.steps()[1] != stuck[1]));
    assert_eq!(pulse.steps(), stuck);
    disk.gate.open();
    assert_eq!(base.join().unwrap(), 2);
    until("all wait again", || pulse.steps() == [None; 3]);
}

#[test]
fn a_session_whose_replies_are_not_read_is_not_stuck() {
    let server = TestServer::start(Arc::new(Shared(MemoryDisk::new(64))), ServeOptions::new(2, 128));
    let stream = UnixStream::connect(&server.path).unwrap();
    stream.set_nonblocking(true).unwrap();
    // GET_FEATURES, version 1, without a payload.
    let message: Vec<u8> = [1u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    until("nothing is taken any more", || {
        while (&stream).write(&message).is_ok_and(|bytes| bytes == message.len()) {}
        not_taken(&stream) > 0 && never(|| (&stream).write(&message).is_ok())
    });
    assert!(never(|| server.options.pulse.steps()[0].is_some()), "it is in a step");
}

#[test]
fn stages_are_told_in_order() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let theirs = Arc::clone(&told);
    let pulse = Arc::new(Pulse::new(2, move |stage| theirs.lock().unwrap().push(stage)));
    let options = ServeOptions { pulse, ..ServeOptions::new(2, 128) };
    let server = TestServer::start(Arc::new(Shared(MemoryDisk::new(64))), options);
    drop(Guest::connect(&server.path, ALL));
    until("the session is over", || told.lock().unwrap().len() == 3);
    let _guest = Guest::connect(&server.path, ALL);
    server.finish().unwrap();
    let expected = [Stage::Attached, Stage::Draining, Stage::Waiting, Stage::Attached, Stage::Draining];
    assert_eq!(*told.lock().unwrap(), expected);
}
