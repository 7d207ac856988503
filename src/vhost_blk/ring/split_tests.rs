//! The split ring against a hand-driven guest: in one mapping and across several, and the states that the guest can see.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestMemory, MemoryTable, RegionInfo};
use crate::part::Part;
use crate::ring::{Chain, RingLayout, SplitRing, Used};

const REGION: u64 = 0x1000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Memory of `regions` adjacent regions, each in its own mapping.
fn memory(regions: u64) -> Arc<GuestMemory> {
    let infos: Vec<_> = (0..regions)
        .map(|n| RegionInfo { guest: n * REGION, size: REGION, user: n * REGION, offset: 0 })
        .collect();
    let file = |_: &RegionInfo| -> File {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(REGION).expect("its length");
        file
    };
    let files = infos.iter().map(file).collect();
    MemoryTable::new().with_regions(&infos, files).expect("sound regions").memory()
}

fn layout(size: u16, descriptors: u64, available: u64, used: u64) -> RingLayout {
    RingLayout { size, descriptors, available, used, base: 0, event_index: true, indirect: true }
}

/// The three parts in one mapping.
const TOGETHER: (u64, u64, u64) = (0x0, 0x400, 0x800);
/// Each part, and an element of the used ring, crosses the end of a mapping.
const SPREAD: (u64, u64, u64) = (0x0ff0, 0x1ffa, 0x2ff0);

fn write(memory: &GuestMemory, bytes: &[u8], address: u64) {
    memory.map().write_slice(bytes, GuestAddress(address)).expect("guest memory");
}

fn read<const N: usize>(memory: &GuestMemory, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.map().read_slice(&mut bytes, GuestAddress(address)).expect("guest memory");
    bytes
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
    let (address, length) = (address.to_le_bytes(), length.to_le_bytes());
    [&address[..], &length, &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

#[test]
fn a_ring_over_several_mappings_is_as_good_as_in_one() {
    for (descriptors, available, used) in [TOGETHER, SPREAD] {
        let memory = memory(5);
        let mut ring =
            SplitRing::new(&layout(4, descriptors, available, used), &memory).expect("a sound ring");
        assert!(!ring.was_used());
        // Chain 0 consists of descriptors 0 and 3; chain 1 has an indirect table that crosses the end of a mapping.
        let table = 4 * REGION - 16;
        write(&memory, &descriptor(0x100, 16, NEXT, 3), descriptors);
        write(&memory, &descriptor(table, 32, INDIRECT, 0), descriptors + 16);
        write(&memory, &descriptor(0x200, 1, WRITE, 0), descriptors + 48);
        write(&memory, &[descriptor(0x300, 8, NEXT, 1), descriptor(0x310, 9, WRITE, 0)].concat(), table);
        write(&memory, &[0, 0, 1, 0], available + 4);
        assert!(!ring.enable_kicks().expect("a sound ring"), "nothing waits");
        write(&memory, &2u16.to_le_bytes(), available + 2);
        assert!(ring.enable_kicks().expect("a sound ring"), "two chains wait");
        assert_eq!(ring.available().expect("a sound ring"), 2);
        let mut chain = Chain::default();
        for (head, lengths) in [(0, (16, 1)), (1, (8, 9))] {
            ring.pop(&memory, &mut chain).expect("a sound ring");
            let found = (chain.readable[0].len(), chain.writable[0].len());
            assert_eq!((chain.head, chain.fault, found), (head, None, lengths));
        }
        assert_eq!(ring.available().expect("a sound ring"), 0);
        ring.enable_kicks().expect("a sound ring");
        assert_eq!(read(&memory, used + 4 + 4 * 8), 2u16.to_le_bytes(), "a kick for the third chain");
        let given = [Used { head: 1, written: 9 }, Used { head: 0, written: 1 }];
        ring.push_used(&given).expect("a sound ring");
        assert_eq!(read(&memory, used + 2), 2u16.to_le_bytes());
        let elements: [u8; 16] = read(&memory, used + 4);
        assert_eq!(elements, [1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert!(ring.needs_notification().expect("a sound ring"), "for the first of them");
        assert!(!ring.needs_notification().expect("a sound ring"), "nothing since");
    }
}

#[test]
fn notifications_follow_the_event_index() {
    let memory = memory(1);
    let (descriptors, available, used) = TOGETHER;
    let mut ring = SplitRing::new(&layout(4, descriptors, available, used), &memory).expect("a sound ring");
    let heads: Vec<u8> = (0..4u8).flat_map(|head| [head, 0]).collect();
    write(&memory, &heads, available + 4);
    (0..4).for_each(|n| write(&memory, &descriptor(0x100, 1, WRITE, 0), descriptors + 16 * n));
    let mut chain = Chain::default();
    let mut done = 0u16;
    let mut ask = |ring: &mut SplitRing, count: u16, event: u16| {
        write(&memory, &event.to_le_bytes(), available + 4 + 2 * 4);
        write(&memory, &(done + count).to_le_bytes(), available + 2);
        for _ in 0..count {
            ring.pop(&memory, &mut chain).expect("a sound ring");
            ring.push_used(&[Used { head: chain.head, written: 1 }]).expect("a sound ring");
        }
        done += count;
        ring.needs_notification().expect("a sound ring")
    };
    assert!(!ask(&mut ring, 2, 2), "0 and 1 were given back, 2 is waited for");
    assert!(ask(&mut ring, 1, 2), "now 2 was");
    assert!(ask(&mut ring, 4, 5), "5 is among 3 to 6");
    assert!(!ask(&mut ring, 1, 5), "that was told");
    assert!(!ask(&mut ring, 1, 9), "8 was given back, 9 is waited for");
}

/// Not one chain at a time: a polling guest would find a batch in bits, and each store takes the cache line from it.
#[test]
fn a_batch_is_given_back_at_once() {
    const BATCH: u16 = 32;
    let memory = memory(1);
    let (descriptors, available, used) = TOGETHER;
    let mut ring =
        SplitRing::new(&layout(BATCH, descriptors, available, used), &memory).expect("a sound ring");
    for head in 0..BATCH {
        write(&memory, &descriptor(0x100, 1, WRITE, 0), descriptors + 16 * u64::from(head));
        write(&memory, &head.to_le_bytes(), available + 4 + 2 * u64::from(head));
    }
    let over = AtomicBool::new(false);
    let part = Part::find(&memory, used, 4).expect("guest memory");
    let odd = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut odd = None;
            while !over.load(Ordering::Relaxed) {
                let index = part.load(2, Ordering::Acquire).expect("guest memory");
                odd = odd.or(Some(index).filter(|index| index % BATCH != 0));
            }
            odd
        });
        let (mut chain, mut given) = (Chain::default(), Vec::new());
        for round in 1..=20_000u16 {
            write(&memory, &(round.wrapping_mul(BATCH)).to_le_bytes(), available + 2);
            for _ in 0..ring.available().expect("a sound ring") {
                ring.pop(&memory, &mut chain).expect("a sound ring");
                given.push(Used { head: chain.head, written: 1 });
            }
            assert_eq!(given.len(), usize::from(BATCH));
            ring.push_used(&given).expect("a sound ring");
            given.clear();
        }
        over.store(true, Ordering::Relaxed);
        guest.join().expect("it only looks")
    });
    assert_eq!(odd, None, "the guest has seen a part of a batch");
}

#[test]
fn impossible_layouts_are_refused() {
    let memory = memory(2);
    let (descriptors, available, used) = TOGETHER;
    let refused = |size, descriptors, available, used| {
        SplitRing::new(&layout(size, descriptors, available, used), &memory).is_err()
    };
    assert!(!refused(8, descriptors, available, used));
    assert!(refused(0, descriptors, available, used));
    assert!(refused(12, descriptors, available, used));
    assert!(refused(8, descriptors + 8, available, used));
    assert!(refused(8, descriptors, available + 1, used));
    assert!(refused(8, descriptors, available, used + 2));
    assert!(!refused(8, 2 * REGION - 128, available, used), "up to the end of memory");
    assert!(refused(8, 2 * REGION - 112, available, used), "past it");
    assert!(!refused(8, descriptors, 2 * REGION - 22, used));
    assert!(refused(8, descriptors, 2 * REGION - 20, used));
    assert!(!refused(8, descriptors, available, 2 * REGION - 72));
    assert!(refused(8, descriptors, available, 2 * REGION - 68));
}

#[test]
fn a_part_is_not_left() {
    let memory = memory(3);
    for (base, bytes) in [(0x100, 16), (REGION - 8, 16)] {
        let part = Part::find(&memory, base, bytes).expect("guest memory");
        assert!(part.write(0x0102_0304_0506_0708u64, 8).is_ok());
        assert_eq!(part.read::<u64>(8).ok(), Some(0x0102_0304_0506_0708));
        assert_eq!(part.load(14, Ordering::Relaxed).ok(), Some(0x0102));
        assert!(part.store(7, 14, Ordering::Relaxed).is_ok());
        for offset in [9, 15, 16, usize::MAX] {
            assert!(part.write(0u64, offset).is_err() && part.read::<u64>(offset).is_err());
            let past = if offset == 9 { 15 } else { offset };
            assert!(part.load(past, Ordering::Relaxed).is_err());
            assert!(part.store(0, past, Ordering::Relaxed).is_err());
        }
    }
    assert!(Part::find(&memory, 3 * REGION - 8, 9).is_err());
}
