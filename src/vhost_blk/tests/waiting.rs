//! Requests that wait for help, such as for space on the host, while their ring is stopped. They are answered, the
//! frontend gets its answer soon, and messages that stop no ring leave them waiting.

mod kit;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_blk::ServeOptions;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const ALL: u64 = F_VERSION_1 | F_FLUSH | F_INDIRECT;
/// The offset of the `writeback` byte in the configuration space.
const WRITEBACK: u32 = 32;
/// The most segments of a discard, which is also the most that the session gives the disk at a time.
const SEGMENTS: u32 = 32;

/// Bytes of a request of more pieces than there are slots.
const LARGE: u64 = 128 << 20;

/// Makes a write available and kicks; returns its head and the address of its status.
fn offer_write(guest: &mut Guest, queue: usize) -> (u32, u64) {
    let data = guest.put(&pattern(512, 7));
    offer(guest, queue, T_OUT, 3, data, 512)
}

/// As `offer_write`, for any request that carries some bytes.
fn offer(guest: &mut Guest, queue: usize, kind: u32, sector: u64, data: u64, bytes: u32) -> (u32, u64) {
    let (header, status) = (guest.header(kind, sector), guest.put(&[UNTOUCHED]));
    let head = guest.chain(queue, &[(header, 16, 0), (data, bytes, 0), (status, 1, WRITE)]);
    guest.make_available(queue, head);
    guest.kick(queue);
    (u32::from(head), status)
}

/// A guest with two queues on a disk that is full, with a write waiting on each and a read done on the first.
struct Scene {
    disk: Arc<MemoryDisk>,
    server: TestServer,
    guest: Guest,
    /// By queue: the waiting write's head and the address of its status.
    waiting: [(u32, u64); 2],
}

impl Scene {
    fn new() -> Self {
        let disk = MemoryDisk::new(64);
        let server = TestServer::start(Arc::new(Shared(Arc::clone(&disk))), ServeOptions::new(4, 256));
        let mut guest = Guest::connect(&server.path, ALL);
        disk.full.store(true, Ordering::SeqCst);
        let waiting = [0, 1].map(|queue| {
            assert_eq!(guest.add_queue(32), queue);
            offer_write(&mut guest, queue)
        });
        until("both wait", || disk.held.load(Ordering::SeqCst) == 2);
        guest.read(0, 0, 512);
        Scene { disk, server, guest, waiting }
    }

    /// The waiting write of a queue has been answered, with an error.
    fn assert_failed(&mut self, queue: usize) {
        let (head, status) = self.waiting[queue];
        assert_eq!(self.guest.next_used(queue), (head, 1));
        assert_eq!(self.guest.get(status, 1), [IOERR]);
    }

    /// The waiting write of a queue keeps waiting, and is done once there is space.
    fn assert_waits(mut self, queue: usize) {
        let (head, status) = self.waiting[queue];
        let seen = self.guest.queues[queue].seen_used;
        assert!(never(|| self.guest.used_index(queue) != seen), "it waits");
        self.disk.full.store(false, Ordering::SeqCst);
        self.guest.kick(queue);
        assert_eq!(self.guest.next_used(queue), (head, 1));
        assert_eq!(self.guest.get(status, 1), [OK]);
        assert_eq!(self.guest.read(queue, 3, 512), pattern(512, 7));
    }
}

/// Does work that the session must answer while requests wait.
fn in_time<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(work);
    until(what, || thread.is_finished());
    thread.join().expect("it succeeds")
}

#[test]
fn a_stopped_ring_answers_what_waits_and_others_wait_on() {
    type Stop = fn(&mut Frontend, &VringConfigData);
    let stops: [(&str, Stop); 4] = [
        ("GET_VRING_BASE", |frontend, _| assert_eq!(frontend.get_vring_base(0).unwrap(), 2)),
        ("SET_VRING_ENABLE 0", |frontend, _| frontend.set_vring_enable(0, false).unwrap()),
        ("SET_VRING_KICK", |frontend, _| {
            frontend.set_vring_kick(0, &EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        }),
        ("SET_VRING_ADDR", |frontend, config| {
            let moved = VringConfigData { used_ring_addr: config.used_ring_addr + 64, ..*config };
            frontend.set_vring_addr(0, &moved).unwrap();
        }),
    ];
    for (name, stop) in stops {
        let mut scene = Scene::new();
        let (mut frontend, config) = (scene.guest.frontend.clone(), scene.guest.config(0));
        in_time(name, move || stop(&mut frontend, &config));
        scene.assert_failed(0);
        scene.assert_waits(1);
    }
}

#[test]
fn a_stop_of_all_rings_answers_all_waiting_requests() {
    type Stop = fn(&mut Frontend, [VhostUserMemoryRegionInfo; 2]);
    let stops: [(&str, Stop); 5] = [
        ("RESET_DEVICE", |frontend, _| frontend.reset_device().unwrap()),
        ("SET_FEATURES", |frontend, _| frontend.set_features(F_VERSION_1 | F_FLUSH | F_PROTOCOL).unwrap()),
        ("SET_MEM_TABLE", |frontend, regions| drop(frontend.set_mem_table(&regions).unwrap())),
        ("REM_MEM_REG", |frontend, regions| frontend.remove_mem_region(&regions[1]).unwrap()),
        ("SET_CONFIG", |frontend, _| {
            frontend.set_config(WRITEBACK, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
        }),
    ];
    for (name, stop) in stops {
        let mut scene = Scene::new();
        let (mut frontend, regions) = (scene.guest.frontend.clone(), [0, 1].map(|at| scene.guest.region(at)));
        in_time(name, move || stop(&mut frontend, regions));
        scene.assert_failed(0);
        scene.assert_failed(1);
    }
}

#[test]
fn messages_that_stop_no_ring_leave_requests_waiting() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    let config = guest.config(0);
    guest.frontend.set_features(ALL | F_PROTOCOL).unwrap();
    guest.frontend.set_vring_addr(0, &config).unwrap();
    guest.frontend.set_vring_call(0, &guest.queues[0].call).unwrap();
    let extra = memfd(REGION);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: EXTRA,
        memory_size: REGION,
        userspace_addr: USER + EXTRA,
        mmap_offset: 0,
        mmap_handle: extra.as_raw_fd(),
    };
    guest.frontend.add_mem_region(&region).unwrap();
    scene.assert_waits(0);
}

#[test]
fn a_frontend_that_leaves_is_answered_and_followed_by_the_next() {
    let scene = Scene::new();
    let (memory, used) = (scene.guest.memory.clone(), [0, 1].map(|queue| scene.guest.queues[queue].used));
    drop(scene.guest);
    let path = scene.server.path.clone();
    let mut next = in_time("the next session", move || Guest::connect(&path, ALL));
    assert_eq!(used.map(|used| memory.read_obj::<u16>(GuestAddress(used + 2)).unwrap()), [2, 1]);
    for (_, status) in scene.waiting {
        assert_eq!(memory.read_obj::<u8>(GuestAddress(status)).unwrap(), IOERR);
    }
    // The new session's queues wait again.
    let queue = next.add_queue(16);
    let (head, status) = offer_write(&mut next, queue);
    until("it waits", || scene.disk.held.load(Ordering::SeqCst) == 1);
    in_time("the server's stop", move || scene.server.finish()).unwrap();
    assert_eq!(next.next_used(queue), (head, 1));
    assert_eq!(next.get(status, 1), [IOERR]);
}

/// The frontend keeps the in-flight region, so whoever serves it next does again what waits now.
#[test]
fn requests_that_wait_at_the_end_of_a_session_stay_recorded() {
    let disk = MemoryDisk::new(LARGE / 512);
    let server = TestServer::start(Arc::new(Shared(Arc::clone(&disk))), ServeOptions::new(4, 256));
    let (mut guest, region) = Guest::connect_as_cloud(&server.path, ALL, &[32]);
    guest.write(0, 0, &pattern(512, 1));
    disk.full.store(true, Ordering::SeqCst);
    let waiting = [offer_write(&mut guest, 0), offer_write(&mut guest, 0)];
    let segments: Vec<u8> = (0..4).flat_map(|at| segment(10 + at, 1, 0)).collect();
    let data = guest.put(&segments);
    let discard = offer(&mut guest, 0, T_DISCARD, 0, data, segments.len() as u32);
    until("all wait", || disk.held.load(Ordering::SeqCst) == 6);
    guest.read(0, 0, 512);
    for _ in 0..2 {
        guest.reconnect(&server.path, Some(&region));
        until("they wait again", || disk.held.load(Ordering::SeqCst) == 6);
        let seen = guest.queues[0].seen_used;
        assert_eq!(guest.used_index(0), seen, "none was answered");
        guest.read(0, 0, 512);
    }
    disk.full.store(false, Ordering::SeqCst);
    guest.kick(0);
    let mut answered: Vec<_> = (0..3).map(|_| guest.next_used(0)).collect();
    answered.sort_unstable();
    let mut expected = [waiting[0], waiting[1], discard].map(|(head, _)| (head, 1));
    expected.sort_unstable();
    assert_eq!(answered, expected, "each is answered once");
    for (_, status) in [waiting[0], waiting[1], discard] {
        assert_eq!(guest.get(status, 1), [OK]);
    }
}

/// A frontend that asks for the base takes everything before it as done, so nothing may stay unanswered.
#[test]
fn requests_that_wait_are_answered_at_any_other_stop_with_a_region_too() {
    let disk = MemoryDisk::new(64);
    let server = TestServer::start(Arc::new(Shared(Arc::clone(&disk))), ServeOptions::new(4, 256));
    let (mut guest, _region) = Guest::connect_as_cloud(&server.path, ALL, &[32]);
    disk.full.store(true, Ordering::SeqCst);
    let (head, status) = offer_write(&mut guest, 0);
    until("it waits", || disk.held.load(Ordering::SeqCst) == 1);
    guest.read(0, 0, 512);
    assert_eq!(guest.frontend_base(0), 2);
    assert_eq!(guest.next_used(0), (head, 1));
    assert_eq!(guest.get(status, 1), [IOERR]);
}

#[test]
fn discards_of_many_segments_are_given_up_whole() {
    let mut scene = Scene::new();
    let segments: Vec<u8> = (0..SEGMENTS).flat_map(|at| segment(u64::from(at), 1, 0)).collect();
    let discards = [0, 1, 2, 3].map(|_| {
        let data = scene.guest.put(&segments);
        offer(&mut scene.guest, 0, T_DISCARD, 0, data, segments.len() as u32)
    });
    // The segments of the other discards wait in line for the slots of the first.
    until("the first's segments wait", || scene.disk.held.load(Ordering::SeqCst) == 2 + u64::from(SEGMENTS));
    scene.guest.read(0, 0, 512);
    let frontend = scene.guest.frontend.clone();
    assert_eq!(in_time("GET_VRING_BASE", move || frontend.get_vring_base(0).unwrap()), 7);
    scene.assert_failed(0);
    for (head, status) in discards {
        assert_eq!(scene.guest.next_used(0), (head, 1));
        assert_eq!(scene.guest.get(status, 1), [IOERR]);
    }
}

/// Reads and discards in pieces have slots of their own: a discard may free the very space.
#[test]
fn large_requests_pass_a_large_write_that_waits() {
    let disk = MemoryDisk::new(LARGE / 512);
    let server = TestServer::start(Arc::new(Shared(Arc::clone(&disk))), ServeOptions::new(1, 256));
    let mut guest = Guest::connect(&server.path, ALL);
    guest.add_queue(32);
    disk.full.store(true, Ordering::SeqCst);
    let mut offer_large = |kind: u32, flags: u16| {
        let (header, status) = (guest.header(kind, 0), guest.put(&[UNTOUCHED]));
        let mut parts = vec![(header, 16, 0)];
        parts.resize(1 + (LARGE / REGION) as usize, (REGION, REGION as u32, flags));
        parts.push((status, 1, WRITE));
        let head = guest.indirect_chain(0, &parts);
        guest.make_available(0, head);
        guest.kick(0);
        (u32::from(head), status)
    };
    let write = offer_large(T_OUT, 0);
    until("all slots of writes are taken", || disk.held.load(Ordering::SeqCst) == 32);
    let read = offer_large(T_IN, WRITE);
    assert_eq!(guest.next_used(0), (read.0, LARGE as u32 + 1));
    assert_eq!(guest.get(read.1, 1), [OK]);
    disk.full.store(false, Ordering::SeqCst);
    guest.kick(0);
    assert_eq!(guest.next_used(0), (write.0, 1));
    assert_eq!(guest.get(write.1, 1), [OK]);
}

#[test]
fn a_corrupt_ring_answers_what_waits() {
    let mut scene = Scene::new();
    let available = scene.guest.queues[0].available;
    scene.guest.write_u16(available + 2, 1000);
    scene.guest.kick(0);
    scene.assert_failed(0);
    until("the error signal", || scene.guest.queues[0].error.read().is_ok());
    scene.assert_waits(1);
}
