//! A frontend and a guest driver in one. `vhost`'s own client sends the messages. The rings are written by hand, so
//! that a test can make them invalid in any way.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::packed::{PackedSide, Place};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const F_FLUSH: u64 = 1 << 9;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_PROTOCOL: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_PACKED: u64 = 1 << 34;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// The status byte before the device writes it.
pub const UNTOUCHED: u8 = 0xee;

/// The size of each of the guest's two adjacent regions.
pub const REGION: u64 = 2 << 20;
/// The address at which a third region may be added.
pub const EXTRA: u64 = 8 << 20;
/// The start of the tests' buffers.
pub const DATA: u64 = 1 << 20;
/// The difference between the frontend's addresses and the guest's.
pub const USER: u64 = 0x7000_0000_0000;

/// Waits for a condition that another thread fulfils, and fails at a deadline.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::yield_now();
    }
}

/// True if the condition stays false for a little while.
pub fn never(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_millis(30);
    while Instant::now() < deadline {
        if condition() {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// A file of memory to share.
pub fn memfd(bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(bytes).expect("its length");
    file
}

/// One queue, from the driver's side.
pub struct Driver {
    pub index: usize,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub kick: EventFd,
    pub call: EventFd,
    pub error: EventFd,
    /// The driver's index in the available ring; in a packed ring its place, see [`Place::bits`].
    pub next_available: u16,
    /// Chains that came back.
    pub seen_used: u16,
    pub next_descriptor: u16,
    /// Where the ring is a packed one.
    pub packed: Option<PackedSide>,
}

impl Driver {
    fn new(index: usize, size: u16) -> Self {
        let base = 0x1_0000 * index as u64;
        let eventfd = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        Driver {
            index,
            size,
            descriptors: base,
            available: base + 0x5000,
            used: base + 0x8000,
            kick: eventfd(),
            call: eventfd(),
            error: eventfd(),
            next_available: 0,
            seen_used: 0,
            next_descriptor: 0,
            packed: None,
        }
    }
}

/// A guest with its connection.
pub struct Guest {
    pub frontend: Frontend,
    pub memory: GuestMemoryMmap<()>,
    pub files: Vec<File>,
    pub queues: Vec<Driver>,
    pub features: u64,
    next_data: u64,
}

/// The answer to a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u8,
    pub written: u32,
    pub data: Vec<u8>,
}

impl Guest {
    /// Connects and negotiates as QEMU does, with its memory set up by slots. No queue runs yet.
    pub fn connect(path: &Path, features: u64) -> Self {
        Self::negotiate(UnixStream::connect(path).expect("the server listens"), features)
    }

    pub fn negotiate(stream: UnixStream, features: u64) -> Self {
        let mut guest = Self::bare(stream);
        let frontend = &mut guest.frontend;
        frontend.set_owner().expect("owner");
        let offered = frontend.get_features().expect("features");
        assert_ne!(offered & F_PROTOCOL, 0);
        let protocol = frontend.get_protocol_features().expect("protocol features");
        frontend
            .set_protocol_features(
                protocol
                    & (VhostUserProtocolFeatures::MQ
                        | VhostUserProtocolFeatures::REPLY_ACK
                        | VhostUserProtocolFeatures::CONFIG
                        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                        | VhostUserProtocolFeatures::RESET_DEVICE
                        | VhostUserProtocolFeatures::LOG_SHMFD),
            )
            .expect("protocol features");
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.get_queue_num().expect("queues");
        frontend.set_features(features | F_PROTOCOL).expect("features");
        guest.features = features;
        for region in 0..2 {
            guest.frontend.add_mem_region(&guest.region(region)).expect("a region");
        }
        guest
    }

    /// A connection without any message.
    pub fn bare(stream: UnixStream) -> Self {
        let files = vec![memfd(REGION), memfd(REGION)];
        let map = |index: u64| {
            let file = files[index as usize].try_clone().expect("a copy");
            (GuestAddress(REGION * index), REGION as usize, Some(FileOffset::new(file, 0)))
        };
        let memory = GuestMemoryMmap::from_ranges_with_files([map(0), map(1)]).expect("guest memory");
        let frontend = Frontend::from_stream(stream, 64);
        Guest { frontend, memory, files, queues: Vec::new(), features: 0, next_data: DATA }
    }

    /// The message for one of the two regions.
    pub fn region(&self, index: usize) -> VhostUserMemoryRegionInfo {
        let guest_phys_addr = REGION * index as u64;
        VhostUserMemoryRegionInfo {
            guest_phys_addr,
            memory_size: REGION,
            userspace_addr: USER + guest_phys_addr,
            mmap_offset: 0,
            mmap_handle: self.files[index].as_raw_fd(),
        }
    }

    /// Adds a queue that the device does not know yet.
    pub fn add_stopped_queue(&mut self, size: u16) {
        let mut driver = Driver::new(self.queues.len(), size);
        if self.features & F_PACKED != 0 {
            driver.packed = Some(PackedSide::new(size));
            driver.next_available = Place::START.bits();
        }
        self.queues.push(driver);
    }

    /// Sets up the next queue and starts it.
    pub fn add_queue(&mut self, size: u16) -> usize {
        let index = self.queues.len();
        self.add_stopped_queue(size);
        let base = self.queues[index].next_available;
        self.start_queue(index, base);
        index
    }

    pub fn config(&self, index: usize) -> VringConfigData {
        let queue = &self.queues[index];
        VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: USER + queue.descriptors,
            used_ring_addr: USER + queue.used,
            avail_ring_addr: USER + queue.available,
            log_addr: None,
        }
    }

    /// QEMU's order: CALL, NUM, BASE, ADDR, KICK, ENABLE.
    pub fn start_queue(&mut self, index: usize, base: u16) {
        let config = self.config(index);
        let queue = &self.queues[index];
        let frontend = &mut self.frontend;
        frontend.set_vring_call(index, &queue.call).expect("call");
        frontend.set_vring_num(index, queue.size).expect("num");
        frontend.set_vring_base(index, base).expect("base");
        frontend.set_vring_addr(index, &config).expect("addr");
        frontend.set_vring_err(index, &queue.error).expect("err");
        frontend.set_vring_kick(index, &queue.kick).expect("kick");
        if self.features & F_PROTOCOL != 0 || self.features & F_VERSION_1 != 0 {
            frontend.set_vring_enable(index, true).expect("enable");
        }
    }

    /// Stops a queue by GET_VRING_BASE.
    pub fn frontend_base(&mut self, queue: usize) -> u32 {
        self.frontend.get_vring_base(queue).expect("the base")
    }

    /// Resets the driver's side of a queue to its first state.
    pub fn clear_rings(&mut self, queue: usize) {
        if self.packed(queue).is_some() {
            return self.packed_clear(queue);
        }
        let driver = &mut self.queues[queue];
        (driver.next_available, driver.seen_used, driver.next_descriptor) = (0, 0, 0);
        let (available, used) = (driver.available, driver.used);
        for at in [available, available + 2, used, used + 2] {
            self.write_u16(at, 0);
        }
    }

    pub fn read_config(&mut self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let space = vec![0; size as usize];
        self.frontend
            .get_config(offset, size, VhostUserConfigFlags::WRITABLE, &space)
            .ok()
            .map(|(_, bytes)| bytes)
    }

    /// Allocates a separate buffer.
    pub fn alloc(&mut self, bytes: u64) -> u64 {
        let at = self.next_data;
        self.next_data += bytes.next_multiple_of(16);
        if self.next_data > REGION {
            self.next_data = DATA + bytes.next_multiple_of(16);
            return DATA;
        }
        at
    }

    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.alloc(bytes.len() as u64);
        self.memory.write_slice(bytes, GuestAddress(at)).expect("in memory");
        at
    }

    pub fn put_at(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("in memory");
    }

    pub fn get(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory.read_slice(&mut data, GuestAddress(at)).expect("in memory");
        data
    }

    pub fn write_u16(&self, at: u64, value: u16) {
        self.memory.store(value, GuestAddress(at), Ordering::Release).expect("in memory");
    }

    pub fn read_u16(&self, at: u64) -> u16 {
        self.memory.load(GuestAddress(at), Ordering::Acquire).expect("in memory")
    }

    /// Writes a descriptor into a table.
    pub fn descriptor(&self, table: u64, index: u16, at: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = Vec::new();
        bytes.extend(at.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index))).expect("in memory");
    }

    /// Writes a chain of `parts` into the queue's table; returns its head. In a packed ring the chain is only kept, and
    /// its buffer id takes the place of the head.
    pub fn chain(&mut self, queue: usize, parts: &[(u64, u32, u16)]) -> u16 {
        if self.packed(queue).is_some() {
            return self.packed_chain(queue, parts);
        }
        let (table, size) = (self.queues[queue].descriptors, self.queues[queue].size);
        let first = self.queues[queue].next_descriptor;
        let slot = |number: usize| (first + number as u16) % size;
        for (number, (at, length, flags)) in parts.iter().enumerate() {
            let next = if number + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(table, slot(number), *at, *length, flags | next, slot(number + 1));
        }
        self.queues[queue].next_descriptor = slot(parts.len());
        first
    }

    /// Writes a chain into a separate table; returns the head of the one descriptor that refers to it.
    pub fn indirect_chain(&mut self, queue: usize, parts: &[(u64, u32, u16)]) -> u16 {
        let bytes = 16 * parts.len() as u32;
        let table = self.alloc(u64::from(bytes));
        if self.packed(queue).is_some() {
            for (number, part) in (0..).zip(parts) {
                self.packed_descriptor(table + 16 * number, *part, 0, part.2);
            }
            return self.chain(queue, &[(table, bytes, INDIRECT)]);
        }
        for (number, (at, length, flags)) in parts.iter().enumerate() {
            let next = if number + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(table, number as u16, *at, *length, flags | next, number as u16 + 1);
        }
        self.chain(queue, &[(table, bytes, INDIRECT)])
    }

    /// Puts a head into the available ring without the kick.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        if self.packed(queue).is_some() {
            return self.packed_make_available(queue, head);
        }
        let driver = &mut self.queues[queue];
        let slot = driver.available + 4 + 2 * u64::from(driver.next_available % driver.size);
        driver.next_available = driver.next_available.wrapping_add(1);
        let (index_at, next) = (driver.available + 2, driver.next_available);
        self.write_u16(slot, head);
        self.write_u16(index_at, next);
        fence(Ordering::SeqCst);
    }

    /// Makes a read of `bytes` available, into one part of guest memory again and again, without a kick. Returns its head
    /// and the address of its status.
    pub fn offer_large_read(&mut self, queue: usize, bytes: u64) -> (u32, u64) {
        let (header, status) = (self.header(T_IN, 0), self.put(&[UNTOUCHED]));
        let mut parts = vec![(header, 16, 0)];
        parts.resize(1 + (bytes / REGION) as usize, (REGION, REGION as u32, WRITE));
        parts.push((status, 1, WRITE));
        let head = self.indirect_chain(queue, &parts);
        self.make_available(queue, head);
        (u32::from(head), status)
    }

    /// Makes a write of one sector available, without a kick.
    pub fn offer_write(&mut self, queue: usize, sector: u64) {
        let (header, data) = (self.header(T_OUT, sector), self.alloc(512));
        let status = self.put(&[UNTOUCHED]);
        let head = self.chain(queue, &[(header, 16, 0), (data, 512, 0), (status, 1, WRITE)]);
        self.make_available(queue, head);
    }

    /// Kicks, whether the device wants it or not.
    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).expect("a kick");
    }

    /// Kicks like a driver that made chains available from the index `before` on: only if the device wants it (virtio
    /// 1.2, 2.7.10). A device that sleeps without a last check of the ring misses earlier chains.
    pub fn kick_if_wanted(&self, queue: usize, before: u16) {
        let driver = &self.queues[queue];
        fence(Ordering::SeqCst);
        let wanted = if self.packed(queue).is_some() {
            self.packed_wants_kick(queue, before)
        } else if self.features & F_EVENT_IDX != 0 {
            let event = self.read_u16(driver.used + 4 + 8 * u64::from(driver.size));
            let new = driver.next_available;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(before)
        } else {
            self.read_u16(driver.used) & 1 == 0
        };
        if wanted {
            self.kick(queue);
        }
    }

    /// How many chains the device has handed back.
    pub fn used_index(&self, queue: usize) -> u16 {
        if self.packed(queue).is_some() {
            return self.packed_used(queue);
        }
        self.read_u16(self.queues[queue].used + 2)
    }

    /// Waits for the next used element: head and length.
    pub fn next_used(&mut self, queue: usize) -> (u32, u32) {
        let seen = self.queues[queue].seen_used;
        until("a used element", || self.used_index(queue) != seen);
        if self.packed(queue).is_some() {
            return self.packed_take(queue);
        }
        let driver = &mut self.queues[queue];
        let at = driver.used + 4 + 8 * u64::from(seen % driver.size);
        driver.seen_used = seen.wrapping_add(1);
        let element = self.get(at, 8);
        let number = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().expect("four bytes"));
        (number(0), number(4))
    }

    /// Makes a chain available, kicks, and waits until it comes back. Returns the used length.
    pub fn run(&mut self, queue: usize, head: u16) -> u32 {
        self.make_available(queue, head);
        self.kick(queue);
        let (used, length) = self.next_used(queue);
        assert_eq!(used, u32::from(head));
        length
    }

    pub fn header(&mut self, kind: u32, sector: u64) -> u64 {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(0u32.to_le_bytes());
        header.extend(sector.to_le_bytes());
        self.put(&header)
    }

    /// A request in three descriptors.
    pub fn request(&mut self, queue: usize, kind: u32, sector: u64, out: &[u8], read: u32) -> Answer {
        let header = self.header(kind, sector);
        let mut parts = vec![(header, 16, 0)];
        if !out.is_empty() {
            let at = self.put(out);
            parts.push((at, out.len() as u32, 0));
        }
        let data = self.alloc(u64::from(read));
        if read > 0 {
            parts.push((data, read, WRITE));
        }
        let status = self.put(&[UNTOUCHED]);
        parts.push((status, 1, WRITE));
        let head = self.chain(queue, &parts);
        let written = self.run(queue, head);
        Answer { status: self.get(status, 1)[0], written, data: self.get(data, read as usize) }
    }

    pub fn read(&mut self, queue: usize, sector: u64, bytes: u32) -> Vec<u8> {
        let answer = self.request(queue, T_IN, sector, &[], bytes);
        assert_eq!((answer.status, answer.written), (OK, bytes + 1));
        answer.data
    }

    pub fn write(&mut self, queue: usize, sector: u64, data: &[u8]) {
        let answer = self.request(queue, T_OUT, sector, data, 0);
        assert_eq!((answer.status, answer.written), (OK, 1));
    }
}

/// A discard or write-zeroes segment.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(sector.to_le_bytes());
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Bytes that identify their position.
pub fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed).collect()
}
