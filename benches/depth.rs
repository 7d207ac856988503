//! The cost of an allocating write, and the longest wait for one, by the number of requests in flight.
//!
//! Threads with a queue each keep writes of 4 KiB to unallocated clusters in flight. The image is a real one in
//! `/dev/shm`, or in the directory named on the command line. `cargo bench --bench depth` prints a row for each
//! load and round. With `-- DIRECTORY 8x128` it runs that load alone.
//!
//! Where there are more threads than processors, the machine alone makes some requests wait long. So there are
//! loads with as many threads as processors, and loads without a disk. Those are the same threads, which spend as
//! much processor time on each request and answer in order. And waits are counted, too, in requests that completed
//! meanwhile.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use disk::{Completed, Disk, DiskOptions, DiskQueue, Request, RequestId};
use qcow2::{Geometry, NewImage, Version};
use storage::GuestSlice;
use storage::host::HostStorage;

/// Threads, each with a queue, where they are more than the processors.
const QUEUES: u64 = 8;
/// Requests in flight, of all queues.
const IN_FLIGHT: [u64; 2] = [1024, 8000];
/// Requests of a run: one for each cluster of the disk.
const REQUESTS: u64 = 64 << 10;
/// Runs of each load, by turns.
const ROUNDS: u32 = 3;
/// Bytes of a cluster.
const CLUSTER: u64 = 64 << 10;
/// Bytes of a write.
const BLOCK: usize = 4096;
/// Consecutive requests are this many clusters apart. Odd, so each cluster is written once.
const STRIDE: u64 = 40_503;

fn main() {
    // Cargo passes `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let directory = arguments.next().unwrap_or_else(|| "/dev/shm".into());
    let only = arguments.next().map(|load| {
        let (queues, depth) = load.split_once('x').expect("QUEUESxDEPTH");
        (queues.parse().expect("a number"), depth.parse().expect("a number"))
    });
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let loads = match only {
        Some(load) => vec![load],
        None => [QUEUES, cores]
            .into_iter()
            .flat_map(|queues| IN_FLIGHT.map(|in_flight| (queues, (in_flight / queues) as u32)))
            .collect(),
    };
    println!("{:>37} {:>21} {:>17}", "processor", "wait (ms)", "wait (requests)");
    println!(
        "{:>12} {:>8} {:>6} {:>8} {:>10} {:>10} {:>6} {:>8} {:>8} {:>9}",
        "in flight", "", "µs", "µs", "mean", "longest", "ratio", "of all", "own", "off (ms)"
    );
    for _ in 0..ROUNDS {
        for (queues, depth) in &loads {
            let run = on_disk(Path::new(&directory), *queues, *depth);
            run.print(*queues, *depth, "disk");
            without_disk(*queues, *depth, run.processor).print(*queues, *depth, "none");
        }
    }
}

/// The figures of a run.
struct Run {
    /// The run's time divided by its requests.
    each: Duration,
    /// The threads' processor time divided by the requests.
    processor: Duration,
    /// The mean wait of a request, from its submission to its completion.
    mean: Duration,
    longest: Duration,
    /// The most requests that completed while one waited, divided by the number in flight.
    of_all: f64,
    /// The same for the requests of the same queue.
    own: f64,
    /// The longest time that a thread was off the processor although it had work.
    off: Duration,
}

impl Run {
    fn of(began: Instant, depth: u32, threads: Vec<Waits>) -> Run {
        let each = began.elapsed() / REQUESTS as u32;
        let in_flight = threads.len() as f64 * f64::from(depth);
        let off = threads.iter().map(|waits| waits.off).max().expect("there are threads");
        let processor = threads.iter().map(|waits| waits.used).sum::<Duration>() / REQUESTS as u32;
        let waits: Vec<Wait> = threads.into_iter().flat_map(|waits| waits.waits).collect();
        let most = |count: fn(&Wait) -> u64| waits.iter().map(count).max().expect("there are some") as f64;
        Run {
            each,
            processor,
            mean: waits.iter().map(|wait| wait.time).sum::<Duration>() / waits.len() as u32,
            longest: waits.iter().map(|wait| wait.time).max().expect("there are some"),
            of_all: most(|wait| wait.of_all) / in_flight,
            own: most(|wait| wait.own) / f64::from(depth),
            off,
        }
    }

    fn print(&self, queues: u64, depth: u32, what: &str) {
        let [each, processor] = [self.each, self.processor].map(|time| time.as_secs_f64() * 1e6);
        let [mean, longest, off] = [self.mean, self.longest, self.off].map(|time| time.as_secs_f64() * 1e3);
        println!(
            "{:>12} {what:>8} {each:>6.1} {processor:>8.1} {mean:>10.2} {longest:>10.2} {:>6.2} {:>8.2} {:>8.2} {off:>9.2}",
            format!("{queues} x {depth}"),
            longest / mean,
            self.of_all,
            self.own,
        );
    }
}

/// The requests of all threads, by number.
#[derive(Default)]
struct Numbers {
    submitted: AtomicU64,
    completed: AtomicU64,
}

impl Numbers {
    /// The next request's number; `None` after the last.
    fn next(&self) -> Option<u64> {
        Some(self.submitted.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < REQUESTS)
    }
}

/// Runs a function in this many threads at once.
fn threads(queues: u64, work: impl Fn() -> Waits + Sync) -> Vec<Waits> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..queues).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a load")).collect()
    })
}

fn on_disk(directory: &Path, queues: u64, depth: u32) -> Run {
    let directory = tempfile::tempdir_in(directory).expect("a directory");
    let image = directory.path().join("image.qcow2");
    create(&image);
    let disk = Disk::open(HostStorage::new(), &image, &DiskOptions::default()).expect("a valid image");
    let numbers = Numbers::default();
    let began = Instant::now();
    let waits = threads(queues, || Load::new(disk.queue(depth).expect("a queue"), depth).run(&numbers));
    let run = Run::of(began, depth, waits);
    disk.close().expect("a clean close");
    run
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

/// Threads that answer their requests in order, each after `each` of processor time.
fn without_disk(queues: u64, depth: u32, each: Duration) -> Run {
    let numbers = Numbers::default();
    let began = Instant::now();
    let waits = threads(queues, || {
        let (mut waits, mut line) = (Waits::new(depth), VecDeque::new());
        let submit = |waits: &mut Waits, line: &mut VecDeque<u32>, slot| {
            if numbers.next().is_some() {
                waits.begin(slot, &numbers);
                line.push_back(slot);
            }
        };
        (0..depth).for_each(|slot| submit(&mut waits, &mut line, slot));
        while let Some(slot) = line.pop_front() {
            waits.work(|| {
                let began = processor_time();
                while processor_time() - began < each {
                    std::hint::spin_loop();
                }
            });
            waits.end(slot, &numbers);
            submit(&mut waits, &mut line, slot);
        }
        waits
    });
    Run::of(began, depth, waits)
}

/// The processor time of this thread.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The wait of a request: the time, and the requests that completed meanwhile, of all queues and of its own.
struct Wait {
    time: Duration,
    of_all: u64,
    own: u64,
}

/// A request in flight: when it began, and how many requests of all queues and of its own had completed by then.
#[derive(Clone, Copy)]
struct Began {
    at: Instant,
    of_all: u64,
    own: u64,
    /// Its number among this queue's requests.
    number: u64,
}

/// The waits of one queue's requests.
struct Waits {
    began: Vec<Began>,
    submitted: u64,
    completed: u64,
    /// Those of the requests that began when all slots were taken.
    waits: Vec<Wait>,
    off: Duration,
    /// Processor time of the thread's work.
    used: Duration,
}

impl Waits {
    fn new(depth: u32) -> Self {
        let began = Began { at: Instant::now(), of_all: 0, own: 0, number: 0 };
        Waits {
            began: vec![began; depth as usize],
            submitted: 0,
            completed: 0,
            waits: Vec::new(),
            off: Duration::ZERO,
            used: Duration::ZERO,
        }
    }

    fn begin(&mut self, slot: u32, numbers: &Numbers) {
        let of_all = numbers.completed.load(Ordering::Relaxed);
        let began = Began { at: Instant::now(), of_all, own: self.completed, number: self.submitted };
        self.began[slot as usize] = began;
        self.submitted += 1;
    }

    fn end(&mut self, slot: u32, numbers: &Numbers) {
        let Began { at, of_all, own, number } = self.began[slot as usize];
        let completed = numbers.completed.fetch_add(1, Ordering::Relaxed);
        if number >= self.began.len() as u64 {
            let wait = Wait { time: at.elapsed(), of_all: completed - of_all, own: self.completed - own };
            self.waits.push(wait);
        }
        self.completed += 1;
    }

    /// Does work that never sleeps: what it takes beyond its processor time, the thread was off the processor.
    fn work(&mut self, work: impl FnOnce()) {
        let (began, before) = (Instant::now(), processor_time());
        work();
        let used = processor_time() - before;
        self.off = self.off.max(began.elapsed().saturating_sub(used));
        self.used += used;
    }
}

/// The requests of one thread.
struct Load {
    queue: DiskQueue<HostStorage>,
    memory: [GuestSlice; 1],
    waits: Waits,
    in_flight: u32,
}

impl Load {
    fn new(queue: DiskQueue<HostStorage>, depth: u32) -> Self {
        let all = GuestSlice::from(Vec::leak(vec![7; 2 * BLOCK]));
        let start = all.ptr_guard().as_ptr().align_offset(BLOCK);
        let memory = [all.subslice(start, BLOCK).expect("within")];
        Load { queue, memory, waits: Waits::new(depth), in_flight: 0 }
    }

    /// Keeps all slots in flight until no cluster is left.
    fn run(mut self, numbers: &Numbers) -> Waits {
        let depth = self.waits.began.len() as u32;
        (0..depth).for_each(|slot| self.submit(slot, numbers));
        let mut done: Vec<Completed> = Vec::new();
        while self.in_flight > 0 {
            self.waits.work(|| self.queue.poll(&mut done));
            if done.is_empty() {
                self.queue.wait(None);
            }
            for completed in done.drain(..) {
                completed.result.expect("a write");
                self.in_flight -= 1;
                self.waits.end(completed.id.0, numbers);
                self.submit(completed.id.0, numbers);
            }
        }
        self.waits
    }

    fn submit(&mut self, slot: u32, numbers: &Numbers) {
        let Some(number) = numbers.next() else { return };
        let offset = number * STRIDE % REQUESTS * CLUSTER;
        self.waits.begin(slot, numbers);
        self.in_flight += 1;
        let request = Request::Write { offset, write_through: false };
        self.queue.submit(RequestId(slot), request, &self.memory);
    }
}
