//! A disk driven in-process, without a socket: two queues of one [`Disk`] on the test's own thread.
//!
//! Requests that do not overlap are put in flight together, on both queues by turns, from guest memory at aligned and
//! at odd addresses. The contents of the disk are compared with a [`ByteModel`].

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use disk::{
    Completed, Disk, DiskOptions, DiskQueue, NewOverlay, OpenError, ParkedQueue, Request, RequestError,
    RequestId,
};
use storage::GuestSlice;
use storage::host::HostStorage;
use strata_kit::ByteModel;
use strata_kit::images::Content;
use strata_kit::model::{Operation, contents};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// 1 KiB.
pub const K: u64 = 1024;
/// 1 MiB.
pub const M: u64 = 1024 * K;

/// The options of tests: a short wait for locks, and the defaults otherwise.
pub fn options() -> DiskOptions {
    DiskOptions { lock_timeout: Duration::from_secs(2), ..DiskOptions::default() }
}

/// A write.
pub fn write(offset: u64, length: u64, seed: u32) -> Operation {
    Operation::Write { offset, length, seed }
}

/// Content of a new image.
pub fn pattern(offset: u64, length: u64, byte: u8) -> Content {
    Content::Pattern { offset, length, byte }
}

/// Patches bytes of a file.
pub fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("the image");
    file.write_all_at(bytes, offset).expect("a patch");
}

/// A big-endian word of a file.
pub fn word(path: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(path).expect("the image").read_exact_at(&mut bytes, offset).expect("eight bytes");
    u64::from_be_bytes(bytes)
}

/// Offsets of an image's L1 table, first L2 table and first refblock.
pub fn tables(path: &Path) -> (u64, u64, u64) {
    let l1 = word(path, 40);
    let offset = 0x00ff_ffff_ffff_fe00;
    (l1, word(path, l1) & offset, word(path, word(path, 48)) & offset)
}

/// Guest bytes for each request in flight.
const WINDOW: usize = 1 << 20;
/// Requests in flight at a time.
const IN_FLIGHT: usize = 8;
/// Requests of which none completes for this long hang.
const HANG: Duration = Duration::from_secs(60);

thread_local! {
    /// Guest memory of closed rigs, which is free for reuse.
    static MEMORIES: RefCell<Vec<&'static GuestMemoryMmap<()>>> = const { RefCell::new(Vec::new()) };
}

/// An open disk with two queues.
pub struct Rig {
    queues: Vec<DiskQueue<HostStorage>>,
    disk: Disk<HostStorage>,
    memory: &'static GuestMemoryMmap<()>,
}

/// A request in flight and its operation.
struct Flying {
    operation: Operation,
    slices: Vec<GuestSlice>,
}

impl Rig {
    /// Opens an image.
    pub fn open(path: &Path, options: &DiskOptions) -> Result<Self, OpenError> {
        Self::open_on(HostStorage::new(), path, options)
    }

    /// Opens an image through a storage of the caller's choice.
    pub fn open_on(storage: HostStorage, path: &Path, options: &DiskOptions) -> Result<Self, OpenError> {
        let disk = Disk::open(storage, path, options)?;
        let queues = (0..2).map(|_| disk.queue(64)).collect::<Result<Vec<_>, _>>()?;
        let memory = MEMORIES.with_borrow_mut(Vec::pop).unwrap_or_else(|| {
            let range = (GuestAddress(0), WINDOW * IN_FLIGHT);
            let memory = GuestMemoryMmap::<()>::from_ranges(&[range]).expect("guest memory");
            // Leaked, so that its slices are 'static.
            Box::leak(Box::new(memory))
        });
        Ok(Rig { queues, disk, memory })
    }

    /// Closes the disk cleanly.
    pub fn close(self) {
        drop(self.queues);
        MEMORIES.with_borrow_mut(|memories| memories.push(self.memory));
        self.disk.close().expect("a clean close");
    }

    /// The disk itself.
    pub fn disk(&self) -> &Disk<HostStorage> {
        &self.disk
    }

    /// Puts a new overlay on top of the chain. Nothing is in flight.
    pub fn put_overlay(&mut self, path: &Path) {
        let below = self.disk.layers()[0].path.clone();
        let backing_file = below.into_os_string().into_encoded_bytes();
        let new = NewOverlay { path: path.to_owned(), backing_file };
        let overlay = self.disk.make_overlay(&new).expect("it is made");
        let parked: Vec<_> = self.queues.drain(..).map(park).collect();
        self.disk.rest();
        let old = self.disk.snapshot(overlay, || Ok(())).expect("it is put on top");
        self.disk.go_on();
        self.disk.let_go(old).expect("the old top is let go");
        let resumed = parked.into_iter().map(|queue| self.disk.resume(queue).expect("a queue"));
        self.queues = resumed.collect();
    }

    /// Runs operations and applies them to the model. Operations that do not overlap are in flight together. Panics if
    /// a read differs.
    pub fn run(&mut self, operations: &[Operation], model: &mut ByteModel) {
        let mut group: Vec<Operation> = Vec::new();
        for operation in operations {
            let clashes = group.iter().any(|other| clash(other, operation));
            if clashes || group.len() == IN_FLIGHT {
                self.run_group(&group, model);
                group.clear();
            }
            group.push(*operation);
        }
        self.run_group(&group, model);
    }

    fn run_group(&mut self, group: &[Operation], model: &mut ByteModel) {
        let mut flying: Vec<Flying> = Vec::new();
        for (index, operation) in group.iter().enumerate() {
            let slices = self.memory_for(index, operation);
            if let Operation::Write { offset, length, seed } = *operation {
                scatter(&contents(seed, offset, length), &slices);
            }
            let queue = &mut self.queues[index % 2];
            queue.submit(RequestId(index as u32), request(operation), &slices);
            flying.push(Flying { operation: *operation, slices });
        }
        self.wait_for(group.len());
        for flying in &flying {
            if let Operation::Read { offset, length } = flying.operation {
                let found = gather(&flying.slices, length as usize);
                if let Err(difference) = model.compare(offset, &found) {
                    panic!("a read of {length} bytes at {offset:#x}: {difference}");
                }
            }
        }
        for operation in group {
            model.apply(operation);
        }
    }

    fn wait_for(&mut self, count: usize) {
        for completed in self.collect(count) {
            completed.result.expect("the request succeeds");
        }
    }

    /// Polls both queues until that many requests have completed. It waits only while neither queue gets on: a queue may
    /// have more to do after a poll, and a wait for the other one would delay that.
    fn collect(&mut self, count: usize) -> Vec<Completed> {
        let mut done: Vec<Completed> = Vec::new();
        let (mut idle, mut polls) = (0_u32, 0);
        let mut deadline = (0, Instant::now() + HANG);
        while done.len() < count {
            for queue in &mut self.queues {
                queue.poll(&mut done);
            }
            if done.len() > deadline.0 {
                deadline = (done.len(), Instant::now() + HANG);
            } else if Instant::now() > deadline.1 {
                // Dropping the queues would wait for the hanging requests.
                std::mem::forget(std::mem::take(&mut self.queues));
                panic!("requests hang: {} of {count} are done", done.len());
            }
            let before = std::mem::replace(&mut polls, self.queues.iter().map(DiskQueue::polls).sum::<u64>());
            if polls > before {
                idle = 0;
                continue;
            }
            idle += 1;
            // The other queue may be the one that can go on: short pauses at first.
            let pause = Duration::from_micros(if idle < 100 { 50 } else { 1000 });
            self.queues[idle as usize % 2].wait(Some(pause));
        }
        done
    }

    /// Memory for an operation's bytes: every third at an odd address, every second in two slices.
    fn memory_for(&self, index: usize, operation: &Operation) -> Vec<GuestSlice> {
        let length = match *operation {
            Operation::Read { length, .. } | Operation::Write { length, .. } => length as usize,
            _ => return Vec::new(),
        };
        let odd = if index % 3 == 2 { 7 } else { 0 };
        let base = GuestAddress((index * WINDOW + odd) as u64);
        assert!(length + odd <= WINDOW, "transfers fit their windows");
        let whole = self.memory.get_slice(base, length).expect("within guest memory");
        if index.is_multiple_of(2) || length <= 512 {
            return vec![whole];
        }
        let cut = 512 + odd;
        let (first, second) = whole.split_at(cut).expect("a cut within");
        vec![first, second]
    }

    /// Runs one operation that may fail.
    pub fn try_one(&mut self, operation: &Operation) -> Result<(), RequestError> {
        let slices = self.memory_for(0, operation);
        self.queues[0].submit(RequestId(0), request(operation), &slices);
        self.collect(1).pop().expect("one request").result
    }

    /// Reads the whole disk.
    pub fn read_all(&mut self) -> Vec<u8> {
        let size = self.disk.size();
        let mut all = Vec::with_capacity(size as usize);
        while (all.len() as u64) < size {
            let length = (size - all.len() as u64).min(WINDOW as u64 / 2);
            let operation = Operation::Read { offset: all.len() as u64, length };
            let slices = self.memory_for(0, &operation);
            self.queues[0].submit(RequestId(0), request(&operation), &slices);
            self.wait_for(1);
            all.extend(gather(&slices, length as usize));
        }
        all
    }
}

/// Has a queue without requests let its disk go. It may still load a table for a request that is over.
fn park(mut queue: DiskQueue<HostStorage>) -> ParkedQueue<HostStorage> {
    loop {
        match queue.park() {
            Ok(parked) => return parked,
            Err(busy) => queue = *busy,
        }
        queue.poll(&mut Vec::new());
        queue.wait(Some(Duration::from_millis(1)));
    }
}

/// True if the order of two operations matters.
fn clash(a: &Operation, b: &Operation) -> bool {
    let (Some((a_start, a_end)), Some((b_start, b_end))) = (range(a), range(b)) else { return false };
    a_start < b_end && b_start < a_end
}

fn range(operation: &Operation) -> Option<(u64, u64)> {
    match *operation {
        Operation::Flush => None,
        Operation::Read { offset, length }
        | Operation::Write { offset, length, .. }
        | Operation::Discard { offset, length }
        | Operation::WriteZeroes { offset, length, .. } => Some((offset, offset + length)),
    }
}

fn request(operation: &Operation) -> Request {
    let write_through = false;
    match *operation {
        Operation::Read { offset, .. } => Request::Read { offset },
        Operation::Write { offset, seed, .. } => {
            Request::Write { offset, write_through: seed.is_multiple_of(16) }
        }
        Operation::Discard { offset, length } => Request::Discard { offset, length, write_through },
        Operation::WriteZeroes { offset, length, unmap } => {
            Request::WriteZeroes { offset, length, unmap, write_through }
        }
        Operation::Flush => Request::Flush,
    }
}

fn scatter(bytes: &[u8], slices: &[GuestSlice]) {
    let mut at = 0;
    for slice in slices {
        slice.copy_from(&bytes[at..at + slice.len()]);
        at += slice.len();
    }
}

fn gather(slices: &[GuestSlice], length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut at = 0;
    for slice in slices {
        slice.copy_to(&mut bytes[at..at + slice.len()]);
        at += slice.len();
    }
    bytes
}
