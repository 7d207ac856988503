//! A queue's thread panics at every operation of its slow path in turn, while another queue waits for what it does.
//!
//! The disk has failed then. So every request of the other queue must end: reads with their data, changes with an error
//! or as before. The image has leaks at worst.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use disk::check::Verdict;
use disk::{Completed, Disk, DiskOptions, DiskQueue, Request, RequestId};
use qcow2::{Geometry, NewImage, Version};
use storage::host::{HostQueue, HostStorage};
use storage::{
    Completion, FileId, FileInfo, GuestSlice, IoQueue, Notifier, OpenOptions, Operation, Storage,
    StorageError, Token,
};
use strata_rig::agree::our_opinion;
use vmm_sys_util::eventfd::EventFd;

/// The thread that panics.
const VICTIM: &str = "victim";
/// The thread whose requests must end.
const OTHER: &str = "other";
/// Bytes of a cluster: an L2 table maps 64.
const CLUSTER: u64 = 512;
/// Clusters of the disk: 8 L2 tables.
const CLUSTERS: u64 = 512;
/// The first clusters, which have data from the beginning.
const WRITTEN: u64 = CLUSTERS / 2;
/// Requests of a queue.
const REQUESTS: u32 = 40;
/// Only a request that waits for ever takes so long.
const HANG: Duration = Duration::from_secs(30);

/// What the panic is thrown with: no hook reports it.
struct Sprung;

/// Makes the victim panic at one operation.
#[derive(Default)]
struct Trap {
    /// Operations of the victim's tasks until then.
    left: AtomicI64,
    sprung: AtomicBool,
    /// The other thread has no I/O in flight and sleeps, or has ended.
    other_waits: AtomicBool,
}

impl Trap {
    /// The victim is about to start an operation of a task.
    fn step(&self) {
        if self.left.fetch_sub(1, Ordering::Relaxed) != 0 {
            return;
        }
        let began = Instant::now();
        while !self.other_waits.load(Ordering::Acquire) && began.elapsed() < HANG {
            thread::yield_now();
        }
        self.sprung.store(true, Ordering::Release);
        resume_unwind(Box::new(Sprung));
    }
}

/// The host's storage with a trap in it.
struct Trapped {
    inner: HostStorage,
    trap: Arc<Trap>,
}

struct TrappedQueue {
    inner: HostQueue,
    trap: Arc<Trap>,
}

fn is(name: &str) -> bool {
    thread::current().name() == Some(name)
}

impl Storage for Trapped {
    type Queue = TrappedQueue;

    fn open(&self, path: &Path, options: &OpenOptions) -> Result<(FileId, FileInfo), StorageError> {
        self.inner.open(path, options)
    }

    fn open_shared(&self, path: &Path, direct: bool) -> Result<(FileId, FileInfo), StorageError> {
        self.inner.open_shared(path, direct)
    }

    fn create(
        &self,
        path: &Path,
        like: FileId,
        options: &OpenOptions,
    ) -> Result<(FileId, FileInfo), StorageError> {
        self.inner.create(path, like, options)
    }

    fn sync_name(&self, path: &Path) -> Result<(), StorageError> {
        self.inner.sync_name(path)
    }

    fn remove(&self, path: &Path) -> Result<(), StorageError> {
        self.inner.remove(path)
    }

    fn share(&self, file: FileId) -> Result<(), StorageError> {
        self.inner.share(file)
    }

    fn queue(&self, depth: u32) -> Result<TrappedQueue, StorageError> {
        Ok(TrappedQueue { inner: self.inner.queue(depth)?, trap: Arc::clone(&self.trap) })
    }

    fn length(&self, file: FileId) -> Result<u64, StorageError> {
        self.inner.length(file)
    }

    fn allocated(&self, file: FileId) -> Result<u64, StorageError> {
        self.inner.allocated(file)
    }
}

impl IoQueue for TrappedQueue {
    fn push(&mut self, token: Token, operation: Operation) {
        // The disk marks the operations of tasks so. The fast path has no plans that could be lost.
        if token.0 >> 63 == 1 && is(VICTIM) {
            self.trap.step();
        }
        self.inner.push(token, operation);
    }

    fn submit(&mut self) {
        self.inner.submit();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.inner.reap(done);
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        let waits = is(OTHER) && self.inner.in_flight() == 0;
        self.trap.other_waits.fetch_or(waits, Ordering::Release);
        self.inner.wait(timeout);
        if is(OTHER) {
            self.trap.other_waits.store(false, Ordering::Release);
        }
    }

    fn watch(&mut self, event: EventFd) {
        self.inner.watch(event);
    }

    fn notifier(&self) -> Arc<dyn Notifier> {
        self.inner.notifier()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn now(&self) -> Instant {
        self.inner.now()
    }
}

fn options() -> DiskOptions {
    DiskOptions { direct: false, ..DiskOptions::default() }
}

/// The bytes of a cluster that was written before the test.
fn content(cluster: u64) -> [u8; CLUSTER as usize] {
    [cluster as u8 | 1; CLUSTER as usize]
}

fn memory(bytes: &[u8]) -> GuestSlice {
    GuestSlice::from(Vec::leak(bytes.to_vec()))
}

/// Submits requests and waits until all have ended.
fn run<S: Storage>(
    queue: &mut DiskQueue<S>,
    requests: &[(Request, GuestSlice)],
    submitted: impl FnOnce(),
) -> Vec<Completed> {
    for (number, (request, slice)) in requests.iter().enumerate() {
        let has_data = matches!(request, Request::Read { .. } | Request::Write { .. });
        let slices = if has_data { std::slice::from_ref(slice) } else { &[] };
        queue.submit(RequestId(number as u32), *request, slices);
    }
    submitted();
    let mut done = Vec::new();
    loop {
        queue.poll(&mut done);
        if done.len() == requests.len() {
            return done;
        }
        queue.wait(None);
    }
}

/// Creates the image; its first clusters have data.
fn create(path: &Path) {
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: CLUSTER.trailing_zeros(),
        refcount_order: 4,
        extended_l2: false,
        size: CLUSTERS * CLUSTER,
    };
    let pieces = NewImage::new(geometry).layout().expect("a sound image");
    std::fs::write(path, pieces.into_iter().flat_map(|(_, bytes)| bytes).collect::<Vec<_>>()).expect("room");
    let disk = Disk::open(HostStorage::new(), path, &options()).expect("a sound image");
    let mut queue = disk.queue(8).expect("a queue");
    let write = |cluster| (write(cluster), memory(&content(cluster)));
    let done = run(&mut queue, &(0..WRITTEN).map(write).collect::<Vec<_>>(), || ());
    assert!(done.iter().all(|completed| completed.result.is_ok()));
    drop(queue);
    disk.close().expect("a clean close");
}

fn write(cluster: u64) -> Request {
    Request::Write { offset: cluster * CLUSTER, write_through: false }
}

/// The requests of a thread. Those of the two threads meet in tables, windows, cuts and claims.
fn requests(thread: u64) -> Vec<(Request, GuestSlice)> {
    let request = |number: u64| {
        let old = (number * 37 + thread) % WRITTEN;
        let new = WRITTEN + (number * 23 + thread * 5) % WRITTEN;
        let (offset, length) = (old * CLUSTER, 2 * CLUSTER);
        match number % 8 {
            0 | 3 | 6 => write(new),
            1 => Request::Flush,
            2 => Request::Discard { offset, length, write_through: false },
            4 => write(old),
            5 => Request::WriteZeroes { offset, length, unmap: true, write_through: false },
            _ => Request::Read { offset },
        }
    };
    (0..u64::from(REQUESTS)).map(|number| (request(number), memory(&[0xee; CLUSTER as usize]))).collect()
}

/// The thread whose requests must end. Reports when all have.
fn other(disk: &Disk<Trapped>, trap: &Trap, start: &Barrier) {
    let mut queue = disk.queue(REQUESTS).expect("a queue");
    let mut left = requests(1);
    // Some come later, when the disk may have failed.
    let later = left.split_off(left.len() / 2);
    run(&mut queue, &left, || _ = start.wait());
    let sprung = trap.sprung.load(Ordering::Acquire);
    let done = run(&mut queue, &later, || ());
    trap.other_waits.store(true, Ordering::Release);
    for Completed { id, result } in done {
        let request = later[id.0 as usize].0;
        match request {
            Request::Read { .. } => result.expect("reads go on"),
            Request::Flush if sprung => assert!(result.is_err(), "a flush succeeds after a panic"),
            _ => {}
        }
    }
}

/// Runs both threads, with the trap after `steps` operations. False if it did not spring.
fn trial(image: &Path, steps: i64) -> bool {
    let trap = Arc::new(Trap { left: AtomicI64::new(steps), ..Trap::default() });
    let storage = Trapped { inner: HostStorage::new(), trap: Arc::clone(&trap) };
    let disk = Disk::open(storage, image, &options()).expect("a sound image");
    let start = Barrier::new(2);
    let victim = || {
        let run = catch_unwind(AssertUnwindSafe(|| {
            let mut queue = disk.queue(REQUESTS).expect("a queue");
            run(&mut queue, &requests(0), || _ = start.wait());
        }));
        match run {
            Err(panic) if !panic.is::<Sprung>() => resume_unwind(panic),
            _ => {}
        }
    };
    thread::scope(|scope| {
        let named = |name: &str| thread::Builder::new().name(name.to_owned());
        named(VICTIM).spawn_scoped(scope, victim).expect("a thread");
        named(OTHER).spawn_scoped(scope, || other(&disk, &trap, &start)).expect("a thread");
    });
    let sprung = trap.sprung.load(Ordering::Acquire);
    assert_eq!(disk.close().is_err(), sprung, "a disk that has failed is not closed cleanly");
    sprung
}

#[test]
fn after_a_panic_in_a_plan_nobody_waits_for_ever() {
    let folder = tempfile::tempdir().expect("a folder");
    let (sound, image) = (folder.path().join("sound.qcow2"), folder.path().join("image.qcow2"));
    create(&sound);
    for steps in 0.. {
        std::fs::copy(&sound, &image).expect("room");
        let (ended, end) = mpsc::channel();
        let path = image.clone();
        let thread = thread::spawn(move || ended.send(trial(&path, steps)));
        let sprung = match end.recv_timeout(HANG) {
            Ok(sprung) => sprung,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                panic!("a request waits for ever after operation {steps}")
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                resume_unwind(thread.join().expect_err("it panicked"))
            }
        };
        let report = our_opinion(&image).expect("a readable image");
        let verdicts: &[Verdict] = if sprung { &[Verdict::Clean, Verdict::Leaks] } else { &[Verdict::Clean] };
        assert!(verdicts.contains(&report.verdict()), "operation {steps}: {report:#?}");
        if !sprung {
            assert!(steps > 20, "the victim has only {steps} operations");
            return;
        }
    }
}
