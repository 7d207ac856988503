//! The life of sessions and queues: start, stop, changes while running, and notifications.

mod kit;

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_blk::{Request, ServeOptions, Server, SessionError, StopHandle, serve};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const ALL: u64 = F_VERSION_1 | F_FLUSH | F_INDIRECT;
const NO_NOTIFY: u16 = 1;
const NO_INTERRUPT: u16 = 1;

fn start(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(4, 256))
}

/// Makes a read available without the kick: (head, status address).
fn offer_read(guest: &mut Guest, queue: usize) -> (u16, u64) {
    let (header, status, data) = (guest.header(T_IN, 0), guest.put(&[UNTOUCHED]), guest.alloc(512));
    let head = guest.chain(queue, &[(header, 16, 0), (data, 512, WRITE), (status, 1, WRITE)]);
    guest.make_available(queue, head);
    (head, status)
}

#[test]
fn both_indices_wrap() {
    for features in [ALL, ALL | F_EVENT_IDX] {
        let disk = MemoryDisk::new(64);
        let server = start(&disk);
        let mut guest = Guest::connect(&server.path, features);
        let queue = guest.add_queue(128);
        let (used, available) = (guest.queues[queue].used, guest.queues[queue].available);
        let mut interrupts = 0;
        let mut sent = 0u32;
        while sent < 66_000 {
            // To get one interrupt, for the last of these chains, a driver stores its wish before any interrupt.
            let before = guest.queues[queue].next_available;
            guest.write_u16(available + 4 + 2 * 128, before.wrapping_add(31));
            for _ in 0..32 {
                offer_read(&mut guest, queue);
                sent += 1;
            }
            guest.kick_if_wanted(queue, before);
            for _ in 0..32 {
                assert_eq!(guest.next_used(queue).1, 513);
            }
            if features & F_EVENT_IDX != 0 {
                let call = &guest.queues[queue].call;
                until("the interrupt", || call.read().is_ok_and(|count| count > 0));
                interrupts += 1;
            }
        }
        assert_eq!(guest.used_index(queue), sent as u16);
        assert_eq!(server.options.metrics.total().reads, u64::from(sent));
        if features & F_EVENT_IDX != 0 {
            assert!(server.options.metrics.total().interrupts <= interrupts, "one interrupt a batch at most");
            // The sleeping device wants a kick for the very next chain.
            let next = guest.queues[queue].next_available;
            until("the event index", || guest.read_u16(used + 4 + 8 * 128) == next);
        }
    }
}

#[test]
fn kicks_and_interrupts_are_suppressed() {
    let disk = MemoryDisk::later(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    let (used, available) = (guest.queues[queue].used, guest.queues[queue].available);
    guest.read(queue, 0, 512);
    until("an interrupt", || guest.queues[queue].call.read().is_ok());
    until("kicks are wanted while it sleeps", || guest.read_u16(used) & NO_NOTIFY == 0);
    guest.write_u16(available, NO_INTERRUPT);
    guest.read(queue, 0, 512);
    assert!(never(|| guest.queues[queue].call.read().is_ok()));
    guest.write_u16(available, 0);
    guest.read(queue, 0, 512);
    until("an interrupt", || guest.queues[queue].call.read().is_ok());
    // A new call descriptor on a running ring is raised at once: the last interrupt may have gone to the old one.
    let call = vmm_sys_util::eventfd::EventFd::new(libc_nonblock()).unwrap();
    guest.frontend.set_vring_call(queue, &call).unwrap();
    until("the new descriptor", || call.read().is_ok());
    guest.read(queue, 0, 512);
    until("the new descriptor", || call.read().is_ok());
    assert!(guest.queues[queue].call.read().is_err());
}

fn libc_nonblock() -> i32 {
    vmm_sys_util::eventfd::EFD_NONBLOCK
}

#[test]
fn an_idle_queue_sleeps() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    guest.read(queue, 0, 512);
    let sleeps = || server.options.metrics.total().sleeps;
    until("it sleeps", || sleeps() > 0);
    let before = sleeps();
    assert!(never(|| sleeps() > before + 1), "and stays asleep");
    guest.read(queue, 0, 512);
}

#[test]
fn kicks_for_nothing_are_paced() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    let wakes = |count: u64| {
        let goal = server.options.metrics.total().sleeps + count;
        until("it is woken", || {
            guest.kick(queue);
            server.options.metrics.total().sleeps >= goal
        });
    };
    wakes(100);
    let began = Instant::now();
    wakes(50);
    // Every wake but the first and the last certainly pauses for a millisecond.
    assert!(began.elapsed() >= Duration::from_millis(48), "{:?}", began.elapsed());
    guest.read(queue, 0, 512);
}

#[test]
fn get_vring_base_drains_and_the_queue_restarts() {
    let disk = MemoryDisk::later(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    disk.gate.close();
    for _ in 0..4 {
        offer_read(&mut guest, queue);
    }
    guest.kick(queue);
    disk.await_submitted(4);
    let mut frontend = guest.frontend.clone();
    let asked = std::thread::spawn(move || frontend_base(&mut frontend, queue));
    assert!(never(|| asked.is_finished()), "requests are in flight");
    disk.gate.open();
    assert_eq!(asked.join().unwrap(), 4);
    assert_eq!(guest.used_index(queue), 4, "drained before the reply");
    // A stopped queue takes and writes nothing.
    offer_read(&mut guest, queue);
    guest.kick(queue);
    assert!(never(|| guest.used_index(queue) != 4));
    guest.start_queue(queue, 4);
    for _ in 0..5 {
        assert_eq!(guest.next_used(queue).1, 513);
    }
    guest.read(queue, 0, 512);
    assert_eq!(guest.frontend_base(queue), 6);
    assert_eq!(guest.frontend_base(queue), 6, "once more");
    assert_eq!(guest.frontend_base(3), 0, "one that never ran");
}

fn frontend_base(frontend: &mut vhost::vhost_user::Frontend, queue: usize) -> u32 {
    frontend.get_vring_base(queue).unwrap()
}

#[test]
fn disabling_drains_and_flushes() {
    let disk = MemoryDisk::later(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    guest.write(queue, 0, &[1; 512]);
    guest.frontend.set_vring_enable(queue, false).unwrap();
    assert_eq!(disk.requests.lock().unwrap().last(), Some(&Request::Flush));
    offer_read(&mut guest, queue);
    guest.kick(queue);
    assert!(never(|| guest.used_index(queue) != 1));
    guest.frontend.set_vring_enable(queue, true).unwrap();
    assert_eq!(guest.next_used(queue).1, 513);
    guest.frontend.reset_device().unwrap();
    offer_read(&mut guest, queue);
    guest.kick(queue);
    assert!(never(|| guest.used_index(queue) != 2));
    guest.frontend.set_vring_enable(queue, true).unwrap();
    assert_eq!(guest.next_used(queue).1, 513);
}

#[test]
fn nothing_runs_half_configured() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    // A setup without addresses, and a chain that waits.
    let queue = guest.add_queue(16);
    guest.read(queue, 0, 512);
    guest.frontend_base(queue);
    let stray = vhost::VringConfigData { desc_table_addr: USER + EXTRA, ..guest.config(queue) };
    guest.frontend.set_vring_addr(queue, &stray).unwrap();
    guest.frontend.set_vring_kick(queue, &guest.queues[queue].kick).unwrap();
    offer_read(&mut guest, queue);
    guest.kick(queue);
    assert!(never(|| guest.used_index(queue) != 1), "the table is outside memory");
    guest.frontend.set_vring_addr(queue, &guest.config(queue)).unwrap();
    assert_eq!(guest.next_used(queue).1, 513, "kick before address");
    // While the queue runs, its size and its base stay.
    assert!(guest.frontend.set_vring_num(queue, 32).is_err());
    assert!(guest.frontend.set_vring_base(queue, 0).is_err());
    assert!(guest.frontend.set_vring_num(queue, 16).is_ok());
    guest.frontend.set_vring_addr(queue, &guest.config(queue)).unwrap();
    guest.frontend.set_features(ALL | F_PROTOCOL | 1 << 26).unwrap();
    guest.read(queue, 0, 512);
    // Another kick descriptor.
    guest.queues[queue].kick = vmm_sys_util::eventfd::EventFd::new(libc_nonblock()).unwrap();
    guest.frontend.set_vring_kick(queue, &guest.queues[queue].kick).unwrap();
    guest.read(queue, 0, 512);
}

#[test]
fn a_frontend_without_protocol_features() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::bare(UnixStream::connect(&server.path).unwrap());
    guest.frontend.set_owner().unwrap();
    guest.frontend.get_features().unwrap();
    guest.frontend.set_features(F_FLUSH).unwrap();
    guest.features = F_FLUSH;
    // In the wrong order.
    let regions = [guest.region(1), guest.region(0)];
    guest.frontend.set_mem_table(&regions).unwrap();
    let queue = guest.add_queue(16);
    guest.write(queue, 0, &[3; 512]);
    assert_eq!(guest.read(queue, 0, 512), [3; 512]);
}

#[test]
fn disconnect_in_flight_then_the_next_session() {
    let disk = MemoryDisk::later(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    disk.gate.close();
    let data = pattern(512, 8);
    let (header, at) = (guest.header(T_OUT, 9), guest.put(&data));
    let status = guest.put(&[UNTOUCHED]);
    let head = guest.chain(queue, &[(header, 16, 0), (at, 512, 0), (status, 1, WRITE)]);
    guest.make_available(queue, head);
    guest.kick(queue);
    disk.await_submitted(1);
    let memory: GuestMemoryMmap<()> = guest.memory.clone();
    let used = guest.queues[queue].used;
    drop(guest);
    disk.gate.open();
    let mut next = Guest::connect(&server.path, ALL);
    let queue = next.add_queue(16);
    assert_eq!(next.read(queue, 9, 512), data, "what was taken was done");
    assert_eq!(memory.read_obj::<u16>(GuestAddress(used + 2)).unwrap(), 1, "and answered");
    for _ in 0..20 {
        drop(next);
        next = Guest::connect(&server.path, ALL);
        let queue = next.add_queue(16);
        next.read(queue, 9, 512);
    }
}

#[test]
fn memory_changes_while_queues_run() {
    let disk = MemoryDisk::later(1024);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    let data = pattern(4096, 5);
    guest.write(queue, 0, &data);

    // With a request in flight, memory is added, and the next request uses it.
    disk.gate.close();
    offer_read(&mut guest, queue);
    guest.kick(queue);
    disk.await_submitted(2);
    let extra = memfd(REGION);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: EXTRA,
        memory_size: REGION,
        userspace_addr: USER + EXTRA,
        mmap_offset: 0,
        mmap_handle: extra.as_raw_fd(),
    };
    guest.frontend.add_mem_region(&region).unwrap();
    let (header, status) = (guest.header(T_IN, 0), guest.put(&[UNTOUCHED]));
    let head = guest.chain(queue, &[(header, 16, 0), (EXTRA + 100, 4096, WRITE), (status, 1, WRITE)]);
    guest.make_available(queue, head);
    guest.kick(queue);
    disk.await_submitted(3);

    // Memory is removed only once no request uses it.
    let mut frontend = guest.frontend.clone();
    let gone = std::thread::spawn(move || frontend.remove_mem_region(&region).unwrap());
    assert!(never(|| gone.is_finished()), "a request writes to it");
    disk.gate.open();
    gone.join().unwrap();
    assert_eq!(guest.next_used(queue).1, 513);
    assert_eq!(guest.next_used(queue), (u32::from(head), 4097));
    let mut read = vec![0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&extra, &mut read, 100).unwrap();
    assert_eq!(read, data);
    let (header, status) = (guest.header(T_IN, 0), guest.put(&[UNTOUCHED]));
    let head = guest.chain(queue, &[(header, 16, 0), (EXTRA + 100, 4096, WRITE), (status, 1, WRITE)]);
    assert_eq!(guest.run(queue, head), 1);
    assert_eq!(guest.get(status, 1), [IOERR], "it is gone");

    // The same table is set again while requests arrive: none is lost, none is done twice.
    let frontend = guest.frontend.clone();
    let regions = [guest.region(0), guest.region(1)];
    let changer = std::thread::spawn(move || {
        for _ in 0..50 {
            frontend.set_mem_table(&regions).unwrap();
        }
    });
    let before = guest.used_index(queue);
    let mut count: u16 = 0;
    while !changer.is_finished() || count < 100 {
        guest.read(queue, 0, 512);
        count += 1;
    }
    changer.join().unwrap();
    assert_eq!(guest.used_index(queue).wrapping_sub(before), count);

    // A table without the rings stops them; with a table that has them, they go on.
    guest.frontend.set_mem_table(&[guest.region(1)]).unwrap();
    offer_read(&mut guest, queue);
    guest.kick(queue);
    let stopped = guest.queues[queue].seen_used;
    assert!(never(|| guest.used_index(queue) != stopped));
    guest.frontend.set_mem_table(&regions).unwrap();
    assert_eq!(guest.next_used(queue).1, 513);
}

#[test]
fn a_stop_ends_everything_at_once() {
    let disk = MemoryDisk::later(64);
    // Without a connection.
    start(&disk).finish().unwrap();
    // In the middle of a session with a request in flight, which is drained.
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(16);
    disk.gate.close();
    offer_read(&mut guest, queue);
    guest.kick(queue);
    disk.await_submitted(1);
    let ending = std::thread::spawn(move || server.finish());
    assert!(never(|| ending.is_finished()), "a request is in flight");
    disk.gate.open();
    ending.join().unwrap().unwrap();
    assert_eq!(guest.next_used(queue).1, 513);
    assert!(guest.frontend.get_features().is_err(), "closed");
    // In the middle of a message, or just before its first bytes are taken.
    for _ in 0..10 {
        let server = start(&disk);
        let mut stream = UnixStream::connect(&server.path).unwrap();
        std::io::Write::write_all(&mut stream, &[1, 0, 0, 0, 1]).unwrap();
        std::thread::yield_now();
        server.finish().unwrap();
    }
}

#[test]
fn sockets_are_replaced_only_when_stale() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.sock");
    let living = UnixListener::bind(&path).unwrap();
    assert!(matches!(Server::bind(&path), Err(SessionError::SocketInUse { .. })));
    drop(living);
    let server = Server::bind(&path).expect("nobody listens any more");
    assert!(matches!(Server::bind(&path), Err(SessionError::SocketInUse { .. })));
    drop(server);
    assert!(!path.exists(), "removed with its server");
    let server = Server::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "another's").unwrap();
    drop(server);
    assert!(path.exists(), "not ours any more");
    assert!(matches!(Server::bind(&path), Err(SessionError::NotASocket { .. })));
    assert!(Server::bind(directory.path().join("none/disk.sock")).is_err());
}

#[test]
fn inherited_sockets() {
    let disk = Arc::new(Shared(MemoryDisk::new(64)));
    let options = ServeOptions { poll_max: Duration::ZERO, ..ServeOptions::new(2, 128) };
    // A connected socket serves one session and then ends.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::from_inherited(ours.as_raw_fd()).unwrap();
    let (device, its_options) = (Arc::clone(&disk), options.clone());
    let thread =
        std::thread::spawn(move || serve(&server, device, &its_options, &StopHandle::new().unwrap()));
    let mut guest = Guest::negotiate(theirs, ALL);
    guest.add_queue(16);
    guest.read(0, 0, 512);
    drop(guest);
    thread.join().unwrap().unwrap();
    // A listening socket serves until a stop, even a stop before it begins.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::from_fd(listener.into()).unwrap();
    let stop = StopHandle::new().unwrap();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| serve(&server, Arc::clone(&disk), &options, &stop));
        for _ in 0..2 {
            let mut guest = Guest::connect(&path, ALL);
            guest.add_queue(16);
            guest.read(0, 0, 512);
        }
        stop.stop();
        running.join().unwrap().unwrap();
    });
    serve(&server, Arc::clone(&disk), &options, &stop).expect("stopped before it began");
    // Neither listening nor connected.
    assert!(Server::from_fd(memfd(0).into()).is_err());
    assert!(Server::from_inherited(-1).is_err());
    // Invalid options.
    for (queues, size) in [(0, 128), (257, 128), (1, 0), (1, 100), (1, 1)] {
        let options = ServeOptions::new(queues, size);
        assert!(matches!(
            serve(&server, Arc::clone(&disk), &options, &stop),
            Err(SessionError::Option { .. })
        ));
    }
}
