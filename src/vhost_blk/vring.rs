//! The frontend's settings for one queue, and the worker that runs once they are complete.
//!
//! A ring runs when it has a size, addresses in guest memory, a kick descriptor, and is enabled. Any message that
//! removes or changes one of these stops it, drained. It never runs half-configured.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::{debug, info, warn};
use vmm_sys_util::eventfd::EventFd;

use crate::config::{EVENT_INDEX, INDIRECT, PACKED};
use crate::control::{Shared, Stop, WorkerSetup};
use crate::device::BlockDevice;
use crate::dirty_log::DirtyLog;
use crate::fd::SignalSlot;
use crate::in_flight_region::Region;
use crate::memory::MemoryTable;
use crate::metrics::Metrics;
use crate::pulse::Pulse;
use crate::ring::{PackedRing, RingLayout, SplitRing};
use crate::virtqueue::Virtqueue;
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
    /// Where the ring goes on, in the form of `RingLayout::base`, while no worker runs. None until that is known.
    base: Option<u32>,
    /// The last worker of this session left nothing in flight.
    settled: bool,
    /// Since then the frontend has got the base. So whatever base it sends next counts, and no record of the old one.
    told: bool,
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
            vring.base = Some(exit.base);
            vring.settled = exit.settled;
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

    /// Sets where the ring goes on; false if the ring runs.
    pub(crate) fn set_base(&mut self, base: u32) -> bool {
        if self.is_running() {
            return false;
        }
        self.base = Some(base);
        self.broken = false;
        true
    }

    /// Where the ring goes on, after it was stopped; for a ring that never had a base, where a ring with these features
    /// begins. It stays stopped until it gets a new kick descriptor.
    pub(crate) fn take_base(&mut self, features: u64) -> u32 {
        self.drain();
        self.kick = None;
        self.broken = false;
        self.base_or_start(features)
    }

    /// Notes that the frontend gets the base of this stopped ring: the message is not refused.
    pub(crate) fn tell(&mut self) {
        self.told = self.settled;
    }

    fn base_or_start(&self, features: u64) -> u32 {
        let start = if features & PACKED != 0 { PackedRing::START_BASE } else { 0 };
        self.base.unwrap_or(start)
    }

    /// At the end of a session. If the frontend knows where the ring goes on, its record is given up: the frontend may
    /// begin anew, with whatever ring, before the next session.
    pub(crate) fn forget_told(&mut self, region: &Region) {
        if std::mem::take(&mut self.told) {
            region.empty_queue(self.index);
        }
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
            base: self.base_or_start(surroundings.features),
            event_index: surroundings.features & EVENT_INDEX != 0,
            indirect: surroundings.features & INDIRECT != 0,
        };
        if surroundings.features & PACKED != 0 {
            self.ready(&layout, addresses.used_log, kick, surroundings).map(Prepared::Packed)
        } else {
            self.ready(&layout, addresses.used_log, kick, surroundings).map(Prepared::Split)
        }
    }

    /// Finds the ring of a complete setup in guest memory.
    fn ready<R: Virtqueue, D>(
        &self,
        layout: &RingLayout,
        used_log: Option<u64>,
        kick: &EventFd,
        surroundings: &Surroundings<'_, D>,
    ) -> Option<Ready<R>> {
        let mut ring = match R::open(layout, &surroundings.table.memory()) {
            Ok(ring) => ring,
            Err(error) => {
                debug!(queue = self.index, %error, "the ring does not start");
                return None;
            }
        };
        if let (Some(log), Some(address)) = (surroundings.log, used_log)
            && let Err(error) = ring.log_writes(log, address, layout)
        {
            warn!(queue = self.index, "the ring does not start: its used ring cannot be logged in {error}");
            return None;
        }
        let kick = match kick.try_clone() {
            Ok(kick) => kick,
            Err(error) => {
                warn!(queue = self.index, %error, "the ring does not start: no file descriptor for its kicks");
                return None;
            }
        };
        // Whoever used an area knew the write cache, and kept it where the region has a place for it.
        let recorded = surroundings
            .region
            .is_some_and(|region| region.keeps_write_cache() && R::is_recorded(region, self.index));
        Some(Ready { ring, size: layout.size, kick, recorded: self.served || recorded })
    }

    /// Starts the worker of a ring that is prepared.
    pub(crate) fn run<D: BlockDevice>(&mut self, prepared: Prepared, surroundings: &Surroundings<'_, D>) {
        match prepared {
            Prepared::Split(ready) => self.run_kind(ready, surroundings),
            Prepared::Packed(ready) => self.run_kind(ready, surroundings),
        }
    }

    fn run_kind<D: BlockDevice, R: Virtqueue>(
        &mut self,
        ready: Ready<R>,
        surroundings: &Surroundings<'_, D>,
    ) {
        let Ready { mut ring, size, kick, recorded } = ready;
        surroundings.region.into_iter().for_each(|region| self.forget_told(region));
        (self.settled, self.told) = (false, false);
        let recovered = match surroundings.region.map(|region| ring.recover(region, self.index)).transpose() {
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
        let (base, in_flight) = (ring.base(), again.len());
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
pub(crate) enum Prepared {
    Split(Ready<SplitRing>),
    Packed(Ready<PackedRing>),
}

impl Prepared {
    /// The ring was served before, and nothing was recorded of that.
    pub(crate) fn is_unrecorded(&self) -> bool {
        let (was_used, recorded) = match self {
            Prepared::Split(ready) => (ready.ring.was_used(), ready.recorded),
            Prepared::Packed(ready) => (ready.ring.was_used(), ready.recorded),
        };
        was_used && !recorded
    }
}

/// A ring of one kind that may start.
pub(crate) struct Ready<R> {
    ring: R,
    size: u16,
    kick: EventFd,
    /// What is known of the write cache holds for it: it was served in this session, or with this region.
    recorded: bool,
}
