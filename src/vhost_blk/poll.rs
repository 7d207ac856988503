//! How long a worker that has nothing to do keeps looking before it sleeps.
//!
//! Pure arithmetic on durations, no clock of its own. Looking is worth its processor time only if work tends to come
//! within about the time that a sleep and a wake-up cost.

use std::time::Duration;

/// The first step up from not looking at all.
const FIRST: Duration = Duration::from_micros(6);
/// Below this there is no point.
const LEAST: Duration = Duration::from_micros(3);

/// The time to look before sleeping. It doubles when the worker was woken soon after it gave up, and halves when the
/// sleep was long: an idle queue soon costs nothing at all.
#[derive(Clone, Debug)]
pub(crate) struct PollBudget {
    most: Duration,
    now: Duration,
}

impl PollBudget {
    pub(crate) fn new(most: Duration) -> Self {
        PollBudget { most, now: FIRST.min(most) }
    }

    /// How long to look.
    pub(crate) fn get(&self) -> Duration {
        self.now
    }

    /// The worker looked in vain, slept, and was woken `idle` after it had begun to look.
    pub(crate) fn slept(&mut self, idle: Duration) {
        // The sleep and the wake-up are a good part of it, and looking saves them.
        self.now = if idle <= 2 * self.most {
            (self.now * 2).clamp(FIRST, self.most.max(FIRST)).min(self.most)
        } else if self.now / 2 < LEAST {
            Duration::ZERO
        } else {
            self.now / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_raise_it_and_long_ones_end_it() {
        let most = Duration::from_micros(50);
        let mut budget = PollBudget::new(most);
        for _ in 0..10 {
            budget.slept(Duration::from_micros(20));
            assert!(budget.get() <= most);
        }
        assert_eq!(budget.get(), most);
        for _ in 0..10 {
            budget.slept(Duration::from_millis(5));
        }
        assert_eq!(budget.get(), Duration::ZERO);
        budget.slept(Duration::from_micros(20));
        assert_eq!(budget.get(), FIRST);
    }

    #[test]
    fn it_can_be_turned_off() {
        let mut budget = PollBudget::new(Duration::ZERO);
        budget.slept(Duration::ZERO);
        budget.slept(Duration::from_secs(1));
        assert_eq!(budget.get(), Duration::ZERO);
    }
}
