//! One queue's thread of a load.

use std::sync::Barrier;
use std::time::Instant;

use super::order::Blocks;
use super::stamp::{check_block, stamp_block};
use super::{Limit, LoadError, Mix, Report, Spec, Verify};
use crate::client::{
    ClientError, Command, Completion, Queue, SECTOR, SEGMENT_BYTES, Segment, Slot, Status, UNMAP,
};
use crate::random::Random;

/// The kind of request in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Discard,
    WriteZeroes { unmap: bool },
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    kind: Kind,
    offset: u64,
    started: Instant,
}

struct Worker<'a> {
    queue: &'a mut Queue,
    spec: &'a Spec,
    blocks: Blocks,
    random: Random,
    /// Indexed by slot.
    in_flight: Vec<InFlight>,
    /// Requests still to be started, flushes not counted; none if the time decides.
    left: Option<u64>,
    end: Option<Instant>,
    writes_since_flush: u64,
    report: Report,
}

/// Runs queue `index` of `count`. All workers start together.
pub(super) fn run(
    queue: &mut Queue,
    spec: &Spec,
    index: u64,
    count: u64,
    start: &Barrier,
) -> Result<Report, LoadError> {
    let mut worker = Worker::new(queue, spec, index, count);
    worker.prepare_buffers();
    start.wait();
    worker.work()
}

impl<'a> Worker<'a> {
    fn new(queue: &'a mut Queue, spec: &'a Spec, index: u64, count: u64) -> Self {
        let blocks = Blocks::new(spec.order, spec.blocks(), spec.seed, index, count);
        let left = match spec.limit {
            Limit::Duration(_) => None,
            Limit::Requests(total) => Some(total / count + u64::from(index < total % count)),
            Limit::Once => Some(blocks.count()),
        };
        let idle = InFlight { kind: Kind::Flush, offset: 0, started: Instant::now() };
        Self {
            in_flight: vec![idle; queue.slots()],
            queue,
            spec,
            blocks,
            random: Random::new(spec.seed ^ (index + 1).rotate_left(48)),
            left,
            end: None,
            writes_since_flush: 0,
            report: Report::empty(),
        }
    }

    /// Without verification every write sends the existing bytes of its slot's buffer: not zero, and different in
    /// each buffer. Touching the pages also takes the page faults out of the measurement.
    fn prepare_buffers(&mut self) {
        let words = self.spec.block_size as usize / 8;
        let mut slots = Vec::new();
        while let Some(slot) = self.queue.acquire() {
            stamp_block(&self.queue.words(slot)[..words], self.spec.seed, (slot.index() as u64) << 40);
            slots.push(slot);
            if slots.len() == self.spec.depth {
                break;
            }
        }
        // Released in reverse order of a stack: the same slots are acquired again.
        slots.into_iter().rev().for_each(|slot| self.queue.release(slot));
    }

    fn work(mut self) -> Result<Report, LoadError> {
        let (kicks, sleeps) = (self.queue.kicks(), self.queue.sleeps());
        let begin = Instant::now();
        if let Limit::Duration(duration) = self.spec.limit {
            self.end = Some(begin + duration);
        }
        let mut done = Vec::with_capacity(self.queue.slots());
        let mut now = begin;
        let mut stopped = false;
        loop {
            stopped = stopped || self.end.is_some_and(|end| now >= end);
            while !stopped && self.queue.in_flight() < self.spec.depth && self.left != Some(0) {
                self.start_next(now)?;
            }
            self.queue.notify()?;
            if self.queue.in_flight() == 0 {
                break;
            }
            while self.queue.reap(&mut done)? == 0 {
                self.queue.wait_used(Instant::now() + self.queue.timeout())?;
            }
            now = Instant::now();
            for completion in done.drain(..) {
                self.finish(completion, now);
            }
        }
        self.report.elapsed = begin.elapsed();
        self.report.kicks = self.queue.kicks() - kicks;
        self.report.sleeps = self.queue.sleeps() - sleeps;
        Ok(self.report)
    }

    fn start_next(&mut self, now: Instant) -> Result<(), ClientError> {
        let slot = self.queue.acquire().ok_or(ClientError::Full(self.queue.index()))?;
        if self.spec.flush_every != 0 && self.writes_since_flush >= self.spec.flush_every {
            self.writes_since_flush = 0;
            self.in_flight[slot.index()] = InFlight { kind: Kind::Flush, offset: 0, started: now };
            self.queue.start(slot, Command::flush());
            return Ok(());
        }
        if let Some(left) = &mut self.left {
            *left -= 1;
        }
        let kind = self.choose();
        let size = self.spec.block_size;
        let offset = (self.spec.first_block() + self.blocks.next()) * u64::from(size);
        self.in_flight[slot.index()] = InFlight { kind, offset, started: now };
        let command = match kind {
            Kind::Read => Command::read(offset / SECTOR, size),
            Kind::Write => {
                self.writes_since_flush += 1;
                if self.spec.verify != Verify::Off {
                    stamp_block(&self.queue.words(slot)[..size as usize / 8], self.spec.seed, offset);
                }
                Command::write(offset / SECTOR, size)
            }
            Kind::Discard => self.segment(slot, offset, 0).map(Command::discard)?,
            Kind::WriteZeroes { unmap } => {
                let flags = if unmap { UNMAP } else { 0 };
                self.segment(slot, offset, flags).map(Command::write_zeroes)?
            }
            Kind::Flush => Command::flush(),
        };
        self.queue.start(slot, command);
        Ok(())
    }

    fn segment(&self, slot: Slot, offset: u64, flags: u32) -> Result<u32, ClientError> {
        let segment = Segment { offset, length: u64::from(self.spec.block_size), flags };
        self.queue.write_data(slot, &segment.bytes()?);
        Ok(SEGMENT_BYTES as u32)
    }

    fn choose(&mut self) -> Kind {
        let mix = self.spec.mix;
        if mix == Mix::READ {
            return Kind::Read;
        }
        if mix == Mix::WRITE {
            return Kind::Write;
        }
        let mut point = self.random.below(mix.total());
        let kinds = [
            (mix.read, Kind::Read),
            (mix.write, Kind::Write),
            (mix.discard, Kind::Discard),
            (mix.write_zeroes, Kind::WriteZeroes { unmap: false }),
        ];
        for (weight, kind) in kinds {
            if point < u64::from(weight) {
                return kind;
            }
            point -= u64::from(weight);
        }
        Kind::WriteZeroes { unmap: true }
    }

    fn finish(&mut self, completion: Completion, now: Instant) {
        let InFlight { kind, offset, started } = self.in_flight[completion.slot.index()];
        let latency = u64::try_from(now.saturating_duration_since(started).as_nanos()).unwrap_or(u64::MAX);
        if completion.status == Status::Ok {
            self.report.requests += 1;
            if kind == Kind::Flush {
                self.report.flushes += 1;
                self.report.flush_latency.record(latency);
            } else {
                self.report.latency.record(latency);
            }
            if matches!(kind, Kind::Read | Kind::Write) {
                self.report.bytes += u64::from(self.spec.block_size);
            }
            if kind == Kind::Read && !self.verified(completion.slot, offset) {
                self.report.mismatches += 1;
                self.report.first_mismatch.get_or_insert(offset);
            }
        } else {
            self.report.errors += 1;
        }
        self.queue.release(completion.slot);
    }

    fn verified(&self, slot: Slot, offset: u64) -> bool {
        let zero_allowed = match self.spec.verify {
            Verify::Off => return true,
            Verify::StampedOrZero => true,
            Verify::Stamped => false,
        };
        let words = self.queue.words(slot);
        check_block(&words[..self.spec.block_size as usize / 8], self.spec.seed, offset, zero_allowed)
    }
}
