//! The housekeeper on a simulated host, where time passes quickly. Tests when dirty metadata reaches the disk without a
//! flush, and when freed space and memory of the chain map go back to the host.

use std::path::Path;
use std::time::Duration;

use disk::{Completed, Disk, DiskOptions, DiskQueue, Keeper, Request, RequestId};
use engine::SLICE_WORDS;
use qcow2::{Geometry, NewImage, Version};
use storage::{Errno, GuestSlice};
use storage_sim::{Fault, Outcome, SimOptions, SimStorage, SimWorld, Verb};

/// Bytes of the words of a slice of the map.
const FRAME: usize = SLICE_WORDS as usize * 8;
/// Bytes that the map's directory needs once anything is resident.
const LEAF: usize = 32 << 10;

/// The interval at which the housekeeper sweeps the map, and a little more.
const SWEEP: Duration = Duration::from_secs(310);

/// A disk on a simulated host, with one queue and its housekeeper.
struct Still {
    world: SimWorld,
    queue: DiskQueue<SimStorage>,
    keeper: Keeper<SimStorage>,
    disk: Disk<SimStorage>,
    memory: GuestSlice,
}

impl Still {
    const CLUSTER: u64 = 4096;
    const SLICE: u64 = SLICE_WORDS * Self::CLUSTER;
    const SLICES: u64 = 32;

    fn new() -> Self {
        let geometry = Geometry {
            version: Version::V3,
            cluster_bits: Self::CLUSTER.trailing_zeros(),
            refcount_order: 4,
            extended_l2: false,
            size: Self::SLICE * Self::SLICES,
        };
        let mut image = Vec::new();
        for (offset, piece) in NewImage::new(geometry).layout().expect("a valid image") {
            image.resize(offset.0 as usize, 0);
            image.extend(piece);
        }
        let world = SimWorld::new(1, SimOptions::calm());
        world.add_file("top.qcow2", &image);
        Still::open(world)
    }

    fn open(world: SimWorld) -> Self {
        let options = DiskOptions { lock_timeout: Duration::ZERO, ..DiskOptions::default() };
        let disk = Disk::open_unkept(world.storage(), Path::new("top.qcow2"), &options).expect("it opens");
        let (queue, keeper) = (disk.queue(4).expect("a queue"), disk.keeper().expect("a housekeeper"));
        let memory = GuestSlice::from(&mut Box::leak(Box::new([0; 4096]))[..]);
        Still { world, queue, keeper, disk, memory }
    }

    /// Closes the disk and opens it again.
    fn reopened(self) -> Self {
        let Still { world, queue, keeper, disk, .. } = self;
        drop((queue, keeper));
        disk.close().expect("a clean close");
        Still::open(SimWorld::from_image(world.image(), 1, SimOptions::calm()))
    }

    /// Polls the queue and the housekeeper until nothing is left to do without time passing for timers. Exactly
    /// `requests` requests must complete, all with success.
    fn settle(&mut self, requests: usize) {
        let mut done: Vec<Completed> = Vec::new();
        loop {
            self.queue.poll(&mut done);
            self.queue.wait(Some(Duration::ZERO));
            self.keeper.poll();
            self.keeper.wait(Some(Duration::ZERO));
            if !self.world.step() && self.world.is_idle() {
                break;
            }
        }
        assert!(done.len() == requests && done.iter().all(|done| done.result.is_ok()), "{done:?}");
    }

    fn rest(&mut self, time: Duration) {
        self.settle(0);
        for _ in 0..time.as_secs() {
            self.world.pass(Duration::from_secs(1));
            self.settle(0);
        }
    }

    /// Runs one request.
    fn run(&mut self, request: Request) {
        let memory = [self.memory];
        let moves = matches!(request, Request::Read { .. } | Request::Write { .. });
        self.queue.submit(RequestId(0), request, if moves { &memory } else { &[] });
        self.settle(1);
    }

    /// Writes data to one cluster of each slice, so that no slice is a run.
    fn write_all(&mut self, round: u8) {
        for slice in 0..Self::SLICES {
            let offset = slice * Self::SLICE + 7 * Self::CLUSTER;
            self.memory.copy_from(&[slice as u8 + round; 4096]);
            self.run(Request::Write { offset, write_through: false });
        }
    }

    fn assert_slice(&mut self, slice: u64, round: u8) {
        for (cluster, byte) in [(7, slice as u8 + round), (8, 0)] {
            self.run(Request::Read { offset: slice * Self::SLICE + cluster * Self::CLUSTER });
            let mut found = [0; 4096];
            self.memory.copy_to(&mut found[..]);
            assert_eq!(found, [byte; 4096], "cluster {cluster} of slice {slice}");
        }
    }

    /// Slices of the map that have memory.
    fn resident(&self) -> usize {
        (self.disk.status().map_bytes - LEAF) / FRAME
    }
}

/// A disk that could not be closed is used on, with another housekeeper.
#[test]
fn the_next_housekeeper_of_a_disk_works_as_the_first() {
    let Still { world, queue, keeper, disk, memory } = Still::new();
    drop(keeper);
    let keeper = disk.keeper().expect("another housekeeper");
    let mut still = Still { world, queue, keeper, disk, memory };
    still.write_all(1);
    assert!(still.disk.status().dirty_bytes > 0);
    still.rest(Duration::from_secs(20));
    assert_eq!(still.disk.status().dirty_bytes, 0, "it flushes what has been dirty for long");
}

#[test]
fn a_disk_at_rest_gives_memory_of_the_map_back() {
    let mut still = Still::new();
    let all = Still::SLICES as usize;
    for round in 1..4 {
        still.write_all(round);
        still.rest(SWEEP);
        assert_eq!(still.resident(), all, "all were used a while ago");
        for slice in [0, 5, 6] {
            still.assert_slice(slice, round);
        }
        still.rest(SWEEP);
        assert_eq!(still.resident(), 3, "what was used lately stays");
        for slice in [5, 9] {
            still.assert_slice(slice, round);
        }
        still.rest(2 * SWEEP);
        still.rest(2 * SWEEP);
        assert_eq!(still.resident(), 1, "at least one stays");
        (0..Still::SLICES).for_each(|slice| still.assert_slice(slice, round));
        assert_eq!(still.resident(), all);
    }
}

/// The longest time that metadata may stay dirty without a flush from the guest.
const AGE: Duration = Duration::from_secs(5);

#[test]
fn dirty_tables_are_flushed_in_time() {
    let mut still = Still::new();
    for round in 0..3 {
        let write = |cluster: u64| Request::Write { offset: cluster * Still::CLUSTER, write_through: false };
        still.run(write(2 * round));
        assert!(still.disk.status().dirty_bytes > 0);
        still.rest(AGE - Duration::from_secs(2));
        assert!(still.disk.status().dirty_bytes > 0, "the guest may yet flush it");
        still.run(Request::Flush);
        assert_eq!(still.disk.status().dirty_bytes, 0);
        still.run(write(2 * round + 1));
        still.rest(AGE - Duration::from_secs(1));
        assert!(still.disk.status().dirty_bytes > 0, "its time is counted anew");
        still.rest(AGE + Duration::from_secs(1));
        assert_eq!(still.disk.status().dirty_bytes, 0, "nobody flushed for twice as long");
    }
}

#[test]
fn clusters_that_a_flush_unlinks_are_reclaimed_at_once() {
    let mut still = Still::new();
    let cluster = |number: u64| (number * Still::CLUSTER, Still::CLUSTER);
    for number in 0..8 {
        still.run(Request::Write { offset: cluster(number).0, write_through: false });
    }
    still.run(Request::Flush);
    let full = still.world.allocated();
    for (freed, number) in (1..).zip([5, 0, 7]) {
        let (offset, length) = cluster(number);
        still.run(Request::Discard { offset, length, write_through: false });
        assert_eq!(still.disk.status().quarantined_clusters, 1, "a crash may still bring it back");
        still.run(Request::Flush);
        assert_eq!(still.disk.status().quarantined_clusters, 0);
        assert_eq!(still.world.allocated(), full - freed * Still::CLUSTER);
        // Another flush without dirty metadata changes nothing.
        still.run(Request::Flush);
    }
}

/// The file ends with free clusters as long as it is in use. Otherwise nobody would search for the leaks of a crash.
#[test]
fn a_mark_that_failed_is_made_by_the_next_cut() {
    let mut still = Still::new();
    for cluster in 0..2 {
        still.run(Request::Write { offset: cluster * Still::CLUSTER, write_through: false });
    }
    let mut still = still.reopened();
    let length =
        |still: &Still| still.world.image().file(Path::new("top.qcow2")).expect("the image").length();
    let (closed, failed) = (length(&still), Fault::nth(0, Outcome::Fail(Errno::EFBIG)).of(Verb::SetLength));
    let failed = still.world.inject(failed);
    let discard = |offset| Request::Discard { offset, length: Still::CLUSTER, write_through: false };
    still.run(discard(0));
    still.run(Request::Flush);
    assert_eq!((still.world.hits(failed), length(&still)), (1, closed));
    still.run(discard(Still::CLUSTER));
    still.run(Request::Flush);
    assert!(length(&still) >= closed + (60 << 10), "{} bytes, {closed} when it was closed", length(&still));
}

/// The first flush of a session extends the file. Windows reserved meanwhile extend it, too. If the first extension is
/// late, it must not cut off the data written there.
#[test]
fn a_late_growth_of_the_file_cuts_nothing_off() {
    let mut still = Still::new();
    still.run(Request::Write { offset: 0, write_through: false });
    let mut still = still.reopened();
    still.run(Request::Discard { offset: 0, length: Still::CLUSTER, write_through: false });
    let late = Fault::nth(0, Outcome::Delay(Duration::from_millis(500))).of(Verb::SetLength);
    let late = still.world.inject(late);
    let (mut done, mut begun, mut ended) = (Vec::new(), 1, 0);
    still.queue.submit(RequestId(0), Request::Flush, &[]);
    still.memory.copy_from(&[9u8; 4096]);
    while ended < 65 {
        still.queue.poll(&mut done);
        still.keeper.poll();
        ended += done.len() as u64;
        assert!(done.drain(..).all(|done: Completed| done.result.is_ok()));
        // Two at a time, once the file is being extended.
        if still.world.hits(late) > 0 && begun < 65 && begun < ended + 3 {
            let write = Request::Write { offset: begun * Still::CLUSTER, write_through: false };
            still.queue.submit(RequestId(begun as u32), write, &[still.memory]);
            begun += 1;
        } else if !still.world.step() {
            still.world.pass(Duration::from_millis(1));
        }
    }
    still.settle(0);
    assert_eq!(still.world.hits(late), 1);
    for number in 1..=64 {
        still.memory.copy_from(&[0u8; 4096]);
        still.run(Request::Read { offset: number * Still::CLUSTER });
        let mut found = [0u8; 4096];
        still.memory.copy_to(&mut found[..]);
        assert!(found == [9; 4096], "cluster {number} was cut off");
    }
}
