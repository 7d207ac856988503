//! A load generator on the client: one thread per queue, a fixed number of requests in flight, a histogram.
//!
//! Owns the choice and order of requests, and the accounting. Between the first request and the last it allocates
//! nothing and sleeps only in the client.

mod histogram;
mod order;
mod stamp;
mod worker;

pub use histogram::Histogram;
pub use order::{Order, Permutation};
pub use stamp::{check_block, stamp_block};

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::client::{ClientError, Queue, SECTOR};

/// How often each kind of request comes: its weight relative to the sum of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Reads.
    pub read: u32,
    /// Writes.
    pub write: u32,
    /// Discards of one block.
    pub discard: u32,
    /// Write zeroes of one block, without unmap.
    pub write_zeroes: u32,
    /// Write zeroes of one block, with unmap.
    pub write_zeroes_unmap: u32,
}

impl Mix {
    /// No requests, to be filled in.
    pub const NONE: Self = Self { read: 0, write: 0, discard: 0, write_zeroes: 0, write_zeroes_unmap: 0 };
    /// Reads only.
    pub const READ: Self = Self { read: 100, ..Self::NONE };
    /// Writes only.
    pub const WRITE: Self = Self { write: 100, ..Self::NONE };

    /// Reads and writes, with this percentage of reads.
    pub fn reads(percent: u32) -> Self {
        Self { read: percent.min(100), write: 100 - percent.min(100), ..Self::NONE }
    }

    fn total(self) -> u64 {
        [self.read, self.write, self.discard, self.write_zeroes, self.write_zeroes_unmap]
            .iter()
            .map(|weight| u64::from(*weight))
            .sum()
    }
}

/// When a load is over. Requests in flight at that time are awaited and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// After this time.
    Duration(Duration),
    /// After this many requests over all queues, not counting the flushes of `flush_every`.
    Requests(u64),
    /// After one request for every block of the range. Not for [`Order::Random`].
    Once,
}

/// The contents that reads must return and writes leave behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// No check: writes send the same bytes again and again, reads are not compared.
    Off,
    /// Writes describe themselves (see [`stamp_block`]); reads must return such a block, or zeroes.
    StampedOrZero,
    /// As `StampedOrZero`, but zeroes are wrong.
    Stamped,
}

/// A load.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Requests in flight per queue; no more than the queue's slots.
    pub depth: usize,
    /// Bytes per request, whole sectors, no more than the queue's capacity.
    pub block_size: u32,
    /// The order of the blocks.
    pub order: Order,
    /// The kinds of requests.
    pub mix: Mix,
    /// A flush after this many writes of a queue, concurrent with other requests; 0 for never.
    pub flush_every: u64,
    /// When it is over.
    pub limit: Limit,
    /// The contents to check.
    pub verify: Verify,
    /// The part of the disk, in bytes; only whole blocks of it are used.
    pub range: Range<u64>,
    /// Makes order and contents reproducible. Stamps of another seed fail verification.
    pub seed: u64,
}

impl Spec {
    /// 4 KiB random reads at depth 32 for a duration, over a disk of `size` bytes.
    pub fn random_reads(size: u64, duration: Duration) -> Self {
        Self {
            depth: 32,
            block_size: 4096,
            order: Order::Random,
            mix: Mix::READ,
            flush_every: 0,
            limit: Limit::Duration(duration),
            verify: Verify::Off,
            range: 0..size,
            seed: 1,
        }
    }

    /// Blocks in the range.
    pub fn blocks(&self) -> u64 {
        let start = self.first_block();
        (self.range.end / u64::from(self.block_size.max(1))).saturating_sub(start)
    }

    fn first_block(&self) -> u64 {
        self.range.start.div_ceil(u64::from(self.block_size.max(1)))
    }
}

/// Why a load did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The spec makes no sense for these queues.
    #[error("the load cannot run: {0}")]
    Spec(&'static str),
    /// The client failed.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// The result of a load.
#[derive(Clone, Debug)]
pub struct Report {
    /// Requests completed with success, flushes included.
    pub requests: u64,
    /// Bytes read and written by them.
    pub bytes: u64,
    /// Flushes among them.
    pub flushes: u64,
    /// Requests completed with a bad status.
    pub errors: u64,
    /// Reads with wrong contents.
    pub mismatches: u64,
    /// Byte offset on the disk of one such read.
    pub first_mismatch: Option<u64>,
    /// From the first request to the last completion.
    pub elapsed: Duration,
    /// Latencies of all successful requests but flushes, in nanoseconds.
    pub latency: Histogram,
    /// Latencies of successful flushes, in nanoseconds.
    pub flush_latency: Histogram,
    /// Kicks sent.
    pub kicks: u64,
    /// Times a queue slept.
    pub sleeps: u64,
}

impl Report {
    /// Successful requests per second.
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Megabytes (10⁶ bytes) per second.
    pub fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn empty() -> Self {
        Self {
            requests: 0,
            bytes: 0,
            flushes: 0,
            errors: 0,
            mismatches: 0,
            first_mismatch: None,
            elapsed: Duration::ZERO,
            latency: Histogram::new(),
            flush_latency: Histogram::new(),
            kicks: 0,
            sleeps: 0,
        }
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.flushes += other.flushes;
        self.errors += other.errors;
        self.mismatches += other.mismatches;
        self.first_mismatch = self.first_mismatch.or(other.first_mismatch);
        self.elapsed = self.elapsed.max(other.elapsed);
        self.latency.add(&other.latency);
        self.flush_latency.add(&other.flush_latency);
        self.kicks += other.kicks;
        self.sleeps += other.sleeps;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = |fraction| self.latency.percentile(fraction) as f64 / 1000.0;
        write!(
            f,
            "{:.0} IOPS, {:.1} MB/s; latency in us: mean {:.1}, p50 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1}; \
             {} requests in {:.2} s, {} flushes, {} errors, {} mismatches, {} kicks, {} sleeps",
            self.iops(),
            self.megabytes_per_second(),
            self.latency.mean() / 1000.0,
            micros(0.5),
            micros(0.99),
            micros(0.999),
            self.latency.max() as f64 / 1000.0,
            self.requests,
            self.elapsed.as_secs_f64(),
            self.flushes,
            self.errors,
            self.mismatches,
            self.kicks,
            self.sleeps
        )
    }
}

/// Runs a load on the queues, which must be idle, one thread each.
///
/// # Errors
/// When the spec does not fit the queues, or the client fails: bad statuses and wrong contents are only counted.
pub fn run(queues: &mut [Queue], spec: &Spec) -> Result<Report, LoadError> {
    validate(queues, spec)?;
    let count = queues.len() as u64;
    let start = std::sync::Barrier::new(queues.len());
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = queues
            .iter_mut()
            .enumerate()
            .map(|(index, queue)| {
                let start = &start;
                scope.spawn(move || worker::run(queue, spec, index as u64, count, start))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a worker does not panic")).collect::<Vec<_>>()
    });
    let mut report = Report::empty();
    for result in results {
        report.add(&result?);
    }
    Ok(report)
}

fn validate(queues: &[Queue], spec: &Spec) -> Result<(), LoadError> {
    let refuse = |reason| Err(LoadError::Spec(reason));
    if queues.is_empty() {
        return refuse("there is no queue");
    }
    if spec.block_size == 0 || !u64::from(spec.block_size).is_multiple_of(SECTOR) {
        return refuse("the block size is no whole number of sectors");
    }
    if spec.blocks() == 0 {
        return refuse("the range has not one whole block");
    }
    if spec.order != Order::Random && spec.blocks() < queues.len() as u64 {
        return refuse("there are more queues than blocks");
    }
    if spec.mix.total() == 0 {
        return refuse("the mix asks for nothing");
    }
    if spec.limit == Limit::Once && spec.order == Order::Random {
        return refuse("random blocks repeat: every block once needs another order");
    }
    for queue in queues {
        if spec.depth == 0 || spec.depth > queue.slots() {
            return refuse("the depth is not within the queue's slots");
        }
        if spec.block_size as usize > queue.capacity() {
            return refuse("a block is larger than the queue's buffers");
        }
        if queue.in_flight() != 0 {
            return refuse("a queue is not idle");
        }
    }
    Ok(())
}
