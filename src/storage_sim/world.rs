//! The state of a simulated host: files, operations in flight, the clock, and the events to come.
//!
//! One event happens at a time, in the order of a timeline that is drawn from the seed as operations start. Nothing
//! here blocks, and only events advance the clock.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::contents::PAGE_BYTES;
use crate::fault::{Faults, Outcome, Verb};
use crate::history::{Ending, Event, History, LengthStep, Recorded};
use crate::image::ImageFile;
use crate::{Contents, Image, Moment, Random, Ranges, SimOptions};
use storage::{Errno, Token};

/// How often a queue may wait while no other acts, before that counts as a deadlock.
const VAIN_WAITS_MAX: u32 = 1000;
/// How often a queue may wait, with nothing in flight, before time moves on although another queue has not waited.
const WAITS_FOR_OTHERS_MAX: u32 = 64;
/// Latencies lie between these powers of two, in nanoseconds. They are uniform in the exponent, so that sometimes very
/// many operations overtake one.
const LATENCY_BITS_MIN: u64 = 10;
const LATENCY_BITS_MAX: u64 = 23;

/// A simulated host.
pub(crate) struct World {
    pub(crate) options: SimOptions,
    pub(crate) random: Random,
    pub(crate) files: Vec<File>,
    pub(crate) queues: Vec<QueueState>,
    pub(crate) faults: Faults,
    pub(crate) history: History,
    /// The space of the file system in bytes, for all files together.
    pub(crate) space: u64,
    /// The error of an operation that finds no room.
    pub(crate) space_errno: Errno,
    /// The number of storages so far: it identifies their locks.
    pub(crate) storages: u64,
    epoch: Instant,
    clock: Duration,
    flights: BTreeMap<u64, Flight>,
    timeline: BTreeMap<(Duration, u64), Due>,
    next_number: u64,
}

/// A file as reads see it.
pub(crate) struct File {
    pub(crate) path: Arc<Path>,
    pub(crate) contents: Contents,
    /// The storages that have it open.
    pub(crate) holders: Vec<Holder>,
}

/// An open file's image lock.
pub(crate) struct Holder {
    pub(crate) storage: u64,
    pub(crate) writable: bool,
}

/// The world's side of a queue.
pub(crate) struct QueueState {
    /// Set by notifiers, without the world's lock.
    pub(crate) rung: Arc<AtomicBool>,
    /// Completed, not yet reaped.
    pub(crate) ready: VecDeque<Ended>,
    /// Pushed, not yet started.
    staged: VecDeque<u64>,
    started: u32,
    depth: u32,
    alive: bool,
    /// It waits with nothing to do, perhaps until a time.
    parked: Option<Option<Duration>>,
    vain_waits: u32,
}

/// A finished operation.
pub(crate) struct Ended {
    pub(crate) number: u64,
    pub(crate) result: Result<(), Errno>,
    /// The bytes that a read returns.
    pub(crate) found: Vec<u8>,
}

/// An operation as a queue passes it on.
pub(crate) struct Asked {
    pub(crate) token: Token,
    pub(crate) file: usize,
    pub(crate) verb: Verb,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) bytes: Option<Arc<[u8]>>,
}

/// An operation pushed and not completed.
struct Flight {
    asked: Asked,
    queue: usize,
    since: Duration,
    started: bool,
    doom: Option<Outcome>,
    /// Whether its effect may happen.
    acts: bool,
    /// The effect has begun: space is allocated, the length is changed.
    begun: bool,
    /// Bytes that have not taken effect (for a read: not been read).
    left: Ranges,
    result: Result<(), Errno>,
    found: Vec<u8>,
    recorded: Option<usize>,
}

/// An event of the timeline.
#[derive(Clone, Copy)]
enum Due {
    /// A part of an operation's bytes takes effect.
    SomeEffect(u64),
    /// The rest of its bytes takes effect.
    AllEffect(u64),
    Completion(u64),
}

/// The result of a wait.
pub(crate) enum Rest {
    /// The queue must check again for work.
    Over,
    /// Nothing will ever happen: a list of the hanging operations, and whether a fault made them hang.
    Deadlock { report: String, meant: bool },
}

impl World {
    pub(crate) fn new(image: Image, seed: u64, options: SimOptions) -> Self {
        let files = image.files.iter().map(|file| File {
            path: Arc::clone(&file.path),
            contents: file.contents.clone(),
            holders: Vec::new(),
        });
        World {
            files: files.collect(),
            options,
            random: Random::new(seed),
            queues: Vec::new(),
            faults: Faults::default(),
            history: History { start: image, ..History::default() },
            space: crate::SPACE_BYTES,
            space_errno: Errno::ENOSPC,
            storages: 0,
            epoch: Instant::now(),
            clock: Duration::ZERO,
            flights: BTreeMap::new(),
            timeline: BTreeMap::new(),
            next_number: 0,
        }
    }

    pub(crate) fn now(&self) -> Instant {
        self.epoch + self.clock
    }

    pub(crate) fn moment(&self) -> Moment {
        self.history.end()
    }

    /// The files as reads see them.
    pub(crate) fn image(&self) -> Image {
        let files = self
            .files
            .iter()
            .map(|file| ImageFile { path: Arc::clone(&file.path), contents: file.contents.clone() });
        Image { files: files.collect() }
    }

    pub(crate) fn add_file(&mut self, path: &Path, bytes: &[u8]) {
        assert!(self.files.iter().all(|file| &*file.path != path), "{} is there already", path.display());
        let path: Arc<Path> = path.into();
        let contents = Contents::from_bytes(bytes);
        // It counts as durable from the start on. Earlier instants are unaffected, because no operation there refers to
        // it.
        self.history.start.files.push(ImageFile { path: Arc::clone(&path), contents: contents.clone() });
        self.files.push(File { path, contents, holders: Vec::new() });
    }

    /// Takes the name of a file away. The file stays, under a name that nobody uses.
    pub(crate) fn remove_file(&mut self, path: &Path) {
        let number = self.next_number();
        let gone: Arc<Path> = Path::new(&format!("removed {number}")).into();
        for file in self.files.iter_mut().filter(|file| &*file.path == path) {
            file.path = Arc::clone(&gone);
        }
        for file in self.history.start.files.iter_mut().filter(|file| &*file.path == path) {
            file.path = Arc::clone(&gone);
        }
    }

    pub(crate) fn add_queue(&mut self, depth: u32) -> (usize, Arc<AtomicBool>) {
        let rung = Arc::new(AtomicBool::new(false));
        self.queues.push(QueueState {
            rung: Arc::clone(&rung),
            ready: VecDeque::new(),
            staged: VecDeque::new(),
            started: 0,
            depth: depth.max(1),
            alive: true,
            parked: None,
            vain_waits: 0,
        });
        (self.queues.len() - 1, rung)
    }

    /// Accepts an operation and returns its number. With an `answer` it completes at once, without an effect.
    pub(crate) fn push(&mut self, queue: usize, asked: Asked, answer: Option<Result<(), Errno>>) -> u64 {
        self.stir();
        let number = self.next_number();
        if let Some(result) = answer {
            self.queues[queue].ready.push_back(Ended { number, result, found: Vec::new() });
            return number;
        }
        let touched = asked.offset..asked.offset + asked.length;
        let doom = self.faults.judge(asked.verb, &self.files[asked.file].path, &touched);
        let recorded = self.record(&asked);
        let left = match asked.verb {
            Verb::Read | Verb::Write | Verb::Punch | Verb::Zero => Ranges::one(touched),
            Verb::Sync | Verb::Allocate | Verb::SetLength => Ranges::none(),
        };
        let found = if asked.verb == Verb::Read { vec![0; asked.length as usize] } else { Vec::new() };
        let flight = Flight {
            asked,
            queue,
            since: self.clock,
            started: false,
            doom,
            acts: true,
            begun: false,
            left,
            result: Ok(()),
            found,
            recorded,
        };
        self.flights.insert(number, flight);
        self.queues[queue].staged.push_back(number);
        number
    }

    fn record(&mut self, asked: &Asked) -> Option<usize> {
        if !self.options.record || asked.verb == Verb::Read {
            return None;
        }
        let index = self.history.operations.len();
        self.history.operations.push(Recorded {
            verb: asked.verb,
            file: asked.file,
            offset: asked.offset,
            length: asked.length,
            bytes: asked.bytes.clone(),
        });
        self.history.events.push(Event::Pushed(index));
        Some(index)
    }

    /// Starts pushed operations, up to the depth of the queue.
    pub(crate) fn submit(&mut self, queue: usize) {
        loop {
            let state = &mut self.queues[queue];
            if state.started >= state.depth {
                break;
            }
            let Some(number) = state.staged.pop_front() else { break };
            state.started += 1;
            self.start(number);
        }
    }

    /// Draws when the operation takes effect and when it completes.
    fn start(&mut self, number: u64) {
        let mut random = self.random.fork();
        let flight = self.flights.get_mut(&number).expect("staged operations are in flight");
        flight.started = true;
        let shuffle = self.options.shuffle;
        let bits = LATENCY_BITS_MIN + random.below(LATENCY_BITS_MAX - LATENCY_BITS_MIN);
        let nanoseconds = if shuffle { (1 << bits) + random.below(1 << bits) } else { 1 << LATENCY_BITS_MIN };
        let mut delay = Duration::ZERO;
        match flight.doom {
            None => {}
            Some(Outcome::Delay(time)) => delay = time,
            Some(Outcome::Fail(_)) => flight.acts = false,
            Some(Outcome::Hang) => flight.acts = random.chance(1, 2),
            Some(Outcome::Short(_)) => {
                // Any part, none and all included; an operation without bytes happens or not.
                flight.left = match random.below(8) {
                    0 => Ranges::none(),
                    1 => std::mem::take(&mut flight.left),
                    _ => flight.left.tear(&mut random, flight.grain()),
                };
                let has_bytes = !flight.left.is_empty();
                let without_bytes = matches!(flight.asked.verb, Verb::Allocate | Verb::SetLength);
                flight.acts = has_bytes || (without_bytes && random.chance(1, 2));
            }
        }
        let (acts, hangs) = (flight.acts, flight.doom == Some(Outcome::Hang));
        // A delayed operation also takes effect late: after those that complete meanwhile.
        let begin = self.clock + delay;
        let end = begin + Duration::from_nanos(nanoseconds);
        if acts && shuffle && !random.chance(1, 4) {
            let mut moment = || begin + Duration::from_nanos(random.below(nanoseconds));
            let (one, other) = (moment(), moment());
            if random.chance(1, 3) {
                self.schedule(one.min(other), Due::SomeEffect(number));
            }
            self.schedule(one.max(other), Due::AllEffect(number));
        }
        if !hangs {
            self.schedule(end, Due::Completion(number));
        }
    }

    fn next_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn schedule(&mut self, at: Duration, due: Due) {
        let number = self.next_number();
        self.timeline.insert((at, number), due);
    }

    /// An event has happened or will: waiting queues must check again before a wait counts as vain.
    pub(crate) fn stir(&mut self) {
        for queue in &mut self.queues {
            queue.parked = None;
            queue.vain_waits = 0;
        }
    }

    /// Runs the next event; false if there is none.
    pub(crate) fn step(&mut self) -> bool {
        self.happen().is_some()
    }

    /// Runs the next event; returns whether it was a completion.
    fn happen(&mut self) -> Option<bool> {
        let ((at, _), due) = self.timeline.pop_first()?;
        self.clock = self.clock.max(at);
        match due {
            Due::SomeEffect(number) => {
                if let Some(flight) = self.flights.get(&number) {
                    let part = flight.left.tear(&mut self.random, flight.grain());
                    self.take_effect(number, part);
                }
            }
            Due::AllEffect(number) => self.take_whole_effect(number),
            Due::Completion(number) => self.complete(number),
        }
        self.stir();
        Some(matches!(due, Due::Completion(_)))
    }

    fn take_whole_effect(&mut self, number: u64) {
        if let Some(flight) = self.flights.get(&number) {
            let left = flight.left.clone();
            self.take_effect(number, left);
        }
    }

    /// Applies a part of an operation's bytes, which reads then see.
    fn take_effect(&mut self, number: u64, part: Ranges) {
        let used: u64 = self.files.iter().map(|file| file.contents.allocated()).sum();
        let flight = self.flights.get_mut(&number).expect("looked at by the caller");
        let contents = &mut self.files[flight.asked.file].contents;
        let mut step = None;
        if !flight.begun {
            flight.begun = true;
            step = begin(flight, contents, self.space.saturating_sub(used), self.space_errno);
        }
        // Bytes that found no room have no effect.
        let part = part.intersect(&flight.left);
        flight.left = flight.left.without(&part);
        let asked = &flight.asked;
        if matches!(asked.verb, Verb::Write | Verb::Zero) && part.end() > contents.length() {
            // The file was cut meanwhile.
            contents.grow(part.end());
            step = Some(LengthStep::Grow(part.end()));
        }
        for range in part.iter() {
            let within = (range.start - asked.offset) as usize..(range.end - asked.offset) as usize;
            match (asked.verb, &asked.bytes) {
                (Verb::Read, _) => contents.read(range.start, &mut flight.found[within]),
                (Verb::Write, Some(bytes)) => contents.write(range.start, &bytes[within]),
                (Verb::Punch, _) => contents.zero(range, true),
                (Verb::Zero, _) => contents.zero(range, false),
                (verb, _) => unreachable!("{verb:?} has no bytes"),
            }
        }
        if let Some(operation) = flight.recorded
            && (!part.is_empty() || step.is_some())
        {
            self.history.events.push(Event::Effect { operation, bytes: part, step });
        }
    }

    fn complete(&mut self, number: u64) {
        let acts = self.flights.get(&number).is_some_and(|flight| flight.acts);
        if acts {
            self.take_whole_effect(number);
        }
        let Some(flight) = self.flights.remove(&number) else { return };
        let result = match flight.doom {
            Some(Outcome::Fail(errno) | Outcome::Short(errno)) => Err(errno),
            _ => flight.result,
        };
        if let Some(operation) = flight.recorded {
            let how = match (result, flight.asked.verb) {
                (Ok(()), _) => Ending::Done,
                (Err(_), Verb::Sync) => Ending::SyncFailed(self.random.next_bits()),
                (Err(_), _) => Ending::Failed,
            };
            self.history.events.push(Event::Completed { operation, how });
        }
        let queue = &mut self.queues[flight.queue];
        queue.started -= 1;
        if queue.alive {
            queue.ready.push_back(Ended { number, result, found: flight.found });
        }
    }

    /// Releases hanging operations at the next event.
    pub(crate) fn release_hung(&mut self) {
        let hung = |flight: &&mut Flight| flight.started && flight.doom == Some(Outcome::Hang);
        let mut numbers = Vec::new();
        for (number, flight) in &mut self.flights {
            if hung(&flight) {
                flight.doom = None;
                flight.acts = true;
                numbers.push(*number);
            }
        }
        for number in numbers {
            self.schedule(self.clock, Due::Completion(number));
        }
        self.stir();
    }

    /// The wait of a queue that has nothing to reap: runs events until an operation completes or a queue's timeout
    /// passes.
    pub(crate) fn rest(&mut self, queue: usize, timeout: Option<Duration>) -> Rest {
        let own = timeout.map(|timeout| self.clock.saturating_add(timeout));
        let others =
            self.queues.iter().filter(|queue| queue.alive).filter_map(|queue| queue.parked.flatten());
        let deadline = others.chain(own).min();
        if self.timeline.is_empty() {
            return self.park(queue, own, deadline);
        }
        while let Some(((at, _), _)) = self.timeline.first_key_value() {
            if let Some(deadline) = deadline
                && *at > deadline
            {
                self.move_clock(deadline);
                break;
            }
            if self.happen() == Some(true) {
                break;
            }
        }
        Rest::Over
    }

    /// Nothing is in flight: the clock advances only when every queue waits, because one thread runs them all.
    fn park(&mut self, queue: usize, own: Option<Duration>, deadline: Option<Duration>) -> Rest {
        let state = &mut self.queues[queue];
        state.parked = Some(own);
        state.vain_waits += 1;
        let vain_waits = state.vain_waits;
        let all_wait =
            self.queues.iter().all(|queue| !queue.alive || queue.parked.is_some() && !queue.has_work());
        match deadline {
            Some(deadline) if all_wait || vain_waits > WAITS_FOR_OTHERS_MAX => self.move_clock(deadline),
            None if all_wait || vain_waits > VAIN_WAITS_MAX => {
                return self.deadlock(queue);
            }
            _ => {}
        }
        Rest::Over
    }

    fn move_clock(&mut self, to: Duration) {
        self.clock = self.clock.max(to);
        self.stir();
    }

    /// Advances the clock, with only the events that fall due.
    pub(crate) fn pass(&mut self, time: Duration) {
        let end = self.clock.saturating_add(time);
        while self.timeline.first_key_value().is_some_and(|((at, _), _)| *at <= end) {
            self.happen();
        }
        self.move_clock(end);
    }

    /// True if no event is due, nothing waits to be reaped or submitted, and no notifier was used.
    pub(crate) fn is_idle(&self) -> bool {
        self.timeline.is_empty() && !self.queues.iter().any(|queue| queue.alive && queue.has_work())
    }

    /// Ends a queue after its operations in flight, except the hanging ones.
    pub(crate) fn retire(&mut self, queue: usize) {
        self.submit(queue);
        self.queues[queue].alive = false;
        self.queues[queue].ready.clear();
        loop {
            let waits = |flight: &Flight| flight.queue == queue && flight.started;
            let hangs = |flight: &Flight| flight.doom == Some(Outcome::Hang);
            if !self.flights.values().any(|flight| waits(flight) && !hangs(flight)) || !self.step() {
                break;
            }
            self.submit(queue);
        }
        self.flights.retain(|_, flight| flight.queue != queue);
        self.stir();
    }

    fn deadlock(&self, queue: usize) -> Rest {
        let meant = self.flights.values().any(|flight| flight.started && flight.doom == Some(Outcome::Hang));
        Rest::Deadlock { report: self.report(queue), meant }
    }

    fn report(&self, queue: usize) -> String {
        let mut text = format!("deadlock: queue {queue} waits and nothing will ever happen");
        for (number, state) in self.queues.iter().enumerate().filter(|(_, state)| state.alive) {
            let (ready, staged) = (state.ready.len(), state.staged.len());
            let _ = write!(text, "\n  queue {number}: {ready} to reap, {staged} not submitted");
        }
        for flight in self.flights.values() {
            let Asked { token, file, verb, offset, length, .. } = &flight.asked;
            let path = self.files[*file].path.display();
            let state = if flight.started { "in flight" } else { "not started" };
            let (queue, since) = (flight.queue, flight.since);
            let _ = write!(
                text,
                "\n  {state} on queue {queue} since {since:?}: {verb:?} of {length} bytes at {offset:#x} of {path}, \
                 token {:#x}, fault {:?}",
                token.0, flight.doom
            );
        }
        text
    }
}

impl Flight {
    /// Bytes that take effect together in the view of reads: a file system frees space by whole pages.
    fn grain(&self) -> u64 {
        if self.asked.verb == Verb::Punch { PAGE_BYTES } else { 512 }
    }
}

impl QueueState {
    /// True if its thread has work.
    pub(crate) fn has_work(&self) -> bool {
        !self.ready.is_empty() || !self.staged.is_empty() || self.rung.load(Ordering::Acquire)
    }
}

/// Allocates space and changes the file's length, as far as there is room. Bytes without room are dropped, and the
/// operation fails.
fn begin(flight: &mut Flight, contents: &mut Contents, room: u64, no_room: Errno) -> Option<LengthStep> {
    let asked = &flight.asked;
    let end = match asked.verb {
        Verb::Read | Verb::Punch | Verb::Sync => return None,
        Verb::SetLength => {
            let changes = contents.length() != asked.offset;
            contents.set_length(asked.offset);
            return changes.then_some(LengthStep::Set(asked.offset));
        }
        Verb::Write | Verb::Zero => flight.left.end(),
        Verb::Allocate => asked.offset + asked.length,
    };
    let mut range = asked.offset..end;
    let first_without_room = contents.missing_pages(range.clone()).nth((room / PAGE_BYTES) as usize);
    if let Some(page) = first_without_room {
        range.end = (page * PAGE_BYTES).max(range.start);
        flight.left = flight.left.intersect(&Ranges::one(range.clone()));
        flight.result = Err(no_room);
        contents.allocate(range);
        if asked.verb == Verb::Allocate {
            return None;
        }
    } else {
        contents.allocate(range);
    }
    let end = if asked.verb == Verb::Allocate { end } else { flight.left.end() };
    (end > contents.length()).then(|| {
        contents.grow(end);
        LengthStep::Grow(end)
    })
}
