//! The door: which frontend is admitted during a session, how a session ends, and in what order a server stops.

mod kit;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use vhost_blk::{ServeOptions, Server, StopHandle};

fn start(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(2, 128))
}

/// Makes the disk hold a read until its gate is opened.
fn submit_read(disk: &MemoryDisk, guest: &mut Guest, queue: usize) {
    disk.gate.close();
    let (header, status, data) = (guest.header(T_IN, 0), guest.put(&[UNTOUCHED]), guest.alloc(512));
    let head = guest.chain(queue, &[(header, 16, 0), (data, 512, WRITE), (status, 1, WRITE)]);
    guest.make_available(queue, head);
    guest.kick(queue);
    disk.await_submitted(1);
}

/// GET_FEATURES as bytes.
const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// Whether a frontend gets an answer; false if its connection is closed.
fn is_answered(stream: &mut UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    let sent = stream.write_all(&GET_FEATURES);
    let read = stream.read(&mut [0; 20]);
    assert!(
        !matches!(&read, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
        "no answer, no end"
    );
    sent.is_ok() && read.is_ok_and(|length| length == 20)
}

#[test]
fn a_second_frontend_is_refused_at_once() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut first = UnixStream::connect(&server.path).expect("connected");
    assert!(is_answered(&mut first));
    for _ in 0..3 {
        let mut second = UnixStream::connect(&server.path).expect("connected");
        assert!(!is_answered(&mut second), "the first is still there");
    }
    assert!(is_answered(&mut first), "and is not bothered");
    drop(first);
    // The first has hung up, so the next one waits for the end of that session, however long it takes.
    let mut next = UnixStream::connect(&server.path).expect("connected");
    assert!(is_answered(&mut next));
}

#[test]
fn a_frontend_that_reconnects_while_its_session_drains_waits() {
    let disk = MemoryDisk::later(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, F_VERSION_1);
    let queue = guest.add_queue(16);
    submit_read(&disk, &mut guest, queue);
    drop(guest);
    let mut next = UnixStream::connect(&server.path).expect("connected");
    next.write_all(&GET_FEATURES).expect("there is room");
    next.set_nonblocking(true).expect("set");
    let waits = |stream: &mut UnixStream| match stream.read(&mut [0; 20]) {
        Ok(_) => false,
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    };
    assert!(never(|| !waits(&mut next)), "it is neither served nor refused");
    disk.gate.open();
    next.set_nonblocking(false).expect("set");
    assert_eq!(next.read(&mut [0; 20]).expect("served"), 20);
}

#[test]
fn a_stop_closes_the_listener_then_drains_then_hangs_up() {
    let disk = MemoryDisk::later(64);
    let server = start(&disk);
    let path = server.path.clone();
    let connection = UnixStream::connect(&path).expect("connected");
    let mut guest = Guest::negotiate(connection.try_clone().expect("a copy"), F_VERSION_1);
    let queue = guest.add_queue(16);
    submit_read(&disk, &mut guest, queue);
    let is_hung_up = || {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&connection, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec::default())).expect("polled") > 0
    };
    server.stop.stop();
    until("the socket file is gone", || !path.exists());
    assert!(UnixStream::connect(&path).is_err());
    assert!(never(is_hung_up), "a request is in flight");
    disk.gate.open();
    until("the end of the session", is_hung_up);
    assert_eq!(guest.next_used(queue).1, 513, "drained before the hang-up");
    server.finish().expect("a clean end");
}

/// Nobody is hung up on because it connected just when another server took over.
#[test]
fn a_frontend_that_has_sent_nothing_goes_on_with_the_next_server() {
    let disk = MemoryDisk::new(64);
    let (folder, device) = (tempfile::tempdir().expect("a folder"), Arc::new(Shared(Arc::clone(&disk))));
    let path = folder.path().join("s");
    let options = ServeOptions::new(2, 128);
    let serve = |server: Server| {
        let stop = StopHandle::new().expect("a handle");
        let (device, options, its_stop) = (Arc::clone(&device), options.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            server.serve(&device, &options, &its_stop).map(|()| server).expect("it serves")
        });
        (stop, thread)
    };
    let mut server = Server::bind(&path).expect("a socket");
    let mut accepted = UnixStream::connect(&path).expect("connected");
    let mut behind = UnixStream::connect(&path).expect("connected");
    for round in 0..3 {
        let (stop, thread) = serve(server);
        // In some rounds it is in the session by then, in others it waits.
        (0..round * 20).for_each(|_| std::thread::yield_now());
        stop.hand_over();
        let old = thread.join().expect("no panic");
        let sockets = old.sockets().expect("copied").expect("they are there");
        old.leave();
        server = Server::taken_over(sockets, &path).expect("taken over");
    }
    let (stop, thread) = serve(server);
    assert!(is_answered(&mut accepted), "it was never hung up on");
    drop(accepted);
    // Refused by a server that served the other, or served now.
    is_answered(&mut behind);
    drop(behind);
    // One that was heard is hung up on, and finds the next server.
    let mut heard = UnixStream::connect(&path).expect("connected");
    assert!(is_answered(&mut heard));
    stop.hand_over();
    thread.join().expect("no panic");
    assert_eq!(heard.read(&mut [0; 20]).expect("the end"), 0);
}

#[test]
fn a_frontend_that_reads_no_replies_does_not_hold_a_stop() {
    let server = start(&MemoryDisk::new(64));
    let mut stream = UnixStream::connect(&server.path).expect("connected");
    stream.set_nonblocking(true).expect("set");
    // Until the session is stuck in a reply, and takes no more messages.
    until("nothing more is taken", || never(|| stream.write(&GET_FEATURES).is_ok_and(|length| length > 0)));
    server.finish().expect("a clean end");
}
