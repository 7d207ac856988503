//! Packed rings in a session: kicks and interrupts through many laps, rings of any size, and rings that a hostile guest
//! has corrupted.

mod kit;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::packed::Place;
use kit::raw::{self, Raw};
use vhost::VhostBackend;
use vhost_blk::ServeOptions;

const ALL: u64 = F_VERSION_1 | F_FLUSH | F_INDIRECT | F_PACKED;
/// Event suppression: notify when a place is passed.
const DESCRIPTOR: u16 = 2;
const DISABLE: u16 = 1;

fn start(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(4, 256))
}

/// Makes a read of a sector available without the kick.
fn offer_read(guest: &mut Guest, queue: usize, indirect: bool) {
    let (header, status, data) = (guest.header(T_IN, 0), guest.put(&[UNTOUCHED]), guest.alloc(512));
    let parts = [(header, 16, 0), (data, 512, WRITE), (status, 1, WRITE)];
    let id = if indirect { guest.indirect_chain(queue, &parts) } else { guest.chain(queue, &parts) };
    guest.make_available(queue, id);
}

#[test]
fn kicks_and_interrupts_work_through_many_laps() {
    const BATCHES: u64 = 2000;
    for features in [ALL, ALL | F_EVENT_IDX] {
        let disk = MemoryDisk::new(64);
        let server = start(&disk);
        let mut guest = Guest::connect(&server.path, features);
        let queue = guest.add_queue(100);
        let (available, used) = (guest.queues[queue].available, guest.queues[queue].used);
        for batch in 0..BATCHES {
            let before = guest.queues[queue].next_available;
            (0..31).for_each(|number| offer_read(&mut guest, queue, number % 2 == 0));
            // One interrupt, for the last of these chains. A driver stores its wish before any interrupt.
            guest.write_u16(available, guest.queues[queue].next_available);
            guest.write_u16(available + 2, if features & F_EVENT_IDX != 0 { DESCRIPTOR } else { DISABLE });
            offer_read(&mut guest, queue, batch % 3 == 0);
            guest.kick_if_wanted(queue, before);
            for _ in 0..32 {
                assert_eq!(guest.next_used(queue).1, 513);
            }
            if features & F_EVENT_IDX != 0 {
                let call = &guest.queues[queue].call;
                until("the interrupt", || call.read().is_ok_and(|count| count > 0));
            }
        }
        let total = server.options.metrics.total();
        assert_eq!((total.reads, total.ring_errors), (32 * BATCHES, 0));
        let interrupts = if features & F_EVENT_IDX != 0 { BATCHES } else { 0 };
        assert!(total.interrupts <= interrupts, "{} interrupts", total.interrupts);
        // The sleeping device wants a kick for the very next chain.
        let wanted = if features & F_EVENT_IDX != 0 { DESCRIPTOR } else { 0 };
        until("kicks are wanted", || guest.read_u16(used + 2) == wanted);
        if features & F_EVENT_IDX != 0 {
            assert_eq!(guest.read_u16(used), guest.queues[queue].next_available);
        }
    }
}

type Corrupt = fn(&Guest, u64, Place, u16);

/// What a guest may write where its next descriptor is, while the chain with a buffer id is in flight.
const CORRUPT: &[(&str, Corrupt)] = &[
    ("the id of a chain in flight", |guest, table, place, id| write_available(guest, table, place, id, 0)),
    ("an id past the ring", |guest, table, place, _| write_available(guest, table, place, 16, 0)),
    ("a chain that is not all there", |guest, table, place, _| {
        write_available(guest, table, place, 1, NEXT);
    }),
    ("a chain without an end", |guest, table, place, _| {
        for index in (place.index..16).rev() {
            write_available(guest, table, Place { index, ..place }, 1, NEXT);
        }
        for index in (0..place.index).rev() {
            write_available(guest, table, Place { index, wrap: !place.wrap }, 1, NEXT);
        }
        write_available(guest, table, place, 1, NEXT);
    }),
];

fn write_available(guest: &Guest, table: u64, place: Place, id: u16, flags: u16) {
    let available = if place.wrap { 1 << 7 } else { 1 << 15 };
    guest.packed_descriptor(table + 16 * u64::from(place.index), (DATA, 16, 0), id, flags | available);
}

#[test]
fn a_corrupt_ring_stops_alone() {
    for (name, corrupt) in CORRUPT {
        let disk = MemoryDisk::later(64);
        let server = start(&disk);
        let mut guest = Guest::connect(&server.path, ALL);
        let (bad, good) = (guest.add_queue(16), guest.add_queue(16));
        guest.write(bad, 0, &pattern(512, 3));
        let sent = disk.submitted.load(Ordering::SeqCst);
        disk.gate.close();
        let (header, status, data) = (guest.header(T_IN, 0), guest.put(&[UNTOUCHED]), guest.alloc(512));
        let id = guest.chain(bad, &[(header, 16, 0), (data, 512, WRITE), (status, 1, WRITE)]);
        guest.make_available(bad, id);
        guest.kick(bad);
        disk.await_submitted(sent + 1);
        let place = guest.packed(bad).expect("a packed ring").next;
        corrupt(&guest, guest.queues[bad].descriptors, place, id);
        guest.kick(bad);
        disk.gate.open();
        until(name, || guest.queues[bad].error.read().is_ok());
        assert_eq!(guest.next_used(bad), (u32::from(id), 513), "{name}: what was in flight is answered");
        assert_eq!(guest.read(good, 0, 512), pattern(512, 3), "{name}");
        guest.frontend_base(bad);
        guest.clear_rings(bad);
        guest.start_queue(bad, Place::START.bits());
        assert_eq!(guest.read(bad, 0, 512), pattern(512, 3), "{name}: set up again");
    }
}

#[test]
fn sizes_and_bases_are_those_of_packed_rings() {
    let disk = MemoryDisk::new(64);
    let server = start(&disk);
    let mut guest = Guest::connect(&server.path, ALL);
    for size in [3, 7, 255, 256] {
        let queue = guest.add_queue(size);
        guest.write(queue, 0, &[7; 512]);
        assert_eq!(guest.read(queue, 0, 512), [7; 512]);
    }
    assert!(guest.frontend.set_vring_num(0, 257).is_err() && guest.frontend.set_vring_num(0, 0).is_err());
    drop(guest);
    let mut raw = Raw::negotiated(&server.path);
    let mut acknowledge = |message, payload: &[u8]| raw.ask(message, payload, &[]).number();
    assert_ne!(acknowledge(raw::SET_VRING_NUM, &raw::state(0, 100)), Some(0), "split rings");
    assert_ne!(acknowledge(raw::SET_VRING_BASE, &raw::state(0, 0x8000_8000)), Some(0));
    assert_eq!(acknowledge(raw::SET_FEATURES, &(ALL | F_PROTOCOL).to_ne_bytes()), Some(0));
    assert_eq!(acknowledge(raw::SET_VRING_NUM, &raw::state(0, 100)), Some(0));
    assert_eq!(acknowledge(raw::GET_VRING_BASE, &raw::state(1, 0)), Some(0x8000_8000 << 32 | 1));
    for base in [0x8063_8063, 0x0001_8005] {
        assert_eq!(acknowledge(raw::SET_VRING_BASE, &raw::state(0, base)), Some(0));
        assert_eq!(acknowledge(raw::GET_VRING_BASE, &raw::state(0, 0)), Some(u64::from(base) << 32));
    }
}
