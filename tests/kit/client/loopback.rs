//! Tests a queue without a session: a thread plays a device that answers everything at once.
//!
//! Shows that ring, queue and load work together where no daemon is installed, and what the client itself costs.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use super::events::Events;
use super::layout::QueueLayout;
use super::memory::{GUEST_BASE, SharedMemory, View};
use super::queue::{Parts, Queue};
use super::ring::{INDIRECT, NEXT, WRITE};
use super::{ClientError, Request, Status};
use crate::load::{self, Limit, Mix, Order, Spec};
use vmm_sys_util::eventfd::EventFd;

/// The device's end of a ring, written from the specification and not from [`super::ring`].
struct Device {
    memory: Arc<SharedMemory>,
    layout: QueueLayout,
    kick: EventFd,
    call: EventFd,
    event_idx: bool,
    next: u16,
    /// The status to answer with.
    status: u8,
    available: View<AtomicU16>,
    used_index: View<AtomicU16>,
    used: View<AtomicU32>,
}

impl Device {
    fn new(
        memory: &Arc<SharedMemory>,
        layout: QueueLayout,
        events: &Events,
        event_idx: bool,
        base: u16,
    ) -> Self {
        let size = usize::from(layout.size);
        Self {
            memory: Arc::clone(memory),
            layout,
            kick: events.kick.try_clone().expect("eventfd"),
            call: events.call.try_clone().expect("eventfd"),
            event_idx,
            next: base,
            status: 0,
            available: View::new(memory, layout.ring.available, size + 3),
            used_index: View::new(memory, layout.ring.used, 2),
            used: View::new(memory, layout.ring.used + 4, 2 * size),
        }
    }

    /// Serves until `stop` is set. Polls, and yields the CPU when a poll finds nothing.
    fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            if !self.pass() {
                std::thread::yield_now();
            }
        }
        // Kicks that arrived meanwhile no longer matter.
        let _ = self.kick.read();
    }

    /// Answers everything that is available. Returns whether there was anything.
    fn pass(&mut self) -> bool {
        let end = self.available[1].load(Ordering::Acquire);
        if end == self.next {
            return false;
        }
        let mut index = self.used_index[1].load(Ordering::Relaxed);
        let old = index;
        let mask = self.layout.size - 1;
        while self.next != end {
            let head = self.available[2 + usize::from(self.next & mask)].load(Ordering::Relaxed);
            let written = self.answer(head);
            let at = 2 * usize::from(index & mask);
            self.used[at].store(u32::from(head), Ordering::Relaxed);
            self.used[at + 1].store(written, Ordering::Relaxed);
            self.next = self.next.wrapping_add(1);
            index = index.wrapping_add(1);
        }
        self.used_index[1].store(index, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.available[2 + usize::from(self.layout.size)].load(Ordering::Relaxed);
            index.wrapping_sub(event).wrapping_sub(1) < index.wrapping_sub(old)
        } else {
            self.available[0].load(Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            self.call.write(1).expect("eventfd");
        }
        true
    }

    /// Walks a chain to its last descriptor, the status, and sets the status. Returns the writable bytes.
    fn answer(&self, head: u16) -> u32 {
        let (mut table, mut index, mut written) = (self.layout.ring.descriptors, head, 0);
        loop {
            let words = View::<AtomicU64>::new(&self.memory, table + 16 * usize::from(index), 2);
            let (address, rest) = (words[0].load(Ordering::Relaxed), words[1].load(Ordering::Relaxed));
            let (length, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
            let offset = (address - GUEST_BASE) as usize;
            if flags & INDIRECT != 0 {
                (table, index) = (offset, 0);
                continue;
            }
            if flags & WRITE != 0 {
                written += length;
            }
            if flags & NEXT == 0 {
                assert_eq!((length, flags & WRITE), (1, WRITE), "a chain ends with a status byte");
                self.memory.write(offset, &[self.status]);
                return written;
            }
            index = next;
        }
    }
}

struct Setup {
    queue: Queue,
    device: Device,
    _peer: UnixStream,
}

fn setup(size: u16, segments: u16, indirect: bool, event_idx: bool, base: u16, timeout: Duration) -> Setup {
    let layout = QueueLayout::new(0, size, segments, 8192, indirect, u16::MAX);
    let memory = Arc::new(SharedMemory::new(layout.end).expect("memfd"));
    let (socket, peer) = UnixStream::pair().expect("socket pair");
    let socket = Arc::new(socket);
    let events = Events::new(&socket).expect("eventfds");
    let device = Device::new(&memory, layout, &events, event_idx, base);
    let spin_max = Duration::from_micros(20);
    let queue = Queue::new(Parts { index: 0, memory, layout, events, event_idx, base, timeout, spin_max });
    Setup { queue, device, _peer: peer }
}

/// Runs a load against the device thread.
fn run_load(setup: Setup, spec: &Spec) -> load::Report {
    let Setup { mut queue, device, _peer } = setup;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| device.run(&stop));
        let report = load::run(std::slice::from_mut(&mut queue), spec);
        stop.store(true, Ordering::Relaxed);
        report.expect("the load runs")
    })
}

const LONG: Duration = Duration::from_secs(30);

#[test]
fn every_kind_of_ring_carries_a_load_over_the_wrap() {
    for (indirect, event_idx) in [(false, false), (false, true), (true, false), (true, true)] {
        let setup = setup(16, 2, indirect, event_idx, 65_500, LONG);
        let spec = Spec {
            depth: 4,
            mix: Mix { read: 2, write: 2, discard: 1, write_zeroes: 1, write_zeroes_unmap: 1 },
            order: Order::Random,
            limit: Limit::Requests(140_000),
            flush_every: 10,
            ..Spec::random_reads(1 << 40, LONG)
        };
        let report = run_load(setup, &spec);
        assert_eq!((report.requests - report.flushes, report.errors), (140_000, 0));
        assert!(report.flushes > 1000);
    }
}

/// Printed, not asserted: the result depends on the machine and its other load.
#[test]
fn the_client_by_itself_reports_its_rate() {
    let setup = setup(256, 1, true, true, 0, LONG);
    let report = run_load(setup, &Spec::random_reads(1 << 30, Duration::from_millis(300)));
    assert_eq!((report.errors, report.bytes), (0, report.requests * 4096));
    // Bypasses the test harness, which hides the output of a passing test.
    let _ = writeln!(std::io::stderr(), "null device, depth 32: {report}");
}

#[test]
fn a_silent_device_is_a_timeout_and_a_closed_one_a_disconnect() {
    let Setup { mut queue, mut device, _peer } = setup(16, 1, false, true, 0, Duration::from_millis(20));
    let ticket = queue.submit(&Request::Flush).expect("room");
    assert!(matches!(queue.wait(ticket), Err(ClientError::Timeout { in_flight: 1, .. })));
    drop(_peer);
    assert!(matches!(queue.wait_used(Instant::now() + LONG), Err(ClientError::Disconnected(0))));
    // Requests answered before the end still count, with any status.
    device.status = 2;
    assert!(device.pass());
    assert_eq!(queue.wait(ticket).expect("answered").status, Status::Unsupported);
    assert!(matches!(queue.wait(ticket), Err(ClientError::NoSuchTicket(0))));
}

#[test]
fn a_device_that_breaks_the_rules_is_reported() {
    let Setup { mut queue, mut device, _peer } = setup(16, 1, false, false, 0, LONG);
    let ticket = queue.submit(&Request::Flush).expect("room");
    device.status = super::request::Status::UNSET;
    assert!(device.pass());
    assert_eq!(queue.wait(ticket).expect("answered").status, Status::Missing);
    // The same element again: nothing is in flight under that head.
    device.used_index[1].store(2, Ordering::Release);
    device.used[2].store(0, Ordering::Relaxed);
    assert!(matches!(queue.poll(), Err(ClientError::BadUsed { id: 0, .. })));
    // A length larger than the chain's buffers.
    let ticket = queue.submit(&Request::Read { offset: 0, length: 512 }).expect("room");
    device.used[4].store(0, Ordering::Relaxed);
    device.used[5].store(514, Ordering::Relaxed);
    device.used_index[1].store(3, Ordering::Release);
    assert!(matches!(queue.wait(ticket), Err(ClientError::BadUsedLength { length: 514, writable: 513, .. })));
    device.call.write(1).expect("eventfd");
}

#[test]
fn a_full_queue_says_so() {
    let Setup { mut queue, mut device, _peer } = setup(16, 2, false, true, 0, LONG);
    let tickets: Vec<_> = (0..4).map(|_| queue.submit(&Request::Flush).expect("room")).collect();
    assert!(matches!(queue.submit(&Request::Flush), Err(ClientError::Full(0))));
    assert!(device.pass());
    for ticket in tickets {
        assert!(queue.wait(ticket).expect("answered").status.is_ok());
    }
    assert_eq!(queue.in_flight(), 0);
}
