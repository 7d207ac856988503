//! The packed ring against a model of its driver: in one mapping and across several, under random use, with hostile
//! descriptors, and the states that the guest can see.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::RingError;
use crate::packed_driver::{DATA, DESCRIPTOR, DISABLE, Driver, INDIRECT, NEXT, Piece, REGION, WRITE, memory};
use crate::part::Part;
use crate::ring::{Chain, Fault, PackedRing, Position, RingLayout, Used};

fn piece(address: u64, length: u32, flags: u16) -> Piece {
    Piece { address, length, flags }
}

/// A table of descriptors at an address, for an indirect one. Each claims to go on, which counts for nothing.
fn table(driver: &Driver, at: u64, pieces: &[Piece]) -> Piece {
    for (number, piece) in (0..).zip(pieces) {
        driver.write_descriptor(at + 16 * number, *piece, 0xffff, piece.flags | NEXT);
    }
    Piece { address: at, length: 16 * pieces.len() as u32, flags: INDIRECT }
}

fn pop(ring: &mut PackedRing, driver: &Driver) -> Result<Chain, RingError> {
    let mut chain = Chain::default();
    ring.pop(&driver.memory, &mut chain).map(|()| chain)
}

/// The lengths of a chain's parts.
fn lengths(chain: &Chain) -> (Vec<usize>, Vec<usize>) {
    let of = |parts: &[crate::device::GuestSlice]| parts.iter().map(|part| part.len()).collect();
    (of(&chain.readable), of(&chain.writable))
}

#[test]
fn a_ring_over_several_mappings_is_as_good_as_in_one() {
    let together = Driver::new(5, memory(5)).layout;
    let spread =
        RingLayout { descriptors: REGION - 32, available: REGION * 2, used: REGION * 3 + 4, ..together };
    for layout in [together, spread] {
        let mut driver = Driver::at(layout, memory(5));
        let mut ring = driver.ring();
        assert!(!ring.was_used() && ring.available() == Ok(0));
        assert!(!ring.enable_kicks().expect("a sound ring"), "nothing waits");
        assert_eq!(driver.wanted_kicks(), (DESCRIPTOR, Position::START));
        // The table crosses the end of a mapping.
        let parts = table(&driver, 4 * REGION - 16, &[piece(DATA, 8, 0), piece(DATA + 16, 9, WRITE)]);
        driver.add(0, 4, &[piece(DATA, 16, 0), piece(DATA + 32, 2, WRITE), piece(DATA + 48, 1, WRITE)]);
        driver.add(1, 1, &[parts]);
        assert!(ring.enable_kicks().expect("a sound ring"), "two chains wait");
        assert_eq!(ring.available(), Ok(2));
        let direct = pop(&mut ring, &driver).expect("a sound chain");
        assert_eq!((direct.head, direct.fault, lengths(&direct)), (4, None, (vec![16], vec![2, 1])));
        let indirect = pop(&mut ring, &driver).expect("a sound chain");
        assert_eq!((indirect.head, indirect.fault, lengths(&indirect)), (1, None, (vec![8], vec![9])));
        assert_eq!((ring.available(), ring.base()), (Ok(0), 0x8000_8004));
        ring.disable_kicks().expect("a sound ring");
        assert_eq!(driver.wanted_kicks().0, DISABLE);
        ring.push_used(&[Used { head: 1, written: 9 }, Used { head: 4, written: 0 }]).expect("a sound ring");
        assert_eq!(driver.take().map(|(id, was, written)| (id, was.request, written)), Some((1, 1, 9)));
        assert_eq!(driver.take().map(|(id, was, written)| (id, was.request, written)), Some((4, 0, 0)));
        assert_eq!((ring.base(), ring.next_used()), (0x8004_8004, driver.seen));
        assert!(driver.take().is_none() && ring.was_used());
    }
}

/// Any mixture of chains, batches and orders, on rings of any size, through many laps: the device gets what the driver
/// sent, and the driver what the device handed back.
#[test]
fn driver_and_device_agree_through_many_laps() {
    let memory = memory(1);
    let mut number = 1u64;
    let mut below = |limit: usize| {
        number = number.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (number >> 33) as usize % limit
    };
    for size in [1, 2, 3, 5, 8, 13, 16] {
        let mut driver = Driver::new(size, Arc::clone(&memory));
        (0..size).for_each(|index| driver.write(&[0; 16], driver.descriptor(index)));
        let mut ring = driver.ring();
        let mut taken: VecDeque<Used> = VecDeque::new();
        let (mut sent, mut got, mut answered) = (0u64, 0u64, 0u64);
        while answered < 2000 {
            let ids: Vec<u16> =
                (0..size).filter(|id| driver.outstanding[usize::from(*id)].is_none()).collect();
            let count = 1 + below(3) as u16;
            if !ids.is_empty() && count <= driver.free && below(3) > 0 {
                let pieces = (0..count).map(|part| piece(DATA + sent % 64, 1 + u32::from(part), WRITE));
                driver.add(sent, ids[below(ids.len())], &pieces.collect::<Vec<_>>());
                sent += 1;
            }
            let waiting = ring.available().expect("a sound ring");
            assert_eq!(u64::from(waiting), sent - got);
            for _ in 0..below(usize::from(waiting) + 1) {
                let chain = pop(&mut ring, &driver).expect("a sound chain");
                let was = driver.outstanding[usize::from(chain.head)].clone().expect("it was sent");
                let expected: Vec<_> = was.pieces.iter().map(|piece| piece.length as usize).collect();
                assert_eq!((was.request, lengths(&chain).1), (got, expected), "in the order of the ring");
                taken.push_back(Used { head: chain.head, written: got as u32 });
                got += 1;
            }
            let batch: Vec<Used> = (0..below(taken.len() + 1))
                .map(|_| taken.swap_remove_back(below(taken.len())).expect("one of them"))
                .collect();
            ring.push_used(&batch).expect("a sound ring");
            for used in &batch {
                let (id, was, written) = driver.take().expect("handed back, in this order");
                assert_eq!((id, was.request as u32, written), (used.head, used.written, used.written));
                answered += 1;
            }
            assert!(driver.take().is_none());
            assert_eq!((ring.next_used(), driver.seen.index() < size), (driver.seen, true));
        }
    }
}

#[test]
fn a_chain_that_went_back_is_taken_again() {
    let mut driver = Driver::new(4, memory(1));
    let mut ring = driver.ring();
    driver.add(0, 2, &[piece(DATA, 1, WRITE); 2]);
    driver.add(1, 0, &[piece(DATA, 1, WRITE); 2]);
    assert_eq!(ring.available(), Ok(2));
    pop(&mut ring, &driver).expect("a sound chain");
    let taken = ring.taken();
    assert_eq!(pop(&mut ring, &driver).expect("a sound chain").head, 0);
    ring.push_used(&[Used { head: 2, written: 1 }]).expect("a sound ring");
    ring.put_back(0);
    assert_eq!((ring.taken(), ring.available(), ring.base()), (taken, Ok(1), 0x8002_8002));
    driver.take().expect("the first one");
    driver.add(2, 1, &[piece(DATA, 1, WRITE); 2]);
    assert_eq!(ring.available(), Ok(2));
    for id in [0, 1] {
        assert_eq!(pop(&mut ring, &driver).expect("a sound chain").head, id);
    }
}

/// After an even number of laps both positions are where they began. The descriptors tell.
#[test]
fn a_ring_that_came_round_to_its_start_was_used() {
    for size in [1, 4, 7] {
        let mut driver = Driver::new(size, memory(1));
        let mut ring = driver.ring();
        for lap in 1..=4 {
            let lengths = if size == 1 { vec![1] } else { vec![usize::from(size) - 1, 1] };
            for length in lengths {
                driver.add(0, 0, &vec![piece(DATA, 1, WRITE); length]);
                let is_new = lap == 1 && ring.base() == PackedRing::START_BASE;
                assert!(!is_new || !driver.ring().was_used(), "made available, and nobody came");
                assert_eq!(ring.available(), Ok(1));
                pop(&mut ring, &driver).expect("a sound chain");
                ring.push_used(&[Used { head: 0, written: 1 }]).expect("a sound ring");
                driver.take().expect("handed back");
            }
            driver.layout.base = ring.base();
            assert_eq!(ring.base() == PackedRing::START_BASE, lap % 2 == 0);
            assert!(driver.ring().was_used(), "{size} descriptors, {lap} laps");
            driver.layout.base = PackedRing::START_BASE;
        }
    }
    let driver = Driver::new(4, memory(1));
    driver.write_descriptor(driver.descriptor(0), piece(DATA, 1, WRITE), 3, 0);
    assert!(!driver.ring().was_used(), "the driver is just making its first chain available");
}

#[test]
fn notifications_follow_the_drivers_event() {
    let mut driver = Driver::new(5, memory(1));
    let mut ring = driver.ring();
    let mut ask = |ring: &mut PackedRing, count: usize, flags: u16, event: Position| {
        driver.want(flags, event);
        for _ in 0..count {
            driver.add(0, 3, &[piece(DATA, 1, WRITE)]);
            assert_eq!(ring.available(), Ok(1));
            pop(ring, &driver).expect("a sound chain");
            ring.push_used(&[Used { head: 3, written: 1 }]).expect("a sound ring");
            driver.take().expect("handed back");
        }
        ring.needs_notification().expect("a sound ring")
    };
    let at = |index, wrap| Position::new(index, wrap);
    assert!(!ask(&mut ring, 2, DESCRIPTOR, at(2, true)), "0 and 1 were given back, 2 is waited for");
    assert!(ask(&mut ring, 1, DESCRIPTOR, at(2, true)), "now 2 was");
    assert!(ask(&mut ring, 4, DESCRIPTOR, at(1, false)), "3, 4 and, of the next lap, 0 and 1");
    assert!(!ask(&mut ring, 1, DESCRIPTOR, at(1, false)), "that was told");
    assert!(!ask(&mut ring, 1, DESCRIPTOR, at(3, true)), "3 of another lap");
    assert!(ask(&mut ring, 1, DESCRIPTOR, at(5, true)), "5 is not in the ring");
    assert!(ask(&mut ring, 1, 0, at(0, true)), "always");
    assert!(!ask(&mut ring, 1, DISABLE, at(0, true)), "never");
    let plain = RingLayout { event_index: false, ..Driver::new(5, memory(1)).layout };
    let mut driver = Driver::at(plain, memory(1));
    let mut ring = driver.ring();
    driver.add(0, 3, &[piece(DATA, 1, WRITE)]);
    assert!(ring.enable_kicks().expect("a sound ring"), "a chain waits");
    assert_eq!(driver.wanted_kicks(), (0, Position::new(0, false)), "no position without event indexes");
    driver.want(DESCRIPTOR, Position::new(4, true));
    assert!(ring.needs_notification().expect("a sound ring"), "not negotiated");
}

/// Not one chain at a time: a polling guest would find a batch in bits.
#[test]
fn a_batch_is_given_back_at_once() {
    const BATCH: u16 = 32;
    let mut driver = Driver::new(BATCH, memory(1));
    let mut ring = driver.ring();
    let over = AtomicBool::new(false);
    let part = Part::find(&driver.memory, 0, 16 * usize::from(BATCH)).expect("guest memory");
    let is_used = |index: u16, wrap: bool, order| {
        let flags = part.load(usize::from(index) * 16 + 14, order).expect("guest memory");
        flags & 0x8080 == if wrap { 0x8080 } else { 0 }
    };
    let odd = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let (mut odd, mut wrap) = (false, true);
            while !over.load(Ordering::Relaxed) {
                if is_used(0, wrap, Ordering::Acquire) {
                    // They stay so until the driver reuses them, which it does in the lap after the one that is next.
                    let last = part.load(usize::from(BATCH - 1) * 16 + 14, Ordering::Relaxed);
                    odd |= last.expect("guest memory") & 0x8000 != if wrap { 0x8000 } else { 0 }
                        && is_used(0, wrap, Ordering::Acquire);
                    wrap = !wrap;
                }
            }
            odd
        });
        for _ in 0..10_000 {
            (0..BATCH).for_each(|id| driver.add(0, id, &[piece(DATA, 1, WRITE)]));
            let mut given = Vec::new();
            assert_eq!(ring.available(), Ok(BATCH));
            for _ in 0..BATCH {
                given.push(Used { head: pop(&mut ring, &driver).expect("a sound chain").head, written: 1 });
            }
            ring.push_used(&given).expect("a sound ring");
            (0..BATCH).for_each(|_| drop(driver.take().expect("all of them")));
        }
        over.store(true, Ordering::Relaxed);
        guest.join().expect("it only looks")
    });
    assert!(!odd, "the guest has seen a part of a batch");
}

#[test]
fn a_bad_chain_is_taken_with_its_fault() {
    let far = 1 << 40;
    type Make = fn(&Driver) -> Vec<Piece>;
    let (read, write) = (piece(DATA, 4, 0), piece(DATA, 4, WRITE));
    let cases: Vec<(&str, Vec<Piece>, Option<Fault>)> = vec![
        ("sound", vec![read, write], None),
        ("readable after writable", vec![write, read], Some(Fault::Malformed)),
        ("a far part", vec![piece(far, 4, 0), write], Some(Fault::Unreachable)),
        ("a far end", vec![read, piece(far, 4, WRITE)], Some(Fault::Malformed)),
        ("an overflow", vec![piece(u64::MAX - 1, 4, 0), write], Some(Fault::Unreachable)),
        ("indirect after another", vec![read, piece(DATA, 16, INDIRECT)], Some(Fault::Malformed)),
        ("indirect before another", vec![piece(DATA, 16, INDIRECT), write], Some(Fault::Malformed)),
        ("an empty table", vec![piece(DATA, 0, INDIRECT)], Some(Fault::Malformed)),
        ("a table of a half", vec![piece(DATA, 24, INDIRECT)], Some(Fault::Malformed)),
        ("a far table", vec![piece(far, 16, INDIRECT)], Some(Fault::Malformed)),
        ("a table past the end", vec![piece(REGION - 16, 32, INDIRECT)], Some(Fault::Malformed)),
        ("a table that is too long", vec![piece(0, 16 * 1025, INDIRECT)], Some(Fault::Malformed)),
    ];
    let made: [(&str, Make, Option<Fault>); 2] = [
        (
            "a sound table",
            |driver| vec![table(driver, 0xc00, &[piece(DATA, 4, 0), piece(DATA, 4, WRITE)])],
            None,
        ),
        (
            "a table with its writable part first",
            |driver| vec![table(driver, 0xd00, &[piece(DATA, 4, WRITE), piece(DATA, 4, 0)])],
            Some(Fault::Malformed),
        ),
    ];
    for regions in [1, 8] {
        let mut driver = Driver::new(7, memory(regions));
        let mut ring = driver.ring();
        let made = made.iter().map(|(name, make, fault)| (*name, make(&driver), *fault)).collect::<Vec<_>>();
        for (name, pieces, fault) in made.into_iter().chain(cases.clone()) {
            if regions > 1 && name == "a table past the end" {
                continue;
            }
            driver.add(0, 2, &pieces);
            assert_eq!(ring.available(), Ok(1), "{name}");
            let chain = pop(&mut ring, &driver).expect(name);
            assert_eq!((chain.head, chain.fault), (2, fault), "{name}");
            if fault == Some(Fault::Malformed) {
                assert!(chain.readable.is_empty() && chain.writable.is_empty(), "{name}");
            }
            ring.push_used(&[Used { head: 2, written: 0 }]).expect(name);
            assert!(driver.take().is_some(), "{name}");
        }
    }
    let without = RingLayout { indirect: false, ..Driver::new(7, memory(1)).layout };
    let mut driver = Driver::at(without, memory(1));
    let pieces = table(&driver, 0xc00, &[read, write]);
    driver.add(0, 2, &[pieces]);
    let mut ring = driver.ring();
    assert_eq!(ring.available(), Ok(1));
    let chain = pop(&mut ring, &driver).expect("a chain");
    assert_eq!(chain.fault, Some(Fault::Malformed), "not negotiated");
}

#[test]
fn a_corrupt_ring_is_refused() {
    let part = piece(DATA, 1, WRITE);
    let write = |driver: &Driver, index: u16, flags: u16| {
        let flags = flags | Driver::available_flags(Position::new(index, true));
        driver.write_descriptor(driver.descriptor(index), part, 1, flags);
    };
    // Descriptors 0 and 1 of a ring of 4 are in flight, as one chain.
    let start = || {
        let mut driver = Driver::new(4, memory(1));
        driver.add(0, 3, &[part; 2]);
        let mut ring = driver.ring();
        assert_eq!(ring.available(), Ok(1));
        pop(&mut ring, &driver).expect("a sound chain");
        (driver, ring)
    };
    let (driver, mut ring) = start();
    [2, 3].into_iter().for_each(|index| write(&driver, index, NEXT));
    assert_eq!(
        ring.available(),
        Err(RingError::ChainTooLong { index: 2, room: 2 }),
        "into what is in flight"
    );
    let (driver, mut ring) = start();
    write(&driver, 2, NEXT);
    assert_eq!(ring.available(), Err(RingError::ChainCut { index: 3 }));
    for (id, expected) in
        [(4, RingError::IdOutOfRange { id: 4, size: 4 }), (3, RingError::IdInFlight { id: 3 })]
    {
        let (driver, mut ring) = start();
        write(&driver, 2, 0);
        driver.write(&u16::to_le_bytes(id), driver.descriptor(2) + 12);
        assert_eq!(ring.available(), Ok(1));
        assert_eq!(pop(&mut ring, &driver).err(), Some(expected));
    }
    // Each was counted as one of two chains, and then changed.
    let changes: [(u16, u16); 3] = [(2, NEXT), (2, 1 << 15), (3, 1 << 15)];
    for (index, flags) in changes {
        let (driver, mut ring) = start();
        [2, 3].into_iter().for_each(|index| write(&driver, index, 0));
        driver.write(&[2], driver.descriptor(3) + 12);
        assert_eq!(ring.available(), Ok(2));
        write(&driver, index, flags);
        let first = pop(&mut ring, &driver).map(|_| ());
        let changed = first.and_then(|()| pop(&mut ring, &driver).map(|_| ()));
        assert!(matches!(changed, Err(RingError::ChainChanged { .. })), "{index}, {flags:#x}: {changed:?}");
    }
    let (driver, mut ring) = start();
    [2, 3].into_iter().for_each(|index| write(&driver, index, if index == 2 { NEXT } else { 0 }));
    assert_eq!(ring.available(), Ok(1));
    write(&driver, 2, 0);
    assert!(matches!(pop(&mut ring, &driver), Err(RingError::ChainChanged { .. })), "shorter than it was");
}

#[test]
fn impossible_layouts_and_bases_are_refused() {
    let memory = memory(2);
    let sound = Driver::new(7, Arc::clone(&memory)).layout;
    let accepted = |layout: RingLayout| PackedRing::new(&layout, &memory).is_ok();
    let end = 2 * REGION;
    assert!(accepted(sound) && accepted(RingLayout { size: 1, ..sound }));
    assert!(!accepted(RingLayout { size: 0, ..sound }) && !accepted(RingLayout { size: 32769, ..sound }));
    assert!(!accepted(RingLayout { descriptors: 8, ..sound }));
    assert!(!accepted(RingLayout { available: 2, ..sound }) && !accepted(RingLayout { used: 2, ..sound }));
    assert!(accepted(RingLayout { descriptors: end - 112, ..sound }), "up to the end of memory");
    assert!(!accepted(RingLayout { descriptors: end - 96, ..sound }));
    assert!(accepted(RingLayout { used: end - 4, available: end - 4, ..sound }));
    assert!(
        !accepted(RingLayout { used: end, ..sound }) && !accepted(RingLayout { available: end, ..sound })
    );
    let positions = |base| {
        let ring = PackedRing::new(&RingLayout { base, ..sound }, &memory);
        ring.map(|ring| (ring.next_available(), ring.next_used())).ok()
    };
    let at = |index, wrap| Position::new(index, wrap);
    assert_eq!(positions(0x8000_8000), Some((Position::START, Position::START)));
    assert_eq!(positions(0x0003_0006), Some((at(6, false), at(3, false))));
    assert_eq!(positions(0x8006_0002), Some((at(2, false), at(6, true))), "over the end of a lap");
    assert_eq!(positions(0x0000_8005), Some((at(5, true), at(5, true))), "only one position");
    assert_eq!(positions(0x8003_0003), Some((at(3, false), at(3, true))), "all in flight");
    for base in [0x8007_8007, 0x8000_8007, 0x8007_8000, 0xffff_ffff, 0x8003_8002, 0x8003_0004] {
        assert_eq!(positions(base), None, "{base:#x}");
    }
}
