//! The two kinds of virtqueue as a worker uses them: a ring, and its record in the in-flight region.
//!
//! A worker is compiled once for each kind, so serving a ring costs no choice between them. Nothing here has state.

use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::dirty_log::{DirtyLog, LogError, PartLog};
use crate::error::RingError;
use crate::in_flight_region::{
    AreaError, Packed, PackedTracker, Region, RingIndexes, RingKind, Split, SplitTracker,
};
use crate::memory::GuestMemory;
use crate::ring::{Chain, PackedRing, RecordedChain, RingLayout, SplitRing, Used};

/// A ring of one kind. What its functions do is described at those of [`SplitRing`] and [`PackedRing`] of the same names.
pub(crate) trait Virtqueue: Sized + Send + 'static {
    const KIND: RingKind;
    /// The record of its chains in flight.
    type Tracker: Tracker + Send + 'static;
    /// What the record says of a chain in flight.
    type Recorded: Send + 'static;

    fn open(layout: &RingLayout, memory: &Arc<GuestMemory>) -> Result<Self, RingError>;
    /// Logs all writes to the ring from now on. `address`: where the frontend has those logged that go to what the layout
    /// calls `used`.
    fn log_writes(&mut self, log: &Arc<DirtyLog>, address: u64, layout: &RingLayout) -> Result<(), LogError>;
    /// Whether the area of a queue was used before; `false` if there is none.
    fn is_recorded(region: &Region, index: u16) -> bool;
    /// Takes the ring over from whoever served it last.
    fn recover(&mut self, region: &Region, index: u16) -> Result<Recovered<Self>, RecoverError>;
    /// Where the ring goes on, in the form of [`RingLayout::base`].
    fn base(&self) -> u32;
    /// Counts chains that were taken and not put back, from any number on.
    fn sequence(&self) -> u16;
    fn was_used(&self) -> bool;
    fn available(&mut self) -> Result<u16, RingError>;
    fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), RingError>;
    fn take_again(
        &mut self,
        recorded: &Self::Recorded,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<(), RingError>;
    fn put_back(&mut self, head: u16);
    fn push_used(&mut self, used: &[Used]) -> Result<(), RingError>;
    fn needs_notification(&mut self) -> Result<bool, RingError>;
    fn enable_kicks(&mut self) -> Result<bool, RingError>;
    fn disable_kicks(&mut self) -> Result<(), RingError>;
    fn writable(&self, bytes: u64) -> impl Iterator<Item = (u64, u32)>;
    /// Records the chain that was last popped.
    fn record(&self, tracker: &mut Self::Tracker, head: u16);
    /// Records that the listed chains of this batch were given back.
    fn clear(&self, tracker: &mut Self::Tracker, heads: impl Iterator<Item = u16>);
}

/// The record of the chains in flight of one ring.
pub(crate) trait Tracker {
    /// Lists the chains that are about to be given back.
    fn list(&mut self, heads: impl Iterator<Item = u16>);
    /// Notes that a chain goes back into the ring, as every chain taken after it does. It stays recorded until the area is
    /// given up.
    fn put_back(&mut self, head: u16);
    /// Gives the area up: nothing is in flight.
    fn close(self);
}

/// A ring that was taken over: its record, and the chains to do again, in this order.
pub(crate) struct Recovered<R: Virtqueue> {
    pub tracker: R::Tracker,
    pub in_flight: Vec<R::Recorded>,
}

/// The reasons why a queue with an in-flight region does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoverError {
    #[error("{0}")]
    Ring(#[from] RingError),
    #[error("the in-flight region has no area for it")]
    NoArea,
    #[error("the in-flight region is for the other kind of rings, split or packed")]
    OtherKind,
    #[error("its area in the in-flight region cannot be true: {0}")]
    Area(#[from] AreaError),
}

fn no_area(region: &Region, wanted: RingKind) -> RecoverError {
    if region.kind() == wanted { RecoverError::NoArea } else { RecoverError::OtherKind }
}

impl Virtqueue for SplitRing {
    const KIND: RingKind = RingKind::Split;
    type Tracker = SplitTracker;
    type Recorded = u16;

    fn open(layout: &RingLayout, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        Self::new(layout, memory)
    }

    fn log_writes(&mut self, log: &Arc<DirtyLog>, address: u64, layout: &RingLayout) -> Result<(), LogError> {
        self.log_used_ring(PartLog::new(
            Arc::clone(log),
            GuestAddress(address),
            Self::used_bytes(layout.size),
        )?);
        Ok(())
    }

    fn is_recorded(region: &Region, index: u16) -> bool {
        region.queue::<Split>(index).as_ref().is_some_and(SplitTracker::was_used)
    }

    /// It continues after the chains in flight: the frontend's base may already count chains that nobody has taken.
    fn recover(&mut self, region: &Region, index: u16) -> Result<Recovered<Self>, RecoverError> {
        let area = region.queue(index).ok_or_else(|| no_area(region, Self::KIND))?;
        let indexes =
            RingIndexes { size: self.size(), available: self.available_index()?, used: self.next_used() };
        let recovered = SplitTracker::recover(area, indexes)?;
        // At most as many as the ring has descriptors.
        self.resume(recovered.in_flight.len() as u16);
        Ok(Recovered { tracker: recovered.tracker, in_flight: recovered.in_flight })
    }

    fn base(&self) -> u32 {
        u32::from(self.next_available())
    }

    fn sequence(&self) -> u16 {
        self.next_available()
    }

    fn was_used(&self) -> bool {
        SplitRing::was_used(self)
    }

    #[inline]
    fn available(&mut self) -> Result<u16, RingError> {
        SplitRing::available(self)
    }

    #[inline]
    fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), RingError> {
        SplitRing::pop(self, memory, chain)
    }

    fn take_again(&mut self, head: &u16, memory: &GuestMemory, chain: &mut Chain) -> Result<(), RingError> {
        SplitRing::take_again(self, *head, memory, chain)
    }

    fn put_back(&mut self, head: u16) {
        SplitRing::put_back(self, head);
    }

    #[inline]
    fn push_used(&mut self, used: &[Used]) -> Result<(), RingError> {
        SplitRing::push_used(self, used)
    }

    #[inline]
    fn needs_notification(&mut self) -> Result<bool, RingError> {
        SplitRing::needs_notification(self)
    }

    fn enable_kicks(&mut self) -> Result<bool, RingError> {
        SplitRing::enable_kicks(self)
    }

    fn disable_kicks(&mut self) -> Result<(), RingError> {
        SplitRing::disable_kicks(self)
    }

    fn writable(&self, bytes: u64) -> impl Iterator<Item = (u64, u32)> {
        SplitRing::writable(self, bytes)
    }

    #[inline]
    fn record(&self, tracker: &mut SplitTracker, head: u16) {
        tracker.begin(head);
    }

    #[inline]
    fn clear(&self, tracker: &mut SplitTracker, heads: impl Iterator<Item = u16>) {
        tracker.clear(heads, self.next_used());
    }
}

impl Tracker for SplitTracker {
    #[inline]
    fn list(&mut self, heads: impl Iterator<Item = u16>) {
        SplitTracker::list(self, heads);
    }

    /// Until then a successor does it before anything that is in the ring. Afterwards nothing is recorded.
    fn put_back(&mut self, _: u16) {}

    fn close(self) {
        SplitTracker::close(self);
    }
}

impl Virtqueue for PackedRing {
    const KIND: RingKind = RingKind::Packed;
    type Tracker = PackedTracker;
    type Recorded = RecordedChain;

    fn open(layout: &RingLayout, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        Self::new(layout, memory)
    }

    /// The frontend names an address for the device's event suppression only. Descriptors are logged where they are.
    fn log_writes(&mut self, log: &Arc<DirtyLog>, address: u64, layout: &RingLayout) -> Result<(), LogError> {
        let event = PartLog::new(Arc::clone(log), GuestAddress(address), Self::DEVICE_EVENT_BYTES)?;
        let bytes = Self::descriptor_bytes(layout.size);
        PackedRing::log_writes(
            self,
            PartLog::new(Arc::clone(log), GuestAddress(layout.descriptors), bytes)?,
            event,
        );
        Ok(())
    }

    fn is_recorded(region: &Region, index: u16) -> bool {
        region.queue::<Packed>(index).as_ref().is_some_and(PackedTracker::was_used)
    }

    fn recover(&mut self, region: &Region, index: u16) -> Result<Recovered<Self>, RecoverError> {
        let area = region.queue(index).ok_or_else(|| no_area(region, Self::KIND))?;
        let recovered = PackedTracker::recover(area, self)?;
        Ok(Recovered { tracker: recovered.tracker, in_flight: recovered.in_flight })
    }

    fn base(&self) -> u32 {
        PackedRing::base(self)
    }

    fn sequence(&self) -> u16 {
        self.taken()
    }

    fn was_used(&self) -> bool {
        PackedRing::was_used(self)
    }

    #[inline]
    fn available(&mut self) -> Result<u16, RingError> {
        PackedRing::available(self)
    }

    #[inline]
    fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), RingError> {
        PackedRing::pop(self, memory, chain)
    }

    fn take_again(
        &mut self,
        recorded: &RecordedChain,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        PackedRing::take_again(self, recorded, memory, chain)
    }

    fn put_back(&mut self, head: u16) {
        PackedRing::put_back(self, head);
    }

    #[inline]
    fn push_used(&mut self, used: &[Used]) -> Result<(), RingError> {
        PackedRing::push_used(self, used)
    }

    #[inline]
    fn needs_notification(&mut self) -> Result<bool, RingError> {
        PackedRing::needs_notification(self)
    }

    fn enable_kicks(&mut self) -> Result<bool, RingError> {
        PackedRing::enable_kicks(self)
    }

    fn disable_kicks(&mut self) -> Result<(), RingError> {
        PackedRing::disable_kicks(self)
    }

    fn writable(&self, bytes: u64) -> impl Iterator<Item = (u64, u32)> {
        PackedRing::writable(self, bytes)
    }

    #[inline]
    fn record(&self, tracker: &mut PackedTracker, head: u16) {
        tracker.begin(head, self.last_chain());
    }

    #[inline]
    fn clear(&self, tracker: &mut PackedTracker, heads: impl Iterator<Item = u16>) {
        tracker.clear(heads);
    }
}

impl Tracker for PackedTracker {
    #[inline]
    fn list(&mut self, heads: impl Iterator<Item = u16>) {
        PackedTracker::list(self, heads);
    }

    fn put_back(&mut self, head: u16) {
        PackedTracker::put_back(self, head);
    }

    /// The area keeps the position in the ring, which is nowhere else once the frontend has lost this daemon.
    fn close(self) {
        PackedTracker::close(self);
    }
}
