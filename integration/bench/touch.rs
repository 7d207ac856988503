//! A load of one small request to each cluster of the disk, no cluster twice. It makes an image allocate, or reads back
//! exactly those blocks.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};
use strata_kit::client::{Command, Completion, Queue, SECTOR, Slot};
use strata_kit::load::{Histogram, Permutation, check_block, stamp_block};

use super::case::BLOCK;

/// The kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Writes the contents of the slot's buffer.
    Write,
    /// Writes a self-describing block of this seed.
    WriteStamped(u64),
    /// Reads a block, which must be of this seed.
    ReadStamped(u64),
    /// Reads a block, which must be zero.
    ReadZero,
}

/// The load.
#[derive(Clone, Copy, Debug)]
pub struct Touch {
    /// Clusters of the disk.
    pub clusters: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// The most clusters to use.
    pub count: u64,
    /// The time after which no request is sent.
    pub time: Option<Duration>,
    /// Requests in flight.
    pub depth: usize,
    /// Moves every request by this number of blocks, modulo its cluster.
    pub shift: u64,
    /// Writes per flush, 0 for no flush.
    pub flush_every: u64,
    /// The kind of requests.
    pub access: Access,
}

impl Touch {
    /// Byte offset of the request for a cluster. The offset within the cluster differs between clusters.
    fn offset(&self, cluster: u64) -> u64 {
        let blocks = self.cluster / u64::from(BLOCK);
        let block = (cluster.wrapping_mul(7) + self.shift) % blocks;
        cluster * self.cluster + block * u64::from(BLOCK)
    }
}

/// The result of the load.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    /// Clusters used.
    pub clusters: u64,
    /// Requests that succeeded, flushes included.
    pub requests: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Reads with wrong contents.
    pub mismatches: u64,
    /// Latencies in nanoseconds of all requests but flushes.
    pub latency: Histogram,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    /// The cluster; `None` for a flush.
    offset: Option<u64>,
    started: Instant,
}

struct Worker<'a> {
    queue: &'a mut Queue,
    touch: Touch,
    permutation: Permutation,
    /// The requests in flight, indexed by slot.
    in_flight: Vec<InFlight>,
    unflushed: u64,
    touched: Touched,
}

/// Seed of the order of the clusters: the same for every server and for reading back.
const ORDER: u64 = 7;

/// Runs the load on an idle queue.
pub fn run(queue: &mut Queue, touch: &Touch) -> Result<Touched> {
    if touch.clusters == 0 || touch.depth == 0 || touch.depth > queue.slots() {
        bail!("an empty load, or one deeper than the queue: {touch:?}");
    }
    let idle = InFlight { offset: None, started: Instant::now() };
    let worker = Worker {
        in_flight: vec![idle; queue.slots()],
        queue,
        touch: *touch,
        permutation: Permutation::new(touch.clusters, ORDER),
        unflushed: 0,
        touched: Touched::default(),
    };
    worker.work()
}

impl Worker<'_> {
    fn work(mut self) -> Result<Touched> {
        let begin = Instant::now();
        let limit = self.touch.count.min(self.touch.clusters);
        let mut done = Vec::with_capacity(self.queue.slots());
        let mut now = begin;
        loop {
            let on = self.touch.time.is_none_or(|time| now - begin < time);
            while on && self.queue.in_flight() < self.touch.depth {
                if self.touch.flush_every != 0 && self.unflushed >= self.touch.flush_every {
                    self.unflushed = 0;
                    self.start(None, now);
                } else if self.touched.clusters < limit {
                    let cluster = self.permutation.at(self.touched.clusters);
                    self.touched.clusters += 1;
                    self.unflushed += 1;
                    self.start(Some(self.touch.offset(cluster)), now);
                } else {
                    break;
                }
            }
            self.queue.notify()?;
            if self.queue.in_flight() == 0 {
                return Ok(self.touched);
            }
            while self.queue.reap(&mut done)? == 0 {
                self.queue.wait_used(Instant::now() + self.queue.timeout())?;
            }
            now = Instant::now();
            done.drain(..).for_each(|completion| self.finish(completion, now));
        }
    }

    fn start(&mut self, offset: Option<u64>, now: Instant) {
        let slot = self.queue.acquire().expect("the depth is at most the number of slots");
        self.in_flight[slot.index()] = InFlight { offset, started: now };
        let command = match (offset, self.touch.access) {
            (None, _) => Command::flush(),
            (Some(offset), Access::Write) => {
                // Not zero, because a server may detect zeroes. One fill per slot is enough.
                self.queue.words(slot)[0].store(u64::MAX, std::sync::atomic::Ordering::Relaxed);
                Command::write(offset / SECTOR, BLOCK)
            }
            (Some(offset), Access::WriteStamped(seed)) => {
                stamp_block(&self.queue.words(slot)[..BLOCK as usize / 8], seed, offset);
                Command::write(offset / SECTOR, BLOCK)
            }
            (Some(offset), Access::ReadStamped(_) | Access::ReadZero) => {
                Command::read(offset / SECTOR, BLOCK)
            }
        };
        self.queue.start(slot, command);
    }

    fn finish(&mut self, completion: Completion, now: Instant) {
        let InFlight { offset, started } = self.in_flight[completion.slot.index()];
        if completion.status.is_ok() {
            self.touched.requests += 1;
            if let Some(offset) = offset {
                let latency = now.saturating_duration_since(started).as_nanos();
                self.touched.latency.record(u64::try_from(latency).unwrap_or(u64::MAX));
                self.touched.mismatches += u64::from(!self.as_expected(completion.slot, offset));
            }
        } else {
            self.touched.errors += 1;
        }
        self.queue.release(completion.slot);
    }

    fn as_expected(&self, slot: Slot, offset: u64) -> bool {
        let words = self.queue.words(slot);
        let block = &words[..BLOCK as usize / 8];
        match self.touch.access {
            Access::Write | Access::WriteStamped(_) => true,
            Access::ReadStamped(seed) => check_block(block, seed, offset, false),
            Access::ReadZero => block.iter().all(|word| word.load(std::sync::atomic::Ordering::Relaxed) == 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_in_their_cluster_with_any_shift() {
        let touch = Touch {
            clusters: 100,
            cluster: 65536,
            count: 100,
            time: None,
            depth: 1,
            shift: 0,
            flush_every: 0,
            access: Access::Write,
        };
        for cluster in 0..100 {
            let offsets: Vec<u64> =
                [0, 1, 15].iter().map(|shift| Touch { shift: *shift, ..touch }.offset(cluster)).collect();
            assert!(offsets.iter().all(|offset| offset / 65536 == cluster && offset.is_multiple_of(4096)));
            assert!(offsets[0] != offsets[1] && offsets[1] != offsets[2] && offsets[0] != offsets[2]);
        }
    }
}
