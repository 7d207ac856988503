//! A guest with a ring of reads, for the benchmarks of either kind of ring.
//!
//! Owns the guest's memory and what lies where in it. A program has one kind of ring, as with two the compiler makes other
//! code of the same functions.

use std::hint::black_box;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use vhost_blk::internals::{Chain, Checker, GuestMemory, MemoryTable, Parsed, RegionInfo, RingLayout, Used};
use vhost_blk::{Capacity, DeviceProfile};

use crate::harness::Case;

/// Chains per run.
pub const CHAINS: u16 = 64;
/// Descriptors of the ring: enough for all chains, with three each.
pub const SIZE: u16 = 256;
/// Bytes of each of the guest's three memory regions, as in a machine with a hole below 4 GiB.
const REGION: u64 = 1 << 20;
const REGIONS: [u64; 3] = [0, 1 << 20, 1 << 32];
/// Addresses of the parts of the ring. In a packed one the last two are the driver's and the device's event suppression.
pub const DESCRIPTORS: u64 = REGIONS[1];
pub const AVAILABLE: u64 = DESCRIPTORS + 0x2000;
pub const USED: u64 = DESCRIPTORS + 0x3000;
/// Addresses of headers, indirect tables and data.
pub const HEADERS: u64 = DESCRIPTORS + 0x4000;
pub const TABLES: u64 = DESCRIPTORS + 0x8000;
pub const DATA: u64 = REGIONS[2];
/// Bytes of a read.
pub const BLOCK: u32 = 4096;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where the descriptors of a read (header, data, status) are: in the ring or in an indirect table.
#[derive(Clone, Copy)]
pub enum Shape {
    Direct,
    Indirect,
}

/// A kind of ring, with what its driver does.
pub trait Ring {
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

/// A ring with the guest's side.
pub struct Guest<R> {
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
pub fn descriptor(address: u64, length: u32, third: u16, fourth: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &length.to_le_bytes(), &third.to_le_bytes(), &fourth.to_le_bytes()].concat()
}

/// Writes the header of a read. The three parts of its chain: address, length and flags.
pub fn three(memory: &GuestMemory, chain: u16) -> [(u64, u32, u16); 3] {
    let number = u64::from(chain);
    let header = HEADERS + 32 * number;
    let sector = 8 * number;
    let bytes = [&[0; 8][..], &sector.to_le_bytes()].concat();
    memory.map().write_slice(&bytes, GuestAddress(header)).expect("guest memory");
    let data = DATA + u64::from(BLOCK) * number;
    [(header, 16, NEXT), (data, BLOCK, NEXT | WRITE), (header + 16, 1, WRITE)]
}

pub fn parse(checker: &Checker, chain: &mut Chain) {
    let parsed = checker.parse(chain, false);
    assert!(matches!(parsed, Parsed::Submit(_)), "a valid request");
    black_box(parsed);
}

pub fn pops<R: Ring + 'static>(shape: Shape, each: fn(&Checker, &mut Chain)) -> Case {
    let prepare = |guest: &mut Guest<R>| {
        guest.give_back(usize::from(CHAINS));
        guest.offer();
    };
    Case::new(u64::from(CHAINS), Guest::new(shape), prepare, move |guest| {
        guest.take(|checker, chain| each(checker, black_box(chain)));
    })
}

pub fn pushes<R: Ring + 'static>(batch: u16) -> Case {
    let prepare = |guest: &mut Guest<R>| {
        guest.offer();
        guest.take(|_, _| {});
    };
    Case::new(u64::from(CHAINS / batch), Guest::new(Shape::Direct), prepare, move |guest| {
        guest.give_back(usize::from(batch));
    })
}
