//! The fields of the in-flight region, as atomics that other processes see.
//!
//! Every load acquires and every store releases. So the stores of one worker reach the memory in the order of its
//! program, which is all that a successor relies on: it finds the state after some number of them
//! (docs/concurrency.md, "The in-flight region"). On x86 that order costs nothing.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::AtomicInteger;

use super::layout::{ENTRY_BYTES, HEADER_BYTES};

/// A number in shared memory.
#[derive(Debug)]
#[repr(transparent)]
pub(super) struct Cell<A>(A);

impl<A: AtomicInteger> Cell<A> {
    #[inline]
    pub(super) fn load(&self) -> A::V {
        self.0.load(Ordering::Acquire)
    }

    #[inline]
    pub(super) fn store(&self, value: A::V) {
        #[cfg(test)]
        death::step();
        self.0.store(value, Ordering::Release);
    }
}

/// The beginning of a queue's area: QueueRegionSplit of the specification.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Header {
    /// Feature flags. None are defined.
    pub features: Cell<AtomicU64>,
    /// 1, or 0 while the area holds nothing.
    pub version: Cell<AtomicU16>,
    /// The number of descriptor states after the header.
    pub desc_num: Cell<AtomicU16>,
    /// The head that was listed last: the beginning of the last batch.
    pub last_batch_head: Cell<AtomicU16>,
    /// The ring's used index up to which no state is in flight any more.
    pub used_idx: Cell<AtomicU16>,
}

/// The state of one descriptor: DescStateSplit of the specification. It is in use for heads of chains only.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Entry {
    /// 1 while the chain is in flight, else 0.
    pub inflight: Cell<AtomicU8>,
    _padding: [AtomicU8; 5],
    /// The head that was listed before this one.
    pub next: Cell<AtomicU16>,
    /// Grows from chain to chain, in the order in which they were taken.
    pub counter: Cell<AtomicU64>,
}

/// Strata's own page behind the areas. A successor of a later version may find a longer page of an earlier one zeroed.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Own {
    /// [`MAGIC`], or the page is somebody else's.
    pub magic: Cell<AtomicU64>,
    /// [`OWN_VERSION`].
    pub version: Cell<AtomicU32>,
    /// What the guest last set its write cache to: 0 if unknown, 1 for off, 2 for on.
    pub write_cache: Cell<AtomicU8>,
}

/// Marks Strata's page.
pub(super) const MAGIC: u64 = u64::from_ne_bytes(*b"STRATAIF");
/// The version of Strata's page.
pub(super) const OWN_VERSION: u32 = 1;

const _: () = assert!(size_of::<Header>() == HEADER_BYTES && size_of::<Entry>() == ENTRY_BYTES);
const _: () = assert!(align_of::<Header>() <= 8 && align_of::<Entry>() <= 8 && align_of::<Own>() <= 8);

/// A worker that dies before any store that a test chooses.
#[cfg(test)]
pub(super) mod death {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    struct Died;

    /// Called before every store: the moment of death if the count has run out.
    pub(in crate::in_flight_region) fn step() {
        match LEFT.get() {
            None => {}
            Some(0) => resume_unwind(Box::new(Died)),
            Some(left) => LEFT.set(Some(left - 1)),
        }
    }

    /// Works until `stores` stores are done and dies before the next; `None` if it died.
    pub(in crate::in_flight_region) fn after<T>(stores: u32, work: impl FnOnce() -> T) -> Option<T> {
        LEFT.set(Some(stores));
        let result = catch_unwind(AssertUnwindSafe(work));
        LEFT.set(None);
        match result {
            Ok(value) => Some(value),
            Err(panic) if panic.is::<Died>() => None,
            Err(panic) => resume_unwind(panic),
        }
    }
}
