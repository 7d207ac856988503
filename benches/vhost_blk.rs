//! The cost of the ring and of parsing a request. Run by `cargo bench-paths` (docs/performance.md, "What an operation
//! costs").
//!
//! It writes the guest's side of the ring itself, and uses no disk.

mod harness;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use harness::{Case, Named};
use vhost_blk::internals::{
    Chain, Checker, GuestMemory, MemoryTable, PackedDescriptor, PackedRing, PackedTracker, Parsed,
    RegionInfo, RingLayout, SplitRing, SplitTracker, Used,
};
use vhost_blk::{Capacity, DeviceProfile};

/// Chains per run.
const CHAINS: u16 = 64;
/// Descriptors of the ring: enough for all chains, with three each.
const SIZE: u16 = 256;
/// Bytes of each of the guest's three memory regions, as in a machine with a hole below 4 GiB.
const REGION: u64 = 1 << 20;
const REGIONS: [u64; 3] = [0, 1 << 20, 1 << 32];
/// Addresses of the parts of the ring. In a packed one the last two are the driver's and the device's event suppression.
const DESCRIPTORS: u64 = REGIONS[1];
const AVAILABLE: u64 = DESCRIPTORS + 0x2000;
const USED: u64 = DESCRIPTORS + 0x3000;
/// Addresses of headers, indirect tables and data.
const HEADERS: u64 = DESCRIPTORS + 0x4000;
const TABLES: u64 = DESCRIPTORS + 0x8000;
const DATA: u64 = REGIONS[2];
/// Bytes of a read.
const BLOCK: u32 = 4096;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const CASES: &[Named] = &[
    ("pop, 3 descriptors", || pops::<SplitRing>(Shape::Direct, |_, _| {})),
    ("pop, indirect table of 3", || pops::<SplitRing>(Shape::Indirect, |_, _| {})),
    ("pop and parse, 3 descriptors", || pops::<SplitRing>(Shape::Direct, parse)),
    ("pop and parse, indirect table of 3", || pops::<SplitRing>(Shape::Indirect, parse)),
    ("push of 1, and whether to notify", || pushes::<SplitRing>(1)),
    ("push of 32, and whether to notify", || pushes::<SplitRing>(32)),
    ("in-flight record of 1, taken and handed back", || records(1)),
    ("in-flight record of 32, taken and handed back", || records(32)),
    ("packed: pop and parse, 3 descriptors", || pops::<PackedRing>(Shape::Direct, parse)),
    ("packed: pop and parse, indirect table of 3", || pops::<PackedRing>(Shape::Indirect, parse)),
    ("packed: push of 1, and whether to notify", || pushes::<PackedRing>(1)),
    ("packed: push of 32, and whether to notify", || pushes::<PackedRing>(32)),
    ("packed: in-flight record of 1, taken and handed back", || packed_records(1)),
    ("packed: in-flight record of 32, taken and handed back", || packed_records(32)),
];

fn main() {
    harness::main("vhost_blk", CASES);
}

/// Where the descriptors of a read (header, data, status) are: in the ring or in an indirect table.
#[derive(Clone, Copy)]
enum Shape {
    Direct,
    Indirect,
}

impl Shape {
    /// Descriptors of a read in the ring.
    fn descriptors(self) -> u16 {
        match self {
            Shape::Direct => 3,
            Shape::Indirect => 1,
        }
    }
}

/// A kind of ring, with what its driver does.
trait Ring {
    /// The base of a new ring.
    const BASE: u32;
    /// Starts a ring that wants no kicks.
    fn open(layout: &RingLayout, memory: &Arc<GuestMemory>) -> Self;
    /// The driver makes all chains available, after so many others.
    fn offer(memory: &GuestMemory, shape: Shape, before: u64);
    fn available(&mut self) -> u16;
    fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain);
    /// Returns chains. Whether the guest wants a notification for them.
    fn push(&mut self, used: &[Used]) -> bool;
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
            let first = (before + u64::from(chain)) * u64::from(shape.descriptors());
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

/// A ring with the guest's side.
struct Guest<R> {
    memory: Arc<GuestMemory>,
    ring: R,
    shape: Shape,
    chain: Chain,
    checker: Checker,
    /// Chains that the guest made available so far.
    offered: u64,
    /// Chains to return.
    used: Vec<Used>,
}

impl<R: Ring> Guest<R> {
    fn new(shape: Shape) -> Self {
        let infos = REGIONS.map(|guest| RegionInfo { guest, size: REGION, user: guest, offset: 0 });
        let file = || {
            let file = tempfile::tempfile().expect("a temporary file");
            file.set_len(REGION).expect("its length");
            file
        };
        let table = MemoryTable::new().with_regions(&infos, infos.iter().map(|_| file()).collect());
        let memory = table.expect("valid regions").memory();
        let layout = RingLayout {
            size: SIZE,
            descriptors: DESCRIPTORS,
            available: AVAILABLE,
            used: USED,
            base: R::BASE,
            event_index: true,
            indirect: true,
        };
        let ring = R::open(&layout, &memory);
        let profile = DeviceProfile {
            capacity: Capacity::new(1 << 20),
            block_size: 512,
            physical_block_size: 512,
            optimal_io_size: 65536,
            read_only: false,
            discard: true,
            discard_alignment: 65536,
            write_zeroes: true,
            zeroes_are_data: false,
            serial: [0; 20],
        };
        let used = Vec::with_capacity(usize::from(CHAINS));
        let checker = Checker::new(profile);
        Guest { memory, ring, shape, chain: Chain::default(), checker, offered: 0, used }
    }

    /// Makes all chains available.
    fn offer(&mut self) {
        R::offer(&self.memory, self.shape, self.offered);
        self.offered += u64::from(CHAINS);
    }

    /// Pops all available chains and calls `each` for every chain.
    fn take(&mut self, mut each: impl FnMut(&Checker, &mut Chain)) {
        for _ in 0..self.ring.available() {
            self.ring.pop(&self.memory, &mut self.chain);
            each(&self.checker, &mut self.chain);
            self.used.push(Used { head: self.chain.head, written: BLOCK + 1 });
        }
    }

    /// Returns all chains, `batch` at a time. The guest requests a notification for the last chain.
    fn give_back(&mut self, batch: usize) {
        for used in self.used.chunks(batch) {
            black_box(self.ring.push(used));
        }
        self.used.clear();
    }
}

/// The bytes of a descriptor. The last two numbers are flags and next in a split ring, buffer id and flags in a packed one.
fn descriptor(address: u64, length: u32, third: u16, fourth: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &length.to_le_bytes(), &third.to_le_bytes(), &fourth.to_le_bytes()].concat()
}

/// Writes the header of a read. The three parts of its chain: address, length and flags.
fn three(memory: &GuestMemory, chain: u16) -> [(u64, u32, u16); 3] {
    let number = u64::from(chain);
    let header = HEADERS + 32 * number;
    let sector = 8 * number;
    let bytes = [&[0; 8][..], &sector.to_le_bytes()].concat();
    memory.map().write_slice(&bytes, GuestAddress(header)).expect("guest memory");
    let data = DATA + u64::from(BLOCK) * number;
    [(header, 16, NEXT), (data, BLOCK, NEXT | WRITE), (header + 16, 1, WRITE)]
}

/// Writes a read for a packed ring. What is in the ring of it: address, length and flags of each descriptor.
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

fn parse(checker: &Checker, chain: &mut Chain) {
    let parsed = checker.parse(chain, false);
    assert!(matches!(parsed, Parsed::Submit(_)), "a valid request");
    black_box(parsed);
}

fn pops<R: Ring + 'static>(shape: Shape, each: fn(&Checker, &mut Chain)) -> Case {
    let prepare = |guest: &mut Guest<R>| {
        guest.give_back(usize::from(CHAINS));
        guest.offer();
    };
    Case::new(u64::from(CHAINS), Guest::new(shape), prepare, move |guest| {
        guest.take(|checker, chain| each(checker, black_box(chain)));
    })
}

fn pushes<R: Ring + 'static>(batch: u16) -> Case {
    let prepare = |guest: &mut Guest<R>| {
        guest.offer();
        guest.take(|_, _| {});
    };
    Case::new(u64::from(CHAINS / batch), Guest::new(Shape::Direct), prepare, move |guest| {
        guest.give_back(usize::from(batch));
    })
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

/// As [`records`], for a packed ring and chains of three descriptors.
fn packed_records(batch: u16) -> Case {
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
