//! The cost of a split ring and of parsing a request. Run by `cargo bench-paths` (docs/performance.md, "What an operation
//! costs"). It writes the guest's side of the ring itself, and uses no disk.

mod guest;
mod harness;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost_blk::internals::{Chain, GuestMemory, RingLayout, SplitRing, SplitTracker, Used};
use vm_memory::{Bytes, GuestAddress};

use guest::*;
use harness::{Case, Named};

const CASES: &[Named] = &[
    ("pop, 3 descriptors", || pops::<SplitRing>(Shape::Direct, |_, _| {})),
    ("pop, indirect table of 3", || pops::<SplitRing>(Shape::Indirect, |_, _| {})),
    ("pop and parse, 3 descriptors", || pops::<SplitRing>(Shape::Direct, parse)),
    ("pop and parse, indirect table of 3", || pops::<SplitRing>(Shape::Indirect, parse)),
    ("push of 1, and whether to notify", || pushes::<SplitRing>(1)),
    ("push of 32, and whether to notify", || pushes::<SplitRing>(32)),
    ("in-flight record of 1, taken and handed back", || records(1)),
    ("in-flight record of 32, taken and handed back", || records(32)),
];

fn main() {
    harness::main("vhost_blk", CASES);
}

impl Ring for SplitRing {
    const BASE: u32 = 0;

    fn open(layout: &RingLayout, memory: &Arc<GuestMemory>) -> Self {
        let mut ring = SplitRing::new(layout, memory).expect("a valid ring");
        ring.disable_kicks().expect("a valid ring");
        ring
    }

    /// The entries of the available ring never change, because its size is a multiple of the number of chains.
    fn offer(memory: &GuestMemory, shape: Shape, before: u64) {
        if before == 0 {
            (0..CHAINS).for_each(|chain| lay_out(memory, shape, chain));
        }
        let index = before.wrapping_add(u64::from(CHAINS)) as u16;
        memory.map().store(index, GuestAddress(AVAILABLE + 2), Ordering::Release).expect("guest memory");
    }

    fn available(&mut self) -> u16 {
        SplitRing::available(self).expect("a valid ring")
    }

    fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) {
        SplitRing::pop(self, memory, chain).expect("a valid ring");
    }

    fn push(&mut self, used: &[Used]) -> bool {
        self.push_used(used).expect("a valid ring");
        self.needs_notification().expect("a valid ring")
    }
}

/// Writes the header and the descriptors of a read for a split ring.
fn lay_out(memory: &GuestMemory, shape: Shape, chain: u16) {
    let write = |bytes: &[u8], address: u64| {
        memory.map().write_slice(bytes, GuestAddress(address)).expect("guest memory");
    };
    let three = three(memory, chain);
    let chained = |first: u16| {
        let nexts = [first + 1, first + 2, 0];
        let one = |(part, next): (&(u64, u32, u16), u16)| descriptor(part.0, part.1, part.2, next);
        three.iter().zip(nexts).flat_map(one).collect::<Vec<u8>>()
    };
    let head = 3 * chain;
    let place = DESCRIPTORS + 16 * u64::from(head);
    match shape {
        Shape::Direct => write(&chained(head), place),
        Shape::Indirect => {
            let table = TABLES + 48 * u64::from(chain);
            write(&chained(0), table);
            write(&descriptor(table, 48, INDIRECT, 0), place);
        }
    }
    for turn in (chain..SIZE).step_by(usize::from(CHAINS)) {
        write(&head.to_le_bytes(), AVAILABLE + 4 + 2 * u64::from(turn));
    }
}

/// The stores to the in-flight region for chains that a worker takes and hands back in batches.
fn records(batch: u16) -> Case {
    let heads: Vec<u16> = (0..CHAINS).map(|chain| 3 * chain).collect();
    let state = (SplitTracker::alone(SIZE), heads, 0u16);
    Case::new(
        u64::from(CHAINS / batch),
        state,
        |_| {},
        move |(tracker, heads, used)| {
            for heads in heads.chunks(usize::from(batch)) {
                black_box(heads).iter().for_each(|head| tracker.begin(*head));
                tracker.list(heads.iter().copied());
                *used = used.wrapping_add(batch);
                tracker.clear(heads.iter().copied(), *used);
            }
        },
    )
}
