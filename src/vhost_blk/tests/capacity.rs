//! A disk that is resized while it is served: which requests succeed, and how the frontend hears of it.

mod kit;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_blk::{Capacity, ServeOptions};

const SMALL: u64 = 32;
const LARGE: u64 = 64;

/// A disk that could have `LARGE` sectors and shows `SMALL`.
fn disk() -> Arc<MemoryDisk> {
    MemoryDisk::with(LARGE, false, |profile| profile.capacity = Capacity::new(SMALL))
}

fn start(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(2, 64))
}

/// The capacity that the frontend reads.
fn capacity(guest: &mut Guest) -> u64 {
    let bytes = guest.read_config(0, 8).expect("the configuration space");
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

/// Gives the device a back channel.
fn give_channel(guest: &mut Guest) -> UnixStream {
    let offered = guest.frontend.get_protocol_features().expect("protocol features");
    assert!(offered.contains(VhostUserProtocolFeatures::BACKEND_REQ));
    guest.frontend.set_protocol_features(offered).expect("protocol features");
    let (theirs, ours) = UnixStream::pair().expect("a pair");
    guest.frontend.set_backend_request_fd(&theirs).expect("it is taken");
    ours
}

#[test]
fn requests_in_the_new_part_succeed_once_it_is_there() {
    let disk = disk();
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
    let queue = guest.add_queue(16);
    let data = pattern(512, 7);
    for sector in [SMALL, LARGE - 1] {
        assert_eq!(guest.request(queue, T_OUT, sector, &data, 0).status, IOERR, "past the end");
    }
    assert_eq!(guest.request(queue, T_OUT, SMALL - 1, &pattern(1024, 7), 0).status, IOERR, "across the end");
    disk.profile.capacity.set(LARGE);
    for sector in [SMALL, LARGE - 1] {
        assert_eq!(guest.request(queue, T_OUT, sector, &data, 0).status, OK);
        assert_eq!(guest.read(queue, sector, 512), data);
    }
    assert_eq!(guest.request(queue, T_IN, LARGE, &[], 512).status, IOERR);
    disk.profile.capacity.set(SMALL);
    assert_eq!(guest.request(queue, T_IN, SMALL, &[], 512).status, IOERR, "it shrank");
    guest.read(queue, SMALL - 1, 512);
}

#[test]
fn the_frontend_hears_of_it_and_may_ask_meanwhile() {
    let disk = disk();
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
    let channel = &server.options.back_channel;
    assert!(!channel.tell_change().expect("nobody to tell"));
    let mut ours = give_channel(&mut guest);
    assert_eq!(capacity(&mut guest), SMALL);
    disk.profile.capacity.set(LARGE);
    assert!(channel.tell_change().expect("it is sent"));
    let mut message = [0; 12];
    ours.read_exact(&mut message).expect("a message");
    assert_eq!(message, [2u32, 1, 0].map(u32::to_ne_bytes).concat()[..]);
    // While it handles the message, a frontend asks for the configuration space.
    assert_eq!(capacity(&mut guest), LARGE);
    // A second channel takes the place of the first.
    let mut second = give_channel(&mut guest);
    assert_eq!(ours.read(&mut message).expect("the end"), 0, "the first is closed");
    assert!(channel.tell_change().expect("it is sent"));
    second.read_exact(&mut message).expect("a message");
    drop(guest);
    assert_eq!(second.read(&mut message).expect("the end"), 0, "it ends with the session");
    assert!(!channel.tell_change().expect("nobody to tell"));
}

#[test]
fn what_is_no_unix_socket_is_no_back_channel() {
    let disk = disk();
    let server = start(&disk);
    for wrong in [memfd(512), std::fs::File::open("/dev/null").expect("/dev/null")] {
        let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
        let offered = guest.frontend.get_protocol_features().expect("protocol features");
        guest.frontend.set_protocol_features(offered).expect("protocol features");
        guest.frontend.set_backend_request_fd(&wrong).expect_err("it is refused");
        assert!(!server.options.back_channel.tell_change().expect("nobody to tell"));
        drop(guest);
        // The server serves the next frontend.
        let mut next = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
        assert_eq!(capacity(&mut next), SMALL);
    }
}
