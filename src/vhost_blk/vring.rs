//! The frontend's settings for one queue, and the worker that runs once they are complete.
//!
//! A ring runs when it has a size, addresses in guest memory, a kick descriptor, and is enabled. Any message that
//! removes or changes one of these stops it, drained. It never runs half-configured.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::{debug, info, warn};
use vmm_sys_util::eventfd::EventFd;

use crate::config::{EVENT_INDEX, INDIRECT};
use crate::control::{Shared, Stop, WorkerSetup};
use crate::device::BlockDevice;
use crate::dirty_log::{DirtyLog, UsedRingLog};
use crate::error::RingError;
use crate::fd::SignalSlot;
use crate::in_flight_region::{AreaError, QueueArea, Recovered, Region, RingIndexes, SplitTracker};
use crate::memory::MemoryTable;
use crate::metrics::Metrics;
use crate::pulse::Pulse;
use crate::ring::{Ring, RingLayout};
use crate::worker::Worker;

/// A ring's parts by their addresses in the frontend's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UserAddresses {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// The guest address at which writes to the used ring are logged, if they are to be.
    pub used_log: Option<u64>,
}

/// The parts of its session that a ring needs to start.
pub(crate) struct Surroundings<'a, D> {
    pub device: &'a Arc<D>,
    pub table: &'a MemoryTable,
    /// The in-flight region, if the frontend keeps one.
    pub region: Option<&'a Region>,
    /// The log of writes to guest memory, while they are logged.
    pub log: Option<&'a Arc<DirtyLog>>,
    pub shared: &'a Arc<Shared>,
    pub metrics: &'a Arc<Metrics>,
    pub pulse: &'a Arc<Pulse>,
    /// The virtio features in force.
    pub features: u64,
    pub poll_max: Duration,
}

/// One queue.
#[derive(Default)]
pub(crate) struct Vring {
    index: u16,
    size: Option<u16>,
    addresses: Option<UserAddresses>,
    /// The next index in the available ring, while no worker runs.
    base: u16,
    kick: Option<EventFd>,
    pub call: Arc<SignalSlot>,
    pub error: Arc<SignalSlot>,
    pub enabled: bool,
    /// The ring was corrupt, or its worker failed: it stays stopped until it is set up again.
    broken: bool,
    /// A worker of this session has served it.
    served: bool,
    /// A stop was to make everything durable, and its worker did not.
    unflushed: bool,
    worker: Option<Worker>,
}

impl Vring {
    pub(crate) fn new(index: u16) -> Self {
        Vring { index, ..Vring::default() }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.worker.is_some()
    }

    /// Stops the workers of all these rings that run. All are told first, so that none goes on serving while another
    /// one drains. False if the stop is to make everything durable and a ring's worker did not: it could not, or it had
    /// failed before, or nobody waits for the rest of a pause any more. Such a ring has the same answer until it starts
    /// again.
    pub(crate) fn stop_all<'a>(
        vrings: impl IntoIterator<Item = &'a mut Vring>,
        stop: Stop,
        hurry: &dyn Fn() -> bool,
    ) -> bool {
        let (running, stopped): (Vec<_>, Vec<_>) =
            vrings.into_iter().partition(|vring| vring.worker.is_some());
        let mut durable = stopped.iter().all(|vring| !vring.unflushed);
        let (vrings, workers): (Vec<_>, Vec<_>) = running
            .into_iter()
            .filter_map(|vring| vring.worker.take().map(|worker| (vring, worker)))
            .inspect(|(_, worker)| worker.tell(stop))
            .unzip();
        for (vring, exit) in vrings.into_iter().zip(Worker::join_all(workers, hurry)) {
            vring.base = exit.next_available;
            vring.broken |= exit.broken;
            vring.unflushed = stop.flushes() && !exit.flushed;
            durable &= !vring.unflushed;
        }
        durable || !stop.flushes()
    }

    /// Stops the worker, if there is one, as soon as possible.
    pub(crate) fn drain(&mut self) {
        Self::stop_all([self], Stop::Drain, &|| false);
    }

    /// Sets the number of descriptors; false if it cannot change now.
    pub(crate) fn set_size(&mut self, size: u16) -> bool {
        if self.is_running() && self.size != Some(size) {
            return false;
        }
        self.size = Some(size);
        true
    }

    /// Sets the next index in the available ring; false if the ring runs.
    pub(crate) fn set_base(&mut self, base: u16) -> bool {
        if self.is_running() {
            return false;
        }
        self.base = base;
        self.broken = false;
        true
    }

    /// The next index in the available ring of a stopped ring. It stays stopped until it gets a new kick descriptor.
    pub(crate) fn take_base(&mut self) -> u16 {
        self.drain();
        self.kick = None;
        self.broken = false;
        self.base
    }

    pub(crate) fn set_addresses(&mut self, addresses: UserAddresses) {
        // Both QEMU and Cloud Hypervisor send a live ring's addresses again when dirty logging starts or ends. Then the
        // ring starts anew, so that no request in flight escapes the log.
        if self.addresses == Some(addresses) {
            return;
        }
        self.drain();
        self.broken = false;
        self.addresses = Some(addresses);
    }

    pub(crate) fn set_kick(&mut self, kick: Option<EventFd>) {
        self.drain();
        self.broken = false;
        self.kick = kick;
    }

    /// Prepares the ring once its setup is complete; [`Vring::run`] then starts the worker. Errors are only logged: the
    /// frontend may still correct them.
    pub(crate) fn prepare<D>(&mut self, surroundings: &Surroundings<'_, D>) -> Option<Prepared> {
        let (Some(size), Some(addresses), Some(kick)) = (self.size, self.addresses, &self.kick) else {
            return None;
        };
        if self.is_running() || self.broken || !self.enabled {
            return None;
        }
        let table = surroundings.table;
        let memory = table.memory();
        let guest = |user| table.guest_address(user);
        let (Some(descriptors), Some(available), Some(used)) =
            (guest(addresses.descriptors), guest(addresses.available), guest(addresses.used))
        else {
            debug!(queue = self.index, ?addresses, "the ring is not in guest memory; it does not start");
            // Later this may be true for a moment, while the frontend replaces regions.
            if !surroundings.shared.started.load(Ordering::Relaxed) {
                surroundings.shared.tell_unshared(self.index);
            }
            return None;
        };
        let layout = RingLayout {
            size,
            descriptors,
            available,
            used,
            base: self.base,
            event_index: surroundings.features & EVENT_INDEX != 0,
            indirect: surroundings.features & INDIRECT != 0,
        };
        let mut ring = match Ring::new(&layout, &memory) {
            Ok(ring) => ring,
            Err(error) => {
                debug!(queue = self.index, %error, "the ring does not start");
                return None;
            }
        };
        if let (Some(log), Some(address)) = (surroundings.log, addresses.used_log) {
            match UsedRingLog::new(Arc::clone(log), address, Ring::used_bytes(size)) {
                Ok(log) => ring.log_used_ring(log),
                Err(error) => {
                    warn!(
                        queue = self.index,
                        "the ring does not start: its used ring cannot be logged in {error}"
                    );
                    return None;
                }
            }
        }
        let kick = match kick.try_clone() {
            Ok(kick) => kick,
            Err(error) => {
                warn!(queue = self.index, %error, "the ring does not start: no file descriptor for its kicks");
                return None;
            }
        };
        let area = surroundings.region.map(|region| region.queue(self.index));
        // Whoever used an area knew the write cache, and kept it where the region has a place for it.
        let recorded = surroundings.region.is_some_and(Region::keeps_write_cache)
            && area.iter().flatten().any(SplitTracker::was_used);
        let recorded = self.served || recorded;
        Some(Prepared { ring, size, kick, area, recorded })
    }

    /// Starts the worker of a ring that is prepared.
    pub(crate) fn run<D: BlockDevice>(&mut self, prepared: Prepared, surroundings: &Surroundings<'_, D>) {
        let Prepared { mut ring, size, kick, area, recorded } = prepared;
        let recovered = match area.map(|area| recover(area, size, &mut ring)).transpose() {
            Ok(recovered) => recovered,
            Err(error) => {
                warn!(queue = self.index, "the queue cannot start: {error}");
                self.broken = true;
                self.error.raise();
                return;
            }
        };
        let (tracker, again) =
            recovered.map_or((None, Vec::new()), |recovered| (Some(recovered.tracker), recovered.in_flight));
        let (base, in_flight) = (ring.next_available(), again.len());
        let started = Worker::start(WorkerSetup {
            index: self.index,
            device: Arc::clone(surroundings.device),
            // A used index may have come round to 0.
            resumed: ring.was_used() || recorded,
            ring,
            ring_size: size,
            tracker,
            again,
            log: surroundings.log.cloned(),
            shared: Arc::clone(surroundings.shared),
            kick,
            call: Arc::clone(&self.call),
            error: Arc::clone(&self.error),
            metrics: Arc::clone(surroundings.metrics),
            pulse: Arc::clone(surroundings.pulse),
            poll_max: surroundings.poll_max,
        });
        match started {
            Ok(worker) => {
                // A guest may have its rings start anew as often as it likes.
                if std::mem::replace(&mut self.served, true) {
                    debug!(queue = self.index, size, base, in_flight, "queue started again");
                } else {
                    info!(queue = self.index, size, base, in_flight, "queue started");
                }
                self.unflushed = false;
                surroundings.shared.started.store(true, Ordering::Relaxed);
                self.worker = Some(worker);
            }
            Err(error) => {
                warn!(queue = self.index, %error, "the queue cannot start");
                self.broken = true;
                self.error.raise();
            }
        }
    }
}

/// A ring that may start.
pub(crate) struct Prepared {
    ring: Ring,
    size: u16,
    kick: EventFd,
    /// Where the frontend keeps a region: its area there, if it has one.
    area: Option<Option<QueueArea>>,
    /// What is known of the write cache holds for it: it was served in this session, or with this region.
    recorded: bool,
}

impl Prepared {
    /// The ring was served before, and nothing was recorded of that.
    pub(crate) fn is_unrecorded(&self) -> bool {
        self.ring.was_used() && !self.recorded
    }
}

/// The reasons why a queue with an in-flight region does not start.
#[derive(Debug, thiserror::Error)]
enum RecoverError {
    #[error("{0}")]
    Ring(#[from] RingError),
    #[error("the in-flight region has no area for it")]
    NoArea,
    #[error("its area in the in-flight region cannot be true: {0}")]
    Area(#[from] AreaError),
}

/// Takes the ring over from whoever served it last. It continues after the chains in flight: the frontend's base may
/// already count chains that nobody has taken.
fn recover(area: Option<QueueArea>, size: u16, ring: &mut Ring) -> Result<Recovered, RecoverError> {
    let area = area.ok_or(RecoverError::NoArea)?;
    let indexes = RingIndexes { size, available: ring.available_index()?, used: ring.next_used() };
    let recovered = SplitTracker::recover(area, indexes)?;
    // At most as many as the ring has descriptors.
    ring.resume(recovered.in_flight.len() as u16);
    Ok(recovered)
}
