//! Counters of the queues, which any thread may read while the workers count.
//!
//! Every counter is independent and relaxed: a snapshot is not consistent across counters.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::Status;
use crate::request::Kind;

/// The counters of all queues of a server. They outlive sessions.
#[derive(Debug)]
pub struct Metrics {
    queues: Vec<QueueMetrics>,
}

/// The counters of one queue, or the sum over queues, at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSnapshot {
    /// Read requests done.
    pub reads: u64,
    /// Write requests done.
    pub writes: u64,
    /// Flush requests done.
    pub flushes: u64,
    /// Discard requests done.
    pub discards: u64,
    /// Write-zeroes requests done.
    pub write_zeroes: u64,
    /// GET_ID and unknown requests done.
    pub others: u64,
    /// Bytes read by successful reads.
    pub read_bytes: u64,
    /// Bytes written by successful writes.
    pub written_bytes: u64,
    /// Requests that ended with IOERR or UNSUPP.
    pub errors: u64,
    /// Chains without a usable status byte.
    pub malformed: u64,
    /// Times the ring was found corrupt or its worker failed.
    pub ring_errors: u64,
    /// Interrupts sent.
    pub interrupts: u64,
    /// Times the worker went to sleep.
    pub sleeps: u64,
}

#[derive(Debug, Default)]
pub(crate) struct QueueMetrics {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    write_zeroes: AtomicU64,
    others: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
    malformed: AtomicU64,
    ring_errors: AtomicU64,
    interrupts: AtomicU64,
    sleeps: AtomicU64,
}

impl Metrics {
    /// Counters for `num_queues` queues.
    pub fn new(num_queues: u16) -> Self {
        Metrics { queues: (0..num_queues).map(|_| QueueMetrics::default()).collect() }
    }

    /// The counters of each queue, in order.
    pub fn snapshot(&self) -> Vec<QueueSnapshot> {
        self.queues.iter().map(QueueMetrics::snapshot).collect()
    }

    /// The sums over all queues.
    pub fn total(&self) -> QueueSnapshot {
        self.queues.iter().map(QueueMetrics::snapshot).fold(QueueSnapshot::default(), QueueSnapshot::plus)
    }

    pub(crate) fn queues(&self) -> usize {
        self.queues.len()
    }

    pub(crate) fn queue(&self, index: u16) -> &QueueMetrics {
        &self.queues[usize::from(index)]
    }
}

impl QueueSnapshot {
    fn plus(self, other: Self) -> Self {
        QueueSnapshot {
            reads: self.reads + other.reads,
            writes: self.writes + other.writes,
            flushes: self.flushes + other.flushes,
            discards: self.discards + other.discards,
            write_zeroes: self.write_zeroes + other.write_zeroes,
            others: self.others + other.others,
            read_bytes: self.read_bytes + other.read_bytes,
            written_bytes: self.written_bytes + other.written_bytes,
            errors: self.errors + other.errors,
            malformed: self.malformed + other.malformed,
            ring_errors: self.ring_errors + other.ring_errors,
            interrupts: self.interrupts + other.interrupts,
            sleeps: self.sleeps + other.sleeps,
        }
    }
}

impl QueueMetrics {
    pub(crate) fn request(&self, kind: Kind, status: Status, bytes: u32) {
        let (counter, moved) = match kind {
            Kind::Read => (&self.reads, Some(&self.read_bytes)),
            Kind::Write => (&self.writes, Some(&self.written_bytes)),
            Kind::Flush => (&self.flushes, None),
            Kind::Discard => (&self.discards, None),
            Kind::WriteZeroes => (&self.write_zeroes, None),
            Kind::GetId | Kind::Unknown => (&self.others, None),
        };
        add(counter, 1);
        match (status, moved) {
            (Status::Ok, Some(moved)) => add(moved, u64::from(bytes)),
            (Status::Ok, None) => {}
            _ => add(&self.errors, 1),
        }
    }

    pub(crate) fn malformed(&self) {
        add(&self.malformed, 1);
    }

    pub(crate) fn ring_error(&self) {
        add(&self.ring_errors, 1);
    }

    pub(crate) fn interrupt(&self) {
        add(&self.interrupts, 1);
    }

    pub(crate) fn sleep(&self) {
        add(&self.sleeps, 1);
    }

    fn snapshot(&self) -> QueueSnapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueSnapshot {
            reads: get(&self.reads),
            writes: get(&self.writes),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            write_zeroes: get(&self.write_zeroes),
            others: get(&self.others),
            read_bytes: get(&self.read_bytes),
            written_bytes: get(&self.written_bytes),
            errors: get(&self.errors),
            malformed: get(&self.malformed),
            ring_errors: get(&self.ring_errors),
            interrupts: get(&self.interrupts),
            sleeps: get(&self.sleeps),
        }
    }
}

/// Only the queue's worker counts, so a load and a store suffice, without a locked instruction. (After a worker's death
/// the session counts once, with no worker running.)
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}
