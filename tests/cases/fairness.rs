//! A queue that is full of discards or of reads of compressed clusters does not starve another one, and takes no more than
//! a bounded amount of memory. Nothing is timed: the simulated host has a clock of its own, and the other queue's waits are
//! also counted in requests of the full queue.

use std::path::Path;
use std::time::Duration;

use disk::{Completed, Disk, DiskOptions, DiskQueue, Request, RequestId};
use storage::GuestSlice;
use storage_sim::{SimOptions, SimStorage, SimWorld};
use strata_fuzz_targets::meter::measure;
use strata_kit::Qemu;
use strata_kit::images::{Content, ImageSpec};

/// Bytes of a cluster.
const CLUSTER: u64 = 4096;
/// Bytes of the disk: the full queue uses the first half.
const SIZE: u64 = 32 << 20;
/// Requests that the guest of the full queue would have in flight.
const DEPTH: usize = 256;
/// Requests of the other queue, one after another.
const VISITS: usize = 150;
/// The most heap that any number of requests may take, in bytes: the work of a disk (32 MiB), and for each of the two queues
/// its buffers and what it inflates at a time (16 MiB each), half of them in use here. docs/concurrency.md, "Buffers".
const HEAP_MAX: usize = (32 + 16 + 16) << 20;

/// The waits of the other queue's requests.
#[derive(Debug, Default)]
struct Waits {
    /// By the host's clock.
    times: Vec<Duration>,
    /// Requests of the full queue that completed meanwhile.
    overtaken: Vec<u64>,
}

impl Waits {
    fn mean(&self) -> Duration {
        self.times.iter().sum::<Duration>() / self.times.len() as u32
    }

    fn longest(&self) -> Duration {
        self.times.iter().copied().max().expect("some were made")
    }
}

/// What the two queues do, by the number of the request.
#[derive(Clone, Copy)]
struct Load {
    full: fn(u64) -> Request,
    other: fn(u64) -> Request,
}

/// The image's bytes, and whether its data is compressed.
fn image(qemu: &Qemu, compressed: bool) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder");
    let [plain, packed] = ["plain", "packed"].map(|name| folder.path().join(name));
    let spec = ImageSpec { cluster_size: CLUSTER, ..ImageSpec::qcow2(SIZE) };
    // The last quarter stays without data.
    let content = Content::Pattern { offset: 0, length: SIZE / 4 * 3, byte: 5 };
    qemu.create(&plain, &spec.with(content)).expect("an image");
    let [from, to] = [&plain, &packed].map(|path| path.display().to_string());
    let cluster = format!("cluster_size={CLUSTER}");
    let mut convert = vec!["convert", "-f", "qcow2", "-O", "qcow2", "-o", &cluster];
    convert.extend(compressed.then_some("-c"));
    convert.extend([from.as_str(), to.as_str()]);
    qemu.img(convert).expect("converted");
    std::fs::read(packed).expect("the image")
}

fn memory(bytes: usize) -> [GuestSlice; 1] {
    let memory = Vec::leak(vec![7; bytes + 4096]);
    let skip = memory.as_ptr().align_offset(4096);
    [GuestSlice::from(&mut memory[skip..skip + bytes])]
}

struct Scene {
    world: SimWorld,
    _disk: Disk<SimStorage>,
    queues: [DiskQueue<SimStorage>; 2],
    memory: [GuestSlice; 1],
    load: Load,
    /// Requests of the full queue: those that were begun, those that have ended, and its free slots.
    begun: u64,
    ended: u64,
    free: Vec<u32>,
}

impl Scene {
    fn new(bytes: &[u8], load: Load) -> Self {
        let world = SimWorld::new(3, SimOptions { record: false, ..SimOptions::default() });
        world.add_file("image", bytes);
        let options = DiskOptions { inflate_threads: 0, ..DiskOptions::default() };
        let disk = Disk::open_unkept(world.storage(), Path::new("image"), &options).expect("a sound image");
        let queues = [DEPTH as u32, 1].map(|depth| disk.queue(depth).expect("a queue"));
        let (memory, free) = (memory(CLUSTER as usize), (0..DEPTH as u32).collect());
        Scene { world, _disk: disk, queues, memory, load, begun: 0, ended: 0, free }
    }

    fn submit(&mut self, queue: usize, slot: u32, request: Request) {
        let slices = match request {
            Request::Read { .. } | Request::Write { .. } => &self.memory[..],
            _ => &[],
        };
        self.queues[queue].submit(RequestId(slot), request, slices);
    }

    /// Gives the full queue as much as a guest with that many requests would.
    fn fill(&mut self) {
        while self.queues[0].has_room()
            && let Some(slot) = self.free.pop()
        {
            self.submit(0, slot, (self.load.full)(self.begun));
            self.begun += 1;
        }
    }

    /// Lets both queues and the host do a step. True if the other queue's request has ended.
    fn step(&mut self, done: &mut Vec<Completed>) -> bool {
        self.queues[0].poll(done);
        for completed in done.drain(..) {
            completed.result.expect("it succeeds");
            self.free.push(completed.id.0);
            self.ended += 1;
        }
        self.queues[1].poll(done);
        let has_ended = !done.is_empty();
        done.drain(..).for_each(|completed| completed.result.expect("it succeeds"));
        if !has_ended && !self.world.step() && self.world.is_idle() {
            self.world.pass(Duration::from_millis(1));
        }
        has_ended
    }

    fn run(mut self, beside: bool) -> Waits {
        let (mut waits, mut done) = (Waits::default(), Vec::new());
        for visit in 0..VISITS {
            if beside {
                self.fill();
            }
            assert!(self.queues[1].has_room(), "the full queue has taken all the room");
            let (began, before) = (self.world.now(), self.ended);
            self.submit(1, 0, (self.load.other)(visit as u64));
            while !self.step(&mut done) {
                if beside {
                    self.fill();
                }
                let waited = self.world.now() - began;
                assert!(waited < Duration::from_secs(60), "visit {visit} never ends");
            }
            waits.times.push(self.world.now() - began);
            waits.overtaken.push(self.ended - before);
        }
        if beside {
            assert!(self.ended > VISITS as u64, "the full queue did {} requests", self.ended);
        }
        waits
    }
}

/// The waits alone, and beside the full queue; there, the heap is bounded, too.
fn compare(name: &str, bytes: &[u8], load: Load) -> [Waits; 2] {
    let alone = Scene::new(bytes, load).run(false);
    let scene = Scene::new(bytes, load);
    let (beside, cost) = measure(|| scene.run(true));
    println!(
        "{name}: alone {:?}, at most {:?}; beside {:?}, at most {:?}, {} requests meanwhile; {} KiB of heap",
        alone.mean(),
        alone.longest(),
        beside.mean(),
        beside.longest(),
        beside.overtaken.iter().max().expect("some"),
        cost.bytes >> 10
    );
    assert!(cost.bytes < HEAP_MAX, "{} bytes of heap", cost.bytes);
    [alone, beside]
}

/// Reads of data that is not compressed, in the part that the full queue leaves alone.
fn read(number: u64) -> Request {
    Request::Read { offset: SIZE / 2 + number * 7 % 64 * CLUSTER }
}

/// Writes to new clusters.
fn write(number: u64) -> Request {
    Request::Write { offset: SIZE / 4 * 3 + number * CLUSTER, write_through: false }
}

/// Half of the disk, eight clusters at a time, and the same again.
fn discard(number: u64) -> Request {
    let length = 8 * CLUSTER;
    Request::Discard { offset: number * length % (SIZE / 2), length, write_through: false }
}

/// Clusters of the first half of the disk, none of them twice in a row.
fn read_scattered(number: u64) -> Request {
    Request::Read { offset: number * 1237 % (SIZE / 2 / CLUSTER) * CLUSTER }
}

#[test]
fn a_queue_full_of_discards_starves_no_other() {
    let Some(qemu) = Qemu::find() else { return };
    let bytes = image(&qemu, false);
    let [alone, beside] = compare("reads beside discards", &bytes, Load { full: discard, other: read });
    assert!(beside.longest() <= 2 * alone.longest(), "{beside:?}");
}

#[test]
fn a_queue_full_of_compressed_reads_starves_no_other() {
    let Some(qemu) = Qemu::find() else { return };
    let bytes = image(&qemu, true);
    let load = Load { full: read_scattered, other: write };
    let [alone, beside] = compare("writes beside compressed reads", &bytes, load);
    assert!(beside.longest() <= 2 * alone.longest(), "{beside:?}");
}
