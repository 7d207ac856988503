//! What an allocating write costs, and how long it waits, with thousands of requests in flight. Work is counted, not
//! timed: how often the tasks of the queues are polled, and how many requests complete while one waits.

use std::path::Path;

use disk::{Completed, Disk, DiskOptions, DiskQueue, Request, RequestId};
use qcow2::{Geometry, NewImage, Version};
use storage::GuestSlice;
use storage_sim::{SimOptions, SimStorage, SimWorld};

/// Queues of the disk.
const QUEUES: usize = 8;
/// Bytes of a cluster.
const CLUSTER: u64 = 64 << 10;
/// Each queue completes so many requests as it has in flight, times this.
const ROUNDS: u64 = 4;

/// The cost and the waits of a run.
#[derive(Debug)]
struct Figures {
    /// Polls of tasks for each request.
    polls: f64,
    /// The mean and the longest wait of the requests that began at full depth, in requests that completed meanwhile.
    mean: f64,
    longest: u64,
}

/// Where requests go, by number: an offset on the disk.
type Place = fn(number: u64, requests: u64) -> u64;

/// Each request has a cluster of its own, far from that of the request before.
fn scattered(number: u64, requests: u64) -> u64 {
    // Both are odd or coprime with any number of requests used here.
    number * 40_503 % requests * CLUSTER
}

/// Each cluster is allocated by one request and overwritten by seven that wait for it.
fn eight_on_each(number: u64, requests: u64) -> u64 {
    scattered(number / 8, requests) + number % 8 * 512
}

struct Load {
    world: SimWorld,
    queues: Vec<DiskQueue<SimStorage>>,
    _disk: Disk<SimStorage>,
    memory: [GuestSlice; 1],
    depth: u64,
    place: Place,
    requests: u64,
    submitted: u64,
    completed: u64,
    /// For each request in flight, by queue and slot: its number, and how many requests had completed before it began.
    began: Vec<Vec<(u64, u64)>>,
    waits: Vec<u64>,
}

impl Load {
    fn new(depth: u64, shuffle: bool, place: Place) -> Self {
        let requests = ROUNDS * depth * QUEUES as u64;
        let geometry = Geometry {
            version: Version::V3,
            cluster_bits: CLUSTER.trailing_zeros(),
            refcount_order: 4,
            extended_l2: false,
            size: requests * CLUSTER,
        };
        let pieces = NewImage::new(geometry).layout().expect("a sound image");
        let world = SimWorld::new(7, SimOptions { shuffle, record: false, ..SimOptions::default() });
        world.add_file("image", &pieces.into_iter().flat_map(|(_, bytes)| bytes).collect::<Vec<_>>());
        let options = DiskOptions { inflate_threads: 0, ..DiskOptions::default() };
        let disk = Disk::open_unkept(world.storage(), Path::new("image"), &options).expect("a sound image");
        let queues = (0..QUEUES).map(|_| disk.queue(depth as u32).expect("a queue")).collect();
        let bytes = Vec::leak(vec![7; 2 * 4096]);
        let skip = bytes.as_ptr().align_offset(4096);
        let memory = [GuestSlice::from(&mut bytes[skip..skip + 512])];
        let began = vec![vec![(0, 0); depth as usize]; QUEUES];
        let waits = Vec::new();
        Load {
            world,
            queues,
            _disk: disk,
            memory,
            depth,
            place,
            requests,
            submitted: 0,
            completed: 0,
            began,
            waits,
        }
    }

    /// Submits the next request, if one is left.
    fn submit(&mut self, queue: usize, slot: u32) {
        if self.submitted == self.requests {
            return;
        }
        let offset = (self.place)(self.submitted, self.requests);
        self.began[queue][slot as usize] = (self.submitted, self.completed);
        self.submitted += 1;
        let request = Request::Write { offset, write_through: false };
        self.queues[queue].submit(RequestId(slot), request, &self.memory);
    }

    fn end(&mut self, queue: usize, completed: Completed) {
        completed.result.expect("a write");
        let (number, before) = self.began[queue][completed.id.0 as usize];
        if number >= self.depth * QUEUES as u64 {
            self.waits.push(self.completed - before);
        }
        self.completed += 1;
        self.submit(queue, completed.id.0);
    }

    fn run(mut self) -> Figures {
        for slot in 0..self.depth as u32 {
            (0..QUEUES).for_each(|queue| self.submit(queue, slot));
        }
        let mut done = Vec::new();
        while self.completed < self.requests {
            let before = self.completed;
            for queue in 0..QUEUES {
                self.queues[queue].poll(&mut done);
                done.drain(..).for_each(|completed| self.end(queue, completed));
            }
            let hangs = self.completed == before && self.world.is_idle();
            assert!(!hangs, "{} of {} requests completed, and nothing happens", before, self.requests);
            self.world.step();
        }
        let polls: u64 = self.queues.iter().map(DiskQueue::polls).sum();
        Figures {
            polls: polls as f64 / self.requests as f64,
            mean: self.waits.iter().sum::<u64>() as f64 / self.waits.len() as f64,
            longest: self.waits.iter().copied().max().expect("more requests than slots"),
        }
    }
}

/// Compares few with many requests in flight.
fn check(shuffle: bool, place: Place) -> [Figures; 2] {
    let run = |depth| Load::new(depth, shuffle, place).run();
    let (few, many) = (run(128), run(1000));
    println!("{few:.1?}, {many:.1?}");
    assert!(many.polls <= 1.2 * few.polls, "the cost grows with the number in flight: {few:?}, {many:?}");
    [few, many]
}

#[test]
fn an_allocating_write_costs_and_waits_the_same_at_any_depth() {
    for figures in check(false, scattered) {
        assert!(figures.longest as f64 <= 2.0 * figures.mean, "a request waits too long: {figures:?}");
    }
}

/// The host's own latencies differ by far more than a factor of two here, so only the cost is compared.
#[test]
fn the_cost_does_not_depend_on_what_completes_first() {
    check(true, scattered);
}

#[test]
fn writes_that_wait_for_each_other_cost_the_same_at_any_depth() {
    check(false, eight_on_each);
    check(true, eight_on_each);
}
