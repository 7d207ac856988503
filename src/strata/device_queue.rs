//! Connects a disk's queue to a session: passes requests and results on unchanged, counts those in flight, and lets the
//! disk go while the gate is closed.
//!
//! Neither side knows the other. Nothing is allocated per request here.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use block::{Request, RequestId};
use disk::{Completed, DiskQueue, OpenError, ParkedQueue, RequestError};
use storage::{Errno, Storage};
use tracing::error;
use vhost_blk::{BlockQueue, GuestSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::device_watch::Gauge;
use crate::gate::Seat;
use crate::held::Held;

/// How long a queue whose thread panics waits for the host before it ends the program.
const PANIC_PATIENCE: Duration = Duration::from_secs(30);

/// One thread's queue on the disk. Fields drop in their order here: the gate learns last that the queue is gone.
pub struct DeviceQueue<S: Storage> {
    place: Place<S>,
    /// Requests submitted and not yet completed to the caller.
    in_flight: u32,
    gauge: Arc<Gauge>,
    /// Flushes that were answered while the queue was out.
    answered: Vec<Completed>,
    /// The queue is being stopped.
    stops: bool,
    held: Arc<Held<S>>,
    seat: Seat,
}

/// On which side of the gate a queue is.
#[allow(clippy::large_enum_variant, reason = "there is one for each queue, and requests go through it")]
enum Place<S: Storage> {
    /// It has the disk.
    Inside(DiskQueue<S>),
    /// It has let the disk go.
    Outside(ParkedQueue<S>),
    /// Between the two, within one call.
    Passing,
}

impl<S: Storage> DeviceQueue<S> {
    /// A queue that has the disk.
    pub fn new(queue: DiskQueue<S>, held: Arc<Held<S>>, seat: Seat, gauge: Arc<Gauge>) -> Self {
        let (place, answered) = (Place::Inside(queue), Vec::new());
        DeviceQueue { place, in_flight: 0, gauge, answered, stops: false, held, seat }
    }

    /// Records how many requests are in flight.
    fn count(&mut self, in_flight: u32) {
        self.in_flight = in_flight;
        self.gauge.in_flight.store(in_flight, Ordering::Relaxed);
    }

    /// Goes through the gate if it has to, and can.
    #[cold]
    fn pass_gate(&mut self) {
        self.place = match std::mem::replace(&mut self.place, Place::Passing) {
            Place::Inside(queue) => match queue.park() {
                Ok(parked) => {
                    self.seat.go_out();
                    Place::Outside(parked)
                }
                Err(queue) => Place::Inside(*queue),
            },
            Place::Outside(parked) if self.seat.go_in() => {
                let disk = self.held.wait().expect("a disk with queues is not released");
                let mut queue = disk.resume(parked).expect("it had a queue for this one before");
                if self.stops {
                    queue.stop_waiting();
                }
                Place::Inside(queue)
            }
            place => place,
        };
    }

    /// A flush while the queue is out: nothing of it is in flight, so the disk does it by itself.
    fn flush_outside(&mut self, id: RequestId) {
        let flushed = self.held.wait().map_or(Ok(true), |disk| disk.flush());
        let result = match flushed {
            Ok(_) => Ok(()),
            Err(OpenError::Request { source, .. }) => Err(source),
            Err(_) => Err(RequestError::Io { action: "flushing", source: Errno::EIO }),
        };
        self.answered.push(Completed { id, result });
    }
}

impl<S: Storage> BlockQueue for DeviceQueue<S> {
    type Error = RequestError;

    fn submit(&mut self, id: RequestId, request: Request, slices: &[GuestSlice]) {
        self.count(self.in_flight + 1);
        match &mut self.place {
            Place::Inside(queue) => queue.submit(id, request, slices),
            _ => {
                assert_eq!(request, Request::Flush, "a queue without room gets nothing else");
                self.flush_outside(id);
            }
        }
    }

    fn expect_more(&mut self, more: bool) {
        if let Place::Inside(queue) = &mut self.place {
            queue.expect_more(more);
        }
    }

    fn poll(&mut self, done: &mut Vec<Completed>) {
        let before = done.len();
        let is_inside = match &mut self.place {
            Place::Inside(queue) => {
                queue.poll(done);
                true
            }
            _ => {
                done.append(&mut self.answered);
                false
            }
        };
        self.count(self.in_flight - (done.len() - before) as u32);
        if self.seat.is_shut() == is_inside && self.in_flight == 0 {
            self.pass_gate();
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        match &mut self.place {
            Place::Inside(queue) => queue.wait(timeout),
            Place::Outside(parked) if self.answered.is_empty() => parked.wait(timeout),
            Place::Outside(_) | Place::Passing => {}
        }
    }

    fn stop_waiting(&mut self) {
        self.stops = true;
        if let Place::Inside(queue) = &mut self.place {
            queue.stop_waiting();
        }
    }

    fn was_given_up(&self, error: &RequestError) -> bool {
        error.was_given_up()
    }

    fn watch(&mut self, event: EventFd) {
        match &mut self.place {
            Place::Inside(queue) => queue.watch(event),
            Place::Outside(parked) => parked.watch(event),
            Place::Passing => {}
        }
    }

    fn kicks(&self) -> u64 {
        match &self.place {
            Place::Inside(queue) => queue.signals(),
            Place::Outside(parked) => parked.signals(),
            Place::Passing => 0,
        }
    }

    fn heed_kicks(&mut self, heed: bool) {
        match &mut self.place {
            Place::Inside(queue) => queue.heed_signals(heed),
            Place::Outside(parked) => parked.heed_signals(heed),
            Place::Passing => {}
        }
    }

    fn has_room(&self) -> bool {
        match &self.place {
            Place::Inside(queue) => !self.seat.is_shut() && queue.has_room(),
            _ => false,
        }
    }

    fn is_paused(&self) -> bool {
        self.seat.is_paused()
    }

    fn waiting(&self) -> usize {
        match &self.place {
            Place::Inside(queue) => queue.waiting(),
            _ => 0,
        }
    }

    fn notifier(&self) -> Arc<dyn Fn() + Send + Sync> {
        let notifier = match &self.place {
            Place::Inside(queue) => queue.notifier(),
            Place::Outside(parked) => parked.notifier(),
            Place::Passing => panic!("no caller meets this state"),
        };
        Arc::new(move || notifier.notify())
    }
}

impl<S: Storage> Drop for DeviceQueue<S> {
    /// Waits until the host no longer uses any guest memory. After a panic in the disk a request may never end. Then
    /// ending the program is the only safe way, and no worse for the image than a crash.
    fn drop(&mut self) {
        self.stop_waiting();
        let patience = std::thread::panicking().then(|| Instant::now() + PANIC_PATIENCE);
        while let Place::Inside(queue) = &mut self.place {
            let mut done = Vec::new();
            queue.poll(&mut done);
            self.count(self.in_flight - done.len() as u32);
            if self.in_flight == 0 {
                return;
            }
            if patience.is_some_and(|end| Instant::now() >= end) {
                error!(
                    in_flight = self.in_flight,
                    "a queue that failed has requests at the host that do not end"
                );
                std::process::abort();
            }
            self.wait(patience.map(|end| end.saturating_duration_since(Instant::now())));
        }
    }
}
