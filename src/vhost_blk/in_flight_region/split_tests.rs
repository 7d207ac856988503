//! A model of a ring, its driver and its guest: the device dies before every single store in turn, also while it
//! recovers. From the guest's view each request must complete exactly once, and be done again in the order in which
//! it was taken. And areas that cannot be true.

use std::collections::{BTreeSet, VecDeque};

use super::cells::Split;
use super::defects::AreaError;
use super::split::{RingIndexes, SplitTracker};
use super::{Layout, Region, RingKind};
use crate::death;

const LAYOUT: Layout = Layout { kind: RingKind::Split, queues: 2, queue_size: 16 };

fn region() -> Region {
    Region::alone(LAYOUT).expect("a memfd")
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

/// A ring in guest memory with its driver. The indexes are never smaller than 65,500 at first, so that they wrap.
struct Ring {
    size: u16,
    available: u16,
    used: u16,
    /// Heads by slot.
    available_ring: Vec<u16>,
    used_ring: Vec<u16>,
    /// The used index up to which the driver has looked.
    seen: u16,
    free: Vec<u16>,
    /// For each descriptor the request that its chain carries while it is outstanding.
    outstanding: Vec<Option<u64>>,
    completed: BTreeSet<u64>,
    next_request: u64,
}

impl Ring {
    fn new(size: u16) -> Self {
        let slots = usize::from(size);
        Ring {
            size,
            available: 65500,
            used: 65500,
            available_ring: vec![0; slots],
            used_ring: vec![0; slots],
            seen: 65500,
            free: (0..size).collect(),
            outstanding: vec![None; slots],
            completed: BTreeSet::new(),
            next_request: 0,
        }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index % self.size)
    }

    /// The driver adds a request, if a descriptor is free. The descriptors are reused in any order.
    fn add(&mut self, random: &mut Random) {
        if self.free.is_empty() {
            return;
        }
        let head = self.free.swap_remove(random.below(self.free.len() as u64) as usize);
        self.outstanding[usize::from(head)] = Some(self.next_request);
        self.next_request += 1;
        let slot = self.slot(self.available);
        self.available_ring[slot] = head;
        self.available = self.available.wrapping_add(1);
    }

    /// The driver takes all completions: none of a request that is not outstanding.
    fn look(&mut self) {
        while self.seen != self.used {
            let head = self.used_ring[self.slot(self.seen)];
            let request = self.outstanding[usize::from(head)].take().expect("completed twice, or never sent");
            assert!(self.completed.insert(request));
            self.free.push(head);
            self.seen = self.seen.wrapping_add(1);
        }
    }

    fn indexes(&self) -> RingIndexes {
        RingIndexes { size: self.size, available: self.available, used: self.used }
    }
}

/// One device: what it has taken and not handed back.
struct Device {
    tracker: SplitTracker,
    next_available: u16,
    /// Heads in the order in which they were taken.
    taken: VecDeque<u16>,
}

impl Device {
    /// Starts on a ring that another may have left. `order` is that in which the last device took its chains.
    fn start(region: &Region, ring: &Ring, order: &[u64]) -> Self {
        let area = region.queue::<Split>(1).expect("an area");
        let recovered = SplitTracker::recover(area, ring.indexes()).expect("a sound area");
        let again: Vec<u64> = recovered
            .in_flight
            .iter()
            .map(|head| ring.outstanding[usize::from(*head)].expect("outstanding, or it is a phantom"))
            .collect();
        // Some of those taken were handed back; the others keep their order.
        let mut before = order.iter();
        assert!(again.iter().all(|request| before.any(|other| other == request)), "{again:?} of {order:?}");
        let next_available = ring.used.wrapping_add(again.len() as u16);
        Device { tracker: recovered.tracker, next_available, taken: recovered.in_flight.into() }
    }

    /// One step of a worker: takes some chains, then hands some back in any order.
    fn turn(&mut self, ring: &mut Ring, random: &mut Random, order: &mut Vec<u64>) {
        let waiting = ring.available.wrapping_sub(self.next_available);
        for _ in 0..random.below(u64::from(waiting) + 1) {
            let head = ring.available_ring[ring.slot(self.next_available)];
            // Noted first: if it dies at the next store, the chain may or may not count as taken.
            order.push(ring.outstanding[usize::from(head)].expect("made available"));
            self.tracker.begin(head);
            self.next_available = self.next_available.wrapping_add(1);
            self.taken.push_back(head);
        }
        let batch: Vec<u16> = (0..random.below(self.taken.len() as u64 + 1))
            .filter_map(|_| self.taken.swap_remove_back(random.below(self.taken.len() as u64) as usize))
            .collect();
        if batch.is_empty() {
            return;
        }
        self.tracker.list(batch.iter().copied());
        let mut next = ring.used;
        for head in &batch {
            let slot = ring.slot(next);
            ring.used_ring[slot] = *head;
            next = next.wrapping_add(1);
        }
        death::step();
        ring.used = next;
        // A guest on another processor sees them at once, and reuses the descriptors.
        ring.look();
        for _ in 0..random.below(3) {
            ring.add(random);
        }
        self.tracker.clear(batch.iter().copied(), next);
    }
}

/// Plays one case: devices that die after so many stores each, and a last one that does not. Returns whether the
/// first device died.
fn play(region: &Region, seed: u64, stores: &[u32]) -> bool {
    let mut random = Random(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15));
    region.queue::<Split>(1).expect("an area").header().version.store(0);
    let mut ring = Ring::new(1 << (1 + random.below(4)));
    let mut order = Vec::new();
    let mut first_died = false;
    for (number, stores) in stores.iter().enumerate() {
        let turns = 1 + random.below(6);
        let life = death::after(*stores, || {
            let mut device = Device::start(region, &ring, &order);
            for _ in 0..turns {
                for _ in 0..random.below(5) {
                    ring.add(&mut random);
                }
                device.turn(&mut ring, &mut random, &mut order);
            }
        });
        ring.look();
        first_died |= number == 0 && life.is_none();
    }
    // The last device serves until nothing is left.
    let mut device = Device::start(region, &ring, &order);
    while ring.completed.len() as u64 != ring.next_request {
        device.turn(&mut ring, &mut random, &mut order);
        ring.look();
    }
    assert!(device.taken.is_empty() && ring.free.len() == usize::from(ring.size));
    device.tracker.close();
    let after = Device::start(region, &Ring::new(8), &[]);
    assert!(after.taken.is_empty(), "whatever ring comes next");
    first_died
}

/// The order in which a device takes chains is checked only for those taken by the one before it: a chain that was
/// noted but not recorded is taken again later, in its place.
#[test]
fn each_request_completes_once_whichever_store_was_the_last() {
    let region = region();
    for seed in 1..=40 {
        let stores = (0..).take_while(|stores| play(&region, seed, &[*stores])).count();
        assert!(stores > 20, "the first device did something");
    }
}

#[test]
fn each_request_completes_once_however_many_devices_die() {
    let region = region();
    let mut random = Random(7);
    for seed in 1..=4000 {
        let deaths: Vec<u32> = (0..1 + random.below(6)).map(|_| random.below(60) as u32).collect();
        play(&region, seed, &deaths);
    }
}

/// An area with chains in flight on a ring of 8: heads 3, 1, 4 were taken in this order after index 100.
fn scene(region: &Region) -> RingIndexes {
    region.queue::<Split>(1).expect("an area").header().version.store(0);
    let start = RingIndexes { size: 8, available: 100, used: 100 };
    let mut tracker = recover(region, start).expect("an empty area").0;
    [3, 1, 4].into_iter().for_each(|head| tracker.begin(head));
    RingIndexes { available: 105, ..start }
}

fn recover(region: &Region, ring: RingIndexes) -> Result<(SplitTracker, Vec<u16>), AreaError> {
    let area = region.queue::<Split>(1).expect("an area");
    SplitTracker::recover(area, ring).map(|recovered| (recovered.tracker, recovered.in_flight))
}

#[test]
fn requests_that_were_taken_are_done_again_in_order() {
    let region = region();
    let ring = scene(&region);
    for _ in 0..3 {
        assert_eq!(recover(&region, ring).expect("a sound area").1, [3, 1, 4]);
    }
    let (mut tracker, _) = recover(&region, ring).expect("a sound area");
    tracker.begin(0);
    assert_eq!(recover(&region, ring).expect("a sound area").1, [3, 1, 4, 0], "counted on");
    tracker.list([1, 3].into_iter());
    assert_eq!(recover(&region, ring).expect("a sound area").1, [3, 1, 4, 0], "not handed back");
    let handed = RingIndexes { used: 102, ..ring };
    assert_eq!(recover(&region, handed).expect("a sound area").1, [4, 0], "handed back, not cleared");
    recover(&region, handed).expect("a sound area").0.close();
    assert!(recover(&region, handed).expect("an empty area").1.is_empty(), "all are back in the ring");
}

#[test]
fn an_area_without_outstanding_requests_begins_anew() {
    let region = region();
    scene(&region);
    // The guest has reset its ring.
    for used in [0, 40000] {
        let ring = RingIndexes { size: 16, available: used, used };
        assert!(recover(&region, ring).expect("an idle ring").1.is_empty());
        assert_eq!(region.queue::<Split>(1).expect("an area").header().used_idx.load(), used);
    }
}

#[test]
fn impossible_areas_are_refused_and_left_alone() {
    type Change = fn(&super::region::QueueArea<Split>);
    use AreaError as E;
    type Expected = fn(&AreaError) -> bool;
    let cases: [(&str, Change, Expected); 11] = [
        ("version", |area| area.header().version.store(2), |error| matches!(error, E::Version { .. })),
        ("features", |area| area.header().features.store(1), |error| matches!(error, E::Features { .. })),
        ("fewer states", |area| area.header().desc_num.store(8), |error| matches!(error, E::Count { .. })),
        (
            "more states",
            |area| area.header().desc_num.store(u16::MAX),
            |error| matches!(error, E::Count { .. }),
        ),
        (
            "a batch beyond the ring",
            |area| area.header().used_idx.store(91),
            |error| matches!(error, E::Batch { .. }),
        ),
        (
            "a used index ahead",
            |area| area.header().used_idx.store(101),
            |error| matches!(error, E::Batch { .. }),
        ),
        (
            "a loop",
            |area| {
                area.header().used_idx.store(92);
                area.header().last_batch_head.store(5);
                area.entries()[5].next.store(6);
                area.entries()[6].next.store(5);
            },
            |error| *error == E::BatchHead { head: 5 },
        ),
        (
            "a list out of range",
            |area| {
                area.header().used_idx.store(98);
                area.header().last_batch_head.store(5);
                area.entries()[5].next.store(u16::MAX);
            },
            |error| *error == E::BatchHead { head: u16::MAX },
        ),
        (
            "a head beyond the ring",
            |area| area.entries()[8].inflight.store(1),
            |error| *error == E::Head { head: 8, size: 8 },
        ),
        (
            "half in flight",
            |area| area.entries()[4].inflight.store(255),
            |error| *error == E::State { head: 4, state: 255 },
        ),
        (
            "the same counter",
            |area| area.entries()[4].counter.store(0),
            |error| matches!(error, E::Counter { counter: 0, .. }),
        ),
    ];
    let region = region();
    for (name, change, expected) in cases {
        let ring = scene(&region);
        change(&region.queue::<Split>(1).expect("an area"));
        let error = recover(&region, ring).expect_err(name);
        assert!(expected(&error), "{name}: {error}");
        let state = |head: usize| region.queue::<Split>(1).expect("an area").entries()[head].inflight.load();
        assert_eq!([state(1), state(3)], [1, 1], "{name}");
    }
    let ring = scene(&region);
    region.queue::<Split>(1).expect("an area").entries()[1].counter.store(u64::MAX);
    let large = E::Counter { head: 1, counter: u64::MAX };
    assert_eq!(recover(&region, ring).err(), Some(large));
    let ring = scene(&region);
    let few = RingIndexes { available: 102, ..ring };
    assert_eq!(recover(&region, few).err(), Some(E::TooMany { in_flight: 3, outstanding: 2 }));
    let wild = RingIndexes { available: 109, ..ring };
    assert_eq!(recover(&region, wild).err(), Some(E::Outstanding { outstanding: 9, size: 8 }));
    let large = RingIndexes { size: 32, ..ring };
    assert_eq!(recover(&region, large).err(), Some(E::Small { entries: 16, size: 32 }));
}

#[test]
fn random_areas_neither_hang_nor_panic() {
    let region = region();
    let mut random = Random(3);
    for _ in 0..20_000 {
        let ring = scene(&region);
        let area = region.queue::<Split>(1).expect("an area");
        for _ in 0..1 + random.below(4) {
            let entry = &area.entries()[random.below(16) as usize];
            let number = [random.below(16), random.below(1 << 16), 100, u64::MAX >> random.below(64)];
            let number = number[random.below(4) as usize];
            match random.below(6) {
                0 => area.header().used_idx.store(100 - random.below(10) as u16),
                1 => area.header().last_batch_head.store(number as u16),
                2 => entry.next.store(number as u16),
                3 => entry.counter.store(number),
                4 => entry.inflight.store(number.min(2) as u8),
                _ => area.header().desc_num.store(number as u16),
            }
        }
        if let Ok((_, in_flight)) = recover(&region, ring) {
            assert!(in_flight.len() <= 5 && in_flight.iter().all(|head| *head < 8));
        }
    }
}
