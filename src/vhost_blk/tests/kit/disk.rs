//! A disk in memory, with a queue that completes at once and one that completes when another thread allows it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost_blk::{
    BlockDevice, BlockQueue, Capacity, Completed, DeviceProfile, GuestSlice, JournalMemory, Request,
    RequestId,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Whether requests may complete on a disk that completes later.
#[derive(Default)]
pub struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    pub fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }

    pub fn open(&self) {
        *self.closed.lock().unwrap() = false;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.changed.wait_while(closed, |closed| *closed).unwrap());
    }
}

pub struct MemoryDisk {
    pub bytes: Mutex<Vec<u8>>,
    pub profile: DeviceProfile,
    pub requests: Mutex<Vec<Request>>,
    pub gate: Arc<Gate>,
    /// Requests submitted to the disk.
    pub submitted: AtomicU64,
    /// The next submit panics.
    pub trap: AtomicBool,
    /// There is no space: requests other than reads and flushes are held until there is space, or until their queue
    /// gives up.
    pub full: AtomicBool,
    /// Requests held.
    pub held: AtomicU64,
    /// Flushes fail.
    pub broken: AtomicBool,
    /// Requests that may be in flight while there is room for one more.
    pub room: AtomicU64,
    /// Queues let the disk go, and have no room: see [`MemoryDisk::shut`].
    shut: AtomicBool,
    /// Queues that have let it go.
    pub outside: AtomicU64,
    /// One for each queue that was made: ends its wait, if it still exists.
    wakes: Mutex<Vec<Weak<EventFd>>>,
    /// How often the disk was released.
    pub releases: AtomicU64,
    /// A disk that completes at once first waits for the gate, and then is slow.
    pub slow: AtomicBool,
    /// For each turn after a submission: the number of requests submitted for it, and whether more were announced.
    pub portions: Mutex<Vec<(usize, bool)>>,
    /// For each turn after a submission: the bytes of the requests submitted for it, data or ranges.
    pub batches: Mutex<Vec<u64>>,
    /// What was offered for a journal: its number of words, and the first, which then grows by one.
    pub journals: Mutex<Vec<Option<(usize, u64)>>>,
    /// The next offer is refused.
    pub refuses_journal: AtomicBool,
    later: bool,
}

impl MemoryDisk {
    pub fn with(sectors: u64, later: bool, change: impl FnOnce(&mut DeviceProfile)) -> Arc<Self> {
        let mut profile = DeviceProfile {
            capacity: Capacity::new(sectors),
            block_size: 512,
            physical_block_size: 512,
            optimal_io_size: 65536,
            read_only: false,
            discard: true,
            discard_alignment: 65536,
            write_zeroes: true,
            zeroes_are_data: false,
            serial: *b"serial-of-this-disk\0",
        };
        change(&mut profile);
        Arc::new(MemoryDisk {
            bytes: Mutex::new(vec![0; sectors as usize * 512]),
            profile,
            requests: Mutex::default(),
            gate: Arc::default(),
            submitted: AtomicU64::new(0),
            trap: AtomicBool::new(false),
            full: AtomicBool::new(false),
            held: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            room: AtomicU64::new(u64::MAX),
            shut: AtomicBool::new(false),
            outside: AtomicU64::new(0),
            wakes: Mutex::default(),
            releases: AtomicU64::new(0),
            slow: AtomicBool::new(false),
            portions: Mutex::default(),
            batches: Mutex::default(),
            journals: Mutex::default(),
            refuses_journal: AtomicBool::new(false),
            later,
        })
    }

    pub fn new(sectors: u64) -> Arc<Self> {
        Self::with(sectors, false, |_| {})
    }

    pub fn later(sectors: u64) -> Arc<Self> {
        Self::with(sectors, true, |_| {})
    }

    /// Waits until `count` requests in all were submitted to the disk.
    pub fn await_submitted(&self, count: u64) {
        super::guest::until("the disk has the requests", || self.submitted.load(Ordering::SeqCst) >= count);
    }

    /// From now on queues have no room. Each lets the disk go at a poll, and takes it again at the first poll after
    /// [`MemoryDisk::unshut`].
    pub fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
    }

    /// Ends that, and the wait of each queue once.
    pub fn unshut(&self) {
        self.shut.store(false, Ordering::SeqCst);
        for wake in self.wakes.lock().unwrap().iter().filter_map(Weak::upgrade) {
            let _ = wake.write(1);
        }
    }

    fn perform(&self, request: Request, slices: &[GuestSlice]) -> Result<(), Failure> {
        let mut bytes = self.bytes.lock().unwrap();
        match request {
            Request::Read { offset } => {
                let mut at = offset as usize;
                for slice in slices {
                    slice.copy_from(&bytes[at..at + slice.len()]);
                    at += slice.len();
                }
            }
            Request::Write { offset, .. } => {
                let mut at = offset as usize;
                for slice in slices {
                    slice.copy_to(&mut bytes[at..at + slice.len()]);
                    at += slice.len();
                }
            }
            Request::Flush if self.broken.load(Ordering::SeqCst) => return Err(Failure::Broken),
            Request::Flush => {}
            Request::Discard { offset, length, .. } | Request::WriteZeroes { offset, length, .. } => {
                bytes[offset as usize..(offset + length) as usize].fill(0);
            }
        }
        self.requests.lock().unwrap().push(request);
        Ok(())
    }
}

/// A device needs an owned handle on itself to create queues that outlive the call.
pub struct Shared(pub Arc<MemoryDisk>);

impl BlockDevice for Shared {
    type Queue = MemoryQueue;

    fn profile(&self) -> DeviceProfile {
        self.0.profile.clone()
    }

    fn release(&self) -> io::Result<bool> {
        if self.0.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("a flush failed"));
        }
        self.0.releases.fetch_add(1, Ordering::SeqCst);
        Ok(true)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.perform(Request::Flush, &[]).map_err(|_| io::Error::other("a flush failed"))
    }

    fn keep_journal(&self, memory: Option<JournalMemory>) -> io::Result<()> {
        if self.0.refuses_journal.swap(false, Ordering::SeqCst) {
            return Err(io::Error::other("it cannot be flushed"));
        }
        let offered = memory.map(|memory| {
            let words = (*memory).as_ref();
            (words.len(), words[0].fetch_add(1, Ordering::SeqCst))
        });
        self.0.journals.lock().unwrap().push(offered);
        Ok(())
    }

    fn queue(&self, depth: u32) -> io::Result<MemoryQueue> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        self.0.wakes.lock().unwrap().push(Arc::downgrade(&wake));
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        let (send, its_receive) = channel::<RequestId>();
        let (its_send, receive) = channel();
        let (gate, its_wake) = (Arc::clone(&self.0.gate), Arc::clone(&wake));
        let helper = std::thread::spawn(move || {
            for id in its_receive {
                gate.pass();
                let _ = its_send.send(id);
                let _ = its_wake.write(1);
            }
        });
        Ok(MemoryQueue {
            disk: Arc::clone(&self.0),
            depth: depth as usize,
            portion: (0, false),
            batch: 0,
            kicks: 0,
            heeds: true,
            ready: Vec::new(),
            pending: Vec::new(),
            held: Vec::new(),
            leaving: false,
            outside: false,
            send: Some(send),
            receive,
            helper: Some(helper),
            wake,
            watched: Vec::new(),
            epoll,
        })
    }
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Its queue no longer waits for space.
    GivenUp,
    /// The disk is broken.
    Broken,
}

type Done = Completed<Failure>;

pub struct MemoryQueue {
    disk: Arc<MemoryDisk>,
    depth: usize,
    /// Requests since the last turn, and whether more follow after the next.
    portion: (usize, bool),
    /// Bytes since the last turn.
    batch: u64,
    /// Signals of the watched eventfds, and whether they end waits.
    kicks: u64,
    heeds: bool,
    ready: Vec<Done>,
    pending: Vec<(RequestId, Request, Vec<GuestSlice>)>,
    /// Requests that wait for space.
    held: Vec<(RequestId, Request, Vec<GuestSlice>)>,
    leaving: bool,
    /// It has let the disk go.
    outside: bool,
    send: Option<Sender<RequestId>>,
    receive: Receiver<RequestId>,
    helper: Option<JoinHandle<()>>,
    wake: Arc<EventFd>,
    watched: Vec<EventFd>,
    epoll: Epoll,
}

impl MemoryQueue {
    fn complete(&mut self, id: RequestId) -> Done {
        let at = self.pending.iter().position(|entry| entry.0 == id).expect("an ID that was submitted");
        let (id, request, slices) = self.pending.swap_remove(at);
        Done { id, result: self.disk.perform(request, &slices) }
    }

    fn hold(&mut self, id: RequestId, request: Request, slices: &[GuestSlice]) {
        if self.leaving {
            return self.ready.push(Done { id, result: Err(Failure::GivenUp) });
        }
        self.held.push((id, request, slices.to_vec()));
        assert!(self.held.len() <= self.depth, "more requests than were announced");
        self.disk.held.fetch_add(1, Ordering::SeqCst);
    }

    /// Ends the held requests, with success or an error.
    fn let_go(&mut self, end: impl Fn(&MemoryDisk, Request, &[GuestSlice]) -> Result<(), Failure>) {
        for (id, request, slices) in std::mem::take(&mut self.held) {
            self.ready.push(Done { id, result: end(&self.disk, request, &slices) });
            self.disk.held.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl BlockQueue for MemoryQueue {
    type Error = Failure;

    fn submit(&mut self, id: RequestId, request: Request, slices: &[GuestSlice]) {
        assert!(!self.disk.trap.swap(false, Ordering::SeqCst), "a trap of the test");
        assert!(self.pending.iter().all(|entry| entry.0 != id), "an ID that is in flight");
        let needs_space = !matches!(request, Request::Read { .. } | Request::Flush);
        if needs_space && self.disk.full.load(Ordering::SeqCst) {
            self.hold(id, request, slices);
        } else if self.disk.later {
            self.pending.push((id, request, slices.to_vec()));
            assert!(self.pending.len() <= self.depth, "more requests than were announced");
            self.send.as_ref().expect("until drop").send(id).expect("the helper lives");
        } else {
            if self.disk.slow.load(Ordering::SeqCst) {
                self.disk.gate.pass();
                std::thread::sleep(Duration::from_micros(100));
            }
            let result = self.disk.perform(request, slices);
            self.ready.push(Done { id, result });
        }
        self.portion.0 += 1;
        self.batch += match request {
            Request::Discard { length, .. } | Request::WriteZeroes { length, .. } => length,
            _ => slices.iter().map(|slice| slice.len() as u64).sum(),
        };
        self.disk.submitted.fetch_add(1, Ordering::SeqCst);
    }

    fn expect_more(&mut self, more: bool) {
        self.portion.1 = more;
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        if self.portion.0 > 0 {
            self.disk.portions.lock().unwrap().push(self.portion);
            self.disk.batches.lock().unwrap().push(std::mem::take(&mut self.batch));
            self.portion.0 = 0;
        }
        if !self.disk.full.load(Ordering::SeqCst) {
            self.let_go(MemoryDisk::perform);
        }
        done.append(&mut self.ready);
        while let Ok(id) = self.receive.try_recv() {
            let finished = self.complete(id);
            done.push(finished);
        }
        let shut = self.disk.shut.load(Ordering::SeqCst);
        if shut && !self.outside && self.pending.is_empty() {
            self.outside = true;
            self.disk.outside.fetch_add(1, Ordering::SeqCst);
        } else if self.outside && !shut {
            self.outside = false;
            self.disk.outside.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        let mut events = [EpollEvent::default(); 4];
        let timeout = timeout.map_or(-1, |timeout| timeout.as_millis() as i32);
        let _ = self.epoll.wait(timeout, &mut events);
        let _ = self.wake.read();
        for event in self.watched.iter().filter(|_| self.heeds) {
            if let Ok(count) = event.read() {
                assert!(count > 0);
                self.kicks += 1;
            }
        }
    }

    fn kicks(&self) -> u64 {
        self.kicks
    }

    fn heed_kicks(&mut self, heed: bool) {
        self.heeds = heed;
        let wanted = if heed { EventSet::IN } else { EventSet::empty() };
        for event in &self.watched {
            let interest = EpollEvent::new(wanted, 1);
            self.epoll.ctl(ControlOperation::Modify, event.as_raw_fd(), interest).expect("it is watched");
        }
    }

    fn has_room(&self) -> bool {
        let let_go = self.outside || self.disk.shut.load(Ordering::SeqCst);
        !let_go && (self.pending.len() as u64) < self.disk.room.load(Ordering::SeqCst)
    }

    fn waiting(&self) -> usize {
        self.held.len()
    }

    fn was_given_up(&self, error: &Failure) -> bool {
        *error == Failure::GivenUp
    }

    fn stop_waiting(&mut self) {
        self.leaving = true;
        self.let_go(|_, _, _| Err(Failure::GivenUp));
    }

    fn watch(&mut self, event: EventFd) {
        let interest = EpollEvent::new(EventSet::IN, 1);
        self.epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest).expect("a kick descriptor");
        self.watched.push(event);
    }

    fn notifier(&self) -> Arc<dyn Fn() + Send + Sync> {
        let wake = Arc::clone(&self.wake);
        Arc::new(move || {
            let _ = wake.write(1);
        })
    }
}

impl Drop for MemoryQueue {
    fn drop(&mut self) {
        self.stop_waiting();
        drop(self.send.take());
        if let Some(helper) = self.helper.take() {
            let _ = helper.join();
        }
        while let Ok(id) = self.receive.try_recv() {
            self.complete(id);
        }
    }
}
