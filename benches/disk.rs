//! The cost of a disk's fast path, from a request to its operations and from their completions to the completed
//! request. Run by `cargo bench-paths` (docs/performance.md, "What an operation costs").
//!
//! The images are on a simulated host. Operations on guest memory complete at once and move no data, so the host adds
//! nothing to the counts.

mod harness;

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use disk::{Completed, Disk, DiskOptions, DiskQueue, JournalMemory, Request, RequestId};
use qcow2::{Geometry, NewImage, Version};
use storage::{
    Completion, FileId, FileInfo, GuestSlice, IoQueue, Notifier, OpenOptions, Operation, Part, Storage,
    StorageError, Token,
};
use storage_sim::{SimOptions, SimQueue, SimStorage, SimWorld};
use vmm_sys_util::eventfd::EventFd;

use harness::{Case, Named};

/// Requests in a run.
const REQUESTS: u32 = 64;
/// Bytes of a cluster, and of the disk.
const CLUSTER: u64 = 65536;
const SIZE: u64 = 64 << 20;
/// Bytes of a block.
const BLOCK: usize = 4096;
/// Layers of the deep chain.
const DEPTH: usize = 64;

const CASES: &[Named] = &[
    ("submit: read 4 KiB", || submits(single(), Job::read(BLOCK))),
    ("submit: overwrite 4 KiB", || submits(single(), Job::write(BLOCK))),
    ("submit: read 4 KiB, extended L2", || submits(parted(), Job::read(BLOCK))),
    ("submit: read 4 KiB, chain of 64", || submits(chain(), Job::read(BLOCK))),
    ("submit: read 64 KiB, 2 adjacent clusters", || submits(single(), Job::read(1 << 16).across())),
    ("submit: read 64 KiB, 2 clusters far apart", || submits(scattered(), Job::read(1 << 16).across())),
    ("submit: read 64 KiB in 16 pieces of memory", || submits(single(), Job::read(1 << 16).in_pages())),
    ("submit: write zeroes of a cluster", || zeroes(single())),
    ("submit and poll: allocating write of a cluster", || allocates(None)),
    ("submit and poll: the same, with a journal", || allocates(Some(journal()))),
    ("poll: 4 KiB read", || polls(single(), Job::read(BLOCK))),
    ("poll: 64 KiB read in 16 pieces of memory", || polls(single(), Job::read(1 << 16).in_pages())),
];

fn main() {
    harness::main("disk", CASES);
}

/// The request that a case repeats.
#[derive(Clone, Copy)]
struct Job {
    writes: bool,
    bytes: usize,
    /// Its offset in its cluster.
    within: u64,
    /// Bytes of each piece of guest memory.
    piece: usize,
}

impl Job {
    fn read(bytes: usize) -> Self {
        Job { writes: false, bytes, within: 0, piece: bytes }
    }

    fn write(bytes: usize) -> Self {
        Job { writes: true, ..Self::read(bytes) }
    }

    /// Moves half of the request to the next cluster.
    fn across(self) -> Self {
        Job { within: CLUSTER - self.bytes as u64 / 2, ..self }
    }

    /// Splits the memory into separate pages, as in a guest's page cache.
    fn in_pages(self) -> Self {
        Job { piece: BLOCK, ..self }
    }

    fn request(self, number: u32) -> Request {
        let offset = u64::from(number) * CLUSTER + self.within;
        if self.writes { Request::Write { offset, write_through: false } } else { Request::Read { offset } }
    }

    /// Memory for the request; leaked, so that it is 'static.
    fn memory(self) -> Vec<GuestSlice> {
        let pieces = self.bytes / self.piece;
        let all = guest_memory(2 * self.bytes);
        let piece = |n| all.subslice(2 * n * self.piece, self.piece).expect("within");
        (0..pieces).map(piece).collect()
    }
}

fn guest_memory(bytes: usize) -> GuestSlice {
    let all = GuestSlice::from(Vec::leak(vec![0; bytes + BLOCK]));
    let start = all.ptr_guard().as_ptr().align_offset(BLOCK);
    all.subslice(start, bytes).expect("within")
}

/// An open disk and its queue.
struct Bench {
    queue: DiskQueue<Host>,
    disk: Disk<Host>,
    done: Vec<Completed>,
}

impl Bench {
    /// Opens an image of a world and writes these clusters, which are then in the file in this order.
    fn open(world: &SimWorld, image: &str, clusters: impl Iterator<Item = u64>) -> Self {
        Self::open_with(world, image, clusters, None)
    }

    /// The same with a journal in some memory.
    fn open_with(
        world: &SimWorld,
        image: &str,
        clusters: impl Iterator<Item = u64>,
        journal: Option<JournalMemory>,
    ) -> Self {
        let options = DiskOptions { inflate_threads: 0, ..DiskOptions::default() };
        let disk =
            Disk::open_unkept(Host(world.storage()), Path::new(image), &options).expect("a valid chain");
        disk.keep_journal(journal).expect("a journal");
        let queue = disk.queue(2 * REQUESTS).expect("a queue");
        let mut bench = Bench { queue, disk, done: Vec::new() };
        let memory = [guest_memory(CLUSTER as usize)];
        for cluster in clusters {
            bench.finish(Request::Write { offset: cluster * CLUSTER, write_through: false }, &memory);
        }
        bench
    }

    /// Carries out one request.
    fn finish(&mut self, request: Request, memory: &[GuestSlice]) {
        self.queue.submit(RequestId(0), request, memory);
        self.queue.poll(&mut self.done);
        while self.done.is_empty() {
            self.queue.wait(None);
            self.queue.poll(&mut self.done);
        }
        self.clear(1);
    }

    /// Checks that `count` requests have completed, and removes them from `done`.
    fn clear(&mut self, count: u32) {
        assert_eq!(self.done.len(), count as usize, "a request did not complete at once");
        assert!(self.done.drain(..).all(|completed| completed.result.is_ok()));
    }

    fn submit_all(&mut self, job: Job, memory: &[GuestSlice]) {
        for number in 0..REQUESTS {
            self.queue.submit(RequestId(number), black_box(job.request(number)), memory);
        }
    }
}

fn submits(mut bench: Bench, job: Job) -> Case {
    let memory = job.memory();
    // These requests bring their clusters into the map.
    (0..REQUESTS).for_each(|number| bench.finish(job.request(number), &memory));
    let prepare = |(bench, _): &mut (Bench, Vec<_>)| {
        bench.queue.poll(&mut bench.done);
        bench.done.clear();
    };
    Case::new(REQUESTS.into(), (bench, memory), prepare, move |(bench, memory)| bench.submit_all(job, memory))
}

/// Zeroes clusters that hold data.
fn zeroes(bench: Bench) -> Case {
    let memory = [guest_memory(CLUSTER as usize)];
    let prepare = move |bench: &mut Bench| {
        bench.queue.poll(&mut bench.done);
        bench.done.clear();
        for number in 0..REQUESTS {
            let offset = u64::from(number) * CLUSTER;
            bench.finish(Request::Write { offset, write_through: false }, &memory);
        }
    };
    Case::new(REQUESTS.into(), bench, prepare, |bench| {
        for number in 0..REQUESTS {
            let offset = black_box(u64::from(number) * CLUSTER);
            let request =
                Request::WriteZeroes { offset, length: CLUSTER, unmap: false, write_through: false };
            bench.queue.submit(RequestId(number), request, &[]);
        }
    })
}

/// Memory of a journal.
fn journal() -> JournalMemory {
    struct Words(Vec<AtomicU64>);
    impl AsRef<[AtomicU64]> for Words {
        fn as_ref(&self) -> &[AtomicU64] {
            &self.0
        }
    }
    Arc::new(Words((0..1 << 17).map(|_| AtomicU64::new(0)).collect()))
}

/// Writes clusters that were discarded, and given back, before.
fn allocates(journal: Option<JournalMemory>) -> Case {
    let memory = [guest_memory(CLUSTER as usize)];
    let world = world();
    add_image(&world, "image", false, None);
    let bench = Bench::open_with(&world, "image", clusters(), journal);
    let mut keeper = bench.disk.keeper().expect("a housekeeper");
    let prepare = move |(bench, _): &mut (Bench, _)| {
        let length = u64::from(REQUESTS) * CLUSTER;
        bench.finish(Request::Discard { offset: 0, length, write_through: false }, &[]);
        bench.finish(Request::Flush, &[]);
        while bench.disk.status().quarantined_clusters > 0 {
            keeper.poll();
            keeper.wait(None);
        }
    };
    Case::new(REQUESTS.into(), (bench, memory), prepare, |(bench, memory)| {
        for number in 0..REQUESTS {
            let offset = black_box(u64::from(number) * CLUSTER);
            bench.finish(Request::Write { offset, write_through: false }, memory);
        }
    })
}

fn polls(mut bench: Bench, job: Job) -> Case {
    let memory = job.memory();
    (0..REQUESTS).for_each(|number| bench.finish(job.request(number), &memory));
    let prepare = move |(bench, memory): &mut (Bench, Vec<_>)| {
        bench.done.clear();
        bench.submit_all(job, memory);
    };
    Case::new(REQUESTS.into(), (bench, memory), prepare, |(bench, _)| {
        bench.queue.poll(&mut bench.done);
        assert_eq!(bench.done.len(), REQUESTS as usize, "a request did not complete at once");
    })
}

fn world() -> SimWorld {
    SimWorld::new(1, SimOptions::calm())
}

fn add_image(world: &SimWorld, name: &str, extended_l2: bool, backing: Option<&str>) {
    let geometry =
        Geometry { version: Version::V3, cluster_bits: 16, refcount_order: 4, extended_l2, size: SIZE };
    let mut image = NewImage::new(geometry);
    image.backing_file = backing.map(|name| name.as_bytes().to_vec());
    image.backing_format = backing.map(|_| "qcow2".to_owned());
    let pieces = image.layout().expect("a valid image");
    world.add_file(name, &pieces.into_iter().flat_map(|(_, bytes)| bytes).collect::<Vec<_>>());
}

/// One cluster per request, and one more.
fn clusters() -> std::ops::Range<u64> {
    0..u64::from(REQUESTS) + 1
}

/// One image, its clusters in order.
fn single() -> Bench {
    let world = world();
    add_image(&world, "image", false, None);
    Bench::open(&world, "image", clusters())
}

/// One image, no two consecutive clusters adjacent in order.
fn scattered() -> Bench {
    let world = world();
    add_image(&world, "image", false, None);
    Bench::open(&world, "image", clusters().rev())
}

/// One image; in each cluster half of the subclusters are data.
fn parted() -> Bench {
    let world = world();
    add_image(&world, "image", true, None);
    let mut bench = Bench::open(&world, "image", std::iter::empty());
    let memory = [guest_memory(CLUSTER as usize / 2)];
    for cluster in clusters() {
        bench.finish(Request::Write { offset: cluster * CLUSTER, write_through: false }, &memory);
    }
    bench
}

/// Empty layers over a layer with the data.
fn chain() -> Bench {
    let world = world();
    let name = |layer| format!("layer-{layer}");
    add_image(&world, &name(0), false, None);
    let mut base = Bench::open(&world, &name(0), clusters());
    base.finish(Request::Flush, &[]);
    drop(base);
    for layer in 1..DEPTH {
        add_image(&world, &name(layer), false, Some(&name(layer - 1)));
    }
    Bench::open(&world, &name(DEPTH - 1), std::iter::empty())
}

/// A simulated host, whose queue completes operations on guest memory by itself.
struct Host(SimStorage);

impl Storage for Host {
    type Queue = HostQueue;

    fn open(&self, path: &Path, options: &OpenOptions) -> Result<(FileId, FileInfo), StorageError> {
        self.0.open(path, options)
    }

    fn open_shared(&self, path: &Path, direct: bool) -> Result<(FileId, FileInfo), StorageError> {
        self.0.open_shared(path, direct)
    }

    fn create(
        &self,
        path: &Path,
        like: FileId,
        options: &OpenOptions,
    ) -> Result<(FileId, FileInfo), StorageError> {
        self.0.create(path, like, options)
    }

    fn sync_name(&self, path: &Path) -> Result<(), StorageError> {
        self.0.sync_name(path)
    }

    fn remove(&self, path: &Path) -> Result<(), StorageError> {
        self.0.remove(path)
    }

    fn share(&self, file: FileId) -> Result<(), StorageError> {
        self.0.share(file)
    }

    fn queue(&self, depth: u32) -> Result<HostQueue, StorageError> {
        Ok(HostQueue { metadata: self.0.queue(depth)?, answered: Vec::new() })
    }

    fn length(&self, file: FileId) -> Result<u64, StorageError> {
        self.0.length(file)
    }

    fn allocated(&self, file: FileId) -> Result<u64, StorageError> {
        self.0.allocated(file)
    }
}

struct HostQueue {
    metadata: SimQueue,
    answered: Vec<Completion>,
}

impl IoQueue for HostQueue {
    fn push(&mut self, token: Token, operation: Operation) {
        if let Some(Part::Guest(_)) = operation.parts.first() {
            self.answered.push(Completion { token, result: Ok(()), parts: operation.parts });
        } else {
            self.metadata.push(token, operation);
        }
    }

    fn submit(&mut self) {
        if self.metadata.in_flight() > 0 {
            self.metadata.submit();
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.metadata.reap(done);
        done.append(&mut self.answered);
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        if self.answered.is_empty() {
            self.metadata.wait(timeout);
        }
    }

    fn watch(&mut self, event: EventFd) {
        self.metadata.watch(event);
    }

    fn notifier(&self) -> Arc<dyn Notifier> {
        self.metadata.notifier()
    }

    fn in_flight(&self) -> usize {
        self.metadata.in_flight() + self.answered.len()
    }

    fn now(&self) -> Instant {
        self.metadata.now()
    }
}
