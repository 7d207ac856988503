//! No allocation per request: counts the allocations of a queue's thread after a warm-up.
//!
//! Runs the daemon's components from the ring to the file (session, glue, disk, host storage) in this process. The test
//! is alone in its program, because it has its own allocator. Only the queue's thread is counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use disk::{Disk, DiskOptions};
use qcow2::{Geometry, NewImage, Version};
use storage::host::HostStorage;
use strata::device::{BlockSizes, DeviceQueue, DiskDevice};
use strata_kit::client::{Command, Queue, Slot};
use strata_kit::{Client, Options};
use vhost_blk::{BlockDevice, DeviceProfile, ServeOptions, Server, StopHandle};

/// The system's allocator, which counts the allocations of the queue's thread.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The allocations so far.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// True on the queue's thread.
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

fn note() {
    if COUNTED.try_with(Cell::get).unwrap_or(false) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is the same.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// A disk whose queue's thread is counted.
struct Watched(DiskDevice<HostStorage>);

impl BlockDevice for Watched {
    type Queue = DeviceQueue<HostStorage>;

    fn profile(&self) -> DeviceProfile {
        self.0.profile()
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn queue(&self, depth: u32) -> io::Result<Self::Queue> {
        COUNTED.set(true);
        self.0.queue(depth)
    }
}

const CLUSTER: u64 = 65536;
const CLUSTERS: u64 = 32;
/// Requests in flight at a time.
const BATCH: usize = 16;
/// The most turns, of twenty batches each, until a kind of request must allocate nothing.
const TURNS: usize = 10;

#[test]
fn warm_requests_allocate_nothing() {
    // A file system in memory takes another path than the others.
    for folder in [std::env::temp_dir(), "/dev/shm".into()] {
        for indirect in [false, true] {
            check(&folder, indirect);
        }
    }
}

fn check(folder: &Path, indirect: bool) {
    let folder = tempfile::tempdir_in(folder).expect("a folder");
    let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
    make_image(&image);
    let disk = Disk::open(HostStorage::new(), &image, &DiskOptions::default()).expect("a sound image");
    let device = Arc::new(Watched(DiskDevice::new(disk, [0; 20], BlockSizes::default())));
    let server = Server::bind(&socket).expect("a socket");
    let stop = StopHandle::new().expect("a stop handle");
    std::thread::scope(|scope| {
        // Also stops on a panic: the scope waits for its thread.
        let _stop = StopAtLast(&stop);
        let serving = scope.spawn(|| server.serve(&device, &ServeOptions::new(1, 512), &stop));
        let options = Options {
            data_capacity: CLUSTER as usize,
            segments: 16,
            slots_max: BATCH as u16,
            indirect,
            queue_size: 512,
            ..Options::with_queues(1)
        };
        let mut client = Client::connect(&socket, &options).expect("a session");
        exercise(client.queue(0));
        client.close().expect("a good end");
        stop.stop();
        serving.join().expect("no panic").expect("a good end");
    });
}

struct StopAtLast<'a>(&'a StopHandle);

impl Drop for StopAtLast<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn exercise(queue: &mut Queue) {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    // From the last to the first, so that no two clusters are contiguous in order.
    for cluster in (0..CLUSTERS).rev() {
        run(queue, &[Act { make: write, offset: cluster * CLUSTER, length: CLUSTER as u32 }]);
    }
    let cold = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert!(cold >= CLUSTERS, "first writes allocate: if none is seen, none is counted");
    // The last two before zeroing span two clusters.
    let kinds = [
        Kind { name: "read", make: read, length: 4096, within: 0 },
        Kind { name: "write", make: write, length: 4096, within: 8192 },
        Kind { name: "read", make: read, length: 65536, within: 0 },
        Kind { name: "write", make: write, length: 65536, within: 0 },
        Kind { name: "read", make: read, length: 65536, within: 32768 },
        Kind { name: "write", make: write, length: 65536, within: 32768 },
        Kind { name: "write zeroes", make: write_zeroes, length: 65536, within: 0 },
    ];
    // Retained buffers grow with the peak use so far, which partly depends on chance. So each kind gets several turns
    // to reach its peak. An allocation per request would show in every turn.
    for kind in &kinds {
        let turn = |queue: &mut Queue| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            (0..20).for_each(|_| run(queue, &kind.batch()));
            ALLOCATIONS.load(Ordering::Relaxed) - before
        };
        let made: Vec<u64> = (0..TURNS).map(|_| turn(queue)).take_while(|made| *made > 0).collect();
        let Kind { name, length, within, .. } = kind;
        assert!(made.len() < TURNS, "{name} of {length} bytes at {within} allocates: {made:?}");
    }
}

/// Makes a command in a slot, from an offset and a length in bytes.
type Make = fn(&Queue, Slot, u64, u32) -> Command;

fn read(_: &Queue, _: Slot, offset: u64, length: u32) -> Command {
    Command::read(offset / 512, length)
}

fn write(_: &Queue, _: Slot, offset: u64, length: u32) -> Command {
    Command::write(offset / 512, length)
}

fn write_zeroes(queue: &Queue, slot: Slot, offset: u64, length: u32) -> Command {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&(offset / 512).to_le_bytes());
    segment[8..12].copy_from_slice(&(length / 512).to_le_bytes());
    queue.write_data(slot, &segment);
    Command::write_zeroes(segment.len() as u32)
}

/// One request.
struct Act {
    make: Make,
    offset: u64,
    length: u32,
}

/// A kind of request that is repeated.
struct Kind {
    name: &'static str,
    make: Make,
    length: u32,
    /// The offset of each request in its cluster.
    within: u64,
}

impl Kind {
    fn batch(&self) -> Vec<Act> {
        let act = |number: u64| Act {
            make: self.make,
            offset: number * CLUSTER + self.within,
            length: self.length,
        };
        (0..BATCH as u64).map(act).collect()
    }
}

/// Runs requests, all in flight together.
fn run(queue: &mut Queue, acts: &[Act]) {
    for act in acts {
        let slot = queue.acquire().expect("a free slot");
        let command = (act.make)(queue, slot, act.offset, act.length);
        queue.start(slot, command);
    }
    queue.notify().expect("a kick");
    let mut done = Vec::new();
    while done.len() < acts.len() {
        queue.wait_used(Instant::now() + Duration::from_secs(30)).expect("answers");
        queue.reap(&mut done).expect("sound answers");
    }
    for completion in done {
        assert!(completion.status.is_ok());
        queue.release(completion.slot);
    }
}

fn make_image(path: &Path) {
    let size = 2 * CLUSTERS * CLUSTER;
    let geometry =
        Geometry { version: Version::V3, cluster_bits: 16, refcount_order: 4, extended_l2: false, size };
    let pieces = NewImage::new(geometry).layout().expect("a sound image");
    let bytes: Vec<u8> = pieces.into_iter().flat_map(|(_, bytes)| bytes).collect();
    std::fs::write(path, bytes).expect("room for an image");
}
