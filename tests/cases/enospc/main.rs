//! A simulated host that runs out of space: requests that need space fail or wait for it, and others continue. In the
//! end the disk equals the model, and the image is clean.

mod held;
mod mount;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use disk::check::check;
use disk::resize::{NewSize, Shrinking};
use disk::{
    Completed, Disk, DiskOptions, DiskQueue, Keeper, OnEnospc, Request, RequestError, RequestId, Resizing,
    SpaceStatus,
};
use qcow2::create::NewImage;
use qcow2::{Geometry, Version};
use storage::{Errno, GuestSlice};
use storage_sim::{Fault, Outcome, Random, SimOptions, SimStorage, SimWorld, Verb};
use strata_kit::Qemu;
use strata_kit::model::{ByteModel, DiscardRule, Operation, contents};
use strata_rig::agree::assert_clean;

const TOP: &str = "top.qcow2";
const BASE: &str = "base.raw";
/// Bytes of the disk.
const SIZE: u64 = 4 << 20;
/// Requests in flight at a time.
const SLOTS: usize = 8;
/// Bytes of a request's memory.
const WINDOW: usize = 256 << 10;
/// More space than any test needs.
const PLENTY: u64 = 1 << 30;
const QUEUES: usize = 2;
const CLUSTER: u64 = 64 << 10;

/// The options with which a disk is made and opened.
#[derive(Clone, Copy, Debug)]
struct Setup {
    cluster_bits: u32,
    backing: bool,
    /// The host can preallocate space.
    allocate: bool,
    on_enospc: OnEnospc,
    /// Bytes of the disk.
    size: u64,
    seed: u64,
}

impl Setup {
    fn new(on_enospc: OnEnospc) -> Self {
        Setup { cluster_bits: 16, backing: false, allocate: true, on_enospc, size: SIZE, seed: 1 }
    }

    fn options(&self) -> DiskOptions {
        DiskOptions { lock_timeout: Duration::ZERO, on_enospc: self.on_enospc, ..DiskOptions::default() }
    }

    fn open(self) -> Rig {
        let options = SimOptions { allocate: self.allocate, record: false, ..SimOptions::default() };
        let world = SimWorld::new(self.seed, options);
        let base = if self.backing { contents(7, 0, self.size * 3 / 4) } else { Vec::new() };
        let geometry = Geometry {
            version: Version::V3,
            cluster_bits: self.cluster_bits,
            refcount_order: 4,
            extended_l2: false,
            size: self.size,
        };
        let mut new = NewImage::new(geometry);
        if self.backing {
            world.add_file(BASE, &base);
            new.backing_file = Some(BASE.as_bytes().to_vec());
            new.backing_format = Some("raw".to_owned());
        }
        let mut bytes = Vec::new();
        for (offset, piece) in new.layout().expect("a geometry that the format allows") {
            bytes.resize(offset.0 as usize, 0);
            bytes.extend(piece);
        }
        world.add_file(TOP, &bytes);
        let rule = DiscardRule::ZeroesClusters;
        let model = ByteModel::with_contents(&base, self.size, 1 << self.cluster_bits, rule);
        Rig::open(world, self, model)
    }
}

/// An open disk with two queues and a housekeeper, all in one thread.
struct Rig {
    world: SimWorld,
    setup: Setup,
    model: ByteModel,
    queues: Vec<DiskQueue<SimStorage>>,
    keeper: Option<Keeper<SimStorage>>,
    resizing: Option<Resizing<SimStorage>>,
    disk: Disk<SimStorage>,
    windows: Vec<GuestSlice>,
    /// Operations in flight, by slot.
    flying: BTreeMap<usize, Operation>,
    /// Failed operations, with their errors.
    failed: Vec<(Operation, RequestError)>,
    done: usize,
}

impl Rig {
    fn open(world: SimWorld, setup: Setup, model: ByteModel) -> Self {
        let disk =
            Disk::open_unkept(world.storage(), Path::new(TOP), &setup.options()).expect("the disk opens");
        let queues = (0..QUEUES).map(|_| disk.queue(32).expect("a queue")).collect();
        let keeper = Some(disk.keeper().expect("a housekeeper"));
        let windows = (0..SLOTS).map(|_| window()).collect();
        let (flying, failed) = (BTreeMap::new(), Vec::new());
        let resizing = None;
        Rig { world, setup, model, queues, keeper, resizing, disk, windows, flying, failed, done: 0 }
    }

    /// Limits the space to the allocated bytes and this many more.
    fn leave_space(&self, bytes: u64) {
        self.world.set_space(self.world.allocated() + bytes, Errno::ENOSPC);
    }

    fn space(&self) -> SpaceStatus {
        self.disk.space().status()
    }

    /// Sends a request.
    fn send(&mut self, operation: Operation) {
        let slot = (0..SLOTS).find(|slot| !self.flying.contains_key(slot)).expect("a free slot");
        let slices = match operation {
            Operation::Read { length, .. } | Operation::Write { length, .. } => {
                vec![self.windows[slot].subslice(0, length as usize).expect("a request fits its window")]
            }
            _ => Vec::new(),
        };
        if let Operation::Write { offset, length, seed } = operation {
            slices[0].copy_from(&contents(seed, offset, length));
        }
        self.queues[slot % QUEUES].submit(RequestId(slot as u32), request(&operation), &slices);
        self.flying.insert(slot, operation);
    }

    /// Runs the queues and the housekeeper for this long, by the simulated clock.
    fn pass(&mut self, time: Duration) {
        let end = self.world.now() + time;
        loop {
            self.exhaust();
            let left = end.saturating_duration_since(self.world.now());
            if left.is_zero() {
                return;
            }
            self.world.pass(left.min(Duration::from_millis(10)));
        }
    }

    /// Polls the queues and the housekeeper until nothing is left to do without time passing for timers.
    fn exhaust(&mut self) {
        loop {
            let mut done: Vec<Completed> = Vec::new();
            for queue in &mut self.queues {
                queue.poll(&mut done);
                queue.wait(Some(Duration::ZERO));
            }
            if let Some(keeper) = &mut self.keeper {
                keeper.poll();
                keeper.wait(Some(Duration::ZERO));
            }
            if let Some(resizing) = &mut self.resizing {
                let ended = resizing.poll();
                resizing.wait(Some(Duration::ZERO));
                if let Some(outcome) = ended {
                    outcome.expect("it is resized");
                    self.resizing = None;
                }
            }
            let idle = done.is_empty();
            for completed in done {
                self.complete(completed);
            }
            if idle && !self.world.step() && self.world.is_idle() {
                return;
            }
        }
    }

    fn complete(&mut self, completed: Completed) {
        let slot = completed.id.0 as usize;
        let operation = self.flying.remove(&slot).expect("it was in flight, once");
        if let Err(error) = completed.result {
            return self.failed.push((operation, error));
        }
        self.done += 1;
        self.model.apply(&operation);
        if let Operation::Read { offset, length } = operation {
            let mut found = vec![0; length as usize];
            self.windows[slot].copy_to(&mut found);
            self.model.compare(offset, &found).expect("a read finds what was written");
        }
    }

    /// Sends one request and gives it a moment. Returns its result, if it ended.
    fn try_one(&mut self, operation: Operation) -> Option<Result<(), RequestError>> {
        let (done, failed) = (self.done, self.failed.len());
        self.send(operation);
        self.pass(Duration::from_millis(50));
        match self.failed.len() > failed {
            true => self.failed.pop().map(|(_, error)| Err(error)),
            false => (self.done > done).then_some(Ok(())),
        }
    }

    /// Sends one request that must succeed at once.
    fn run(&mut self, operation: Operation) {
        self.try_one(operation).expect("it does not wait").expect("it succeeds");
    }

    /// Resizes the disk while it is in use.
    fn resize(&mut self, size: u64) {
        let resizing = self.disk.resizing(NewSize::Of(size), Shrinking::Accepted).expect("it begins");
        self.resizing = Some(resizing);
        self.pass(Duration::from_secs(1));
        assert!(self.resizing.is_none() && self.disk.size() == size, "it is resized");
    }

    /// Closes the disk, copies it to another host with every page of zeros as a hole, and opens it there.
    fn copied_with_holes(mut self) -> Self {
        self.queues.clear();
        self.keeper = None;
        self.disk.close().expect("a clean close");
        let world = SimWorld::new(2, SimOptions { record: false, ..SimOptions::default() });
        let image = self.world.image();
        let contents = image.file(Path::new(TOP)).expect("the image");
        let mut bytes = vec![0; contents.length() as usize];
        contents.read(0, &mut bytes);
        world.add_file(TOP, &bytes);
        Rig::open(world, self.setup, self.model)
    }

    /// Closes the disk. The image must be clean and equal the model.
    fn conclude(mut self) {
        assert!(self.flying.is_empty() && self.failed.is_empty(), "{:?}, {:?}", self.flying, self.failed);
        self.queues.clear();
        self.keeper = None;
        self.disk.close().expect("a clean close");
        let calm = SimWorld::from_image(self.world.image(), 1, SimOptions::calm());
        let report = check(&calm.storage(), Path::new(TOP), &self.setup.options()).expect("a check");
        assert_eq!((report.corruptions, report.leaked_clusters), (0, 0), "{:?}", report.findings);
        check_by_qemu(&calm);
        let mut again = Rig::open(calm, self.setup, self.model);
        for offset in (0..self.setup.size).step_by(WINDOW) {
            again.run(Operation::Read { offset, length: WINDOW as u64 });
        }
    }
}

/// Checks the image with QEMU, if its tools are present.
fn check_by_qemu(world: &SimWorld) {
    static QEMU: LazyLock<Option<Qemu>> = LazyLock::new(Qemu::find);
    if QEMU.is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let image = world.image();
    for name in image.paths() {
        image.export(name, &folder.path().join(name)).expect("an export");
    }
    assert_clean(&folder.path().join(TOP), "the closed image");
}

/// A request's memory, aligned for direct I/O. Leaked, so that the slice is 'static.
fn window() -> GuestSlice {
    let bytes = Box::leak(vec![0; WINDOW + 4096].into_boxed_slice());
    let skip = bytes.as_ptr().align_offset(4096);
    GuestSlice::from(&mut bytes[skip..skip + WINDOW])
}

fn request(operation: &Operation) -> Request {
    let write_through = false;
    match *operation {
        Operation::Read { offset, .. } => Request::Read { offset },
        Operation::Write { offset, seed, .. } => {
            Request::Write { offset, write_through: seed.is_multiple_of(8) }
        }
        Operation::Discard { offset, length } => Request::Discard { offset, length, write_through },
        Operation::WriteZeroes { offset, length, unmap } => {
            Request::WriteZeroes { offset, length, unmap, write_through }
        }
        Operation::Flush => Request::Flush,
    }
}

fn write(cluster: u64, clusters: u64, seed: u32) -> Operation {
    Operation::Write { offset: cluster * CLUSTER, length: clusters * CLUSTER, seed }
}

/// A disk whose first two clusters are written and flushed, on a host without further space.
fn full(setup: Setup) -> Rig {
    let mut rig = setup.open();
    rig.run(write(0, 2, 1));
    rig.run(Operation::Flush);
    rig.pass(Duration::from_secs(12));
    rig.leave_space(0);
    rig
}

/// Runs requests that need no space: a read, and a write in place.
fn run_others(rig: &mut Rig, seed: u32) {
    rig.run(Operation::Read { offset: 0, length: 2 * CLUSTER });
    rig.run(Operation::Write { offset: CLUSTER + 8192, length: 16384, seed });
}

#[test]
fn report_fails_what_needs_space_and_nothing_else() {
    let mut rig = full(Setup::new(OnEnospc::Report));
    let error = rig.try_one(write(10, 1, 2)).expect("it does not wait").expect_err("there is no space");
    assert!(error.is_no_space(), "{error}");
    run_others(&mut rig, 3);
    assert_eq!(rig.space(), SpaceStatus { waiting: 0, waited: 0 });
    rig.leave_space(PLENTY);
    rig.run(write(10, 1, 2));
    rig.run(Operation::Flush);
    rig.conclude();
}

#[test]
fn wait_holds_what_needs_space_and_nothing_else() {
    let mut rig = full(Setup::new(OnEnospc::Wait));
    rig.send(write(10, 1, 2));
    rig.send(Operation::Write { offset: 20 * CLUSTER + 512, length: 1024, seed: 3 });
    rig.pass(Duration::from_secs(5));
    assert_eq!(rig.flying.len(), 2, "there is no space for them: {:?}", rig.failed);
    assert_eq!(rig.space(), SpaceStatus { waiting: 2, waited: 2 });
    run_others(&mut rig, 5);
    rig.leave_space(PLENTY);
    rig.pass(Duration::from_millis(1100));
    assert!(rig.flying.is_empty(), "the longest pause is a second");
    assert_eq!(rig.space(), SpaceStatus { waiting: 0, waited: 2 });
    rig.run(Operation::Flush);
    rig.conclude();
}

#[test]
fn an_overlapping_request_passes_one_that_waits() {
    let mut rig = full(Setup::new(OnEnospc::Wait));
    rig.send(write(1, 2, 2));
    rig.pass(Duration::from_secs(2));
    assert_eq!(rig.space().waiting, 1);
    // The waiting request has dropped its claim: the shared cluster is free for other requests.
    rig.run(write(1, 1, 3));
    rig.run(Operation::Discard { offset: CLUSTER, length: CLUSTER });
    rig.leave_space(PLENTY);
    rig.pass(Duration::from_millis(1100));
    assert!(rig.flying.is_empty());
    rig.conclude();
}

/// A write that waits while the disk becomes smaller must not be carried out past the new end.
#[test]
fn a_write_that_waits_fails_where_the_disk_has_become_smaller() {
    let mut rig = full(Setup::new(OnEnospc::Wait));
    rig.send(write(40, 1, 2));
    rig.send(write(10, 1, 3));
    rig.pass(Duration::from_secs(2));
    assert_eq!(rig.space().waiting, 2);
    rig.resize(SIZE / 2);
    rig.leave_space(PLENTY);
    rig.pass(Duration::from_millis(1100));
    let (operation, error) = rig.failed.pop().expect("one of them failed");
    assert!(operation == write(40, 1, 2) && matches!(error, RequestError::PastEnd), "{operation:?}: {error}");
    assert!(rig.failed.is_empty() && rig.flying.is_empty(), "the other was carried out");
    rig.run(Operation::Read { offset: 10 * CLUSTER, length: CLUSTER });
    // What lies past the end again shows no write that failed.
    rig.resize(SIZE);
    rig.run(Operation::Read { offset: 40 * CLUSTER, length: CLUSTER });
    rig.conclude();
}

#[test]
fn freed_space_ends_a_wait_at_once() {
    let mut rig = full(Setup::new(OnEnospc::Wait));
    rig.send(write(10, 1, 2));
    // It is tried after 0.1, 0.3, 0.7, 1.5 and 2.5 seconds. The next attempt is long after the discard.
    rig.pass(Duration::from_millis(2600));
    assert_eq!(rig.space().waiting, 1);
    rig.run(Operation::Discard { offset: 0, length: 2 * CLUSTER });
    rig.run(Operation::Flush);
    rig.pass(Duration::from_millis(300));
    assert!(rig.flying.is_empty(), "the discard has made space: {:?}", rig.space());
    rig.leave_space(PLENTY);
    rig.conclude();
}

#[test]
fn freed_space_is_there_for_the_next_write() {
    for on_enospc in [OnEnospc::Report, OnEnospc::Wait] {
        let mut rig = full(Setup::new(on_enospc));
        rig.run(Operation::Discard { offset: 0, length: 2 * CLUSTER });
        rig.run(write(10, 1, 2));
        assert_eq!(rig.space(), SpaceStatus::default());
        rig.leave_space(PLENTY);
        rig.conclude();
    }
}

/// A disk with a cluster of which the host has allocated only the first sectors.
fn sparse(on_enospc: OnEnospc) -> Rig {
    let mut rig = Setup::new(on_enospc).open();
    rig.run(Operation::Write { offset: 0, length: 4096, seed: 1 });
    rig.run(Operation::Flush);
    rig.run(Operation::Read { offset: 0, length: CLUSTER });
    rig.pass(Duration::from_secs(12));
    rig.leave_space(0);
    rig
}

#[test]
fn a_write_in_place_may_find_no_space_either() {
    let hole = Operation::Write { offset: 32768, length: 8192, seed: 2 };
    let mut rig = sparse(OnEnospc::Report);
    let error = rig.try_one(hole).expect("it does not wait").expect_err("there is no space");
    assert!(error.is_no_space(), "{error}");
    rig.leave_space(PLENTY);
    rig.run(hole);
    rig.conclude();

    let mut rig = sparse(OnEnospc::Wait);
    rig.send(hole);
    rig.pass(Duration::from_secs(2));
    assert_eq!((rig.flying.len(), rig.space().waiting), (1, 1));
    rig.run(Operation::Write { offset: 0, length: 4096, seed: 3 });
    rig.leave_space(PLENTY);
    rig.pass(Duration::from_millis(1100));
    assert!(rig.flying.is_empty());
    rig.conclude();
}

/// A disk on a host without preallocation, with space for a cluster's data but not for its L2 table.
fn unflushable(on_enospc: OnEnospc) -> Rig {
    let mut rig = Setup { allocate: false, ..Setup::new(on_enospc) }.open();
    rig.leave_space(CLUSTER);
    rig.run(write(0, 1, 1));
    rig
}

#[test]
fn a_flush_without_space_fails_or_waits() {
    let mut rig = unflushable(OnEnospc::Report);
    let error = rig.try_one(Operation::Flush).expect("it does not wait").expect_err("there is no space");
    assert!(error.is_no_space(), "{error}");
    rig.leave_space(PLENTY);
    rig.run(Operation::Flush);
    rig.conclude();

    let mut rig = unflushable(OnEnospc::Wait);
    rig.send(Operation::Flush);
    rig.pass(Duration::from_secs(2));
    assert_eq!((rig.flying.len(), rig.space().waiting), (1, 1));
    run_read(&mut rig);
    rig.leave_space(PLENTY);
    rig.pass(Duration::from_millis(1100));
    assert!(rig.flying.is_empty());
    rig.conclude();
}

fn run_read(rig: &mut Rig) {
    rig.run(Operation::Read { offset: 0, length: CLUSTER });
}

#[test]
fn a_disk_that_is_stopped_waits_no_more() {
    let mut rig = full(Setup::new(OnEnospc::Wait));
    rig.send(write(10, 1, 2));
    rig.pass(Duration::from_secs(2));
    assert_eq!(rig.space().waiting, 1);
    rig.disk.space().stop_waiting();
    rig.exhaust();
    let (_, error) = rig.failed.pop().expect("it ends");
    assert!(error.is_no_space() && error.was_given_up(), "{error}");
    let error = rig.try_one(write(11, 1, 2)).expect("it does not wait").expect_err("there is no space");
    assert!(error.is_no_space() && error.was_given_up(), "{error}");
    run_others(&mut rig, 3);
    rig.leave_space(PLENTY);
    rig.conclude();
}

/// Lack of space in a flush fails the disk. Nobody can do such a request again, so the guest must get its answer.
#[test]
fn a_request_of_a_disk_that_has_failed_was_not_given_up() {
    let mut rig = Setup::new(OnEnospc::Wait).open();
    rig.run(write(1, 1, 2));
    rig.world.inject(Fault::nth(0, Outcome::Fail(Errno::ENOSPC)).of(Verb::Sync));
    for operation in [Operation::Flush, Operation::Flush, write(2, 1, 3)] {
        let error = rig.try_one(operation).expect("it does not wait").expect_err("the disk has failed");
        assert!(!error.was_given_up(), "{operation:?}: {error}");
    }
    assert!(rig.disk.has_failed());
}

#[test]
fn a_queue_that_is_dropped_waits_no_more() {
    let mut rig = full(Setup::new(OnEnospc::Wait));
    rig.send(write(10, 1, 2));
    rig.send(write(12, 1, 3));
    rig.pass(Duration::from_secs(2));
    assert_eq!(rig.space().waiting, 2);
    // Slot 0, and so the first request, belongs to the first queue. The drop waits for the end of all its requests.
    drop(rig.queues.remove(0));
    assert_eq!(rig.space().waiting, 1, "the other queue stays");
    rig.flying.remove(&0);
    rig.leave_space(PLENTY);
    rig.pass(Duration::from_millis(1100));
    assert!(rig.flying.is_empty());
    rig.conclude();
}

#[test]
fn a_queue_that_stops_waiting_fails_its_waiting_requests_and_no_others() {
    let mut rig = full(Setup::new(OnEnospc::Wait));
    // Alternately on the first and the second queue.
    rig.send(write(1, 2, 2));
    rig.send(write(10, 1, 3));
    rig.pass(Duration::from_secs(2));
    assert_eq!(rig.space().waiting, 2);
    rig.queues[0].stop_waiting();
    rig.exhaust();
    let (operation, error) = rig.failed.pop().expect("it ends at once");
    assert!(operation == write(1, 2, 2) && error.was_given_up(), "{operation:?}: {error}");
    assert_eq!(rig.space().waiting, 1, "the other queue's waits on");
    // Its range is free for other requests, and its queue still serves requests that need no space.
    rig.run(write(1, 1, 5));
    run_others(&mut rig, 6);
    let error = rig.try_one(write(11, 1, 7)).expect("it does not wait").expect_err("there is no space");
    assert!(error.is_no_space(), "{error}");
    rig.leave_space(PLENTY);
    rig.pass(Duration::from_millis(1100));
    assert!(rig.flying.is_empty(), "{:?}", rig.flying);
    rig.run(write(1, 2, 9));
    rig.run(Operation::Discard { offset: CLUSTER, length: CLUSTER });
    rig.run(Operation::Flush);
    rig.conclude();
}

#[test]
fn a_request_that_stops_waiting_during_a_retry_frees_its_claim() {
    let mut rig = full(Setup::new(OnEnospc::Wait));
    rig.send(write(20, 1, 2));
    rig.pass(Duration::from_secs(2));
    assert_eq!(rig.space().waiting, 1);
    // The next attempt comes within a second, and its I/O hangs for now.
    rig.world.inject(Fault::nth(0, Outcome::Hang));
    rig.pass(Duration::from_millis(1100));
    rig.send(write(20, 1, 3));
    rig.pass(Duration::from_millis(500));
    assert_eq!((rig.flying.len(), rig.space().waiting), (2, 1), "the second is behind the first's claim");
    rig.queues[0].stop_waiting();
    rig.world.release_hung();
    rig.exhaust();
    // The second may first wait for room in the quarantine, where the first's clusters are.
    rig.pass(Duration::from_millis(90));
    let (operation, _) = rig.failed.pop().expect("the first has ended");
    assert_eq!(operation, write(20, 1, 2));
    assert_eq!((rig.flying.len(), rig.space().waiting), (1, 1), "now the second has been tried, and waits");
    rig.leave_space(PLENTY);
    rig.pass(Duration::from_millis(1100));
    assert!(rig.flying.is_empty(), "{:?}", rig.flying);
    rig.conclude();
}

/// Random operations on different clusters.
fn group(random: &mut Random, cluster_size: u64, next_seed: &mut u32) -> Vec<Operation> {
    let lane = SIZE / SLOTS as u64;
    (0..SLOTS as u64)
        .map(|number| {
            *next_seed += 1;
            let whole = random.chance(1, 2);
            let grain = if whole { cluster_size } else { 512 };
            let most = (WINDOW as u64).min(lane / 2) / grain;
            let length = (1 + random.below(most)) * grain;
            let offset = number * lane + random.below((lane - length) / grain + 1) * grain;
            match random.below(10) {
                0 => Operation::Read { offset, length },
                1 => Operation::Flush,
                2 | 3 => Operation::Discard { offset, length },
                4 | 5 => Operation::WriteZeroes { offset, length, unmap: random.chance(1, 2) },
                _ => Operation::Write { offset, length, seed: *next_seed },
            }
        })
        .collect()
}

/// A run with shortages of space.
fn random_run(setup: Setup) -> u64 {
    let mut rig = setup.open();
    let mut random = Random::new(setup.seed ^ 0xe05);
    let mut next_seed = 1;
    let mut short = 0;
    for _ in 0..12 {
        let room = if random.chance(1, 4) { PLENTY } else { random.below(512 << 10) };
        rig.leave_space(room);
        for operation in group(&mut random, 1 << setup.cluster_bits, &mut next_seed) {
            rig.send(operation);
        }
        rig.pass(Duration::from_millis(random.below(3000)));
        // Before a request fails or waits, freed space is given back, with a bounded number of short pauses.
        rig.pass(Duration::from_secs(1));
        if setup.on_enospc == OnEnospc::Wait {
            assert!(rig.failed.is_empty(), "{setup:?}: {:?}", rig.failed);
            short += rig.space().waiting;
            assert_eq!(rig.space().waiting, rig.flying.len() as u64, "{setup:?}: only what waits is left");
        } else {
            assert!(rig.flying.is_empty(), "{setup:?}: nothing waits: {:?}", rig.flying);
            short += rig.failed.len() as u64;
        }
        rig.leave_space(PLENTY);
        // After a failed operation the contents are unknown until it is repeated.
        for (operation, error) in std::mem::take(&mut rig.failed) {
            assert!(error.is_no_space(), "{setup:?}: {operation:?}: {error}");
            rig.send(operation);
        }
        rig.pass(Duration::from_millis(1500));
        assert!(rig.flying.is_empty(), "{setup:?}: there is space: {:?}", rig.flying);
    }
    rig.conclude();
    short
}

#[test]
fn random_runs_end_right_in_both_ways() {
    for on_enospc in [OnEnospc::Report, OnEnospc::Wait] {
        let mut short = 0;
        for seed in 0..64 {
            let setup = Setup {
                cluster_bits: if seed & 1 == 0 { 12 } else { 16 },
                backing: seed & 2 != 0,
                allocate: seed & 4 == 0,
                on_enospc,
                size: SIZE,
                seed,
            };
            short += random_run(setup);
        }
        println!("{on_enospc:?}: {short} requests found no space");
        assert!(short > 100, "the runs ran out of space: {short} times");
    }
}
