//! The small traits through which a session reaches its disk. The requests are those of the crate `block`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::{Completed, Request, RequestId};
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

/// A span of guest memory, already translated and checked. The session keeps the mapping until its request is done or
/// the [`BlockQueue`] is dropped.
pub type GuestSlice = VolatileSlice<'static, ()>;

/// Memory that outlives the process, in which a disk records what it has not made durable. The frontend has it too, and
/// may change it at any time.
pub type JournalMemory = Arc<dyn AsRef<[AtomicU64]> + Send + Sync>;

/// A disk's capacity. It may change while the disk is served: requests are checked against the present one.
#[derive(Clone, Debug)]
pub struct Capacity {
    sectors: Arc<AtomicU64>,
}

impl Capacity {
    /// A capacity in 512-byte sectors.
    pub fn new(sectors: u64) -> Self {
        Capacity { sectors: Arc::new(AtomicU64::new(sectors)) }
    }

    /// The present capacity in 512-byte sectors.
    #[inline]
    pub fn sectors(&self) -> u64 {
        // Acquire pairs with the release in `set`: a request in a new part finds the disk ready for it.
        self.sectors.load(Ordering::Acquire)
    }

    /// Changes the capacity. The disk must serve all of it from now on. A request that was checked before may still be
    /// under way past a smaller capacity.
    pub fn set(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Release);
    }
}

/// The properties of a disk that the guest sees.
#[derive(Clone, Debug)]
pub struct DeviceProfile {
    /// The capacity, shared by all who have this profile.
    pub capacity: Capacity,
    /// Logical block size in bytes, 512 or 4096: requests are multiples of it, and so is the capacity.
    pub block_size: u32,
    /// Physical block size in bytes, a power of two and at least the logical block size: smaller writes cost more.
    pub physical_block_size: u32,
    /// Preferred I/O size in bytes: the cluster size of a qcow2 image.
    pub optimal_io_size: u32,
    /// Every write, discard and write zeroes fails.
    pub read_only: bool,
    /// Offer DISCARD.
    pub discard: bool,
    /// Preferred alignment of discards in bytes: the cluster size.
    pub discard_alignment: u32,
    /// Offer WRITE_ZEROES.
    pub write_zeroes: bool,
    /// A write zeroes may have to write its whole range as data, so it is as much work as a write.
    pub zeroes_are_data: bool,
    /// The answer to GET_ID: at most 20 bytes, zero-padded.
    pub serial: [u8; 20],
}

/// A disk that any number of queues may use at once.
pub trait BlockDevice: Send + Sync + 'static {
    /// One thread's access to the disk.
    type Queue: BlockQueue;

    /// The properties of the disk. All but the capacity are constant while a session lasts.
    fn profile(&self) -> DeviceProfile;

    /// From now on the disk records in this memory what it answers and has not made durable; with `None` nowhere. No
    /// queue exists. First everything that was answered becomes durable, and what a dead process left in this memory is
    /// carried out. A disk without a record does nothing.
    ///
    /// # Errors
    /// When something cannot be made durable.
    fn keep_journal(&self, _memory: Option<JournalMemory>) -> io::Result<()> {
        Ok(())
    }

    /// Makes everything durable that was answered, whether or not a queue exists. A disk that was released has nothing left
    /// to do.
    ///
    /// # Errors
    /// When something cannot be made durable.
    fn flush(&self) -> io::Result<()>;

    /// Creates a queue for the calling thread, which keeps it there. At most `depth` requests are in flight on it.
    ///
    /// # Errors
    /// When the host refuses the resources (io_uring, memory), or a disk that was released is in use elsewhere.
    fn queue(&self, depth: u32) -> io::Result<Self::Queue>;

    /// The guest has stopped here and may go on elsewhere: makes everything durable, and lets other processes open the
    /// disk for writing. Called while no queue exists. The next [`BlockDevice::queue`] takes the disk back. False if
    /// there is nothing to release.
    ///
    /// # Errors
    /// When something could not be made durable. The disk is not released then.
    fn release(&self) -> io::Result<bool> {
        Ok(false)
    }
}

/// One thread's access to the disk. Dropping it waits until no guest memory is in use.
pub trait BlockQueue {
    /// Why a request failed. The guest learns only that it did.
    type Error;

    /// Starts a request. `slices` add up to its length for reads and writes and are empty otherwise. They may have any
    /// address and length. The request may complete at once; the next [`BlockQueue::poll`] then returns it.
    fn submit(&mut self, id: RequestId, request: Request, slices: &[GuestSlice]);

    /// A hint: whether more requests follow after the next poll. The queue should then offload slow work from this
    /// thread if it can.
    fn expect_more(&mut self, _more: bool) {}

    /// Sends the submitted requests to the host, runs ready tasks, and moves completed requests into `done`. Never
    /// blocks.
    fn poll(&mut self, done: &mut Vec<Completed<Self::Error>>);

    /// Sleeps until a poll may find something, a watched eventfd was signalled, the notifier was used, or the timeout
    /// passed. May return early for no reason.
    fn wait(&mut self, timeout: Option<Duration>);

    /// From now on no request of this queue waits for help from outside, such as for space on the host. A request
    /// that does, or would, fails. Requests that are only slow go on. Called when the ring is told to stop or is
    /// corrupt, before the queue is drained, because the frontend waits for that.
    fn stop_waiting(&mut self);

    /// True if a request failed only because its queue, or the disk, no longer waits for help. Whoever serves the ring next
    /// may do it again.
    fn was_given_up(&self, _error: &Self::Error) -> bool {
        false
    }

    /// From now on a signal on `event` ends [`BlockQueue::wait`]. The queue reads (resets) the eventfd itself.
    fn watch(&mut self, event: EventFd);

    /// Signals on watched eventfds that this queue has met so far, several as one if they came close together.
    fn kicks(&self) -> u64 {
        0
    }

    /// A hint: whether signals on watched eventfds are to end waits from now on, as they do at first. A signal that comes
    /// while they are not ends the first wait afterwards.
    fn heed_kicks(&mut self, _heed: bool) {}

    /// Whether one more request may be submitted. False while the requests in flight may be so much work that a drain would
    /// take long. Then this queue has requests in flight that wait for nobody's help, and the end of one of them changes
    /// it. Or the disk is being changed or paused: then the notifier is used when there is room again.
    fn has_room(&self) -> bool {
        true
    }

    /// True while the queue takes no request before somebody outside resumes the disk: it has no room then, whatever ends.
    /// Of requests that come all the same, only flushes are allowed. The notifier is used when the disk is resumed.
    fn is_paused(&self) -> bool {
        false
    }

    /// How many requests of this queue wait for help from outside, such as for space on the host. Only flushes and
    /// requests that change the disk may.
    fn waiting(&self) -> usize {
        0
    }

    /// A function with which any thread ends this queue's present or next [`BlockQueue::wait`]: used between two waits,
    /// it is not lost. It may be used after the queue is gone, to no effect.
    fn notifier(&self) -> Arc<dyn Fn() + Send + Sync>;
}
