//! How long a worker with nothing to do polls before it sleeps.
//!
//! Pure arithmetic on durations, without a clock of its own. Polling is worth its processor time only if work tends to
//! arrive within about the time that a sleep and a wake-up cost.

use std::time::Duration;

/// The first step up from no polling.
const FIRST: Duration = Duration::from_micros(6);
/// A shorter poll is pointless.
const LEAST: Duration = Duration::from_micros(3);
/// After so many sleeps in a row, poll once for the longest time. Where wake-ups are slow (a guest as host, a busy
/// host), a sleep is long even if work arrived soon. Only polling reveals that.
const TRIAL_AFTER: u32 = 16;
/// After so many longest polls in a row that just missed their work, polling does not pay.
const VAIN_MAX: u32 = 4;

/// The time to poll before sleeping. It doubles when the worker was woken soon after polling, and halves when the sleep
/// was long: an idle queue soon costs next to nothing. Polls that keep failing stop too: for a disk that takes twice
/// the longest poll, the worker polls only now and then.
#[derive(Clone, Debug)]
pub(crate) struct PollBudget {
    most: Duration,
    now: Duration,
    /// Sleeps since polling last found something, or was last tried.
    sleeps: u32,
    /// Longest polls since polling last found something, after which work came soon.
    vain: u32,
}

impl PollBudget {
    pub(crate) fn new(most: Duration) -> Self {
        PollBudget { most, now: FIRST.min(most), sleeps: 0, vain: 0 }
    }

    /// How long to poll.
    pub(crate) fn get(&self) -> Duration {
        if self.sleeps == TRIAL_AFTER { self.most } else { self.now }
    }

    /// Polling found something after that time.
    pub(crate) fn found(&mut self, after: Duration) {
        (self.sleeps, self.vain) = (0, 0);
        self.now = self.now.max((after * 2).clamp(FIRST, self.most.max(FIRST)).min(self.most));
    }

    /// A poll found nothing, the worker slept, and was woken `idle` after the poll began.
    pub(crate) fn slept(&mut self, idle: Duration) {
        let soon = idle <= 2 * self.most;
        self.vain = (self.vain + u32::from(soon && self.get() == self.most)).min(VAIN_MAX);
        self.sleeps = if self.sleeps == TRIAL_AFTER { 0 } else { self.sleeps + 1 };
        // The sleep and the wake-up are a good part of `idle`, and polling saves them.
        self.now = if self.vain == VAIN_MAX {
            Duration::ZERO
        } else if soon {
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
        for _ in 0..5 {
            budget.slept(Duration::from_micros(60));
            assert!(budget.get() <= most);
        }
        assert_eq!(budget.get(), most);
        for _ in 0..(3 * TRIAL_AFTER + 5) {
            budget.slept(Duration::from_millis(5));
        }
        assert_eq!(budget.get(), Duration::ZERO);
        budget.slept(Duration::from_micros(20));
        assert_eq!(budget.get(), FIRST);
    }

    #[test]
    fn polling_is_tried_again_where_wakes_are_slow() {
        let most = Duration::from_micros(50);
        let mut budget = PollBudget::new(most);
        let mut looked = Duration::ZERO;
        for _ in 0..100 {
            budget.slept(Duration::from_millis(1));
            looked += budget.get();
        }
        assert!(looked >= 4 * most && looked <= 7 * most, "a trial now and then, and no more: {looked:?}");
        while budget.get() < most {
            budget.slept(Duration::from_millis(1));
        }
        budget.found(Duration::from_micros(20));
        assert_eq!(budget.get(), Duration::from_micros(40), "what was found is looked for again");
        budget.found(Duration::from_micros(49));
        assert_eq!(budget.get(), most);
        budget.found(Duration::from_micros(1));
        assert_eq!(budget.get(), most, "one that came at once says nothing of the next");
    }

    #[test]
    fn polling_stops_where_work_always_comes_too_late() {
        let most = Duration::from_micros(100);
        let late = Duration::from_micros(150);
        let mut budget = PollBudget::new(most);
        let mut looked = Duration::ZERO;
        for _ in 0..1000 {
            looked += budget.get();
            budget.slept(late);
        }
        assert!(looked <= 1000 * late / 20, "a look in a while: {looked:?} of {:?}", 1000 * late);
        while budget.get() == Duration::ZERO {
            budget.slept(late);
        }
        budget.found(Duration::from_micros(60));
        assert_eq!(budget.get(), most, "it came sooner, and is looked for again");
        for _ in 0..100 {
            // Half of the polls find something: that is worth it.
            budget.slept(late);
            budget.found(Duration::from_micros(60));
            assert_eq!(budget.get(), most);
        }
    }

    #[test]
    fn it_can_be_turned_off() {
        let mut budget = PollBudget::new(Duration::ZERO);
        budget.found(Duration::from_micros(1));
        budget.slept(Duration::ZERO);
        budget.slept(Duration::from_secs(1));
        assert_eq!(budget.get(), Duration::ZERO);
    }
}
