//! The atomics, locks and fences for state that threads share outside the engine's lock.
//!
//! They are the standard library's, or loom's in a build with `--cfg loom`. Loom tries every interleaving that the
//! memory model allows (loom_tests.rs). This file owns that choice only, and never changes the behaviour of a normal
//! build.
//!
//! `Arc` is not here: no code relies on the order of its count, and loom's cannot be a receiver (`self: &Arc<Self>`).

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard, OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};

/// Atomics that all hold zero.
pub(crate) fn zeroed<const N: usize>() -> [AtomicU64; N] {
    #[cfg(not(loom))]
    return [const { AtomicU64::new(0) }; N];
    // Loom identifies an atomic by when it was created, so a constant cannot create one.
    #[cfg(loom)]
    return std::array::from_fn(|_| AtomicU64::new(0));
}

/// Replaces `std::sync::OnceLock`, which loom lacks, where one thread at a time initialises. An acquire load sees what
/// the one release store published, and no more than that.
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
        // No loom operation runs while the std lock is held: loom must not switch threads there.
        let value = init();
        assert!(self.value.set(value).is_ok(), "one thread at a time initialises");
        self.ready.store(true, Ordering::Release);
        self.get().expect("initialised")
    }
}
