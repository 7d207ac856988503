//! The log of failed requests: the guest gets no reason, the log does.
//!
//! Once some requests fail, the guest decides how many do, and must not fill the host's disk with log lines. So the
//! number of lines in a period is bounded; other failures are only counted. Has no clock of its own.

use std::cell::Cell;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::error::RequestError;
use block::RequestId;

/// The most lines in a period.
const LINES_MAX: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

/// The failures that one thread has logged.
#[derive(Default)]
pub(crate) struct FailureLog {
    /// When the period began.
    began: Cell<Option<Instant>>,
    /// Lines in it.
    lines: Cell<u32>,
    /// Failures since the last line.
    unlogged: Cell<u64>,
}

impl FailureLog {
    /// Records the result of a request.
    pub fn note(&self, id: RequestId, result: &Result<(), RequestError>, now: impl FnOnce() -> Instant) {
        let Err(error) = result else { return };
        match self.line(now()) {
            Some(0) => warn!(request = id.0, %error, "a request failed"),
            Some(unlogged) => {
                warn!(request = id.0, %error, unlogged, "a request failed; failures before it were not logged");
            }
            None => {}
        }
    }

    /// Whether another line is due; if so, the number of failures before it that were not logged.
    fn line(&self, now: Instant) -> Option<u64> {
        if self.began.get().is_none_or(|began| now.duration_since(began) >= PERIOD) {
            self.began.set(Some(now));
            self.lines.set(0);
        }
        if self.lines.get() == LINES_MAX {
            self.unlogged.set(self.unlogged.get() + 1);
            return None;
        }
        self.lines.set(self.lines.get() + 1);
        Some(self.unlogged.take())
    }
}

impl Drop for FailureLog {
    fn drop(&mut self) {
        let unlogged = self.unlogged.get();
        if unlogged > 0 {
            warn!(unlogged, "requests failed and were not logged");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_beyond_the_bound_are_counted_and_not_logged() {
        let log = FailureLog::default();
        let start = Instant::now();
        for _ in 0..LINES_MAX {
            assert_eq!(log.line(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(log.line(start + PERIOD / 2), None);
        }
        assert_eq!(log.line(start + PERIOD), Some(1000));
        assert_eq!(log.line(start + PERIOD), Some(0));
    }
}
