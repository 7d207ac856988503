//! The atomics, locks and fences of what threads share outside the engine's lock.
//!
//! They are the standard library's own, or, in a build with `--cfg loom`, loom's, which try every interleaving that the
//! memory model allows (loom_tests.rs). Owns that choice only; never anything that a normal build would notice.
//!
//! `Arc` is not here: nothing relies on the order of its count, and loom's cannot be a receiver (`self: &Arc<Self>`).

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};

/// Atomics that all hold zero.
pub(crate) fn zeroed<const N: usize>() -> [AtomicU64; N] {
    #[cfg(not(loom))]
    return [const { AtomicU64::new(0) }; N];
    // Loom's are told apart by when they are made: no constant can make them.
    #[cfg(loom)]
    return std::array::from_fn(|_| AtomicU64::new(0));
}

/// Stands for `std::sync::OnceLock`, which loom lacks, where one thread at a time initialises: an acquire load sees what
/// the one release store published, and nothing more than that.
#[cfg(loom)]
pub(crate) struct OnceLock<T> {
    ready: AtomicBool,
    value: std::sync::OnceLock<T>,
}

#[cfg(loom)]
impl<T> OnceLock<T> {
    pub fn new() -> Self {
        OnceLock { ready: AtomicBool::new(false), value: std::sync::OnceLock::new() }
    }

    pub fn get(&self) -> Option<&T> {
        if self.ready.load(Ordering::Acquire) { self.value.get() } else { None }
    }

    pub fn get_or_init(&self, init: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.get() {
            return value;
        }
        // Nothing of loom's is waited for in here: loom may switch threads only where the std lock is not held.
        let value = init();
        assert!(self.value.set(value).is_ok(), "one thread at a time initialises");
        self.ready.store(true, Ordering::Release);
        self.get().expect("initialised")
    }
}
