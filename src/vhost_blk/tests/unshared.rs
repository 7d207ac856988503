//! A frontend that does not share the guest's memory: the log reports it once a session, with the setting that helps.
//! Alone in its program, because it reads the log of the whole process.

mod kit;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::log;
use kit::raw::*;
use vhost_blk::ServeOptions;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const NOT_SHARED: &str = "not shared";

#[test]
fn memory_that_is_not_shared_is_logged() {
    log::keep();
    let server = TestServer::start(Arc::new(Shared(MemoryDisk::new(64))), ServeOptions::new(4, 128));
    let told = |count: usize, why: &str| {
        until(why, || log::with(NOT_SHARED).len() >= count);
        assert!(never(|| log::with(NOT_SHARED).len() > count), "{why}: once");
    };

    // A guest with shared memory, which kicks before there is work.
    let mut guest = Guest::connect(&server.path, F_VERSION_1);
    guest.write_u16(0x9_0000, 0x1234);
    let queue = guest.add_queue(16);
    guest.kick(queue);
    guest.read(queue, 0, 512);
    drop(guest);
    told(0, "a guest that shares its memory");

    // As QEMU without a memory backend: the rings are set up, but there is no memory.
    let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let mut raw = Raw::negotiated(&server.path);
    for queue in [0, 1] {
        raw.ask(SET_VRING_NUM, &state(queue, 16), &[]);
        raw.ask(SET_VRING_ADDR, &address(queue, 0x1000, 0x3000, 0x2000), &[]);
        raw.ask(SET_VRING_KICK, &u64::from(queue).to_ne_bytes(), &[kick.as_raw_fd()]);
        raw.ask(SET_VRING_ENABLE, &state(queue, 1), &[]);
    }
    drop(raw);
    told(1, "no memory at all");

    // As QEMU with share=off: there are files, but the guest uses other pages.
    let mut guest = Guest::connect(&server.path, F_VERSION_1);
    for _ in 0..2 {
        let queue = guest.add_queue(16);
        guest.kick(queue);
    }
    told(2, "memory that nobody wrote to");
    let line = log::with(NOT_SHARED).pop().expect("a line");
    assert!(line.starts_with("WARN") && line.contains("share=on") && line.contains("shared=on"), "{line}");
}
