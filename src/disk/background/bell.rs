//! The housekeeper's bell: how other threads wake it, and what they tell it.
//!
//! Owns the flags and the waker, and knows nothing of the work.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

/// Wakes the housekeeper from other threads.
#[derive(Default)]
pub(crate) struct Bell {
    /// The housekeeper sleeps until rung. Stored (SeqCst) before its last check for work; rung after the work was
    /// created. So one of the two sees the other.
    listening: AtomicBool,
    /// The housekeeper has planned the next sweep of the map: it needs no notice that there is something to sweep.
    sweeping: AtomicBool,
    /// So many changes wait for a cut that one is due at once.
    hurry: AtomicBool,
    stop: AtomicBool,
    /// Leaf lock.
    waker: Mutex<Option<Waker>>,
}

impl Bell {
    /// There is work to do soon.
    pub fn ring(&self) {
        if self.listening.load(Ordering::SeqCst) && self.listening.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// A cut is due at once.
    pub fn hurry(&self) {
        if !self.hurry.load(Ordering::Relaxed) && !self.hurry.swap(true, Ordering::SeqCst) {
            self.wake();
        }
    }

    pub fn wake(&self) {
        let waker = self.waker.lock().expect("no panic under this lock").take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// A housekeeper begins: the stop was for the last one, which has ended.
    pub fn begin(&self) {
        self.stop.store(false, Ordering::SeqCst);
    }

    /// The housekeeper is to end after its present work.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Names the task to wake, instead of any named before.
    pub fn set_waker(&self, waker: &Waker) {
        *self.waker.lock().expect("no panic under this lock") = Some(waker.clone());
    }

    /// From now on a ring wakes the housekeeper, or not. It must look for work once more after this.
    pub fn listen(&self, listen: bool) {
        self.listening.store(listen, Ordering::SeqCst);
    }

    /// True until a ring, after [`Bell::listen`].
    pub fn is_listening(&self) -> bool {
        self.listening.load(Ordering::SeqCst)
    }

    /// Records whether the housekeeper has planned a sweep of the map.
    pub fn set_sweeping(&self, sweeping: bool) {
        self.sweeping.store(sweeping, Ordering::SeqCst);
    }

    /// True if the housekeeper has planned a sweep of the map.
    pub fn is_sweeping(&self) -> bool {
        self.sweeping.load(Ordering::SeqCst)
    }

    /// True if a cut is due at once.
    pub fn is_hurried(&self) -> bool {
        self.hurry.load(Ordering::SeqCst)
    }

    /// As [`Bell::is_hurried`]; the notice is used up.
    pub fn take_hurry(&self) -> bool {
        self.hurry.swap(false, Ordering::SeqCst)
    }
}
