//! Every descriptor from a frontend is closed, whatever happens to its message. Alone in its program, because it counts
//! the descriptors of the whole process.

mod kit;

use std::sync::Arc;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::raw::*;
use vhost_blk::ServeOptions;

#[test]
fn no_descriptor_is_left_behind() {
    let disk = MemoryDisk::new(64);
    let server = TestServer::start(Arc::new(Shared(disk)), ServeOptions::new(4, 128));
    // A session is over before the next is served, so only this session's descriptors are counted.
    let count = || {
        let mut raw = Raw::negotiated(&server.path);
        assert!(raw.lives());
        open_descriptors()
    };
    // A first round, for descriptors that are opened only once.
    round(&server);
    let before = count();
    round(&server);
    assert_eq!(count(), before);
}

fn round(server: &TestServer) {
    let files: Vec<_> = (0..33).map(|_| memfd(4096)).collect();
    let fds = raw_fds(&files);
    let page = 4096;
    let number = |value: u64| value.to_ne_bytes().to_vec();
    let messages: Vec<(u32, Vec<u8>, usize)> = vec![
        (SET_MEM_TABLE, table(&[[0, page, 0, 0], [0, page, 0, 0]]), 2),
        (SET_MEM_TABLE, table(&[[0, page, 0, 0], [page, 2 * page, 0, 0]]), 2),
        (SET_MEM_TABLE, table(&[[0, page, 0, 0]]), 32),
        (SET_MEM_TABLE, table(&[[0, page, 0, 0]]), 33),
        (ADD_MEM_REG, single_region([0, 2 * page, 0, 0]), 1),
        (ADD_MEM_REG, single_region([0, page, 0, 0]), 1),
        (ADD_MEM_REG, single_region([0, page, 0, 0]), 3),
        (REM_MEM_REG, single_region([0, page, 0, 0]), 1),
        (SET_VRING_KICK, number(0), 1),
        (SET_VRING_KICK, number(0), 1),
        (SET_VRING_KICK, number(9), 1),
        (SET_VRING_CALL, number(1), 1),
        (SET_VRING_CALL, number(1), 2),
        (SET_VRING_ERR, number(0x201), 1),
        (SET_VRING_NUM, state(0, 128), 4),
        (GET_INFLIGHT_FD, vec![0; 24], 1),
        (200, vec![], 7),
    ];
    for (request, payload, count) in messages {
        let mut raw = Raw::negotiated(&server.path);
        raw.ask(request, &payload, &fds[..count]);
    }
    let mut guest = Guest::connect(&server.path, F_VERSION_1);
    guest.add_queue(16);
    guest.read(0, 0, 512);
}
