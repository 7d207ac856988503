//! A whole disk in one thread on a simulated host: two queues and the housekeeper, polled in an order that a seed
//! determines. The code under test is the production code. This module decides the order and the passing of time.

mod overlays;
pub mod releasing;
mod resizing;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use disk::change::{ChangeError, ChangeRefusal};
use disk::snapshot::{Change, change};
use disk::{Completed, Disk, DiskQueue, Keeper, OpenError, RequestError, RequestId, Resizing, SpaceStatus};
use engine::EngineStatus;
use storage::GuestSlice;
use storage_sim::{Fault, Hung, Moment, Outcome, Random, SimOptions, SimStorage, SimWorld};

pub use self::overlays::Layers;
use self::overlays::request;
use super::deaths::{Death, DeathWatch};
use super::examine::values_now;
use super::journal::{Deed, Journal, Op};
use super::memory::{SLOTS, WINDOW, gather, memory, scatter};
use super::scarce::Tide;
use super::shape::{FIRST_WRITE, Past, Shape, Start, TOP};
use super::stamp::{SECTOR, Value, read_stamps, stamp};

/// Number of queues of a disk.
const QUEUES: usize = 2;
/// Operations in flight on each queue.
const QUEUE_DEPTH: u32 = 32;
/// Polls that find nothing before time passes.
const VAIN_TURNS_MAX: u32 = 300;
/// Simulated time without a completion that counts as a hang.
const HANG: Duration = Duration::from_secs(60);
/// Time without a completion after which hanging I/O is released.
const PATIENCE: Duration = Duration::from_secs(20);
/// Simulated time that a queue may take to stop. Its I/O takes much less.
const STOP_MAX: Duration = Duration::from_secs(4);
/// Step by which simulated time passes when nothing else happens.
const TICK: Duration = Duration::from_millis(50);

/// An open disk and the journal of its requests.
pub struct Rig {
    /// The host.
    pub world: SimWorld,
    /// The requests and their results.
    pub journal: Journal,
    /// The requests that failed, with their errors.
    pub failures: Vec<(usize, RequestError)>,
    /// The requests that failed while their queue was being stopped.
    pub given_up: Vec<(usize, RequestError)>,
    /// The first read that returned a forbidden value.
    pub misread: Option<String>,
    queues: Vec<DiskQueue<SimStorage>>,
    keeper: Option<Keeper<SimStorage>>,
    /// A resize of the disk in use, and its entry in the journal.
    resizing: Option<(usize, Resizing<SimStorage>)>,
    /// None only while the closed image is changed.
    disk: Option<Disk<SimStorage>>,
    shape: Shape,
    /// The names of the image's snapshots, oldest first.
    snapshots: Vec<String>,
    flying: Vec<Option<Flight>>,
    next_write: u32,
    random: Random,
    quiet: Vec<Moment>,
    stalled: Duration,
    /// Delay of the next request's first I/O.
    late: Option<Duration>,
    reserved: Vec<(Moment, u64)>,
    /// Set while the host runs out of space from time to time.
    tide: Option<Tide>,
    /// The queue that is being stopped, and the start of the stop.
    leaving: Option<(usize, Instant)>,
    /// Set if the disk keeps a journal.
    watch: Option<DeathWatch>,
    /// The layers of its chain.
    layers: Layers,
}

/// A request in flight.
struct Flight {
    index: usize,
    queue: usize,
    slices: Vec<GuestSlice>,
}

/// A run that has ended.
pub struct Finished {
    /// The host.
    pub world: SimWorld,
    /// The requests and their results.
    pub journal: Journal,
    /// The requests that failed, with their errors.
    pub failures: Vec<(usize, RequestError)>,
    /// The requests that failed while their queue was being stopped.
    pub given_up: Vec<(usize, RequestError)>,
    /// The first read that returned a forbidden value.
    pub misread: Option<String>,
    /// Instants without dirty bytes and without clusters in quarantine, in order. The first is the opening.
    pub quiet: Vec<Moment>,
    /// The result of the clean close.
    pub closed: Result<(), OpenError>,
    /// An I/O of the opening or of the close never ended, so the opening or the close did not end either.
    pub hung: bool,
    /// Each new maximum of the reserved, unused clusters, with the moment of its observation, in order.
    pub reserved: Vec<(Moment, u64)>,
    /// The most attempts of a request that found no space.
    pub tries: u64,
    /// What deaths of the daemon alone would have left.
    pub deaths: Vec<Death>,
    /// The layers of the chain.
    pub layers: Layers,
}

/// The result of `work`. None if it waits for an I/O that a fault made hang, as a process waits until the machine
/// crashes.
fn until_hung<T>(work: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(value) => Some(value),
        Err(panic) if panic.is::<Hung>() => None,
        Err(panic) => resume_unwind(panic),
    }
}

impl Finished {
    /// A run whose opening hung.
    fn hung_in_opening(start: &Start, world: SimWorld) -> Finished {
        Finished {
            world,
            journal: Journal::new(start.shape, start.values.clone(), &start.snapshots),
            failures: Vec::new(),
            given_up: Vec::new(),
            misread: None,
            quiet: Vec::new(),
            closed: Ok(()),
            hung: true,
            reserved: Vec::new(),
            tries: 1,
            deaths: Vec::new(),
            layers: Layers::default(),
        }
    }

    /// The value of each sector, if no requests overlapped in time.
    pub fn settled_values(&self) -> Vec<Value> {
        self.journal.settled_values()
    }
}

/// The options of a host, from a seed. Most hosts support everything.
pub fn host(seed: u64) -> SimOptions {
    let mut random = Random::new(seed ^ 0x4057);
    SimOptions { punch: !random.chance(1, 8), allocate: !random.chance(1, 8), ..SimOptions::default() }
}

type Opened = (Disk<SimStorage>, Vec<DiskQueue<SimStorage>>, Option<Keeper<SimStorage>>);

fn open(world: &SimWorld, top: &str, shape: &Shape, watch: Option<&DeathWatch>) -> Result<Opened, OpenError> {
    let disk = Disk::open_unkept(world.storage(), Path::new(top), &shape.options())?;
    if let Some(watch) = watch {
        disk.keep_journal(Some(Arc::clone(&watch.memory)))?;
    }
    let queues = (0..QUEUES).map(|_| disk.queue(QUEUE_DEPTH)).collect::<Result<Vec<_>, _>>()?;
    let keeper = shape.is_qcow2().then(|| disk.keeper()).transpose()?;
    Ok((disk, queues, keeper))
}

impl Rig {
    /// Opens a disk in its own world.
    pub fn open(start: &Start, seed: u64) -> Result<Rig, OpenError> {
        let world = SimWorld::from_image(start.image.clone(), seed, host(seed));
        Rig::open_numbered(start, world, seed, FIRST_WRITE + 1000)
    }

    /// As [`Rig::open`], with a journal, for a run of some `requests` in which the daemon may die.
    pub fn open_watched(start: &Start, seed: u64, requests: usize) -> Result<Rig, OpenError> {
        let world = SimWorld::from_image(start.image.clone(), seed, host(seed));
        let watch = DeathWatch::new(requests, seed);
        Rig::open_with(start, world, seed, FIRST_WRITE + 1000, Some(watch))
    }

    /// Opens the disk in a world. Writes are numbered from `first_write`.
    pub fn open_numbered(
        start: &Start,
        world: SimWorld,
        seed: u64,
        first_write: u32,
    ) -> Result<Rig, OpenError> {
        Rig::open_with(start, world, seed, first_write, None)
    }

    fn open_with(
        start: &Start,
        world: SimWorld,
        seed: u64,
        first_write: u32,
        watch: Option<DeathWatch>,
    ) -> Result<Rig, OpenError> {
        let (disk, queues, keeper) = open(&world, &start.top, &start.shape, watch.as_ref())?;
        let quiet = vec![world.moment()];
        Ok(Rig {
            journal: Journal::new(start.shape, start.values.clone(), &start.snapshots),
            shape: start.shape,
            snapshots: start.snapshots.iter().map(|(name, _)| name.clone()).collect(),
            failures: Vec::new(),
            given_up: Vec::new(),
            misread: None,
            queues,
            keeper,
            resizing: None,
            disk: Some(disk),
            flying: (0..SLOTS).map(|_| None).collect(),
            next_write: first_write,
            random: Random::new(seed ^ 0x71d),
            quiet,
            stalled: Duration::ZERO,
            late: None,
            reserved: Vec::new(),
            tide: None,
            leaving: None,
            watch,
            layers: Layers::new(start),
            world,
        })
    }

    /// As [`Rig::open_numbered`]. If the opening hangs, the outer error is the run so far.
    pub fn open_or_hang(
        start: &Start,
        world: &SimWorld,
        seed: u64,
        first_write: u32,
    ) -> Result<Result<Rig, OpenError>, Box<Finished>> {
        let open = || Rig::open_numbered(start, world.clone(), seed, first_write);
        until_hung(open).ok_or_else(|| Box::new(Finished::hung_in_opening(start, world.clone())))
    }

    /// The engine's status.
    pub fn status(&self) -> EngineStatus {
        self.disk.as_ref().expect("it is open").status()
    }

    /// The requests that wait for space.
    pub fn space(&self) -> SpaceStatus {
        self.disk.as_ref().expect("it is open").space().status()
    }

    /// From now on the host runs out of space from time to time, and queues are stopped and restarted meanwhile.
    pub fn begin_tide(&mut self, tide: Tide) {
        self.tide = Some(tide);
    }

    /// From now on the host always has space.
    pub fn end_tide(&mut self) {
        self.tide = None;
        Tide::ebb(&self.world);
    }

    fn turn_tide(&mut self) {
        let Some(tide) = &mut self.tide else { return };
        let stops = tide.turn(&self.world, QUEUES);
        let Some((queue, since)) = self.leaving else {
            if let Some(queue) = stops {
                self.queues[queue].stop_waiting();
                self.leaving = Some((queue, self.world.now()));
            }
            return;
        };
        if self.flying.iter().flatten().all(|flight| flight.queue != queue) {
            self.queues[queue] = self.disk.as_ref().expect("it is open").queue(QUEUE_DEPTH).expect("a queue");
            self.leaving = None;
        } else if self.world.now() > since + STOP_MAX {
            self.hang("a queue cannot be stopped");
        }
    }

    fn is_leaving(&self, queue: usize) -> bool {
        self.leaving.is_some_and(|(leaving, _)| leaving == queue)
    }

    /// Panics: something takes too long.
    fn hang(&mut self, what: &str) -> ! {
        let hanging = self.hanging();
        // Dropping the queues would wait for the hanging requests, and end the program.
        self.queues.drain(..).for_each(std::mem::forget);
        panic!("{what}: {hanging}");
    }

    fn in_flight(&self) -> usize {
        self.flying.iter().flatten().count()
    }

    /// Performs operations one after the other, lets the housekeeper do its work, and closes.
    pub fn play_alone(mut self, ops: &[Op]) -> Finished {
        self.play(ops, 1);
        self.rest();
        self.finish()
    }

    /// Performs operations in their order, at most `at_once` in flight.
    ///
    /// # Panics
    /// If no operation ends any more.
    pub fn play(&mut self, ops: &[Op], at_once: usize) {
        let mut next = 0;
        while next < ops.len() || self.in_flight() > 0 || self.resizing.is_some() {
            let may_submit = match ops.get(next) {
                None => false,
                Some(Op::Pause(_) | Op::Change(_) | Op::Overlay) => {
                    self.in_flight() == 0 && self.resizing.is_none()
                }
                Some(Op::Live(_)) => self.resizing.is_none(),
                Some(_) => self.in_flight() < at_once.min(SLOTS),
            };
            if may_submit && (at_once == 1 || self.random.chance(1, 3)) {
                match ops[next] {
                    Op::Pause(milliseconds) => self.pause(Duration::from_millis(milliseconds)),
                    Op::Change(deed) => self.change_image(deed),
                    Op::Live(sectors) => self.begin_resize(sectors),
                    Op::Overlay => self.put_overlay(),
                    Op::Late(milliseconds) => self.late = Some(Duration::from_millis(milliseconds)),
                    op => {
                        // A sequence without concurrency is played exactly as written.
                        let through = at_once > 1 && self.random.chance(1, 10);
                        self.submit(op, through);
                    }
                }
                next += 1;
            } else {
                self.act();
            }
        }
    }

    /// True if the image allows this change now.
    fn is_possible(&self, deed: Deed) -> bool {
        // A snapshot that the header does not count would not survive.
        // An image with an external data file has no snapshots.
        let may_have_snapshots =
            self.shape.is_qcow2() && self.shape.past != Past::Shared && !self.shape.has_data_file();
        match deed {
            Deed::Create => may_have_snapshots,
            Deed::Apply | Deed::Delete => may_have_snapshots && !self.snapshots.is_empty(),
            Deed::Resize(_) => {
                self.shape.is_resizable() && (self.shape.version == 3 || self.snapshots.is_empty())
            }
        }
    }

    /// Closes the disk, changes its snapshots or its size, and opens it again.
    ///
    /// # Panics
    /// If any of that fails, except for a full refcount and for a size at which version 2 would show the backing file.
    fn change_image(&mut self, deed: Deed) {
        if !self.is_possible(deed) {
            return;
        }
        self.world.release_hung();
        self.exhaust();
        self.queues.clear();
        self.keeper = None;
        let flush = self.journal.submit(Op::Flush, 0, false, self.world.moment());
        self.disk.take().expect("it is open").close().expect("a clean close");
        self.journal.end(flush, true, self.world.moment());
        let values = values_now(&self.world.image(), TOP, &self.shape).expect("a closed disk can be read");
        let request = self.journal.submit(Op::Change(deed), 0, true, self.world.moment());
        let oldest = self.snapshots.first().cloned().unwrap_or_default();
        let done = match deed {
            Deed::Resize(sectors) => self.resize(sectors),
            _ => self.change_snapshots(deed, request, oldest, values),
        };
        self.journal.end(request, done, self.world.moment());
        let (disk, queues, keeper) =
            open(&self.world, TOP, &self.shape, self.watch.as_ref()).expect("it opens again");
        self.journal.sectors = disk.size() / SECTOR;
        (self.disk, self.queues, self.keeper) = (Some(disk), queues, keeper);
        self.note_quiet();
    }

    fn change_snapshots(&mut self, deed: Deed, request: usize, oldest: String, values: Arc<[Value]>) -> bool {
        let wanted = match deed {
            Deed::Create => {
                let number =
                    (1..).find(|n| self.journal.kept.iter().all(|kept| kept.name != format!("taken {n}")));
                let name = format!("taken {}", number.expect("numbers enough"));
                self.journal.makes(request, name.clone(), values);
                Change::Create { name, seconds: 1, nanoseconds: 2 }
            }
            Deed::Apply => {
                self.journal.applies(request, &oldest);
                Change::Apply { wanted: oldest }
            }
            Deed::Delete => {
                self.journal.deletes(request, &oldest);
                Change::Delete { wanted: oldest }
            }
            Deed::Resize(_) => panic!("no change of snapshots"),
        };
        let changed = change(&self.world.storage(), Path::new(TOP), wanted, &self.shape.options());
        let done = changed.is_ok();
        match (deed, changed) {
            (Deed::Create, Ok(new)) => self.snapshots.push(String::from_utf8(new.name).expect("our name")),
            (Deed::Delete, Ok(_)) => {
                self.snapshots.remove(0);
            }
            (_, Ok(_)) => {}
            (_, Err(ChangeError::Refused { source: ChangeRefusal::RefcountFull { .. }, .. })) => {}
            (_, Err(error)) => panic!("{deed:?}: {error}"),
        }
        done
    }

    /// Submits a request to a random queue. It is write-through if `through` or the operation requires it.
    fn submit(&mut self, op: Op, through: bool) {
        let op = op.clipped(self.journal.sectors);
        if op != Op::Flush && op.sectors().is_empty() {
            // The disk ends before this operation.
            return;
        }
        let through = match op {
            Op::Write { through: always, .. } => through || always,
            Op::Gappy { .. } | Op::Zeroes { .. } | Op::Discard { .. } => through,
            _ => false,
        };
        let slot = self.flying.iter().position(Option::is_none).expect("a free slot");
        let write = self.next_write;
        self.next_write += 1;
        let slices = match op {
            Op::Read { count, .. } | Op::Write { count, .. } | Op::Gappy { count, .. } => {
                memory(slot, count, self.random.below(8))
            }
            _ => Vec::new(),
        };
        if let Op::Write { sector, count, .. } | Op::Gappy { sector, count } = op {
            let mut bytes = vec![0; (count * SECTOR) as usize];
            for (sector, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR as usize)) {
                if !matches!(op, Op::Gappy { .. }) || !self.shape.is_gap(sector) {
                    stamp(sector, write, bytes);
                }
            }
            scatter(&bytes, &slices);
        }
        let mut queue = self.random.below(QUEUES as u64) as usize;
        if self.is_leaving(queue) {
            queue = (queue + 1) % QUEUES;
        }
        let index = self.journal.submit(op, write, through, self.world.moment());
        if let Some(late) = self.late.take() {
            self.world.inject(Fault::nth(0, Outcome::Delay(late)));
        }
        self.flying[slot] = Some(Flight { index, queue, slices: slices.clone() });
        self.queues[queue].submit(RequestId(slot as u32), request(op, through), &slices);
    }

    /// Runs one random step: polls the housekeeper or a queue, or lets a little time pass.
    fn act(&mut self) {
        self.turn_tide();
        if let Some(watch) = &mut self.watch {
            watch.tick(&self.world, self.layers.top(), &self.journal);
        }
        if self.resizing.is_some() && self.random.chance(1, 4) {
            self.poll_resizing();
        }
        let done = match self.random.below(QUEUES as u64 * 2 + 4) {
            0 => self.poll_keeper(),
            number if number <= 2 * QUEUES as u64 => self.poll_queue(number as usize % QUEUES),
            // Only a little time, so that a late I/O stays late: the next event may be far away.
            _ => {
                self.world.pass(Duration::from_nanos(1 << (10 + self.random.below(12))));
                0
            }
        };
        if done > 0 {
            self.stalled = Duration::ZERO;
            return;
        }
        // Long pauses are rare, but the housekeeper's five seconds must sometimes pass in the middle of requests.
        let pass = match self.random.below(2048) {
            0 if self.leaving.is_none() => Duration::from_millis(5100),
            // Sometimes the map is swept.
            1 if self.leaving.is_none() => Duration::from_secs(301),
            0..4 => TICK,
            4..16 => Duration::from_micros(500),
            _ => return self.count_vain_turn(),
        };
        self.world.pass(pass);
    }

    /// Counts a poll that found nothing. After many of them, time must pass.
    fn count_vain_turn(&mut self) {
        self.stalled += TICK / VAIN_TURNS_MAX;
        if self.world.is_idle() && self.random.chance(1, 8) {
            self.world.pass(TICK);
            self.stalled += TICK;
        }
        if self.stalled > PATIENCE {
            self.world.release_hung();
        }
        if self.stalled >= HANG {
            self.hang("requests hang");
        }
    }

    fn hanging(&self) -> String {
        let flights = self.flying.iter().flatten();
        let ops: Vec<_> = flights.map(|flight| self.journal.entries()[flight.index].op).collect();
        format!("{ops:?}, engine {:?}", self.status())
    }

    fn poll_keeper(&mut self) -> usize {
        if let Some(keeper) = &mut self.keeper {
            keeper.poll();
            // As its thread does: this answers a wake, and lets no time pass.
            keeper.wait(Some(Duration::ZERO));
        }
        self.note_reserved();
        0
    }

    fn note_reserved(&mut self) {
        let EngineStatus { reserved_clusters: reserved, quarantined_clusters, quarantined_max, .. } =
            self.status();
        // A request in flight may free two clusters for each compressed cluster that it writes, and a table.
        let under_way = SLOTS as u64 * (2 * (WINDOW as u64 >> self.shape.cluster_bits) + 8);
        assert!(
            quarantined_clusters <= quarantined_max + under_way,
            "{quarantined_clusters} clusters are held back, of {quarantined_max}"
        );
        if self.reserved.last().map_or(0, |(_, most)| *most) < reserved {
            self.reserved.push((self.world.moment(), reserved));
        }
    }

    fn poll_queue(&mut self, queue: usize) -> usize {
        let mut done = Vec::new();
        self.queues[queue].poll(&mut done);
        self.queues[queue].wait(Some(Duration::ZERO));
        self.note_reserved();
        let count = done.len();
        for completed in done {
            self.complete(completed);
        }
        count
    }

    fn complete(&mut self, completed: Completed) {
        let slot = completed.id.0 as usize;
        let flight = self.flying[slot].take().expect("it was in flight, once");
        self.journal.end(flight.index, completed.result.is_ok(), self.world.moment());
        match completed.result {
            Ok(()) => self.compare_read(&flight),
            Err(RequestError::PastEnd) if self.journal.is_cut_off(flight.index) => {}
            Err(error) if self.is_leaving(flight.queue) => self.given_up.push((flight.index, error)),
            Err(error) => self.failures.push((flight.index, error)),
        }
    }

    /// Compares what a read returned with the values that the oracle allows.
    fn compare_read(&mut self, flight: &Flight) {
        let Op::Read { sector: first, .. } = self.journal.entries()[flight.index].op else { return };
        for (sector, value) in (first..).zip(read_stamps(first, &gather(&flight.slices))) {
            let allowed = self.journal.readable(sector, flight.index);
            if !allowed.contains(&value) && self.misread.is_none() {
                let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
                self.misread = Some(format!(
                    "a read (request {}) found {value} in sector {sector}, not {}",
                    flight.index,
                    allowed.join(" or ")
                ));
            }
        }
    }

    /// Polls the queues and the housekeeper until nothing is left to do without time passing for timers.
    fn exhaust(&mut self) {
        loop {
            for queue in 0..QUEUES {
                self.poll_queue(queue);
            }
            self.poll_keeper();
            if !self.world.step() && self.world.is_idle() {
                break;
            }
        }
    }

    /// Submits nothing for a while. Hanging I/O is released afterwards.
    fn pause(&mut self, time: Duration) {
        let end = self.world.now() + time;
        loop {
            self.exhaust();
            if self.world.now() >= end {
                break;
            }
            self.world.pass(TICK.min(end - self.world.now()));
        }
        self.world.release_hung();
        self.exhaust();
        self.note_quiet();
    }

    fn note_quiet(&mut self) {
        let status = self.status();
        if status.dirty_bytes == 0 && status.quarantined_clusters == 0 {
            self.quiet.push(self.world.moment());
        }
    }

    /// Pauses long enough for the housekeeper to flush, to give space back, and to flush that, too: at most ten seconds
    /// each.
    pub fn rest(&mut self) {
        self.pause(Duration::from_millis(22_000));
    }

    /// Whether a write and a flush succeed now. The housekeeper's current work ends first: a failure of it that is
    /// still in flight would come between the two.
    pub fn probe(&mut self) -> (bool, bool) {
        self.world.release_hung();
        self.exhaust();
        self.play(&[Op::write(0, 1), Op::Flush], 1);
        let entries = self.journal.entries();
        let last = entries.len() - 2;
        let done = (entries[last].done, entries[last + 1].done);
        // The caller asked whether these fail.
        self.failures.retain(|(index, _)| *index < last);
        done
    }

    /// Closes the disk cleanly. Nothing may be in flight.
    pub fn finish(self) -> Finished {
        self.finish_with(&[])
    }

    /// As [`Rig::finish`], with faults from the start of the close on.
    pub fn finish_with(mut self, faults: &[Fault]) -> Finished {
        assert_eq!(self.in_flight(), 0, "requests are waited for");
        self.world.release_hung();
        self.exhaust();
        for fault in faults {
            self.world.inject(fault.clone());
        }
        let Rig { queues, keeper, disk, .. } = self;
        let closed = until_hung(|| {
            drop(queues);
            drop(keeper);
            disk.expect("it is open").close()
        });
        Finished {
            world: self.world,
            journal: self.journal,
            failures: self.failures,
            given_up: self.given_up,
            misread: self.misread,
            quiet: self.quiet,
            hung: closed.is_none(),
            closed: closed.unwrap_or(Ok(())),
            reserved: self.reserved,
            tries: 1,
            deaths: self.watch.map_or_else(Vec::new, |watch| watch.deaths),
            layers: self.layers,
        }
    }

    /// Stops without closing, as a crash does. Nothing may be in flight.
    pub fn abandon(self) -> Finished {
        // When the housekeeper is dropped, it completes its current work.
        self.world.release_hung();
        let closed = Ok(());
        Finished {
            world: self.world.clone(),
            journal: self.journal,
            failures: self.failures,
            given_up: self.given_up,
            misread: self.misread,
            quiet: self.quiet,
            closed,
            hung: false,
            reserved: self.reserved,
            tries: 1,
            deaths: self.watch.map_or_else(Vec::new, |watch| watch.deaths),
            layers: self.layers,
        }
    }
}
