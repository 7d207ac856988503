//! Shows other threads what a server is doing, and whether its threads get on.
//!
//! Each thread counts its steps: the session's thread handles one message in a step, a worker does the work between two
//! looks at its command. A thread that waits for others is in no step. Relaxed: the counts order nothing.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// What a server is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits for a frontend.
    Waiting,
    /// It serves a frontend.
    Attached,
    /// A session has ended, and its requests are being finished.
    Draining,
}

type Tell = Box<dyn Fn(Stage) + Send + Sync>;

/// The steps of a server's threads.
pub struct Pulse {
    pub(crate) session: Beat,
    queues: Vec<Beat>,
    tell: Tell,
}

impl Pulse {
    /// For at least as many queues as the server has. `tell` is called on the session's thread at each new stage.
    pub fn new(num_queues: u16, tell: impl Fn(Stage) + Send + Sync + 'static) -> Self {
        let queues = (0..num_queues).map(|_| Beat::default()).collect();
        Pulse { session: Beat::default(), queues, tell: Box::new(tell) }
    }

    /// The step that each thread is in, if any: the session's thread first, then the worker of each queue. Two steps of a
    /// thread have two numbers.
    pub fn steps(&self) -> Vec<Option<u32>> {
        std::iter::once(&self.session).chain(&self.queues).map(Beat::now).collect()
    }

    pub(crate) fn queues(&self) -> usize {
        self.queues.len()
    }

    pub(crate) fn queue(&self, index: u16) -> &Beat {
        &self.queues[usize::from(index)]
    }

    pub(crate) fn tell(&self, stage: Stage) {
        (self.tell)(stage);
    }
}

impl fmt::Debug for Pulse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pulse").field("steps", &self.steps()).finish_non_exhaustive()
    }
}

/// A thread's count: odd in a step. Only that thread stores it.
#[derive(Debug, Default)]
pub(crate) struct Beat(AtomicU32);

impl Beat {
    /// A step begins, and the one before has ended.
    pub(crate) fn step(&self) {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before.wrapping_add(1) | 1, Ordering::Relaxed);
    }

    /// The step has ended; the thread waits, or has left.
    pub(crate) fn rest(&self) {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before.wrapping_add(before & 1), Ordering::Relaxed);
    }

    /// The thread begins to wait for others. True if that interrupts a step, which goes on after the wait.
    pub(crate) fn pause(&self) -> bool {
        let in_step = self.now().is_some();
        self.rest();
        in_step
    }

    fn now(&self) -> Option<u32> {
        Some(self.0.load(Ordering::Relaxed)).filter(|count| count % 2 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_distinguished_from_each_other_and_from_rest() {
        let pulse = Pulse::new(2, |_| {});
        assert_eq!(pulse.steps(), [None; 3]);
        let beat = pulse.queue(1);
        beat.step();
        let first = pulse.steps();
        assert!(first[2].is_some() && first[..2] == [None; 2]);
        assert_eq!(pulse.steps(), first);
        beat.step();
        let second = pulse.steps();
        assert!(second[2].is_some() && second != first);
        beat.rest();
        beat.rest();
        assert_eq!(pulse.steps(), [None; 3]);
        beat.step();
        let third = pulse.steps()[2];
        assert!(third.is_some() && third != second[2] && third != first[2]);
    }
}
