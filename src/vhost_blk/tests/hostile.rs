//! The results of hostile guests and frontends, one row a case. The rule: a bad request gets its status byte, and a
//! chain without one gets a used length of 0. A corrupt ring stops. A bad message is refused, or ends its session.
//!
//! After each row an ordinary request on the same disk must succeed. It uses the same queue after a bad chain,
//! another queue after a bad ring, and the next session after a bad connection.

mod kit;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::raw::*;
use vhost_blk::{Request, ServeOptions};

const SECTORS: u64 = 256;
const ALL: u64 = F_VERSION_1 | F_FLUSH | F_INDIRECT;

fn serve(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(4, 128))
}

/// The result of a bad request or chain.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gets {
    /// Its status byte, and a used length of 1.
    Status(u8),
    /// A used element of length 0, and no byte written.
    Nothing,
}
use Gets::{Nothing, Status};

type Build = fn(&mut Guest, u64) -> u16;

/// Chains by their defect. `build` gets the address of a status byte and returns the head.
const CHAINS: &[(&str, u64, Gets, Build)] = &[
    ("a descriptor that is its own next", ALL, Nothing, |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.descriptor(0, 5, at, 16, NEXT, 5);
        let _ = status;
        5
    }),
    ("a loop of two behind a header", ALL, Nothing, |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.descriptor(0, 1, at, 16, NEXT, 2);
        guest.descriptor(0, 2, status, 1, NEXT | WRITE, 3);
        guest.descriptor(0, 3, status, 1, NEXT | WRITE, 2);
        1
    }),
    ("next beyond the table", ALL, Nothing, |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.descriptor(0, 1, at, 16, NEXT, 2);
        guest.descriptor(0, 2, status, 1, NEXT | WRITE, 16);
        1
    }),
    ("the header alone", ALL, Nothing, |guest, _| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 16, 0)])
    }),
    ("a status that cannot be written", ALL, Nothing, |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 16, 0), (status, 1, 0)])
    }),
    ("readable after writable", ALL, Nothing, |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 16, 0), (status, 1, WRITE), (at, 16, 0)])
    }),
    ("a status of no length", ALL, Nothing, |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 16, 0), (status, 0, WRITE)])
    }),
    ("a status outside memory", ALL, Nothing, |guest, _| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 16, 0), (EXTRA, 1, WRITE)])
    }),
    ("data that ends with a bad status", ALL, Nothing, |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 16, 0), (status, 1, WRITE), (2 * REGION - 512, 513, WRITE)])
    }),
    ("data outside memory", ALL, Status(IOERR), |guest, status| {
        let at = guest.header(T_OUT, 0);
        guest.chain(0, &[(at, 16, 0), (EXTRA, 512, 0), (status, 1, WRITE)])
    }),
    ("data that ends outside memory", ALL, Status(IOERR), |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 16, 0), (2 * REGION - 256, 512, WRITE), (status, 1, WRITE)])
    }),
    ("data whose end wraps", ALL, Status(IOERR), |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 16, 0), (u64::MAX - 511, 1024, WRITE), (status, 1, WRITE)])
    }),
    ("data to the last address and on", ALL, Status(IOERR), |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 16, 0), (u64::MAX - 511, 512, WRITE), (status, 1, WRITE)])
    }),
    ("no data at a bad address", ALL, Status(IOERR), |guest, status| {
        let at = guest.header(T_OUT, 0);
        guest.chain(0, &[(at, 16, 0), (EXTRA, 0, 0), (status, 1, WRITE)])
    }),
    ("a header outside memory", ALL, Status(IOERR), |guest, status| {
        guest.chain(0, &[(EXTRA, 16, 0), (status, 1, WRITE)])
    }),
    ("half a header", ALL, Status(IOERR), |guest, status| {
        let at = guest.header(T_IN, 0);
        guest.chain(0, &[(at, 15, 0), (status, 1, WRITE)])
    }),
    ("no header", ALL, Status(IOERR), |guest, status| guest.chain(0, &[(status, 1, WRITE)])),
    ("an indirect table in an indirect table", ALL, Nothing, |guest, status| {
        let inner = guest.alloc(16);
        guest.descriptor(inner, 0, status, 1, WRITE, 0);
        let header = guest.header(T_IN, 0);
        guest.indirect_chain(0, &[(header, 16, 0), (inner, 16, INDIRECT)])
    }),
    ("an indirect table that is its own entry", ALL, Nothing, |guest, _| {
        let table = guest.alloc(16);
        guest.descriptor(table, 0, table, 16, INDIRECT, 0);
        guest.chain(0, &[(table, 16, INDIRECT)])
    }),
    ("INDIRECT with NEXT", ALL, Nothing, |guest, status| {
        // Either half alone would be a valid chain.
        let table = guest.alloc(32);
        let header = guest.header(T_IN, 0);
        guest.descriptor(table, 0, header, 16, NEXT, 1);
        guest.descriptor(table, 1, status, 1, WRITE, 0);
        guest.chain(0, &[(table, 32, INDIRECT), (status, 1, WRITE)])
    }),
    ("an indirect table of 24 bytes", ALL, Nothing, |guest, _| {
        let table = guest.alloc(32);
        guest.chain(0, &[(table, 24, INDIRECT)])
    }),
    ("an indirect table of no bytes", ALL, Nothing, |guest, _| {
        let table = guest.alloc(16);
        guest.chain(0, &[(table, 0, INDIRECT)])
    }),
    ("an indirect table outside memory", ALL, Nothing, |guest, _| guest.chain(0, &[(EXTRA, 32, INDIRECT)])),
    ("an indirect table that ends outside memory", ALL, Nothing, |guest, status| {
        let table = 2 * REGION - 32;
        let header = guest.header(T_IN, 0);
        guest.descriptor(table, 0, header, 16, NEXT, 1);
        guest.descriptor(table, 1, status, 1, WRITE, 0);
        guest.chain(0, &[(table, 48, INDIRECT)])
    }),
    ("an indirect loop", ALL, Nothing, |guest, status| {
        let table = guest.alloc(32);
        guest.descriptor(table, 0, status, 1, NEXT | WRITE, 1);
        guest.descriptor(table, 1, status, 1, NEXT | WRITE, 0);
        guest.chain(0, &[(table, 32, INDIRECT)])
    }),
    ("next beyond an indirect table", ALL, Nothing, |guest, status| {
        let table = guest.alloc(64);
        guest.descriptor(table, 0, status, 1, NEXT | WRITE, 2);
        guest.descriptor(table, 2, status, 1, WRITE, 0);
        guest.chain(0, &[(table, 32, INDIRECT)])
    }),
    ("an indirect chain of 65,535 descriptors", ALL, Nothing, |guest, status| {
        let table = REGION;
        for index in 0..u16::MAX {
            guest.descriptor(table, index, status, 1, NEXT | WRITE, index + 1);
        }
        guest.chain(0, &[(table, 16 * 65535, INDIRECT)])
    }),
    ("INDIRECT that was not negotiated", F_VERSION_1, Nothing, |guest, status| {
        let header = guest.header(T_IN, 0);
        guest.indirect_chain(0, &[(header, 16, 0), (status, 1, WRITE)])
    }),
];

#[test]
fn bad_chains() {
    for later in [false, true] {
        let disk = MemoryDisk::with(SECTORS, later, |_| {});
        let server = serve(&disk);
        for (name, features, gets, build) in CHAINS {
            let mut guest = Guest::connect(&server.path, *features);
            guest.add_queue(16);
            let status = guest.put(&[UNTOUCHED]);
            let head = build(&mut guest, status);
            let written = guest.run(0, head);
            let byte = guest.get(status, 1)[0];
            let got = if written == 0 { Nothing } else { Status(byte) };
            assert_eq!(got, *gets, "{name}");
            if *gets == Nothing {
                assert_eq!(byte, UNTOUCHED, "{name}: nothing is written");
            }
            guest.queues[0].next_descriptor = 8;
            assert_eq!(guest.read(0, 0, 512), [0; 512], "{name}: the queue goes on");
        }
        assert!(disk.bytes.lock().unwrap().iter().all(|byte| *byte == 0));
        assert_eq!(server.options.metrics.total().ring_errors, 0);
    }
}

#[test]
fn bad_requests() {
    let seg = segment;
    let too_many: Vec<u8> = (0..33).flat_map(|number| seg(number, 1, 0)).collect();
    let second_bad = [seg(0, 1, 0), seg(SECTORS, 1, 0)].concat();
    /// Name, type, sector, data to write, bytes to read, status.
    type Case = (&'static str, u32, u64, Vec<u8>, u32, u8);
    let cases: Vec<Case> = vec![
        ("a read past the end", T_IN, SECTORS, vec![], 512, IOERR),
        ("a read that ends past the end", T_IN, SECTORS - 1, vec![], 1024, IOERR),
        ("a sector that overflows bytes", T_IN, 1 << 55, vec![], 512, IOERR),
        ("a sector that overflows all", T_IN, u64::MAX, vec![], 512, IOERR),
        ("no data past the end", T_IN, SECTORS + 1, vec![], 0, IOERR),
        ("a write past the end", T_OUT, SECTORS, vec![1; 512], 0, IOERR),
        ("a read of 511 bytes", T_IN, 0, vec![], 511, IOERR),
        ("a write of 513 bytes", T_OUT, 0, vec![1; 513], 0, IOERR),
        ("type 2, SCSI", 2, 0, vec![], 0, UNSUPP),
        ("type 0x8000_0000, a barrier", 0x8000_0000, 0, vec![], 0, UNSUPP),
        ("type 14, secure erase", 14, 0, seg(0, 1, 0), 0, UNSUPP),
        ("a discard without a segment", T_DISCARD, 0, vec![], 0, IOERR),
        ("a discard of 15 bytes", T_DISCARD, 0, vec![0; 15], 0, IOERR),
        ("a discard of 24 bytes", T_DISCARD, 0, vec![0; 24], 0, IOERR),
        ("too many segments of a discard", T_DISCARD, 0, too_many, 0, UNSUPP),
        ("two segments to zero", T_WRITE_ZEROES, 0, [seg(0, 1, 0), seg(1, 1, 0)].concat(), 0, UNSUPP),
        ("an unknown flag to discard", T_DISCARD, 0, seg(0, 1, 2), 0, UNSUPP),
        ("unmap to discard", T_DISCARD, 0, seg(0, 1, 1), 0, UNSUPP),
        ("an unknown flag to zero", T_WRITE_ZEROES, 0, seg(0, 1, 0x8000_0001), 0, UNSUPP),
        ("a discard past the end", T_DISCARD, 0, seg(SECTORS, 1, 0), 0, IOERR),
        ("a discard that overflows", T_DISCARD, 0, seg(u64::MAX, 1, 0), 0, IOERR),
        ("a discard too long", T_DISCARD, 0, seg(0, u32::MAX, 0), 0, IOERR),
        ("a second segment past the end", T_DISCARD, 0, second_bad, 0, IOERR),
        ("zeroes past the end", T_WRITE_ZEROES, 0, seg(SECTORS - 1, 2, 0), 0, IOERR),
    ];
    let disk = MemoryDisk::new(SECTORS);
    disk.bytes.lock().unwrap().fill(5);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(64);
    for (name, kind, sector, out, read, status) in cases {
        let answer = guest.request(queue, kind, sector, &out, read);
        assert_eq!((answer.status, answer.written), (status, 1), "{name}");
    }
    assert!(disk.bytes.lock().unwrap().iter().all(|byte| *byte == 5), "nothing was done");
    assert!(disk.requests.lock().unwrap().is_empty());

    let plain = MemoryDisk::with(SECTORS, false, |profile| {
        (profile.discard, profile.write_zeroes) = (false, false);
    });
    let server = serve(&plain);
    let mut guest = Guest::connect(&server.path, ALL);
    let queue = guest.add_queue(64);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        assert_eq!(guest.request(queue, kind, 0, &segment(0, 1, 0), 0).status, UNSUPP);
    }
}

/// Corrupt rings: the queue stops and its error descriptor is signalled; another queue goes on; after a new setup it
/// runs.
#[test]
fn corrupt_rings() {
    type Spoil = fn(&mut Guest);
    let cases: &[(&str, Spoil)] = &[
        ("the available index jumps", |guest| {
            let index = guest.queues[0].next_available.wrapping_add(17);
            guest.write_u16(guest.queues[0].available + 2, index);
        }),
        ("the available index goes back", |guest| {
            let index = guest.queues[0].next_available.wrapping_sub(1);
            guest.write_u16(guest.queues[0].available + 2, index);
        }),
        ("a head beyond the table", |guest| guest.make_available(0, 16)),
        ("the last head there could be", |guest| guest.make_available(0, u16::MAX)),
    ];
    let disk = MemoryDisk::new(SECTORS);
    let server = serve(&disk);
    for (name, spoil) in cases {
        let mut guest = Guest::connect(&server.path, ALL);
        guest.add_queue(16);
        guest.add_queue(16);
        guest.read(0, 0, 512);
        spoil(&mut guest);
        guest.kick(0);
        until(name, || guest.queues[0].error.read().is_ok());
        assert_eq!(guest.used_index(0), 1, "{name}: nothing came back");
        guest.read(1, 0, 512);
        // The driver resets the queue: a full setup again, with clean rings.
        let base = guest.frontend_base(0);
        assert_eq!(base, 1, "{name}");
        guest.clear_rings(0);
        guest.start_queue(0, 0);
        guest.read(0, 0, 512);
        assert!(guest.queues[0].error.read().is_err(), "{name}: no further error");
    }
    assert_eq!(server.options.metrics.total().ring_errors, cases.len() as u64);
}

#[test]
fn the_same_head_twice() {
    let disk = MemoryDisk::later(SECTORS);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    guest.add_queue(16);
    disk.gate.close();
    let (header, status) = (guest.header(T_IN, 0), guest.put(&[UNTOUCHED]));
    let data = guest.alloc(512);
    let head = guest.chain(0, &[(header, 16, 0), (data, 512, WRITE), (status, 1, WRITE)]);
    guest.make_available(0, head);
    guest.kick(0);
    disk.await_submitted(1);
    guest.make_available(0, head);
    guest.kick(0);
    until("the ring error", || guest.queues[0].error.read().is_ok());
    disk.gate.open();
    assert_eq!(guest.next_used(0), (u32::from(head), 513));
    assert!(never(|| guest.used_index(0) != 1), "the second is never completed");
    let requests = disk.requests.lock().unwrap();
    assert_eq!(requests.iter().filter(|request| **request != Request::Flush).count(), 1);
}

#[test]
fn changes_by_the_guest_in_flight_are_not_seen() {
    let disk = MemoryDisk::later(SECTORS);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    guest.add_queue(16);
    disk.gate.close();
    let header = guest.header(T_WRITE_ZEROES, 0);
    let (data, status) = (guest.put(&segment(3, 1, 0)), guest.put(&[UNTOUCHED]));
    let head = guest.chain(0, &[(header, 16, 0), (data, 16, 0), (status, 1, WRITE)]);
    disk.bytes.lock().unwrap().fill(1);
    guest.make_available(0, head);
    guest.kick(0);
    disk.await_submitted(1);
    let other = guest.put(&[UNTOUCHED]);
    guest.descriptor(0, head + 2, other, 1, WRITE, 0);
    let everything = segment(0, SECTORS as u32, 0);
    vm_memory::Bytes::write_slice(&guest.memory, &everything, vm_memory::GuestAddress(data)).unwrap();
    disk.gate.open();
    assert_eq!(guest.next_used(0), (u32::from(head), 1));
    assert_eq!((guest.get(status, 1), guest.get(other, 1)), (vec![OK], vec![UNTOUCHED]));
    assert_eq!(disk.bytes.lock().unwrap().iter().filter(|byte| **byte == 0).count(), 512);
}

#[test]
fn a_panic_in_a_worker_stops_its_queue_only() {
    let disk = MemoryDisk::new(SECTORS);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    guest.add_queue(16);
    guest.add_queue(16);
    guest.read(0, 0, 512);
    disk.trap.store(true, std::sync::atomic::Ordering::SeqCst);
    let header = guest.header(T_FLUSH, 0);
    let head = guest.chain(0, &[(header, 16, 0), (header, 1, WRITE)]);
    guest.make_available(0, head);
    guest.kick(0);
    until("the error", || guest.queues[0].error.read().is_ok());
    guest.read(1, 0, 512);
    guest.frontend_base(0);
    guest.clear_rings(0);
    guest.start_queue(0, 0);
    guest.read(0, 0, 512);
}

/// The result of a bad message.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Told {
    /// A non-zero acknowledgement, and the session goes on.
    No,
    /// An acknowledgement of zero.
    Yes,
    /// The connection is closed, and the next is served.
    End,
}

fn told(reply: &Reply) -> Told {
    match reply.number() {
        Some(0) => Told::Yes,
        Some(_) => Told::No,
        None => Told::End,
    }
}

#[test]
fn bad_messages() {
    let disk = MemoryDisk::new(SECTORS);
    let server = serve(&disk);
    let event = File::open("/dev/null").unwrap();
    let (page, memory) = (4096u64, memfd(8192));
    let fd = [event.as_raw_fd()];
    let map = [memory.as_raw_fd()];
    let (two_fds, two_maps) = ([fd[0], fd[0]], [map[0], map[0]]);
    let number = |value: u64| value.to_ne_bytes().to_vec();
    /// Name, request, payload, descriptors, expected result.
    type Case<'a> = (&'a str, u32, Vec<u8>, &'a [i32], Told);
    let cases: Vec<Case> = vec![
        ("a size of 0", SET_VRING_NUM, state(0, 0), &[], Told::No),
        ("a size of 100", SET_VRING_NUM, state(0, 100), &[], Told::No),
        ("a size above the limit", SET_VRING_NUM, state(0, 256), &[], Told::No),
        ("a size of 65,536", SET_VRING_NUM, state(0, 65536), &[], Told::No),
        ("a size of 65,664", SET_VRING_NUM, state(0, 65536 + 128), &[], Told::No),
        ("a size", SET_VRING_NUM, state(0, 128), &[], Told::Yes),
        ("queue 4 of 4, num", SET_VRING_NUM, state(4, 128), &[], Told::No),
        ("queue 2^32-1, base", SET_VRING_BASE, state(u32::MAX, 0), &[], Told::No),
        ("queue 256, enable", SET_VRING_ENABLE, state(256, 1), &[], Told::No),
        ("queue 4, addr", SET_VRING_ADDR, address(4, 0, 0, 0), &[], Told::No),
        ("queue 4, kick", SET_VRING_KICK, number(4), &fd, Told::No),
        ("queue 0x200, kick", SET_VRING_KICK, number(0x200), &fd, Told::No),
        ("queue 2^32, call", SET_VRING_CALL, number(1 << 32), &fd, Told::No),
        ("queue 2^63, err", SET_VRING_ERR, number(1 << 63), &fd, Told::No),
        ("a kick by a file", SET_VRING_KICK, number(0), &map, Told::No),
        ("a kick by a device", SET_VRING_KICK, number(0), &fd, Told::No),
        ("a call by a file", SET_VRING_CALL, number(0), &map, Told::No),
        ("an error by a device", SET_VRING_ERR, number(0), &fd, Told::No),
        ("no kick descriptor", SET_VRING_KICK, number(0x100), &[], Told::No),
        ("no call descriptor", SET_VRING_CALL, number(0x100), &[], Told::Yes),
        ("a base beyond 16 bits", SET_VRING_BASE, state(0, 65536), &[], Told::No),
        ("an address outside memory", SET_VRING_ADDR, address(0, 1 << 40, 1 << 41, 1 << 42), &[], Told::Yes),
        ("an unaligned address", SET_VRING_ADDR, address(0, 1, 0, 0), &[], Told::End),
        ("enable by 2", SET_VRING_ENABLE, state(0, 2), &[], Told::End),
        ("kick with two descriptors", SET_VRING_KICK, number(0), &two_fds, Told::End),
        ("kick with a descriptor too few", SET_VRING_KICK, number(0), &[], Told::End),
        ("num with a descriptor", SET_VRING_NUM, state(0, 128), &fd, Told::End),
        ("a region outside its file", ADD_MEM_REG, single_region([0, 3 * page, 0, 0]), &map, Told::No),
        ("an offset outside its file", ADD_MEM_REG, single_region([0, page, 0, 2 * page]), &map, Told::No),
        ("a region of a device", ADD_MEM_REG, single_region([0, page, 0, 0]), &fd, Told::No),
        ("a region of no bytes", ADD_MEM_REG, single_region([0, 0, 0, 0]), &map, Told::No),
        ("a region that overflows", ADD_MEM_REG, single_region([u64::MAX, page, 0, 0]), &map, Told::No),
        ("a region without its file", ADD_MEM_REG, single_region([0, page, 0, 0]), &[], Told::End),
        ("a region with two files", ADD_MEM_REG, single_region([0, page, 0, 0]), &two_maps, Told::End),
        ("a region that was never there", REM_MEM_REG, single_region([0, page, 0, 0]), &[], Told::No),
        (
            "a table that overlaps",
            SET_MEM_TABLE,
            table(&[[page, page, 0, 0], [0, 2 * page, 0, 0]]),
            &two_maps,
            Told::No,
        ),
        ("a table without files", SET_MEM_TABLE, table(&[[0, page, 0, 0]]), &[], Told::No),
        ("a table of nothing", SET_MEM_TABLE, table(&[]), &[], Told::No),
        ("a read-only field", SET_CONFIG, config(0, 8, &[0; 8]), &[], Told::No),
        ("a config of another size", SET_CONFIG, config(0, 8, &[0; 4]), &[], Told::No),
        ("the base of queue 9", GET_VRING_BASE, state(9, 0), &[], Told::End),
        ("an in-flight region, not negotiated", GET_INFLIGHT_FD, vec![0; 24], &[], Told::End),
        ("an unknown request", 200, vec![], &[], Told::End),
        ("request 0", 0, vec![], &[], Told::End),
        ("a payload too short", SET_FEATURES, vec![0; 4], &[], Told::End),
        ("a payload too long", SET_FEATURES, vec![0; 16], &[], Told::End),
        ("features that were not offered", SET_FEATURES, number(u64::MAX), &[], Told::Yes),
    ];
    let mut failures = Vec::new();
    for (name, request, payload, fds, expected) in cases {
        let mut raw = Raw::negotiated(&server.path);
        let reply = raw.ask(request, &payload, fds);
        let got = told(&reply);
        // After its own refusal, `vhost` may also end the session; either result is right.
        if got != expected {
            failures.push(format!("{name}: {got:?} instead of {expected:?}"));
        }
        drop(raw);
        assert!(Raw::negotiated(&server.path).lives(), "{name}: the next frontend");
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn a_refusal_goes_on_only_if_the_frontend_knows() {
    let disk = MemoryDisk::new(SECTORS);
    let server = serve(&disk);
    let mut raw = Raw::negotiated(&server.path);
    assert_eq!(told(&raw.ask(SET_VRING_NUM, &state(0, 3), &[])), Told::No);
    assert!(raw.lives());
    raw.tell(SET_CONFIG, &config(0, 8, &[0; 8]), &[]);
    assert!(raw.lives(), "a refused SET_CONFIG harms nobody");
    raw.tell(SET_VRING_NUM, &state(0, 3), &[]);
    assert!(!raw.lives(), "nobody would know");
    let mut raw = Raw::negotiated(&server.path);
    assert!(raw.lives());
}

#[test]
fn the_configuration_space_out_of_range() {
    let disk = MemoryDisk::new(SECTORS);
    let server = serve(&disk);
    let mut raw = Raw::negotiated(&server.path);
    for (offset, size) in [(256, 8), (0, 300), (4000, 96)] {
        let reply = raw.ask(GET_CONFIG, &config(offset, size, &vec![0; size as usize]), &[]);
        assert_eq!(reply, Reply::Payload(config(offset, 0, &[])), "a reply of no bytes");
    }
    let Reply::Payload(reply) = raw.ask(GET_CONFIG, &config(0, 57, &[0; 57]), &[]) else {
        panic!("closed");
    };
    assert_eq!(reply.len(), 12 + 57);
    // Beyond the end of any configuration space: `vhost` ends the session.
    assert_eq!(raw.ask(GET_CONFIG, &config(4095, 2, &[0; 2]), &[]), Reply::Closed);
    assert!(Raw::negotiated(&server.path).lives());
}

#[test]
fn broken_streams() {
    let disk = MemoryDisk::new(SECTORS);
    let server = serve(&disk);
    let header = |request: u32, flags: u32, size: u32| {
        [request.to_ne_bytes(), flags.to_ne_bytes(), size.to_ne_bytes()].concat()
    };
    for (name, bytes) in [
        ("half a header", vec![1, 0, 0, 0, 1]),
        ("a payload that does not come", header(SET_FEATURES, 1, 8)),
        ("an oversized payload", header(SET_MEM_TABLE, 1, u32::MAX)),
        ("a large payload", [header(SET_MEM_TABLE, 1, 4096), vec![0xff; 4096]].concat()),
        ("version 2", header(GET_FEATURES, 2, 0)),
        ("a reply", header(GET_FEATURES, 5, 0)),
        ("noise", vec![0xa5; 300]),
    ] {
        let mut raw = Raw::connect(&server.path);
        raw.send_bytes(&bytes);
        raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(raw.reply(), Reply::Closed, "{name}");
        assert!(Raw::negotiated(&server.path).lives(), "{name}: the next frontend");
    }
    // A frontend that never reads its replies, and then leaves.
    let mut raw = Raw::connect(&server.path);
    raw.stream.set_nonblocking(true).unwrap();
    for _ in 0..10_000 {
        raw.tell(GET_FEATURES, &[], &[]);
    }
    drop(raw);
    assert!(Raw::negotiated(&server.path).lives());
}
