//! Messages that arrive in pieces: any split has the same effect as the whole message, and a message that is never
//! completed ends its session.

mod kit;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::host::not_taken;
use kit::raw::*;
use vhost_blk::ServeOptions;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const PAGE: u64 = 4096;
const HEADER: usize = 12;
const VERSION_AND_NEED_REPLY: u32 = 9;

fn serve() -> TestServer {
    TestServer::start(Arc::new(Shared(MemoryDisk::new(64))), ServeOptions::new(4, 128))
}

/// Sends a message that requests an acknowledgement: in pieces of the given lengths, then the rest. The descriptors go
/// with the first piece. With `apart`, each piece has been taken before the next is sent.
fn ask_in_pieces(raw: &mut Raw, message: &Message, pieces: &[usize], apart: bool) -> Reply {
    let bytes = message.bytes();
    let mut rest = &bytes[..];
    let mut fds = &message.fds[..];
    for length in pieces.iter().copied().chain([bytes.len()]) {
        let (piece, later) = rest.split_at(length.min(rest.len()));
        if !piece.is_empty() {
            raw.stream.send_with_fds(&[piece], fds).expect("the session takes it");
        }
        (rest, fds) = (later, &[]);
        if apart && !rest.is_empty() {
            until("the piece is taken", || not_taken(&raw.stream) == 0);
        }
    }
    raw.reply()
}

struct Message {
    request: u32,
    payload: Vec<u8>,
    fds: Vec<i32>,
}

impl Message {
    fn new(request: u32, payload: Vec<u8>, fds: &[i32]) -> Self {
        Message { request, payload, fds: fds.to_vec() }
    }

    fn bytes(&self) -> Vec<u8> {
        let header = [self.request, VERSION_AND_NEED_REPLY, self.payload.len() as u32];
        header.iter().flat_map(|number| number.to_ne_bytes()).chain(self.payload.iter().copied()).collect()
    }
}

/// Every message is cut at every byte, and into single bytes, all in one session.
#[test]
fn a_message_may_be_cut_anywhere() {
    let server = serve();
    let memory = memfd(64 * PAGE);
    let events = [(); 3].map(|()| EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    let map = memory.as_raw_fd();
    let [kick, call, error] = events.each_ref().map(AsRawFd::as_raw_fd);
    let many: Vec<[u64; 4]> = (0..32).map(|at| [at * PAGE, PAGE, at * PAGE, at * PAGE]).collect();
    let number = |value: u64| value.to_ne_bytes().to_vec();
    let messages = [
        Message::new(GET_FEATURES, vec![], &[]),
        Message::new(SET_OWNER, vec![], &[]),
        Message::new(SET_MEM_TABLE, table(&[[0, 64 * PAGE, 0, 0]]), &[map]),
        Message::new(SET_VRING_NUM, state(0, 16), &[]),
        Message::new(SET_VRING_ADDR, address(0, 0, 2 * PAGE, PAGE), &[]),
        Message::new(SET_VRING_BASE, state(1, 0), &[]),
        Message::new(SET_VRING_CALL, number(0), &[call]),
        Message::new(SET_VRING_ERR, number(0), &[error]),
        Message::new(SET_VRING_KICK, number(0), &[kick]),
        Message::new(SET_VRING_ENABLE, state(1, 1), &[]),
        Message::new(GET_CONFIG, config(0, 60, &[0; 60]), &[]),
        Message::new(SET_CONFIG, config(32, 1, &[1]), &[]),
        Message::new(GET_VRING_BASE, state(0, 0), &[]),
        Message::new(REM_MEM_REG, single_region([0, 64 * PAGE, 0, 0]), &[]),
        Message::new(ADD_MEM_REG, single_region([0, 64 * PAGE, 0, 0]), &[map]),
    ];
    let mut raw = Raw::negotiated(&server.path);
    for (at, message) in messages.iter().enumerate() {
        let whole = ask_in_pieces(&mut raw, message, &[], false);
        assert_ne!(whole, Reply::Closed, "message {at}");
        // A removed region cannot be removed a second time, and an added one cannot be added again.
        let again = match message.request {
            REM_MEM_REG | ADD_MEM_REG => ask_in_pieces(&mut raw, message, &[], false),
            _ => whole,
        };
        assert_ne!(again, Reply::Closed, "message {at}");
        let length = HEADER + message.payload.len();
        for apart in [false, true] {
            for cut in 1..length {
                let reply = ask_in_pieces(&mut raw, message, &[cut], apart);
                assert_eq!(reply, again, "message {at} cut at {cut}, apart: {apart}");
            }
            let reply = ask_in_pieces(&mut raw, message, &vec![1; length], apart);
            assert_eq!(reply, again, "message {at} in single bytes, apart: {apart}");
        }
    }
    // The socket cannot hold so many pieces, so the session must take them while they arrive.
    let largest = Message::new(SET_MEM_TABLE, table(&many), &[map; 32]);
    let reply = ask_in_pieces(&mut raw, &largest, &[1; 1100], false);
    assert_eq!(reply.number(), Some(0));
    assert!(raw.lives());
}

#[test]
fn the_queue_of_a_late_payload_is_seen_whole() {
    let server = serve();
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let mut raw = Raw::negotiated(&server.path);
    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        for index in [0x200u64, 1 << 32, 1 << 63] {
            let message = Message::new(request, index.to_ne_bytes().to_vec(), &[event.as_raw_fd()]);
            for cut in [HEADER, HEADER + 1, HEADER + 7] {
                let reply = ask_in_pieces(&mut raw, &message, &[cut], true);
                assert!(
                    reply.number().is_some_and(|refused| refused != 0),
                    "{request} of queue {index:#x}, cut at {cut}: {reply:?}"
                );
            }
        }
    }
}

#[test]
fn a_stop_does_not_wait_for_the_rest_of_a_message() {
    let server = serve();
    let mut raw = Raw::negotiated(&server.path);
    raw.send_bytes(&Message::new(SET_VRING_NUM, state(0, 16), &[]).bytes()[..HEADER + 3]);
    until("the piece is taken", || not_taken(&raw.stream) == 0);
    server.finish().expect("it ends well");
    assert_eq!(raw.reply(), Reply::Closed);
}

#[test]
fn a_message_that_is_never_completed_ends_its_session() {
    let options = ServeOptions { message_timeout: Duration::from_millis(200), ..ServeOptions::new(4, 128) };
    let server = TestServer::start(Arc::new(Shared(MemoryDisk::new(64))), options);
    let mut raw = Raw::negotiated(&server.path);
    raw.send_bytes(&[GET_FEATURES as u8]);
    assert_eq!(raw.reply(), Reply::Closed, "within the 20 s that a reply is waited for");
    assert!(Raw::negotiated(&server.path).lives());
}
