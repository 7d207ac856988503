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
    Chain, Checker, GuestMemory, MemoryTable, Parsed, RegionInfo, RingLayout, SplitRing, SplitTracker, Used,
};
use vhost_blk::{Capacity, DeviceProfile};

/// Chains per run.
const CHAINS: u16 = 64;
/// Descriptors of the ring: enough for all chains, with three each.
const SIZE: u16 = 256;
/// Bytes of each of the guest's three memory regions, as in a machine with a hole below 4 GiB.
const REGION: u64 = 1 << 20;
const REGIONS: [u64; 3] = [0, 1 << 20, 1 << 32];
/// Addresses of the parts of the ring.
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
    ("pop, 3 descriptors", || pops(Shape::Direct, |_, _| {})),
    ("pop, indirect table of 3", || pops(Shape::Indirect, |_, _| {})),
    ("pop and parse, 3 descriptors", || pops(Shape::Direct, parse)),
    ("pop and parse, indirect table of 3", || pops(Shape::Indirect, parse)),
    ("push of 1, and whether to notify", || pushes(1)),
    ("push of 32, and whether to notify", || pushes(32)),
    ("in-flight record of 1, taken and handed back", || records(1)),
    ("in-flight record of 32, taken and handed back", || records(32)),
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

/// A ring with the guest's side.
struct Guest {
    memory: Arc<GuestMemory>,
    ring: SplitRing,
    chain: Chain,
    checker: Checker,
    /// The guest's available index.
    available: u16,
    /// Chains to return.
    used: Vec<Used>,
}

impl Guest {
    fn new(shape: Shape) -> Self {
        let infos = REGIONS.map(|guest| RegionInfo { guest, size: REGION, user: guest, offset: 0 });
        let file = || {
            let file = tempfile::tempfile().expect("a temporary file");
            file.set_len(REGION).expect("its length");
            file
        };
        let table = MemoryTable::new().with_regions(&infos, infos.iter().map(|_| file()).collect());
        let memory = table.expect("valid regions").memory();
        for chain in 0..CHAINS {
            lay_out(&memory, shape, chain);
        }
        let layout = RingLayout {
            size: SIZE,
            descriptors: DESCRIPTORS,
            available: AVAILABLE,
            used: USED,
            base: 0,
            event_index: true,
            indirect: true,
        };
        let mut ring = SplitRing::new(&layout, &memory).expect("a valid ring");
        ring.disable_kicks().expect("a valid ring");
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
        Guest { memory, ring, chain: Chain::default(), checker: Checker::new(profile), available: 0, used }
    }

    /// Makes all chains available. The entries of the available ring never change, because its size is a multiple of
    /// the number of chains.
    fn offer(&mut self) {
        self.available = self.available.wrapping_add(CHAINS);
        let index = GuestAddress(AVAILABLE + 2);
        self.memory.map().store(self.available, index, Ordering::Release).expect("guest memory");
    }

    /// Pops all available chains and calls `each` for every chain.
    fn take(&mut self, mut each: impl FnMut(&Checker, &mut Chain)) {
        let waiting = self.ring.available().expect("a valid ring");
        for _ in 0..waiting {
            self.ring.pop(&self.memory, &mut self.chain).expect("a valid ring");
            each(&self.checker, &mut self.chain);
            self.used.push(Used { head: self.chain.head, written: BLOCK + 1 });
        }
    }

    /// Returns all chains, `batch` at a time. The guest requests a notification for the last chain.
    fn give_back(&mut self, batch: usize) {
        for used in self.used.chunks(batch) {
            self.ring.push_used(used).expect("a valid ring");
            black_box(self.ring.needs_notification().expect("a valid ring"));
        }
        self.used.clear();
    }
}

/// Writes the header and the descriptors of a read.
fn lay_out(memory: &GuestMemory, shape: Shape, chain: u16) {
    let write = |bytes: &[u8], address: u64| {
        memory.map().write_slice(bytes, GuestAddress(address)).expect("guest memory");
    };
    let number = u64::from(chain);
    let header = HEADERS + 32 * number;
    let sector = 8 * number;
    write(&[&[0; 8][..], &sector.to_le_bytes()].concat(), header);
    let descriptor = |address: u64, length: u32, flags: u16, next: u16| {
        let parts =
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        parts.concat()
    };
    let three = |first: u16| {
        [
            descriptor(header, 16, NEXT, first + 1),
            descriptor(DATA + u64::from(BLOCK) * number, BLOCK, NEXT | WRITE, first + 2),
            descriptor(header + 16, 1, WRITE, 0),
        ]
        .concat()
    };
    let head = 3 * chain;
    let place = DESCRIPTORS + 16 * u64::from(head);
    match shape {
        Shape::Direct => write(&three(head), place),
        Shape::Indirect => {
            let table = TABLES + 48 * number;
            write(&three(0), table);
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

fn pops(shape: Shape, each: fn(&Checker, &mut Chain)) -> Case {
    let prepare = |guest: &mut Guest| {
        guest.give_back(usize::from(CHAINS));
        guest.offer();
    };
    Case::new(u64::from(CHAINS), Guest::new(shape), prepare, move |guest| {
        guest.take(|checker, chain| each(checker, black_box(chain)));
    })
}

fn pushes(batch: u16) -> Case {
    let prepare = |guest: &mut Guest| {
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
