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
use crate::fd::SignalSlot;
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
}

/// The parts of its session that a ring needs to start.
pub(crate) struct Surroundings<'a, D> {
    pub device: &'a Arc<D>,
    pub table: &'a MemoryTable,
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
    /// one drains.
    pub(crate) fn stop_all<'a>(
        vrings: impl IntoIterator<Item = &'a mut Vring>,
        stop: Stop,
        hurry: &dyn Fn() -> bool,
    ) {
        let (vrings, workers): (Vec<_>, Vec<_>) = vrings
            .into_iter()
            .filter_map(|vring| vring.worker.take().map(|worker| (vring, worker)))
            .inspect(|(_, worker)| worker.tell(stop))
            .unzip();
        for (vring, exit) in vrings.into_iter().zip(Worker::join_all(workers, hurry)) {
            vring.base = exit.next_available;
            vring.broken |= exit.broken;
        }
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
        // Both QEMU and Cloud Hypervisor send a live ring's addresses again when dirty logging starts or ends.
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

    /// Starts the worker once the setup is complete. Errors are only logged: the frontend may still correct them.
    pub(crate) fn start<D: BlockDevice>(&mut self, surroundings: &Surroundings<'_, D>) {
        let (Some(size), Some(addresses), Some(kick)) = (self.size, self.addresses, &self.kick) else {
            return;
        };
        if self.is_running() || self.broken || !self.enabled {
            return;
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
            return;
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
        let ring = match Ring::new(&layout, &memory) {
            Ok(ring) => ring,
            Err(error) => {
                debug!(queue = self.index, %error, "the ring does not start");
                return;
            }
        };
        let kick = match kick.try_clone() {
            Ok(kick) => kick,
            Err(error) => {
                warn!(queue = self.index, %error, "the ring does not start: no file descriptor for its kicks");
                return;
            }
        };
        let started = Worker::start(WorkerSetup {
            index: self.index,
            device: Arc::clone(surroundings.device),
            resumed: ring.was_used(),
            ring,
            ring_size: size,
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
                info!(queue = self.index, size, base = self.base, "queue started");
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
