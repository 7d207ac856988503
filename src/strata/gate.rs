//! The gate between a session and its disk. While it is closed no request passes, and each queue lets the disk go as soon
//! as its requests have ended.
//!
//! Owns why the gate is closed and which queues have let go. It knows no disk (docs/concurrency.md, "The gate").

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Somebody paused the disk, until it is resumed.
const PAUSED: u8 = 1;
/// The disk is being changed.
const CHANGING: u8 = 2;

/// Why the gate did not close: it is as open as before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotClosed {
    /// Requests were still in flight at the end of the wait.
    #[error("requests are still in flight after {} s", waited.as_secs())]
    Busy {
        /// How long was waited.
        waited: Duration,
    },
    /// It was opened meanwhile.
    #[error("the disk was resumed meanwhile")]
    Opened,
}

/// The gate of one device.
#[derive(Default)]
pub struct Gate {
    /// Why it is closed: bits of [`PAUSED`] and [`CHANGING`]. It is open at 0. Stored under the lock. A worker loads it without, and looks again under the
    /// lock before it acts on it, so Relaxed is enough.
    reasons: AtomicU8,
    /// A leaf lock.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    seats: Vec<Place>,
    next: u64,
}

/// A queue as the gate sees it.
struct Place {
    number: u64,
    /// It has the disk.
    inside: bool,
    /// Ends the queue's wait.
    notify: Arc<dyn Fn() + Send + Sync>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True while the disk is paused.
    pub fn is_paused(&self) -> bool {
        self.reasons.load(Ordering::Relaxed) & PAUSED != 0
    }

    /// A seat for the calling thread's queue, which has the disk. `notify` ends the queue's wait.
    pub fn seat(self: &Arc<Self>, notify: Arc<dyn Fn() + Send + Sync>) -> Seat {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.seats.push(Place { number, inside: true, notify });
        Seat { gate: Arc::clone(self), number }
    }

    /// Closes the gate until [`Gate::resume`], and waits until every queue has let the disk go. If it is paused already,
    /// it only waits.
    ///
    /// # Errors
    /// When requests are in flight for longer than `patience`, or it is resumed meanwhile. Then it is open.
    pub fn pause(&self, patience: Duration) -> Result<(), NotClosed> {
        self.close(PAUSED, patience)
    }

    /// As [`Gate::pause`], until the result is dropped: for a change of the disk. One at a time.
    ///
    /// # Errors
    /// When requests are in flight for longer than `patience`.
    pub fn close_for_change(&self, patience: Duration) -> Result<Change<'_>, NotClosed> {
        self.close(CHANGING, patience)?;
        Ok(Change(self))
    }

    fn close(&self, reason: u8, patience: Duration) -> Result<(), NotClosed> {
        let mut state = self.state();
        self.reasons.fetch_or(reason, Ordering::Relaxed);
        self.call_all(&state);
        let deadline = Instant::now() + patience;
        while state.seats.iter().any(|place| place.inside) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.open(reason, &state);
                return Err(NotClosed::Busy { waited: patience });
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            if self.reasons.load(Ordering::Relaxed) & reason == 0 {
                return Err(NotClosed::Opened);
            }
        }
        Ok(())
    }

    /// Ends a pause. The gate opens, unless the disk is being changed.
    pub fn resume(&self) {
        self.open(PAUSED, &self.state());
    }

    fn open(&self, reason: u8, state: &State) {
        self.reasons.fetch_and(!reason, Ordering::Relaxed);
        self.call_all(state);
        self.changed.notify_all();
    }

    /// Ends the wait of every queue. A notifier takes no lock, so this may be done under ours.
    fn call_all(&self, state: &State) {
        state.seats.iter().for_each(|place| (place.notify)());
    }
}

/// A change of the disk, for which the gate is closed. Dropping it opens the gate, unless the disk is paused.
#[must_use]
pub struct Change<'a>(&'a Gate);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.open(CHANGING, &self.0.state());
    }
}

/// A queue's place at the gate. Dropping it leaves the gate: the queue has let the disk go by then.
pub struct Seat {
    gate: Arc<Gate>,
    number: u64,
}

impl Seat {
    /// True if no request may pass.
    #[inline]
    pub fn is_shut(&self) -> bool {
        self.gate.reasons.load(Ordering::Relaxed) != 0
    }

    /// True if no request may pass before somebody resumes the disk.
    pub fn is_paused(&self) -> bool {
        self.gate.is_paused()
    }

    /// The queue has let the disk go.
    pub fn go_out(&self) {
        self.put(&mut self.gate.state(), false);
        self.gate.changed.notify_all();
    }

    /// True if the gate is open: the queue may take the disk again, and whoever closes the gate waits for it.
    #[must_use]
    pub fn go_in(&self) -> bool {
        let mut state = self.gate.state();
        let open = !self.is_shut();
        if open {
            self.put(&mut state, true);
        }
        open
    }

    fn put(&self, state: &mut State, inside: bool) {
        let own = state.seats.iter_mut().find(|place| place.number == self.number);
        own.expect("a seat is at its gate until it is dropped").inside = inside;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.gate.state().seats.retain(|place| place.number != self.number);
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    const SOON: Duration = Duration::from_millis(5);
    const PATIENCE: Duration = Duration::from_secs(60);

    fn seat(gate: &Arc<Gate>) -> (Seat, Arc<AtomicU32>) {
        let calls = Arc::new(AtomicU32::new(0));
        let counts = Arc::clone(&calls);
        let seat = gate.seat(Arc::new(move || {
            counts.fetch_add(1, Ordering::Relaxed);
        }));
        (seat, calls)
    }

    #[test]
    fn it_closes_when_every_queue_has_let_go_and_opens_for_all() {
        let gate = Arc::new(Gate::default());
        let (first, second) = (seat(&gate), seat(&gate));
        first.0.go_out();
        let closing = {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || gate.pause(PATIENCE))
        };
        while second.1.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        assert!(second.0.is_shut() && !first.0.go_in(), "nobody gets in any more");
        assert!(!closing.is_finished(), "one has the disk");
        second.0.go_out();
        assert_eq!(closing.join().expect("no panic"), Ok(()));
        assert_eq!(gate.pause(SOON), Ok(()), "it is paused already");
        gate.resume();
        assert!(first.1.load(Ordering::Relaxed) >= 2 && !first.0.is_shut() && first.0.go_in());
    }

    #[test]
    fn a_change_leaves_a_paused_disk_paused_and_a_pause_a_change() {
        let gate = Arc::new(Gate::default());
        let (queue, _) = seat(&gate);
        queue.go_out();
        gate.pause(SOON).expect("paused");
        drop(gate.close_for_change(SOON).expect("closed"));
        assert!(queue.is_paused() && !queue.go_in());
        let change = gate.close_for_change(SOON).expect("closed");
        gate.resume();
        assert!(queue.is_shut() && !queue.is_paused() && !queue.go_in());
        drop(change);
        assert!(queue.go_in());
        assert!(gate.close_for_change(SOON).is_err() && !queue.is_shut(), "it has the disk");
    }

    #[test]
    fn it_opens_again_if_requests_do_not_end() {
        let gate = Arc::new(Gate::default());
        let (busy, calls) = seat(&gate);
        assert_eq!(gate.pause(SOON), Err(NotClosed::Busy { waited: SOON }));
        assert!(!busy.is_shut() && calls.load(Ordering::Relaxed) == 2, "it is called to come back");
        drop(busy);
        assert_eq!(gate.pause(SOON), Ok(()), "a queue that is gone has nothing in flight");
        let (late, _) = seat(&gate);
        assert!(late.is_paused() && gate.pause(SOON).is_err(), "it has the disk at first");
    }

    #[test]
    fn a_pause_ends_if_the_disk_is_resumed_meanwhile() {
        let gate = Arc::new(Gate::default());
        let (_busy, calls) = seat(&gate);
        let closing = {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || gate.pause(PATIENCE))
        };
        while calls.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        gate.resume();
        assert_eq!(closing.join().expect("no panic"), Err(NotClosed::Opened));
    }
}
