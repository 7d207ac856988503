//! Guest memory whose pages are lost when they are needed: the request is not reported as done, the session ends, and
//! the next is served.

mod kit;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::host::{Mount, skipped};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_blk::ServeOptions;

const HUGE: u64 = 2 << 20;

fn serve() -> TestServer {
    TestServer::start(Arc::new(Shared(MemoryDisk::new(64))), ServeOptions::new(4, 128))
}

/// Adds a region at [`EXTRA`] that this process has not mapped.
fn add_region(guest: &mut Guest, file: &File, bytes: u64) {
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: EXTRA,
        memory_size: bytes,
        userspace_addr: USER + EXTRA,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    guest.frontend.add_mem_region(&region).expect("a region");
}

/// Starts a request whose data is a missing page at [`EXTRA`]: the session ends without an answer.
fn assert_ends(server: &TestServer, mut guest: Guest, kind: u32) {
    let queue = guest.add_queue(16);
    guest.read(queue, 0, 512);
    let (header, status) = (guest.header(kind, 0), guest.put(&[UNTOUCHED]));
    let access = if kind == T_IN { WRITE } else { 0 };
    let head = guest.chain(queue, &[(header, 16, 0), (EXTRA, 512, access), (status, 1, WRITE)]);
    guest.make_available(queue, head);
    guest.kick(queue);
    until("the session has ended", || guest.frontend.get_features().is_err());
    assert_eq!(guest.used_index(queue), 1, "the request is not reported as done");
    assert_next(server);
}

fn assert_next(server: &TestServer) {
    let mut next = Guest::connect(&server.path, F_VERSION_1);
    let queue = next.add_queue(16);
    next.read(queue, 0, 512);
}

#[test]
fn a_region_that_is_truncated_ends_the_session() {
    let server = serve();
    for kind in [T_IN, T_OUT] {
        let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
        let file = memfd(REGION);
        add_region(&mut guest, &file, REGION);
        file.set_len(0).expect("it is cut");
        assert_ends(&server, guest, kind);
    }
}

#[test]
fn rings_that_are_truncated_end_the_session() {
    let server = serve();
    let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
    let queue = guest.add_queue(16);
    guest.read(queue, 0, 512);
    // From here on this process must not touch the first region: it would not survive that.
    guest.files[0].set_len(0).expect("it is cut");
    guest.kick(queue);
    until("the session has ended", || guest.frontend.get_features().is_err());
    assert_next(&server);
}

#[test]
fn a_sparse_region_on_a_full_file_system_ends_the_session() {
    let Some(mount) = Mount::tmpfs(64 << 10) else { return skipped("it needs the right to mount a tmpfs") };
    let server = serve();
    let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
    let file = File::options().read(true).write(true).create_new(true).open(mount.path().join("memory"));
    let file = file.expect("a file");
    file.set_len(REGION).expect("its length");
    add_region(&mut guest, &file, REGION);
    let mut filler = File::create(mount.path().join("filler")).expect("a file");
    while filler.write_all(&[1; 4096]).is_ok() {}
    assert_ends(&server, guest, T_IN);
}

#[test]
fn a_region_without_huge_pages_ends_the_session() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(file) = rustix::fs::memfd_create("huge", flags) else {
        return skipped("the kernel has no huge pages");
    };
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.map(|free| free.trim().to_owned()).ok().as_deref() != Some("0") {
        return skipped("there are huge pages, so none can be missing");
    }
    let file = File::from(file);
    file.set_len(HUGE).expect("its length");
    let server = serve();
    for kind in [T_IN, T_OUT] {
        let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH);
        add_region(&mut guest, &file, HUGE);
        assert_ends(&server, guest, kind);
    }
}
