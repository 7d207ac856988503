//! How a worker backs off from kicks that bring nothing: a flood of them, or a kick descriptor that is always readable.
//!
//! Pure arithmetic, without a clock. While a worker backs off, its queue does not heed kicks, but completions and the
//! session wake it at once. After each pause it looks at the ring, so no chain waits for longer than a pause.

use std::time::Duration;

/// So many kicks in a row may bring nothing. More is no accident.
const VAIN_MAX: u32 = 64;
/// The first pause, and the longest; each is twice the one before.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(10);

/// Counts kicks that come without a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    /// Kicks without a chain since the last chain.
    vain: u32,
    /// The next pause is due before kicks are heeded again.
    due: bool,
    pause: Duration,
}

impl Pace {
    /// A chain was taken.
    pub(crate) fn chain(&mut self) {
        *self = Pace::default();
    }

    /// A kick brought no chain.
    pub(crate) fn vain(&mut self) {
        self.vain = self.vain.saturating_add(1);
        self.due = self.vain > VAIN_MAX;
    }

    /// True if no kick came without a request since the last chain.
    pub(crate) fn is_fresh(&self) -> bool {
        self.vain == 0
    }

    /// True if the last kicks all came without a request, and were too many.
    pub(crate) fn is_slow(&self) -> bool {
        self.vain > VAIN_MAX
    }

    /// How long to heed no kick now.
    pub(crate) fn pause(&mut self) -> Option<Duration> {
        if !std::mem::take(&mut self.due) {
            return None;
        }
        self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        Some(self.pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_with_a_chain() {
        let mut pace = Pace::default();
        for _ in 0..VAIN_MAX {
            pace.vain();
            assert_eq!(pace.pause(), None);
        }
        let mut pauses = Vec::new();
        for _ in 0..6 {
            pace.vain();
            pauses.extend(pace.pause().map(|pause| pause.as_millis()));
            assert_eq!(pace.pause(), None, "kicks are heeded between two pauses");
        }
        assert_eq!(pauses, [1, 2, 4, 8, 10, 10]);
        assert!(pace.is_slow());
        pace.chain();
        pace.vain();
        assert_eq!(pace.pause(), None);
        assert!(!pace.is_slow());
    }
}
