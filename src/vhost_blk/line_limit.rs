//! A limit for lines of the log that a guest or a stranger can cause as often as it likes.
//!
//! Owns the count, and never logs.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Admits a number of lines in each period.
#[derive(Debug)]
pub(crate) struct LineLimit {
    most: u32,
    period: Duration,
    /// A leaf.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The begin of the present period, once there was a line.
    began: Option<Instant>,
    /// Lines admitted in it.
    admitted: u32,
}

impl LineLimit {
    /// At most `most` lines in each `period`.
    pub fn new(most: u32, period: Duration) -> Self {
        LineLimit { most, period, state: Mutex::default() }
    }

    /// Whether a line may be logged now.
    pub fn admits(&self, now: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.began.is_none_or(|began| now.saturating_duration_since(began) >= self.period) {
            *state = State { began: Some(now), admitted: 0 };
        }
        let admits = state.admitted < self.most;
        state.admitted += u32::from(admits);
        admits
    }
}

/// The lines of a session that its guest can cause, each kind with a limit of its own.
#[derive(Debug)]
pub(crate) struct SessionLines {
    /// A message was refused.
    pub refusals: LineLimit,
    /// Other features are in force.
    pub features: LineLimit,
    /// A ring is corrupt.
    pub corrupt: LineLimit,
    /// The flush of a stopping queue failed.
    pub flushes: LineLimit,
}

impl Default for SessionLines {
    fn default() -> Self {
        let limit = || LineLimit::new(16, Duration::from_secs(10));
        SessionLines { refusals: limit(), features: limit(), corrupt: limit(), flushes: limit() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_period_admits_so_many_lines() {
        let (now, period) = (Instant::now(), Duration::from_secs(1));
        let limit = LineLimit::new(2, period);
        assert_eq!([now; 4].map(|at| limit.admits(at)), [true, true, false, false]);
        assert!(!limit.admits(now + period / 2));
        assert_eq!([now + period; 3].map(|at| limit.admits(at)), [true, true, false]);
    }
}
