//! The record of a packed ring, with the ring itself and a model of its driver: the device dies before every single store
//! to the area and to the ring in turn, also while it recovers. From the guest's view each request must complete exactly
//! once, and be done again as it was sent, in the order in which it was taken. And areas that cannot be true.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use super::cells::{Packed, UsedPositions};
use super::defects::AreaError;
use super::packed::PackedTracker;
use super::region::QueueArea;
use super::{Layout, Region, RingKind};
use crate::death;
use crate::memory::GuestMemory;
use crate::packed_driver::{self, DATA, Driver, Piece, WRITE};
use crate::ring::{Chain, PackedRing, Position, RecordedChain, Used};

const LAYOUT: Layout = Layout { kind: RingKind::Packed, queues: 2, queue_size: 16 };

fn region() -> Region {
    Region::alone(LAYOUT).expect("a memfd")
}

fn area(region: &Region) -> QueueArea<Packed> {
    region.queue(1).expect("an area")
}

/// A small generator of numbers, so that a case follows from its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// The guest: its driver, and what has become of its requests.
struct Guest {
    driver: Driver,
    completed: BTreeSet<u64>,
    next_request: u64,
    /// Requests in the order in which devices took them.
    order: Vec<u64>,
}

impl Guest {
    fn new(size: u16, memory: &Arc<GuestMemory>) -> Self {
        memory_is_zero(memory);
        let driver = Driver::new(size, Arc::clone(memory));
        Guest { driver, completed: BTreeSet::new(), next_request: 0, order: Vec::new() }
    }

    /// Adds a request of some descriptors, if there is room. Buffer ids are reused in any order.
    fn add(&mut self, random: &mut Random) {
        let count = 1 + random.below(4);
        let ids: Vec<u16> = (0..self.driver.layout.size)
            .filter(|id| self.driver.outstanding[usize::from(*id)].is_none())
            .collect();
        if count > u64::from(self.driver.free) || ids.is_empty() {
            return;
        }
        let id = ids[random.below(ids.len() as u64) as usize];
        let readable = random.below(count + 1);
        let piece = |number: u64| Piece {
            address: DATA + (self.next_request * 4 + number) % 0x400,
            length: 1 + number as u32,
            flags: if number < readable { 0 } else { WRITE },
        };
        let pieces: Vec<Piece> = (0..count).map(piece).collect();
        self.driver.add(self.next_request, id, &pieces);
        self.next_request += 1;
    }

    /// Takes all completions.
    fn look(&mut self) {
        while let Some((_, was, _)) = self.driver.take() {
            assert!(self.completed.insert(was.request));
        }
    }

    /// The request with this buffer id; the device must have its descriptors as they were sent.
    fn request(&self, id: u16, chain: &RecordedChain) -> u64 {
        let sent = self.driver.outstanding[usize::from(id)].as_ref();
        let sent = sent.expect("outstanding, or it is a phantom");
        let piece = |number: usize| {
            let descriptor = chain.0[number];
            Piece { address: descriptor.address, length: descriptor.length, flags: descriptor.flags & WRITE }
        };
        let taken: Vec<Piece> = (0..chain.0.len()).map(piece).collect();
        assert_eq!(taken, sent.pieces);
        sent.request
    }
}

fn memory_is_zero(memory: &Arc<GuestMemory>) {
    use vm_memory::{Bytes, GuestAddress};
    memory.map().write_slice(&[0; 0xa00], GuestAddress(0)).expect("guest memory");
}

/// One device: what it has taken and not handed back.
struct Device {
    tracker: PackedTracker,
    ring: PackedRing,
    chain: Chain,
    /// Buffer ids in the order in which they were taken, each with its place in that order if this device took it.
    taken: VecDeque<(u16, Option<u16>)>,
}

impl Device {
    /// Starts on a ring that another may have left. The frontend still has the base of the first start.
    fn start(region: &Region, guest: &Guest) -> Self {
        let mut ring = guest.driver.ring();
        let recovered = PackedTracker::recover(area(region), &mut ring).expect("a sound area");
        let mut device =
            Device { tracker: recovered.tracker, ring, chain: Chain::default(), taken: VecDeque::new() };
        let mut before = guest.order.iter();
        for recorded in &recovered.in_flight {
            device.ring.take_again(recorded, &guest.driver.memory, &mut device.chain).expect("a sound chain");
            let request = guest.request(device.chain.head, recorded);
            // Some of those taken were handed back; the others keep their order.
            assert!(before.any(|other| *other == request), "{request} of {:?}", guest.order);
            device.taken.push_back((device.chain.head, None));
        }
        device
    }

    fn take(&mut self, guest: &mut Guest) {
        let place = self.ring.taken();
        self.ring.pop(&guest.driver.memory, &mut self.chain).expect("a sound chain");
        let id = self.chain.head;
        // Noted first: if it dies at the next store, the chain may or may not count as taken.
        guest.order.push(guest.request(id, &RecordedChain(self.ring.last_chain().to_vec())));
        self.tracker.begin(id, self.ring.last_chain());
        self.taken.push_back((id, Some(place)));
    }

    /// Stops in order, if it can: puts what was taken last back into the ring, in any order, and hands everything else back.
    fn stop(mut self, guest: &mut Guest, random: &mut Random) {
        let (left, mut expected) = (random.below(4) as usize, self.ring.taken());
        let mut put_back = Vec::new();
        while let Some((id, place)) = self.taken.back().copied()
            && place == Some(expected.wrapping_sub(1))
            && put_back.len() < left
        {
            self.taken.pop_back();
            put_back.push(id);
            expected = expected.wrapping_sub(1);
        }
        while !put_back.is_empty() {
            let id = put_back.swap_remove(random.below(put_back.len() as u64) as usize);
            self.ring.put_back(id);
            self.tracker.put_back(id);
        }
        let all: Vec<Used> = self.taken.iter().map(|(head, _)| Used { head: *head, written: 1 }).collect();
        self.hand_back(&all, guest, random);
        self.tracker.close();
    }

    /// One step of a worker: takes some chains, then hands some back in any order.
    fn turn(&mut self, guest: &mut Guest, random: &mut Random) {
        let waiting = self.ring.available().expect("a sound ring");
        for _ in 0..random.below(u64::from(waiting) + 1) {
            self.take(guest);
        }
        let batch: Vec<Used> = (0..random.below(self.taken.len() as u64 + 1))
            .map(|_| {
                let at = random.below(self.taken.len() as u64) as usize;
                let (head, _) = self.taken.remove(at).expect("one of them");
                Used { head, written: random.below(2) as u32 }
            })
            .collect();
        self.hand_back(&batch, guest, random);
    }

    fn hand_back(&mut self, batch: &[Used], guest: &mut Guest, random: &mut Random) {
        if batch.is_empty() {
            return;
        }
        let ids = || batch.iter().map(|used| used.head);
        self.tracker.list(ids());
        self.ring.push_used(batch).expect("a sound ring");
        // A guest on another processor sees them at once, and reuses the descriptors.
        guest.look();
        for _ in 0..random.below(3) {
            guest.add(random);
        }
        self.tracker.clear(ids());
    }
}

/// Plays one case: devices that die after so many stores each, and a last one that does not. Returns whether the
/// first device died.
fn play(region: &Region, memory: &Arc<GuestMemory>, seed: u64, stores: &[u32]) -> bool {
    let mut random = Random(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15));
    region.empty_queue(1);
    let mut guest = Guest::new(1 + random.below(16) as u16, memory);
    let mut first_died = false;
    for (number, stores) in stores.iter().enumerate() {
        let turns = 1 + random.below(6);
        let life = death::after(*stores, || {
            let mut device = Device::start(region, &guest);
            for _ in 0..turns {
                for _ in 0..random.below(5) {
                    guest.add(&mut random);
                }
                device.turn(&mut guest, &mut random);
            }
            if random.below(2) == 0 {
                device.stop(&mut guest, &mut random);
            }
        });
        guest.look();
        first_died |= number == 0 && life.is_none();
    }
    // The last device serves until nothing is left.
    let mut device = Device::start(region, &guest);
    while guest.completed.len() as u64 != guest.next_request {
        device.turn(&mut guest, &mut random);
        guest.look();
    }
    assert!(device.taken.is_empty() && guest.driver.free == guest.driver.layout.size);
    let after = Device::start(region, &guest);
    assert!(after.taken.is_empty(), "nothing is in flight");
    assert_eq!((after.ring.next_available(), after.ring.next_used()), (guest.driver.next, guest.driver.seen));
    first_died
}

#[test]
fn each_request_completes_once_whichever_store_was_the_last() {
    let (region, memory) = (region(), packed_driver::memory(1));
    for seed in 1..=40 {
        let stores = (0..).take_while(|stores| play(&region, &memory, seed, &[*stores])).count();
        assert!(stores > 20, "the first device did something");
    }
}

#[test]
fn each_request_completes_once_however_many_devices_die() {
    let (region, memory) = (region(), packed_driver::memory(1));
    let mut random = Random(7);
    for seed in 1..=4000 {
        let deaths: Vec<u32> = (0..1 + random.below(6)).map(|_| random.below(120) as u32).collect();
        play(&region, &memory, seed, &deaths);
    }
}

/// An area with chains in flight on a ring of 8, in a lap with the other wrap counter: ids 3, 1 and 4, of 1, 2 and 3
/// descriptors, were taken in this order, after one of 5 that was handed back.
fn scene(region: &Region, memory: &Arc<GuestMemory>) -> Driver {
    region.empty_queue(1);
    memory_is_zero(memory);
    let mut driver = Driver::new(8, Arc::clone(memory));
    let mut ring = driver.ring();
    let mut tracker = PackedTracker::recover(area(region), &mut ring).expect("an empty area").tracker;
    let mut chain = Chain::default();
    let piece = Piece { address: DATA, length: 1, flags: WRITE };
    for (request, id, pieces) in [(0, 7, 5), (1, 3, 1), (2, 1, 2), (3, 4, 3)] {
        driver.add(request, id, &vec![piece; pieces]);
        assert_eq!(ring.available().expect("a sound ring"), 1);
        ring.pop(memory, &mut chain).expect("a sound chain");
        tracker.begin(id, ring.last_chain());
        if id == 7 {
            tracker.list([7].into_iter());
            ring.push_used(&[Used { head: 7, written: 1 }]).expect("a sound ring");
            tracker.clear([7].into_iter());
            driver.take().expect("it was handed back");
        }
    }
    driver
}

fn recover(region: &Region, driver: &Driver) -> Result<(PackedTracker, PackedRing, Vec<u16>), AreaError> {
    let mut ring = driver.ring();
    let recovered = PackedTracker::recover(area(region), &mut ring)?;
    let ids = recovered.in_flight.iter().map(|chain| chain.0[chain.0.len() - 1].id).collect();
    Ok((recovered.tracker, ring, ids))
}

#[test]
fn requests_that_were_taken_are_done_again_in_order() {
    let (region, memory) = (region(), packed_driver::memory(1));
    let driver = scene(&region, &memory);
    for _ in 0..3 {
        let (_, ring, ids) = recover(&region, &driver).expect("a sound area");
        assert_eq!(ids, [3, 1, 4]);
        assert_eq!((ring.next_used(), ring.next_available()), (driver.seen, driver.next));
        assert_eq!(ring.next_available(), Position::new(3, false));
    }
    let (mut tracker, _, _) = recover(&region, &driver).expect("a sound area");
    tracker.list([1, 3].into_iter());
    assert_eq!(recover(&region, &driver).expect("a sound area").2, [3, 1, 4], "not handed back");
}

/// A batch of two was half written by a device that died. The guest must not take its second element for one that was
/// handed back, once the next device hands back something else.
#[test]
fn elements_of_a_batch_that_nobody_saw_are_undone() {
    let (region, memory) = (region(), packed_driver::memory(1));
    let mut driver = scene(&region, &memory);
    let used = |head| Used { head, written: 1 };
    let begin = |driver: &Driver| {
        let (tracker, mut ring, _) = recover(&region, driver).expect("a sound area");
        let recorded =
            PackedTracker::recover(area(&region), &mut driver.ring()).expect("a sound area").in_flight;
        let mut chain = Chain::default();
        for recorded in &recorded {
            ring.take_again(recorded, &memory, &mut chain).expect("a sound chain");
        }
        (tracker, ring)
    };
    let (mut tracker, mut ring) = begin(&driver);
    tracker.list([3, 1].into_iter());
    // Length and flags of the second element, then length, id and not the flags of the first one.
    let died = death::after(3, || ring.push_used(&[used(3), used(1)]));
    assert!(died.is_none() && driver.take().is_none());
    let (mut tracker, mut ring) = begin(&driver);
    tracker.list([3].into_iter());
    ring.push_used(&[used(3)]).expect("a sound ring");
    tracker.clear([3].into_iter());
    assert_eq!(driver.take().map(|(id, ..)| id), Some(3));
    assert!(driver.take().is_none(), "1 was not handed back");
}

#[test]
fn impossible_areas_are_refused_and_left_alone() {
    use AreaError as E;
    type Change = fn(&QueueArea<Packed>);
    type Expected = fn(&AreaError) -> bool;
    let cases: &[(&str, Change, Expected)] = &[
        ("version", |area| area.header().version.store(2), |error| matches!(error, E::Version { .. })),
        ("features", |area| area.header().features.store(1), |error| matches!(error, E::Features { .. })),
        ("fewer states", |area| area.header().desc_num.store(8), |error| matches!(error, E::Count { .. })),
        (
            "a used index past the ring",
            |area| used(area, 8, 8, 1, 1),
            |error| matches!(error, E::Positions { .. }),
        ),
        ("a wrap counter of 2", |area| used(area, 5, 5, 2, 1), |error| matches!(error, E::Positions { .. })),
        (
            "a batch of more than a lap",
            |area| used(area, 4, 5, 1, 1),
            |error| matches!(error, E::Positions { .. }),
        ),
        (
            "a free list that starts nowhere",
            |area| area.header().old_free_head.store(17),
            |error| *error == E::Free { entry: 17 },
        ),
        (
            "a free list with a loop",
            |area| area.entries()[9].next.store(8),
            |error| matches!(error, E::Free { .. }),
        ),
        (
            "a free list that is cut off",
            |area| area.entries()[12].next.store(16),
            |error| *error == E::Lost { lost: 3 },
        ),
        (
            "half in flight",
            |area| entry_of(area, 3).inflight.store(255),
            |error| matches!(error, E::State { state: 255, .. }),
        ),
        (
            "the same counter",
            |area| entry_of(area, 3).counter.store(2),
            |error| matches!(error, E::Counter { counter: 2, .. }),
        ),
        (
            "a large counter",
            |area| entry_of(area, 3).counter.store(u64::MAX),
            |error| matches!(error, E::Counter { .. }),
        ),
        ("a chain of none", |area| entry_of(area, 3).num.store(0), |error| matches!(error, E::Length { .. })),
        (
            "a chain that is too short",
            |area| entry_of(area, 4).num.store(2),
            |error| matches!(error, E::Length { num: 2, .. }),
        ),
        (
            "another last one",
            |area| entry_of(area, 4).last.store(0),
            |error| matches!(error, E::Length { .. }),
        ),
        (
            "a chain into the free list",
            |area| entry_of(area, 4).num.store(4),
            |error| matches!(error, E::Chain { .. }),
        ),
        (
            "more descriptors than the ring",
            |area| entry_of(area, 4).num.store(6),
            |error| matches!(error, E::Descriptors { descriptors: 9, .. }),
        ),
        (
            "a chain that leaves the area",
            |area| entry_of(area, 1).next.store(u16::MAX),
            |error| matches!(error, E::Chain { entry: u16::MAX, .. }),
        ),
        (
            "an id past the ring",
            |area| entry_of(area, 3).id.store(8),
            |error| matches!(error, E::Id { id: 8, .. }),
        ),
        ("an id twice", |area| entry_of(area, 3).id.store(1), |error| matches!(error, E::Id { id: 1, .. })),
    ];
    let (region, memory) = (region(), packed_driver::memory(1));
    for (name, change, expected) in cases {
        let driver = scene(&region, &memory);
        change(&area(&region));
        let error = recover(&region, &driver).expect_err(name);
        assert!(expected(&error), "{name}: {error}");
        assert_eq!(entry_of(&area(&region), 1).inflight.load(), 1, "{name}");
    }
    let driver = Driver::new(32, packed_driver::memory(1));
    assert_eq!(recover(&region, &driver).err(), Some(E::Small { entries: 16, size: 32 }));
}

/// Nothing says which chains they are, so nobody could ever give them back.
#[test]
fn chains_in_flight_without_a_record_are_refused() {
    let (region, memory) = (region(), packed_driver::memory(1));
    let mut driver = scene(&region, &memory);
    region.empty_queue(1);
    driver.layout.base = 0x8005_0003;
    let apart = AreaError::Unrecorded { descriptors: 6 };
    assert_eq!(recover(&region, &driver).err(), Some(apart));
    assert_eq!(area(&region).header().version.load(), 0, "left alone");
    driver.layout.base = 0x0003_0003;
    let (_, ring, ids) = recover(&region, &driver).expect("nothing is in flight");
    assert_eq!((ring.next_used(), ids), (driver.next, Vec::new()));
}

fn used(area: &QueueArea<Packed>, index: u16, old_index: u16, wrap: u8, old_wrap: u8) {
    area.header().used.store(UsedPositions { index, old_index, wrap, old_wrap }.word());
}

/// The first entry of the scene's chain with this buffer id. They follow those of the chain of five, which come first in
/// the list of free ones again.
fn entry_of(area: &QueueArea<Packed>, id: u16) -> &super::cells::PackedEntry {
    let is_first = |entry: &&super::cells::PackedEntry| entry.inflight.load() == 1 && entry.id.load() == id;
    area.entries().iter().find(is_first).expect("it is in flight")
}

#[test]
fn random_areas_neither_hang_nor_panic() {
    let (region, memory) = (region(), packed_driver::memory(1));
    let mut random = Random(3);
    let mut accepted = 0;
    for _ in 0..20_000 {
        let driver = scene(&region, &memory);
        let area = area(&region);
        for _ in 0..1 + random.below(4) {
            let entry = &area.entries()[random.below(16) as usize];
            let numbers = [random.below(17), random.below(1 << 16), u64::MAX >> random.below(64)];
            let number = numbers[random.below(3) as usize];
            match random.below(10) {
                0 => area.header().used.store(number | random.below(4) << 32 | random.below(9) << 16),
                1 => area.header().old_free_head.store(number as u16),
                2 => area.header().free_head.store(number as u16),
                3 => entry.next.store(number as u16),
                4 => entry.last.store(number as u16),
                5 => entry.num.store(number as u16),
                6 => entry.counter.store(number),
                7 => entry.inflight.store(number.min(2) as u8),
                8 => entry.id.store(number as u16),
                _ => entry.flags.store(number as u16),
            }
        }
        let Ok((mut tracker, mut ring, ids)) = recover(&region, &driver) else { continue };
        accepted += 1;
        let again = PackedTracker::recover(area, &mut ring).expect("it was sound before").in_flight;
        let mut chain = Chain::default();
        for recorded in &again {
            ring.take_again(recorded, &memory, &mut chain).expect("different ids in range");
        }
        let batch: Vec<Used> = ids.iter().map(|head| Used { head: *head, written: 1 }).collect();
        tracker.list(ids.iter().copied());
        ring.push_used(&batch).expect("a sound ring");
        tracker.clear(ids.iter().copied());
        assert!(recover(&region, &driver).expect("it was sound before").2.is_empty());
    }
    assert!(accepted > 1000, "{accepted}");
}
