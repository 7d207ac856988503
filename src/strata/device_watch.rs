//! What a device has in flight and what waits for space, for any thread to see.
//!
//! Owns the counts' homes; the queues and the disk store them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use disk::{Disk, SpaceStatus, SpaceWatch};
use storage::Storage;

/// Shows what a device's queues have in flight and what waits for space, for as long as it exists.
#[derive(Clone, Default)]
pub struct DeviceWatch {
    /// The existing queues. A leaf lock: taken when a queue is created and when the counts are read.
    queues: Arc<Mutex<Vec<Weak<Gauge>>>>,
    /// The waits of the disk as it was last opened; none before. A leaf lock, except for the disk's in [`SpaceWatch`].
    space: Arc<Mutex<Option<SpaceWatch>>>,
}

/// How many requests one queue has in flight. Stored by its thread and loaded by other threads: relaxed, it orders
/// nothing.
pub struct Gauge {
    /// The name of the thread.
    queue: String,
    /// Requests submitted and not yet completed to the caller.
    pub in_flight: AtomicU32,
}

impl DeviceWatch {
    /// Follows a disk that was just opened.
    pub fn follow<S: Storage>(&self, disk: &Disk<S>) {
        *self.space() = Some(disk.space());
    }

    fn space(&self) -> MutexGuard<'_, Option<SpaceWatch>> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The numbers of requests that wait for space.
    pub fn space_status(&self) -> SpaceStatus {
        self.space().as_ref().map(SpaceWatch::status).unwrap_or_default()
    }

    /// The device is being stopped: requests that wait for space fail, and none waits from now on.
    pub fn stop_waiting(&self) {
        if let Some(space) = &*self.space() {
            space.stop_waiting();
        }
    }

    /// The queues with requests in flight: the name of each queue's thread, and its number of requests.
    pub fn in_flight(&self) -> Vec<(String, u32)> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let gauges = queues.iter().filter_map(Weak::upgrade);
        let counts = gauges.map(|gauge| (gauge.queue.clone(), gauge.in_flight.load(Ordering::Relaxed)));
        counts.filter(|(_, in_flight)| *in_flight > 0).collect()
    }

    /// A gauge for the calling thread's queue.
    pub fn gauge(&self) -> Arc<Gauge> {
        let queue = std::thread::current().name().unwrap_or("a queue").to_owned();
        let gauge = Arc::new(Gauge { queue, in_flight: AtomicU32::new(0) });
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|other| other.strong_count() > 0);
        queues.push(Arc::downgrade(&gauge));
        gauge
    }
}
