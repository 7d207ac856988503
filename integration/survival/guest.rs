//! A guest that keeps two queues busy with writes, zeroes, discards, reads and flushes, and records them.
//!
//! It runs until the test kills the daemon, and then collects the last completions.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use strata_kit::client::{
    Client, ClientError, Command, Completion, Queue, SECTOR, SEGMENT_BYTES, Segment, Slot, Status, UNMAP,
};
use strata_kit::random::Random;

use super::ledger::{Ledger, Tick};
use super::stamp::{Value, fill};

/// The longest time without a completed request.
const HANG: Duration = Duration::from_secs(30);
/// Bytes of a request of the read of the whole disk.
const SWEEP_BYTES: usize = 128 << 10;

/// Counts of requests sent and completed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Requests sent.
    pub requests: u64,
    /// Writes, zeroes and discards completed.
    pub changes: u64,
    /// Zeroes that may unmap and discards, sent.
    pub unmaps: u64,
    /// Writes, zeroes and discards sent.
    pub changes_sent: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Requests in flight when the daemon was killed.
    pub cut_off: u64,
    /// Requests completed.
    pub answered: u64,
}

/// Why a guest failed.
#[derive(Debug)]
pub struct Failure(pub String);

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self(error.to_string())
    }
}

/// The request of a slot; ranges are in sectors.
#[derive(Clone, Debug)]
enum Flight {
    Read(Range<usize>),
    /// A write, zeroes or a discard, with the sectors that it changes.
    Change(Range<usize>),
    Flush(Tick),
}

/// The kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    ZeroUnmap,
    ZeroKeep,
    Discard,
    Flush,
}

/// Chooses a kind from a number below 100. More than a third of the changes are zeroes that may unmap, or discards.
const WEIGHTS: [(u64, Kind); 6] = [
    (44, Kind::Write),
    (17, Kind::ZeroUnmap),
    (5, Kind::ZeroKeep),
    (17, Kind::Discard),
    (9, Kind::Read),
    (8, Kind::Flush),
];

/// The guest of one round.
pub struct Guest<'a> {
    client: Client,
    flights: Vec<Vec<Option<Flight>>>,
    ledger: &'a mut Ledger,
    random: &'a mut Random,
    /// The generation of the next request; each is used once.
    generation: &'a mut u64,
    cluster_sectors: u64,
    done: Vec<Completion>,
    /// The counts so far.
    pub tally: Tally,
}

impl<'a> Guest<'a> {
    /// A guest on a new connection.
    pub fn new(
        mut client: Client,
        ledger: &'a mut Ledger,
        random: &'a mut Random,
        generation: &'a mut u64,
        cluster_sectors: u64,
    ) -> Self {
        let flights = client.queues().iter().map(|queue| vec![None; queue.slots()]).collect();
        let (done, tally) = (Vec::new(), Tally::default());
        Self { client, flights, ledger, random, generation, cluster_sectors, done, tally }
    }

    /// Reads the whole disk and settles the ledger.
    ///
    /// # Errors
    /// When the daemon does not answer, or a sector holds a value that it must not.
    pub fn settle(&mut self) -> Result<(), Failure> {
        let disk = read_all(&mut self.client)?;
        self.ledger.settle(&disk).map_err(Failure)
    }

    /// Keeps both queues full until `requests` have been sent, then for `time`.
    ///
    /// # Errors
    /// When the daemon does not answer or fails a request, or a read returns a value that it must not.
    pub fn work(&mut self, requests: u64, time: Duration) -> Result<(), Failure> {
        let mut end = None;
        let mut last_answer = Instant::now();
        loop {
            for queue in 0..self.flights.len() {
                self.send_some(queue)?;
            }
            let now = Instant::now();
            if self.take_answers()? {
                last_answer = now;
            } else if now.duration_since(last_answer) > HANG {
                return Err(Failure(format!("no request completed within {HANG:?}")));
            } else {
                std::thread::yield_now();
            }
            if self.tally.requests >= requests && now >= *end.get_or_insert(now + time) {
                return Ok(());
            }
        }
    }

    /// Reads the whole disk: it must hold what was last written. Nothing may be in flight.
    ///
    /// # Errors
    /// As [`Guest::settle`].
    pub fn check_latest(&mut self) -> Result<(), Failure> {
        let disk = read_all(&mut self.client)?;
        self.ledger.check_latest(&disk).map_err(Failure)
    }

    /// Sends some requests and takes what has completed, whether or not a daemon serves them.
    ///
    /// # Errors
    /// As [`Guest::work`].
    pub fn serve_some(&mut self) -> Result<(), Failure> {
        self.send()?;
        if !self.take_answers()? {
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Sends some requests on each queue, whether or not a daemon serves them.
    ///
    /// # Errors
    /// As [`Guest::work`].
    pub fn send(&mut self) -> Result<(), Failure> {
        (0..self.flights.len()).try_for_each(|queue| self.send_some(queue))
    }

    /// After the kill: collects what the daemon completed before it.
    ///
    /// # Errors
    /// As [`Guest::work`].
    pub fn collect(&mut self) -> Result<(), Failure> {
        self.take_answers()?;
        let cut_off: u64 = self.client.queues().iter().map(|queue| queue.in_flight() as u64).sum();
        self.tally.cut_off += cut_off;
        Ok(())
    }

    /// Connects to the next daemon, with all requests in flight.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn reconnect(&mut self, socket: &Path) -> Result<(), Failure> {
        Ok(self.client.reconnect(socket)?)
    }

    /// Sends nothing more, and waits until every request is answered.
    ///
    /// # Errors
    /// As [`Guest::work`].
    pub fn finish(&mut self) -> Result<(), Failure> {
        let mut last_answer = Instant::now();
        while self.client.queues().iter().any(|queue| queue.in_flight() > 0) {
            if self.take_answers()? {
                last_answer = Instant::now();
            } else if last_answer.elapsed() > HANG {
                let lost = self.flights.iter().flatten().flatten().map(|flight| format!("{flight:?}"));
                return Err(Failure(format!("never answered: {}", lost.collect::<Vec<_>>().join(", "))));
            } else {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Collects the requests that the daemon completed before the kill, and disconnects.
    ///
    /// # Errors
    /// As [`Guest::work`].
    pub fn leave(mut self) -> Result<Tally, Failure> {
        self.collect()?;
        self.client.abandon();
        Ok(self.tally)
    }

    /// Fills a queue's slots, as far as the random choices find free sectors.
    fn send_some(&mut self, queue: usize) -> Result<(), Failure> {
        // Choices of busy sectors count too, so that the loop ends.
        for _ in 0..4 {
            let Some(slot) = self.client.queue(queue).acquire() else { break };
            match self.choose(queue, slot)? {
                Some((flight, command)) => {
                    self.flights[queue][slot.index()] = Some(flight);
                    self.client.queue(queue).start(slot, command);
                    self.tally.requests += 1;
                }
                None => self.client.queue(queue).release(slot),
            }
        }
        Ok(self.client.queue(queue).notify()?)
    }

    fn choose(&mut self, queue: usize, slot: Slot) -> Result<Option<(Flight, Command)>, ClientError> {
        let mut point = self.random.below(100);
        let mut kind = Kind::Flush;
        for (weight, candidate) in WEIGHTS {
            if point < weight {
                kind = candidate;
                break;
            }
            point -= weight;
        }
        if kind == Kind::Flush {
            return Ok(Some((Flight::Flush(self.ledger.flush_sent()), Command::flush())));
        }
        let range = self.range(kind);
        if !self.ledger.is_free(range.clone()) {
            return Ok(None);
        }
        let (offset, length) = (range.start as u64 * SECTOR, range.len() as u64 * SECTOR);
        if kind == Kind::Read {
            self.ledger.read_sent(range.clone());
            return Ok(Some((Flight::Read(range), Command::read(offset / SECTOR, length as u32))));
        }
        self.tally.changes_sent += 1;
        self.tally.unmaps += u64::from(matches!(kind, Kind::ZeroUnmap | Kind::Discard));
        let ring = self.client.queue(queue);
        let command = match kind {
            Kind::Write => {
                let mut bytes = vec![0; length as usize];
                fill(&mut bytes, offset, *self.generation);
                ring.write_data(slot, &bytes);
                Command::write(offset / SECTOR, length as u32)
            }
            Kind::Discard => segment(ring, slot, offset, length, 0).map(Command::discard)?,
            Kind::ZeroKeep => segment(ring, slot, offset, length, 0).map(Command::write_zeroes)?,
            _ => segment(ring, slot, offset, length, UNMAP).map(Command::write_zeroes)?,
        };
        let (changed, value) = match kind {
            Kind::Write => (range, Value::Written(*self.generation)),
            Kind::Discard => (self.whole_clusters(range), Value::Zero),
            _ => (range, Value::Zero),
        };
        *self.generation += 1;
        self.ledger.write_sent(changed.clone(), value);
        Ok(Some((Flight::Change(changed), command)))
    }

    /// Chooses a range: half of the requests have whole clusters, and half lie in the first eighth of the disk.
    fn range(&mut self, kind: Kind) -> Range<usize> {
        let all = self.ledger.sectors() as u64;
        let cluster = self.cluster_sectors;
        let space = if self.random.below(2) == 0 { all } else { all / 8 };
        let most = match kind {
            Kind::Discard | Kind::ZeroKeep | Kind::ZeroUnmap => 8,
            // As many clusters as a slot's buffer holds.
            _ => (256 / cluster).clamp(1, 4),
        };
        let (start, length) = if self.random.below(2) == 0 {
            let length = (1 + self.random.below(most)) * cluster;
            (self.random.below(space / cluster) * cluster, length)
        } else {
            (self.random.below(space), 1 + self.random.below(cluster * 3 / 2))
        };
        start as usize..(start + length).min(all) as usize
    }

    /// The sectors that a discard changes: Strata and QEMU discard whole clusters only.
    fn whole_clusters(&self, range: Range<usize>) -> Range<usize> {
        let cluster = self.cluster_sectors as usize;
        let start = range.start.next_multiple_of(cluster);
        start..(range.end / cluster * cluster).max(start)
    }

    /// Collects completions. Returns whether there were any.
    fn take_answers(&mut self) -> Result<bool, Failure> {
        let mut any = false;
        for queue in 0..self.flights.len() {
            let mut done = std::mem::take(&mut self.done);
            self.client.queue(queue).reap(&mut done)?;
            any |= !done.is_empty();
            for completion in done.drain(..) {
                self.answered(queue, completion)?;
            }
            self.done = done;
        }
        Ok(any)
    }

    fn answered(&mut self, queue: usize, completion: Completion) -> Result<(), Failure> {
        let slot = completion.slot;
        self.tally.answered += 1;
        let flight = self.flights[queue][slot.index()].take().expect("a completed request was sent");
        if completion.status != Status::Ok {
            return Err(Failure(format!("{flight:?} completed with {:?}", completion.status)));
        }
        match flight {
            Flight::Read(range) => {
                let mut bytes = vec![0; range.len() * SECTOR as usize];
                self.client.queue(queue).read_data(slot, &mut bytes);
                self.ledger.read_answered(range, &bytes).map_err(Failure)?;
            }
            Flight::Change(range) => {
                self.ledger.write_answered(range);
                self.tally.changes += 1;
            }
            Flight::Flush(sent) => {
                self.ledger.flush_answered(sent);
                self.tally.flushes += 1;
            }
        }
        self.client.queue(queue).release(slot);
        Ok(())
    }
}

fn segment(ring: &Queue, slot: Slot, offset: u64, length: u64, flags: u32) -> Result<u32, ClientError> {
    ring.write_data(slot, &Segment { offset, length, flags }.bytes()?);
    Ok(SEGMENT_BYTES as u32)
}

/// Reads the whole disk on one queue, with as many requests at a time as it has slots.
fn read_all(client: &mut Client) -> Result<Vec<u8>, Failure> {
    let mut disk = vec![0; client.size() as usize];
    let ring = client.queue(0);
    let (mut sent, mut answered) = (0, 0);
    let mut places = vec![0; ring.slots()];
    let mut done = Vec::new();
    while answered < disk.len() {
        while sent < disk.len()
            && let Some(slot) = ring.acquire()
        {
            places[slot.index()] = sent;
            let length = SWEEP_BYTES.min(disk.len() - sent);
            ring.start(slot, Command::read(sent as u64 / SECTOR, length as u32));
            sent += length;
        }
        ring.notify()?;
        ring.wait_used(Instant::now() + HANG)?;
        ring.reap(&mut done)?;
        for completion in done.drain(..) {
            let at = places[completion.slot.index()];
            if completion.status != Status::Ok {
                return Err(Failure(format!("a read at {at:#x} completed with {:?}", completion.status)));
            }
            let end = disk.len().min(at + SWEEP_BYTES);
            ring.read_data(completion.slot, &mut disk[at..end]);
            answered += end - at;
            ring.release(completion.slot);
        }
    }
    Ok(disk)
}
