//! The cost of a packed ring and of parsing a request. Run by `cargo bench-paths` (docs/performance.md, "What an operation
//! costs"). It writes the guest's side of the ring itself, and uses no disk.

mod guest;
mod harness;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost_blk::internals::{
    Chain, GuestMemory, PackedDescriptor, PackedRing, PackedTracker, RingLayout, Used,
};
use vm_memory::{Bytes, GuestAddress};

use guest::*;
use harness::{Case, Named};

const CASES: &[Named] = &[
    ("packed: pop and parse, 3 descriptors", || pops::<PackedRing>(Shape::Direct, parse)),
    ("packed: pop and parse, indirect table of 3", || pops::<PackedRing>(Shape::Indirect, parse)),
    ("packed: push of 1, and whether to notify", || pushes::<PackedRing>(1)),
    ("packed: push of 32, and whether to notify", || pushes::<PackedRing>(32)),
    ("packed: in-flight record of 1, taken and handed back", || records(1)),
    ("packed: in-flight record of 32, taken and handed back", || records(32)),
];

fn main() {
    harness::main("vhost_blk-packed", CASES);
}

/// Descriptors of a read in the ring.
fn descriptors(shape: Shape) -> u16 {
    match shape {
        Shape::Direct => 3,
        Shape::Indirect => 1,
    }
}

impl Ring for PackedRing {
    const BASE: u32 = 0x8000_8000;

    fn open(layout: &RingLayout, memory: &Arc<GuestMemory>) -> Self {
        let mut ring = PackedRing::new(layout, memory).expect("a valid ring");
        ring.disable_kicks().expect("a valid ring");
        // The driver wants a notification for one descriptor of a lap.
        let flags = GuestAddress(AVAILABLE + 2);
        memory.map().store(2u16, flags, Ordering::Release).expect("guest memory");
        ring
    }

    fn offer(memory: &GuestMemory, shape: Shape, before: u64) {
        for chain in 0..CHAINS {
            let first = (before + u64::from(chain)) * u64::from(descriptors(shape));
            for (number, (address, length, flags)) in (first..).zip(parts(memory, shape, chain)) {
                let available = if number / u64::from(SIZE) % 2 == 0 { 1 << 7 } else { 1 << 15 };
                let raw = descriptor(address, length, chain, flags | available);
                let at = DESCRIPTORS + 16 * (number % u64::from(SIZE));
                memory.map().write_slice(&raw, GuestAddress(at)).expect("guest memory");
            }
        }
    }

    fn available(&mut self) -> u16 {
        PackedRing::available(self).expect("a valid ring")
    }

    fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) {
        PackedRing::pop(self, memory, chain).expect("a valid ring");
    }

    fn push(&mut self, used: &[Used]) -> bool {
        self.push_used(used).expect("a valid ring");
        self.needs_notification().expect("a valid ring")
    }
}

/// Writes a read for a packed ring. Returns the address, length and flags of each of its descriptors in the ring.
fn parts(memory: &GuestMemory, shape: Shape, chain: u16) -> Vec<(u64, u32, u16)> {
    let three = three(memory, chain);
    if let Shape::Direct = shape {
        return three.to_vec();
    }
    let table = TABLES + 48 * u64::from(chain);
    let entries = three.map(|(address, length, flags)| descriptor(address, length, 0, flags)).concat();
    memory.map().write_slice(&entries, GuestAddress(table)).expect("guest memory");
    vec![(table, 48, INDIRECT)]
}

/// The stores to the in-flight region for chains of three descriptors that a worker takes and hands back in batches.
fn records(batch: u16) -> Case {
    let ids: Vec<u16> = (0..CHAINS).collect();
    let part = |flags| PackedDescriptor { address: DATA, length: BLOCK, id: 0, flags };
    let state = (PackedTracker::alone(SIZE), ids, [part(NEXT), part(NEXT | WRITE), part(WRITE)]);
    Case::new(
        u64::from(CHAINS / batch),
        state,
        |_| {},
        move |(tracker, ids, chain)| {
            for ids in ids.chunks(usize::from(batch)) {
                black_box(ids).iter().for_each(|id| tracker.begin(*id, black_box(&chain[..])));
                tracker.list(ids.iter().copied());
                tracker.clear(ids.iter().copied());
            }
        },
    )
}
