//! How many chains a worker takes before it hands back completed ones.
//!
//! Pure arithmetic on counts and durations. Some disks carry requests out in the same poll that starts them (a file in
//! memory, the page cache). They get few at a time, so that the guest handles the first while the worker handles the
//! next. Any other disk gets enough for one system call, and begins with them while the worker takes the rest.

use std::time::Duration;

use crate::bounds::{PORTION_MOST as MOST, PORTION_STARTED as STARTED};

/// How long a portion that the disk carries out at once should take.
const SPAN: Duration = Duration::from_micros(15);

/// The number of chains to take next.
#[derive(Clone, Debug)]
pub(crate) struct Portion {
    now: u16,
}

impl Portion {
    pub(crate) fn new() -> Self {
        Portion { now: STARTED }
    }

    /// The number of chains, at least 1.
    pub(crate) fn get(&self) -> u16 {
        self.now
    }

    /// A portion of `taken` chains went to the disk, `done` of them were done by the end of its poll, all within
    /// `time`.
    pub(crate) fn over(&mut self, taken: u16, done: usize, time: Duration) {
        self.now = if done * 2 < usize::from(taken) {
            STARTED
        } else {
            let fit = SPAN.as_nanos() * u128::from(taken) / time.as_nanos().max(1);
            fit.clamp(1, u128::from(MOST)) as u16
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_answers_at_once_gets_few_at_a_time() {
        let mut portion = Portion::new();
        assert_eq!(portion.get(), STARTED);
        portion.over(32, 32, Duration::from_micros(32));
        assert_eq!(portion.get(), 15.min(MOST));
        portion.over(15, 15, Duration::from_millis(3));
        assert_eq!(portion.get(), 1, "long ones are handed back one by one");
        portion.over(1, 1, Duration::ZERO);
        assert_eq!(portion.get(), MOST, "a clock that stands still says nothing");
    }

    #[test]
    fn a_disk_that_takes_its_time_gets_some() {
        let mut portion = Portion::new();
        portion.over(8, 8, Duration::from_micros(80));
        assert_eq!(portion.get(), 1);
        portion.over(1, 0, Duration::from_micros(2));
        assert_eq!(portion.get(), STARTED);
        portion.over(10, 4, Duration::from_micros(20));
        assert_eq!(portion.get(), STARTED, "a few that were over at once are no sign");
    }
}
