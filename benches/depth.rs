//! The cost of an allocating write, and the longest wait for one, by the number of requests in flight.
//!
//! Eight threads, each with a queue, keep writes of 4 KiB to unallocated clusters in flight, on a real image in
//! `/dev/shm` (or in the directory named on the command line). `cargo bench --bench depth` prints a row for each depth
//! and round: microseconds per request, the mean and the longest wait, and their ratio.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use disk::{Disk, DiskOptions, DiskQueue, Request, RequestId};
use qcow2::{Geometry, NewImage, Version};
use storage::GuestSlice;
use storage::host::HostStorage;

/// Threads, each with a queue.
const QUEUES: u64 = 8;
/// Requests in flight on each queue.
const DEPTHS: [u32; 2] = [128, 1000];
/// Requests of a run: one for each cluster of the disk.
const REQUESTS: u64 = 64 << 10;
/// Runs of each depth, by turns.
const ROUNDS: u32 = 3;
/// Bytes of a cluster.
const CLUSTER: u64 = 64 << 10;
/// Bytes of a write.
const BLOCK: usize = 4096;
/// Consecutive requests are this many clusters apart. Odd, so each cluster is written once.
const STRIDE: u64 = 40_503;

fn main() {
    // Cargo passes `--bench`.
    let directory = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let directory = directory.unwrap_or_else(|| "/dev/shm".into());
    println!(
        "{:>14} {:>12} {:>12} {:>12} {:>6}",
        "in flight", "µs/request", "mean (ms)", "longest (ms)", "ratio"
    );
    for _ in 0..ROUNDS {
        for depth in DEPTHS {
            let run = run(Path::new(&directory), depth);
            let (each, mean, longest) =
                (run.each.as_secs_f64(), run.mean.as_secs_f64(), run.longest.as_secs_f64());
            println!(
                "{:>14} {:>12.1} {:>12.2} {:>12.2} {:>6.2}",
                format!("{QUEUES} x {depth}"),
                each * 1e6,
                mean * 1e3,
                longest * 1e3,
                longest / mean
            );
        }
    }
}

/// The figures of a run.
struct Run {
    /// The run's time divided by its requests.
    each: Duration,
    /// The mean wait of a request, from its submission to its completion.
    mean: Duration,
    longest: Duration,
}

fn run(directory: &Path, depth: u32) -> Run {
    let directory = tempfile::tempdir_in(directory).expect("a directory");
    let image = directory.path().join("image.qcow2");
    create(&image);
    let disk = Disk::open(HostStorage::new(), &image, &DiskOptions::default()).expect("a valid image");
    let next = AtomicU64::new(0);
    let began = Instant::now();
    let waits: Vec<Duration> = std::thread::scope(|scope| {
        let load = || Load::new(disk.queue(depth).expect("a queue"), depth).run(&next);
        let threads: Vec<_> = (0..QUEUES).map(|_| scope.spawn(load)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a load")).collect()
    });
    let each = began.elapsed() / REQUESTS as u32;
    disk.close().expect("a clean close");
    let mean = waits.iter().sum::<Duration>() / waits.len() as u32;
    Run { each, mean, longest: waits.into_iter().max().expect("there are some") }
}

fn create(image: &Path) {
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: CLUSTER.trailing_zeros(),
        refcount_order: 4,
        extended_l2: false,
        size: REQUESTS * CLUSTER,
    };
    let pieces = NewImage::new(geometry).layout().expect("a valid image");
    let bytes: Vec<u8> = pieces.into_iter().flat_map(|(_, bytes)| bytes).collect();
    std::fs::write(image, bytes).expect("the image");
}

/// The requests of one thread.
struct Load {
    queue: DiskQueue<HostStorage>,
    memory: [GuestSlice; 1],
    /// The start of each request in flight, and its number among this thread's requests.
    began: Vec<(Instant, u32)>,
    submitted: u32,
    in_flight: u32,
    waits: Vec<Duration>,
}

impl Load {
    fn new(queue: DiskQueue<HostStorage>, depth: u32) -> Self {
        let all = GuestSlice::from(Vec::leak(vec![7; 2 * BLOCK]));
        let start = all.ptr_guard().as_ptr().align_offset(BLOCK);
        let memory = [all.subslice(start, BLOCK).expect("within")];
        let began = vec![(Instant::now(), 0); depth as usize];
        Load { queue, memory, began, submitted: 0, in_flight: 0, waits: Vec::new() }
    }

    /// Keeps all slots in flight until no cluster is left. Returns the waits of the requests that began when all
    /// slots were taken.
    fn run(mut self, next: &AtomicU64) -> Vec<Duration> {
        let depth = self.began.len() as u32;
        (0..depth).for_each(|slot| self.submit(slot, next));
        let mut done = Vec::new();
        while self.in_flight > 0 {
            self.queue.turn(&mut done);
            if done.is_empty() {
                self.queue.wait(None);
            }
            for completed in done.drain(..) {
                completed.result.expect("a write");
                self.in_flight -= 1;
                let (began, number) = self.began[completed.id.0 as usize];
                if number >= depth {
                    self.waits.push(began.elapsed());
                }
                self.submit(completed.id.0, next);
            }
        }
        self.waits
    }

    fn submit(&mut self, slot: u32, next: &AtomicU64) {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= REQUESTS {
            return;
        }
        let offset = number * STRIDE % REQUESTS * CLUSTER;
        self.began[slot as usize] = (Instant::now(), self.submitted);
        self.submitted += 1;
        self.in_flight += 1;
        let request = Request::Write { offset, write_through: false };
        self.queue.submit(RequestId(slot), request, &self.memory);
    }
}
