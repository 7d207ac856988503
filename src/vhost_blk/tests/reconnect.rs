//! A frontend that keeps the in-flight region and connects again after a session that ended with requests in
//! flight. The worker of that session dies as a killed daemon does. The disk may or may not have carried requests
//! out, and the guest has no answer to them.

mod kit;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kit::TestServer;
use kit::cloud::InFlight;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::packed::Place;
use kit::raw::{self, Raw, Reply};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost_blk::{Request, ServeOptions};

const ALL: u64 = F_VERSION_1 | F_FLUSH | F_INDIRECT | F_EVENT_IDX | F_CONFIG_WCE;
/// With split and with packed rings.
const KINDS: [u64; 2] = [ALL, ALL | F_PACKED];
/// The offset of the `writeback` byte in the configuration space.
const WRITEBACK: u32 = 32;
/// Bytes of a large request: more than a queue may have in flight.
const LARGE: u64 = 64 << 20;

fn serve(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(4, 256))
}

/// A daemon, and a guest that begins as Cloud Hypervisor does, with queues of these sizes.
fn serve_cloud(disk: &Arc<MemoryDisk>, sizes: &[u16]) -> (TestServer, Guest, InFlight) {
    serve_with(disk, ALL, sizes)
}

fn serve_with(disk: &Arc<MemoryDisk>, features: u64, sizes: &[u16]) -> (TestServer, Guest, InFlight) {
    let server = serve(disk);
    let (guest, region) = Guest::connect_as_cloud(&server.path, features, sizes);
    (server, guest, region)
}

/// A write of one sector that is not made available yet.
struct Write {
    head: u16,
    status: u64,
    sector: u64,
}

fn write_of(guest: &mut Guest, queue: usize, sector: u64) -> Write {
    let (header, data) = (guest.header(T_OUT, sector), guest.put(&pattern(512, sector as u8)));
    let status = guest.put(&[UNTOUCHED]);
    let head = guest.chain(queue, &[(header, 16, 0), (data, 512, 0), (status, 1, WRITE)]);
    Write { head, status, sector }
}

fn offset_of(write: &Write) -> u64 {
    write.sector * 512
}

/// The offsets of the writes that the disk carried out, in order, since the last call.
fn take_writes(disk: &MemoryDisk) -> Vec<u64> {
    let requests = std::mem::take(&mut *disk.requests.lock().unwrap());
    let offset = |request| match request {
        Request::Write { offset, .. } => Some(offset),
        _ => None,
    };
    requests.into_iter().filter_map(offset).collect()
}

/// Whether the only request of the disk since the last call, a write, was to be durable before its answer. A cache that is
/// turned off is flushed before it.
fn take_write_through(disk: &MemoryDisk) -> bool {
    let mut requests = std::mem::take(&mut *disk.requests.lock().unwrap());
    requests.retain(|request| *request != Request::Flush);
    match requests[..] {
        [Request::Write { write_through, .. }] => write_through,
        ref other => panic!("not one write: {other:?}"),
    }
}

/// Lets the worker of a queue die at the next request that it takes, which is `last`.
fn die(disk: &MemoryDisk, guest: &mut Guest, queue: usize, last: &Write) {
    disk.trap.store(true, Ordering::SeqCst);
    guest.make_available(queue, last.head);
    guest.kick(queue);
    until("it has died", || !disk.trap.load(Ordering::SeqCst));
    // What the disk has goes on, as after a kill; it is complete before the session ends.
    disk.gate.open();
    until("its error is signalled", || guest.queues[queue].error.read().is_ok());
}

/// The statuses of these writes by head, as the used ring hands them back; each must come once.
fn answers(guest: &mut Guest, queue: usize, writes: &[Write]) -> Vec<(u16, u8)> {
    let mut answers: Vec<_> = writes
        .iter()
        .map(|_| {
            let (head, written) = guest.next_used(queue);
            assert_eq!(written, 1);
            let write = writes.iter().find(|write| u32::from(write.head) == head).expect("one of them");
            (write.head, guest.get(write.status, 1)[0])
        })
        .collect();
    let seen = guest.queues[queue].seen_used;
    assert!(never(|| guest.used_index(queue) != seen), "one more than was sent");
    answers.sort_unstable();
    answers
}

fn all_done(writes: &[Write]) -> Vec<(u16, u8)> {
    let mut expected: Vec<_> = writes.iter().map(|write| (write.head, OK)).collect();
    expected.sort_unstable();
    expected
}

#[test]
fn requests_in_flight_are_done_again_in_their_order_and_answered_once() {
    for features in KINDS {
        let disk = MemoryDisk::later(64);
        let (server, mut guest, region) = serve_with(&disk, features, &[32, 32]);
        for (queue, before) in [(0, 0), (1, 3)] {
            // Some requests before, so that the base is not 0.
            for sector in 0..before {
                guest.write(queue, sector, &pattern(512, 1));
            }
            take_writes(&disk);
            // Taken in another order than that of their heads.
            let mut writes: Vec<_> = (0..6).map(|sector| write_of(&mut guest, queue, 10 + sector)).collect();
            writes.swap(0, 4);
            writes.swap(1, 2);
            // The first two are answered, and with them descriptors may be in use again.
            for write in writes.drain(..2).collect::<Vec<_>>() {
                assert_eq!(guest.run(queue, write.head), 1);
            }
            take_writes(&disk);
            let sent = disk.submitted.load(Ordering::SeqCst);
            disk.gate.close();
            for write in &writes[..3] {
                guest.make_available(queue, write.head);
            }
            guest.kick(queue);
            disk.await_submitted(sent + 3);
            die(&disk, &mut guest, queue, &writes[3]);
            assert_eq!(guest.used_index(queue), guest.queues[queue].seen_used, "no answer yet");
            // One more comes while nobody serves.
            writes.push(write_of(&mut guest, queue, 20));
            guest.make_available(queue, writes[4].head);
            guest.reconnect(&server.path, Some(&region));
            assert_eq!(answers(&mut guest, queue, &writes), all_done(&writes));
            let done = take_writes(&disk);
            let again: Vec<_> = writes.iter().map(offset_of).collect();
            assert_eq!(
                done[done.len() - 5..],
                again,
                "after the three that the dead worker's disk had: {done:?}"
            );
            for write in &writes {
                assert_eq!(guest.read(queue, write.sector, 512), pattern(512, write.sector as u8));
            }
        }
    }
}

/// The wait for the disk ends once. In the poll after that the queue takes the disk, and no completion follows.
#[test]
fn requests_in_flight_are_done_again_when_the_disk_is_there_again() {
    for features in KINDS {
        let disk = MemoryDisk::later(64);
        let (server, mut guest, region) = serve_with(&disk, features, &[32]);
        disk.gate.close();
        let writes: Vec<_> = (0..4).map(|sector| write_of(&mut guest, 0, 10 + sector)).collect();
        for write in &writes[..3] {
            guest.make_available(0, write.head);
        }
        guest.kick(0);
        disk.await_submitted(3);
        die(&disk, &mut guest, 0, &writes[3]);
        disk.shut();
        guest.reconnect(&server.path, Some(&region));
        until("the queue has let the disk go", || disk.outside.load(Ordering::SeqCst) == 1);
        assert_eq!(guest.used_index(0), guest.queues[0].seen_used, "no answer yet");
        disk.unshut();
        assert_eq!(answers(&mut guest, 0, &writes), all_done(&writes));
    }
}

#[test]
fn a_worker_may_die_again_and_again() {
    for features in KINDS {
        let disk = MemoryDisk::later(64);
        let (server, mut guest, region) = serve_with(&disk, features, &[16]);
        let mut writes = Vec::new();
        for round in 0..4 {
            let sent = disk.submitted.load(Ordering::SeqCst);
            let write = write_of(&mut guest, 0, round);
            disk.gate.close();
            if round > 0 {
                guest.reconnect(&server.path, Some(&region));
                disk.await_submitted(sent + round);
            }
            die(&disk, &mut guest, 0, &write);
            writes.push(write);
        }
        take_writes(&disk);
        guest.reconnect(&server.path, Some(&region));
        assert_eq!(answers(&mut guest, 0, &writes), all_done(&writes));
        assert_eq!(take_writes(&disk), writes.iter().map(offset_of).collect::<Vec<_>>());
    }
}

#[test]
fn chains_in_flight_are_checked_like_any_other() {
    let disk = MemoryDisk::later(64);
    let (server, mut guest, region) = serve_cloud(&disk, &[16]);
    let writes: Vec<_> = (0..3).map(|sector| write_of(&mut guest, 0, sector)).collect();
    disk.gate.close();
    guest.make_available(0, writes[0].head);
    guest.make_available(0, writes[1].head);
    guest.kick(0);
    disk.await_submitted(2);
    die(&disk, &mut guest, 0, &writes[2]);
    // Meanwhile the guest has made a loop of one, and moved another out of its memory.
    let table = guest.queues[0].descriptors;
    guest.descriptor(table, writes[0].head, DATA, 16, NEXT, writes[0].head);
    guest.descriptor(table, writes[1].head + 1, 1 << 40, 512, NEXT, writes[1].head + 2);
    guest.reconnect(&server.path, Some(&region));
    let mut seen: Vec<_> = (0..3).map(|_| guest.next_used(0)).collect();
    seen.sort_unstable();
    let head = |write: &Write| u32::from(write.head);
    assert_eq!(seen, [(head(&writes[0]), 0), (head(&writes[1]), 1), (head(&writes[2]), 1)]);
    let status = |write: &Write| guest.get(write.status, 1)[0];
    assert_eq!([status(&writes[0]), status(&writes[1]), status(&writes[2])], [UNTOUCHED, IOERR, OK]);
}

/// Makes a large read available. Returns its head and the address of its status.
fn send_large_read(guest: &mut Guest) -> (u32, u64) {
    let read = guest.offer_large_read(0, LARGE);
    guest.kick(0);
    read
}

/// A large request is not wholly at the disk when its session ends, so it goes back into the ring.
#[test]
fn a_request_that_went_back_into_the_ring_is_answered_once() {
    for features in KINDS {
        let disk = MemoryDisk::later(LARGE / 512);
        let (server, mut guest, region) = serve_with(&disk, features, &[16]);
        guest.write(0, 0, &pattern(512, 1));
        disk.gate.close();
        let (head, status) = send_large_read(&mut guest);
        disk.await_submitted(2);
        guest.hang_up();
        disk.gate.open();
        guest.leave(&server.path);
        assert_eq!((guest.used_index(0), guest.get(status, 1)), (1, vec![UNTOUCHED]), "not answered");
        guest.reconnect(&server.path, Some(&region));
        assert_eq!(guest.next_used(0), (head, LARGE as u32 + 1));
        assert_eq!(guest.get(status, 1), [OK]);
        guest.write(0, 0, &pattern(512, 1));
    }
}

/// A request that is done again has no place in the ring to go back to, and the guest may have made it very large. A
/// session that ends does not wait for all of it: it stays recorded, and the next session does it.
#[test]
fn a_large_request_that_is_done_again_is_left_to_the_next_session() {
    for features in KINDS {
        let disk = MemoryDisk::later(LARGE / 512);
        let (server, mut guest, region) = serve_with(&disk, features, &[16]);
        guest.write(0, 0, &pattern(512, 1));
        disk.gate.close();
        let (head, status) = send_large_read(&mut guest);
        disk.await_submitted(2);
        disk.trap.store(true, Ordering::SeqCst);
        disk.gate.open();
        until("it has died at a later piece", || guest.queues[0].error.read().is_ok());
        disk.gate.close();
        let sent = disk.submitted.load(Ordering::SeqCst);
        guest.reconnect(&server.path, Some(&region));
        disk.await_submitted(sent + 1);
        guest.hang_up();
        // Nothing shows when the session has noticed that; a disk in memory would do the whole request meanwhile.
        std::thread::sleep(std::time::Duration::from_millis(300));
        disk.gate.open();
        guest.leave(&server.path);
        let whole = LARGE.div_ceil(2 << 20);
        assert!(disk.submitted.load(Ordering::SeqCst) - sent < whole, "the disk never got all of it");
        assert_eq!((guest.used_index(0), guest.get(status, 1)), (1, vec![UNTOUCHED]));
        guest.reconnect(&server.path, Some(&region));
        assert_eq!(guest.next_used(0), (head, LARGE as u32 + 1));
        assert_eq!((guest.used_index(0), guest.get(status, 1)), (2, vec![OK]));
    }
}

#[test]
fn a_session_that_ends_in_order_leaves_nothing_in_flight() {
    let disk = MemoryDisk::new(64);
    let (server, mut guest, region) = serve_cloud(&disk, &[16]);
    for round in 0..5 {
        for sector in 0..7 {
            guest.write(0, sector, &pattern(512, round));
        }
        take_writes(&disk);
        guest.reconnect(&server.path, Some(&region));
        assert!(never(|| !take_writes(&disk).is_empty()));
    }
    // A ring that begins anew, with the region of the old one.
    assert_eq!(guest.frontend_base(0), 35);
    guest.clear_rings(0);
    guest.start_queue(0, 0);
    guest.write(0, 1, &pattern(512, 9));
    assert_eq!(guest.read(0, 1, 512), pattern(512, 9));
}

/// A packed ring has its place nowhere in guest memory. The region keeps it, until the frontend has asked for it.
#[test]
fn a_packed_ring_goes_on_where_it_was() {
    let disk = MemoryDisk::new(64);
    let (server, mut guest, region) = serve_with(&disk, ALL | F_PACKED, &[13]);
    for round in 0..5 {
        for sector in 0..7 {
            guest.write(0, sector, &pattern(512, round));
        }
        take_writes(&disk);
        // The frontend has the base of the first start.
        guest.reconnect(&server.path, Some(&region));
        assert!(never(|| !take_writes(&disk).is_empty()));
    }
    let place = u32::from(guest.queues[0].next_available);
    assert_eq!(guest.frontend_base(0), place | place << 16);
    // The same ring goes on.
    guest.start_queue(0, place as u16);
    guest.write(0, 1, &pattern(512, 8));
    // A ring that begins anew, with the region of the old one: in this session, and in the next.
    guest.frontend_base(0);
    guest.clear_rings(0);
    guest.start_queue(0, Place::START.bits());
    guest.write(0, 1, &pattern(512, 9));
    guest.frontend_base(0);
    guest.clear_rings(0);
    guest.reconnect(&server.path, Some(&region));
    assert_eq!(guest.read(0, 1, 512), pattern(512, 9));
}

/// In a packed ring what is handed back may overwrite a chain in flight, so it is done again as it was recorded.
#[test]
fn chains_of_a_packed_ring_are_done_again_as_they_were_taken() {
    let disk = MemoryDisk::later(64);
    let (server, mut guest, region) = serve_with(&disk, ALL | F_PACKED, &[16]);
    let writes: Vec<_> = (0..3).map(|sector| write_of(&mut guest, 0, sector)).collect();
    disk.gate.close();
    guest.make_available(0, writes[0].head);
    guest.make_available(0, writes[1].head);
    guest.kick(0);
    disk.await_submitted(2);
    die(&disk, &mut guest, 0, &writes[2]);
    // All but the flags, as the device does when it hands something back.
    for descriptor in 0..9 {
        guest.put_at(guest.queues[0].descriptors + 16 * descriptor, &[0xff; 12]);
    }
    take_writes(&disk);
    guest.reconnect(&server.path, Some(&region));
    assert_eq!(answers(&mut guest, 0, &writes), all_done(&writes));
    assert_eq!(take_writes(&disk), writes.iter().map(offset_of).collect::<Vec<_>>());
}

/// The region of one kind of rings is no record for the other kind.
#[test]
fn a_ring_does_not_start_with_a_region_for_the_other_kind() {
    for (before, after) in [(ALL, ALL | F_PACKED), (ALL | F_PACKED, ALL)] {
        let disk = MemoryDisk::new(64);
        let (server, mut guest, _) = serve_with(&disk, before, &[16]);
        guest.write(0, 0, &pattern(512, 1));
        guest.frontend_base(0);
        guest.frontend.set_features(after | F_PROTOCOL).expect("features");
        guest.features = after;
        guest.queues.clear();
        guest.add_stopped_queue(16);
        guest.clear_rings(0);
        let base = guest.queues[0].next_available;
        guest.start_queue(0, base);
        assert!(guest.queues[0].error.read().is_ok(), "its error is signalled");
        drop(server);
    }
}

#[test]
fn a_base_that_skips_requests_is_not_believed() {
    let disk = MemoryDisk::new(64);
    let (server, mut guest, region) = serve_cloud(&disk, &[16]);
    guest.write(0, 0, &pattern(512, 1));
    // The session is over, and the guest goes on.
    guest.leave(&server.path);
    let writes: Vec<_> = (1..4).map(|sector| write_of(&mut guest, 0, sector)).collect();
    for write in &writes {
        guest.make_available(0, write.head);
    }
    guest.reconnect(&server.path, Some(&region));
    assert_eq!(answers(&mut guest, 0, &writes), all_done(&writes));
}

fn set_writeback(guest: &mut Guest, on: bool) {
    guest.frontend.set_config(WRITEBACK, VhostUserConfigFlags::WRITABLE, &[u8::from(on)]).expect("it may");
}

#[test]
fn the_write_cache_stays_as_the_guest_set_it() {
    let disk = MemoryDisk::new(64);
    let (server, mut guest, region) = serve_cloud(&disk, &[16]);
    guest.write(0, 0, &pattern(512, 1));
    assert!(!take_write_through(&disk), "the cache is on at first");
    for on in [false, true, false] {
        set_writeback(&mut guest, on);
        for _ in 0..2 {
            guest.reconnect(&server.path, Some(&region));
            take_writes(&disk);
            guest.write(0, 0, &pattern(512, 1));
            assert_eq!(take_write_through(&disk), !on);
            assert_eq!(guest.read_config(WRITEBACK, 1), Some(vec![u8::from(on)]));
        }
    }
}

#[test]
fn a_cache_that_was_never_set_stays_on_whether_the_session_ends_or_dies() {
    let disk = MemoryDisk::later(64);
    let (server, mut guest, region) = serve_cloud(&disk, &[16]);
    guest.write(0, 0, &pattern(512, 1));
    guest.reconnect(&server.path, Some(&region));
    take_writes(&disk);
    guest.write(0, 0, &pattern(512, 1));
    assert!(!take_write_through(&disk), "after an end in good order");
    let write = write_of(&mut guest, 0, 1);
    die(&disk, &mut guest, 0, &write);
    guest.reconnect(&server.path, Some(&region));
    guest.next_used(0);
    assert!(!take_write_through(&disk), "after a death");
}

#[test]
fn a_ring_that_resumes_without_a_record_begins_in_write_through() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    for (features, write_through) in [(ALL, true), (ALL & !F_CONFIG_WCE, false)] {
        let (mut guest, _) = Guest::connect_as_cloud(&server.path, features, &[16, 16]);
        guest.write(0, 0, &pattern(512, 1));
        assert!(!take_write_through(&disk), "a new ring");
        // In the same session nothing is unknown.
        assert_eq!(guest.frontend_base(0), 1);
        guest.start_queue(0, 1);
        guest.write(0, 0, &pattern(512, 1));
        assert!(!take_write_through(&disk), "in the same session");
        guest.reconnect(&server.path, None);
        // Also the other ring, which is new: the cache is the disk's.
        for queue in [0, 1] {
            guest.write(queue, 0, &pattern(512, 1));
            assert_eq!(take_write_through(&disk), write_through);
        }
        if write_through {
            assert_eq!(guest.read_config(WRITEBACK, 1), Some(vec![0]));
            set_writeback(&mut guest, true);
            guest.write(0, 0, &pattern(512, 1));
            assert!(!take_write_through(&disk), "the guest knows better");
        }
    }
}

/// A guest with two queues whose first worker has died with requests 0 and 1 in flight, of five.
fn died(disk: &Arc<MemoryDisk>, server: &TestServer) -> (Guest, InFlight) {
    let (mut guest, region) = Guest::connect_as_cloud(&server.path, ALL, &[16, 16]);
    let writes: Vec<_> = (0..5).map(|sector| write_of(&mut guest, 0, sector)).collect();
    let sent = disk.submitted.load(Ordering::SeqCst);
    disk.gate.close();
    guest.make_available(0, writes[0].head);
    guest.kick(0);
    disk.await_submitted(sent + 1);
    die(disk, &mut guest, 0, &writes[1]);
    writes[2..].iter().for_each(|write| guest.make_available(0, write.head));
    (guest, region)
}

/// The guest begins anew, so the region must not hold what an earlier ring had in flight.
#[test]
fn a_reset_empties_the_record() {
    let disk = MemoryDisk::later(64);
    let server = serve(&disk);
    let (mut guest, region) = died(&disk, &server);
    guest.frontend.reset_owner().expect("a reset");
    guest.clear_rings(0);
    let writes = [write_of(&mut guest, 0, 9)];
    guest.make_available(0, writes[0].head);
    guest.reconnect(&server.path, Some(&region));
    assert_eq!(answers(&mut guest, 0, &writes), all_done(&writes));
}

#[test]
fn hostile_contents_stop_one_queue_at_most() {
    // Offsets in queue 0's area: its header (features, version, desc_num, last_batch_head, used_idx), then states of 16
    // bytes each (inflight, padding, next, counter).
    let state = |head: u64| 16 + 16 * head;
    let cases: [(&str, u64, &[u8]); 9] = [
        ("features", 0, &[1]),
        ("version", 8, &[7, 0]),
        ("more states than there are", 10, &[0xff, 0xff]),
        ("a batch that is longer than the ring", 14, &[0, 0x80]),
        ("a batch with a descriptor that does not exist", 12, &[0xff, 0xff, 0xfd, 0xff]),
        ("a batch that is a loop", 12, &[0, 0, 0xfd, 0xff]),
        ("the same counter twice", state(3) + 8, &[0]),
        ("a state that does not exist", state(7), &[0xff]),
        ("a counter without a successor", state(0) + 8, &[0xff; 8]),
    ];
    let disk = MemoryDisk::later(64);
    let server = serve(&disk);
    for (name, at, bytes) in cases {
        let (mut guest, region) = died(&disk, &server);
        region.file.write_all_at(bytes, at).expect("its own file");
        guest.reconnect(&server.path, Some(&region));
        until(name, || guest.queues[0].error.read().is_ok());
        assert_eq!(guest.used_index(0), 0, "{name}: not served");
        guest.write(1, 9, &pattern(512, 2));
        assert_eq!(guest.read(1, 9, 512), pattern(512, 2), "{name}: the other queue is served");
    }
    // More in flight than the guest has made available.
    let (mut guest, region) = died(&disk, &server);
    region.file.write_all_at(&[1], state(9)).expect("its own file");
    region.file.write_all_at(&[1], state(11)).expect("its own file");
    region.file.write_all_at(&[9], state(9) + 8).expect("its own file");
    region.file.write_all_at(&[8], state(11) + 8).expect("its own file");
    guest.queues[0].next_available = 3;
    guest.write_u16(guest.queues[0].available + 2, 3);
    guest.reconnect(&server.path, Some(&region));
    until("too many in flight", || guest.queues[0].error.read().is_ok());
}

/// The payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD, in the bytes of struct VhostUserInflight.
fn payload(bytes: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    let mut payload = [bytes.to_ne_bytes(), offset.to_ne_bytes()].concat();
    payload.extend(queues.to_ne_bytes());
    payload.extend(size.to_ne_bytes());
    payload.resize(size_of::<VhostUserInflight>(), 0);
    payload
}

fn negotiated(server: &TestServer) -> Raw {
    let mut raw = Raw::negotiated(&server.path);
    // MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD.
    assert_eq!(raw.ask(raw::SET_PROTOCOL_FEATURES, &0x1209u64.to_ne_bytes(), &[]).number(), Some(0));
    raw
}

#[test]
fn numbers_in_the_messages_are_bounded() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    for (queues, size) in [(5, 128), (1, 257), (u16::MAX, u16::MAX), (0, 128), (1, 0)] {
        let mut raw = negotiated(&server);
        let reply = raw.ask(raw::GET_INFLIGHT_FD, &payload(0, 0, queues, size), &[]);
        assert_eq!(reply, Reply::Closed, "{queues} queues of {size}");
    }
    let mut raw = negotiated(&server);
    let file = memfd(1 << 20);
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").expect("/dev/null");
    let cases = [
        (payload(0, 0, 1, 128), &file),
        (payload(1 << 20, 4096, 1, 128), &file),
        (payload(u64::MAX, 1, 1, 128), &file),
        (payload(1 << 20, u64::MAX - 4095, 1, 128), &file),
        (payload(4096, 100, 1, 128), &file),
        (payload(4096, 0, 4, 256), &file),
        (payload(1 << 20, 0, 5, 128), &file),
        (payload(1 << 20, 0, 1, 512), &file),
        (payload(4096, 0, 1, 128), &null),
    ];
    for (payload, file) in cases {
        let refused = raw.ask(raw::SET_INFLIGHT_FD, &payload, &[file.as_raw_fd()]).number();
        assert_eq!(refused, Some(1), "{payload:?}");
    }
    assert_eq!(
        raw.ask(raw::SET_INFLIGHT_FD, &payload(1 << 20, 0, 4, 256), &[file.as_raw_fd()]).number(),
        Some(0)
    );
    assert!(raw.lives());
}

#[test]
fn a_region_that_is_truncated_ends_the_session_and_nothing_else() {
    let disk = MemoryDisk::new(64);
    let (server, mut guest, region) = serve_cloud(&disk, &[16]);
    assert!(region.file.set_len(0).is_err(), "the one that was handed out is sealed");
    // A region of the frontend's own, which it may cut.
    let file = memfd(1 << 20);
    let message = VhostUserInflight::new(1 << 20, 0, 1, 16);
    guest.frontend.set_inflight_fd(&message, file.as_raw_fd()).expect("a region");
    guest.write(0, 0, &pattern(512, 1));
    file.set_len(0).expect("it is cut");
    let write = write_of(&mut guest, 0, 1);
    guest.make_available(0, write.head);
    guest.kick(0);
    until("the session has ended", || guest.frontend.get_features().is_err());
    assert_eq!(guest.used_index(0), 1, "the request is not reported as done");
    let (mut next, _) = Guest::connect_as_cloud(&server.path, ALL, &[16]);
    next.write(0, 0, &pattern(512, 1));
}

#[test]
fn a_ring_that_the_region_has_no_room_for_does_not_start() {
    let disk = MemoryDisk::new(64);
    let (_server, mut guest, _) = serve_cloud(&disk, &[16]);
    let queue = guest.add_queue(16);
    until("no area for the second queue", || guest.queues[queue].error.read().is_ok());
    assert_eq!(guest.frontend_base(0), 0);
    guest.queues[0].size = 32;
    guest.start_queue(0, 0);
    until("the area is too small", || guest.queues[0].error.read().is_ok());
}
