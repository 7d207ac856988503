//! The cost of a piece of work on its own thread: its peak heap and its processor time.
//!
//! Owns the counting allocator, which every program that links this package uses. C code (zstd) has its own
//! allocator, and allocations of other threads are not counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The system's allocator, with a count of the bytes that this thread holds.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// Bytes allocated but not freed on this thread, and their peak. Negative if others' allocations are freed.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(change: isize) {
    // At the end of a thread the counter no longer exists.
    let _ = HELD.try_with(|held| {
        let (now, most) = held.get();
        let now = now + change;
        held.set((now, most.max(now)));
    });
}

// SAFETY: every call is passed unchanged to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are those that the system's allocator requires.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // During the move both allocations may exist.
        count(size as isize);
        // SAFETY: as above.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        count(-(layout.size() as isize));
        moved
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) };
    }
}

/// The cost of a piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Peak bytes of heap, above those held before.
    pub bytes: usize,
    /// Processor time of the thread.
    pub time: Duration,
}

/// Runs a piece of work and returns its cost.
pub fn measure<T>(work: impl FnOnce() -> T) -> (T, Cost) {
    let before = HELD.with(|held| {
        let (now, _) = held.get();
        held.set((now, now));
        now
    });
    let started = thread_time();
    let result = work();
    let time = thread_time() - started;
    let most = HELD.with(|held| held.get().1);
    (result, Cost { bytes: usize::try_from(most - before).unwrap_or(0), time })
}

/// The processor time of this thread. On a busy machine wall-clock time would not measure the work.
fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
