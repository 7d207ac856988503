//! Counters of the queues, which any thread may read while the workers count.
//!
//! Every counter is independent and relaxed: a snapshot is not consistent across counters.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::request::{Kind, Status};

/// The counters of all queues of a server. They outlive sessions.
#[derive(Debug)]
pub struct Metrics {
    queues: Vec<QueueMetrics>,
}

/// The counters of a queue. Their names stand only in the list below.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of one queue, or the sum over queues, at a moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct QueueSnapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        #[derive(Debug, Default)]
        pub(crate) struct QueueMetrics {
            $($name: AtomicU64,)*
        }

        impl QueueSnapshot {
            fn plus(self, other: Self) -> Self {
                QueueSnapshot { $($name: self.$name + other.$name,)* }
            }
        }

        impl QueueMetrics {
            fn snapshot(&self) -> QueueSnapshot {
                QueueSnapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Read requests done.
    reads,
    /// Write requests done.
    writes,
    /// Flush requests done.
    flushes,
    /// Discard requests done.
    discards,
    /// Write-zeroes requests done.
    write_zeroes,
    /// GET_ID and unknown requests done.
    others,
    /// Bytes read by successful reads.
    read_bytes,
    /// Bytes written by successful writes.
    written_bytes,
    /// Read requests that ended with IOERR or UNSUPP, as all requests do that fail.
    read_errors,
    /// Write requests that failed.
    write_errors,
    /// Flush requests that failed.
    flush_errors,
    /// Discard requests that failed.
    discard_errors,
    /// Write-zeroes requests that failed.
    write_zeroes_errors,
    /// GET_ID and unknown requests that failed.
    other_errors,
    /// Chains without a usable status byte.
    malformed,
    /// Times the ring was found corrupt or its worker failed.
    ring_errors,
    /// Interrupts sent.
    interrupts,
    /// Times the worker went to sleep.
    sleeps,
}

impl QueueSnapshot {
    /// Requests of every kind that failed.
    pub fn errors(&self) -> u64 {
        self.read_errors
            + self.write_errors
            + self.flush_errors
            + self.discard_errors
            + self.write_zeroes_errors
            + self.other_errors
    }
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
            _ => add(self.errors(kind), 1),
        }
    }

    fn errors(&self, kind: Kind) -> &AtomicU64 {
        match kind {
            Kind::Read => &self.read_errors,
            Kind::Write => &self.write_errors,
            Kind::Flush => &self.flush_errors,
            Kind::Discard => &self.discard_errors,
            Kind::WriteZeroes => &self.write_zeroes_errors,
            Kind::GetId | Kind::Unknown => &self.other_errors,
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
}

/// Only the queue's worker counts, so a load and a store suffice, without a locked instruction. (After a worker's death
/// the session counts once, with no worker running.)
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}
